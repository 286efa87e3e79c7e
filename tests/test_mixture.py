"""Datasets without end (reasoning-gym's) and mixtures of several."""

import json
import multiprocessing
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import assert_resumes_exactly, batches_of, eval_options, small_config, sums, train_locally, write_prepared

from hrm_lm.config import load_config
from hrm_lm.data.collate import pad, pad_batch
from hrm_lm.data.loading import prefetch, train_batches
from hrm_lm.data.mixture import BLOCK, Mixture
from hrm_lm.data.reasoning_gym import ReasoningGymTask
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.splits import Limits, Sample, Samples
from hrm_lm.data.tokenizer import ByteTokenizer, SimpleTokenizer, resolve_tokenizer, same_tokens
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import generate
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.validation import validate

SUMS = "reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"
GYM = {"data__dataset": SUMS, "data__val_samples": 20, "model__max_response_len": 6}


def load(**overrides):
    config = load_config(overrides={key.replace("__", "."): value for key, value in overrides.items()})
    return load_dataset(config.data, config.model, config.train.seed)


def prompts(splits, config, steps, first=0):
    """Of each training batch, its prompts as text."""
    batches = islice(batches_of(splits, config, first), steps)
    return [[splits.tokenizer.decode(row) for row in batch.encoder_ids.tolist()] for (batch,) in batches]


# --- reasoning-gym -----------------------------------------------------------------------------------------------


def test_validation_is_the_same_for_every_seed_and_training_another_for_each():
    one, two = (load(**GYM, train__seed=seed) for seed in (0, 1))
    assert one.val.pairs == two.val.pairs and len(one.val) <= 20
    seen = [prompts(splits, small_config(**GYM, train__seed=seed), 4) for seed, splits in enumerate((one, two))]
    assert seen[0] != seen[1]
    assert seen[0][2:] == prompts(load(**GYM), small_config(**GYM), 2, first=2), (
        "a batch depends on seed and number alone"
    )


def test_no_validation_question_is_trained_on_nor_one_too_long_for_the_model():
    splits = load(data__dataset="reasoning_gym:coin_flip", data__val_samples=100)
    longest = int(np.median([len(splits.train[i].prompt) for i in range(100)]))
    short = splits.train.fitted(Limits(longest, 128), truncate=False)
    trained_on = [short[i].prompt for i in range(100)]
    assert max(map(len, trained_on)) == longest
    assert splits.val.prompts().isdisjoint(map(tuple, trained_on))


def test_the_tasks_own_verifier_scores_greedy_answers(tmp_path):
    config = small_config(**GYM)
    session = train_locally(config, tmp_path)
    model, tokenizer, checkpoint = load_model(tmp_path / "step_000012")
    splits = load_dataset(config.data, config.model, 0)
    answers = generate(model, tokenizer, [tokenizer.decode(sample.prompt) for sample in splits.val])
    scores = [splits.val.verdict(i, answer) for i, answer in enumerate(answers)]
    assert session.reports[-1]["val_score"] == pytest.approx(np.mean(scores))
    right = [tokenizer.decode(sample.response) for sample in splits.val]
    assert [splits.val.verdict(i, answer) for i, answer in enumerate(right)] == [1.0] * len(right)


@pytest.mark.parametrize(
    "name, message",
    [
        ("chainsum", "no such task; did you mean chain_sum"),
        ("chain_sum,terms=2", "has no option 'terms'; it has allow_negation, max_digits"),
        ("chain_sum,seed=2", "has no option 'seed'"),
        ("chain_sum,min_terms=5,max_terms=2", "max_terms must be >= min_terms"),
        ("chain_sum,min_terms=two", "chain_sum: "),
        ("chain_sum,min_terms=[2", "is not valid YAML"),
        ("bf,difficulty=0.5", "bf: makes no question of these options: cannot access local variable"),
        ("figlet_font,static_font=0", "figlet_font: makes no question of these options: FontNotFound"),
        ("rearc,board_format_opts=0", "rearc: .*'int' object has no attribute 'alphabet'"),
        ("word_ladder", "set PYTHONHASHSEED=0"),
        ("list_functions", "its questions are others every time"),
        ("boxnet", "no answers to learn from"),
        ("arc_agi", r"the prompt has \d+ tokens, more than model.max_prompt_len \(512\)"),
        ("tower_of_hanoi,min_disks=3,max_disks=3,min_pegs=3,max_pegs=3", "1,000 questions in a row are held out"),
    ],
)
def test_what_is_wrong_with_a_task_is_told_before_training(name, message):
    with pytest.raises(UserError, match=message):
        load(data__dataset=f"reasoning_gym:{name}")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'hrm-lm\[reasoning\]'"):
        load(**GYM)


# --- mixtures ----------------------------------------------------------------------------------------------------


def test_every_block_holds_the_parts_by_weight_and_each_part_runs_through_its_own_epochs():
    members = {str(n): Samples([Sample([5], [6])] * n, ByteTokenizer()) for n in (100, 3000, 7)}
    mixture = Mixture(members, weights=[3, 1, 1e-9])
    assert mixture.counts.tolist() == [3071, 1024, 1]
    row = mixture.order(0, 2 * BLOCK, seed=5)
    for block in np.split(row, 2):
        assert np.histogram(block, mixture.starts)[0].tolist() == [3071, 1024, 1]
    first = row[row < 100]
    times = np.bincount(first)
    assert times.min() >= times.max() - 1, "epochs of 100: each sample as often as any other"
    assert (mixture.order(1000, 5000, seed=5) == row[1000:5000]).all()
    assert (mixture.order(0, 50, seed=6) != row[:50]).any()
    early = np.histogram(row[:400], mixture.starts)[0]
    assert 260 < early[0] < 340, "mixed, not one part after another"


@pytest.fixture
def mixed(tmp_path):
    """A file of four questions, the synthetic dataset, a task and a prepared dataset, as options of a mixture."""
    lines = [{"q": f"Say {word}", "response": word.upper()} for word in ("één", "zwei", "trois", "four")]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "data__dataset": None,
        "data__mixture": {
            "words": {"dataset": str(tmp_path / "words.jsonl"), "prompt_field": "q", "weight": 0.5},
            "addition": {"dataset": "synthetic", "weight": 2},
            "gym": {"dataset": SUMS},
            "ready": {"dataset": str(write_prepared(tmp_path / "ready", sums(20), tokenizer=ByteTokenizer()))},
        },
        "data__val_samples": 10,
        "model__max_response_len": 6,
    }


def test_a_mixture_is_validated_by_dataset_and_over_all_samples(tmp_path, mixed):
    config = small_config(**mixed)
    metrics = train_locally(config, tmp_path / "run").reports[-1]
    splits = load_dataset(config.data, config.model, 0)
    model, *_ = load_model(tmp_path / "run" / "step_000012")
    labelled = []
    for name, member in splits.members.items():
        alone = validate(model, member, eval_options(8))
        assert metrics[f"val_loss/{name}"] == pytest.approx(alone["val_loss"], rel=1e-5)
        assert metrics[f"val_exact_match/{name}"] == alone["val_exact_match"]
        labelled.append(sum(len(sample.response) + 1 for sample in member.val))
    by_member = [metrics[f"val_loss/{name}"] for name in splits.members]
    assert metrics["val_loss"] == pytest.approx(np.average(by_member, weights=labelled), rel=1e-5)
    assert metrics["val_score"] == metrics["val_score/gym"] and "val_score/words" not in metrics
    words = splits.members["words"]
    assert "één" in {splits.tokenizer.decode(s.response).lower() for split in (words.train, words.val) for s in split}


@pytest.mark.parametrize(
    "options", [{}, {"train__length_window": 24, "train__batch_tokens": 640}], ids=["size", "tokens"]
)
def test_a_mixture_resumes_bit_for_bit(tmp_path, mixed, options):
    config = small_config(**mixed, **options, model__max_prompt_len=100, train__val_every=4)
    straight = assert_resumes_exactly(config, tmp_path, 4)
    assert "val_score" in straight.reports[0]


def test_workers_share_out_the_batches_of_a_mixture(mixed):
    config = small_config(**mixed)
    splits = load_dataset(config.data, config.model, 0)
    alone = prompts(splits, config, 6)
    shares = [islice(batches_of(splits, config, 0, rank, 2), 6) for rank in range(2)]
    for whole, (left,), (right,) in zip(alone, *shares):
        rows = left.encoder_ids.tolist() + right.encoder_ids.tolist()
        assert [splits.tokenizer.decode(row) for row in rows] == whole


def test_what_one_part_holds_out_is_trained_on_in_none(tmp_path):
    for name, words in (("a", range(40)), ("b", range(20, 60))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(f'{{"prompt": "p{i}", "response": "r"}}' for i in words))
    gym = "reasoning_gym:chain_sum,min_digits=1,max_digits=1,min_terms=2,max_terms="
    parts = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl"), "two": f"{gym}2", "three": f"{gym}3"}
    mixture = {name: {"dataset": dataset} for name, dataset in parts.items()}
    splits = load(data__mixture=mixture, data__val_fraction=0.3, data__val_samples=100)
    trained_on = [tuple(splits.train[int(i)].prompt) for i in splits.train.order(0, 1000, seed=0)]
    assert splits.val.prompts().isdisjoint(trained_on)


FUNCTIONS = """
from hrm_lm.data.registry import Splits
from hrm_lm.data.tokenizer import ByteTokenizer

def pairs(start, stop):
    return tuple((f"p{i}", "r") for i in range(start, stop))

def tuples(config, seed):
    return Splits(pairs(0, 30), pairs(30, 40), ByteTokenizer())

def generators(config, seed):
    return Splits(iter(pairs(20, 50)), iter(pairs(5, 10)), ByteTokenizer())
"""


def test_a_mixture_trains_on_no_held_out_prompt_whatever_a_function_returns(tmp_path, monkeypatch):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    splits = load(data__mixture={name: {"dataset": f"functions:{name}"} for name in ("tuples", "generators")})
    trained_on = {splits.tokenizer.decode(splits.train[i].prompt) for i in range(len(splits.train))}
    assert trained_on == {f"p{i}" for i in (*range(5), *range(10, 30), *range(40, 50))}


def test_a_batch_of_a_mixture_is_that_of_its_samples_one_by_one(mixed):
    splits = load(**mixed)
    indices = splits.train.order(0, 64, seed=3)
    together, one_by_one = splits.train.ragged(indices), [splits.train[int(i)] for i in indices]
    for a, b in zip(pad(together, splits.tokenizer), pad_batch(one_by_one, splits.tokenizer), strict=True):
        assert a.equal(b)


def test_the_order_in_which_a_mixture_is_written_changes_nothing(mixed):
    parts = mixed["data__mixture"]
    turned = mixed | {"data__mixture": dict(reversed(parts.items()))}
    one, other = (prompts(load(**options), small_config(**options), 2) for options in (mixed, turned))
    assert one == other


def test_what_a_model_writes_is_not_run_as_code(tmp_path):
    task = ReasoningGymTask("countdown")
    entry = task.entry(0, 0)
    numbers = entry["metadata"]["numbers"]
    assert task.score(entry["metadata"]["expression"], entry) == 1.0
    assert 0 < task.score("+".join(map(str, numbers)), entry) < 1, "the verifier has its own view of what is not right"
    file = tmp_path / "written"
    for answer in (f"__import__('pathlib').Path({str(file)!r}).touch()", "9**9**9**9", "9 * * 9", "9999999!"):
        assert task.score(answer, entry) == 0.0
    assert not file.exists()


def test_a_prepared_dataset_gives_a_mixture_its_tokenizer(tmp_path):
    tokenizer = SimpleTokenizer("What is+?=0123456789 ")
    ready = {
        "ready": {
            "dataset": str(write_prepared(tmp_path / "d", [("1=", "1"), ("2=", "2"), ("3=", "3")], tokenizer=tokenizer))
        }
    }
    addition = {"addition": {"dataset": "synthetic"}}
    splits = load(data__mixture=addition | ready)
    assert splits.tokenizer.to_json() == tokenizer.to_json()
    assert {tokenizer.decode(splits.train[i].prompt)[-1] for i in (0, len(splits.train) - 1)} == {"?", "="}
    with pytest.raises(UserError, match=r"/d has a tokenizer of its own, not data.tokenizer \(bytes\)"):
        load(data__mixture=addition | ready, data__tokenizer="bytes")


def test_a_named_tokenizer_reads_any_text_dataset(tmp_path):
    (tmp_path / "tokenizer.json").write_text(SimpleTokenizer("What is+?0123456789 xyz").to_json())
    for name in ("bytes", str(tmp_path / "tokenizer.json")):
        splits = load(data__dataset="synthetic", data__tokenizer=name)
        assert splits.tokenizer.decode(splits.train[0].prompt).startswith("What is")
        assert same_tokens(splits.tokenizer, resolve_tokenizer(name))
    with pytest.raises(UserError, match="data.tokenizer: .*nothing.json cannot be read: No such file"):
        load(data__dataset="synthetic", data__tokenizer=str(tmp_path / "nothing.json"))


def test_batches_are_the_same_from_loader_processes_and_those_end_with_the_iterator(mixed):
    config = small_config(**mixed, train__loader_workers=2, train__grad_accum_steps=2)
    splits = load_dataset(config.data, config.model, 0)
    before = multiprocessing.active_children()
    made = prefetch(batches_of(splits, config, 3), torch.device("cpu"))
    alone = batches_of(splits, small_config(**mixed, train__grad_accum_steps=2), 3)
    for one, other in zip(islice(made, 6), alone):
        assert len(one) == 2
        assert all(torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y))
    assert len(multiprocessing.active_children()) == len(before) + 2
    made.close()
    assert multiprocessing.active_children() == before


class Unreadable(Samples):
    def __getitem__(self, i):
        if i:
            raise UserError("sample 7: half of it is missing")
        return super().__getitem__(i)


def test_a_mistake_found_by_a_loader_process_is_told_as_such():
    config = small_config(train__loader_workers=1)
    split = Unreadable([Sample([5], [6])] * 20, ByteTokenizer())
    with pytest.raises(UserError, match="^sample 7: half of it is missing$"):
        next(train_batches(split, ByteTokenizer(), pad, config.train))
