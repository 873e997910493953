"""Chapter 10. The engine: requests by their token ids go in, and every step gives tokens of some of them.

while anything is unfinished:
    output = scheduler.schedule()          who computes what, and which blocks move (plain Python)
    logits = runner.run(output)            one ragged batch, prompts and single tokens mixed
    tokens = sample(logits)                for every sequence whose end was reached

Continuous batching is nothing more: who is in the batch is decided anew in each turn of this loop.
"""

import time
from dataclasses import dataclass

from torch import Tensor

from minipaged.engine.beam import BeamSearch, BeamSearchParams
from minipaged.engine.metrics import Meter, Metrics, Times
from minipaged.engine.runner import Runner
from minipaged.engine.sampling import logprobs, sample
from minipaged.engine.scheduler import Scheduler, SchedulerOutput
from minipaged.engine.sequence import (
    CompletionOutput,
    FinishReason,
    RequestOutput,
    SamplingParams,
    Sequence,
    SequenceGroup,
)
from minipaged.engine.text import Writer
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.trace import Trace
from minipaged.model.tokenizer import TextTokenizer

Ready = list[tuple[int, SequenceGroup, Sequence]]  # whose next token is due, and the row of its logits


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """One new token of one sample. `text` is what it adds: nothing, while a character or a stop string may follow.

    A sample that is aborted ends with one whose token_id is None.
    """

    request_id: str
    index: int
    text: str
    token_id: int | None
    finish_reason: FinishReason | None


class LLMEngine:
    """Invariant: a request is in `outputs` from its arrival until it is finished or aborted, and then holds nothing."""

    def __init__(self, runner: Runner, scheduler: Scheduler, tokenizer: TextTokenizer, trace: Trace | None = None):
        self.runner, self.scheduler, self.tokenizer, self.trace = runner, scheduler, tokenizer, trace
        self.outputs: dict[str, RequestOutput] = {}  # request -> its answer so far
        self._groups: dict[str, list[SequenceGroup]] = {}  # request -> one group, or one a sample where none can share
        self._new: list[StreamOutput] = []  # what the present step gave; after a failure, the next step hands it on
        self._meter = Meter()

    def add_request(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams | BeamSearchParams,
        *,
        seed: int = 0,
        prompt: str | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """Queue a request. Returns its answer, which grows while the engine steps. Raises ValueError where it could
        never run; nothing else is touched then."""
        beams = isinstance(params, BeamSearchParams)
        if isinstance(params, BeamSearchParams):
            if not self.scheduler.memory.shares_blocks:
                raise ValueError("a beam search forks, and sequences of the contiguous cache cannot share: use paged")
            search = BeamSearch(
                params,
                frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.tokenizer.eos_token_ids),
                min(params.max_tokens, self.scheduler.max_model_len - len(token_ids)),
            )
            n, width = 1, params.beam_width
            params = SamplingParams(max_tokens=params.max_tokens)
        else:
            n, width, search = params.n, 0, None
        outputs = [CompletionOutput(i, logprobs=None if params.logprobs is None else []) for i in range(n)]
        seqs = [
            Sequence(
                seq_id=f"{request_id}.{output.index}",
                prompt_token_ids=token_ids,
                params=params,
                output=CompletionOutput(0) if beams else output,  # beams come and go; the answer comes at the end
                cache_salt=cache_salt,
                seed=seed,
                writer=None if beams else Writer(output, params, self.tokenizer),
            )
            for output in outputs
        ]
        if self.scheduler.memory.shares_blocks:
            groups = [SequenceGroup(request_id, seqs[:1], seqs[1:], width, search)]
        else:
            groups = [SequenceGroup(seq.seq_id, [seq]) for seq in seqs]
        answer = RequestOutput(request_id, prompt, token_ids, outputs)
        for group in groups:  # the first refuses what all would
            self.scheduler.add(group)
        self.outputs[request_id], self._groups[request_id] = answer, groups
        self._meter.arrive(request_id)
        return answer

    def has_unfinished(self) -> bool:
        return bool(self.outputs)

    def step(self) -> list[StreamOutput]:
        """One iteration. Empty where nothing is unfinished, and where no sequence reached its end.

        If anything fails, Ctrl-C included, no token is lost and no block: every request computes its tokens anew.
        """
        start = time.perf_counter()
        try:
            output = self.scheduler.schedule()
            scheduled = time.perf_counter()
            if not output.work:
                return []
            logits = self.runner.run(output)
            ran = time.perf_counter()
            self._record_writes(output)
            ready = self.scheduler.computed(output)
            accounted = time.perf_counter()
            self._choose(logits, ready)
        except BaseException:
            self.scheduler.start_over()
            raise
        self._meter.num_steps += 1
        self._meter.num_scheduled += len(output.work)
        self._meter.num_computed += sum(item.count for item in output.work)
        self._meter.scheduler_seconds += scheduled - start + accounted - ran
        self._meter.step_seconds += time.perf_counter() - start
        new, self._new = self._new, []
        return new

    def abort(self, request_id: str) -> list[StreamOutput]:
        """Take a request out, wherever it stands, and give back its memory. Its text so far remains in its answer.

        Returns the last word of each of its samples that were unfinished: what of the text was held back. Raises
        ValueError where there is no such unfinished request.
        """
        if request_id not in self.outputs:
            raise ValueError(f"there is no unfinished request {request_id!r}")
        seqs = [seq for group in self._groups[request_id] for seq in (*group.seqs, *group.unborn)]
        for group in self._groups[request_id]:
            self.scheduler.abort(group.request_id)
        last = []
        for output in self.outputs[request_id].outputs:
            if output.finish_reason in (None, "abort"):
                output.finish_reason = "abort"
                text = next((s.writer.rest() for s in seqs if s.output is output and s.writer), "")
                last.append(StreamOutput(request_id, output.index, text, None, "abort"))
        self._leave(request_id, aborted=True)
        return last

    def metrics(self) -> Metrics:
        """What happened so far, and how it stands now."""
        scheduler, memory, meter = self.scheduler, self.runner.memory, self._meter
        pool = memory.allocator if isinstance(memory, BlockManager) else None
        host = memory.host if isinstance(memory, BlockManager) else None
        num_blocks = pool.num_blocks if pool else 0
        used = num_blocks - pool.num_free if pool else 0
        cached = pool.num_unused if isinstance(pool, PrefixCache) else 0
        return Metrics(
            num_blocks=num_blocks,
            num_blocks_used=used,
            num_blocks_cached=cached,
            num_blocks_free=num_blocks - used - cached,
            num_host_blocks=host.num_blocks if host else 0,
            num_host_blocks_used=host.num_blocks - host.num_free if host else 0,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_finished=meter.ended["finished"],
            num_aborted=meter.ended["aborted"],
            prefix_tokens_looked_up=scheduler.num_looked_up if memory.finds_prefixes else 0,
            prefix_tokens_found=scheduler.num_found,
            preemptions=dict(scheduler.preemptions),
            num_steps=meter.num_steps,
            num_tokens_computed=meter.num_computed,
            num_tokens_generated=meter.num_generated,
            mean_batch_size=meter.num_scheduled / max(1, meter.num_steps),
            mean_tokens_per_step=meter.num_computed / max(1, meter.num_steps),
            time_to_first_token=Times.of(meter.first),
            time_between_tokens=Times.of(meter.between),
            step_seconds=meter.step_seconds,
            scheduler_seconds=meter.scheduler_seconds,
        )

    # ---- the next tokens ---------------------------------------------------------------------------------------

    def _choose(self, logits: Tensor, ready: Ready) -> None:
        """Choose and append the next token of everybody who reached its end."""
        sampled = [(row, group, seq) for row, group, seq in ready if not group.beam_width]
        if sampled:
            wanted = [row for row, _, _ in sampled]  # a prompt's samples all draw from its one row
            # Megabytes, and nearly always each row once, in order: then they are not copied.
            rows = logits if wanted == list(range(len(logits))) else logits[wanted]
            seqs = [seq for _, _, seq in sampled]
            tokens = sample(rows, seqs)
            self._keep_logprobs(rows, tokens, seqs)
            for (_, group, seq), token in zip(sampled, tokens, strict=True):
                self._accept(group, seq, token)
        searches: dict[str, list[tuple[int, Sequence]]] = {}
        for row, group, seq in ready:
            if group.beam_width:
                searches.setdefault(group.request_id, []).append((row, seq))
        for request_id, beams in searches.items():
            self._advance(self.scheduler.groups[request_id], beams, logits)

    def _accept(self, group: SequenceGroup, seq: Sequence, token: int) -> None:
        """Append a token to its sequence, with its text, and finish the sequence where it ends."""
        request_id = seq.seq_id.rpartition(".")[0]
        text, reason = seq.writer.push(token, is_full=len(seq) + 1 >= self.scheduler.max_model_len)
        self._meter.token(request_id, seq.seq_id)
        self._new.append(StreamOutput(request_id, seq.output.index, text, token, reason))
        if reason:
            self.scheduler.finish(group, seq, reason)
            if self.outputs[request_id].finished:
                self._leave(request_id)

    def _keep_logprobs(self, logits: Tensor, tokens: list[int], seqs: list[Sequence]) -> None:
        asked = [i for i, seq in enumerate(seqs) if seq.params.logprobs is not None]
        if asked:
            numbers = [seqs[i].params.logprobs or 0 for i in asked]
            for i, found in zip(asked, logprobs(logits[asked], [tokens[i] for i in asked], numbers), strict=True):
                output = seqs[i].output
                assert output.logprobs is not None
                output.logprobs.append(found)
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + found[tokens[i]]

    def _advance(self, group: SequenceGroup, rows: list[tuple[int, Sequence]], logits: Tensor) -> None:
        """One step of a beam search: beams fork, go on and die. Its answer comes at its end, all at once."""
        beams = {id(seq): row for row, seq in rows}
        order = sorted(group.seqs, key=lambda seq: seq.output.index)  # the best beam first, as the search knows them
        search: BeamSearch = group.search
        choices = search.advance(logits[[beams[id(seq)] for seq in order]], [seq.output.token_ids for seq in order])
        if not choices:
            self._finish_search(group, search)
            return
        taken: set[int] = set()
        next_beams: list[tuple[Sequence, int]] = []
        for parent_index, token in choices:
            beam = parent = order[parent_index]
            if parent_index in taken:  # its first continuation goes on in the parent's own table
                search.num_forks += 1
                output = CompletionOutput(0, token_ids=list(parent.output.token_ids))
                seq_id = f"{group.request_id}.{search.num_forks}"
                beam = Sequence(seq_id, parent.prompt_token_ids, parent.params, output, parent.cache_salt)
                self.scheduler.fork(group, parent, beam)
            taken.add(parent_index)
            next_beams.append((beam, token))
        for index, seq in enumerate(order):
            if index not in taken:
                self.scheduler.drop(group, seq)
        for rank, (beam, token) in enumerate(next_beams):
            beam.output.index = rank
            beam.output.token_ids.append(token)

    def _finish_search(self, group: SequenceGroup, search: BeamSearch) -> None:
        request_id = group.request_id
        self.scheduler.remove(group)
        outputs = self.outputs[request_id].outputs
        outputs[:] = [
            CompletionOutput(
                rank,
                text=self.tokenizer.decode([t for t in found.token_ids if t not in search.params.stop_token_ids]),
                token_ids=found.token_ids,
                finish_reason=found.finish_reason,
                cumulative_logprob=found.cumulative_logprob,
                score=found.score,
            )
            for rank, found in enumerate(search.hypotheses)
        ]
        for output in outputs:
            self._meter.token(request_id, request_id)
            self._meter.num_generated += len(output.token_ids) - 1
        self._new += [
            StreamOutput(request_id, output.index, output.text, output.token_ids[-1], output.finish_reason)
            for output in outputs
        ]
        self._leave(request_id)

    def _leave(self, request_id: str, aborted: bool = False) -> None:
        seq_ids = [f"{request_id}.{output.index}" for output in self.outputs.pop(request_id).outputs]
        del self._groups[request_id]
        self._meter.leave(request_id, [*seq_ids, request_id], aborted)

    def _record_writes(self, output: SchedulerOutput) -> None:
        if self.trace is not None:
            for item in output.work:
                words = self.tokenizer.pieces(item.seq.tokens(item.start, item.start + item.count))
                self.trace.record("write", seq=item.seq.seq_id, start=item.start, count=item.count, tokens=words)
