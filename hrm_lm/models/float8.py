"""`train.mixed_precision: fp8`: the matrices of self-attention and SwiGLU multiply in float8 while training.

All three products of a matrix do: forward, the gradient of what was read, the gradient of the weight. A tensor has a
single scale, which maps its largest magnitude to the largest of its format (arXiv 2209.05433): e4m3 for weights and what
they multiply, e5m2 for gradients, whose range is wider. The rest is as with bf16: cross-attention, embedding, head and loss,
norms, gates. So is what does not learn: validation and generation multiply by the same weights in bf16.

Weights are cast once a step, however many applications and micro-batches it has (`recast`). That is why this is not
torchao's `Float8Linear`, which casts a weight at every application: here a step applies a weight many times. Where the model is
sharded a worker has whole weights only after they were gathered, in bf16, and casts these at every application.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_lm.errors import UserError
from hrm_lm.models.layers import SelfAttention, SwiGLU

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What the sizes of a float8 product are multiples of."""
CAST = (SelfAttention, SwiGLU)
"""The modules whose matrices multiply in float8."""


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as float8, and what to multiply it with to have x again, 0-dim float32. Infinity and NaN make it all NaN."""
    largest = x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * (torch.finfo(dtype).max / largest)).to(dtype), largest / torch.finfo(dtype).max


class Float8Product(torch.autograd.Function):
    """x (N, K) @ weight.T (K, O) -> (N, O) in bf16, where N, K and O are multiples of 16. The weight's gradient has its dtype.

    `torch._scaled_mm` wants its first matrix row by row and its second column by column, hence the transposed copies.
    Only the forward product takes the faster, less exact way to sum, as in torchao.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, w8: Tensor, w8t: Tensor | None, w_scale: Tensor) -> Tensor:
        """w8: (O, K), w8t: (K, O), the same values, or None if backward is to make them; weight: (O, K), for its gradient."""
        x8, x_scale = to_float8(x, E4M3)
        ctx.weight_dtype, ctx.has_w8t = weight.dtype, w8t is not None
        ctx.save_for_backward(x8, x_scale, weight if w8t is None else w8t, w_scale)
        return torch._scaled_mm(x8, w8.t(), x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x8, x_scale, w8t, w_scale = ctx.saved_tensors
        if not ctx.has_w8t:
            w8t = to_float8(w8t, E4M3)[0].t().contiguous()
        g8, g_scale = to_float8(gradient.contiguous(), E5M2)
        of_x = torch._scaled_mm(g8, w8t.t(), g_scale, w_scale, out_dtype=torch.bfloat16)
        g8t, x8t = g8.t().contiguous(), x8.t().contiguous()
        of_weight = torch._scaled_mm(g8t, x8t.t(), g_scale, x_scale, out_dtype=ctx.weight_dtype)
        return of_x, of_weight, None, None, None


class Float8Linear(nn.Linear):
    """Takes a linear layer's place and its parameter.

    sharded: whether the weight will be a sharded one. Otherwise there are float8 copies of it, which `recast` fills. They are no
    buffers: they are neither saved nor sent.
    """

    def __init__(self, linear: nn.Linear, sharded: bool = False):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.copies: tuple[Tensor, Tensor, Tensor] | None = None
        if not sharded:
            w8 = torch.zeros_like(self.weight, dtype=E4M3, requires_grad=False)
            self.copies = w8, w8.t().contiguous(), torch.ones((), device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., O), in bf16 while training."""
        if not self.training:
            return super().forward(x)
        rows = x.flatten(0, -2).to(torch.bfloat16)
        count = rows.shape[0]
        if count % MULTIPLE:
            rows = F.pad(rows, (0, 0, 0, -count % MULTIPLE))
        if self.copies:
            w8, w8t, scale = self.copies
        else:  # the gathered weight stays for the step, and a copy for each application would take room
            (w8, scale), w8t = to_float8(self.weight.detach(), E4M3), None
        y = Float8Product.apply(rows, self.weight, w8, w8t, scale)
        return y[:count].view(*x.shape[:-1], -1)


def cast_weight(weight: Tensor, w8: Tensor, w8t: Tensor, scale: Tensor) -> None:
    """Writes the last three, in place: a CUDA graph reads them there."""
    values, factor = to_float8(weight, E4M3)
    w8.copy_(values)
    w8t.copy_(values.t())
    scale.copy_(factor)


@cache
def compiled_cast_weight():
    return torch.compile(cast_weight, dynamic=False)


def use_float8(model: nn.Module, device: torch.device, sharded: bool = False) -> None:
    """From here on the model, which is on `device`, trains in float8. Its parameters and their names stay.

    sharded: whether it will be sharded.

    Raises UserError for a GPU without float8. A CPU computes it slowly.
    """
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise UserError(
            f"train.mixed_precision: fp8 needs a GPU of compute capability 8.9 or more (L4, H100), and {name} has "
            f"{version}; use bf16"
        )
    for module in list(model.modules()):
        if isinstance(module, CAST):
            for name, linear in list(module.named_children()):
                setattr(module, name, Float8Linear(linear, sharded))


def float8_weights(model: nn.Module) -> list[nn.Parameter]:
    """Lists the weights that multiply in float8 where `use_float8` was called."""
    matrices = (child for module in model.modules() if isinstance(module, CAST) for child in module.children())
    return [linear.weight for linear in matrices if isinstance(linear, nn.Linear)]


@torch.no_grad()
def recast(model: nn.Module, compiled: bool) -> None:
    """Makes the float8 copies those of the weights. Due before a step, whatever has changed the weights since the last."""
    cast = compiled_cast_weight() if compiled else cast_weight
    for module in model.modules():
        if isinstance(module, Float8Linear) and module.copies:
            cast(module.weight, *module.copies)
