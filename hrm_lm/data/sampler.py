"""Which samples make up global batch k: a pure function of (seed, k).

Whatever the number of workers and whatever restarts happened, batch k is the same, and nothing needs saving but the
step. Batches are cut from an endless row of epochs, each a permutation of its own, so they run across epoch ends.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a batch touches one epoch, or two at its border
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def global_batch(num_samples: int, batch_size: int, seed: int, k: int) -> np.ndarray:
    """Indices (batch_size,) of the samples of global batch k, counted from 0."""
    places = np.arange(k * batch_size, (k + 1) * batch_size)
    epochs = places // num_samples
    return np.concatenate(
        [_permutation(num_samples, seed, int(e))[places[epochs == e] % num_samples] for e in np.unique(epochs)]
    )


def worker_share(indices: np.ndarray, rank: int, world_size: int, accum_steps: int) -> np.ndarray:
    """A worker's micro-batches of a global batch: (accum_steps, micro_batch_size)."""
    return indices.reshape(accum_steps, world_size, -1)[:, rank]
