"""Eight trials of the default config on one GPU: all at once against one after another, through the tune command.

Prints the seconds of both sweeps, Ray's start and the first import of PyTorch in each trial's process included, and
their ratio. `--mps` starts NVIDIA's MPS for the trials, so that their kernels run side by side; without MPS the
processes that share a GPU take turns. `--quick` shows on CPU that it works: two tiny trials, a CPU for each.

    python benchmarks/trials_per_gpu.py [--trials 8] [--steps 2000] [--mps] [--set PATH=VALUE ...]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

FILE = """
base:
  train: {{steps: {steps}, val_every: {steps}, log_every: 50}}
  data: {{dataset: synthetic}}
search_space:
  optim.lr: {{loguniform: [5.0e-4, 5.0e-3]}}
tune: {{num_samples: {trials}, scheduler: fifo}}
"""
QUICK = ["model.d_model=16", "model.n_heads=2", "train.batch_size=8", "data.synthetic.max_digits=1"]


def seconds(sweep: str, folder: str, at_once: int, share: float, sets: list[str]) -> float:
    """Of a whole sweep whose trials take `share` of the GPU each, `at_once` of them at a time."""
    fields = [f"tune.max_concurrent_trials={at_once}", f"tune.gpus_per_worker={share}", *sets]
    command = [sys.executable, "-m", "hrm_lm.commands", "tune", "--config", sweep, "--save_dir", folder]
    command += ["--run_name", f"{at_once}_at_once", *(part for field in fields for part in ("--set", field))]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    took = time.perf_counter() - start
    print(f"{at_once} at once: {took:.1f} s", flush=True)
    return took


@contextmanager
def mps(folder: str) -> Iterator[None]:
    """NVIDIA's Multi-Process Service for the processes that are started in here."""
    os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
    try:
        yield
    finally:
        subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mps", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.steps, args.set = 2, 5, [*QUICK, *args.set]
    with tempfile.TemporaryDirectory(prefix="trials_") as folder:
        sweep = f"{folder}/sweep.yaml"
        with open(sweep, "w", encoding="utf-8") as file:
            file.write(FILE.format(steps=args.steps, trials=args.trials))
        with mps(folder) if args.mps else nullcontext():
            share = 0 if args.quick else 1 / args.trials
            after, at_once = (seconds(sweep, folder, count, share, args.set) for count in (1, args.trials))
    print(f"{args.trials} trials of {args.steps} steps: all at once take {at_once / after:.2f} of one after another")


if __name__ == "__main__":
    main()
