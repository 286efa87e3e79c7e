"""Score a checkpoint: `hrm-lm evaluate [--tasks file.jsonl,reasoning_gym:chain_sum] [--h_cycles 1,2,4]` prints JSON.

Without --tasks it is scored on the validation split of its own dataset. `python -m ray_jobs.evaluate` spreads the work over
all of a cluster.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from hrm_lm.commands.flags import add_checkpoint_flags, add_set, check_cycles
from hrm_lm.config import parse_set
from hrm_lm.errors import UserError
from hrm_lm.filesystem import local_copy, shown
from hrm_lm.inference.choice import find_checkpoint


def main(argv: Sequence[str] | None = None, workers: int | None = None) -> int:
    """workers: what `--num_workers` is when it is not given; None: this process does all."""
    parser = argparse.ArgumentParser(prog="hrm-lm evaluate", description=__doc__)
    add_checkpoint_flags(parser, several_cycles=True)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="files of records, datasets as --dataset names them, a suite's .yaml; with commas or spaces between them, and "
        "options behind each, such as file.jsonl,metric=number,limit=100",
    )
    parser.add_argument("--dataset", help="score the validation split of this dataset, not the checkpoint's own")
    parser.add_argument("--output", metavar="PATH", help="folder or URI for the results (default: in the run's folder)")
    parser.add_argument("--batch_size", type=int, default=256, help="samples at a time (default: %(default)s)")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=workers,
        help="workers on a cluster, 0 for as many as it has room for (default: "
        f"{'this process does all' if workers is None else workers})",
    )
    add_set(parser, "a field of the checkpoint's config")
    args = parser.parse_args(argv)
    check_cycles(args)
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.tasks and args.dataset:
        raise UserError("--tasks and --dataset: give one of them; --tasks takes datasets, too")

    overrides = ({"data.dataset": args.dataset} if args.dataset else {}) | parse_set(args.set)
    fs, path = find_checkpoint(args.checkpoint, args.run_name, args.save_dir)

    from hrm_lm.evaluation.output import begun
    from hrm_lm.evaluation.results import documents, table
    from hrm_lm.inference.evaluate import evaluate

    with local_copy(path, fs) as folder, begun(args.output, None if args.checkpoint else (fs, path)) as output:
        evaluation = evaluate(
            folder, overrides, args.tasks, args.batch_size, args.h_cycles, args.l_cycles, args.num_workers,
            shown=shown(fs, path),
        )  # fmt: skip
        output.write(evaluation)
    print(table(evaluation), file=sys.stderr)
    print(json.dumps(documents(evaluation)), flush=True)
    # At the end, where it is not lost before the long line of JSON.
    print(f"results, samples and report.html in {output.uri}", file=sys.stderr)
    return 0
