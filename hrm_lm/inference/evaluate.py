"""Score a checkpoint on held-out samples: `python -m hrm_lm.inference.evaluate [--h_cycles 4]` prints JSON."""

import argparse
import json
import sys
from typing import Sequence

import torch

from hrm_lm.cli import run_command
from hrm_lm.config import parse_config, parse_set, set_dotted
from hrm_lm.data.registry import is_function, load_dataset
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import add_checkpoint_flags, check_cycles, chosen_checkpoint, chosen_cycles
from hrm_lm.models.contract import EvalOptions
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.validation import validate


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hrm_lm.inference.evaluate", description=__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--dataset", help="score the validation split of this one, not the checkpoint's own")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a field of the checkpoint's config; repeatable",
    )
    args = parser.parse_args(argv)
    check_cycles(args)
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with chosen_checkpoint(args.checkpoint, args.run_name, args.save_dir) as folder:
        model, _, checkpoint = load_model(folder, device)
        raw = checkpoint.config.to_dict()
        if args.dataset:
            raw["data"] |= {"dataset": args.dataset, "mixture": {}}
        for dotted, value in parse_set(args.set).items():
            set_dotted(raw, dotted, value)
        set_dotted(raw, "data.tokenizer", str(folder / "tokenizer.json"))
        config = parse_config(raw, source="the checkpoint's config")
        names = [config.data.dataset, *(part.dataset for part in config.data.mixture.values())]
        code = [name for name in names if name and is_function(name)]
        if code and not args.dataset:
            raise UserError(f"the checkpoint's dataset is code, {code[0]}: give --dataset {code[0]} to run it")
        splits = load_dataset(config.data, config.model, config.train.seed)
    if args.h_cycles and model.core is None:
        raise UserError("this model was trained with h_cycles 0: it has no HRM core to cycle")
    precision = config.train.mixed_precision
    if precision == "fp16" and device.type != "cuda":
        precision = "none"  # fp16 is CUDA's alone
    cycles = chosen_cycles(args, config.model.hrm)
    options = EvalOptions.of(config, cycles=cycles, batch_size=args.batch_size, mixed_precision=precision)
    scores = validate(model, splits, options)
    print(json.dumps({"step": checkpoint.progress.step, "samples": len(splits.val), **scores}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
