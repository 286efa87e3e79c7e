"""What a run does about steps whose loss or gradient is not finite, and about spikes of its loss.

`train.on_nonfinite: skip` does not take a step that is not finite. The device decides that, and the host does not wait for
it. `rollback` goes back to the last checkpoint, of which every worker keeps a copy in its host's memory. The run then takes
the same steps again, but leaves out the steps that were bad. `Progress.left_out` names these, so a resume leaves out the
same. Workers decide from numbers that they have reduced over all of them, hence alike.

A spike is a loss that exceeds its running mean by `train.spike` running standard deviations. OLMo 2 (arXiv 2501.00656)
counts spikes that way, with 7 deviations. PaLM (arXiv 2204.02311, section 5.1) found that spikes come of certain batches
at a certain state of the weights, and went back and left out 200 to 500 batches of some 255,000. Here it is a thousandth
of a run's steps before the spike and as many after it.
"""

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hrm_lm.training.checkpoint import Progress, state_tensors
from hrm_lm.training.optim import local

if TYPE_CHECKING:
    from hrm_lm.training.step import Stats, TrainState

WATCHED = ("in_a_row", "skipped", "spikes", "losses", "mean", "variance")
"""Steps skipped in a row up to now, all steps skipped or left out, spikes; losses seen, their running mean and variance."""
MEMORY = 100
"""Losses that the running mean is taken of, about. Before so many were seen, none is a spike."""
MOST_IN_A_ROW = 100
"""Steps that may be skipped in a row. Weights whose every gradient is not finite do not heal."""
MOST_ROLLBACKS = 10
"""Rollbacks to the same checkpoint, or to checkpoints between which no step was taken. After so many the next step that
is not finite ends the run, and a spike is only told."""


class Diverged(Exception):
    """The run cannot go on from `step`. what: a clause that says why."""

    def __init__(self, step: int, what: str = "the loss or gradient was not finite"):
        self.step, self.what = step, what


def on_all(loss: Tensor, labelled: Tensor, finite: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """The global batch's mean loss, 0-dim float64, and whether the step is finite on all workers.

    loss: of this worker's tokens, summed. labelled: how many tokens the global batch has.
    """
    both = torch.stack([loss.double(), (~finite).double()])
    if world_size > 1:
        dist.all_reduce(both)
    return both[0] / labelled.clamp(min=1), both[1] == 0


def observed(watched: Tensor, loss: Tensor, finite: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """What WATCHED names, (6,) float64, after a step of that loss; and whether the loss is a spike.

    The running variance is Finch's ("Incremental calculation of weighted mean and variance", 2009). A spike counts for
    no more than the least loss that were a spike, so that the mean follows where losses stay high.
    """
    in_a_row, skipped, spikes, losses, mean, variance = watched.unbind()
    good = finite.double()
    in_a_row, skipped, spike = (in_a_row + 1) * (1 - good), skipped + (1 - good), torch.zeros_like(finite)
    if threshold:
        bound = (mean + threshold * variance.sqrt()).masked_fill(losses < MEMORY, math.inf)
        spike = finite & (loss > bound)
        losses = losses + good
        share = good / losses.clamp(1, MEMORY)
        change = torch.where(finite, loss.minimum(bound) - mean, torch.zeros_like(mean))
        mean, variance = mean + share * change, (1 - share) * (variance + share * change * change)
    return torch.stack([in_a_row, skipped, spikes + spike, losses, mean, variance]), spike


def update(state: "TrainState", finite: Tensor | None = None) -> None:
    """The step of the optimizer and of the average. finite: 0-dim; where it is false, the step changes nothing."""
    on_device = any(group.get("fused") or group.get("capturable") for group in state.optimizer.param_groups)
    if finite is not None and on_device:
        # What GradScaler tells an optimizer. Every optimizer that steps on the device heeds it.
        state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    takes = finite is None or on_device or bool(finite)
    if takes:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if takes and state.average:
        state.average.update(finite if on_device else None)


def is_left_out(progress: Progress, step: int) -> bool:
    return any(first <= step <= last for first, last in progress.left_out)


def leave_out(state: "TrainState", stats: "Stats") -> None:
    """In place of a step."""
    state.step += 1
    stats.steps += 1
    stats.watched[WATCHED.index("skipped")] += 1


class Guard:
    """Looks at each interval's numbers. With `rollback` it keeps a copy of the last checkpoint's state, and goes back."""

    def __init__(self, state: "TrainState", stats: "Stats", progress: Progress, tell: Callable[[str], None]):
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
