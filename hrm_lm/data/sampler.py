"""Which samples make up global batch k: a pure function of (seed, k).

Whatever the number of workers and whatever restarts happened, batch k is the same, and nothing needs saving but the
step. Batches are cut from an endless row of epochs, each a permutation of its own, so they run across epoch ends.

With `train.length_window` the row is cut into windows of so many samples, and each window by itself into batches of
samples of similar length, in a random order. `train.batch_tokens` makes the number of batches of a window depend on
its samples, so finding batch k counts through the windows before it: lengths only, some 50 ms for 65,536 samples.
With `train.packing` lengths need not be alike, so the samples of a window stay in the order of the row.
"""

from collections.abc import Iterator
from itertools import count

import numpy as np

from hrm_lm.config import TrainConfig
from hrm_lm.data.collate import padded_length
from hrm_lm.data.splits import Split, stream_lengths


def global_batches(split: Split, config: TrainConfig, first: int = 0) -> Iterator[np.ndarray]:
    """Indices of the samples of global batches `first`, `first + 1` and so on, without end."""
    start, skip = (0, first) if config.batch_tokens else divmod(first, window_size(config) // config.batch_size)
    for window in count(start):
        batches = window_batches(split, config, window)
        yield from batches[skip:]
        skip = max(skip - len(batches), 0)


def window_size(config: TrainConfig) -> int:
    """Samples of a window; where batches are random, it only says how many are looked up together."""
    size = config.length_window or max(4096, config.batch_size)
    return size if config.batch_tokens else size - size % config.batch_size


def window_batches(split: Split, config: TrainConfig, window: int) -> list[np.ndarray]:
    """The batches of a window: each of its samples once."""
    size = window_size(config)
    indices = split.order(window * size, (window + 1) * size, config.seed)
    if not config.length_window:
        return list(indices.reshape(-1, config.batch_size))
    lengths = split.lengths(indices)
    if config.packing and config.batch_tokens:
        return np.split(indices, fill_rows(stream_lengths(lengths), config.batch_tokens))
    padded = padded_length(lengths)
    if config.batch_tokens:
        order = by_length(lengths, padded.sum() / config.batch_tokens)
        cuts = fill(padded[order], config.batch_tokens)
    else:
        order = by_length(lengths, size / config.batch_size)
        cuts = range(config.batch_size, size, config.batch_size)
    batches = np.split(indices[order], cuts)
    return [batches[i] for i in np.random.default_rng([config.seed, window, 1]).permutation(len(batches))]


def by_length(lengths: np.ndarray, num_batches: float) -> np.ndarray:
    """An order (N,) of samples of `lengths` (N, 2) in which neighbours are alike on both sides.

    Sorted into strips by prompt length, and within a strip by response length, up and down by turns. There are about
    as many strips as batches to a strip; weights of sqrt(length) put their borders where they save most padding.
    """
    prompts, responses = lengths.T
    order = np.argsort(prompts, kind="stable")
    weights = np.cumsum(np.sqrt(prompts[order]))
    strips = np.empty_like(prompts)
    strips[order] = (weights - weights[0]) / weights[-1] * np.sqrt(num_batches)
    return np.lexsort((np.where(strips % 2, -responses, responses), strips))


def fill(lengths: np.ndarray, tokens: int) -> list[int]:
    """Where to cut samples of padded `lengths` (N, 2) into runs of at most `tokens` positions, each run as long as fits."""
    cuts, start, prompt, response = [], 0, 0, 0
    for i, (p, r) in enumerate(lengths.tolist()):
        prompt, response = max(prompt, p), max(response, r)
        if (i + 1 - start) * (prompt + response) > tokens and i > start:
            cuts.append(i)
            start, prompt, response = i, p, r
    return cuts


def fill_rows(lengths: np.ndarray, tokens: int) -> list[int]:
    """Where to cut samples of `lengths` (N,) into runs of at most `tokens` tokens, each run as long as fits."""
    ends, cuts, start = np.cumsum(lengths), [], 0
    while True:
        used = int(ends[start - 1]) if start else 0
        start = max(int(np.searchsorted(ends, used + tokens, side="right")), start + 1)
        if start >= len(lengths):
            return cuts
        cuts.append(start)


def worker_share(indices: np.ndarray, rank: int, world_size: int, accum_steps: int) -> list[np.ndarray]:
    """A worker's micro-batches of a global batch: `accum_steps` of them, empty ones where samples are too few."""
    count, shares = len(indices), accum_steps * world_size
    return [indices[count * i // shares : count * (i + 1) // shares] for i in range(rank, shares, world_size)]


def token_share(
    indices: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, accum_steps: int
) -> list[np.ndarray]:
    """`worker_share` for samples of `lengths` (B,): micro-batches of about as many tokens, at most a sample more."""
    starts, shares = np.cumsum(lengths) - lengths, accum_steps * world_size
    cuts = np.searchsorted(starts, lengths.sum() * np.arange(1, shares) / shares)
    return np.split(indices, cuts)[rank::world_size]
