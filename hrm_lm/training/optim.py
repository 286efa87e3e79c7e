"""What the published HRM-Text recipe (arXiv 2605.20613) has beside AdamW: Adam-atan2, and an average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AdamAtan2(torch.optim.Optimizer):
    """Adam whose ratio of moments goes through atan2 (arXiv 2407.05872): no epsilon, and a step that does not change
    with the scale of the gradient, however small. Weight decay is decoupled, as in AdamW.

        m = lerp(g, m, beta1),  v = lerp(g * g, v, beta2)
        p = p (1 - lr decay) - lr / (1 - beta1^t) atan2(m, sqrt(v / (1 - beta2^t)))

    The first moment's bias is corrected outside of the atan2, as HRM-Text does, so that its learning rates carry over.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros(()), **zeros}  # the count stays on the CPU: reading it is free
            gradients = [p.grad for p in params]
            steps, m, v = ([self.state[p][name] for p in params] for name in ("step", "exp_avg", "exp_avg_sq"))
            lr, (beta1, beta2) = group["lr"], group["betas"]

            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_lerp_(m, gradients, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
            torch._foreach_add_(steps, 1)
            roots = torch._foreach_sqrt(v)
            for p, step, first, root in zip(params, steps, m, roots):  # there is no foreach of atan2
                t = step.item()
                root.div_(math.sqrt(1 - beta2**t))
                p.add_(torch.atan2(first, root), alpha=-lr / (1 - beta1**t))


class WeightAverage:
    """Exponential moving average of a model's parameters: average = lerp(weights, average, decay) after every step.

    It starts from the initial weights, as HRM-Text's does, so 1 / (1 - decay) steps should be few beside the run's.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restart(self) -> None:
        for name, p in self.parameters.items():
            self.tensors[name].copy_(p)

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights for as long as this lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self.parameters.items():
            kept = p.clone()
            p.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
