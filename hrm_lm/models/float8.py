"""`train.mixed_precision: fp8`: the matrices of self-attention and SwiGLU multiply in float8 while training.

All three products of a matrix do: forward, the gradient of what was read, the gradient of the weight. A tensor has a
single scale, which maps its largest magnitude to the largest of its format (arXiv 2209.05433): e4m3 for weights and what
they multiply, e5m2 for gradients, whose range is wider. The rest is as with bf16: cross-attention, embedding, head and loss,
norms, gates. So is what does not learn: validation and generation multiply by the same weights in bf16.

Weights are cast once a step, however many applications and micro-batches it has (`recast`). That is why this is not
torchao's `Float8Linear`, which casts a weight at every application: here a step applies a weight many times. Where the model is
sharded a worker has whole weights only after they were gathered, in bf16, and casts these at every application.
"""

from importlib.util import find_spec

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


def factors(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the factor with which a tensor fills the range of `dtype`, and the scale that undoes it, both float32.

    largest: the largest magnitude in the tensor, 0-dim, or those of several tensors.
    """
    largest = largest.float().clamp(min=1e-12)
    return torch.finfo(dtype).max / largest, largest / torch.finfo(dtype).max


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts x. Returns it with its scale, 0-dim float32. Infinity and NaN make all of it NaN."""
    factor, scale = factors(x.abs().amax(), dtype)
    return (x.float() * factor).to(dtype), scale


def to_float8_both(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Casts x (N, K). Returns it, the same transposed, (K, N), and their scale. Both are contiguous."""
    # By rows first: Inductor then takes a row's largest magnitude in the kernel that makes x.
    factor, scale = factors(x.abs().amax(-1).amax(), dtype)
    return *cast_both(x, factor, dtype), scale


def cast_both(x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts x (N, K) times `factor`. Returns it, and the same transposed, (K, N). Both are contiguous."""
    if x.is_cuda:
        return torch.ops.hrm_lm.cast_both(x, factor, dtype)
    x8 = (x.float() * factor).to(dtype)
    return x8, x8.t().contiguous()


def product(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Multiplies a (M, K) by b.T, where b is (N, K). `torch._scaled_mm` wants its second matrix column by column."""
    return torch._scaled_mm(a, b.t(), *scales, out_dtype=dtype, use_fast_accum=fast)


class Float8Product(torch.autograd.Function):
    """x (N, K) @ weight.T (K, O) -> (N, O) in bf16, where N, K and O are multiples of 16. The weight's gradient has its dtype.

    Only the forward product takes the faster, less exact way to sum, as in torchao.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, w8: Tensor, w8t: Tensor | None, w_scale: Tensor) -> Tensor:
        """w8: (O, K), w8t: (K, O), the same values, or None if backward is to make them; weight: (O, K), for its gradient."""
        x8, x8t, x_scale = to_float8_both(x, E4M3)
        ctx.weight_dtype, ctx.has_w8t = weight.dtype, w8t is not None
        ctx.save_for_backward(x8t, x_scale, weight if w8t is None else w8t, w_scale)
        return product(x8, w8, (x_scale, w_scale), torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x8t, x_scale, w8t, w_scale = ctx.saved_tensors
        if not ctx.has_w8t:
            _, w8t, _ = to_float8_both(w8t, E4M3)
        g8, g8t, g_scale = to_float8_both(gradient, E5M2)
        of_x = product(g8, w8t, (g_scale, w_scale), torch.bfloat16)
        of_weight = product(g8t, x8t, (g_scale, x_scale), ctx.weight_dtype)
        return of_x, of_weight, None, None, None


class Float8Linear(nn.Linear):
    """Takes a linear layer's place and its parameter.

    sharded: whether the weight will be a sharded one. Otherwise there are float8 copies of it, which `recast` fills. They are no
    buffers: they are neither saved nor sent.
    """

    def __init__(self, linear: nn.Linear, sharded: bool = False):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        if self.weight.is_cuda:
            import hrm_lm.models.float8_kernels  # noqa: F401  (registers `torch.ops.hrm_lm.cast_both`, and needs Triton)
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
        if torch.is_grad_enabled():
            y = Float8Product.apply(rows, self.weight, w8, w8t, scale)
        else:
            x8, x_scale = to_float8(rows, E4M3)
            y = product(x8, w8, (x_scale, scale), torch.bfloat16, fast=True)
        return y[:count].view(*x.shape[:-1], -1)


def use_float8(model: nn.Module, device: torch.device, sharded: bool = False) -> None:
    """From here on the model, which is on `device`, trains in float8. Its parameters and their names stay.

    sharded: whether it will be sharded.

    Raises UserError where a GPU has no float8, and where PyTorch came without Triton. A CPU computes it slowly.
    """
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise UserError(
            f"train.mixed_precision: fp8 needs a GPU of compute capability 8.9 or more (L4, H100), and {name} has "
            f"{version}; use bf16"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise UserError("train.mixed_precision: fp8 needs Triton, which this PyTorch came without; use bf16")
    for module in list(model.modules()):
        if isinstance(module, CAST):
            for name, linear in list(module.named_children()):
                setattr(module, name, Float8Linear(linear, sharded))


def float8_weights(model: nn.Module) -> list[nn.Parameter]:
    """Lists the weights that multiply in float8 where `use_float8` was called."""
    matrices = (child for module in model.modules() if isinstance(module, CAST) for child in module.children())
    return [linear.weight for linear in matrices if isinstance(linear, nn.Linear)]


@torch.no_grad()
def recast(model: nn.Module) -> None:
    """Makes the float8 copies those of the weights. Due before a step, whatever has changed the weights since the last.

    They are cast from bf16, as sharded ones are, and written in place: a CUDA graph reads them there.
    """
    layers = [module for module in model.modules() if isinstance(module, Float8Linear) and module.copies]
    if not layers:
        return
    weights = [layer.weight.to(torch.bfloat16) for layer in layers]
    largest = torch.stack(torch._foreach_norm(weights, torch.inf))
    for layer, weight, factor, scale in zip(layers, weights, *factors(largest, E4M3)):
        for copy, new in zip(layer.copies or (), (*cast_both(weight, factor, E4M3), scale)):
            copy.copy_(new)
