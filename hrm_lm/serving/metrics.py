"""What a replica counts. Ray's agents collect it from all replicas for Prometheus, as they do with Ray's own metrics, under
names that begin with `ray_`.
"""

import asyncio
import time
from collections import Counter
from urllib.request import urlopen

import ray
from ray.serve import metrics

from hrm_lm.serving.worker import Work, Worker

PREFIX = "hrm_lm_"
FLUSH_S = 1.0
"""Ray is told what has come after so many seconds: each time costs more than counting here."""
SECONDS = [0.001 * 2**i for i in range(18)]
"""Bounds of the histograms' buckets, up to two minutes."""


class RayMetrics:
    """See `hrm_lm.serving.app.Metrics`. To be made in a replica, within its event loop."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._times: list[tuple[str, float]] = []
        count, spread = metrics.Counter, metrics.Histogram
        self._counters = {
            "requests": count(f"{PREFIX}requests", "HTTP requests that have ended", ("path", "code")),
            "prompt_tokens": count(f"{PREFIX}prompt_tokens", "tokens of prompts that were answered"),
            "tokens": count(f"{PREFIX}tokens", "tokens of answers"),
        }
        self._spreads = {
            "request": spread(f"{PREFIX}request_seconds", "a request for an answer, to its end", SECONDS),
            "first": spread(f"{PREFIX}first_token_seconds", "from a request to the first token of its answer", SECONDS),
            "token": spread(f"{PREFIX}token_seconds", "from token to token, mean over a request", SECONDS),
        }
        self._running = metrics.Gauge(f"{PREFIX}running", "answers that are under way")
        self._waiting = metrics.Gauge(f"{PREFIX}waiting", "answers that wait for a place")
        self._task = asyncio.get_running_loop().create_task(self._flush())

    def request(self, path: str, code: int) -> None:
        self._counts["requests", path, str(code)] += 1

    def answers(self, work: Work) -> None:
        seconds, tokens = time.monotonic() - work.began, sum(len(answer.tokens) for answer in work.answers)
        self._times.append(("request", seconds))
        self._counts["tokens",] += tokens
        self._counts["prompt_tokens",] += sum(len(request.prompt) for request in work.requests)
        if work.first_token is not None:
            first = work.first_token - work.began
            self._times.append(("first", first))
            longest = max(len(answer.tokens) for answer in work.answers)
            if longest > 1:
                self._times.append(("token", (seconds - first) / (longest - 1)))

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            counts, self._counts = self._counts, Counter()
            times, self._times = self._times, []
            for (name, *tags), value in counts.items():
                self._counters[name].inc(value, dict(zip(("path", "code"), tags)))
            for name, value in times:
                self._spreads[name].observe(value, {})
            running = self.worker.running
            self._running.set(running, {})
            self._waiting.set(self.worker.unfinished - running, {})

    async def text(self) -> str:
        nodes = await asyncio.to_thread(ray.nodes)
        places = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes if node["Alive"]]
        texts = await asyncio.gather(*(asyncio.to_thread(scrape, *place) for place in places))
        return merged(texts)


def scrape(address: str, port: int) -> str:
    """A node's metrics; nothing where the node does not answer."""
    host = f"[{address}]" if ":" in address else address
    try:
        with urlopen(f"http://{host}:{port}/metrics", timeout=5) as response:
            return response.read().decode()
    except OSError:
        return ""


def merged(texts: list[str]) -> str:
    """This project's metrics of several nodes as one text: Prometheus wants all of a metric's lines together."""
    heads: dict[str, dict[str, None]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("#"):
                name = line.split(" ", 3)[2]
            if not name.startswith(f"ray_{PREFIX}"):
                continue
            if line.startswith("#"):
                heads.setdefault(name, {})[line] = None
            else:
                samples.setdefault(name, []).append(line)
    return "".join(f"{line}\n" for name in heads for line in [*heads[name], *samples.get(name, [])])
