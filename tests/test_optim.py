"""The optimizers, by themselves and in a training step; and what a GPU asks of them."""

import math

import pyarrow.fs
import pytest
import torch
import yaml
from conftest import assert_resumes_exactly, assert_same_weights, batches_of, small_config
from safetensors.torch import load_file

from hrm_lm.config import OptimConfig
from hrm_lm.data.loading import prefetch
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import UserError
from hrm_lm.training.checkpoint import Progress, Snapshot, load_state, obstacles, read_checkpoint
from hrm_lm.training.optim import (
    AdamAtan2,
    Muon,
    WeightAverage,
    build_optimizer,
    foreach_atan2,
    orthogonalized,
)
from hrm_lm.training.step import Stats, build_state, train_step
from hrm_lm.tuning.space import Sweep

CAPTURABLE = pytest.mark.parametrize("capturable", [False, True])


def named(state, group):
    names = {p: name for name, p in state.model.named_parameters()}
    return {names[p] for p in group["params"]}


def test_norms_gates_and_embeddings_are_not_decayed():
    state = build_state(small_config(), 20)
    decayed, others = (named(state, group) for group in state.optimizer.param_groups)
    assert all(
        name.endswith((".qkv.weight", ".out.weight", ".q.weight", ".kv.weight", ".gate_up.weight", "head.weight"))
        for name in decayed
    )
    assert {"embedding.weight", "norm.weight", "bridge.gate"} <= others


# --- Adam-atan2 --------------------------------------------------------------------------------------------------


def adam_atan2_weights(scale=1.0, capturable=False, lr=0.1, steps=5):
    generator, p = torch.Generator().manual_seed(0), torch.nn.Parameter(torch.linspace(-1, 1, 8))
    optimizer = AdamAtan2([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, capturable=capturable)
    optimizer.param_groups[0]["lr"] = lr
    gradients = [torch.randn(8, generator=generator) for _ in range(steps)]
    for gradient in gradients:
        p.grad = gradient * scale
        optimizer.step()
    return p.detach(), gradients


@CAPTURABLE
def test_adam_atan2_takes_the_steps_of_its_formula(capturable):
    p, m, v = torch.linspace(-1, 1, 8), torch.zeros(8), torch.zeros(8)
    result, gradients = adam_atan2_weights(capturable=capturable)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p * (1 - 0.1 * 0.1) - 0.1 / (1 - 0.9**t) * torch.atan2(m, (v / (1 - 0.95**t)).sqrt())
    torch.testing.assert_close(result, p)


@CAPTURABLE
def test_adam_atan2_does_not_see_the_scale_of_the_gradient(capturable):
    small, large = (adam_atan2_weights(scale, capturable)[0] for scale in (2.0**-40, 1.0))
    torch.testing.assert_close(small, large)
    assert adam_atan2_weights(0.0, capturable)[0].isfinite().all()


def test_adam_atan2_on_the_cpu_keeps_its_results_bit_for_bit():
    p, m, v = torch.linspace(-1, 1, 8), torch.zeros(8), torch.zeros(8)
    result, gradients = adam_atan2_weights()
    for t, g in enumerate(gradients, start=1):
        p.mul_(1 - 0.1 * 0.1)
        m.lerp_(g, 1 - 0.9)
        v.mul_(0.95).addcmul_(g, g, value=1 - 0.95)
        root = v.sqrt().div_(math.sqrt(1 - 0.95**t))
        p.add_(torch.atan2(m, root), alpha=-0.1 / (1 - 0.9**t))
    assert torch.equal(result, p)


def test_adam_atan2_takes_its_learning_rate_from_a_tensor_and_reads_no_tensor_back(monkeypatch):
    with_a_number = adam_atan2_weights(capturable=True)[0]
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("a GPU would be waited for"))
    torch.testing.assert_close(adam_atan2_weights(capturable=True, lr=torch.tensor(0.1))[0], with_a_number)


def test_the_atan_of_the_ratio_is_atan2_where_moments_are_zero_too():
    m = torch.tensor([0.0, -0.0, 1e-20, -1e-20, 1.0, -3.0, 2.0**-30, 5.0])
    root = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1e-15, 1.0, 2.0**-40])
    (angles,) = foreach_atan2([m], [root**2], torch.tensor(1.0))
    torch.testing.assert_close(angles, torch.atan2(m, root), rtol=1e-6, atol=0)


def test_a_step_with_an_infinite_gradient_changes_nothing_and_reads_no_tensor_back(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("a GPU would be waited for"))
    p, plain = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    scaled, unscaled = (AdamAtan2([q], lr=0.1, weight_decay=0.1, capturable=True) for q in (p, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (math.inf, math.nan, 1.0, -math.inf, 1.0):
        before, gradient = p.detach().clone(), torch.linspace(1, -2, 8)
        gradient[3] *= bad
        scaler.scale((p * gradient).sum()).backward()
        scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        p.grad = None
        if bad == 1.0:
            plain.grad = gradient
            unscaled.step()
        else:
            assert torch.equal(p, before)
    torch.testing.assert_close(p, plain)
    assert torch.equal(scaled.state[p]["step"], torch.tensor(2.0))
    for slot in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(scaled.state[p][slot], unscaled.state[plain][slot])


# --- Muon --------------------------------------------------------------------------------------------------------


def muon(params, parts=1, lr=0.1):
    other = torch.nn.Parameter(torch.zeros(3))  # AdamW wants parameters
    return Muon(dict.fromkeys(params, parts), [{"params": [other]}], lr, 0.1, (0.9, 0.95), 1e-8, fused=False)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_muon_takes_the_steps_of_pytorchs_as_far_as_bfloat16_goes(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    pytorchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = muon([ours])
    for i in range(4):
        ours.grad, theirs.grad = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for _ in range(2))
        optimizer.step()
        pytorchs.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_muon_cuts_a_fused_projection_into_its_matrices():
    generator = torch.Generator().manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(48, 16, generator=generator))
    cut = [torch.nn.Parameter(piece) for piece in fused.detach().clone().split(16)]
    optimizers = muon([fused], parts=3), muon(cut)
    scales = torch.tensor([1.0, 1e-3, 1e3]).repeat_interleave(16)[:, None]
    for _ in range(3):
        fused.grad = torch.randn(48, 16, generator=generator) * scales
        for p, gradient in zip(cut, fused.grad.split(16)):
            p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in cut]))


def test_orthogonalized_matrices_have_singular_values_near_one_and_zero_stays_zero():
    matrices = (
        torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-9, 1, 1e9])[:, None, None]
    )
    values = torch.linalg.svdvals(orthogonalized(matrices))
    assert values.min() > 0.6 and values.max() < 1.25
    assert not orthogonalized(torch.zeros(1, 4, 8)).any()


@pytest.mark.parametrize("architecture, fused", [("encoder_decoder", 3), ("prefix_lm", 4)])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(architecture, fused):
    state = build_state(small_config(optim__name="muon", model__architecture=architecture), 20)
    *matrices, decayed, others = state.optimizer.param_groups
    parts = {name.split(".")[-2]: group["parts"] for group in matrices for name in named(state, group)}
    expected = {"qkv": fused, "out": 1, "gate_up": 2} | ({"q": 1, "kv": 2} if architecture == "encoder_decoder" else {})
    assert parts == expected
    assert named(state, decayed) == {"head.weight"} and decayed["weight_decay"] > 0
    assert "embedding.weight" in named(state, others) and not others["weight_decay"]
    every = [name for group in state.optimizer.param_groups for name in named(state, group)]
    assert sorted(every) == sorted(name for name, _ in state.model.named_parameters())


def test_a_run_with_muon_learns_and_resumes_bit_for_bit(tmp_path):
    config = small_config(optim__name="muon", train__val_every=4, train__ema_decay=0.5, train__steps=20)
    session = assert_resumes_exactly(config, tmp_path, 4, 12)
    assert session.reports[-1]["val_loss"] < session.reports[0]["val_loss"] - 0.1
    slots = load_file(session.last_checkpoint / "optimizer.safetensors")
    assert "momentum_buffer/core.h_stack.blocks.0.mlp.out.weight" in slots and "exp_avg/head.weight" in slots
    assert "exp_avg/core.h_stack.blocks.0.mlp.out.weight" not in slots


def test_muon_is_a_choice_of_a_sweep_and_does_not_go_with_fp16(tmp_path):
    space = {"optim.name": {"choice": ["adamw", "adam_atan2", "muon"]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"search_space": space, "tune": {"scheduler": "fifo"}}))
    assert Sweep(str(tmp_path / "sweep.yaml")).space["optim.name"] == ("choice", ["adamw", "adam_atan2", "muon"])
    with pytest.raises(UserError, match="train.mixed_precision: fp16 does not go with optim.name muon"):
        small_config(optim__name="muon", train__mixed_precision="fp16")


def test_a_run_may_change_from_one_adam_to_the_other_but_not_to_muon():
    assert obstacles(small_config(), small_config(optim__name="adam_atan2")) == {}
    assert obstacles(small_config(), small_config(optim__name="muon")) == {"optim.name": ("adamw", "muon")}


# --- on a GPU ----------------------------------------------------------------------------------------------------


def on_gpu(name, mixed_precision="none", steps=0, **options):
    """A state on the GPU that has taken `steps` steps, its statistics, and the batches that come next."""
    config = small_config(optim__name=name, train__mixed_precision=mixed_precision, **options)
    splits, device = load_dataset(config.data, config.model, 0), torch.device("cuda")
    state = build_state(config, splits.tokenizer.vocab_size, device)
    stats, batches = Stats(state), list(prefetch(batches_of(splits, config, collate=state.model.collate), device))
    for micro_batches in batches[:steps]:
        train_step(state, micro_batches, stats)
    return state, stats, batches[steps:]


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
@pytest.mark.parametrize(
    "name, mixed_precision",
    [("adamw", "fp16"), ("adam_atan2", "fp16"), ("adam_atan2", "bf16"), ("muon", "bf16"), ("muon", "none")],
)
def test_a_step_never_waits_for_the_gpu(name, mixed_precision, architecture):
    options = {"train__ema_decay": 0.5, "train__grad_clip": 1.0, "model__architecture": architecture}
    state, stats, batches = on_gpu(name, mixed_precision, steps=2, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for micro_batches in batches[:3]:
            train_step(state, micro_batches, stats)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(stats.read()["loss"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adam_atan2"])
def test_fp16_skips_the_steps_that_overflow_and_trains_on(name):
    state, stats, batches = on_gpu(name, "fp16")
    state.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**120)  # overflows in the first steps
    before = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    train_step(state, batches[0], stats)
    assert_same_weights(before, {n: p.detach() for n, p in state.model.named_parameters()})
    state.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    for micro_batches in batches[1:]:
        train_step(state, micro_batches, stats)
    counts = {float(slots["step"]) for slots in state.optimizer.state.values()}
    assert counts == {11.0}, f"steps that were taken, of 12: {counts}"
    assert math.isfinite(stats.read()["loss"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adam_atan2", "muon"])
def test_optimizer_and_average_captured_as_a_graph_do_what_they_do_uncaptured(name):
    """The learning rate changes between replays, which is what a tensor is for."""
    weights = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = build_state(small_config(optim__name=name), 20, torch.device("cuda")).model
        config = OptimConfig(name=name, lr=0.1)
        optimizer, average = build_optimizer(model, config, torch.device("cuda")), WeightAverage(model, 0.5)
        lr = torch.zeros((), device="cuda")
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = lr, True
        gradients = [torch.randn_like(p) for p in model.parameters()]

        def step():
            for p, gradient in zip(model.parameters(), gradients):
                p.grad = gradient.clone()
            optimizer.step()
            average.update()

        side = torch.cuda.Stream()  # as PyTorch wants it: the first step, which makes the state, before the capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            lr.fill_(0.1)
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for rate in (0.05, 0.01, 0.0):
            lr.fill_(rate)
            graph.replay() if captured else step()
        weights.append(
            {n: p.detach().clone() for n, p in model.named_parameters()}
            | {f"average.{n}": tensor.clone() for n, tensor in average.tensors.items()}
        )
    assert_same_weights(*weights, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name, tolerance", [("adamw", 1e-4), ("adam_atan2", 1e-4), ("muon", 0.02)])
def test_an_optimizer_on_a_gpu_takes_the_steps_that_it_takes_on_the_cpu(name, tolerance):
    weights = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model = build_state(small_config(), 20).model.to(device)
        start = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01), device)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]) - start)
    difference = ((weights[0] - weights[1]).norm() / weights[0].norm()).item()
    assert difference < tolerance, f"the way that was gone differs by {difference:.2e} of its length"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adam_atan2", "muon"])
def test_a_checkpoint_from_a_gpu_goes_on_there_and_on_the_cpu(name, tmp_path):
    state, _, _ = on_gpu(name, steps=3)
    splits = load_dataset(state.config.data, state.config.model, 0)
    snapshot = Snapshot(state, splits.tokenizer)
    snapshot.take(Progress(step=3))
    snapshot.write(pyarrow.fs.LocalFileSystem(), str(tmp_path))
    gradients = {n: torch.randn(p.shape) for n, p in state.model.named_parameters()}
    weights = []
    for device in ("cuda", "cuda", "cpu"):
        if weights:  # the first is the state itself
            state = build_state(state.config, splits.tokenizer.vocab_size, torch.device(device))
            load_state(read_checkpoint(tmp_path, for_resume=True), state)
        for group in state.optimizer.param_groups:
            group["lr"] = 1e-3
        for n, p in state.model.named_parameters():
            p.grad = gradients[n].to(device, copy=True)
        state.optimizer.step()
        weights.append({n: p.detach().cpu() for n, p in state.model.named_parameters()})
    assert_same_weights(weights[0], weights[1])
    assert_same_weights(weights[0], weights[2], atol=1e-3 if name == "muon" else 1e-6, rtol=1e-3)
