"""HRMCore: two transformer stacks, slow H and fast L, recurring over the same token states.

    z_H, z_L = x, z_L0
    repeat h_cycles:
        repeat l_cycles:  z_L = L(z_L + z_H)
        z_H = H(z_H + z_L)

The recurrence is that of HRM-Text (arXiv 2605.20613), after HRM (arXiv 2506.21734). The weights do not depend on the
cycle counts, so they are arguments of the call: a model can think longer than it was trained to.

Which applications carry gradient is decided here and nowhere else: the last `backprop_steps` of them, so H first and
at least one L. Before the window everything runs without a graph, hence without activation memory.
"""

import torch
from torch import Tensor, nn

from hrm_lm.models.layers import Rotary


class HRMCore(nn.Module):
    def __init__(self, h_stack: nn.Module, l_stack: nn.Module, d_model: int):
        super().__init__()
        self.h_stack, self.l_stack = h_stack, l_stack
        self.register_buffer("z_l0", torch.zeros(d_model))

    def forward(
        self,
        x: Tensor,
        rope: Rotary,
        mask: Tensor | None,
        h_cycles: int,
        l_cycles: int,
        backprop_steps: int | None = None,
    ) -> list[Tensor]:
        """x: (B, T, C). Returns z_H after each H-cycle, the last one being the output; `[x]` for no cycle.

        backprop_steps: length of the gradient window in applications of a stack, at least 2; None for all of them.
        """
        if h_cycles == 0:
            return [x]
        applications = ([self.l_stack] * l_cycles + [self.h_stack]) * h_cycles
        window_start = 0 if backprop_steps is None else max(len(applications) - max(backprop_steps, 2), 0)
        wants_grad = torch.is_grad_enabled()

        z_h, z_l = x, self.z_l0.to(x.dtype).expand_as(x)
        outputs = []
        for i, stack in enumerate(applications):
            if 0 < i == window_start:
                # Autocast remembers the weights it has cast; those cast without a graph would swallow the gradient.
                torch.clear_autocast_cache()
                if z_h is not x:
                    # A window that ends after the first cycle cuts x off, and the encoder would never learn. The
                    # state passes x on along its residual stream, so the Jacobian there is taken as the identity.
                    z_h = z_h + (x - x.detach())
            with torch.set_grad_enabled(wants_grad and i >= window_start):
                if stack is self.l_stack:
                    z_l = stack(z_l + z_h, rope, mask)
                else:
                    z_h = stack(z_h + z_l, rope, mask)
                    outputs.append(z_h)
        return outputs
