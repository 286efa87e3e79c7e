import json
import re
from itertools import islice

import numpy as np
import pytest

from hrm_lm.config import DataConfig, ModelConfig, SyntheticConfig, TrainConfig
from hrm_lm.data.collate import IGNORE, pad_batch
from hrm_lm.data.registry import Splits, load_dataset
from hrm_lm.data.sampler import global_batches, permuted, stream, worker_share
from hrm_lm.data.synthetic import build_synthetic_dataset
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError


def jsonl(path, *records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(n, **extra):
    return [{"prompt": f"p{i}", "response": f"r{i}", **extra} for i in range(n)]


def load(path, model=ModelConfig(), **fields):
    return load_dataset(DataConfig(dataset=str(path), **fields), model, seed=0)


# --- the batch ---------------------------------------------------------------------------------------------------


def test_pad_batch_makes_the_five_tensors_of_the_guide():
    batch = pad_batch([([5, 6, 7], [1, 8], [8, 2]), ([9], [1], [2])], pad_id=0)
    assert batch.encoder_ids.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch.encoder_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.decoder_input_ids.tolist() == [[1, 8], [1, 0]]
    assert batch.labels.tolist() == [[8, 2], [2, IGNORE]]
    assert batch.decoder_mask.tolist() == [[1, 1], [1, 0]]


# --- order -------------------------------------------------------------------------------------------------------


def batches(number, seed, first=0):
    return list(islice(global_batches(range(10), TrainConfig(batch_size=4, seed=seed), first), number))


def test_every_epoch_visits_each_sample_once_also_across_batch_borders():
    row = np.concatenate(batches(5, seed=3))
    assert sorted(row[:10]) == sorted(row[10:]) == list(range(10))
    assert row[:10].tolist() != row[10:].tolist()


def test_a_batch_depends_on_seed_and_number_alone():
    late = batches(1, seed=3, first=2000)[0].tolist()  # beyond what is looked up together
    assert late == batches(2001, seed=3)[-1].tolist() != batches(1, seed=4, first=2000)[0].tolist()


@pytest.mark.parametrize("num_samples", [1, 2, 10, 257, 4096])
def test_an_epoch_is_a_permutation_of_any_number_of_samples(num_samples):
    assert sorted(stream(num_samples, 2 * num_samples, range(num_samples), seed=5)) == list(range(num_samples))


def test_epochs_order_samples_evenly():
    """Of 5 samples, each of the 20 ordered pairs comes first about as often."""
    firsts = [tuple(permuted(np.arange(2), 5, seed, 0)) for seed in range(2000)]
    counts = [firsts.count(pair) for pair in set(firsts)]
    assert len(counts) == 20 and sum((count - 100) ** 2 / 100 for count in counts) < 44  # chi-square, p = 0.001


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
    questions = [[splits.tokenizer.decode(sample[0]) for sample in split] for split in splits[:2]]
    train, val = ({tuple(sorted(map(int, re.findall(r"\d+", q)))) for q in side} for side in questions)
    assert val and not train & val
    assert len(questions[0]) == len(set(questions[0]))


def test_answers_are_sums_and_digits_are_in_range():
    options = SyntheticConfig(min_digits=3, max_digits=6, num_samples=500)
    splits = build_synthetic_dataset(DataConfig(synthetic=options))
    for prompt, inputs, labels in splits.train:
        a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", splits.tokenizer.decode(prompt)).groups())
        assert 100 <= a <= 999_999 and 100 <= b <= 999_999
        assert splits.tokenizer.decode(labels) == str(a + b) and labels[-1] == splits.tokenizer.eos_id
        assert list(inputs) == [splits.tokenizer.bos_id, *labels[:-1]]


# --- jsonl -------------------------------------------------------------------------------------------------------


def test_a_jsonl_file_is_split_by_prompt_and_a_folder_brings_its_own_split(tmp_path):
    file = jsonl(tmp_path / "data.jsonl", *pairs(20), *pairs(20))
    splits = load(file, val_fraction=0.25)
    train, val = ({tuple(sample[0]) for sample in split} for split in splits[:2])
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


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken\n", r"d\.jsonl:3: not JSON"),
        ('{"prompt": "half \\ud83d", "response": "b"}\n', r"d\.jsonl:3: 'prompt' has half a character"),
        ('{"prompt": "a"}\n', r"d\.jsonl:3: no field 'response'; it has 'prompt'"),
        ('{"prompt": 5, "response": "b"}\n', r"d\.jsonl:3: 'prompt' must be text, not int"),
        ("[1]\n", r"d\.jsonl:3: no field 'prompt'; it is not an object"),
        ('{"prompt": "", "response": "b"}\n', r"d\.jsonl:3: the prompt is empty"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    file = jsonl(tmp_path / "d.jsonl", *pairs(2), line, *pairs(4))
    with pytest.raises(UserError, match=message):
        load(file)


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
    assert max(len(p) for p, _, _ in splits.train + splits.val) == 8
    assert max(len(l) for _, _, l in splits.train + splits.val) == 4


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
    assert isinstance(splits, Splits) and splits.tokenizer.decode(splits.val[0][2]) == "AA"


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
