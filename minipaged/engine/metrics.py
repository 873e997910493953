"""Chapter 10. What an engine did so far, in numbers: memory, batches, preemptions, and what a user waits for.

Two times are what a user of a serving engine feels. The time to first token is from the request's arrival to its first
token: waiting in the queue, and prefill. The time between tokens is from one token of a sample to its next.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from minipaged.engine.scheduler import Scheduler
from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.engine.sequence import Request
from minipaged.memory.prefix_cache import PrefixCache

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
class Metrics:
    """A moment's view of an engine. Blocks are 0 where the cache has none."""

    num_blocks: int
    num_blocks_used: int  # named by a table
    num_blocks_cached: int  # named by no table, and in the prefix cache until they are evicted
    num_blocks_free: int  # neither
    num_host_blocks: int
    num_host_blocks_used: int
    num_running: int  # sequences
    num_waiting: int  # sequences; those swapped out are among them
    num_finished: int  # requests
    num_aborted: int
    num_failed: int
    prefix_tokens_looked_up: int  # tokens of requests as they entered, or came back
    prefix_tokens_found: int
    preemptions: dict[str, int]  # by mode: recompute, swap
    num_steps: int
    num_tokens_computed: int
    num_tokens_generated: int
    mean_batch_size: float  # sequences in a step
    mean_tokens_per_step: float
    time_to_first_token: Times
    time_between_tokens: Times
    step_seconds: float  # all steps together
    scheduler_seconds: float  # what of it the scheduler and its bookkeeping took

    @classmethod
    def of(cls, scheduler: Scheduler, unfinished: Iterable[Request], totals: "Totals", stats: "StepStats") -> "Metrics":
        """The view of an engine with this scheduler, these requests and these sums."""
        pool, host = scheduler.blocks.device, scheduler.blocks.host
        used = scheduler.blocks.num_used
        cached = pool.num_evictable if isinstance(pool, PrefixCache) else 0
        return cls(
            num_blocks=pool.num_blocks,
            num_blocks_used=used,
            num_blocks_cached=cached,
            num_blocks_free=pool.num_free - cached,
            num_host_blocks=host.num_blocks if host else 0,
            num_host_blocks_used=host.num_blocks - host.num_free if host else 0,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_finished=totals.num_finished,
            num_aborted=totals.num_aborted,
            num_failed=totals.num_failed,
            prefix_tokens_looked_up=scheduler.counts["looked_up"] if scheduler.blocks.enable_prefix_caching else 0,
            prefix_tokens_found=scheduler.counts["found"],
            preemptions={mode: scheduler.counts[mode] for mode in ("recompute", "swap")},
            num_steps=stats.num_steps,
            num_tokens_computed=stats.num_computed,
            num_tokens_generated=totals.num_tokens + sum(len(s.outputs) for each in unfinished for s in each.seqs),
            mean_batch_size=stats.num_scheduled / max(1, stats.num_steps),
            mean_tokens_per_step=stats.num_computed / max(1, stats.num_steps),
            time_to_first_token=Times.of(totals.first),
            time_between_tokens=Times.of(totals.between),
            step_seconds=stats.step_seconds,
            scheduler_seconds=stats.scheduler_seconds,
        )

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_tokens_found / self.prefix_tokens_looked_up if self.prefix_tokens_looked_up else 0.0

    @property
    def scheduler_share(self) -> float:
        return self.scheduler_seconds / self.step_seconds if self.step_seconds else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """For a table: what, and how much."""
        blocks = f"{self.num_blocks_used} used, {self.num_blocks_cached} cached, {self.num_blocks_free} free"
        first, between = self.time_to_first_token, self.time_between_tokens
        return [
            ("requests", f"{self.num_running} running, {self.num_waiting} waiting, {self.num_finished} finished"),
            ("blocks", f"{blocks} of {self.num_blocks}"),
            ("blocks on the host", f"{self.num_host_blocks_used} used of {self.num_host_blocks}"),
            ("prefix cache", f"{self.prefix_hit_rate:.1%} of {self.prefix_tokens_looked_up:,} tokens found"),
            ("preemptions", ", ".join(f"{number} by {mode}" for mode, number in self.preemptions.items())),
            ("steps", f"{self.num_steps:,}, of {self.mean_batch_size:.1f} sequences on average"),
            ("tokens", f"{self.num_tokens_computed:,} computed, {self.num_tokens_generated:,} generated"),
            ("time to first token", f"mean {first.mean * 1e3:.1f} ms, p99 {first.p99 * 1e3:.1f} ms"),
            ("time between tokens", f"mean {between.mean * 1e3:.1f} ms, p99 {between.p99 * 1e3:.1f} ms"),
            ("scheduler", f"{self.scheduler_share:.1%} of {self.step_seconds:.2f} s"),
        ]


@dataclass(frozen=True)
class Totals:
    """Sums over the requests that are gone. What a request adds follows from the request alone."""

    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    first: tuple[float, ...] = ()  # seconds to the first token, of the latest requests
    between: tuple[float, ...] = ()  # seconds between tokens

    def plus(self, request: Request) -> "Totals":
        reasons = {seq.finish_reason for seq in request.seqs}
        failed, aborted = "error" in reasons, "abort" in reasons
        times = [[token.time for token in seq.outputs] for seq in request.seqs]
        first = [min(each[0] for each in times if each) - request.arrival_time] if any(times) else []
        between = [b - a for each in times for a, b in pairwise(each)]
        return Totals(
            self.num_finished + (not failed and not aborted),
            self.num_aborted + (aborted and not failed),
            self.num_failed + failed,
            self.num_tokens + sum(map(len, times)),
            (*self.first, *first)[-KEPT:],
            (*self.between, *between)[-KEPT:],
        )


@dataclass(frozen=True)
class StepStats:
    """What the steps cost. A step that was interrupted is not counted; what it computes again is."""

    num_steps: int = 0
    num_scheduled: int = 0  # sequences, over all steps
    num_computed: int = 0  # tokens
    scheduler_seconds: float = 0.0  # the scheduler and its bookkeeping
    step_seconds: float = 0.0

    def plus(self, output: SchedulerOutput, scheduler_seconds: float, step_seconds: float) -> "StepStats":
        return StepStats(
            self.num_steps + 1,
            self.num_scheduled + len(output.num_scheduled_tokens),
            self.num_computed + output.total_num_scheduled_tokens,
            self.scheduler_seconds + scheduler_seconds,
            self.step_seconds + step_seconds,
        )
