"""Hyperparameter search: `python -m ray_jobs.tune --config configs/sweep.yaml`, or through `ray job submit`."""

import argparse
import sys
from datetime import datetime
from typing import Sequence

from hrm_lm.cli import run_command
from hrm_lm.cluster.run_folder import RunFolder, default_storage, outliving
from hrm_lm.config import parse_set
from hrm_lm.tuning.space import Sweep
from hrm_lm.tuning.sweep import run_sweep, summary


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.tune", description="Search a config's fields with Ray Tune."
    )
    parser.add_argument("--config", metavar="YAML", required=True, help="sweep file")
    parser.add_argument("--run_name", help="name of the sweep's folder")
    parser.add_argument("--save_dir", metavar="PATH", help="folder or URI that it is created in (default: runs/)")
    parser.add_argument("--resume", action="store_true", help="continue the sweep --run_name where it was interrupted")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="a field of the base config or of the tune section, such as tune.num_samples=4; repeatable",
    )
    args = parser.parse_args(argv)
    if args.resume and not args.run_name:
        parser.error("--resume needs --run_name")
    sweep = Sweep(args.config, parse_set(args.set))
    name = args.run_name or f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    location = args.save_dir or sweep.config.ray.storage_path
    folder = RunFolder(outliving(location, "--save_dir") if location else default_storage(), name)
    print(summary(run_sweep(sweep, folder, args.resume), sweep, folder))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
