"""The routes: OpenAI's endpoints, a page to try them on, health and metrics. Whatever goes wrong is told in the form of
OpenAI's errors.

This is ASGI without a framework: for a small model, the layers of one would take more time than the answer.
"""

import asyncio
import hmac
import json
import time
import traceback
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from hrm_lm.data import chat
from hrm_lm.serving.access import digest, is_loopback
from hrm_lm.serving.metrics import Metrics
from hrm_lm.serving.protocol import Chat, Completion, Model, Refused, parse
from hrm_lm.serving.responses import Writer
from hrm_lm.serving.worker import Work, Worker

MOST_BYTES = 4 << 20
"""Of a request's body."""
READ_APART = 1 << 16
"""Bodies of more bytes are parsed in a thread, so that others do not wait for that, and so are conversations that a
tokenizer's template writes, in a process of its own."""
OPEN = ("/", "/health")
"""Paths that need no key."""
PAGE = (resources.files("hrm_lm.serving") / "page.html").read_text(encoding="utf-8")
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class App:
    """The ASGI application of a replica.

    everyones: gives the metrics of all replicas as text. timeout: seconds that an answer may take, waiting included.
    key: `digest` of the key that clients must show; None where whoever comes over loopback may ask.
    """

    def __init__(
        self,
        model: Model,
        worker: Worker,
        metrics: Metrics,
        everyones: Callable[[], Awaitable[str]],
        timeout: float,
        key: bytes | None = None,
    ):
        self.model, self.worker, self.metrics, self.everyones = model, worker, metrics, everyones
        self.timeout, self.key = timeout, key
        self.has_template = chat.Chat.of(model.tokenizer).template != chat.PLAIN
        self.routes = {
            "/": ("GET", self.page),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.metrics_text),
            "/v1/models": ("GET", self.models),
            f"/v1/models/{model.name}": ("GET", self.one_model),
            "/v1/completions": ("POST", self.completions),
            "/v1/chat/completions": ("POST", self.chat),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await lifespan(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        status = 499  # the client went away before it got another

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            response = await self.respond(Request(scope, receive), path)
            await response(scope, receive, noting)
        except Refused as refused:
            await error_response(refused)(scope, receive, noting)
        except ClientDisconnect:
            pass
        except Exception:
            traceback.print_exc()
            if status == 499:
                await error_response(Refused(500, "an error of the server"))(scope, receive, noting)
        finally:
            self.metrics.request(path if path in self.routes else "other", status)

    async def respond(self, request: Request, path: str) -> Response:
        if not (self.key and path in OPEN):
            self.check_client(request)
        if path not in self.routes:
            if path.startswith("/v1/models/"):
                raise Refused(404, f"this server has the model {self.model.name!r} alone", "model", "model_not_found")
            raise Refused(404, f"there is no {path}")
        method, route = self.routes[path]
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            raise Refused(405, f"{path} takes {method}, not {request.method}")
        return await route(request)

    def check_client(self, request: Request) -> None:
        """Raises Refused for whom this server is not."""
        headers = request.headers
        if self.key:
            kind, _, shown = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(digest(shown.strip()), self.key):
                raise Refused(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`")
            return
        # A browser must not let other sites' pages in: neither by a name of theirs that leads here (DNS rebinding), nor by
        # a request that they may send without reading its answer.
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_loopback(host) or (origin and origin.partition("://")[2] != host):
            message = "without HRM_LM_API_KEY this server answers this machine alone, and no other site's page"
            raise Refused(403, message)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        try:
            self.worker.check()
        except RuntimeError as error:
            raise Refused(503, str(error)) from None
        return json_response({"status": "ok"})

    async def metrics_text(self, request: Request) -> Response:
        return PlainTextResponse(await self.everyones())

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self.model.describe()]})

    async def one_model(self, request: Request) -> Response:
        return json_response(self.model.describe())

    async def completions(self, request: Request) -> Response:
        return await self.answer(request, Completion)

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, Chat)

    async def answer(self, request: Request, kind: type[Completion] | type[Chat]) -> Response:
        body = await read_body(request)
        apart = len(body) > READ_APART or (kind is Chat and self.has_template)
        arguments = body, kind, self.model, self.worker.most
        job = await asyncio.to_thread(parse, *arguments) if apart else parse(*arguments)
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
        if work.failure is not None:
            raise Refused(500, "the model failed")

    def end(self, work: Work) -> None:
        """To be called for all work in the end, whoever ends it."""
        self.worker.cancel(work)
        self.metrics.answers(work)


class Stream(Response):
    """Chunks as server-sent events. Nothing is sent before the first token, so that until then an error has its status."""

    def __init__(self, app: App, work: Work, writer: Writer):
        self.app, self.work, self.writer = app, work, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = done = False
        try:
            while not done:
                try:
                    await self.app.change(self.work)
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
            self.app.end(self.work)


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


async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """The protocol's begin and end, at which there is nothing to do."""
    while scope["type"] == "lifespan":
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, media_type="application/json")


def error_response(refused: Refused) -> Response:
    return json_response(refused.body(), refused.status, {"Retry-After": "1"} if refused.status in (429, 503) else None)
