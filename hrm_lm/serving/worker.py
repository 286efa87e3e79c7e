"""What an event loop knows of an engine that runs elsewhere (`hrm_lm.serving.host`)."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from hrm_lm.config import Cycles
from hrm_lm.inference.engine import Request, Token
from hrm_lm.serving.host import AnyOrder, Cancel, Failure, News, Order, Step
from hrm_lm.serving.protocol import Model, Refused

STUCK_S = 300.0
"""A step that takes so long will not end."""
MOST_FAILURES = 3
"""After so many steps in a row that failed, only another process helps."""


@dataclass
class State:
    """How far an answer has come."""

    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    logprobs: list[tuple[Token, int]] = field(default_factory=list)
    """See `hrm_lm.serving.host.News`."""


class Work:
    """Answers that are asked for together."""

    def __init__(self, requests: Sequence[Request], streams: bool):
        self.requests, self.streams = requests, streams
        self.states = [State() for _ in requests]
        self.unfinished = len(requests)
        self.changed = asyncio.Event()
        """Something is new: with `streams` a state, otherwise the last state. Or there is a failure."""
        self.failure: str | None = None
        self.began = time.monotonic()
        self.first_token: float | None = None
        """When the first token of all came."""

    def hear(self, news: News) -> None:
        state = self.states[news.row]
        state.text += news.text
        state.tokens, state.finish_reason = news.tokens, news.finish_reason
        state.logprobs += news.logprobs


class Worker:
    """Orders answers of an engine and hears what comes of them. An event loop makes it and calls it.

    connection: leads to the engine. rows: how many answers the engine gives at a time. most_waiting: how many may wait beyond
    that. lost: is called once the engine's process has ended by itself.
    """

    def __init__(self, connection: Connection, rows: int, most_waiting: int, lost: Callable[[], None]):
        self.connection, self.lost, self.loop = connection, lost, asyncio.get_running_loop()
        self.most = rows + most_waiting
        self.unfinished = 0
        """Answers that run or wait."""
        self.running = 0
        self.tokens = 0
        """Of all answers so far, given up ones among them."""
        self.failures = 0
        """Of the last steps in a row."""
        self._works: dict[int, Work] = {}
        self._orders = 0
        """How many orders the engine was given."""
        self._owes_since: float | None = None
        """When the engine last said something, or got something to do; None where it has nothing to do."""
        self.loop.add_reader(connection.fileno(), self._hear)

    def submit(self, requests: Sequence[Request], streams: bool) -> Work:
        """Raises Refused where too much waits already."""
        if self.unfinished + len(requests) > self.most:
            raise Refused(429, f"{self.unfinished} answers run or wait already; try again later")
        work, number = Work(requests, streams), self._orders
        self._send(Order(number, requests, streams))
        self._works[number] = work
        self.unfinished += work.unfinished
        return work

    def cancel(self, work: Work) -> None:
        """Gives up what has not come of the answers."""
        if work.unfinished:
            number = next(number for number, each in self._works.items() if each is work)
            self._forget(number)
            self._send(Cancel(number))

    async def warm_up(self, model: Model) -> None:
        """Lets the engine answer once with each count of cycles that `reasoning_effort` chooses, which takes the memory that
        it will need. Raises RuntimeError with what it failed with.
        """
        for h in sorted({model.cycles.h, *model.efforts.values()}):
            cycles = Cycles(h, model.cycles.l)
            request = Request(
                prompt=[model.tokenizer.eos_id], cycles=cycles, max_new_tokens=min(2, model.limits.max_response_len)
            )
            work = self.submit([request], streams=False)
            await work.changed.wait()
            if work.failure is not None:
                raise RuntimeError(work.failure)

    def check(self) -> None:
        """Raises RuntimeError where the engine will answer no more."""
        if self.failures >= MOST_FAILURES:
            raise RuntimeError(f"the engine's last {self.failures} steps failed")
        if self._owes_since is not None and time.monotonic() - self._owes_since > STUCK_S:
            raise RuntimeError(f"a step of the engine takes more than {STUCK_S:.0f} s")

    def close(self) -> None:
        """Lets the engine end, once it has made its step."""
        self.loop.remove_reader(self.connection.fileno())
        self.connection.close()

    def _send(self, order: AnyOrder) -> None:
        self._orders += 1
        self._owes_since = self._owes_since or time.monotonic()
        with suppress(OSError):  # `_hear` learns that the engine has gone
            self.connection.send(order)

    def _hear(self) -> None:
        try:
            said: Step | Failure = self.connection.recv()
        except (EOFError, OSError):
            self.loop.remove_reader(self.connection.fileno())
            self.lost()
            return
        now = time.monotonic()
        if isinstance(said, Failure):
            self._owes_since = None if said.of_step and said.orders == self._orders else now
            if said.of_step:
                self.failures, self.running = self.failures + 1, 0
            self._fail(said.works, said.reason)
            return
        self._owes_since = None if said.is_idle and said.orders == self._orders else now
        self.failures, self.running = 0, said.running
        self.tokens += said.tokens
        for number in said.begun:
            if number in self._works:
                self._works[number].first_token = now
        for news in said.news:
            if news.work not in self._works:  # it was cancelled
                continue
            work = self._works[news.work]
            work.hear(news)
            if news.finish_reason:
                work.unfinished -= 1
                self.unfinished -= 1
                if not work.unfinished:
                    del self._works[news.work]
            if work.streams or not work.unfinished:
                work.changed.set()

    def _fail(self, works: Sequence[int], reason: str) -> None:
        for number in works:
            if number in self._works:
                work = self._forget(number)
                work.failure = reason
                work.changed.set()

    def _forget(self, number: int) -> Work:
        work = self._works.pop(number)
        self.unfinished -= work.unfinished
        work.unfinished = 0
        return work
