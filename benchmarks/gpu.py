"""Training and generation of HRM-Text on a GPU, here and in Transformers: tokens/s, memory and warm-up, in one table.

Each section prints a row as soon as it has it, and merges it into a JSON file (`benchmarks/results/<device>.json`).
Where two sides are compared, they live in one process, and rounds of both alternate. Medians are given, and the median
ratio of a round. A training step has 32,768 tokens, a vocabulary of 65,536, bf16, AdamW, and gradient through 5
applications.

    python benchmarks/gpu.py                                    # all sections, HRM-Text B
    python benchmarks/gpu.py --only fixed,memory --presets b,xl
    python benchmarks/gpu.py --only trainer --workers 1,2
    python benchmarks/gpu.py --quick                            # tiny, also on CPU: shows that it works

The sections:

    fixed     Sequences of 1,024 tokens, half of them response: the bare step here, in bf16 and with `train.mixed_precision=fp8`,
              and compiled `HrmTextForCausalLM`.
    real      Lengths of an instruction set (log-normal, mean 200 a side, up to 1,023): packed here, there random batches
              padded to their longest sample, as many samples as fit as many positions.
    memory    `train.activation_memory`, on packed batches of these lengths.
    workers   `fixed` with several workers, a GPU each: DDP and FSDP over a worker on its own.
    trainer   `hrm-lm train` on a prepared dataset of these lengths, with one worker, and with several under DDP and FSDP.
    generate  32 prompts, 256 new tokens, greedy: here, and `transformers.generate` with the same weights.
    small     The default config: bare steps, and the loop in this process.

A side's memory (GiB) is the peak while it steps, less what the other sides hold at rest. Warm-up is the time from building
the model until three steps are done, with no kernel compiled before. The share of the matrix peak is what a run logs as
`mfu` (`hrm_lm.training.flops`).
"""

import argparse
import datetime
import fcntl
import gc
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pyarrow.fs
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp

from hrm_lm.config import Config, load_config, parse_set
from hrm_lm.data.collate import TokenRows, join, pack, to_device
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.prepared.writer import ShardWriter, write_meta
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.data.tokenizer import ByteTokenizer
from hrm_lm.errors import UserError
from hrm_lm.interop.export import hrm_text_config
from hrm_lm.interop.hrm_text import require_transformers, to_hrm_text
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import EvalOptions
from hrm_lm.models.decoding import generate_ids
from hrm_lm.training.checkpoint import Snapshot
from hrm_lm.training.compilation import keep_activations
from hrm_lm.training.flops import known_peak, training_flops
from hrm_lm.training.loop import train
from hrm_lm.training.profiling import table as profile_table
from hrm_lm.training.step import Stats, backprop_steps_of, build_state, train_step

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ACTIVATION_MEMORY = {"b": 1.0, "l": 0.55, "xl": 0.35}  # with which 32,768 tokens fit 80 GB here
PARTS = {"b": 1, "l": 2, "xl": 4}  # micro-batches with which they fit there, beside the other side's weights
PROFILED = 4  # steps, the first of which is not counted
MEMORY_ARMS = {"b": (1.0, 0.6, 0.35), "l": (0.7, 0.5, 0.3), "xl": (0.3, 0.2)}


class Sizes(NamedTuple):
    """How large everything is: as measured, or tiny."""

    tokens: int = 32_768
    vocab_size: int = 65_536
    length: int = 1024
    mean: int = 200
    longest: int = 1023
    batches: int = 8
    new_tokens: int = 256
    prompts: int = 32
    dataset: int = 70_000
    trainer_steps: int = 60
    small_steps: int = 400
    overrides: tuple[tuple[str, Any], ...] = ()


TINY = Sizes(
    1024, 300, 64, 20, 63, 3, 8, 4, 3000, 30, 20,
    (("model.d_model", 64), ("model.n_heads", 4), ("model.hrm.h_layers", 1), ("model.hrm.l_layers", 1),
     ("train.compile", False), ("train.activation_memory", 1.0)),
)  # fmt: skip


class Vocabulary:
    """What building a model and its batches asks of a tokenizer. No token ends a text, so generation takes all its steps."""

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


class Endless(Vocabulary):
    eos_id = -1


class TimeLimit(BaseException):
    """Not an Exception: no `except Exception` on its way out of a compiler may swallow it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeLimit after so many seconds, and again every 30 s should something have swallowed it."""

    def stop(*_: object) -> None:
        raise TimeLimit(f"not done after {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Table:
    """Rows, printed and merged into a JSON file as they come. Several processes may share the file.

    fields: of the config, which are part of the name of our arms, so that others keep their rows.
    """

    COLUMNS = ("section", "preset", "arm", "rate", "unit", "spread", "ratio", "gib", "warm_up_s", "of_peak", "note")
    WIDTHS = (8, 6, 22, 10, 8, 20, 6, 6, 7, 7, 0)

    def __init__(self, output: Path | None, fields: Sequence[str] = ()):
        self.output, self.fields = output, fields
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.origin = {"date": datetime.date.today().isoformat(), "commit": commit.stdout.strip() or None}
        self._print(self.COLUMNS)

    def add(self, section: str, preset: str, arm: str, **row: Any) -> None:
        row = {"section": section, "preset": preset, "arm": self._named(arm), **row}
        profile = row.pop("profile", None)
        rates = row.get("rates") or []
        shown = row | {"spread": f"{_shown(min(rates))} to {_shown(max(rates))}" if len(rates) > 1 else ""}
        self._print([_shown(shown.get(column)) for column in self.COLUMNS])
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if profile:
            name = re.sub(r"[^\w.-]+", "_", "_".join(["profile", self.output.stem, section, preset, row["arm"]]))
            self.output.with_name(f"{name}.txt").write_text(profile, encoding="utf-8")
        with self.output.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            rows = {_key(known): known for known in json.loads(file.read() or "{}").get("rows", [])}
            rows[_key(row)] = row | self.origin
            content = {
                "device": _device_name(),
                "torch": torch.__version__,
                "transformers": _transformers_version(),
                "rows": sorted(rows.values(), key=_key),
            }
            file.truncate(0)
            file.write(json.dumps(content, indent=1) + "\n")

    def rate(self, section: str, preset: str, arm: str) -> float | None:
        """Of a row that is in the file."""
        if self.output is None or not self.output.exists():
            return None
        rows = json.loads(self.output.read_text(encoding="utf-8"))["rows"]
        key = section, preset, self._named(arm)
        return next((row.get("rate") for row in rows if _key(row) == key), None)

    def _named(self, arm: str) -> str:
        return arm if arm.startswith("transformers") else " ".join([arm, *self.fields])

    def _print(self, cells: Any) -> None:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, self.WIDTHS)).rstrip(), flush=True)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["section"], row["preset"], row["arm"]


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value or "")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _transformers_version() -> str | None:
    with suppress(UserError):
        return require_transformers().__version__
    return None


# --- samples and batches -------------------------------------------------------------------------------------------


def lengths(rng: np.random.Generator, count: int, sizes: Sizes) -> np.ndarray:
    """(count, 2): tokens of prompts and responses, as an instruction set has them."""
    return np.exp(rng.normal(np.log(sizes.mean) - 0.32, 0.8, (count, 2))).clip(1, sizes.longest).astype(int)


def fixed_samples(rng: np.random.Generator, sizes: Sizes) -> list[Sample]:
    """EOS is a label that is not read, so half prompt and half response are `length` tokens."""
    shape = (sizes.tokens // sizes.length, 2, sizes.length // 2)
    return [Sample(*pair) for pair in rng.integers(3, sizes.vocab_size, shape)]


def real_samples(rng: np.random.Generator, sizes: Sizes, padded: bool = False) -> list[Sample]:
    """Random samples, as many as fit `tokens`; `padded`: with all of them as long as the longest."""
    samples: list[Sample] = []
    used = longest = 0
    while True:
        pair = lengths(rng, 1, sizes)[0]
        longest, used = max(longest, int(pair.sum())), used + int(pair.sum())
        if (rounded(longest) * (len(samples) + 1) if padded else used) > sizes.tokens:
            return samples
        samples.append(Sample(*(rng.integers(3, sizes.vocab_size, n) for n in pair)))


def rounded(length: int) -> int:
    """What Transformers' batches are padded to: attention kernels want multiples of 8."""
    return -(-length // 8) * 8


def config_of(preset: str, args: argparse.Namespace, **overrides: Any) -> Config:
    fields = {
        "train.packing": False, "train.batch_tokens": None, "train.length_window": 0, "train.grad_accum_steps": 1,
        "train.cuda_graphs": False,  # whose memory is not that of a step
        "optim.name": "adamw", "train.ema_decay": 0.0, "train.compile": True, "model.hrm.backprop_warmup_steps": 0,
        "model.vocab_size": args.sizes.vocab_size, "train.activation_memory": ACTIVATION_MEMORY[preset],
    }  # fmt: skip
    fields |= overrides | dict(args.sizes.overrides) | parse_set(args.set)
    return load_config(ROOT / "configs" / f"hrm_text_{preset}.yaml", fields)


# --- sides ---------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """What is measured: a step that returns its useful tokens, and what is known of the step."""

    step: Callable[[], int]
    facts: dict[str, Any]


Attempts = list[tuple[str, Callable[[], Side]]]
"""Ways to make a side, each with a note. The first that works is measured."""


def ours(config: Config, batches: list[TokenRows]) -> Side:
    placed = itertools.cycle([to_device(batch, DEVICE) for batch in batches])
    tokens = itertools.cycle([int(batch.num_tokens) for batch in batches])
    state = build_state(config, config.model.vocab_size, DEVICE)
    stats = Stats(state)

    def step() -> int:
        keep_activations(config.train.activation_memory)
        train_step(state, [next(placed)], stats)
        return next(tokens)

    return Side(step, _facts(config, batches))


def theirs(config: Config, samples: list[list[Sample]], compiled: str, parts: int) -> Side:
    """compiled: "whole", "layers" or "no". parts: micro-batches of a step."""
    transformers = require_transformers()
    vocabulary = Vocabulary(config.model.vocab_size)
    batches = [join(Ragged.of(some), vocabulary) for some in samples]
    model = transformers.HrmTextForCausalLM(hrm_text_config(config.model, vocabulary)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=DEVICE.type == "cuda")
    dynamic = len({batch.ids.shape for batch in batches}) > 1 or None
    forward = model
    if config.train.compile and compiled == "whole":
        forward = torch.compile(model, dynamic=dynamic)
    elif config.train.compile and compiled == "layers":
        for layer in (*model.model.L_module.layers, *model.model.H_module.layers):
            layer.compile(dynamic=dynamic)
    micro_batches = itertools.cycle([_their_inputs(batch, parts) for batch in batches])
    tokens = itertools.cycle([int(batch.num_tokens) for batch in batches])

    def step() -> int:
        keep_activations(1.0)
        for inputs, share in next(micro_batches):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = forward(**inputs, use_cache=False).loss
            (loss * share).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return next(tokens)

    return Side(step, _facts(config, batches, positions=lambda batch: len(batch.ids) * rounded(batch.ids.shape[1])))


def _their_inputs(batch: TokenRows, parts: int) -> list[tuple[dict[str, torch.Tensor], float]]:
    """Micro-batches of `batch`, each with its share of the labels."""
    ids = torch.nn.functional.pad(batch.ids, (0, rounded(batch.ids.shape[1]) - batch.ids.shape[1]))
    places = torch.arange(ids.shape[1])
    prompt, read = places <= batch.sees_to[:, :1], places < batch.lengths[:, None]
    inputs = {
        "input_ids": ids,
        "token_type_ids": prompt.long(),
        # A label stands at its own token's place: Transformers shifts them. The last one of a sample has no place there.
        "labels": ids.masked_fill(prompt | ~read, -100),
    }
    if not read.all():
        inputs["attention_mask"] = read.long()
    pieces = [
        dict(zip(inputs, piece)) for piece in zip(*(tensor.to(DEVICE).chunk(parts) for tensor in inputs.values()))
    ]
    counts = [int((piece["labels"] != -100).sum()) for piece in pieces]
    return [(piece, count / sum(counts)) for piece, count in zip(pieces, counts)]


def _facts(
    config: Config, batches: list[TokenRows], positions: Callable[[TokenRows], int] = lambda batch: batch.num_positions
) -> dict[str, Any]:
    tokens = sum(int(batch.num_tokens) for batch in batches)
    labels, samples = sum(len(batch.labels) for batch in batches), sum(batch.num_samples for batch in batches)
    hrm = config.model.hrm
    backprop_steps = backprop_steps_of(hrm, hrm.backprop_warmup_steps, hrm.cycles)
    with torch.device("meta"):
        model = build_model(config.model, config.model.vocab_size or 0)
    return {
        "padding": 1 - tokens / sum(map(positions, batches)),
        "flops_per_token": training_flops(model, tokens, labels, samples, hrm.cycles, backprop_steps) / tokens,
    }


# --- measuring -----------------------------------------------------------------------------------------------------


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def clean() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def compare(sides: dict[str, Attempts], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Warms the sides up one after another, then measures them in rounds that alternate. Returns a row for each.

    A side that fails has a note that says why; the others are measured without it.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # as `build_state` sets it: whichever side comes first, both have it
    ready: dict[str, Side] = {}
    rows: dict[str, dict[str, Any]] = {}
    held: dict[str, int] = {}
    for name, attempts in sides.items():
        notes, rows[name] = [], {}
        for note, make in attempts:
            clean()
            before = allocated()
            side, told = warmed_up(make, args)
            progress(f"{name} {note}: " + (f"warm after {told:.1f} s" if side else told))
            notes.append(note if side else f"{note}: {told}".removeprefix(": "))
            if side:
                clean()
                ready[name], held[name] = side, allocated() - before
                rows[name] = {"warm_up_s": told, **side.facts}
                break
        rows[name]["note"] = "; ".join(filter(None, notes))

    side = None  # `ready` alone holds them, and lets go of what does not fit
    rates: dict[str, list[float]] = {name: [] for name in ready}
    peaks = dict.fromkeys(ready, 0)
    for turn in range(args.rounds):
        for name in list(ready)[:: -1 if turn % 2 else 1]:
            clean()  # the other side's activations must not crowd this side's out
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                ready[name].step()
                synchronize()
                start = time.perf_counter()
                tokens = sum(ready[name].step() for _ in range(args.steps))
                synchronize()
            except torch.OutOfMemoryError:
                rows[name]["note"] += "; out of memory beside the other sides"
                del ready[name], held[name]
                continue
            rates[name].append(tokens / (time.perf_counter() - start))
            progress(f"{name}, round {turn + 1} of {args.rounds}: {rates[name][-1]:,.0f} tokens/s")
            if DEVICE.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
    peak = known_peak(_device_name(), "bf16", tf32=True)
    for name in ready:
        row, others = rows[name], sum(held.values()) - held[name]
        row |= {"rate": statistics.median(rates[name]), "unit": "tokens/s", "rates": rates[name]}
        if DEVICE.type == "cuda":
            row |= {"gib": (peaks[name] - others) / 2**30}
        if peak and "flops_per_token" in row:
            row["of_peak"] = row["rate"] * row["flops_per_token"] / peak
        if args.profile:
            row["profile"] = profile_of(ready[name].step)
    for name in ready.keys() & {"ours", "fp8"} if "transformers" in ready else ():
        rows[name]["ratio"] = statistics.median(a / b for a, b in zip(rates[name], rates["transformers"]))
    return rows


def profile_of(step: Callable[[], object]) -> str:
    """Tells where the time of three steps goes (`hrm_lm.training.profiling`)."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=PROFILED - 1, repeat=1)
        with torch.profiler.profile(schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(trace))) as p:
            for _ in range(PROFILED):
                step()
                synchronize()  # a profiled step begins and ends with an idle device
                p.step()
        return profile_table(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def progress(text: str) -> None:
    """Tells what is known before the row is: a run may be cut off."""
    print(text, file=sys.stderr, flush=True)


def warmed_up(make: Callable[[], Side], args: argparse.Namespace) -> tuple[Side | None, Any]:
    """The side and the seconds until three of its steps are done, or None and why it failed."""
    # No kernel of an earlier run, nor of the other side, may be found.
    folder = tempfile.mkdtemp(dir=args.temporary)
    folders = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    start = time.perf_counter()
    try:
        with patch.dict(os.environ, folders), limited(args.limit):
            side = make()
            for i in range(args.sizes.batches):  # every shape is seen before time is taken
                side.step()
                if i < 3:
                    synchronize()
                    seconds = time.perf_counter() - start
        return side, seconds
    except TimeLimit as error:
        return None, str(error)
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except UserError as error:
        return None, str(error)
    except Exception as error:  # what a compiler raises is no family; the other sides are still worth their time
        traceback.print_exc()
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def _device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def chosen(sides: dict[str, Attempts], args: argparse.Namespace) -> dict[str, Attempts]:
    return {name: attempts for name, attempts in sides.items() if name in args.sides}


# --- sections ------------------------------------------------------------------------------------------------------


def fixed(preset: str, args: argparse.Namespace, table: Table) -> None:
    config, rng = config_of(preset, args), np.random.default_rng(0)
    samples = [fixed_samples(rng, args.sizes) for _ in range(args.sizes.batches)]
    vocabulary, parts = Vocabulary(args.sizes.vocab_size), PARTS[preset]
    batches = [join(Ragged.of(some), vocabulary) for some in samples]
    in_fp8 = config_of(preset, args, **{"train.mixed_precision": "fp8"})
    sides: dict[str, Attempts] = {
        "ours": [(_our_note(config), lambda: ours(config, batches))],
        "fp8": [(_our_note(in_fp8), lambda: ours(in_fp8, batches))],
        "transformers": [
            (f"compiled{_in(n)}", lambda n=n: theirs(config, samples, "whole", n)) for n in (parts, 2 * parts)
        ],
    }
    for name, row in compare(chosen(sides, args), args).items():
        table.add("fixed", preset, name, **row)


def real(preset: str, args: argparse.Namespace, table: Table) -> None:
    config, rng = config_of(preset, args), np.random.default_rng(0)
    batches = packed_batches(args)
    padded = [real_samples(rng, args.sizes, padded=True) for _ in range(args.sizes.batches)]
    parts = PARTS[preset]
    ways = {"whole": ("compiled", parts), "layers": ("layers compiled", 2 * parts), "no": ("eager", 4 * parts)}
    sides: dict[str, Attempts] = {
        "ours": [(_our_note(config), lambda: ours(config, batches))],
        "transformers": [
            (ways[how][0] + _in(ways[how][1]), lambda how=how: theirs(config, padded, how, ways[how][1]))
            for how in args.compiled
        ],
    }
    for name, row in compare(chosen(sides, args), args).items():
        if "padding" in row:
            row["note"] = "; ".join(filter(None, [f"padding {row['padding']:.1%}", row["note"]]))
        table.add("real", preset, name, **row)


def memory(preset: str, args: argparse.Namespace, table: Table) -> None:
    batches = packed_batches(args)
    for share in MEMORY_ARMS[preset]:
        config = config_of(preset, args, **{"train.activation_memory": share})
        row = compare({"ours": [(_our_note(config), lambda: ours(config, batches))]}, args)["ours"]
        table.add("memory", preset, f"activation_memory {share:g}", **row)


def workers(preset: str, args: argparse.Namespace, table: Table) -> None:
    """Bare steps of several processes, with a GPU each: on their own, and together."""
    clean()
    for count in (n for n in args.workers if n > 1):
        if DEVICE.type == "cuda" and count > torch.cuda.device_count():
            table.add("workers", preset, f"{count} x ddp", note=f"this machine has {torch.cuda.device_count()} GPUs")
            continue
        mp.spawn(one_of_several, (count, preset, args, table), nprocs=count)


def one_of_several(rank: int, count: int, preset: str, args: argparse.Namespace, table: Table) -> None:
    """Rank 0 adds the tokens/s of all workers together, and their ratio to those of a worker that trains alone."""
    device = torch.device("cuda", rank) if DEVICE.type == "cuda" else DEVICE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    store = dist.FileStore(f"{args.temporary}/workers_{preset}_{count}", count)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
    rng, vocabulary, alone = np.random.default_rng(rank), Vocabulary(args.sizes.vocab_size), 0.0
    samples = [fixed_samples(rng, args.sizes) for _ in range(args.sizes.batches)]
    batches = [to_device(join(Ragged.of(some), vocabulary), device) for some in samples]
    for kind in ("alone", "ddp", "fsdp"):
        clean()
        torch._dynamo.reset()
        size = 1 if kind == "alone" else count
        spread = {"ray.parallel": "fsdp" if kind == "fsdp" else "ddp", "ray.num_workers": size}
        config = config_of(preset, args, **spread, **{"train.batch_size": size})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        state = build_state(config, args.sizes.vocab_size, device, rank if size > 1 else 0, size)
        stats, rates = Stats(state), []
        for round_ in range(args.rounds + 1):  # the first one compiles
            dist.barrier()
            synchronize()
            start = time.perf_counter()
            for batch in batches[: args.steps]:
                train_step(state, [batch], stats)
            synchronize()
            tokens = sum(int(batch.num_tokens) for batch in batches[: args.steps])
            rates += [tokens * size / (time.perf_counter() - start)] * (round_ > 0)
        row: dict[str, Any] = {"rate": statistics.median(rates), "unit": "tokens/s", "rates": rates}
        row["loss"] = stats.read()["loss"]
        if device.type == "cuda":
            row["gib"] = torch.cuda.max_memory_allocated() / 2**30
        if args.profile:
            step = partial(train_step, state, batches[:1], stats)
            if rank == 0:
                row["profile"] = profile_of(step)
            else:
                for _ in range(PROFILED):
                    step()
        if kind == "alone":
            alone = row["rate"]
        else:
            row |= {"ratio": row["rate"] / alone, "note": f"ratio to one worker; last loss {row['loss']:.4f}"}
        if rank == 0:
            table.add("workers", preset, f"{size} x {kind}" if size > 1 else "1", **row)
        del state, stats
    dist.barrier()
    dist.destroy_process_group()


def trainer(preset: str, args: argparse.Namespace, table: Table) -> None:
    """The tokens/s of each logging interval but the first, which holds the compilation."""
    clean()  # the command's processes need the memory that earlier sections held
    sizes, alone = args.sizes, table.rate("trainer", preset, "1")
    bare = table.rate("real", preset, "ours")
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        write_dataset(Path(folder) / "data", sizes)
        for workers, parallel in [
            (n, parallel) for n in args.workers for parallel in (("ddp", "fsdp") if n > 1 else ("ddp",))
        ]:
            arm = f"{workers} x {parallel}" if workers > 1 else "1"
            if DEVICE.type == "cuda" and workers > torch.cuda.device_count():
                table.add("trainer", preset, arm, note=f"this machine has {torch.cuda.device_count()} GPUs")
                continue
            rates, error = trained(preset, workers, parallel, Path(folder), args)
            if error:
                print(error, file=sys.stderr)
                table.add("trainer", preset, arm, note=error.strip().splitlines()[-1][:120])
                continue
            rate = statistics.median(rates)
            alone = rate if workers == 1 else alone
            row: dict[str, Any] = {"rate": rate, "unit": "tokens/s", "rates": rates}
            if alone and workers > 1:
                row |= {"ratio": rate / alone, "note": "ratio to one worker"}
            if bare:
                row["to_bare_step"] = rate / workers / bare
                row["note"] = "; ".join(
                    filter(None, [row.get("note"), f"a worker {row['to_bare_step']:.3f} of bare steps"])
                )
            table.add("trainer", preset, arm, **row)


def trained(
    preset: str, workers: int, parallel: str, folder: Path, args: argparse.Namespace
) -> tuple[list[float], str | None]:
    """The tokens/s of the intervals, and what the command said where it failed."""
    sizes = args.sizes
    fields = {
        "train.packing": True, "train.batch_tokens": sizes.tokens * workers, "train.grad_accum_steps": 1, "train.log_every": 10,
        "train.length_window": min(65_536, sizes.dataset), "train.ema_decay": 0, "optim.name": "adamw",
        "train.activation_memory": ACTIVATION_MEMORY[preset], "model.vocab_size": sizes.vocab_size,
        "model.hrm.backprop_warmup_steps": 0, "model.max_prompt_len": sizes.longest + 1,
        "model.max_response_len": sizes.longest + 1, "ray.parallel": parallel,
    }  # fmt: skip
    given = [f"{path}={json.dumps(value)}" for path, value in (fields | dict(sizes.overrides)).items()]
    command = [
        sys.executable, "-m", "ray_jobs.train", "--config", str(ROOT / "configs" / f"hrm_text_{preset}.yaml"),
        "--dataset", str(folder / "data"), "--save_dir", str(folder / "runs"), "--num_workers", str(workers),
        "--steps", str(sizes.trainer_steps), *(part for value in [*given, *args.set] for part in ("--set", value)),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        told, _ = process.communicate(timeout=args.limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # as from the keyboard: the command stops its own Ray
        try:
            told, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            told, _ = process.communicate()
        return [], f"{told}\nnot done after {args.limit:g} s"
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"tokens_per_s ([\d,]+)", told)][1:]
    return rates, None if process.returncode == 0 and rates else told


def generate(preset: str, args: argparse.Namespace, table: Table) -> None:
    transformers = require_transformers()
    sizes, config, vocabulary = args.sizes, config_of(preset, args), Endless(args.sizes.vocab_size)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, sizes.vocab_size, n) for n in lengths(rng, sizes.prompts, sizes)[:, 0]]
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for i, prompt in enumerate(prompts):  # padded on the left, as `generate` wants prompts
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.from_numpy(prompt), 1
    inputs = {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "token_type_ids": mask.to(DEVICE)}

    for precision in args.precisions:
        # In float32 the products are exact: the tokens of both sides must be the same.
        torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
        options = EvalOptions(cycles=config.model.hrm.cycles, mixed_precision=precision, batch_size=len(prompts))

        answers = {}

        def side(name: str, tokens: Callable[[], list[list[int]]]) -> Side:
            def step() -> int:
                answers[name] = tokens()
                return sum(map(len, answers[name]))

            return Side(step, {})

        def new_model():
            torch.manual_seed(0)
            return build_model(config.model, sizes.vocab_size)

        def our_side() -> Side:
            model = new_model().to(DEVICE).eval()
            return side(
                "ours", lambda: generate_ids(model, vocabulary, prompts, options, max_new_tokens=sizes.new_tokens)
            )

        def their_side() -> Side:
            model = transformers.HrmTextForCausalLM(hrm_text_config(config.model, Vocabulary(sizes.vocab_size)))
            model.load_state_dict(to_hrm_text(new_model().state_dict()))
            model = model.to(DEVICE, torch.bfloat16 if precision == "bf16" else torch.float32).eval()
            how = {"max_new_tokens": sizes.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return side("transformers", lambda: model.generate(**inputs, **how)[:, width:].tolist())

        sides: dict[str, Attempts] = {"ours": [("", our_side)], "transformers": [("", their_side)]}
        quicker = argparse.Namespace(
            **vars(args) | {"steps": 1, "rounds": min(args.rounds, 3), "sizes": sizes._replace(batches=1)}
        )
        rows = compare(chosen(sides, args), quicker)
        if len(answers) == 2:
            pairs = list(zip(answers["ours"], answers["transformers"]))
            equal = np.mean([a == b for ours, theirs in pairs for a, b in zip(ours, theirs)])
            same = sum(ours == theirs for ours, theirs in pairs)
            rows["ours"] |= {
                "equal_tokens": float(equal), "same_answers": same,
                "note": f"{equal:.1%} of tokens equal, {same} of {len(pairs)} answers the same",
            }  # fmt: skip
        for name, row in rows.items():
            table.add("generate", preset, f"{name} {'float32' if precision == 'none' else precision}", **row)
    torch.set_float32_matmul_precision("high")


class LocalSession:
    """Runs the loop in this process, from the start, and keeps nothing."""

    rank, world_size, device, display, event_folder = 0, 1, DEVICE, "none", None

    def __init__(self, folder: str):
        self.folder = folder
        self.seconds: list[float] = []

    def alive(self) -> None:
        pass

    def preempted(self, step: int) -> bool:
        return False

    def checkpoints(self):
        return iter(())

    def report(self, metrics: dict[str, Any], snapshot: Snapshot | None) -> None:
        assert snapshot, "a worker alone writes the whole checkpoint"
        snapshot.write(pyarrow.fs.LocalFileSystem(), tempfile.mkdtemp(dir=self.folder))
        self.seconds.append(metrics["seconds"])


def small(args: argparse.Namespace, table: Table) -> None:
    """Bare steps take batches that are ready; the loop loads, logs and checks as in a run. Time is taken of the second half
    of the steps, when nothing is prepared any more.
    """
    torch.set_float32_matmul_precision("highest")  # as in a run
    half = args.sizes.small_steps // 2
    fields = {"data.dataset": "synthetic", "train.steps": 2 * half, "train.checkpoint_every": half}
    config = load_config(overrides=fields | parse_set(args.set))
    splits = load_dataset(config.data, config.model, config.train.seed)
    state = build_state(config, splits.tokenizer.vocab_size, DEVICE)
    source = train_batches(
        splits.train, splits.tokenizer, state.model.collate, config.train, round_up=state.graphs is not None
    )
    ready = list(prefetch(source, DEVICE))

    def bare() -> float:
        state = build_state(config, splits.tokenizer.vocab_size, DEVICE)
        stats = Stats(state)
        for micro_batches in ready[:half]:
            train_step(state, micro_batches, stats)
        stats.read()  # waits for the device
        start = time.perf_counter()
        for micro_batches in ready[half:]:
            train_step(state, micro_batches, stats)
        stats.read()
        return half / (time.perf_counter() - start)

    def loop() -> float:
        session = LocalSession(args.temporary)
        train(config, session)
        first, last = session.seconds
        return half / (last - first)

    try:
        with limited(args.limit):
            bare(), loop()  # warm up
            rates = [(loop(), bare()) if i % 2 else (bare(), loop())[::-1] for i in range(args.rounds)]
    except TimeLimit as error:
        table.add("small", "default", "bare", note=str(error))
        return
    looped, bares = map(list, zip(*rates))
    ratio = statistics.median(a / b for a, b in rates)
    table.add("small", "default", "bare", rate=statistics.median(bares), unit="steps/s", rates=bares)
    table.add(
        "small", "default", "loop", rate=statistics.median(looped), unit="steps/s", rates=looped, ratio=ratio,
        note="ratio to bare steps",
    )  # fmt: skip


def packed_batches(args: argparse.Namespace) -> list[TokenRows]:
    rng, vocabulary = np.random.default_rng(1), Vocabulary(args.sizes.vocab_size)
    samples = [real_samples(rng, args.sizes) for _ in range(args.sizes.batches)]
    return [pack(Ragged.of(some), vocabulary, width=args.sizes.tokens) for some in samples]


def _our_note(config: Config) -> str:
    share = config.train.activation_memory
    return f"activation_memory {share:g}" if share < 1 else ""


def _in(parts: int) -> str:
    return f", {parts} micro-batches" if parts > 1 else ""


def write_dataset(folder: Path, sizes: Sizes) -> None:
    """A prepared dataset of random tokens."""
    rng, fs, tokenizer = np.random.default_rng(0), pyarrow.fs.LocalFileSystem(), ByteTokenizer()
    folder.mkdir()
    closed: dict[str, list] = {"train": [], "val": []}
    for split, count in (("train", sizes.dataset), ("val", 64)):
        writer = ShardWriter(fs, str(folder), f"{split}-00000", tokenizer)
        writer.write([tuple(rng.integers(3, 259, n).tolist() for n in pair) for pair in lengths(rng, count, sizes)])
        closed[split].append(writer.close())
    write_meta(fs, str(folder), tokenizer, closed)


PRESET_SECTIONS = {
    "fixed": fixed, "real": real, "memory": memory, "generate": generate, "workers": workers, "trainer": trainer,
}  # fmt: skip
SECTIONS = [*PRESET_SECTIONS, "small"]
SIDES = ["ours", "fp8", "transformers"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--only", type=some, default=SECTIONS, metavar="SECTION,...", help=", ".join(SECTIONS))
    parser.add_argument("--presets", type=some, default=["b"], metavar="PRESET,...", help="b, l, xl")
    parser.add_argument("--sides", type=some, default=SIDES, metavar="SIDE,...", help=", ".join(SIDES))
    parser.add_argument(
        "--compiled", type=some, default=["whole", "layers", "no"], metavar="HOW,...",
        help="what of Transformers' model is tried in `real`, in this order: whole, layers, no",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=lambda text: [int(n) for n in text.split(",")], help="of workers and trainer [1,2]"
    )
    parser.add_argument("--precisions", type=some, default=["bf16", "none"], help="of generate: bf16, none")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, help="of a round")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a side to warm up, or a command to end")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="of the config, on our side")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="beside the JSON file, of each side that is measured: where its steps' time goes",
    )
    parser.add_argument("--output", type=Path, help="the JSON file [benchmarks/results/<device>.json; none if --quick]")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled")
    args = parser.parse_args(argv)
    known_values = {
        "only": SECTIONS, "presets": ACTIVATION_MEMORY, "sides": SIDES,
        "compiled": ["whole", "layers", "no"], "precisions": ["bf16", "none"],
    }  # fmt: skip
    for name, known in known_values.items():
        if unknown := [value for value in getattr(args, name) if value not in known]:
            parser.error(f"--{name}: {', '.join(unknown)}: known are {', '.join(known)}")
    args.sizes = TINY if args.quick else Sizes()
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.steps = args.steps or args.sizes.batches
    args.workers = args.workers or ([1] if args.quick else [1, 2])
    if args.output is None and not args.quick:
        slug = re.search(r"[a-z]+\d+\w*", _device_name().lower())
        args.output = ROOT / "benchmarks" / "results" / f"{slug.group() if slug else 'cpu'}.json"

    torch.set_float32_matmul_precision("high")
    table = Table(args.output, args.set)
    with tempfile.TemporaryDirectory(prefix="gpu_") as args.temporary:
        for section, preset in itertools.product([name for name in SECTIONS if name in args.only], args.presets):
            if section in PRESET_SECTIONS:
                PRESET_SECTIONS[section](preset, args, table)
        if "small" in args.only:
            small(args, table)


if __name__ == "__main__":
    main()
