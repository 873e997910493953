"""Chapter 7. The fast form: right however a slot or a block is read, and it reads no block that nobody owns.

Small pools would hardly ever be read in runs, since a copy of a few blocks is quicker. So the thresholds are drawn too.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.attention import passes
from minipaged.attention import plan as planning
from minipaged.attention.blockwise import attend, can_read_by_slot
from minipaged.attention.paged import slot_rows, write_kv
from minipaged.attention.plan import make_plan
from minipaged.attention.workspace import Workspace
from minipaged.kvcache import PagedCache
from minipaged.model.contract import Scheduled, make_step
from minipaged.model.transformer import ModelConfig
from strategies import paged_batches
from test_ch07_paged_attention import writes

# A buffer of another size than is asked for would be made anew by torch, with a warning, at every call.
pytestmark = [pytest.mark.ch07, pytest.mark.filterwarnings("error")]

THRESHOLDS = (
    (planning, "MIN_DECODES"),
    (passes, "MAX_GAP_BLOCKS"),
    (passes, "MIN_RUN_BLOCKS"),
    (passes, "MIN_RUN_SHARE"),
    (passes, "CHUNK_BLOCKS"),
)
thresholds = st.tuples(
    st.sampled_from((1, 1, 1, 4)),
    st.sampled_from((0, 1, 2, 100)),
    st.sampled_from((1, 2, 3)),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.integers(1, 3),
)


@contextmanager
def reading_by(values):
    with ExitStack() as stack:
        for (module, name), value in zip(THRESHOLDS, values, strict=True):
            stack.enter_context(patch.object(module, name, value))
        yield


def plan_of(batch, window=None, by_slot=False):
    return make_plan(
        batch.block_tables,
        batch.seq_lens,
        batch.query_start_loc,
        num_heads=batch.query.shape[1],
        num_kv_heads=batch.key_cache.shape[1],
        block_size=batch.key_cache.shape[2],
        sliding_window=window,
        by_slot=by_slot,
    )


def by_plan(batch, plan, workspace, scale):
    return attend(batch.query, batch.key_cache, batch.value_cache, plan, workspace, scale=scale)


class PoisonedWorkspace(Workspace):
    """Gives out memory full of NaN: what a call before has left there must not matter."""

    def take(self, *arguments, **named):
        return super().take(*arguments, **named).fill_(torch.nan)


@pytest.mark.parametrize("by_slot", [True, False])
@pytest.mark.parametrize("decode_only", [True, False])
@given(data=st.data(), values=thresholds, scale=st.floats(0.05, 2.0), window=st.none() | st.integers(1, 20))
def test_equals_the_oracle_however_the_blocks_are_read(decode_only, by_slot, data, values, scale, window):
    batch = data.draw(paged_batches(decode_only=decode_only, max_seqs=6))
    with reading_by(values):
        plan = plan_of(batch, window, by_slot)
    out = by_plan(batch, plan, PoisonedWorkspace(), scale)
    torch.testing.assert_close(out, batch.expected(scale, window), rtol=1e-9, atol=1e-10)


@given(batch=paged_batches(dtype=torch.bfloat16, decode_only=True, max_seqs=3), values=thresholds)
def test_bfloat16_is_near_the_oracle(batch, values):
    """Scores of bfloat16 have 8 bits, as in every engine that leaves products in that dtype; sums are of float32."""
    with reading_by(values):
        plan = plan_of(batch)
    out = by_plan(batch, plan, PoisonedWorkspace(), 0.25)
    torch.testing.assert_close(out.double(), batch.expected(0.25), rtol=0.05, atol=0.05)


@given(first=paged_batches(), second=paged_batches(), values=thresholds, by_slot=st.booleans())
def test_a_workspace_that_was_used_before_changes_nothing(first, second, values, by_slot):
    workspace = Workspace()
    with reading_by(values):
        plans = plan_of(first, by_slot=by_slot), plan_of(second, by_slot=by_slot)
    for batch, plan in ((first, plans[0]), (second, plans[1]), (first, plans[0])):
        assert torch.equal(by_plan(batch, plan, workspace, 0.5), by_plan(batch, plan, Workspace(), 0.5))


def test_a_workspace_serves_in_inference_mode_and_out_of_it():
    workspace, like = Workspace(), torch.zeros(2)
    with torch.inference_mode():
        workspace.take("buffer", (4,), like).fill_(1.0)
    workspace.take("buffer", (3,), like).fill_(2.0)


@given(
    num_blocks=st.integers(50, 2000),
    seq_lens=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    shared=st.integers(0, 6),
    window=st.none() | st.integers(1, 64),
    rng=st.randoms(use_true_random=False),
)
def test_free_blocks_are_hardly_read(num_blocks, seq_lens, shared, window, rng):
    """At most as many blocks that nobody wants as blocks that somebody does, however large the pool is."""
    block_size, shared = 4, min(shared, min(seq_lens) // 4)
    counts = [-(-n // block_size) for n in seq_lens]
    num_blocks = max(num_blocks, sum(counts))
    free = rng.sample(range(num_blocks), num_blocks)
    tables = torch.full((len(seq_lens), max(counts)), -1, dtype=torch.int32)
    prefix = [free.pop() for _ in range(shared)]
    for row, count in zip(tables, counts, strict=True):
        row[:count] = torch.tensor(prefix + [free.pop() for _ in range(count - shared)])
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    with patch.multiple(planning, MIN_DECODES=1):
        plan = make_plan(
            tables,
            torch.tensor(seq_lens, dtype=torch.int32),
            starts,
            num_heads=2,
            num_kv_heads=1,
            block_size=block_size,
            sliding_window=window,
        )
    wanted = set(tables[tables >= 0].tolist())
    read = sum(part.num_blocks for part in plan.passes)
    assert read <= 2 * len(wanted), f"{read} blocks are read, of which {len(wanted)} are owned"
    if window is None:
        assert len(plan.row_query) <= 2 * sum(counts), "more rows than twice the pairs of a block and its owner"


def test_one_decode_is_gathered_and_two_are_not():
    def plan(num_seqs):
        return make_plan(
            torch.arange(num_seqs * 8, dtype=torch.int32).view(num_seqs, 8),
            torch.full((num_seqs,), 8 * 4, dtype=torch.int32),
            torch.arange(num_seqs + 1, dtype=torch.int32),
            num_heads=1,
            num_kv_heads=1,
            block_size=4,
        )

    one, two = plan(1), plan(2)
    assert len(one.gathered) == 1 and not one.passes
    assert not two.gathered and two.passes


def test_blocks_that_lie_far_apart_are_copied_and_no_others_with_them():
    """A pool that has been in use for a while has its free blocks everywhere: none of them is worth reading."""

    def plan(stride):
        return make_plan(
            (torch.arange(32 * 8) * stride).to(torch.int32).view(-1, 8),
            torch.full((32,), 8 * 4, dtype=torch.int32),
            torch.arange(32 + 1, dtype=torch.int32),
            num_heads=1,
            num_kv_heads=1,
            block_size=4,
        )

    together, apart = plan(1), plan(100)
    assert not together.gathered and not apart.gathered
    assert [part.run for part in together.passes] == [slice(0, 32 * 8)]
    assert all(part.run is None and part.num_blocks <= passes.CHUNK_BLOCKS for part in apart.passes)
    assert sum(part.num_blocks for part in apart.passes) == 32 * 8


@given(block=st.integers(0, 2**31 - 2) | st.integers(44739241, 44739243), by_slot=st.booleans())
def test_slots_are_named_exactly_however_large_the_pool_and_in_4_bytes_where_they_suffice(block, by_slot):
    num_kv_heads, block_size = 3, 16
    plan = make_plan(
        torch.tensor([[block], [block + 1]], dtype=torch.int32),
        torch.full((2,), block_size, dtype=torch.int32),
        torch.arange(3, dtype=torch.int32),
        num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        by_slot=by_slot,
    )
    first = block * num_kv_heads * block_size
    assert plan.bag_slots.tolist() == list(range(first, first + 2 * num_kv_heads * block_size))
    assert plan.bag_slots.element_size() == (4 if first + 2 * num_kv_heads * block_size < 2**31 else 8)
    assert plan.bag_starts.dtype == plan.bag_slots.dtype, "torch wants them alike"


def test_keys_are_read_by_slot_where_torch_can():
    """Where it cannot, it says so: no sampled product of bfloat16, and none that was tried on another device."""
    for dtype, can in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False), (torch.float16, False)):
        assert can_read_by_slot(torch.empty(1, dtype=dtype)) == can
        assert not can_read_by_slot(torch.empty(1, dtype=dtype, device="meta"))


@given(blocks=st.sets(st.integers(0, 60)), values=thresholds)
def test_runs_are_the_dense_parts_between_wide_gaps(blocks, values):
    with reading_by(values):
        parts = [[]]
        for block in sorted(blocks):
            if parts[-1] and block - parts[-1][-1] > passes.MAX_GAP_BLOCKS:
                parts.append([])
            parts[-1].append(block)
        expected = [
            [part[0], part[-1] + 1]
            for part in parts
            if len(part) >= passes.MIN_RUN_BLOCKS and len(part) >= passes.MIN_RUN_SHARE * (part[-1] + 1 - part[0])
        ]
        assert passes.runs(np.array(sorted(blocks), dtype=np.int64)).tolist() == expected


def plan_of_decodes(seq_lens):
    """Blocks of one token, all next to each other: a sequence has as many blocks, and lines of scores, as tokens."""
    tables = torch.full((len(seq_lens), max(seq_lens)), -1, dtype=torch.int32)
    for row, last, count in zip(tables, accumulate(seq_lens), seq_lens, strict=True):
        row[:count] = torch.arange(last - count, last)
    with patch.multiple(planning, MIN_DECODES=1):
        return make_plan(
            tables,
            torch.tensor(seq_lens, dtype=torch.int32),
            torch.arange(len(seq_lens) + 1, dtype=torch.int32),
            num_heads=1,
            num_kv_heads=1,
            block_size=1,
        )


@given(short=st.lists(st.integers(1, 9), min_size=16, max_size=24), longest=st.integers(1, 30) | st.integers(200, 400))
def test_a_long_sequence_among_short_ones_does_not_stretch_their_scores(short, longest):
    """Scores are filled up to the longest sequence, but to a few times what they are at most: else it is gathered."""
    seq_lens = [*short, longest]
    plan = plan_of_decodes(seq_lens)
    lines, filled_up = len(plan.bag_lines), len(plan.padded_lines)
    assert filled_up <= 8 * lines, f"{lines} lines of scores are filled up to {filled_up}"
    assert len(plan.decode_tokens) + len(plan.gathered) == len(seq_lens)
    if max(seq_lens) * len(seq_lens) <= 2 * sum(seq_lens):
        assert not plan.gathered, "lengths that are alike are read together, all of them"


@given(seq_len=st.integers(1, 200), window=st.integers(1, 40), num_queries=st.integers(1, 4))
def test_a_window_leaves_out_the_blocks_before_it(seq_len, window, num_queries):
    num_queries = min(num_queries, seq_len)
    plan = make_plan(
        torch.arange(50, dtype=torch.int32)[None],
        torch.tensor([seq_len], dtype=torch.int32),
        torch.tensor([0, num_queries], dtype=torch.int32),
        num_heads=1,
        num_kv_heads=1,
        block_size=4,
        sliding_window=window,
    )
    (seq,) = plan.gathered
    first = max(0, seq_len - num_queries - window + 1) // 4
    assert seq.source.tolist() == list(range(first, -(-seq_len // 4)))


def test_a_shared_block_is_read_once_for_all_its_owners():
    """32 sequences with a prefix of 8 blocks and one whole block each of their own: 40 blocks, and not 288."""
    num_seqs, block_size = 32, 2
    tables = torch.tensor([[*range(8), 8 + seq] for seq in range(num_seqs)], dtype=torch.int32)
    plan = make_plan(
        tables,
        torch.full((num_seqs,), 9 * block_size, dtype=torch.int32),
        torch.arange(num_seqs + 1, dtype=torch.int32),
        num_heads=1,
        num_kv_heads=1,
        block_size=block_size,
    )
    assert sum(part.num_blocks for part in plan.passes) == 8 + num_seqs
    assert sorted(part.owners for part in plan.passes) == [1, num_seqs]


@given(writes(), st.integers(1, 3))
def test_slots_translated_once_are_the_slots_of_write_kv(drawn, num_kv_heads):
    num_blocks, block_size, slots, key, _ = drawn
    key = key[:, :1].expand(-1, num_kv_heads, -1)
    plain, bulk = (torch.zeros(num_blocks, num_kv_heads, block_size, 4, dtype=torch.float64) for _ in range(2))
    slot_mapping = torch.tensor(slots, dtype=torch.int64)
    write_kv(key, key, plain, plain.clone(), slot_mapping)
    rows, stored = slot_rows(slot_mapping, num_kv_heads, block_size)
    bulk.view(-1, 4)[rows] = (key if stored is None else key[stored]).reshape(-1, 4)
    assert torch.equal(plain, bulk)


# ---- the cache: what a step says is checked, and worked out, once for all layers ----------------------------------

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4,
    max_position=32,
)  # fmt: skip


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_a_step_is_planned_once_for_all_layers_and_the_next_one_anew(monkeypatch):
    from minipaged.kvcache import paged

    plans = []
    monkeypatch.setattr(paged, "make_plan", lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1])
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    for position in range(3):
        step = make_step([Scheduled([1], position, [3, 1])], block_size=2)
        for layer in range(CONFIG.num_layers):
            cache.attend(layer, drawn(1, 4, 4), drawn(1, 2, 4), drawn(1, 2, 4), step)
        assert len(plans) == position + 1


def test_a_step_that_does_not_fit_is_refused_before_anything_is_written_and_again_when_it_comes_again():
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    cache.key_cache.zero_()
    good = make_step([Scheduled([1], 2, [3, 1])], block_size=2)
    bad = replace(good, block_tables=torch.tensor([[3, 4]], dtype=torch.int32))
    for _ in range(2):
        with pytest.raises(ValueError, match="got 4"):
            cache.attend(0, drawn(1, 4, 4), drawn(1, 2, 4), drawn(1, 2, 4), bad)
    assert not cache.key_cache.any()


def test_a_slot_past_the_pool_is_refused_before_anything_is_written():
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    cache.key_cache.zero_()
    step = make_step([Scheduled([1], 2, [3, 1])], block_size=2)
    with pytest.raises(ValueError, match="slot_mapping must lie in -1 to 7, got 8"):
        cache.attend(0, drawn(1, 4, 4), drawn(1, 2, 4), drawn(1, 2, 4), replace(step, slot_mapping=torch.tensor([8])))
    assert not cache.key_cache.any()


def test_a_token_without_a_slot_is_not_stored():
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    cache.key_cache.zero_()
    cache.value_cache.zero_()
    step = make_step([Scheduled([1, 2], 0, [3])], block_size=2)
    key = drawn(2, 2, 4)
    cache.attend(0, drawn(2, 4, 4), key, key, replace(step, slot_mapping=torch.tensor([-1, 7])))
    assert torch.equal(cache.key_cache[0, 3, :, 1], key[1])
    cache.key_cache[0, 3, :, 1] = 0.0
    assert not cache.key_cache.any()
