"""The routes: OpenAI's endpoints, a page to try them on, health and metrics. Whatever goes wrong is told in the form of
OpenAI's errors.
"""

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrm_lm.serving.metrics import Metrics
from hrm_lm.serving.protocol import Chat, Completion, Model, Refused, parse
from hrm_lm.serving.responses import Writer
from hrm_lm.serving.worker import Work, Worker

MOST_BYTES = 4 << 20
"""Of a request's body."""
READ_APART = 1 << 16
"""Bodies of more bytes are parsed in a thread, so that others do not wait for that."""
OPEN = ("/", "/health")
"""Paths that need no key."""


@dataclass(frozen=True)
class Service:
    """What the routes work with."""

    model: Model
    worker: Worker
    metrics: Metrics
    everyones: Callable[[], Awaitable[str]]
    """The metrics of all replicas, as text."""
    timeout: float
    """Seconds that an answer may take, waiting included."""
    key: bytes | None = None
    """`digest` of the key that clients must show. None: whoever comes in over loopback may ask."""

    async def answer(self, request: Request, kind: type[Completion] | type[Chat]) -> Response:
        body = await read_body(request)
        arguments = body, kind, self.model, self.worker.most
        job = parse(*arguments) if len(body) < READ_APART else await asyncio.to_thread(parse, *arguments)
        work = self.worker.submit(job.requests, streams=bool(job.asked.stream))
        writer = Writer(job, work, self.model.name, self.model.tokenizer)
        if job.asked.stream:
            return Stream(self, work, writer)
        try:
            await self.change(work)
        finally:
            self.end(work)
        return json_response(writer.whole())

    async def change(self, work: Work) -> None:
        """Waits until something is new. Raises Refused where the time is over or the model failed."""
        try:
            async with asyncio.timeout(work.began + self.timeout - time.monotonic()):
                await work.changed.wait()
        except TimeoutError:
            raise Refused(504, f"the answer took more than {self.timeout:g} s") from None
        work.changed.clear()
        if work.failure:
            raise Refused(500, "the model failed")

    def end(self, work: Work) -> None:
        """To be called for all work in the end, whoever ends it."""
        self.worker.cancel(work)
        self.metrics.answers(work)


class Stream(Response):
    """Chunks as server-sent events. Nothing is sent before the first token, so that until then an error has its status."""

    def __init__(self, service: Service, work: Work, writer: Writer):
        self.service, self.work, self.writer = service, work, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = done = False
        try:
            while not done:
                try:
                    await self.service.change(self.work)
                    done = not self.work.unfinished
                    events = [*map(dumps, self.writer.news())] + [b"[DONE]"] * done
                except Refused as refused:
                    if not began:
                        raise
                    done, events = True, [dumps(refused.body())]
                if not began:
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    began = True
                lines = b"".join(b"data: %b\n\n" % event for event in events)
                await send({"type": "http.response.body", "body": lines, "more_body": not done})
        finally:
            self.service.end(self.work)


class Guard:
    """Lets in whom the service is for, and counts requests."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client went away before it got another

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if refused := self._refusal(Request(scope)):
                await error_response(refused)(scope, receive, noting)
            else:
                await self.app(scope, receive, noting)
        finally:
            path = scope["path"]
            self.service.metrics.request(path if path in PATHS else "other", status)

    def _refusal(self, request: Request) -> Refused | None:
        headers, key = request.headers, self.service.key
        if request.url.path in OPEN and key:
            return None
        if key:
            kind, _, shown = headers.get("authorization", "").partition(" ")
            if kind.lower() == "bearer" and hmac.compare_digest(digest(shown.strip()), key):
                return None
            return Refused(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`")
        # Without a key, a browser must not let other sites' pages in: neither by a name of theirs that leads here (DNS
        # rebinding), nor by a request that they may send without reading its answer.
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_loopback(host) or (origin and origin.partition("://")[2] != host):
            message = "without HRM_LM_API_KEY this server answers this machine alone, and no other site's page"
            return Refused(403, message)
        return None


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def is_loopback(host: str) -> bool:
    """Whether a host leads to this machine alone: a name or an address, or what a Host header says."""
    parts = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", host)
    name = (parts[1] or parts[2]) if parts else host
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


async def read_body(request: Request) -> bytes:
    """Raises Refused for one of more than MOST_BYTES."""
    parts, size = [], 0
    too_large = Refused(413, f"the body has more than {MOST_BYTES >> 20} MiB")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MOST_BYTES:
        raise too_large
    async for part in request.stream():
        size += len(part)
        if size > MOST_BYTES:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, media_type="application/json")


def error_response(refused: Refused) -> Response:
    return json_response(refused.body(), refused.status, {"Retry-After": "1"} if refused.status in (429, 503) else None)


PATHS = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
PAGE = (resources.files("hrm_lm.serving") / "page.html").read_text(encoding="utf-8")
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def build_app(service: Service) -> ASGIApp:
    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def health(request: Request) -> Response:
        try:
            service.worker.check()
        except RuntimeError as error:
            raise Refused(503, str(error)) from None
        return json_response({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(await service.everyones())

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [service.model.describe()]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.model.name:
            raise Refused(404, f"this server has {service.model.name!r}", "model", "model_not_found")
        return json_response(service.model.describe())

    async def completions(request: Request) -> Response:
        return await service.answer(request, Completion)

    async def chat(request: Request) -> Response:
        return await service.answer(request, Chat)

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return error_response(error if isinstance(error, Refused) else Refused(500, "an error of the server"))

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys([Refused, HTTPException, Exception], failed),
    )
    return Guard(app, service)
