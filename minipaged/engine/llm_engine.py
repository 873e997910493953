"""Chapter 10. The engine: requests go in, and every step gives a token to some of them.

while anything is unfinished:
    output = scheduler.schedule()          which tokens to compute, which blocks to copy (plain Python)
    batch = forward_batch(output)          its tensors: one ragged batch, prompts and single tokens mixed
    logits = runner.run(output, batch)     block copies, then one forward pass
    tokens = sample(logits)                one for each sequence whose last token was computed
    append                                 the tokens to their sequences; finished sequences leave

This loop is continuous batching: the batch is chosen again at each step.

The engine is *crash-only* (Candea and Fox, "Crash-Only Software", HotOS 2003): recovery is the only clean-up code. The
state is `requests`, the tokens generated for each, and `_aborting`. Block tables, prefix cache, queues and text are
derived from it, and change only inside `changing`. If that is left by an exception or Ctrl-C, at any line, the next
call rebuilds the derived data, and the requests compute their tokens again. No token is lost or doubled: each is one
append, and its random number depends only on the seed and its position.
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from threading import RLock

from minipaged.engine.detokenizer import IncrementalDetokenizer
from minipaged.engine.metrics import Metrics, Stats
from minipaged.engine.runner import Runner, forward_batch
from minipaged.engine.sampling import sample
from minipaged.engine.scheduler import Scheduler
from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.engine.sequence import Request, Sequence, Token
from minipaged.model.tokenizer import TextTokenizer


class LLMEngine:
    """Invariant, after each call that returned: `requests` holds the unfinished requests, and the scheduler holds
    exactly their unfinished sequences."""

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: TextTokenizer):
        self.scheduler, self.runner, self.tokenizer = scheduler, runner, tokenizer
        self.blocks, self.trace = scheduler.blocks, scheduler.blocks.trace
        self.requests: dict[str, Request] = {}  # state: every unfinished request, in the order of arrival
        self.stats = Stats()  # state
        self._aborting: Items[Request] = ()  # state: what an abort has still to remove
        self._changing = False
        self.lock = RLock()  # threads take turns, a call of `add`, `step` or `abort` each

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, changing nothing, where it can never run or has the id of another."""
        first = request.seqs[0]
        self.scheduler.check(len(first.prompt_token_ids), first.params.max_tokens)
        if request.request_id in self.requests:
            raise ValueError(f"request {request.request_id!r} is there already")
        with self.changing():
            for seq in request.seqs:
                seq.detokenizer = self._detokenizer(seq)
            self.requests[request.request_id] = request
            self.scheduler.add(request.seqs)

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Sequence]:
        """One iteration over all unfinished requests. Returns the sequences that got a token, or failed."""
        with self.changing():
            start = time.perf_counter()
            self.begin_step()
            output = self.scheduler.schedule()
            if output.num_scheduled_tokens:
                scheduled = time.perf_counter()
                batch = forward_batch(output, self.blocks, self.runner.device)
                with self.recording(output):
                    logits = self.runner.run(output, batch)
                ran = time.perf_counter()
                self.scheduler.update_from_output(output)
                updated = time.perf_counter()
                rows = list(output.sampled.values())
                if rows != list(range(len(logits))):  # else each row once, in order: megabytes are not copied
                    logits = logits[rows]
                self._append(sample(logits, list(output.sampled)), output)
                seconds = scheduled - start + updated - ran, time.perf_counter() - start
                self.stats = self.stats.after_step(output, *seconds)
        return list(output.sampled)

    def _append(self, tokens: list[Token | Exception], output: SchedulerOutput) -> None:
        for seq, token in zip(output.sampled, tokens, strict=True):
            if isinstance(token, Exception):
                seq.error = repr(token)
            else:
                seq.outputs.append(token)  # the one line that changes the sequence's state
            self._settle(seq)
            self._retire(self.requests[seq.request_id])

    def begin_step(self) -> None:
        """Events that are recorded from here on are of the next step."""
        if self.trace is not None:
            self.trace.step += 1

    @contextmanager
    def recording(self, output: SchedulerOutput) -> Iterator[None]:
        """Around the run of a step: events of what it preempts and computes, and then of what it wrote."""
        if self.trace is None:
            yield
            return
        for seq, mode in output.preempted.items():
            self.trace.record("preempt", seq=seq.seq_id, mode=mode)
        self.trace.record("schedule", seqs={seq.seq_id: count for seq, count in output.num_scheduled_tokens.items()})
        yield
        for seq, count in output.num_scheduled_tokens.items():
            words = self.tokenizer.pieces(seq.tokens(seq.num_computed, seq.num_computed + count))
            self.trace.record("write", seq=seq.seq_id, start=seq.num_computed, count=count, tokens=words)

    def abort(self, *request_ids: str) -> None:
        """Stop requests and free their blocks. Their texts so far remain. Raises ValueError, changing nothing, where
        one of them is not unfinished."""
        for request_id in request_ids:
            if request_id not in self.requests:
                raise ValueError(f"there is no unfinished request {request_id!r}")
        with self.changing():
            ids = dict.fromkeys(request_ids)
            self._aborting = [self.requests[request_id] for request_id in ids if request_id in self.requests]
            for seq in self._mark_aborted():
                self._settle(seq)
            for request in self._aborting:
                self._retire(request)
            self._aborting = ()

    def metrics(self) -> Metrics:
        """What the engine did so far, and how it stands now."""
        return Metrics.of(self.stats, self.scheduler, self.requests.values())

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, the derived data may disagree with the state; if an exception leaves it, they stay marked so."""
        with self.lock:
            self.recover()
            self._changing = True
            yield
            self._changing = False

    def recover(self) -> None:
        """If the call before was interrupted, rebuild what is derived: no block is held, no token computed."""
        if not self._changing:
            return
        self._mark_aborted()
        requests = list(self.requests.values())
        for request in requests:
            for seq in request.seqs:
                seq.detokenizer = self._detokenizer(seq)
                self._write_text(seq)
        self.scheduler.reset(seq for request in requests for seq in request.seqs if not seq.finish_reason)
        for request in requests:
            self._retire(request)
        self._aborting, self._changing = (), False

    def _mark_aborted(self) -> list[Sequence]:
        """The sequences that an abort ends."""
        seqs = [seq for request in self._aborting for seq in request.seqs if seq.aborted or not seq.finish_reason]
        for seq in seqs:
            seq.aborted = True
        return seqs

    def _settle(self, seq: Sequence) -> None:
        """Derive the text after a new token, an error or an abort, and remove the sequence if it is finished."""
        self._write_text(seq)
        if seq.finish_reason:
            if self.trace is not None:
                self.trace.record("finish", seq=seq.seq_id, reason=seq.finish_reason)
            self.scheduler.finish(seq)

    def _write_text(self, seq: Sequence) -> None:
        assert seq.detokenizer
        try:
            for token in seq.outputs[len(seq.detokenizer.pieces) :]:
                seq.detokenizer.push(token.token_id)
        except Exception as error:  # it fails this sequence only
            seq.error = repr(error)
        if seq.error is not None or (seq.aborted and not seq.finish_reason):
            seq.detokenizer.close("abort" if seq.error is None else "error")

    def _retire(self, request: Request) -> None:
        """Move a finished request from `requests` to `stats`, in one line, so that it is counted once."""
        if request.finished:
            self.stats, _ = self.stats.after_request(request), self.requests.pop(request.request_id)

    def _detokenizer(self, seq: Sequence) -> IncrementalDetokenizer:
        max_tokens = min(seq.params.max_tokens, self.scheduler.max_model_len - len(seq.prompt_token_ids))
        return IncrementalDetokenizer(seq.params, self.tokenizer, max_tokens, seq.prompt_token_ids)
