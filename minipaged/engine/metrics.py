"""Chapter 10. What an engine did so far, in numbers: memory, batches, preemptions, and what a user waits for.

Two times are what a user of a serving engine feels. The time to first token is from the request's arrival to its first
token: waiting in the queue, and prefill. The time between tokens is from one token of a sample to its next.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

KEPT = 100_000  # times that are kept, the latest ones: an engine may run for days


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
    num_blocks_cached: int  # named by no table, and findable by the prefix cache until they are needed
    num_blocks_free: int  # neither
    num_host_blocks: int
    num_host_blocks_used: int
    num_running: int  # requests
    num_waiting: int  # requests; those swapped out are among them
    num_finished: int
    num_aborted: int
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


@dataclass
class Meter:
    """What an engine writes down while it runs."""

    num_steps: int = 0
    num_scheduled: int = 0  # sequences, over all steps
    num_computed: int = 0  # tokens
    num_generated: int = 0
    ended: Counter[str] = field(default_factory=Counter)  # requests, by how they ended: finished, aborted
    step_seconds: float = 0.0
    scheduler_seconds: float = 0.0
    first: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    between: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    _arrived: dict[str, float] = field(default_factory=dict)
    _last_token: dict[str, float] = field(default_factory=dict)

    def arrive(self, request_id: str) -> None:
        self._arrived[request_id] = time.perf_counter()

    def token(self, request_id: str, seq_id: str) -> None:
        now = time.perf_counter()
        self.num_generated += 1
        if request_id in self._arrived:
            self.first.append(now - self._arrived.pop(request_id))
        if seq_id in self._last_token:
            self.between.append(now - self._last_token[seq_id])
        self._last_token[seq_id] = now

    def leave(self, request_id: str, seq_ids: Iterable[str], aborted: bool) -> None:
        self.ended["aborted" if aborted else "finished"] += 1
        self._arrived.pop(request_id, None)
        for seq_id in seq_ids:
            self._last_token.pop(seq_id, None)
