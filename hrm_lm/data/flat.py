"""Samples that lie end to end in arrays, in memory or in mapped files: read in batches, without an object for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hrm_lm.data.splits import Limits, Ragged, Sample, Split


class Shard(Protocol):
    """Two arrays, as their bytes: slicing a memoryview costs a fraction of slicing an array."""

    @property
    def tokens(self) -> memoryview:
        """Token ids, sample after sample: prompt, BOS, response, EOS."""

    @property
    def ends(self) -> memoryview:
        """int64: where each prompt and each sample ends in the tokens, after a leading 0."""


class MemoryShard(NamedTuple):
    """A shard in memory."""

    tokens: memoryview
    ends: memoryview


class FlatSplit(Split):
    """Samples of several shards. A shard is opened when a sample of it is first asked for."""

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        dtype: np.dtype,
        open_shard: Callable[[int], Shard],
        limits: Limits | None = None,
    ):
        """counts: samples of each shard. dtype: of the token ids. limits: what is longer is cut as it is read."""
        self.starts = np.cumsum([0, *counts])
        self.dtype, self.open_shard, self.limits = dtype, open_shard, limits
        self._shards: dict[int, Shard] = {}

    def _shard(self, home: int) -> Shard:
        if home not in self._shards:
            self._shards[home] = self.open_shard(home)
        return self._shards[home]

    @staticmethod
    def merged(splits: Sequence[Split]) -> FlatSplit | None:
        """The samples of several flat splits in a single split; None where the splits are not flat, or not alike."""
        flat = [split for split in splits if isinstance(split, FlatSplit)]
        if len(flat) < len(splits) or len({(split.dtype, split.limits) for split in flat}) > 1:
            return None
        return _Merged(flat)

    def fetch_shards(self, homes: Iterable[int], tokens: bool = True) -> None:
        """Waits until shards can be opened. tokens: whether more than the ends of samples is wanted."""

    def fetch(self, indices: np.ndarray) -> None:
        self.fetch_shards(set(self._locate(indices)[0].tolist()))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        ids, (prompt_len,), (label_len,), (ends,) = self.ragged(np.array([i % len(self)]))
        response = ids[prompt_len + 1 : prompt_len + 1 + label_len - ends]
        return Sample(ids[:prompt_len], response, bool(ends))

    def ragged(self, indices: np.ndarray) -> Ragged:
        homes, rows = self._locate(indices)
        size, here = self.dtype.itemsize, homes.tolist()
        self.fetch_shards(set(here))
        shards = {home: self._shard(home) for home in set(here)}
        places = (16 * rows).tolist()
        raw = b"".join([shards[home].ends[place : place + 24] for home, place in zip(here, places, strict=True)])
        bounds = np.frombuffer(raw, "<i8").reshape(-1, 3)
        lengths, ends = self._lengths(*bounds.T)
        if self.limits is None:
            runs = zip(here, (size * bounds[:, [0, 2]]).tolist(), strict=True)
            parts = [shards[home].tokens[start:end] for home, (start, end) in runs]
        else:
            starts = bounds[:, :2]
            runs = zip(here, (size * np.concatenate([starts, starts + lengths + [0, 1]], axis=1)).tolist(), strict=True)
            parts = [
                part for home, (a, c, b, d) in runs for part in (shards[home].tokens[a:b], shards[home].tokens[c:d])
            ]
        return Ragged(np.frombuffer(b"".join(parts), self.dtype), lengths[:, 0], lengths[:, 1], ends)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        homes, rows = self._locate(indices)
        order = np.argsort(homes, kind="stable")  # a corpus has a thousand shards: no pass over all indices for each
        found, firsts = np.unique(homes[order], return_index=True)
        self.fetch_shards(found.tolist(), tokens=False)
        bounds = np.empty((len(indices), 3), dtype=np.int64)
        for home, here in zip(found.tolist(), np.split(order, firsts[1:]), strict=False):
            ends = np.frombuffer(self._shard(home).ends, "<i8")
            bounds[here] = ends[2 * rows[here, None] + np.arange(3)]
        return self._lengths(*bounds.T)[0]

    def _lengths(self, start: np.ndarray, middle: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) int64, lengths of prompts and labels; and (B,) bool, whether the responses end."""
        lengths = np.stack([middle - start, end - middle - 1], axis=1)
        if self.limits is None:
            return lengths, np.ones(len(lengths), dtype=bool)
        return np.minimum(lengths, self.limits), lengths[:, 1] <= self.limits.response

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        homes = np.searchsorted(self.starts, indices, side="right") - 1
        return homes, indices - self.starts[homes]


class _Merged(FlatSplit):
    """The samples of several flat splits, which keep their shards: a split may close shards that it is done with."""

    def __init__(self, splits: Sequence[FlatSplit]):
        self.owners = [(split, home) for split in splits for home in range(len(split.starts) - 1)]
        counts = np.concatenate([np.diff(split.starts) for split in splits])
        super().__init__(counts, splits[0].dtype, self._shard, splits[0].limits)

    def _shard(self, home: int) -> Shard:
        split, own = self.owners[home]
        return split._shard(own)

    def fetch_shards(self, homes: Iterable[int], tokens: bool = True) -> None:
        wanted: dict[FlatSplit, list[int]] = {}
        for split, own in map(self.owners.__getitem__, homes):
            wanted.setdefault(split, []).append(own)
        for split, own in wanted.items():
            split.fetch_shards(own, tokens)
