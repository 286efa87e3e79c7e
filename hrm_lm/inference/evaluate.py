"""Score a checkpoint on held-out samples: `python -m hrm_lm.inference.evaluate [--h_cycles 4]` prints JSON."""

import argparse
import json
import sys
from typing import Sequence

import torch

from hrm_lm.cli import run_command
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import add_checkpoint_flags, check_cycles, chosen_checkpoint
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.validation import validate


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hrm_lm.inference.evaluate", description=__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--dataset", help="another dataset than the checkpoint's own")
    parser.add_argument("--batch_size", type=int, default=256)
    args = parser.parse_args(argv)
    check_cycles(args)
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with chosen_checkpoint(args.checkpoint, args.run_name, args.save_dir) as folder:
        model, tokenizer, checkpoint = load_model(folder, device)
        config = checkpoint.config
        data = config.data
        if args.dataset:
            other = {"dataset": args.dataset, "mixture": {}, "tokenizer": str(folder / "tokenizer.json")}
            data = data.model_copy(update=other)
        splits = load_dataset(data, config.model, config.train.seed)
    if args.h_cycles and model.core is None:
        raise UserError("this model was trained with h_cycles 0: it has no HRM core to cycle")
    if splits.tokenizer.to_json() != tokenizer.to_json():
        raise UserError(f"{data.dataset}: needs another tokenizer than the checkpoint's")
    scores = validate(model, splits, args.batch_size, h_cycles=args.h_cycles, l_cycles=args.l_cycles)
    print(json.dumps({"step": checkpoint.progress.step, **scores}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
