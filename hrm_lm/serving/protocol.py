"""OpenAI's requests, as far as they are served: what is taken, what is refused, and with which words.

A field that this server cannot follow is refused rather than ignored, unless its value asks for nothing. So a client hears of
what it would miss. Errors have OpenAI's form, of which its clients make their exceptions.
"""

import json
import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hrm_lm.config import Cycles, ModelConfig
from hrm_lm.data.chat import render
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.inference.engine import Request

IGNORED = {
    *("metadata", "moderation", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "safety_identifier", "service_tier", "store", "user", "verbosity"),
}
"""Fields without a meaning here that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
"""Fields that are not supported, and the values besides null with which they ask for nothing."""
CODES = {400: None, 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"} | {
    413: "request_too_large", 429: "rate_limit_exceeded", 500: "internal_error", 503: "unavailable", 504: "timeout"
}  # fmt: skip
GREEDY_BELOW, LEAST_TOP_P = 1e-3, 1e-9
"""Logits that are divided by less may leave the range of float32, and less probability is that of no token."""
MOST_STOPS, LONGEST_STOP = 4, 256


class Refused(Exception):
    """What the client is told instead of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code or CODES.get(status)

    def body(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "server_error"
        kind = kind if self.status in (429, 500, 503, 504) else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Asked(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    h_cycles: Annotated[int, Field(ge=1)] | None = None


class Completion(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Chat(Asked):
    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


@dataclass(frozen=True)
class Model:
    """What is served: what a request is checked against."""

    name: str
    limits: ModelConfig
    recurs_per_token: bool
    """See `hrm_lm.models.contract.LanguageModel`."""
    tokenizer: Tokenizer
    cycles: Cycles
    """Those of a request that says nothing of them."""
    sampled: tuple[int, int] | None = None
    """The least and the most H-cycles that training took, where it did not take one count alone."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def efforts(self) -> dict[str, int]:
        """H-cycles by `reasoning_effort`; empty for a model without a core."""
        h = self.cycles.h
        low, high = self.sampled or (-(-h // 2), 2 * h)
        return {"low": low, "medium": h, "high": high} if h else {}

    def describe(self) -> dict[str, Any]:
        limits = {"max_prompt_tokens": self.limits.max_prompt_len, "max_tokens": self.limits.max_response_len}
        own = {"id": self.name, "object": "model", "created": self.created, "owned_by": "hrm_lm"}
        trained = list(self.sampled or [self.limits.hrm.h_cycles] * 2)
        return own | limits | {"reasoning_efforts": self.efforts, "trained_h_cycles": trained}


@dataclass(frozen=True)
class Job:
    """What a client asks for, as the engine takes it."""

    asked: Completion | Chat
    requests: list[Request]
    """Those of a prompt follow one another."""
    echoes: list[str]
    """What each answer's text begins with, if with anything."""

    @property
    def includes_usage(self) -> bool:
        return bool(self.asked.stream_options and self.asked.stream_options.include_usage)


def parse(body: bytes, kind: type[Completion] | type[Chat], model: Model, most: int) -> Job:
    """What a request asks for. most: answers that it may have. Raises Refused for what cannot be answered."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is not a JSON object")
    for name in fields.keys() & NEUTRAL.keys():
        if (value := fields.pop(name)) is not None and value not in NEUTRAL[name]:
            raise Refused(400, f"{name} is not supported", name, "unsupported_parameter")
    try:
        asked = kind.model_validate({name: value for name, value in fields.items() if name not in IGNORED})
    except ValidationError as error:
        raise _refusal(error) from None
    if asked.model != model.name:
        message = f"the model {asked.model!r} does not exist; this server has {model.name!r}"
        raise Refused(404, message, "model", "model_not_found")
    return _job(asked, model, most)


def _refusal(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return Refused(400, "the name of a field is no text", code="unknown_parameter")
    name, *rest = map(str, first["loc"])
    if first["type"] == "extra_forbidden":
        return Refused(400, f"unknown field {'.'.join([name, *rest])}", name, "unknown_parameter")
    if first["type"] == "missing":
        return Refused(400, f"{name} is missing", name, "missing_required_parameter")
    if name == "prompt":  # it has an error for each of its types
        return Refused(400, "prompt must be a text, token ids, or a list of either", name, "invalid_type")
    return Refused(400, f"{name}: {first['msg']}", name, "invalid_value")


def _job(asked: Completion | Chat, model: Model, most: int) -> Job:
    tokenizer, limits, n = model.tokenizer, model.limits, asked.n or 1
    if isinstance(asked, Chat):
        source, new_name, new = "messages", "max_completion_tokens", asked.max_completion_tokens or asked.max_tokens
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refused(400, "top_logprobs needs logprobs", "top_logprobs")
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    else:
        source, new_name, new, logprobs = "prompt", "max_tokens", asked.max_tokens, asked.logprobs
        if asked.best_of not in (None, n):
            raise Refused(400, "best_of is not supported", "best_of", "unsupported_parameter")
        if asked.echo and logprobs is not None:
            raise Refused(400, "echo is not supported with logprobs", "echo", "unsupported_parameter")
    given: list[Any] = [asked.messages] if isinstance(asked, Chat) else _several(asked.prompt)
    if len(given) * n > most:
        message = f"{len(given) * n} answers are asked for; this server gives up to {most} at a time"
        raise Refused(400, message, "n" if n > 1 else source)
    try:
        prompts = [_ids(tokenizer, render(tokenizer, each) if isinstance(asked, Chat) else each) for each in given]
    except (UserError, UnicodeEncodeError) as error:
        raise Refused(400, str(error), source) from None
    for ids in prompts:
        if not 0 < len(ids) <= limits.max_prompt_len:
            message = f"the prompt has {len(ids)} tokens; this model takes 1 to {limits.max_prompt_len}"
            raise Refused(400, message, source, "context_length_exceeded")
    if new is not None and new > limits.max_response_len:
        message = f"{new_name} is {new}; this model gives up to {limits.max_response_len} tokens"
        raise Refused(400, message, new_name, "context_length_exceeded")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if len(stop) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in stop):
        raise Refused(400, f"stop takes up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", "stop")
    temperature = asked.temperature or 0.0
    seed = random.getrandbits(63) if asked.seed is None else asked.seed % 2**63
    # The answers to a prompt differ from one another. They do not depend on the prompts beside it.
    seeds = [seed, *(random.Random(f"{seed} {i}").getrandbits(63) for i in range(1, n))]
    each = partial(
        Request,
        cycles=_cycles(asked, model),
        max_new_tokens=new or limits.max_response_len,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=asked.top_k if asked.top_k and asked.top_k > 0 else None,
        top_p=max(1.0 if asked.top_p is None else asked.top_p, LEAST_TOP_P),
        stop=tuple(stop),
        logprobs=logprobs,
    )
    echoes = isinstance(asked, Completion) and asked.echo
    echoed = [tokenizer.decode(ids) for ids in prompts for _ in seeds] if echoes else []
    return Job(asked, [each(prompt=ids, seed=seed) for ids in prompts for seed in seeds], echoed)


def _several(prompt: Any) -> list[Any]:
    """The prompts of a completion, each a text or token ids."""
    several = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not several:
        raise Refused(400, "prompt is empty", "prompt")
    return several


def _ids(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not all(0 <= token < tokenizer.vocab_size for token in prompt):
        raise Refused(400, f"token ids are 0 to {tokenizer.vocab_size - 1}", "prompt")
    return prompt


def _cycles(asked: Asked, model: Model) -> Cycles:
    name = "reasoning_effort" if asked.reasoning_effort else "h_cycles"
    if asked.reasoning_effort is None and asked.h_cycles is None:
        return model.cycles
    if not model.efforts:
        raise Refused(400, f"{name}: this model has no HRM core to cycle", name, "unsupported_parameter")
    if asked.reasoning_effort and asked.h_cycles:
        raise Refused(400, "reasoning_effort and h_cycles exclude each other", "h_cycles")
    if asked.reasoning_effort:
        return Cycles(model.efforts[asked.reasoning_effort], model.cycles.l)
    # Each count has caches of its own in a model that recurs for every token.
    chosen = sorted(set(model.efforts.values()))
    counts = chosen if model.recurs_per_token else list(range(1, chosen[-1] + 1))
    if asked.h_cycles not in counts:
        raise Refused(400, f"h_cycles is {asked.h_cycles}; this model takes {', '.join(map(str, counts))}", "h_cycles")
    return Cycles(asked.h_cycles or 0, model.cycles.l)
