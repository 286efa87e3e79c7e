"""Steps as CUDA graphs: which steps share a graph, and that replays train as eager steps do.

Without a GPU a replay runs the captured step again on the tensors that it was captured with, which is what a graph does.
"""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    LocalSession,
    assert_resumes_exactly,
    assert_same_weights,
    batches_of,
    small_config,
    train_locally,
)

from hrm_lm.data.collate import TokenRows, to_device
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import UserError
from hrm_lm.training import graphs, step
from hrm_lm.training.graphs import StepGraphs
from hrm_lm.training.step import Stats, build_state, learning_rate, train_step

KINDS = {
    "encoder_decoder": {},
    "lengths": {"data__synthetic__max_digits": 2, "data__synthetic__num_samples": 500},
    "prefix_lm": {"model__architecture": "prefix_lm"},
    "sampled_cycles": {"train__sample_h_cycles": [1, 3]},
    "window_and_gate": {
        "model__hrm__backprop_steps": 5,
        "model__hrm__backprop_warmup_steps": 6,
        "model__bridge__gate_warmup_steps": 5,
    },
    "average": {"train__ema_decay": 0.9, "model__hrm__deep_supervision": 0.5, "train__grad_clip": 0.5},
    "dropout": {"model__dropout": 0.2},
    "accumulation": {"train__grad_accum_steps": 2, "train__mixed_precision": "bf16"},
    "fp8": {"train__mixed_precision": "fp8", "train__grad_accum_steps": 2},
    "adam_atan2": {"optim__name": "adam_atan2", "model__architecture": "prefix_lm", "train__ema_decay": 0.9},
}
STEPS = 24


class OnCPU(StepGraphs):
    """As on a GPU, but that a graph is a function."""

    def __init__(self):
        self.lr, self.only_small, self.given_up, self.seen, self.captured = torch.zeros(()), False, False, set(), {}

    def _run_eagerly(self, batches, step):
        step(batches)

    def _capture(self, batches, step):
        return SimpleNamespace(replay=lambda: step(batches))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepared(config):
    """A new state, and its batches where it is."""
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size, device())
    batches = [
        [to_device(batch, device()) for batch in group]
        for group in batches_of(splits, config, collate=state.model.collate)
    ]
    return state, batches


def trained(config):
    """The numbers of a run of `config`, its weights (and their average), and its state."""
    state, batches = prepared(config)
    if device().type == "cpu" and config.train.cuda_graphs == "auto":
        state.graphs = OnCPU()
        for group in state.optimizer.param_groups:
            group["lr"] = state.graphs.lr
    stats = Stats(state)
    for group in batches:
        train_step(state, group, stats)
    weights = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
    if state.average:
        weights |= {f"average/{name}": tensor for name, tensor in state.average.tensors.items()}
    return stats.read(), weights, state


@pytest.mark.parametrize("kind", KINDS)
def test_replays_train_as_eager_steps_do(kind, monkeypatch):
    config = small_config(train__steps=STEPS, train__length_window=64, **KINDS[kind])
    replayed, weights, state = trained(config)
    assert state.graphs.captured, "graphs were there"
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 0)
    eager, expected, state = trained(config)
    assert not state.graphs.captured
    assert replayed["samples"] == eager["samples"] == STEPS * 8 and replayed["tokens"] == eager["tokens"]
    if torch.cuda.is_available():  # whose kernels may sum in another order
        assert replayed["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert_same_weights(weights, expected, atol=1e-5, rtol=1e-4)
    else:
        assert replayed == eager
        assert_same_weights(weights, expected)


def test_graphs_change_nothing_but_the_rounding_of_the_learning_rate():
    config = small_config(train__steps=STEPS, train__length_window=64)
    replayed, weights, _ = trained(config)
    plain, expected, state = trained(
        small_config(train__steps=STEPS, train__length_window=64, train__cuda_graphs=False)
    )
    assert state.graphs is None
    assert state.optimizer.param_groups[0]["lr"] == learning_rate(config.optim, STEPS, STEPS - 1)
    assert replayed["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert_same_weights(weights, expected, atol=1e-4, rtol=1e-3)


def test_no_more_graphs_are_kept_than_their_bound(monkeypatch):
    config = small_config(train__steps=STEPS, train__sample_h_cycles=[1, 4], data__synthetic__max_digits=1)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    numbers, _, state = trained(config)
    assert len(state.graphs.captured) == 2 and numbers["samples"] == STEPS * 8


def test_every_step_of_a_kind_is_given_tensors_of_its_own():
    """What is copied to a GPU is a view of one tensor, and torch.compile would tell the first step of a kind, of views, from the
    second, and compile while that is captured.
    """
    given, graphs = [], OnCPU()
    for _ in range(3):
        whole = torch.arange(8)
        batch = TokenRows(*whole.split(1))
        graphs.run("kind", [batch], lambda batches: given.extend(tensor._is_view() for tensor in batches[0]))
    assert given == [False] * len(TokenRows._fields) * 3


def test_a_step_whose_numbers_are_not_finite_is_told_whether_replayed_or_not():
    config = small_config(train__steps=STEPS, optim__lr=1e30, optim__warmup_steps=0)
    assert trained(config)[0]["bad_step"] == 2


def test_without_a_gpu_graphs_are_left_out_unless_they_are_asked_for():
    assert build_state(small_config(), 20).graphs is None
    with pytest.raises(UserError, match="train.cuda_graphs: true needs a CUDA GPU"):
        build_state(small_config(train__cuda_graphs=True), 20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ray__num_workers": 2}, r"train.cuda_graphs: true needs a single worker \(ray.num_workers is 2\)"),
        ({"train__mixed_precision": "fp16"}, "train.cuda_graphs: true does not go with train.mixed_precision fp16"),
    ],
)
def test_graphs_that_cannot_be_are_refused_and_auto_leaves_them_out(fields, message):
    with pytest.raises(UserError, match=message):
        small_config(train__cuda_graphs=True, **fields)
    assert small_config(**fields).graphs_obstacle


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(LocalSession, "device", torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["encoder_decoder", "average", "dropout"])
def test_a_run_with_graphs_that_is_stopped_resumes_exactly(kind, tmp_path, on_gpu):
    # Validation, which comes between, swaps in the average and back.
    assert_resumes_exactly(small_config(train__val_every=1, **KINDS[kind]), tmp_path, 4, 9)


@pytest.mark.gpu
def test_a_run_of_the_loop_uses_graphs_of_few_sizes_and_reports_what_an_eager_run_does(tmp_path, on_gpu, monkeypatch):
    made = []
    monkeypatch.setattr(step, "step_graphs", lambda *arguments: made.append(graphs.step_graphs(*arguments)) or made[-1])
    options = {"train__steps": 60, "train__val_every": 20, "data__synthetic__max_digits": 2}
    session = train_locally(small_config(**options), tmp_path / "graphs")
    assert 1 <= len(made[0].captured) <= 8, list(made[0].captured)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 0)
    eager = train_locally(small_config(**options), tmp_path / "eager")
    for name in ("loss", "grad_norm", "val_loss", "lr"):
        assert [r[name] for r in session.reports] == pytest.approx([r[name] for r in eager.reports], rel=1e-3), name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["encoder_decoder", "prefix_lm", "dropout", "adam_atan2", "accumulation", "fp8"])
def test_a_replayed_step_does_not_wait_for_the_gpu(kind):
    state, (batches, *_) = prepared(small_config(**KINDS[kind]))
    stats = Stats(state)
    for i in range(6):
        torch.cuda.set_sync_debug_mode("error" if i > 2 else "default")
        try:
            train_step(state, batches, stats)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(state.graphs.captured) == 1


@pytest.mark.gpu
@pytest.mark.slow  # a compiler runs
def test_compiled_blocks_are_captured(monkeypatch):
    config = small_config(train__steps=STEPS, train__compile=True, train__length_window=64)
    replayed, weights, state = trained(config)
    assert state.graphs.captured
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 0)
    eager, expected, _ = trained(config)
    assert replayed["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    assert_same_weights(weights, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow  # a compiler runs
def test_compiled_steps_of_several_sizes_are_captured():
    """Batches come as views of what was copied, which torch.compile tells from other tensors once sizes vary."""
    data = {
        "data__dataset": "task:prefix_parity,length=32",
        "data__val_samples": 8,
        "train__batch_size": 64,
        "train__length_window": 64,
    }
    shape = {"model__architecture": "puzzle", "train__compile": True, "train__mixed_precision": "bf16"}
    _, _, state = trained(small_config(train__steps=30, train__cuda_graphs=True, **data, **shape))
    assert len(state.graphs.captured) > 1


@pytest.mark.gpu
def test_a_step_that_takes_much_of_the_memory_is_not_captured(monkeypatch):
    monkeypatch.setattr(graphs, "SMALL", 0.0)
    numbers, _, state = trained(small_config(train__steps=STEPS))
    assert state.graphs.given_up and not state.graphs.captured and numbers["samples"] == STEPS * 8


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_is_an_error_that_names_the_field():
    script = """
        from typing import NamedTuple
        import torch
        from hrm_lm.training.graphs import StepGraphs
        class Batch(NamedTuple):
            ids: torch.Tensor
        graphs = StepGraphs(torch.device("cuda"), only_small=False)
        for _ in range(2):
            graphs.run("kind", [Batch(torch.ones(3, device="cuda"))], lambda batches: batches[0].ids.sum().item())
    """
    # A broken capture spoils its process.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "UserError: train.cuda_graphs: the step cannot be captured (" in done.stderr, done.stderr
    assert "set train.cuda_graphs=false" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_a_batch_is_the_same_on_the_gpu(architecture):
    config = small_config(model__architecture=architecture)
    splits = load_dataset(config.data, config.model, 0)
    collate = build_state(config, splits.tokenizer.vocab_size).model.collate
    for (batch,) in batches_of(splits, config, collate=collate):
        for here, there in zip(batch, to_device(batch, torch.device("cuda")), strict=True):
            assert torch.equal(here, there.cpu())
