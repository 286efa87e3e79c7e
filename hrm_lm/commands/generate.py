"""Ask a checkpoint: `hrm-lm generate --prompt "What is 12 + 7?"` prints the answer alone."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hrm_lm.commands.flags import add_checkpoint_flags, add_sampling_flags, check_cycles, sampling_of
from hrm_lm.errors import UserError
from hrm_lm.inference.choice import chosen_checkpoint, chosen_cycles
from hrm_lm.parsing import parse_json


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="hrm-lm generate",
        description="Answer prompts; the answers, a line each, are all that goes to standard output.",
    )
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; repeatable")
    parser.add_argument(
        "--prompts_file",
        metavar="FILE",
        help="more prompts, a line each; of a .jsonl file the field `prompt` of each, and answers are then JSON strings",
    )
    add_checkpoint_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--dataset", help="accepted for the guide's sake: the checkpoint brings its tokenizer")
    args = parser.parse_args(argv)
    check_cycles(args)
    sampling = sampling_of(args)

    prompts, as_json = list(args.prompt), bool(args.prompts_file) and args.prompts_file.endswith(".jsonl")
    if args.prompts_file:
        prompts += read_prompts(args.prompts_file, as_json)
    if not prompts:
        raise UserError('nothing to answer: give --prompt "What is 12 + 7?" or --prompts_file FILE')

    with chosen_checkpoint(args.checkpoint, args.run_name, args.save_dir) as folder:
        import torch

        from hrm_lm.inference.generate import generate
        from hrm_lm.models.contract import EvalOptions
        from hrm_lm.training.checkpoint import load_model

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer, checkpoint = load_model(folder, device)
    options = EvalOptions(cycles=chosen_cycles(checkpoint.config, args.h_cycles, args.l_cycles))
    for answer in generate(model, tokenizer, prompts, options, **sampling):
        print(json.dumps(answer, ensure_ascii=False) if as_json else answer)
    return 0


def read_prompts(file: str, as_json: bool) -> list[str]:
    """The lines that are not blank; `as_json`: the field `prompt` of each."""
    try:
        # splitlines would also cut at U+2028 and the like, which stand within a line.
        lines = enumerate(Path(file).read_text(encoding="utf-8").split("\n"), start=1)
        texts = {number: line for number, line in lines if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file: {file} cannot be read: {error}") from None
    if not as_json:
        return list(texts.values())
    prompts = []
    for number, line in texts.items():
        try:
            prompts.append(str(parse_json(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--prompts_file: {file}:{number}: not a JSON object with a field 'prompt'") from None
    return prompts
