"""Nodes that are about to go: all workers learn of them at the same step. And how far a run had come before its workers
were started again.

`ray.train.get_preemption_info` costs a round trip between the workers at each look, and every worker must look at the
same steps. So rank 0 tells the others two things in one round trip: whether a node is about to go, and at which step
they look next. It chooses that step by the clock. The workers' processes meet here, and no GPU is waited for.
"""

import threading
import time
from contextlib import suppress

import pyarrow.fs
import ray.train.collective

from hrm_lm.cluster import ray_private

PERIOD = 1.0
"""Seconds between looks, at the least. Ray itself asks every 5 s whether a node is about to go."""
SHARE = 0.0025
"""Of the time that goes into looks, at most."""
MEMORY = 0.9
"""How much of the steps' duration up to a look still counts at the next look."""


class Preempted(Exception):
    """A node is about to go, and the run's state is saved. The workers are to start again elsewhere."""


class Lookout:
    """Tells after which step a worker's node is about to go: the same step on all workers."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self._signal = ray_private.PreemptionSignal()
        self._seen = 0  # the last step that `sees` was told of
        self._restart()
        self._round_trip = float("inf")  # in seconds: the shortest, which waited least for the other workers

    def _restart(self) -> None:
        self._next = 0  # the step after which to look
        self._last: tuple[int, float] | None = None  # step and time of the last look
        self._steps = self._seconds = 0.0  # between looks; older ones count less

    def sees(self, step: int) -> bool:
        """Whether the run is to stop after `step`. To be asked after every step."""
        if self.world_size == 1:
            return self._signal.is_set()
        if step <= self._seen:  # the run went back (`train.on_nonfinite: rollback`), as it did on all workers
            self._restart()
        self._seen = step
        if step < self._next:
            return False
        plan = (self._signal.is_set(), self._next_look(step)) if self.rank == 0 else None
        start = time.monotonic()
        announced, self._next = ray.train.collective.broadcast_from_rank_zero(plan)
        self._round_trip = min(self._round_trip, time.monotonic() - start)
        return announced

    def _next_look(self, step: int) -> int:
        """The step of the look that follows the look after `step`.

        Where a GPU lags behind, some steps seem to take no time. So the time between looks at most doubles.
        """
        now, last = time.monotonic(), self._last
        self._last = step, now
        if last is None:
            return step + 1
        self._steps = MEMORY * self._steps + step - last[0]
        self._seconds = MEMORY * self._seconds + now - last[1]
        due = max(PERIOD, self._round_trip / SHARE) * self._steps / max(self._seconds, 1e-9)
        return step + max(1, min(int(due), 2 * (step - last[0])))


class Reached:
    """How many steps a run has taken, kept in its folder: checkpoints do not tell which steps were lost.

    A thread writes the file, so that no step waits for storage. What died in a second has counted all but its last steps.
    """

    def __init__(self, fs: pyarrow.fs.FileSystem, folder: str):
        self._fs, self._path = fs, f"{folder}/.reached"
        self._period = 1 if isinstance(fs, pyarrow.fs.LocalFileSystem) else 2  # seconds
        self.before, self.exact = 0, False
        """How many steps were taken before the workers started again, at least, and whether this count is exact."""
        with suppress(OSError, ValueError), fs.open_input_stream(self._path) as stream:
            count, *end = stream.read().decode().split()
            self.before, self.exact = int(count), end == ["end"]
        self.step = self._written = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="reached", daemon=True)
        self._thread.start()

    def repeated(self, step: int) -> str:
        """Tells how many steps a run repeats that goes on with this step."""
        again = max(self.before - step + 1, 0)
        return f"{again} steps are repeated" if self.exact else f"at least {again} steps are repeated"

    def _keep(self) -> None:
        while not self._closed.wait(self._period):
            if self.step != self._written:
                self._write()
        if self.step:
            self._write(" end")

    def _write(self, end: str = "") -> None:
        step = self.step
        with suppress(OSError), self._fs.open_output_stream(self._path, compression=None) as stream:
            stream.write(f"{step}{end}".encode())
            self._written = step

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=30)  # storage may be away
