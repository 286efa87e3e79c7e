"""Prepared datasets: the format and its reader, order and batches; no Ray."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pyarrow.fs
import pytest
from conftest import (
    DIGITS,
    ROOT,
    Remote,
    assert_resumes_exactly,
    batches_of,
    each_fails_once,
    small_config,
    sums,
    train_locally,
    wait_until,
    write_prepared,
)  # fmt: skip

from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.collate import pad, pad_batch
from hrm_lm.data.prepared import cache
from hrm_lm.data.prepared.cache import fetch
from hrm_lm.data.prepared.format import token_dtype
from hrm_lm.data.prepared.reader import load_prepared
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import global_batches
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError

LOCAL = pyarrow.fs.LocalFileSystem()


def load(location, model=ModelConfig(), **fields):
    return load_dataset(DataConfig(dataset=str(location), **fields), model, seed=0)


def test_samples_come_back_as_they_were_written_over_all_shards(tmp_path):
    splits = load(write_prepared(tmp_path / "d", sums(50)))
    decode = splits.tokenizer.decode
    assert len(splits.train) == 50 and len(splits.val) == 2
    assert sorted((decode(s.prompt), decode(s.response)) for s in splits.train) == sorted(sums(50))
    assert all(s.prompt.dtype == np.uint8 and s.ends for s in splits.train)
    lengths = splits.train.lengths(np.arange(50))
    assert lengths.tolist() == [[len(s.prompt), len(s.response) + 1] for s in splits.train]


def test_many_shards_take_no_file_descriptors(tmp_path):
    """A limit of 1,024 open files is usual, and a corpus of some hundred shards too."""
    splits = load(write_prepared(tmp_path / "d", sums(40), shards=20))
    splits.train.ragged(np.arange(40))
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert len(splits.train._shards) == 20 and not [file for file in opened if file.startswith(str(tmp_path))]


def test_a_shard_is_opened_when_a_sample_of_it_is_asked_for(tmp_path):
    splits = load(write_prepared(tmp_path / "d", sums(40), shards=20))
    assert not splits.train._shards and not splits.val._shards
    splits.train[0]
    assert list(splits.train._shards) == [0]


@pytest.mark.parametrize("vocab_size, dtype", [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_take_the_smallest_unsigned_type(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype


def test_what_is_too_long_is_refused_or_cut_when_read(tmp_path):
    folder, model = write_prepared(tmp_path / "d", sums(50)), ModelConfig(max_prompt_len=4, max_response_len=3)
    with pytest.raises(UserError, match=r"longest prompt has 7 tokens, more than model.max_prompt_len \(4\)"):
        load(folder, model)
    whole, cut = load(folder).train, load(folder, model, truncate=True).train
    for sample, short in zip(whole, cut, strict=True):
        assert sample.prompt[:4].tolist() == short.prompt.tolist()
        assert sample.response[:3].tolist() == short.response.tolist()
        assert short.ends == (len(sample.response) < 3)
    assert cut.lengths(np.arange(50)).tolist() == [[len(s.prompt), len(s.response) + s.ends] for s in cut]


@pytest.mark.parametrize("round_up", [False, True])
@pytest.mark.parametrize("model", [ModelConfig(), ModelConfig(max_prompt_len=4, max_response_len=3)])
def test_a_batch_is_that_of_the_same_samples_one_by_one(tmp_path, model, round_up):
    splits = load(write_prepared(tmp_path / "d", sums(50)), model, truncate=True)
    indices = np.array([3, 49, 17, 17, 0])
    one_by_one = pad_batch([splits.train[i] for i in indices], DIGITS, round_up)
    for a, b in zip(pad(splits.train.ragged(indices), DIGITS, round_up), one_by_one, strict=True):
        assert a.dtype == b.dtype and a.equal(b)


def break_file(name, how):
    def apply(folder):
        file = folder / name
        raw = file.read_bytes()
        file.unlink() if how is None else file.write_bytes(how(raw))

    return apply


def edit_meta(**fields):
    return break_file("meta.json", lambda raw: json.dumps(json.loads(raw) | fields).encode())


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_file("train-00001.bin", lambda raw: raw[:-1]), r"train-00001\.bin: has \d+ bytes, meta\.json says \d+"),
        (break_file("train-00002.idx", None), r"train-00002\.idx: is missing"),
        (break_file("meta.json", lambda raw: raw[: len(raw) // 2]), r"meta\.json: torn or foreign"),
        (break_file("meta.json", lambda raw: b"[]"), r"meta\.json: torn or foreign"),
        (edit_meta(format_version=99), r"meta\.json: format version 99, this program reads 1"),
        (edit_meta(splits={}), r"meta\.json: torn or foreign: 'train' is missing"),
        (break_file("tokenizer.json", lambda raw: raw.replace(b"9", b"x")), r"tokenizer\.json: is not the one"),
        (
            break_file("meta.json", lambda raw: raw.replace(b'"train-00001"', b'"../../train-1"')),
            "name: String should match",
        ),
        (
            break_file("meta.json", lambda raw: raw.replace(b'"train-00001"', b'"/etc/passwd"')),
            "name: String should match",
        ),
        (break_file("meta.json", lambda raw: raw.replace(b"train-00001.", b"../00001.")), "files.*String should match"),
        (break_file("meta.json", lambda raw: b"[" * 100_000), "nested too deeply"),
        (edit_meta(dtype="O"), "dtype: Input should be '|u1'"),
        (edit_meta(files={"tokenizer.json": [1, "x"]}), "'train-00000.idx' is missing"),
        (
            break_file("meta.json", lambda raw: raw.replace(b'"samples": 7', b'"samples": 8')),
            "not as long as its 8 samples",
        ),
        (
            break_file("meta.json", lambda raw: raw.replace(b'"samples": 7', b'"samples": -7')),
            "greater than or equal to 0",
        ),
    ],
)
def test_a_torn_or_foreign_folder_is_refused_by_file_and_reason(tmp_path, damage, message):
    folder = write_prepared(tmp_path / "d", sums(20))
    damage(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


def in_file(name, dtype, place, value):
    """Writes a number over another, and leaves the file's size as it is."""

    def how(raw):
        array = np.frombuffer(raw, dtype).copy()
        array[place] = value
        return array.tobytes()

    return break_file(name, how)


@pytest.mark.parametrize(
    "damage, message",
    [
        (in_file("train-00001.bin", "u1", 0, 200), r"train sample 8: damaged: it has other tokens than its tokenizer"),
        *(
            (in_file("train-00001.idx", "<i8", place, value), "train sample [89]: damaged: its index says where no sample")
            for place, value in [(0, -1), (1, 0), (1, -5), (2, 2**62), (2, 1), (2, 10**6), (0, 2**63 - 1)]
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", [ModelConfig(), ModelConfig(max_prompt_len=3, max_response_len=2)])
def test_a_damaged_sample_is_named_before_a_model_reads_it(tmp_path, damage, message, model):
    folder = write_prepared(tmp_path / "d", sums(20))
    damage(folder)
    splits = load(folder, model, truncate=True)
    with pytest.raises(UserError, match=message):
        splits.train.lengths(np.arange(20)), splits.train.ragged(np.arange(20))
    mixed = {name: {"dataset": str(folder)} for name in ("a", "b")}
    mixture = load_dataset(DataConfig(mixture=mixed, truncate=True), model, seed=0)
    with pytest.raises(UserError, match=message):
        mixture.train.lengths(np.arange(40)), mixture.train.ragged(np.arange(40))


def test_a_sample_that_ends_behind_its_file_is_named(tmp_path):
    folder = write_prepared(tmp_path / "d", sums(20))
    size = (folder / "train-00002.bin").stat().st_size
    break_file("train-00002.bin", lambda raw: raw[:-1])(folder)
    break_file("meta.json", lambda raw: raw.replace(f"{size},".encode(), f"{size - 1},".encode()))(folder)
    with pytest.raises(UserError, match="train sample 20: damaged: it has other tokens than its tokenizer, or too few"):
        load(folder).train.ragged(np.arange(20))


def test_a_folder_without_meta_is_not_taken_for_a_dataset(tmp_path):
    folder = write_prepared(tmp_path / "d", sums(20))
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl nor meta\.json"):
        load(folder)
    with pytest.raises(UserError, match=r"no meta\.json there"):
        load(f"file://{folder}")


@pytest.mark.slow
def test_opening_and_reading_a_large_corpus_touches_a_small_part_of_it(tmp_path):
    """Four million samples: memory may not depend on that."""
    folder = write_prepared(tmp_path / "d", sums(10), shards=1)
    meta = json.loads((folder / "meta.json").read_text())
    samples = 4_000_000
    with open(folder / "train-00000.bin", "wb") as tokens:
        tokens.truncate(samples * 100)
    with open(folder / "train-00000.idx", "wb") as ends:
        for start in range(0, samples, 1_000_000):
            block = np.arange(start, start + 1_000_000)[:, None] * 100 + [0, 80]
            ends.write(block.astype("<i8").tobytes())
        ends.write(np.array([samples * 100], "<i8").tobytes())
    meta["splits"]["train"]["shards"][0]["samples"] = samples
    meta["splits"]["train"] |= {"longest_prompt": 80, "longest_response": 20}
    for name in ("train-00000.bin", "train-00000.idx"):
        meta["files"][name][0] = (folder / name).stat().st_size
    (folder / "meta.json").write_text(json.dumps(meta))
    code = (
        "import resource, numpy as np; from hrm_lm.config import *; from hrm_lm.data.registry import load_dataset\n"
        "from hrm_lm.data.collate import pad; from hrm_lm.data.loading import train_batches\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        f"splits = load_dataset(DataConfig(dataset={str(folder)!r}), ModelConfig(), 0)\n"
        "[splits.train[i] for i in np.random.default_rng(0).integers(len(splits.train), size=1000).tolist()]\n"
        "next(train_batches(splits.train, splits.tokenizer, pad, TrainConfig(steps=50_001), 50_000))\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60  # MiB, of 460


# --- remote storage ----------------------------------------------------------------------------------------------


class CountingFileSystem:
    """A file system as `fetch` sees one: it writes down each opening."""

    def __init__(self, log):
        self.log = log

    def open_input_stream(self, path):
        with open(self.log, "a") as log:
            log.write("opened\n")
        return LOCAL.open_input_stream(path)


def fetch_once(source, target, log, sha256):
    fetch(CountingFileSystem(log), source, target, 1 << 20, sha256)
    assert target.read_bytes() == b"x" * (1 << 20)


@pytest.mark.slow
def test_of_processes_that_start_at_once_one_fetches_and_all_read_it_whole(tmp_path):
    (tmp_path / "remote").write_bytes(b"x" * (1 << 20))
    sha256 = hashlib.sha256(b"x" * (1 << 20)).hexdigest()
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "remote"), tmp_path / "cache" / "file", tmp_path / "log", sha256)
    workers = [context.Process(target=fetch_once, args=arguments) for _ in range(5)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert [worker.exitcode for worker in workers] == [0] * 5
    assert (tmp_path / "log").read_text() == "opened\n"


def test_what_comes_damaged_is_refused_and_not_kept(tmp_path):
    (tmp_path / "remote").write_bytes(b"y")
    with pytest.raises(UserError, match="SHA-256 differs"):
        fetch(LOCAL, str(tmp_path / "remote"), tmp_path / "cache" / "file", 1, hashlib.sha256(b"x").hexdigest())
    assert not (tmp_path / "cache" / "file").exists()


class RemoteDataset:
    """A dataset of 300 samples in 20 shards, as if it were remote. Eight shards fit `cache_gb`, and so two a block."""

    def __init__(self, folder, cache, monkeypatch):
        monkeypatch.setenv("HRM_LM_CACHE", str(cache))
        monkeypatch.setattr(
            "hrm_lm.data.prepared.reader.resolve", lambda location: (self.fs, location.removeprefix("far://"))
        )
        self.folder, self.cache, self.fs = write_prepared(folder, sums(300), shards=20), cache, Remote()
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        largest = max(sizes[f"train-{i:05d}.bin"] + sizes[f"train-{i:05d}.idx"] for i in range(20))
        self.cache_gb = (sizes["val-00000.bin"] + sizes["val-00000.idx"] + 8 * largest) / 1e9

    def load(self, **fields):
        return load(self.folder, **{"cache_gb": self.cache_gb} | fields)

    def cached(self):
        return {file.name: file.stat().st_size for file in self.cache.glob("*/*") if file.suffix != ".lock"}


@pytest.fixture
def remote(tmp_path, monkeypatch):
    return RemoteDataset(tmp_path / "d", tmp_path / "cache", monkeypatch)


def idle(splits):
    def nothing_asked():
        with splits.train.remote._lock:
            return not (splits.train.remote._wanted or splits.train.remote._running)

    wait_until(nothing_asked)


def assert_same_batches(splits, others, config, steps=60, first=0):
    both = (islice(batches_of(side, config, first), steps) for side in (splits, others))
    for (one,), (other,) in zip(*both, strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def in_memory(remote, train):
    """The dataset's samples, read locally, in the order of `train`."""
    remote.fs, local = LOCAL, remote.fs
    splits = load(remote.folder)
    remote.fs, splits.train.blocks = local, train.blocks
    return splits


def test_a_remote_dataset_is_checked_without_its_shards_and_gives_the_batches_of_a_local_one(remote):
    splits, config = remote.load(cache_gb=1), small_config(train__length_window=64, train__batch_tokens=700)
    assert sorted(remote.fs.opened) == ["meta.json", "tokenizer.json"]
    assert_same_batches(splits, in_memory(remote, splits.train), config)
    idle(splits)
    assert sorted(remote.fs.opened) == sorted(path.name for path in remote.folder.iterdir()), "each file once"


def test_of_a_dataset_larger_than_the_cache_an_epoch_takes_each_sample_once_in_blocks_of_shards(remote):
    train = remote.load().train
    row = train.order(0, 900, seed=3)
    for epoch in np.split(row, 3):
        assert sorted(epoch.tolist()) == list(range(300))
        shards = np.searchsorted(train.starts, epoch, side="right") - 1
        blocks = [set(shards[i : i + 30].tolist()) for i in range(0, 300, 30)]
        assert all(len(block) == 2 for block in blocks) and len(set().union(*blocks)) == 20
        assert all(len(set(shards[i : i + 15].tolist())) == 2 for i in range(0, 300, 15)), "mixed within a block"
    assert (row[:300] != row[300:600]).any() and (train.order(0, 300, seed=4) != row[:300]).any()
    for start, stop in ((0, 1), (29, 31), (250, 700), (600, 601)):
        assert (train.order(start, stop, seed=3) == row[start:stop]).all()


def test_shards_come_when_they_are_due_or_ahead_of_that_and_the_cache_keeps_to_its_limit(remote):
    splits = remote.load()
    config = small_config(train__batch_size=5, train__length_window=10, train__steps=200)
    batches, local = batches_of(splits, config), batches_of(in_memory(remote, splits.train), config)
    for step in range(130):
        (batch,), (expected,) = next(batches), next(local)
        assert all(a.equal(b) for a, b in zip(batch, expected, strict=True))
        idle(splits)
        assert sum(remote.cached().values()) <= remote.cache_gb * 1e9
        if step == 0:
            homes = {
                home for block in splits.train.blocks.around(0, 31, 0) for home in splits.train.blocks.shards(block, 0)
            }
            assert set(remote.cached()) == {*splits.train.files(homes), *splits.val.files()} and len(homes) == 4
        if step == 59:  # the end of an epoch
            train_files = [name for name in remote.fs.opened if name.startswith("train-")]
            assert len(set(train_files)) == 40 and len(train_files) <= 40 + 4, "once, and the next epoch's first block"
    assert len(splits.train._shards) <= 8, "what is removed does not stay mapped, and takes no room"


@pytest.mark.parametrize("fits", [False, True], ids=["blocks", "whole"])
def test_a_disk_that_does_not_hold_what_is_needed_at_a_time_is_refused_with_what_to_lower(remote, monkeypatch, fits):
    train = remote.load(**{"cache_gb": 1} if fits else {}).train
    files, folder = train.remote.files, train.remote.folder
    disk = SimpleNamespace(free=0)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda root: disk)

    def expect():
        train._expected = None
        train.expect(0, 5, 0)

    def refused():
        with pytest.raises(UserError, match=r"cache: this disk has no room for the .* GB of copies that a run needs"):
            expect()

    refused()
    soon = []
    if not fits:  # the next block once more
        last = train.blocks.span(train.blocks.around(0, 5, 0)[-1], 0)[1]
        (coming,) = train.blocks.around(last, last + 1, 0)
        soon = train.files(train.blocks.shards(coming, 0))
    need = sum(files[name][0] for name in [*cache._kept[folder], *soon])
    disk.free = need - 1
    refused()
    other = remote.cache / ("0" * 32)
    other.mkdir()
    (other / "train-00000.bin").write_bytes(b"x")  # of a dataset that may go
    expect()
    idle(SimpleNamespace(train=train))
    (other / "train-00000.bin").unlink()
    there = sum(remote.cached().values())
    disk.free = need - there
    expect()
    disk.free = max(disk.free - 1, 0)
    refused() if soon else expect()
    partial = folder / f"{next(iter(cache._kept[folder]))}.partial"
    with open(partial, "wb") as file:
        file.truncate(10**9)  # nothing of it is written yet
    refused() if soon else expect()


def test_a_copy_that_another_process_removes_is_fetched_again(remote):
    splits, config = remote.load(), small_config(train__batch_size=5)
    others = in_memory(remote, splits.train)
    splits.train.lengths(np.arange(300))
    for file in remote.cache.glob("*/*.idx"):
        file.unlink()
    assert_same_batches(splits, others, config, 60)


def test_processes_that_make_batches_read_what_their_worker_has_fetched(remote):
    splits = remote.load()
    config = small_config(train__batch_size=5, train__length_window=10, train__loader_workers=2, train__steps=40)
    assert_same_batches(splits, in_memory(remote, splits.train), config, 40)


def test_a_run_on_blocks_of_a_remote_dataset_resumes_bit_for_bit(tmp_path, remote):
    fields = {"data__dataset": str(remote.folder), "data__cache_gb": remote.cache_gb, "train__length_window": 16}
    assert_resumes_exactly(small_config(train__val_every=1, **fields), tmp_path, 4, 9)


def test_a_mixture_fetches_what_its_remote_member_is_asked_for(tmp_path, remote):
    local = {"dataset": str(write_prepared(tmp_path / "local", sums(30)))}
    data = {"data__dataset": None, "data__mixture": {"far": {"dataset": f"far://{remote.folder}"}, "near": local}}
    config = small_config(
        **data, data__tokenizer=str(remote.folder), data__cache_gb=remote.cache_gb, train__batch_size=64
    )
    splits = load_dataset(config.data, config.model, 0)
    assert splits.train.members[0].blocks
    assert {"train-00000.bin"}.isdisjoint(remote.cached())
    indices = next(global_batches(splits.train, config.train))
    (batch,) = next(batches_of(splits, config))
    prompts = [DIGITS.decode(row) for row in batch.encoder_ids.tolist()]
    expected = [DIGITS.decode(splits.train[i].prompt) for i in indices.tolist()]
    assert prompts == expected


def test_a_cache_too_small_for_its_shards_is_refused_with_the_size_that_it_needs(remote):
    with pytest.raises(UserError, match=r"data.cache_gb is 1e-07 GB; it needs \S+ GB"):
        remote.load(cache_gb=1e-7)


def test_reading_outlasts_storage_that_fails_now_and_then(remote, waits):
    remote.fs = Remote(each_fails_once())
    splits = remote.load()
    assert_same_batches(splits, in_memory(remote, splits.train), small_config(train__batch_size=5), 20)
    assert len(waits) > 10


def test_what_a_killed_fetch_left_does_no_harm(remote, tmp_path):
    raw = b"x" * 1000
    (tmp_path / "far").write_bytes(raw)
    target = tmp_path / "cache" / ("0" * 32) / "train-00000.bin"
    target.parent.mkdir(parents=True)
    for limit in (None, 2000):
        target.with_name("train-00000.bin.partial").write_bytes(b"y" * 3000)
        fetch(LOCAL, str(tmp_path / "far"), target, 1000, hashlib.sha256(raw).hexdigest(), limit)
        assert target.read_bytes() == raw and sum(remote.cached().values()) == 1000
        target.unlink()


# --- training ----------------------------------------------------------------------------------------------------


def test_a_run_on_a_prepared_dataset_resumes_bit_for_bit(tmp_path):
    folder = write_prepared(tmp_path / "d", sums(60))
    assert_resumes_exactly(small_config(train__val_every=1, data__dataset=str(folder)), tmp_path, 4, 9)


def test_a_run_does_not_go_on_with_another_tokenizer_or_number_of_samples(tmp_path):
    def config(folder, steps):
        return small_config(data__dataset=str(folder), train__steps=steps)

    folder = write_prepared(tmp_path / "a", sums(20))
    train_locally(config(folder, 2), tmp_path / "run")
    with pytest.raises(UserError, match="another tokenizer"):
        train_locally(
            config(write_prepared(tmp_path / "b", sums(20), tokenizer=SimpleTokenizer("0123456789+")), 4),
            tmp_path / "run",
        )
    with pytest.raises(UserError, match="was trained on 20 samples, the dataset now has 21"):
        train_locally(config(write_prepared(tmp_path / "c", sums(21)), 4), tmp_path / "run")


def test_load_prepared_takes_a_uri(tmp_path, monkeypatch):
    """A local file system under a URI; tests/test_prepare_s3.py has the remote one."""
    folder = write_prepared(tmp_path / "d", sums(20))
    assert len(load_prepared(f"file://{folder}").train) == 20
