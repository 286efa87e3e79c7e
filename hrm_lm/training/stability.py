"""What a step decides about itself on the device: whether it is finite, and whether its loss is a spike.

`train.on_nonfinite: skip` does not take a step that is not finite. The device decides that, and the host does not wait for
it. Workers decide from numbers that they have reduced over all of them, hence alike. What a run does about an interval
with such steps is in `hrm_lm.training.rollback`.

A spike is a loss that exceeds its running mean by `train.spike` running standard deviations. OLMo 2 (arXiv 2501.00656)
counts spikes that way, with 7 deviations.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

WATCHED = ("in_a_row", "skipped", "spikes", "losses", "mean", "variance")
"""Steps skipped in a row up to now, all steps skipped or left out, spikes; losses seen, their running mean and variance."""
MEMORY = 100
"""Losses that the running mean is taken of, about. Before so many were seen, none is a spike."""


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
