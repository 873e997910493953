"""The routes: OpenAI's API, health and metrics, and the live page.

    POST /v1/completions  POST /v1/chat/completions  GET /v1/models       the API
    GET /health  GET /metrics                                             for those who watch over it
    GET /  GET /live (server-sent events)  POST /live                     the page, its feed, and its step button

Every request is bounded: its body, the time it may take, and how many may wait. A client that goes away ends its
requests in the engine before the next step.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from minipaged import viz
from minipaged.engine.prompt import read_prompt
from minipaged.server.engine_loop import Call, EngineLoop, Piece
from minipaged.server.live import Watcher
from minipaged.server.protocol import Answer, ApiError, ChatRequest, CompletionRequest, _Asked, parsed

PAGE = Path(__file__).parent / "page"
PLAYER = Path(viz.__file__).parent / "player"
BODY_SECONDS = 30.0  # for a body to come in
MAX_WATCHERS = 16
PAGE_HEADERS = {
    # what a model wrote never runs
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Limits:
    max_waiting: int = 256  # choices that may wait beside those that run
    seconds: float = 600.0  # of one request, from its arrival to its last byte
    body_bytes: int = 1 << 20


class Steps(_Asked):
    """How many steps a paused engine runs more; 0 pauses it, and None lets it run."""

    steps: Annotated[int, Field(ge=0, le=10_000)] | None = None


class Server:
    def __init__(self, engine: EngineLoop, model: str, limits: Limits, api_key: str | None, hosts: list[str]):
        self.engine, self.llm, self.model, self.limits = engine, engine.llm, model, limits
        self.api_key, self.hosts = api_key, hosts
        self.started = int(time.time())
        self.load = 0  # choices that run or wait
        self.most = self.llm.scheduler.max_num_seqs + limits.max_waiting
        self.watchers: set[Watcher] = set()
        self.stepping = engine.steps_due is not None
        self.draining = False

    def app(self) -> Starlette:
        guarded: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
            ("/v1/models", self.models, "GET"),
            ("/v1/completions", partial(self.create, CompletionRequest), "POST"),
            ("/v1/chat/completions", partial(self.create, ChatRequest), "POST"),
            ("/metrics", self.metrics, "GET"),
            ("/live", self.live, "GET"),
            ("/live", self.step, "POST"),
        ]
        return Starlette(
            routes=[
                *(Route(path, self.guarded(endpoint), methods=[method]) for path, endpoint, method in guarded),
                Route("/health", self.health),
                Route("/", lambda request: FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)),
                Mount("/player", StaticFiles(directory=PLAYER)),
                Mount("/page", StaticFiles(directory=PAGE)),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=self.hosts)],
            exception_handlers={ApiError: _refused, HTTPException: _http_refused, Exception: _failed},
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await self.engine.stop()

    def drain(self) -> None:
        """No request comes any more: let those that are there run to their end, and the pages go."""
        self.draining = True
        self.engine.submit(lambda: self.engine.allow(None))
        for watcher in self.watchers:
            watcher.wake.set()

    def guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            if self.api_key is not None:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(), self.api_key.encode()):
                    raise ApiError(401, "give the server's API key: Authorization: Bearer KEY", "invalid_api_key")
            try:
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=499)  # there is no one to read it

        return checked

    async def body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site can send any other type unasked
            raise ApiError(415, f"Content-Type must be application/json, got {kind[:60]!r}")
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > self.limits.body_bytes:
                        most = f"{self.limits.body_bytes:,} bytes"
                        raise ApiError(413, f"the body has more than {most}", headers={"Connection": "close"})
        except TimeoutError:
            raise ApiError(408, f"the body did not come in {BODY_SECONDS:.0f} s", headers=_DO_NOT_RETRY) from None
        return b"".join(parts)

    # ---- OpenAI's API --------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        card = {"id": self.model, "object": "model", "created": self.started, "owned_by": "minipaged"}
        card["max_model_len"] = self.llm.scheduler.max_model_len
        return JSONResponse({"object": "list", "data": [card]})

    async def create(self, kind: type[CompletionRequest] | type[ChatRequest], request: Request) -> Response:
        """A completion. What can never run is refused before anything is queued, with the numbers."""
        body = parsed(await self.body(request), kind)
        if body.model not in (None, self.model):
            raise ApiError(
                404, f"there is no model {body.model[:80]!r}: this server has {self.model!r}", "model_not_found"
            )
        try:
            prompts = await run_in_threadpool(self._prompts, body)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        call = Call(prompts, body.cache_salt)
        num_choices = call.open
        if num_choices > self.most:
            raise ApiError(400, f"{num_choices} choices were asked for, and the server takes {self.most} at once")
        if self.load + num_choices > self.most:
            busy = f"{self.load} choices run or wait, of {self.most} at most"
            raise ApiError(429, f"the server is busy: {busy}", "rate_limit_exceeded", headers={"Retry-After": "1"})
        answer = Answer(body, self.llm.tokenizer, self.model, sum(len(tokens) for tokens, _ in prompts))
        if body.stream:
            return _Events(self._chunks(call, answer), self.limits.seconds + 5.0)
        return await _unless_gone(request.receive, self._whole(call, answer))

    def _prompts(self, body: CompletionRequest | ChatRequest) -> list[Any]:
        """Tokens and parameters of each prompt. Raises ValueError where one can never run."""
        scheduler, found = self.llm.scheduler, []
        room = min(scheduler.max_model_len, scheduler.blocks.num_slots + 1)
        for token_ids in body.prompts(self.llm.tokenizer):
            read_prompt({"prompt_token_ids": token_ids}, self.llm.tokenizer, self.llm.config.vocab_size)
            params = body.params(body.new_tokens or max(1, room - len(token_ids)), body.num_logprobs)
            scheduler.check(len(token_ids), params.max_tokens)
            found.append((token_ids, params))
        return found

    async def _pieces(self, call: Call) -> AsyncGenerator[list[Piece], None]:
        """Queue a call and yield its pieces as they come; at the end, or wherever it is left, nothing of it remains."""
        num_choices = call.open
        self.load += num_choices
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            await self.engine.call(lambda: self.engine.add(call))
            yield []
            while call.open:
                async with asyncio.timeout_at(deadline):
                    pieces = await call.inbox.get()
                call.open -= sum(piece.finish_reason is not None for piece in pieces)
                if any(piece.finish_reason in ("error", "abort") for piece in pieces):
                    said = f"the request failed: {call.error or 'the engine gave it up'}"
                    raise ApiError(500, said, headers=_DO_NOT_RETRY)
                yield pieces
        except TimeoutError:
            said = f"the request took longer than {self.limits.seconds:g} s, and was ended"
            raise ApiError(504, said, headers=_DO_NOT_RETRY) from None
        finally:
            self.load -= num_choices
            if call.open:
                self.engine.submit(lambda: self.engine.abort(call))

    async def _whole(self, call: Call, answer: Answer) -> Response:
        found: list[Piece] = []
        async with aclosing(self._pieces(call)) as batches:
            async for pieces in batches:
                found += pieces
        answer.name(call.requests[0].request_id)
        return JSONResponse(answer.whole(found))

    async def _chunks(self, call: Call, answer: Answer) -> AsyncGenerator[str, None]:
        async with aclosing(self._pieces(call)) as batches:
            try:
                async for pieces in batches:
                    if not pieces:
                        answer.name(call.requests[0].request_id)
                        chunks: list[Any] = answer.first_chunks(call.open)
                    else:
                        chunks = [chunk for piece in pieces if (chunk := answer.chunk(piece))]
                    if chunks:
                        yield "".join(map(_event, chunks))
                if answer.body.stream_options and answer.body.stream_options.include_usage:
                    yield _event(answer.last_chunk())
                yield "data: [DONE]\n\n"
            except ApiError as error:  # the status has been sent
                yield _event(error.body)

    # ---- health, metrics, the page -------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return Response(status_code=200 if self.engine.alive and not self.draining else 503)

    async def metrics(self, request: Request) -> Response:
        engine = await self.engine.call(self.llm.metrics)
        return Response(self.engine.metrics.text(engine), media_type="text/plain; version=0.0.4")

    async def live(self, request: Request) -> Response:
        if len(self.watchers) >= MAX_WATCHERS:
            raise ApiError(429, f"{MAX_WATCHERS} pages are open, and more are not fed", headers={"Retry-After": "5"})
        return _Events(self._feed(Watcher(asyncio.Event())), None)

    async def _feed(self, watcher: Watcher) -> AsyncGenerator[str, None]:
        self.watchers.add(watcher)
        about = {"title": "The pool now", "model": self.model, "stepping": self.stepping}
        watch = partial(self.engine.feed.watch, watcher, **about)
        try:
            self.engine.submit(watch)
            while not self.draining:
                await watcher.wake.wait()
                if messages := watcher.take():
                    yield "".join(f"data: {message}\n\n" for message in messages)
                if watcher.behind:
                    watcher.behind = False
                    self.engine.submit(watch)
                await asyncio.sleep(0.05)  # several steps in one piece: no page shows more than 20 a second
        finally:
            self.watchers.discard(watcher)
            self.engine.submit(lambda: self.engine.feed.leave(watcher))

    async def step(self, request: Request) -> Response:
        if not self.stepping:
            raise ApiError(403, "the engine runs by itself: minipaged serve --step lets the page step it")
        asked = parsed(await self.body(request), Steps)
        await self.engine.call(lambda: self.engine.allow(asked.steps))
        return JSONResponse({"steps": self.engine.steps_due})


_DO_NOT_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would, and it would take as long again


def _event(data: Any) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class _Events(StreamingResponse):
    """Server-sent events. They end when the client goes, and where it does not read them within `seconds`."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[str, None], seconds: float | None):
        super().__init__(chunks, headers={"Cache-Control": "no-cache"})
        self.chunks, self.seconds = chunks, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(TimeoutError):
            async with aclosing(self.chunks), asyncio.timeout(self.seconds):
                await super().__call__(scope, receive, send)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work returns or raises. Raises ClientDisconnect, with the work cancelled, when the client goes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server made a mistake; its log says which").body, 500)
