"""Reading for training: `python benchmarks/reading.py`.

samples/s of an epoch of batches, opening included: a prepared dataset against JSONL, both of characters
samples/s of a mixture of two halves of that dataset, against the halves alone
the share of the step's time on the default config that making its batch takes
padding and useful tokens/s on a skewed corpus, prompts and responses of 8 to 512 tokens, with and without batches by
length

`python benchmarks/reading.py --resume` prints instead the seconds that a rank of 128 takes to its first batch, from the start
and on a resume, in a corpus of 10^9 samples: 1,000 shards, all of them the same two files, which are in the page cache. The
ranks are taken one after another, each on a core of its own, so to say. Before that it prints the seconds that a rank takes to
find a checkpoint of 128 sharded workers whole, and to load its part of it. The checkpoint has the files and the tensors of
HRM-Text B, an eighth as wide, and is on a local disk, as it is once a node has downloaded it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hrm_lm.config import Config, load_config
from hrm_lm.data.collate import pack_apart, pad
from hrm_lm.data.loading import train_batches
from hrm_lm.data.mixture import Mixture
from hrm_lm.data.order import Blocks
from hrm_lm.data.prepared.reader import PreparedSplit
from hrm_lm.data.prepared.writer import ShardWriter, write_meta
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import WindowStart, batch_rows, window_batches, window_size
from hrm_lm.data.splits import Split, Splits
from hrm_lm.data.tokenizer import ByteTokenizer, SimpleTokenizer, Tokenizer
from hrm_lm.training.checkpoint import Progress, Snapshot, load_state, whole_checkpoint
from hrm_lm.training.step import Stats, TrainState, build_state, train_step

PAIRS = 200_000
WORKERS = 128
PRESET_B = Path(__file__).parent.parent / "configs" / "hrm_text_b.yaml"


def text_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Prompts of 30 and responses of 10 words, about."""
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 8))) for _ in range(5000)]
    lengths = np.minimum(rng.poisson((30, 10), (PAIRS, 2)) + 1, (60, 18))
    return [tuple(" ".join(words[i] for i in rng.integers(len(words), size=n)) for n in pair) for pair in lengths]


def write_prepared(
    folder: Path, pairs: list[tuple[list[int], list[int]]], tokenizer: Tokenizer, shards: int = 4
) -> None:
    fs, closed = pyarrow.fs.LocalFileSystem(), {"train": [], "val": []}
    folder.mkdir()
    for split, some, count in (("train", pairs[100:], shards), ("val", pairs[:100], 1)):
        for i in range(count):
            writer = ShardWriter(fs, str(folder), f"{split}-{i:05d}", tokenizer)
            writer.write(some[i::count])
            closed[split].append(writer.close())
    write_meta(fs, str(folder), tokenizer, closed)


def epoch_rate(data: dict[str, Any]) -> float:
    """Samples/s of the first epoch, from the names of the data sets on. data: fields of the config's `data` section."""
    config = load_config(overrides={"data": data, "train.steps": 10**9})
    start = time.perf_counter()
    splits = load_dataset(config.data, config.model, 0)
    steps = len(splits.train) // config.train.batch_size
    for _ in islice(train_batches(splits.train, splits.tokenizer, pad, config.train), steps):
        pass
    return steps * config.train.batch_size / (time.perf_counter() - start)


def shares(config: Config, splits: Splits, steps: int) -> tuple[float, float, dict[str, float]]:
    """Seconds a step for making the batch and for training on it, and the stats over all steps."""
    state = build_state(config, splits.tokenizer.vocab_size)
    batches = train_batches(splits.train, splits.tokenizer, state.model.collate, config.train)
    stats, making, training = Stats(state), 0.0, 0.0
    train_step(state, next(batches), stats)
    stats.read()
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        made = time.perf_counter()
        train_step(state, batch, stats)
        making, training = making + made - start, training + time.perf_counter() - made
    return making / steps, training / steps, stats.read()


def open_large(folder: Path, blocks: bool = False) -> PreparedSplit:
    """The split of 10^9 samples that `resume` wrote a shard of; in the order by blocks of a cache of 100 GB if `blocks`."""
    shards = [{"name": "shard", "samples": 10**6}] * 1000
    meta = {"shards": shards, "longest_prompt": 1 << 16, "longest_response": 1 << 16}
    split = PreparedSplit(meta, np.dtype("<u2"), 1 << 16, str(folder), "corpus")
    if blocks:
        size = sum((folder / f"shard{suffix}").stat().st_size for suffix in (".idx", ".bin"))
        split.blocks = Blocks(np.full(1000, 10**6), np.full(1000, size), 25e9)
    return split


def open_mixture(folder: Path) -> Mixture:
    """That split twice, once in the order by blocks."""
    return Mixture({"all": open_large(folder), "blocks": open_large(folder, blocks=True)}, [2, 1])


def first_batch_seconds(
    open_split: Callable[[], Split], config: Config, first_step: int, start: WindowStart
) -> list[float]:
    """What each of the workers of a node of eight takes, the node in the middle of all, each with a split of its own."""
    seconds, world_size = [], config.ray.workers.most
    for rank in range(world_size // 2, world_size // 2 + 8):
        begin, split = time.perf_counter(), open_split()
        step_rows, rows = batch_rows(split, config)
        collate = partial(pack_apart, rows=rows) if rows else pad
        place = first_step, rank, world_size
        next(train_batches(split, ByteTokenizer(), collate, config.train, *place, rows=step_rows, starts=[start]))
        seconds.append(time.perf_counter() - begin)
    return seconds


def state_of(rank: int) -> TrainState:
    """A sharded worker's, whose process group is there for none but this worker."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=rank, world_size=WORKERS, store=FakeStore())
    small = {"model.d_model": 128, "train.compile": False, "ray.parallel": "fsdp", "ray.num_workers": WORKERS}
    return build_state(load_config(PRESET_B, small), 512, torch.device("cpu"), rank, WORKERS)


def write_part(folder: Path, rank: int) -> None:
    snapshot = Snapshot(state_of(rank), ByteTokenizer())
    snapshot.take(Progress(step=1))
    snapshot.write(pyarrow.fs.LocalFileSystem(), str(folder))


def load_seconds(folder: Path, rank: int) -> tuple[float, float]:
    """To find the checkpoint whole, together with the other workers of a node of eight, and to load the rank's part."""
    state = state_of(rank)
    os.environ |= {"LOCAL_RANK": str(rank % 8), "LOCAL_WORLD_SIZE": "8"}
    begin = time.perf_counter()
    checkpoint = whole_checkpoint(folder, str(folder), state.device, WORKERS)
    found = time.perf_counter()
    load_state(checkpoint, state)
    return found - begin, time.perf_counter() - found


def resume_sharded(folder: Path) -> None:
    # A process for each rank, forked before this one has computed anything: PyTorch's threads do not outlive a fork.
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        pool.map(partial(write_part, folder), range(WORKERS), chunksize=1)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        measured = pool.map(partial(load_seconds, folder), range(WORKERS // 2, WORKERS // 2 + 8), chunksize=1)
    print("seconds of a sharded checkpoint, median and most of the eight workers of a node")
    for what, seconds in zip(("found whole", "loaded"), zip(*measured)):
        print(f"{what}: {statistics.median(seconds):.2f} {max(seconds):.2f}", flush=True)


def resume(folder: Path) -> None:
    """Prompts and labels have 8 to 64 tokens."""
    ends = np.cumsum(np.append(0, np.random.default_rng(0).integers(8, 65, (10**6, 2)) + [0, 1]))
    ends.astype("<i8").tofile(folder / "shard.idx")
    np.full(ends[-1], 10, "<u2").tofile(folder / "shard.bin")
    by_tokens = {"train.batch_tokens": 2**20, "train.length_window": 65_536}
    orders = {
        "all samples": partial(open_large, folder),
        "blocks of shards": partial(open_large, folder, blocks=True),
        "a mixture of both": partial(open_mixture, folder),
    }
    print("seconds to the first batch, median and most of the eight workers of a node, and their sum")
    for (order, open_split), (title, options) in itertools.product(
        orders.items(),
        (
            ("random batches of 8,192", {"train.batch_size": 8_192}),
            ("by length, 1,048,576 tokens", by_tokens),
            ("packed, 1,048,576 tokens", by_tokens | {"train.packing": True, "model.bridge.type": "cross_attention"}),
        ),
    ):
        config = load_config(overrides={"train.steps": 10**9, "ray.num_workers": WORKERS} | options)
        split = open_split()
        window = 10**9 // window_size(config.train)
        rows, _ = batch_rows(split, config)
        begin = time.perf_counter()
        batches = len(window_batches(split, config.train, window, rows))
        counting = (time.perf_counter() - begin) * window
        # The number of a window's first batch is not counted out here. A batch right behind its window costs most.
        start = WindowStart(window * batches, window)
        places = {"start": (0, WindowStart(0, 0)), "resume after 10^9 samples": (start.batch + batches, start)}
        for what, place in places.items():
            seconds = first_batch_seconds(open_split, config, *place)
            figures = f"{statistics.median(seconds):.2f} {max(seconds):.2f} {sum(seconds):.2f}"
            print(f"{order}, {title}, {what}: {figures}", flush=True)
        if config.train.batch_tokens:
            print(f"{order}, {title}, by counting, which a checkpoint saves: {counting:,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="only the seconds to the first batch")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="reading_") as temporary:
        folder = Path(temporary)
        if args.resume:
            resume_sharded(folder / "checkpoint")
            return resume(folder)
        pairs = text_pairs(rng)
        tokenizer = SimpleTokenizer.from_texts(text for pair in pairs for text in pair)
        with open(folder / "corpus.jsonl", "w") as file:
            file.writelines(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in pairs)
        encoded = [tuple(map(tokenizer.encode, pair)) for pair in pairs]
        write_prepared(folder / "prepared", encoded, tokenizer)
        halves = {"one": folder / "one", "two": folder / "two"}
        for number, half in enumerate(halves.values()):
            write_prepared(half, encoded[number::2], tokenizer)
        # A process each: what JSONL leaves of the heap makes every batch after it slower by a sixth.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            files = [{"dataset": str(folder / name)} for name in ("corpus.jsonl", "prepared")]
            jsonl, prepared = pool.map(epoch_rate, files, chunksize=1)
            print(f"samples/s: JSONL {jsonl:,.0f}, prepared {prepared:,.0f}: {prepared / jsonl:.1f} times")
            alone = [{"dataset": str(half)} for half in halves.values()]
            mixture = {"mixture": {name: {"dataset": str(half)} for name, half in halves.items()}}
            rounds = [pool.map(epoch_rate, [*alone, mixture], chunksize=1) for _ in range(5)]
            shares_of_own = [mixed / statistics.mean(own) for *own, mixed in rounds]
            mixed = statistics.median(rates[-1] for rates in rounds)
            print(
                f"a mixture of two halves: {mixed:,.0f} samples/s, {statistics.median(shares_of_own):.0%} of the halves' own "
                f"(five rounds: {min(shares_of_own):.0%} to {max(shares_of_own):.0%})"
            )

        config = load_config(overrides={"data.dataset": str(folder / "prepared"), "train.steps": 10**6})
        making, training, _ = shares(config, load_dataset(config.data, config.model, 0), 30)
        print(
            f"default config: a batch takes {making * 1e3:.2f} ms, its step {training * 1e3:.0f} ms: {making / training:.2%}"
        )

        lengths = np.exp(rng.uniform(np.log(8), np.log(512), (PAIRS, 2))).astype(int)
        write_prepared(folder / "skewed", [([10] * p, [11] * (r - 1)) for p, r in lengths.tolist()], ByteTokenizer())
        skewed = {"data.dataset": str(folder / "skewed"), "train.steps": 10**6, "model.max_response_len": 512}
        for title, options in (
            ("random batches of 32", {"train.batch_size": 32}),
            ("by length, batches of 32", {"train.batch_size": 32, "train.length_window": 65_536}),
            ("by length, 8,192 tokens", {"train.batch_tokens": 8_192, "train.length_window": 65_536}),
        ):
            config = load_config(overrides=skewed | options)
            splits = load_dataset(config.data, config.model, 0)
            making, training, stats = shares(config, splits, 60)
            print(
                f"{title}: padding {stats['padding']:.1%}, {stats['tokens'] / 60 / (making + training):,.0f} useful tokens/s"
            )


if __name__ == "__main__":
    main()
