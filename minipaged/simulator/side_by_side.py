"""Chapter 11. The same traffic, the same memory: one stream of requests in front of two servers, filmed.

                       +-->  reserved: a contiguous run for each request (max, pow2 or oracle)
    arrivals, lengths -+
                       +-->  paged: blocks of `block_size` slots, as they fill

Both are servers of `servers.py`: the scheduler of chapter 10 over the reservation pool of chapter 4, or over the block
manager of chapter 9. A film holds a frame for each second of the servers' clock. The site plays it, and makes another
one in the reader's browser when a slider is moved: plain Python, and no tensor.

    frame    account    where the pool's slots are, a `MemoryAccount`: their sum is the pool
             queues     requests that run, that wait, and that are finished
             tokens     request -> tokens that it stores now; a request that is missing stores none
             given      request -> what it was given since the frame before:
                        a run    [start, slots it will fill, slots asked for, slots of its buddy block]
                        blocks   [k, block, block, ...]: entries of its block table from the k-th on
"""

from itertools import takewhile
from typing import Any

from minipaged.engine.scheduler_output import SchedulerOutput
from minipaged.memory.reservation import POLICIES, ReservationPool
from minipaged.simulator.contiguous import ReservedMemory
from minipaged.simulator.lengths import MAX_MODEL_LEN, SHAREGPT, SPREAD, Lengths
from minipaged.simulator.servers import SERVERS, Server
from minipaged.simulator.simulate import simulate
from minipaged.simulator.workloads import Request, stream

SECONDS = 120  # of the servers' clock
RATES = (0.1, 5.0)  # requests a second
SPREADS = (0.1, 1.5)  # sigma of the lognormal lengths; the means stay those of ShareGPT
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens
LEFT_BLOCK_SIZE = 16  # where the server on the left is paged, too

Frame = dict[str, Any]


def film(rate: float = 3.0, spread: float = SPREAD, block_size: int = 16, policy: str = "max") -> dict[str, Any]:
    """The two servers under one stream of requests. Raises ValueError, with the numbers, for what cannot be filmed.

    policy: the server on the left, one of SERVERS. block_size: of the paged server on the right.
    """
    for name, value, (least, most) in (("rate", rate, RATES), ("spread", spread, SPREADS)):
        if not least <= value <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {value}")
    if block_size not in BLOCK_SIZES or policy not in SERVERS:
        raise ValueError(f"block_size is one of {BLOCK_SIZES} and policy of {SERVERS}, got {block_size} and {policy!r}")
    lengths = Lengths(SHAREGPT.prompt_mean, SHAREGPT.output_mean, spread)
    drawn = stream(lengths, rate, num_requests=int(2 * rate * SECONDS) + 100, seed=0)
    requests = list(takewhile(lambda request: request.arrival < SECONDS, drawn))
    servers = [Server(policy, block_size=LEFT_BLOCK_SIZE), Server("paged", block_size=block_size)]
    return {
        "schema": "minipaged.side_by_side",
        "version": 1,
        "settings": {"rate": rate, "spread": spread, "block_size": block_size, "policy": policy},
        "seconds": SECONDS,
        "num_slots": servers[0].num_slots,
        "requests": len(requests),
        "pools": [
            {
                "name": server.name,
                "block_size": None if server.name in POLICIES else server.memory.block_size,
                "frames": frames(server, requests),
            }
            for server in servers
        ],
    }


def frames(server: Server, requests: list[Request]) -> list[Frame]:
    """What a server looks like at 0, 1, 2, ... SECONDS: in the step that runs at that moment, its slots allocated."""
    if isinstance(server.memory, ReservedMemory):
        server.memory.pool = _StartsKept(server.num_slots, server.name, MAX_MODEL_LEN)
    empty, made, known = list(server.account()), list[Frame](), dict[int, list[int]]()
    clock, seen = 0.0, 0

    def fill(moment: float, frame: Frame) -> None:
        """The frames before a moment."""
        while len(made) < min(moment, SECONDS + 1):
            made.append(frame)

    def idle() -> Frame:
        return {"account": empty, "queues": [0, 0, seen], "tokens": {}, "given": {}}

    def look(server: Server, output: SchedulerOutput, seconds: float) -> None:
        nonlocal clock, seen
        if server.num_requests > seen and requests[seen].arrival > clock:  # it was idle, and waited for this request
            clock = requests[seen].arrival
            fill(clock, idle())
        seen = server.num_requests
        clock += seconds
        if len(made) < clock:
            fill(clock, _frame(server, known))

    simulate(requests, server, until=SECONDS + 1.0, account_every=0, on_step=look)
    fill(SECONDS + 1, idle())
    return made


def _frame(server: Server, known: dict[int, list[int]]) -> Frame:
    """The server now. `known`, what the frames before said of each request that ran, is brought up to date."""
    running, tokens, given = server.scheduler.running, {}, {}
    for seq in running:
        request = int(seq.seq_id.partition(".")[0])
        tokens[request] = server.memory.num_tokens(seq.seq_id)
        before, now = known.get(request, []), _place(server, seq.seq_id)
        known[request] = now
        if now != before and isinstance(server.memory, ReservedMemory):
            given[request] = now
        elif now != before:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False)))
            given[request] = [same, *now[same:]]
    for request in known.keys() - tokens.keys():  # finished, or preempted
        del known[request]
    waiting = len(server.scheduler.waiting)
    return {
        "account": list(server.account()),
        "queues": [len(running), waiting, server.num_requests - len(running) - waiting],
        "tokens": tokens,
        "given": given,
    }


def _place(server: Server, seq_id: str) -> list[int]:
    """Where a request's slots are: its run, or its block table."""
    memory = server.memory
    if not isinstance(memory, ReservedMemory):
        return list(memory.blocks(seq_id))
    assert isinstance(memory.pool, _StartsKept)
    lengths = memory.running[seq_id]
    asked = memory.pool.reservation(*lengths)
    return [memory.pool.starts[seq_id], sum(lengths), asked, 1 << (asked - 1).bit_length()]


class _StartsKept(ReservationPool):
    """A pool that remembers where each run starts."""

    def __init__(self, num_slots: int, policy: str, max_model_len: int):
        super().__init__(num_slots, policy, max_model_len)
        self.starts: dict[Any, int] = {}

    def allocate(self, seq: Any, prompt_len: int, output_len: int) -> int:
        self.starts[seq] = start = super().allocate(seq, prompt_len, output_len)
        return start
