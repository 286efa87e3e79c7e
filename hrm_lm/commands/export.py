"""Checkpoint -> Transformers folder, with a model card: `hrm-lm export --checkpoint PATH --output DIR`.

With `--output FILE.gguf` -> a file for llama.cpp.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hrm_lm.errors import UserError
from hrm_lm.filesystem import local_copy, resolve
from hrm_lm.inference.choice import find_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hrm-lm export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint folder or URI")
    parser.add_argument("--output", required=True, metavar="DIR|FILE.gguf", help="folder or file to be made")
    parser.add_argument(
        "--results",
        nargs="+",
        metavar="JSON",
        help="results for the model card, as evaluate and lm_eval write them (default: the evaluations of this checkpoint "
        "in its run's folder)",
    )
    args = parser.parse_args(argv)
    output = Path(args.output)
    as_gguf = output.suffix.lower() == ".gguf"
    if as_gguf and args.results:
        raise UserError("--results: a .gguf file has no model card; leave it out")
    fs, path = find_checkpoint(args.checkpoint, None, None)

    from hrm_lm.interop.card import find_results, read_results
    from hrm_lm.interop.export import export
    from hrm_lm.interop.gguf import export_gguf

    with local_copy(path, fs) as folder:
        if as_gguf:
            export_gguf(folder, output)
        else:
            results = [read_results(*resolve(location)) for location in args.results or []]
            export(folder, output, results or find_results(fs, path))
    print(args.output)
    return 0
