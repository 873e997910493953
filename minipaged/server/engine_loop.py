"""The engine's step loop in a thread, and the two ways between it and the server's event loop.

    event loop      call(function)  --->  queue of calls  --->  function(), between two steps      engine's thread
                    Call.inbox      <---  one batch a step  <-  step(), then the new pieces of each request

Invariant: while the loop runs, its thread alone touches the engine. So the engine needs no lock, and a request that is
added, aborted or asked for its metrics waits for the end of a step at most.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from minipaged.engine.llm import LLM
from minipaged.engine.sequence import FinishReason, Request, SamplingParams
from minipaged.server.live import Feed
from minipaged.server.metrics import ServerMetrics

Result = TypeVar("Result")
FAILURES = 3  # steps that fail one after the other before the requests are given up
log = logging.getLogger("minipaged.server")


class Piece(NamedTuple):
    """What one token added to one choice of an answer."""

    choice: int
    text: str
    token_id: int | None
    logprobs: dict[int, float] | None
    finish_reason: FinishReason | None


class Call:
    """One HTTP request: prompts, each a request of the engine, whose pieces come together in one inbox."""

    def __init__(self, prompts: list[tuple[list[int], SamplingParams]], cache_salt: str | None = None):
        self.prompts, self.cache_salt = prompts, cache_salt
        self.requests: list[Request] = []
        self.num_read: dict[str, int] = {}  # sequence -> its pieces that are in the inbox
        self.inbox: asyncio.Queue[list[Piece]] = asyncio.Queue()  # at most one entry for each token
        self.open = sum(params.n for _, params in prompts)  # choices that have not ended

    @property
    def error(self) -> str | None:
        return next((seq.error for request in self.requests for seq in request.seqs if seq.error), None)


class EngineLoop:
    """Start it in the server's event loop. `steps_due`: steps that it may still run, None for any number."""

    def __init__(self, llm: LLM, metrics: ServerMetrics, steps_due: int | None = None):
        self.llm, self.metrics, self.steps_due = llm, metrics, steps_due
        self.feed = Feed(llm)
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._open: dict[str, tuple[Request, Call, int]] = {}  # by id: a request, its call, its first choice there
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._failures = 0

    # ---- the event loop's side -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function between two steps. Functions run in the order in which they were submitted."""
        future: Future[Result] = Future()
        self._calls.put((function, future))
        return future

    async def call(self, function: Callable[[], Result]) -> Result:
        """`submit`, and wait for what the function returns or raises."""
        if not self.alive:
            raise RuntimeError("the engine's thread has ended; the server's log says why")
        return await asyncio.wrap_future(self.submit(function))

    async def stop(self) -> None:
        """End the thread after the present step."""
        self._stopping = True
        self.submit(lambda: None)
        await asyncio.to_thread(self._thread.join)

    def allow(self, steps: int | None) -> None:
        """Run this many steps more; None: run on until told otherwise; 0: pause."""
        self.steps_due = None if steps is None else steps if not steps else (self.steps_due or 0) + steps

    # ---- the thread's side ---------------------------------------------------------------------------------------

    def add(self, call: Call) -> None:
        """Queue the prompts of a call. Raises ValueError, with none of them queued, where one can never run."""
        try:
            for number, (token_ids, params) in enumerate(call.prompts):
                prompt: Any = {"prompt_token_ids": token_ids, "cache_salt": call.cache_salt}
                request = self.llm.add_request(prompt, params)
                call.requests.append(request)
                self._open[request.request_id] = request, call, number * params.n
                self.feed.arrived(seq.seq_id for seq in request.seqs)
        except BaseException:
            self.abort(call)
            raise

    def abort(self, call: Call) -> None:
        """End what is unfinished of a call, and free its blocks; of one that has ended, nothing."""
        ids = [request.request_id for request in call.requests if request.request_id in self._open]
        self.llm.abort(*(request_id for request_id in ids if request_id in self.llm.requests))
        for request_id in ids:
            del self._open[request_id]

    def _run(self) -> None:
        while not self._stopping:
            self._do_calls()
            if self._may_step():
                self._step()
            self._deliver()

    def _may_step(self) -> bool:
        return self.llm.has_unfinished() and self.steps_due != 0 and not self._stopping

    def _do_calls(self) -> None:
        """What was submitted; where there is nothing to step, wait for it."""
        wait = not self._may_step()
        while True:
            try:
                function, future = self._calls.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    def _step(self) -> None:
        if self.steps_due:
            self.steps_due -= 1
        try:
            self.llm.step()
            self._failures = 0
        except Exception:  # the next call recovers, and repeats the work
            self._failures += 1
            log.exception("step failed (%d of %d)", self._failures, FAILURES)
            if self._failures == FAILURES:
                self._failures = 0
                self.llm.abort(*self.llm.requests)

    def _deliver(self) -> None:
        """New pieces to the inboxes, new events to the pages: one call into the event loop for all of them."""
        batch = []
        for request, call, first in list(self._open.values()):
            if pieces := self._new_pieces(call, request, first):
                batch.append((call, pieces))
            if request.finished:
                del self._open[request.request_id]
                self.metrics.finished(request)
        messages = self.feed.drain()
        if batch or messages:
            self._loop.call_soon_threadsafe(_hand_over, batch, messages)

    def _new_pieces(self, call: Call, request: Request, first: int) -> list[Piece]:
        pieces = []
        for seq in request.seqs:
            number = call.num_read.get(seq.seq_id, 0)
            for new in seq.pieces(number):
                token = seq.outputs[number] if new.token_id is not None else None
                logprobs = token.logprobs if token else None
                pieces.append(Piece(first + seq.index, new.text, new.token_id, logprobs, new.finish_reason))
                if token:
                    self.metrics.token(request, seq, number)
                number += 1
            call.num_read[seq.seq_id] = number
        return pieces


def _hand_over(batch: list[tuple[Call, list[Piece]]], messages: list[tuple[Any, str]]) -> None:
    for call, pieces in batch:
        call.inbox.put_nowait(pieces)
    for watcher, message in messages:
        watcher.put(message)
