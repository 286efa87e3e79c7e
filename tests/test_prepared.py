"""Prepared datasets: the format and its reader, order and batches; no Ray."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pyarrow.fs
import pytest
from conftest import DIGITS, ROOT, assert_resumes_exactly, small_config, sums, train_locally, write_prepared

from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.collate import pad, pad_batch
from hrm_lm.data.prepared.cache import fetch
from hrm_lm.data.prepared.format import token_dtype
from hrm_lm.data.prepared.reader import load_prepared
from hrm_lm.data.registry import load_dataset
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
        (edit_meta(splits={}), r"meta\.json: torn or foreign: KeyError\('train'\)"),
        (break_file("tokenizer.json", lambda raw: raw.replace(b"9", b"x")), r"tokenizer\.json: is not the one"),
    ],
)
def test_a_torn_or_foreign_folder_is_refused_by_file_and_reason(tmp_path, damage, message):
    folder = write_prepared(tmp_path / "d", sums(20))
    damage(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


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
    assert float(done.stdout) < 60, done.stderr  # MiB, of 460


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
    assert fetch(CountingFileSystem(log), source, target, 1 << 20, sha256).read_bytes() == b"x" * (1 << 20)


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
