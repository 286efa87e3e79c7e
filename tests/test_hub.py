"""`hf:`: datasets of the `datasets` library, from local folders of every kind."""

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_config, train_locally

from hrm_lm.config import DataConfig, MixtureMember, ModelConfig
from hrm_lm.data import hub
from hrm_lm.data.registry import is_function, load_dataset
from hrm_lm.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline_with_a_cache_of_its_own(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def pairs(n, start=0):
    return [(f"What is {i} + {i}?", str(2 * i)) for i in range(start, start + n)]


def records(some):
    return [{"prompt": prompt, "response": response, "id": 7} for prompt, response in some]


def conversation(i, turns):
    contents = [(f"p{i}.{turn}", f"r{i}.{turn}") for turn in range(turns)]
    return [
        {"role": role, "content": content} for pair in contents for role, content in zip(("user", "assistant"), pair)
    ]


def load(name, model=ModelConfig(max_prompt_len=256), **fields):
    return load_dataset(DataConfig(dataset=str(name), **fields), model, seed=0)


def texts(splits, *names):
    decode = splits.tokenizer.decode
    sides = (
        [splits.map(lambda name, split: split).train, splits.val] if not names else [getattr(splits, n) for n in names]
    )
    return [(decode(sample.prompt), decode(sample.response)) for side in sides for sample in side]


def write(folder, kind, some):
    """A local folder of that kind, of which `hf:` is to read the records `some`; returns its name and options."""
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(some), folder / "data.parquet")
    elif kind == "jsonl":
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    elif kind == "csv":
        pa.csv.write_csv(pa.Table.from_pylist(some), folder / "data.csv")
    elif kind == "saved":
        datasets.Dataset.from_list(some).save_to_disk(folder)
    elif kind == "saved splits":
        other = datasets.Dataset.from_list([{"other": 1}])
        datasets.DatasetDict(mine=datasets.Dataset.from_list(some), train=other).save_to_disk(folder)
        return f"hf:{folder},split=mine"
    return f"hf:{folder}"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "saved", "saved splits"])
def test_a_folder_of_every_kind_gives_the_same_pairs_each_prompt_on_one_side(tmp_path, kind):
    import pyarrow.csv  # noqa: F401

    some = pairs(40) + [(prompt, "another answer") for prompt, _ in pairs(40)]
    splits = load(write(tmp_path / "data", kind, records(some)), val_fraction=0.25)
    train, val = texts(splits, "train"), texts(splits, "val")
    assert sorted(train + val) == sorted(some) and len(val) == 20
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in val}
    assert splits.tokenizer.characters == sorted({c for pair in some for text in pair for c in text})
    again = load(f"hf:{tmp_path / 'data'}" + (",split=mine" if kind == "saved splits" else ""), val_fraction=0.25)
    assert texts(again, "val") == val


def test_the_splits_are_those_that_are_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, start, n in (("train", 0, 10), ("test", 100, 4)):
        pq.write_table(pa.Table.from_pylist(records(pairs(n, start))), folder / f"{name}.parquet")
    splits = load(f"hf:{folder},val_split=test")
    assert (texts(splits, "train"), texts(splits, "val")) == (pairs(10), pairs(4, 100))
    splits = load(f"hf:{folder},split=train[:50%],val_split=train[50%:]")
    assert (texts(splits, "train"), texts(splits, "val")) == (pairs(5), pairs(5, 5))
    splits = load(f"hf:{folder},split=test", val_fraction=0.5)
    assert sorted(texts(splits, "train", "val")) == sorted(pairs(4, 100))


def test_a_config_is_chosen_by_name(tmp_path):
    folder = tmp_path / "data"
    for name, start in (("one", 0), ("two", 50)):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(records(pairs(9, start))), folder / name / "train.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.parquet\n- config_name: two\n  data_files: two/*.parquet\n---\n"
    )
    assert sorted(texts(load(f"hf:{folder},config=two"), "train", "val")) == sorted(pairs(9, 50))
    with pytest.raises(UserError, match=r"data.dataset: hf:.*: cannot be loaded: Config name is missing|one.*two"):
        load(f"hf:{folder}")


def test_conversations_that_begin_alike_are_on_one_side(tmp_path):
    some = [{"messages": conversation(i, turns)} for turns in (1, 3) for i in range(20)]
    splits = load(write(tmp_path / "data", "saved", some), tokenizer="bytes", val_fraction=0.4)
    train, val = ({response.split(".")[0] for _, response in texts(splits, side)} for side in ("train", "val"))
    assert len(val) == 8 and train.isdisjoint(val)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved"])
def test_conversations_give_a_sample_for_each_answer_and_stay_on_one_side(tmp_path, kind):
    some = [{"messages": conversation(i, turns=1 + i % 3), "prompt": None} for i in range(30)]
    splits = load(write(tmp_path / "data", kind, some), tokenizer="bytes", val_fraction=0.4)
    train, val = texts(splits, "train"), texts(splits, "val")
    answers = lambda side: sorted(response for _, response in side)  # noqa: E731
    assert answers(train + val) == sorted(f"r{i}.{turn}" for i in range(30) for turn in range(1 + i % 3))
    assert {response.split(".")[0] for _, response in train}.isdisjoint(response.split(".")[0] for _, response in val)
    assert len({response.split(".")[0] for _, response in val}) == 12
    prompts = {response: prompt for prompt, response in train + val}
    assert prompts["r2.0"] == "p2.0"
    assert prompts["r2.1"] == "user: p2.0\nassistant: r2.0\nuser: p2.1\nassistant:"
    order = [f"r{i}.{turn}" for i in range(30) for turn in range(1 + i % 3)]
    assert [r for _, r in train] == [r for r in order if r in dict(map(reversed, train))], "in the order of the rows"


def test_contents_of_several_shapes_in_one_file_are_read(tmp_path):
    """The library keeps such a column as JSON."""
    asked = [{"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}]
    some = [{"messages": conversation(0, 1)}, {"messages": [*asked, {"role": "assistant", "content": "yes"}]}]
    splits = load(write(tmp_path / "data", "jsonl", some + records(pairs(2))), tokenizer="bytes", val_fraction=0.3)
    assert sorted(texts(splits, "train", "val")) == sorted([("p0.0", "r0.0"), ("in parts", "yes"), *pairs(2)])


def test_fields_may_be_nested_templates_or_a_conversation_of_another_name(tmp_path):
    some = [{"data": {"q": f"q{i}", "n": i}, "answers": [f"a{i}"], "talk": conversation(i, 1)} for i in range(9)]
    name = write(tmp_path / "data", "parquet", some)
    splits = load(name, prompt_field="{data.q} of {data.n}", response_field="answers.0", tokenizer="bytes")
    assert sorted(texts(splits, "train", "val")) == [(f"q{i} of {i}", f"a{i}") for i in range(9)]
    splits = load(name, prompt_field="talk", tokenizer="bytes")
    assert sorted(texts(splits, "train", "val")) == [(f"p{i}.0", f"r{i}.0") for i in range(9)]


class Counted:
    """A table that tells which rows are read of it."""

    def __init__(self, table, reads):
        self.table, self.reads = table, reads

    def __len__(self):
        return len(self.table)

    def __getitem__(self, rows):
        self.reads.append(rows)
        return self.table[rows]

    def __getattr__(self, name):
        found = getattr(self.table, name)
        return (lambda *a: Counted(found(*a), self.reads)) if name in ("select", "select_columns") else found


def test_rows_are_read_some_at_a_time_and_a_table_is_never_in_memory(tmp_path, monkeypatch):
    some = records([(f"{i:06d}" + "x" * 2000, "y" * 2000) for i in range(5_000)])
    name, reads = write(tmp_path / "data", "saved", some), []
    load_table = hub.HubDataset.load
    monkeypatch.setattr(hub.HubDataset, "load", lambda self, split: Counted(load_table(self, split), reads))
    monkeypatch.setattr(hub, "READ_TOGETHER", 64)
    model = ModelConfig(max_prompt_len=2048, max_response_len=2048)
    load(name, model, tokenizer="bytes", val_fraction=0.1)  # imports what it needs
    reads.clear()
    tracemalloc.start()
    splits = load(name, model, tokenizer="bytes", val_fraction=0.1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < sum(len(record["prompt"] + record["response"]) for record in some) / 4
    assert reads and all(rows.stop - rows.start <= hub.READ_TOGETHER for rows in reads)
    assert len(splits.train) + len(splits.val) == 5_000


def test_samples_may_be_asked_for_in_any_slice():
    table = datasets.Dataset.from_list([{"messages": conversation(i, 1 + i % 4)} for i in range(50)])
    fields = hub.Fields.of("prompt", "response", hub.Chat(), "")
    rows, _ = hub.surveyed(table, fields, "x")
    whole = list(rows)
    assert len(whole) == len(rows) == sum(1 + i % 4 for i in range(50))
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(whole), (100, 2)), axis=1).tolist():
        assert rows[start : stop + 1] == whole[start : stop + 1] and rows[start] == whole[start]
    mask = rng.random(50) < 0.5
    taken = rows.taken(mask)
    assert list(taken) == [pair for pair in whole if mask[int(pair[1][1:].split(".")[0])]]
    assert [taken.place(i) for i in range(len(taken))] == [
        f"x row {int(pair[1][1:].split('.')[0]) + 1}" for pair in taken
    ]


def test_a_model_trains_on_a_folder_and_a_mixture_takes_it_as_a_member(tmp_path):
    name = write(tmp_path / "data", "parquet", records(pairs(60)))
    train_locally(small_config(data__dataset=name, train__steps=3), tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(record) + "\n" for record in records(pairs(60, 30))))
    members = {"a": MixtureMember(dataset=name), "b": MixtureMember(dataset=str(other))}
    mixed = load_dataset(DataConfig(mixture=members, val_fraction=0.3), ModelConfig(), seed=0)
    held_out = {prompt for prompt, _ in texts(mixed, "val")}
    assert held_out and held_out.isdisjoint(prompt for prompt, _ in texts(mixed, "train"))
    wrong = {"a": MixtureMember(dataset="hf:s3://bucket/x")}
    with pytest.raises(UserError, match="hf: takes a dataset's name on the Hub, or a local folder"):
        load_dataset(DataConfig(mixture=wrong), ModelConfig(), seed=0)


# --- what is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (",split=test", 'hf:.*: cannot be loaded: Unknown split "test". Should be one of'),
        (",config=x", "hf:.*: cannot be loaded: BuilderConfig 'x' not found"),
        (",streaming=true", "has no option 'streaming'; there are config, split, val_split, revision"),
        (",val_split=none", 'cannot be loaded: Unknown split "none"'),
    ],
)
def test_what_a_folder_does_not_have_is_told_in_a_line(tmp_path, options, message):
    name = write(tmp_path / "data", "parquet", records(pairs(9)))
    with pytest.raises(UserError, match=message) as raised:
        load(name + options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "kind, some, message",
    [
        ("parquet", [{"q": "a"}], r"hf:.*: train: no field 'prompt': there are q \(data.prompt_field and"),
        ("parquet", [{"prompt": "a", "answer": "b"}], "no field 'response': there are prompt, answer"),
        ("parquet", [{"prompt": "a", "response": 5}], "train row 1: field 'response' is int, not text"),
        ("saved", [*records(pairs(5)), {"prompt": "a"}], "train row 6: field 'response' is null, not text"),
        ("saved", [{"messages": []}], "train row 1: messages must be a list of at least one message"),
        ("jsonl", [{"messages": [{"role": "x", "content": "y"}]}], "train row 1: a message's role must be one of"),
        ("saved", records(pairs(1) * 3), "train: too few different prompts to hold some out"),
        ("saved", [{"prompt": "a" * 300, "response": "b"}, *records(pairs(9))], "row 1: the prompt has 300 tokens"),
        ("saved", [{"prompt": "", "response": "b"}, *records(pairs(9))], "row 1: the prompt is empty"),
    ],
)
def test_a_malformed_row_is_named_by_its_place(tmp_path, kind, some, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "data", kind, some))


@pytest.mark.parametrize(
    "name, message",
    [
        ("hf:", "takes a dataset's name on the Hub, or a local folder"),
        ("hf:s3://bucket/x", "takes a dataset's name on the Hub, or a local folder"),
        ("hf:no/such", "hf:no/such: cannot be loaded: .*no/such"),
        ("hf:empty", "hf:empty: cannot be loaded: .*doesn't contain any data files"),
        ("hf:broken", "hf:broken: cannot be loaded: JSON parse error"),
        ("hf:script", "hf:script: cannot be loaded: .*scripts are no longer supported"),
        ("hf:pickled", "hf:pickled: cannot be loaded: "),
        ("hf:saved,split=train", "hf:saved: has no split 'train'; it is a single split, which needs no name"),
        ("hf:splits", "hf:splits: has no split 'train'; there are a, b"),
    ],
)
def test_what_cannot_be_loaded_is_a_line_and_runs_no_code(in_folder, name, message):
    for folder in ("empty", "broken", "script", "pickled"):
        (in_folder / folder).mkdir()
    (in_folder / "broken/a.jsonl").write_text("{broken\n")
    (in_folder / "script/script.py").write_text("open('RAN', 'w')\n")
    (in_folder / "pickled/data.pkl").write_bytes(b"cos\nsystem\n(S'touch RAN'\ntR.")
    some = datasets.Dataset.from_list(records(pairs(3)))
    some.save_to_disk("saved")
    datasets.DatasetDict(a=some, b=some).save_to_disk("splits")
    with pytest.raises(UserError, match=message) as raised:
        load(name)
    assert "\n" not in str(raised.value) and not (in_folder / "RAN").exists()


def test_text_that_is_not_utf8_is_told_with_its_rows(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe"])
    column = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"prompt": column, "response": ["a", "b"]}), tmp_path / "data/data.parquet")
    with pytest.raises(UserError, match="train: rows 1 to 2 cannot be read: .*utf-8"):
        load(f"hf:{tmp_path / 'data'}")


def test_a_damaged_table_is_refused_before_it_is_read(tmp_path):
    """Its offsets point out of the file, which would crash the process."""
    name = write(tmp_path / "data", "saved", [{"prompt": "abc", "response": "de"}, {"prompt": "fgh", "response": "ij"}])
    (file,) = (tmp_path / "data").glob("*.arrow")
    offsets = [np.array([0, 3, end], dtype="<i4").tobytes() for end in (6, 1 << 30)]
    assert file.read_bytes().count(offsets[0]) == 1
    file.write_bytes(file.read_bytes().replace(*offsets))
    with pytest.raises(UserError, match="hf:.*: cannot be loaded: .*offset"):
        load(name)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
def test_a_torn_folder_is_told_in_a_line(tmp_path, file):
    name = write(tmp_path / "data", "saved", records(pairs(5)))
    (tmp_path / "data" / file).write_text('{"splits": ["x"]}')
    with pytest.raises(UserError, match="hf:.*: cannot be loaded: (KeyError|AttributeError): "):
        load(name)


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets library: pip install 'hrm-lm\[hub\]'"):
        load("hf:some/name")


def test_a_name_of_the_hub_is_no_code():
    assert not is_function("hf:name") and not is_function("hf:some/name,split=test")
