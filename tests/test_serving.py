"""The server as its clients see it: OpenAI's own client against the routes, over a socket, without Ray."""

import asyncio
import json
import multiprocessing
import shutil
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from urllib.request import urlopen

import openai
import pytest
import torch
import uvicorn
from conftest import small_config, wait_until
from websockets.sync.client import connect

from hrm_lm.config import Cycles
from hrm_lm.data.chat import render
from hrm_lm.data.tokenizer import SimpleTokenizer
from hrm_lm.errors import UserError
from hrm_lm.inference.engine import Engine
from hrm_lm.models.build import build_model
from hrm_lm.serving import host, worker
from hrm_lm.serving.access import digest
from hrm_lm.serving.app import MOST_BYTES, App
from hrm_lm.serving.host import Host, check_memory
from hrm_lm.serving.metrics import Metrics, merged
from hrm_lm.serving.protocol import Model
from hrm_lm.serving.worker import Worker

TOKENIZER = SimpleTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 .,!?:\n")
PROMPT = "what is it?"


def build(**overrides):
    torch.manual_seed(0)
    sizes = {"model__d_model": 64, "model__max_prompt_len": 60, "model__max_response_len": 20}
    model = build_model(small_config(**sizes, **overrides).model, TOKENIZER.vocab_size).eval()
    with torch.no_grad():
        # Logits far apart: rounding changes no token. All tokens of an answer have text.
        model.head.weight.normal_()[: TOKENIZER.SPECIAL] = 0
    return model


def served_as_small(model) -> Model:
    return Model("small", model.config, model.recurs_per_token, TOKENIZER, model.config.hrm.cycles)


class Gated(Engine):
    """An engine whose steps wait until they may go on, and fail as told."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gate, self.failures, self.holds = threading.Event(), 0, False
        self.gate.set()

    def step(self):
        self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise AssertionError  # an error without words
        changed = super().step()
        if changed and self.holds:  # after the first token
            self.holds = False
            self.gate.clear()
        return changed


class Server:
    """A server in a thread."""

    def __init__(self, model=None, slots: int = 8, max_queue: int = 8, timeout: float = 60, key: str | None = None):
        self.model, self.key = model or build(), key
        self.engine = Gated(self.model, TOKENIZER, slots)
        ready = threading.Event()

        async def run():
            connection, its = multiprocessing.Pipe()
            engine = threading.Thread(target=Host(self.engine, its).run)
            engine.start()
            worker = Worker(connection, slots, max_queue, lost=lambda: None)
            metrics = Metrics(worker)

            async def everyones() -> str:
                return merged([metrics.text()])

            served = served_as_small(self.model)
            self.app = App(served, worker, metrics, everyones, timeout, digest(key) if key else None)
            self.uvicorn = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="critical"))
            task = asyncio.create_task(self.uvicorn.serve())
            while not self.uvicorn.started:
                await asyncio.sleep(0.001)
            self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
            ready.set()
            await task
            self.engine.holds = False
            self.engine.gate.set()
            worker.close()
            await asyncio.to_thread(engine.join)

        self.thread = threading.Thread(target=asyncio.run, args=(run(),))
        self.thread.start()
        ready.wait()
        url = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0)

    def stop(self):
        self.engine.gate.set()
        self.uvicorn.should_exit = True
        self.thread.join()

    def complete(self, prompt=PROMPT, **options):
        return self.client.completions.create(model="small", prompt=prompt, **options)

    def chat(self, *contents: str, **options):
        roles = ("user", "assistant") * len(contents)
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        return self.client.chat.completions.create(model="small", messages=messages, **options)

    def raw(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None):
        """Status, headers and body of an HTTP request."""
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


@contextmanager
def running(**options):
    server = Server(**options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def in_thread(function, *arguments, **options):
    """Calls `function`; the list that is returned holds what came of it as soon as it is there."""
    outcome = []

    def call():
        try:
            outcome.append(function(*arguments, **options))
        except openai.APIError as error:
            outcome.append(error)

    threading.Thread(target=call).start()
    return outcome


# --- answers -----------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_engine_answers(server):
    answer = server.complete()
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("text_completion", "small")
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert len(choice.text) == 20 and choice.logprobs is None
    assert answer.usage.to_dict() == {"prompt_tokens": 11, "completion_tokens": 20, "total_tokens": 31}
    assert server.complete(max_tokens=5).choices[0].text == choice.text[:5]
    assert server.complete(TOKENIZER.encode(PROMPT)).choices[0].text == choice.text
    assert server.complete(echo=True).choices[0].text == PROMPT + choice.text


def test_several_prompts_and_answers_come_in_order(server):
    others = ["abc", "who?"]
    alone = [server.complete(prompt, seed=3, temperature=1, n=2) for prompt in others]
    together = server.complete(others, seed=3, temperature=1, n=2)
    assert [choice.text for choice in together.choices] == [choice.text for one in alone for choice in one.choices]
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in together.choices}) == 4
    assert together.usage.prompt_tokens == 7


def test_a_seed_repeats_an_answer_and_without_one_answers_differ(server):
    def answer(temperature: float = 1, **options):
        return server.complete(temperature=temperature, **options).choices[0].text

    assert answer(seed=1) == answer(seed=1) != answer(seed=2)
    assert answer(seed=-1) == answer(seed=-1) and answer() != answer()
    likeliest = server.complete().choices[0].text
    assert likeliest == answer(extra_body={"top_k": 1}) == answer(top_p=0) == answer(temperature=1e-5)


def test_a_stream_tells_the_same_in_pieces(server):
    for options in ({}, {"n": 2, "temperature": 1, "seed": 5}, {"logprobs": 2}, {"echo": True}):
        whole, told = server.complete(**options), {}
        chunks = list(server.complete(stream=True, stream_options={"include_usage": True}, **options))
        assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            told.setdefault(choice.index, []).append(choice)
            assert chunk.usage is None and chunk.id == chunks[0].id
        for choice in whole.choices:
            pieces = told[choice.index]
            assert "".join(piece.text for piece in pieces) == choice.text
            assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [choice.finish_reason]
            if choice.logprobs:
                for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    parts = [part for piece in pieces for part in getattr(piece.logprobs, field)]
                    assert parts == getattr(choice.logprobs, field)


def test_chat_reads_the_conversation_as_training_does(server):
    said = ["what is it?", "a fox.", "is it?"]
    roles = ("user", "assistant", "user")
    prompt = render(TOKENIZER, [{"role": role, "content": text} for role, text in zip(roles, said)])
    answer = server.chat(*said, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == server.complete(prompt).choices[0].text
    assert answer.object == "chat.completion" and answer.usage.prompt_tokens == len(prompt)
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob and bytes(token.bytes).decode() == token.token
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it?"}]
    assert server.chat(parts).choices[0].message.content == server.complete().choices[0].text

    first, *chunks = server.chat(*said, stream=True, max_completion_tokens=4)
    assert first.choices[0].delta.role == "assistant" and first.object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content[:4]
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stop_text_ends_an_answer_whose_logprobs_end_there_too(server):
    text = server.complete().choices[0].text
    stop = text[6:9]
    assert stop not in text[:8]
    (choice,) = server.complete(stop=stop, logprobs=1).choices
    assert (choice.text, choice.finish_reason) == (text[:6], "stop") and "".join(choice.logprobs.tokens) == text[:6]
    assert choice.logprobs.text_offset == list(range(6))
    pieces = [chunk.choices[0] for chunk in server.complete(stop=["zzz", stop], logprobs=0, stream=True)]
    assert "".join(piece.text for piece in pieces) == text[:6] == "".join(t for p in pieces for t in p.logprobs.tokens)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_reasoning_effort_chooses_the_cycles(architecture):
    with running(model=build(model__architecture=architecture)) as server:
        cycles = []
        add = server.engine.add
        server.engine.add = lambda request: cycles.append(request.cycles) or add(request)
        server.chat(PROMPT)
        for effort in ("low", "medium", "high"):
            server.chat(PROMPT, reasoning_effort=effort)
        server.complete(extra_body={"h_cycles": 4})
        server.complete(extra_body={"reasoning_effort": "low"})
        assert cycles == [Cycles(2, 2), Cycles(1, 2), Cycles(2, 2), Cycles(4, 2), Cycles(4, 2), Cycles(1, 2)]
        for wrong in (0, 5, *([3] * (architecture == "prefix_lm"))):  # whose caches for three cycles would take memory
            with pytest.raises(openai.BadRequestError, match="h_cycles"):
                server.complete(extra_body={"h_cycles": wrong})
        with pytest.raises(openai.BadRequestError, match="exclude each other"):
            server.chat(PROMPT, reasoning_effort="low", extra_body={"h_cycles": 1})


def test_efforts_stay_within_the_counts_of_training():
    model = served_as_small(build())
    assert model.efforts == {"low": 1, "medium": 2, "high": 4}
    assert replace(model, sampled=(1, 3)).efforts == {"low": 1, "medium": 2, "high": 3}
    assert replace(model, cycles=Cycles(1, 2)).efforts == {"low": 1, "medium": 1, "high": 2}


def test_a_model_without_a_core_refuses_cycles():
    with running(model=build(model__hrm__h_cycles=0)) as server:
        assert server.chat(PROMPT).choices[0].message.content
        assert server.client.models.list().data[0].reasoning_efforts == {}
        for options in ({"reasoning_effort": "medium"}, {"extra_body": {"h_cycles": 1}}):
            with pytest.raises(openai.BadRequestError, match="has no HRM core"):
                server.chat(PROMPT, **options)


def test_models_are_listed_with_their_limits(server):
    (model,) = server.client.models.list()
    assert (model.id, model.max_prompt_tokens, model.max_tokens) == ("small", 60, 20)
    assert model.reasoning_efforts == {"low": 1, "medium": 2, "high": 4} and model.trained_h_cycles == [2, 2]
    assert server.client.models.retrieve("small") == model
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("large")


# --- refusals ----------------------------------------------------------------------------------------------------

BOTH = {
    "model": ({"model": "large"}, "large", "model_not_found"),
    "temperature": ({"temperature": 2.5}, "less than or equal to 2", "invalid_value"),
    "seed": ({"seed": "x"}, "valid integer", "invalid_value"),
    "n": ({"n": 17}, "up to 16 at a time", None),
    "stop": ({"stop": ["a"] * 5}, "up to 4 texts", None),
    "logit_bias": ({"logit_bias": {"1": 2}}, "not supported", "unsupported_parameter"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, "not supported", "unsupported_parameter"),
    "shape": ({"extra_body": {"shape": 1}}, "unknown field shape", "unknown_parameter"),
    "h_cycles": ({"extra_body": {"h_cycles": 9}}, "1, 2, 3, 4", None),
    "stream_options": ({"stream_options": {"x": 1}}, "unknown field stream_options.x", "unknown_parameter"),
}
COMPLETIONS = {
    "prompt": ({"prompt": ""}, "0 tokens", "context_length_exceeded"),
    "prompt ": ({"prompt": "a" * 61}, "61 tokens; this model takes 1 to 60", "context_length_exceeded"),
    "prompt  ": ({"prompt": "Ä"}, "not in the tokenizer", None),
    "prompt   ": ({"prompt": [1, 99]}, "token ids are 0 to", None),
    "prompt    ": ({"prompt": [[1], "a"]}, "a text, token ids, or a list", "invalid_type"),
    "prompt     ": ({"prompt": []}, "empty", None),
    "max_tokens": ({"max_tokens": 21}, "up to 20 tokens", "context_length_exceeded"),
    "best_of": ({"best_of": 3}, "not supported", "unsupported_parameter"),
    "suffix": ({"suffix": "a"}, "not supported", "unsupported_parameter"),
    "echo": ({"echo": True, "logprobs": 1}, "with logprobs", "unsupported_parameter"),
}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = {
    "messages": ({"messages": []}, "at least one message", None),
    "messages ": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text", None),
    "tools": ({"tools": [TOOL]}, "not supported", "unsupported_parameter"),
    "response_format": ({"response_format": {"type": "json_object"}}, "not supported", "unsupported_parameter"),
    "top_logprobs": ({"top_logprobs": 2}, "needs logprobs", None),
    "max_completion_tokens": ({"max_completion_tokens": 21}, "up to 20", "context_length_exceeded"),
    "reasoning_effort": ({"reasoning_effort": "minimal"}, "'low', 'medium' or 'high'", "invalid_value"),
}
CASES = [("completions", *item) for item in (BOTH | COMPLETIONS).items()] + [
    ("chat", *i) for i in (BOTH | CHAT).items()
]


@pytest.mark.parametrize(("endpoint", "param", "case"), CASES)
def test_what_cannot_be_followed_is_refused_with_the_field_and_the_reason(server, endpoint, param, case):
    options, message, code = case
    usual = {"prompt": PROMPT} if endpoint == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    create = (server.client if endpoint == "completions" else server.client.chat).completions.create
    with pytest.raises(openai.APIStatusError, match=message) as refusal:
        create(**{"model": "small"} | usual | options)
    assert refusal.value.status_code == (404 if code == "model_not_found" else 400)
    assert (refusal.value.param, refusal.value.code) == (param.strip(), code)


def test_what_asks_for_nothing_is_taken(server):
    options = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": "none", "n": 1,
        "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "parallel_tool_calls": False,
    }  # fmt: skip
    assert server.chat(PROMPT, **options).choices[0].message.content
    assert server.complete(best_of=1, suffix=None, presence_penalty=0.0).choices[0].text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"model": "small"}', b"[" * 100_000, b'{"a": NaN}', b'{"\\ud800": 1}']
)
def test_a_body_that_is_no_request_is_refused(server, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, text = server.raw("POST", path, body)
        assert status == 400 and json.loads(text)["error"]["type"] == "invalid_request_error"


def test_a_body_without_measure_is_refused(server):
    status, _, text = server.raw("POST", "/v1/completions", b" " * (MOST_BYTES + 1))
    assert status == 413 and "MiB" in json.loads(text)["error"]["message"]


def test_other_paths_and_methods_are_refused_in_the_same_form(server):
    for method, path, expected in (("GET", "/v2", 404), ("GET", "/v1/completions", 405)):
        status, _, text = server.raw(method, path)
        assert status == expected and path in json.loads(text)["error"]["message"]


# --- limits and failures -----------------------------------------------------------------------------------------


def test_more_than_may_wait_is_refused_and_the_rest_is_answered():
    with running(slots=1, max_queue=1) as server:
        server.engine.gate.clear()
        taken = [in_thread(server.complete) for _ in range(2)]
        wait_until(lambda: server.app.worker.unfinished == 2)
        with pytest.raises(openai.RateLimitError, match="2 answers run or wait") as refusal:
            server.complete()
        assert refusal.value.response.headers["Retry-After"] == "1"
        server.engine.gate.set()
        assert [wait_until(lambda: outcome)[0].choices[0].text for outcome in taken] == [
            server.complete().choices[0].text
        ] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up_and_makes_room(stream):
    with running(timeout=0.2) as server:
        server.engine.gate.clear()
        with pytest.raises(openai.APIStatusError, match="more than 0.2 s") as refusal:
            server.complete(stream=stream)
        assert refusal.value.status_code == 504
        assert server.app.worker.unfinished == 0
        server.engine.gate.set()
        wait_until(lambda: not server.engine.running and not server.engine.waiting)


def test_a_stream_that_takes_too_long_ends_with_an_error():
    with running() as server:
        server.engine.holds = True
        chunks = iter(server.complete(stream=True))
        assert next(chunks).choices[0].text
        (work,) = server.app.worker._works.values()
        work.began -= 60
        server.engine.holds = True
        server.engine.gate.set()
        with pytest.raises(openai.APIError, match="more than 60 s"):
            for chunk in chunks:  # at most the one that was on its way
                assert chunk.choices[0].text
        wait_until(lambda: server.app.worker.unfinished == 0)


def test_a_step_that_fails_fails_its_requests_and_no_others():
    with running() as server:
        expected = server.complete().choices[0].text
        server.engine.failures = 1
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            server.complete()
        assert server.complete().choices[0].text == expected
        assert server.raw("GET", "/health")[0] == 200


def test_a_request_that_the_engine_does_not_take_fails_alone():
    with running() as server:
        server.engine.gate.clear()
        others = in_thread(server.complete)
        wait_until(lambda: server.engine.waiting)
        add = server.engine.add
        server.engine.add = lambda request: add(replace(request, max_new_tokens=0))
        fails = in_thread(server.complete)
        wait_until(lambda: server.app.worker.unfinished == 2)
        server.engine.gate.set()
        assert isinstance(wait_until(lambda: fails)[0], openai.InternalServerError)
        server.engine.add = add
        assert wait_until(lambda: others)[0].choices[0].text == server.complete().choices[0].text


def test_a_server_whose_steps_keep_failing_is_not_healthy():
    with running() as server:
        server.engine.failures = 3
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                server.complete()
        status, _, text = server.raw("GET", "/health")
        assert status == 503 and "last 3 steps failed" in text


def test_a_server_whose_step_hangs_is_not_healthy_whoever_still_waits_for_it(monkeypatch):
    monkeypatch.setattr(worker, "STUCK_S", 0.5)
    with running(timeout=0.2) as server:
        server.engine.gate.clear()
        for _ in range(3):  # each has gone away before the step takes too long
            with pytest.raises(openai.APIStatusError, match="more than 0.2 s"):
                server.complete()
        wait_until(lambda: server.raw("GET", "/health")[0] == 503)
        server.engine.gate.set()
        wait_until(lambda: server.raw("GET", "/health")[0] == 200)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_caches_that_will_not_fit_are_refused_before_they_are_taken(architecture, monkeypatch):
    model = build(model__architecture=architecture)
    served = served_as_small(model)
    with running(model=model, slots=4) as server:
        asyncio.run_coroutine_threadsafe(server.app.worker.warm_up(served), server.app.worker.loop).result()
        lanes = [lane.decoding for lane in server.engine.lanes.values()]
    assert len(lanes) == (3 if architecture == "prefix_lm" else 1)
    caches = [cache for lane in lanes for cache in [c for some in lane.caches for c in some] + lane.memory]
    taken = sum(cache.k.nbytes + cache.v.nbytes for cache in caches)
    monkeypatch.setattr(host, "free_memory", lambda device: taken)
    check_memory(model, served, 4, "none")
    with pytest.raises(UserError, match=r"--slots 5: their caches take .* MiB, and .* are free; --slots 3 fits"):
        check_memory(model, served, 5, "none")


# --- who may ask -------------------------------------------------------------------------------------------------


def test_with_a_key_only_those_who_show_it_are_answered():
    with running(key="secret") as server:
        assert server.complete().choices[0].text
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="other").models.list()
        for wrong in ("", "secret", "Bearer secre", "Bearer \xff"):
            assert server.raw("GET", "/v1/models", headers={"Authorization": wrong})[0] == 401
        for path, status in (("/v1/models", 401), ("/metrics", 401), ("/", 200), ("/health", 200)):
            assert server.raw("GET", path)[0] == status
        headers = {"Authorization": "Bearer secret", "Host": "example.com", "Origin": "https://example.org"}
        assert server.raw("GET", "/v1/models", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:8000", "Origin": "http://[::1]:8000"}, 200),
        ({"Host": "example.com"}, 403),
        ({"Host": "127.0.0.1.example.com"}, 403),
        ({"Host": "localhost", "Origin": "http://example.com"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
    ],
)
def test_without_a_key_other_sites_pages_are_refused(server, headers, status):
    assert server.raw("GET", "/v1/models", headers=headers)[0] == status


# --- metrics -----------------------------------------------------------------------------------------------------


def test_metrics_count_requests_tokens_and_times():
    with running() as server:
        server.complete()
        server.complete(["a", "b"], max_tokens=3)
        with pytest.raises(openai.BadRequestError):
            server.complete("")
        lines = server.raw("GET", "/metrics")[2].splitlines()
    for line in (
        'hrm_lm_requests_total{code="200",path="/v1/completions",replica="0"} 2.0',
        'hrm_lm_requests_total{code="400",path="/v1/completions",replica="0"} 1.0',
        'hrm_lm_prompt_tokens_total{replica="0"} 13.0',
        'hrm_lm_tokens_total{replica="0"} 26.0',
        'hrm_lm_request_seconds_count{replica="0"} 2.0',
        'hrm_lm_first_token_seconds_count{replica="0"} 2.0',
        'hrm_lm_running{replica="0"} 0.0',
    ):
        assert line in lines


def test_the_metrics_of_several_replicas_stand_together_by_name():
    one, other = (
        f'# HELP a_total x\n# TYPE a_total counter\na_total{{replica="{i}"}} 1.0\n# HELP b y\nb 2\n' for i in "12"
    )
    text = merged([one, other])
    assert text.splitlines() == [
        *("# HELP a_total x", "# TYPE a_total counter", 'a_total{replica="1"} 1.0', 'a_total{replica="2"} 1.0'),
        *("# HELP b y", "b 2", "b 2"),
    ]


# --- the page ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page in a headless Chromium, which is told what to do over Chromium's own protocol."""

    def __init__(self, socket):
        self.socket = socket

    def tell(self, method: str, **parameters):
        self.socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
        while "id" not in (answer := json.loads(self.socket.recv())):
            pass  # an event
        return answer["result"]

    def open(self, url: str):
        self.tell("Page.navigate", url="about:blank")  # else a change of what follows `#` alone loads nothing
        self.tell("Page.navigate", url=url)

    def run(self, script: str):
        result = self.tell("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector('{selector}')?.textContent ?? ''")

    def ask(self, prompt: str):
        self.run("document.querySelector('textarea').select()")
        self.tell("Input.insertText", text=prompt)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}  # with Ctrl
        self.tell("Input.dispatchKeyEvent", type="keyDown", **key)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **key)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium or Chrome")
    folder = tmp_path_factory.mktemp("chromium")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen([CHROMIUM, *options, f"--user-data-dir={folder}"], stderr=subprocess.DEVNULL)
    try:
        file = folder / "DevToolsActivePort"
        port = wait_until(lambda: file.exists() and file.read_text().partition("\n")[0])

        def pages():
            with urlopen(f"http://127.0.0.1:{port}/json") as response:
                return [target for target in json.load(response) if target["type"] == "page"]

        with connect(wait_until(pages)[0]["webSocketDebuggerUrl"]) as socket:
            yield Page(socket)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_page_shows_an_answer_as_it_comes(server, page):
    page.open(f"http://127.0.0.1:{server.port}/")
    wait_until(lambda: page.text("h1") == "small")
    server.engine.holds = True
    page.ask(PROMPT)
    begin = wait_until(lambda: page.text(".answer"))
    assert page.text("button") == "Stop" and len(begin) == 1
    server.engine.gate.set()
    wait_until(lambda: page.text("button") == "Ask")
    whole = server.complete().choices[0].text
    assert page.text(".answer") == whole and whole.startswith(begin)
    assert page.text(".question") == PROMPT and page.text("small").startswith("2 cycles · 20 tokens · ")
    assert "tokens/s" in page.text("small")

    page.run("document.querySelector('[value=high]').click()")
    page.ask(PROMPT)
    wait_until(lambda: page.text("small").startswith("4 cycles"))
    assert page.text(".answer") == server.chat(PROMPT, reasoning_effort="high").choices[0].message.content


@pytest.mark.slow
def test_the_page_stops_and_shows_errors(server, page):
    page.open(f"http://127.0.0.1:{server.port}/")
    wait_until(lambda: page.text("h1") == "small")
    page.ask("Ä")
    assert "not in the tokenizer" in wait_until(lambda: page.text(".error"))
    server.engine.holds = True
    page.ask(PROMPT)
    wait_until(lambda: page.text(".answer"))
    page.run("document.querySelector('button').click()")
    wait_until(lambda: page.text(".error") == "stopped")
    assert page.text("button") == "Ask"
    server.engine.gate.set()


@pytest.mark.slow
def test_the_page_asks_for_the_key_and_takes_it_from_its_address(page):
    with running(key="secret word") as server:
        page.open(f"http://127.0.0.1:{server.port}/")
        wait_until(lambda: page.run("document.querySelector('#key')?.hidden === false"))
        wait_until(lambda: "API key" in page.text("#limits"))
        page.open(f"http://127.0.0.1:{server.port}/#key=secret%20word")
        wait_until(lambda: page.text("h1") == "small")
        assert page.run("location.hash") == "" and page.run("document.querySelector('#key').hidden")
        page.ask(PROMPT)
        wait_until(lambda: "tokens/s" in page.text("small"))
