"""What the loop needs of whoever runs it: which worker it is, where it starts from, and who takes a checkpoint.

The loop talks to this interface, and Ray stays behind it (`hrm_lm.cluster.sessions`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from hrm_lm.training.checkpoint import Snapshot
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

    def checkpoints(self) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        """The checkpoints to continue from, the last one first; on every rank the same. Of each its name for messages, and
        a local folder with its files. The next one is asked for where a checkpoint is damaged.
        """

    def report(self, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        """Hands metrics over on every rank, and has a snapshot written, perhaps while training goes on. What several ranks
        write becomes one checkpoint.

        Metrics without `val_loss` belong to a checkpoint that was saved between validations.
        """
