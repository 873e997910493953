"""Chapter 11. The loop of a server, with a clock that is told how long each step took.

    arrivals up to now  ->  schedule  ->  the step's seconds pass  ->  update  ->  every sequence gets its next token

It is the loop of `engine/llm_engine.py` with the model taken out. A token is chosen by counting: a sequence ends when
it has as many as the workload says.
"""

import random
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from minipaged.engine.beam_scheduler import BeamScheduler, Choice, Search
from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.engine.sequence import Sequence, Token
from minipaged.simulator.beams import choose
from minipaged.simulator.contiguous import ReservedMemory
from minipaged.simulator.cost import StepCost
from minipaged.simulator.paper import Bar
from minipaged.simulator.servers import Server
from minipaged.simulator.workloads import Request

TOKEN = Token(0, None, 0.0)  # every token that is generated
OnStep = Callable[[Server, SchedulerOutput, float], None]  # after schedule; the seconds are those of the step


@dataclass
class Totals:
    """What was seen between `start` and `end`, every step weighted with its seconds."""

    start: float
    end: float
    seconds: float = 0.0
    sequences: float = 0.0  # sum of running sequences times seconds
    slots: list[float] = field(default_factory=lambda: [0.0] * 4)  # slot-seconds: held, reserved, internal, external
    tables: float = 0.0  # blocks that tables name, shared ones once for each table
    distinct: float = 0.0  # blocks in use
    finished: int = 0  # requests

    @property
    def batch(self) -> float:
        """Mean number of running sequences."""
        return self.sequences / self.seconds if self.seconds else 0.0

    @property
    def shares(self) -> Bar:
        """Mean share of the pool's slots, in %, cut as in the paper's Figure 2. They sum to 100."""
        total = sum(self.slots) or 1.0
        return Bar(*(100 * part / total for part in self.slots))

    @property
    def saved(self) -> float:
        """Share of blocks that sharing saves: blocks saved over blocks that there would be without sharing."""
        return 1 - self.distinct / self.tables if self.tables else 0.0

    @property
    def throughput(self) -> float:
        """Requests finished a second."""
        return self.finished / self.seconds if self.seconds else 0.0


@dataclass
class Result:
    """clock: seconds in all. latencies: of each request, end to end over the tokens of its answer, as they finish."""

    clock: float
    totals: Totals
    latencies: "array[float]"
    tokens: int  # of all answers
    preemptions: int
    found: float  # share of prompt tokens that the prefix cache had

    @property
    def latency(self) -> float:
        """The paper's normalised latency: mean of seconds a token, over the requests."""
        return sum(self.latencies) / len(self.latencies) if self.latencies else 0.0


def simulate(
    requests: Iterable[Request],
    server: Server,
    *,
    window: tuple[float, float] = (0.0, float("inf")),
    until: float = float("inf"),
    account_every: int = 1,
    count_blocks: bool = False,
    on_step: OnStep | None = None,
    seed: int = 0,
) -> Result:
    """Serve all requests, or until the clock passes `until`. Totals are of `window`, in seconds.

    account_every: steps between two looks at the memory; 0 for none. count_blocks: how many are shared, too.
    """
    totals = Totals(*window)
    rng = random.Random(f"beams {seed}")
    coming = iter(requests)
    next_request = next(coming, None)
    clock = 0.0
    unfinished: dict[Sequence | Search, list[float]] = {}  # part -> [arrival, output tokens, parts unfinished]
    latencies: array[float] = array("d")
    num_tokens = num_steps = 0
    while next_request is not None or unfinished:
        if clock >= until:
            break
        if not unfinished and next_request is not None:
            clock = max(clock, next_request.arrival)
        while next_request is not None and next_request.arrival <= clock:
            parts = server.add(next_request)
            entry = [next_request.arrival, next_request.output_len, len(parts)]
            unfinished.update((part, entry) for part in parts)
            next_request = next(coming, None)
        scheduler = server.whose_turn()
        output = scheduler.schedule()
        seconds = server.cost.step(cost_of(output))
        if on_step is not None:
            on_step(server, output, seconds)
        num_steps += 1
        in_window = totals.start <= clock < totals.end
        if in_window:
            _look(server, totals, seconds, account_every > 0 and num_steps % account_every == 0, count_blocks)
        clock += seconds
        ended: list[Sequence | Search] = []
        if isinstance(scheduler, BeamScheduler):
            for search in scheduler.update_from_output(output):
                num_tokens += search.params.beam_width
                if not _choose(scheduler, search, rng):
                    ended.append(search)
        else:
            scheduler.update_from_output(output)
            num_tokens += len(output.sampled)
            for seq in output.sampled:
                seq.outputs.append(TOKEN)
                if len(seq.outputs) == seq.params.max_tokens:
                    scheduler.finish(seq)
                    ended.append(seq)
        for part in ended:
            totals.finished += in_window * _close(unfinished.pop(part), clock, latencies)
    counts = server.scheduler.counts
    found = counts["found"] / (counts["looked_up"] or 1)
    return Result(clock, totals, latencies, num_tokens, server.num_preempted, found)


def cost_of(output: SchedulerOutput) -> StepCost:
    """What a step computes and moves."""
    decodes = decode_context = prompt_tokens = prompt_context = 0
    pairs = 0.0
    for seq, count in output.num_scheduled_tokens.items():
        start = seq.num_computed
        if count == 1 and start:
            decodes += 1
            decode_context += start + 1
        else:
            prompt_tokens += count
            prompt_context += start + count
            pairs += count * start + count * (count + 1) / 2
    swapped = len(output.swap_out) + len(output.swap_in)
    return StepCost(decodes, decode_context, prompt_tokens, prompt_context, pairs, swapped, len(output.copies))


def _look(server: Server, totals: Totals, seconds: float, account: bool, count_blocks: bool) -> None:
    totals.seconds += seconds
    running = server.running
    totals.sequences += seconds * len(running)
    if account:
        now = server.account()
        for place, part in enumerate((now.held, now.reserved, now.over_reserved, now.external_and_others)):
            totals.slots[place] += seconds * part
    if count_blocks:
        memory = server.memory
        assert not isinstance(memory, ReservedMemory), "a run is not made of blocks, and has one owner"
        totals.tables += seconds * sum(memory.blocks_for(memory.num_tokens(seq.seq_id)) for seq in running)
        totals.distinct += seconds * memory.num_used


def _close(entry: list[float], clock: float, latencies: "array[float]") -> bool:
    """A part of a request is answered. Returns whether the request is, too: with the last of its parts."""
    entry[2] -= 1
    if entry[2]:
        return False
    latencies.append((clock - entry[0]) / entry[1])
    return True


def _choose(scheduler: BeamScheduler, search: Search, rng: random.Random) -> list[Choice]:
    """One step of a beam search. Returns the next beams; none where the answer is complete."""
    choices: list[Choice] = []
    if len(search.beams[0].outputs) + 1 < search.max_tokens:
        chosen = choose(search.cumulative, search.params.beam_width, rng)
        choices = [Choice(beam, TOKEN.token_id) for beam, _ in chosen]
        search.cumulative = [score for _, score in chosen]
    scheduler.advance(search, choices)
    return choices
