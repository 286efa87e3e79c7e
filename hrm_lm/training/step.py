"""The HRM-LM step: forward, backward, accumulate, clip, update. No Ray in here, and no hidden synchronisation.

The loss of a global batch is the mean over its labelled tokens across all workers and accumulation steps, so how a
batch is cut into workers and micro-batches changes nothing but rounding.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hrm_lm.config import Config, Cycles, HRMConfig, OptimConfig
from hrm_lm.data.collate import IGNORE, AnyBatch
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import LanguageModel, autocast
from hrm_lm.models.float8 import recast, use_float8
from hrm_lm.models.layers import LOGITS_AT_ONCE
from hrm_lm.models.lora import add_lora
from hrm_lm.training.graphs import StepGraphs, step_graphs
from hrm_lm.training.optim import WeightAverage, build_optimizer
from hrm_lm.training.parallel import forget_gathered, is_sharded, parallelize, unsynchronized
from hrm_lm.training.stability import WATCHED, observed, on_all


@dataclass
class TrainState:
    """All that an optimisation step reads and changes."""

    config: Config
    model: LanguageModel
    parallel: nn.Module
    """`model`, or `model` in DistributedDataParallel; see `hrm_lm.training.parallel`."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    device: torch.device
    rank: int = 0
    world_size: int = 1
    step: int = 0
    """Optimisation steps done."""
    graphs: StepGraphs | None = None
    """Where steps are replayed as CUDA graphs."""


class Stats:
    """Sums over the steps of a logging interval, kept on the device until a number is due."""

    def __init__(self, state: TrainState, watched: dict[str, float] | None = None):
        """watched: as an earlier `read` gave it."""
        self.world_size, self.device = state.world_size, state.device
        self.steps = torch.zeros((), device=state.device)
        """Optimisation steps done, as the device knows them."""
        self.sums = torch.zeros(6, dtype=torch.float64, device=state.device)
        """loss summed over labelled tokens, of how many, labelled tokens, tokens read, positions with padding, samples"""
        self.bad_step = torch.zeros((), device=state.device)
        self.spike_step = torch.zeros((), device=state.device)
        self.watched = torch.zeros(len(WATCHED), dtype=torch.float64, device=state.device)
        """What `hrm_lm.training.stability` goes by, the same on all workers."""
        self.grad_norm = torch.zeros((), device=state.device)
        self.restart(state.step, watched or {})

    def restart(self, step: int, watched: dict[str, float]) -> None:
        """A new interval begins after `step`. The tensors keep their places in memory."""
        self.steps.fill_(step)
        self.sums.zero_()
        self.bad_step.fill_(math.inf)
        self.spike_step.fill_(math.inf)
        self.watched.copy_(torch.tensor([watched.get(name, 0.0) for name in WATCHED], dtype=torch.float64))
        self.begin()

    def begin(self) -> None:
        """The interval's time counts from here on, where the device did something else since the last interval."""
        self.began = event_now(self.device)

    def read(self) -> dict[str, Any]:
        """The interval's numbers over all workers; then a new interval begins. This waits for the device."""
        return self.send().read()

    def send(self) -> "SentStats":
        """As `read`, with the numbers on their way to the host. No one waits for the device."""
        if self.world_size > 1:
            dist.all_reduce(self.sums)
            dist.all_reduce(self.bad_step, op=dist.ReduceOp.MIN)
        single = torch.stack([self.bad_step, self.spike_step, self.steps, self.grad_norm]).double()
        numbers = torch.cat([self.sums, single, self.watched])
        self.sums.zero_()
        self.spike_step.fill_(math.inf)
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
        began, self.began = self.began, event_now(self.device)
        return SentStats(numbers, began, self.began, alone=self.world_size == 1 or self.device.type != "cuda")


class HostEvent:
    """What a `torch.cuda.Event` is where nothing runs behind the host's back."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "HostEvent") -> float:
        """Milliseconds."""
        return 1000 * (end.at - self.at)


def event_now(device: torch.device) -> Any:
    """Records an event with a time. It comes when `device` has done what it was given so far."""
    if device.type != "cuda":
        return HostEvent()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass
class SentStats:
    """An interval's numbers on their way to the host."""

    numbers: Tensor
    began: Any
    ended: Any
    """Events; the numbers are there at the second."""
    alone: bool

    def arrived(self) -> bool:
        """Whether `read` returns at once; False among several workers on GPUs, which must all read at the same step."""
        return self.alone and self.ended.query()

    def seconds(self) -> float:
        """Returns how long the device took for the interval, however late it is asked. It waits for the interval's end."""
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000

    def read(self) -> dict[str, Any]:
        """Waits for the numbers, and not for steps that were launched since.

        `bad_step`: the first step (from 1) whose loss or gradient was not finite, else None; with `train.on_nonfinite:
        skip` always None, and `loss` is that of the steps that were taken. `spike_step`: the interval's first spike, else
        None.
        """
        self.ended.synchronize()
        sums, (bad, spike, step, grad_norm), watched = (
            part.tolist() for part in self.numbers.split([6, 4, len(WATCHED)])
        )
        loss, counted, labelled, tokens, positions, samples = sums
        return {
            "step": int(step),
            "loss": loss / counted if counted else math.nan,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "labels": labelled,
            "padding": 1 - tokens / max(positions, 1),
            "samples": samples,
            "bad_step": None if math.isinf(bad) else int(bad),
            "spike_step": None if math.isinf(spike) else int(spike),
            "watched": dict(zip(WATCHED, watched, strict=True)),
        }


def build_state(
    config: Config, vocab_size: int, device: torch.device | None = None, rank: int = 0, world_size: int = 1
) -> TrainState:
    """A new model and its optimizer: the same weights on every rank and device for the same seed."""
    device = device or torch.device("cpu")
    if config.train.compile:
        from hrm_lm.training import compilation  # half a second, most of it for PyTorch's compiler

        compilers = compilation.start_compilers(device)  # they need some seconds, as building the model does
    try:
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, vocab_size).to(device)
        add_lora(model, config.train.lora)
        if config.train.mixed_precision == "fp8":
            use_float8(model, device, config.ray.shards(world_size))
    finally:
        if config.train.compile:
            compilers.join()  # also where the process is about to end
    if config.train.compile:
        compilation.compile_model(model, config.train, device)
    else:
        torch._functorch.config.activation_memory_budget = 1.0  # flex attention is compiled all the same
    model.head.logits_at_once = logits_at_once(config)
    parallel = parallelize(model, config, device, world_size)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.mixed_precision == "fp16")
    optimizer = build_optimizer(model, config.optim, device)
    average = WeightAverage(model, config.train.ema_decay) if config.train.ema_decay else None
    graphs = step_graphs(config, device)
    if graphs:
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = graphs.lr, True
    return TrainState(config, model, parallel, optimizer, scaler, average, device, rank, world_size, graphs=graphs)


def logits_at_once(config: Config) -> int:
    """How many logits are held at a time while losses are computed. Compiled kernels in bf16 hold no float32 copies of them, so they
    may be five times as many: 2.5 GiB, and as much for their gradients. With deep supervision each output has its own.
    """
    train, hrm = config.train, config.model.hrm
    lean = train.compile and train.mixed_precision in ("bf16", "fp8") and not hrm.deep_supervision
    return 5 * LOGITS_AT_ONCE if lean else LOGITS_AT_ONCE


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """Rate of optimisation step `step`, from 0: linear warm-up, then decay to `min_lr_ratio * lr` at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * decay)


def cycles_of(config: Config, step: int) -> Cycles:
    """The cycles of optimisation step `step`, the same on every worker."""
    cycles = config.model.hrm.cycles
    if config.train.sample_h_cycles is None:
        return cycles
    train, (least, most) = config.train, config.train.sample_h_cycles
    draws = np.random.default_rng((train.seed, step, 1))  # 1: apart from the draws of data order
    if train.h_cycles_distribution == "uniform":
        return cycles._replace(h=int(draws.integers(least, most + 1)))
    if train.h_cycles_distribution == "poisson":
        drawn: float = draws.poisson(train.h_cycles_mean)
    else:
        sigma = train.h_cycles_sigma
        drawn = draws.lognormal(math.log(train.h_cycles_mean) - sigma**2 / 2, sigma)
    return cycles._replace(h=min(max(round(drawn), least), most))


def backprop_steps_of(config: HRMConfig, step: int, cycles: Cycles) -> int | None:
    """Applications of a stack that carry gradient at optimisation step `step`; None for all."""
    total = cycles.h * (cycles.l + 1)
    steps = total if config.backprop_steps == "all" else min(config.backprop_steps, total)
    if step < config.backprop_warmup_steps:
        steps = min(steps, 2 + (steps - 2) * step // config.backprop_warmup_steps)
    return None if steps >= total else steps


def train_step(state: TrainState, micro_batches: list[AnyBatch], stats: Stats) -> None:
    """One optimisation step over this worker's micro-batches of a global batch. Adds to `stats`, on the device."""
    config, step = state.config, state.step
    lr = learning_rate(config.optim, config.train.steps, step)
    if state.graphs:
        state.graphs.lr.fill_(lr)
    else:
        for group in state.optimizer.param_groups:
            group["lr"] = lr
    if config.model.dropout:
        torch.manual_seed(hash((config.train.seed, step, state.rank)))
    state.model.set_step(step)
    cycles = cycles_of(config, step)
    backprop_steps = backprop_steps_of(config.model.hrm, step, cycles)

    def run(batches: list[AnyBatch]) -> None:
        device_step(state, batches, stats, cycles, backprop_steps)

    if state.graphs:
        state.graphs.run((stats, cycles, backprop_steps), micro_batches, run)
    else:
        run(micro_batches)
    state.step += 1


def device_step(
    state: TrainState, micro_batches: list[AnyBatch], stats: Stats, cycles: Cycles, backprop_steps: int | None
) -> None:
    """What a step does on the device. A CUDA graph may repeat it, so whatever is not an argument and changes from step
    to step is in a tensor, which keeps its place in memory.
    """
    config = state.config
    if config.train.mixed_precision == "fp8":
        recast(state.model)
    counts = [(batch.labels != IGNORE).sum() for batch in micro_batches]
    mine = torch.stack(counts).sum()
    read = (
        torch.stack([batch.thought_about.sum() for batch in micro_batches]).sum() if config.train.fixed_point else mine
    )
    labelled, read = all_reduced(torch.stack([mine, read]), state.world_size).unbind()
    segments = config.train.segments
    scale = state.world_size / labelled.clamp(min=1) / segments  # DDP and FSDP take the mean over workers

    step_loss = torch.zeros((), device=state.device)
    for i, batch in enumerate(micro_batches):
        carry = None
        for segment in range(segments):
            last_pass = i == len(micro_batches) - 1 and segment == segments - 1
            with nullcontext() if last_pass else unsynchronized(state.parallel):
                with autocast(state.device, config.train.mixed_precision):
                    (*earlier, last), thought = state.parallel(batch, cycles, backprop_steps, carry)
                loss = last.losses.sum()
                if segment == segments - 1:
                    step_loss += loss.detach()
                if earlier:  # deep supervision
                    mean = torch.stack([prediction.losses.sum() for prediction in earlier]).mean()
                    loss = loss + config.model.hrm.deep_supervision * mean
                if config.train.fixed_point:
                    penalty = (thought.changes(last=True) * batch.thought_about).sum() * labelled / read
                    loss = loss + config.train.fixed_point * penalty
                state.scaler.scale(loss * scale).backward()
            if segments > 1:
                carry = thought.carry.detach()

    if is_sharded(state.model):
        forget_gathered(state.model)
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):  # of sharded gradients
        norm = norm.full_tensor()
    if config.train.grad_clip > 0:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), config.train.grad_clip, norm)

    finite = step_loss.isfinite()
    if not state.scaler.is_enabled():  # the scaler skips steps of infinite gradients itself, and backs off
        finite = finite & norm.isfinite()
    stats.steps += 1
    skips = config.train.on_nonfinite == "skip"
    if skips or config.train.spike:
        loss, finite = on_all(step_loss, labelled, finite, state.world_size)
        watched, spike = observed(stats.watched, loss, finite, config.train.spike)
        stats.watched.copy_(watched)
        stats.spike_step.copy_(torch.where(spike, stats.spike_step.minimum(stats.steps), stats.spike_step))
    update_weights(state, finite if skips else None)
    counted = mine
    if skips:
        step_loss, counted = (torch.where(finite, number, torch.zeros_like(number)) for number in (step_loss, mine))
    else:
        stats.bad_step.copy_(torch.where(finite, stats.bad_step, stats.bad_step.minimum(stats.steps)))

    tokens = torch.stack([batch.num_tokens for batch in micro_batches]).sum()
    positions = sum(batch.num_positions for batch in micro_batches)
    samples = sum(batch.num_samples for batch in micro_batches)
    counts = [counted, mine, tokens, torch.full_like(mine, positions), torch.full_like(mine, samples)]
    stats.sums += torch.stack([step_loss.double(), *(count.double() for count in counts)])
    stats.grad_norm.copy_(norm)


def all_reduced(numbers: Tensor, world_size: int) -> Tensor:
    """Their sums over all workers."""
    if world_size > 1:
        dist.all_reduce(numbers)
    return numbers


def update_weights(state: TrainState, finite: Tensor | None = None) -> None:
    """The step of the optimizer and of the average. finite: 0-dim; where it is false, the step changes nothing."""
    on_device = any(group.get("fused") or group.get("capturable") for group in state.optimizer.param_groups)
    if finite is not None and on_device:
        # What GradScaler tells an optimizer. Every optimizer that steps on the device heeds it.
        state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    takes = finite is None or on_device or bool(finite)
    if takes:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if takes and state.average:
        state.average.update(finite if on_device else None)
