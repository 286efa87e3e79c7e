"""What a run will take, before it starts: parameters, FLOPs, memory, and the time of its steps.

No data are read: samples are as long as the config allows, so a real run is no slower.
"""

import time
from collections import Counter
from typing import Any

import torch

from hrm_lm.config import Config, Cycles
from hrm_lm.data.collate import Rows
from hrm_lm.data.sampler import divided
from hrm_lm.data.tokenizer import ByteTokenizer, SimpleTokenizer, model_vocab_size
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.encoder_decoder import HRMEncoderDecoder
from hrm_lm.models.hrm import carries_gradient
from hrm_lm.models.layers import Block
from hrm_lm.models.lora import add_lora
from hrm_lm.training.flops import matrix_peak, training_flops
from hrm_lm.training.memory import batch_of, kept_bytes, largest_lengths, most_cycles
from hrm_lm.training.step import Stats, backprop_steps_of, build_state, cycles_of, logits_at_once, train_step

VOCABULARY = 64
"""Of the dry run, where `model.vocab_size` is not set."""
MEASURED = 5
"""Steps that are timed, after three."""
DRAWN = 1000
"""Steps whose cycles the mean is taken of."""
CPU_FLOPS = 1e10
"""Of a step that a CPU still measures: some tenths of a second."""
BLOCK_FLOPS = 5e7
"""What a CPU computes in the time that a block takes beside its products, forward and backward: a millisecond."""


def plan(config: Config, device: torch.device, obstacle: str | None = None) -> str:
    """A table of about ten lines. Where a step does not take long, this trains a new model for a few steps.

    obstacle: why no step is to be taken, if none is. Raises UserError for a vocabulary that no tokenizer has.
    """
    least, workers = config.ray.workers
    config = config.for_workers(workers)
    train, vocab_size = config.train, VOCABULARY
    if config.model.vocab_size:
        vocab_size = model_vocab_size(config.model, SimpleTokenizer(""))  # refuses what has no room for special tokens
    with torch.device("meta"):
        model = build_model(config.model, vocab_size)
        add_lora(model, train.lora)
    count, prompt, labels = lengths_of(config)
    streams = {"encoder_decoder": prompt + labels, "prefix_lm": prompt + labels - 1, "puzzle": prompt + 1}
    tokens = count * streams[config.model.architecture]  # of a micro-batch
    flops = mean_flops(model, config, tokens, count * labels, count)
    parts = train.grad_accum_steps
    at_most = "at most " if least < workers else ""
    sharded = config.ray.shards(workers)
    shares = least if sharded else 1  # the fewest workers hold the largest parts
    kept = kept_bytes(model, config)
    activations = activation_bytes(model, config, count * prompt, count * labels)
    if sharded:  # a worker gathers all weights for a pass, in the precision of the step
        activations += kept["weights"] // (1 if train.mixed_precision == "none" else 2)
    total = sum(kept.values()) / shares + activations

    of_workers = f", of {at_most}{workers} workers" if workers > 1 else ""
    rows = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, vocabulary {vocab_size:,}"
        + ("" if config.model.vocab_size else " (model.vocab_size is not set, and no data are read)"),
        "a step": f"{count * parts * workers:,} samples of {prompt:,} + {labels:,} tokens in {parts * workers} "
        f"micro-batch{'es' * (parts * workers > 1)}{of_workers}",
        "FLOPs": f"{'at most ' * bool(train.lora.rank)}{flops / tokens:.3g} a token, {flops * parts * workers:.3g} a step",
        **{name: size(n / shares) + (f" a worker, {size(n)} in all" if sharded else "") for name, n in kept.items()},
        "activations": f"about {size(activations)} a worker, of the largest micro-batch"
        + (" and of gathered weights" if sharded else ""),
        "memory": f"about {size(total)} a worker",
    }
    if device.type == "cuda":
        rows["memory"] += f"; this GPU has {size(torch.cuda.mem_get_info(device)[1])}"
    if obstacle is None and device.type != "cuda" and cpu_work(config, flops) * parts > CPU_FLOPS:
        obstacle = "a step takes a CPU too long"
    if obstacle:
        rows["time"] = f"not measured: {obstacle}"
    else:
        rows |= measured(config, vocab_size, device, flops)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def lengths_of(config: Config) -> tuple[int, int, int]:
    """Samples of the largest micro-batch, and the tokens of their prompts and labels; packed the longest samples."""
    prompt, labels = config.model.max_prompt_len, config.model.max_response_len
    if config.row_tokens:
        one_stream = config.model.architecture == "prefix_lm"
        return config.row_tokens // (prompt + labels - one_stream), prompt, labels
    return largest_lengths(config)


def rows_of(config: Config) -> Rows | None:
    """The rows that a packed micro-batch of the longest samples fills."""
    if config.row_tokens is None:
        return None
    prompt, labels = config.model.max_prompt_len, config.model.max_response_len
    one_stream = config.model.architecture == "prefix_lm"
    return (config.row_tokens,) if one_stream else divided(config.row_tokens, prompt / (prompt + labels))


def mean_flops(model: LanguageModel, config: Config, tokens: int, labels: int, samples: int) -> float:
    """Of a micro-batch, over the cycles that a step may draw, past all warm-up."""

    def of(cycles: Cycles) -> float:
        backprop_steps = backprop_steps_of(config.model.hrm, config.model.hrm.backprop_warmup_steps, cycles)
        return training_flops(model, tokens, labels, samples, cycles, backprop_steps)

    drawn = Counter(cycles_of(config, step) for step in range(DRAWN))
    return config.train.segments * sum(count * of(cycles) for cycles, count in drawn.items()) / DRAWN


def cpu_work(config: Config, flops: float) -> float:
    """FLOPs that a CPU could do in the time of a micro-batch of `flops`: many small blocks take long, too."""
    hrm, (cycles, _) = config.model.hrm, most_cycles(config)
    applied = cycles.h * (hrm.h_layers + cycles.l * hrm.l_layers) or hrm.h_layers + hrm.l_layers
    return flops + BLOCK_FLOPS * (applied + config.model.encoder_layers + config.model.decoder_layers)


def activation_bytes(model: LanguageModel, config: Config, prompts: int, labels: int) -> float:
    """An estimate of what a backward pass needs of its forward pass: what each block keeps in eager mode, as many times as
    it is applied with gradient, and the logits. A compiler keeps what it thinks best, so this may be off by a third.

    prompts, labels: tokens of the micro-batch.
    """

    def values(*blocks: Any) -> int:
        """Of a token, over these blocks."""
        return sum(_block_values(block) for module in blocks for block in module.modules() if isinstance(block, Block))

    cycles, backprop_steps = most_cycles(config)
    l_carries, h_carries = carries_gradient(cycles, backprop_steps)
    outputs = cycles.h if config.model.hrm.deep_supervision and cycles.h else 1
    core = 0
    if model.core is not None:
        core = values(model.core.fast) * sum(map(sum, l_carries)) + values(model.core.h_stack) * sum(h_carries)
    if isinstance(model, HRMEncoderDecoder):
        kept = prompts * (values(model.encoder) + core) + labels * values(model.decoder) * outputs
    else:
        kept = (prompts + labels) * (core or values(model))
    width = 4 if config.train.mixed_precision == "none" else 2
    # An output's logits are kept, or computed once more in backward if they are many; one output's gradients are there at a time.
    # They are in the step's precision, and, where nothing is compiled, in float32, too.
    logits, at_once = labels * model.head.out_features, logits_at_once(config)
    logits = logits * (outputs + 1) if logits <= at_once else 2 * at_once
    return kept * width * config.train.activation_memory + logits * (width if config.train.compile else 4 + width)


def _block_values(block: Block) -> int:
    """Values that a block keeps of a token. Each half keeps the stream and its norm (4 d). Attention keeps its fused
    projection, queries and keys once more as rotated, its output, and that as the last product reads it; where it is
    gated, the gate's sigmoid. The SwiGLU keeps gate and up, the silu, and the product.
    """
    d, hidden = block.mlp.gate_up.in_features, block.mlp.out.in_features
    gated = block.attention.qkv.out_features == 4 * d
    return block.attention.qkv.out_features + (8 + gated + 5 * (block.cross is not None)) * d + 4 * hidden


def measured(config: Config, vocab_size: int, device: torch.device, flops: float) -> dict[str, str]:
    """Rows of what a few steps of one worker take. flops: of a micro-batch."""
    train = config.train
    try:
        seconds, tokens = step_seconds(config, vocab_size, device)
    except torch.OutOfMemoryError as error:
        return {
            "time": f"not measured: the largest batch does not fit one GPU: {str(error).partition(' If reserved')[0]}"
        }
    rate, peak = tokens / seconds, None if train.lora.rank else matrix_peak(device, train.mixed_precision)
    hours = train.steps * seconds / 3600
    where, mfu = "CPU", ""
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {size(torch.cuda.max_memory_allocated(device))} of memory"
        mfu = f", mfu {flops * train.grad_accum_steps / seconds / peak:.3f}" if peak else ""
    workers = config.ray.workers.most
    alone = f" of {workers} workers, if they cost one another nothing" if workers > 1 else ""
    return {
        "measured": f"{rate:,.0f} tokens/s{mfu} ({where})",
        "time": f"{train.steps:,} steps of {seconds:.3g} s: {hours:,.2f} hours{alone}",
    }


def step_seconds(config: Config, vocab_size: int, device: torch.device) -> tuple[float, int]:
    """Seconds of a step of the largest micro-batches, and the tokens that one worker reads in it."""
    state = build_state(config, vocab_size, device)
    state.step = config.model.hrm.backprop_warmup_steps
    stats = Stats(state)
    batches = [batch_of(state, ByteTokenizer(), *lengths_of(config), rows_of(config))] * config.train.grad_accum_steps
    start = 0.0
    for i in range(3 + MEASURED):
        if i == 3:
            stats.read()  # waits for the device
            start = time.perf_counter()
        train_step(state, batches, stats)
    tokens = stats.read()["tokens"]
    return (time.perf_counter() - start) / MEASURED, int(tokens) // MEASURED


def size(count: float) -> str:
    """Bytes as a reader takes them in."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
