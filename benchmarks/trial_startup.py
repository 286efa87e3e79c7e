"""What a one-worker trial costs to start: three ways to run the same sweep, one after another in one Ray.

    in process, reused     what ray_jobs.tune does: trials train in Tune's own process, which the next trial takes over
    in process             a new process for every trial
    TorchTrainer           a TorchTrainer for every trial, as multi-worker trials need it

One trial at a time, each of five steps that take milliseconds: what passes between the ends of two is start-up.

    python benchmarks/trial_startup.py [--trials 6]
"""

import argparse
import itertools
import statistics
import tempfile
import time

import ray
import ray.tune

from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.cluster.start import init_ray
from hrm_lm.tuning import sweep as sweeps
from hrm_lm.tuning.space import Sweep

FILE = """
base:
  model: {d_model: 16, n_heads: 2}
  train: {steps: 5, val_every: 5, log_every: 5, batch_size: 8}
  data: {dataset: synthetic, synthetic: {max_digits: 1}}
search_space:
  optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
tune: {scheduler: fifo, max_concurrent_trials: 1}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    args = parser.parse_args()
    init_ray()
    original, options = sweeps.trains_in_process, ray.tune.TuneConfig
    table = [f"{'':24}{'whole sweep':>12}  seconds from a trial's end to the next one's (median)"]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/sweep.yaml"
        with open(path, "w") as file:
            file.write(FILE)
        for name, in_process, reuse in (
            ("in process, reused", True, True),
            ("in process", True, False),
            ("TorchTrainer", False, False),
        ):
            sweeps.trains_in_process = lambda sweep: in_process
            ray.tune.TuneConfig = lambda **fields: options(**fields | {"reuse_actors": reuse})
            sweep = Sweep(path, {"tune.num_samples": args.trials})
            start = time.perf_counter()
            results = sweeps.build_tuner(sweep, RunFolder(folder, name.replace(" ", "_")), resume=False).fit()
            seconds = time.perf_counter() - start
            ends = sorted(result.metrics["timestamp"] for result in results)
            gaps = [b - a for a, b in itertools.pairwise(ends)]
            table.append(f"{name:24}{seconds:10.1f} s  {statistics.median(gaps):6.1f}")
    sweeps.trains_in_process, ray.tune.TuneConfig = original, options
    ray.shutdown()
    print("\n".join(table))


if __name__ == "__main__":
    main()
