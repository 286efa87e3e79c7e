"""Serve a checkpoint over HTTP, as OpenAI's clients ask: `hrm-lm serve --run_name mine`.

`application` is for a config of Ray Serve (`serve run`, KubeRay's RayService), whose `args` are flags of this command.
"""

import argparse
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hrm_lm.commands.flags import add_checkpoint_flags, check_cycles
from hrm_lm.errors import UserError
from hrm_lm.inference.choice import chosen_cycles, find_checkpoint
from hrm_lm.serving.access import digest, is_loopback

if TYPE_CHECKING:
    from ray.serve import Application

    from hrm_lm.serving.plan import Plan

KEY = "HRM_LM_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    parser = plan_parser()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.port < 1 << 16:
        raise UserError(f"--port must be 1 to 65535, not {args.port}")
    key = os.environ.get(KEY)
    made = None if key or is_loopback(args.host) else secrets.token_urlsafe(24)
    plan = plan_of(args, key or made)

    url = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"
    told = f"{plan.settings.name!r} answers on {url}, until Ctrl-C"
    if made:
        told += f"\nits key, made for this time ({KEY} sets one): {made}\nthe page with the key: {url}/#key={made}"

    from hrm_lm.serving.start import serve_until_stopped

    try:
        serve_until_stopped(plan, args.host, args.port, told)
    except KeyboardInterrupt:  # later ones end it in good order
        raise KeyboardInterrupt("nothing was served yet") from None
    return 0


def application(args: Mapping[str, Any]) -> "Application":
    """For a Serve config. It does not say here where it listens, so a key must be set. Raises UserError."""
    key = os.environ.get(KEY)
    if not key:
        raise UserError(f"{KEY} must be set where this application is built, on the head")
    plan = plan_of(parse_args(args), key)

    from hrm_lm.serving.replica import application

    return application(plan)


def parse_args(args: Mapping[str, Any]) -> argparse.Namespace:
    """Flags as a mapping."""
    return plan_parser().parse_args([word for name, value in args.items() for word in (f"--{name}", str(value))])


def plan_parser() -> argparse.ArgumentParser:
    """The flags that say what is served."""
    parser = argparse.ArgumentParser(
        prog="hrm-lm serve",
        description="Serve a checkpoint over HTTP, as OpenAI's clients ask, with a page to try it on.",
    )
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--replicas",
        default="1",
        metavar="N|LEAST:MOST",
        help="copies of the model; with a range, as load asks (default: 1)",
    )
    parser.add_argument(
        "--cpus_per_replica", type=int, default=1, metavar="N", help="its threads, too (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus_per_replica",
        type=float,
        metavar="N",
        help="may be a fraction (default: 1 where the cluster has GPUs, else 0)",
    )
    parser.add_argument(
        "--slots", type=int, default=64, help="answers that a replica gives at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--max_queue",
        type=int,
        default=256,
        help="answers that wait in a replica; more are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120,
        help="seconds that an answer may take, waiting included (default: %(default)s)",
    )
    parser.add_argument(
        "--mixed_precision",
        choices=("none", "bf16"),
        default="none",
        help="what the model computes in (default: %(default)s)",
    )
    return parser


def plan_of(args: argparse.Namespace, key: str | None) -> "Plan":
    check_cycles(args)
    limits = {
        "slots": (1, 1 << 16), "max_queue": (0, 1 << 20), "cpus_per_replica": (1, 1 << 10),
        "gpus_per_replica": (0, 1 << 10), "timeout": (0.001, 1e6),
    }  # fmt: skip
    for name, (least, most) in limits.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name} must be {least} to {most:g}, not {value}")
    replicas = re.fullmatch(r"(\d+)(?::(\d+))?", args.replicas)
    least, most = (int(replicas[1]), int(replicas[2] or replicas[1])) if replicas else (0, 0)
    if not 1 <= least <= most:
        raise UserError(f"--replicas must be a number, or a range such as 1:4, not {args.replicas}")
    fs, path = find_checkpoint(args.checkpoint, args.run_name, args.save_dir)

    from hrm_lm.serving.plan import Plan, Settings
    from hrm_lm.training.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path, fs)
    settings = Settings(
        fs=fs,
        checkpoint=path,
        name=name_of(path),
        cycles=chosen_cycles(checkpoint.config, args.h_cycles, args.l_cycles),
        slots=args.slots,
        max_queue=args.max_queue,
        timeout=args.timeout,
        mixed_precision=args.mixed_precision,
        key=digest(key) if key else None,
    )
    return Plan(settings, least, most, args.cpus_per_replica, args.gpus_per_replica)


def name_of(path: str) -> str:
    """The model's name: the run's, whose folder the checkpoint is in, else the checkpoint's own."""
    folder, _, name = path.rstrip("/").rpartition("/")
    in_run = re.fullmatch(r"checkpoint_\d+(_again)*|best_checkpoint", name)
    return (folder.rpartition("/")[2] if in_run else "") or name
