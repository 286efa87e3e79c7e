"""An engine that runs apart from the event loop, which orders answers over a connection and hears what has come of them.

It has a process of its own: between two operations of a model a thread of PyTorch must get Python's lock back, for which it
would wait whenever the event loop's thread has something to do. Measured on two cores with 64 clients, a process that did
both used one of them.
"""

import math
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple, TypeAlias

import torch

from hrm_lm.config import Cycles
from hrm_lm.errors import UserError
from hrm_lm.filesystem import local_copy
from hrm_lm.inference.engine import Answer, Engine, Request, Token
from hrm_lm.models.contract import LanguageModel, Precision, autocast
from hrm_lm.serving.plan import Settings
from hrm_lm.serving.protocol import Model
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.plan import size

# --- what is said over the connection ---


class Order(NamedTuple):
    """Answers that are wanted together."""

    work: int
    """A number that tells it apart."""
    requests: Sequence[Request]
    streams: bool
    """Whether to tell of each token, or once an answer has ended."""


class Cancel(NamedTuple):
    """Nobody wants what has not come of the answers."""

    work: int


Orders: TypeAlias = Order | Cancel | None
"""None: the engine is to end. After each order there is a `Step`, or a `Failure` of a step."""


class News(NamedTuple):
    """What has come of an answer since the last news of it."""

    work: int
    row: int
    """Which of the order's requests it answers."""
    text: str
    tokens: int
    """So many, without EOS."""
    logprobs: Sequence[tuple[Token, int]]
    """Those of the tokens that belong to the text so far, and where each begins in it; where the request asked for that."""
    finish_reason: str | None


class Step(NamedTuple):
    """A step of the engine has ended."""

    orders: int
    """So many were carried out so far."""
    running: int
    """Answers that the engine gives now."""
    is_idle: bool
    """Whether the engine has nothing to do before the next order."""
    tokens: int
    """Of all answers, that are new."""
    begun: Sequence[int]
    """Works whose first token this step gave."""
    news: Sequence[News]


class Failure(NamedTuple):
    """The answers to these orders are lost."""

    orders: int
    """See `Step`."""
    works: Sequence[int]
    reason: str
    of_step: bool
    """Whether a step failed, and the engine has nothing to do now; otherwise the engine did not take the order."""


# --- the engine's side ---


class Held:
    """An order whose answers the engine has."""

    def __init__(self, order: Order):
        self.order = order
        self.answers: list[Answer] = []
        self.unfinished = len(order.requests)
        self.has_begun = False


@dataclass
class Told:
    """What the other side knows of an answer."""

    held: Held
    row: int
    tokens: int = 0
    characters: int = 0
    logprobs: int = 0


class Host:
    """Runs an engine as told over a connection."""

    def __init__(self, engine: Engine, connection: Connection):
        self.engine, self.connection = engine, connection
        self.orders = 0
        """How many were carried out."""
        self._inbox: SimpleQueue[Orders] = SimpleQueue()
        self._held: dict[int, Held] = {}
        self._told: dict[Answer, Told] = {}

    def run(self) -> None:
        """Until it is told to end, or the other side has gone."""
        # It takes what comes while the engine makes a step, so that the other side never waits until it can send.
        Thread(target=self._listen, name="orders", daemon=True).start()
        with self.engine:
            while True:
                try:
                    if not self._take_orders():
                        return
                    self._tell(self.engine.step())
                except Exception as failure:
                    traceback.print_exc()
                    self._fail(failure)

    def _listen(self) -> None:
        try:
            while (order := self.connection.recv()) is not None:
                self._inbox.put(order)
        except (EOFError, OSError):
            pass  # the other side has gone
        finally:
            self._inbox.put(None)

    def _say(self, what: Step | Failure) -> None:
        with suppress(OSError):  # where the other side has gone, `_listen` ends the engine
            self.connection.send(what)

    def _take_orders(self) -> bool:
        """Carries out what has come, and waits for it where the engine has nothing to do. False: it is to end."""
        try:
            order = self._inbox.get(block=not (self.engine.running or self.engine.waiting))
            while order:
                self.orders += 1
                if isinstance(order, Order):
                    self._add(order)
                elif held := self._held.pop(order.work, None):
                    self._drop(held)
                order = self._inbox.get_nowait()
            return False
        except Empty:
            return True

    def _add(self, order: Order) -> None:
        held = self._held[order.work] = Held(order)
        try:
            for row, request in enumerate(order.requests):
                answer = self.engine.add(request)
                held.answers.append(answer)
                self._told[answer] = Told(held, row)
        except Exception as failure:  # what `protocol` has let through fails alone
            traceback.print_exc()
            self._drop(self._held.pop(order.work))
            self._say(Failure(self.orders, [order.work], explained(failure), of_step=False))

    def _drop(self, held: Held) -> None:
        for answer in held.answers:
            self.engine.cancel(answer)
            self._told.pop(answer, None)

    def _tell(self, answers: list[Answer]) -> None:
        news: list[News] = []
        begun: list[int] = []
        new_tokens = 0
        for answer in answers:
            if (told := self._told.get(answer)) is None:  # it was cancelled
                continue
            held, tokens = told.held, len(answer.tokens)
            if not held.has_begun:
                held.has_begun = True
                begun.append(held.order.work)
            new_tokens += tokens - told.tokens
            told.tokens = tokens
            if not (held.order.streams or answer.finish_reason):
                continue
            fresh: list[tuple[Token, int]] = []
            if answer.request.logprobs is not None:
                pairs = zip(answer.tokens[told.logprobs :], answer.offsets[told.logprobs :])
                fresh = [(token, offset) for token, offset in pairs if offset < len(answer.text)]
            text = answer.text[told.characters :]
            news.append(News(held.order.work, told.row, text, tokens, fresh, answer.finish_reason))
            told.characters, told.logprobs = len(answer.text), told.logprobs + len(fresh)
            if answer.finish_reason:
                del self._told[answer]
                held.unfinished -= 1
                if not held.unfinished:
                    del self._held[held.order.work]
        is_idle = not (self.engine.running or self.engine.waiting)
        self._say(Step(self.orders, self.engine.running, is_idle, new_tokens, begun, news))

    def _fail(self, failure: Exception) -> None:
        """What the engine holds is lost: nobody knows how far the step went."""
        works = list(self._held)
        self._held.clear()
        self._told.clear()
        self.engine.clear()
        self._say(Failure(self.orders, works, explained(failure), of_step=True))


def explained(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def host_engine(settings: Settings, connection: Connection) -> None:
    """The process of a replica's engine. First it says what is served, a `Model`, or why it cannot be, an exception."""
    # It may wait for storage, or for a step that hangs: nothing else ends it with its replica.
    Thread(target=end_with_parent, daemon=True).start()
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with local_copy(settings.checkpoint, settings.fs) as folder:
            model, tokenizer, checkpoint = load_model(folder, device)
        sampled = checkpoint.config.train.sample_h_cycles
        served = Model(settings.name, model.config, model.recurs_per_token, tokenizer, settings.cycles, sampled)
        check_memory(model, served, settings.slots, settings.mixed_precision)
        engine = Engine(model, tokenizer, settings.slots, settings.mixed_precision)
    except UserError as error:
        connection.send(error)
        return
    except Exception as error:
        traceback.print_exc()  # which does not go over a connection
        connection.send(RuntimeError(explained(error)))
        return
    connection.send(served)
    Host(engine, connection).run()


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


@torch.inference_mode()
def check_memory(model: LanguageModel, served: Model, slots: int, mixed_precision: Precision) -> None:
    """Raises UserError where the caches of all slots will not fit. They are taken for the greatest lengths, and where the
    model recurs for every token for each count of cycles that `reasoning_effort` chooses.
    """
    limits, each = served.limits, 0
    device = next(model.parameters()).device
    counts = set(served.efforts.values()) if model.recurs_per_token else set()
    for h in counts | {served.cycles.h}:
        decoding = model.open(1, limits.max_prompt_len, limits.max_response_len, Cycles(h, served.cycles.l))
        prompt = torch.tensor([[served.tokenizer.eos_id]], device=device)
        with autocast(device, mixed_precision):
            model.prefill(prompt, [1], served.tokenizer.bos_id, decoding)
        caches = [cache for some in decoding.caches for cache in some] + decoding.memory
        each += sum(kept.nbytes for cache in caches for kept in (cache.k, cache.v))
    free = free_memory(device)
    if slots * each > free:
        raise UserError(
            f"--slots {slots}: their caches take {size(slots * each)}, and {size(free)} of memory are free; "
            f"--slots {max(int(0.8 * free / each), 1)} fits"
        )


def free_memory(device: torch.device) -> float:
    """Bytes that a device, or the machine, can still give; infinity where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * float(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return math.inf
