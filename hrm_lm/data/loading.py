"""From splits to batches on the device, made ahead in a thread.

Batches are small and come from memory, so a thread is enough. It starts at once and shares the samples. It copies
batches to the device from pinned memory, on a CUDA stream of its own, while the step computes. Samples that take long
to make (some tasks of reasoning-gym) are made by `train.loader_workers` processes behind it, in the same order.
"""

import queue
import threading
from collections.abc import Generator, Iterable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hrm_lm.config import TrainConfig
from hrm_lm.data.collate import AnyBatch, Collate, Rows, to_device, without_labels
from hrm_lm.data.sampler import WindowStart, by_length, global_batches, packed, row_lengths, token_share, worker_share
from hrm_lm.data.splits import Split
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError

VAL_WINDOW = 1 << 16
"""Validation samples that are sorted by length together."""


class Batches(Dataset):
    """Lists of batches by lists of their samples' indices. Raises nothing: a UserError is an item, so that it can cross
    from a loader's process.
    """

    def __init__(self, split: Split, tokenizer: Tokenizer, collate: Collate, round_up: bool):
        self.split, self.tokenizer, self.collate, self.round_up = split, tokenizer, collate, round_up

    def __getitem__(self, micro_batches: list[np.ndarray]) -> list[AnyBatch] | UserError:
        try:
            return [self.batch(indices) for indices in micro_batches]
        except UserError as error:
            return error

    def batch(self, indices: np.ndarray) -> AnyBatch:
        """The batch of the samples at `indices` (B,). For no index it is a batch that counts for nothing."""
        if not len(indices):
            return without_labels(self.batch(np.zeros(1, dtype=np.int64)))
        return self.collate(self.split.ragged(indices), self.tokenizer, self.round_up)


def train_batches(
    split: Split,
    tokenizer: Tokenizer,
    collate: Collate,
    config: TrainConfig,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    *,
    round_up: bool = False,
    rows: Rows | None = None,
    starts: list[WindowStart] | None = None,
) -> Generator[list[AnyBatch], None, None]:
    """This worker's micro-batches of each optimisation step, from `first_step` to the last.

    round_up: whether their sizes are rounded up; with `train.length_window` they are anyway. rows: what a step fills, packed.
    starts: where windows begin, as `global_batches` takes it.
    """
    batches = Batches(split, tokenizer, collate, round_up or config.length_window > 0)

    def share(indices: np.ndarray) -> list[np.ndarray]:
        """Some of them empty, where fewer samples fit train.batch_tokens than there are shares."""
        if rows:
            lengths = row_lengths(split.lengths(indices), rows)
            return token_share(indices, lengths, rank, world_size, config.grad_accum_steps)
        return worker_share(indices, rank, world_size, config.grad_accum_steps)

    steps = (
        share(indices)
        for _, indices in zip(
            range(first_step, config.steps), global_batches(split, config, first_step, rows, starts), strict=False
        )
    )
    made: Iterable[list[AnyBatch] | UserError] = map(batches.__getitem__, steps)
    if config.loader_workers:

        def fetched(micro_batches: list[np.ndarray]) -> list[np.ndarray]:
            # A forked process might not fetch what is remote. The first sample stands where there is no other.
            split.fetch(np.concatenate([indices if len(indices) else [0] for indices in micro_batches]))
            return micro_batches

        made = DataLoader(
            batches,
            batch_size=None,
            sampler=map(fetched, steps),
            num_workers=config.loader_workers,
            multiprocessing_context="fork",  # shares what is in memory
        )
    for micro_batches in made:
        if isinstance(micro_batches, UserError):
            raise micro_batches
        yield micro_batches


def val_batches(
    split: Split,
    tokenizer: Tokenizer,
    collate: Collate,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    round_up: bool = False,
    rows: Rows | None = None,
) -> Generator[list[AnyBatch], None, None]:
    """This worker's share of a validation split, each sample once over all workers, alike lengths together; or with
    `rows`, as many samples as fill these.

    All workers get the same number of batches, since workers that share a model must run together. A worker that has no
    sample left gets a batch without labels.
    """
    batches = Batches(split, tokenizer, collate, round_up)
    if rows:
        every = np.arange(len(split))
        runs = packed(split.lengths(every), rows)
        runs += [every[:0]] * (-len(runs) % world_size)
        yield from ([batches.batch(run)] for run in runs[rank::world_size])
        return
    mine = np.arange(rank, len(split), world_size)
    most = -(-len(split) // world_size)  # samples of the worker that has most
    for start in range(0, most, VAL_WINDOW):
        window = mine[start : start + VAL_WINDOW]
        if len(window):
            window = window[by_length(split.lengths(window), len(window) / batch_size)]
        for first in range(0, min(most - start, VAL_WINDOW), batch_size):
            yield [batches.batch(window[first : first + batch_size])]


def prefetch(
    batches: Generator[list[AnyBatch], None, None], device: torch.device, depth: int = 2
) -> Generator[list[AnyBatch], None, None]:
    """The same batches on `device`, `depth` lists ahead. Closing the iterator ends the thread."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()
    end = object()

    def put(item) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            for group in batches:
                copied = None
                if stream is not None:
                    with torch.cuda.stream(stream):
                        group = [to_device(batch, device) for batch in group]
                        copied = stream.record_event()
                if not put((group, copied)):
                    return
            put(end)
        except BaseException as error:  # raised where the batch is asked for
            put(error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            group, copied = item
            if copied is not None:
                compute = torch.cuda.current_stream(device)
                compute.wait_event(copied)
                for batch in group:
                    batch[0].record_stream(compute)  # the others lie in the same memory
            yield group
    finally:
        closed.set()
        thread.join()
        batches.close()  # and with it the loader's processes
