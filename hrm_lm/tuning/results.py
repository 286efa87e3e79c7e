"""What a sweep found: Tune's results as trials, and the files made of them."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs

from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.errors import StorageError, UserError
from hrm_lm.filesystem import outlasting, shown
from hrm_lm.training.checkpoint import Checkpoint, read_checkpoint
from hrm_lm.tuning.space import Sweep, point

CURVES = ("val_loss", "val_exact_match", "loss")


@dataclass
class Trial:
    number: int
    params: dict[str, Any]
    status: str
    """finished, early_stopped, stopped (by the scheduler), diverged, invalid, failed, unfinished"""
    steps: int = 0
    best_step: int | None = None
    score: Any = None
    """The metric's best value; None for a trial without a validation."""
    val_loss: float | None = None
    val_exact_match: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    error: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: Any = None
    """The trial's best checkpoint, as a `ray.tune.Checkpoint`."""


def read_trials(results, sweep: Sweep) -> list[Trial]:
    """Tune's ResultGrid as trials, in the order they were made."""
    return [_read_trial(number, result, sweep) for number, result in enumerate(results)]


def _read_trial(number: int, result, sweep: Sweep) -> Trial:
    params = {dotted: result.config[dotted] for dotted in sweep.space} if result.config else {}
    frame, last, metric = result.metrics_dataframe, result.metrics or {}, sweep.tune.metric
    history: dict[int, dict[str, float]] = {}
    for row in frame.to_dict("records") if frame is not None else []:
        # Where a trial went on from a checkpoint, what it repeated replaces what was there.
        if (
            isinstance(row.get("status"), str) and row["status"] in ("diverged", "invalid", "failed")
        ) or "seconds" not in row:
            continue
        history[int(row["step"])] = {
            name: row[name] for name in {"step", "seconds", "tokens", metric, *CURVES} if name in row
        }
    rows = [history[step] for step in sorted(history)]
    # Checkpoints that were saved between validations are reported, too.
    validated = [row for row in rows if not math.isnan(row[metric])]
    trial = Trial(number, params, _status(result, last, sweep), history=validated)
    trial.steps = max([int(last.get("step", 0)), *history])
    if trial.status == "failed" and result.error is not None:
        lines = [line for line in str(result.error).strip().splitlines() if line.strip()]
        trial.error = lines[-1].strip() if lines else type(result.error).__name__
    else:
        trial.error = str(last.get("error") or "")
    if rows:
        trial.seconds = rows[-1]["seconds"]
        trial.tokens_per_s = rows[-1]["tokens"] / rows[-1]["seconds"] if rows[-1]["seconds"] else None
    if validated:
        choose = min if sweep.tune.mode == "min" else max
        best = choose(validated, key=lambda row: row[metric])
        trial.best_step, trial.score = int(best["step"]), best[metric]
        trial.val_loss, trial.val_exact_match = best["val_loss"], best["val_exact_match"]
        kept = [pair for pair in result.best_checkpoints or [] if not math.isnan(pair[1][metric])]
        if kept:
            trial.checkpoint = choose(kept, key=lambda pair: pair[1][metric])[0]
            if not is_there(trial.checkpoint):  # of a killed sweep: Tune noted it before another took its place
                trial.checkpoint = saved_at(trial.best_step, result)
    return trial


def is_there(checkpoint) -> bool:
    fs, path = checkpoint.filesystem, checkpoint.path
    info = outlasting(f"{shown(fs, path)}: cannot be read", lambda: fs.get_file_info(path))
    return info.type != pyarrow.fs.FileType.NotFound


def saved_at(step: int, result):
    """The checkpoint of this step in a trial's folder, whether Tune knows of it or not; None where it is not there."""
    from ray.tune import Checkpoint

    for path, saved in whole_checkpoints(result.filesystem, result.path):
        if saved.progress.step == step:
            return Checkpoint(path, result.filesystem)
    return None


def whole_checkpoints(
    fs: pyarrow.fs.FileSystem, folder: str, for_resume: bool = False
) -> Iterator[tuple[str, Checkpoint]]:
    """The checkpoints in a trial's folder that are not torn, each with its path. Raises StorageError."""
    # Those of a trial of several workers are a folder deeper.
    below = pyarrow.fs.FileSelector(folder, allow_not_found=True, recursive=True)
    for info in outlasting(f"{shown(fs, folder)}: cannot be read", lambda: fs.get_file_info(below)):
        if info.type == pyarrow.fs.FileType.Directory and info.base_name.startswith("checkpoint_"):
            try:
                yield info.path, read_checkpoint(info.path, fs, for_resume)
            except StorageError:
                raise
            except UserError:  # the upload was cut
                continue


def _status(result, last: dict[str, Any], sweep: Sweep) -> str:
    if isinstance(last.get("status"), str):
        return last["status"]
    if result.error is not None:
        return "failed"
    if last.get("step", 0) >= sweep.config.train.steps:
        return "finished"
    return "stopped" if last.get("done") else "unfinished"


def best_trial(trials: list[Trial], sweep: Sweep) -> Trial | None:
    """Of those that were trained properly, stopped ones included."""
    good = [t for t in trials if t.score is not None and t.status not in ("diverged", "invalid", "failed")]
    choose = min if sweep.tune.mode == "min" else max
    return choose(good, key=lambda trial: trial.score, default=None)


def write_results(trials: list[Trial], best: Trial | None, sweep: Sweep, folder: RunFolder) -> None:
    """Writes trials.csv and, of the best trial, best.yaml and best_checkpoint/."""
    folder.write("trials.csv", trials_csv(trials, sweep))
    if best is not None:
        config = point(sweep.base, best.params)
        folder.write("best.yaml", config.to_yaml())
        if best.checkpoint is not None:
            outlasting(f"{folder.uri}/best_checkpoint: cannot be written", lambda: copy_to(folder, best.checkpoint))


def copy_to(folder: RunFolder, checkpoint) -> None:
    """Makes best_checkpoint/ a copy of this checkpoint. Raises OSError."""
    target = f"{folder.path}/best_checkpoint"
    if folder.exists("best_checkpoint"):
        folder.fs.delete_dir(target)
    folder.fs.create_dir(target)
    pyarrow.fs.copy_files(
        checkpoint.path, target, source_filesystem=checkpoint.filesystem, destination_filesystem=folder.fs
    )


def trials_csv(trials: list[Trial], sweep: Sweep) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["status", "steps", "val_loss", "best_step", "val_exact_match", "tokens_per_s", "seconds", "error"]
    metric = [sweep.tune.metric] if sweep.tune.metric not in columns else []
    writer.writerow(["trial", *sweep.space, *columns, *metric])
    for trial in trials:
        values = [getattr(trial, column) for column in columns] + [trial.score] * len(metric)
        writer.writerow(
            [
                trial.number,
                *(trial.params.get(p) for p in sweep.space),
                *(round(v, 6) if isinstance(v, float) else v for v in values),
            ]
        )
    return text.getvalue()
