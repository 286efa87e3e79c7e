"""Samples that lie end to end in arrays, in memory or in mapped files: read in batches, without an object for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hrm_lm.data.splits import Limits, Ragged, Sample, Split
from hrm_lm.errors import UserError


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


class Promise(NamedTuple):
    """What is said of all samples of a file that may be damaged. Each sample is held against it when it is read."""

    vocab_size: int
    """More than every token id."""
    longest: Limits


class FlatSplit(Split):
    """Samples of several shards. A shard is opened when a sample of it is first asked for."""

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        dtype: np.dtype,
        open_shard: Callable[[int], Shard],
        limits: Limits | None = None,
        promise: Promise | None = None,
    ):
        """counts: samples of each shard. dtype: of the token ids. limits: what is longer is cut as it is read. promise: None
        where the shards need no check.
        """
        self.starts = np.cumsum([0, *counts])
        self.dtype, self.open_shard, self.limits, self.promise = dtype, open_shard, limits, promise
        self._shards: dict[int, Shard] = {}

    def _shard(self, home: int) -> Shard:
        if home not in self._shards:
            self._shards[home] = self.open_shard(home)
        return self._shards[home]

    @staticmethod
    def merged(splits: Sequence[Split]) -> FlatSplit | None:
        """The samples of several flat splits in a single split; None where the splits are not flat, or not alike."""
        flat = [split for split in splits if isinstance(split, FlatSplit)]
        kinds = {(split.dtype, split.limits, split.promise and split.promise.vocab_size) for split in flat}
        if len(flat) < len(splits) or len(kinds) > 1:
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
        lengths, ends = self._lengths(bounds, indices)
        if self.limits is None:
            runs = zip(here, (size * bounds[:, [0, 2]]).tolist(), strict=True)
            parts = [shards[home].tokens[start:end] for home, (start, end) in runs]
        else:
            starts = bounds[:, :2]
            runs = zip(here, (size * np.concatenate([starts, starts + lengths + [0, 1]], axis=1)).tolist(), strict=True)
            parts = [
                part for home, (a, c, b, d) in runs for part in (shards[home].tokens[a:b], shards[home].tokens[c:d])
            ]
        samples = Ragged(np.frombuffer(b"".join(parts), self.dtype), lengths[:, 0], lengths[:, 1], ends)
        if self.promise and not (
            len(samples.ids) == samples.sizes.sum() and samples.ids.max() < self.promise.vocab_size
        ):
            for i in indices.tolist() if len(indices) > 1 else []:
                self.ragged(np.array([i]))  # finds out which sample it is
            raise UserError(
                f"{self.place(int(indices[0]))}: damaged: it has other tokens than its tokenizer, or too few"
            )
        return samples

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        homes, rows = self._locate(indices)
        order = np.argsort(homes, kind="stable")  # a corpus has a thousand shards: no pass over all indices for each
        found, firsts = np.unique(homes[order], return_index=True)
        self.fetch_shards(found.tolist(), tokens=False)
        bounds = np.empty((len(indices), 3), dtype=np.int64)
        for home, here in zip(found.tolist(), np.split(order, firsts[1:]), strict=False):
            ends = np.frombuffer(self._shard(home).ends, "<i8")
            bounds[here] = ends[2 * rows[here, None] + np.arange(3)]
        return self._lengths(bounds, indices)[0]

    def _lengths(self, bounds: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) int64, lengths of prompts and labels; and (B,) bool, whether the responses end.

        bounds: (B, 3) int64, where the samples at `indices` (B,) begin, where their prompts end, and where they end.
        """
        start, middle, end = bounds.T
        lengths = np.stack([middle - start, end - middle - 1], axis=1)
        if self.promise and len(bounds):
            longest, prompts, labels = self.promise.longest, *lengths.T
            likely = min(prompts.min(), labels.min()) > 0 and start.min() >= 0 and end.max() < 1 << 59
            if not (likely and prompts.max() <= longest.prompt and labels.max() <= longest.response):
                good = ((lengths > 0) & (lengths <= longest)).all(axis=1) & (start >= 0) & (end < 1 << 59)
                place = self.place(int(indices[good.argmin()]))
                raise UserError(f"{place}: damaged: its index says where no sample can be")
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
        promises = [split.promise for split in splits if split.promise]
        longest = Limits(*np.max([promise.longest for promise in promises], axis=0)) if promises else None
        promise = longest and promises[0]._replace(longest=longest)
        super().__init__(counts, splits[0].dtype, self._shard, splits[0].limits, promise)

    def place(self, i: int) -> str:
        home = int(np.searchsorted(self.starts, i, side="right")) - 1
        split, own = self.owners[home]
        return split.place(int(split.starts[own] + i - self.starts[home]))

    def _shard(self, home: int) -> Shard:
        split, own = self.owners[home]
        return split._shard(own)

    def fetch_shards(self, homes: Iterable[int], tokens: bool = True) -> None:
        wanted: dict[FlatSplit, list[int]] = {}
        for split, own in map(self.owners.__getitem__, homes):
            wanted.setdefault(split, []).append(own)
        for split, own in wanted.items():
            split.fetch_shards(own, tokens)
