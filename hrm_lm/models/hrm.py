"""HRMCore: two transformer stacks, slow H and fast L, recurring over the same token states.

    z_H, z_L = x, z_L0
    repeat h_cycles:
        repeat l_cycles:  z_L = L(z_L + z_H)
        z_H = H(z_H + z_L)

The recurrence is that of HRM-Text (arXiv 2605.20613), after HRM (arXiv 2506.21734). The weights do not depend on the
cycle counts, so they are arguments of the call: a model can think longer than it was trained to.

Which applications carry gradient is decided here and nowhere else: `backprop_steps` of them, counted from the end of
each level, H first and at least one L. The others run without a graph, hence without activation memory.
"""

import torch
from torch import Tensor, nn

from hrm_lm.models.layers import KVCache, Rotary


class HRMCore(nn.Module):
    """`straight_through`: what part of the gradient at the window's start goes on to x where the window cuts x off."""

    def __init__(self, h_stack: nn.Module, l_stack: nn.Module, d_model: int, straight_through: float = 1.0):
        super().__init__()
        self.h_stack, self.l_stack = h_stack, l_stack
        self.straight_through = straight_through
        self.register_buffer("z_l0", torch.zeros(d_model))

    def forward(
        self,
        x: Tensor,
        rope: Rotary,
        mask: Tensor | None,
        h_cycles: int,
        l_cycles: int,
        backprop_steps: int | None = None,
        caches: list[list[KVCache]] | None = None,
    ) -> list[Tensor]:
        """x: (B, T, C). Returns z_H after each H-cycle, the last one being the output; `[x]` for no cycle.

        backprop_steps: length of the gradient window in applications of a stack, at least 2; None for all of them.
        caches: for each application of a stack, in order, those of its blocks.
        """
        if h_cycles == 0:
            return [x]
        applications = ([self.l_stack] * l_cycles + [self.h_stack]) * h_cycles
        carries = gradient_window(h_cycles, l_cycles, backprop_steps)
        wants_grad = torch.is_grad_enabled()

        z_h, z_l = x, self.z_l0.to(x.dtype).expand_as(x)
        outputs = []
        for i, stack in enumerate(applications):
            if i > 0 and carries[i] and not carries[i - 1]:
                # Autocast remembers the weights it has cast, in PyTorch before 2.13 also those cast without a graph, which
                # would swallow the gradient.
                torch.clear_autocast_cache()
                if z_h is not x and not any(carries[:i]):
                    # A window that opens after the first cycle cuts x off. The state passes x on along its residual
                    # stream, so the Jacobian there may be taken as the identity. (Times zero rather than left out:
                    # DistributedDataParallel waits for a gradient of whatever made x.)
                    z_h = z_h + self.straight_through * (x - x.detach())
            with torch.set_grad_enabled(wants_grad and carries[i]):
                cache = caches[i] if caches else None
                if stack is self.l_stack:
                    z_l = stack(z_l + z_h, rope, mask, cache)
                else:
                    z_h = stack(z_h + z_l, rope, mask, cache)
                    outputs.append(z_h)
        return outputs


def gradient_window(h_cycles: int, l_cycles: int, backprop_steps: int | None) -> list[bool]:
    """Whether each application of a stack, in order, carries gradient.

    As published (arXiv 2605.20613): of `backprop_steps` (at least 2) all but one go to the last applications of H, as
    far as there are that many, and the rest to the last ones of L.
    """
    total = h_cycles * (l_cycles + 1)
    steps = total if backprop_steps is None else min(max(backprop_steps, 2), total)
    h_steps = min(h_cycles, steps - 1)
    first_h, first_l = h_cycles - h_steps, h_cycles * l_cycles - (steps - h_steps)
    return [
        carries
        for cycle in range(h_cycles)
        for carries in (*(cycle * l_cycles + i >= first_l for i in range(l_cycles)), cycle >= first_h)
    ]
