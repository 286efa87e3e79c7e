"""Batches by length and by token budget: which samples, how they are padded, resumes and worker counts; no Ray."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import assert_resumes_exactly, assert_same_weights, eval_options, small_config, train_locally

from hrm_lm.config import TrainConfig, load_config
from hrm_lm.data import sampler
from hrm_lm.data.collate import IGNORE, pack_apart, pad, pad_batch, padded_length
from hrm_lm.data.loading import train_batches, val_batches
from hrm_lm.data.registry import load_dataset
from hrm_lm.data.sampler import batch_rows, global_batches, row_lengths, token_share
from hrm_lm.data.splits import Ragged, Sample, Samples
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError
from hrm_lm.models.contract import LanguageModel, layout
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.step import Stats, build_state, train_step
from hrm_lm.training.validation import validate

BY_SIZE = TrainConfig(steps=10_000, batch_size=16, length_window=250)  # 240 samples, then
PACKED = TrainConfig(steps=10_000, batch_tokens=2048, length_window=250, packing=True)
BY_TOKENS = TrainConfig(steps=10_000, batch_tokens=2048, length_window=250)


def skewed(n, seed=0, longest=512):
    """Prompts and responses of 8 to `longest` tokens, both log-uniform and independent: the hardest case."""
    lengths = np.exp(np.random.default_rng(seed).uniform(np.log(8), np.log(longest), (n, 2))).astype(int)
    return Samples([Sample(np.full(p, 5), np.full(r - 1, 6)) for p, r in lengths], TOKENIZER)


TOKENIZER = SimpleTokenizer("x")
SAMPLES = skewed(1000)
DISTINCT = Samples([Sample(s.prompt, np.asarray(s.response) * 0 + 10 + i) for i, s in enumerate(SAMPLES)], TOKENIZER)


ONE_ROW, TWO_ROWS = (2048,), (1024, 1024)
PACKED_ROWS = pytest.mark.parametrize("rows", [ONE_ROW, TWO_ROWS])


def first_batches(config, number, first=0, samples=SAMPLES, rows=None):
    return [batch.tolist() for batch in islice(global_batches(samples, config, first, rows), number)]


def used_of(batches, rows):
    """(N, len(rows)): tokens of each batch in each row."""
    return np.array([row_lengths(SAMPLES.lengths(np.array(batch)), rows).sum(axis=0) for batch in batches])


def padding(batches):
    tokens = sum(int(b.encoder_mask.sum() + b.decoder_mask.sum()) for b in batches)
    return 1 - tokens / sum(b.encoder_mask.numel() + b.decoder_mask.numel() for b in batches)


@pytest.mark.parametrize(
    "config, window, rows",
    [(BY_SIZE, 240, None), (BY_TOKENS, 250, None), (PACKED, 250, ONE_ROW), (PACKED, 250, TWO_ROWS)],
)
def test_every_window_holds_each_of_its_samples_once(config, window, rows):
    row, windows = [], 0
    for batch in first_batches(config, 500, rows=rows):
        row += batch
        if len(row) >= (windows + 1) * window:
            there = range(windows * window, (windows + 1) * window)
            assert sorted(row[there.start :]) == sorted(SAMPLES.order(there.start, there.stop, config.seed))
            windows += 1
    assert windows > 5, "more than one epoch"


@pytest.mark.parametrize("config, rows", [(BY_SIZE, None), (BY_TOKENS, None), (PACKED, ONE_ROW), (PACKED, TWO_ROWS)])
def test_batch_k_is_the_same_from_wherever_one_starts(config, rows):
    straight = first_batches(config, 60, rows=rows)
    for first in (1, 17, 45):
        assert first_batches(config, 60 - first, first, rows=rows) == straight[first:]
    assert straight != first_batches(config.model_copy(update={"seed": 1}), 60, rows=rows)


def test_a_token_budget_is_kept_and_filled():
    batches = first_batches(BY_TOKENS, 400)
    used = []
    for batch in batches:
        lengths = padded_length(SAMPLES.lengths(np.array(batch)))
        used.append(len(batch) * int(lengths.max(axis=0).sum()))
    assert max(used) <= 2048
    assert np.median(used) > 0.8 * 2048  # windows of 250 samples cut coarsely


@PACKED_ROWS
def test_packed_rows_have_no_padding_but_for_the_last_sample_that_did_not_fit(rows):
    used = used_of(first_batches(PACKED, 400, rows=rows), rows)
    assert (used <= rows).all()
    assert np.median(used.sum(axis=1)) > 0.8 * 2048  # samples of up to 1,023 tokens


def test_two_rows_fill_up_alike_whatever_the_data():
    """Prompts of 40 tokens and responses of 8 on average, some of either long; the widths are measured."""
    lengths = np.random.default_rng(0).exponential((40, 8), (4000, 2)).astype(int) + 1
    split = Samples([Sample(np.full(p, 5), np.full(r, 6)) for p, r in lengths], TOKENIZER)
    fields = {"train.packing": True, "train.batch_tokens": 4096, "train.length_window": 1000}
    config = load_config(overrides=fields)
    step_rows, rows = batch_rows(split, config)
    assert sum(step_rows) == sum(rows) == 4096 and step_rows[0] == pytest.approx(4096 * 41 / 51, rel=0.03)
    used = np.array([split.lengths(np.array(b)).sum(axis=0) for b in first_batches(config.train, 200, 0, split, rows)])
    assert (used <= rows).all() and np.median(used.sum(axis=1)) > 0.95 * 4096
    shared = load_config(overrides=fields | {"train.grad_accum_steps": 4})
    assert batch_rows(split, shared)[0] == step_rows, "batches do not depend on how they are shared out"
    assert sum(batch_rows(split, shared)[1]) == shared.row_tokens == 1024 + 640


@PACKED_ROWS
@pytest.mark.parametrize("world_size, accum", [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_workers_share_out_packed_batches_by_tokens(world_size, accum, rows):
    for batch in first_batches(PACKED, 40, rows=rows):
        lengths = row_lengths(SAMPLES.lengths(np.array(batch)), rows)
        shares = [token_share(np.array(batch), lengths, rank, world_size, accum) for rank in range(world_size)]
        assert [len(share) for share in shares] == [accum] * world_size
        micro = [indices for share in shares for indices in share]
        assert sorted(np.concatenate(micro)) == sorted(batch)
        most = lengths.sum() / (world_size * accum) + lengths.sum(axis=1).max()
        assert used_of([m for m in micro if len(m)], rows).sum(axis=1).max() <= most


def test_shares_of_a_packed_batch_are_alike_to_a_few_tokens():
    """So a worker's row has next to no padding: it is as wide as its part of `train.batch_tokens`, and a little."""
    lengths = np.random.default_rng(0).lognormal(np.log(400), 0.8, 1000).astype(int)[:, None] + 1
    for shares in (2, 8):
        dealt = [token_share(np.arange(1000), lengths, rank, shares, 1)[0] for rank in range(shares)]
        tokens = [int(lengths[share].sum()) for share in dealt]
        assert max(tokens) - min(tokens) < 20
    config = load_config(
        overrides={"model.architecture": "prefix_lm", "train.packing": True, "train.length_window": 1000}
        | {"train.batch_tokens": 65_536, "ray.num_workers": 2}
    )
    assert config.row_tokens == 65_536 // 2 + (512 + 128) // 8


@PACKED_ROWS
def test_packed_workers_read_together_what_one_reads_alone(rows):
    def read(rank, world_size, accum, share):
        config = PACKED.model_copy(update={"grad_accum_steps": accum})
        collate = layout(LanguageModel(), share)
        steps = islice(train_batches(DISTINCT, TOKENIZER, collate, config, 3, rank, world_size, rows=rows), 12)
        return [[batch for batch in micro if (batch.labels != IGNORE).any()] for micro in steps]

    wider = (2048 // 4 + 1024,) if len(rows) == 1 else (1024 // 4 + 512,) * 2
    for alone, *shares in zip(read(0, 1, 1, rows), *(read(rank, 2, 2, wider) for rank in range(2))):
        labels = [
            torch.cat([batch.labels[batch.labels != IGNORE] for batch in micro]).tolist()
            for micro in (alone, [batch for share in shares for batch in share])
        ]
        assert sorted(labels[0]) == sorted(labels[1]) and len(labels[0]) > 500
        assert {batch.num_positions for share in shares for batch in share} == {sum(wider)}


@PACKED_ROWS
def test_packed_validation_reads_each_sample_once_in_rows_of_one_width(rows):
    collate = layout(LanguageModel(), rows)
    workers = [list(val_batches(SAMPLES, TOKENIZER, collate, 1, rank, 3, rows=rows)) for rank in range(3)]
    assert len({len(batches) for batches in workers}) == 1, "workers that share a model run together"
    batches = [batch for worker in workers for (batch,) in worker]
    assert {tuple(map(len, (b.ids if len(rows) == 1 else (b.encoder_ids[0], b.labels[0])))) for b in batches} == {rows}
    read = [n for batch in batches if (batch.labels != IGNORE).any() for n in batch.lengths.tolist()]
    assert sorted(read) == sorted(row_lengths(SAMPLES.lengths(np.arange(1000)), rows).sum(axis=1))


def test_rows_that_samples_do_not_fit_give_way_to_one_another():
    """So what a step takes of memory is bounded, whatever is long: two rows hold as much as a single row would."""
    for sizes, widths in [((30, 4), (32, 32)), ((4, 40), (24, 40)), ((60, 4), (60, 4)), ((40, 10), (40, 24))]:
        sample = Sample([5] * sizes[0], [6] * (sizes[1] - 1))
        batch = pack_apart(Ragged.of([sample]), TOKENIZER, rows=(32, 32))
        assert (batch.encoder_ids.shape[1], batch.labels.shape[1]) == widths
        assert batch.num_positions == 64 and int(batch.num_tokens) == sum(sizes)


def test_batches_come_in_no_order_of_length():
    longest = [max(len(SAMPLES[i].prompt) for i in batch) for batch in first_batches(BY_SIZE, 15)]
    assert longest != sorted(longest)


@pytest.mark.parametrize(
    "options", [{"batch_size": 64, "length_window": 131_072}, {"batch_tokens": 16_384, "length_window": 65_536}]
)
def test_on_a_skewed_corpus_padding_falls_below_a_tenth(options):
    split = skewed(30_000)
    by_length = TrainConfig(steps=10**6, **options)
    shuffled = padding([b for (b,) in islice(train_batches(split, TOKENIZER, pad, TrainConfig(steps=10**6)), 50)])
    assert shuffled > 0.7
    assert padding([b for (b,) in islice(train_batches(split, TOKENIZER, pad, by_length), 300)]) < 0.1


def test_padded_lengths_are_few_and_at_most_an_eighth_or_seven_longer():
    lengths = np.arange(1, 513)
    padded = padded_length(lengths)
    assert (padded >= lengths).all() and (padded - lengths < np.maximum(8, lengths / 8 + 1)).all()
    assert len(np.unique(padded)) == 32
    batch = pad_batch([Sample([1] * 70, [1] * 2)], TOKENIZER, round_up=True)
    assert batch.encoder_ids.shape == (1, 72) and batch.labels.shape == (1, 8) and (batch.labels[0, 3:] == IGNORE).all()


@pytest.mark.parametrize("config", [BY_SIZE, BY_TOKENS])
@pytest.mark.parametrize("world_size, accum", [(2, 1), (1, 4), (3, 2)])
def test_workers_and_accumulation_share_out_the_same_global_batches(config, world_size, accum):
    shared = config.model_copy(update={"grad_accum_steps": accum})
    alone = islice(train_batches(SAMPLES, TOKENIZER, pad, config, 5), 20)
    workers = [
        islice(train_batches(SAMPLES, TOKENIZER, pad, shared, 5, rank, world_size), 20) for rank in range(world_size)
    ]
    for (whole,), *shares in zip(alone, *workers):
        assert [len(share) for share in shares] == [accum] * world_size
        micro = [batch for share in shares for batch in share]
        real = [
            row
            for batch in micro
            for row, labels in zip(batch.encoder_mask.sum(1), batch.labels)
            if (labels != IGNORE).any()
        ]
        assert sorted(map(int, real)) == sorted(whole.encoder_mask.sum(1).tolist())
        assert sum(int((b.labels != IGNORE).sum()) for b in micro) == int((whole.labels != IGNORE).sum())


def test_validation_batches_hold_each_sample_once_over_all_workers():
    batches = [b for rank in range(3) for (b,) in val_batches(SAMPLES, TOKENIZER, pad, 16, rank, 3)]
    assert sorted(int(n) for b in batches for n in b.encoder_mask.sum(1)) == sorted(len(s.prompt) for s in SAMPLES)
    assert padding(batches) < 0.5
    two = Samples([SAMPLES[0], SAMPLES[1]], TOKENIZER)
    ((spare,),) = val_batches(two, TOKENIZER, pad, 16, 2, 3)
    assert (spare.labels == IGNORE).all(), "workers that share a model run together, also the one without a sample"


# --- training ----------------------------------------------------------------------------------------------------

BY_LENGTH = [
    {"train__length_window": 24},
    {
        "train__length_window": 24,
        "train__batch_tokens": 160,
        "model__max_prompt_len": 60,
        "model__max_response_len": 20,
    },
    {
        "train__length_window": 24,
        "train__batch_tokens": 160,
        "train__packing": True,
        "model__architecture": "prefix_lm",
        "model__max_prompt_len": 60,
        "model__max_response_len": 20,
    },
]
BY_LENGTH.append(BY_LENGTH[2] | {"model__architecture": "encoder_decoder"})


@pytest.mark.parametrize("options", BY_LENGTH)
def test_a_resumed_run_repeats_no_batch_and_skips_none(tmp_path, options):
    data = {"data__synthetic__max_digits": 2, "data__synthetic__num_samples": 100}
    assert_resumes_exactly(small_config(train__val_every=1, **data, **options), tmp_path, 4, 9)


@pytest.mark.parametrize("options", BY_LENGTH[1:3])
def test_a_resume_looks_at_no_window_before_that_of_the_last_trained_batch(tmp_path, options, monkeypatch):
    data = {"data__synthetic__max_digits": 2, "data__synthetic__num_samples": 100}
    config = small_config(train__val_every=1, **data, **options | {"train__length_window": 6})
    looked_at, window_batches = [], sampler.window_batches

    def recorded(split, config, window, rows):
        batches = window_batches(split, config, window, rows)
        looked_at.append((window, len(batches)))
        return batches

    monkeypatch.setattr(sampler, "window_batches", recorded)
    straight = train_locally(config, tmp_path / "straight").last_weights()
    window_of_step = [window for window, size in looked_at for _ in range(size)]
    assert window_of_step[4] > 1
    for stop_at in (4, 7):
        stopped = tmp_path / f"stopped_{stop_at}"
        train_locally(config, stopped, stop_at)
        looked_at.clear()
        resumed = train_locally(config, stopped)
        assert looked_at[0][0] == window_of_step[stop_at - 1], "not the window that was prepared ahead either"
        assert_same_weights(straight, resumed.last_weights())


def test_a_checkpoint_that_does_not_know_its_window_is_resumed_by_counting(tmp_path):
    data = {"data__synthetic__max_digits": 2, "data__synthetic__num_samples": 100}
    config = small_config(train__val_every=1, **data, **BY_LENGTH[1])
    straight = train_locally(config, tmp_path / "straight").last_weights()
    state = train_locally(config, tmp_path / "old", 9).last_checkpoint / "trainer_state.json"
    fields = json.loads(state.read_text())
    assert fields.pop("window") and fields.pop("window_step")
    state.write_text(json.dumps(fields))
    assert_same_weights(straight, train_locally(config, tmp_path / "old").last_weights())


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_packing_changes_no_validation_loss(tmp_path, architecture):
    options = BY_LENGTH[1] | {"model__architecture": architecture}
    losses = [
        train_locally(small_config(**options, train__packing=packing, train__steps=1), tmp_path / str(packing)).reports
        for packing in (False, True)
    ]
    assert losses[1][0]["val_exact_match"] == losses[0][0]["val_exact_match"]
    model = load_model(max((tmp_path / "True").glob("step_*")))[0]
    splits = load_dataset(small_config().data, small_config().model, 0)
    rows = (160,) if architecture == "prefix_lm" else (100, 60)
    padded, packed = (validate(model, splits, eval_options(8, rows=rows)) for rows in (None, rows))
    assert packed["val_loss"] == pytest.approx(padded["val_loss"], rel=1e-5)


@pytest.mark.parametrize("options", BY_LENGTH)
def test_accumulation_changes_nothing_but_rounding(tmp_path, options):
    """Also where a batch has fewer samples than there are micro-batches."""
    options |= dict(data__synthetic__max_digits=2, data__synthetic__num_samples=100, train__val_every=1)
    one = train_locally(small_config(**options), tmp_path / "one")
    four = train_locally(small_config(**options, train__grad_accum_steps=8), tmp_path / "four")
    assert [m["loss"] for m in one.reports] == pytest.approx([m["loss"] for m in four.reports], rel=1e-5)
    assert [m["grad_norm"] for m in one.reports] == pytest.approx([m["grad_norm"] for m in four.reports], rel=1e-3)


def test_the_share_of_padding_is_reported(tmp_path):
    config = small_config(train__val_every=6)
    session = train_locally(config, tmp_path)
    state = build_state(config, 20)
    batch = pad_batch([Sample([5] * 6, [5] * 2), Sample([5] * 2, [])], TOKENIZER)
    stats = Stats(state)
    train_step(state, [batch], stats)
    assert stats.read()["padding"] == pytest.approx(1 - 12 / 18)
    assert all(0 < metrics["padding"] < 1 for metrics in session.reports)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.batch_tokens": 4096}, "train.batch_tokens needs train.length_window"),
        ({"train.batch_tokens": 100, "train.length_window": 64}, r"train.batch_tokens \(100\) is less than one sample"),
        ({"train.packing": True, "model.bridge.type": "prefix"}, "train.packing: model.bridge.type prefix puts"),
        ({"train.packing": True}, "train.packing needs train.batch_tokens"),
        ({"train.length_window": 8}, r"train.length_window \(8\) is smaller than train.batch_size \(64\)"),
    ],
)
def test_windows_and_budgets_that_hold_no_batch_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=overrides)
