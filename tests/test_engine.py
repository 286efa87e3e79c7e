"""Requests that are answered together: each gets the answer that it would get alone, whenever it comes."""

import random

import pytest
import torch
from conftest import eval_options, small_config

from hrm_lm.config import Cycles
from hrm_lm.data.tokenizer import ByteTokenizer, SimpleTokenizer
from hrm_lm.inference import engine as engine_module
from hrm_lm.inference.engine import Engine, Reader, Request
from hrm_lm.models import cache
from hrm_lm.models.build import build_model
from hrm_lm.models.decoding import generate_ids

KINDS = {
    "cross_attention": {"model__decoder_layers": 2},
    "prefix": {"model__bridge__type": "prefix"},
    "prefix_lm": {"model__architecture": "prefix_lm"},
    "prefix_lm_plain": {"model__architecture": "prefix_lm", "model__hrm__h_cycles": 0},
}
MODELS = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
TOKENIZER = SimpleTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,!?")


def build(**overrides):
    torch.manual_seed(0)
    sizes = {"model__d_model": 64, "model__max_prompt_len": 24, "model__max_response_len": 20}
    model = build_model(small_config(**sizes, **overrides).model, TOKENIZER.vocab_size).eval()
    torch.nn.init.normal_(model.head.weight)  # logits far apart: rounding changes no token
    return model


def requests(model, count: int, **options) -> list[Request]:
    """Of random prompts, lengths and cycle counts."""
    draw, (h, l, _) = random.Random(0), model.config.hrm.cycles

    def one() -> Request:
        prompt = [draw.randrange(4, TOKENIZER.vocab_size) for _ in range(draw.randint(1, 24))]
        cycles = Cycles(h and draw.randint(1, 3), l)
        return Request(prompt=prompt, cycles=cycles, max_new_tokens=draw.randint(1, 20), **options)

    return [one() for _ in range(count)]


def alone(model, request: Request) -> list[int]:
    options = eval_options(cycles=request.cycles)
    (answer,) = generate_ids(model, TOKENIZER, [request.prompt], options, max_new_tokens=request.max_new_tokens)
    return answer


def run(engine: Engine, arriving: list[list[Request]]):
    """The answers in order of arrival. arriving: the requests that come before each step."""
    answers = []
    with engine:
        while engine.waiting or engine.running or arriving:
            answers += [engine.add(request) for request in (arriving.pop(0) if arriving else [])]
            engine.step()
    return answers


@MODELS
@pytest.mark.parametrize("read_step", [1, 16])
def test_requests_that_come_and_go_get_the_answers_that_they_get_alone(kind, read_step, monkeypatch):
    monkeypatch.setitem(cache.READ_STEP, "cpu", read_step)
    model = build(**kind)
    asked, draw = requests(model, 40), random.Random(1)
    arriving, rest = [], list(asked)
    while rest:
        n = draw.randint(0, 5)
        arriving.append(rest[:n])
        rest = rest[n:]
    answers = run(Engine(model, TOKENIZER, rows=6), arriving)
    assert [[token.id for token in answer.tokens] for answer in answers] == [alone(model, r) for r in asked]
    for answer in answers:
        assert answer.finish_reason == ("length" if len(answer.tokens) == answer.request.max_new_tokens else "stop")
    assert [answer.text for answer in answers] == [TOKENIZER.decode(alone(model, r)) for r in asked]


@MODELS
def test_rows_that_only_fill_up_a_size_change_nothing(kind, monkeypatch):
    """As on CUDA, where a step has a power of two of rows."""
    model = build(**kind)
    asked = requests(model, 12)
    engine = Engine(model, TOKENIZER, rows=8)
    monkeypatch.setattr(engine_module, "step_rows", lambda *_: 8)
    answers = run(engine, [asked[:1], *[[]] * 30, asked[1:]])
    assert [[token.id for token in answer.tokens] for answer in answers] == [alone(model, r) for r in asked]


@MODELS
def test_what_is_drawn_does_not_depend_on_other_requests(kind):
    model = build(**kind)
    asked = requests(model, 8, temperature=1.5, top_k=20, top_p=0.9, seed=3)
    together = [answer.text for answer in run(Engine(model, TOKENIZER), [asked])]
    assert together == [run(Engine(model, TOKENIZER), [[request]])[0].text for request in asked]
    others = requests(model, 8, temperature=1.5, seed=4)
    assert [answer.text for answer in run(Engine(model, TOKENIZER), [others])] != together


def test_no_more_requests_run_than_there_is_room_for_and_the_first_to_come_is_the_first_to_run():
    model = build()
    asked = [Request(prompt=[4 + i], cycles=Cycles(2, 2), max_new_tokens=5) for i in range(7)]
    engine = Engine(model, TOKENIZER, rows=3)
    with engine:
        answers = [engine.add(request) for request in asked]
        begun = []
        while engine.waiting or engine.running:
            engine.step()
            assert engine.running <= 3
            begun += [i for i, answer in enumerate(answers) if answer.tokens and i not in begun]
    assert begun == list(range(7)) and all(answer.finish_reason for answer in answers)


def test_prompts_that_join_together_are_bounded_and_a_long_one_comes_to_its_turn(monkeypatch):
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS", 10)
    model, read = build(), []
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda ids, *rest: read.append(tuple(ids.shape)) or prefill(ids, *rest))
    asked = [Request(prompt=[4] * n, cycles=Cycles(2, 2), max_new_tokens=3) for n in (4, 6, 1, 20, 2)]
    run(Engine(model, TOKENIZER), [asked])
    assert read == [(2, 6), (1, 1), (1, 20), (1, 2)]


@MODELS
def test_a_cancelled_request_makes_room_whether_it_waits_or_runs(kind):
    model = build(**kind)
    long = [Request(prompt=[5, 6, 7 + i], cycles=model.config.hrm.cycles, max_new_tokens=20) for i in range(4)]
    engine = Engine(model, TOKENIZER, rows=2)
    with engine:
        first, second, third, fourth = (engine.add(request) for request in long)
        engine.step()
        engine.cancel(first)
        engine.cancel(third)
        while engine.waiting or engine.running:
            engine.step()
    assert first.finish_reason == third.finish_reason == "cancelled" and len(first.tokens) == 1 and not third.tokens
    for answer in (second, fourth):
        assert [token.id for token in answer.tokens] == alone(model, answer.request)


@MODELS
def test_logprobs_are_those_of_the_whole_sequence(kind):
    model = build(**kind)
    (request,) = requests(model, 1, logprobs=3)
    (answer,) = run(Engine(model, TOKENIZER), [[request]])
    decoding = model.open(1, len(request.prompt), request.max_new_tokens, request.cycles)
    with torch.no_grad():
        logits = model.prefill(torch.tensor([list(request.prompt)]), [len(request.prompt)], 1, decoding)
        for token in answer.tokens:
            expected = logits[0].log_softmax(-1)
            assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
            values, ids = expected.topk(3)
            assert [i for i, _ in token.likeliest] == ids.tolist()
            assert [value for _, value in token.likeliest] == pytest.approx(values.tolist(), abs=1e-4)
            logits = model.decode(torch.tensor([token.id]), decoding)


def test_a_request_beyond_the_models_limits_is_refused():
    engine, cycles = Engine(build(), TOKENIZER), Cycles(2, 2)
    for prompt, new in (([], 1), ([4] * 25, 1), ([4], 0), ([4], 21)):
        with pytest.raises(ValueError, match="this model"):
            engine.add(Request(prompt=prompt, cycles=cycles, max_new_tokens=new))
    assert not engine.waiting


def told(tokenizer, text: str, stop: tuple[str, ...] = (), at_once: int = 1) -> tuple[list[str], bool]:
    """What a reader tells of a text, token by token."""
    reader, pieces, ids = Reader(tokenizer, stop), [], tokenizer.encode(text)
    for i in range(0, len(ids), at_once):
        piece, stopped = reader.read(ids[i : i + at_once], last=i + at_once >= len(ids))
        pieces.append(piece)
        if stopped:
            return pieces, True
    return pieces, False


def test_a_character_of_several_tokens_is_told_when_it_is_whole():
    pieces, stopped = told(ByteTokenizer(), "né 🦊!")
    assert pieces == ["n", "", "é", " ", "", "", "", "🦊", "!"] and not stopped
    half = Reader(ByteTokenizer())
    assert half.read(ByteTokenizer().encode("é")[:1], last=False) == ("", False)
    assert half.read([], last=True) == ("\ufffd", False)


def test_a_stop_text_ends_the_answer_before_it_and_no_part_of_it_is_told():
    letters = SimpleTokenizer("abcdefgh\n")
    pieces, stopped = told(letters, "abc\ncd\n\nef", stop=("\n\n", "xx"))
    assert "".join(pieces) == "abc\ncd" and stopped
    assert pieces[3] == "" and pieces[4] == "\nc", "a line break alone is held back until it is certain"
    pieces, stopped = told(letters, "abc\n", stop=("\n\n",))
    assert "".join(pieces) == "abc\n" and not stopped, "what was held back is told at the end"
    for at_once in (1, 2, 3, 9):
        pieces, stopped = told(letters, "aabaabaaac", stop=("aabaaa",), at_once=at_once)
        assert "".join(pieces) == "aab" and stopped


def test_a_stop_text_ends_a_request():
    model = build()
    request = Request(prompt=[7, 8, 9], cycles=Cycles(2, 2), max_new_tokens=20)
    text = TOKENIZER.decode(alone(model, request))
    stop = text[3:5]
    stopping = Request(
        **{name: getattr(request, name) for name in ("prompt", "cycles", "max_new_tokens")}, stop=(stop,)
    )
    (answer,) = run(Engine(model, TOKENIZER), [[stopping]])
    assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"
    assert len(answer.tokens) < len(text)
