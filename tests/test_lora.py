"""LoRA: a few parameters learn, the rest stays, and what it makes is an ordinary model wherever it does not train."""

import pytest
import torch
from conftest import assert_resumes_exactly, assert_same_weights, small_config, train_locally
from safetensors.torch import load_file

from hrm_lm.errors import UserError
from hrm_lm.inference.generate import generate
from hrm_lm.models.lora import add_lora, is_factor, merge_lora
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.memory import kept_bytes
from hrm_lm.training.step import build_state

ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])


@pytest.fixture
def base(tmp_path):
    """`base(architecture)` is a trained checkpoint."""

    def trained(architecture="encoder_decoder", **fields):
        config = small_config(model__architecture=architecture, **fields)
        return train_locally(config, tmp_path / "base").last_checkpoint

    return trained


def lora(checkpoint, **fields):
    start = {"train__init_from": str(checkpoint), "train__lora__rank": 2, "optim__lr": 0.01}
    return small_config(**start | fields)


def changed(a, b) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@ARCHITECTURES
def test_only_matrices_of_blocks_change_and_the_checkpoint_is_an_ordinary_model_where_it_is_used(
    base, tmp_path, architecture
):
    checkpoint = base(architecture)
    session = train_locally(lora(checkpoint, model__architecture=architecture), tmp_path / "lora")
    before, after = load_model(checkpoint)[0].state_dict(), session.last_weights()
    assert before.keys() == after.keys()
    matrices = {
        name
        for name in before
        if name.endswith((".qkv.weight", ".q.weight", ".kv.weight", ".out.weight", ".gate_up.weight"))
    }
    assert changed(before, after) == matrices
    saved = load_file(session.last_checkpoint / "model.safetensors")
    assert_same_weights({name: value for name, value in saved.items() if not is_factor(name)}, before)


@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_targets_say_which_matrices_change(base, tmp_path, targets):
    checkpoint = base()
    session = train_locally(lora(checkpoint, train__lora__targets=targets), tmp_path / "lora")
    names = changed(load_model(checkpoint)[0].state_dict(), session.last_weights())
    kinds = {"attention": (".attention.", ".cross."), "mlp": (".mlp.",)}[targets]
    assert names and all(any(kind in name for kind in kinds) for name in names)


def test_training_begins_where_its_checkpoint_ended(base, tmp_path):
    checkpoint = base()
    config = lora(checkpoint, train__steps=1, optim__lr=1e-12)
    session = train_locally(config, tmp_path / "lora")
    assert_same_weights(load_model(checkpoint)[0].state_dict(), session.last_weights(), atol=1e-9, rtol=0)


@ARCHITECTURES
def test_merged_weights_answer_as_the_factors_do(base, tmp_path, architecture):
    checkpoint = base(architecture)
    config = lora(checkpoint, model__architecture=architecture)
    session = train_locally(config, tmp_path / "lora")
    merged, tokenizer, _ = load_model(session.last_checkpoint)
    apart = build_state(config, tokenizer.vocab_size).model.eval()
    apart.load_state_dict(load_file(session.last_checkpoint / "model.safetensors"))
    prompts = [f"What is {a} + 7?" for a in range(10)]
    assert generate(apart, tokenizer, prompts) == generate(merged, tokenizer, prompts)
    assert not any(is_factor(name) for name in merged.state_dict()) and all(
        p.requires_grad for p in merged.parameters()
    )


@pytest.mark.parametrize(
    "extra",
    [{}, {"model__architecture": "prefix_lm", "train__ema_decay": 0.9, "optim__name": "adam_atan2"}],
    ids=["plain", "recipe"],
)
def test_a_resumed_run_has_the_weights_of_one_never_stopped_bit_for_bit(base, tmp_path, extra):
    checkpoint = base(extra.get("model__architecture", "encoder_decoder"))
    session = assert_resumes_exactly(lora(checkpoint, **{"train__val_every": 1, **extra}), tmp_path, 4, 9)
    kept = load_file(session.last_checkpoint / "optimizer.safetensors")
    assert kept and all(is_factor(name) for name in kept), "no state of what does not learn"


def test_a_run_starts_from_what_lora_made_averages_included(base, tmp_path):
    first = train_locally(lora(base(), train__ema_decay=0.5), tmp_path / "first")
    for name, fields in {"whole": {}, "again": {"train__lora__rank": 3}}.items():
        config = small_config(train__init_from=str(first.last_checkpoint), train__steps=1, optim__lr=1e-12, **fields)
        session = train_locally(config, tmp_path / name)
        assert_same_weights(first.last_weights(), session.last_weights(), atol=1e-6, rtol=0)


def test_a_run_does_not_go_on_with_other_factors(base, tmp_path):
    checkpoint = base()
    train_locally(lora(checkpoint), tmp_path / "lora")
    with pytest.raises(UserError, match="lora_"):
        train_locally(lora(checkpoint, train__lora__rank=3, train__steps=13), tmp_path / "lora")


def test_gradients_and_optimizer_are_those_of_the_factors_alone():
    config = small_config(train__lora__rank=2, train__init_from="x")
    state = build_state(config, 64)
    factors = sum(p.numel() for name, p in state.model.named_parameters() if is_factor(name))
    kept = kept_bytes(state.model, config)
    assert kept["gradients"] == 4 * factors and kept["optimizer"] == 8 * factors < kept["weights"]


def test_factors_of_rank_0_are_no_factors_and_merging_nothing_changes_nothing():
    state = build_state(small_config(), 64)
    names = list(state.model.state_dict())
    add_lora(state.model, small_config().train.lora)
    merge_lora(state.model)
    assert list(state.model.state_dict()) == names


@pytest.mark.parametrize(
    "fields, told",
    [
        ({}, "train.lora.rank (2) needs train.init_from"),
        ({"train__init_from": "x", "optim__name": "muon"}, "train.lora: optim.name muon"),
        ({"train__init_from": "x", "train__mixed_precision": "fp8"}, "train.lora does not go with"),
    ],
)
def test_what_does_not_go_with_lora_is_refused(fields, told):
    with pytest.raises(UserError, match=told.replace("(", r"\(").replace(")", r"\)")):
        small_config(train__lora__rank=2, **fields)
