"""`train.mixed_precision: fp8`: the products' accuracy, and that a run in float8 is a run like any other."""

import copy
import math
import sys

import pytest
import torch
from conftest import (
    LocalSession,
    assert_resumes_exactly,
    batches_of,
    small_config,
    train_locally,
)
from torch import nn

from hrm_lm.data.collate import to_device
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import UserError
from hrm_lm.models.float8 import (
    E4M3,
    E5M2,
    Float8Linear,
    cast_silu_mul_both,
    cast_silu_mul_gradient_both,
    largest_silu_mul,
    largest_silu_mul_gradient,
    recast,
    to_float8_both,
    use_float8,
)
from hrm_lm.models.layers import Block, SwiGLU, rotary, silu_mul, silu_mul_gradient
from hrm_lm.training.step import Stats, build_state, train_step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of a from b, relative to b."""
    return float((a.detach().float() - b).norm() / b.norm())


def layer_and_reference(device: str) -> tuple[Float8Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = Float8Linear(nn.Linear(96, 160, bias=False, device=device))
    recast(layer)
    return layer, layer.weight.detach()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4, 16), (3, 7), (1, 1)], ids=str)  # the last two are no multiple of 16
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_products_in_float8_are_close_to_float32_whatever_the_number_of_tokens_and_their_scale(device, shape, scale):
    layer, weight = layer_and_reference(device)
    x = (torch.randn(*shape, 96, device=device) * scale).bfloat16().requires_grad_()
    gradient = torch.randn(*shape, 160, device=device) * 1e-6
    y = layer(x)
    y.backward(gradient.bfloat16())
    assert y.dtype == x.grad.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    rows, gradients = x.detach().float().flatten(0, 1), gradient.flatten(0, 1)
    found = {
        "y": distance(y.flatten(0, 1), rows @ weight.T),
        "gradient of x": distance(x.grad.flatten(0, 1), gradients @ weight),
        "gradient of weight": distance(layer.weight.grad, gradients.T @ rows),
    }
    assert max(found.values()) < 0.09 and min(found.values()) > 0.005, found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shape", [(4, 16), (3, 7)], ids=str)
def test_swiglu_in_float8_is_close_to_float32(device, sharded, shape):
    torch.manual_seed(0)
    model = nn.Sequential(SwiGLU(96, 4.0)).to(device)
    if sharded:
        model.bfloat16()  # as gathered weights are
    exact = copy.deepcopy(model).float()
    use_float8(model, torch.device(device), sharded)
    recast(model)
    x = torch.randn(*shape, 96, device=device)
    rough, right = x.bfloat16().requires_grad_(), x.clone().requires_grad_()
    gradient = torch.randn_like(x)
    y, expected = model(rough), exact(right)
    y.backward(gradient.bfloat16()), expected.backward(gradient)
    with torch.no_grad():
        assert distance(model(rough), y.detach().float()) < 0.02, "the same without gradient, but for rounding"
    found = {"y": distance(y, expected.detach()), "x": distance(rough.grad, right.grad)}
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        found[name] = distance(p.grad, q.grad)
    assert max(found.values()) < 0.12 and min(found.values()) > 0.01, found


@pytest.mark.slow  # a compiler runs
@pytest.mark.parametrize("sharded", [False, True])
def test_a_block_compiles_in_one_piece(sharded):
    torch._dynamo.reset()
    block = Block(64, 4, 4.0, hrm_text=True)
    use_float8(block, torch.device("cpu"), sharded)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(block, backend="aot_eager", fullgraph=True)(x, rotary(torch.arange(16), 16))
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_cast_from_bf16_as_sharded_ones_are(device):
    layer, weight = layer_and_reference(device)
    for cast, expected in zip(layer.copies, to_float8_both(weight.bfloat16(), E4M3), strict=True):
        assert torch.equal(cast.float(), expected.float())


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_learn_multiplies_in_bf16(device):
    layer, weight = layer_and_reference(device)
    x = torch.randn(5, 96, device=device)
    layer.eval()
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(layer(x), nn.functional.linear(x, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("learns", [True, False])
def test_a_number_that_is_not_finite_stays_so(device, bad, learns):
    layer, _ = layer_and_reference(device)
    x = torch.randn(16, 96, device=device)
    x[3, 5] = bad
    with torch.set_grad_enabled(learns):
        assert not layer(x).isfinite().all()


def losses_of(device: str = "cpu", steps: int = 40, **fields) -> list[float]:
    """Of each step of a run on a few samples."""
    config = small_config(train__steps=steps, optim__lr=3e-3, **fields)
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size, torch.device(device))
    stats, losses = Stats(state), []
    for batches in batches_of(splits, config, collate=state.model.collate):
        train_step(state, [to_device(batch, state.device) for batch in batches], stats)
        losses.append(stats.read()["loss"])
    return losses


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_the_loss_follows_that_of_bf16(architecture):
    fields = {"model__architecture": architecture, "model__d_model": 32}
    float8, bf16 = (torch.tensor(losses_of(train__mixed_precision=p, **fields)) for p in ("fp8", "bf16"))
    assert not torch.equal(float8, bf16)
    assert bf16[-1] < bf16[0] - 0.5, "there is something to follow"
    assert (float8 - bf16).abs().max() < 0.1, (float8, bf16)


@pytest.mark.slow  # a compiler runs
def test_losses_of_compiled_steps_on_a_cpu_are_finite():
    """Those of this width were not."""
    fields = {"model__architecture": "prefix_lm", "model__d_model": 64, "model__n_heads": 4}
    assert all(map(math.isfinite, losses_of(steps=2, train__mixed_precision="fp8", train__compile=True, **fields)))


def test_a_run_that_is_stopped_resumes_exactly_and_its_checkpoints_are_those_of_bf16(tmp_path):
    fields = {"train__val_every": 2, "train__steps": 6, "train__ema_decay": 0.9}
    run = assert_resumes_exactly(small_config(train__mixed_precision="fp8", **fields), tmp_path, 4)
    other = train_locally(small_config(train__mixed_precision="bf16", **fields), tmp_path / "bf16", 4)
    assert run.last_weights().keys() == other.last_weights().keys()
    # A run may go on in the other precision.
    resumed = train_locally(small_config(train__mixed_precision="fp8", **fields), tmp_path / "bf16")
    assert resumed.reports[-1]["step"] == 6
    assert resumed.reports[-1]["val_loss"] == pytest.approx(run.reports[-1]["val_loss"], abs=0.05)


def test_a_step_multiplies_by_the_weights_that_it_finds():
    """As after a rollback, which puts earlier weights in the place of those that a step left."""
    config = small_config(train__mixed_precision="fp8")
    splits = load_dataset(config.data, config.model, 0)
    first, second, *_ = batches_of(splits, config)
    state, other = (build_state(config, splits.tokenizer.vocab_size) for _ in range(2))
    stats = Stats(state)
    train_step(state, first, stats)
    stats.read()
    with torch.no_grad():
        for p, initial in zip(state.model.parameters(), other.model.parameters(), strict=True):
            p.copy_(initial)
    train_step(state, second, stats)
    expected = Stats(other)
    train_step(other, second, expected)
    assert stats.read()["loss"] == expected.read()["loss"]


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"fp8 needs a model.d_model \(24\) that is a multiple of 16"):
        small_config(train__mixed_precision="fp8", model__d_model=24)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match="fp8 needs a GPU of compute capability 8.9 or more .*, and A100 has 8.0"):
        use_float8(SwiGLU(16, 4.0), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="fp8 needs Triton"):
        use_float8(SwiGLU(16, 4.0), torch.device("cuda"))


# --- on a GPU ----------------------------------------------------------------------------------------------------

MODEL = {"model__d_model": 128, "model__n_heads": 4, "model__architecture": "prefix_lm"}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 16), (160, 96), (96, 352), (1040, 2816), (32_768, 5632)], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_kernel_casts_as_pytorch_does(shape, dtype, transposed):
    x = torch.randn(shape, device="cuda").bfloat16()
    x = x.t() if transposed else x
    x[-1, -1] = x.abs().amax() * 2  # the last value fills the range
    rows, columns, scale = to_float8_both(x, dtype)
    expected = (x.float() * (torch.finfo(dtype).max / x.abs().amax().float())).to(dtype).contiguous()
    assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(columns.view(torch.uint8), expected.view(torch.uint8).t())
    assert float(scale) == pytest.approx(float(x.abs().amax()) / torch.finfo(dtype).max)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 16), (160, 96), (1040, 2816), (32_768, 2816)], ids=str)
def test_the_kernels_of_swiglu_find_and_cast_what_pytorch_computes(shape):
    gate_up = torch.randn(shape[0], 2 * shape[1], device="cuda").bfloat16()
    gradient = torch.randn(shape, device="cuda").bfloat16()
    h, d = silu_mul(gate_up.float()), silu_mul_gradient(gate_up.float(), gradient.float())
    torch.testing.assert_close(largest_silu_mul(gate_up), h.abs().amax())
    torch.testing.assert_close(largest_silu_mul_gradient(gate_up, gradient), d.abs().amax())
    factor = torch.tensor(20.0, device="cuda")
    for (rows, columns), exact, dtype in (
        (cast_silu_mul_both(gate_up, factor, E4M3), h, E4M3),
        (cast_silu_mul_gradient_both(gate_up, gradient, factor, E5M2), d, E5M2),
    ):
        expected = (exact.bfloat16().float() * factor).to(dtype).float()
        # A value between two float8 values may be rounded to either, where its sigmoid differs in the last bit.
        assert (rows.float() != expected).float().mean() < 0.01, (rows.float() - expected).abs().max()
        assert distance(rows, expected) < 0.02
        assert torch.equal(columns.view(torch.uint8), rows.view(torch.uint8).t())


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_the_kernels_of_swiglu_find_what_is_not_finite(bad):
    gate_up = torch.randn(48, 64, device="cuda").bfloat16()
    gradient = torch.randn(48, 32, device="cuda").bfloat16()
    gate_up[7, 40] = bad  # an up
    assert not largest_silu_mul(gate_up).isfinite()
    assert not largest_silu_mul_gradient(gate_up, gradient).isfinite()


@pytest.mark.gpu
@pytest.mark.slow  # a compiler runs
@pytest.mark.parametrize(
    "sizes", [{}, {"train__length_window": 64, "data__synthetic__max_digits": 2}], ids=["fixed", "lengths"]
)
def test_the_loss_of_compiled_steps_follows_that_of_bf16(sizes):
    fields = MODEL | sizes | {"train__compile": True, "train__cuda_graphs": False}
    float8, bf16 = (torch.tensor(losses_of("cuda", train__mixed_precision=p, **fields)) for p in ("fp8", "bf16"))
    assert not torch.equal(float8, bf16)
    assert (float8 - bf16).abs().max() < 0.15, (float8, bf16)


@pytest.mark.gpu
@pytest.mark.slow  # a compiler runs
@pytest.mark.parametrize("memory", [1.0, 0.3])
def test_compiled_steps_as_cuda_graphs_lose_what_eager_steps_do(memory):
    fields = MODEL | {"train__compile": True, "train__activation_memory": memory, "train__mixed_precision": "fp8"}
    graphs, eager = (torch.tensor(losses_of("cuda", train__cuda_graphs=on, **fields)) for on in (True, False))
    torch.testing.assert_close(graphs, eager, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_run_on_a_gpu_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalSession, "device", torch.device("cuda"))
    assert_resumes_exactly(small_config(train__mixed_precision="fp8", train__val_every=2, train__steps=6), tmp_path, 4)
