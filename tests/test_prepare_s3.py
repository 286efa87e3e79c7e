"""Object storage from end to end: input, prepared dataset and checkpoints in S3, as `moto` serves it."""

import base64
import io
import json
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow.fs
import pytest
import ray
import yaml
from conftest import KEYS, small_config, sums, write_prepared

from hrm_lm.cluster.run import check_resume, run
from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.commands.evaluate import main as evaluate
from hrm_lm.commands.export import main as export
from hrm_lm.commands.generate import main as generate
from hrm_lm.commands.prepare import main as prepare
from hrm_lm.commands.train import main as train
from hrm_lm.commands.tune import main as tune
from hrm_lm.data.prepared.cache import cache_folder
from hrm_lm.data.prepared.format import write_file
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.tokenizer import resolve_tokenizer
from hrm_lm.errors import UserError
from hrm_lm.filesystem import outlasting, read_bytes
from hrm_lm.models.build import build_model
from hrm_lm.training.checkpoint import Progress, save_model


@pytest.fixture(scope="module")
def prepared(shared_cluster, bucket):
    """What `prepare` did in storage: its arguments, and what it returned and said."""
    for name in ("a", "b"):
        with bucket.fs.open_output_stream(f"bucket/in/{name}.jsonl.gz") as file:  # pyarrow compresses it for its name
            for i in range(100):
                file.write(json.dumps({"prompt": f"{name}{i}?", "response": str(i)}).encode() + b"\n")
    options = ["--output", bucket("out"), "--tokenizer", "characters", "--val_fraction", "0.2", "--shard_mb", "0.0005"]
    arguments = ["--input", bucket("in"), *options]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = prepare(arguments)
    return arguments, code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(prepared, bucket, tmp_path_factory):
    """The fields of a run that was trained in storage, from a checkpoint that is there, its result and what it said."""
    fields = {
        "train__val_every": 3, "train__steps": 6, "train__init_from": bucket("first"), "data__dataset": bucket("out"),
        "ray__storage_path": bucket("runs"), "ray__run_name": "r",
    }  # fmt: skip
    config, first = small_config(**fields), tmp_path_factory.mktemp("first")
    tokenizer = load_dataset(config.data, config.model, 0).tokenizer
    save_model(first, build_model(config.model, tokenizer.vocab_size), config, tokenizer, Progress())
    here = pyarrow.fs.LocalFileSystem()
    pyarrow.fs.copy_files(str(first), "bucket/first", source_filesystem=here, destination_filesystem=bucket.fs)
    assert not cache_folder().exists(), "checking a dataset fetches none of it"
    with redirect_stderr(io.StringIO()) as err:
        return fields, run(config), err.getvalue()


def test_a_run_in_object_storage_has_curves_and_uris_and_is_resumed_without_a_download(
    trained, bucket, capsys, monkeypatch
):
    fields, result, err = trained
    assert result["best_checkpoint"].startswith("s3://bucket/runs/r/checkpoint_0000000")
    assert result["last_checkpoint"] == "s3://bucket/runs/r/checkpoint_00000006"
    assert "run 'r' in s3://bucket/runs/r\n" in err and "secret" not in err
    found = {info.base_name: info for info in bucket.fs.get_file_info(pyarrow.fs.FileSelector("bucket/runs/r"))}
    (events,) = (info for name, info in found.items() if name.startswith("events.out.tfevents."))
    assert events.size > 500
    with bucket.fs.open_input_stream("bucket/runs/r/result.json") as file:
        assert "s3://bucket/runs/r/checkpoint" in file.read().decode()

    monkeypatch.setattr(pyarrow.fs, "copy_files", lambda *_, **__: pytest.fail("a checkpoint was downloaded"))
    assert run(small_config(**fields)) == result
    assert "already at step 6 of 6" in capsys.readouterr().err
    other = small_config(**fields | {"train__init_from": bucket("other")})
    check_resume(other, RunFolder(bucket("runs"), "r"), "auto")
    assert "  train.init_from: s3://bucket/first -> s3://bucket/other\n" in capsys.readouterr().err


def test_input_dataset_and_checkpoints_live_in_object_storage(prepared, trained, command, bucket):
    arguments, code, out, err = prepared
    assert code == 0, err
    assert "in s3://bucket/out;" in out and "secret" not in out + err
    assert command(prepare, *arguments)[1] == out, "it was finished"
    found = {info.base_name for info in bucket.fs.get_file_info(pyarrow.fs.FileSelector("bucket/out"))}
    assert {"meta.json", "tokenizer.json", "report.json", "train-00000.bin"} <= found and ".prepare" not in found

    fields, result, _ = trained
    config = small_config(**fields)
    splits = load_dataset(config.data, config.model, 0)
    decoded = sorted(splits.tokenizer.decode(sample.prompt) for split in (splits.train, splits.val) for sample in split)
    assert decoded == sorted(f"{name}{i}?" for name in ("a", "b") for i in range(100))
    assert result["status"] == "finished" and result["step"] == 6
    longer = small_config(**fields | {"train__steps": 9, "ray__run_name": "longer"})
    pyarrow.fs.copy_files(
        "bucket/runs/r", "bucket/runs/longer", source_filesystem=bucket.fs, destination_filesystem=bucket.fs
    )
    assert run(longer)["step"] == 9
    code, out, err = command(generate, "--save_dir", bucket("runs"), "--prompt", "a1?")
    assert code == 0 and len(out.splitlines()) == 1, err

    with bucket.fs.open_output_stream("bucket/out/train-00000.bin") as file:
        file.write(b"torn")
    with pytest.raises(UserError, match=r"train-00000\.bin: has 4 bytes, meta\.json says"):
        load_dataset(config.data, config.model, 0)


def test_what_changed_in_storage_is_not_trained_on(cluster, command, bucket):
    with bucket.fs.open_output_stream("bucket/changed/in.jsonl") as file:
        file.write("".join(json.dumps({"prompt": f"{i}?", "response": str(i)}) + "\n" for i in range(50)).encode())
    code, out, err = command(
        prepare,
        "--input",
        bucket("changed/in.jsonl"),
        "--output",
        bucket("changed/out"),
        "--tokenizer",
        "bytes",
        "--val_fraction",
        0.2,
    )
    assert code == 0, err
    with bucket.fs.open_input_stream("bucket/changed/out/train-00000.bin") as file:
        raw = file.read()
    with bucket.fs.open_output_stream("bucket/changed/out/train-00000.bin") as file:
        file.write(raw[::-1])
    config = small_config(data__dataset=bucket("changed/out"))
    with pytest.raises(UserError, match="train-00000.bin: is not what meta.json says"):
        load_dataset(config.data, config.model, 0).train[0]


@pytest.fixture
def throttled(monkeypatch):
    """Storage answers 503 SlowDown to the first requests of each kind for each object, more than S3's own client repeats."""
    werkzeug_app = pytest.importorskip("moto.moto_server.werkzeug_app")
    answered, requests = werkzeug_app.DomainDispatcherApplication.__call__, Counter()

    def answer(app, environ, start_response):
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"], "uploads" in environ["QUERY_STRING"]
        requests[request] += 1
        if requests[request] > 3:
            return answered(app, environ, start_response)
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]

    monkeypatch.setattr(werkzeug_app.DomainDispatcherApplication, "__call__", answer)
    return requests


@pytest.fixture
def in_bucket(tmp_path, bucket):
    """A prepared dataset in `tmp_path/near` and in storage."""
    write_prepared(tmp_path / "near", sums(40), shards=1)
    here = pyarrow.fs.LocalFileSystem()
    pyarrow.fs.copy_files(
        str(tmp_path / "near"), "bucket/slow", source_filesystem=here, destination_filesystem=bucket.fs
    )


def test_a_throttled_bucket_is_read_and_written_in_the_end(in_bucket, tmp_path, bucket, throttled, waits):
    config = small_config(data__dataset=bucket("slow"))
    near = small_config(data__dataset=str(tmp_path / "near"))
    far, near = (load_dataset(side.data, side.model, 0).train for side in (config, near))
    assert [far[i].prompt.tolist() for i in range(40)] == [near[i].prompt.tolist() for i in range(40)]
    write_file(bucket.fs, "bucket/slow/more", b"more")
    assert waits and throttled["GET", "/bucket/slow/train-00000.bin", False] > 3
    assert outlasting("more", lambda: read_bytes(bucket.fs, "bucket/slow/more")) == b"more"


def test_a_hugging_face_tokenizer_is_read_from_object_storage_with_what_is_beside_it(bucket):
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1, "END": 2}, "unk_token": "a"}
    files = {
        "with/tokenizer.json": {"model": model},
        "with/tokenizer_config.json": {"eos_token": "END"},
        "alone/tokenizer.json": {"model": model},
    }
    for name, fields in files.items():
        with bucket.fs.open_output_stream(f"bucket/{name}") as file:
            file.write(json.dumps(fields).encode())
    assert resolve_tokenizer(bucket("with")).eos_id == 2
    assert resolve_tokenizer(bucket("alone")).eos_id == resolve_tokenizer(bucket("alone/tokenizer.json")).eos_id == 1
    with pytest.raises(UserError, match="^--tokenizer: s3://bucket/nothing cannot be read: ") as error:
        resolve_tokenizer(bucket("nothing"), "--tokenizer")
    assert "secret" not in str(error.value)


def traces(secret: str, *folders) -> list[str]:
    """The files that hold the secret, as text or in one of the ways in which pickles are written."""
    raw = secret.encode()
    encodings = [raw, raw.hex().encode(), *(base64.b64encode(b"." * i + raw)[4:-4] for i in range(3))]
    files = [file for folder in folders for file in Path(folder).rglob("*") if file.is_file()]
    return [f"{file}: {way!r}" for file in files for way in encodings if way in file.read_bytes()]


def test_keys_in_a_uri_reach_no_file_and_no_message(trained, command, bucket, in_folder):
    fields, _, err = trained
    said = [err]
    config = small_config(**fields | {"train__checkpoint_every": 2, "ray__run_name": None})
    sweep = {"base": config.to_dict(), "search_space": {"optim.lr": {"choice": [0.001]}}, "tune": {"num_samples": 1}}
    (in_folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    for main, *arguments in (
        (tune, "--config", "sweep.yaml", "--run_name", "sweep"),
        (tune, "--config", "sweep.yaml", "--run_name", "sweep", "--resume"),
        (evaluate, "--checkpoint", bucket("runs/r/checkpoint_00000006"), "--dataset", bucket("out")),
        (export, "--checkpoint", bucket("runs/r/checkpoint_00000006"), "--output", in_folder / "exported"),
        (train, "--config", bucket("runs/r/config.yaml"), "--dataset", bucket("out"), "--dry_run", 1),
        (train, "--config", "sweep.yaml", "--dataset", bucket("out")),  # from here on refused, and the reason told
        (train, "--dataset", bucket("nothing there")),
        (train, "--dataset", bucket("out").replace("topsecret", "top/secret")),
        (train, "--set", bucket("out")),
    ):
        code, out, err = command(main, *arguments)
        assert code in (0, 2), err
        said += [out, err]
    (in_folder / "sweep.yaml").unlink()
    here = pyarrow.fs.LocalFileSystem()
    pyarrow.fs.copy_files("bucket", str(in_folder / "bucket"), source_filesystem=bucket.fs, destination_filesystem=here)
    logs = ray._private.worker.global_worker.node.get_logs_dir_path()
    for secret in KEYS.split(":"):
        lines = "".join(said).replace("top/secret", "topsecret").splitlines()
        assert [line for line in lines if secret in line] == []
        assert traces(secret, in_folder, cache_folder(), logs) == []
