"""A corpus to a prepared dataset: `hrm-lm prepare --input PATH --output PATH --tokenizer characters`.

`--sources YAML` in place of `--input` names several sources. Give the output to the trainer as `--dataset`. The work is in `hrm_lm.prepare.pipeline`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

from hrm_lm.cluster.run_folder import outliving
from hrm_lm.commands.help import field_docs
from hrm_lm.errors import UserError
from hrm_lm.filesystem import without_secrets
from hrm_lm.prepare.pipeline import prepare
from hrm_lm.prepare.recipe import read_recipe
from hrm_lm.prepare.report import describe
from hrm_lm.prepare.tasks import Settings

POSITIVE = ("vocab_size", "text_prompt_chars", "text_response_chars", "max_prompt_len", "max_response_len", "shard_mb")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="hrm-lm prepare",
        description="Tokenize JSONL, Parquet, CSV and plain text into a dataset for the trainer. "
        "A killed command, given again, finishes what is left.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--input", nargs="+", metavar="PATH", help="files, folders, URIs or datasets of the Hub (hf:NAME)"
    )
    which.add_argument(
        "--sources",
        metavar="YAML",
        help="a file or URI that names sources, each with its fields, condition, cap and repetition",
    )
    parser.add_argument("--output", required=True, metavar="PATH", help="folder or URI, new or begun by this command")
    docs = field_docs(Settings)
    for field in fields(Settings):
        kind = (get_args(field.type) or [field.type])[0]  # of `int | None`, int
        default = "" if field.default is None else f" (default: {field.default})"
        text = docs[field.name].replace("%", "%%") + default
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    parser.add_argument("--strict", action="store_true", help="the first fault of the input is an error")
    args = vars(parser.parse_args(argv))
    settings = Settings(**{field.name: args[field.name] for field in fields(Settings)})
    for name in POSITIVE:
        if (value := getattr(settings, name)) is not None and not 0 < value < 2**31:
            raise UserError(f"--{name} must be more than 0 and less than 2^31, not {value}")
    if not 0 < settings.val_fraction < 1:
        raise UserError(f"--val_fraction must be between 0 and 1, not {settings.val_fraction}")
    if settings.train_tokenizer not in (None, "bpe"):
        raise UserError(f"--train_tokenizer {settings.train_tokenizer}: only bpe can be trained")

    output = outliving(args["output"], "--output")
    recipe = read_recipe(args["sources"]) if args["sources"] else None
    report = prepare(settings, args["input"] or [], output, args["strict"], recipe)
    for name, counts in report.get("sources", {}).items():
        print(f"{name}: {', '.join(f'{what} {count:,}' for what, count in counts.items())}", file=sys.stderr)
    if report["dropped"]:
        print(f"left out: {describe(report['dropped'])}", file=sys.stderr)
    print(
        f"{report['train']:,} training and {report['val']:,} validation pairs in {without_secrets(output)}; "
        f"{report['duplicates']:,} duplicates, {sum(drop['count'] for drop in report['dropped'].values()):,} left out (report.json)"
    )
    return 0
