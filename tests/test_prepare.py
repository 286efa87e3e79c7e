"""`python -m ray_jobs.prepare`: what is read, what is left out, and that a kill changes nothing."""

import csv
import dataclasses
import gzip
import json
import re
import signal
import zlib
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from conftest import Remote, each_fails_once, processes_with, small_config, train_locally, wait_until

from hrm_lm.commands.help import field_docs
from hrm_lm.commands.prepare import main
from hrm_lm.config import DataConfig, ModelConfig
from hrm_lm.data.chat import Chat
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.tokenizer import ByteTokenizer, resolve_tokenizer
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import generate
from hrm_lm.prepare.pipeline import run_task
from hrm_lm.prepare.reading import MAX_RECORD, End, Mapping, Pair, Problem, find_files, plan_parts, read_piece
from hrm_lm.prepare.tasks import Job, Settings, Source, survey, write_shard
from hrm_lm.training.checkpoint import load_model

LOCAL = pyarrow.fs.LocalFileSystem()
MAPPING = Mapping("prompt", "response")
SOURCES = [Source("", [], MAPPING)]


def pairs(n, start=0):
    return [(f"What is {i} + {i}?", str(2 * i)) for i in range(start, start + n)]


def records(some):
    return [{"prompt": prompt, "response": response} for prompt, response in some]


def jsonl(some):
    return "".join(json.dumps(record) + "\n" for record in some).encode()


def read_all(location, part_bytes=1 << 30):
    """Pairs and problems of all files, cut into parts of so many bytes: (path, item)."""
    parts = plan_parts([file for file, _ in find_files([str(location)])], part_bytes)
    return [(Path(piece.path).name, item) for part in parts for piece in part for item in read_piece(piece, MAPPING)]


def texts(split, tokenizer):
    return sorted((tokenizer.decode(sample.prompt), tokenizer.decode(sample.response)) for sample in split)


def load(folder):
    splits = load_dataset(DataConfig(dataset=str(folder)), ModelConfig(), 0)
    return texts(splits.train, splits.tokenizer), texts(splits.val, splits.tokenizer)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- reading, without Ray ----------------------------------------------------------------------------------------


def test_every_format_gives_the_same_pairs(tmp_path):
    some = pairs(50)
    raw, table = jsonl(records(some)), pa.Table.from_pylist(records(some))
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))  # two members
    (tmp_path / "c.ndjson.zst").write_bytes(pa.compress(raw, "zstd", asbytes=True))
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    (tmp_path / "sub").mkdir()
    with open(tmp_path / "sub" / "e.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "response"), *some])
    (tmp_path / "f.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\n"))
    (tmp_path / "README.md").write_text("not data")
    found = read_all(tmp_path)
    for name in ("a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.parquet", "e.csv", "f.jsonl"):
        items = [item for path, item in found if path == name and not isinstance(item, End)]
        assert [item[:2] for item in items] == some, name
    assert len({path for path, _ in found}) == 6


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 997, 10**6])
def test_a_file_cut_into_parts_gives_every_line_once_with_its_number(tmp_path, part_bytes):
    lines = [
        line
        for i, pair in enumerate(pairs(60))
        for line in (["not json"] if i % 13 == 3 else []) + ["", json.dumps(records([pair])[0])]
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))  # the last line has no end
    pq.write_table(pa.Table.from_pylist(records(pairs(60, 1000))), tmp_path / "b.parquet", row_group_size=7)
    before, numbered = 0, []
    for path, item in read_all(tmp_path, part_bytes):
        if isinstance(item, End):
            before += item.lines
        elif path == "a.jsonl":
            numbered.append((before + item.position, item[:2] if isinstance(item, Pair) else item.reason))
    expected = [
        (n, "not JSON" if line == "not json" else tuple(json.loads(line).values()))
        for n, line in enumerate(lines, 1)
        if line
    ]
    assert numbered == expected
    rows = [(item.position, item[:2]) for path, item in read_all(tmp_path, part_bytes) if path == "b.parquet"]
    assert rows == list(enumerate(pairs(60, 1000), start=1))


def test_small_files_share_a_part_and_large_ones_are_cut(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.jsonl").write_bytes(b"x" * (10 if i else 1000))
    parts = plan_parts([file for file, _ in find_files([str(tmp_path)])], 300)
    assert [sum(piece.num_bytes for piece in part) for part in parts] == [300, 300, 300, 180]


@pytest.mark.parametrize(
    "prompt, record, expected",
    [
        ("data.question", {"data": {"question": "q"}}, "q"),
        ("data.question", {"data.question": "flat", "data": {"question": "q"}}, "flat"),
        ("messages.0.content", {"messages": [{"content": "q"}]}, "q"),
        ("{question}\nContext: {data.context}", {"question": "q", "data": {"context": "c"}}, "q\nContext: c"),
        ("{a} + {{b}} {b}", {"a": 1, "b": 2.5}, "1 + {b} 2.5"),
    ],
)
def test_fields_may_be_nested_or_filled_into_a_template(tmp_path, prompt, record, expected):
    (tmp_path / "a.jsonl").write_bytes(jsonl([record | {"response": "r"}]))
    pq.write_table(pa.Table.from_pylist([record | {"response": "r", "unused": 1}]), tmp_path / "b.parquet")
    for file, _ in find_files([str(tmp_path)]):
        items = [item for item in read_piece(file, Mapping(prompt, "response")) if not isinstance(item, End)]
        assert [item[:2] for item in items] == [(expected, "r")]


def talk(i):
    """A conversation, and what becomes of it."""
    turns = [("user", f"p{i}"), ("assistant", f"r{i}"), ("user", f"q{i}"), ("assistant", f"s{i}")]
    prompt = f"[p{i}][r{i}][q{i}]>"
    return [{"role": role, "content": content} for role, content in turns], [(f"[p{i}]>", f"r{i}"), (prompt, f"s{i}")]


@pytest.mark.parametrize("field", ["messages", "talk"])
def test_a_conversation_of_any_format_gives_a_pair_for_each_answer_all_held_out_by_the_first_prompt(tmp_path, field):
    datasets = pytest.importorskip("datasets")
    chat = Chat("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    mapping = Mapping("prompt" if field == "messages" else field, "response", chat=chat)
    some = [{field: talk(i)[0], "id": i} for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(some))
    pq.write_table(pa.Table.from_pylist(some), tmp_path / "b.parquet", row_group_size=7)
    datasets.Dataset.from_list(some).save_to_disk(tmp_path / "saved")
    for location in (tmp_path / "a.jsonl", tmp_path / "b.parquet", f"hf:{tmp_path / 'saved'}"):
        for part_bytes in (1 << 30, 300):
            parts = plan_parts([file for file, _ in find_files([str(location)])], part_bytes)
            items = [item for part in parts for piece in part for item in read_piece(piece, mapping)]
            found = [item for item in items if not isinstance(item, End)]
            assert [item[:2] for item in found] == [pair for i in range(40) for pair in talk(i)[1]]
            assert [item.origin for item in found] == [f"[p{i}]>" for i in range(40) for _ in range(2)]
            assert part_bytes > 300 or len(parts) > 3


def test_rows_of_a_dataset_of_the_library_are_named_by_their_number_and_unread_columns_by_the_table(tmp_path):
    datasets = pytest.importorskip("datasets")
    some = [*records(pairs(6)), {"prompt": "p"}, {"prompt": "", "response": "x"}, *records(pairs(6))]
    datasets.Dataset.from_list(some).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list([{"question": "a"}] * 5).save_to_disk(tmp_path / "other")

    def problems(name):
        parts = plan_parts([file for file, _ in find_files([f"hf:{tmp_path / name}"])], 100)
        items = [item for part in parts for piece in part for item in read_piece(piece, MAPPING)]
        return [item[:2] for item in items if not isinstance(item, Pair)], sum(
            item.lost for item in items if not isinstance(item, Pair)
        )

    assert problems("saved") == ([("field 'response' is null, not text", 7), ("the prompt is empty", 8)], 2)
    assert {reason for reason, _ in problems("other")[0]} == {"no field 'prompt'"} and problems("other")[1] == 5
    with pytest.raises(UserError, match="--input: hf:.*saved: has no split 'x'"):
        find_files([f"hf:{tmp_path / 'saved'},split=x"])


def test_plain_text_becomes_prompts_and_continuations_and_none_of_it_is_lost(tmp_path):
    words = [f"word{i}" + (".\n" if i % 11 == 0 else "") for i in range(500)] + ["x" * 300]
    text = " ".join(words)
    (tmp_path / "a.txt").write_text(text)
    (file, _), *_ = find_files([str(tmp_path)])
    items = [item for item in read_piece(file, Mapping("", "", 80, 20)) if isinstance(item, Pair)]
    assert "".join(item.prompt + item.response for item in items) == text
    assert all(0 < len(item.prompt) <= 80 and 0 < len(item.response) <= 20 for item in items[:-1])
    assert items[-1].prompt and items[-1].response and len(items[-1].prompt + items[-1].response) < 102
    assert all(item.response[0].isspace() for item in items[:20]), "cut between words"
    assert items[5].position > 1


def broken_corpus(folder):
    """Every fault of the list, with good pairs before and behind; returns the good pairs and what must be reported."""
    folder.mkdir()
    good = iter([pairs(10, 100 * i) for i in range(50)])
    kept, expected = [], []

    def some():
        kept.extend(chosen := next(good))
        return jsonl(records(chosen))

    def fault(name, lines, reason, count=1):
        expected.append((f"{folder / name}" + (f":{lines}" if lines else ""), reason, count))

    rng = np.random.default_rng(0)
    noise = jsonl([{"prompt": f"n{i} {rng.random()}", "response": str(rng.random())} for i in range(3000)])
    cut = gzip.compress(noise)[: len(gzip.compress(noise)) // 2]
    whole = zlib.decompressobj(31).decompress(cut)
    survivors = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    kept.extend((record["prompt"], record["response"]) for record in survivors)
    (folder / "truncated.jsonl.gz").write_bytes(cut)
    fault("truncated.jsonl.gz", len(survivors) + 1, "unreadable from here on")

    (folder / "lines.jsonl").write_bytes(
        some() + b"{broken\n" + some() + b'{"prompt": "no answer"}\n' + b'{"prompt": 5, "response": "b"}\n' + some()
        + b'{"prompt": "p", "response": null}\n' + b"[1, 2]\n" + b'{"prompt": "", "response": "x"}\n'
        + b'{"prompt": "\\ud800", "response": "x"}\n' + some()
    )  # fmt: skip
    fault("lines.jsonl", 11, "not JSON")
    fault("lines.jsonl", 22, "no field 'response'")
    fault("lines.jsonl", 23, "field 'prompt' is int, not text")
    fault("lines.jsonl", 34, "field 'response' is null, not text")
    fault("lines.jsonl", 35, "no field 'prompt'")
    fault("lines.jsonl", 36, "the prompt is empty")
    fault("lines.jsonl", 37, "not Unicode text, but half a character")

    (folder / "empty.jsonl").write_bytes(b"")
    fault("empty.jsonl", None, "the file is empty")
    long = json.dumps({"prompt": "long", "response": "x" * 10_000_000}).encode() + b"\n"
    (folder / "long.jsonl").write_bytes(some() + long + some())
    fault("long.jsonl", 11, f"longer than {MAX_RECORD:,} bytes")
    latin = json.dumps({"prompt": "caf\xe9", "response": "x"}, ensure_ascii=False)
    (folder / "mixed.jsonl").write_bytes(some() + latin.encode("latin-1") + b"\n" + latin.encode() + b"\n" + some())
    kept.append(("caf\xe9", "x"))
    fault("mixed.jsonl", 11, "not UTF-8 text")

    pq.write_table(pa.table({"question": ["a"] * 7, "response": ["b"] * 7}), folder / "other.parquet")
    fault("other.parquet", 1, "no field 'prompt'", 7)
    pq.write_table(pa.table({"prompt": [1, 2], "response": ["a", "b"]}), folder / "types.parquet")
    fault("types.parquet", 1, "field 'prompt' is int, not text", 2)
    (folder / "torn.parquet").write_bytes(b"PAR1 torn")
    fault("torn.parquet", 1, "unreadable from here on")
    (folder / "ragged.csv").write_text('prompt,response\nq1,a1\nq2\nq3,a3,more\n"q\n4",a4\n')
    kept.extend([("q1", "a1"), ("q\n4", "a4")])
    fault("ragged.csv", 3, "no field 'response'")
    fault("ragged.csv", 4, "more fields than the header")
    return kept, expected


def test_what_is_broken_is_counted_and_reported_by_file_and_position_and_nothing_else_is_lost(
    cluster, command, tmp_path
):
    kept, expected = broken_corpus(tmp_path / "in")
    code, out, err = command(
        main,
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--tokenizer",
        "bytes",
        "--shard_mb",
        0.3,
        "--val_fraction",
        0.05,
    )
    assert code == 0, err
    train, val = load(tmp_path / "out")
    assert sorted(train + val) == sorted(set(kept))
    dropped = json.loads((tmp_path / "out/report.json").read_text())["dropped"]
    places = {(example["place"], reason) for reason, drop in dropped.items() for example in drop["examples"]}
    for place, reason, _ in expected:
        assert (place, reason) in places
    counts = {reason: sum(count for _, r, count in expected if r == reason) for _, reason, _ in expected}
    assert {reason: drop["count"] for reason, drop in dropped.items()} == counts
    assert f"{sum(counts.values())} left out" in out and "not JSON 1 (" in err


@pytest.mark.parametrize(
    "line, message",
    [(b"{broken\n", "not JSON"), (b'{"prompt": "p"}\n', "no field 'response'"), (b"\xff\n", "not UTF-8 text")],
)
def test_strict_makes_the_first_fault_an_error(cluster, command, tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(5))) + line)
    code, out, err = command(
        main, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes", "--strict"
    )
    assert code == 2 and f"a.jsonl:6: {message}" in err and "Traceback" not in err
    assert not (tmp_path / "out/meta.json").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_fault_of_the_storage_is_not_taken_for_one_of_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    (file, _), *_ = find_files([str(tmp_path)])
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: cannot be read"):
        list(read_piece(file, MAPPING))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_no_pair_is_lost_where_reading_fails_now_and_then(tmp_path, waits, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"prompt": ["a", "b"] * 500, "response": ["c", "d"] * 500}), path, row_group_size=300)
    else:
        with LOCAL.open_output_stream(str(path)) as file:  # compressed for its name
            file.write(b"".join(b'{"prompt": "%d", "response": "x"}\n' % i for i in range(1000)))
    (file, _), *_ = find_files([str(path)])
    expected = [piece for part in plan_parts([file], 5000) for piece in part]
    far = [piece._replace(fs=Remote(each_fails_once())) for piece in expected]
    read, expected = ([item for piece in side for item in read_piece(piece, MAPPING)] for side in (far, expected))
    assert read == expected and len(expected) >= 1000 and len(waits) >= 3


def test_a_task_whose_storage_fails_is_done_again_to_the_same_bytes(tmp_path, waits):
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(20))))
    parts = plan_parts([file for file, _ in find_files([str(tmp_path)])], 1 << 20)
    shards = []
    for name, fs in (("near", LOCAL), ("far", Remote(each_fails_once()))):
        (tmp_path / name / ".prepare").mkdir(parents=True)
        job = Job(Settings(tokenizer="bytes"), SOURCES, parts, fs, str(tmp_path / name), False, False)
        surveyed = json.loads(run_task(job, "survey", [0], survey, {"i": 0})["result"])
        task = partial(
            write_shard,
            tokenizer_json=ByteTokenizer().to_json(),
            duplicates={},
            pairs=[sum(surveyed["groups"])],
            last={"": None},
        )
        done = run_task(job, "shard", [0], task, {"i": 0})
        assert not done["error"] and job.read_json(".prepare/shard-00000.json") == json.loads(done["result"])
        shards.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.*") if file.is_file()})
    assert shards[0] == shards[1] and "train-00000.bin" in shards[0] and waits


def test_input_that_changes_while_it_is_read_is_noticed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(10))))
    parts = plan_parts([file for file, _ in find_files([str(tmp_path)])], 1 << 20)
    (tmp_path / "out/.prepare").mkdir(parents=True)
    job = Job(
        Settings(tokenizer="bytes"), SOURCES, parts, pyarrow.fs.LocalFileSystem(), str(tmp_path / "out"), False, False
    )
    surveyed = survey(job, 0)
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(9))))
    with pytest.raises(UserError, match="changed while it was read: one of .*a.jsonl"):
        write_shard(job, 0, ByteTokenizer().to_json(), {}, [sum(surveyed["groups"])], {"": None})


# --- the result --------------------------------------------------------------------------------------------------


def prepare(command, folder, *files, output="out", options=("--tokenizer", "characters", "--val_fraction", 0.2)):
    code, out, err = command(main, "--input", *files, "--output", folder / output, *options)
    assert code == 0, err
    return load(folder / output)


def test_duplicates_go_and_a_prompt_is_on_one_side_whatever_files_come_later(cluster, command, tmp_path):
    again = [(prompt, "another answer") for prompt, _ in pairs(200)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(200) + pairs(100))))
    (tmp_path / "b.jsonl").write_bytes(jsonl(records(pairs(300, 100) + again)))
    first_train, first_val = prepare(command, tmp_path, tmp_path / "a.jsonl", output="first")
    train, val = prepare(
        command,
        tmp_path,
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
        options=("--tokenizer", "characters", "--val_fraction", 0.2, "--shard_mb", 0.002),
    )
    assert sorted(train + val) == sorted(pairs(400) + again)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in val}
    assert set(first_train) <= set(train) and set(first_val) <= set(val)
    assert 0.1 < len(val) / 600 < 0.3
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["duplicates"] == 200 and (report["train"], report["val"]) == (len(train), len(val))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert len(meta["splits"]["train"]["shards"]) > 3 and meta["splits"]["train"]["samples"] == len(train)
    assert sum(meta["splits"]["train"]["lengths_up_to"]["prompt"].values()) == len(train)
    assert not (tmp_path / "out/.prepare").exists()


def test_what_has_too_many_tokens_is_left_out_and_counted(cluster, command, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(50) + [("p" * 40, "r"), ("p", "r" * 40)])))
    options = ("--tokenizer", "bytes", "--max_prompt_len", 30, "--max_response_len", 10, "--val_fraction", 0.2)
    train, val = prepare(command, tmp_path, tmp_path / "a.jsonl", options=options)
    assert sorted(train + val) == sorted(pairs(50))
    dropped = json.loads((tmp_path / "out/report.json").read_text())["dropped"]
    places = {reason: [example["place"][-3:] for example in drop["examples"]] for reason, drop in dropped.items()}
    assert places == {"the prompt has too many tokens": [":51"], "the response has too many tokens": [":52"]}


def test_a_tokenizer_is_trained_on_the_corpus_and_taken_by_path(cluster, command, tmp_path):
    some = pairs(300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(some)))
    train, val = prepare(
        command,
        tmp_path,
        tmp_path / "a.jsonl",
        output="bpe",
        options=("--train_tokenizer", "bpe", "--vocab_size", 300, "--val_fraction", 0.2),
    )
    assert sorted(train + val) == sorted(some)
    tokenizer = resolve_tokenizer(str(tmp_path / "bpe/tokenizer.json"))
    assert tokenizer.vocab_size == 300 and len(tokenizer.encode("What is 12 + 12?")) < 10
    assert tokenizer.decode(tokenizer.encode("h\xe9llo \u2211")) == "h\xe9llo \u2211"

    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.definition))  # as Hugging Face has it
    train_again, val_again = prepare(
        command,
        tmp_path,
        tmp_path / "a.jsonl",
        output="path",
        options=("--tokenizer", tmp_path / "tokenizer.json", "--val_fraction", 0.2),
    )
    assert (train_again, val_again) == (train, val)
    assert resolve_tokenizer(str(tmp_path / "path/tokenizer.json")).to_json() == tokenizer.to_json()
    options = ("--tokenizer", tmp_path / "bpe", "--val_fraction", 0.2)  # the folder of a dataset
    assert prepare(command, tmp_path, tmp_path / "a.jsonl", output="folder", options=options) == (train, val)
    assert resolve_tokenizer(str(tmp_path / "folder/tokenizer.json")).to_json() == tokenizer.to_json()

    config = small_config(data__dataset=str(tmp_path / "bpe"), train__steps=5)
    train_locally(config, tmp_path / "run")
    model, of_checkpoint, _ = load_model(max((tmp_path / "run").glob("step_*")))
    assert of_checkpoint.to_json() == tokenizer.to_json() and model.embedding.weight.shape[0] == 300
    assert len(generate(model, of_checkpoint, ["What is 2 + 2?"], max_new_tokens=3)) == 1


def test_help_tells_what_each_setting_means(command):
    """The docstring of every field, with its default."""
    code, out, _ = command(main, "--help")
    text = " ".join(out.split())
    docs = field_docs(Settings)
    assert code == 0 and docs.keys() == {field.name for field in dataclasses.fields(Settings)}
    for field in dataclasses.fields(Settings):
        shown = " ".join(docs[field.name].split()) + ("" if field.default is None else f" (default: {field.default})")
        assert f"{field.name.upper()} {shown}" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokenizer", "nope.json"], "--tokenizer: nope.json cannot be read: No such file"),
        ([], "give --tokenizer"),
        (["--tokenizer", "bytes", "--train_tokenizer", "bpe"], "give --tokenizer"),
        (["--train_tokenizer", "unigram"], "only bpe"),
        (["--tokenizer", "bytes", "--prompt_field", "{a"], "--prompt_field '{a': not a template"),
        (["--tokenizer", "bytes", "--prompt_field", "{}"], "not a template: name fields in braces"),
        (["--tokenizer", "bytes", "--val_fraction", "1.5"], "--val_fraction must be between 0 and 1"),
        (["--tokenizer", "bytes", "--shard_mb", "0"], "--shard_mb must be more than 0"),
        (["--tokenizer", "bytes", "--input", "missing"], "--input missing: does not exist"),
        (["--tokenizer", "bytes", "--input", "t.md"], "not a kind of file that is read"),
        (["--tokenizer", "bytes", "--input", "."], "no .jsonl, "),
        (["--tokenizer", "bytes", "--output", "."], "is not empty"),
        (["--tokenizer", "bytes", "--output", "s4://x"], "s4://x"),
    ],
)
def test_bad_input_is_a_line_and_exit_code_2_before_ray_starts(command, in_folder, arguments, message):
    (in_folder / "t.md").write_text("x")
    (in_folder / "data").mkdir()
    (in_folder / "data/a.jsonl").write_bytes(jsonl(records(pairs(5))))
    if "." in arguments and "--input" in arguments:
        (in_folder / "data/a.jsonl").unlink()
    code, out, err = command(main, "--input", "data/a.jsonl", "--output", "out", *arguments)
    assert code == 2 and message in err and not out
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"{broken\n", r"no usable pair in 1 file\(s\): not JSON 1 \("),
        (jsonl(records(pairs(1))), "--val_fraction 0.01: of 1 pairs, 0 would be"),
    ],
)
def test_a_corpus_without_pairs_for_both_sides_is_refused(cluster, command, tmp_path, raw, message):
    (tmp_path / "a.jsonl").write_bytes(raw)
    code, out, err = command(
        main, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes"
    )
    assert code == 2 and re.search(message, err)


# --- again, and after a kill -------------------------------------------------------------------------------------


def test_given_again_it_does_nothing_and_with_other_settings_or_input_it_refuses(cluster, command, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(100))))
    arguments = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--val_fraction", 0.2, "--tokenizer"]
    first = command(main, *arguments, "bytes")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert command(main, *arguments, "bytes")[:2] == first[:2]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "holds a dataset of other input or settings" in command(main, *arguments, "characters")[2]
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(101))))
    assert "holds a dataset of other input or settings" in command(main, *arguments, "bytes")[2]


KILLED_IN_STEP = """
import os, signal, sys
from hrm_lm.commands.prepare import main
from hrm_lm.prepare import pipeline

def killing(task, driver=os.getpid(), calls=[]):
    def run(*args, **options):
        calls.append(task)
        if len(calls) == 3:  # so the results of two calls are in storage
            os.kill(driver, signal.SIGKILL)
        return task(*args, **options)
    return run

setattr(pipeline, sys.argv[1], killing(getattr(pipeline, sys.argv[1])))
main(sys.argv[2:])
"""


def test_killed_while_reading_and_while_tokenizing_and_given_again_it_finishes_what_is_left(
    cluster, command, driver, tmp_path
):
    """The result is byte-identical to that of an undisturbed run, and shards that were finished are not written again."""
    sources = {"a": {"input": [], "cap": 1500}, "b": {"input": [], "condition": "cot", "repeat": 2}}
    for i in range(6):
        sources["ab"[i // 3]]["input"].append(str(tmp_path / f"{i}.jsonl"))
        (tmp_path / f"{i}.jsonl").write_bytes(jsonl(records(pairs(600, 400 * i))))  # a third are duplicates

    (tmp_path / "recipe.yaml").write_text(json.dumps({"sources": sources}))

    def arguments(output):
        options = ["--train_tokenizer", "bpe", "--vocab_size", "300", "--shard_mb", "0.01"]
        return ["--sources", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / output), *options]

    code, undisturbed, err = command(main, *arguments("undisturbed"))
    assert code == 0, err
    work = tmp_path / "killed/.prepare"
    for step, results in (("survey", "survey-*.json"), ("write_shard", "shard-*.json")):
        command_of = ("-c", KILLED_IN_STEP, step, *arguments("killed"))
        killed = driver(*command_of, joins=cluster, stdout=DEVNULL, stderr=DEVNULL)
        assert killed.wait() == -signal.SIGKILL
        wait_until(lambda: not processes_with(driver.mark))  # its workers may write until then
        assert len(list(work.glob(results))) >= 2 and not (tmp_path / "killed/meta.json").exists()
        with pytest.raises(UserError):
            load(tmp_path / "killed")
    numbers = [path.stem[-5:] for path in work.glob("shard-*.json")]
    shards = [tmp_path / "killed" / f"{split}-{number}.bin" for number in numbers for split in ("train", "val")]
    finished = {shard: shard.stat().st_mtime_ns for shard in shards if shard.exists()}  # not all pairs are duplicates
    code, out, err = command(main, *arguments("killed"))
    assert code == 0 and out.split(" in ")[0] == undisturbed.split(" in ")[0], err
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")
    assert finished and all(shard.stat().st_mtime_ns == before for shard, before in finished.items())


def test_a_parquet_row_that_is_no_text_is_left_out_and_no_other(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": texts, "response": ["x", "y", "z"]}), tmp_path / "t.parquet")
    items = [item for _, item in read_all(tmp_path)]
    assert [(item.prompt, item.position) for item in items if isinstance(item, Pair)] == [("a", 1), ("c", 3)]
    assert [(item.reason, item.position) for item in items if isinstance(item, Problem)] == [("not UTF-8 text", 2)]


def test_what_is_done_of_a_plan_that_is_not_there_is_not_gone_on_with(tmp_path, command):
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(9))))
    (tmp_path / "out/.prepare").mkdir(parents=True)
    (tmp_path / "out/.prepare/survey-00000.json").write_text("{}")
    code, _, err = command(main, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert code == 2 and "damaged: .prepare has survey-00000.json, but no plan.json; delete what is there" in err


@pytest.mark.parametrize("name", ["meta.json", ".prepare/plan.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "[" * 5000])
def test_a_damaged_file_of_an_earlier_command_is_named(tmp_path, command, name, text):
    (tmp_path / "a.jsonl").write_bytes(jsonl(records(pairs(9))))
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text(text)
    code, _, err = command(main, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert code == 2 and f"{name}: damaged: " in err and len(err.splitlines()) == 1
