"""Model FLOPs of training, and the share of a device's matrix peak that they make: `mfu` (PaLM, arXiv 2204.02311, app. B).

Counted are the matrix products and attention of what was trained. A forward pass counts once, and a backward pass twice
as much: once for the gradient of what a product reads, once for that of its weights. Applications without gradient count
their forward pass alone. Attention counts the pairs of a token and what it may see. Not counted are norms and other
elementwise work, padding, and what `train.activation_memory` or the loss computes a second time.
"""

import re
from collections import Counter

import torch
from torch import nn

from hrm_lm.config import Config, Cycles
from hrm_lm.models.contract import LanguageModel, Precision
from hrm_lm.models.encoder_decoder import HRMEncoderDecoder
from hrm_lm.models.hrm import HRMCore, carries_gradient
from hrm_lm.models.layers import Stack
from hrm_lm.models.prefix_lm import HRMPrefixLM, TokenStream
from hrm_lm.models.puzzle import HRMPuzzle
from hrm_lm.training.step import backprop_steps_of, cycles_of

# Dense TFLOP/s of matrix products in bf16 or fp16 (summed in float32), in TF32 and in float32, after NVIDIA's data sheets
# (half of what these give "with sparsity"). A device is the first row whose words are all in its name.
PEAKS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500, 1250, 80),
    "B200": (2250, 1100, 75),
    "GH200": (989, 494, 67),
    "H200 NVL": (835, 417, 60),
    "H200": (989, 494, 67),
    "H100 PCIE": (756, 378, 51),
    "H100 NVL": (835, 417, 60),
    "H100": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "A10": (125, 62.5, 31.2),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}
SMALLER = {"LAPTOP", "D", "MIG"}
"""Words of the names of devices that share a name with a larger one."""


def matrix_peak(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s that the device's matrix units can do at most in that precision; None where it is not known, and on CPU.

    With fp8 it is the peak of bf16, in which attention and the head still multiply: an `mfu` of fp8 compares with one of
    bf16, and says nothing about the units of float8.
    """
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), precision, torch.get_float32_matmul_precision() != "highest")


def known_peak(name: str, precision: Precision, tf32: bool) -> float | None:
    """Of a device of that name. tf32: whether products of float32 matrices may be computed in TF32."""
    words = set(re.findall(r"\w+", name.upper()))
    column = 0 if precision != "none" else 1 if tf32 else 2
    for listed, peaks in PEAKS.items():
        if words >= set(listed.split()) and not words & SMALLER:
            return peaks[column] * 1e12
    return None


def interval_flops(
    model: LanguageModel, config: Config, steps: range, tokens: float, labels: float, samples: float
) -> float:
    """Of optimisation steps `steps`, which read so much together: the mean over the cycles that these steps drew."""
    drawn = Counter(
        (cycles, backprop_steps_of(config.model.hrm, step, cycles))
        for step in steps
        for cycles in [cycles_of(config, step)]
    )
    flops = (count * training_flops(model, tokens, labels, samples, *how) for how, count in drawn.items())
    return config.train.segments * sum(flops) / len(steps)


def training_flops(
    model: LanguageModel, tokens: float, labels: float, samples: float, cycles: Cycles, backprop_steps: int | None
) -> float:
    """Of one forward and backward pass over `samples` samples, which have so many tokens to read and so many labels.

    tokens, labels: as `Stats` sums them. Attention is computed for samples that are all as long as the mean. So it is
    exact where they are, and mostly too low where lengths differ, since attention grows with the square.
    """
    count = {HRMPrefixLM: _prefix_lm, HRMEncoderDecoder: _encoder_decoder, HRMPuzzle: _puzzle}[type(model)]
    return count(model, tokens, labels, max(samples, 1), cycles, backprop_steps)


def linear_weights(*modules: nn.Module) -> int:
    """Elements of the matrices that a token is multiplied with on its way through these modules."""
    return sum(m.weight.numel() for module in modules for m in module.modules() if isinstance(m, nn.Linear))


def _stack(stack: Stack, tokens: float, pairs: float, d_model: int) -> float:
    """Forward FLOPs of one application. pairs: of a token and what it may see; each is a product of queries with keys,
    and of weights with values."""
    return 2 * linear_weights(stack) * tokens + 4 * d_model * pairs * len(stack.blocks)


def _core(
    core: HRMCore, tokens: float, pairs: float, d_model: int, cycles: Cycles, backprop_steps: int | None
) -> float:
    l_carries, h_carries = carries_gradient(cycles, backprop_steps)
    l_passes = sum(3 if carries else 1 for row in l_carries for carries in row)
    h_passes = sum(3 if carries else 1 for carries in h_carries)
    forward_l, forward_h = (_stack(stack, tokens, pairs, d_model) for stack in (core.fast, core.h_stack))
    return l_passes * forward_l + h_passes * forward_h


def _read_states(model: LanguageModel, cycles: Cycles, backprop_steps: int | None) -> list[bool]:
    """Of each of the core's outputs that predictions are made of: whether it carries gradient."""
    if model.core is None or not model.config.hrm.deep_supervision:
        return [True]
    return carries_gradient(cycles, backprop_steps)[1]


def _prefix_lm(
    model: HRMPrefixLM, tokens: float, labels: float, samples: float, cycles: Cycles, backprop_steps: int | None
) -> float:
    if model.stream.causal:  # which labels there are is another matter
        return _stream(model, tokens, labels, tokens * (tokens / samples + 1) / 2, cycles, backprop_steps)
    response = labels / samples - 1  # its tokens that are read: the last is a label alone
    prompt = tokens / samples - response
    pairs = samples * (prompt * prompt + prompt * response + response * (response + 1) / 2)
    return _stream(model, tokens, labels, pairs, cycles, backprop_steps)


def _puzzle(
    model: HRMPuzzle, tokens: float, labels: float, samples: float, cycles: Cycles, backprop_steps: int | None
) -> float:
    return _stream(model, tokens, labels, tokens * tokens / samples, cycles, backprop_steps)


def _stream(
    model: TokenStream, tokens: float, labels: float, pairs: float, cycles: Cycles, backprop_steps: int | None
) -> float:
    C = model.config.d_model
    if model.stack is not None:
        flops = 3 * _stack(model.stack, tokens, pairs, C)
    else:
        assert model.core is not None
        flops = _core(model.core, tokens, pairs, C, cycles, backprop_steps)
    head = 2 * linear_weights(model.head) * labels
    return flops + sum((3 if carries else 2) * head for carries in _read_states(model, cycles, backprop_steps))


def _encoder_decoder(
    model: HRMEncoderDecoder, tokens: float, labels: float, samples: float, cycles: Cycles, backprop_steps: int | None
) -> float:
    C, bridge = model.config.d_model, model.bridge
    prompts = tokens - labels  # tokens; the decoder reads as many as there are labels
    prompt, response = prompts / samples, labels / samples
    flops = 3 * _stack(model.encoder, prompts, samples * prompt**2, C)
    if model.core is not None:
        flops += _core(model.core, prompts, samples * prompt**2, C, cycles, backprop_steps)

    # What reads the core's states (keys and values), what makes a decoder's queries of them, and the decoder.
    prefix = model.config.bridge.prefix_len if model.config.bridge.type == "prefix" else 0
    crossing = [bridge.pool] if prefix else [block.cross for block in model.decoder]
    reading = 2 * linear_weights(*(cross.kv for cross in crossing)) * prompts
    asking = linear_weights(*(module for cross in crossing for module in (cross.q, cross.out)))
    own = linear_weights(*(module for block in model.decoder for module in (block.attention, block.mlp)))
    asked = prefix or response  # queries of each sample
    positions = prefix + response
    decoder = 2 * samples * (asking * asked + own * positions) + 2 * linear_weights(model.head) * labels
    decoder += 4 * C * samples * len(crossing) * asked * prompt
    decoder += 4 * C * samples * len(model.decoder) * positions * (positions + 1) / 2
    for carries in _read_states(model, cycles, backprop_steps):
        flops += 3 * decoder + (3 if carries else 2) * reading
    return flops
