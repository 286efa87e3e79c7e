"""Ray behind the loop's `Session`: a worker of a TorchTrainer, and a trial of one worker."""

import math
import os
import sys
import tempfile
import uuid
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
from hrm_lm.cluster.preemption import Lookout, Reached
from hrm_lm.cluster.run_folder import NO_VAL_LOSS
from hrm_lm.cluster.start import say
from hrm_lm.cluster.watchdog import Watchdog
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


def named(checkpoint: ray.train.Checkpoint | ray.tune.Checkpoint) -> tuple[str, AbstractContextManager[Path]]:
    """What `Session.checkpoints` gives of a checkpoint."""
    return shown(checkpoint.filesystem, checkpoint.path), opened(checkpoint)


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

    run_folder: file system and path of the folder that TensorBoard files go to. hang_timeout: seconds, 0 for never.
    start_from: the checkpoint to continue from where the run has no checkpoint of its own.
    """

    def __init__(
        self,
        driver_folder: str,
        display: Literal["bar", "lines", "none"],
        run_folder: tuple[pyarrow.fs.FileSystem, str] | None = None,
        start_from: ray.train.Checkpoint | ray.tune.Checkpoint | None = None,
        hang_timeout: float = 0,
    ):
        ray_private.quiet_reports()  # the loop says itself what it reports
        context = ray.train.get_context()
        ray_private.check_storage(context.get_storage())
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
        self._listed: set[str] = set()  # names of the checkpoints that the run had at its start
        self._watchdog = Watchdog(hang_timeout, self.rank, ray_private.fail_worker)
        self._lookout = Lookout(self.rank, self.world_size)
        self._reached = Reached(*run_folder) if self.rank == 0 and run_folder else None

    def alive(self) -> None:
        self._watchdog.alive()

    def preempted(self, step: int) -> bool:
        if self._reached:
            if not self._reached.step and (step > 1 or self._reached.before):
                say(f"resumed from step {step - 1}; {self._reached.repeated(step)}")
            self._reached.step = step
        announced = self._lookout.sees(step)
        self._watchdog.alive(step)
        return announced

    def close(self) -> None:
        """Ends what watches the loop, and copies what was written after the last report."""
        self._watchdog.close()
        if self._reached:
            self._reached.close()
        self.copy_events()

    def checkpoints(self) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        last = ray.train.get_checkpoint() or self._start_from
        if last is None:
            return
        kept = sorted(ray.train.get_all_reported_checkpoints(), key=lambda c: (c.metrics["step"], c.checkpoint.path))
        self._listed = {Path(item.checkpoint.path).name for item in kept}
        if self._reached and kept:  # the last one may be damaged
            self._reached.before = max(self._reached.before, kept[-1].metrics["step"])
        yield named(last)
        for checkpoint in (item.checkpoint for item in reversed(kept) if item.checkpoint.path != last.path):
            yield named(checkpoint)

    def report(self, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        name = f"checkpoint_{metrics['step']:08d}"
        while name in self._listed:  # of a run that went back behind it; Ray deletes that folder in its time
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
    """A trial, seen from the loop of its single worker or from the TorchTrainer of its workers.

    metric: what the sweep ranks trials by.
    """

    rank, world_size = 0, 1
    display: Display = "none"
    event_folder: Path | None = None  # Tune writes the event files

    def __init__(self, metric: str):
        self.metric = metric
        self.start_from: ray.tune.Checkpoint | None = None
        self.attempt = uuid.uuid4().hex[:8]
        """Part of the names of what this process stores, so that it never writes into a folder that was there: not the
        folder of a killed process, which may hold a part of a checkpoint, nor a folder that Tune remembers."""
        self.last_report: dict[str, Any] = {}
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        use_assigned_cpus(self.device)

    def alive(self) -> None:
        pass  # Tune lets a trial wait for others, for as long as it likes

    def preempted(self, step: int) -> bool:
        return False

    def checkpoints(self) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        if self.start_from:
            yield named(self.start_from)

    def report(self, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        assert snapshot, "a worker alone writes the whole checkpoint"
        fs, folder = ray_private.trial_folder()
        path = f"{folder}/checkpoint_{metrics['step']:08d}_{self.attempt}"
        snapshot.write(fs, path)
        self.report_stored(metrics, ray.tune.Checkpoint(path, fs))

    def report_stored(self, metrics: dict[str, Any], checkpoint: ray.tune.Checkpoint) -> None:
        """Tells Tune of a checkpoint that is in the trial's folder. Does not return if Tune stops the trial."""
        self.last_report = scored(metrics, "val_loss", self.metric)
        ray_private.report_to_tune(self.last_report, checkpoint)
