"""HRMCore: two transformer stacks, slow H and fast L, recurring over the same token states.

    z_H, z_L = x, z_L0
    repeat h_cycles:
        repeat l_cycles:  z_L = L(z_L + z_H)
        z_H = H(z_H + z_L)

The recurrence is that of HRM-Text (arXiv 2605.20613), after HRM (arXiv 2506.21734). The weights do not depend on the
cycle counts, so the counts are an argument of the call: a model can think longer than it was trained to.

Which applications of a stack carry gradient is decided here and nowhere else (`carries_gradient`). `backprop_steps` of
them do, counted from the end: those of H come first, and at least the last application of L counts. The others run
without a graph, hence without activation memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hrm_lm.config import Cycles
from hrm_lm.models.cache import KVCache
from hrm_lm.models.layers import Rotary


class HRMCore(nn.Module):
    def __init__(self, h_stack: nn.Module, l_stack: nn.Module, d_model: int, straight_through: float = 1.0):
        """straight_through: how much of the gradient reaches x where the applications without gradient cut x off. These
        applications pass x on along their residual stream, so their Jacobian may be taken as the identity (1).
        With 0 no gradient passes them.
        """
        super().__init__()
        self.h_stack, self.l_stack = h_stack, l_stack
        self.straight_through = straight_through
        self.register_buffer("z_l0", torch.zeros(d_model))

    def forward(
        self,
        x: Tensor,
        rope: Rotary,
        mask: Tensor | None,
        cycles: Cycles,
        backprop_steps: int | None = None,
        caches: Sequence[list[KVCache]] | None = None,
    ) -> list[Tensor]:
        """x: (B, T, C). Returns z_H after each H-cycle, the last of which is the output; `[x]` for no cycle.

        backprop_steps: how many applications carry gradient, at least 2; None for all of them.
        caches: the blocks' caches of each application, in order.
        """
        if cycles.h == 0:
            return [x]
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

        z_h, z_l = x, self.z_l0.to(x.dtype).expand_as(x)
        outputs = []
        for h in range(cycles.h):
            for l in range(cycles.l):
                z_l = applied(self.l_stack, z_l + z_h, l_carries[h][l])
            z_h = applied(self.h_stack, z_h + z_l, h_carries[h])
            outputs.append(z_h)
            if not h_carries[h] and h + 1 < cycles.h and h_carries[h + 1]:
                # From here on gradient flows, and x is cut off. (Times zero rather than left out:
                # DistributedDataParallel waits for a gradient of whatever made x.)
                z_h = z_h + self.straight_through * (x - x.detach())
        return outputs


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
