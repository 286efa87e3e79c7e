"""Which samples make up global batch k: a pure function of (seed, k).

Whatever the number of workers and whatever restarts happened, batch k is the same. Batches are cut from an endless row
of epochs, each a permutation of its own, so they run across epoch ends.

With `train.length_window` the row is cut into windows of so many samples, and each window by itself into batches of
samples of similar length, in a random order. `train.batch_tokens` makes the number of batches of a window depend on
its samples, so finding batch k counts through the windows before it: lengths only, some 50 ms for 65,536 samples. A
checkpoint remembers where a window began (`WindowStart`), and a resume counts from there.
With `train.packing` lengths need not be alike. The samples of a window stay in the order of the row; where prompts and
responses fill rows of their own, they are ordered so that both rows fill up alike (`balanced`).
"""

from collections.abc import Iterable, Iterator
from heapq import heapreplace
from itertools import count
from typing import NamedTuple

import numpy as np

from hrm_lm.config import Config, TrainConfig
from hrm_lm.data.collate import Rows, padded_length
from hrm_lm.data.splits import Split, stream_lengths


class WindowStart(NamedTuple):
    """Where a window begins. It holds for the split, seed and options of batches that it was counted with."""

    batch: int
    """The number of the window's first global batch."""
    window: int


def window_of(batch: int, starts: Iterable[WindowStart]) -> WindowStart:
    """The last of `starts` that is not after a global batch; the start of the row where all come after it."""
    return max((start for start in starts if start.batch <= batch), default=WindowStart(0, 0))


def global_batches(
    split: Split,
    config: TrainConfig,
    first: int = 0,
    rows: Rows | None = None,
    starts: list[WindowStart] | None = None,
) -> Iterator[np.ndarray]:
    """Indices of the samples of global batches `first`, `first + 1` and so on, without end. rows: what each fills, packed.

    starts: what is known of where windows begin. Each window's start is added before its first batch is given, so another
    thread that has a batch finds the batch's window there.
    """
    starts = [] if starts is None else starts
    if config.batch_tokens:
        begin, start = window_of(first, starts)
    else:
        start, skip = divmod(first, window_size(config) // config.batch_size)
        begin = first - skip
    for window in count(start):
        starts.append(WindowStart(begin, window))
        batches = window_batches(split, config, window, rows)
        if first < begin + len(batches):
            split.expect(window * window_size(config), (window + 1) * window_size(config), config.seed)
        yield from batches[max(first - begin, 0) :]
        begin += len(batches)


def window_size(config: TrainConfig) -> int:
    """Samples of a window; where batches are random, it only says how many are looked up together."""
    size = config.length_window or max(4096, config.batch_size)
    return size if config.batch_tokens else size - size % config.batch_size


def window_batches(split: Split, config: TrainConfig, window: int, rows: Rows | None = None) -> list[np.ndarray]:
    """The batches of a window: each of its samples once."""
    size = window_size(config)
    indices = split.order(window * size, (window + 1) * size, config.seed)
    if not config.length_window:
        return list(indices.reshape(-1, config.batch_size))
    lengths = split.lengths(indices)
    if rows:
        return [indices[run] for run in packed(lengths, rows)]
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
    for i, (p, r) in enumerate(zip(*lengths.T.tolist(), strict=True)):  # not a list for each sample to be collected
        prompt, response = max(prompt, p), max(response, r)
        if (i + 1 - start) * (prompt + response) > tokens and i > start:
            cuts.append(i)
            start, prompt, response = i, p, r
    return cuts


def batch_rows(split: Split, config: Config) -> tuple[Rows | None, Rows | None]:
    """With `train.packing`, the rows that a batch fills, and those that a worker takes through the model at a time.

    An `encoder_decoder` takes two rows. Prompts have the same share of both, that of the split's first window, so the
    widths are the same for all workers and after a restart. Together the two rows hold what a single row would.
    """
    train, row_tokens = config.train, config.row_tokens
    if row_tokens is None or train.batch_tokens is None:
        return None, None
    if config.model.architecture == "prefix_lm":
        return (train.batch_tokens,), (row_tokens,)
    lengths = split.lengths(split.order(0, window_size(train), train.seed)).sum(axis=0)
    share = float(lengths[0] / lengths.sum())
    return divided(train.batch_tokens, share), divided(row_tokens, share)


def divided(tokens: int, share: float) -> Rows:
    """An encoder's and a decoder's row of so many tokens together.

    The encoder's is a multiple of about a 256th of them: of 128 for 32,768 tokens, as the blocks of flex attention are.
    """
    step = max(8, 2 ** (tokens.bit_length() - 9))
    prompts = max(min(max(round(tokens * share / step) * step, step), tokens - step), 1)  # each row has a token
    return prompts, tokens - prompts


def row_lengths(lengths: np.ndarray, rows: Rows) -> np.ndarray:
    """What samples of `lengths` (N, 2) take of each row: (N, len(rows))."""
    return stream_lengths(lengths)[:, None] if len(rows) == 1 else lengths


def packed(lengths: np.ndarray, rows: Rows) -> list[np.ndarray]:
    """Samples of `lengths` (N, 2), in runs that fit `rows`: the places of each run's samples."""
    order = np.arange(len(lengths)) if len(rows) == 1 else balanced(lengths)
    return np.split(order, fill_rows(row_lengths(lengths[order], rows), rows))


def balanced(lengths: np.ndarray) -> np.ndarray:
    """An order (N,) of samples of `lengths` (N, 2): in every run of it prompts have about the share that they have in all.

    A sample leans to the side of which it has more than that share. Samples that lean to the same side keep their order.
    The two sides are merged so that both have given the same part of what they lean.
    """
    lean = np.subtract(*(lengths / lengths.sum(axis=0)).T)
    given = np.empty_like(lean)
    for side in (lean > 0, lean <= 0):
        leans = np.abs(lean[side])
        given[side] = (np.cumsum(leans) - leans / 2) / (leans.sum() or 1)
    return np.argsort(given, kind="stable")


def fill_rows(lengths: np.ndarray, rows: Rows) -> list[int]:
    """Where to cut samples of `lengths` (N, len(rows)) into runs that fit `rows`, each run as long as fits.

    A sample that fits no row has a run of its own.
    """
    ends, cuts, start = np.cumsum(lengths, axis=0), [], 0
    while True:
        full = (ends[start - 1] if start else 0) + np.array(rows)
        fitting = min(int(np.searchsorted(ends[:, i], full[i], side="right")) for i in range(len(rows)))
        start = max(fitting, start + 1)
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
    """`worker_share` for samples that take `lengths` (B, rows) of the rows: micro-batches of about as many tokens.

    For a single row samples are dealt out, the longest first, each to the share that has the fewest tokens: the shares
    are alike to a few tokens. Two rows fill up alike in the order that `balanced` made, so there a share is a run of
    samples, and at most a sample longer than its part.
    """
    shares = accum_steps * world_size
    if lengths.shape[1] > 1:
        totals = lengths.sum(axis=1)
        cuts = np.searchsorted(np.cumsum(totals) - totals, totals.sum() * np.arange(1, shares) / shares)
        return np.split(indices, cuts)[rank::world_size]
    owner, tokens = np.empty(len(indices), dtype=np.int64), [(0, share) for share in range(shares)]
    for place in np.argsort(-lengths[:, 0], kind="stable").tolist():
        held, owner[place] = tokens[0]
        heapreplace(tokens, (held + int(lengths[place, 0]), int(owner[place])))
    return [indices[owner == share] for share in range(rank, shares, world_size)]
