"""What the loop costs: steps/s of `train_loop_per_worker`'s loop under TorchTrainer over the bare step's.

Both sides alternate in one Ray Train worker, in rounds; the medians are compared. The loop's side loads, prefetches,
logs and writes event files; the bare one takes batches that are ready through `train_step`.

    python benchmarks/loop_overhead.py [--rounds 7] [--set PATH=VALUE ...]
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext

import ray
from pyarrow.fs import LocalFileSystem
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from hrm_lm.cluster.sessions import RayTrainSession
from hrm_lm.config import load_config, parse_config, parse_set
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.training.loop import train
from hrm_lm.training.step import Stats, build_state, train_step


class FreshSession(RayTrainSession):
    """Every round starts anew, whatever was reported before."""

    def restored(self):
        return nullcontext()

    def report(self, metrics, checkpoint):
        self.steps_per_s = metrics["step"] / metrics["seconds"]


def rounds(loop_config: dict) -> list[tuple[float, float]]:
    config = parse_config(loop_config["config"])
    session = FreshSession(os.getcwd(), "lines", (LocalFileSystem(), loop_config["event_folder"]))
    splits = load_dataset(config.data, config.model, config.train.seed)
    collate = build_state(config, splits.tokenizer.vocab_size).model.collate
    ready = list(prefetch(train_batches(splits.train, splits.tokenizer, collate, config.train), session.device))

    def bare() -> float:
        state = build_state(config, splits.tokenizer.vocab_size, session.device)
        stats, start = Stats(state), time.perf_counter()
        for micro_batches in ready:
            train_step(state, micro_batches, stats)
        stats.read()  # waits for the device
        return len(ready) / (time.perf_counter() - start)

    def loop() -> float:
        train(config, session)
        return session.steps_per_s

    bare(), loop()  # warm up
    return [(loop(), bare()) if i % 2 else (bare(), loop())[::-1] for i in range(loop_config["rounds"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    args = parser.parse_args()
    config = load_config(overrides={"data.dataset": "synthetic"} | parse_set(args.set))

    ray.init(logging_level="error")
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    resources = {"CPU": 1, "GPU": 1} if gpus else {"CPU": cpus}
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            rounds,
            train_loop_config={"config": config.to_dict(), "event_folder": folder, "rounds": args.rounds},
            scaling_config=ScalingConfig(num_workers=1, use_gpu=bool(gpus), resources_per_worker=resources),
            run_config=RunConfig(storage_path=folder),
        )
        measured = trainer.fit().return_value
    loop, bare = (statistics.median(side) for side in zip(*measured))
    ratio = statistics.median(a / b for a, b in measured)
    print(f"loop {loop:.1f} steps/s, bare step {bare:.1f} steps/s, ratio {ratio:.3f} (median of {args.rounds} rounds)")


if __name__ == "__main__":
    main()
