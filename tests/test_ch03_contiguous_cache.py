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

from messages import says
from minipaged.attention.contiguous import causal_attention
from minipaged.cdiv import cdiv
from minipaged.kvcache import ContiguousCache, PagedCache
from minipaged.memory.block_manager import BlockManager
from minipaged.model.batch import make_batch
from minipaged.model.recompute import RecomputeCache
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
    return BlockManager(MAX_LIVE, MAX_LEN), poisoned(ContiguousCache(config(*shape), MAX_LIVE, MAX_LEN, torch.float64))


def paged(shape, draw):
    block_size = draw(st.sampled_from(BLOCK_SIZES), label="block_size")
    num_blocks = MAX_LIVE * cdiv(MAX_LEN, block_size)
    return BlockManager(num_blocks, block_size), poisoned(
        PagedCache(config(*shape), num_blocks, block_size, torch.float64)
    )


def recompute(shape, draw):
    return None, RecomputeCache()


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
    """Also where sequences fork: the two have one past, and from then on each stores tokens of its own."""
    shape = data.draw(head_shapes(max_group=3), label="heads")
    memory, cache = make(shape, data.draw)
    rng = data.draw(generators())
    live: list[Live] = []

    def numbers():
        num_heads, num_kv_heads, head_dim = shape
        return [rng.standard_normal((NUM_LAYERS, MAX_LEN, h, head_dim)) for h in (num_heads, *[num_kv_heads] * 2)]

    for number in range(data.draw(st.integers(1, 6), label="steps")):
        # Some sequences end; their memory goes to the next one.
        for seq in [s for s in live if s.done == MAX_LEN or data.draw(st.integers(0, 4), label="ends if 0") == 0]:
            if memory:
                memory.free(seq.name)
            live.remove(seq)
        while len(live) < MAX_LIVE and (not live or data.draw(st.booleans(), label="one more sequence")):
            seq = Live(f"{number}.{len(live)}", *numbers())
            parent = [None, *live][data.draw(st.integers(0, len(live)), label="forks from, or 0")]
            if parent and parent.done:
                for name in ("query", "key", "value"):
                    getattr(seq, name)[:, : parent.done] = getattr(parent, name)[:, : parent.done]
                seq.done = parent.done
                if memory:
                    memory.fork(parent.name, seq.name)
            live.append(seq)
        counts = [min(data.draw(st.just(1) | st.integers(1, 9), label="new tokens"), MAX_LEN - s.done) for s in live]
        starts = [seq.done if memory else 0 for seq in live]
        ends = [seq.done + count for seq, count in zip(live, counts, strict=True)]
        tables, block_size = [], 0
        if memory:
            copies = [memory.allocate_slots(seq.name, end) for seq, end in zip(live, ends, strict=True)]
            assert None not in copies, "the pool holds MAX_LIVE sequences of any length"
            cache.copy_blocks([pair for each in copies for pair in each])
            tables, block_size = [memory.blocks(seq.name) for seq in live], memory.block_size
        tokens = [[0] * (end - start) for start, end in zip(starts, ends, strict=True)]
        batch = make_batch(tokens, starts, tables, block_size)

        for layer in range(NUM_LAYERS):
            new = {
                name: [getattr(s, name)[layer, start:end] for s, start, end in zip(live, starts, ends, strict=True)]
                for name in ("query", "key", "value")
            }
            out = cache.attend(layer, *(torch.from_numpy(np.concatenate(parts)) for parts in new.values()), batch, None)
            for i, (seq, start, end) in enumerate(zip(live, starts, ends, strict=True)):
                rows = slice(*batch.query_start_loc[i : i + 2].tolist())
                expected = masked_attention(seq.query[layer, start:end], seq.key[layer, :end], seq.value[layer, :end])
                np.testing.assert_allclose(out[rows].numpy(), expected, rtol=1e-9, atol=1e-10)
        for seq, end in zip(live, ends, strict=True):
            seq.done = end


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
    batch = make_batch([[1, 2]], [3])
    with pytest.raises(ValueError, match="all 5 tokens must come; got 2"):
        RecomputeCache().attend(0, torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), torch.zeros(2, 1, 2), batch, None)


@given(
    block_size=st.sampled_from(BLOCK_SIZES),
    spans=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=5),
    rng=generators(),
)
def test_a_batch_translates_every_position_to_its_slot(block_size, spans, rng):
    """make_batch does it in bulk; here it is done one token at a time."""
    tables = [list(rng.permutation(100)[: cdiv(start + count, block_size)]) for start, count in spans]
    token_ids = [list(range(start, start + count)) for start, count in spans]
    batch = make_batch(token_ids, [start for start, _ in spans], tables, block_size)
    expected = [
        (position, table[position // block_size] * block_size + position % block_size)
        for (start, count), table in zip(spans, tables, strict=True)
        for position in range(start, start + count)
    ]
    assert list(zip(batch.positions.tolist(), batch.slot_mapping.tolist(), strict=True)) == expected
    assert batch.token_ids.tolist() == batch.positions.tolist()
    assert batch.seq_lens.tolist() == [start + count for start, count in spans]
    assert batch.query_start_loc.tolist() == [0, *np.cumsum([count for _, count in spans])]
    for row, table in zip(batch.block_tables.tolist(), tables, strict=True):
        assert row == [*table, *[-1] * (len(row) - len(table))]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_a_cache_of_no_size_is_refused(sizes):
    for kind in (ContiguousCache, PagedCache):
        kind(config(1, 1, 2), 1, 1)  # the smallest there is
        with pytest.raises(ValueError) as error:
            kind(config(1, 1, 2), *sizes)
        assert says(error.value, min(sizes)), f"the message does not name {min(sizes)}: {error.value}"


def test_a_pool_is_in_use_exactly_as_far_as_its_tables_say():
    """The same two sequences over blocks of 4 tokens and over slabs of 16, in as much memory."""
    paged, slabs = BlockManager(8, 4), BlockManager(2, 16)
    for memory in (paged, slabs):
        assert memory.num_slots == 32
        assert memory.allocate_slots("A", 5) == memory.allocate_slots("B", 1) == []
        assert (memory.num_tokens("A"), memory.num_tokens("B"), memory.num_tokens("unknown")) == (5, 1, 0)
        assert memory.blocks("unknown") == []
    assert paged.num_free == 5, "two blocks and one"
    assert slabs.num_free == 0, "a slab each, however little they hold"
    assert slabs.allocate_slots("A", 16) == [], "a slab is taken whole"
    assert slabs.allocate_slots("C", 1) is None, "both slabs are taken"
    assert paged.allocate_slots("A", 8) == []
    assert paged.num_free == 5, "the second block had room"
    assert paged.allocate_slots("A", 9) == []
    assert paged.num_free == 4
    assert paged.allocate_slots("C", 17) is None
    assert paged.allocate_slots("C", 16) == []
    for memory in (paged, slabs):
        for name in ("A", "B", "C", "unknown"):
            memory.free(name)
        assert memory.num_free == memory.num_blocks
        assert memory.blocks("A") == []


@given(num_blocks=st.integers(1, 6), block_size=st.integers(1, 6), num_tokens=st.integers(1, 40))
def test_what_can_ever_fit_is_what_the_empty_pool_takes(num_blocks, block_size, num_tokens):
    memory = BlockManager(num_blocks, block_size)
    assert memory.can_ever_fit(num_tokens) == (num_tokens <= memory.num_slots)
    assert memory.can_ever_fit(num_tokens) == (memory.allocate_slots("A", num_tokens) is not None)
    assert len(memory.blocks("A")) == (memory.blocks_for(num_tokens) if memory.can_ever_fit(num_tokens) else 0)


def test_a_fork_of_a_slab_takes_a_whole_slab_when_one_of_the_two_goes_on():
    slabs = BlockManager(2, 16)
    slabs.allocate_slots("A", 5)
    slabs.fork("A", "B")
    assert slabs.blocks("A") == slabs.blocks("B") and slabs.num_free == 1
    [(source, target)] = slabs.allocate_slots("B", 6)
    assert ([source], [target]) == (slabs.blocks("A"), slabs.blocks("B"))
    assert slabs.allocate_slots("A", 6) == [], "alone with its slab again"
    assert slabs.num_free == 0


@pytest.mark.parametrize("kind", [ContiguousCache, PagedCache])
@given(
    data=st.data(),
    copies=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] != pair[1]), max_size=6
    ),
)
def test_copies_are_made_in_order_and_in_every_layer(kind, data, copies):
    """The source of one copy may be the target of one before it, as copy-on-write asks for."""
    cache = kind(config(2, 1, 4), 5, 3, torch.float64)
    for part in (cache.key_cache, cache.value_cache):
        part.copy_(torch.from_numpy(data.draw(generators()).standard_normal(tuple(part.shape))))
    before = cache.key_cache.clone(), cache.value_cache.clone()
    holds = list(range(5))  # block -> the block whose content it holds
    for source, target in copies:
        holds[target] = holds[source]
    cache.copy_blocks(copies)
    assert torch.equal(cache.key_cache, before[0][:, holds]), f"keys after the copies {copies}"
    assert torch.equal(cache.value_cache, before[1][:, holds]), f"values after the copies {copies}"
