"""Casts to float8 on a GPU: a tensor is read once and written twice, as it is and transposed.

A float8 product wants its tensors row by row in one of its uses and column by column in another. Compiled PyTorch reads a
tensor again for each. Importing this module needs Triton and registers `torch.ops.hrm_lm.*`.

N: tokens, K: width. A tile is rounded to bf16 before it is cast: Triton then transposes that, and what it makes of float8
values that it transposes itself is wrong (3.6, on an H200).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK_N, BLOCK_K = 64, 128


@triton.jit
def store_both(rows, columns, tile, factor, n, k, N, K, within):
    """Casts a tile, times `factor`, and stores it to the same one of `rows` (N, K) and of `columns` (K, N)."""
    cast = (tile.to(tl.bfloat16).to(tl.float32) * factor).to(rows.dtype.element_ty)
    tl.store(rows + n * K + k, cast, within)
    tl.store(columns + k * N + n, cast, within)


@triton.jit
def silu_mul(gate, up):
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_mul_gradients(gate, up, gradient):
    """Returns the gradients of `gate` and of `up`."""
    gate, up, gradient = gate.to(tl.float32), up.to(tl.float32), gradient.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    return gradient * up * (sigmoid * (1 + gate * (1 - sigmoid))), gradient * (gate * sigmoid)


@triton.jit
def cast_tile(x, factor, rows, columns, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Casts a tile of x (N, K)."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    within = (n < N) & (k < K)
    store_both(rows, columns, tl.load(x + n * K + k, within), tl.load(factor), n, k, N, K, within)


@triton.jit
def cast_silu_mul_tile(gate_up, factor, rows, columns, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Casts a tile of silu(gate) * up (N, K). gate_up: (N, 2 K)."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    within = (n < N) & (k < K)
    gate = gate_up + n * 2 * K + k
    tile = silu_mul(tl.load(gate, within), tl.load(gate + K, within))
    store_both(rows, columns, tile, tl.load(factor), n, k, N, K, within)


@triton.jit
def cast_silu_mul_gradient_tile(
    gate_up, gradient, factor, rows, columns, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Casts a tile of the gradient of gate and the same one of up, (N, 2 K) together. gradient: (N, K), of silu(gate) * up."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    within = (n < N) & (k < K)
    gate = gate_up + n * 2 * K + k
    of_gate, of_up = silu_mul_gradients(
        tl.load(gate, within), tl.load(gate + K, within), tl.load(gradient + n * K + k, within)
    )
    factor = tl.load(factor)
    store_both(rows, columns, of_gate, factor, n, k, N, 2 * K, within)
    store_both(rows, columns, of_up, factor, n, K + k, N, 2 * K, within)


ROWS, CHUNK = 1, 1024
"""How much of a tensor a program looks at, at a time, for the largest magnitudes of its rows."""


@triton.jit
def larger(a, b):
    """Returns NaN where a or b is. `tl.max` would drop it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_silu_mul_rows(gate_up, largest, N, K, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Finds the largest magnitudes of rows of silu(gate) * up."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    found = tl.zeros((ROWS, CHUNK), tl.float32)
    for start in range(0, K, CHUNK):
        k = (start + tl.arange(0, CHUNK))[None, :]
        within = (n < N)[:, None] & (k < K)
        gate = gate_up + n[:, None] * 2 * K + k
        h = silu_mul(tl.load(gate, within, other=0.0), tl.load(gate + K, within, other=0.0))
        found = larger(found, tl.abs(h))
    tl.store(largest + n, tl.reduce(found, 1, larger), n < N)


@triton.jit
def largest_silu_mul_gradient_rows(gate_up, gradient, largest, N, K, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Finds the largest magnitudes of rows of the gradient of gate_up. gradient: (N, K), of silu(gate) * up."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    found = tl.zeros((ROWS, CHUNK), tl.float32)
    for start in range(0, K, CHUNK):
        k = (start + tl.arange(0, CHUNK))[None, :]
        within = (n < N)[:, None] & (k < K)
        gate = gate_up + n[:, None] * 2 * K + k
        of_gate, of_up = silu_mul_gradients(
            tl.load(gate, within, other=0.0),
            tl.load(gate + K, within, other=0.0),
            tl.load(gradient + n[:, None] * K + k, within, other=0.0),
        )
        found = larger(found, larger(tl.abs(of_gate), tl.abs(of_up)))
    tl.store(largest + n, tl.reduce(found, 1, larger), n < N)


CASTS = cast_tile, cast_silu_mul_tile, cast_silu_mul_gradient_tile


def cast(
    kernel, tensors: list[Tensor], factor: Tensor, dtype: torch.dtype, K: int, width: int, warps: int = 4
) -> tuple[Tensor, Tensor]:
    """Runs a kernel that casts over (N, K). Returns what it fills: (N, width), and the same transposed."""
    N, new = tensors[0].shape[0], tensors[0].new_empty
    rows, columns = new((N, width), dtype=dtype), new((width, N), dtype=dtype)
    grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))
    wrap_triton(kernel)[grid](
        *(x.contiguous() for x in tensors), factor, rows, columns, N, K,
        BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=warps,
    )  # fmt: skip
    return rows, columns


def largest(kernel, tensors: list[Tensor], K: int) -> Tensor:
    """Runs a kernel that looks for the largest magnitudes of rows of (N, K). Returns that of all, 0-dim float32."""
    N = tensors[0].shape[0]
    rows = tensors[0].new_empty(N, dtype=torch.float32)
    wrap_triton(kernel)[(triton.cdiv(N, ROWS),)](
        *(x.contiguous() for x in tensors), rows, N, K, ROWS=ROWS, CHUNK=CHUNK, num_warps=4
    )
    return rows.amax()


@triton_op("hrm_lm::cast_both", mutates_args={})
def cast_both(x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts x (N, K), rounded to bf16, times `factor`, 0-dim float32. Returns it, and the same transposed, (K, N). Both are
    contiguous.
    """
    return cast(cast_tile, [x], factor, dtype, x.shape[1], x.shape[1])


@triton_op("hrm_lm::cast_silu_mul_both", mutates_args={})
def cast_silu_mul_both(gate_up: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts silu(gate) * up, (N, K), in the same way. gate_up: (N, 2 K)."""
    K = gate_up.shape[1] // 2
    return cast(cast_silu_mul_tile, [gate_up], factor, dtype, K, K)


@triton_op("hrm_lm::cast_silu_mul_gradient_both", mutates_args={})
def cast_silu_mul_gradient_both(
    gate_up: Tensor, gradient: Tensor, factor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Casts the gradient of gate_up, (N, 2 K), in the same way, where that of silu(gate) * up is `gradient`, (N, K)."""
    K = gradient.shape[1]
    return cast(cast_silu_mul_gradient_tile, [gate_up, gradient], factor, dtype, K, 2 * K, warps=8)


@triton_op("hrm_lm::largest_silu_mul", mutates_args={})
def largest_silu_mul(gate_up: Tensor) -> Tensor:
    """Returns the largest magnitude of silu(gate) * up, 0-dim float32."""
    return largest(largest_silu_mul_rows, [gate_up], gate_up.shape[1] // 2)


@triton_op("hrm_lm::largest_silu_mul_gradient", mutates_args={})
def largest_silu_mul_gradient(gate_up: Tensor, gradient: Tensor) -> Tensor:
    """Returns the largest magnitude of the gradient of gate_up, where that of silu(gate) * up is `gradient`."""
    return largest(largest_silu_mul_gradient_rows, [gate_up, gradient], gradient.shape[1])
