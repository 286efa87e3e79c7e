"""Which sample comes when: an endless row of epochs, each a permutation of its own, and a pure function of the seed.

A permutation is computed and not stored. Its n-th sample comes from a Feistel network over the next power of four, which
is walked until the result falls below the number of samples (Black & Rogaway 2002, "Ciphers with arbitrary finite
domains"). So memory does not grow with the corpus.

Such a permutation needs every shard for every few batches. Where the shards do not fit a node's disk, `Blocks` takes its
place.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

ROUNDS = 6

Seed = int | tuple[Any, ...]
"""The run's seed, or a seed and the number of a mixture's member."""


def epochs(start: int, stop: int, num_samples: int, seed: Seed) -> np.ndarray:
    """(stop - start,) int64: samples `start` to `stop` of the endless row."""
    places = np.arange(start, stop)
    epoch_of = places // num_samples
    return np.concatenate(
        [
            permuted(places[epoch_of == epoch] % num_samples, num_samples, seed, int(epoch))
            for epoch in np.unique(epoch_of)
        ]
    )


def permuted(places: np.ndarray, num_samples: int, seed: Seed, epoch: int) -> np.ndarray:
    """The samples (B,) at `places` (B,) of the permutation of an epoch."""
    half = max(3, (num_samples - 1).bit_length() + 1 >> 1)  # fewer bits than 2 * 3 do not mix well
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    samples = places.astype(np.uint64)
    walking = np.arange(len(samples))
    while len(walking):
        left, right = samples[walking] >> shift, samples[walking] & mask
        for key in _keys(seed, epoch):
            left, right = right, left ^ (_mix(right + key) & mask)
        samples[walking] = left << shift | right
        walking = walking[samples[walking] >= num_samples]
    return samples.astype(np.int64)


@lru_cache(maxsize=64)
def _keys(seed: Seed, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([*np.atleast_1d(seed).tolist(), epoch]).generate_state(ROUNDS, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads each bit of uint64 over the word (after SplitMix64)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Epoch(NamedTuple):
    """In which order an epoch goes through the shards."""

    shards: np.ndarray
    """(S,)."""
    before: np.ndarray
    """(S + 1,): samples of the epoch that come before each of `shards`."""
    cuts: np.ndarray
    """(blocks + 1,): where among `shards` blocks begin."""


class Blocks:
    """The order of a dataset whose shards are not all at hand: an epoch takes the shards in a random order, some at a
    time (a block), and the samples of a block in a random order.
    """

    def __init__(self, counts: np.ndarray, sizes: np.ndarray, most: float):
        """counts, sizes: (S,), samples and bytes of each shard. most: bytes of a block, which holds a shard at least."""
        self.sizes, self.most = sizes, most
        self.starts = np.cumsum([0, *counts])
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    def _epoch(self, epoch: int, seed: Seed) -> Epoch:
        shards = permuted(np.arange(len(self.sizes)), len(self.sizes), _own(seed, epoch), 0)
        before = np.cumsum([0, *np.diff(self.starts)[shards]])
        cuts, held = [0], 0
        for i, size in enumerate(self.sizes[shards].tolist()):
            if held and held + size > self.most:
                cuts.append(i)
                held = 0
            held += size
        return Epoch(shards, before, np.array([*cuts, len(shards)]))

    def around(self, start: int, stop: int, seed: Seed) -> list[tuple[int, int]]:
        """The blocks (epoch, number) that samples `start` to `stop` of the endless row are in."""
        size, found = int(self.starts[-1]), []
        for epoch in range(start // size, (stop - 1) // size + 1):
            _, before, cuts = self.epoch(epoch, seed)
            first = np.searchsorted(before[cuts], max(start - epoch * size, 0), side="right") - 1
            last = np.searchsorted(before[cuts], min(stop - epoch * size, size), side="left")
            found += [(epoch, block) for block in range(int(first), int(last))]
        return found

    def shards(self, block: tuple[int, int], seed: Seed) -> list[int]:
        """The shards of a block."""
        shards, _, cuts = self.epoch(block[0], seed)
        return shards[cuts[block[1]] : cuts[block[1] + 1]].tolist()

    def span(self, block: tuple[int, int], seed: Seed) -> tuple[int, int]:
        """Where in the endless row a block begins and ends."""
        _, before, cuts = self.epoch(block[0], seed)
        first, last = before[cuts[block[1] : block[1] + 2]].tolist()
        return block[0] * int(self.starts[-1]) + first, block[0] * int(self.starts[-1]) + last

    def order(self, start: int, stop: int, seed: Seed) -> np.ndarray:
        """As `epochs`."""
        runs = []
        for block in self.around(start, stop, seed):
            shards, before, cuts = self.epoch(block[0], seed)
            first, last = self.span(block, seed)
            places = np.arange(max(start, first), min(stop, last)) - first
            within = before[cuts[block[1]]] + permuted(places, last - first, _own(seed, block[0]), block[1] + 1)
            homes = np.searchsorted(before, within, side="right") - 1
            runs.append(self.starts[shards[homes]] + within - before[homes])
        return np.concatenate(runs)


def _own(seed: Seed, epoch: int) -> Seed:
    return (*np.atleast_1d(seed).tolist(), epoch)
