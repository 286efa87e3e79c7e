r"""Does recurrence pay? Models that recur against plain stacks of equal parameters and of equal training compute, at the cycles
that they were trained with and at others. No Ray; on CUDA where there is any.

    python benchmarks/recurrence.py sudoku --arms plain_2,plain_14,hrm_1-8x2 --steps 2000 --output recurrence.json
    python benchmarks/recurrence.py sudoku --seconds 300        # as many steps as fit
    python benchmarks/recurrence.py sudoku --quick              # tiny: shows that it works, and nothing else
    python benchmarks/recurrence.py sudoku --table recurrence.json --picture hrm_1-8x2 plain_14 sudoku.svg

A study (`STUDIES`) is a task, a way to train and test on it, and its arms. All arms and seeds of a study train side by side in
one process, step by step: the arms of a seed take the same batches, which are made once, and with CUDA graphs the GPU never
waits for the host. With `--seconds` the first steps are timed, and all arms take as many steps as fit. Scores are those of
averaged weights where a study keeps them. --output holds the results of each run, by study, arm, seed and steps, as soon as they
are known. The table shows means and standard deviations over seeds.
"""

import argparse
import concurrent.futures
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm_lm.config import Config, Cycles, DataConfig, ModelConfig, load_config, parse_config, parse_set
from hrm_lm.data.collate import AnyBatch, Collate
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.splits import Splits
from hrm_lm.models.contract import EvalOptions, layout
from hrm_lm.training.step import Stats, TrainState, backprop_steps_of, build_state, cycles_of, train_step
from hrm_lm.training.validation import validate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Overrides = dict[str, Any]
TIMED = range(40, 60)
"""Steps that are timed. Before them everything is compiled and captured."""
SPARE = 0.15
"""Share of `--seconds` that is kept for the scores."""


@dataclass(frozen=True)
class Study:
    """A task, a way to train on it, and what is compared."""

    settings: Overrides
    """Fields that every arm's config has."""
    arms: dict[str, Overrides]
    levels: dict[str, str]
    """Data sets whose validation samples are tested on, by what makes them hard; without any, those of the training's set."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """H-cycles that are tested, besides those trained with."""
    halting: tuple[float, ...] = ()
    """Residuals at which samples halt, of at most `counts[-1]` H-cycles."""
    quick: Overrides = field(default_factory=dict)


GPU = {"train.mixed_precision": "bf16", "train.compile": True, "train.cuda_graphs": True, "train.loader_workers": 4}
COMMON = {"train.grad_clip": 1.0, "train.log_every": 1000, "optim.warmup_steps": 100, "optim.lr": 1e-3}


def plain(layers: int) -> Overrides:
    half = layers // 2
    return {"model.hrm.h_cycles": 0, "model.hrm.h_layers": half, "model.hrm.l_layers": layers - half}


def hrm(h: int, l: int, **more: Any) -> Overrides:
    """h_cycles, l_cycles, and of the core or of training what else differs; `a__b=1` sets `a.b`."""
    fields = {key.replace("__", "."): value for key, value in more.items()}
    return {"model.hrm.h_cycles": h, "model.hrm.l_cycles": l, "model.hrm.inject": "add"} | fields


PLAIN = {"model.hrm.h_cycles": 0}  # of an encoder-decoder, whose core's layers then belong to the encoder
DEEP = {"model__hrm__deep_supervision": 1.0}


def sampled(least: int, most: int) -> Overrides:
    return {"train__sample_h_cycles": [least, most]}


PUZZLE = COMMON | {
    "model.architecture": "puzzle", "model.d_model": 128, "model.n_heads": 4, "train.batch_size": 256, "train.ema_decay": 0.995, "data.val_samples": 1000,
}  # fmt: skip
TERMS = "min_terms=2,max_terms=3,min_digits=1,max_digits=1"
LANGUAGE = {
    "data.val_samples": 500, "model.d_model": 64, "train.batch_size": 32, "optim.lr": 3e-3, "optim.warmup_steps": 50,
}  # fmt: skip
LANGUAGE_TASKS: dict[str, Overrides] = {
    "addition": {"data.dataset": "synthetic", "data.synthetic.num_samples": 40_000, "train.batch_size": 64},
    "chain_sum": {"data.dataset": f"reasoning_gym:chain_sum,{TERMS}"},
    "basic_arithmetic": {"data.dataset": f"reasoning_gym:basic_arithmetic,{TERMS}"},
    "mini_sudoku": {"data.dataset": "reasoning_gym:mini_sudoku", "optim.lr": 2e-3},
}
STUDIES = {
    "sudoku": Study(
        settings=PUZZLE | {"data.dataset": "task:sudoku", "model.max_prompt_len": 81, "model.max_response_len": 82},
        arms={
            "plain_2": plain(2),
            "plain_12": plain(12),
            "plain_14": plain(14),
            "hrm_2x2": hrm(2, 2),
            "hrm_4x2": hrm(4, 2),
            "hrm_4x2_deep": hrm(4, 2, **DEEP),
            "hrm_6x1_deep": hrm(6, 1, **DEEP),
            "hrm_1-8x2": hrm(4, 2, **sampled(1, 8)),
            "hrm_1-8x2_deep": hrm(4, 2, **sampled(1, 8), **DEEP),
            "hrm_1-8x2_none_deep": hrm(4, 2, **sampled(1, 8), **DEEP, model__hrm__inject="none"),
            "hrm_1-8x2_gated": hrm(4, 2, **sampled(1, 8), model__hrm__inject="gated"),
            "hrm_1-8x2_rest": hrm(4, 2, **sampled(1, 8), train__fixed_point=0.01),
            "hrm_1-8x2_poisson": hrm(4, 2, **sampled(1, 8), train__h_cycles_distribution="poisson", train__h_cycles_mean=4.5),
            "shared_1-4x2": hrm(2, 2, **sampled(1, 4), model__hrm__shared=True, model__hrm__h_layers=2),  # TRM's
            "segments_2_of_2x2": hrm(2, 2, train__segments=2),
            "segments_4_of_1x2": hrm(1, 2, train__segments=4),
            "hrm_4x2_deep_muon": hrm(4, 2, **DEEP, optim__name="muon"),
        },
        levels={f"{share:.0%} of the blanks given": f"task:sudoku,val_hints=[{share}]" for share in (0, 0.1, 0.2, 0.3, 0.4)},
        counts=(1, 2, 4, 8, 12, 16, 24, 32),
        halting=(0.1, 0.05, 0.02),
        quick={"data.dataset": "task:sudoku,size=4"},
    ),
    "parity": Study(
        settings=PUZZLE | {
            "data.dataset": "task:prefix_parity,length=16", "model.max_prompt_len": 128, "model.max_response_len": 129,
            "model.places": False, "model.d_model": 32, "model.n_heads": 2, "train.batch_size": 64, "optim.lr": 2e-3,
        },
        arms={
            "plain_2": plain(2),
            "plain_12": plain(12),
            "hrm_4x2": hrm(4, 2),
            "hrm_8x1_deep": hrm(8, 1, **DEEP),
            "hrm_1-8x1_deep": hrm(4, 1, **sampled(1, 8), **DEEP),
            "hrm_1-8x1": hrm(4, 1, **sampled(1, 8)),
            "hrm_1-16x1": hrm(8, 1, **sampled(1, 16)),
            "hrm_1-8x2_deep": hrm(4, 2, **sampled(1, 8), **DEEP),
            "segments_4_of_2x1": hrm(2, 1, train__segments=4),
        },
        levels={f"{length} bits": f"task:prefix_parity,length=16,val_length=[{length}]" for length in (8, 16, 20, 24, 32)},
        counts=(1, 2, 4, 8, 16, 32),
        halting=(0.1, 0.05, 0.02, 0.01),
    ),
    **{
        f"{task}_{architecture}": Study(
            settings=COMMON | LANGUAGE | data | {"model.architecture": architecture},
            arms={
                "plain_2": plain(2) if architecture == "prefix_lm" else PLAIN | {"model.encoder_layers": 1 + 2},
                "plain_6": plain(6) if architecture == "prefix_lm" else PLAIN | {"model.encoder_layers": 1 + 6},
                "hrm_2x2": hrm(2, 2),
                "hrm_2x2_none": hrm(2, 2, model__hrm__inject="none"),
                "hrm_1-4x2": hrm(2, 2, **sampled(1, 4)),
                "hrm_1-4x2_none": hrm(2, 2, **sampled(1, 4), model__hrm__inject="none"),
            },
            levels={},
            counts=(1, 2, 4, 8),
        )
        for task, data in LANGUAGE_TASKS.items()
        for architecture in ("prefix_lm", "encoder_decoder")
    },
    # HRM-Text's table 3 (arXiv 2605.20613), small: which tokens are labels, what a prompt sees, plain or HRM.
    "objective": Study(
        settings=COMMON | LANGUAGE | LANGUAGE_TASKS["chain_sum"] | {"model.architecture": "prefix_lm"},
        arms={
            f"{model}/{mask}/{objective}": fields | {"model.mask": mask, "train.objective": objective}
            for mask, objective in (("causal", "all"), ("causal", "response"), ("prefix", "response"))
            for model, fields in {"plain_6": plain(6), "hrm_2x2_none": hrm(2, 2, model__hrm__inject="none")}.items()
        },
        levels={},
        counts=(1, 2, 4),
    ),
}  # fmt: skip
QUICK = {"model.d_model": 16, "model.n_heads": 2, "train.batch_size": 16, "data.val_samples": 16}


@dataclass
class Run:
    """A model that is trained beside others."""

    arm: str
    seed: int
    state: TrainState
    stats: Stats
    vocab_size: int
    first: AnyBatch | None = None
    """The first batch of training."""
    events: list[Any] = field(default_factory=list)
    """Begin and end of timed steps."""

    def step(self, batches: list[AnyBatch], timed: bool) -> None:
        if self.first is None:
            self.first = batches[0]
        if timed:
            self.events.append(now())
        train_step(self.state, batches, self.stats)
        if timed:
            self.events.append(now())

    @property
    def collate(self) -> Collate:
        return layout(self.state.model, None, self.state.config.train.objective)

    @property
    def source(self) -> tuple[Any, ...]:
        """Runs whose source is equal take the same batches."""
        config = self.state.config
        return self.seed, config.model.architecture, config.model.mask, config.train.objective

    @property
    def ms(self) -> float:
        """The mean of a step's milliseconds: steps of drawn cycle counts differ."""
        pairs = zip(self.events[::2], self.events[1::2], strict=True)
        return statistics.mean(a.elapsed_time(b) if DEVICE.type == "cuda" else 1000 * (b - a) for a, b in pairs)


def now() -> Any:
    if DEVICE.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def train_all(study: Study, configs: dict[tuple[str, int], Config], seconds: float | None) -> list[Run]:
    start = time.perf_counter()
    first = next(iter(configs.values()))
    splits = load_dataset(first.data, first.model, seed=0)  # the same split whatever the seed of a run
    runs = []
    for (arm, seed), config in configs.items():
        state = build_state(config, splits.tokenizer.vocab_size, DEVICE)
        if runs and state.graphs and runs[0].state.graphs:
            state.graphs.pool = runs[0].state.graphs.pool  # one step runs at a time
        runs.append(Run(arm, seed, state, Stats(state), splits.tokenizer.vocab_size))
    steps = first.train.steps if seconds is None else 10**9
    sources: dict[Any, Iterator[list[AnyBatch]]] = {}
    for run in runs:
        if run.source not in sources:
            train = run.state.config.train.model_copy(update={"steps": steps})
            batches = train_batches(splits.train, splits.tokenizer, run.collate, train, round_up=DEVICE.type == "cuda")
            sources[run.source] = prefetch(batches, DEVICE, depth=8)
    step = 0
    while step < steps:
        ready = {key: next(source) for key, source in sources.items()}
        for run in runs:
            run.step(ready[run.source], step in TIMED)
        step += 1
        if step in (TIMED.start, TIMED.stop):
            for run in runs:
                run.stats.read()  # waits for the device
            if step == TIMED.start:
                begun = time.perf_counter()
                print(f"compiled and captured after {begun - start:.0f} s", flush=True)
            elif seconds is not None:
                each = (time.perf_counter() - begun) / len(TIMED)
                left = seconds * (1 - SPARE) - (time.perf_counter() - start)
                steps = step + int(left / each)
                print(f"{steps} steps of {1000 * each:.1f} ms, all arms and seeds", flush=True)
                for run in runs:
                    train = run.state.config.train.model_copy(update={"steps": steps})
                    run.state.config = run.state.config.model_copy(update={"train": train})
        if step % 500 == 0:
            losses = {f"{run.arm}/{run.seed}": round(run.stats.read()["loss"], 4) for run in runs}
            print(f"{time.perf_counter() - start:5.0f} s  step {step}  {losses}", flush=True)
    for source in sources.values():
        source.close()
    return runs


def held_out(data: DataConfig, model: ModelConfig) -> Splits:
    """The validation samples, without a task's verifier: generating answers for it would take most of the time."""
    splits = load_dataset(data, model, seed=0)
    splits.val.verdict = None
    return Splits(splits.val, splits.val, splits.tokenizer)


@torch.no_grad()
def scores(run: Run, study: Study, levels: dict[str, Splits]) -> dict[str, Any]:
    """Exact match by level and H-cycles; where samples halt, with the mean of the H-cycles that they took."""
    state, trained = run.state, run.state.config.cycles
    counts = sorted({*study.counts, trained.h}) if trained.h else [0]
    found: dict[str, Any] = {"exact": {}, "halting": {}, "residual": {}}
    with state.average.applied() if state.average else nullcontext():
        for level, splits in levels.items():

            def score(cycles: Cycles) -> dict[str, float]:
                options = EvalOptions.of(state.config, cycles=cycles, batch_size=1024, round_up=True)
                return validate(state.model, splits, options)

            measured = {h: score(trained._replace(h=h)) for h in counts}
            found["exact"][level] = {str(h): metrics["val_exact_match"] for h, metrics in measured.items()}
            most = measured[counts[-1]]
            found["residual"][level] = [value for name, value in most.items() if name.startswith("residual/")]
            if trained.h and study.halting:
                halted = {rest: score(trained._replace(h=counts[-1], halt=rest)) for rest in study.halting}
                found["halting"][level] = {
                    str(rest): [metrics["val_exact_match"], metrics["mean_h_cycles"]]
                    for rest, metrics in halted.items()
                }
    return found


def training_flops(state: TrainState, batch: AnyBatch) -> float:
    """Counts the FLOPs of a forward and backward pass with PyTorch's counter. Where steps differ it takes their mean."""
    config, seen = state.config, {}
    counts = [cycles_of(config, step) for step in range(100)]
    for cycles in set(counts):
        with FlopCounterMode(display=False) as counter:
            predictions, _ = state.model(batch, cycles, backprop_steps_of(config.model.hrm, 0, cycles))
            sum(prediction.losses.sum() for prediction in predictions).backward()
        state.model.zero_grad(set_to_none=True)
        seen[cycles] = counter.get_total_flops()
    return config.train.segments * statistics.mean(seen[cycles] for cycles in counts)


def run_study(
    name: str, arms: list[str], seeds: range, seconds: float | None, settings: Overrides, quick: bool
) -> Iterator[dict[str, Any]]:
    """The results of each run as soon as they are known."""
    study, start = STUDIES[name], time.perf_counter()
    fields = study.settings | (GPU if DEVICE.type == "cuda" else {}) | (study.quick | QUICK if quick else {}) | settings
    configs = {
        (arm, seed): load_config(overrides=fields | study.arms[arm] | {"train.seed": seed})
        for seed in seeds
        for arm in arms
    }
    first = next(iter(configs.values()))
    named = study.levels if not quick else {}
    data = {level: first.data.model_copy(update={"dataset": dataset}) for level, dataset in named.items()} or {
        "": first.data
    }
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        made = {level: beside.submit(held_out, config, first.model) for level, config in data.items()}
        runs = train_all(study, configs, seconds)
        levels = {level: splits.result() for level, splits in made.items()}
    print(f"trained after {time.perf_counter() - start:.0f} s", flush=True)
    flops: dict[str, float] = {}
    for run in runs:
        if run.arm not in flops:
            assert run.first is not None
            own = run.state.config.to_dict()
            eager = parse_config(own | {"train": own["train"] | {"compile": False}})
            flops[run.arm] = training_flops(build_state(eager, run.vocab_size, DEVICE), run.first)
        result = {
            "study": name, "arm": run.arm, "seed": run.seed, "steps": run.state.step, "ms": run.ms,
            "batch": first.train.batch_size, "flops": flops[run.arm],
            "parameters": sum(p.numel() for p in run.state.model.parameters()),
            "diverged": run.stats.read()["bad_step"] is not None,
        } | scores(run, study, levels)  # fmt: skip
        print(f"{time.perf_counter() - start:5.0f} s  {json.dumps(result)}", flush=True)
        yield result


def table(results: list[dict[str, Any]]) -> str:
    """Exact match in %, mean ± standard deviation over seeds: for each study and level a row for each arm."""
    lines = []
    for study in dict.fromkeys(result["study"] for result in results):
        some = [result for result in results if result["study"] == study]
        counts = sorted({int(h) for result in some for exact in result["exact"].values() for h in exact} - {0})
        rests = list(dict.fromkeys(rest for result in some for halted in result["halting"].values() for rest in halted))
        columns = ["level", "arm", "parameters", "GFLOP a step", "steps", "seeds", "no cycles"]
        columns += [f"{h} cycles" for h in counts] + [f"auto:{rest} (mean cycles)" for rest in rests]
        lines += [f"\n{study}\n", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for result in some:
            groups.setdefault((result["arm"], result["steps"]), []).append(result)
        for level in dict.fromkeys(level for result in some for level in result["exact"]):
            for (arm, steps), runs in groups.items():
                cells = [
                    level,
                    arm + " (diverged)" * any(run["diverged"] for run in runs),
                    f"{runs[0]['parameters']:,}",
                ]
                cells += [f"{runs[0]['flops'] / 1e9:.1f}", str(steps), str(len(runs))]
                found = [run["exact"].get(level, {}) for run in runs]
                cells += [spread([exact[str(h)] for exact in found if str(h) in exact]) for h in (0, *counts)]
                for rest in rests:
                    halted = [run["halting"][level][rest] for run in runs if rest in run["halting"].get(level, {})]
                    took = f" ({statistics.mean(taken for _, taken in halted):.1f})" if halted else ""
                    cells.append(spread([exact for exact, _ in halted]) + took)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(shares: list[float]) -> str:
    values = [100 * share for share in shares]
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def picture(results: list[dict[str, Any]], study: str, recurs: str, plain: str, path: str) -> None:
    """Exact match against cycles, a line for each level; dashed, the plain model's. It needs matplotlib."""
    from matplotlib import pyplot

    first = next(result for result in results if (result["study"], result["arm"]) == (study, recurs))

    def mean(arm: str, level: str, h: str) -> float:
        key = (study, arm, first["steps"])
        runs = [result for result in results if (result["study"], result["arm"], result["steps"]) == key]
        return 100 * statistics.mean(run["exact"][level][h] for run in runs)

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for i, (level, exact) in enumerate(first["exact"].items()):
        counts = list(exact)
        axes.plot([int(h) for h in counts], [mean(recurs, level, h) for h in counts], "o-", color=f"C{i}", label=level)
        axes.axhline(mean(plain, level, "0"), color=f"C{i}", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(h) for h in counts], counts)
    axes.set(
        xlabel="H-cycles at test", ylabel="answers wholly right (%)", title=f"{study}: {recurs}, and dashed {plain}"
    )
    axes.legend(fontsize="small")
    pyplot.rcParams["svg.hashsalt"] = study  # the same picture again is the same file
    figure.savefig(path, metadata={"Date": None})


class Results:
    """Keeps the results of runs in a file, if there is one. Each change writes the file whole or leaves it as it was."""

    def __init__(self, path: Path | None):
        """Raises ValueError where the file is something else, and OSError where it cannot be written."""
        self.path, self.rows = path, []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.rows = read(path) if path.exists() else []
            self.write()

    def add(self, row: dict[str, Any]) -> None:
        """In place of what is known of the same run."""
        self.rows = [old for old in self.rows if any(old[key] != row[key] for key in RUN)] + [row]
        self.write()

    def write(self) -> None:
        if self.path is not None:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.rows))
            new.replace(self.path)


RUN = ("study", "arm", "seed", "steps")
"""What tells the results of runs apart."""


def read(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError where the file does not hold results."""
    rows = json.loads(path.read_text())
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {*RUN, "exact"} <= row.keys() for row in rows):
        raise ValueError(f"{path} does not hold results of this benchmark")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"some of {', '.join(STUDIES)}")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--arms", help="some of a study's, comma-separated; left out, all of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0, help="where seeds are shared out to several processes")
    parser.add_argument("--seconds", type=float, help="as many steps as fit, for each study; left out, --steps")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="a field of every run's config"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch on CPU; for several of these commands at once")
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps, one seed")
    parser.add_argument("--table", type=Path, metavar="JSON", help="instead: print what is there")
    parser.add_argument(
        "--picture", nargs=3, metavar=("ARM", "PLAIN_ARM", "SVG"), help="with --table, of the one study that is named"
    )
    args = parser.parse_args(argv)
    for study in args.studies:
        if study not in STUDIES:
            parser.error(f"there is no study {study!r}; there are {', '.join(STUDIES)}")
        for arm in (args.arms or "").split(",") * bool(args.arms):
            if arm not in STUDIES[study].arms:
                parser.error(f"--arms: {study} has no arm {arm!r}; it has {', '.join(STUDIES[study].arms)}")
    try:
        if args.table:
            rows = [row for row in read(args.table) if row["study"] in (args.studies or STUDIES)]
            if args.picture:
                there = {row["arm"] for row in rows}
                if len(args.studies) != 1 or not {*args.picture[:2]} <= there:
                    parser.error(
                        f"--picture wants a study and two of its arms, of which {args.table} has {sorted(there)}"
                    )
                picture(rows, args.studies[0], *args.picture)
            print(table(rows))
            return
        if not args.studies or args.picture:
            parser.error("--picture goes with --table" if args.picture else f"name a study: {', '.join(STUDIES)}")
        if args.steps < TIMED.stop or (args.quick and args.output):
            parser.error(
                "--quick shows that it works, and has no results to keep; leave out --output"
                if args.quick
                else f"--steps must be at least {TIMED.stop}: steps {TIMED.start} to {TIMED.stop} are timed"
            )
        results = Results(args.output)
    except (OSError, ValueError) as error:
        parser.error(f"{args.table or args.output}: {error}")
    torch.set_float32_matmul_precision("high")
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {"train.steps": 70 if args.quick else args.steps} | parse_set(args.set)
    for name in args.studies:
        arms = args.arms.split(",") if args.arms else list(STUDIES[name].arms)
        seeds = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
        rows = []
        for row in run_study(name, arms, seeds, args.seconds, settings, args.quick):
            results.add(row)
            rows.append(row)
        print(table(rows))
        gc.collect()


if __name__ == "__main__":
    main()
