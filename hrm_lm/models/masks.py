"""What a query may see where that is a range of keys: as a dense mask, or as blocks for flex attention on CUDA.

Keys are tokens of the queries' own row (self-attention) or of another row of another length (cross-attention).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hrm_lm.models.layers import Mask

FLEX_FROM = 512
"""Tokens of a row from which on flex attention takes the place of a dense mask. At 1,024 tokens it trains HRM-Text B 9 %
faster (H100); shorter rows were not measured, and a dense mask costs little there."""
BLOCK = 128


def visible(sees_from: Tensor, sees_to: Tensor, keys: int, dense: bool) -> Mask:
    """What each query sees of so many keys: from key `sees_from` (R, T) to key `sees_to` (R, T), which counts.

    dense: whether the mask must be dense; see `needs_dense`.
    """
    blocks = takes_blocks(sees_from, sees_from.shape[1], keys, dense)
    return (visible_blocks if blocks else visible_keys)(sees_from, sees_to, keys)


def takes_blocks(like: Tensor, queries: int, keys: int, dense: bool) -> bool:
    """Whether flex attention is possible and faster: on CUDA, for rows of some length."""
    return like.is_cuda and min(queries, keys) >= FLEX_FROM and not dense


def needs_dense(head_dim: int, dropout: float) -> bool:
    """What flex attention cannot do: dropout, and on CUDA heads of fewer than 16 values."""
    return dropout > 0 or head_dim < 16


def visible_keys(sees_from: Tensor, sees_to: Tensor, keys: int) -> Tensor:
    """(R, 1, T, keys): True where a key may be seen."""
    key = torch.arange(keys, device=sees_from.device)
    return ((sees_from[..., None] <= key) & (key <= sees_to[..., None])).unsqueeze(1)


def visible_blocks(sees_from: Tensor, sees_to: Tensor, keys: int) -> BlockMask:
    """The same as blocks of BLOCK by BLOCK: those that are seen in part are masked, those that are seen whole are not.

    Each query sees a range of keys, so a block of queries is taken to see a range of blocks, too: from the least first
    key to the greatest last key.
    """
    R, T = sees_from.shape
    q_blocks, k_blocks = -(-T // BLOCK), -(-keys // BLOCK)

    def by_block(values: Tensor, fill: int) -> Tensor:  # (R, T) -> (R, q_blocks, BLOCK)
        return F.pad(values, (0, q_blocks * BLOCK - T), value=fill).view(R, q_blocks, BLOCK)

    low, high = by_block(sees_from, keys - 1), by_block(sees_to, 0)
    key_block = torch.arange(k_blocks, device=sees_from.device)
    seen = (low.amin(-1, keepdim=True) // BLOCK <= key_block) & (key_block <= high.amax(-1, keepdim=True) // BLOCK)
    low, high = by_block(sees_from, 0), by_block(sees_to, keys)
    whole = (low.amax(-1, keepdim=True) <= key_block * BLOCK) & (
        high.amin(-1, keepdim=True) >= (key_block + 1) * BLOCK - 1
    )
    whole &= seen

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(R, q_blocks, k_blocks) bool -> how many are chosen in each row, and which, those first."""
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    def may_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (sees_from[b, q] <= k) & (k <= sees_to[b, q])

    return BlockMask.from_kv_blocks(
        *listed(seen & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=may_see, seq_lengths=(T, keys)
    )
