"""The step and the loop, in this process."""

import json
import math
import time

import pytest
import torch
from conftest import (
    LocalSession,
    assert_resumes_exactly,
    assert_same_weights,
    batches_of,
    eval_options,
    poisoned,
    small_config,
    train_locally,
)
from safetensors.torch import load_file

from hrm_lm.config import Cycles, HRMConfig, OptimConfig
from hrm_lm.data.loading import prefetch
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.splits import Splits
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import generate
from hrm_lm.models import decoding
from hrm_lm.training import loop
from hrm_lm.training.checkpoint import load_model, read_checkpoint
from hrm_lm.training.loop import train
from hrm_lm.training.metrics import MetricsLog
from hrm_lm.training.step import SentStats, Stats, backprop_steps_of, build_state, cycles_of, learning_rate, train_step
from hrm_lm.training.validation import validate

ARCHITECTURES = pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])


def losses(session):
    return [metrics["loss"] for metrics in session.reports]


# --- the step ----------------------------------------------------------------------------------------------------


@ARCHITECTURES
def test_accumulation_steps_change_nothing_but_rounding(tmp_path, architecture):
    options = {"train__val_every": 1, "model__architecture": architecture}
    one = train_locally(small_config(**options), tmp_path / "one")
    four = train_locally(small_config(**options, train__grad_accum_steps=4), tmp_path / "four")
    assert losses(one) == pytest.approx(losses(four), rel=1e-5)
    assert_same_weights(one.last_weights(), four.last_weights(), atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # a compiler runs
def test_compiling_changes_nothing_but_rounding(tmp_path):
    # Validation compiles what runs without a graph.
    options = {
        "train__steps": 2,
        "model__architecture": "prefix_lm",
        "model__hrm__h_cycles": 1,
        "model__hrm__l_cycles": 1,
    }
    plain = train_locally(small_config(**options), tmp_path / "plain")
    compiled = train_locally(small_config(**options, train__compile=True), tmp_path / "compiled")
    assert compiled.reports[0]["val_loss"] == pytest.approx(plain.reports[0]["val_loss"], rel=1e-4)
    assert load_model(max((tmp_path / "compiled").glob("step_*")))[0].state_dict().keys() == plain.last_weights().keys()


def test_grad_clip_bounds_the_update_and_the_norm_is_reported_unclipped():
    config = small_config(train__grad_clip=1e-6, optim__eps=1.0, optim__weight_decay=0.0, optim__schedule="constant")
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    stats = Stats(state)
    train_step(state, next(batches_of(splits, config)), stats)
    moved = math.sqrt(sum((p - before[n]).square().sum().item() for n, p in state.model.named_parameters()))
    assert stats.read()["grad_norm"] > 0.1
    assert 0 < moved < 1e-6 * config.optim.lr * 2  # with eps 1, Adam's first step is about lr * gradient


def test_the_schedule_warms_up_and_ends_at_its_floor():
    rates = {}
    for schedule in ("cosine", "linear", "constant"):
        config = OptimConfig(lr=1.0, warmup_steps=4, schedule=schedule, min_lr_ratio=0.1)
        rates[schedule] = [learning_rate(config, 14, step) for step in range(15)]
        assert rates[schedule][:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates["cosine"][14] == pytest.approx(0.1) and rates["cosine"][9] == pytest.approx(0.55)
    assert rates["linear"][14] == pytest.approx(0.1) and rates["linear"][9] == pytest.approx(0.55)
    assert set(rates["constant"][4:]) == {1.0}


def test_the_gradient_window_warms_up_from_two():
    config = HRMConfig(h_cycles=2, l_cycles=3, backprop_steps=5, backprop_warmup_steps=6)
    assert [backprop_steps_of(config, step, config.cycles) for step in range(8)] == [2, 2, 3, 3, 4, 4, 5, 5]
    assert backprop_steps_of(HRMConfig(backprop_steps="all"), 0, Cycles(2, 2)) is None
    assert backprop_steps_of(HRMConfig(backprop_steps=6), 0, Cycles(2, 2)) is None


@ARCHITECTURES
def test_every_step_draws_its_h_cycles_anew_and_runs_that_many(architecture):
    options = {"train__steps": 20, "model__hrm__backprop_steps": 5, "model__architecture": architecture}
    config = small_config(**options, train__sample_h_cycles=[1, 4])
    splits = load_dataset(config.data, config.model, 0)
    state, cycles = build_state(config, splits.tokenizer.vocab_size), []
    state.model.core.h_stack.register_forward_hook(lambda *_: cycles.append(state.step))
    stats = Stats(state)
    for batches in batches_of(splits, config, collate=state.model.collate):
        train_step(state, batches, stats)
    drawn = [cycles_of(config, step).h for step in range(config.train.steps)]
    assert [cycles.count(step) for step in range(config.train.steps)] == drawn and set(drawn) == {1, 2, 3, 4}
    other_seed = small_config(**options, train__sample_h_cycles=[1, 4], train__seed=1)
    assert [cycles_of(other_seed, step).h for step in range(config.train.steps)] != drawn
    assert cycles_of(small_config(), 0) == Cycles(2, 2)


@ARCHITECTURES
def test_the_average_of_the_weights_is_what_validates_and_generates(tmp_path, architecture):
    config = small_config(train__ema_decay=0.5, train__val_every=1, optim__lr=0.05, model__architecture=architecture)
    session = train_locally(config, tmp_path)
    folders, average = sorted(tmp_path.glob("step_*")), None
    names = build_state(config, 20).average.tensors
    for folder in folders[:3]:
        raw, saved = load_file(folder / "model.safetensors"), load_file(folder / "average.safetensors")
        assert saved.keys() == names.keys()
        if average:
            assert_same_weights({n: (average[n] + raw[n]) / 2 for n in saved}, saved, atol=1e-6, rtol=1e-6)
        average = saved
    model, _, checkpoint = load_model(folders[-1])
    splits = load_dataset(checkpoint.config.data, checkpoint.config.model, 0)
    val_loss = validate(model, splits, eval_options(8))["val_loss"]
    assert val_loss == pytest.approx(session.reports[-1]["val_loss"], rel=1e-5)
    model.load_state_dict(load_file(folders[-1] / "model.safetensors"))
    assert validate(model, splits, eval_options(8))["val_loss"] != pytest.approx(val_loss, rel=1e-3)

    child = train_locally(small_config(train__init_from=str(folders[-1]), train__steps=1, optim__lr=1e-12,
                                       model__architecture=architecture), tmp_path / "child")  # fmt: skip
    assert child.reports[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-5)


def test_an_average_switched_on_in_mid_run_starts_there(tmp_path):
    train_locally(small_config(), tmp_path)
    config = small_config(train__steps=13, train__ema_decay=0.999, optim__lr=1e-12)
    train_locally(config, tmp_path)
    before, after = (
        load_file(tmp_path / name) for name in ("step_000012/model.safetensors", "step_000013/average.safetensors")
    )
    assert_same_weights({name: before[name] for name in after}, after, atol=1e-6, rtol=0)


@ARCHITECTURES
def test_val_exact_match_is_that_of_greedy_generation(tmp_path, architecture):
    options = {"train__steps": 150, "train__batch_size": 32, "optim__lr": 0.01, "model__architecture": architecture}
    train_locally(small_config(**options), tmp_path)
    model, tokenizer, checkpoint = load_model(max(tmp_path.glob("step_*")))
    splits = load_dataset(checkpoint.config.data, checkpoint.config.model, 0)
    seen = [sample for split in (splits.train, splits.val) for sample in split]  # it has learned the former
    splits = Splits(splits.train, seen, tokenizer)
    prompts = [tokenizer.decode(sample.prompt) for sample in seen]
    answers = [tokenizer.decode(sample.response) for sample in seen]
    right = sum(a == b for a, b in zip(generate(model, tokenizer, prompts), answers)) / len(answers)
    assert 0 < right < 1, "a score that tells"
    assert validate(model, splits, eval_options(16))["val_exact_match"] == pytest.approx(right)


def test_workers_that_share_a_model_take_every_step_whatever_the_answers(monkeypatch):
    config = small_config()
    tokenizer = load_dataset(config.data, config.model, 0).tokenizer
    model = build_state(config, tokenizer.vocab_size).model
    monkeypatch.setattr(decoding, "pick", lambda logits, *_: torch.full(logits.shape[:1], tokenizer.eos_id))
    steps, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda *arguments: steps.append(1) or decode(*arguments))
    for in_step, expected in ((False, 0), (True, 4)):
        steps.clear()
        assert decoding.generate_ids(
            model, tokenizer, [[5], [6, 7]], eval_options(), max_new_tokens=5, in_step=in_step
        ) == [[], []]
        assert len(steps) == expected


def test_validation_does_not_depend_on_how_it_is_cut_into_batches():
    config = small_config(data__synthetic__max_digits=2, data__synthetic__num_samples=200)
    splits = load_dataset(config.data, config.model, 0)
    model = build_state(config, splits.tokenizer.vocab_size).model
    whole, cut = (validate(model, splits, eval_options(size)) for size in (1000, 3))
    assert whole["val_loss"] == pytest.approx(cut["val_loss"], rel=1e-5)


# --- the life of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"train__grad_accum_steps": 2, "model__dropout": 0.1, "train__mixed_precision": "bf16"},
        {"model__architecture": "prefix_lm", "model__dropout": 0.1, "model__hrm__backprop_steps": 4},
        {"optim__name": "adam_atan2", "train__ema_decay": 0.9, "train__sample_h_cycles": [1, 3]},
    ],
    ids=["plain", "bf16", "prefix_lm", "recipe"],
)
def test_a_resumed_run_has_the_weights_of_one_never_stopped_bit_for_bit(tmp_path, extra):
    # 64 samples in batches of 8: an epoch ends at step 8, between the stops.
    assert_resumes_exactly(small_config(train__val_every=1, **extra), tmp_path, 4, 9)


def test_a_run_that_is_complete_does_nothing_more(tmp_path):
    train_locally(small_config(), tmp_path)
    again = train_locally(small_config(), tmp_path)
    assert again.outcome == {"status": "finished", "step": 12} and again.reports == []


def test_checkpoints_come_at_every_validation_and_at_the_end(tmp_path):
    session = train_locally(small_config(train__val_every=5), tmp_path)
    assert [metrics["step"] for metrics in session.reports] == [5, 10, 12]
    assert {
        "loss",
        "lr",
        "grad_norm",
        "samples_per_s",
        "tokens_per_s",
        "val_loss",
        "val_exact_match",
    } <= session.reports[0].keys()


def test_early_stopping_ends_a_run_that_gets_no_better_and_a_resume_keeps_it_ended(tmp_path):
    config = small_config(train__steps=50, train__val_every=1, train__early_stopping_patience=2, optim__lr=1e-12)
    session = train_locally(config, tmp_path)
    assert session.outcome["status"] == "early_stopped" and session.outcome["step"] < 50
    assert train_locally(config, tmp_path).outcome == session.outcome


def test_a_loss_that_is_not_finite_ends_the_run_with_step_lr_and_advice_and_saves_nothing(tmp_path):
    config = small_config(optim__lr=1e30, optim__warmup_steps=0, train__log_every=5, train__val_every=5)
    session = train_locally(config, tmp_path)
    assert session.outcome["status"] == "diverged" and session.reports == []
    assert "not finite at step 2, lr 9.8" in session.outcome["error"] and "train.grad_clip" in session.outcome["error"]


def test_a_step_that_does_not_fit_the_memory_ends_the_run_with_what_to_change(tmp_path, monkeypatch):
    def too_large(state, batches, stats):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB. If reserved but unallocated ...")

    monkeypatch.setattr(loop, "train_step", too_large)
    session = train_locally(small_config(), tmp_path)
    assert session.outcome["status"] == "failed" and session.reports == []
    assert session.outcome["error"].startswith("out of memory in the step after step 0: CUDA out of memory. Tried to")
    assert "lower train.batch_size (8)" in session.outcome["error"]


def test_init_from_takes_weights_and_nothing_else(tmp_path):
    train_locally(small_config(), tmp_path / "a")
    checkpoint = max((tmp_path / "a").glob("step_*"))
    config = small_config(train__init_from=str(checkpoint), train__steps=1, optim__lr=1e-12)
    session = train_locally(config, tmp_path / "b")
    assert session.reports[0]["step"] == 1
    assert_same_weights(load_model(checkpoint)[0].state_dict(), session.last_weights(), atol=1e-6, rtol=0)


def test_progress_lines_name_the_metrics(tmp_path, capsys):
    train_locally(small_config(train__steps=2), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/2  loss ") and "samples_per_s" in lines[0]
    assert lines[-1].startswith("step 2/2  val_loss ")


def test_an_interval_s_rate_is_that_of_its_own_steps_however_late_it_is_logged(tmp_path, monkeypatch):
    """Several workers on GPUs log an interval when the next one ends. All but steps takes a hundred seconds here: going back at
    the bad step, validating, and saving.
    """
    rates, now, step = [], [0.0], poisoned(bad=[9])

    def takes(seconds, function):
        def timed(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr(SentStats, "arrived", lambda self: False)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "train_step", takes(1, step))
    for where, name in ((loop, "validate"), (loop, "save"), (MetricsLog, "rewind")):
        monkeypatch.setattr(where, name, takes(100, getattr(where, name)))
    monkeypatch.setattr(MetricsLog, "write", lambda self, step, m: rates.append((step, m.get("samples_per_s"))))
    train_locally(small_config(train__log_every=2, train__val_every=7, train__on_nonfinite="rollback"), tmp_path)
    assert [(step, rate) for step, rate in rates if rate] == [(step, 8.0) for step in (2, 4, 6, 7, 8, 8, 10, 12)]


@pytest.mark.gpu
def test_on_a_gpu_an_interval_s_time_is_the_device_s_and_not_that_of_launching():
    state = build_state(small_config(), 16, torch.device("cuda"))
    stats = Stats(state)
    matrix = torch.randn(8192, 8192, device="cuda")
    torch.mm(matrix, matrix)
    torch.cuda.synchronize()
    start = time.perf_counter()
    stats.begin()
    for _ in range(50):
        torch.mm(matrix, matrix)
    sent = stats.send()
    launched = time.perf_counter() - start
    seconds = sent.seconds()
    assert launched < seconds / 2
    assert seconds == pytest.approx(time.perf_counter() - start, rel=0.1)


def test_event_files_hold_the_curves(tmp_path):
    import struct

    from tensorboardX.proto.event_pb2 import Event

    class WithEvents(LocalSession):
        event_folder = tmp_path / "events"

    train(small_config(), WithEvents(tmp_path / "run"))
    (file,) = (tmp_path / "events").iterdir()
    data, tags = file.read_bytes(), {}
    while data:  # TFRecord: length, its CRC, the event, its CRC
        (length,) = struct.unpack("<Q", data[:8])
        for value in Event.FromString(data[12 : 12 + length]).summary.value:
            tags[value.tag] = tags.get(value.tag, 0) + 1
        data = data[16 + length :]
    assert tags["loss"] == 12 and tags["val_loss"] == 1


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    return train_locally(small_config(train__steps=1, train__ema_decay=0.5), tmp_path).last_checkpoint


@pytest.mark.parametrize(
    "name", ["model.safetensors", "average.safetensors", "trainer_state.json", "config.yaml", "tokenizer.json"]
)
def test_a_checkpoint_with_a_file_missing_or_torn_names_it(checkpoint, name):
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[: len(whole) // 2] if name != "config.yaml" else b"model: [")
    with pytest.raises(UserError, match=name):
        load_model(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model(checkpoint)


def test_a_torn_optimizer_state_is_named_on_resume(checkpoint, tmp_path):
    (checkpoint / "optimizer.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="optimizer.safetensors: torn or foreign"):
        train_locally(small_config(train__steps=2), tmp_path)


def test_a_foreign_folder_and_a_later_format_are_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="not a whole checkpoint"):
        read_checkpoint(tmp_path)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state.pop("crc32")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        read_checkpoint(checkpoint)


def test_weights_of_another_shape_are_refused(checkpoint, tmp_path):
    config = small_config(model__d_model=32, train__init_from=str(checkpoint))
    with pytest.raises(UserError, match=r"has shape .*, this model's has"):
        train_locally(config, tmp_path / "other")


def test_no_file_of_a_checkpoint_is_a_pickle(checkpoint):
    for file in checkpoint.iterdir():
        assert file.suffix in (".safetensors", ".json", ".yaml")


# --- prefetching -------------------------------------------------------------------------------------------------


def test_an_error_in_the_data_reaches_whoever_asks_for_the_batch():
    def broken():
        yield []
        raise RuntimeError("bad sample")

    batches = prefetch(broken(), torch.device("cpu"))
    assert next(batches) == []
    with pytest.raises(RuntimeError, match="bad sample"):
        next(batches)


def test_closing_ends_the_thread_also_of_an_endless_source():
    import itertools
    import threading

    batches = prefetch(([] for _ in itertools.count()), torch.device("cpu"))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
