"""From prompts to responses: the ways to decode give the same tokens, on CPU and as CUDA graphs."""

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import eval_options, small_config

from hrm_lm.models import cache, decoding
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.layers import Block

VOCAB = 50
KINDS = {
    "cross_attention": {"model__decoder_layers": 2},
    "prefix": {"model__bridge__type": "prefix"},
    "prefix_lm": {"model__architecture": "prefix_lm"},
    "prefix_lm_plain": {"model__architecture": "prefix_lm", "model__hrm__h_cycles": 0},
}
MODELS = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
PROMPTS = [
    torch.randint(4, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 19, 1, 8, 30)
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(device: torch.device | str = "cpu", **overrides) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(small_config(**overrides, model__d_model=64).model, VOCAB).eval()
    torch.nn.init.normal_(model.head.weight)  # logits far apart: rounding changes no token
    return model.to(device)


def answers(model: LanguageModel, eos_id: int = -1, batch_size: int = 3, max_new_tokens: int = 40, **options):
    """Greedy unless told otherwise, and without an end unless `eos_id` is a token."""
    evaluation = {"mixed_precision": options.pop("mixed_precision", "none"), "batch_size": batch_size}
    tokenizer = SimpleNamespace(pad_id=0, bos_id=1, eos_id=eos_id)
    return decoding.generate_ids(
        model, tokenizer, PROMPTS, eval_options(**evaluation), max_new_tokens=max_new_tokens, **options
    )


def cut(rows: list[list[int]], eos_id: int) -> list[list[int]]:
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def logits_of(model: LanguageModel, steps: int) -> torch.Tensor:
    """Of the first tokens after PROMPTS and some given ones, (B, steps + 1, V)."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in PROMPTS], batch_first=True)
    given = torch.randint(4, VOCAB, (len(PROMPTS), steps), generator=torch.Generator().manual_seed(0))
    lens = [len(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        state = model.open(len(ids), ids.shape[1], steps + 1, model.config.hrm.cycles)
        logits = model.prefill(ids, lens, 1, state)
        return torch.stack([logits, *(model.decode(given[:, t], state) for t in range(steps))], dim=1)


@contextmanager
def empty_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@MODELS
def test_places_that_are_read_before_they_are_filled_change_nothing(kind, monkeypatch):
    model = build(**kind)
    exact = logits_of(model, 20)
    monkeypatch.setitem(cache.READ_STEP, "cpu", 16)
    with empty_memory_is_nan():
        torch.testing.assert_close(logits_of(model, 20), exact, atol=1e-4, rtol=1e-5)


@MODELS
def test_prompts_read_some_at_a_time_are_those_read_at_once(kind, monkeypatch):
    model = build(**kind)
    whole = logits_of(model, 5)
    at_once, embedding = [], model.embedding.forward
    monkeypatch.setattr(model.embedding, "forward", lambda ids: at_once.append(ids.shape) or embedding(ids))
    monkeypatch.setattr(cache, "PROMPT_TOKENS", 2 * max(map(len, PROMPTS)))
    torch.testing.assert_close(logits_of(model, 5), whole, atol=1e-4, rtol=1e-5)
    read = [shape for shape in at_once if shape[1] > 1]
    assert read == [(2, 30), (2, 30), (1, 30)]


@MODELS
def test_the_host_looks_seldom_and_late_and_answers_are_the_same(kind, monkeypatch):
    model = build(**kind)
    endless = answers(model, batch_size=5)
    eos_id = endless[0][2]
    steps, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda *arguments: steps.append(1) or decode(*arguments))
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", 8)
    assert answers(model, eos_id, batch_size=5) == cut(endless, eos_id)
    longest = max(map(len, cut(endless, eos_id)))
    assert len(steps) == min(-(-(longest + 1) // 8) * 8 + 8, 40) - 1
    assert answers(model, eos_id, batch_size=2) == cut(endless, eos_id)
    monkeypatch.setattr(decoding, "pick", lambda logits, *_: logits.new_full(logits.shape[:1], eos_id).long())
    steps.clear()
    assert answers(model, eos_id, batch_size=5) == [[]] * 5
    assert len(steps) == 15


@MODELS
@pytest.mark.parametrize("look_every", [1, 4])
def test_others_take_the_places_of_samples_that_have_ended_and_answers_are_the_same(kind, look_every, monkeypatch):
    if look_every > 1:  # as on CUDA
        monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", look_every)
        monkeypatch.setattr(decoding, "step_rows", lambda samples, rows, device: rows)
    model = build(**kind)
    endless = answers(model, batch_size=1)
    for eos_id in {endless[0][0], endless[1][4], endless[2][20], endless[3][1]}:
        expected, scores = cut(endless, eos_id), [[], []]
        assert answers(model, eos_id, batch_size=1, scores=scores[0]) == expected
        steps, decode = [], model.decode
        with monkeypatch.context() as patch:
            patch.setattr(model, "decode", lambda *arguments: steps.append(1) or decode(*arguments))
            assert answers(model, eos_id, batch_size=2, scores=scores[1]) == expected
        assert scores[1] == pytest.approx(scores[0], abs=1e-4)
        lengths = [min(len(answer) + 1, 40) for answer in expected]
        idle = 2 * look_every * len(lengths)  # until the host sees that a sample has ended
        assert len(steps) <= sum(lengths) / 2 + max(lengths) / 2 + idle, "rows are not idle until their batch ends"


@MODELS
def test_a_score_is_the_mean_log_probability_of_the_tokens_and_of_eos(kind):
    model = build(**kind)
    eos_id, scores = answers(model)[1][4], []
    for ids, prompt, score in zip(answers(model, eos_id, scores=scores), PROMPTS, scores):
        tokens = [*ids, eos_id][:40]
        state = model.open(1, len(prompt), 40, model.config.hrm.cycles)
        with torch.no_grad():
            logits = [model.prefill(torch.tensor([prompt]), [len(prompt)], 1, state)]
            logits += [model.decode(torch.tensor([token]), state) for token in tokens[:-1]]
        logprobs = torch.cat(logits).log_softmax(-1)[range(len(tokens)), tokens]
        assert score == pytest.approx(logprobs.mean().item(), abs=1e-4)
    assert len(scores) == len(PROMPTS) and min(scores) < max(scores) < 0


@MODELS
def test_what_is_drawn_for_a_prompt_depends_on_its_number_alone(kind):
    model = build(**kind)
    sampled = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3}
    one = answers(model, batch_size=1, **sampled)
    assert answers(model, batch_size=3, **sampled) == one
    assert answers(model, batch_size=2, **sampled | {"numbers": [0, 1, 2, 9, 4]}) != one
    assert answers(model, batch_size=2, **sampled | {"numbers": [0, 1, 2, 9, 4]})[:3] == one[:3]
    assert answers(model, batch_size=2, **sampled | {"seed": 4}) != one


@pytest.mark.parametrize("top_k, top_p", [(None, 1.0), (5, 1.0), (None, 0.7), (5, 0.7), (1, 1.0), (None, 1e-9)])
def test_tokens_are_drawn_as_often_as_is_likely_and_no_others(top_k, top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    expected, left = [0.0] * 12, top_p
    for place, (p, token) in enumerate(sorted(zip((logits[0] / 0.7).softmax(-1).tolist(), range(12)), reverse=True)):
        expected[token] = p if place < (top_k or 12) else 0.0
    total = sum(expected)
    for token in sorted(range(12), key=lambda token: -expected[token]):
        p = expected[token] / total
        expected[token], left = (p, left - p) if left > 0 else (0.0, left)
    expected = torch.tensor(expected) / sum(expected)
    even = torch.arange(10_000) / 10_000  # every part of the interval as often
    drawn = decoding.pick(logits.expand(10_000, -1), 0.7, top_k, top_p, even).bincount(minlength=12) / 10_000
    torch.testing.assert_close(drawn, expected, atol=3e-4, rtol=0)
    assert ((drawn > 0) == (expected > 0)).all()
    tiny = decoding.pick(logits.expand(10_000, -1), 1e-42, top_k, top_p, even)
    assert (tiny == logits.argmax()).all()
    highest = torch.tensor([1 - 2**-24])
    assert expected[decoding.pick(logits, 0.7, top_k, top_p, highest)] > 0


def test_a_compiled_model_answers_without_compiling():
    model = build(**KINDS["prefix_lm"])
    plain = answers(model, max_new_tokens=5)

    def refuse(*_):
        raise AssertionError("something was compiled")

    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=refuse)
    assert answers(model, max_new_tokens=5) == plain


# --- on a GPU ----------------------------------------------------------------------------------------------------


def where_they_part(a: list[list[int]], b: list[list[int]]) -> str:
    same = [[x == y for x, y in zip(one, other, strict=False)] for one, other in zip(a, b, strict=True)]
    first = [row.index(False) if False in row else len(row) for row in same]
    return f"lengths {list(map(len, a))} and {list(map(len, b))}; they part at {first}"


def assert_same_answers(a: list[list[int]], b: list[list[int]]) -> None:
    assert a == b, where_they_part(a, b)


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs were captured, and how often they were replayed."""
    counts = SimpleNamespace(captured=0, replayed=0)

    class Counted(torch.cuda.CUDAGraph):
        def capture_begin(self, *arguments, **options):
            counts.captured += 1
            super().capture_begin(*arguments, **options)

        def replay(self):
            counts.replayed += 1
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    return counts


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 9, "seed": 5}], ids=["greedy", "sampled"])
@MODELS
def test_graphs_give_the_tokens_of_steps_without_graphs(kind, precision, sampling, graphs, monkeypatch):
    monkeypatch.setitem(cache.READ_STEP, "cuda", 16)
    model = build(DEVICE, **kind)
    options = {"mixed_precision": precision} | sampling
    plain = answers(model, in_step=True, **options)
    assert graphs.captured == 0
    assert_same_answers(answers(model, **options), plain)
    assert graphs.captured >= 4, "two batches, of two sizes or more each"
    assert graphs.replayed > 2 * 30


@pytest.mark.gpu
@MODELS
def test_graphs_give_the_tokens_of_a_cache_that_is_read_as_far_as_it_is_filled(kind, monkeypatch):
    model = build(DEVICE, **kind)
    rounded = answers(model)
    monkeypatch.setitem(cache.READ_STEP, "cuda", 1)
    assert_same_answers(rounded, answers(model, in_step=True))


@pytest.mark.gpu
@MODELS
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_on_a_gpu_an_answer_ends_where_it_ends_on_cpu(kind, batch_size):
    model = build(DEVICE, **kind)
    endless = answers(model, batch_size=batch_size)
    assert_same_answers(endless, answers(build(**kind), batch_size=batch_size))
    for eos_id in {endless[0][0], endless[1][4], endless[2][20]}:
        assert_same_answers(answers(model, eos_id, batch_size), cut(endless, eos_id))
    assert_same_answers(answers(model, batch_size=batch_size, max_new_tokens=1), [row[:1] for row in endless])


@pytest.mark.gpu
@MODELS
def test_the_host_does_not_wait_for_the_gpu_at_every_token(kind):
    model = build(DEVICE, **kind)
    answers(model)

    def waits(max_new_tokens: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                answers(model, batch_size=5, max_new_tokens=max_new_tokens, temperature=0.8, top_k=9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    few, many = waits(5), waits(60)
    assert few > 0, "sync debug mode has seen the copies of prompts and answers"
    assert many == few
