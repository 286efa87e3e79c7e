"""What the loop costs, and what checkpoints cost: in a worker of a TorchTrainer.

The loop: steps/s of `train_loop_per_worker`'s loop over the bare step's.

Both sides alternate in one Ray Train worker, in rounds; the medians are compared. The loop's side loads, prefetches,
logs and writes event files; the bare one takes batches that are ready through `train_step`. Of each run the second half
is timed: the first half compiles and captures what it needs.

    python benchmarks/loop_overhead.py [--rounds 7] [--steps 400] [--set PATH=VALUE ...]
    python benchmarks/loop_overhead.py --preset b --steps 40    # HRM-Text B, 32 sequences of 1,024 tokens; on a GPU
    python benchmarks/loop_overhead.py --checkpoints            # instead: a checkpoint every 50 steps against none

Checkpoints are written as Ray's upload thread writes them, while training goes on, to a local disk. Of both sides the time
between the first checkpoint and the end is taken, in which one side saves every 50 steps and the other does not.
"""

import argparse
import gc
import json
import os
import random
import statistics
import string
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import LocalFileSystem
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from hrm_lm.cluster.sessions import RayTrainSession
from hrm_lm.config import load_config, parse_config, parse_set
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import batch_rows
from hrm_lm.data.tokenizer import model_vocab_size
from hrm_lm.models.contract import layout
from hrm_lm.training.loop import train
from hrm_lm.training.step import Stats, build_state, train_step

PRESET_B = Path(__file__).parent.parent / "configs" / "hrm_text_b.yaml"


class FreshSession(RayTrainSession):
    """Every round starts anew, whatever was reported before."""

    def checkpoints(self):
        self.reports, self.times, self.save_ms = [], [], 0.0
        return iter(())

    def report(self, metrics, snapshot):
        self.reports.append((metrics["step"], metrics["seconds"]))
        self.times.append(time.perf_counter())
        self.save_ms = metrics["save_ms"]  # the mean so far
        threading.Thread(target=self._write, args=[snapshot]).start()

    def _write(self, snapshot):
        with tempfile.TemporaryDirectory() as folder:
            snapshot.write(LocalFileSystem(), folder)

    @property
    def steps_per_s(self) -> float:
        """Between the checkpoint after half of the steps and the last."""
        (half, before), (steps, after) = self.reports
        return (steps - half) / (after - before)


def saving(loop_config: dict) -> list[tuple[float, float]]:
    """Of each round: what a checkpoint every 50 steps adds to the time of these steps, as a share, and the milliseconds that
    training waited for each.
    """
    session = FreshSession(os.getcwd(), "none", (LocalFileSystem(), loop_config["event_folder"]))
    half = loop_config["config"]["train"]["steps"] // 2

    def run(**fields: int) -> None:
        gc.collect()
        config = loop_config["config"]
        train(parse_config(config | {"train": config["train"] | fields}), session)

    def last_half(every: int) -> tuple[float, float]:
        """The seconds of the second half of the steps, with and without what is not a step."""
        run(checkpoint_every=every)
        start = [step for step, _ in session.reports].index(half)
        (_, before), (_, after) = session.reports[start], session.reports[-1]
        return session.times[-1] - session.times[start], after - before

    def share(seldom: tuple[float, float], often: tuple[float, float]) -> float:
        """`seldom` saves once in the half, at its end."""
        return (often[0] - seldom[0]) / (half // 50 - 1) / (50 * seldom[1] / half)

    run(steps=20, checkpoint_every=10)  # warm up
    measured = []
    for i in range(loop_config["rounds"]):
        if i % 2:
            seldom, often = last_half(half), last_half(50)
        else:
            often, seldom = last_half(50), last_half(half)
        measured.append((share(seldom, often), session.save_ms))
    return measured


def rounds(loop_config: dict) -> list[tuple[float, float]]:
    config = parse_config(loop_config["config"])
    session = FreshSession(os.getcwd(), "lines", (LocalFileSystem(), loop_config["event_folder"]))
    splits = load_dataset(config.data, config.model, config.train.seed)
    vocab_size, half = model_vocab_size(config.model, splits.tokenizer), config.train.steps // 2

    def bare() -> float:
        gc.collect()  # compiled blocks are in cycles, and keep the last round's weights
        state = build_state(config, vocab_size, session.device)
        step_rows, rows = batch_rows(splits.train, config)
        source = train_batches(
            splits.train,
            splits.tokenizer,
            layout(state.model, rows),
            config.train,
            round_up=state.graphs is not None,
            rows=step_rows,
        )
        ready, stats = list(prefetch(source, state.device)), Stats(state)
        for i, micro_batches in enumerate(ready):
            if i == half:
                stats.read()  # waits for the device
                start = time.perf_counter()
            train_step(state, micro_batches, stats)
        stats.read()
        return (len(ready) - half) / (time.perf_counter() - start)

    def loop() -> float:
        gc.collect()
        train(config, session)
        return session.steps_per_s

    bare(), loop()  # warm up
    return [(loop(), bare()) if i % 2 else (bare(), loop())[::-1] for i in range(loop_config["rounds"])]


def fixed_lengths(folder: str, samples: int = 2000) -> str:
    """A JSONL file of random letters: with the bytes as tokens, 512 of each prompt and of each response."""
    letters, path = random.Random(0), f"{folder}/letters.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(samples):
            prompt, response = ("".join(letters.choices(string.ascii_letters, k=k)) for k in (512, 511))  # and EOS
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--preset", choices=("default", "b"), default="default")
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    args = parser.parse_args()
    if args.checkpoints and args.steps < 200:
        parser.error(
            "--checkpoints needs --steps 200 at least: it compares checkpoints in the second half of the steps"
        )

    ray.init(logging_level="error")
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    resources = {"CPU": 1, "GPU": 1} if gpus else {"CPU": cpus}
    with tempfile.TemporaryDirectory() as folder:
        fields: dict[str, Any] = {"train.steps": args.steps, "train.checkpoint_every": args.steps // 2}
        fields |= {"data.dataset": "synthetic", "data.max_val_samples": 64}
        if args.preset == "b":
            fields |= {
                "data.dataset": fixed_lengths(folder), "data.tokenizer": "bytes", "model.vocab_size": 65_536,
                "model.max_prompt_len": 512, "model.max_response_len": 512, "model.hrm.backprop_warmup_steps": 0,
                "train.batch_size": 32, "train.val_every": 0, "train.log_every": 10, "train.packing": False,
                "train.batch_tokens": None, "train.length_window": 0, "train.grad_accum_steps": 1,
            }  # fmt: skip
        config = load_config(PRESET_B if args.preset == "b" else None, fields | parse_set(args.set))
        trainer = TorchTrainer(
            saving if args.checkpoints else rounds,
            train_loop_config={"config": config.to_dict(), "event_folder": folder, "rounds": args.rounds},
            scaling_config=ScalingConfig(num_workers=1, use_gpu=bool(gpus), resources_per_worker=resources),
            run_config=RunConfig(storage_path=folder),
        )
        measured = trainer.fit().return_value
    if args.checkpoints:
        share, save_ms = (statistics.median(side) for side in zip(*measured))
        print(f"a checkpoint every 50 steps adds {share:.1%} to their time; training waits {save_ms:.1f} ms for each")
        return
    loop, bare = (statistics.median(side) for side in zip(*measured))
    ratio = statistics.median(a / b for a, b in measured)
    print(f"loop {loop:.1f} steps/s, bare step {bare:.1f} steps/s, ratio {ratio:.3f} (median of {args.rounds} rounds)")


if __name__ == "__main__":
    main()
