"""What the loop needs of whoever runs it: who am I, where do I start from, here is a checkpoint.

The loop talks to this interface and to nothing else of Ray.
"""

import logging
import os
import sys
import tempfile
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Iterator, Protocol

import torch

from hrm_lm.training.metrics import Display


class Session(Protocol):
    rank: int
    world_size: int
    device: torch.device
    display: Display
    event_folder: Path | None
    """Where TensorBoard files go."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """The checkpoint to continue from, as a local folder, if there is one."""

    def new_folder(self) -> Path:
        """An empty local folder for a checkpoint to be reported."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Hands metrics over on every rank, and a checkpoint's folder for good; those of several ranks become one."""


def enter(driver_folder: str) -> None:
    """Goes where the command was given, if that is on this machine: relative paths and modules mean the driver's."""
    if os.path.isdir(driver_folder):
        os.chdir(driver_folder)
        if driver_folder not in sys.path:
            sys.path.insert(0, driver_folder)


def use_assigned_cpus(device: torch.device) -> None:
    """As many threads as Ray gave this worker CPUs, where these do the work."""
    import ray

    if device.type == "cpu" and ray.is_initialized():
        torch.set_num_threads(max(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)), 1))


class RayTrainSession:
    """A worker of a `TorchTrainer`."""

    def __init__(self, driver_folder: str, display: Display, event_folder: str | None, start_from=None):
        """start_from: a `ray.train.Checkpoint` to continue from where the run has none of its own."""
        import ray.train
        import ray.train.torch

        # The loop says itself what it reports. (Ray 2.60 names this logger by its file, so LoggingConfig misses it.)
        logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        use_assigned_cpus(self.device)
        self.display: Display = display if self.rank == 0 else "none"
        self.event_folder = Path(event_folder) if event_folder and self.rank == 0 else None
        # Ray gives each worker a scratch folder; the config's relative paths mean the driver's.
        self._scratch = os.getcwd() if os.getcwd() != driver_folder else None
        enter(driver_folder)
        self._start_from = start_from

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint() or self._start_from
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            yield Path(folder) if folder else None

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="checkpoint_", dir=self._scratch))

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        import ray.train

        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None,
            checkpoint_dir_name=f"checkpoint_{metrics['step']:08d}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )
