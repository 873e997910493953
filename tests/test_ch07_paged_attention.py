"""Chapter 7. Attention that reads through block tables equals the oracle, wherever the blocks lie.

The memory that no token owns is NaN in every example. An answer without NaN has read nothing that was not written.
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention import blockwise, paged_attention, paged_attention_gathered, paged_attention_online, write_kv
from minipaged.attention import plan as planning
from minipaged.attention.paged import slot_rows
from strategies import BLOCK_SIZES, generators, paged_batches

pytestmark = pytest.mark.ch07


def by_slot(*arguments, **named):
    """The fast form gathers a decode that is alone: let it not."""
    with patch.multiple(planning, MIN_DECODES=1):
        return paged_attention(*arguments, **named)


def by_block(*arguments, **named):
    """And it reads by block only what torch has no sampled product for: let it have none for float64."""
    with patch.multiple(blockwise, can_read_by_slot=lambda cache: False):
        return by_slot(*arguments, **named)


FORMS = {
    "gather": paged_attention_gathered,
    "online": paged_attention_online,
    "fast": paged_attention,
    "by slot": by_slot,
    "by block": by_block,
}
every_form = pytest.mark.parametrize("attend", FORMS.values(), ids=FORMS.keys())
scales = st.floats(0.05, 2.0)
windows = st.none() | st.integers(1, 20)


@every_form
@given(batch=paged_batches(), scale=scales, window=windows)
def test_equals_the_oracle_for_each_sequence(attend, batch, scale, window):
    out = attend(*batch.arguments, scale=scale, sliding_window=window)
    torch.testing.assert_close(out, batch.expected(scale, window), rtol=1e-9, atol=1e-10)


@every_form
@given(batch=paged_batches(decode_only=True), scale=scales)
def test_decode_equals_the_oracle(attend, batch, scale):
    out = attend(*batch.arguments, scale=scale)
    torch.testing.assert_close(out, batch.expected(scale), rtol=1e-9, atol=1e-10)


@every_form
@given(batch=paged_batches(dtype=torch.float32), scale=scales)
def test_float32_is_near_the_oracle(attend, batch, scale):
    out = attend(*batch.arguments, scale=scale)
    torch.testing.assert_close(out.double(), batch.expected(scale), rtol=1e-4, atol=1e-5)


@every_form
@given(batch=paged_batches(), size=st.sampled_from((100.0, 1e4)))
def test_large_scores_do_not_overflow(attend, batch, size):
    """exp of such a score is infinite: only a maximum that is subtracted, and rescaled by, keeps the answer."""
    batch.query *= size
    batch.queries = [query * size for query in batch.queries]
    torch.testing.assert_close(attend(*batch.arguments, scale=1.0), batch.expected(1.0), rtol=1e-8, atol=1e-8)


@every_form
@given(batch=paged_batches(), data=st.data())
def test_where_a_block_lies_does_not_matter(attend, batch, data):
    """Move every block to another place and rename it in the tables: not one bit of the answer changes."""
    num_blocks = batch.key_cache.shape[0]
    place = torch.tensor(data.draw(st.permutations(range(num_blocks))))  # block b moves to place[b]
    before = attend(*batch.arguments, scale=0.5)
    moved_keys, moved_values = torch.empty_like(batch.key_cache), torch.empty_like(batch.value_cache)
    moved_keys[place], moved_values[place] = batch.key_cache, batch.value_cache
    tables = torch.where(batch.block_tables >= 0, place[batch.block_tables], -1).to(torch.int32)
    after = attend(batch.query, moved_keys, moved_values, tables, batch.seq_lens, batch.query_start_loc, scale=0.5)
    assert torch.equal(before, after)


@every_form
@given(batch=paged_batches(max_seqs=3), data=st.data())
def test_other_sequences_do_not_matter(attend, batch, data):
    """Isolation, the seed of the course: what B holds in its own blocks never reaches A."""
    seq = data.draw(st.integers(0, len(batch.keys) - 1), label="A")
    rows = slice(*batch.query_start_loc[seq : seq + 2].tolist())
    together = attend(*batch.arguments, scale=0.5)[rows]
    mine = batch.block_tables[seq][batch.block_tables[seq] >= 0]
    others = torch.ones(batch.key_cache.shape[0], dtype=torch.bool)
    others[mine.long()] = False
    batch.key_cache[others], batch.value_cache[others] = torch.nan, torch.nan
    alone = attend(
        batch.query[rows],
        batch.key_cache,
        batch.value_cache,
        batch.block_tables[seq : seq + 1],
        batch.seq_lens[seq : seq + 1],
        torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
        scale=0.5,
    )
    # Near, not equal: a block that was shared is met by fewer queries now, and sums in another order.
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@every_form
@given(batch=paged_batches(), garbage=st.integers(-(2**31), 2**31 - 1))
def test_a_table_is_never_read_past_the_end_of_its_sequence(attend, batch, garbage):
    before = attend(*batch.arguments, scale=0.5)
    batch.block_tables[batch.block_tables < 0] = garbage
    assert torch.equal(attend(*batch.arguments, scale=0.5), before)


@st.composite
def writes(draw):
    """New tokens and where they go: any slots, no slot twice, some of them -1."""
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    num_blocks = draw(st.integers(1, 5))
    slots = draw(st.lists(st.integers(0, num_blocks * block_size - 1), unique=True, max_size=12))
    for _ in range(draw(st.integers(0, 3), label="tokens that are not stored")):
        slots.insert(draw(st.integers(0, len(slots))), -1)
    rng = draw(generators())
    key, value = torch.from_numpy(rng.standard_normal((2, len(slots), 2, 4)))
    return num_blocks, block_size, slots, key, value


@given(writes())
def test_write_stores_each_token_in_its_slot_and_nothing_else(drawn):
    num_blocks, block_size, slots, key, value = drawn
    caches = [torch.full((num_blocks, 2, block_size, 4), torch.nan, dtype=torch.float64) for _ in range(2)]
    write_kv(key, value, *caches, torch.tensor(slots, dtype=torch.int64))
    for cache, new in zip(caches, (key, value), strict=True):
        for slot in range(num_blocks * block_size):
            stored = cache[slot // block_size, :, slot % block_size]
            if slot in slots:
                assert torch.equal(stored, new[slots.index(slot)]), f"slot {slot} holds another token"
            else:
                assert stored.isnan().all(), f"slot {slot} was written, and no token goes there"


def _arguments():
    """Two sequences of 3 and 5 tokens in blocks of 2; everything fits."""
    return {
        "query": torch.zeros(3, 4, 8),
        "key_cache": torch.zeros(6, 2, 2, 8),
        "value_cache": torch.zeros(6, 2, 2, 8),
        "block_tables": torch.tensor([[0, 1, -1], [2, 3, 4]], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 5], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
    }


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


BAD_ARGUMENTS = [
    ("query", torch.zeros(3, 4, 6), "head_dim = 8"),
    ("query", torch.zeros(3, 4, 10), "head_dim = 8"),
    ("query", torch.zeros(3, 3, 8), "3 heads"),
    ("query", torch.zeros(3, 0, 8), "0 heads"),
    ("query", torch.zeros(3, 4, 8, device="meta"), "meta"),
    ("query", torch.zeros(3, 4, 8, dtype=torch.float64), "float64"),
    ("key_cache", torch.zeros(6, 2, 8), "head_dim], got [6, 2, 8]"),
    ("key_cache", torch.zeros(6, 2, 2, 8, 1), "head_dim], got [6, 2, 2, 8, 1]"),
    ("value_cache", torch.zeros(6, 2, 2, 8, device="meta"), "meta"),
    ("value_cache", torch.zeros(5, 2, 2, 8), "[5, 2, 2, 8]"),
    ("block_tables", i32(0, 1, 2), "[3]"),
    ("block_tables", torch.tensor([[0.0], [1.0]]), "float32"),
    ("block_tables", torch.tensor([[0, 6, -1], [2, 3, 4]], dtype=torch.int32), "got 6"),
    ("block_tables", torch.tensor([[0, -1, -1], [2, 3, 4]], dtype=torch.int32), "got -1"),
    ("seq_lens", i32(3, 5).to("meta"), "meta"),
    ("seq_lens", i32(3, 7), "got 7"),
    ("seq_lens", i32(3, -1), "got -1"),
    ("seq_lens", i32(3), "[2]"),
    ("seq_lens", i32(3, 1), "[1, 2]"),
    ("query_start_loc", i32(0, 1, 2), "num_tokens = 3"),
    ("query_start_loc", i32(0, 4, 3), "[0, 4, 3]"),
    ("query_start_loc", i32(0, 3), "[3]"),
    ("sliding_window", 0, "got 0"),
]


@every_form
@pytest.mark.parametrize(("name", "wrong", "said"), BAD_ARGUMENTS)
def test_what_does_not_fit_is_refused_by_name(attend, name, wrong, said):
    arguments = _arguments()
    attend(**arguments, scale=1.0)
    with pytest.raises(ValueError) as error:
        attend(**{**arguments, name: wrong}, scale=1.0)
    assert name.split("_")[0] in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("key", torch.zeros(2, 3, 8), "[2, 3, 8]"),
        ("value", torch.zeros(1, 2, 8), "[1, 2, 8]"),
        ("value", torch.zeros(2, 2, 8, dtype=torch.float64), "float64"),
        ("slot_mapping", torch.tensor([0, 12]), "got 12"),
        ("slot_mapping", torch.tensor([0, -2]), "got -2"),
        ("slot_mapping", torch.tensor([0]), "[1]"),
        ("slot_mapping", torch.tensor([0, 11], device="meta"), "meta"),
    ],
)
def test_a_refused_write_changes_nothing(name, wrong, said):
    arguments = {
        "key": torch.ones(2, 2, 8),
        "value": torch.ones(2, 2, 8),
        "key_cache": torch.zeros(6, 2, 2, 8),
        "value_cache": torch.zeros(6, 2, 2, 8),
        "slot_mapping": torch.tensor([0, 11]),
    }
    with pytest.raises(ValueError) as error:
        write_kv(**{**arguments, name: wrong})
    assert name in str(error.value)
    assert said in str(error.value)
    assert not arguments["key_cache"].any()
    assert not arguments["value_cache"].any()


@pytest.mark.parametrize("slots", [[0, 5, 3], [-1, 0, 7], [2, -1, -1]])
def test_rows_of_slots_are_where_write_kv_stores(slots):
    """Slot 0 is a slot like any other, and -1 is none."""
    slot_mapping = torch.tensor(slots)
    key = torch.arange(1.0, 19.0).view(3, 2, 3)  # [num_tokens, num_kv_heads, head_dim]
    expected, cache = torch.zeros(4, 2, 2, 3), torch.zeros(4, 2, 2, 3)  # blocks of 2 tokens
    write_kv(key, key, expected, torch.zeros_like(expected), slot_mapping)
    rows, stored = slot_rows(slot_mapping, num_kv_heads=2, block_size=2)
    cache.view(-1, 3)[rows] = (key if stored is None else key[stored]).reshape(-1, 3)
    assert torch.equal(cache, expected)
