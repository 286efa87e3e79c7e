"""Hyperparameter search: `hrm-lm tune --config configs/sweep.yaml`, or `python -m ray_jobs.tune` for submitting."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from hrm_lm.cluster.run_folder import RunFolder, default_storage, outliving
from hrm_lm.commands.flags import add_run_flags
from hrm_lm.config import Layer, is_own, parse_set, set_dotted
from hrm_lm.tuning.space import Sweep


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hrm-lm tune", description="Search a config's fields with Ray Tune.")
    add_run_flags(
        parser,
        config="sweep file, or its URI",
        run_name="name of the sweep's folder (default: made from the time)",
        fields="a field of the base config or of the tune section (tune.num_samples=4)",
        required=True,
    )
    parser.add_argument("--resume", action="store_true", help="continue the sweep --run_name where it was interrupted")
    args = parser.parse_args(argv)
    if args.resume and not args.run_name:
        parser.error("--resume needs --run_name")
    overrides = parse_set(args.set)
    sweep = Sweep(args.config, overrides)
    check_code(sweep, overrides)
    name = args.run_name or f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    location = args.save_dir or sweep.config.ray.storage_path
    folder = RunFolder(outliving(location, "--save_dir") if location else default_storage(), name)

    from hrm_lm.tuning.sweep import run_sweep, summary

    print(summary(run_sweep(sweep, folder, args.resume), sweep, folder))
    return 0


def check_code(sweep: Sweep, overrides: dict[str, Any]) -> None:
    """Raises UserError where the base, or an option of the search space, is code of a stranger's."""
    from hrm_lm.trust import refuse_strangers_code

    refuse_strangers_code(sweep.config.to_dict(), sweep.layers, overrides)
    for dotted, (_, options) in sweep.space.items():
        for option in options:
            values: dict[str, Any] = {}
            set_dotted(values, dotted, option)
            layer = Layer(sweep.path, values, is_own(sweep.path))
            refuse_strangers_code(values, [*sweep.layers, layer], overrides)
