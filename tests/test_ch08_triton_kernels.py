"""Chapter 8. The Triton kernels pass the suite of chapter 7, and what a GPU adds to it.

Without a GPU the kernels run in Triton's interpreter; with one, the same tests run on it. Beside the memory that no
token owns, every output is NaN before the call: what the kernel forgets to write shows as well.
"""

import importlib
import os
import re
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from messages import says
from strategies import BLOCK_SIZES, PagedBatch, costly, paged_batches, rounded
from test_ch07_paged_attention import BAD_ARGUMENTS, i32, writes
from test_ch07_paged_attention import _arguments as fitting_arguments

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
pytest.importorskip("triton", reason="the kernels need Triton, which runs on Linux")

import minipaged.kernels
from minipaged.cdiv import cdiv
from minipaged.kernels import attention, copy_blocks, paged_attention, write_kv
from minipaged.kernels.paged_decode import MAX_SPLITS, MIN_TOKENS, choose_num_splits, paged_decode
from minipaged.kernels.paged_prefill import paged_prefill

pytestmark = pytest.mark.ch08

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIMS = (4, 16, 24)  # 24 is padded to 32
scales = st.sampled_from((0.1, 0.25, 0.5))
windows = st.none() | st.integers(1, 20)


def one_query_each(launcher, query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, **options):
    """A decode launcher behind the one signature."""
    assert query_start_loc.tolist() == list(range(len(query) + 1))
    return launcher(query, key_cache, value_cache, block_tables, seq_lens, **options)


# Tiles of 16 keys, so that short contexts have several; whole ones too. What is drawn first is what shrinking ends at.
tiles = st.sampled_from((16, 64))
ragged_kernels = st.builds(partial, st.just(paged_prefill), rows=st.sampled_from((32, 128)), tile=tiles) | st.just(
    paged_attention
)
decode_kernels = st.builds(
    partial, st.just(one_query_each), st.just(paged_decode), tile=tiles, num_splits=st.just(1) | st.integers(2, 6)
)


@st.composite
def kernels_and_batches(draw, dtype=torch.float32, max_seqs=2):
    """A kernel, and a batch that it serves."""
    decode_only = draw(st.booleans(), label="decode")
    kernel = draw(decode_kernels if decode_only else ragged_kernels, label="kernel")
    small = {"max_seqs": max_seqs, "max_kv_heads": 2, "max_queries": 20}  # the interpreter runs program by program
    return kernel, draw(paged_batches(dtype, decode_only, head_dims=HEAD_DIMS, **small), label="batch")


def attend(kernel, batch, scale=0.25, **options):
    """The answer on the CPU. NaN before the call: `out`, the memory behind it, and what the launcher allocates."""
    arguments = [tensor.to(DEVICE) for tensor in batch.arguments]
    num_tokens = len(batch.query)
    memory = torch.full((num_tokens + 16, *batch.query.shape[1:]), torch.nan, dtype=batch.query.dtype, device=DEVICE)
    out = memory[:num_tokens]
    torch.use_deterministic_algorithms(True)  # so that torch.empty is filled with NaN
    try:
        assert kernel(*arguments, scale=scale, out=out, **options) is out
    finally:
        torch.use_deterministic_algorithms(False)
    assert memory[num_tokens:].isnan().all(), "the kernel wrote past the end of out"
    return out.cpu()


def assert_near(out, expected, tolerance):
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@costly(1 / 4)
@given(kernels_and_batches(max_seqs=3), scales, windows)
def test_equals_the_oracle_for_each_sequence(drawn, scale, window):
    kernel, batch = drawn
    assert_near(attend(kernel, batch, scale, sliding_window=window), batch.expected(scale, window), 1e-5)


@costly(1 / 4)
@given(kernels_and_batches(torch.float16), scales, windows)
def test_float16_is_near_the_oracle(drawn, scale, window):
    kernel, batch = drawn
    assert_near(attend(kernel, batch, scale, sliding_window=window), batch.expected(scale, window), 2e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter computes bfloat16 wrongly")
@costly(1 / 4)
@given(kernels_and_batches(torch.bfloat16), scales)
def test_bfloat16_is_near_the_oracle(drawn, scale):
    kernel, batch = drawn
    assert_near(attend(kernel, batch, scale), batch.expected(scale), 2e-2)


@costly(1 / 4)
@given(kernels_and_batches(), st.sampled_from((100.0, 1e4)))
def test_large_scores_do_not_overflow(drawn, size):
    """exp2 of such a score is infinite: only a maximum that is subtracted, and rescaled by, keeps the answer."""
    kernel, batch = drawn
    batch = replace(batch, query=batch.query.double() * size, key_cache=batch.key_cache.double())
    batch.value_cache, batch.queries = batch.value_cache.double(), [query * size for query in batch.queries]
    # A scale is rounded to float32 on its way to a GPU, so take one that float32 holds: log2(e) it does not.
    tolerance = 1e-8 if DEVICE == "cpu" else 1e-6 * size
    assert_near(attend(kernel, batch, 0.25), batch.expected(0.25), tolerance)


@costly(1 / 4)
@given(kernels_and_batches(), st.data())
def test_where_a_block_lies_does_not_matter(drawn, data):
    """Move every block to another place and rename it in the tables: not one bit of the answer changes."""
    kernel, batch = drawn
    place = torch.tensor(data.draw(st.permutations(range(len(batch.key_cache)))))  # block b moves to place[b]
    moved = replace(batch, key_cache=batch.key_cache.clone(), value_cache=batch.value_cache.clone())
    moved.key_cache[place], moved.value_cache[place] = batch.key_cache, batch.value_cache
    moved.block_tables = torch.where(batch.block_tables >= 0, place[batch.block_tables], -1).to(torch.int32)
    assert torch.equal(attend(kernel, batch), attend(kernel, moved))


@costly(1 / 4)
@given(kernels_and_batches(), st.data())
def test_other_sequences_do_not_matter(drawn, data):
    """Isolation: what B holds in its own blocks never reaches A, nor does how many others there are."""
    kernel, batch = drawn
    seq = data.draw(st.integers(0, len(batch.keys) - 1), label="A")
    rows = slice(*batch.query_start_loc[seq : seq + 2].tolist())
    together = attend(kernel, batch)[rows]
    others = torch.ones(len(batch.key_cache), dtype=torch.bool)
    others[batch.block_tables[seq][batch.block_tables[seq] >= 0].long()] = False
    batch.key_cache[others], batch.value_cache[others] = torch.nan, torch.nan
    alone = replace(
        batch,
        query=batch.query[rows],
        block_tables=batch.block_tables[seq : seq + 1],
        seq_lens=batch.seq_lens[seq : seq + 1],
        query_start_loc=i32(0, rows.stop - rows.start),
    )
    assert_near(attend(kernel, alone), together.double(), 1e-5)  # tiles of rows fall differently: near, not equal


@costly(1 / 4)
@given(kernels_and_batches(), st.data())
def test_a_table_is_never_read_past_the_end_of_its_sequence(drawn, data):
    kernel, batch = drawn
    before = attend(kernel, batch)
    batch.block_tables[batch.block_tables < 0] = data.draw(st.integers(0, len(batch.key_cache) - 1), label="garbage")
    assert torch.equal(attend(kernel, batch), before)


@costly(1 / 4)
@given(kernels_and_batches(), st.integers(1, 20))
def test_what_no_window_reaches_may_be_freed(drawn, window):
    kernel, batch = drawn
    before = attend(kernel, batch, sliding_window=window)
    free_what_no_window_reaches(batch, window)
    assert torch.equal(attend(kernel, batch, sliding_window=window), before)


def free_what_no_window_reaches(batch, window):
    """Tokens before the window of a sequence's first query: their slots become NaN, whole blocks leave the table."""
    num_blocks, _, block_size, _ = batch.key_cache.shape
    live = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for table, seq_len, queries in zip(batch.block_tables, batch.seq_lens.tolist(), batch.queries, strict=True):
        first = max(0, seq_len - len(queries) - window + 1)  # the first token that a query of this sequence sees
        table[: first // block_size] = -1
        for position in range(first, seq_len):
            live[table[position // block_size], position % block_size] = True
    for cache in (batch.key_cache, batch.value_cache):
        cache.transpose(1, 2)[~live] = torch.nan  # [num_blocks, block_size, ...]


@costly(1 / 4)
@given(kernels_and_batches(), st.data())
def test_other_layouts_give_the_same_bits(drawn, data):
    """K and V as FlashAttention orders them (NHD), and queries that are a part of a fused QKV: only strides differ."""
    kernel, batch = drawn
    before = attend(kernel, batch)
    if data.draw(st.booleans(), label="NHD"):
        batch.key_cache = batch.key_cache.transpose(1, 2).contiguous().transpose(1, 2)
        batch.value_cache = batch.value_cache.transpose(1, 2).contiguous().transpose(1, 2)
    else:  # K and V of a block side by side
        both = torch.stack((batch.key_cache, batch.value_cache), dim=1)
        batch.key_cache, batch.value_cache = both.unbind(1)
    batch.query = torch.cat((torch.full_like(batch.query, torch.nan), batch.query), dim=1)[:, batch.query.shape[1] :]
    arguments = [tensor.to(DEVICE) for tensor in batch.arguments]
    out = torch.full((batch.query.shape[1], batch.query.shape[0], batch.query.shape[2]), torch.nan, dtype=torch.float32)
    out = out.to(DEVICE).transpose(0, 1)
    assert torch.equal(kernel(*arguments, scale=0.25, out=out).cpu(), before)


@costly(1 / 4)
@given(kernels_and_batches(), st.data())
def test_a_query_without_context_gives_zero(drawn, data):
    """The padding of a batch: seq_lens is 0, the table's row is never read, and the others do not notice."""
    kernel, batch = drawn
    expected = attend(kernel, batch)
    for seq in data.draw(st.sets(st.integers(0, len(batch.keys) - 1), min_size=1), label="padding"):
        batch.seq_lens[seq], batch.block_tables[seq] = 0, -1
        expected[slice(*batch.query_start_loc[seq : seq + 2].tolist())] = 0.0
    assert torch.equal(attend(kernel, batch), expected)


def fixed_batch(heads, kv_heads, head_dim, block_size, seq_lens, num_queries, dtype=torch.float32):
    """A batch of given shape over permuted blocks; one block is in no table."""
    rng = np.random.default_rng(0)
    counts = [cdiv(n, block_size) for n in seq_lens]
    blocks = torch.from_numpy(rng.permutation(sum(counts) + 1)).to(torch.int32)
    tables = torch.full((len(seq_lens), max(counts)), -1, dtype=torch.int32)
    caches = torch.full((2, len(blocks), kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    arrays = [[rounded(rng.standard_normal((n, kv_heads, head_dim)), dtype) for n in seq_lens] for _ in range(2)]
    queries = [rounded(rng.standard_normal((n, heads, head_dim)), dtype) for n in num_queries]
    for seq, (seq_len, own) in enumerate(zip(seq_lens, blocks[:-1].split(counts), strict=True)):
        tables[seq, : len(own)] = own
        position = torch.arange(seq_len)
        for cache, contents in zip(caches, arrays, strict=True):
            cache[own[position // block_size].long(), :, position % block_size] = torch.from_numpy(contents[seq]).to(
                dtype
            )
    query = torch.from_numpy(np.concatenate(queries)).to(dtype)
    return PagedBatch(
        query, *caches, tables, i32(*seq_lens), i32(0, *np.cumsum(num_queries)), queries, arrays[0], arrays[1]
    )


every_kernel = pytest.mark.parametrize(
    "kernel",
    [
        partial(one_query_each, paged_decode),
        partial(one_query_each, paged_decode, num_splits=3),
        paged_prefill,
    ],
    ids=["decode", "split", "prefill"],
)


@every_kernel
@pytest.mark.parametrize("head_dim", [1, 16, 32, 64, 80, 96, 128, 256])
def test_head_sizes(kernel, head_dim):
    batch = fixed_batch(3, 1, head_dim, 5, seq_lens=(150, 7), num_queries=(1, 1))
    assert_near(attend(kernel, batch, head_dim**-0.5), batch.expected(head_dim**-0.5), 1e-5)


@every_kernel
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
def test_block_sizes(kernel, block_size):
    """A tile may hold many blocks, or a block many tiles."""
    batch = fixed_batch(2, 2, 16, block_size, seq_lens=(260, 255), num_queries=(1, 1))
    assert_near(attend(kernel, batch), batch.expected(0.25), 1e-5)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 17, 71])
def test_groups(group):
    """17 and 71 query heads on one KV head: more than the 16 rows that a dot has at least."""
    batch = fixed_batch(group, 1, 16, 4, seq_lens=(21, 9), num_queries=(1, 1))
    for kernel in (partial(one_query_each, paged_decode), paged_prefill):
        assert_near(attend(kernel, batch), batch.expected(0.25), 1e-5)


def test_a_row_may_see_nothing_of_its_first_tile():
    """The last query of the tile sees positions 58 and 59; the tile of keys in front of it starts at 19."""
    batch = fixed_batch(1, 1, 16, 4, seq_lens=(60,), num_queries=(40,))
    out = attend(partial(paged_prefill, rows=64, tile=16), batch, sliding_window=2)
    assert_near(out, batch.expected(0.25, 2), 1e-5)


@every_kernel
@pytest.mark.parametrize("window", [1, 6, 17])
def test_keys_before_the_window_are_not_loaded(kernel, window):
    """To mask their scores is not enough: 0 * NaN is NaN. Blocks of 7, so that a window starts within one."""
    batch = fixed_batch(2, 1, 16, 7, seq_lens=(48, 20), num_queries=(1, 1) if kernel is not paged_prefill else (5, 2))
    free_what_no_window_reaches(batch, window)
    assert_near(attend(kernel, batch, sliding_window=window), batch.expected(0.25, window), 1e-5)


def test_many_sequences_find_their_queries():
    """Empty ones, long ones, and starts on every side of a query tile's edge."""
    counts = (0, 16, 0, 1, 15, 17, 0, 0, 3, 33, 1, 0)
    batch = fixed_batch(1, 1, 16, 4, seq_lens=[n + 2 for n in counts], num_queries=counts)
    assert_near(attend(partial(paged_prefill, rows=16), batch), batch.expected(0.25), 1e-5)


@pytest.mark.parametrize("num_queries", [(1, 1, 1), (2, 0, 1), (1, 0, 2), (3, 4, 1), (1, 1, 0), (0, 0, 0)])
@pytest.mark.parametrize("told", [False, True])
def test_one_signature_for_every_mix(num_queries, told):
    """As many tokens as sequences is not yet decode: one may have two queries and another none."""
    batch = fixed_batch(4, 2, 16, 3, seq_lens=(300, 5, 40), num_queries=num_queries)
    options = {"max_query_len": max(num_queries)} if told else {}
    assert_near(attend(paged_attention, batch, **options), batch.expected(0.25), 1e-5)


def test_a_small_batch_is_split(monkeypatch):
    launched = []
    monkeypatch.setattr(attention, "count_multiprocessors", lambda device: 132)
    monkeypatch.setattr(
        attention, "paged_decode", lambda *a, **k: launched.append(k["num_splits"]) or paged_decode(*a, **k)
    )
    batch = fixed_batch(2, 1, 16, 16, seq_lens=(2 * MIN_TOKENS + 5, 3), num_queries=(1, 1))
    assert_near(attend(paged_attention, batch), batch.expected(0.25), 1e-5)
    assert launched == [2]


@given(st.integers(0, 512), st.integers(1, 16), st.integers(0, 200_000), st.integers(1, 200))
def test_splits_fill_the_gpu_and_are_not_too_short(num_seqs, num_kv_heads, max_seq_len, multiprocessors):
    num_splits = choose_num_splits(num_seqs, num_kv_heads, max_seq_len, multiprocessors)
    programs = num_seqs * num_kv_heads
    assert 1 <= num_splits <= MAX_SPLITS
    assert num_splits == 1 or max_seq_len >= num_splits * MIN_TOKENS, "a split is too short to be worth its merge"
    if programs >= 2 * multiprocessors:
        assert num_splits == 1, "the batch fills the GPU by itself"
    if num_splits < min(MAX_SPLITS, max_seq_len // MIN_TOKENS):
        assert max(1, programs) * num_splits >= multiprocessors, "multiprocessors idle, and the context is long enough"


def test_a_block_far_into_the_pool():
    """Its number times the stride is 2**31, one more than 32 bits hold. Of 8.6 GB only a few pages are ever touched.

    The pool is the second half of the memory: where 32 bits would wrap around to, 2**31 elements before it, is ours.
    """
    try:
        memory = torch.empty(2**32 + 2048, dtype=torch.float16, device=DEVICE)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"8.6 GB cannot be allocated: {error}")
    pool = memory[2**31 :].view(-1, 1, 16, 64)  # [num_blocks, num_kv_heads, block_size, head_dim]; K and V in one
    far = 2**31 // pool.stride(0)
    batch = fixed_batch(2, 1, 64, 16, seq_lens=(20,), num_queries=(1,), dtype=torch.float16)
    batch.block_tables = i32(far, 0)[None]
    batch.key_cache = batch.value_cache = pool
    batch.values = batch.keys
    key = torch.from_numpy(batch.keys[0]).half().to(DEVICE)
    slots = [*range(far * 16, far * 16 + 16), *range(4)]
    write_kv(key, key, pool, pool, torch.tensor(slots, device=DEVICE))
    assert torch.equal(pool[far, 0], key[:16, 0])
    decode = partial(one_query_each, paged_decode)
    split = partial(one_query_each, paged_decode, num_splits=2)
    for kernel in (decode, split, paged_prefill):
        assert_near(attend(kernel, batch), batch.expected(0.25), 2e-3)
    copy_blocks(pool, pool, [(far, 1), (0, far + 1)])
    assert torch.equal(pool[1], pool[far])
    assert torch.equal(pool[far + 1, 0, :4], key[16:, 0])


@given(writes(), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_write_stores_each_token_in_its_slot_and_nothing_else(drawn, num_kv_heads, head_dim, nhd):
    num_blocks, block_size, slots, *new = drawn
    fused = torch.cat(new, dim=1).to(DEVICE)  # [num_tokens, 4, 4]: K and V are views, as of one projection
    key, value = fused[:, :num_kv_heads, :head_dim], fused[:, -num_kv_heads:, -head_dim:]
    # The pool lies between two blocks that are not its own; slot -1 is in the first of them.
    shape = (block_size, num_kv_heads, head_dim) if nhd else (num_kv_heads, block_size, head_dim)
    memory = torch.full((2, num_blocks + 2, *shape), torch.nan, dtype=torch.float64, device=DEVICE)
    caches = [part.transpose(1, 2)[1:-1] if nhd else part[1:-1] for part in memory]
    write_kv(key, value, *caches, torch.tensor(slots, dtype=torch.int64, device=DEVICE), check=True)
    assert memory[:, [0, -1]].isnan().all(), "something was stored outside the pool"
    for cache, new in zip(caches, (key, value), strict=True):
        for slot in range(num_blocks * block_size):
            stored = cache[slot // block_size, :, slot % block_size]
            if slot in slots:
                assert torch.equal(stored, new[slots.index(slot)]), f"slot {slot} holds another token"
            else:
                assert stored.isnan().all(), f"slot {slot} was written, and no token goes there"


@st.composite
def block_copies(draw):
    """Distinct targets, none of which is a source."""
    num_blocks = draw(st.integers(2, 7))
    order = draw(st.permutations(range(num_blocks)))
    targets = order[: draw(st.integers(0, num_blocks - 1))]
    return num_blocks, [(draw(st.sampled_from(order[len(targets) :])), target) for target in targets]


@given(block_copies(), st.integers(0, 3), st.sampled_from(BLOCK_SIZES), st.booleans(), st.booleans())
def test_copies_are_whole_blocks_in_every_layer(drawn, num_layers, block_size, nhd, as_tensor):
    """num_layers 0 stands for the pool of one layer, without that dimension. 40 * 2 * 16 elements are two pieces."""
    num_blocks, copies = drawn
    caches = torch.randn(2, max(1, num_layers), num_blocks, 2, block_size, 40, device=DEVICE)
    if nhd:
        caches = caches.transpose(3, 4).contiguous().transpose(3, 4)
    if num_layers == 0:
        caches = caches[:, 0]
    expected = caches.clone()
    for source, target in copies:
        expected.select(-4, target).copy_(expected.select(-4, source))
    pairs = torch.tensor(copies, dtype=torch.int64, device=DEVICE).view(-1, 2) if as_tensor else copies
    copy_blocks(*caches, pairs, check=True)
    assert torch.equal(caches, expected)


MORE_BAD_ARGUMENTS = [
    ("query", torch.zeros(3, 8, 4).transpose(1, 2), ("stride 1",)),
    ("query", torch.zeros(3, 4, 8, device="meta"), ("meta",)),
    ("key_cache", torch.zeros(6, 2, 8, 2).transpose(2, 3), ("stride 1",)),
    ("value_cache", torch.zeros(6, 2, 2, 8).transpose(1, 2), ("strides",)),
    ("block_tables", torch.zeros(2, 3, dtype=torch.int32, device="meta"), ("meta",)),
    ("block_tables", torch.zeros(3, 2, dtype=torch.int32).T, ("stride 1",)),
    ("seq_lens", i32(3, 0, 5, 0)[::2], ("stride 1",)),
    ("seq_lens", torch.tensor([3.0, 5.0]), ("float32",)),
    ("out", torch.zeros(3, 4, 4), ("[3, 4, 4]",)),
    ("out", torch.zeros(3, 4, 8, dtype=torch.float16), ("float16",)),
    ("sliding_window", -1, ("got -1",)),
]


@pytest.mark.parametrize(("name", "wrong", "said"), BAD_ARGUMENTS + MORE_BAD_ARGUMENTS)
def test_what_does_not_fit_is_refused_by_name(name, wrong, said):
    arguments = {**fitting_arguments(), "out": torch.full((3, 4, 8), 7.0)}
    with pytest.raises(ValueError) as error:
        paged_attention(**{**arguments, name: wrong}, scale=1.0, check=True)
    assert name.split("_")[0] in str(error.value)
    assert says(error.value, *said), f"the message does not name {said}: {error.value}"
    assert (arguments["out"] == 7).all()


@pytest.mark.parametrize(
    ("launcher", "options", "said"),
    [
        (paged_decode, {"tile": 8}, "tile must be a power of two from 16, got 8"),
        (paged_decode, {"tile": 48}, "got 48"),
        (paged_decode, {"query": torch.zeros(3, 4, 8)}, "one token a sequence, got 3 for 2"),
        (paged_decode, {"query": torch.zeros(1, 4, 8)}, "one token a sequence, got 1 for 2"),
        (paged_decode, {"num_splits": 0}, "num_splits must lie in 1 to 64, got 0"),
        (paged_decode, {"num_splits": 65}, "got 65"),
        (paged_prefill, {"rows": 24}, "rows must be a power of two from 16, got 24"),
        (paged_prefill, {"rows": 16, "query": torch.zeros(3, 40, 8)}, "group of 20 query heads, got 16"),
        (paged_prefill, {"query": torch.zeros(3, 400, 8)}, "at most 128 may share one"),
        (
            paged_prefill,
            {"query": torch.zeros(3, 4, 257), **dict.fromkeys(("key_cache", "value_cache"), torch.zeros(6, 2, 2, 257))},
            "head_dim 257",
        ),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(launcher, options, said):
    arguments = fitting_arguments()
    if launcher is not paged_prefill:
        del arguments["query_start_loc"]
        arguments["query"] = torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match=re.escape(said)):
        launcher(**{**arguments, **options}, scale=1.0)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("key", torch.zeros(2, 3, 8), "[2, 3, 8]"),
        ("key", torch.zeros(2, 8, 2).transpose(1, 2), "stride 1"),
        ("value", torch.zeros(1, 2, 8), "[1, 2, 8]"),
        ("value", torch.zeros(2, 2, 8, dtype=torch.float64), "float64"),
        ("slot_mapping", torch.tensor([0, 12]), "got 12"),
        ("slot_mapping", torch.tensor([0, -2]), "got -2"),
        ("slot_mapping", torch.tensor([0]), "[1]"),
        ("slot_mapping", torch.tensor([0.0, 1.0]), "float32"),
        ("copies", [(0, 6)], "got 6"),
        ("copies", [(-1, 2)], "got -1"),
        ("copies", [(0, 2), (1, 2)], "got 2 twice"),
        ("copies", [(0, 2), (2, 3)], "source 2"),
        ("copies", torch.tensor([[0, 2], [2, 3]]), "source 2"),
        ("copies", torch.tensor([0, 2]), "[2]"),
    ],
)
def test_a_refused_write_or_copy_changes_nothing(name, wrong, said):
    caches = torch.zeros(6, 2, 2, 8), torch.zeros(6, 2, 2, 8)
    with pytest.raises(ValueError) as error:
        if name == "copies":
            copy_blocks(*caches, wrong, check=True)
        else:
            new = {"key": torch.ones(2, 2, 8), "value": torch.ones(2, 2, 8), "slot_mapping": torch.tensor([0, 11])}
            write_kv(**{**new, name: wrong}, key_cache=caches[0], value_cache=caches[1], check=True)
    assert name in str(error.value)
    assert said in str(error.value)
    assert not caches[0].any()
    assert not caches[1].any()


def test_blocks_in_several_pieces_are_not_copied():
    cache = torch.zeros(2, 6, 4, 8).transpose(0, 1)  # a pool for each head: the heads of a block lie far apart
    with pytest.raises(ValueError, match="key_cache must hold a block in one piece"):
        copy_blocks(cache, cache, [(0, 1)])


def test_without_triton_the_package_imports_and_a_kernel_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"minipaged\.kernels\.write_kv needs Triton"):
        importlib.reload(minipaged.kernels).__getattr__("write_kv")
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        _ = minipaged.kernels.flash
