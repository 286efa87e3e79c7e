"""Steps that are not finite, and spikes of the loss: skipped, or gone back for; in this process."""

import json
import math
import re
import struct
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    LocalSession,
    assert_resumes_exactly,
    assert_same_weights,
    batches_of,
    poisoned,
    small_config,
    train_locally,
    without_checksums,
)
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from hrm_lm.data.collate import to_device
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import UserError
from hrm_lm.training import loop, rollback, stability
from hrm_lm.training.checkpoint import read_checkpoint, state_tensors
from hrm_lm.training.metrics import MetricsLog
from hrm_lm.training.optim import build_optimizer
from hrm_lm.training.step import Stats, build_state

RECIPE = {
    "optim__name": "adam_atan2", "train__ema_decay": 0.9, "model__dropout": 0.1, "train__sample_h_cycles": [1, 3],
    "train__grad_clip": 1.0,
}  # fmt: skip
KINDS = {"plain": {}, "recipe": RECIPE, "muon": {"optim__name": "muon"}}


def poison(monkeypatch, **steps):
    monkeypatch.setattr(loop, "train_step", poisoned(**steps))


def all_tensors(session):
    files = sorted(session.last_checkpoint.glob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_skipped_or_gone_back_for_a_bad_step_leaves_no_trace_and_a_resume_is_exact(tmp_path, monkeypatch, capsys):
    """Steps 3 and 11 come before and after the stops, 7 and 8 between; checkpoints are at 5, 9, 10 and 12."""
    bad, fields = [3, 7, 8, 11], {"train__val_every": 5, "train__checkpoint_every": 9, "train__log_every": 2}
    monkeypatch.setattr(loop, "is_left_out", lambda progress, step: step in bad)
    expected = train_locally(small_config(**fields, **RECIPE), tmp_path / "expected")
    monkeypatch.undo()
    poison(monkeypatch, bad=bad)
    for mode in ("skip", "rollback"):
        config = small_config(**fields, **RECIPE, train__on_nonfinite=mode)
        session = assert_resumes_exactly(config, tmp_path / mode, 5, 9)
        assert_same_weights(all_tensors(session), all_tensors(expected))
        assert [report["skipped"] for report in session.reports] == [1, 3, 3, 4]
        assert [report["loss"] for report in session.reports] == pytest.approx([r["loss"] for r in expected.reports])
        progress = read_checkpoint(session.last_checkpoint).progress
        assert [tuple(span) for span in progress.left_out] == ([] if mode == "skip" else [(s, s) for s in bad])
    assert [report["rollbacks"] for report in session.reports] == [1, 3, 3, 4]
    out = capsys.readouterr().out
    assert "step 4: 1 of the last steps skipped, whose loss or gradient was not finite" in out
    assert "step 8: the loss or gradient was not finite; back to step 5, and steps 8 to 8 are left out" in out


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("stop", "the loss or gradient was not finite at step 3, lr"),
        ("skip", "6 steps in a row were skipped: the loss or gradient was not finite at step 8, lr .*lower optim.lr"),
        (
            "rollback",
            "after 4 rollbacks to step 6, the loss or gradient was not finite at step 7, lr .*lower optim.lr",
        ),
    ],
)
def test_a_run_that_does_not_heal_ends_and_says_what_was_tried(mode, error, tmp_path, monkeypatch):
    monkeypatch.setattr(rollback, "MOST_IN_A_ROW", 5)
    monkeypatch.setattr(rollback, "MOST_ROLLBACKS", 4)
    poison(monkeypatch, bad=range(3, 99))
    config = small_config(train__on_nonfinite=mode, train__checkpoint_every=2, train__val_every=99, train__log_every=4)
    session = train_locally(config, tmp_path)
    assert session.outcome["status"] == "diverged"
    assert re.match(error, session.outcome["error"]), session.outcome["error"]


def test_a_spike_is_told_or_gone_back_for_with_the_steps_around_it_and_a_resume_is_exact(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stability, "MEMORY", 8)
    poison(monkeypatch, spikes=[13])
    config = small_config(train__steps=30, train__checkpoint_every=10, train__spike=20, train__log_every=3)
    told = train_locally(config, tmp_path / "told")
    assert "step 13: the loss was 20 standard deviations above its running mean\n" in capsys.readouterr().out
    assert [report["spikes"] for report in told.reports] == [0, 1, 1]

    fields = config.model_copy(update={"train": config.train.model_copy(update={"on_nonfinite": "rollback"})})
    session = assert_resumes_exactly(fields, tmp_path / "back", 10)
    assert "back to step 10, and steps 12 to 14 are left out" in capsys.readouterr().out
    assert [(report["spikes"], report["rollbacks"]) for report in session.reports] == [(0, 0), (1, 1), (1, 1)]

    monkeypatch.setattr(loop, "is_left_out", lambda progress, step: 12 <= step <= 14)
    expected = train_locally(small_config(train__steps=30, train__log_every=3), tmp_path / "expected")
    assert_same_weights(all_tensors(session), all_tensors(expected))
    monkeypatch.undo()
    poison(monkeypatch, spikes=[13])
    blind = train_locally(small_config(train__steps=30, train__log_every=3), tmp_path / "blind")
    assert_same_weights(all_tensors(told), all_tensors(blind))


def test_a_spike_counts_for_the_mean_as_the_least_spike_and_no_step_before_the_mean_is_known(monkeypatch):
    monkeypatch.setattr(stability, "MEMORY", 4)
    watched, spikes, finite = torch.zeros(6, dtype=torch.float64), [], torch.tensor(True)
    for loss in (9.0, 1.0, 3.0, 3.0, 1e6, 3.0, math.nan):
        watched, spike = stability.observed(watched, torch.tensor(loss), finite & math.isfinite(loss), 3.0)
        spikes.append(spike.item())
        if len(spikes) == 4:  # the plain mean and variance so far
            assert watched[-2:].tolist() == pytest.approx([4.0, 9.0])
    assert spikes == [False] * 4 + [True, False, False]
    least = 4 + 3 * math.sqrt(9.0)
    mean = 4 + (least - 4) / 4
    assert dict(zip(stability.WATCHED, watched.tolist(), strict=True)) == {
        "in_a_row": 1, "skipped": 1, "spikes": 1, "losses": 6, "mean": pytest.approx(mean + (3 - mean) / 4),
        "variance": pytest.approx(0.75 * (0.75 * (9 + (least - 4) ** 2 / 4) + (3 - mean) ** 2 * 0.25)),
    }  # fmt: skip


def test_a_checkpoint_of_before_there_were_these_fields_goes_on(tmp_path):
    straight = train_locally(small_config(), tmp_path / "straight")
    train_locally(small_config(train__checkpoint_every=6), tmp_path / "old", stop_at=6)
    without_checksums(tmp_path / "old/step_000006")
    file = tmp_path / "old/step_000006/trainer_state.json"
    fields = json.loads(file.read_text())
    for name in ("rollbacks", "left_out", "watched"):
        del fields[name]
    file.write_text(json.dumps(fields))
    again = train_locally(small_config(train__on_nonfinite="rollback", train__spike=7), tmp_path / "old")
    assert_same_weights(all_tensors(straight), all_tensors(again))


def test_skipping_is_refused_where_the_loss_scaling_does_it():
    with pytest.raises(UserError, match="train.on_nonfinite: skip does not go with train.mixed_precision fp16"):
        small_config(train__on_nonfinite="skip", train__mixed_precision="fp16")


def stepped_on_the_device(kind, device, bad, mode="skip"):
    """A state after six steps whose optimizer works as on a GPU, and what its tensors were before the last step."""
    fields = KINDS[kind] | {"train__sample_h_cycles": None}  # each step is of the same kind
    config = small_config(**fields, train__on_nonfinite=mode, train__spike=7)
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, splits.tokenizer.vocab_size, device)
    if device.type == "cpu":
        state.optimizer = build_optimizer(state.model, config.optim, torch.device("cuda"))
    batch = next(batches_of(splits, config, collate=state.model.collate))
    batch = [to_device(part, device) for part in batch]
    stats, step = Stats(state), poisoned(bad=bad)
    for i in range(6):
        before = [tensor.clone() for tensor in state_tensors(state)]
        if device.type == "cuda" and i > 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(state, batch, stats)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return state, before, stats.read()


def assert_skips_on_the_device(kind, device):
    state, before, numbers = stepped_on_the_device(kind, device, bad=[1, 2, 6])
    for own, kept in zip(state_tensors(state), before, strict=True):
        assert torch.equal(own, kept), (own, kept)
    assert numbers["watched"]["skipped"] == 3 and numbers["watched"]["in_a_row"] == 1, numbers
    assert numbers["bad_step"] is None and math.isfinite(numbers["loss"]), numbers
    counts = {slots["step"].item() for slots in state.optimizer.state.values() if "step" in slots}
    assert counts == {3}, "the optimizer counts the steps that were taken"
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_that_works_on_the_device_skips_without_asking_the_host(kind):
    skipping, stopping = (
        state_tensors(stepped_on_the_device(kind, torch.device("cpu"), bad=[], mode=mode)[0])
        for mode in ("skip", "stop")
    )
    for own, expected in zip(skipping, stopping, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    assert_skips_on_the_device(kind, torch.device("cpu"))


def test_event_files_and_the_progress_bar_go_back_with_the_run(tmp_path):
    bar = SimpleNamespace(n=0, set_description=lambda text: None, close=lambda: None)
    bar.update = lambda steps: setattr(bar, "n", bar.n + steps)
    log, reached = MetricsLog(tmp_path, lambda steps: bar, 0, 10), []
    for step in (2, 4):
        log.write(step, {"loss": 1.0})
        reached.append(bar.n)
    log.rewind(2)
    log.write(4, {"loss": 2.0})
    log.close()
    assert [*reached, bar.n] == [2, 4, 4]
    (file,) = tmp_path.iterdir()
    data, steps = file.read_bytes(), []
    while data:  # TFRecord: length, its CRC, the event, its CRC
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        if event.HasField("session_log"):
            steps = [step for step in steps if step < event.step]  # as TensorBoard does
        steps += [event.step] * len(event.summary.value)
    assert steps == [2, 4]


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_skipped_without_waiting_for_the_gpu(kind):
    state = assert_skips_on_the_device(kind, torch.device("cuda"))
    assert state.graphs is not None and state.graphs.captured


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_a_run_of_graphs_heals_on_the_gpu(mode, tmp_path, monkeypatch):
    """On a GPU, too, all that a bad step changed is gone: the run has the weights of one that left the steps out."""
    monkeypatch.setattr(LocalSession, "device", torch.device("cuda"))
    fields = {"train__steps": 24, "train__checkpoint_every": 6, "train__log_every": 4, "train__ema_decay": 0.9}
    bad = [3, 15, 16, 21]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "is_left_out", lambda progress, step: step in bad)
        expected = train_locally(small_config(**fields), tmp_path / "expected")
    poison(monkeypatch, bad=bad)
    session = train_locally(small_config(**fields, train__on_nonfinite=mode), tmp_path / mode)
    assert session.outcome["status"] == "finished" and session.reports[-1]["skipped"] == 4, session.outcome
    assert_same_weights(all_tensors(session), all_tensors(expected), atol=1e-4, rtol=1e-3)
