"""What the loop needs of whoever runs it: who am I, where do I start from, here is a checkpoint.

The loop talks to this interface, and Ray stays behind it (`hrm_lm.cluster.sessions`).
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from hrm_lm.training.metrics import Display


class Session(Protocol):
    rank: int
    world_size: int
    device: torch.device
    display: Display
    """How the run's numbers are shown while it runs."""
    event_folder: Path | None
    """A local folder for TensorBoard files."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """The checkpoint to continue from, as a local folder, if there is one."""

    def new_folder(self) -> Path:
        """An empty local folder for a checkpoint to be reported."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Hands metrics over on every rank, and a checkpoint's folder for good; those of several ranks become one.

        Metrics without `val_loss` are those of a checkpoint that was saved between validations.
        """
