"""Checkpoints that are torn, what a run may go on with, and checkpoints between validations; no Ray cluster."""

import shutil
from pathlib import Path

import pyarrow.fs
import pytest
from conftest import assert_resumes_exactly, assert_same_weights, small_config, train_locally
from safetensors.torch import load_file, save_file

from hrm_lm.cluster import ray_private
from hrm_lm.cluster.sessions import TuneSession
from hrm_lm.errors import UserError
from hrm_lm.training.checkpoint import load_model, obstacles, read_checkpoint
from hrm_lm.tuning.trial import newest_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return train_locally(small_config(train__steps=1), tmp_path / "run").last_checkpoint


def cut(file, size=-1):
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("size", [-1, 100, 4, 0])
def test_cut_weights_are_found_without_reading_them(checkpoint, size):
    read_checkpoint(checkpoint, for_resume=True)
    cut(checkpoint / "model.safetensors", size)
    with pytest.raises(UserError, match="model.safetensors: torn or foreign"):
        read_checkpoint(checkpoint)


def test_only_a_resume_needs_the_optimizer(checkpoint):
    cut(checkpoint / "optimizer.safetensors")
    read_checkpoint(checkpoint)
    with pytest.raises(UserError, match="optimizer.safetensors: torn or foreign"):
        read_checkpoint(checkpoint, for_resume=True)
    (checkpoint / "optimizer.safetensors").unlink()
    assert load_model(checkpoint)
    with pytest.raises(UserError, match="not a whole checkpoint: optimizer.safetensors is missing"):
        read_checkpoint(checkpoint, for_resume=True)


def shard(checkpoint, kind, name):
    """Two files in place of one, with the tensor `name` cut in two, as workers with a sharded model write them."""
    tensors = load_file(checkpoint / f"{kind}.safetensors")
    (checkpoint / f"{kind}.safetensors").unlink()
    (checkpoint / kind).mkdir()
    parts = [tensors, {name: tensors[name]}]
    parts[0][name], parts[1][name] = (half.contiguous() for half in tensors[name].chunk(2))
    for i, part in enumerate(parts):
        offsets = {n: {"saved_offsets": [0] * t.dim()} for n, t in part.items()}
        offsets[name]["saved_offsets"][0] = i * len(parts[0][name])
        info = {"format": "pt", "DCP_SHARDING_INFO": str(offsets).replace("'", '"')}
        save_file(part, checkpoint / kind / f"shard-0000{i}.safetensors", metadata=info)


def test_a_sharded_checkpoint_is_whole_only_with_all_its_parts(checkpoint):
    before = load_model(checkpoint)[0].state_dict()
    shard(checkpoint, "model", "embedding.weight")
    after = load_model(checkpoint)[0].state_dict()
    assert_same_weights(before, after)
    first, second = sorted((checkpoint / "model").iterdir())
    whole = second.read_bytes()
    cut(second)
    with pytest.raises(UserError, match="shard-00001.safetensors: torn or foreign"):
        read_checkpoint(checkpoint)
    second.write_bytes(whole)
    first.unlink()
    with pytest.raises(UserError, match="model: not whole: a part of embedding.weight is missing"):
        read_checkpoint(checkpoint)
    second.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        read_checkpoint(checkpoint)


def test_a_trial_passes_over_what_it_cannot_go_on_from(tmp_path):
    config = small_config(train__steps=4, train__val_every=1)
    train_locally(config, tmp_path / "run")
    folders = sorted((tmp_path / "run").glob("step_*"))
    trial, fs = tmp_path / "trial", pyarrow.fs.LocalFileSystem()
    of_workers = trial / "workers_1/checkpoint_00000003"
    places = [trial / "checkpoint_000009", trial / "checkpoint_00000002_a", of_workers, trial / "checkpoint_00000004_b"]
    for folder, place in zip(folders, places):
        shutil.copytree(folder, place)

    def newest(config):
        found = newest_checkpoint(config, fs, str(trial))
        return found and Path(found.path)

    assert newest(config) == places[3]
    cut(places[3] / "model.safetensors")
    assert newest(config) == places[2]
    (places[2] / "optimizer.safetensors").unlink()
    (places[1] / "trainer_state.json").unlink()
    assert newest(config) == places[0]
    assert newest(small_config(train__steps=4, train__val_every=1, train__seed=1)) is None
    assert newest_checkpoint(config, fs, str(tmp_path / "nothing")) is None


def test_a_trial_that_is_taken_over_writes_into_no_folder_of_the_process_before(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("ray.get_gpu_ids", list)
    monkeypatch.setattr("hrm_lm.cluster.sessions.use_assigned_cpus", lambda device: None)
    monkeypatch.setattr(ray_private, "trial_folder", lambda: (pyarrow.fs.LocalFileSystem(), str(tmp_path / "trial")))
    monkeypatch.setattr(ray_private, "report_to_tune", lambda metrics, checkpoint: told.append(Path(checkpoint.path)))
    for file in ("optimizer.safetensors", "model.safetensors"):  # as of a process that was killed in mid-copy
        session = TuneSession("val_loss")
        written = session.new_folder()
        (written / file).write_text(file)
        session.report({"step": 5}, written)
        assert not written.exists()
    assert [[file.name for file in folder.iterdir()] for folder in told] == [
        ["optimizer.safetensors"],
        ["model.safetensors"],
    ]


def test_a_run_goes_on_with_another_rate_but_not_with_another_shape_or_order():
    now = small_config(optim__lr=1.0, train__steps=99, ray__num_workers=2, model__max_prompt_len=9)
    assert obstacles(small_config(), now) == {}
    fixed = {"model__d_model": 32, "train__seed": 1, "data__val_fraction": 0.3, "model__hrm__l_layers": 2}
    assert obstacles(small_config(), small_config(**fixed)).keys() == {key.replace("__", ".") for key in fixed}
    tokens = {"model__architecture": "prefix_lm", "train__batch_tokens": 1024, "train__length_window": 64}
    assert obstacles(small_config(**tokens), small_config(**tokens, train__packing=True)).keys() == {"train.packing"}
    cut = small_config(data__truncate=True)
    assert obstacles(cut, small_config(data__truncate=True, model__max_prompt_len=9)).keys() == {"model.max_prompt_len"}
    assert obstacles(small_config(), small_config(model__hrm__h_cycles=3)) == {}
    assert obstacles(small_config(), small_config(model__hrm__h_cycles=0)) == {"model.hrm.h_cycles": (2, 0)}


def test_a_run_killed_between_validations_goes_on_from_the_last_interval(tmp_path):
    options = {"train__steps": 12, "train__val_every": 6, "train__ema_decay": 0.5}
    session = assert_resumes_exactly(small_config(**options, train__checkpoint_every=4), tmp_path, 8)
    assert [(m["step"], "val_loss" in m) for m in session.reports] == [(4, False), (6, True), (8, False), (12, True)]
    without = train_locally(small_config(**options), tmp_path / "without")
    assert [m["val_loss"] for m in without.reports] == [m["val_loss"] for m in session.reports if "val_loss" in m]
    assert_same_weights(without.last_weights(), session.last_weights())
    best = min(without.reports, key=lambda metrics: metrics["val_loss"])
    progress = read_checkpoint(max((tmp_path / "stopped").glob("step_*"))).progress
    assert (progress.best_step, progress.best_val_loss) == (best["step"], best["val_loss"])
