"""Chapter 11. The loop of a server, with a clock that is told how long each step took.

    arrivals up to now  ->  schedule  ->  the step's seconds pass  ->  computed  ->  every sequence gets its next token

It is the loop of `engine/llm.py` with the model taken out. A token is chosen by counting: a sequence ends when it has
as many as the workload says.
"""

import random
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from minipaged.engine.scheduler import SchedulerOutput
from minipaged.engine.sequence import CompletionOutput, Sequence, SequenceGroup
from minipaged.memory.block_manager import BlockManager
from minipaged.simulator.beams import choose
from minipaged.simulator.cost import Load
from minipaged.simulator.paper import Bar
from minipaged.simulator.servers import Server
from minipaged.simulator.workloads import Request

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
    steps: int = 0

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
    scheduler, cost = server.scheduler, server.cost
    totals = Totals(*window)
    rng = random.Random(f"beams {seed}")
    coming = iter(requests)
    next_request = next(coming, None)
    clock = 0.0
    open_requests: dict[str, list[float]] = {}  # group -> [arrival, output tokens, groups that are unfinished]
    scores: dict[str, float] = {}  # of beams
    latencies: array[float] = array("d")
    num_tokens = num_steps = num_forks = 0
    while next_request is not None or scheduler.groups:
        if clock >= until:
            break
        if not scheduler.groups and next_request is not None:
            clock = max(clock, next_request.arrival)
        while next_request is not None and next_request.arrival <= clock:
            groups = server.add(next_request)
            entry = [next_request.arrival, next_request.output_len, len(groups)]
            open_requests.update((group.request_id, entry) for group in groups)
            next_request = next(coming, None)
        output = scheduler.schedule()
        seconds = cost.step(load_of(output))
        if on_step is not None:
            on_step(server, output, seconds)
        num_steps += 1
        in_window = totals.start <= clock < totals.end
        if in_window:
            _look(server, totals, seconds, account_every > 0 and num_steps % account_every == 0, count_blocks)
        clock += seconds
        searches: dict[SequenceGroup, None] = {}
        for _, group, seq in scheduler.computed(output):
            if group.beam_width:
                searches[group] = None
                continue
            tokens = seq.output.token_ids
            tokens.append(0)
            num_tokens += 1
            if len(tokens) == seq.params.max_tokens:
                scheduler.finish(group, seq, "length")
                if not group.seqs and not group.unborn:
                    totals.finished += in_window * _close(open_requests, group.request_id, clock, latencies)
        for group in searches:
            num_forks += 1
            num_tokens += _search(server, group, scores, rng, num_forks)
            if len(group.seqs[0].output.token_ids) == group.seqs[0].params.max_tokens:
                for seq in group.seqs:
                    del scores[seq.seq_id]
                scheduler.remove(group)
                totals.finished += in_window * _close(open_requests, group.request_id, clock, latencies)
    looked_up = scheduler.num_looked_up or 1
    preempted = scheduler.preemptions.total()
    return Result(clock, totals, latencies, num_tokens, preempted, scheduler.num_found / looked_up)


def load_of(output: SchedulerOutput) -> Load:
    """What a step computes and moves."""
    decodes = decode_context = prompt_tokens = prompt_context = 0
    pairs = 0.0
    for item in output.work:
        count = item.count
        if count == 1 and item.start:
            decodes += 1
            decode_context += item.start + 1
        else:
            prompt_tokens += count
            prompt_context += item.start + count
            pairs += count * item.start + count * (count + 1) / 2
    swapped = len(output.swap_out) + len(output.swap_in)
    return Load(decodes, decode_context, prompt_tokens, prompt_context, pairs, swapped, len(output.copies))


def _look(server: Server, totals: Totals, seconds: float, account: bool, count_blocks: bool) -> None:
    totals.seconds += seconds
    totals.steps += 1
    running = server.scheduler.running
    totals.sequences += seconds * sum(len(group.seqs) for group in running)
    if account:
        now = server.account()
        for place, part in enumerate((now.held, now.reserved, now.over_reserved, now.external_and_others)):
            totals.slots[place] += seconds * part
    if count_blocks:
        memory, size = server.memory, server.block_size
        assert isinstance(memory, BlockManager), "a run is no block, and nobody shares it"
        lengths = [memory.length(seq.seq_id) for group in running for seq in group.seqs]
        totals.tables += seconds * sum(-(-length // size) for length in lengths)
        totals.distinct += seconds * memory.num_slots_reserved / size


def _close(open_requests: dict[str, list[float]], group_id: str, clock: float, latencies: "array[float]") -> bool:
    """A group is answered. Returns whether its request is, too: where samples are groups, with the last of them."""
    entry = open_requests.pop(group_id)
    entry[2] -= 1
    if entry[2]:
        return False
    latencies.append((clock - entry[0]) / entry[1])
    return True


def _search(server: Server, group: SequenceGroup, scores: dict[str, float], rng: random.Random, number: int) -> int:
    """One step of a beam search: who dies, who forks, and one token for each that lives. Returns how many tokens."""
    beams = list(group.seqs)
    chosen = choose([scores.get(seq.seq_id, 0.0) for seq in beams], group.beam_width, rng)
    living: list[tuple[Sequence, float]] = []
    used: set[int] = set()
    for place, (index, score) in enumerate(chosen):
        seq = parent = beams[index]
        if index in used:
            answer = CompletionOutput(place, token_ids=list(parent.output.token_ids))
            name = f"{group.request_id}.{number}.{place}"
            seq = Sequence(name, parent.prompt_token_ids, parent.params, answer)
            server.scheduler.fork(group, parent, seq)
        used.add(index)
        living.append((seq, score))
    for index, seq in enumerate(beams):
        scores.pop(seq.seq_id, None)
        if index not in used:
            server.scheduler.drop(group, seq)
    for seq, score in living:
        scores[seq.seq_id] = score
        seq.output.token_ids.append(0)
    return len(living)
