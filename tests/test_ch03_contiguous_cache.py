"""Chapters 3 and 7. Every cache keeps the contract: however the tokens come, attention is as if all had come at once.

Random queries, keys and values stand for a model, so that a cache is tested with nothing around it. All its memory is
NaN at first, and memory that ended sequences leave behind is used again by later ones.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention.contiguous import causal_attention
from minipaged.kvcache import ContiguousCache, PagedCache, RecomputeCache
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.unpaged import NoMemory, SlabManager
from minipaged.model.contract import Scheduled, Step, make_step
from minipaged.model.transformer import ModelConfig
from minipaged.reference import masked_attention
from strategies import BLOCK_SIZES, generators, head_shapes

pytestmark = [pytest.mark.ch03, pytest.mark.ch07]

MAX_LEN = 24
NUM_LAYERS = 2
MAX_LIVE = 3  # sequences at once


def config(num_heads, num_kv_heads, head_dim):
    return ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=NUM_LAYERS,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=MAX_LEN,
    )


def poisoned(cache):
    cache.key_cache.fill_(torch.nan)
    cache.value_cache.fill_(torch.nan)
    return cache


def contiguous(shape, draw):
    return SlabManager(MAX_LIVE, MAX_LEN), poisoned(ContiguousCache(config(*shape), MAX_LIVE, MAX_LEN, torch.float64))


def paged(shape, draw):
    block_size = draw(st.sampled_from(BLOCK_SIZES), label="block_size")
    num_blocks = MAX_LIVE * -(-MAX_LEN // block_size)
    return BlockManager(num_blocks, block_size), poisoned(
        PagedCache(config(*shape), num_blocks, block_size, torch.float64)
    )


def recompute(shape, draw):
    return NoMemory(), RecomputeCache()


@dataclass
class Live:
    """A sequence with all the numbers that it will ever need: [NUM_LAYERS, MAX_LEN, heads, head_dim] each."""

    name: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    done: int = 0


@pytest.mark.parametrize("make", [recompute, contiguous, paged], ids=lambda make: make.__name__)
@given(data=st.data())
def test_tokens_in_any_portions_equal_all_at_once(make, data):
    shape = data.draw(head_shapes(max_group=3), label="heads")
    memory, cache = make(shape, data.draw)
    rng = data.draw(generators())
    live: list[Live] = []
    for number in range(data.draw(st.integers(1, 6), label="steps")):
        # Some sequences end; their memory goes to whoever comes next.
        for seq in [s for s in live if s.done == MAX_LEN or data.draw(st.integers(0, 4), label="ends if 0") == 0]:
            memory.free(seq.name)
            live.remove(seq)
        while len(live) < MAX_LIVE and (not live or data.draw(st.booleans(), label="one more sequence")):
            num_heads, num_kv_heads, head_dim = shape
            arrays = [rng.standard_normal((NUM_LAYERS, MAX_LEN, h, head_dim)) for h in (num_heads, *[num_kv_heads] * 2)]
            live.append(Live(f"{number}.{len(live)}", *arrays))
        counts = [min(data.draw(st.just(1) | st.integers(1, 9), label="new tokens"), MAX_LEN - s.done) for s in live]
        batch = []
        for seq, count in zip(live, counts, strict=True):
            if seq.done == 0:
                memory.begin(seq.name, [], count)
            else:
                assert memory.grow({seq.name: seq.done + count}) == []  # nothing is shared, so nothing is copied
            start = seq.done if memory.keeps_tokens else 0
            batch.append(Scheduled([0] * (seq.done + count - start), start, memory.blocks(seq.name)))
        step = make_step(batch, memory.block_size)

        for layer in range(NUM_LAYERS):

            def new(name, layer=layer, batch=batch):
                parts = [
                    getattr(s, name)[layer, b.start : b.start + len(b.token_ids)]
                    for s, b in zip(live, batch, strict=True)
                ]
                return torch.from_numpy(np.concatenate(parts))

            out = cache.attend(layer, new("query"), new("key"), new("value"), step)
            for i, (seq, item) in enumerate(zip(live, batch, strict=True)):
                rows = slice(*step.query_start_loc[i : i + 2].tolist())
                length = item.start + len(item.token_ids)
                expected = masked_attention(
                    seq.query[layer, item.start : length], seq.key[layer, :length], seq.value[layer, :length]
                )
                np.testing.assert_allclose(out[rows].numpy(), expected, rtol=1e-9, atol=1e-10)
        for seq, count in zip(live, counts, strict=True):
            seq.done += count


@given(
    shape=head_shapes(max_group=3),
    num_keys=st.integers(1, 12),
    window=st.none() | st.integers(1, 12),
    scale=st.floats(0.05, 2.0),
    data=st.data(),
)
def test_causal_attention_equals_the_oracle(shape, num_keys, window, scale, data):
    """A whole prompt, a chunk of one behind a context, a decoded token: with and without a sliding window."""
    num_heads, num_kv_heads, head_dim = shape
    num_queries = data.draw(st.integers(1, num_keys), label="num_queries")
    rng = data.draw(generators())
    query = rng.standard_normal((num_queries, num_heads, head_dim))
    key, value = rng.standard_normal((2, num_keys, num_kv_heads, head_dim))
    q, k, v = (torch.from_numpy(array) for array in (query, key, value))
    out = causal_attention(q, k.transpose(0, 1), v.transpose(0, 1), scale=scale, sliding_window=window)
    expected = masked_attention(query, key, value, scale=scale, sliding_window=window)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_recompute_refuses_a_sequence_that_does_not_come_whole():
    step = make_step([Scheduled([1, 2], start=3)], 0)
    with pytest.raises(ValueError, match="all 5 tokens must come; got 2"):
        RecomputeCache().attend(0, torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), step)


@given(
    block_size=st.sampled_from(BLOCK_SIZES),
    spans=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5),
    rng=generators(),
)
def test_a_step_translates_every_position_to_its_slot(block_size, spans, rng):
    """make_step does it in bulk; here it is done one token at a time."""
    tables = [list(rng.permutation(100)[: -(-(start + count) // block_size)]) for start, count in spans]
    batch = [
        Scheduled(list(range(start, start + count)), start, table)
        for (start, count), table in zip(spans, tables, strict=True)
    ]
    step: Step = make_step(batch, block_size)
    expected = [
        (position, table[position // block_size] * block_size + position % block_size)
        for (start, count), table in zip(spans, tables, strict=True)
        for position in range(start, start + count)
    ]
    assert list(zip(step.positions.tolist(), step.slot_mapping.tolist(), strict=True)) == expected
    assert step.token_ids.tolist() == step.positions.tolist()
    assert step.seq_lens.tolist() == [start + count for start, count in spans]
    assert step.query_start_loc.tolist() == [0, *np.cumsum([count for _, count in spans])]
    for row, table in zip(step.block_tables.tolist(), tables, strict=True):
        assert row == [*table, *[-1] * (len(row) - len(table))]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_a_cache_of_no_size_is_refused(sizes):
    for kind in (ContiguousCache, PagedCache):
        with pytest.raises(ValueError, match=f"got {sizes[0]} and {sizes[1]}"):
            kind(config(1, 1, 2), *sizes)


def test_a_pool_is_in_use_exactly_as_far_as_its_tables_say():
    paged, slabs = BlockManager(8, 4), SlabManager(2, 16)
    for memory in (paged, slabs):
        memory.begin("A", [], 5)
        memory.begin("B", [], 1)
        assert memory.num_tokens == 6
    assert (paged.num_slots, paged.num_slots_reserved) == (32, 12)  # two blocks and one
    assert (slabs.num_slots, slabs.num_slots_reserved) == (32, 32)  # a slab each, however little they hold
    assert slabs.fits(1, 16)
    assert not slabs.fits(1, 17), "a request lies in one slab"
    assert paged.fits(1, 32)
    assert not paged.fits(1, 33)
    assert slabs.blocks_to_grow({"A": 16}) == 0, "a slab is taken whole"
    assert slabs.blocks_to_begin([], [1], 1) > slabs.num_free, "both slabs are taken"
    assert paged.blocks_to_grow({"A": 8}) == 0
    assert paged.blocks_to_grow({"A": 9}) == 1
    assert paged.blocks_to_begin([], [20], 1) <= paged.num_free
    assert paged.blocks_to_begin([], [21], 1) > paged.num_free
    for memory in (paged, slabs):
        memory.free("A")
        memory.free("B")
        memory.free("nobody")
        assert memory.num_slots_reserved == memory.num_tokens == 0


def test_a_slab_takes_what_fits_into_it_whole_and_has_one_owner():
    slabs = SlabManager(2, 16)
    assert [slabs.fits(1, num_tokens) for num_tokens in (1, 15, 16, 17)] == [True, True, True, False]
    assert not slabs.shares_blocks


@given(prompts=st.lists(st.integers(1, 10**6), max_size=5), num_seqs=st.integers(1, 100))
def test_where_nothing_is_kept_there_is_always_room_and_never_a_block(prompts, num_seqs):
    memory = NoMemory()
    for number, length in enumerate(prompts):
        name = str(number)
        assert memory.fits(length, 2 * length, num_seqs)
        assert memory.find([0] * 3) == []
        assert memory.blocks_to_begin([], [length], length) == 0
        memory.begin(name, [], length)
        memory.insert(name, [0] * 3)
        assert memory.blocks_to_grow({name: 2 * length}) == 0
        assert memory.grow({name: 2 * length}) == []
        memory.fork(name, f"{name}'")
        assert not memory.can_swap_out([name])
        assert memory.blocks_to_swap_in({name: 2 * length}) == 0
        assert memory.blocks(name) == []
        assert memory.length(name) == 0
    assert memory.shares_blocks, "any number of samples share nothing"
    assert not memory.keeps_tokens
    assert (memory.block_size, memory.num_slots, memory.num_free) == (0, 0, 0)
    assert (memory.num_slots_reserved, memory.num_tokens) == (0, 0)


@given(
    data=st.data(),
    copies=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] != pair[1]), max_size=6
    ),
)
def test_copies_are_made_in_order_and_in_every_layer(data, copies):
    """The source of one copy may be the target of one before it, as copy-on-write asks for."""
    cache = PagedCache(config(2, 1, 4), num_blocks=5, block_size=3, dtype=torch.float64)
    for part in (cache.key_cache, cache.value_cache):
        part.copy_(torch.from_numpy(data.draw(generators()).standard_normal(tuple(part.shape))))
    before = cache.key_cache.clone(), cache.value_cache.clone()
    holds = list(range(5))  # block -> the block whose content it holds
    for source, target in copies:
        holds[target] = holds[source]
    cache.copy_blocks(copies)
    assert torch.equal(cache.key_cache, before[0][:, holds]), f"keys after the copies {copies}"
    assert torch.equal(cache.value_cache, before[1][:, holds]), f"values after the copies {copies}"
