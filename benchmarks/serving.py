"""`hrm-lm serve` with the addition model: `python benchmarks/serving.py [--checkpoint FOLDER] [--soak MINUTES]`.

Prints requests/s and latencies of one client, of many clients, each of whom asks again as soon as it is answered, and of
requests that arrive at random at two to five times the rate of the one client; and the CPU time of a request by process
(`spawn_main` is a replica's engine), which a busy machine does not distort. Clients keep their connections. Rounds alternate, and medians are told.

With --soak, well-formed requests are asked for so long, whole and as streams, beside malformed ones and clients that go
away; the replica is killed twice. Prints what became of the requests, and the memory over time.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from hrm_lm.cluster.start import free_port

COMMAND = [sys.executable, "-m", "hrm_lm.commands"]
MARK = "HRM_LM_BENCHMARK"
"""A variable of the environment by which the server's processes are known."""
ARRIVE = (2, 3, 4, 5)
"""Rates of requests that arrive at random, as multiples of one client's rate."""
SHOWN = ("ServeReplica", "spawn_main", "haproxy -db", "HAProxyManager", "ProxyActor", "ServeController")


class Server:
    def __init__(self, checkpoint: str, *flags: str):
        self.port, self.id = free_port(), str(os.getpid())
        command = [*COMMAND, "serve", "--checkpoint", checkpoint, "--port", str(self.port)]
        environment = os.environ | {MARK: self.id}
        self.process = subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.match(r"'(.*)' answers on", line):
                self.model = found[1]
                return
            print(line, end="", file=sys.stderr)
        raise SystemExit(self.process.wait())

    def processes(self) -> dict[str, list[Path]]:
        """By name, those in SHOWN."""
        found = collections.defaultdict(list)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.id}\0".encode() in (process / "environ").read_bytes() + b"\0":
                    command = (process / "cmdline").read_text().replace("\0", " ")
                    for name in SHOWN:
                        if name in command:
                            found[name].append(process)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        def seconds(process: Path) -> float:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        return {name: sum(map(seconds, some)) for name, some in self.processes().items()}

    def mib(self) -> dict[str, float]:
        """Memory that the processes hold for themselves."""

        def own(process: Path) -> float:
            kib = re.search(r"RssAnon:\s+(\d+)", (process / "status").read_text())  # not of one that has just ended
            return int(kib[1]) / 1024 if kib else 0

        return {name: sum(map(own, some)) for name, some in self.processes().items()}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


class Client:
    """A connection that is kept, and opened anew where it was closed."""

    def __init__(self, port: int):
        self.port, self.reader, self.writer = port, None, None
        self.began = False
        """Whether the last response began."""

    async def ask(self, *parts: bytes) -> tuple[int, bytes]:
        """Status and body of the response to an HTTP request, sent in parts. Raises OSError or IncompleteReadError."""
        self.began = False
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            for part in parts:
                self.writer.write(part)
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            self.began = True
            if length := re.search(rb"content-length: (\d+)", head):
                body = await self.reader.readexactly(int(length[1]))
            else:
                body = b""
                while size := int((await self.reader.readuntil(b"\r\n")), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            if b"connection: close" in head:
                self.close()
            return int(head.split()[1]), body
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            raise

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        self.writer = None


def post(body: bytes, path: str = "/v1/completions") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body


def question(model: str, **options) -> tuple[bytes, str]:
    """A request and the right answer."""
    a, b = random.randrange(10, 100), random.randrange(10, 100)
    return post(json.dumps({"model": model, "prompt": f"What is {a} + {b}?", **options}).encode()), str(a + b)


# --- rates and latencies -----------------------------------------------------------------------------------------


class Measured:
    def __init__(self, seconds: float, latencies: list[float], right: int, cpu: dict[str, float]):
        latencies = sorted(latencies)
        self.rate, self.right = len(latencies) / seconds, right / len(latencies)
        self.p50, self.p95 = (1000 * latencies[int(len(latencies) * share)] for share in (0.5, 0.95))
        self.cpu = {name: 1000 * used / len(latencies) for name, used in cpu.items()}


async def measure(server: Server, clients: int, seconds: float, rate: float | None = None) -> Measured:
    """rate: of requests that arrive at random; None where each client asks again when it has its answer."""
    latencies, right, end = [], 0, time.monotonic() + seconds
    free: asyncio.Queue[Client] = asyncio.Queue()

    async def ask(client: Client, began: float) -> None:
        nonlocal right
        data, answer = question(server.model)
        status, body = await client.ask(data)
        latencies.append(time.monotonic() - began)
        right += status == 200 and json.loads(body)["choices"][0]["text"] == answer

    async def closed(client: Client) -> None:
        while time.monotonic() < end:
            await ask(client, time.monotonic())

    async def arrived(began: float) -> None:
        client = await free.get()
        await ask(client, began)
        free.put_nowait(client)

    everyone = [Client(server.port) for _ in range(clients)]
    before, begin = server.cpu_seconds(), time.monotonic()
    if rate is None:
        await asyncio.gather(*map(closed, everyone))
    else:
        list(map(free.put_nowait, everyone))
        tasks, at = [], time.monotonic()
        while at < end:
            await asyncio.sleep(max(at - time.monotonic(), 0))
            tasks.append(asyncio.create_task(arrived(at)))
            at += random.expovariate(rate)
        await asyncio.gather(*tasks)
    spent = time.monotonic() - begin
    for client in everyone:
        client.close()
    after = server.cpu_seconds()
    return Measured(spent, latencies, right, {name: after[name] - before.get(name, 0) for name in after})


def compare(server: Server, clients: int, seconds: float, rounds: int) -> None:
    async def all_rounds():
        await measure(server, clients, 3)  # warm
        for _ in range(rounds):
            one, many = await measure(server, 1, seconds), await measure(server, clients, seconds)
            yield one, many, *[await measure(server, 4 * clients, seconds, times * one.rate) for times in ARRIVE]

    async def run():
        return [each async for each in all_rounds()]

    results = uvloop.run(run())
    names = ("1 client", f"{clients} clients", *(f"{times} x 1 client's rate" for times in ARRIVE))
    print(f"{'':<20}{'requests/s':>11}{'p50 ms':>9}{'p95 ms':>9}{'right':>7}  CPU ms a request")
    for name, of_rounds in zip(names, zip(*results)):
        rate, p50, p95, right = (
            statistics.median(getattr(each, field) for each in of_rounds) for field in ("rate", "p50", "p95", "right")
        )
        cpu = {process: statistics.median(each.cpu.get(process, 0) for each in of_rounds) for process in SHOWN}
        used = ", ".join(f"{process.split()[0]} {ms:.2f}" for process, ms in cpu.items() if ms >= 0.05)
        print(f"{name:<20}{rate:>11.0f}{p50:>9.1f}{p95:>9.1f}{right:>7.3f}  {used}")
    for i, what in enumerate(names[1:], 1):
        times = statistics.median(each[i].rate / each[0].rate for each in results)
        latency = statistics.median(each[i].p95 / each[0].p50 for each in results)
        print(f"{what}: {times:.1f} x the requests/s of one client, p95 {latency:.1f} x its median latency")


# --- a soak ------------------------------------------------------------------------------------------------------

MALFORMED = [
    lambda model: post(b"{"),
    lambda model: post(b"\xff\xfe"),
    lambda model: post(b"[" * 100_000),
    lambda model: post(b"x" * (5 << 20)),
    lambda model: post(json.dumps({"model": model}).encode()),
    lambda model: post(json.dumps({"model": model, "prompt": "é" * 10}).encode()),
    lambda model: post(json.dumps({"model": model, "prompt": "1" * 100_000}).encode()),
    lambda model: post(json.dumps({"model": model, "prompt": [10**30, -1]}).encode()),
    lambda model: post(json.dumps({"model": model, "prompt": "1", "n": 10**9, "temperature": -1}).encode()),
    lambda model: post(json.dumps({"model": model, "prompt": "1", "max_tokens": 10**9}).encode()),
    lambda model: post(json.dumps({"model": model, "prompt": "1", "stop": ["x" * 10_000]}).encode()),
    lambda model: post(json.dumps({"model": model, "prompt": "1", "h_cycles": 10**9}).encode()),
    lambda model: post(b"{}", "/v1/chat/completions"),
    lambda model: post(b"{}", "/" + "x" * 5000),
    lambda model: b"nonsense\r\n\r\n",
    lambda model: b"GET / HTTP/1.1\r\n\r\n",
]


async def soak_for(server: Server, seconds: float) -> None:
    outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    begin = time.monotonic()
    end, slowest = begin + seconds, 0.0

    async def well_formed(stream: bool) -> None:
        nonlocal slowest
        client, kind = Client(server.port), "streams" if stream else "whole"
        while time.monotonic() < end:
            data, answer = question(server.model, stream=stream)
            began = time.monotonic()
            try:
                head, blank, body = data.partition(b"\r\n\r\n")  # apart, as most clients send them
                status, body = await client.ask(head + blank, body)
                if status == 200:
                    events = (
                        [json.loads(line[6:]) for line in body.split(b"\n\n")[:-2]] if stream else [json.loads(body)]
                    )
                    text = "".join(event["choices"][0]["text"] for event in events)
                    outcome = "right" if text == answer else "wrong"
                else:
                    outcome = f"status {status}"
            except (OSError, asyncio.IncompleteReadError) as error:
                outcome = "broken off" if client.began else type(error).__name__
            slowest = max(slowest, time.monotonic() - began)
            outcomes[kind][outcome] += 1

    async def malformed() -> None:
        while time.monotonic() < end:
            client = Client(server.port)
            try:
                status, _ = await asyncio.wait_for(client.ask(random.choice(MALFORMED)(server.model)), 60)
                outcomes["malformed"][f"status {status}"] += 1
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                outcomes["malformed"][type(error).__name__] += 1
            client.close()
            await asyncio.sleep(0.02)

    async def leaving() -> None:
        while time.monotonic() < end:
            data, _ = question(server.model, stream=random.random() < 0.5, n=4, temperature=1)
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(data[: random.choice([20, len(data) - 5, len(data), len(data)])])
                await asyncio.sleep(random.random() * 0.05)
                writer.transport.abort()
                outcomes["left"]["left"] += 1
            await asyncio.sleep(0.02)

    async def watch() -> None:
        kills = [begin + seconds / 3, begin + 2 * seconds / 3]
        print(f"{'minute':>7}  MiB of " + ", ".join(SHOWN), flush=True)
        while time.monotonic() < end:
            if kills and time.monotonic() > kills[0]:
                kills.pop(0)
                for replica in server.processes()["ServeReplica"]:
                    os.kill(int(replica.name), signal.SIGKILL)
                print(f"{(time.monotonic() - begin) / 60:>7.1f}  killed the replica", flush=True)
            mib = server.mib()
            row = "".join(f"{mib.get(name, 0):>8.0f}" for name in SHOWN)
            print(f"{(time.monotonic() - begin) / 60:>7.1f}{row}", flush=True)
            await asyncio.sleep(min(seconds / 20, max(end - time.monotonic(), 0)))

    roles = [*(well_formed(stream) for stream in (False, True) for _ in range(8)), *(malformed() for _ in range(4))]
    await asyncio.gather(watch(), *roles, *(leaving() for _ in range(4)))
    for kind, counts in outcomes.items():
        print(f"{kind}: " + ", ".join(f"{outcome} {count:,}" for outcome, count in counts.most_common()))
    print(f"the slowest well-formed request took {slowest:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of the addition model (default: train it first)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replicas", default="1")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="a soak instead of a comparison")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.checkpoint:
            config = str(Path(__file__).parent.parent / "configs/arithmetic.yaml")
            subprocess.run([*COMMAND, "train", "--config", config, "--run_name", "a", "--save_dir", folder], check=True)
            args.checkpoint = json.loads(Path(folder, "a/result.json").read_text())["best_checkpoint"]
        server = Server(args.checkpoint, "--replicas", args.replicas)
        try:
            if args.soak:
                uvloop.run(soak_for(server, 60 * args.soak))
            else:
                compare(server, args.clients, args.seconds, args.rounds)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
