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
def cast_tile(x, factor, rows, columns, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Casts a tile of x (N, K), times `factor`, to the same tile of `rows` (N, K) and of `columns` (K, N)."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    within = (n < N) & (k < K)
    tile = tl.load(x + n * K + k, within).to(tl.float32) * tl.load(factor)
    cast = tile.to(rows.dtype.element_ty)
    tl.store(rows + n * K + k, cast, within)
    tl.store(columns + k * N + n, cast, within)


@triton_op("hrm_lm::cast_both", mutates_args={})
def cast_both(x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Casts x (N, K), bf16, times `factor`, 0-dim float32. Returns it, and the same transposed, (K, N). Both are contiguous."""
    assert x.dtype == torch.bfloat16, "of a float32 tile Triton 3.6 stores some values where others belong"
    N, K = x.shape
    rows, columns = torch.empty((N, K), dtype=dtype, device=x.device), torch.empty((K, N), dtype=dtype, device=x.device)
    grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))
    wrap_triton(cast_tile)[grid](
        x.contiguous(), factor, rows, columns, N, K, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=WARPS
    )
    return rows, columns
