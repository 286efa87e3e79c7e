"""Ask a checkpoint: `hrm-lm generate --prompt "What is 12 + 7?"` prints the answer alone."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from hrm_lm.commands.flags import add_checkpoint_flags, check_cycles
from hrm_lm.config import MOST_TOKENS
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import chosen_checkpoint, chosen_cycles, generate
from hrm_lm.models.contract import EvalOptions
from hrm_lm.parsing import parse_json
from hrm_lm.training.checkpoint import load_model


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
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: the model's max_response_len)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top_k", type=int, help="sample from the likeliest so many tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--dataset", help="accepted for the guide's sake: the checkpoint brings its tokenizer")
    args = parser.parse_args(argv)
    check_cycles(args)
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature must be at least 0, not {args.temperature}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and less than 2^63, not {args.seed}")
    for name in ("max_new_tokens", "top_k"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= MOST_TOKENS:
            raise UserError(f"--{name} must be at least 1 and at most {MOST_TOKENS:,}, not {getattr(args, name)}")

    prompts, as_json = list(args.prompt), bool(args.prompts_file) and args.prompts_file.endswith(".jsonl")
    if args.prompts_file:
        prompts += read_prompts(args.prompts_file, as_json)
    if not prompts:
        raise UserError('nothing to answer: give --prompt "What is 12 + 7?" or --prompts_file FILE')

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with chosen_checkpoint(args.checkpoint, args.run_name, args.save_dir) as folder:
        model, tokenizer, _ = load_model(folder, device)
    options = EvalOptions(cycles=chosen_cycles(model.config.hrm, args.h_cycles, args.l_cycles))
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "seed")}
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
