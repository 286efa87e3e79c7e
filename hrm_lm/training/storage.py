"""Where runs live: a storage folder or URI, a folder in it for each run, checkpoints in that.

The default is `runs/` beside where the command was given. Under `ray job submit` that place is a temporary copy, so
there it is `~/hrm_lm_runs` of the cluster, which outlives the job.
"""

import fcntl
import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator

import pyarrow.fs

from hrm_lm.errors import UserError
from hrm_lm.filesystem import resolve

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints: its presence says that there are some."""
JOB_STORAGE = Path("~/hrm_lm_runs").expanduser()


def in_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def default_storage() -> str:
    return str(JOB_STORAGE if in_ray_job() else Path("runs").absolute())


class RunFolder:
    """A run's folder in storage. `location`: the storage's folder or URI."""

    def __init__(self, location: str, name: str):
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"ray.run_name: {name!r} cannot name a folder")
        self.name = name
        self.fs, self.storage = resolve(location)
        self.path = f"{self.storage}/{name}"
        self.is_local = isinstance(self.fs, pyarrow.fs.LocalFileSystem)

    def exists(self, file: str) -> bool:
        return self.fs.get_file_info(f"{self.path}/{file}").type != pyarrow.fs.FileType.NotFound

    def has_checkpoints(self) -> bool:
        return self.exists(SNAPSHOT)

    def read(self, file: str) -> str:
        with self.fs.open_input_stream(f"{self.path}/{file}") as stream:
            return stream.read().decode()

    def write(self, file: str, text: str) -> None:
        try:
            self.fs.create_dir(self.path, recursive=True)
            with self.fs.open_output_stream(f"{self.path}/{file}") as stream:
                stream.write(text.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error}") from None

    def checkpoints(self) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
        """The kept checkpoints with their metrics, best `val_loss` first, and the last one; each a full path."""
        from ray.train import Result

        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would explain at length that it found some
        try:
            result = Result.from_path(self.path, storage_filesystem=self.fs)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.path}: its list of checkpoints cannot be read: {error}") from None
        kept = [(checkpoint.path, metrics) for checkpoint, metrics in result.best_checkpoints]
        kept.sort(key=lambda item: item[1]["val_loss"])
        return kept, result.checkpoint.path if result.checkpoint else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run of this name away for as long as this process lives (local storage only)."""
        if not self.is_local:
            yield
            return
        self.write(".lock", "") if not self.exists(".lock") else None
        with open(f"{self.path}/.lock", "r+") as file:
            _lock_or_refuse(file, self.name)
            yield


def _lock_or_refuse(file: IO[str], name: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"run {name!r} is being trained by process {file.read().strip() or '?'}; wait for it, or give another --run_name"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def newest_run(locations: list[str]) -> RunFolder:
    """The run that saved a checkpoint last, over all the given storages."""
    newest, newest_time = None, -1
    for location in locations:
        fs, path = resolve(location)
        for info in fs.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)):
            if info.type != pyarrow.fs.FileType.Directory or info.base_name.startswith("."):
                continue
            snapshot = fs.get_file_info(f"{info.path}/{SNAPSHOT}")
            if snapshot.type == pyarrow.fs.FileType.File and snapshot.mtime_ns > newest_time:
                newest, newest_time = RunFolder(location, info.base_name), snapshot.mtime_ns
    if newest is None:
        raise UserError(f"no run with a checkpoint in {' or '.join(locations)}; train one, or give --checkpoint")
    return newest


@contextmanager
def local_checkpoint(location: str, fs: pyarrow.fs.FileSystem | None = None) -> Iterator[Path]:
    """A checkpoint's folder or URI as a local folder, downloaded for the time being where it is not."""
    if fs is None:
        fs, location = resolve(location)
    if isinstance(fs, pyarrow.fs.LocalFileSystem):
        yield Path(location)
        return
    if fs.get_file_info(location).type != pyarrow.fs.FileType.Directory:
        raise UserError(f"{location}: no such checkpoint folder")
    import ray.train

    with ray.train.Checkpoint(location, fs).as_directory() as folder:
        yield Path(folder)


def dump_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
