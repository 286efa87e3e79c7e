"""Ray behind the loop's `Session`: a worker of a TorchTrainer, and a trial of one worker."""

import math
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Literal

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import ray.tune
import torch

from hrm_lm.cluster import ray_private
from hrm_lm.cluster.start import say
from hrm_lm.filesystem import reason, shown
from hrm_lm.training.metrics import Display


def enter(driver_folder: str) -> None:
    """Goes where the command was given, if that is on this machine: relative paths and modules mean the driver's."""
    if os.path.isdir(driver_folder):
        os.chdir(driver_folder)
        if driver_folder not in sys.path:
            sys.path.insert(0, driver_folder)


def use_assigned_cpus(device: torch.device) -> None:
    """Takes as many threads as Ray gave this worker CPUs, where the CPUs do the work."""
    if device.type == "cpu" and ray.is_initialized():
        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))


def scored(metrics: dict[str, Any], *names: str) -> dict[str, Any]:
    """The metrics of a report, with NaN for the scores `names` where there was no validation.

    Ray ranks a checkpoint without its score above all others and a NaN below them.
    """
    return dict.fromkeys(names, math.nan) | metrics


class RayTrainSession:
    """A worker of a `TorchTrainer`.

    run_folder: file system and path of the folder that TensorBoard files go to.
    start_from: the checkpoint to continue from where the run has no checkpoint of its own.
    """

    def __init__(
        self,
        driver_folder: str,
        display: Literal["bar", "lines", "none"],
        run_folder: tuple[pyarrow.fs.FileSystem, str] | None = None,
        start_from: ray.train.Checkpoint | ray.tune.Checkpoint | None = None,
    ):
        ray_private.quiet_reports()  # the loop says itself what it reports
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        use_assigned_cpus(self.device)
        self.display: Display = "none"
        if self.rank == 0 and display != "none":
            self.display = ray_private.progress_bar if display == "bar" else "lines"
        # Ray gives each worker a scratch folder; the config's relative paths mean the driver's.
        self._scratch = os.getcwd() if os.getcwd() != driver_folder else None
        self.event_folder, self._copy_events = None, None
        if self.rank == 0 and run_folder:
            fs, path = run_folder
            if isinstance(fs, pyarrow.fs.LocalFileSystem):
                self.event_folder = Path(path)
            else:
                self.event_folder = Path(tempfile.mkdtemp(prefix="events_", dir=self._scratch)).absolute()
                self._copy_events = partial(copy_events, self.event_folder, fs, path)
        enter(driver_folder)
        self._start_from = start_from

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint() or self._start_from
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            yield Path(folder) if folder else None

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="checkpoint_", dir=self._scratch))

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        ray.train.report(
            scored(metrics, "val_loss"),
            checkpoint=ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None,
            checkpoint_dir_name=f"checkpoint_{metrics['step']:08d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )
        if self._copy_events:
            self._copy_events()

    def close(self) -> None:
        """Brings the last of the TensorBoard files to storage."""
        if self._copy_events:
            self._copy_events()
            shutil.rmtree(self.event_folder, ignore_errors=True)


def copy_events(folder: Path, fs: pyarrow.fs.FileSystem, path: str) -> None:
    """Copies TensorBoard files to storage. A failure is only told: curves are not worth a run."""
    try:
        pyarrow.fs.copy_files(
            str(folder), path, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=fs
        )
    except OSError as error:
        say(f"{shown(fs, path)}: TensorBoard files could not be copied there: {reason(error)}")


class TuneSession:
    """A trial of one worker, seen from the loop.

    metric: what the sweep ranks trials by. start_from: the checkpoint to continue from.
    """

    rank, world_size, event_folder = 0, 1, None  # Tune writes the event files
    display: Display = "none"

    def __init__(self, metric: str, start_from: ray.tune.Checkpoint | None):
        self.metric, self._start_from, self.last_report = metric, start_from, {}
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        use_assigned_cpus(self.device)

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        with self._start_from.as_directory() if self._start_from else nullcontext() as folder:
            yield Path(folder) if folder else None

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="checkpoint_"))

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        self.last_report = scored(metrics, "val_loss", self.metric)
        try:
            ray.tune.report(self.last_report, checkpoint=ray.tune.Checkpoint.from_directory(checkpoint))
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)
