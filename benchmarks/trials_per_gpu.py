"""Trials of the default config that share a GPU: all at once against one after another, through the tune command.

Prints the seconds of both sweeps and their ratio, and where they go: Ray's start and the first trial's, and the trials' own
loops. Before the sweeps it takes bare steps without Ray, in one process and then in several that begin together. What these do
not gain by sharing the GPU, no sweep can gain. `--mps` starts NVIDIA's MPS, so that kernels of several processes run side by
side, and tells at the end what MPS's log says of its clients; without MPS the processes take turns. `--quick` shows on CPU that
it works: two tiny trials, a CPU for each.

    python benchmarks/trials_per_gpu.py [--trials 8] [--steps 20000] [--mps] [--set PATH=VALUE ...]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from hrm_lm.config import load_config, parse_set
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.training.step import Stats, build_state, train_step
from hrm_lm.tuning.trial import share_multiprocessors

FILE = """
base:
  train: {{steps: {steps}, val_every: {steps}, log_every: {log_every}}}
  data: {{dataset: synthetic}}
search_space:
  optim.lr: {{loguniform: [5.0e-4, 5.0e-3]}}
tune: {{num_samples: {trials}, scheduler: fifo}}
"""
QUICK = ["model.d_model=16", "model.n_heads=2", "train.batch_size=8", "data.synthetic.max_digits=1"]


# --- without Ray ---------------------------------------------------------------------------------------------------


def bare_steps(rank: int, kind: str, share: float, steps: int, sets: list[str], begin: Any, ended: Any) -> None:
    """A process that trains: it prepares itself, waits for the others, and says how many steps/s it took. kind: "cuda" or "cpu"; share:
    of the GPU.
    """
    share_multiprocessors(share)
    torch.set_num_threads(1)
    device = torch.device(kind)
    config = load_config(overrides={"data.dataset": "synthetic", "train.steps": 2 * steps} | parse_set(sets))
    splits = load_dataset(config.data, config.model, config.train.seed)
    state = build_state(config, splits.tokenizer.vocab_size, device)
    source = train_batches(
        splits.train, splits.tokenizer, state.model.collate, config.train, round_up=state.graphs is not None
    )
    stats, batches = Stats(state), prefetch(source, device)

    def train(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            train_step(state, next(batches), stats)
        stats.read()  # waits for the device
        return count / (time.perf_counter() - start)

    train(min(steps, 50))  # all that is prepared on first use
    begin.wait()
    ended.put(train(steps))


def together(processes: int, kind: str, steps: int, sets: list[str]) -> float:
    """Steps/s of all processes, which train at the same time."""
    context = mp.get_context("spawn")
    begin, ended = context.Barrier(processes), context.Queue()
    running = mp.spawn(bare_steps, (kind, 1 / processes, steps, sets, begin, ended), nprocs=processes, join=False)
    while not running.join():  # it raises what a process raised, and ends the others
        pass
    return sum(ended.get() for _ in range(processes))


# --- through the command -------------------------------------------------------------------------------------------


def sweep(file: str, folder: str, at_once: int, share: float, sets: list[str], limit: float) -> float | None:
    """The seconds of a sweep whose trials take `share` of the GPU each, `at_once` of them at a time. Prints where they went.
    None where it was not done after `limit` seconds.
    """
    name = f"{at_once}_at_once"
    fields = [f"tune.max_concurrent_trials={at_once}", f"tune.gpus_per_worker={share}", *sets]
    command = [sys.executable, "-m", "hrm_lm.commands", "tune", "--config", file, "--save_dir", folder]
    command += ["--run_name", name, *(part for field in fields for part in ("--set", field))]
    began = time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        told, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{at_once} at once: not done after {limit:g} s", flush=True)
        process.send_signal(signal.SIGINT)  # as from the keyboard: the command ends its own Ray
        process.communicate()
        return None
    took = time.time() - began
    if process.returncode:
        sys.exit(told)
    trials = [
        [json.loads(line) for line in results.read_text().splitlines()]
        for results in Path(folder, name).rglob("result.json")
        if results.parent != Path(folder, name)
    ]
    starts = [rows[0]["timestamp"] - rows[0]["time_this_iter_s"] for rows in trials if rows]
    ends = [rows[-1]["timestamp"] for rows in trials if rows]
    loops = [rows[-1]["seconds"] for rows in trials if rows]
    rates = [rows[-1]["step"] / rows[-1]["seconds"] for rows in trials if rows]
    processes = len({rows[-1]["pid"] for rows in trials if rows})
    print(
        f"{at_once} at once: {took:.1f} s, of {len(trials)} trials in {processes} processes; "
        f"the first trial began after {min(starts) - began:.1f} s, the last ended {began + took - max(ends):.1f} s before the "
        f"end; a trial's loop took {statistics.median(loops):.1f} s ({max(loops):.1f} s at most), "
        f"{statistics.median(rates):.0f} steps/s",
        flush=True,
    )
    return took


@contextmanager
def mps(folder: str) -> Iterator[None]:
    """NVIDIA's Multi-Process Service for the processes that are started in here."""
    os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
    # A daemon that sees some GPUs only numbers them anew for its clients, whose own CUDA_VISIBLE_DEVICES would then name others.
    sees_all = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, env=sees_all)
    try:
        yield
    finally:
        told = Path(folder, "log", "server.log")
        served = [line for line in told.read_text().splitlines() if "client" in line.lower()] if told.exists() else []
        print(f"MPS: {len(served)} lines about clients in its log, the last {served[-1:]}")
        subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--mps", action="store_true")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds of a sweep")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.steps, args.set = 2, 50, [*QUICK, *args.set]
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="trials_") as folder, mps(folder) if args.mps else nullcontext():
        alone = together(1, kind, args.steps // 10, args.set)
        several = together(args.trials, kind, args.steps // 10, args.set)
        print(
            f"without Ray: {alone:.0f} steps/s alone, {several:.0f} of {args.trials} processes together, "
            f"{several / alone:.2f} times as many",
            flush=True,
        )
        file, log_every = f"{folder}/sweep.yaml", max(args.steps // 20, 1)
        Path(file).write_text(FILE.format(steps=args.steps, trials=args.trials, log_every=log_every), encoding="utf-8")
        on_gpu = kind == "cuda" and not args.quick
        # At once first: whatever a sweep finds ready, by the one before, is then on the other side.
        at_once, after = (sweep(file, folder, n, on_gpu / n, args.set, args.limit) for n in (args.trials, 1))
    if at_once and after:
        print(
            f"{args.trials} trials of {args.steps} steps: all at once take {at_once / after:.2f} of one after another"
        )


if __name__ == "__main__":
    main()
