"""The largest batch that a config allows, tried before the first step: what it is, and that the trial leaves no trace."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import LocalSession, assert_same_weights, small_config
from torch.distributed.device_mesh import init_device_mesh

from hrm_lm.data.loading import train_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import batch_rows, divided
from hrm_lm.data.tokenizer import ByteTokenizer
from hrm_lm.errors import UserError
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import layout
from hrm_lm.models.float8 import Float8Linear
from hrm_lm.training import loop, memory, parallel
from hrm_lm.training.memory import batch_of, does_not_fit, kept_bytes, largest_lengths
from hrm_lm.training.step import Stats, build_state, train_step

SHORT = {"model__max_prompt_len": 30, "model__max_response_len": 10, "data__synthetic__max_digits": 3}
RECIPE = SHORT | {
    "model__architecture": "prefix_lm", "model__dropout": 0.1, "optim__name": "adam_atan2", "train__ema_decay": 0.7,
    "train__sample_h_cycles": [1, 3], "model__hrm__backprop_steps": 4,
}  # fmt: skip
BY_LENGTH = SHORT | {"train__length_window": 400, "train__batch_tokens": 400}
PACKED = RECIPE | {"train__length_window": 400, "train__batch_tokens": 400, "train__packing": True}
PACKED_APART = PACKED | {"model__architecture": "encoder_decoder"}


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps_of(state, splits, count=3) -> list[float]:
    """The losses of some steps."""
    stats = Stats(state)
    config, (step_rows, rows) = state.config, batch_rows(splits.train, state.config)
    collate = layout(state.model, rows)
    batches = train_batches(
        splits.train, splits.tokenizer, collate, config.train, world_size=state.world_size, rows=step_rows
    )
    losses = []
    for _, micro_batches in zip(range(count), batches):
        train_step(state, micro_batches, stats)
        losses.append(stats.read()["loss"])
    return losses


@pytest.mark.parametrize("spread", ["alone", "ddp", "fsdp"])
@pytest.mark.parametrize("fields", [SHORT, RECIPE, PACKED, PACKED_APART])
def test_a_run_whose_largest_batch_was_tried_has_the_weights_of_one_without(fields, spread, request, monkeypatch):
    workers = 1
    if spread != "alone":
        request.getfixturevalue("process_group")
        workers, fields = 2, fields | {"ray__num_workers": 2, "ray__parallel": spread}
        monkeypatch.setattr(parallel, "init_device_mesh", lambda device, _: init_device_mesh(device, (1,)))
    config = small_config(**fields)
    splits = load_dataset(config.data, config.model, 0)
    plain, tried = (build_state(config, splits.tokenizer.vocab_size, world_size=workers) for _ in range(2))
    for _ in range(2):  # before the first step, and as after a resume
        random = torch.get_rng_state()
        assert does_not_fit(tried, splits) is None
        assert torch.equal(random, torch.get_rng_state())
        assert all(p.grad is None for p in tried.model.parameters())
        assert steps_of(plain, splits) == steps_of(tried, splits)
    assert_same_weights(plain.model.state_dict(), tried.model.state_dict())
    for p, q in zip(plain.model.parameters(), tried.model.parameters(), strict=True):
        assert_same_weights(plain.optimizer.state[p], tried.optimizer.state[q])
    if plain.average:
        assert_same_weights(plain.average.tensors, tried.average.tensors)


@pytest.mark.parametrize("fields", [SHORT, RECIPE, BY_LENGTH, BY_LENGTH | RECIPE, PACKED, PACKED_APART])
@pytest.mark.parametrize("shares", [1, 2])
def test_no_batch_of_training_is_larger_than_the_one_tried(fields, shares):
    config = small_config(**fields, train__grad_accum_steps=shares)
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size)
    step_rows, rows = batch_rows(splits.train, config)
    largest = batch_of(state, splits.tokenizer, *largest_lengths(config, rows=rows), rows)
    batches = train_batches(splits.train, splits.tokenizer, layout(state.model, rows), config.train, rows=step_rows)
    seen = [batch for _, group in zip(range(30), batches) for batch in group]
    assert largest.num_positions >= max(batch.num_positions for batch in seen)
    if config.train.packing:
        assert largest[0].shape == seen[0][0].shape, "the same row, so that it is compiled once"
        assert largest.labels.numel() >= max(batch.labels.numel() for batch in seen)


@pytest.mark.parametrize("tokens, prompt, response", [(32_768, 512, 40), (8, 4, 4), (5, 2, 2)])
def test_the_largest_packed_batch_fits_its_rows_where_prompts_are_of_a_token(tokens, prompt, response):
    sizes = {"model__max_prompt_len": prompt, "model__max_response_len": response, "train__batch_tokens": tokens}
    config = small_config(**PACKED_APART | sizes)
    rows = divided(tokens, 1 / (1 + response))
    assert min(rows) > 0
    state = build_state(config, 20)
    batch = batch_of(state, ByteTokenizer(), *largest_lengths(config, rows=rows), rows)
    assert batch.num_positions == tokens


@pytest.mark.parametrize("name", ["adamw", "adam_atan2", "muon"])
def test_what_the_optimizer_keeps_is_counted(name):
    config = small_config(**SHORT, optim__name=name)
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size)
    steps_of(state, splits, count=1)
    slots = [slot for slots in state.optimizer.state.values() for slot in slots.values()]
    real = sum(slot.nbytes for slot in slots if slot.dim())
    assert kept_bytes(state.model, config)["optimizer"] == real


def test_the_float8_copies_of_weights_are_counted_where_a_run_has_them():
    fields = SHORT | {"train__mixed_precision": "fp8", "model__d_model": 32}
    state = build_state(small_config(**fields), 20)
    real = sum(
        copy.nbytes
        for module in state.model.modules()
        if isinstance(module, Float8Linear)
        for copy in module.copies
        if copy.dim()
    )
    assert kept_bytes(state.model, state.config)["float8 copies"] == real > 0
    with torch.device("meta"):  # for a plan
        model = build_model(state.config.model, 20)
    assert kept_bytes(model, state.config)["float8 copies"] == real
    assert "float8 copies" not in kept_bytes(model, small_config(**fields, ray__num_workers=2, ray__parallel="fsdp"))


def test_data_of_one_length_are_tried_at_that_length():
    config, alike = small_config(**SHORT), np.array([[7, 2]] * 8)
    assert largest_lengths(config, alike) == (8, 7, 2)
    assert largest_lengths(config, np.array([[7, 2], [8, 2]])) == (8, 30, 10)


def test_a_largest_batch_that_does_not_fit_is_told_with_the_numbers_and_what_to_change(tmp_path, monkeypatch):
    config = small_config(**SHORT, train__ema_decay=0.5)
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size)

    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB. If reserved but unallocated ...")

    monkeypatch.setattr(state.model, "forward", too_large)
    told = does_not_fit(state, splits)
    assert told.splitlines()[0] == (
        "out of memory with the largest batch that the config allows (8 samples of 30 + 10 tokens on this worker), beside "
        "0.0 GiB of weights, gradients, optimizer and average: CUDA out of memory. Tried to allocate 7.00 GiB."
    )
    assert "lower train.batch_size (8)" in told
    assert not state.optimizer.state

    monkeypatch.setattr(memory, "is_sharded", lambda model: True)  # whose other workers wait
    with pytest.raises(UserError, match="out of memory with the largest batch"):
        does_not_fit(state, splits)


def test_workers_agree_on_whether_the_largest_batch_fits(process_group, monkeypatch):
    config = small_config(**SHORT, ray__num_workers=2)
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size, world_size=2)
    monkeypatch.setattr(dist, "all_reduce", lambda verdict: verdict.fill_(1.0))  # another worker's
    assert "another worker" in does_not_fit(state, splits)


@pytest.mark.gpu
def test_on_a_gpu_a_run_that_cannot_fit_ends_before_its_first_step_and_one_that_can_is_not_changed(tmp_path):
    class OnGpu(LocalSession):
        device = torch.device("cuda")

    small = {"train__steps": 4, "train__mixed_precision": "bf16"}
    long = {"model__max_prompt_len": 4096, "model__max_response_len": 4096, "train__batch_size": 2048}
    session = OnGpu(tmp_path / "large")
    outcome = loop.train(small_config(**small, **long, model__d_model=256, data__synthetic__max_digits=3), session)
    assert outcome["status"] == "failed" and outcome["step"] == 0 and session.reports == [], outcome
    assert "2,048 samples of 4,096 + 4,096 tokens" in outcome["error"], outcome["error"]
    torch.cuda.empty_cache()
    session = OnGpu(tmp_path / "small")
    assert loop.train(small_config(**small, model__dropout=0.1), session)["status"] == "finished"
    assert torch.cuda.memory_allocated() < 2**28, f"{torch.cuda.memory_allocated():,} bytes are still held"


@pytest.mark.gpu
def test_on_a_gpu_the_trial_does_not_count_as_a_step_that_is_too_large_for_graphs():
    config = small_config(**SHORT)
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size, torch.device("cuda"))
    assert does_not_fit(state, splits) is None
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
