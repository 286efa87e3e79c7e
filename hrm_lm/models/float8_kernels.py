"""The cast to float8 on a GPU: a tensor is read once and written twice, as it is and transposed.

A float8 product wants its tensors row by row in one of its uses and column by column in another. Compiled PyTorch reads a
tensor again for each. Importing this module needs Triton and registers `torch.ops.hrm_lm.cast_both`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK_N, BLOCK_K, WARPS = 64, 128, 4


@triton.jit
def store_both(rows, columns, cast, n, k, N, K, within):
    """Stores a tile to the same one of `rows` (N, K) and of `columns` (K, N)."""
    tl.store(rows + n * K + k, cast, within)
    tl.store(columns + k * N + n, cast, within)


@triton.jit
def cast_tile(x, factor, rows, columns, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Casts a tile of x (N, K), times `factor`."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    within = (n < N) & (k < K)
    tile = tl.load(x + n * K + k, within).to(tl.float32) * tl.load(factor)
    store_both(rows, columns, tile.to(rows.dtype.element_ty), n, k, N, K, within)


@triton.jit
def silu_mul_tile(gate_up, factor, rows, columns, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Casts a tile of silu(gate) * up (N, K), times `factor`. gate_up: (N, 2 K)."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    within = (n < N) & (k < K)
    gate = tl.load(gate_up + n * 2 * K + k, within).to(tl.float32)
    up = tl.load(gate_up + n * 2 * K + K + k, within).to(tl.float32)
    tile = gate * tl.sigmoid(gate) * up * tl.load(factor)
    store_both(rows, columns, tile.to(rows.dtype.element_ty), n, k, N, K, within)


@triton.jit
def silu_mul_gradient_tile(
    gate_up, gradient, factor, rows, columns, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Casts a tile of the gradient of `gate`, times `factor`, and the same of `up`. gradient: (N, K), of silu(gate) * up."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    within = (n < N) & (k < K)
    gate = tl.load(gate_up + n * 2 * K + k, within).to(tl.float32)
    up = tl.load(gate_up + n * 2 * K + K + k, within).to(tl.float32)
    scaled = tl.load(gradient + n * K + k, within).to(tl.float32) * tl.load(factor)
    sigmoid = tl.sigmoid(gate)
    of_gate = scaled * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    of_up = scaled * (gate * sigmoid)
    store_both(rows, columns, of_gate.to(rows.dtype.element_ty), n, k, N, 2 * K, within)
    store_both(rows, columns, of_up.to(rows.dtype.element_ty), n, K + k, N, 2 * K, within)


KERNELS = cast_tile, silu_mul_tile, silu_mul_gradient_tile


def run(kernel, inputs: list[Tensor], K: int, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """Runs `kernel` over (N, K) tiles. Returns what it casts to: (N, width), and the same transposed."""
    tensors = inputs[:-1]
    assert all(x.dtype == torch.bfloat16 for x in tensors), (
        "of a float32 tile Triton 3.6 stores some values where others belong"
    )
    N = inputs[0].shape[0]
    rows, columns = (torch.empty(shape, dtype=dtype, device=inputs[0].device) for shape in ((N, width), (width, N)))
    grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))
    wrap_triton(kernel)[grid](
        *(x.contiguous() for x in inputs), rows, columns, N, K, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=WARPS
    )
    return rows, columns


@triton_op("hrm_lm::cast_both", mutates_args={})
def cast_both(x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts x (N, K), bf16, times `factor`, 0-dim float32. Returns it, and the same transposed, (K, N). Both are contiguous."""
    return run(cast_tile, [x, factor], x.shape[1], dtype, x.shape[1])


@triton_op("hrm_lm::cast_silu_mul_both", mutates_args={})
def cast_silu_mul_both(gate_up: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of silu(gate) * up, (N, K). gate_up: (N, 2 K), bf16."""
    K = gate_up.shape[1] // 2
    return run(silu_mul_tile, [gate_up, factor], K, dtype, K)


@triton_op("hrm_lm::cast_silu_mul_gradient_both", mutates_args={})
def cast_silu_mul_gradient_both(
    gate_up: Tensor, gradient: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same of the gradient of gate_up, (N, 2 K), where that of silu(gate) * up is `gradient`, (N, K), bf16."""
    K = gradient.shape[1]
    return run(silu_mul_gradient_tile, [gate_up, gradient, factor], K, dtype, 2 * K)
