"""Where a step's time goes (`train.profile`), what a run will take (`--dry_run 1`), and `mfu` in the log."""

import gzip
import json

import pytest
import torch
from conftest import LocalSession, small_config, train_locally

from hrm_lm.commands.train import main
from hrm_lm.data.registry import load_dataset
from hrm_lm.training import loop, step
from hrm_lm.training import train as dry
from hrm_lm.training.memory import batch_of
from hrm_lm.training.plan import activation_bytes, lengths_of, plan
from hrm_lm.training.profiling import table
from hrm_lm.training.step import build_state

CPU = torch.device("cpu")


@pytest.mark.parametrize("steps", [3, 20])
def test_a_profiled_run_leaves_a_trace_and_a_table_and_has_the_weights_of_any_run(tmp_path, capsys, steps):
    class WithEvents(LocalSession):
        event_folder = tmp_path / "events"

    session = WithEvents(tmp_path / "run")
    loop.train(small_config(train__steps=steps, train__profile=True), session)
    assert "profile/table.txt" in capsys.readouterr().out
    with gzip.open(tmp_path / "events/profile/trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    profiled = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert len(profiled) == min(steps, 5)
    lines = (tmp_path / "events/profile/table.txt").read_text().splitlines()
    assert lines[0].startswith("A step takes ")
    shares = {line.split("%")[1].strip(): float(line.split("%")[0].split()[1]) for line in lines[3:11]}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert all(shares[name] > 0 for name in ("optimizer, clipping and average", "matrix products", "attention", "loss"))
    assert len(lines) == 13 + 20

    plain = train_locally(small_config(train__steps=steps), tmp_path / "plain")
    assert [r["loss"] for r in plain.reports] == [r["loss"] for r in session.reports]


def test_a_run_that_ends_while_it_is_profiled_tells_how_many_steps_were(tmp_path, capsys):
    class WithEvents(LocalSession):
        event_folder = tmp_path / "events"

    fields = {"train__val_every": 6, "train__early_stopping_patience": 1, "optim__lr": 1e-30}
    config = small_config(train__steps=20, train__profile=True, **fields)
    assert loop.train(config, WithEvents(tmp_path / "run")) == {"status": "early_stopped", "step": 12}
    assert "\n2 steps were profiled" in capsys.readouterr().out
    assert "(mean of 2)" in (tmp_path / "events/profile/table.txt").read_text()


def test_a_gpus_table_counts_communication_and_copies_only_where_no_computing_hides_them():
    def event(name, category, start, duration):
        return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration, "tid": 1}

    events = [
        event("ProfilerStep#7", "user_annotation", 0, 1000),
        event("ProfilerStep#8", "user_annotation", 1000, 1000),
        event("aten::mm", "cpu_op", 0, 2000),
        event("nvjet_tst_128x256", "kernel", 0, 600),
        event("ncclDevKernel_AllReduce", "kernel", 500, 400),
        event("triton_tem_fused_flex_attention_0", "kernel", 900, 200),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 1000, 200),
        event("triton_poi_fused_mul_silu_1", "kernel", 1200, 100),
        event("Optimizer.step#AdamAtan2.step", "gpu_user_annotation", 1400, 300),
        event("vectorized_elementwise_kernel<atan2>", "kernel", 1400, 300),
        event("nvjet_tst_128x256", "kernel", -100, 50),
    ]
    lines = table(events).splitlines()
    assert lines[0] == "A step takes 1.000 ms (mean of 2)."
    rows = {line.split("%")[1].strip(): float(line.split()[0]) for line in lines[3:11]}
    assert rows == {
        "optimizer, clipping and average": 0.15, "attention": 0.1, "loss": 0, "matrix products": 0.3,
        "norms, elementwise and other": 0.05, "communication": 0.15, "copies": 0.05, "idle": 0.2,
    }  # fmt: skip
    assert lines[13].split() == ["0.300", "30.0%", "0.5", "nvjet_tst_128x256"]


def test_mfu_is_logged_where_the_devices_peak_is_known(tmp_path, monkeypatch, capsys):
    config = small_config(train__steps=2)
    assert "mfu" not in train_locally(config, tmp_path / "unknown").reports[-1]
    monkeypatch.setattr(loop, "matrix_peak", lambda device, precision: 1e9)
    monkeypatch.setattr(loop, "interval_flops", lambda model, config, steps, *amounts: 1e6 * len(steps))
    report = train_locally(config, tmp_path / "known").reports[-1]
    assert report["mfu"] == pytest.approx(1e6 * report["samples_per_s"] / config.train.batch_size / 1e9)
    assert "  mfu 0." in capsys.readouterr().out


def test_a_dry_run_prints_the_loss_and_then_the_plan(command):
    sets = ["model.d_model=16", "model.n_heads=2", "model.max_prompt_len=12", "model.max_response_len=4",
            "model.vocab_size=100", "train.batch_size=8", "train.ema_decay=0.9"]  # fmt: skip
    code, out, _ = command(main, "--dry_run", 1, *(f"--set={value}" for value in sets))
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("loss ")
    rows = dict(line.split(maxsplit=1) for line in lines[1:])
    parameters = sum(p.numel() for p in build_state(small_config(), 100).model.parameters())
    assert rows["parameters"] == f"{parameters:,}, vocabulary 100"
    assert "8 samples of 12 + 4 tokens in 1 micro-batch" in lines[2]
    assert rows["weights"] == f"{parameters * 4 / 2**20:.1f} MiB"
    assert "tokens/s (CPU)" in rows["measured"] and rows["time"].startswith("200 steps of ")


def test_a_model_that_does_not_fit_the_machine_gets_its_plan_and_no_loss(command, monkeypatch):
    monkeypatch.setattr(dry, "host_memory", lambda: 10 * 2**20)
    code, out, _ = command(main, "--dry_run", 1, "--set=model.d_model=256")
    assert (
        code == 0
        and out.startswith("loss         not computed: a run keeps ")
        and "7.0 MiB of memory are free for it" in out
    )
    assert "time         not measured: a run keeps " in out
    monkeypatch.undo()
    code, out, _ = command(main, "--dry_run", 1, "--set=model.d_model=64000", "--set=model.hrm.h_cycles=200")
    assert code == 0 and out.startswith("loss         not computed: a step takes a CPU too long\nparameters ")


def test_a_plan_of_a_vocabulary_without_room_for_special_tokens_is_an_error_of_a_line(command):
    code, _, err = command(main, "--dry_run", 1, "--set=model.vocab_size=2", "--set=train.batch_size=2")
    assert code == 2 and err == "error: model.vocab_size: 2 is less than the 4 tokens of the tokenizer\n"


def test_a_plan_shares_what_workers_share_and_counts_the_longest_samples():
    xl = {"model__architecture": "prefix_lm", "model__d_model": 1536, "model__n_heads": 12, "model__vocab_size": 65_536,
          "model__hrm__h_layers": 16, "model__hrm__l_layers": 16, "train__packing": True, "train__batch_tokens": 65_536,
          "train__length_window": 65_536, "model__max_prompt_len": 1024, "model__max_response_len": 1024}  # fmt: skip
    text = plan(small_config(**xl, ray__num_workers=2, ray__parallel="fsdp"), CPU)
    assert "weights      2.2 GiB a worker, 4.4 GiB in all" in text
    assert "32 samples of 1,024 + 1,024 tokens in 2 micro-batches, of 2 workers" in text
    assert "not measured: a step takes a CPU too long" in text


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(architecture):
    config = small_config(
        model__architecture=architecture, model__d_model=64, model__n_heads=2,
        model__max_prompt_len=64, model__max_response_len=64, model__hrm__backprop_steps=4,
    )  # fmt: skip
    splits = load_dataset(config.data, config.model, 0)
    state = build_state(config, 64)
    lengths = lengths_of(config)
    batch = batch_of(state, splits.tokenizer, *lengths)
    weights, kept = {p.untyped_storage().data_ptr() for p in state.model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state.model(batch, config.model.hrm.cycles, 4)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    count, prompt, labels = lengths
    estimate = activation_bytes(state.model, config, count * prompt, count * labels)
    assert 0.8 < estimate / real < 1.2, (estimate, real)


@pytest.mark.gpu
def test_on_a_gpu_the_table_knows_the_kernels_and_the_plan_measures(tmp_path):
    class OnGpu(LocalSession):
        device, event_folder = torch.device("cuda"), tmp_path / "events"

    fields = {"train__mixed_precision": "bf16", "model__d_model": 256, "model__n_heads": 4, "train__steps": 20}
    session = OnGpu(tmp_path / "run")
    outcome = loop.train(small_config(**fields, train__profile=True), session)
    assert outcome["status"] == "finished", outcome
    known = loop.matrix_peak(OnGpu.device, "bf16") is not None
    assert known == ("mfu" in session.reports[-1]) and 0 < session.reports[-1].get("mfu", 0.5) < 1, session.reports[-1]
    text = (tmp_path / "events/profile/table.txt").read_text()
    shares = {line.split("%")[1].strip(): float(line.split("%")[0].split()[1]) for line in text.splitlines()[3:11]}
    assert sum(shares.values()) == pytest.approx(100, abs=0.5), text
    found = ("optimizer, clipping and average", "matrix products", "attention", "loss", "copies", "idle")
    assert all(shares[name] > 0 for name in found), text

    planned = plan(small_config(**fields, model__vocab_size=500), OnGpu.device)
    assert torch.cuda.get_device_name() in planned and "20 steps of " in planned and "this GPU has" in planned, planned


def test_the_dry_run_of_a_large_model_takes_a_few_samples_on_cpu_and_that_of_a_small_model_all(monkeypatch):
    taken = []
    monkeypatch.setattr(step, "train_step", lambda state, batches, stats: taken.append((batches[0].num_samples, state)))
    monkeypatch.setattr(dry, "STEP_FLOPS", 3e9)
    for width in (16, 512):
        fields = {"model__d_model": width, "train__compile": True, "train__batch_size": 64}
        dry.random_loss(small_config(**fields), torch.device("cpu"))
    (small, _), (large, state) = taken
    assert small == 64 and 1 <= large < 64
    assert not state.config.train.compile, "which would take longer than the step"
