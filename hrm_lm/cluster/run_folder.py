"""Where runs live: a storage folder or URI, a folder in it for each run, checkpoints in that.

The default is `runs/` beside where the command was given. Under `ray job submit` that place is a temporary copy, so
there it is `~/hrm_lm_runs` of the cluster, which outlives the job.
"""

import logging
import math
import os
import sys
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs
from pydantic import ConfigDict, TypeAdapter

from hrm_lm.cluster.lock import locked
from hrm_lm.cluster.ray_private import SNAPSHOT
from hrm_lm.cluster.start import say
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, read_text, resolve, without_secrets, write_text
from hrm_lm.parsing import is_text, one_line, short

JOB_STORAGE = Path("~/hrm_lm_runs").expanduser()


def in_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def default_storage() -> str:
    return str(JOB_STORAGE if in_ray_job() else Path("runs").absolute())


def run_locations(save_dir: str | None) -> list[str]:
    """Where to look for a run that is named. A job's runs live in a place of their own, so both places are looked at."""
    return [save_dir] if save_dir else list(dict.fromkeys([default_storage(), str(JOB_STORAGE)]))


def outliving(location: str, flag: str) -> str:
    """Where to write what the user wants in `location`, so that it is there when a submitted job is over.

    A relative folder would be in the job's temporary copy of the working directory. It goes under the default storage
    instead, and the user is told. flag: the command's flag that gave it.
    """
    if not in_ray_job() or "://" in location or os.path.isabs(os.path.expanduser(location)):
        return location
    path = os.path.normpath(JOB_STORAGE / location)
    say(f"{flag} {location} would vanish with this job's temporary working directory; writing to {path}")
    return path


NO_VAL_LOSS = sys.float_info.max
"""The `val_loss` of a report without a validation, as Ray Train gets it. It ranks a checkpoint without a score above all
others, and its list of checkpoints, which is JSON, holds no NaN.
"""


def without_placeholder(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics, with NaN for the `val_loss` that stands for no validation."""
    return metrics | {"val_loss": math.nan} if metrics["val_loss"] == NO_VAL_LOSS else metrics


METRICS = TypeAdapter(dict[str, float], config=ConfigDict(strict=True))
"""What a run reports with a checkpoint; `step` is an int."""


class RunFolder:
    """A run's folder in storage. `location`: the storage's folder or URI.

    Storage that is away is waited for; what is read or written then raises UserError.
    """

    def __init__(self, location: str, name: str):
        if not name or "/" in name or name.startswith(".") or not is_text(name):
            raise UserError(f"ray.run_name: {short(name)} cannot name a folder")
        self.name = name
        self.fs, self.storage = resolve(location)
        self.path = f"{self.storage}/{name}"
        """Within `fs`; for users there is `uri`."""
        self.is_local = isinstance(self.fs, pyarrow.fs.LocalFileSystem)
        self.storage_uri = self.storage if self.is_local else without_secrets(location).rstrip("/")
        self.uri = f"{self.storage_uri}/{name}"
        """What a user reads and pastes: the path, or a URI without keys and options."""

    def uri_of(self, path: str) -> str:
        """What a user reads of a path below this folder, a checkpoint's for example."""
        return self.uri + path.removeprefix(self.path)

    def exists(self, file: str) -> bool:
        info = outlasting(f"{self.uri}: cannot be read", partial(self.fs.get_file_info, f"{self.path}/{file}"))
        return info.type != pyarrow.fs.FileType.NotFound

    def has_checkpoints(self) -> bool:
        return self.exists(SNAPSHOT)

    def read(self, file: str) -> str:
        return outlasting(f"{self.uri}/{file}: cannot be read", partial(read_text, self.fs, f"{self.path}/{file}"))

    def write(self, file: str, text: str) -> None:
        outlasting(f"{self.uri}: cannot be written", partial(write_text, self.fs, f"{self.path}/{file}", text))

    def remove(self, file: str) -> None:
        """A file that is not there is no error."""

        def attempt() -> None:
            with suppress(FileNotFoundError):
                self.fs.delete_file(f"{self.path}/{file}")

        outlasting(f"{self.uri}: cannot be written", attempt)

    def checkpoints(self) -> tuple[list[tuple[str, dict[str, Any]]], str]:
        """The kept checkpoints with their metrics, best `val_loss` first, and the last checkpoint; as paths in `fs`.

        A checkpoint that was saved without a validation has NaN for its `val_loss` and stands behind the others. Raises
        UserError where the list is damaged.
        """
        from ray.train import Result

        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would explain at length that it found checkpoints
        try:
            result = outlasting(
                f"{self.uri}: cannot be read", partial(Result.from_path, self.path, storage_filesystem=self.fs)
            )
        except UserError:
            raise
        except Exception as error:  # Ray promises none of its own for a damaged list
            what = one_line(error) or type(error).__name__
            raise UserError(f"{self.uri}: its list of checkpoints cannot be read: {what}") from None
        found = [(checkpoint.path, metrics) for checkpoint, metrics in result.best_checkpoints]
        try:
            for path, metrics in found:
                if missing := {"step", "val_loss", "seconds", "tokens"} - METRICS.validate_python(metrics).keys():
                    raise ValueError(f"{min(missing)} of {os.path.basename(path)} is missing")
                if type(metrics["step"]) is not int:
                    raise ValueError(f"the step of {os.path.basename(path)} is {metrics['step']}")
                if path != f"{self.path}/{os.path.basename(path)}" or os.path.basename(path).startswith("."):
                    raise ValueError(f"{short(path)} is not in the run's folder")
            if not result.checkpoint or result.checkpoint.path not in dict(found):
                raise ValueError("its last checkpoint is missing")
        except ValueError as error:
            raise UserError(f"{self.uri}: its list of checkpoints is damaged: {one_line(error)}") from None
        kept = [(path, without_placeholder(metrics)) for path, metrics in found]

        def rank(item: tuple[str, dict[str, Any]]) -> tuple[bool, float, int]:
            # Two of the same step: the first was damaged, and the one of the longer name was saved in its place.
            val_loss, step = item[1]["val_loss"], item[1]["step"]
            return (True, -step, -len(item[0])) if math.isnan(val_loss) else (False, val_loss, -len(item[0]))

        return sorted(kept, key=rank), result.checkpoint.path

    def lock(self, kind: Literal["run", "sweep"] = "run") -> AbstractContextManager[None]:
        """Keeps a second command of this name away (`hrm_lm.cluster.lock`). kind: what the name is of."""
        doing = f"{kind} {self.name!r} is being trained"
        return locked(self.fs, self.path, doing, name_flag="--run_name", place_flag="--save_dir")


def newest_run(locations: list[str]) -> RunFolder:
    """The run that saved a checkpoint last, over all the given storages."""
    newest, newest_time = None, -1
    for location in locations:
        fs, path = resolve(location)
        what, runs = f"{without_secrets(location)}: cannot be read", pyarrow.fs.FileSelector(path, allow_not_found=True)
        for info in outlasting(what, partial(fs.get_file_info, runs)):
            if info.type != pyarrow.fs.FileType.Directory or info.base_name.startswith("."):
                continue
            snapshot = outlasting(what, partial(fs.get_file_info, f"{info.path}/{SNAPSHOT}"))
            if snapshot.type == pyarrow.fs.FileType.File and snapshot.mtime_ns > newest_time:
                newest, newest_time = RunFolder(location, info.base_name), snapshot.mtime_ns
    if newest is None:
        places = " or ".join(map(without_secrets, locations))
        raise UserError(f"no run with a checkpoint in {places}; train one, or give --checkpoint")
    return newest
