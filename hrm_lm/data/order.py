"""Which sample comes when: an endless row of epochs, each a permutation of its own, and a pure function of the seed.

A permutation is computed and not stored. Its n-th sample comes from a Feistel network over the next power of four, which
is walked until the result falls below the number of samples (Black & Rogaway 2002, "Ciphers with arbitrary finite
domains"). So memory does not grow with the corpus.
"""

from functools import lru_cache
from typing import Any

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
