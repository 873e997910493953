"""Chapter 10. What an engine did so far, in numbers: memory, batches, preemptions, and what a user waits for.

Time to first token: from the request's arrival, so with its wait in the queue and its prefill. Time between tokens:
from one token of a sample to its next.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

from minipaged.engine.scheduler import Scheduler
from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.engine.sequence import Request

KEPT = 10_000  # times that are kept, the latest ones: an engine may run for days


@dataclass(frozen=True)
class Times:
    """A distribution of times, in seconds. Zeros where nothing was measured."""

    count: int = 0
    mean: float = 0.0
    median: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Times":
        ordered = sorted(seconds)
        if not ordered:
            return cls()
        n = len(ordered)
        return cls(n, sum(ordered) / n, ordered[n // 2], ordered[min(n - 1, n * 99 // 100)])


@dataclass(frozen=True)
class Stats:
    """Sums over steps and finished requests. They change by one assignment: an interrupted step is not counted, and a
    request is counted once."""

    num_steps: int = 0
    num_scheduled_seqs: int = 0  # over all steps
    num_tokens_computed: int = 0
    scheduler_seconds: float = 0.0  # the scheduler and its bookkeeping
    step_seconds: float = 0.0  # all of it
    num_finished: int = 0  # requests
    num_aborted: int = 0
    num_failed: int = 0
    num_tokens_generated: int = 0
    first_token_seconds: tuple[float, ...] = ()  # from arrival, of the latest requests
    between_token_seconds: tuple[float, ...] = ()

    def after_step(self, output: SchedulerOutput, scheduler_seconds: float, step_seconds: float) -> Self:
        return replace(
            self,
            num_steps=self.num_steps + 1,
            num_scheduled_seqs=self.num_scheduled_seqs + len(output.num_scheduled_tokens),
            num_tokens_computed=self.num_tokens_computed + output.total_num_scheduled_tokens,
            scheduler_seconds=self.scheduler_seconds + scheduler_seconds,
            step_seconds=self.step_seconds + step_seconds,
        )

    def after_request(self, request: Request) -> Self:
        reasons = {seq.finish_reason for seq in request.seqs}
        failed, aborted = "error" in reasons, "abort" in reasons
        times = [[token.time for token in seq.outputs] for seq in request.seqs]
        first = [min(each[0] for each in times if each) - request.arrival_time] if any(times) else []
        between = [b - a for each in times for a, b in pairwise(each)]
        return replace(
            self,
            num_finished=self.num_finished + (not failed and not aborted),
            num_aborted=self.num_aborted + (aborted and not failed),
            num_failed=self.num_failed + failed,
            num_tokens_generated=self.num_tokens_generated + sum(map(len, times)),
            first_token_seconds=(*self.first_token_seconds, *first)[-KEPT:],
            between_token_seconds=(*self.between_token_seconds, *between)[-KEPT:],
        )


@dataclass(frozen=True)
class Metrics(Stats):
    """The sums, tokens of unfinished requests among them, and how the scheduler stands at this moment."""

    num_blocks: int = 0
    num_blocks_used: int = 0  # named by a table
    num_blocks_cached: int = 0  # named by no table: the prefix cache finds them until they are evicted
    num_blocks_free: int = 0  # neither
    num_host_blocks: int = 0
    num_host_blocks_used: int = 0
    num_running: int = 0  # sequences
    num_waiting: int = 0  # sequences; those swapped out are among them
    prefix_tokens_looked_up: int = 0  # tokens of sequences as they entered, or came back
    prefix_tokens_found: int = 0
    preemptions: dict[str, int] = field(default_factory=dict)  # by mode: recompute, swap

    @classmethod
    def of(cls, stats: Stats, scheduler: Scheduler, unfinished: Iterable[Request]) -> "Metrics":
        pool, host, counts = scheduler.blocks.device, scheduler.blocks.host, scheduler.counts
        cached = scheduler.blocks.prefix_cache.num_evictable if scheduler.blocks.prefix_cache else 0
        num_tokens = sum(len(seq.outputs) for request in unfinished for seq in request.seqs)
        return cls(
            **vars(stats) | {"num_tokens_generated": stats.num_tokens_generated + num_tokens},
            num_blocks=pool.num_blocks,
            num_blocks_used=scheduler.blocks.num_used,
            num_blocks_cached=cached,
            num_blocks_free=pool.num_free - cached,
            num_host_blocks=host.num_blocks if host else 0,
            num_host_blocks_used=host.num_blocks - host.num_free if host else 0,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            prefix_tokens_looked_up=counts["looked_up"] if scheduler.blocks.enable_prefix_caching else 0,
            prefix_tokens_found=counts["found"],
            preemptions={mode: counts[mode] for mode in ("recompute", "swap")},
        )

    @property
    def time_to_first_token(self) -> Times:
        return Times.of(self.first_token_seconds)

    @property
    def time_between_tokens(self) -> Times:
        return Times.of(self.between_token_seconds)

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_tokens_found / max(1, self.prefix_tokens_looked_up)

    @property
    def scheduler_share(self) -> float:
        return self.scheduler_seconds / self.step_seconds if self.step_seconds else 0.0
