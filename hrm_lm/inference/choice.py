"""Which checkpoint is meant, and how many cycles it takes. A wrong name is told at once: this imports no PyTorch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs

from hrm_lm.cluster.run_folder import RunFolder, newest_run, run_locations
from hrm_lm.config import Config, Cycles, Halting
from hrm_lm.errors import UserError
from hrm_lm.filesystem import local_copy, resolve, without_secrets


@contextmanager
def chosen_checkpoint(checkpoint: str | None, run_name: str | None, save_dir: str | None) -> Iterator[Path]:
    """The checkpoint that is meant (`find_checkpoint`), as a local folder."""
    fs, path = find_checkpoint(checkpoint, run_name, save_dir)
    with local_copy(path, fs) as folder:
        yield folder


def find_checkpoint(
    checkpoint: str | None, run_name: str | None, save_dir: str | None
) -> tuple[pyarrow.fs.FileSystem, str]:
    """The checkpoint that is named, else the best checkpoint of the run that is named, else the newest run's. Says on
    stderr which it is. Returns a file system and the path in it. Raises UserError where it is not there.
    """
    if checkpoint:
        fs, path = resolve(checkpoint)
        if isinstance(fs, pyarrow.fs.LocalFileSystem) and not Path(path).is_dir():
            raise UserError(f"{path}: no such checkpoint folder")
        return fs, path
    locations = run_locations(save_dir)
    if run_name:
        runs = [RunFolder(location, run_name) for location in locations]
        run = next((run for run in runs if run.has_checkpoints() or run.exists("best_checkpoint")), None)
        if run is None:
            raise UserError(f"no run {run_name!r} with a checkpoint in {' or '.join(map(without_secrets, locations))}")
    else:
        run = newest_run(locations)
    if run.has_checkpoints():
        (best, metrics), *_ = run.checkpoints()[0]
        print(f"using {run.uri_of(best)} (val_loss {metrics['val_loss']:.4f})", file=sys.stderr)
    else:
        best = f"{run.path}/best_checkpoint"  # a sweep's
        print(f"using {run.uri_of(best)}", file=sys.stderr)
    return run.fs, best


def chosen_cycles(config: Config, h_cycles: int | Halting | None, l_cycles: int | None) -> Cycles:
    """The counts given, and in place of None those that a model of this config was trained to answer with.

    Raises UserError for a count that the model cannot take: a model with a core takes at least 1 H-cycle, a model without
    a core takes no H-cycle.
    """
    trained, hrm = config.cycles, config.model.hrm
    if h_cycles and not hrm.h_cycles:
        raise UserError("this model was trained with h_cycles 0: it has no HRM core to cycle")
    if h_cycles == 0 and hrm.h_cycles:
        raise UserError("--h_cycles must be at least 1, not 0: this model has an HRM core, and it answers through it")
    l = trained.l if l_cycles is None else l_cycles
    if isinstance(h_cycles, Halting):
        _, most = config.train.sample_h_cycles or (0, 0)
        return Cycles(h_cycles.most or max(trained.h, most * config.train.segments), l, h_cycles.residual)
    return Cycles(trained.h if h_cycles is None else h_cycles, l)
