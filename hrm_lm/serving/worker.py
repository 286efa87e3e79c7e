"""The engine in a thread of its own, and what an event loop knows of it.

Work goes to the thread through a queue. After each step the thread tells the loop what has changed, in one call. What it
tells are values that nothing changes any more, so neither side waits for a lock of the other.
"""

import asyncio
import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch

from hrm_lm.config import Cycles
from hrm_lm.errors import UserError
from hrm_lm.inference.engine import Answer, Engine, Request
from hrm_lm.models.contract import Precision, autocast
from hrm_lm.serving.protocol import Model, Refused
from hrm_lm.training.plan import size

STUCK_S = 300.0
"""A step that takes so long will not end."""
MOST_FAILURES = 3
"""After so many steps in a row that failed, only another process helps."""


class State(NamedTuple):
    """How far an answer has come."""

    text: str = ""
    finish_reason: str | None = None


class Work:
    """Answers that are asked for together, as the event loop knows them."""

    def __init__(self, requests: Sequence[Request], streams: bool):
        self.requests, self.streams = requests, streams
        self.states = [State()] * len(requests)
        self.unfinished = len(requests)
        self.changed = asyncio.Event()
        """Something is new: with `streams` a state, otherwise the last state. Or there is a failure."""
        self.failure: Exception | None = None
        self.began = time.monotonic()
        self.first_token: float | None = None
        """When the first token of all came."""
        self.answers: list[Answer] = []
        """The thread's. What others may read of them are tokens that belong to a text of `states`."""


class Worker:
    """Runs an engine. The methods without an underscore are for the event loop's thread.

    most_waiting: how many answers may wait for a place among those that run.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, most_waiting: int):
        self.engine, self.loop = engine, loop
        self.most = engine.rows + most_waiting
        self.unfinished = 0
        """Answers that run or wait."""
        self.step_began: float | None = None
        self.failures = 0
        """Of the last steps in a row."""
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._owners: dict[Answer, tuple[Work, int]] = {}
        """The thread's: whose answers the engine has."""
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], streams: bool) -> Work:
        """Raises Refused where too much waits already."""
        if self.unfinished + len(requests) > self.most:
            raise Refused(429, f"{self.unfinished} answers run or wait already; try again later")
        work = Work(requests, streams)
        self.unfinished += work.unfinished
        self._inbox.put(partial(self._add, work))
        return work

    def cancel(self, work: Work) -> None:
        """Nobody wants what has not come of the answers."""
        if work.unfinished:
            self.unfinished -= work.unfinished
            work.unfinished = 0
            self._inbox.put(partial(self._cancel, work))

    async def warm_up(self, model: Model) -> None:
        """Lets the engine answer once with each count of cycles that `reasoning_effort` chooses, which takes the memory that
        it will need. Raises what it failed with.
        """
        for h in sorted({model.cycles.h, *model.efforts.values()}):
            cycles = Cycles(h, model.cycles.l)
            request = Request(
                prompt=[model.tokenizer.eos_id], cycles=cycles, max_new_tokens=min(2, model.limits.max_response_len)
            )
            work = self.submit([request], streams=False)
            await work.changed.wait()
            if work.failure:
                raise work.failure

    def check(self) -> None:
        """Raises RuntimeError where the engine will answer no more."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")
        if self.failures >= MOST_FAILURES:
            raise RuntimeError(f"the engine's last {self.failures} steps failed")
        began = self.step_began
        if began is not None and time.monotonic() - began > STUCK_S:
            raise RuntimeError(f"a step of the engine takes more than {STUCK_S:.0f} s")

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _hear(self, changes: list[tuple[Work, int, State]]) -> None:
        for work, row, state in changes:
            work.states[row] = state
            if state.finish_reason and work.unfinished:
                work.unfinished -= 1
                self.unfinished -= 1
            if work.streams or not work.unfinished:
                work.changed.set()

    def _hear_failure(self, works: set[Work], failure: Exception) -> None:
        for work in works:
            self.unfinished -= work.unfinished
            work.unfinished, work.failure = 0, failure
            work.changed.set()

    # --- in the thread ---

    def _run(self) -> None:
        with self.engine:
            while True:
                try:
                    if not self._take_orders():
                        return
                    self.step_began = time.monotonic()
                    self._tell(self.engine.step())
                    self.failures = 0
                except Exception as failure:
                    traceback.print_exc()
                    self.failures += 1
                    self._fail(failure)
                finally:
                    self.step_began = None

    def _take_orders(self) -> bool:
        """Carries out what has come, and waits for it where the engine has nothing to do. False: the thread is to end."""
        try:
            order = self._inbox.get(block=not (self.engine.running or self.engine.waiting))
            while order:
                order()
                order = self._inbox.get_nowait()
            return False
        except Empty:
            return True

    def _add(self, work: Work) -> None:
        try:
            for row, request in enumerate(work.requests):
                answer = self.engine.add(request)
                work.answers.append(answer)
                self._owners[answer] = work, row
        except Exception as failure:  # what `protocol` has let through fails alone
            traceback.print_exc()
            self._cancel(work)
            self.loop.call_soon_threadsafe(self._hear_failure, {work}, failure)

    def _cancel(self, work: Work) -> None:
        for answer in work.answers:
            self.engine.cancel(answer)
            self._owners.pop(answer, None)

    def _tell(self, answers: list[Answer]) -> None:
        changes, now = [], time.monotonic()
        for answer in answers:
            if answer not in self._owners:  # it was cancelled
                continue
            work, row = self._owners[answer]
            if work.first_token is None:
                work.first_token = now
            if answer.finish_reason:
                del self._owners[answer]
            if work.streams or answer.finish_reason:
                changes.append((work, row, State(answer.text, answer.finish_reason)))
        if changes:
            self.loop.call_soon_threadsafe(self._hear, changes)

    def _fail(self, failure: Exception) -> None:
        """What the engine holds is lost: nobody knows how far the step went."""
        works = {work for work, _ in self._owners.values()}
        self._owners.clear()
        self.engine.clear()
        self.loop.call_soon_threadsafe(self._hear_failure, works, failure)


@torch.inference_mode()
def check_memory(served: Model, slots: int, mixed_precision: Precision) -> None:
    """Raises UserError where the caches of all slots will not fit. They are taken for the greatest lengths, and where the
    model recurs for every token for each count of cycles that `reasoning_effort` chooses.
    """
    model, limits, each = served.model, served.limits, 0
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
