"""Answer the records of files: `hrm-lm predict --input questions.jsonl --output answers`, over all of a cluster.

The work is in `hrm_lm.predict.pipeline`.
"""

import argparse
import sys
from collections.abc import Sequence

from hrm_lm.cluster.run_folder import outliving
from hrm_lm.commands.flags import (
    add_checkpoint_flags,
    add_sampling_flags,
    check_cycles,
    check_positive,
    sampling_of,
)
from hrm_lm.data.records import parse_mapping
from hrm_lm.errors import UserError
from hrm_lm.filesystem import resolve, without_secrets
from hrm_lm.inference.choice import chosen_cycles, find_checkpoint
from hrm_lm.prepare.reading import find_files
from hrm_lm.prepare.report import describe


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="hrm-lm predict",
        description="Answer the records of JSONL, Parquet and CSV files. The output has the records in their order, each with "
        "all its fields and its answer. A killed command, given again, goes on.",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, folders, URIs or hf: datasets"
    )
    parser.add_argument("--output", required=True, metavar="PATH", help="folder or URI, new or begun by this command")
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--prompt_field",
        default="prompt",
        help="the prompt's field (question, data.question), or a template of the prompt ('{question} Context: {context}'); "
        "a list of messages there is a conversation (default: prompt, else the conversation in messages)",
    )
    parser.add_argument(
        "--response_field",
        default="response",
        help="the field that gets the answer, in place of what is there; NAME_score and NAME_error come beside it, and NAMEs "
        "with several answers (default: response)",
    )
    parser.add_argument("--format", choices=("jsonl", "parquet"), help="of the output (default: that of the input)")
    parser.add_argument(
        "--n", type=int, default=1, help="answers to each record; the likeliest is the answer (default: 1)"
    )
    add_sampling_flags(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="answers at a time, of a worker (default: 64)")
    parser.add_argument(
        "--num_workers", type=int, help="at most so many (default: one for each GPU, else for each CPU)"
    )
    parser.add_argument("--strict", action="store_true", help="the first record that cannot be answered is an error")
    args = parser.parse_args(argv)
    check_cycles(args)
    check_positive(args, "n", "batch_size", "num_workers")
    sampling = sampling_of(args)
    if args.n > 1 and not args.temperature:
        raise UserError(f"--n {args.n} would give the same answer every time; give a --temperature above 0, too")
    parse_mapping("--prompt_field", args.prompt_field)
    output = outliving(args.output, "--output")
    fs, folder = resolve(output)
    files = [
        (file, mtime)
        for file, mtime in find_files(args.input)
        if file.format != "text" and not file.path.startswith(f"{folder}/part-")  # the output may be within the input
    ]
    if not files:
        raise UserError("--input: records are read from JSONL, Parquet and CSV, and there is no such file")
    has_other = any(file.format not in ("parquet", "hub") for file, _ in files)

    checkpoint_fs, path = find_checkpoint(args.checkpoint, args.run_name, args.save_dir)

    from hrm_lm.predict.pipeline import predict
    from hrm_lm.predict.tasks import Job, Settings
    from hrm_lm.training.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path, checkpoint_fs)
    model = checkpoint.config.model
    settings = Settings(
        prompt_field=args.prompt_field,
        response_field=args.response_field,
        format=args.format or ("jsonl" if has_other else "parquet"),
        n=args.n,
        cycles=chosen_cycles(checkpoint.config, args.h_cycles, args.l_cycles),
        **sampling | {"max_new_tokens": args.max_new_tokens or model.max_response_len},
    )
    job = Job(
        settings=settings,
        files=[file for file, _ in files],
        fs=fs,
        output=folder,
        checkpoint=path,
        checkpoint_fs=checkpoint_fs,
        batch_size=args.batch_size,
        strict=args.strict,
    )
    report = predict(job, output, checkpoint, [mtime for _, mtime in files], args.num_workers)
    if report["problems"]:
        print(f"without an answer: {describe(report['problems'])}", file=sys.stderr)
    if report["replaced"]:
        own = f"{report['replaced']:,} records had a field {args.response_field!r} of their own"
        print(f"{own}, which holds the answer now; --response_field names another", file=sys.stderr)
    print(
        f"{report['answered']:,} of {report['records']:,} records answered in {without_secrets(output)}; "
        f"{report['tokens']:,} tokens, {report['tokens_per_s']:,.0f} tokens/s a worker (_report.json)"
    )
    return 0
