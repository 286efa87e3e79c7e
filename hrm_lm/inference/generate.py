"""Ask a checkpoint: `python -m hrm_lm.inference.generate --prompt "What is 12 + 7?"` prints the answer alone."""

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch

from hrm_lm.cli import run_command
from hrm_lm.cluster.run_folder import JOB_STORAGE, RunFolder, default_storage, newest_run
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import local_copy
from hrm_lm.inference.decoding import generate_ids
from hrm_lm.models.build import LanguageModel
from hrm_lm.training.checkpoint import load_model


def generate(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any) -> list[str]:
    """The responses to `prompts`, in their order. `options` are those of `generate_ids`.

    Raises UserError for a prompt that is empty, too long or of unknown characters.
    """
    if options.get("h_cycles") and model.core is None:
        raise UserError("this model was trained with h_cycles 0: it has no HRM core to cycle")
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded):
        if not 0 < len(ids) <= model.config.max_prompt_len:
            raise UserError(
                f"prompt {prompt[:60]!r} has {len(ids)} tokens; this model takes 1 to {model.config.max_prompt_len}"
            )

    answers = generate_ids(model, tokenizer, encoded, **options)
    return [tokenizer.decode(answer) for answer in answers]


@contextmanager
def chosen_checkpoint(checkpoint: str | None, run_name: str | None, save_dir: str | None) -> Iterator[Path]:
    """The checkpoint named, else the best one of the run named, else of the newest run; says which on stderr."""
    if checkpoint:
        with local_copy(checkpoint) as folder:
            yield folder
        return
    # A job's runs live in a place of their own; both are looked at.
    locations = [save_dir] if save_dir else list(dict.fromkeys([default_storage(), str(JOB_STORAGE)]))
    if run_name:
        runs = [RunFolder(location, run_name) for location in locations]
        run = next((run for run in runs if run.has_checkpoints() or run.exists("best_checkpoint")), None)
        if run is None:
            raise UserError(f"no run {run_name!r} with a checkpoint in {' or '.join(locations)}")
    else:
        run = newest_run(locations)
    if run.has_checkpoints():
        (best, metrics), *_ = run.checkpoints()[0]
        print(f"using {best} (val_loss {metrics['val_loss']:.4f})", file=sys.stderr)
    else:
        best = f"{run.path}/best_checkpoint"  # a sweep's
        print(f"using {best}", file=sys.stderr)
    with local_copy(best, run.fs) as folder:
        yield folder


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", metavar="PATH", help="checkpoint folder or URI")
    which.add_argument("--run_name", help="take this run's or sweep's best checkpoint (default: the newest run's)")
    parser.add_argument("--save_dir", metavar="PATH", help="folder or URI that runs are in (default: runs/)")
    parser.add_argument("--h_cycles", type=int, help="H-cycles (default: as trained)")
    parser.add_argument("--l_cycles", type=int, help="L-cycles (default: as trained)")


def check_cycles(args: argparse.Namespace) -> None:
    if args.h_cycles is not None and args.h_cycles < 0:
        raise UserError(f"--h_cycles must be at least 0, not {args.h_cycles}")
    if args.l_cycles is not None and args.l_cycles < 1:
        raise UserError(f"--l_cycles must be at least 1, not {args.l_cycles}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hrm_lm.inference.generate",
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
    if args.temperature < 0:
        raise UserError(f"--temperature must be at least 0, not {args.temperature}")
    for name in ("max_new_tokens", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")

    prompts, as_json = list(args.prompt), bool(args.prompts_file) and args.prompts_file.endswith(".jsonl")
    if args.prompts_file:
        prompts += read_prompts(args.prompts_file, as_json)
    if not prompts:
        raise UserError('nothing to answer: give --prompt "What is 12 + 7?" or --prompts_file FILE')

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with chosen_checkpoint(args.checkpoint, args.run_name, args.save_dir) as folder:
        model, tokenizer, _ = load_model(folder, device)
    names = ("max_new_tokens", "h_cycles", "l_cycles", "temperature", "top_k", "seed")
    for answer in generate(model, tokenizer, prompts, **{name: getattr(args, name) for name in names}):
        print(json.dumps(answer, ensure_ascii=False) if as_json else answer)
    return 0


def read_prompts(file: str, as_json: bool) -> list[str]:
    """The lines that are not blank; `as_json`: the field `prompt` of each."""
    try:
        lines = enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1)
        texts = {number: line for number, line in lines if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file: {file} cannot be read: {error}") from None
    if not as_json:
        return list(texts.values())
    prompts = []
    for number, line in texts.items():
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--prompts_file: {file}:{number}: not a JSON object with a field 'prompt'") from None
    return prompts


if __name__ == "__main__":
    sys.exit(run_command(main))
