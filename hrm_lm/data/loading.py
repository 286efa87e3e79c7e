"""From splits to batches on the device, made ahead in a thread.

Batches are small and come from memory, so a thread is enough: it starts at once, shares the samples, and leaves the
copy to the device (pinned, on a stream of its own) running while the step computes.
"""

import queue
import threading
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch

from hrm_lm.config import TrainConfig
from hrm_lm.data.collate import IGNORE, Batch, Sample, pad_batch
from hrm_lm.data.registry import Splits, sample_lengths, take_samples
from hrm_lm.data.sampler import by_length, global_batches, worker_share

VAL_WINDOW = 1 << 16
"""Validation samples that are sorted by length together."""


def train_batches(
    splits: Splits, config: TrainConfig, first_step: int, rank: int, world_size: int
) -> Iterator[list[Batch]]:
    """This worker's micro-batches of each optimisation step, from `first_step` to the last."""
    pad_id, round_up = splits.tokenizer.pad_id, config.length_window > 0
    for _, indices in zip(range(first_step, config.steps), global_batches(splits.train, config, first_step)):
        micro_batches = []
        for micro in worker_share(indices, rank, world_size, config.grad_accum_steps):
            # Fewer samples may fit train.batch_tokens than there are shares.
            samples = take_samples(splits.train, micro) or unlabelled(splits.train)
            micro_batches.append(pad_batch(samples, pad_id, round_up))
        yield micro_batches


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
            samples = take_samples(splits.val, window[first : first + batch_size])
            yield [pad_batch(samples or unlabelled(splits.val), splits.tokenizer.pad_id, round_up)]


def unlabelled(samples: Sequence[Sample]) -> list[Sample]:
    """A sample that counts for nothing, for a worker that has none left."""
    ((prompt, inputs, labels),) = take_samples(samples, np.zeros(1, dtype=np.int64))
    return [(prompt, inputs, np.full(len(labels), IGNORE))]


def prefetch(batches: Iterable[list[Batch]], device: torch.device, depth: int = 2) -> Iterator[list[Batch]]:
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
