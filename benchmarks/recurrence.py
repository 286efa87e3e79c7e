r"""Does recurrence pay? HRM against plain stacks of equal parameters and of equal training compute, and what cycle counts
other than the trained one do. No Ray; on CUDA where there is any.

    python benchmarks/recurrence.py --parallel 16 --output recurrence.json

Prints a Markdown table. Every finished run is in --output at once, and a run that is there is not repeated, so a broken
off benchmark goes on where it was. On CPU, `--quick` shows that it works, and nothing else; smaller models take two
cores the better part of an hour:

    python benchmarks/recurrence.py --parallel 2 --output recurrence.json --task synthetic \
        --set model.d_model=64 --set train.batch_size=64 --set train.steps=1000 --set optim.lr=3e-3 \
        --set optim.warmup_steps=50 --set data.synthetic.max_digits=2
    python benchmarks/recurrence.py --parallel 2 --output recurrence.json \
        --task reasoning_gym:chain_sum,min_terms=2,max_terms=3,min_digits=1,max_digits=1 \
        --set model.d_model=64 --set train.batch_size=32 --set train.steps=800 --set optim.lr=3e-3 \
        --set optim.warmup_steps=50
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm_lm.config import Cycles, load_config, parse_set
from hrm_lm.data.collate import AnyBatch
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.models.contract import EvalOptions, LanguageModel
from hrm_lm.training.step import Stats, build_state, train_step
from hrm_lm.training.validation import validate

EVALUATED_AT = (1, 2, 4, 8)
HRM = {"model.hrm.h_cycles": 2, "model.hrm.l_cycles": 2, "model.hrm.h_layers": 1, "model.hrm.l_layers": 1}
PLAIN = {"model.hrm.h_cycles": 0}
# A 2x2 HRM applies 2 layers 6 times. A plain encoder-decoder gets its core's layers in the encoder, after its first.
MODELS = {
    "encoder_decoder": {
        "HRM 2×2": HRM,
        "HRM 2×2, sampled 1–4": HRM | {"train.sample_h_cycles": [1, 4]},
        "plain, same parameters": PLAIN | {"model.encoder_layers": 1 + 2},
        "plain, same compute": PLAIN | {"model.encoder_layers": 1 + 6},
    },
    "prefix_lm": {
        "HRM 2×2": HRM,
        "HRM 2×2, sampled 1–4": HRM | {"train.sample_h_cycles": [1, 4]},
        "plain, same parameters": PLAIN | {"model.hrm.h_layers": 1, "model.hrm.l_layers": 1},
        "plain, same compute": PLAIN | {"model.hrm.h_layers": 3, "model.hrm.l_layers": 3},
    },
}
COMMON = {
    "model.d_model": 128, "model.n_heads": 4, "train.steps": 2000, "train.batch_size": 256, "train.grad_clip": 1.0,
    "optim.lr": 2e-3, "optim.warmup_steps": 100,
}  # fmt: skip
QUICK = {"model.d_model": 32, "train.steps": 30, "train.batch_size": 32}
CHAIN_SUM = "reasoning_gym:chain_sum,min_terms=4,max_terms=6,min_digits=1,max_digits=2"
SYNTHETIC = {"data.dataset": "synthetic", "data.synthetic.max_digits": 4, "data.synthetic.num_samples": 40_000}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains one model and scores it. job: `overrides` of the config, and the `key` it is kept under."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        device = torch.device("cuda", job["number"] % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    config = load_config(overrides=job["overrides"])
    splits = load_dataset(config.data, config.model, seed=0)  # the same split whatever the seed of the run
    state = build_state(config, splits.tokenizer.vocab_size, device)
    stats, flops, start = Stats(state), 0, time.perf_counter()
    trained = config.model.hrm.cycles
    batches = train_batches(splits.train, splits.tokenizer, state.model.collate, config.train)
    for i, micro_batches in enumerate(prefetch(batches, device)):
        if i == 0:
            least, most = config.train.sample_h_cycles or (trained.h, trained.h)
            counts = [trained._replace(h=h) for h in range(least, most + 1)]
            flops = statistics.mean(training_flops(state.model, micro_batches[0], cycles) for cycles in counts)
        train_step(state, micro_batches, stats)
    diverged = stats.read()["bad_step"] is not None  # waits for the device
    seconds = time.perf_counter() - start
    exact = {}
    splits.val.verdict = None  # generating answers for the task's verifier would take most of the time
    for h_cycles in EVALUATED_AT if trained.h else (0,):
        options = EvalOptions(cycles=trained._replace(h=h_cycles), batch_size=512)
        exact[str(h_cycles)] = validate(state.model, splits, options)["val_exact_match"]
    return {
        "key": job["key"],
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "gflops_per_step": flops / 1e9,
        "seconds": seconds,
        "diverged": diverged,
        "exact_match": exact,
    }


def training_flops(model: LanguageModel, batch: AnyBatch, cycles: Cycles) -> int:
    """Of a forward and backward pass, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(batch, cycles).predictions[-1].losses.sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def jobs(tasks: dict[str, dict[str, Any]], seeds: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    listed = [
        {
            "key": [task, architecture, name, seed],
            "overrides": settings | data | fields | {"model.architecture": architecture, "train.seed": seed},
        }
        for seed in range(seeds)  # so that a broken off benchmark has whole seeds
        for task, data in tasks.items()
        for architecture, models in MODELS.items()
        for name, fields in models.items()
    ]
    return [job | {"number": number} for number, job in enumerate(listed)]


def table(results: list[dict[str, Any]]) -> str:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["key"][3]):
        groups.setdefault(tuple(result["key"][:3]), []).append(result)
    head = ["task", "architecture", "model", "parameters", "GFLOP a step", "seeds"]
    lines = [
        " | ".join(head + [f"{n} H-cycle{'s' * (n > 1)}" for n in EVALUATED_AT]),
        " | ".join(["---"] * (6 + len(EVALUATED_AT))),
    ]
    order = [(task, a, m) for task in dict.fromkeys(key[0] for key in groups) for a in MODELS for m in MODELS[a]]
    for key in (key for key in order if key in groups):
        runs = groups[key]

        def score(cycles: str) -> str:
            values = [100 * run["exact_match"][cycles] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{spread}"

        if "0" in runs[0]["exact_match"]:
            scores = [f"{score('0')} (no cycles)"] + ["—"] * (len(EVALUATED_AT) - 1)
        else:
            scores = [score(str(cycles)) for cycles in EVALUATED_AT]
        name = key[2] + (" (diverged)" if any(run["diverged"] for run in runs) else "")
        cells = [
            key[0],
            key[1],
            name,
            f"{runs[0]['parameters']:,}",
            f"{runs[0]['gflops_per_step']:.1f}",
            str(len(runs)),
        ]
        lines.append(" | ".join(cells + scores))
    return "Validation exact match in %, mean ± standard deviation over seeds.\n\n" + "\n".join(
        f"| {line} |" for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task",
        action="append",
        help="synthetic, or another dataset's name; repeatable (default: synthetic and a chain_sum of 4 to 6 terms)",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, over all GPUs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="a field of every run's config"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps, one seed")
    args = parser.parse_args()

    tasks = {}
    for task in args.task or ["synthetic", CHAIN_SUM]:
        name = task.rpartition(":")[2].partition(",")[0]
        tasks[name] = SYNTHETIC if task == "synthetic" else {"data.dataset": task}
    settings = COMMON | (QUICK if args.quick else {})
    tasks = {name: data | parse_set(args.set) for name, data in tasks.items()}
    results = json.loads(args.output.read_text()) if args.output.exists() else []
    finished = [result["key"] for result in results]
    due = [job for job in jobs(tasks, 1 if args.quick else args.seeds, settings) if job["key"] not in finished]

    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(args.parallel, max(len(due), 1))) as pool:
        running = []
        while due or running:
            while due and len(running) < args.parallel and time.perf_counter() - start < args.seconds:
                running.append(pool.apply_async(run, (due.pop(0),)))
            if not running:
                print(f"out of time with {len(due)} runs left; the same command goes on with them")
                break
            for result in [result for result in running if result.ready()]:
                running.remove(result)
                results.append(result.get())
                args.output.write_text(json.dumps(results, indent=1))
                print(f"{time.perf_counter() - start:5.0f} s  {results[-1]}", flush=True)
            time.sleep(0.2)
    print(f"\n{len(results)} runs, {time.perf_counter() - start:.0f} s\n\n{table(results)}")


if __name__ == "__main__":
    main()
