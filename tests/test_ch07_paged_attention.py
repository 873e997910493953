"""Chapter 7. Attention that reads through block tables equals the oracle, wherever the blocks lie.

The memory that no token owns is NaN in every example. An answer without NaN has read nothing that was not written.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from messages import says
from minipaged.attention import compiled, gathered, paged_attention_gathered, paged_attention_online
from minipaged.cdiv import cdiv
from minipaged.compiling import OPTIONS
from minipaged.kvcache import PagedCache
from minipaged.model.batch import make_batch
from minipaged.model.transformer import ModelConfig
from minipaged.openmp import shared_out, team
from strategies import BLOCK_SIZES, generators, paged_batches

pytestmark = pytest.mark.ch07

FORMS = {
    "gathered": paged_attention_gathered,
    "online": paged_attention_online,
    "compiled": compiled.paged_attention,
}
WRITES = {"indexed": gathered.write_kv, "compiled": compiled.write_kv}
every_form = pytest.mark.parametrize("attend", FORMS.values(), ids=FORMS.keys())
every_write = pytest.mark.parametrize("write_kv", WRITES.values(), ids=WRITES.keys())


class Checked(np.ndarray):
    """An array that refuses what NumPy would take from its end."""

    def __getitem__(self, index):
        self._refuse_negative(index)
        return super().__getitem__(index)

    def __setitem__(self, index, value):
        self._refuse_negative(index)
        super().__setitem__(index, value)

    def _refuse_negative(self, index):
        for i in index if isinstance(index, tuple) else (index,):
            for number in (i.start, i.stop) if isinstance(i, slice) else (i,):
                if isinstance(number, int | np.integer) and number < 0:
                    raise IndexError(f"index {number} is negative")


is_python = os.environ.get("NUMBA_DISABLE_JIT") == "1"
of_compiled_code = pytest.mark.skipif(is_python, reason="plain Python holds its lock: its threads take turns")
if is_python:  # the loops are plain Python: each index that they use is looked at
    plain_array_of = compiled.array_of
    compiled.array_of = lambda tensor: plain_array_of(tensor).view(Checked)
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


TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float16: (0.01, 0.01), torch.bfloat16: (0.06, 0.06)}


@every_form
@given(data=st.data(), dtype=st.sampled_from(sorted(TOLERANCE, key=str)), scale=st.floats(0.05, 0.5), window=windows)
def test_smaller_types_are_near_the_oracle(attend, data, dtype, scale, window):
    batch = data.draw(paged_batches(dtype=dtype))
    out = attend(*batch.arguments, scale=scale, sliding_window=window)
    assert out.dtype == dtype
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), batch.expected(scale, window), rtol=rtol, atol=atol)


@every_form
@given(batch=paged_batches(), size=st.sampled_from((100.0, 1e4)))
def test_large_scores_do_not_overflow(attend, batch, size):
    """exp of such a score is infinite: only a maximum that is subtracted, and rescaled by, keeps the answer."""
    batch.query *= size
    batch.queries = [query * size for query in batch.queries]
    torch.testing.assert_close(attend(*batch.arguments, scale=1.0), batch.expected(1.0), rtol=1e-8, atol=1e-8)


@every_form
@pytest.mark.parametrize("num_seqs", [0, 2])
def test_a_batch_may_hold_no_token(attend, num_seqs):
    """Then its tables may have no column."""
    caches = torch.full((2, 3, 2, 4, 8), torch.nan)
    starts = torch.zeros(num_seqs + 1, dtype=torch.int32)
    out = attend(torch.empty(0, 4, 8), *caches, starts[1:].view(num_seqs, 1)[:, :0], starts[1:], starts, scale=1.0)
    assert out.shape == (0, 4, 8)


@pytest.mark.parametrize("num_queries", [1, 2, 20])
@pytest.mark.parametrize("attend", [paged_attention_gathered, compiled.paged_attention], ids=["gathered", "compiled"])
def test_products_of_float16_do_not_overflow(attend, num_queries):
    """Each score is 64 * 100 * 100 / 8 = 80,000, more than float16 holds. All are equal: the answer is V's mean, 1."""
    ones = torch.ones(4, 2, 16, 64, dtype=torch.float16)
    for dtype, number in ((torch.float16, 100.0), (torch.bfloat16, 100.0)):
        out = attend(
            torch.full((2 * num_queries, 4, 64), number, dtype=dtype),
            ones.to(dtype) * number,
            ones.to(dtype),
            torch.tensor([[2, 0], [3, 1]], dtype=torch.int32),
            torch.tensor([20, 31], dtype=torch.int32),
            torch.tensor([0, num_queries, 2 * num_queries], dtype=torch.int32),
            scale=0.125,
        )
        torch.testing.assert_close(out, torch.ones_like(out))


@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=64, max_size=64))
def test_every_half_is_widened_exactly(bits):
    """Infinite, subnormal and NaN ones, too: V of the only slot is the answer."""
    for dtype in (torch.float16, torch.bfloat16):
        value = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(dtype).view(1, 1, 1, 64)
        one = torch.tensor([1], dtype=torch.int32)
        arguments = (torch.zeros(1, 1, 64, dtype=dtype), torch.zeros_like(value), value)
        out = compiled.paged_attention(*arguments, one[None] - 1, one, torch.tensor([0, 1]), scale=1.0)
        torch.testing.assert_close(out.view(-1), value.view(-1), rtol=0, atol=0, equal_nan=True)


@every_form
def test_long_contexts_and_wide_heads(attend):
    """Walks that threads share, over many blocks of 16, with a head as wide as real ones."""
    generator = torch.Generator().manual_seed(0)
    lens = [1, 255, 256, 257, 511, 600]
    counts = [cdiv(n, 16) for n in lens]
    order = torch.randperm(sum(counts), generator=generator).to(torch.int32).split(counts)
    tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True, padding_value=-1)
    keys, values = torch.randn(2, sum(counts), 2, 16, 64, generator=generator, dtype=torch.float64)
    num_queries = torch.tensor([1, 8, 1, 3, 9, 8])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), num_queries.cumsum(0)]).to(torch.int32)
    query = torch.randn(int(starts[-1]), 6, 64, generator=generator, dtype=torch.float64)
    arguments = (query, keys, values, tables, torch.tensor(lens, dtype=torch.int32), starts)
    before = torch.empty(0)
    for window in (None, 1, 200, 300):
        expected = paged_attention_gathered(*arguments, scale=0.125, sliding_window=window)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = attend(*arguments, scale=0.125, sliding_window=window)
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
            by_loop = torch.cat([out[:13], out[22:]])  # 9 queries are gathered, and torch's sums are its own
            if attend is compiled.paged_attention and threads > 1:
                assert torch.equal(by_loop, before), "the number of threads shows in the answer"
            before = by_loop


@pytest.mark.parametrize("attend", [compiled.paged_attention], ids=["compiled"])
@given(batch=paged_batches(max_seqs=1, max_queries=8), window=st.integers(1, 20))
def test_slots_before_the_window_are_never_read(attend, batch, window):
    """Those of the first query: the others' windows begin later. (The gathered and the online form mask them.)"""
    seq_len, block_size = int(batch.seq_lens[0]), batch.key_cache.shape[2]
    for position in range(max(0, seq_len - len(batch.query) + 1 - window)):
        block, offset = batch.block_tables[0, position // block_size], position % block_size
        batch.key_cache[block, :, offset] = batch.value_cache[block, :, offset] = torch.nan
    out = attend(*batch.arguments, scale=0.5, sliding_window=window)
    torch.testing.assert_close(out, batch.expected(0.5, window), rtol=1e-9, atol=1e-10)


@given(batch=paged_batches(max_seqs=2), data=st.data())
def test_what_is_gathered_begins_where_it_is_asked_to(batch, data):
    """K of one sequence from any position on, in one piece: [num_kv_heads, tokens, head_dim]."""
    for table, key in zip(batch.block_tables, batch.keys, strict=True):
        first = data.draw(st.integers(0, len(key) - 1), label="first")
        found = gathered.gather(batch.key_cache, table, len(key), first)
        torch.testing.assert_close(found, torch.from_numpy(key[first:]).transpose(0, 1), rtol=0, atol=0)


def _decode(seq_len=700, dtype=torch.float32):
    """What decoding 8 sequences of the same length gives, and what it should give."""
    generator = torch.Generator().manual_seed(seq_len)
    counts = cdiv(seq_len, 16)
    keys, values = torch.randn(2, 8 * counts, 2, 16, 64, generator=generator).to(dtype)
    tables = torch.randperm(8 * counts, generator=generator).to(torch.int32).view(8, counts)
    lens, starts = torch.full((8,), seq_len, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    arguments = (torch.randn(8, 4, 64, generator=generator).to(dtype), keys, values, tables, lens, starts)
    return arguments, paged_attention_gathered(*arguments, scale=0.125)


def _decodes_right(seq_len, threads, times=20):
    torch.set_num_threads(threads)
    arguments, expected = _decode(seq_len)
    outs = [compiled.paged_attention(*arguments, scale=0.125) for _ in range(times)]
    return all(torch.allclose(out, expected, rtol=1e-4, atol=1e-5) for out in outs)


@of_compiled_code
def test_two_threads_may_attend_at_once():
    with ThreadPoolExecutor(3) as callers:
        assert all(callers.map(_decodes_right, (700, 500, 300), (2, 2, 2)))


@njit(**(OPTIONS | {"cache": False}))
def _count(team, first, last, counts, wrong):
    if shared_out(team):
        return
    for item in range(first, last):
        if item == wrong:
            raise ValueError("this item cannot be computed")
        counts[item] += 1


@given(count=st.integers(0, 300), threads=st.integers(1, 4), least=st.integers(1, 40), data=st.data())
def test_a_team_computes_each_item_once_and_says_that_one_cannot_be(count, threads, least, data):
    torch.set_num_threads(threads)
    counts = np.zeros(count, np.int64)
    _count(team(count, least), 0, count, counts, -1)
    assert (counts == 1).all(), counts
    if count:
        wrong = data.draw(st.integers(0, count - 1), label="cannot be computed")
        is_shared = team(count, least)[1] > 1 and not is_python
        with pytest.raises(MemoryError if is_shared else ValueError):
            _count(team(count, least), 0, count, counts, wrong)


@of_compiled_code
def test_what_one_process_compiled_the_next_one_loads():
    """For each type of a cache. (A closure over a helper once gave the code of every process another name.)"""
    script = (
        "import torch; from minipaged.attention import paged_attention, write_kv\n"
        "table, ends = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)\n"
        "for name in ('float32', 'bfloat16'):\n"
        "    x = torch.zeros(1, 1, 16, 64, dtype=getattr(torch, name))\n"
        "    write_kv(x[:, :, 0], x[:, :, 0], x, x.clone(), torch.tensor([3]))\n"
        "    paged_attention(x[:, :, 0], x, x, table, ends[1:], ends, scale=1.0)\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not done.stderr, "compiled again"


@of_compiled_code
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_forked_after_use_attends():
    """It has none of its parent's threads. What is expected was computed before: torch's own do not survive either."""
    assert _decodes_right(700, 2, times=3)
    torch.set_num_threads(1)  # of the reference, in the child
    arguments, expected = _decode()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run():
        torch.set_num_threads(2)
        queue.put(torch.allclose(compiled.paged_attention(*arguments, scale=0.125), expected, rtol=1e-4, atol=1e-5))

    child = context.Process(target=run)
    child.start()
    try:
        assert queue.get(timeout=600)
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(is_python, reason="this is that run")
@pytest.mark.parametrize(
    "chosen",
    [
        "equals_the_oracle or write or refused_there",
        pytest.param(
            "smaller_types or widened or past_the_end or before_the_window or products", marks=pytest.mark.slow
        ),
    ],
)
def test_the_same_as_plain_python_where_each_index_is_checked(chosen):
    """A learner steps through the loop so; and an index past an array's end, or before its start, cannot hide."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", f"compiled and ({chosen})"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_PROFILE": "course", "MINIPAGED_EXAMPLES": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


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
    # Near, not equal: torch's products may sum in another order for another shape.
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


@every_write
@given(drawn=writes())
def test_write_stores_each_token_in_its_slot_and_nothing_else(write_kv, drawn):
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
    ("query", torch.zeros(3, 4, 6), (6, 8)),
    ("query", torch.zeros(3, 4, 10), (10, 8)),
    ("query", torch.zeros(3, 3, 8), (3, 2)),
    ("query", torch.zeros(3, 0, 8), (0,)),
    ("query", torch.zeros(3, 4, 8, device="meta"), ("meta",)),
    ("query", torch.zeros(3, 4, 8, dtype=torch.float64), ("float64",)),
    ("key_cache", torch.zeros(6, 2, 8), (6, 2, 8)),
    ("key_cache", torch.zeros(6, 2, 2, 8, 1), (6, 2, 8, 1)),
    ("value_cache", torch.zeros(6, 2, 2, 8, device="meta"), ("meta",)),
    ("value_cache", torch.zeros(5, 2, 2, 8), (5, 6)),
    ("block_tables", i32(0, 1, 2), (3,)),
    ("block_tables", torch.tensor([[0.0], [1.0]]), ("float32",)),
    ("block_tables", torch.tensor([[0, 6, -1], [2, 3, 4]], dtype=torch.int32), (6,)),
    ("block_tables", torch.tensor([[0, -1, -1], [2, 3, 4]], dtype=torch.int32), (-1,)),
    ("seq_lens", i32(3, 5).to("meta"), ("meta",)),
    ("seq_lens", i32(3, 7), (7,)),
    ("seq_lens", i32(3, -1), (-1,)),
    ("seq_lens", i32(3), ({1, 2},)),
    ("seq_lens", i32(3, 1), (2, 1)),
    ("query_start_loc", i32(0, 1, 2), (3,)),
    ("query_start_loc", i32(0, 4, 3), (4,)),
    ("query_start_loc", i32(0, 3), ({2, 3},)),
    ("sliding_window", 0, (0,)),
]


@every_form
@pytest.mark.parametrize(("name", "wrong", "said"), BAD_ARGUMENTS)
def test_what_does_not_fit_is_refused_by_name(attend, name, wrong, said):
    arguments = _arguments()
    attend(**arguments, scale=1.0)
    with pytest.raises(ValueError) as error:
        attend(**{**arguments, name: wrong}, scale=1.0)
    assert says(error.value, *said), f"the message does not name {said}: {error.value}"
    assert name.split("_")[0] in str(error.value) or attend is not compiled.paged_attention


@every_write
@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("key", torch.zeros(2, 3, 8), (3, 2)),
        ("value", torch.zeros(1, 2, 8), (1, 2)),
        ("value", torch.zeros(2, 2, 8, dtype=torch.float64), ("float64",)),
        ("slot_mapping", torch.tensor([0, 12]), (12,)),
        ("slot_mapping", torch.tensor([0, -2]), (-2,)),
        ("slot_mapping", torch.tensor([0]), (1,)),
        ("slot_mapping", torch.tensor([0, 11], device="meta"), ("meta",)),
    ],
)
def test_a_refused_write_changes_nothing(write_kv, name, wrong, said):
    arguments = {
        "key": torch.ones(2, 2, 8),
        "value": torch.ones(2, 2, 8),
        "key_cache": torch.zeros(6, 2, 2, 8),
        "value_cache": torch.zeros(6, 2, 2, 8),
        "slot_mapping": torch.tensor([0, 11]),
    }
    with pytest.raises(ValueError) as error:
        write_kv(**{**arguments, name: wrong})
    assert says(error.value, *said), f"the message does not name {said}: {error.value}"
    assert name in str(error.value) or write_kv is not compiled.write_kv
    assert not arguments["key_cache"].any()
    assert not arguments["value_cache"].any()


# ---- the cache: what a step says is checked once for all layers ------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4,
    max_position=32,
)  # fmt: skip


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_a_step_is_checked_once_for_all_layers_and_the_next_one_anew(monkeypatch):
    from minipaged.kvcache import paged

    checked = []
    monkeypatch.setattr(paged, "check_paged_attention", lambda *a, **k: checked.append(a))
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    for position in range(3):
        batch = make_batch([[1]], [position], [[3, 1]], block_size=2)
        for layer in range(CONFIG.num_layers):
            cache.attend(layer, drawn(1, 4, 4), drawn(1, 2, 4), drawn(1, 2, 4), batch, None)
        assert len(checked) == position + 1


def test_a_step_that_does_not_fit_is_refused_before_anything_is_written_and_again_when_it_comes_again():
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    cache.key_cache.zero_()
    good = make_batch([[1]], [2], [[3, 1]], block_size=2)
    bad = replace(good, block_tables=torch.tensor([[3, 4]], dtype=torch.int32))
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            cache.attend(0, drawn(1, 4, 4), drawn(1, 2, 4), drawn(1, 2, 4), bad, None)
        assert says(error.value, 4), f"the message does not name block 4: {error.value}"
    assert not cache.key_cache.any()


def test_a_slot_past_the_pool_is_refused_before_anything_is_written():
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    cache.key_cache.zero_()
    batch = make_batch([[1]], [2], [[3, 1]], block_size=2)
    bad = replace(batch, slot_mapping=torch.tensor([8]))
    with pytest.raises(ValueError) as error:
        cache.attend(0, drawn(1, 4, 4), drawn(1, 2, 4), drawn(1, 2, 4), bad, None)
    assert says(error.value, 8), f"the message does not name slot 8: {error.value}"
    assert not cache.key_cache.any()


def test_a_token_without_a_slot_is_not_stored():
    cache = PagedCache(CONFIG, num_blocks=4, block_size=2, dtype=torch.float64)
    cache.key_cache.zero_()
    cache.value_cache.zero_()
    batch = make_batch([[1, 2]], [0], [[3]], block_size=2)
    key = drawn(2, 2, 4)
    cache.attend(0, drawn(2, 4, 4), key, key, replace(batch, slot_mapping=torch.tensor([-1, 7])), None)
    assert torch.equal(cache.key_cache[0, 3, :, 1], key[1])
    cache.key_cache[0, 3, :, 1] = 0.0
    assert not cache.key_cache.any()


def choose_triton(monkeypatch, interpret, imported, kernels):
    """A process in which TRITON_INTERPRET is so (None: not set), and triton is imported or not."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret or "")
    if interpret is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton", sys)
    if not imported:
        monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.setitem(sys.modules, "minipaged.kernels", kernels)


@pytest.mark.parametrize(
    ("device", "interpret", "imported", "needed"),
    [
        ("cpu", None, False, None),
        ("cpu", None, True, "1"),
        ("cpu", "0", False, "1"),
        ("cpu", "1", True, None),
        ("cuda", None, False, None),
        ("cuda", "0", True, None),
        ("cuda", "1", False, "0"),
        ("cuda", "1", True, "0"),
    ],
)
def test_triton_is_taken_where_it_runs_as_the_device_needs_it(monkeypatch, device, interpret, imported, needed):
    """On a CPU its interpreter is chosen where nothing was chosen yet, and triton is not imported. A GPU's is left."""
    kernels = SimpleNamespace(write_kv=lambda *_: None, paged_attention=lambda *_, **options: ("triton", options))
    choose_triton(monkeypatch, interpret, imported, kernels)
    if needed:
        with pytest.raises(ValueError, match=f"'{device}' needs TRITON_INTERPRET={needed}"):
            PagedCache(CONFIG, 4, 2, device=device, backend="triton")
    elif device == "cuda":
        with suppress(AssertionError, RuntimeError):  # of torch, where no GPU is
            PagedCache(CONFIG, 4, 2, device=device, backend="triton")
    else:
        cache = PagedCache(CONFIG, 4, 2, backend="triton")
        batch = make_batch([[1, 2]], [0], [[3]], block_size=2)
        name, options = cache.attend(0, drawn(2, 4, 4), drawn(2, 2, 4), drawn(2, 2, 4), batch, 5)
        assert name == "triton"
        assert options == {"scale": 0.5, "sliding_window": 5, "max_query_len": 2}
    assert os.environ.get("TRITON_INTERPRET") == ("1" if device == "cpu" and not needed else interpret)


@pytest.mark.parametrize("backend", ["", "a", "tri", "tritons", "z"])
def test_an_unknown_backend_is_refused(backend):
    with pytest.raises(ValueError, match=f"'torch' or 'triton', got '{backend}'"):
        PagedCache(CONFIG, 4, 2, backend=backend)


def test_a_backend_that_cannot_be_imported_is_refused(monkeypatch):
    choose_triton(monkeypatch, "1", True, None)
    with pytest.raises(ValueError, match="backend 'triton' cannot be used"):
        PagedCache(CONFIG, 4, 2, backend="triton")
