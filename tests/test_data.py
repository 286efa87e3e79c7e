import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from hrm_lm.config import DataConfig, ModelConfig, SyntheticConfig, TrainConfig
from hrm_lm.data.collate import IGNORE, pad_batch
from hrm_lm.data.order import epochs, permuted
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import global_batches, worker_share
from hrm_lm.data.splits import Limits, Ragged, Sample, Samples, Splits
from hrm_lm.data.synthetic import build_synthetic_dataset
from hrm_lm.data.text import TextSplit, text_splits
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError


def jsonl(path, *records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(n, **extra):
    return [{"prompt": f"p{i}", "response": f"r{i}", **extra} for i in range(n)]


TOKENIZER = SimpleTokenizer("abcdefgh")


def texts(splits, split):
    """The prompts and responses of a split, as texts."""
    decode = splits.tokenizer.decode
    return [(decode(sample.prompt), decode(sample.response)) for sample in split]


def load(path, model=ModelConfig(), **fields):
    return load_dataset(DataConfig(dataset=str(path), **fields), model, seed=0)


# --- the batch ---------------------------------------------------------------------------------------------------


def test_pad_batch_makes_the_five_tensors_of_the_guide():
    batch = pad_batch([Sample([5, 6, 7], [8]), Sample([9], [])], TOKENIZER)
    assert batch.encoder_ids.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch.encoder_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.decoder_input_ids.tolist() == [[1, 8], [1, 0]]
    assert batch.labels.tolist() == [[8, 2], [2, IGNORE]]
    assert batch.decoder_mask.tolist() == [[1, 1], [1, 0]]


def test_a_cut_response_has_no_end_in_a_batch():
    batch = pad_batch([Sample([5], [8, 9], ends=False), Sample([5], [8, 9])], TOKENIZER)
    assert batch.labels.tolist() == [[8, 9, IGNORE], [8, 9, 2]]
    assert batch.decoder_input_ids.tolist() == [[1, 8, 0], [1, 8, 9]]


def test_samples_taken_in_another_order_are_the_same_samples():
    samples = [Sample([5, 6, 7], [8]), Sample([9], []), Sample([4], [4, 5, 6], ends=False)]
    taken = Ragged.of(samples).take(np.array([2, 0, 1]))
    for a, b in zip(taken, Ragged.of([samples[2], samples[0], samples[1]]), strict=True):
        assert a.tolist() == b.tolist()


# --- what a data set's function may return -----------------------------------------------------------------------

PAIRS = [("ab", "ba"), ("cd", "dc"), ("e", "")]
IDS = [(TOKENIZER.encode(prompt), TOKENIZER.encode(response)) for prompt, response in PAIRS]
TRIPLES = [(prompt, [1, *response], [*response, 2]) for prompt, response in IDS]


class Rows:
    """A data set of the `datasets` library, as far as it is used: a length, and rows that are dicts."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        prompt, response = self.pairs[i]
        return {"prompt": prompt, "response": response, "id": i}


@pytest.mark.parametrize(
    "train",
    [
        PAIRS,
        tuple(PAIRS),
        np.array(PAIRS),
        Rows(PAIRS),
        IDS,
        [(np.array(p), np.array(r, dtype=int)) for p, r in IDS],
        TRIPLES,
        [Sample(*pair) for pair in IDS],
        [{"prompt": prompt, "response": response} for prompt, response in PAIRS],
    ],
    ids=["list", "tuple", "array", "datasets", "ids", "arrays", "triples", "samples", "dicts"],
)
def test_whatever_holds_samples_is_a_split(train):
    for given in (train, (train[i] for i in range(3))):
        splits = Splits(given, PAIRS[:1], TOKENIZER)
        assert len(splits.train) == 3 and texts(splits, (splits.train[i] for i in range(3))) == PAIRS
        assert splits.train.lengths(np.array([1, 2])).tolist() == [[2, 3], [1, 1]]
        batch = pad_batch([splits.train[i] for i in range(3)], TOKENIZER)
        assert batch.labels.tolist() == pad_batch([Sample(*pair) for pair in IDS], TOKENIZER).labels.tolist()


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"prompt": "a"}, "train sample 2: a sample needs the field 'response'; it has 'prompt'"),
        (("a", "b", "c", "d"), "train sample 2: a sample is a prompt and a response, or the triple"),
        (5, "train sample 2: a sample is a prompt and a response"),
        ("ab", "train sample 2: a sample is a prompt and a response"),
        (("a", None), "train sample 2: a prompt or response is a text or token ids, not 'None'"),
        (([5.7], [4]), "train sample 2: a prompt or response is a text or token ids"),
        (([5], [99]), "train sample 2: token id 99 is not in the tokenizer's vocabulary of 12"),
        (([5], [1], []), "train sample 2: decoder_input_ids must be BOS"),
        (([4], [4, 5], [5, 2]), r"train sample 2: decoder_input_ids must be BOS \(1\) and the labels less the last"),
    ],
)
def test_what_is_no_sample_is_named_by_its_place(sample, message):
    with pytest.raises(UserError, match=message):
        Splits([PAIRS[0], sample], PAIRS[:1], TOKENIZER)


def test_samples_without_an_order_are_refused_as_every_process_would_have_its_own():
    for samples in ({("a", "b"), ("c", "d")}, {"a": "b"}):
        with pytest.raises(UserError, match="train sample 1: samples need an order"):
            Splits(samples, PAIRS[:1], TOKENIZER)


def test_a_split_of_ones_own_gets_the_verdict_and_the_places_that_come_with_it():
    val = TextSplit(PAIRS, TOKENIZER)
    splits = Splits(PAIRS, val, TOKENIZER, place=lambda split, i: f"{split}.txt:{i}", score=lambda i, answer: 0.5)
    assert splits.val.verdict(0, "x") == 0.5 and splits.val.place(2) == "val.txt:2"


class Backwards(Samples):
    def order(self, start, stop, seed):
        return np.arange(stop, start, -1) % len(self)


def test_a_split_keeps_its_own_order_when_it_is_cut():
    cut = Backwards([Sample([5, 6, 7], [8])] * 5, TOKENIZER).fitted(Limits(2, 2), truncate=True)
    assert cut.order(0, 4, 0).tolist() == [4, 3, 2, 1] and cut[0].prompt == [5, 6]


def test_what_text_splits_cannot_read_is_named_by_its_place():
    config = DataConfig()
    (train,) = (text_splits(config, [{"prompt": "ab", "response": "c"}], PAIRS, lambda: TOKENIZER).train,)
    assert train.pairs == [("ab", "c")]
    for pair in (("a", 5), "ab", ("a", "b", "c")):
        with pytest.raises(UserError, match="val sample 1: needs two texts"):
            text_splits(config, PAIRS, [pair], lambda: TOKENIZER)
    with pytest.raises(UserError, match="train sample 1: has half a character"):
        text_splits(config, [("half \ud83d", "b")], PAIRS, lambda: TOKENIZER)


def test_prompts_that_are_alike_once_they_are_cut_are_not_trained_on(tmp_path):
    file = jsonl(
        tmp_path / "d.jsonl", *({"prompt": "x" * 30 + f"q{i}", "response": "y"} for i in range(20)), *pairs(20)
    )
    splits = load(file, ModelConfig(max_prompt_len=30), truncate=True, val_fraction=0.5)
    assert splits.val.prompts().isdisjoint(splits.train.prompts()) and len(splits.train)


def test_a_sample_without_any_label_is_refused():
    with pytest.raises(UserError, match="sample 2: the response is empty, and does not end either"):
        Samples([Sample([5], []), Sample([5], [], ends=False)], TOKENIZER).fitted(Limits(9, 9), truncate=False)


FOREIGN = """
from hrm_lm.data.registry import Splits
from hrm_lm.data.tokenizer import ByteTokenizer

class Mine(ByteTokenizer):
    def to_json(self):
        return "{}"

number = 5

def without_arguments():
    raise AssertionError("it was called")

def build(config, seed):
    return Splits([("a", "b")], [("c", "d")], Mine())
"""


@pytest.mark.parametrize(
    "name, message",
    [
        ("foreign:build", "has a tokenizer that no checkpoint could bring back"),
        ("foreign:number", "is int, not a function"),
        ("foreign:without_arguments", r"must be a function \(config, seed\): too many positional arguments"),
        ("..:x", "is not module:function"),
    ],
)
def test_what_is_wrong_with_a_function_is_told_in_a_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        load(name)


def test_a_driver_that_checks_a_large_text_data_set_does_not_tokenize_it(monkeypatch):
    pairs = [(f"{i:030d}", "x" * 20) for i in range(30_000)] + [("\xe9" * 60, "x"), ("0" * 70, "x")]
    tokenizer, tokenized = SimpleTokenizer("0123456789x\xe9"), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: tokenized.append(text) or encode(text))
    split = TextSplit(pairs, tokenizer)
    with pytest.raises(UserError, match="sample 30002: the prompt has 70 tokens, more than model.max_prompt_len"):
        split.fitted(Limits(64, 32), truncate=False)
    assert [len(text) for text in tokenized] == [60, 1, 70, 1]
    assert len(split.fitted(Limits(128, 32), truncate=False)) == 30_002 and len(tokenized) == 4


def test_validation_reads_at_most_so_many_samples_spread_over_all(tmp_path):
    file = jsonl(tmp_path / "d.jsonl", *pairs(1000))
    whole, capped = (load(file, val_fraction=0.5, max_val_samples=most) for most in (None, 10))
    assert (len(whole.val), len(capped.val), len(capped.train)) == (500, 10, 500)
    assert texts(capped, capped.val) == texts(whole, whole.val)[::50]
    assert capped.val.prompts() == whole.val.prompts(), "all stay held out"


# --- order -------------------------------------------------------------------------------------------------------


def batches(number, seed, first=0, num_samples=10):
    split = Samples([Sample([5], [6])] * num_samples, TOKENIZER)
    return list(islice(global_batches(split, TrainConfig(batch_size=4, seed=seed), first), number))


def test_every_epoch_visits_each_sample_once_also_across_batch_borders():
    row = np.concatenate(batches(5, seed=3))
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10))
    assert row[:10].tolist() != row[10:].tolist()


def test_a_batch_depends_on_seed_and_number_alone():
    *_, last = batches(2001, seed=3, num_samples=1000)  # beyond what is looked up together
    (late,), (other,) = (batches(1, seed, first=2000, num_samples=1000) for seed in (3, 4))
    assert late.tolist() == last.tolist() != other.tolist()


@pytest.mark.parametrize("num_samples", [1, 2, 10, 257, 4096])
def test_an_epoch_is_a_permutation_of_any_number_of_samples(num_samples):
    assert sorted(epochs(num_samples, 2 * num_samples, num_samples, seed=5)) == list(range(num_samples))


def test_epochs_order_samples_evenly():
    """Of 5 samples, each of the 20 ordered pairs comes first about as often."""
    firsts = [tuple(permuted(np.arange(2), 5, seed, 0)) for seed in range(600)]
    counts = [firsts.count(pair) for pair in set(firsts)]
    assert len(counts) == 20 and sum((count - 30) ** 2 / 30 for count in counts) < 44  # chi-square, p = 0.001


@pytest.mark.parametrize("world_size, accum", [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_workers_share_a_batch_without_loss_or_overlap(world_size, accum):
    batch = np.arange(100, 108)
    shares = [worker_share(batch, rank, world_size, accum) for rank in range(world_size)]
    assert sorted(np.concatenate([micro for share in shares for micro in share])) == sorted(batch)
    assert [[len(micro) for micro in share] for share in shares] == [[8 // world_size // accum] * accum] * world_size


# --- synthetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [20_000, 300])
def test_validation_sums_are_not_in_training_not_even_swapped(num_samples):
    splits = build_synthetic_dataset(DataConfig(synthetic=SyntheticConfig(num_samples=num_samples)))
    questions = [[prompt for prompt, _ in texts(splits, split)] for split in (splits.train, splits.val)]
    train, val = ({tuple(sorted(map(int, re.findall(r"\d+", q)))) for q in side} for side in questions)
    assert val and not train & val
    assert len(questions[0]) == len(set(questions[0]))


def test_answers_are_sums_and_digits_are_in_range():
    options = SyntheticConfig(min_digits=3, max_digits=6, num_samples=500)
    splits = build_synthetic_dataset(DataConfig(synthetic=options))
    for prompt, response in texts(splits, splits.train):
        a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", prompt).groups())
        assert 100 <= a <= 999_999 and 100 <= b <= 999_999
        assert response == str(a + b)


# --- jsonl -------------------------------------------------------------------------------------------------------


def test_a_jsonl_file_is_split_by_prompt_and_a_folder_brings_its_own_split(tmp_path):
    file = jsonl(tmp_path / "data.jsonl", *pairs(20), *pairs(20))
    splits = load(file, val_fraction=0.25)
    train, val = splits.train.prompts(), splits.val.prompts()
    assert len(splits.train) == 30 and len(splits.val) == 10 and not train & val

    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train.jsonl", *pairs(5))
    jsonl(folder / "val.jsonl", *pairs(3))
    splits = load(folder)
    assert (len(splits.train), len(splits.val)) == (5, 3)


def test_field_names_are_configurable(tmp_path):
    file = jsonl(tmp_path / "d.jsonl", *({"q": f"p{i}", "a": "x"} for i in range(5)))
    assert len(load(file, prompt_field="q", response_field="a").train) == 4
    file = jsonl(tmp_path / "e.jsonl", *({"data": {"q": f"p{i}", "c": i}, "a": ["x"]} for i in range(5)))
    splits = load(file, prompt_field="{data.q} of {data.c}", response_field="a.0")
    assert sorted(texts(splits, [*splits.train, *splits.val])) == [(f"p{i} of {i}", "x") for i in range(5)]
    with pytest.raises(UserError, match="data.prompt_field '{q': not a template"):
        load(file, prompt_field="{q")


def turns(i, **extra):
    contents = (f"p{i}", f"r{i}", f"q{i}", f"s{i}")
    return {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, contents)], **extra}


@pytest.mark.parametrize("named", [False, True])
def test_conversations_and_pairs_may_stand_in_one_file_and_a_conversation_is_held_out_as_a_whole(tmp_path, named):
    """Without a tokenizer the vocabulary has the characters that the chat's form needs."""
    file = jsonl(tmp_path / "d.jsonl", *pairs(20), *(turns(i, id=i) for i in range(20, 40)))
    splits = load(file, val_fraction=0.5, **({"tokenizer": "bytes"} if named else {}))
    expected = [pair for i in range(40) for pair in samples_of(i)]
    train, val = texts(splits, splits.train), texts(splits, splits.val)
    assert sorted(train + val) == sorted(expected)
    for i in range(40):
        assert sum(pair in val for pair in samples_of(i)) in (0, len(samples_of(i)))


def samples_of(i):
    first = (f"p{i}", f"r{i}")
    return [first] if i < 20 else [first, (f"user: p{i}\nassistant: r{i}\nuser: q{i}\nassistant:", f"s{i}")]


def test_a_conversation_may_have_any_field_and_its_form_is_the_tokenizers(tmp_path):
    template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}[a]"
    definition = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    characters = {c: i for i, c in enumerate("[]uaprqs 0123456789")}
    definition["model"]["vocab"] = characters | {"</s>": len(characters)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "chat_template.jinja").write_text(template)
    records = [{"talk": {"turns": turns(i)["messages"]}, "messages": "not these"} for i in range(9)]
    file = jsonl(tmp_path / "d.jsonl", *records)
    splits = load(file, prompt_field="talk.turns", tokenizer=str(tmp_path), val_fraction=0.2)
    found = [(p.replace(" ", ""), r.replace(" ", "")) for p, r in texts(splits, [*splits.train, *splits.val])]
    assert sorted(found) == sorted(
        pair for i in range(9) for pair in [(f"[u]p{i}[a]", f"r{i}"), (f"[u]p{i}[a]r{i}[u]q{i}[a]", f"s{i}")]
    )
    assert splits.tokenizer.chat_template == template


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken\n", r"d\.jsonl:3: not JSON"),
        ('{"prompt": "half \\ud83d", "response": "b"}\n', r"d\.jsonl:3: not Unicode text, but half a character"),
        ('{"prompt": "a"}\n', r"d\.jsonl:3: no field 'response'; it has 'prompt'"),
        ('{"prompt": 5, "response": "b"}\n', r"d\.jsonl:3: field 'prompt' is int, not text$"),
        ("[1]\n", r"d\.jsonl:3: no field 'prompt'; it is not an object"),
        ('{"prompt": "", "response": "b"}\n', r"d\.jsonl:3: the prompt is empty"),
        (f'{{"prompt": "a", "response": "b", "n": {"9" * 5000}}}\n', r"d\.jsonl:3: not JSON: Exceeds the limit"),
        ("[" * 10**6 + "\n", r"d\.jsonl:3: not JSON: nested too deeply"),
        ('{"messages": []}\n', r"d\.jsonl:3: messages must be a list of at least one message$"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', r"d\.jsonl:3: the messages have no assistant's answer"),
        ('{"prompt": [{"role": "bot", "content": "x"}]}\n', r"d\.jsonl:3: a message's role .*: it is 'bot'$"),
    ],
    ids=lambda text: text[:40],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    file = jsonl(tmp_path / "d.jsonl", *pairs(2), line, *pairs(4))
    with pytest.raises(UserError, match=message):
        load(file)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    file = jsonl(tmp_path / "d.jsonl", *pairs(4))
    Path(file).write_bytes(b"\xef\xbb\xbf" + Path(file).read_bytes())
    assert len(load(file).train) == 3


def test_a_device_is_no_dataset(tmp_path):
    (tmp_path / "train.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="train.jsonl: not a file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text, message", [("", "has no records"), (None, "cannot be read: No such file"), ("\xff", "not UTF-8")]
)
def test_an_unusable_file_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "d.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "d.jsonl")


def test_a_record_too_long_is_named_or_cut_when_asked(tmp_path):
    file = jsonl(tmp_path / "d.jsonl", *pairs(9), {"prompt": "p1" * 10, "response": "r1r1r1"})
    model = ModelConfig(max_prompt_len=8, max_response_len=4)
    with pytest.raises(UserError, match=r"d\.jsonl:10: the prompt has 20 tokens, more than model.max_prompt_len \(8\)"):
        load(file, model)
    splits = load(file, model, truncate=True)
    lengths = np.concatenate([split.lengths(np.arange(len(split))) for split in (splits.train, splits.val)])
    assert lengths.max(axis=0).tolist() == [8, 4]


# --- registry ----------------------------------------------------------------------------------------------------


def test_a_dataset_of_ones_own_is_a_function_named_on_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "from hrm_lm.data.registry import text_splits\n"
        "from hrm_lm.data.tokenizer import SimpleTokenizer\n"
        "def shout(config, seed):\n"
        "    pairs = [(w, w.upper()) for w in ('ab', 'ba', 'aa')]\n"
        "    return text_splits(config, pairs[:2], pairs[2:], lambda: SimpleTokenizer('abAB'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    splits = load("my_data:shout")
    assert texts(splits, splits.val) == [("aa", "AA")]


@pytest.mark.parametrize(
    "name, message",
    [("nope", "neither a known name"), ("no_such_module:f", "no module 'no_such_module'"), (None, "no dataset")],
)
def test_an_unknown_dataset_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        load_dataset(DataConfig(dataset=name), ModelConfig(), 0)


def test_an_empty_split_is_refused(monkeypatch, tmp_path):
    (tmp_path / "empty_data.py").write_text(
        "from hrm_lm.data.registry import Splits\nfrom hrm_lm.data.tokenizer import SimpleTokenizer\n"
        "def none(config, seed):\n    return Splits([], [], SimpleTokenizer('a'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no train samples"):
        load("empty_data:none")
