"""Flags that several commands share."""

import argparse
import math
from typing import Any

from hrm_lm.config import MOST_CYCLES, MOST_TOKENS, Config, Halting, parse_h_cycles
from hrm_lm.errors import UserError


def field_help(dotted: str) -> str:
    """The help text of a config's field: its docstring."""
    section: Any = Config
    *sections, name = dotted.split(".")
    for inner in sections:
        section = section.model_fields[inner].annotation
    return f"{section.model_fields[name].description} [{dotted}]".replace("%", "%%")  # argparse formats with %


def add_run_flags(
    parser: argparse.ArgumentParser, config: str, run_name: str, fields: str, required: bool = False
) -> None:
    """What a command that starts a run or a sweep takes.

    config, run_name: help of these flags; fields: what --set reaches; required: whether --config must be given.
    """
    parser.add_argument("--config", metavar="YAML", required=required, help=config)
    parser.add_argument("--run_name", metavar="NAME", help=run_name)
    parser.add_argument("--save_dir", metavar="PATH", help=field_help("ray.storage_path"))
    add_set(parser, fields)


def add_set(parser: argparse.ArgumentParser, fields: str) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help=f"{fields} by its dotted path, such as model.hrm.h_cycles=4; may be given several times",
    )


H_CYCLES = (
    "H-cycles (default: as trained); auto[:RESIDUAL[:MOST]]: until a sample's states change by less than RESIDUAL of their "
    f"norm ({Halting().residual}), at most MOST (the most of training)"
)


def add_checkpoint_flags(parser: argparse.ArgumentParser, several_cycles: bool = False) -> None:
    """several_cycles: whether --h_cycles takes several counts; then it is a list."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", metavar="PATH", help="checkpoint folder or URI")
    which.add_argument("--run_name", help="take this run's or sweep's best checkpoint (default: the newest run's)")
    parser.add_argument("--save_dir", metavar="PATH", help="folder or URI that runs are in (default: runs/)")
    if several_cycles:
        parser.add_argument(
            "--h_cycles", type=cycle_counts, default=[None], metavar="N,N,auto", help=f"{H_CYCLES}; one or several"
        )
    else:
        parser.add_argument("--h_cycles", type=parse_h_cycles, metavar="N|auto", help=H_CYCLES)
    parser.add_argument("--l_cycles", type=int, help="L-cycles (default: as trained)")


def cycle_counts(text: str) -> list[int | Halting]:
    """What `--h_cycles 1,2,4,auto` says. Raises UserError."""
    return [parse_h_cycles(part.strip()) for part in text.split(",")]


def check_cycles(args: argparse.Namespace) -> None:
    if args.l_cycles is not None and not 1 <= args.l_cycles <= MOST_CYCLES:
        raise UserError(f"--l_cycles must be at least 1 and at most {MOST_CYCLES}, not {args.l_cycles}")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: the model's max_response_len)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top_k", type=int, help="sample from the likeliest so many tokens (default: all)")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the fewest of the likeliest tokens that have this probability together (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `generate_ids` takes of `add_sampling_flags`. Raises UserError."""
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature must be at least 0, not {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p must be more than 0 and at most 1, not {args.top_p}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be at least 0 and less than 2^63, not {args.seed}")
    check_positive(args, "max_new_tokens", "top_k")
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError for a count that is given and less than 1, or larger than any use of it."""
    for name in names:
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= MOST_TOKENS:
            raise UserError(f"--{name} must be at least 1 and at most {MOST_TOKENS:,}, not {getattr(args, name)}")
