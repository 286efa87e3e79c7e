"""A worker that hangs is noticed, tells where it stands, and ends.

Ray looks only whether a worker's process answers. A process whose training thread waits for ever, in a collective or for
storage, answers all the same.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ray.train.torch import TorchConfig

from hrm_lm.cluster.start import say

START = 4
"""How many times as long the start may take, up to the end of the first step: it reads, compiles and waits for others."""
LAST_WORDS = 10.0
"""Seconds that a worker's process lives on, in which Ray fetches the reason."""
STDERR = 2


class Hung(Exception):
    """A worker made no progress for `ray.hang_timeout` seconds."""


def process_group(timeout: float) -> TorchConfig:
    """PyTorch's own limit on a collective, in which a worker may wait for the start of another: longer than the watchdog's."""
    return TorchConfig(timeout_s=max(TorchConfig.timeout_s, int((START + 1) * timeout)))


class Watchdog:
    """Watches the thread that makes it. `alive` costs a reading of the clock.

    timeout: seconds; 0 watches nothing. hung: what to tell before the process ends.
    """

    def __init__(self, timeout: float, rank: int, hung: Callable[[Hung], None]):
        self.timeout, self.rank, self.hung = timeout, rank, hung
        self.step = 0
        """The last step that was taken."""
        self._watched = threading.get_ident()
        self._alive = time.monotonic()
        self._limit = START * timeout
        self._closed = threading.Event()
        if timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, step: int | None = None) -> None:
        """The loop has got on: it has taken `step`, or is in the midst of something else."""
        self._alive = time.monotonic()
        if step is not None:
            self.step, self._limit = step, self.timeout

    def hangs(self) -> bool:
        return time.monotonic() - self._alive >= self._limit

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self.timeout / 10, 1)):
            if not self.hangs():
                continue
            still = time.monotonic() - self._alive
            faulthandler.dump_traceback(STDERR, all_threads=True)
            after = f"after step {self.step}" if self.step else "in its first step, or before it"
            error = Hung(f"no progress for {still:.0f} s {after}; it stands in {place(self._watched)}")
            say(f"worker {self.rank}: {error}; see its stack above")
            # The other workers hang, too, and Ray ends all of them once it hears of the first.
            time.sleep(min(self.timeout / 2, 5))
            self.hung(error)
            time.sleep(LAST_WORDS)
            os._exit(1)  # a thread that hangs cannot be ended otherwise


def place(thread: int) -> str:
    """Where a thread stands: its innermost function of this project or of torch.distributed, with file and line.

    Where the thread waits for a batch, that is the place of the thread that makes batches.
    """
    frames = sys._current_frames()
    frame = _innermost(frames[thread])
    if frame.f_code.co_name == "prefetch":
        makers = [other.ident for other in threading.enumerate() if other.name == "prefetch"]
        if makers and makers[-1] in frames:  # the latest: while it validates, the training batches wait
            frame = _innermost(frames[makers[-1]])
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _innermost(frame: FrameType) -> FrameType:
    """The innermost frame whose place means something to a user; the very innermost where there is none."""
    known: FrameType | None = frame
    while known is not None:
        module = known.f_globals.get("__name__", "")
        if module.startswith(("hrm_lm.", "torch.distributed.")):
            return known
        known = known.f_back
    return frame
