"""The formula of training FLOPs against PyTorch's own count, and the share of a device's peak that is made of it."""

import pytest
from conftest import small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hrm_lm.config import Cycles
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.data.tokenizer import ByteTokenizer
from hrm_lm.models.build import build_model
from hrm_lm.training.flops import interval_flops, known_peak, training_flops

VOCABULARY = 24


def counted(model, batch, cycles, backprop_steps) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # whose backward recomputes nothing
        sum(prediction.losses.sum() for prediction in model(batch, cycles, backprop_steps).predictions).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("response", [1, 5])
@pytest.mark.parametrize(
    "fields, backprop_steps",
    [
        ({}, None),
        ({"hrm__deep_supervision": 0.5}, 3),
        ({"hrm__h_cycles": 0}, None),
        ({"hrm__h_layers": 2, "encoder_layers": 0, "decoder_layers": 2}, 4),
        ({"bridge__type": "prefix", "bridge__prefix_len": 3}, None),
    ],
)
@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_the_formula_is_what_pytorch_counts(architecture, fields, backprop_steps, response):
    fields = {f"model__{name}": value for name, value in fields.items()}
    config = small_config(model__architecture=architecture, **fields).model
    model = build_model(config, VOCABULARY)
    samples, prompt, C = 3, 7, config.d_model
    rows = Ragged.of([Sample([3] * prompt, [4] * (response - 1)) for _ in range(samples)])  # EOS is a label, too
    batch = model.collate(rows, ByteTokenizer())
    cycles = Cycles(config.hrm.h_cycles and 3, 2)
    formula = training_flops(model, int(batch.num_tokens), samples * response, samples, cycles, backprop_steps)
    real = counted(model, batch, cycles, backprop_steps)

    # PyTorch multiplies with what a mask hides: all pairs of a sample's tokens.
    tokens = prompt + response - 1
    hidden = tokens**2 - (prompt**2 + sum(prompt + i for i in range(1, response)))
    if architecture == "prefix_lm":
        blocks = config.hrm.h_layers + config.hrm.l_layers
        passes = 3 * blocks
        if cycles.h:
            total = cycles.h * (cycles.l + 1)
            h = min(cycles.h, (backprop_steps or total) - 1)  # of H, the applications with gradient
            l = (backprop_steps or total) - h
            passes = config.hrm.h_layers * (cycles.h + 2 * h) + config.hrm.l_layers * (cycles.h * cycles.l + 2 * l)
    else:
        positions = response + (config.bridge.prefix_len if config.bridge.type == "prefix" else 0)
        hidden = positions * (positions - 1) // 2
        passes = 3 * config.decoder_layers * (cycles.h if config.hrm.deep_supervision else 1)
    assert formula == real - 4 * C * samples * hidden * passes


def test_an_interval_counts_the_cycles_that_its_steps_drew():
    config = small_config(train__sample_h_cycles=[1, 3], model__hrm__backprop_warmup_steps=8)
    model, amounts = build_model(config.model, VOCABULARY), (100, 30, 10)
    steps = [interval_flops(model, config, range(i, i + 1), *amounts) for i in range(20)]
    assert len(set(steps)) > 3
    assert interval_flops(model, config, range(20), *amounts) == pytest.approx(sum(steps) / 20)


@pytest.mark.parametrize(
    "name, precision, tf32, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989e12),
        ("NVIDIA H100 80GB HBM3", "none", False, 67e12),
        ("NVIDIA H100 PCIe", "bf16", False, 756e12),
        ("NVIDIA H200", "fp16", False, 989e12),
        ("NVIDIA A100-SXM4-80GB", "none", True, 156e12),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, None),
        ("NVIDIA H20", "bf16", False, None),
    ],
)
def test_a_device_has_the_peak_of_its_name_or_no_peak(name, precision, tf32, peak):
    assert known_peak(name, precision, tf32) == peak
