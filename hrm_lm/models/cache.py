"""What generation keeps from token to token: keys and values of every attention, and how far each sample's places are filled.

A sample's tokens lie in its row of a cache without a gap, so a token's place is its position. Samples come and go between
tokens (`LanguageModel.prefill` adds some, `Decoding.drop` removes one), and those that are there are the first rows. What
changes from token to token are tensors that keep their place in memory, written at indices that are on the device, too. So
the step from a token to the next one can be captured as a CUDA graph, and the host only counts along.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hrm_lm.config import Cycles

T = TypeVar("T")

READ_STEP = {"cpu": 1, "cuda": 128}
"""By the kind of device: attention reads a multiple of so many cached places, hiding what is not filled yet. So shapes
seldom change on CUDA. On CPU it reads what the fullest row has filled and no more."""
PROMPT_TOKENS = 1 << 15
"""Prompts are read so many tokens at a time, padding included, and at least a whole prompt."""


class Cursor:
    """How far the rows of some caches are filled. The first `samples` rows are in use."""

    def __init__(self, rows: int, capacity: int, device: torch.device):
        """rows: samples that there is room for. capacity: places of a row, at least."""
        self.rows, self.device = rows, device
        self.step = READ_STEP[device.type]
        self.capacity = -(-capacity // self.step) * self.step
        self.samples = 0
        self.filled: list[int] = []
        """The places that each sample has filled, as the host counts."""
        self.keys = self.step
        """How many places attention reads, the next token's among them."""
        self.place = torch.zeros(rows, dtype=torch.long, device=device)
        """The next token's place and position in each row."""
        self.reading: slice | None = None
        """The rows whose prompts are being read; None where a token is appended to every sample."""
        self.places = torch.arange(self.capacity, device=device)
        self.hidden: Tensor | None = None  # made when the first keys say what of

    def read(self, tokens: int, filled: Sequence[int]) -> Iterator[slice]:
        """Adds samples, and yields which of them to read at a time, so that activations stay bounded.

        tokens: of a prompt, with padding. filled: the places that each prompt fills.
        A prompt is read whole. Its tokens see one another both ways, so the states of its first token in a layer, and the
        keys made of them in the next, depend on its last token: it cannot be read piece by piece along its length, as
        a causal prompt can. Its activations grow with its length alone, since no scores are held.
        """
        at_once = max(PROMPT_TOKENS // tokens, 1)
        for first in range(0, len(filled), at_once):
            some = slice(first, min(first + at_once, len(filled)))
            self.reading = slice(self.samples + some.start, self.samples + some.stop)
            yield some
        self.reading, new = None, slice(self.samples, self.samples + len(filled))
        self.place[new] = torch.tensor(filled).to(self.device, non_blocking=True)
        if self.hidden is not None:
            seen = (self.places <= self.place[new, None])[:, None, None]
            self.hidden[new].fill_(-torch.inf).masked_fill_(seen, 0.0)
        self._fill([*self.filled, *filled])

    def rope(self, table: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the next tokens' positions, (rows, 1, 1, D). table: those of all positions, (capacity, 1, D)."""
        cos, sin = (values.index_select(0, first(self.place, rows))[:, None] for values in table)
        return cos, sin

    def mask(self, rows: int) -> Tensor:
        """(rows, 1, 1, keys): 0 where the next token may look, itself included, and minus infinity elsewhere.

        It is added to scores: attention would make this of a bool mask at every call.
        """
        assert self.hidden is not None  # there are keys
        return first(self.hidden, rows).narrow(3, 0, self.keys)

    def index(self, rows: int) -> Tensor:
        """(rows, 1, 1, 1): the next token's place in each row."""
        return first(self.place, rows).view(-1, 1, 1, 1)

    def advance(self, rows: int) -> None:
        """A token was appended. Rows beyond the samples, which fill up a size, stay within the cache."""
        first(self.place, rows).add_(1).clamp_(max=self.capacity - 1)
        if self.hidden is not None:
            first(self.hidden, rows).scatter_(3, self.index(rows), 0.0)
        self.count()

    def count(self) -> None:
        """The host's part of `advance`, for a step that is replayed on the device."""
        self._fill([filled + 1 for filled in self.filled])

    def drop(self, moves: "Moves") -> None:
        """Samples end."""
        moves.make(self.place)
        if self.hidden is not None:
            moves.make(self.hidden)
        self._fill(moves.of(self.filled))

    def _fill(self, filled: list[int]) -> None:
        self.filled, self.samples = filled, len(filled)
        # A sample that has ended may go on beyond the capacity until it is dropped.
        self.keys = min(-(-(max(filled, default=0) + 1) // self.step) * self.step, self.capacity)


def first(x: Tensor, rows: int) -> Tensor:
    """The first rows of x, at no cost where these are all: a step of a small model takes a few hundred microseconds."""
    return x if rows == len(x) else x.narrow(0, 0, rows)


class KVCache:
    """Keys and values of one attention. k, v: (rows, H, capacity, D)."""

    def __init__(self, cursor: Cursor):
        self.cursor = cursor
        self.k: Tensor = None  # made when the first keys say what of
        self.v: Tensor = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps (B, H, T, D): prompts that are being read, or the next token of the first B rows. Returns the keys and
        values that these tokens may see.
        """
        cursor = self.cursor
        if self.k is None:
            # What is read and hidden must be finite: its weight is zero, but zero times NaN is NaN.
            shape = (cursor.rows, k.shape[1], cursor.capacity, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
            if cursor.hidden is None:
                cursor.hidden = k.new_zeros(cursor.rows, 1, 1, cursor.capacity)
        if cursor.reading is not None:
            T = k.shape[2]
            self.k[cursor.reading, :, :T], self.v[cursor.reading, :, :T] = k, v
            return k, v
        index = cursor.index(len(k)).expand_as(k)
        first(self.k, len(k)).scatter_(2, index, k)
        first(self.v, len(k)).scatter_(2, index, v)
        return self.filled(len(k))

    def filled(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first rows, as far as attention reads them."""
        keys = self.cursor.keys
        return first(self.k, rows).narrow(2, 0, keys), first(self.v, rows).narrow(2, 0, keys)

    def repeat(self, other: "KVCache", rows: Tensor) -> None:
        """Takes over what `other` was given last, in the rows where `rows` (B,) is true: in those of the prompts that are being
        read, or in the places of the last tokens.
        """
        cursor = self.cursor
        if self.k is None:
            self.k, self.v = torch.zeros_like(other.k), torch.zeros_like(other.v)
        for own, others in ((self.k, other.k), (self.v, other.v)):
            if cursor.reading is not None:
                some = rows.nonzero()[:, 0] + cursor.reading.start
                own[some] = others[some]
            else:
                index = cursor.index(len(rows)).expand(-1, own.shape[1], 1, own.shape[3])
                mine, theirs = (first(side, len(rows)).gather(2, index) for side in (own, others))
                first(own, len(rows)).scatter_(2, index, torch.where(rows[:, None, None, None], theirs, mine))

    def drop(self, moves: "Moves") -> None:
        """Samples end. To be called before the cursor's."""
        # Of a prompt that is looked back at, the last place counts as the next token's.
        seen = max((self.cursor.filled[row] + 1 for row in moves.sources), default=0)
        for kept in (self.k, self.v):
            moves.make(kept[:, :, :seen])


class Moves:
    """Where samples go when others end: the last samples that stay take the rows of those that end."""

    def __init__(self, ended: Collection[int], samples: int, device: torch.device):
        self.left = samples - len(ended)
        """The samples that stay."""
        self.targets = [row for row in ended if row < self.left]
        self.sources = [row for row in range(self.left, samples) if row not in ended]
        self._index = torch.tensor([self.targets, self.sources], dtype=torch.long).to(device, non_blocking=True)

    def make(self, rows: Tensor) -> None:
        """Moves the rows of a tensor."""
        if self.targets:
            targets, sources = self._index
            rows.index_copy_(0, targets, rows.index_select(0, sources))

    def of(self, rows: Sequence[T]) -> list[T]:
        """What the host knows of the rows that stay, as they are now."""
        moved = dict(zip(self.targets, self.sources))
        return [rows[moved.get(row, row)] for row in range(self.left)]


@dataclass
class Decoding:
    """Where the generation of some samples stands. A model adds what else it needs from token to token."""

    cycles: Cycles
    """Those of the prompts that are read next and, where the recurrence runs for every token, of all."""
    cursor: Cursor
    caches: list[list[KVCache]]
    """Of the blocks, for each application of a stack."""
    rope: tuple[Tensor, Tensor]
    """Rotary cosines and sines of all positions, (capacity, 1, D)."""
    memory: list[KVCache]
    """Of what the blocks attend to besides their own past."""
    taken: list[Tensor] = field(default_factory=list, kw_only=True)
    """Where samples halt: the H-cycles of each, (B,), of every prompt that was read and, where the recurrence runs for it, of
    every token."""

    def settled(self, thought: Any) -> Tensor:
        """The core's output, (B, T, C). Where samples halt, notes after how many H-cycles."""
        if thought.cycles is not None:
            self.taken.append(thought.cycles)
        return thought.states[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """What the shapes of a step follow, beside the number of its tokens."""
        return (self.cursor.keys, *(cache.cursor.keys for cache in self.memory[:1]))

    def drop(self, rows: Collection[int]) -> "Moves":
        """The samples of these rows end. Returns how the others move, so that the samples that are there are the first rows."""
        moves = Moves(rows, self.cursor.samples, self.cursor.device)
        kept = [cache for caches in self.caches for cache in caches] + self.memory
        for cache in kept:
            cache.drop(moves)
        for cursor in {id(cache.cursor): cache.cursor for cache in kept}.values():
            cursor.drop(moves)
        return moves
