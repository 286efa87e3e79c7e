"""Which samples make up global batch k: a pure function of (seed, k).

Whatever the number of workers and whatever restarts happened, batch k is the same, and nothing needs saving but the
step. Batches are cut from an endless row of epochs, each a permutation of its own, so they run across epoch ends.

A permutation is computed, not stored: its n-th sample comes from a Feistel network over the next power of four, walked
until it falls below the number of samples (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). So memory
does not grow with the corpus, and a dataset may be endless.
"""

from functools import lru_cache

import numpy as np

ROUNDS = 6


@lru_cache(maxsize=8)
def _keys(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)


def permuted(places: np.ndarray, num_samples: int, seed: int, epoch: int) -> np.ndarray:
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


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads each bit of uint64 over the word (after SplitMix64)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def stream(start: int, stop: int, num_samples: int, seed: int) -> np.ndarray:
    """Samples `start` to `stop` of the endless row of epochs."""
    places = np.arange(start, stop)
    epochs = places // num_samples
    return np.concatenate(
        [permuted(places[epochs == epoch] % num_samples, num_samples, seed, int(epoch)) for epoch in np.unique(epochs)]
    )


def global_batch(num_samples: int, batch_size: int, seed: int, k: int) -> np.ndarray:
    """Indices (batch_size,) of the samples of global batch k, counted from 0."""
    return stream(k * batch_size, (k + 1) * batch_size, num_samples, seed)


def worker_share(indices: np.ndarray, rank: int, world_size: int, accum_steps: int) -> np.ndarray:
    """A worker's micro-batches of a global batch: (accum_steps, micro_batch_size)."""
    return indices.reshape(accum_steps, world_size, -1)[:, rank]
