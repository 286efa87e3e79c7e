"""Checkpoints that are torn or damaged, what a run may go on with, how a checkpoint is written while training goes on, and
checkpoints between validations; no Ray cluster.
"""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs
import pytest
import ray.train
import torch
from conftest import (
    assert_resumes_exactly,
    assert_same_weights,
    batches_of,
    flip_bit,
    small_config,
    train_locally,
    without_checksums,
)
from safetensors.torch import load_file, save_file

from hrm_lm.cluster import ray_private
from hrm_lm.cluster.sessions import RayTrainSession, TuneSession
from hrm_lm.data.collate import to_device
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import DamagedCheckpoint, StorageError, UserError
from hrm_lm.training.checkpoint import (
    Progress,
    Snapshot,
    check_contents,
    load_model,
    load_state,
    obstacles,
    read_checkpoint,
)
from hrm_lm.training.checkpoint_files import write_file
from hrm_lm.training.step import Stats, build_state, train_step
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
    """Two files in place of one, with the tensor `name` cut in two, as workers with a sharded model wrote them when
    checkpoints had no checksums.
    """
    without_checksums(checkpoint)
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


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "config.yaml", "tokenizer.json", "trainer_state.json"]
)
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(checkpoint, file):
    whole = (checkpoint / file).read_bytes()
    for position in (10, len(whole) // 2, len(whole) - 2):
        flip_bit(checkpoint / file, position)
        with pytest.raises(DamagedCheckpoint, match=file):
            check_contents(read_checkpoint(checkpoint, for_resume=True))
        (checkpoint / file).write_bytes(whole)
    check_contents(read_checkpoint(checkpoint, for_resume=True))


def test_no_use_of_a_checkpoint_takes_changed_weights(checkpoint, tmp_path):
    flip_bit(checkpoint / "model.safetensors", -1)
    with pytest.raises(UserError, match="model.safetensors: damaged: its bytes are not those that were written"):
        load_model(checkpoint)  # of `generate`, `evaluate` and `export`
    with pytest.raises(UserError, match="model.safetensors: damaged"):
        train_locally(small_config(train__init_from=str(checkpoint)), tmp_path / "other")


def test_a_resume_takes_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path, capsys):
    config = small_config(train__steps=9, train__val_every=3)
    straight = train_locally(config, tmp_path / "straight")
    train_locally(config, tmp_path / "run", stop_at=6)
    flip_bit(tmp_path / "run/step_000006/optimizer.safetensors", -1)
    capsys.readouterr()
    again = train_locally(config, tmp_path / "run")
    assert capsys.readouterr().err.startswith("run/step_000006/optimizer.safetensors: damaged"), "not of a local copy"
    assert [metrics["step"] for metrics in again.reports] == [6, 9]
    assert_same_weights(again.last_weights(), straight.last_weights())
    for folder in (tmp_path / "run").iterdir():
        cut(folder / "model.safetensors")
    with pytest.raises(UserError, match="step_000003/model.safetensors: torn or foreign"):
        train_locally(config, tmp_path / "run")


def test_a_checkpoint_without_checksums_resumes_as_it_always_did(tmp_path):
    config = small_config(train__val_every=6)
    straight = train_locally(config, tmp_path / "straight")
    without_checksums(train_locally(config, tmp_path / "run", stop_at=6).last_checkpoint)
    assert_same_weights(train_locally(config, tmp_path / "run").last_weights(), straight.last_weights())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_checkpoint_holds_the_state_that_was_taken_whatever_training_does_meanwhile(device, tmp_path):
    config = small_config(train__ema_decay=0.5, model__d_model=64)
    splits, device = load_dataset(config.data, config.model, 0), torch.device(device)

    def new_state():
        return build_state(config, splits.tokenizer.vocab_size, device)

    state = new_state()
    batches, stats = batches_of(splits, config, collate=state.model.collate), Stats(state)

    def step():
        train_step(state, [to_device(batch, device) for batch in next(batches)], stats)

    def tensors(state):
        tensors = {f"model/{name}": t.clone() for name, t in state.model.state_dict().items()}
        tensors |= {f"average/{name}": t.clone() for name, t in state.average.tensors.items()}
        moments = [
            (i, slot) for i, p in enumerate(state.model.parameters()) for slot in state.optimizer.state[p].items()
        ]
        return tensors | {f"{slot}/{i}": t.clone() for i, (slot, t) in moments}

    snapshot, fs = Snapshot(state, splits.tokenizer), pyarrow.fs.LocalFileSystem()
    for i in range(2):  # the second copy takes the place of the first
        step()
        taken = tensors(state)
        snapshot.take(Progress(step=i + 1))
        step()
        snapshot.write(fs, str(tmp_path / str(i)))
        saved = new_state()
        checkpoint = read_checkpoint(tmp_path / str(i), for_resume=True)
        check_contents(checkpoint)
        load_state(checkpoint, saved)
        assert saved.step == i + 1
        assert_same_weights(tensors(saved), taken)
    if device.type == "cuda":
        assert all(copy.is_pinned() for copies in snapshot.copies.values() for copy in copies.values())


class Failing(pyarrow.fs.FileSystemHandler):
    """A local disk on which opening a file to write fails with each of `errors` in turn, and then no more."""

    def __init__(self, *errors):
        self.local, self.errors = pyarrow.fs.LocalFileSystem(), list(errors)

    def get_type_name(self):
        return "failing"

    def normalize_path(self, path):
        return path

    def create_dir(self, path, recursive):
        self.local.create_dir(path, recursive=recursive)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        self.local.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def open_output_stream(self, path, metadata):
        if self.errors:
            raise self.errors.pop()
        return self.local.open_output_stream(path)

    def unused(self, *_):
        raise NotImplementedError

    get_file_info = get_file_info_selector = delete_dir = delete_root_dir_contents = delete_file = unused
    move = copy_file = open_input_stream = open_input_file = open_append_stream = unused


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def snapshot():
    config = small_config()
    splits = load_dataset(config.data, config.model, 0)
    return Snapshot(build_state(config, splits.tokenizer.vocab_size), splits.tokenizer)


def test_a_full_disk_is_waited_for_while_the_next_checkpoint_waits_for_this_one(snapshot, tmp_path, waits, capsys):
    fs = pyarrow.fs.PyFileSystem(Failing(FULL, FULL, OSError("AWS Error NETWORK_CONNECTION")))
    snapshot.take(Progress(step=1))
    next_one = threading.Thread(target=snapshot.take, args=[Progress(step=2)])
    next_one.start()
    snapshot.write(fs, str(tmp_path / "c"))
    next_one.join()
    assert len(waits) == 3 and capsys.readouterr().err.count("No space left on device; next try in") == 2
    checkpoint = read_checkpoint(tmp_path / "c", for_resume=True)
    check_contents(checkpoint)
    assert checkpoint.progress.step == 1


@pytest.mark.parametrize("error, kind", [(PermissionError(errno.EACCES, "no"), UserError), (FULL, StorageError)])
def test_training_ends_with_the_reason_when_a_checkpoint_cannot_be_written(snapshot, tmp_path, waits, error, kind):
    fs = pyarrow.fs.PyFileSystem(Failing(*[error] * 100))
    snapshot.take(Progress(step=1))
    for action in (lambda: snapshot.write(fs, str(tmp_path)), lambda: snapshot.take(Progress(step=2))):
        with pytest.raises(UserError, match="optimizer.safetensors: cannot be written: ") as caught:
            action()
        assert type(caught.value) is kind
    assert bool(waits) == (kind is StorageError)


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
        write = lambda fs, path, file=file: write_file(fs, f"{path}/{file}", [b"a part"])  # noqa: E731
        TuneSession("val_loss").report({"step": 5}, SimpleNamespace(write=write))
    assert [[file.name for file in folder.iterdir()] for folder in told] == [
        ["optimizer.safetensors"],
        ["model.safetensors"],
    ]


def test_a_run_that_went_back_and_was_killed_never_writes_into_a_folder_that_ray_lists(tmp_path, monkeypatch):
    def reported(step):
        checkpoint = ray.train.Checkpoint(tmp_path / f"checkpoint_{step:08d}", pyarrow.fs.LocalFileSystem())
        return SimpleNamespace(checkpoint=checkpoint, metrics={"step": step})

    # Step 100 was damaged. The workers went back to step 50 and died after step 75.
    listed, names = {step: reported(step) for step in (50, 75, 100)}, []
    storage = SimpleNamespace(
        storage_filesystem=pyarrow.fs.LocalFileSystem(),
        build_checkpoint_path_from_name=lambda name: str(tmp_path / name),
    )
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: listed[75].checkpoint)
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda: list(listed.values()))
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    monkeypatch.setattr("ray.train.report", lambda *_, checkpoint_dir_name, **__: names.append(checkpoint_dir_name))
    session = object.__new__(RayTrainSession)
    session.rank, session._start_from, session._listed, session.event_folder = 0, None, set(), None
    session._reached = SimpleNamespace(before=60)  # it was not written after each step
    next(session.checkpoints())
    for step in (90, 100):
        session.report({"step": step}, None)
    assert names == ["checkpoint_00000090", "checkpoint_00000100_again"]
    assert session._reached.before == 100, "so many steps were taken at least"


def test_a_run_goes_on_with_another_rate_but_not_with_another_shape_or_order():
    now = small_config(optim__lr=1.0, train__steps=99, ray__num_workers=2, model__max_prompt_len=9)
    assert obstacles(small_config(), now) == {}
    fixed = {"model__d_model": 32, "train__seed": 1, "data__val_fraction": 0.3, "model__hrm__l_layers": 2}
    assert obstacles(small_config(), small_config(**fixed)).keys() == {key.replace("__", ".") for key in fixed}
    tokens = {"model__architecture": "prefix_lm", "train__batch_tokens": 1024, "train__length_window": 64}
    assert obstacles(small_config(**tokens), small_config(**tokens, train__packing=True)).keys() == {"train.packing"}
    cut = small_config(data__truncate=True)
    assert obstacles(cut, small_config(data__truncate=True, model__max_prompt_len=9)).keys() == {"model.max_prompt_len"}
    puzzle = {"model__architecture": "puzzle"}
    assert obstacles(small_config(**puzzle), small_config(**puzzle, model__places=False)).keys() == {"model.places"}
    longer = small_config(**puzzle, model__max_prompt_len=9, model__max_response_len=9)
    assert obstacles(small_config(**puzzle), longer).keys() == {"model.max_prompt_len"}
    assert obstacles(small_config(), small_config(data__cache_gb=1)) == {}
    remote = small_config(data__dataset="s3://bucket/corpus")
    assert obstacles(remote, small_config(data__dataset="s3://bucket/corpus", data__cache_gb=1)).keys() == {
        "data.cache_gb"
    }
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


def described(checkpoint, **fields):
    """Another trainer_state.json, as an older version would have written it."""
    without_checksums(checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"step": "12"}, "step: Input should be a valid integer"),
        ({"step": True}, "step: Input should be a valid integer"),
        ({"step": -1}, "step: Input should be greater than or equal to 0"),
        ({"tokens": 2**63}, "tokens: should be less than 2^63"),
        ({"best_val_loss": float("nan")}, "best_val_loss: Input should be a finite number"),
        ({"watched": {"mean": "1"}}, "watched.mean: Input should be a valid number"),
        ({"left_out": [[1]]}, "left_out.0"),
        ({"window": 5, "window_step": 3}, "its window begins after its step"),
        ({"scaler": {"scale": 1.0}}, "its scaler is not whole"),
        ({"files": {"../../x": {"size": 1}}}, "the record of ../../x is not whole"),
        ({"canary": 1}, "canary: "),
    ],
)
def test_what_a_checkpoint_says_of_its_run_is_checked(checkpoint, fields, message):
    described(checkpoint, **fields)
    with pytest.raises(DamagedCheckpoint) as error:
        read_checkpoint(checkpoint)
    assert "trainer_state.json: torn or foreign: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda header: header["head.weight"].update(shape=[2**60]), "does not have the bytes of its shape"),
        (lambda header: header["head.weight"].update(data_offsets=[0, 2**60]), "does not have the bytes of its shape"),
        (lambda header: header["head.weight"].update(data_offsets=[0]), r"\[0\] is not a list of 2 counts"),
        (lambda header: header["head.weight"].update(shape=[-1, 16]), "are not counts"),
        (lambda header: header["head.weight"].update(dtype="F8"), "dtype 'F8'"),
        (lambda header: header.update({"head.weight": 5}), "torn or foreign"),
    ],
)
def test_a_header_that_lies_is_found_and_takes_no_memory(checkpoint, how, message):
    without_checksums(checkpoint)
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    how(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(DamagedCheckpoint, match=message):
        read_checkpoint(checkpoint)
    file.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    with pytest.raises(DamagedCheckpoint, match="cut in its header"):
        read_checkpoint(checkpoint)


def test_a_config_of_a_larger_model_than_the_weights_are_takes_no_memory(checkpoint):
    without_checksums(checkpoint)
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("d_model: 16", "d_model: 100000"))
    with pytest.raises(UserError, match=r"has shape .*16.*, this model's has .*100000"):
        load_model(checkpoint)
