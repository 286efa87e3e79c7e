"""What generation keeps from token to token: keys and values of every attention, and where the next token goes.

A new token takes the same place in all samples, behind the longest prompt; padding in between is hidden. What changes
from token to token are tensors that keep their place in memory, written at an index that is on the device, too. So the
step from a token to the next one can be captured as a CUDA graph, and the host only counts along.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

READ_STEP = {"cpu": 1, "cuda": 128}
"""By the kind of device: attention reads a multiple of so many cached places, hiding what is not filled yet. So shapes
seldom change on CUDA. On CPU it reads what is filled and no more."""
PROMPT_TOKENS = 1 << 15
"""Prompts are read so many tokens at a time, padding included, and at least a whole prompt."""


class Cursor:
    """The places of a cache that are filled and visible, and the next place. All caches of a generation share it."""

    def __init__(self, samples: int, width: int, max_new_tokens: int, device: torch.device):
        """width: places that prompts take."""
        self.samples, self.device = samples, device
        self.step = READ_STEP[device.type]
        self.length = width  # that of `place`, as the host counts
        self.capacity = self._rounded(width + max_new_tokens)
        self.rows: slice | None = None
        """The samples whose prompts are being read; None where a token is appended to every sample."""
        self.place = torch.full((1,), width, device=device)

    def prompts(self, tokens: int) -> Iterator[slice]:
        """The samples to read at a time, so that activations stay bounded. tokens: of a prompt, with padding.

        A prompt is read whole. Its tokens see one another both ways, so the states of its first token in a layer, and the
        keys made of them in the next, depend on its last token: it cannot be read piece by piece along its length, as
        a causal prompt can. Its activations grow with its length alone, since no scores are held.
        """
        at_once = max(PROMPT_TOKENS // tokens, 1)
        for first in range(0, self.samples, at_once):
            self.rows = slice(first, first + at_once)
            yield self.rows
        self.rows = None

    def start(self, visible: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        """Prompts are read. visible: (B or 1, width) bool, whether a place holds a token rather than padding. positions:
        (B,) or (1,), of each sample's next token. rope: the rotary cosines and sines of all positions, (capacity, D).
        dtype: that of the cached keys.
        """
        self.positions, self.table = positions.clone(), rope
        # Added to scores: attention would make this of a bool mask at every call.
        self.hidden = torch.full((len(visible), 1, 1, self.capacity), -torch.inf, dtype=dtype, device=self.device)
        self.hidden[:, 0, 0, : visible.shape[1]].masked_fill_(visible, 0.0)

    def rope(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the next token's position, (B or 1, 1, 1, D)."""
        cos, sin = (values.index_select(0, self.positions)[:, None, None] for values in self.table)
        return cos, sin

    @property
    def keys(self) -> int:
        """How many places attention reads, the next token's among them."""
        return self._rounded(self.length + 1)

    def mask(self) -> Tensor:
        """(B or 1, 1, 1, keys): 0 where the next token may look, itself included, and minus infinity elsewhere."""
        return self.hidden.index_fill_(3, self.place, 0.0)[..., : self.keys]

    def advance(self) -> None:
        self.place += 1
        self.positions += 1
        self.length += 1

    def _rounded(self, places: int) -> int:
        return -(-places // self.step) * self.step


class KVCache:
    """Keys and values of one attention. k, v: (B, H, capacity, D)."""

    def __init__(self, cursor: Cursor):
        self.cursor = cursor
        self.k: Tensor = None  # made when the first keys say what of
        self.v: Tensor = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps (b, H, T, D): prompts of `cursor.rows`, or the next token of every sample. Returns the keys and values
        that these tokens may see.
        """
        cursor = self.cursor
        if self.k is None:
            shape = (cursor.samples, k.shape[1], cursor.capacity, k.shape[3])
            # What is read and hidden must be finite: its weight is zero, but zero times NaN is NaN.
            self.k, self.v = ((x.new_zeros if cursor.step > 1 else x.new_empty)(shape) for x in (k, v))
        if cursor.rows is not None:
            T = k.shape[2]
            self.k[cursor.rows, :, :T], self.v[cursor.rows, :, :T] = k, v
            return self.k[cursor.rows, :, :T], self.v[cursor.rows, :, :T]
        self.k.index_copy_(2, cursor.place, k)
        self.v.index_copy_(2, cursor.place, v)
        return self.k[:, :, : cursor.keys], self.v[:, :, : cursor.keys]


@dataclass
class Decoding:
    """Where a generation stands. A model adds what else it needs from token to token."""

    cursor: Cursor
    caches: list[list[KVCache]]
    """Of the blocks, for each application of a stack."""
