"""An engine that runs apart from the event loop, which orders answers over a connection and hears what has come of them.

It has a process of its own. Between two operations of a model a thread of PyTorch must get Python's lock back, and it would wait
for that lock whenever the event loop has something to do. A process that did both used one core of two with 64 clients.
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
    """Asks for answers that are wanted together."""

    work: int
    """A number that no other order has."""
    requests: Sequence[Request]
    streams: bool
    """Whether the other side hears of each token; otherwise it hears of an answer once that has ended."""


class Cancel(NamedTuple):
    """Says that nobody wants the rest of an order's answers."""

    work: int


AnyOrder: TypeAlias = Order | Cancel
"""A `Step` or a `Failure` of a step follows each of them."""


class News(NamedTuple):
    """Tells what has come of an answer since the last news of it."""

    work: int
    row: int
    """Which of the order's requests it answers."""
    text: str
    tokens: int
    """How many tokens the answer has by now, without EOS."""
    logprobs: Sequence[tuple[Token, int]]
    """The new tokens that belong to the text so far, and where each begins in it. It is empty unless the request asked for
    log-probabilities."""
    finish_reason: str | None


class Step(NamedTuple):
    """Tells that a step of the engine has ended."""

    orders: int
    """How many orders the engine has carried out so far."""
    running: int
    """How many answers the engine gives now."""
    is_idle: bool
    """Whether the engine has nothing to do before the next order."""
    tokens: int
    """How many tokens this step gave to all answers together."""
    begun: Sequence[int]
    """The works whose first token this step gave."""
    news: Sequence[News]


class Failure(NamedTuple):
    """Tells that the answers to some orders are lost."""

    orders: int
    """See `Step`."""
    works: Sequence[int]
    reason: str
    of_step: bool
    """Whether a step failed, after which the engine has nothing to do; otherwise the engine did not take the order."""


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
        """How many it has carried out."""
        self._inbox: SimpleQueue[AnyOrder | None] = SimpleQueue()
        """None: the other side has gone."""
        self._held: dict[int, Held] = {}
        self._told: dict[Answer, Told] = {}

    def run(self) -> None:
        """Runs the engine until the other side has gone."""
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
            while True:
                self._inbox.put(self.connection.recv())
        except (EOFError, OSError):
            pass
        finally:
            self._inbox.put(None)

    def _say(self, what: Step | Failure) -> None:
        with suppress(OSError):  # where the other side has gone, `_listen` ends the engine
            self.connection.send(what)

    def _take_orders(self) -> bool:
        """Carries out what has come, and waits for it where the engine has nothing to do. False: nobody orders any more."""
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
        """Gives up what the engine holds, because nobody knows how far the step went."""
        works = list(self._held)
        self._held.clear()
        self._told.clear()
        self.engine.clear()
        self._say(Failure(self.orders, works, explained(failure), of_step=True))


def explained(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def host_engine(settings: Settings, connection: Connection) -> None:
    """Is a replica's engine process. First it sends what is served, a `Model`, or the exception that says why nothing is."""
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
