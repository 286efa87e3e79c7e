"""The trainer: `hrm-lm train`, `python -m ray_jobs.train` for submitting, and the guide's `hrm_lm.training.train`."""

import argparse
from collections.abc import Sequence

from hrm_lm.commands.flags import add_run_flags, field_help
from hrm_lm.config import config_of, parse_set, read_layers

# flag -> the config field it sets; a flag that is not given leaves the config's value
FLAGS = {
    "dataset": "data.dataset",
    "steps": "train.steps",
    "val_every": "train.val_every",
    "save_dir": "ray.storage_path",
    "mixed_precision": "train.mixed_precision",
    "grad_clip": "train.grad_clip",
    "init_from": "train.init_from",
    "run_name": "ray.run_name",
    "num_workers": "ray.num_workers",
    "use_gpu": "ray.use_gpu",
}
NAMES = ("data.dataset", "ray.storage_path", "train.init_from", "ray.run_name")
"""Fields of FLAGS that are texts, whatever YAML would make of them."""


def main(argv: Sequence[str] | None = None, dry_run: int = 0) -> int:
    """dry_run: what `--dry_run` is when it is not given. It is 1 for the guide's `python -m hrm_lm.training.train`."""
    parser = argparse.ArgumentParser(prog="hrm-lm train", description="Train an HRM language model on Ray.")
    add_run_flags(
        parser,
        config="config file, or its URI (default: the values of configs/default.yaml)",
        run_name=field_help("ray.run_name"),
        fields="any config field",
    )
    parser.add_argument(
        "--dry_run",
        type=int,
        choices=(0, 1),
        default=dry_run,
        help="1: one step on random data without Ray, printing its loss and what the run will take (default: %(default)s)",
    )
    for flag, path in FLAGS.items():
        if flag not in ("run_name", "save_dir"):
            parser.add_argument(f"--{flag}", metavar="VALUE", help=field_help(path))
    parser.add_argument("--profile", action="store_true", help=field_help("train.profile"))
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="what to do if the run is there")
    args = parser.parse_args(argv)

    flags = {path: getattr(args, flag) for flag, path in FLAGS.items() if getattr(args, flag) is not None}
    named = {path: value for path, value in flags.items() if path in NAMES}  # a run may be called 2024, or on
    given = [f"{path}={value}" for path, value in flags.items() if path not in NAMES]
    given += ["train.profile=true"] * args.profile
    layers = read_layers(args.config) if args.config else []
    overrides = named | parse_set(given) | parse_set(args.set)
    config = config_of(layers, overrides)
    if args.dry_run:
        from hrm_lm.training.train import dry_run as run_dry

        run_dry(config)
        return 0

    from hrm_lm.cluster.run import run
    from hrm_lm.trust import refuse_strangers_code

    refuse_strangers_code(config.to_dict(), layers, overrides)
    result = run(config, args.resume)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.items() if name.startswith("val_"))
    print(
        f"{result['status']} at step {result['step']}: "
        + (f"{scores} (best, step {result['best_step']}), " if "best_step" in result else "not validated yet, ")
        + f"{result['seconds']:.0f} s, {result['tokens_per_s'] or 0:,.0f} tokens/s\n"
        + f"best checkpoint: {result.get('best_checkpoint') or result.get('last_checkpoint')}"
    )
    return 0
