"""Chapter 9. Swap: a group leaves the device whole and comes back whole, and shares as it shared before.

Any implementation that keeps the contract passes: no block id is pinned, and no order within a plan.
"""

from functools import cache

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from alone import alone
from memory_model import BLOCK_SIZES, Pool, state
from minipaged import LLM, SamplingParams
from minipaged.cdiv import cdiv
from minipaged.kvcache.paged import PagedCache
from minipaged.kvcache.swap_space import SwapSpace
from minipaged.memory.block_allocator import BlockAllocator, OutOfBlocks
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache
from minipaged.memory.swap import Swap
from minipaged.model.load import TINY, load_model
from sharing_model import PagedMemoryMachine, SwapMachine
from strategies import costly, generators

pytestmark = pytest.mark.ch09

TestSwap = SwapMachine.TestCase


@cache
def tiny():
    return load_model("tiny", dtype="float64")


class Memory:
    """A device and a host, with contents."""

    def __init__(self, num_blocks=8, num_host_blocks=8, block_size=4):
        self.device, self.host = BlockAllocator(num_blocks), BlockAllocator(num_host_blocks)
        self.pool, self.host_pool = Pool(num_blocks, block_size), Pool(num_host_blocks, block_size)
        self.swap = Swap(self.device, self.host)
        self.block_size = block_size

    def sequence(self, tokens):
        table = BlockTable(self.device, self.block_size)
        table.append_tokens(len(tokens))
        self.pool.write(table, 0, tokens)
        return table

    def out(self, *tables):
        plan = self.swap.swap_out(tables)
        self.pool.copy(plan, self.host_pool)
        self.pool.poison(source for source, _ in plan if self.device.ref_count(source) == 0)
        return plan

    def back(self, *tables):
        plan = self.swap.swap_in(tables)
        self.host_pool.copy(plan, self.pool)
        self.host_pool.poison(source for source, _ in plan if self.host.ref_count(source) == 0)
        return plan

    def state(self, *tables):
        return state(self.device, *tables), state(self.host)


@given(tokens=st.lists(st.integers(0, 9), max_size=20), block_size=BLOCK_SIZES)
def test_there_and_back(tokens, block_size):
    """Also the last block, however few tokens it holds."""
    memory = Memory(20, 20, block_size)
    table = memory.sequence(tokens)
    num_blocks = len(table.blocks)
    assert len(memory.out(table)) == num_blocks
    assert (memory.device.num_free, memory.host.num_free) == (20, 20 - num_blocks)
    memory.sequence("x" * 20 * block_size).release()  # another request uses the device meanwhile
    assert memory.host_pool.read(table) == tokens
    assert len(memory.back(table)) == num_blocks
    assert (memory.device.num_free, memory.host.num_free) == (20 - num_blocks, 20)
    assert memory.pool.read(table) == tokens


def test_a_shared_block_moves_once_and_is_shared_after():
    memory = Memory()
    first = memory.sequence("abcdef")
    second = first.fork()
    memory.pool.copy(second.append_tokens(1))
    memory.pool.write(second, 6, "X")
    assert len(memory.out(first, second)) == 3
    assert (memory.device.num_free, memory.host.num_free) == (8, 5)
    assert first.blocks[0] == second.blocks[0] and memory.host.ref_count(first.blocks[0]) == 2
    assert len(memory.back(first, second)) == 3
    assert first.blocks[0] == second.blocks[0] and memory.device.ref_count(first.blocks[0]) == 2
    assert ("".join(memory.pool.read(first)), "".join(memory.pool.read(second))) == ("abcdef", "abcdefX")


def test_the_sequence_goes_on_where_it_stopped():
    memory = Memory()
    table = memory.sequence("abcde")
    memory.out(table)
    memory.back(table)
    assert table.append_tokens(3) == [], "the last block is its own, and has room"
    memory.pool.write(table, 5, "fgh")
    assert "".join(memory.pool.read(table)) == "abcdefgh"


def test_samples_that_come_back_still_copy_on_write():
    memory = Memory()
    first = memory.sequence("abcde")
    second = first.fork()
    memory.out(first, second)
    memory.back(first, second)
    memory.pool.copy(second.append_tokens(1))
    memory.pool.write(second, 5, "X")
    memory.pool.copy(first.append_tokens(1))
    memory.pool.write(first, 5, "Y")
    assert ("".join(memory.pool.read(first)), "".join(memory.pool.read(second))) == ("abcdeY", "abcdeX")


def test_a_block_that_another_group_names_too_stays_for_it():
    memory = Memory()
    inside = memory.sequence("abcdef")
    outside = inside.fork()
    blocks = outside.blocks
    assert len(memory.out(inside)) == 2, "the group leaves with all of its tokens"
    assert outside.blocks == blocks and memory.device.num_free == 6
    assert [memory.device.ref_count(block) for block in blocks] == [1, 1]
    assert outside.append_tokens(1) == [], "alone with its last block now"
    memory.pool.write(outside, 6, "X")
    memory.back(inside)
    assert ("".join(memory.pool.read(inside)), "".join(memory.pool.read(outside))) == ("abcdef", "abcdefX")


def test_a_swapped_out_sequence_may_be_released():
    memory = Memory()
    table = memory.sequence("abcde")
    memory.out(table)
    table.release()
    assert (memory.device.num_free, memory.host.num_free, table.num_tokens) == (8, 8, 0)


@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=16),
    more=st.lists(st.integers(0, 9), max_size=6),
    block_size=BLOCK_SIZES,
    room=st.integers(0, 4),
    data=st.data(),
)
def test_blocks_that_the_device_has_are_named_and_not_copied(tokens, more, block_size, room, data):
    """The sequence that stayed holds its first tokens in the blocks that both name, and neither block is copied."""
    memory = Memory(40, 40, block_size)
    first = BlockTable(memory.device, block_size)  # free again at the swap: both pools then use the same numbers
    first.append_tokens(room * block_size)
    stays = memory.sequence(tokens)
    moves = stays.fork()
    memory.pool.copy(moves.append_tokens(len(more)))
    memory.pool.write(moves, len(tokens), more)
    memory.out(moves)
    num_known = data.draw(st.integers(0, len(tokens) // block_size), label="num_known")
    known = dict(zip(moves.blocks[:num_known], stays.blocks, strict=False))
    missing = len(moves.blocks) - num_known
    other = BlockTable(memory.device, block_size)
    other.append_tokens(memory.device.num_free * block_size)
    first.release()
    before = memory.state(stays, moves, other)
    if missing > room:
        with pytest.raises(OutOfBlocks):
            memory.swap.swap_in([moves], known)
        assert memory.state(stays, moves, other) == before
        return
    lay = moves.blocks
    plan = memory.swap.swap_in([moves], known)
    assert plan == list(zip(lay, moves.blocks, strict=True))[num_known:]
    memory.host_pool.copy(plan, memory.pool)
    assert moves.blocks[:num_known] == stays.blocks[:num_known]
    assert memory.pool.read(moves) == tokens + more and memory.pool.read(stays) == tokens
    assert memory.host.num_free == 40 and memory.device.num_free == room - missing
    stays.release()
    assert memory.pool.read(moves) == tokens + more
    moves.release()
    other.release()
    assert memory.device.num_free == 40


def test_plans_are_carried_out_in_their_order():
    """One step may plan several moves before any copy is made: what the first gives back, the next one takes."""
    memory = Memory(num_blocks=4, num_host_blocks=2, block_size=1)
    first, second = memory.sequence("ab"), memory.sequence("cd")
    memory.out(first)
    plan_in = memory.swap.swap_in([first])
    plan_out = memory.swap.swap_out([second])
    third = BlockTable(memory.device, 1)
    third.append_tokens(2)
    assert (memory.device.num_free, memory.host.num_free) == (0, 0)
    memory.host_pool.copy(plan_in, memory.pool)
    memory.pool.copy(plan_out, memory.host_pool)
    memory.pool.write(third, 0, "ef")
    read = memory.pool.read(first), memory.host_pool.read(second), memory.pool.read(third)
    assert read == (list("ab"), list("cd"), list("ef"))


@pytest.mark.parametrize("num_host_blocks", [1, 2])
def test_a_host_without_room_changes_nothing(num_host_blocks):
    memory = Memory(num_host_blocks=num_host_blocks)
    first = memory.sequence("abcdef")
    second = first.fork()
    memory.pool.copy(second.append_tokens(1))
    before = memory.state(first, second)
    with pytest.raises(OutOfBlocks):
        memory.swap.swap_out([first, second])
    assert memory.state(first, second) == before


def test_a_device_without_room_changes_nothing():
    memory = Memory(num_blocks=3)
    table = memory.sequence("abcdef")
    memory.out(table)
    other = memory.sequence("ghijkl")
    before = memory.state(table, other)
    with pytest.raises(OutOfBlocks):
        memory.swap.swap_in([table])
    assert memory.state(table, other) == before
    other.release()
    memory.back(table)
    assert "".join(memory.pool.read(table)) == "abcdef"


def test_what_cannot_move():
    memory = Memory()
    here, there = memory.sequence("abcde"), memory.sequence("fgh")
    foreign = BlockTable(BlockAllocator(4), 4)
    foreign.append_tokens(4)
    memory.out(there)
    before = memory.state(here, there, foreign)
    for refused in (
        lambda: memory.swap.swap_out([here, there]),  # one is on the host already
        lambda: memory.swap.swap_out([here, here]),
        lambda: memory.swap.swap_out([here, foreign]),
        lambda: memory.swap.swap_in([there, here]),
        lambda: memory.swap.swap_in([there, there]),
    ):
        with pytest.raises(ValueError):
            refused()
        assert memory.state(here, there, foreign) == before
    with pytest.raises(ValueError):
        Swap(memory.device, memory.device)


def test_nothing_to_move():
    memory = Memory()
    empty = BlockTable(memory.device, 4)
    assert memory.swap.swap_out([]) == []
    assert memory.swap.swap_out([empty]) == []
    assert memory.swap.swap_in([empty]) == []
    empty.append_tokens(1)
    assert memory.device.num_free == 7


def test_a_prefix_stays_cached_on_the_device():
    """Swapped out, a sequence leaves its full blocks to be found. Swapped in, it has others, and those stay."""
    cache = PrefixCache(8, 2)
    swap = Swap(cache, BlockAllocator(8))
    table = BlockTable(cache, 2)
    table.append_tokens(5)
    cache.cache_blocks(table, [1, 2, 3, 4, 5])
    swap.swap_out([table])
    assert cache.num_free == 8
    found = cache.match([1, 2, 3, 4, 5])
    assert len(found) == 2
    swap.swap_in([table])
    own = table.blocks
    assert cache.num_free == 5 and not {*own} & {*found}
    cache.cache_blocks(table, [1, 2, 3, 4, 5])
    assert (table.blocks, cache.match([1, 2, 3, 4, 5])) == (own, found)
    assert cache.num_free == 5


def test_a_swapped_out_prefix_goes_leaf_first():
    cache = PrefixCache(4, 1)
    table = BlockTable(cache, 1)
    table.append_tokens(4)
    cache.cache_blocks(table, [1, 2, 3, 4])
    Swap(cache, BlockAllocator(4)).swap_out([table])
    for left in (3, 2, 1, 0):
        BlockTable(cache, 1).append_tokens(1)
        assert len(cache.match([1, 2, 3, 4, 5])) == left


# Appends, forks, truncations, releases, prefix hits, evictions and swaps, all in one script.
TestPagedMemory = PagedMemoryMachine.TestCase


@pytest.mark.parametrize("count", [1, 3])
def test_a_table_moves_to_as_many_blocks_as_it_has(count):
    device, host = BlockAllocator(4), BlockAllocator(4)
    table = BlockTable(device, 2)
    table.append_tokens(4)
    before = table.blocks
    with pytest.raises(ValueError):
        table.move(host, [host.allocate() for _ in range(count)])
    assert table.blocks == before and table.allocator is device


def test_a_large_group_moves_as_a_small_one():
    """Numbers above 256, which Python keeps apart even where they are equal."""
    device, host = BlockAllocator(300), BlockAllocator(300)
    tables = [BlockTable(device, 1) for _ in range(300)]
    for table in tables:
        table.append_tokens(1)
    assert len(Swap(device, host).swap_out(tables)) == 300 == device.num_free
    tables[0].append_tokens(0)
    alone = BlockTable(device, 1)
    alone.append_tokens(300)
    assert len(alone.blocks) == 300


# ---- real tensors ---------------------------------------------------------------------------------------------------


@given(num_blocks=st.integers(1, 6), data=st.data(), rng=generators())
def test_keys_come_back_as_keys_and_values_as_values(num_blocks, data, rng):
    """Of every layer, whatever the device's blocks hold meanwhile, and wherever they come back to."""
    cache = PagedCache(TINY, num_blocks, 3, torch.float64)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SwapSpace(cache, 0)
    space = SwapSpace(cache, num_blocks)
    for tensor in (cache.key_cache, cache.value_cache):
        tensor.copy_(torch.from_numpy(rng.standard_normal(tensor.shape)))
    keys, values = cache.key_cache.clone(), cache.value_cache.clone()
    blocks = data.draw(st.lists(st.sampled_from(range(num_blocks)), unique=True), label="device blocks")
    places = [data.draw(st.permutations(range(num_blocks)))[: len(blocks)] for _ in range(2)]
    space.swap_out(list(zip(blocks, places[0], strict=True)))
    assert torch.equal(cache.key_cache, keys) and torch.equal(cache.value_cache, values), "the device's were changed"
    cache.key_cache.fill_(torch.nan), cache.value_cache.fill_(torch.nan)
    space.swap_in(list(zip(*places, strict=True)))
    assert torch.equal(cache.key_cache[:, places[1]], keys[:, blocks])
    assert torch.equal(cache.value_cache[:, places[1]], values[:, blocks])
    others = sorted(set(range(num_blocks)) - set(places[1]))
    assert cache.key_cache[:, others].isnan().all() and cache.value_cache[:, others].isnan().all()


@given(
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=2, max_size=4),
    block_size=st.sampled_from((1, 2, 3)),
    host=st.integers(1, 12),
)
@costly(1 / 2)
def test_a_sequence_that_was_swapped_out_writes_the_text_that_it_writes_alone(prompts, block_size, host):
    """The pool takes one sequence and little more, so the others leave and come back."""
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    num_blocks = cdiv(max(map(len, prompts)) + 9, block_size) + 1
    llm = LLM(
        tiny(),
        max_model_len=24,
        block_size=block_size,
        num_blocks=num_blocks,
        preemption="swap",
        num_host_blocks=host,
        enable_prefix_caching=False,
        watermark=0.0,
    )
    for tensor in (llm.runner.cache.key_cache, llm.runner.cache.value_cache):
        tensor.fill_(torch.nan)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, progress=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == alone(tiny(), prompt, params).outputs[0].token_ids
    event(f"preemptions by swap: {min(3, llm.metrics().preemptions['swap'])}")
