"""Where a step's time goes: some steps under PyTorch's profiler, as a trace and as a table that a reader understands."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction

from hrm_lm.data.collate import AnyBatch

SKIPPED, PROFILED = 10, 5
"""Steps before the profiled ones, in which blocks are compiled and memory is taken, and the profiled ones."""

OPTIMIZER = "optimizer, clipping and average"
# What a kernel's or an operation's name says of its kind. The first that fits counts.
KINDS = {
    OPTIMIZER: r"Optimizer\.step|multi_tensor_apply|_foreach_|_fused_adam",
    "communication": r"nccl|c10d::|gloo",
    "attention": r"flash|fmha|flex_attention|scaled_dot_product|attention|cudnn.*sdpa",
    "loss": r"nll_loss|log_softmax|cross_entropy|softmax_warp|SoftMax",
    "matrix products": r"gemm|gemv|cutlass|xmma|nvjet|wgmma|triton_tem|cublas|aten::(mm|bmm|addmm|baddbmm|matmul|linear)$",
    "copies": r"^Memcpy|^Memset|aten::(copy_|_to_copy|to|clone|contiguous)$",
    "norms, elementwise and other": r"",
}
# Where kernels of several streams run at a time, the time is that of the first kind: communication and copies count as
# far as no computing hides them. On CPU operations lie within others, and what has a name of its own comes first.
ON_GPU = (
    OPTIMIZER,
    "attention",
    "loss",
    "matrix products",
    "norms, elementwise and other",
    "communication",
    "copies",
)
ON_CPU = (
    OPTIMIZER,
    "attention",
    "loss",
    "matrix products",
    "communication",
    "copies",
    "norms, elementwise and other",
)


def profiled(
    batches: Generator[list[AnyBatch], None, None], folder: Path, device: torch.device, steps: int
) -> Generator[list[AnyBatch], None, None]:
    """The same batches. What the loop does with some of them is profiled, and `folder` then holds `trace.json.gz` (of
    Chrome's format, for Perfetto) and `table.txt`. steps: how many batches there are.
    """
    active = min(PROFILED, steps)
    first = min(SKIPPED, steps - active)

    def action(step: int) -> ProfilerAction:
        if step < first:
            return ProfilerAction.WARMUP if step == first - 1 else ProfilerAction.NONE
        if step < first + active - 1:
            return ProfilerAction.RECORD
        return ProfilerAction.RECORD_AND_SAVE if step == first + active - 1 else ProfilerAction.NONE

    def write(profiler: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        with gzip.open(folder / "trace.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        (folder / "table.txt").write_text(table(events))
        files = "profile/table.txt and, for Perfetto, profile/trace.json.gz"
        print(f"{len(_steps(events))} steps were profiled; in the run's folder there are {files}", flush=True)

    with closing(batches):
        with torch.profiler.profile(schedule=action, on_trace_ready=write) as profiler:
            for step, batch in zip(range(first + active), batches):
                yield batch
                if device.type == "cuda" and step >= first - 1:  # a profiled step begins and ends with an idle device
                    torch.cuda.synchronize(device)
                profiler.step()
        yield from batches


def table(events: list[dict[str, Any]]) -> str:
    """What a trace's steps consist of, by kind, and its longest kernels (or on CPU operations, each without those that
    lie within it). events: `traceEvents` of Chrome's format, times in microseconds.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    steps = _steps(events)
    start, end = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
    ran = [e for e in spans if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_gpu = bool(ran)
    optimizing = [
        (e["ts"], e["ts"] + e["dur"])
        for e in spans
        if e["name"].startswith("Optimizer.step")
        and e.get("cat") == ("gpu_user_annotation" if on_gpu else "user_annotation")
    ]
    if not on_gpu:
        ran = [e for e in spans if e.get("cat") == "cpu_op" and not e["name"].startswith("autograd::")]
    ran = [e for e in ran if e["ts"] < end and e["ts"] + e["dur"] > start]

    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in ran:
        by_kind[_kind(event, optimizing)].append((max(event["ts"], start), min(event["ts"] + event["dur"], end)))
    rows, seen, covered = [], [], 0.0
    for kind in ON_GPU if on_gpu else ON_CPU:
        seen += by_kind[kind]
        total = _length(seen)
        rows.append((kind, total - covered))
        covered = total
    rows.append(("idle" if on_gpu else "Python, between operations", end - start - covered))

    wall = end - start
    lines = [f"A step takes {wall / len(steps) / 1000:.3f} ms (mean of {len(steps)}).", "", f"{'ms a step':>10}      %"]
    lines += [f"{us / len(steps) / 1000:10.3f}  {us / wall:5.1%}  {kind}" for kind, us in rows]
    own: dict[str, list[float]] = defaultdict(list)
    for event, microseconds in _own_times(ran, on_gpu):
        own[event["name"]].append(microseconds)
    heaviest = sorted(own.items(), key=lambda item: -sum(item[1]))[:20]
    lines += ["", f"{'ms a step':>10}      %  calls a step  {'kernel' if on_gpu else 'operation'}"]
    lines += [
        f"{sum(times) / len(steps) / 1000:10.3f}  {sum(times) / wall:5.1%}  {len(times) / len(steps):12,.1f}  {name[:120]}"
        for name, times in heaviest
    ]
    return "\n".join(lines) + "\n"


def _steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The profiled steps. They are fewer than asked for where the run ended in their midst."""
    named = (event for event in events if event.get("ph") == "X" and event.get("cat") == "user_annotation")
    return [event for event in named if event["name"].startswith("ProfilerStep")]


def _kind(event: dict[str, Any], optimizing: list[tuple[float, float]]) -> str:
    if any(start <= event["ts"] < end for start, end in optimizing):
        return OPTIMIZER
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, event["name"]))


def _length(spans: Iterable[tuple[float, float]]) -> float:
    """How much time these spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return covered


def _own_times(events: list[dict[str, Any]], on_gpu: bool) -> list[tuple[dict[str, Any], float]]:
    """Each event with its duration, less that of the operations that it called."""
    own = [event["dur"] for event in events]
    if on_gpu:
        return list(zip(events, own))
    open_calls: dict[Any, list[int]] = defaultdict(list)  # by thread, from the outermost
    for i in sorted(range(len(events)), key=lambda i: (events[i]["ts"], -events[i]["dur"])):
        calls = open_calls[events[i]["tid"]]
        while calls and events[calls[-1]]["ts"] + events[calls[-1]]["dur"] <= events[i]["ts"]:
            calls.pop()
        if calls:
            own[calls[-1]] -= events[i]["dur"]
        calls.append(i)
    return list(zip(events, own))
