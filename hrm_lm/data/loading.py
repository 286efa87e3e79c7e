"""From splits to batches on the device, made ahead in a thread.

Batches are small and come from memory, so a thread is enough: it starts at once, shares the samples, and leaves the
copy to the device (pinned, on a stream of its own) running while the step computes.
"""

import math
import queue
import threading
from typing import Iterable, Iterator

import numpy as np
import torch

from hrm_lm.config import TrainConfig
from hrm_lm.data.collate import IGNORE, Batch, pad_batch
from hrm_lm.data.registry import Splits
from hrm_lm.data.sampler import global_batch, worker_share


def train_batches(
    splits: Splits, config: TrainConfig, first_step: int, rank: int, world_size: int
) -> Iterator[list[Batch]]:
    """This worker's micro-batches of each optimisation step, from `first_step` to the last."""
    for step in range(first_step, config.steps):
        indices = global_batch(len(splits.train), config.batch_size, config.seed, step)
        yield [
            pad_batch([splits.train[i] for i in micro], splits.tokenizer.pad_id)
            for micro in worker_share(indices, rank, world_size, config.grad_accum_steps)
        ]


def val_batches(splits: Splits, batch_size: int, rank: int, world_size: int) -> Iterator[list[Batch]]:
    """This worker's share of the validation set, each sample once over all workers.

    All workers get the same number of batches, since workers that share a model must run together: one that has no
    sample left gets a batch without labels.
    """
    mine = np.arange(rank, len(splits.val), world_size)
    for start in range(0, math.ceil(len(splits.val) / world_size), batch_size):
        samples = [splits.val[i] for i in mine[start : start + batch_size]]
        if not samples:
            prompt, inputs, labels = splits.val[0]
            samples = [(prompt, inputs, [IGNORE] * len(labels))]
        yield [pad_batch(samples, splits.tokenizer.pad_id)]


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
