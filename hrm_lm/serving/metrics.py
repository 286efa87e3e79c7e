"""What a replica counts, for Prometheus."""

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from hrm_lm.serving.worker import Work, Worker

disable_created_metrics()  # a line for each metric that says when it was made
SECONDS = [0.001 * 2**i for i in range(18)]
"""Bounds of the histograms' buckets, up to two minutes."""


class Metrics:
    """Each replica has its own. `replica` tells them apart, so that Prometheus may sum over it."""

    def __init__(self, worker: Worker, replica: str = "0"):
        self.worker, self.registry = worker, CollectorRegistry()
        self.counted = worker.tokens  # those of the warm-up, at first
        own: dict[str, Any] = {"registry": self.registry, "labelnames": ["replica"]}

        def spread(name: str, what: str) -> Histogram:
            return Histogram(f"hrm_lm_{name}_seconds", what, buckets=SECONDS, **own).labels(replica)

        self.requests = Counter(
            "hrm_lm_requests", "HTTP requests that have ended", ["replica", "path", "code"], registry=self.registry
        )
        self.replica = replica
        self.prompt_tokens = Counter("hrm_lm_prompt_tokens", "Tokens of prompts", **own).labels(replica)
        self.tokens = Counter("hrm_lm_tokens", "Tokens of answers", **own).labels(replica)
        self.whole = spread("request", "A request for answers, to its end")
        self.first = spread("first_token", "From a request to the first token of its answers")
        self.each = spread("token", "From token to token, the mean over a request")
        self.running = Gauge("hrm_lm_running", "Answers that are being given", **own).labels(replica)
        self.waiting = Gauge("hrm_lm_waiting", "Answers that wait for a place", **own).labels(replica)

    def request(self, path: str, code: int) -> None:
        """A request has ended."""
        self.requests.labels(self.replica, path, str(code)).inc()

    def answers(self, work: Work) -> None:
        """Answers have come, or as much of them as will."""
        seconds, counts = time.monotonic() - work.began, [state.tokens for state in work.states]
        self.whole.observe(seconds)
        self.prompt_tokens.inc(sum(len(request.prompt) for request in work.requests))
        if work.first_token is not None:
            first = work.first_token - work.began
            self.first.observe(first)
            if max(counts) > 1:
                self.each.observe((seconds - first) / (max(counts) - 1))

    def text(self) -> str:
        """In Prometheus' format."""
        self.tokens.inc(self.worker.tokens - self.counted)
        self.counted = self.worker.tokens
        running = min(self.worker.running, self.worker.unfinished)
        self.running.set(running)
        self.waiting.set(self.worker.unfinished - running)
        return generate_latest(self.registry).decode()


def merged(texts: Iterable[str]) -> str:
    """Several replicas' metrics as one text: all lines of a metric must stand together."""
    families: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines(keepends=True):
            if line.startswith("# HELP"):
                name = line.split()[2]
            lines = families.setdefault(name, [])
            if not line.startswith("#") or line not in lines[:2]:
                lines.append(line)
    return "".join(line for lines in families.values() for line in lines)
