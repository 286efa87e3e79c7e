"""A page on a run, or on several runs side by side: `hrm-lm report mine [other ...]`.

A run may go on, may have been killed, or may have ended. The page needs no network to be read.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pyarrow.fs

from hrm_lm.cluster.run_folder import RunFolder, run_locations
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, resolve, shown, without_secrets, write_text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hrm-lm report", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="name of a run; folder or URI of a run or trial (runs/SWEEP/trials/ID)"
    )
    parser.add_argument("--save_dir", metavar="PATH", help="folder or URI that runs of a name are in (default: runs/)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="file or URI of the page (default: report.html in the run's folder, comparison.html here for several runs)",
    )
    args = parser.parse_args(argv)
    places = [place_of(run, args.save_dir) for run in args.runs]

    from hrm_lm.report.comparison import comparison_page
    from hrm_lm.report.page import run_page
    from hrm_lm.report.runs import read_run

    runs = [read_run(*place) for place in places]
    if len(runs) == 1:
        (fs, folder), page = places[0], run_page(runs[0])
        target = fs, f"{folder}/report.html"
    else:
        seen = Counter(run.name for run in runs)  # runs of one name are told apart by what the user has called them
        called = [replace(r, name=without_secrets(a)) if seen[r.name] > 1 else r for r, a in zip(runs, args.runs)]
        if len({run.name for run in called}) < len(called):
            raise UserError("a run is named twice")
        page, target = comparison_page(called), resolve("comparison.html")
    fs, path = resolve(args.output) if args.output else target
    outlasting(f"{shown(fs, path)}: cannot be written", partial(write_text, fs, path, page))
    print(shown(fs, path))
    return 0


def place_of(run: str, save_dir: str | None) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path of a run that the user has named, by its name, folder or URI."""
    if "/" in run:
        return resolve(run)
    locations = run_locations(save_dir)
    folders = [RunFolder(location, run) for location in locations]
    folder = next((folder for folder in folders if folder.exists("config.yaml") or folder.exists("sweep.yaml")), None)
    if folder is None:
        raise UserError(f"no run {run!r} in {' or '.join(map(without_secrets, locations))}")
    return folder.fs, folder.path
