"""What the loop needs of whoever runs it: which worker it is, where it starts from, and who takes a checkpoint.

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

    def alive(self) -> None:
        """Told wherever the loop gets on in what takes longer than a step: a loop that does not is taken for hung."""

    def preempted(self, step: int) -> bool:
        """Told after each step. Whether a node of the run is about to go: then the loop saves and ends. The answer is the
        same on all ranks.
        """

    def restored(self) -> AbstractContextManager[Path | None]:
        """The checkpoint to continue from, as a local folder; None where the run has no checkpoint yet."""

    def new_folder(self) -> Path:
        """An empty local folder for a checkpoint to be reported."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        """Hands metrics over on every rank, and a checkpoint's folder for good. Folders of several ranks become one
        checkpoint.

        Metrics without `val_loss` belong to a checkpoint that was saved between validations.
        """
