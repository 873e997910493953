"""Chapter 11. Four servers that differ in their memory and in nothing else.

    max, pow2, oracle     Orca of the paper's section 6.1: a contiguous run a request, from a buddy allocator
    paged                 ours: blocks of 16 tokens, as they fill

The scheduler is one and the same class: iteration by iteration, first come first served. Orca's code
is not public. The paper's authors wrote their own for section 6, and so do we. Beam searches on a paged server are
stepped by the client of the pool that `LLM.beam_search` uses. Elsewhere each beam is a request of its own.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from itertools import repeat
from typing import Literal

from minipaged.engine.beam_scheduler import BeamScheduler, BeamSearchParams, Search
from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import SamplingParams, Sequence
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.kv_cache_size import OPT_13B, OPT_13B_POOL_BYTES
from minipaged.memory.reservation import POLICIES, MemoryAccount
from minipaged.simulator.contiguous import ReservedMemory
from minipaged.simulator.cost import CostModel
from minipaged.simulator.lengths import MAX_MODEL_LEN
from minipaged.simulator.workloads import Request

SERVERS = ("max", "pow2", "oracle", "paged")
NUM_SLOTS = OPT_13B_POOL_BYTES // OPT_13B.token_bytes  # 15,728: the 15.7K of the paper's Table 1
# Defaults of the vLLM of that time (its arg_utils.py and block_manager.py): 256 sequences, 2,560 tokens a step, 1 % of
# the blocks kept free, 4 GiB of host memory to swap to.
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2560
WATERMARK = 0.01
SWAP_BYTES = 4 << 30

Preemption = Literal["recompute", "swap"]


@dataclass
class Server:
    """A scheduler of requests and one of beam searches over one memory. One run each.

    The two take turns: each goes on until nothing of its kind is left, so the other begins with an empty pool.
    Raises ValueError for a name that is none of SERVERS, and whatever the scheduler and the memory refuse.
    """

    name: str
    num_slots: int = NUM_SLOTS
    block_size: int = 16
    prefix_caching: bool = False
    preemption: Preemption = "recompute"
    max_num_seqs: int = MAX_NUM_SEQS
    watermark: float = WATERMARK
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        if self.name not in SERVERS:
            raise ValueError(f"unknown server {self.name!r}: it is one of {', '.join(SERVERS)}")
        self.memory: BlockManager
        if self.name in POLICIES:
            self.memory = ReservedMemory(self.num_slots, self.name, MAX_MODEL_LEN)
            self.cost = replace(self.cost, attention=1.0)
        else:
            host = SWAP_BYTES // OPT_13B.block_bytes(self.block_size) if self.preemption == "swap" else 0
            self.memory = BlockManager(
                self.num_slots // self.block_size,
                self.block_size,
                num_host_blocks=host,
                enable_prefix_caching=self.prefix_caching,
            )
            self.cost = replace(self.cost, block_size=self.block_size)
        budget = max(MAX_NUM_BATCHED_TOKENS, self.max_num_seqs)
        self.scheduler = Scheduler(self.memory, MAX_MODEL_LEN, self.max_num_seqs, budget, watermark=self.watermark)
        self.beams = BeamScheduler(self.memory, self.max_num_seqs, budget)
        self._turn: Scheduler | BeamScheduler = self.scheduler
        self.num_requests = 0

    def add(self, request: Request) -> list[Sequence] | list[Search]:
        """Queue a request. Returns its parts: it is answered when the last of them is.

        Raises ValueError for one that could never run.
        """
        number, self.num_requests = self.num_requests, self.num_requests + 1
        if isinstance(self.memory, ReservedMemory):  # no memory is shared: each sample, or beam, is a request
            prompt, params = _zeros(request.prompt_len), _params(request.output_len, 1)
            num_seqs = max(request.n, request.beam_width)
            seqs = [Sequence(f"{number}.{i}", 0, prompt, params) for i in range(num_seqs)]
            for seq in seqs:
                self.memory.expect(seq.seq_id, request.prompt_len, request.output_len)
            self.scheduler.add(seqs)
            return seqs
        prompt = _prompt(request, number) if self.prefix_caching else _zeros(request.prompt_len)
        params = _params(request.output_len, request.n)
        seqs = [Sequence(str(number), i, prompt, params) for i in range(request.n)]
        if request.beam_width:
            beam_params = BeamSearchParams(request.beam_width, max_tokens=request.output_len)
            search = Search(beam_params, seqs, room=MAX_MODEL_LEN - request.prompt_len)
            self.beams.check(search)
            self.beams.waiting.append(search)
            return [search]
        self.scheduler.check(request.prompt_len, request.output_len)
        self.scheduler.add(seqs)
        return seqs

    def whose_turn(self) -> Scheduler | BeamScheduler:
        """What schedules the next step."""
        if not self._turn.running and not self._turn.waiting:
            self._turn = self.beams if self._turn is self.scheduler else self.scheduler
        return self._turn

    @property
    def running(self) -> list[Sequence]:
        """The sequences that hold blocks of the device."""
        return self.scheduler.running or [beam for search in self.beams.running for beam in search.beams]

    @property
    def num_preempted(self) -> int:
        return self.scheduler.counts["recompute"] + self.scheduler.counts["swap"] + self.beams.num_preempted

    def account(self) -> MemoryAccount:
        """Where every slot of the pool is. It sums to the slots of the pool, at every step."""
        if isinstance(self.memory, ReservedMemory):
            return self.memory.account()
        return paged_account(self.memory, self.running, self.num_slots)


def paged_account(memory: BlockManager, running: list[Sequence], num_slots: int) -> MemoryAccount:
    """The account of a pool of blocks. What a block has beyond its sequence's end is rounding; external there is none.

    Slots that are too few for a block, at the end of the pool, are rounding too. A token that several sequences share
    is held once.
    """
    reserved = rounding = 0
    seen: set[int] = set()  # last blocks, which samples and beams may share
    for seq in running:
        table = memory.tables[seq.seq_id]
        num_tokens = table.num_tokens
        empty = -num_tokens % memory.block_size
        if not empty:
            continue
        last = table.slot(num_tokens - 1) // memory.block_size
        if last in seen:
            continue
        seen.add(last)
        to_come = len(seq.prompt_token_ids) + seq.params.max_tokens - num_tokens
        reserved += min(empty, to_come)
        rounding += max(0, empty - to_come)
    in_use = memory.num_used * memory.block_size
    return MemoryAccount(
        held=in_use - reserved - rounding,
        reserved=reserved,
        over_reserved=0,
        rounding=rounding + num_slots - memory.num_slots,
        external=0,
        free=memory.num_slots - in_use,
    )


@cache
def _zeros(n: int) -> list[int]:
    """A prompt whose text does not matter, one for all of its length: a prompt is never written."""
    return [0] * n


def _prompt(request: Request, number: int) -> list[int]:
    """The shared prefix, then tokens that no other request has."""
    return [*range(request.prefix_len), *repeat(-1 - number, request.prompt_len - request.prefix_len)]


@cache
def _params(output_len: int, n: int) -> SamplingParams:
    return SamplingParams(n, temperature=1.0, max_tokens=output_len, ignore_eos=True)
