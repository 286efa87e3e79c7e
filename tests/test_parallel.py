"""Sharded training on two processes (gloo), without Ray: the curve of DDP, and checkpoints that know no worker count."""

import contextlib
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import LocalSession, assert_same_weights, eval_options, small_config, train_locally
from safetensors.torch import load_file

from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import generate
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.loop import train
from hrm_lm.training.validation import validate

HYBRID = {"train__val_every": 2, "train__grad_accum_steps": 2}
RECIPE = {
    "train__val_every": 2, "model__architecture": "prefix_lm", "optim__name": "adam_atan2", "train__ema_decay": 0.7,
    "train__sample_h_cycles": [1, 3], "model__hrm__backprop_steps": 4, "train__grad_clip": 0.5, "train__batch_size": 6,
}  # fmt: skip
SCORED = {
    "data__dataset": "reasoning_gym:syllogism", "data__val_samples": 9, "model__max_response_len": 5, "optim__lr": 0.03,
}  # fmt: skip
MUON = HYBRID | {"optim__name": "muon"}
TWO = {"ray__num_workers": 2}
pytestmark = pytest.mark.slow


class TwoProcesses(LocalSession):
    """Both ranks write into one folder, as Ray makes one checkpoint of what several workers report."""

    world_size = 2

    def __init__(self, rank, folder, stop_at):
        super().__init__(folder, stop_at)
        self.rank, self.progress = rank, "none"

    def new_folder(self):
        (self.folder / "new").mkdir(exist_ok=True)
        return self.folder / "new"

    def report(self, metrics, checkpoint):
        dist.barrier()
        try:
            if self.rank == 0:
                super().report(metrics, checkpoint)
        finally:
            dist.barrier()
        if self.stop_at == metrics["step"]:
            raise KeyboardInterrupt


def worker(rank, port, jobs, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, config, folder, stop_at in jobs:
        session = TwoProcesses(rank, folder, stop_at)
        with contextlib.suppress(KeyboardInterrupt):
            train(config, session)
        if rank == 0:
            results[name] = session.reports
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of two processes, in one pair of them: their losses by name, and the folder they are in."""
    root = tmp_path_factory.mktemp("runs")
    train_locally(small_config(**RECIPE), root / "one_then_two", stop_at=6)
    both = {
        "hybrid": HYBRID, "recipe": RECIPE, "bf16": RECIPE | {"train__mixed_precision": "bf16"}, "scored": SCORED,
        "muon": MUON,
    }  # fmt: skip
    jobs = [
        (f"{kind}_{parallel}", small_config(**fields, **TWO, ray__parallel=parallel), root / f"{kind}_{parallel}", None)
        for kind, fields in both.items()
        for parallel in ("ddp", "fsdp")
    ]
    sharded = small_config(**RECIPE, **TWO, ray__parallel="fsdp")
    jobs.append(("two_then_one", sharded, root / "two_then_one", 6))
    jobs.append(("one_then_two", sharded, root / "one_then_two", None))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(port, jobs, results), nprocs=2)
        return dict(results), root


def column(reports, name):
    return [metrics[name] for metrics in reports]


@pytest.mark.parametrize("kind", ["hybrid", "recipe", "muon"])
def test_fsdp_has_the_curve_of_ddp(runs, kind):
    ddp, fsdp = (runs[0][f"{kind}_{parallel}"] for parallel in ("ddp", "fsdp"))
    assert len(ddp) == 6
    for name in ("loss", "val_loss", "grad_norm"):
        assert column(fsdp, name) == pytest.approx(column(ddp, name), rel=1e-5)


def test_sharded_muon_has_the_weights_and_the_momentum_of_one_worker(runs, tmp_path):
    train_locally(small_config(**MUON), tmp_path / "one")
    shutil.copytree(runs[1] / "muon_fsdp", tmp_path / "two")
    one, two = (train_locally(small_config(**MUON, train__steps=14), tmp_path / folder) for folder in ("one", "two"))
    assert column(one.reports, "step") == column(two.reports, "step") == [14]
    assert_same_weights(one.last_weights(), two.last_weights(), atol=1e-5, rtol=1e-4)


def test_workers_answer_for_the_verifier_together_sharded_or_not(runs):
    ddp, fsdp = (runs[0][f"scored_{parallel}"] for parallel in ("ddp", "fsdp"))
    model, _, checkpoint = load_model(max((runs[1] / "scored_fsdp").glob("step_*")))
    alone = validate(model, load_dataset(checkpoint.config.data, checkpoint.config.model, 0), eval_options(3))
    for name in ("val_loss", "val_exact_match", "val_score"):
        assert column(fsdp, name) == pytest.approx(column(ddp, name), rel=1e-5)
        assert fsdp[-1][name] == pytest.approx(alone[name], rel=1e-5)
    assert fsdp[-1]["val_score"] > 0, "it has learned to say Yes or No"


def test_fsdp_in_bf16_has_the_curve_of_ddp_as_far_as_bf16_goes(runs):
    ddp, fsdp = (runs[0][f"bf16_{parallel}"] for parallel in ("ddp", "fsdp"))
    assert column(fsdp, "val_loss") == pytest.approx(column(ddp, "val_loss"), rel=0.02)
    (file, *_) = (max((runs[1] / "bf16_fsdp").glob("step_*")) / "model").iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}, "master weights"


def test_every_worker_writes_its_part_and_nothing_else_is_in_a_checkpoint(runs):
    checkpoint = max((runs[1] / "recipe_fsdp").glob("step_*"))
    files = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    assert [file for file in files if not file.endswith((".safetensors", ".json", ".yaml"))] == []
    for kind in ("model", "average", "optimizer"):
        parts = [load_file(checkpoint / file) for file in files if file.startswith(kind + "/")]
        assert len(parts) == 2
        sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
        assert min(sizes) > 0.4 * sum(sizes)


def test_two_workers_checkpoint_resumes_on_one(runs, tmp_path):
    shutil.copytree(runs[1] / "two_then_one", tmp_path / "run")
    rest = train_locally(small_config(**RECIPE), tmp_path / "run").reports
    assert column(rest, "step") == [8, 10, 12]
    for name in ("loss", "val_loss"):
        assert column(rest, name) == pytest.approx(column(runs[0]["recipe_ddp"], name)[3:], rel=1e-5)


def test_one_workers_checkpoint_resumes_on_two(runs):
    rest = runs[0]["one_then_two"]
    assert column(rest, "step") == [8, 10, 12]
    for name in ("loss", "val_loss"):
        assert column(rest, name) == pytest.approx(column(runs[0]["recipe_ddp"], name)[3:], rel=1e-5)


@pytest.mark.parametrize("kind", ["hybrid", "recipe"])
def test_a_sharded_checkpoint_generates_and_evaluates_on_one_machine(runs, kind):
    model, tokenizer, checkpoint = load_model(max((runs[1] / f"{kind}_fsdp").glob("step_*")))
    splits = load_dataset(checkpoint.config.data, checkpoint.config.model, 0)
    val_loss = validate(model, splits, eval_options(8, cycles=checkpoint.config.model.hrm.cycles))["val_loss"]
    assert val_loss == pytest.approx(runs[0][f"{kind}_fsdp"][-1]["val_loss"], rel=1e-5)
    whole, *_ = load_model(max((runs[1] / f"{kind}_ddp").glob("step_*")))
    prompts = ["What is 1 + 2?", "What is 8 + 7?"]
    assert generate(model, tokenizer, prompts) == generate(whole, tokenizer, prompts)


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_sharded_checkpoint_with_a_part_missing_or_torn_is_refused(runs, tmp_path, damage):
    shutil.copytree(max((runs[1] / "recipe_fsdp").glob("step_*")), tmp_path / "c")
    for file in sorted((tmp_path / "c" / "model").iterdir()):
        copy = file.read_bytes()
        file.unlink()
        if damage == "torn":
            file.write_bytes(copy[: len(copy) // 2])
        with pytest.raises(UserError, match="/c/model[:/]"):
            load_model(tmp_path / "c")
        file.write_bytes(copy)
    load_model(tmp_path / "c")
