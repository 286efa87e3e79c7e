"""Checkpoint -> Transformers folder: `hrm-lm export --checkpoint PATH --output DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hrm_lm.filesystem import local_copy
from hrm_lm.interop.export import export


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hrm-lm export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint folder or URI")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to be made")
    args = parser.parse_args(argv)
    with local_copy(args.checkpoint) as folder:
        export(folder, Path(args.output))
    print(args.output)
    return 0
