"""`python -m ray_jobs.predict`: what is read, what is kept, what is answered, and that a kill changes nothing.

Most tests run the reader and an actor in this process, without Ray.
"""

import dataclasses
import datetime
import decimal
import gzip
import json
import os
import signal
from contextlib import nullcontext, suppress
from pathlib import Path
from subprocess import DEVNULL

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from conftest import KEYS, processes_with, small_config, wait_until

from hrm_lm.commands.generate import main as generate
from hrm_lm.commands.predict import main
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.inference.generate import generate as answers_of
from hrm_lm.models.build import build_model
from hrm_lm.models.decoding import draws
from hrm_lm.predict import pipeline
from hrm_lm.predict.chunks import STEPS, chunk_size, read_chunks
from hrm_lm.prepare.reading import find_files
from hrm_lm.training.checkpoint import Progress, load_model, save_model

TOKENIZER = SimpleTokenizer("0123456789+=? ")
SIZES = {"model__max_prompt_len": 16, "model__max_response_len": 6, "model__d_model": 32}


def save(folder, architecture="encoder_decoder"):
    """A checkpoint of an untrained model, whose answers have various lengths."""
    torch.manual_seed(1)
    config = small_config(model__architecture=architecture, **SIZES)
    model = build_model(config.model, TOKENIZER.vocab_size)
    torch.nn.init.normal_(model.head.weight)  # logits far apart: rounding changes no token
    folder.mkdir()
    save_model(folder, model, config, TOKENIZER, Progress())
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint")


@pytest.fixture
def without_ray(monkeypatch):
    """The command reads and answers in this process. `without_ray.stop_at` makes it end as by Ctrl-C before that chunk."""

    def run(job, done, num_workers):
        actor = pipeline.Answerer(job)
        for rows in pipeline.read(job, done, pa.table({})):
            for row in actor(rows).to_pylist():
                if row["error"]:
                    raise pipeline.UserError(row["error"])
                yield row["number"], json.loads(row["result"]), row["num_bytes"]
                if row["number"] + 1 == run.stop_at:
                    raise RuntimeError("stopped")

    run.stop_at = None
    monkeypatch.setattr(pipeline, "run_actors", run)
    monkeypatch.setattr(pipeline, "started_ray", nullcontext)
    return run


@pytest.fixture
def predict(command, checkpoint, tmp_path, without_ray):
    """Runs the command on `data`, a file or folder in tmp_path; returns the output's records."""

    def run(*arguments, data="in.jsonl", output="out"):
        paths = ["--input", tmp_path / data, "--output", tmp_path / output]
        flags = [] if "--checkpoint" in arguments else ["--checkpoint", checkpoint]
        code, out, err = command(main, *paths, *flags, *arguments)
        assert code == 0, err
        run.said = out, err
        return read(tmp_path / output)

    return run


def questions(n):
    return [{"id": i, "prompt": f"{i * 7 % 89}+{'1' * (i % 9)}=?{i * 3 % 11}"} for i in range(n)]


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    else:
        raw = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def read(folder):
    """The records of an output, in the order of its files' names."""
    files = sorted(folder.glob("part-*"))
    if files[0].suffix == ".parquet":
        return [record for file in files for record in pq.read_table(file).to_pylist()]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


# --- chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_size", [1, 3, 50, 10_000])
@pytest.mark.parametrize("as_table", [False, True])
def test_a_record_is_in_one_chunk_whatever_the_files(tmp_path, first_size, as_table):
    some = questions(200)
    write(tmp_path / "in/a.jsonl", some[:60])
    write(tmp_path / "in/b.jsonl.gz", some[60:100])
    write(tmp_path / "in/c.parquet", some[100:160])
    (tmp_path / "in/d.jsonl").write_bytes(b"")
    (tmp_path / "in/e.csv").write_text("id,prompt\n" + "".join(f"{r['id']},{r['prompt']}\n" for r in some[160:190]))
    (tmp_path / "in/f.jsonl").write_text("\n\n" + "\n \n".join(map(json.dumps, some[190:])))
    files = [file for file, _ in find_files([str(tmp_path / "in")])]
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string())]) if as_table else None
    if as_table:
        files = [file for file in files if file.format == "csv"]
        some = some[160:190]

    def records(chunk):
        rows = pa.ipc.open_stream(chunk.rows).read_all().to_pylist() if as_table else chunk.rows
        rows = [json.loads(row) if isinstance(row, str) else row for row in rows]
        assert len(rows) == len(chunk.places)
        return [{"id": int(row["id"]), "prompt": row["prompt"]} for row in rows]

    chunks = list(read_chunks(files, first_size, schema, set()))
    assert [record for chunk in chunks for record in records(chunk)] == some
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.first for chunk in chunks] == [sum(len(c.places) for c in chunks[:i]) for i in range(len(chunks))]
    assert [len(chunk.places) for chunk in chunks[:-1]] == [chunk_size(i, first_size) for i in range(len(chunks) - 1)]
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(chunk.num_bytes for chunk in chunks) == sum(file.num_bytes for file in files)
    if not as_table:
        places = {chunk.first + i: place for chunk in chunks for i, place in enumerate(chunk.places)}
        assert [places[i] for i in (0, 59, 60, 100, 159, 160, 190, 191)] == [
            *((0, 1), (0, 60), (1, 1), (2, 1), (2, 60), (4, 2), (5, 3), (5, 5))
        ]
    left = [chunk for chunk in chunks if chunk.number % 3 == 1]
    again = list(read_chunks(files, first_size, schema, {c.number for c in chunks if c.number % 3 != 1}))
    assert [chunk[:3] for chunk in again] == [chunk[:3] for chunk in left]


def test_chunks_grow_to_a_limit():
    sizes = [chunk_size(i, 64) for i in range(1000)]
    assert sizes[0] == 64 and sizes[STEPS] == 128 and sizes == sorted(sizes) and sizes[-1] == 64 * STEPS


# --- what is kept, and what is answered --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_records_keep_their_fields_and_order_and_get_the_answers_of_generate(predict, tmp_path, architecture):
    odd = {"n": 12345678901234567890123, "x": 1.5, "no": None, "yes": True, "deep": {"a": [1, {"b": "\u2028é"}]}}
    some = [record | odd for record in questions(150)]
    write(tmp_path / "in.jsonl", some)
    model, tokenizer, _ = load_model(folder := save(tmp_path / "checkpoint", architecture))
    scores = []
    expected = answers_of(model, tokenizer, [record["prompt"] for record in some], scores=scores)
    found = predict("--checkpoint", folder, "--batch_size", 4)
    own = ("response", "response_score", "response_error")
    assert [{k: v for k, v in record.items() if k not in own} for record in found] == some
    assert [record["response"] for record in found] == expected and len(set(expected)) > 9
    assert [record["response_score"] for record in found] == pytest.approx(scores, abs=1e-4)
    assert all(record["response_error"] is None for record in found)
    assert len(list((tmp_path / "out").glob("part-*.jsonl"))) > 10
    report = json.loads((tmp_path / "out/_report.json").read_text())
    assert (report["records"], report["answered"]) == (150, 150) and report["tokens"] >= sum(map(len, expected))
    assert not (tmp_path / "out/.predict").exists() and "150 of 150 records answered in" in predict.said[0]
    again = predict("--checkpoint", folder, "--batch_size", 64, output="again")
    assert [record["response"] for record in again] == expected
    thought = predict("--checkpoint", folder, "--h_cycles", 5, output="cycles")
    assert [record["response"] for record in thought] != expected


def test_columns_of_parquet_keep_their_types(predict, tmp_path):
    some = questions(20)
    table = pa.table({
        "id": pa.array([r["id"] for r in some], pa.int16()),
        "when": pa.array([datetime.datetime(2024, 1, 1 + i) for i in range(20)], pa.timestamp("ns", "UTC")),
        "cost": pa.array([decimal.Decimal("1.10")] * 20, pa.decimal128(9, 2)),
        "kind": pa.array(["a", "b"] * 10).dictionary_encode(),
        "prompt": [{"text": r["prompt"]} for r in some],
        "raw": pa.array([b"\xff"] * 20, pa.binary()),
        "half": pa.array([0.1] * 20, pa.float32()),
    })  # fmt: skip
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 12), tmp_path / "in/a.parquet", row_group_size=5)
    pq.write_table(table.slice(12).append_column("more", pa.array(range(8))), tmp_path / "in/b.parquet")
    predict("--prompt_field", "prompt.text", "--batch_size", 1, data="in")
    found = pq.read_table(tmp_path / "out")  # as one table
    assert (
        found.select(table.column_names).equals(table.unify_dictionaries())
        or found.select(table.column_names).to_pylist() == table.to_pylist()
    )
    assert found.schema.names == [*table.column_names, "more", "response", "response_score", "response_error"]
    for name in table.column_names:
        assert found.schema.field(name).type == table.schema.field(name).type
    assert found["more"].to_pylist() == [None] * 12 + list(range(8))
    assert found.schema.field("response").type == pa.string() and None not in found["response"].to_pylist()

    told = predict("--prompt_field", "prompt.text", "--format", "jsonl", data="in", output="jsonl")
    assert [record["response"] for record in told] == found["response"].to_pylist()
    assert told[0]["when"] == "2024-01-01 00:00:00+00:00" and (told[0]["cost"], told[0]["raw"]) == ("1.10", "/w==")


def test_jsonl_becomes_parquet_of_one_schema(predict, tmp_path):
    some = questions(60)
    some[3] |= {"tags": ["a"], "deep": {"x": 1}}
    some[40] |= {"deep": {"y": "b"}, "id": 40.5}
    write(tmp_path / "in.jsonl", some)
    with open(tmp_path / "in.jsonl", "a") as file:
        file.write("broken\n[1]\n")
    found = predict("--format", "parquet", "--batch_size", 1)
    assert [record["id"] for record in found] == [record["id"] for record in some] + [None] * 2
    assert found[3]["tags"] == ["a"] and found[3]["deep"] == {"x": 1, "y": None}
    assert found[40]["deep"] == {"x": None, "y": "b"} and found[0]["deep"] is None
    assert [record["response_error"] for record in found[-2:]] == ["not JSON: broken", "not an object: [1]"]
    assert len({str(pq.read_schema(file)) for file in (tmp_path / "out").glob("part-*")}) == 1


def test_values_that_no_column_holds_are_refused_for_parquet_alone(predict, command, checkpoint, tmp_path):
    for i, values in enumerate([(1, "a"), ({}, {}), (2**70, 1)]):
        write(tmp_path / "in.jsonl", [{"prompt": "1", "x": value} for value in values])
        assert len(predict(output=f"jsonl{i}")) == 2
        arguments = ["--input", tmp_path / "in.jsonl", "--checkpoint", checkpoint, "--format", "parquet"]
        code, _, err = command(main, *arguments, "--output", tmp_path / f"parquet{i}")
        assert code == 2 and "in.jsonl" in err and "--format jsonl takes all records" in err


def test_a_record_that_cannot_be_answered_is_kept_and_says_why(predict, command, checkpoint, tmp_path):
    lines = [
        '{"prompt": "1+1", "response": "own"}', "{broken", '{"id": 7}', '{"prompt": 5}', '{"prompt": ""}', '{"prompt": "x"}',
        '{"prompt": "12345678901234567"}', '{"prompt": "\\ud800", "id": 8}', "[1]", "\xff", '{"prompt": "2", "y": "\\ud800"}',
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(line.encode("latin-1") for line in lines))
    found = predict()
    errors = [record["response_error"] for record in found]
    assert errors == [
        None, "not JSON: {broken", "no field 'prompt'", "field 'prompt' is int, not text", "the prompt is empty",
        "the prompt has an unknown character: character 'x' of 'x' is not in the tokenizer's vocabulary",
        "the prompt has too many tokens: 17 tokens; this model takes 16", "not Unicode text, but half a character",
        "not an object: [1]", "not UTF-8 text: \ufffd", None,
    ]  # fmt: skip
    assert [record["response"] is None for record in found] == [error is not None for error in errors]
    assert found[2]["id"] == 7 and found[7]["id"] == 8 and found[10]["y"] == "\ud800"
    out, err = predict.said
    assert "2 of 11 records answered" in out and f"not JSON 1 ({tmp_path}/in.jsonl:2)" in err
    assert "1 records had a field 'response' of their own" in err and found[0]["response"] != "own"
    named = predict("--response_field", "answer", output="named")
    assert named[0]["response"] == "own" and named[0]["answer"] == found[0]["response"]

    arguments = ["--input", tmp_path / "in.jsonl", "--checkpoint", checkpoint, "--output", tmp_path / "strict"]
    code, _, err = command(main, *arguments, "--strict")
    assert code == 2 and f"{tmp_path}/in.jsonl:2: not JSON ({{broken)" in err
    code, _, err = command(main, *arguments[:-1], tmp_path / "other", "--prompt_field", "question")
    assert code == 2 and "no record could be answered: no field 'question' 8 (" in err


def test_of_a_conversation_the_last_question_is_answered(predict, tmp_path):
    question = {"role": "user", "content": "1+1"}
    some = [
        {"prompt": "1+1"}, {"messages": [question]}, {"messages": [question, {"role": "assistant", "content": "9"}]},
        {"messages": []}, {"messages": [question, {"role": "assistant", "content": "9"}, question]}, {"prompt": [question]},
    ]  # fmt: skip
    write(tmp_path / "in.jsonl", some)
    for flags in ((), ("--format", "parquet")):
        if flags:
            some = [record for record in some if "messages" in record]  # no column holds both kinds of prompt
            write(tmp_path / "in.jsonl", some)
        found = predict(*flags, output=f"out{len(flags)}")
        answered = [record["response"] for record in found if record["response_error"] is None]
        assert len(answered) == len(some) - 2 and len(set(answered)) == 1
        errors = [record["response_error"] for record in found if record["response_error"]]
        assert "at least one message" in errors[0] and "character 'u' of 'user: 1+1" in errors[1]


def test_a_dataset_of_the_hubs_library_is_read(predict, checkpoint, command, tmp_path):
    datasets = pytest.importorskip("datasets")
    some = questions(30)
    datasets.Dataset.from_list(some).save_to_disk(tmp_path / "saved")
    for form in ("jsonl", "parquet"):
        flags = ["--input", f"hf:{tmp_path / 'saved'}", "--output", tmp_path / form, "--checkpoint", checkpoint]
        code, _, err = command(main, *flags, "--batch_size", 4, *(["--format", "jsonl"] if form == "jsonl" else []))
        assert code == 0, err
        assert [{"id": r["id"], "prompt": r["prompt"]} for r in read(tmp_path / form)] == some
    assert pq.read_schema(tmp_path / "parquet/part-000000.parquet").field("id").type == pa.int64()


def test_several_answers_come_likeliest_first_and_are_drawn_by_number(predict, tmp_path):
    some = questions(70)
    write(tmp_path / "in.jsonl", some)
    sampled = ("--n", 3, "--temperature", 1.5, "--top_k", 9, "--top_p", 0.95, "--seed", 5)
    found = predict(*sampled, "--batch_size", 3)
    for record in found:
        assert len(record["responses"]) == 3
        scores = [answer["score"] for answer in record["responses"]]
        assert scores == sorted(scores, reverse=True)
        assert (record["response"], record["response_score"]) == tuple(record["responses"][0].values())
    assert sum(len({answer["text"] for answer in record["responses"]}) == 3 for record in found) > 20
    assert predict(*sampled, "--batch_size", 50, output="other_chunks") == [
        record | {"response_score": pytest.approx(record["response_score"], abs=1e-4),
                  "responses": [{"text": a["text"], "score": pytest.approx(a["score"], abs=1e-4)} for a in record["responses"]]}
        for record in found
    ]  # fmt: skip
    write(tmp_path / "shifted.jsonl", some[1:])
    shifted = predict(*sampled, data="shifted.jsonl", output="shifted")
    assert [record["response"] for record in shifted] != [record["response"] for record in found[1:]]
    tables = predict(*sampled, "--format", "parquet", output="parquet")
    assert [record["response"] for record in tables] == [record["response"] for record in found]
    assert draws(5, 3, 4).tolist() == draws(5, 3, 9)[:4].tolist() != draws(5, 4, 4).tolist()


# --- again, and after a kill -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_what_was_answered_before_a_stop_is_not_answered_again(
    predict, command, checkpoint, tmp_path, without_ray, name
):
    write(tmp_path / name, questions(100))
    sampled = ("--temperature", 1.0)
    predict(*sampled, "--batch_size", 2, data=name, output="straight")
    without_ray.stop_at = 7
    with pytest.raises(RuntimeError, match="stopped"):
        predict(*sampled, "--batch_size", 2, data=name)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert len(done) == 7 and not (tmp_path / "out/_report.json").exists()
    (tmp_path / "out/.predict/chunk-000003.json").unlink()  # killed after it wrote the answers, and before it said so
    without_ray.stop_at = 9
    with pytest.raises(RuntimeError, match="stopped"):
        predict(*sampled, "--batch_size", 2, data=name)
    without_ray.stop_at = None
    predict(*sampled, "--batch_size", 2, "--num_workers", 1, data=name)
    assert "18 records were answered before" in predict.said[1]
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    again = [path.name for path, before in done.items() if path.stat().st_mtime_ns != before]
    assert again == [f"part-000003.{name[3:]}"]
    reports = [json.loads((tmp_path / folder / "_report.json").read_text()) for folder in ("out", "straight")]
    assert reports[0]["tokens"] == reports[1]["tokens"] and reports[0]["records"] == 100

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    predict(*sampled, "--batch_size", 5, data=name)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before, "it was finished"
    arguments = ["--input", tmp_path / name, "--checkpoint", checkpoint, "--output", tmp_path / "out"]
    code, _, err = command(main, *arguments, *sampled, "--seed", 1)
    assert code == 2 and "holds answers of other input or settings; give another --output" in err
    without_ray.stop_at = 2
    with pytest.raises(RuntimeError, match="stopped"):
        predict(*sampled, "--batch_size", 2, data=name, output="begun")
    other = save(tmp_path / "other", "prefix_lm")
    for flags in (["--checkpoint", other], ["--checkpoint", checkpoint, "--h_cycles", 1]):
        code, _, err = command(main, "--input", tmp_path / name, "--output", tmp_path / "begun", *sampled, *flags)
        assert code == 2 and "holds answers of other input or settings, unfinished" in err


def test_the_output_may_be_within_the_input(predict, tmp_path, without_ray):
    write(tmp_path / "in.jsonl", questions(10))
    without_ray.stop_at = 3
    with pytest.raises(RuntimeError, match="stopped"):
        predict("--batch_size", 2, data=".")
    without_ray.stop_at = None
    assert [record["id"] for record in predict("--batch_size", 2, data=".")] == list(range(10))


def test_a_node_that_does_not_reach_the_output_says_so(predict, tmp_path, without_ray, monkeypatch):
    write(tmp_path / "in.jsonl", questions(10))
    started = pipeline.Answerer.__init__

    def elsewhere(actor, job):
        started(actor, dataclasses.replace(job, output="/elsewhere"))

    monkeypatch.setattr(pipeline.Answerer, "__init__", elsewhere)
    with pytest.raises(AssertionError, match="--output /elsewhere: a node does not reach it"):
        predict()


def test_the_last_chunk_may_be_done_before_others(predict, tmp_path, without_ray, monkeypatch):
    write(tmp_path / "in.jsonl", questions(10))
    predict("--batch_size", 3, output="straight")
    read_in_order = pipeline.read
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read", lambda *arguments: list(read_in_order(*arguments))[::-1])
        without_ray.stop_at = 3
        with pytest.raises(RuntimeError, match="stopped"):
            predict("--batch_size", 3)
    assert {path.name for path in (tmp_path / "out").glob("part-*")} == {"part-000002.jsonl", "part-000003.jsonl"}
    without_ray.stop_at = None
    found = predict("--batch_size", 7)  # the chunks stay as they are
    assert [record["response"] for record in found] == [r["response"] for r in read(tmp_path / "straight")]
    assert content(tmp_path / "out").keys() == content(tmp_path / "straight").keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "missing"], "--input missing: does not exist"),
        (["--input", "t.txt"], "--input: records are read from JSONL, Parquet and CSV"),
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint folder"),
        (["--n", "2"], "--n 2 would give the same answer every time"),
        (["--n", "0"], "--n must be at least 1"),
        (["--top_p", "0"], "--top_p must be more than 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--num_workers", "0"], "--num_workers must be at least 1"),
        (["--h_cycles", "0"], "--h_cycles must be at least 1"),
        (["--prompt_field", "{a"], "--prompt_field '{a': not a template"),
        (["--output", "."], "is not empty"),
        (["--output", "s4://x"], "s4://x"),
    ],
)
def test_bad_input_is_a_line_and_exit_code_2_before_ray_starts(command, in_folder, checkpoint, arguments, message):
    (in_folder / "t.txt").write_text("x")
    write(in_folder / "in.jsonl", questions(3))
    paths = ["--input", "in.jsonl", "--output", "out"]
    flags = [] if "--checkpoint" in arguments else ["--checkpoint", checkpoint]
    code, out, err = command(main, *paths, *flags, *arguments)
    assert code == 2 and message in err and not out
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_an_input_without_a_record_is_refused(command, checkpoint, tmp_path, without_ray):
    (tmp_path / "in.jsonl").write_text("\n")
    arguments = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out", "--checkpoint", checkpoint]
    code, _, err = command(main, *arguments)
    assert code == 2 and "--input: no record" in err


def test_input_output_and_checkpoint_live_in_object_storage(command, bucket, checkpoint, without_ray, tmp_path):
    here = pyarrow.fs.LocalFileSystem()
    pyarrow.fs.copy_files(str(checkpoint), "bucket/model", source_filesystem=here, destination_filesystem=bucket.fs)
    for name, some in (("a.jsonl", questions(30)[:20]), ("b.jsonl", questions(30)[20:])):
        with bucket.fs.open_output_stream(f"bucket/asked/{name}") as file:
            file.write("".join(json.dumps(record) + "\n" for record in some).encode())
    flags = ["--checkpoint", bucket("model"), "--input", bucket("asked"), "--batch_size", 4]
    without_ray.stop_at = 3
    with pytest.raises(RuntimeError, match="stopped"):
        command(main, *flags, "--output", bucket("answers"))
    without_ray.stop_at = None
    code, out, err = command(main, *flags, "--output", bucket("answers"))
    assert code == 0 and "30 of 30 records answered in s3://bucket/answers;" in out, err
    assert "12 records were answered before" in err and not any(key in out + err for key in KEYS.split(":"))
    found = {info.base_name for info in bucket.fs.get_file_info(pyarrow.fs.FileSelector("bucket/answers"))}
    assert "_report.json" in found and ".predict" not in found
    (tmp_path / "copy").mkdir()
    pyarrow.fs.copy_files(
        "bucket/answers", str(tmp_path / "copy"), source_filesystem=bucket.fs, destination_filesystem=here
    )
    assert [record["id"] for record in read(tmp_path / "copy")] == list(range(30))
    write(tmp_path / "in.jsonl", questions(30))
    near = ["--checkpoint", checkpoint, "--input", tmp_path / "in.jsonl", "--batch_size", 4]
    assert command(main, *near, "--output", tmp_path / "near")[0] == 0
    assert content(tmp_path / "near") == content(tmp_path / "copy")


# --- with Ray ----------------------------------------------------------------------------------------------------


def test_killed_driver_and_killed_actor_leave_each_record_answered_once(cluster, command, driver, checkpoint, tmp_path):
    some = questions(2000)
    write(tmp_path / "in.jsonl", some)
    arguments = ["--checkpoint", checkpoint, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out"]
    arguments += ["--batch_size", 4]
    done = (tmp_path / "out/.predict").glob
    killed = driver("-m", "ray_jobs.predict", *arguments, joins=cluster, stdout=DEVNULL, stderr=DEVNULL)
    wait_until(lambda: len(list(done("chunk-*.json"))) >= 3)
    killed.kill()
    killed.wait()
    wait_until(lambda: not actors(driver.mark))  # they may write until then
    before = len(list(done("chunk-*.json")))
    assert before >= 3 and not (tmp_path / "out/_report.json").exists()

    again = driver("-m", "ray_jobs.predict", *arguments, joins=cluster)
    wait_until(lambda: len(list(done("chunk-*.json"))) >= before + 3)
    os.kill(actors(driver.mark)[0], signal.SIGKILL)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "2,000 of 2,000 records answered" in out and "records were answered before" in err and "Traceback" not in err
    found = read(tmp_path / "out")
    assert [record["id"] for record in found] == list(range(2000))
    model, tokenizer, _ = load_model(checkpoint)
    assert [record["response"] for record in found] == answers_of(model, tokenizer, [r["prompt"] for r in some])


def actors(mark: str) -> list[int]:
    def title(pid: int) -> bytes:
        with suppress(OSError):  # it has ended
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        return b""

    return [pid for pid in processes_with(mark) if b"MapWorker" in title(pid)]


def test_generate_samples_with_the_same_flags(command, checkpoint):
    flags = ["--checkpoint", checkpoint, "--prompt", "1+1", "--prompt", "2+2", "--temperature", 1.5]
    code, first, err = command(generate, *flags, "--top_p", 0.9, "--seed", 3)
    assert code == 0, err
    assert command(generate, *flags, "--top_p", 0.9, "--seed", 3)[1] == first
    assert command(generate, *flags, "--top_p", 1e-9, "--seed", 3)[1] == command(generate, *flags[:-2])[1]
