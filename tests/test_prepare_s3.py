"""Object storage from end to end: input, prepared dataset and checkpoints in S3, as `moto` serves it."""

import json

import pyarrow.fs
import pytest
from conftest import small_config

from hrm_lm.cluster.run import run
from hrm_lm.commands.generate import main as generate
from hrm_lm.commands.prepare import main as prepare
from hrm_lm.data.prepared.cache import cache_folder
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.tokenizer import resolve_tokenizer
from hrm_lm.errors import UserError


def test_input_dataset_and_checkpoints_live_in_object_storage(cluster, command, bucket, tmp_path):
    for name in ("a", "b"):
        with bucket.fs.open_output_stream(f"bucket/in/{name}.jsonl.gz") as file:  # pyarrow compresses it for its name
            for i in range(100):
                file.write(json.dumps({"prompt": f"{name}{i}?", "response": str(i)}).encode() + b"\n")
    options = ["--output", bucket("out"), "--tokenizer", "characters", "--val_fraction", 0.2, "--shard_mb", 0.0005]
    code, out, err = command(prepare, "--input", bucket("in"), *options)
    assert code == 0, err
    assert "in s3://bucket/out;" in out and "secret" not in out + err
    assert command(prepare, "--input", bucket("in"), *options)[1] == out, "it was finished"
    found = {info.base_name for info in bucket.fs.get_file_info(pyarrow.fs.FileSelector("bucket/out"))}
    assert {"meta.json", "tokenizer.json", "report.json", "train-00000.bin"} <= found and ".prepare" not in found

    options = {"train__val_every": 3, "train__steps": 6, "ray__storage_path": bucket("runs"), "ray__run_name": "r"}
    config = small_config(data__dataset=bucket("out"), **options)
    splits = load_dataset(config.data, config.model, 0)
    assert not cache_folder().exists(), "checking a dataset fetches none of it"
    decoded = sorted(splits.tokenizer.decode(sample.prompt) for split in (splits.train, splits.val) for sample in split)
    assert decoded == sorted(f"{name}{i}?" for name in ("a", "b") for i in range(100))
    result = run(config)
    assert result["status"] == "finished" and result["step"] == 6
    assert run(small_config(data__dataset=bucket("out"), **options | {"train__steps": 9}))["step"] == 9
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
