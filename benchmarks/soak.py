"""A run that is disturbed until the minutes are up, against one that is left alone: are the weights the same, bit for bit?

    python benchmarks/soak.py --minutes 10 [--seed 0] [--set PATH=VALUE ...] [--output soak.json]

`python -m ray_jobs.train` trains the default config with two workers, on a cluster of three raylets: a head without CPUs,
where the command and Ray Train's controller are, and two nodes of a CPU each. Checkpoints go to an S3 endpoint, moto in a
process of its own, through a proxy. The seed decides what is disturbed, and after which pause. These are killed by SIGKILL:

    worker      a process that trains
    raylet      the raylet of a worker's node; another node comes within ten seconds
    node        the raylet with all processes of its node; likewise
    controller  the process in which Ray Train looks after the workers. Then the command fails, and is given again
    driver      the command, which is given again. Sometimes a file of the last checkpoint is damaged meanwhile: a bit of it
                flips, its end is lost, or it vanishes. Then the run has to go on from the checkpoint before
    storage     not a process: for 5 to 25 s the proxy cuts and refuses connections, or lets them hang, or answers
                "503 Slow Down"

The next disturbance comes some seconds after the run got on again, or in three of ten cases before that. At the end the
command is given with the number of steps that the run has almost reached, and then once more under another name, for a run
that nothing disturbs.

Exit code 0: the files of weights and of the optimizer's state are the same in both runs' last checkpoints, byte for byte. And
no restart went back behind the last checkpoint of Ray Train's list, which is what a run has reported as saved, but for those
that were damaged. Ends all that it started, also at Ctrl-C.
"""

import argparse
import asyncio
import json
import os
import random
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs

from hrm_lm.cluster.ray_private import SNAPSHOT
from hrm_lm.cluster.start import free_port
from hrm_lm.filesystem import read_bytes

MARK = "HRM_LM_SOAK"
"""In the environment of every process that is started here."""
BUCKET = "soak"
ROUND = ("worker", "worker", "raylet", "node", "storage", "storage", "controller", "driver")
PATIENCE = 600
"""Seconds without a new step after which a run counts as hung."""
EVERY = 50
"""Steps between checkpoints."""
MANY = 10**9
"""Steps that no run of these reaches."""
T = TypeVar("T")


class Failed(Exception):
    """The run did what it must not do."""


def wait_until(condition: Callable[[], T], what: str) -> T:
    """What `condition` then gives."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {PATIENCE} s")
        time.sleep(0.1)
    return value


def processes(name: str = "") -> list[int]:
    """The ids of the processes that were started here and whose command line contains `name`."""

    def is_ours(process: Path) -> bool:
        try:
            return mark in (process / "environ").read_bytes() and name.encode() in (process / "cmdline").read_bytes()
        except OSError:  # it ended, or is another user's
            return False

    mark = f"{MARK}={os.environ[MARK]}".encode()
    pids = [int(process.name) for process in Path("/proc").glob("[0-9]*") if is_ours(process)]
    return [pid for pid in pids if pid != os.getpid()]


def children(pid: int) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(process.name))
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} --- {line}", file=sys.stderr, flush=True)


class Storage:
    """moto, and the proxy through which the run reaches it. `fs` goes past the proxy."""

    def __init__(self) -> None:
        self.behind = free_port()
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(self.behind)]
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers, "moto")
        self.port = free_port()
        self.fs, _ = pyarrow.fs.FileSystem.from_uri(self.uri(self.behind))
        self.fs.create_dir(BUCKET)
        self._loop = asyncio.new_event_loop()
        self._is_up = asyncio.Event()
        self._throttles = False
        self._open: set[asyncio.Task] = set()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.heal()

    def uri(self, port: int) -> str:
        return f"s3://key:secret@{BUCKET}/runs?scheme=http&endpoint_override=127.0.0.1:{port}&allow_bucket_creation=true&region=us-east-1"

    def fail(self, how: str) -> None:
        self._call(self._fail(how))

    def heal(self) -> None:
        self._call(self._heal())

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.behind)):
            return True
        return False

    def _call(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _fail(self, how: str) -> None:
        if how == "hangs":
            self._is_up.clear()
            return
        self._throttles = how == "throttles"
        if how == "refuses":
            self._server.close()
        for connection in self._open:
            connection.cancel()

    async def _heal(self) -> None:
        self._throttles = False
        self._is_up.set()
        if not (hasattr(self, "_server") and self._server.is_serving()):
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task, ends = asyncio.current_task(), [to_client]
        assert task
        self._open.add(task)
        try:
            if self._throttles:
                await client.readuntil(b"\r\n\r\n")
                body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                to_client.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n")
                to_client.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                await to_client.drain()
                return
            server, to_server = await asyncio.open_connection("127.0.0.1", self.behind)
            ends.append(to_server)
            await asyncio.gather(self._pass_on(client, to_server), self._pass_on(server, to_client))
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            for end in ends:
                end.transport.abort() if task.cancelling() else end.close()

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            await self._is_up.wait()
            sink.write(data)
            await sink.drain()
        sink.close()


@dataclass
class Kill:
    kind: str
    saved: int
    """The step of the last checkpoint that was reported as saved."""
    workers: frozenset[int] = frozenset()
    """The processes that had trained before."""
    at: float = field(default_factory=time.monotonic)
    """When it was; of storage, when it was back."""
    took: float | None = None
    """Seconds until the next new step; of storage, until the next saved checkpoint."""


class Run:
    """A run of `ray_jobs.train` over all its commands, and what their output tells of it."""

    def __init__(self, name: str, storage: Storage, overrides: list[str]):
        self.name, self.storage, self.overrides = name, storage, overrides
        self.step = self.last = self.resumed_from = 0
        """The furthest step; the last one; the one that the last restart began with."""
        self.commands = self.attempts = self.tracebacks = 0
        self.repeated: list[int] = []
        """Steps, of each restart, as the lines of the steps show them."""
        self.told: list[int] = []
        """Likewise, as the restart says."""
        self.workers: set[int] = set()
        self.kills: list[Kill] = []
        self.lost: list[str] = []

    def start(self, steps: int) -> None:
        fields = [
            "optim.schedule=constant",
            f"train.checkpoint_every={EVERY}",
            "train.log_every=5",
            "ray.max_failures=-1",
        ]
        command = [sys.executable, "-m", "ray_jobs.train", "--dataset", "synthetic", "--num_workers", "2"]
        command += ["--steps", str(steps), "--run_name", self.name, "--save_dir", self.storage.uri(self.storage.port)]
        command += [word for item in fields + self.overrides for word in ("--set", item)]
        self.commands += 1
        self.command = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read, args=[self.command.stdout], daemon=True)
        self._reader.start()

    def wait(self, condition: Callable[[], T], what: str) -> T:
        """`wait_until`, which raises Failed where the command ends meanwhile."""

        def unless_ended() -> T:
            if not (value := condition()) and self.command.poll() is not None:
                raise Failed(f"the command ended with code {self.command.returncode}, unasked")
            return value

        return wait_until(unless_ended, what)

    def end(self, code: int) -> None:
        """Waits until the command ends, for as long as the run gets on. Raises Failed where its exit code is another one."""
        while self.command.poll() is None:
            last = self.step
            wait_until(lambda: self.command.poll() is not None or self.step > last, "a new step, or the command's end")
        self._reader.join()
        if self.command.returncode != code:
            raise Failed(f"the command ended with code {self.command.returncode}, not {code}")

    def saved(self) -> list[tuple[int, str]]:
        """The run's list of its checkpoints: step and folder of each, the last one last."""
        try:
            with self.storage.fs.open_input_file(f"{BUCKET}/runs/{self.name}/{SNAPSHOT}") as file:
                state = json.loads(file.read())
        except FileNotFoundError:
            return []
        except (OSError, ValueError):  # it was written anew between asking for its size and reading it
            return self.saved()
        last = state["latest_checkpoint_result"]
        items = [*(item for item in state["checkpoint_results"] if item != last), last]
        return [(item["metrics"]["step"], f"{BUCKET}/runs/{self.name}/{item['checkpoint_dir_name']}") for item in items]

    def tensors(self) -> dict[str, bytes]:
        """The files of the last checkpoint with tensors, by name."""
        (_, folder), fs = self.saved()[-1], self.storage.fs
        files = fs.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True))
        paths = [file.path for file in files if file.path.endswith(".safetensors")]
        return {path.removeprefix(folder): read_bytes(fs, path) for path in paths}

    def _read(self, lines: Iterator[str]) -> None:
        for line in lines:
            print(time.strftime("%H:%M:%S"), line, end="", file=sys.stderr, flush=True)
            self.tracebacks += "Traceback (most recent" in line
            self.attempts += bool(re.search(r"attempt \d+ starts", line))
            if found := re.search(r"resumed from step (\d+); (?:at least )?(\d+) steps", line):
                self.resumed_from = int(found[1])
                self.repeated.append(max(self.last - self.resumed_from, 0))
                self.told.append(int(found[2]))
            if found := re.search(r"RayTrainWorker pid=(\d+).* step (\d+)/", line):
                self._stepped(int(found[1]), int(found[2]))

    def _stepped(self, worker: int, step: int) -> None:
        self.workers.add(worker)
        self.last = step
        if step <= self.step:
            return
        self.step = step
        for one in self.kills:
            if one.took is None and one.kind != "storage" and worker not in one.workers:
                one.took = time.monotonic() - one.at
                if self.resumed_from < one.saved:
                    self.lost.append(f"step {one.saved} was saved, and the run went on from {self.resumed_from}")


class Soak:
    """Disturbs a run, with a method for each kind."""

    def __init__(self, nodes: Any, run: Run, rng: random.Random):
        self.nodes, self.run, self.rng = nodes, run, rng
        self.damaged: set[str] = set()
        """Folders of checkpoints."""
        self.away = False
        """The storage."""

    def disturb(self, minutes: float) -> None:
        """Until the minutes are up, and at least until each kind has come once."""
        end, kinds = time.monotonic() + 60 * minutes, []
        while time.monotonic() < end or not set(ROUND) <= {kill.kind for kill in self.run.kills}:
            kinds = kinds or self.rng.sample(ROUND, len(ROUND))
            getattr(self, kinds.pop())()
            if self.rng.random() < 0.7:
                self.run.wait(self.got_on, "a new step, or a new checkpoint")
            time.sleep(self.rng.uniform(1, 8))
        self.run.wait(self.got_on, "a new step, or a new checkpoint")

    def got_on(self) -> bool:
        for one in self.run.kills:
            if one.took is None and one.kind == "storage" and not self.away and self.saved() > one.saved:
                one.took = time.monotonic() - one.at
        return all(one.took is not None for one in self.run.kills)

    def saved(self) -> int:
        """The last step that is saved and was left whole."""
        return max((step for step, folder in self.run.saved() if folder not in self.damaged), default=0)

    def note(self, kind: str, how: str) -> None:
        workers = self.run.workers.union(processes("RayTrainWorker"))
        self.run.kills.append(Kill(kind, self.saved(), frozenset(workers)))
        say(f"{kind}: {how}")

    def worker(self) -> None:
        pid = self.rng.choice(self.run.wait(lambda: processes("RayTrainWorker"), "a worker"))
        self.note("worker", f"process {pid}")
        kill(pid)

    def raylet(self) -> None:
        self._lose_node("raylet", alone=True)

    def node(self) -> None:
        self._lose_node("node", alone=False)

    def _lose_node(self, kind: str, alone: bool) -> None:
        node = self.rng.choice(sorted(self.nodes.worker_nodes, key=lambda node: node.node_id))
        raylet = node.all_processes["raylet"][0].process.pid
        self.note(kind, f"process {raylet}")
        others = [] if alone else children(raylet)
        for pid in (raylet, *others):
            kill(pid)
        time.sleep(self.rng.uniform(0, 10))
        self.nodes.remove_node(node, allow_graceful=False)
        self.nodes.add_node(num_cpus=1)

    def storage(self) -> None:
        self.run.wait(lambda: not self.away, "the storage")
        how, seconds = self.rng.choice(("refuses", "hangs", "throttles")), self.rng.uniform(5, 25)
        self.note("storage", f"{how} for {seconds:.0f} s")
        self.away = True
        self.run.storage.fail(how)
        timer = threading.Timer(seconds, self._heal, [self.run.kills[-1]])
        timer.daemon = True
        timer.start()

    def _heal(self, outage: Kill) -> None:
        self.run.storage.heal()
        outage.at, outage.saved, self.away = time.monotonic(), self.saved(), False
        say("storage: back")

    def controller(self) -> None:
        self.run.wait(self.got_on, "a new step, or a new checkpoint")  # before that, it may be another command's
        (pid,) = processes("TrainController")
        self.note("controller", f"process {pid}")
        kill(pid)
        self.run.end(code=1)
        self.run.start(MANY)

    def driver(self) -> None:
        self.note("driver", f"process {self.run.command.pid}")
        self.run.command.kill()
        self.run.end(code=-signal.SIGKILL)
        if self.rng.random() < 0.5:
            wait_until(lambda: not processes("RayTrainWorker") + processes("TrainController"), "the end of the workers")
            self.damage()
        self.run.start(MANY)

    def damage(self) -> None:
        """Damages the last checkpoint, where there is a whole one before it."""
        *before, last = (folder for _, folder in self.run.saved())
        if last in self.damaged or set(before) <= self.damaged:
            return
        fs = self.run.storage.fs
        files = fs.get_file_info(pyarrow.fs.FileSelector(last, recursive=True))
        path = self.rng.choice(sorted(file.path for file in files if file.is_file))
        data, how = bytearray(read_bytes(fs, path)), self.rng.choice(("has another bit", "is cut", "vanishes"))
        if how == "vanishes":
            fs.delete_file(path)
        else:
            if how == "is cut":
                del data[-1:]
            else:
                data[self.rng.randrange(len(data))] ^= 1
            with fs.open_output_stream(path, compression=None) as file:
                file.write(data)
        self.damaged.add(last)
        for one in self.run.kills:
            one.saved = min(one.saved, self.saved())
        say(f"damage: {path} {how}")


@contextmanager
def surroundings() -> Iterator[tuple[Any, Storage]]:
    """The nodes and the storage. All processes that were started meanwhile end with it."""
    with tempfile.TemporaryDirectory(prefix="soak", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        os.environ |= {
            MARK: folder,
            "TMPDIR": folder,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        try:
            storage = Storage()
            from ray.cluster_utils import Cluster

            dashboard = free_port()
            os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"  # there may be other clusters
            head = {"num_cpus": 0, "dashboard_port": dashboard}
            nodes = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
            os.environ["RAY_ADDRESS"] = nodes.address
            for _ in range(2):
                nodes.add_node(num_cpus=1)
            yield nodes, storage
        finally:
            while left := processes():
                for pid in left:
                    kill(pid)
                time.sleep(0.1)


def report(run: Run, wrong: list[str]) -> dict[str, Any]:
    """Prints the table, and returns its figures."""
    took = {
        kind: [round(one.took, 1) for one in run.kills if one.kind == kind and one.took] for kind in sorted(set(ROUND))
    }
    print(f"{'what dies':<12}{'times':>6}{'median s':>10}{'most':>6}")
    for kind, seconds in took.items():
        figures = f"{statistics.median(seconds):>10.0f}{max(seconds):>6.0f}" if seconds else ""
        print(f"{kind:<12}{sum(one.kind == kind for one in run.kills):>6}{figures}")
    print(
        f"{len(run.kills)} times in all; the command was given {run.commands} times, and started its workers {run.attempts} more "
        f"times\n{run.step} steps, a checkpoint every {EVERY}; {sum(run.repeated)} steps were repeated in "
        f"{len(run.repeated)} restarts (which told of {sum(run.told)}), at most {max(run.repeated, default=0)} at once; "
        f"{run.tracebacks} tracebacks\n"
        + (
            "\n".join(wrong)
            or "weights and optimizer state are an undisturbed run's, bit for bit, and nothing saved was lost"
        )
    )
    names = ("commands", "attempts", "step", "repeated", "told", "tracebacks")
    return {"seconds": took, "wrong": wrong} | {name: getattr(run, name) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--output", type=Path, help="figures as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with surroundings() as (nodes, storage):
        run, alone = (Run(name, storage, args.set) for name in ("disturbed", "undisturbed"))
        soak, wrong = Soak(nodes, run, random.Random(args.seed)), []
        try:
            run.start(MANY)
            run.wait(run.saved, "the first checkpoint")
            soak.disturb(args.minutes)
            soak.note("driver", "the last")
            run.command.kill()
            run.end(code=-signal.SIGKILL)
            steps = (run.step // EVERY + 2) * EVERY
            for each in (run, alone):
                each.start(steps)
                each.end(code=0)
            if run.tensors() != alone.tensors():
                wrong.append("the weights or the optimizer's state differ")
        except Failed as error:
            wrong.append(str(error))
    wrong += run.lost
    figures = report(run, wrong)
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
