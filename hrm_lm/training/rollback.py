"""What a run does about steps whose loss or gradient is not finite, and about spikes of its loss.

`train.on_nonfinite: rollback` goes back to the last checkpoint, of which every worker keeps a copy in its host's memory.
The run then takes the same steps again, but leaves out the steps that were bad. `Progress.left_out` names these, so a
resume leaves out the same. All workers have the same numbers, and so do alike.

PaLM (arXiv 2204.02311, section 5.1) found that spikes come of certain batches at a certain state of the weights, and went
back and left out 200 to 500 batches of some 255,000. Here it is a thousandth of a run's steps before the spike and as many
after it.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hrm_lm.training.checkpoint import Progress, state_tensors
from hrm_lm.training.optim import local
from hrm_lm.training.stability import WATCHED
from hrm_lm.training.step import Stats, TrainState

MOST_IN_A_ROW = 100
"""Steps that may be skipped in a row. Weights whose every gradient is not finite do not heal."""
MOST_ROLLBACKS = 10
"""Rollbacks to the same checkpoint, or to checkpoints between which no step was taken. After so many the next step that
is not finite ends the run, and a spike is only told."""


class Diverged(Exception):
    """The run cannot go on from `step`. what: a clause that says why."""

    def __init__(self, step: int, what: str = "the loss or gradient was not finite"):
        self.step, self.what = step, what


def is_left_out(progress: Progress, step: int) -> bool:
    return any(first <= step <= last for first, last in progress.left_out)


def leave_out(state: TrainState, stats: Stats) -> None:
    """In place of a step."""
    state.step += 1
    stats.steps += 1
    stats.watched[WATCHED.index("skipped")] += 1


class Guard:
    """Looks at each interval's numbers. With `rollback` it keeps a copy of the last checkpoint's state, and goes back."""

    def __init__(self, state: TrainState, stats: Stats, progress: Progress, tell: Callable[[str], None]):
        self.state, self.stats, self.tell = state, stats, tell
        self.config = state.config.train
        self.skipped = progress.watched.get("skipped", 0)
        self.taken, self.rollbacks = -1.0, 0
        self.keep(progress)

    def keep(self, progress: Progress) -> None:
        """Goes back to here from now on."""
        taken = progress.step - progress.watched.get("skipped", 0)
        if taken > self.taken:
            self.taken, self.rollbacks = taken, 0
        if self.config.on_nonfinite == "rollback":
            self.tensors: list[Tensor] = []  # frees the memory of the last copy first
            self.tensors = [tensor.detach().to("cpu", copy=True) for tensor in local(state_tensors(self.state))]
            self.scaler, self.progress = self.state.scaler.state_dict(), copy.deepcopy(progress)

    def counts(self, progress: Progress) -> dict[str, int]:
        """What there is to count with this config: `skipped`, `rollbacks`, `spikes`."""
        stop, rollback = (self.config.on_nonfinite == kind for kind in ("stop", "rollback"))
        counts = {} if stop else {"skipped": int(progress.watched["skipped"])}
        counts |= {"rollbacks": progress.rollbacks} if rollback else {}
        return counts | ({"spikes": int(progress.watched["spikes"])} if self.config.spike else {})

    def rolled_back(self, interval: dict[str, Any]) -> Progress | None:
        """Tells what happened in an interval. Where the run goes back, returns how far it then is. All workers do alike.

        Raises Diverged where the run cannot go on.
        """
        bad, spike, watched = interval["bad_step"], interval["spike_step"], interval["watched"]
        step, rollback = interval["step"], self.config.on_nonfinite == "rollback"
        if bad is not None:
            if not rollback:
                raise Diverged(bad)
            if self.rollbacks == MOST_ROLLBACKS:
                what = f"after {MOST_ROLLBACKS} rollbacks to step {self.progress.step}, the loss or gradient was not finite"
                raise Diverged(bad, what)
        if watched["in_a_row"] >= MOST_IN_A_ROW:
            raise Diverged(
                step, f"{watched['in_a_row']:.0f} steps in a row were skipped: the loss or gradient was not finite"
            )
        if bad is not None and (spike is None or bad <= spike):
            return self._go_back(bad, bad, f"step {bad}: the loss or gradient was not finite")
        if spike is not None:
            what = f"step {spike}: the loss was {self.config.spike:g} standard deviations above its running mean"
            if rollback and self.rollbacks < MOST_ROLLBACKS:
                around = max(self.config.steps // 1000, 1)
                self.progress.watched["spikes"] = self.progress.watched.get("spikes", 0) + 1
                return self._go_back(max(spike - around, self.progress.step + 1), spike + around, what)
            self.tell(what)
        if self.config.on_nonfinite == "skip" and (count := watched["skipped"] - self.skipped):
            self.tell(f"step {step}: {count:.0f} of the last steps skipped, whose loss or gradient was not finite")
        self.skipped = watched["skipped"]
        return None

    @torch.no_grad()
    def _go_back(self, first: int, last: int, what: str) -> Progress:
        self.tell(f"{what}; back to step {self.progress.step}, and steps {first} to {last} are left out")
        self.rollbacks += 1
        self.progress.rollbacks += 1
        self.progress.left_out.append((first, last))
        state = self.state
        for own, kept in zip(local(state_tensors(state)), self.tensors, strict=True):  # in place, for CUDA graphs
            own.copy_(kept)
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(self.scaler)
        state.step = self.progress.step
        self.stats.restart(state.step, self.progress.watched)
        return copy.deepcopy(self.progress)
