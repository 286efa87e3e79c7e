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
from hrm_lm.models.layers import SelfAttention, SwiGLU, silu_mul, silu_mul_gradient

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What the sizes of a float8 product are multiples of."""


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


def largest_silu_mul(gate_up: Tensor) -> Tensor:
    """Returns the largest magnitude of `silu_mul`, 0-dim float32."""
    if gate_up.is_cuda:
        return torch.ops.hrm_lm.largest_silu_mul(gate_up)
    return silu_mul(gate_up.float()).abs().amax()


def largest_silu_mul_gradient(gate_up: Tensor, gradient: Tensor) -> Tensor:
    """Returns the largest magnitude of the gradient of gate_up, where `gradient` (N, K) is that of `silu_mul`."""
    if gate_up.is_cuda:
        return torch.ops.hrm_lm.largest_silu_mul_gradient(gate_up, gradient)
    return silu_mul_gradient(gate_up.float(), gradient.float()).abs().amax()


def cast_silu_mul_both(gate_up: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts `silu_mul` of gate_up (N, 2 K) as `cast_both` would. On a GPU it is never stored in bf16."""
    if gate_up.is_cuda:
        return torch.ops.hrm_lm.cast_silu_mul_both(gate_up, factor, dtype)
    return cast_both(silu_mul(gate_up.float()).bfloat16(), factor, dtype)


def cast_silu_mul_gradient_both(
    gate_up: Tensor, gradient: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Casts the gradient of gate_up in the same way, where `gradient` (N, K) is that of `silu_mul`."""
    if gate_up.is_cuda:
        return torch.ops.hrm_lm.cast_silu_mul_gradient_both(gate_up, gradient, factor, dtype)
    return cast_both(silu_mul_gradient(gate_up, gradient), factor, dtype)


def product(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Multiplies a (M, K) by b.T, where b is (N, K). `torch._scaled_mm` wants its second matrix column by column."""
    return torch._scaled_mm(a, b.t(), *scales, out_dtype=dtype, use_fast_accum=fast)


Float8Weight = tuple[Tensor, Tensor | None, Tensor]
"""A weight (O, K) in float8; (K, O), the same values, or None if backward is to make them; its scale."""


def transposed(weight: Tensor) -> Tensor:
    """Returns (K, O) in float8, given that or the weight itself."""
    return weight if weight.dtype == E4M3 else to_float8_both(weight, E4M3)[1]


class Float8Product(torch.autograd.Function):
    """x (N, K) @ weight.T (K, O) -> (N, O) in bf16, where N, K and O are multiples of 16. The weight's gradient has its dtype.

    Only the forward product takes the faster, less exact way to sum, as in torchao.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, w8: Tensor, w8t: Tensor | None, w_scale: Tensor) -> Tensor:
        """weight: for its gradient. Then it as a `Float8Weight`."""
        x8, x8t, x_scale = to_float8_both(x, E4M3)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(x8t, x_scale, weight if w8t is None else w8t, w_scale)
        return product(x8, w8, (x_scale, w_scale), torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x8t, x_scale, w8t, w_scale = ctx.saved_tensors
        g8, g8t, g_scale = to_float8_both(gradient, E5M2)
        of_x = product(g8, transposed(w8t), (g_scale, w_scale), torch.bfloat16)
        of_weight = product(g8t, x8t, (g_scale, x_scale), ctx.weight_dtype)
        return of_x, of_weight, None, None, None


class Float8SwiGLUProducts(torch.autograd.Function):
    """Computes `SwiGLU` of x (N, C) -> (N, C), as two `Float8Product`s would. What is between the products is cast as it is
    made: neither what the second product reads nor the gradient of what the first product returns is ever there in bf16.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        w8: Tensor,
        w8t: Tensor | None,
        w_scale: Tensor,
        out: Tensor,
        out8: Tensor,
        out8t: Tensor | None,
        out_scale: Tensor,
    ) -> Tensor:
        """weight: (2 K, C), of gate and up; out: (C, K). Each is followed by its `Float8Weight`."""
        x8, x8t, x_scale = to_float8_both(x, E4M3)
        gate_up = product(x8, w8, (x_scale, w_scale), torch.bfloat16, fast=True)
        factor, h_scale = factors(largest_silu_mul(gate_up), E4M3)
        h8, h8t = cast_silu_mul_both(gate_up, factor, E4M3)
        ctx.dtypes = weight.dtype, out.dtype
        w8t, out8t = weight if w8t is None else w8t, out if out8t is None else out8t
        ctx.save_for_backward(x8t, x_scale, w8t, w_scale, gate_up, h8t, h_scale, out8t, out_scale)
        return product(h8, out8, (h_scale, out_scale), torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x8t, x_scale, w8t, w_scale, gate_up, h8t, h_scale, out8t, out_scale = ctx.saved_tensors
        weight_dtype, out_dtype = ctx.dtypes
        g8, g8t, g_scale = to_float8_both(gradient, E5M2)
        of_h = product(g8, transposed(out8t), (g_scale, out_scale), torch.bfloat16)
        of_out = product(g8t, h8t, (g_scale, h_scale), out_dtype)
        factor, d_scale = factors(largest_silu_mul_gradient(gate_up, of_h), E5M2)
        d8, d8t = cast_silu_mul_gradient_both(gate_up, of_h, factor, E5M2)
        of_x = product(d8, transposed(w8t), (d_scale, w_scale), torch.bfloat16)
        of_weight = product(d8t, x8t, (d_scale, x_scale), weight_dtype)
        return of_x, of_weight, None, None, None, of_out, None, None, None


class Float8Linear(nn.Linear):
    """Takes a linear layer's place and its parameter.

    sharded: whether the weight will be a sharded one. Otherwise there are float8 copies of it, which `recast` fills. They are no
    buffers: they are neither saved nor sent.
    """

    def __init__(self, linear: nn.Linear, sharded: bool = False):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        if self.weight.is_cuda:
            import hrm_lm.models.float8_kernels  # noqa: F401  (registers the casts, and needs Triton)
        self.copies: tuple[Tensor, Tensor, Tensor] | None = None
        if not sharded:
            w8 = torch.zeros_like(self.weight, dtype=E4M3, requires_grad=False)
            self.copies = w8, w8.t().contiguous(), torch.ones((), device=self.weight.device)

    def cast(self) -> Float8Weight:
        """Returns the copies, or casts the weight if there are none."""
        if self.copies:
            return self.copies
        # The gathered weight stays for the step, and a copy for each application would take room.
        w8, scale = to_float8(self.weight.detach(), E4M3)
        return w8, None, scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., O), in bf16 while training."""
        if not self.training:
            return super().forward(x)
        rows = rows_of(x)
        if torch.is_grad_enabled():
            y = Float8Product.apply(rows, self.weight, *self.cast())
        else:
            y = self.products(*to_float8(rows, E4M3))
        return as_in(x, y)

    def products(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """(N, K) -> (N, O), without gradient."""
        w8, _, scale = self.cast()
        return product(x8, w8, (x_scale, scale), torch.bfloat16, fast=True)


class Float8SwiGLU(SwiGLU):
    """Takes the place of a SwiGLU and its parameters."""

    def __init__(self, swiglu: SwiGLU, sharded: bool = False):
        nn.Module.__init__(self)
        self.gate_up, self.out = (Float8Linear(linear, sharded) for linear in (swiglu.gate_up, swiglu.out))
        self.train(swiglu.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows = rows_of(x)
        if torch.is_grad_enabled():
            weights = (tensor for linear in (self.gate_up, self.out) for tensor in (linear.weight, *linear.cast()))
            y = Float8SwiGLUProducts.apply(rows, *weights)
        else:
            gate_up = self.gate_up.products(*to_float8(rows, E4M3))
            factor, h_scale = factors(largest_silu_mul(gate_up), E4M3)
            y = self.out.products((silu_mul(gate_up).float() * factor).to(E4M3), h_scale)
        return as_in(x, y)


def rows_of(x: Tensor) -> Tensor:
    """Reshapes (..., K) -> (N, K) in bf16, with rows of zeros for N to be a multiple of 16."""
    rows = x.flatten(0, -2).to(torch.bfloat16)
    missing = -rows.shape[0] % MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def as_in(x: Tensor, y: Tensor) -> Tensor:
    """Reshapes (N, O), which `rows_of(x)` became, to (..., O)."""
    return y[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)


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
        for name, child in list(module.named_children()):
            if isinstance(child, SwiGLU):
                setattr(module, name, Float8SwiGLU(child, sharded))
            elif isinstance(module, SelfAttention):
                setattr(module, name, Float8Linear(child, sharded))


def float8_weights(model: nn.Module) -> list[nn.Parameter]:
    """Lists the weights that multiply in float8 where `use_float8` was called."""
    matrices = (
        child
        for module in model.modules()
        if isinstance(module, (SelfAttention, SwiGLU))
        for child in module.children()
    )
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
