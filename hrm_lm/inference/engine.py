"""Many requests, answered together: they join and leave between tokens, so none waits for another to end.

`Engine.step` reads the prompts of requests that wait, as far as there is room, and then gives every running request its
next token. A request's answer does not depend, but for rounding, on the requests beside it, nor on when it came: what it
draws comes from a generator of its own.

Requests of different cycle counts cannot take a step together where the recurrence runs for every token (`prefix_lm`).
Each count then has caches of its own, and they take turns.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm_lm.config import Cycles
from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.models.cache import Decoding
from hrm_lm.models.contract import LanguageModel, Precision, autocast
from hrm_lm.models.decoding import draws, graphed, padded, pick, step_rows

PROMPT_TOKENS = 1 << 13
"""Prompts that join at a step have so many tokens together, or are a single prompt: running requests wait for them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how it is to be answered."""

    prompt: Sequence[int]
    """Token ids, from 1 to the model's `max_prompt_len` of them."""
    cycles: Cycles
    max_new_tokens: int
    """At most the model's `max_response_len`."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int | None = None
    """Draws from so many of the likeliest tokens; None: from all."""
    top_p: float = 1.0
    """Draws from the fewest of the likeliest tokens that have this probability together."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer, which is cut before the first of them."""
    logprobs: int | None = None
    """Of how many of the likeliest tokens log-probabilities are given with each token; None: none at all."""


class Token(NamedTuple):
    """A token of an answer, with what the model thought of it where the request asked for that."""

    id: int
    logprob: float | None = None
    """Its log-probability at temperature 1."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, `Request.logprobs` of them."""


class Reader:
    """The text of tokens that come one by one. Most of them are decoded twice, and none more often.

    stop: texts that end it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.start, self.end = 0, 0
        """What is decoded with the next tokens, because the text of a token may depend on the token before; its end is
        that of the text so far."""
        self.held = ""
        """Text that may be the begin of a stop text."""

    def read(self, tokens: Sequence[int], last: bool) -> tuple[str, bool]:
        """The text that is certain now and was not before, and whether a stop text ended it. last: no token follows."""
        self.ids += tokens
        before = self.tokenizer.decode(self.ids[self.start : self.end])
        text = self.tokenizer.decode(self.ids[self.start :])
        if not last and text.endswith("\ufffd"):  # bytes of a character are missing
            return "", False
        self.start, self.end = self.end, len(self.ids)
        text = self.held + text[len(before) :]
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        held = 0 if last else max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held], False


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Answer:
    """The answer to a request, as it grows."""

    request: Request
    reader: Reader
    draws: np.ndarray | None
    """What its tokens are drawn with; None where the likeliest are taken."""
    tokens: list[Token] = field(default_factory=list)
    """Without EOS. Those of a stop text are among them."""
    offsets: list[int] = field(default_factory=list)
    """Where in the text each token begins."""
    text: str = ""
    """As far as it is certain: a character may take several tokens, and what may begin a stop text is held back."""
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    """`stop` at EOS or at a stop text, `length` after `max_new_tokens`; None while it grows."""

    def append(self, token: Token, eos_id: int) -> None:
        if token.id == eos_id:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            self.offsets.append(len(self.text) + len(self.reader.held))
            if len(self.tokens) == self.request.max_new_tokens:
                self.finish_reason = "length"
        new = [] if token.id == eos_id else [token.id]
        text, stopped = self.reader.read(new, last=self.finish_reason is not None)
        self.text += text
        if stopped:
            self.finish_reason = "stop"


class Lane:
    """The running requests that take their steps together, and their caches."""

    def __init__(self, model: LanguageModel, rows: int, cycles: Cycles):
        most = model.config
        self.decoding: Decoding = model.open(rows, most.max_prompt_len, most.max_response_len, cycles)
        self.decode = (
            graphed(model) if self.decoding.cursor.device.type == "cuda" and cycles.halt is None else model.decode
        )
        self.running: list[Answer] = []
        """In the order of the caches' rows."""


class Engine:
    """A model that answers requests. A single thread calls its methods, within `with engine:`.

    rows: how many requests run at a time; of each cycle count, where each has caches of its own. The caches take memory for
    as many requests of the model's greatest lengths.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, rows: int = 64, mixed_precision: Precision = "none"):
        self.model, self.tokenizer, self.rows = model.eval(), tokenizer, rows
        self.device = next(model.parameters()).device
        # Autocast remembers the weights that it has cast until it ends. Graphs read these copies, so it lasts for all of them.
        self.precision = autocast(self.device, mixed_precision)
        self.waiting: deque[Answer] = deque()
        self.lanes: dict[Cycles | None, Lane] = {}

    def __enter__(self) -> "Engine":
        self.precision.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.precision.__exit__(*error)

    @property
    def running(self) -> int:
        return sum(len(lane.running) for lane in self.lanes.values())

    def add(self, request: Request) -> Answer:
        """Raises ValueError for a request that the model cannot take."""
        limits = self.model.config
        if not 0 < len(request.prompt) <= limits.max_prompt_len:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens; this model takes 1 to {limits.max_prompt_len}"
            )
        if not 0 < request.max_new_tokens <= limits.max_response_len:
            raise ValueError(f"{request.max_new_tokens} new tokens; this model gives 1 to {limits.max_response_len}")
        drawn = draws(request.seed, 0, request.max_new_tokens) if request.temperature > 0 else None
        answer = Answer(request, Reader(self.tokenizer, request.stop), drawn)
        self.waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        answer.finish_reason = answer.finish_reason or "cancelled"

    def clear(self) -> None:
        """Forgets all requests, and lets go of the caches: after a step that failed nobody knows what they hold."""
        self.waiting.clear()
        self.lanes.clear()

    @torch.inference_mode()
    @torch.compiler.set_stance("force_eager")
    def step(self) -> list[Answer]:
        """The next token of every request. Returns the answers that grew or ended."""
        changed: list[Answer] = []
        for lane in self.lanes.values():
            self._leave(lane)
            if lane.running:
                ids = torch.zeros(step_rows(len(lane.running), self.rows, self.device), dtype=torch.long)
                ids[: len(lane.running)] = torch.tensor([answer.tokens[-1].id for answer in lane.running])
                logits = lane.decode(ids.to(self.device), lane.decoding)
                self._extend(lane.running, logits[: len(lane.running)])
                changed += lane.running
        changed += self._join()
        for lane in self.lanes.values():
            self._leave(lane)
        return changed

    def _leave(self, lane: Lane) -> None:
        if ended := [row for row, answer in enumerate(lane.running) if answer.finish_reason]:
            lane.running = lane.decoding.drop(ended).of(lane.running)

    def _join(self) -> list[Answer]:
        """Reads prompts of requests that wait, in the order in which they came, as far as there is room."""
        joined: list[Answer] = []
        tokens, kept = 0, deque[Answer]()
        groups: dict[Cycles, list[Answer]] = {}
        room = {key: self.rows - len(lane.running) for key, lane in self.lanes.items()}
        while self.waiting:
            answer = self.waiting.popleft()
            if answer.finish_reason:
                joined.append(answer)  # it was cancelled
                continue
            key, size = self._lane_of(answer.request.cycles), len(answer.request.prompt)
            if tokens and tokens + size > PROMPT_TOKENS:
                kept.append(answer)
                break
            if room.setdefault(key, self.rows) == 0:
                kept.append(answer)
                continue
            room[key] -= 1
            tokens += size
            groups.setdefault(answer.request.cycles, []).append(answer)
        self.waiting.extendleft(reversed(kept))
        for cycles, answers in groups.items():
            key = self._lane_of(cycles)
            if key not in self.lanes:
                self.lanes[key] = Lane(self.model, self.rows, cycles)
            lane = self.lanes[key]
            lane.decoding.cycles = cycles
            answers.sort(key=lambda answer: len(answer.request.prompt))
            ids, lens = padded([answer.request.prompt for answer in answers], self.tokenizer.pad_id, self.device)
            logits = self.model.prefill(ids, lens, self.tokenizer.bos_id, lane.decoding)
            self._extend(answers, logits)
            lane.running += answers
            joined += answers
        return joined

    def _lane_of(self, cycles: Cycles) -> Cycles | None:
        return cycles if self.model.recurs_per_token else None

    def _extend(self, answers: list[Answer], logits: Tensor) -> None:
        """Gives each answer its next token. logits: (B, V)."""
        ids = logits.argmax(-1)
        alike: dict[tuple[float, int | None, float], dict[int, float]] = {}
        for row, answer in enumerate(answers):
            if answer.draws is not None:
                how = (answer.request.temperature, answer.request.top_k, answer.request.top_p)
                alike.setdefault(how, {})[row] = float(answer.draws[len(answer.tokens)])
        for how, uniforms in alike.items():
            rows = list(uniforms)
            ids[rows] = pick(logits[rows], *how, torch.tensor(list(uniforms.values())).to(self.device))
        tokens = [Token(token) for token in ids.tolist()]
        asked = [row for row, answer in enumerate(answers) if answer.request.logprobs is not None]
        if asked:
            logprobs = logits[asked].float().log_softmax(-1)
            own = logprobs.gather(1, ids[asked, None])[:, 0].tolist()
            most = max(answers[row].request.logprobs or 0 for row in asked)
            values, likeliest = (side.tolist() for side in logprobs.topk(min(most, logprobs.shape[1])))
            for i, row in enumerate(asked):
                pairs = list(zip(likeliest[i], values[i]))[: answers[row].request.logprobs]
                tokens[row] = Token(tokens[row].id, own[i], tuple(pairs))
        for answer, token in zip(answers, tokens):
            answer.append(token, self.tokenizer.eos_id)
