"""Samples that lie end to end in arrays, in memory or in mapped files: read in batches, without an object for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hrm_lm.data.splits import Limits, Ragged, Sample, Split


class Shard(NamedTuple):
    """Two arrays, as their bytes: slicing a memoryview costs a fraction of slicing an array."""

    tokens: memoryview
    """Token ids, sample after sample: prompt, BOS, response, EOS."""
    ends: memoryview
    """int64: where each prompt and each sample ends in the tokens, after a leading 0."""


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
        owners = [(split, home) for split in flat for home in range(len(split.starts) - 1)]
        counts = np.concatenate([np.diff(split.starts) for split in flat])
        return FlatSplit(counts, flat[0].dtype, lambda home: owners[home][0]._shard(owners[home][1]), flat[0].limits)

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
