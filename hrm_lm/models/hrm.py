"""HRMCore: two transformer stacks, slow H and fast L, recurring over the same token states.

    z_H, z_L = x, z_L0
    repeat h_cycles:
        repeat l_cycles:  z_L = L(z_L + z_H)
        z_H = H(z_H + z_L)

The recurrence is that of HRM-Text (arXiv 2605.20613), after HRM (arXiv 2506.21734). The weights do not depend on the
cycle counts, so the counts are an argument of the call: a model can think longer than it was trained to. `carry` goes on
from where an earlier call ended, as in the training segments of HRM.

What L reads may be more (`model.hrm.inject`). Without x in it, a long recurrence forgets x (arXiv 2604.15259).

    none   L(z_L + z_H)             HRM-Text
    add    L(z_L + z_H + x)         HRM, and TRM (arXiv 2510.04871), whose L and H are a single network
    gated  L(a z_L + z_H + b x)     after Parcae (arXiv 2604.12946): a in (0, 1) and b are learned, for each channel

Which applications of a stack carry gradient is decided here and nowhere else (`carries_gradient`). `backprop_steps` of
them do, counted from the end: those of H come first, and at least the last application of L counts. The others run
without a graph, hence without activation memory.

With `cycles.halt` a sample thinks until z_H has come to rest. No head says when, which would have to be trained and tends to
collapse (arXiv 2604.21999): the change of z_H itself does (arXiv 2606.18206).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hrm_lm.config import Cycles
from hrm_lm.models.cache import KVCache
from hrm_lm.models.layers import Mask, Rotary

Inject = Literal["none", "add", "gated"]


class Carry(NamedTuple):
    """Where a recurrence stands, (B, T, C) each."""

    z_h: Tensor
    z_l: Tensor

    def detach(self) -> "Carry":
        return Carry(self.z_h.detach(), self.z_l.detach())


class Thought(NamedTuple):
    """What the core made of x."""

    states: list[Tensor]
    """z_H after each H-cycle, (B, T, C), the last of which is the output; where samples halt, the output alone. `[x]` for no
    cycle."""
    start: Tensor
    """z_H before the first of them."""
    carry: Carry
    cycles: Tensor | None = None
    """(B,) int64: the H-cycles that each sample took, where samples halt."""

    @classmethod
    def of(cls, state: Tensor) -> "Thought":
        """That of a model without recurrence."""
        return cls([state], state, Carry(state, state))

    def changes(self, last: bool = False) -> Tensor:
        """|z' - z|^2 / |z'|^2 of each H-cycle, (h_cycles, B, T) float32: how far z_H is from a fixed point. last: (B, T), of
        the last H-cycle alone.
        """
        pairs = list(pairwise([self.start, *self.states]))
        squares = [change_and_size(old, new) for old, new in (pairs[-1:] if last else pairs)]
        changes = [change / size.clamp(min=1e-12) for change, size in squares]
        return changes[0] if last else torch.stack(changes)


def change_and_size(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """|new - old|^2 and |new|^2 of each token's state, (B, T) float32."""
    old, new = old.float(), new.float()
    return (new - old).square().sum(-1), new.square().sum(-1)


class HRMCore(nn.Module):
    def __init__(
        self,
        h_stack: nn.Module,
        l_stack: nn.Module | None,
        d_model: int,
        straight_through: float = 1.0,
        inject: Inject = "none",
    ):
        """l_stack: None where H's stack is L's, too.

        straight_through: how much of the gradient reaches x where the applications without gradient cut x off. These
        applications pass x on along their residual stream, so their Jacobian may be taken as the identity (1).
        With 0 no gradient passes them. An x that is injected is never cut off.
        """
        super().__init__()
        self.h_stack, self.l_stack = h_stack, l_stack
        self.straight_through, self.inject = straight_through, inject
        self.register_buffer("z_l0", torch.zeros(d_model))
        if inject == "gated":
            self.decay = nn.Parameter(torch.full((d_model,), 2.0))  # sigmoid(2) = 0.88
            self.scale = nn.Parameter(torch.ones(d_model))

    @property
    def fast(self) -> nn.Module:
        """L's stack."""
        return self.h_stack if self.l_stack is None else self.l_stack

    def forward(
        self,
        x: Tensor,
        rope: Rotary,
        mask: Mask,
        cycles: Cycles,
        backprop_steps: int | None = None,
        caches: Sequence[list[KVCache]] | None = None,
        carry: Carry | None = None,
        tokens: Tensor | None = None,
    ) -> Thought:
        """x: (B, T, C).

        backprop_steps: how many applications carry gradient, at least 2; None for all of them.
        caches: the blocks' caches of each application, in order. carry: where to go on from; it takes no gradient.
        tokens: (B, T), 1 where x has a token and 0 at padding; needed where samples halt.
        """
        if cycles.h == 0:
            return Thought.of(x)
        if cycles.halt is not None:
            assert tokens is not None and carry is None
            return self._until_rest(x, rope, mask, cycles, cycles.halt, tokens, caches)
        z_h, z_l = carry or Carry(x, self.z_l0.to(x.dtype).expand_as(x))
        l_carries, h_carries = carries_gradient(cycles, backprop_steps)
        wants_grad, carried = torch.is_grad_enabled(), True
        cache = iter(caches) if caches else None

        def applied(stack: nn.Module, state: Tensor, carries: bool) -> Tensor:
            nonlocal carried
            if carries and not carried:
                # Autocast remembers the weights that it has cast. PyTorch before 2.13 remembers weights that were cast
                # without a graph, too, and they would swallow the gradient.
                torch.clear_autocast_cache()
            carried = carries
            with torch.set_grad_enabled(wants_grad and carries):
                return stack(state, rope, mask, next(cache) if cache else None)

        def passed_through(z_h: Tensor) -> Tensor:
            """z_H where gradient flows from here on and x is cut off. (Times zero rather than left out:
            DistributedDataParallel waits for a gradient of whatever made x.)"""
            return z_h + self.straight_through * (x - x.detach()) if self.inject == "none" else z_h

        start, states = z_h, []
        if carry is not None and h_carries[0]:
            z_h = passed_through(z_h)
        for h in range(cycles.h):
            for l in range(cycles.l):
                z_l = applied(self.fast, self._read(x, z_h, z_l), l_carries[h][l])
            z_h = applied(self.h_stack, z_h + z_l, h_carries[h])
            states.append(z_h)
            if not h_carries[h] and h + 1 < cycles.h and h_carries[h + 1]:
                z_h = passed_through(z_h)
        return Thought(states, start, Carry(states[-1], z_l))

    def _read(self, x: Tensor, z_h: Tensor, z_l: Tensor) -> Tensor:
        """What L reads."""
        if self.inject == "gated":
            return torch.sigmoid(self.decay).to(x.dtype) * z_l + z_h + self.scale.to(x.dtype) * x
        return z_l + z_h + x if self.inject == "add" else z_l + z_h

    @torch.no_grad()
    def _until_rest(
        self,
        x: Tensor,
        rope: Rotary,
        mask: Mask,
        cycles: Cycles,
        halt: float,
        tokens: Tensor,
        caches: Sequence[list[KVCache]] | None,
    ) -> Thought:
        """Samples at rest leave the batch. Where there are caches they stay, and the caches of the cycles that they do not
        take get what their last cycle left: an answer does not depend on the samples beside it.
        """
        start, rest = x, torch.zeros_like(x)
        counts = torch.zeros(len(x), dtype=torch.long, device=x.device)
        there = torch.arange(len(x), device=x.device)  # the samples that are in the batch
        each = cycles.l + 1
        z_h, z_l = x, self.z_l0.to(x.dtype).expand_as(x)
        for h in range(cycles.h):
            cache = iter(caches[h * each : (h + 1) * each]) if caches else None
            for _ in range(cycles.l):
                z_l = self.fast(self._read(x, z_h, z_l), rope, mask, next(cache) if cache else None)
            new = self.h_stack(z_h + z_l, rope, mask, next(cache) if cache else None)
            change, size = ((square * tokens).sum(1) for square in change_and_size(z_h, new))
            z_h, running = new, counts[there] == 0
            halts = running & ((change <= halt**2 * size) | (h + 1 == cycles.h))
            rest[there[halts]], counts[there[halts]] = z_h[halts], h + 1
            if not (running & ~halts).any():
                break
            if not caches:
                there, x, z_h, z_l, tokens = (rows[~halts] for rows in (there, x, z_h, z_l, tokens))
                mask, rope = _kept(mask, halts), (_kept(rope[0], halts), _kept(rope[1], halts))
        if caches:
            for h in range(1, cycles.h):
                for before, after in zip(caches[(h - 1) * each : h * each], caches[h * each : (h + 1) * each]):
                    for source, target in zip(before, after):
                        target.repeat(source, counts <= h)
        return Thought([rest], start, Carry(rest, rest), counts)


def _kept(rows: Tensor, leave: Tensor) -> Tensor:
    """What remains of a mask or of rotary tables where some samples leave. What all samples share has no row for each."""
    return rows[~leave] if len(rows) == len(leave) and rows.dim() == 4 else rows


def carries_gradient(cycles: Cycles, backprop_steps: int | None) -> tuple[list[list[bool]], list[bool]]:
    """Whether each application carries gradient: of L by H-cycle and L-cycle, and of H by H-cycle.

    As published (arXiv 2605.20613): all but one of the `backprop_steps` (at least 2) go to the last applications of H,
    as far as there are that many. The rest go to the last applications of L.
    """
    total = cycles.h * (cycles.l + 1)
    steps = total if backprop_steps is None else min(max(backprop_steps, 2), total)
    h_steps = min(cycles.h, steps - 1)
    first_h, first_l = cycles.h - h_steps, cycles.h * cycles.l - (steps - h_steps)
    l_carries = [[h * cycles.l + l >= first_l for l in range(cycles.l)] for h in range(cycles.h)]
    return l_carries, [h >= first_h for h in range(cycles.h)]
