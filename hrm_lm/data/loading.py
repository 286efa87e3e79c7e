"""From splits to batches on the device, made ahead in a thread.

Batches are small and come from memory, so a thread is enough: it starts at once, shares the samples, and leaves the
copy to the device (pinned, on a stream of its own) running while the step computes. Samples that take long to make
(some tasks of reasoning-gym) are made by `train.loader_workers` processes behind it, in the same order.
"""

import queue
import threading
from typing import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hrm_lm.config import TrainConfig
from hrm_lm.data.collate import IGNORE, Batch, pad_batch, pad_ragged
from hrm_lm.data.registry import Splits, sample_lengths
from hrm_lm.data.sampler import by_length, global_batches, worker_share
from hrm_lm.errors import UserError

VAL_WINDOW = 1 << 16
"""Validation samples that are sorted by length together."""


def collate(splits: Splits, split: str, indices: np.ndarray, round_up: bool) -> Batch:
    """The batch of a split's samples at `indices` (B,); without any, one that counts for nothing: it has no label."""
    samples, pad_id = getattr(splits, split), splits.tokenizer.pad_id
    if not len(indices):
        spare = collate(splits, split, np.zeros(1, dtype=np.int64), round_up)
        return spare._replace(labels=torch.full_like(spare.labels, IGNORE))
    if hasattr(samples, "ragged"):
        return pad_ragged(*samples.ragged(indices), pad_id, round_up)
    return pad_batch([samples[i] for i in indices], pad_id, round_up)


def train_batches(
    splits: Splits, config: TrainConfig, first_step: int, rank: int, world_size: int
) -> Iterator[list[Batch]]:
    """This worker's micro-batches of each optimisation step, from `first_step` to the last."""
    dataset = _Steps(splits, round_up=config.length_window > 0)
    # Fewer samples may fit train.batch_tokens than there are shares.
    steps = (
        worker_share(indices, rank, world_size, config.grad_accum_steps)
        for _, indices in zip(range(first_step, config.steps), global_batches(splits.train, config, first_step))
    )
    made = map(dataset.__getitem__, steps)
    if config.loader_workers:
        splits.train[0]  # opens what is remote, which a forked process might not
        options = {"num_workers": config.loader_workers, "multiprocessing_context": "fork"}  # shares what is in memory
        made = DataLoader(dataset, batch_size=None, sampler=steps, **options)
    for micro_batches in made:
        if isinstance(micro_batches, UserError):
            raise micro_batches
        yield micro_batches


class _Steps(Dataset):
    """Steps by the indices of their micro-batches."""

    def __init__(self, splits: Splits, round_up: bool):
        self.splits, self.round_up = splits, round_up

    def __getitem__(self, micro_batches: list[np.ndarray]) -> list[Batch] | UserError:
        try:
            return [collate(self.splits, "train", indices, self.round_up) for indices in micro_batches]
        except UserError as error:  # raised in a loader's process it would become a traceback
            return error


def val_batches(
    splits: Splits, batch_size: int, rank: int, world_size: int, round_up: bool = False
) -> Iterator[list[Batch]]:
    """This worker's share of the validation set, each sample once over all workers, alike lengths together.

    All workers get the same number of batches, since workers that share a model must run together: one that has no
    sample left gets a batch without labels.
    """
    mine = np.arange(rank, len(splits.val), world_size)
    most = -(-len(splits.val) // world_size)  # samples of the worker that has most
    for start in range(0, most, VAL_WINDOW):
        window = mine[start : start + VAL_WINDOW]
        if len(window):
            window = window[by_length(sample_lengths(splits.val, window), len(window) / batch_size)]
        for first in range(0, min(most - start, VAL_WINDOW), batch_size):
            yield [collate(splits, "val", window[first : first + batch_size], round_up)]


def prefetch(batches: Iterator[list[Batch]], device: torch.device, depth: int = 2) -> Iterator[list[Batch]]:
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
                        group = [batch.pin_memory().to(device) for batch in group]
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
                    for tensor in batch:
                        tensor.record_stream(compute)
            yield group
    finally:
        closed.set()
        thread.join()
        batches.close()  # and with it the loader's processes
