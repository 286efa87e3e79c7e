"""The optimizers: AdamW, Adam-atan2 and Muon; and an average of the weights.

A step is made of operations on lists of tensors, so that it launches few kernels however many parameters there are. It
neither waits for a GPU nor asks it anything, so it may be captured as a CUDA graph. Whatever works element by element
works on each worker's own shards.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hrm_lm.config import OptimConfig
from hrm_lm.models.layers import CrossAttention, Head, ScaledEmbedding, SelfAttention, SwiGLU


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `config.name` says, without weight decay on embeddings, norms, gates and other vectors."""
    on_gpu = device.type == "cuda"
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, ScaledEmbedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.name == "adam_atan2":
        return AdamAtan2(groups, lr=config.lr, betas=config.betas, capturable=on_gpu)
    if config.name == "muon":
        matrices = hidden_matrices(model)
        groups[0]["params"] = [p for p in decayed if p not in matrices]
        return Muon(matrices, groups, config.lr, config.weight_decay, config.betas, config.eps, fused=on_gpu)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=on_gpu)


def new_slots(group: dict[str, Any], p: nn.Parameter) -> dict[str, Tensor]:
    """The state of a parameter of `group` that has not taken a step yet."""
    if "momentum" in group:
        return {"momentum_buffer": torch.zeros_like(p)}
    # The count of steps is where it is read: on the CPU, unless the whole step runs on the device.
    on_device = group.get("fused") or group.get("capturable")
    count = torch.zeros((), device=p.device if on_device else "cpu")
    return {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This worker's shards of the tensors that are sharded. Changing a shard changes its tensor (under `no_grad`)."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


class AdamAtan2(torch.optim.Optimizer):
    """Adam whose ratio of moments goes through atan2 (arXiv 2407.05872): no epsilon, and a step that does not change
    with the scale of the gradient, however small. Weight decay is decoupled, as in AdamW.

        m = lerp(g, m, beta1),  v = lerp(g * g, v, beta2)
        p = p (1 - lr decay) - lr / (1 - beta1^t) atan2(m, sqrt(v / (1 - beta2^t)))

    The first moment's bias is corrected outside of the atan2, as HRM-Text does, so that its learning rates carry over.

    capturable: the step runs on the parameters' device alone. The count of steps is there, and so may be the learning
    rate, a 0-dim float32 tensor in `group["lr"]`. Then all parameters of a group must have taken as many steps, and
    `torch.amp.GradScaler` leaves it to the step to change nothing where a gradient is not finite; `GradScaler.unscale_`
    must come first. Such a step leaves zeros in the gradients.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        capturable: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "capturable": capturable})
        self._step_supports_amp_scaling = capturable  # GradScaler.step asks for it, and then sets `found_inf`

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            owners = [p for p in group["params"] if p.grad is not None]
            if not owners:
                continue
            for p in owners:
                self.state[p] = self.state[p] or new_slots(group, p)
            params, gradients = local(owners), local(p.grad for p in owners)
            steps, m, v = (local(self.state[p][name] for p in owners) for name in ("step", "exp_avg", "exp_avg_sq"))
            lr, (beta1, beta2) = group["lr"], group["betas"]

            if found_inf is None:
                torch._foreach_add_(steps, 1)
                torch._foreach_lerp_(m, gradients, 1 - beta1)
                torch._foreach_mul_(v, beta2)
            else:
                taken = (found_inf == 0).float()  # 1, or 0 for a step that is to change nothing
                zero_unless(taken, gradients)
                lr = lr * taken
                torch._foreach_add_(steps, [taken] * len(steps))  # a single tensor would be read by the CPU
                torch._foreach_mul_(m, 1 - (1 - beta1) * taken)
                torch._foreach_add_(m, gradients, alpha=1 - beta1)
                torch._foreach_mul_(v, 1 - (1 - beta2) * taken)
            torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])

            if group["capturable"]:
                t = steps[0].clamp(min=1)  # 0 before the first step that is taken
                angles = foreach_atan2(m, v, (1 - beta2**t).sqrt())
                torch._foreach_mul_(angles, lr / (1 - beta1**t))
                torch._foreach_sub_(params, angles)
            else:  # on the CPU a loop costs nothing
                for p, count, first, root in zip(params, steps, m, torch._foreach_sqrt(v)):
                    t = count.item()
                    root.div_(math.sqrt(1 - beta2**t))
                    p.add_(torch.atan2(first, root), alpha=-lr / (1 - beta1**t))


def zero_unless(taken: Tensor, gradients: list[Tensor]) -> None:
    """Multiplies the gradients by `taken`, 0-dim, 0 or 1. Infinity times 0 is not 0, so it is their bits that are
    multiplied.
    """
    torch._foreach_mul_([gradient.view(torch.int32) for gradient in gradients], taken.int())


def foreach_atan2(m: list[Tensor], v: list[Tensor], correction: Tensor) -> list[Tensor]:
    """atan2(m, sqrt(v) / correction) of each pair, float32; there is no foreach of atan2.

    As sqrt(v) is not negative, it is the atan of the ratio. Where v is 0 the ratio is 0 for m = 0, and else so large
    that its atan is pi / 2.
    """
    ratios = torch._foreach_rsqrt(v)
    torch._foreach_clamp_max_(ratios, 1 / torch.finfo(torch.float32).tiny)  # instead of infinity
    torch._foreach_mul_(ratios, correction)
    torch._foreach_mul_(ratios, m)
    torch._foreach_atan_(ratios)
    return ratios


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, and AdamW for all else.

    A matrix moves by its Nesterov momentum made orthogonal: all singular values are made nearly equal. The update is
    scaled to the usual root mean square of AdamW's, 0.2, so learning rate and weight decay of AdamW carry over
    (arXiv 2502.16982; `match_rms_adamw` of torch.optim.Muon).

    torch.optim.Muon would take fused projections for single matrices. Orthogonal only together, queries, keys and values
    would share an update of which the largest gradient takes the most. So each matrix is cut into its parts.

    Sharded matrices are gathered, each worker makes all of them orthogonal, and keeps its own shard. A step leaves other
    values in the gradients.
    """

    def __init__(
        self,
        matrices: dict[nn.Parameter, int],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ):
        """matrices: into how many parts, one below the other, each of them is cut. others: AdamW's parameter groups."""
        groups = [
            {"params": [p for p, n in matrices.items() if n == parts], "parts": parts}
            for parts in sorted(set(matrices.values()))
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused)
        self.adamw.state = self.state
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Changes nothing where the attribute `found_inf`, a 0-dim tensor, is there and not 0; that needs `fused`."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        for group in self.param_groups:
            if "momentum" not in group:
                continue
            owners = [p for p in group["params"] if p.grad is not None]
            if not owners:
                continue
            for p in owners:
                self.state[p] = self.state[p] or new_slots(group, p)
            gradients, buffers = local(p.grad for p in owners), local(self.state[p]["momentum_buffer"] for p in owners)
            lr = group["lr"]
            if found_inf is None:
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            else:
                taken = (found_inf == 0).float()
                lr = lr * taken
                zero_unless(taken, gradients)
                torch._foreach_mul_(buffers, 1 - (1 - group["momentum"]) * taken)
                torch._foreach_add_(buffers, gradients, alpha=1 - group["momentum"])
            torch._foreach_lerp_(gradients, buffers, group["momentum"])  # Nesterov
            torch._foreach_mul_(local(owners), 1 - lr * group["weight_decay"])
            for batch in alike(owners):
                rows, columns = batch[0].shape
                rows //= group["parts"]
                pieces = torch.stack([whole(p.grad) for p in batch]).view(-1, rows, columns)
                scale = lr * 0.2 * math.sqrt(max(rows, columns))
                updates = orthogonalized(pieces).float().mul_(scale).reshape(len(batch), -1, columns)
                torch._foreach_sub_(local(batch), [shard(update, p) for update, p in zip(updates, batch)])


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The weights of all linear layers but the head, and of how many matrices, one below the other, each consists."""
    parts = {m.weight: 1 for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, Head)}
    for module in model.modules():
        if isinstance(module, SelfAttention):  # queries, keys, values, and the gate where there is a gate
            parts[module.qkv.weight] = module.qkv.out_features // module.qkv.in_features
        elif isinstance(module, CrossAttention):
            parts[module.kv.weight] = 2
        elif isinstance(module, SwiGLU):
            parts[module.gate_up.weight] = 2
    return parts


AT_ONCE = 1 << 26
"""Elements that are made orthogonal in a batch: small matrices share their kernels, large matrices do not fill memory."""


def alike(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Batches of parameters of one shape, of at most AT_ONCE elements or a single parameter."""
    by_shape = defaultdict(list)
    for p in params:
        by_shape[p.shape].append(p)
    for same in by_shape.values():
        size = max(AT_ONCE // same[0].numel(), 1)
        for first in range(0, len(same), size):
            yield same[first : first + size]


def whole(gradient: Tensor) -> Tensor:
    """All of a gradient, gathered where it is sharded. Muon's bfloat16 is enough on GPUs; on the CPU it is slow."""
    gradient = gradient.bfloat16() if gradient.is_cuda else gradient
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def shard(update: Tensor, p: nn.Parameter) -> Tensor:
    """This worker's part of the update of `p`."""
    if not isinstance(p, DTensor):
        return update
    return distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None).to_local()


def orthogonalized(matrices: Tensor) -> Tensor:
    """(N, rows, columns). Brings all singular values of each matrix near to 1, between 0.7 and 1.2 for all but the
    smallest: Muon's five Newton-Schulz iterations, with its coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class WeightAverage:
    """Exponential moving average of the parameters that are trained: average = lerp(weights, average, decay) after every step.

    It starts from the initial weights, as HRM-Text's does, so 1 / (1 - decay) steps should be few beside the run's.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restart(self) -> None:
        for name, p in self.parameters.items():
            self.tensors[name].copy_(p)

    @torch.no_grad()
    def update(self, taken: Tensor | None = None) -> None:
        """taken: 0-dim; where it is false, the average stays as it is, to the bit."""
        averages, parameters = local(self.tensors.values()), local(self.parameters.values())
        if taken is None:
            torch._foreach_lerp_(averages, parameters, 1 - self.decay)
            return
        changes = torch._foreach_sub(parameters, averages)
        torch._foreach_mul_(changes, (1 - self.decay) * taken.float())
        torch._foreach_add_(averages, changes)

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
