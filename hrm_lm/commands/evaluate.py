"""Score a checkpoint on held-out samples: `hrm-lm evaluate [--h_cycles 4]` prints JSON."""

import argparse
import json
from collections.abc import Sequence

from hrm_lm.commands.flags import add_checkpoint_flags, add_set, check_cycles
from hrm_lm.config import parse_set
from hrm_lm.errors import UserError
from hrm_lm.inference.evaluate import evaluate
from hrm_lm.inference.generate import chosen_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hrm-lm evaluate", description=__doc__)
    add_checkpoint_flags(parser)
    parser.add_argument("--dataset", help="score the validation split of this dataset, not the checkpoint's own")
    parser.add_argument("--batch_size", type=int, default=256, help="samples at a time (default: %(default)s)")
    add_set(parser, "a field of the checkpoint's config")
    args = parser.parse_args(argv)
    check_cycles(args)
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}")

    overrides = ({"data.dataset": args.dataset} if args.dataset else {}) | parse_set(args.set)
    with chosen_checkpoint(args.checkpoint, args.run_name, args.save_dir) as folder:
        scores = evaluate(folder, overrides, args.batch_size, args.h_cycles, args.l_cycles)
    print(json.dumps(scores))
    return 0
