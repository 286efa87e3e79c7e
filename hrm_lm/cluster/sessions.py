"""Ray behind the loop's `Session`: a worker of a TorchTrainer, and a trial of one worker."""

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import ray.tune
import torch

from hrm_lm.cluster import ray_private
from hrm_lm.cluster.run_folder import NO_VAL_LOSS
from hrm_lm.cluster.start import say
from hrm_lm.filesystem import reason, retrying, shown, storage_error
from hrm_lm.training.checkpoint import Snapshot
from hrm_lm.training.checkpoint_files import empty_folder
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

    Tune ranks a checkpoint without its score above all others and a NaN below them.
    """
    return dict.fromkeys(names, math.nan) | metrics


@contextmanager
def opened(checkpoint: ray.train.Checkpoint | ray.tune.Checkpoint) -> Iterator[Path]:
    """The checkpoint as a local folder, downloaded once a node. Raises UserError where it cannot be read.

    Storage that is away is waited for before the download, and not in it: other workers of the node would take what is
    there for all of it.
    """
    fs, what = checkpoint.filesystem, f"{shown(checkpoint.filesystem, checkpoint.path)}: cannot be read"
    with ExitStack() as stack:
        try:
            retrying(what, lambda: fs.get_file_info(checkpoint.path))
            folder = stack.enter_context(checkpoint.as_directory())
        except OSError as error:
            raise storage_error(what, error) from None
        yield Path(folder)


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
        self.event_folder: Path | None = None
        self._run_folder = run_folder
        if self.rank == 0 and run_folder:
            fs, path = run_folder
            # TensorBoard files grow in place, which object storage cannot do; there they are copied again and again.
            local = isinstance(fs, pyarrow.fs.LocalFileSystem)
            self.event_folder = Path(path if local else tempfile.mkdtemp(prefix="events_", dir=self._scratch))
        enter(driver_folder)
        self._start_from = start_from
        self._damaged: set[str] = set()  # names of checkpoints

    def checkpoints(self) -> Iterator[AbstractContextManager[Path]]:
        last = ray.train.get_checkpoint() or self._start_from
        if last is None:
            return
        yield opened(last)
        self._damaged.add(Path(last.path).name)
        kept = sorted(ray.train.get_all_reported_checkpoints(), key=lambda c: (c.metrics["step"], c.checkpoint.path))
        for checkpoint in (item.checkpoint for item in reversed(kept) if item.checkpoint.path != last.path):
            yield opened(checkpoint)
            self._damaged.add(Path(checkpoint.path).name)

    def report(self, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        name = f"checkpoint_{metrics['step']:08d}"
        while name in self._damaged:  # Ray still lists it, and deletes its folder in its time
            name += "_again"
        storage = ray.train.get_context().get_storage()
        fs, path = storage.storage_filesystem, storage.build_checkpoint_path_from_name(name)

        def upload(checkpoint: ray.train.Checkpoint, _: str) -> ray.train.Checkpoint:
            assert snapshot is not None
            snapshot.write(fs, path)
            return checkpoint

        if self.rank == 0 and snapshot and snapshot.is_sharded:
            # No worker writes before all have called `ray.train.report`, which agrees on the name.
            empty_folder(fs, path)
        ray.train.report(
            {"val_loss": NO_VAL_LOSS} | metrics,
            checkpoint=ray.train.Checkpoint(path, fs) if snapshot else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=False,  # it is where it belongs
        )
        self.copy_events()

    def copy_events(self) -> None:
        """Copies TensorBoard files to object storage. A failure is only told: curves are not worth a run."""
        if self.event_folder is None or self._run_folder is None or str(self.event_folder) == self._run_folder[1]:
            return
        fs, path = self._run_folder
        here = pyarrow.fs.LocalFileSystem()
        try:
            pyarrow.fs.copy_files(str(self.event_folder), path, source_filesystem=here, destination_filesystem=fs)
        except OSError as error:
            say(f"{shown(fs, path)}: TensorBoard files could not be copied there: {reason(error)}")


class TuneSession:
    """A trial of one worker, seen from the loop.

    metric: what the sweep ranks trials by. start_from: the checkpoint to continue from.
    """

    rank, world_size = 0, 1
    display: Display = "none"
    event_folder: Path | None = None  # Tune writes the event files

    def __init__(self, metric: str, start_from: ray.tune.Checkpoint | None):
        self.metric, self._start_from = metric, start_from
        self.last_report: dict[str, Any] = {}
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        use_assigned_cpus(self.device)

    def checkpoints(self) -> Iterator[AbstractContextManager[Path]]:
        if self._start_from:
            yield opened(self._start_from)

    def report(self, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        assert snapshot, "a worker alone writes the whole checkpoint"
        self.last_report = scored(metrics, "val_loss", self.metric)
        with tempfile.TemporaryDirectory(prefix="checkpoint_", ignore_cleanup_errors=True) as folder:
            snapshot.write(pyarrow.fs.LocalFileSystem(), folder)
            ray.tune.report(self.last_report, checkpoint=ray.tune.Checkpoint.from_directory(folder))
