"""Chapter 8. Kernels read what they must, once, and touch nothing else: bytes are counted, and dead slots are outside.

A GPU would hide both faults. A read past the end returns what lies there, and a tile that is read twice is only slow.
"""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

os.environ.update({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})  # before triton is imported
pytest.importorskip("triton", reason="the kernels need Triton, which runs on Linux")

import triton

from checked_interpreter import checked
from minipaged.kernels import copy_blocks, paged_attention, write_kv
from minipaged.kernels.paged_decode import paged_decode
from minipaged.kernels.paged_prefill import paged_prefill
from strategies import BLOCK_SIZES, costly, generators, paged_batches

pytestmark = [
    pytest.mark.ch08,
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="bytes are counted with TRITON_INTERPRET=1"),
]

# The interpreter takes some milliseconds a program, and a merge is one a query head: few sequences, and all the edges.
few = {"max_seqs": 3, "max_kv_heads": 2}
windows = st.integers(1, 20)
# (num_splits, tile): one, or more and a merge; a short tile, so that short contexts have several.
ways = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([16, None]))


def decode(batch, way, **options):
    num_splits, tile = way
    arguments = batch.arguments[:-1]  # one query a sequence: query_start_loc says nothing
    return paged_decode(*arguments, scale=0.5, tile=tile, num_splits=num_splits, **options)


def live(batch, window=None):
    """By argument, what may be read: slots of tokens that some query may see, and their entries in the tables."""
    num_blocks, _, block_size, _ = batch.key_cache.shape
    slots = torch.zeros(num_blocks, 1, block_size, 1, dtype=torch.bool)
    entries = torch.zeros(batch.block_tables.shape, dtype=torch.bool)
    for seq, seq_len in enumerate(batch.seq_lens.tolist()):
        num_queries = len(batch.queries[seq])
        first = 0 if window is None else max(0, seq_len - num_queries - window + 1)
        for position in range(first, seq_len):
            slots[batch.block_tables[seq, position // block_size], 0, position % block_size] = True
            entries[seq, position // block_size] = True
    return {"key_cache": slots, "value_cache": slots, "block_tables": entries}


def bytes_of_a_token(batch):
    """Of K, or of V: all KV heads."""
    _, num_kv_heads, _, head_dim = batch.key_cache.shape
    return num_kv_heads * head_dim * batch.key_cache.element_size()


@costly(1 / 4)
@given(batch=paged_batches(dtype=torch.float32, max_queries=20, **few), window=st.none() | windows)
def test_no_batch_makes_a_kernel_leave_what_is_live(batch, window):
    """Prefill, chunks of it, decode and mixes; with a window, nothing that lies before it for all queries."""
    with checked(live(batch, window)) as memory:
        out = paged_attention(*batch.arguments, scale=0.5, sliding_window=window)
    assert memory.stored["out"] == out.nbytes, "each output is stored once"


@costly(1 / 4)
@given(batch=paged_batches(dtype=torch.float16, decode_only=True, **few), way=ways)
def test_decode_reads_each_byte_of_the_context_once(batch, way):
    """The floor. A block that sequences share is read once for each, and is one place."""
    owned = live(batch)
    with checked(owned) as memory:
        decode(batch, way)
    once_for_each_sequence = int(batch.seq_lens.sum()) * bytes_of_a_token(batch)
    every_place = int(owned["key_cache"].sum()) * bytes_of_a_token(batch)
    for cache in ("key_cache", "value_cache"):
        assert memory.loaded[cache] == once_for_each_sequence, f"{cache}: bytes read, and bytes of the context"
        assert memory.distinct[cache] == every_place, f"{cache}: distinct bytes read, and bytes that tokens own"


@costly(1 / 4)
@given(batch=paged_batches(dtype=torch.float16, decode_only=True, **few), way=ways, window=windows)
def test_decode_with_a_window_reads_the_window_alone(batch, way, window):
    """A mask on the scores alone gives the right answer too, and reads the whole context for it."""
    with checked(live(batch, window)) as memory:
        decode(batch, way, sliding_window=window)
    seen = int(batch.seq_lens.clamp(max=window).sum()) * bytes_of_a_token(batch)
    assert memory.loaded["key_cache"] == memory.loaded["value_cache"] == seen


@costly(1 / 4)
@given(
    batch=paged_batches(dtype=torch.float16, max_queries=20, **few),
    window=st.none() | windows,
    rows=st.sampled_from([16, 32]),
    tile=st.sampled_from([16, None]),
)
def test_prefill_reads_no_key_that_no_query_of_a_program_sees(batch, window, rows, tile):
    """A program holds rows // group query tokens of a sequence, and reads K and V once for all of them."""
    group = batch.query.shape[1] // batch.key_cache.shape[1]
    tokens = rows // group
    with checked(live(batch, window)) as memory:
        paged_prefill(*batch.arguments, scale=0.5, sliding_window=window, rows=rows, tile=tile)
    seen = 0
    for query, seq_len in zip(batch.queries, batch.seq_lens.tolist(), strict=True):
        for first in range(seq_len - len(query), seq_len, tokens):  # positions of a program's first and last query
            last = min(first + tokens, seq_len) - 1
            seen += last + 1 - (0 if window is None else max(0, first - window + 1))
    assert memory.loaded["key_cache"] == memory.loaded["value_cache"] == seen * bytes_of_a_token(batch)


@costly(1 / 4)
@given(batch=paged_batches(dtype=torch.float32, decode_only=True, **few), way=ways, garbage=st.integers(-(2**31), -1))
def test_other_layouts_are_read_through_their_strides(batch, way, garbage):
    """FlashAttention's order of a pool, and queries with gaps between tokens and heads, which are outside."""
    owned = live(batch)
    by_slot = torch.stack([batch.key_cache, batch.value_cache]).transpose(2, 3).contiguous()  # [2, blocks, slots, ...]
    batch.key_cache, batch.value_cache = by_slot.transpose(2, 3)
    num_tokens, num_heads, head_dim = batch.query.shape
    wide = batch.query.new_full((num_tokens, 2, num_heads, 3, head_dim), torch.nan)
    wide[:, 1, :, 1] = batch.query
    batch.query = wide[:, 1, :, 1]
    batch.block_tables[batch.block_tables < 0] = garbage
    with checked(owned) as memory:
        out = decode(batch, way)
    assert memory.loaded["key_cache"] == int(batch.seq_lens.sum()) * bytes_of_a_token(batch)
    assert not out.isnan().any()


@pytest.mark.parametrize(
    ("num_seqs", "num_kv_heads", "num_splits", "over"), [(8, 1, 8, 0.05), (1, 8, 16, 0.10)], ids=["64 x 8", "1 x 16"]
)
@pytest.mark.slow
def test_a_whole_decode_call_is_near_the_floor(num_seqs, num_kv_heads, num_splits, over):
    """Llama 3 8B at a context of 2,048: tables, lengths, queries, partial results, merge and outputs are the rest.

    Each sequence, and each group of 4 query heads with its KV head, costs the same bytes. So 8 sequences and one of the
    8 groups stand for the batch of 64: the share of the rest is the same, in a 64th of the interpreter's time.
    """
    group, head_dim, block_size, context = 4, 128, 16, 2048
    blocks = num_seqs * context // block_size
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(num_seqs, num_kv_heads * group, head_dim, generator=rng).half()
    key_cache, value_cache = torch.randn(2, blocks, num_kv_heads, block_size, head_dim, generator=rng).half()
    block_tables = torch.randperm(blocks, generator=rng).view(num_seqs, -1).int()
    seq_lens = torch.full((num_seqs,), context, dtype=torch.int32)
    with checked() as memory:
        paged_decode(query, key_cache, value_cache, block_tables, seq_lens, scale=0.1, num_splits=num_splits)
    floor = 2 * num_seqs * context * num_kv_heads * head_dim * key_cache.element_size()
    assert memory.loaded["key_cache"] + memory.loaded["value_cache"] == floor
    moved = memory.loaded.total() + memory.stored.total()
    assert moved <= (1 + over) * floor, f"{moved / floor - 1:.1%} above the floor: {memory.loaded}, {memory.stored}"


@given(block_size=st.sampled_from(BLOCK_SIZES), num_blocks=st.integers(1, 5), rng=generators(), data=st.data())
def test_write_reads_and_stores_the_stored_tokens_alone(block_size, num_blocks, rng, data):
    num_slots, num_kv_heads, head_dim = num_blocks * block_size, data.draw(st.integers(1, 3)), 8
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=8))
    slots += [-1] * data.draw(st.integers(0, 3), label="tokens that are not stored")
    slots = torch.tensor(data.draw(st.permutations(slots)), dtype=torch.int64)
    key, value = torch.from_numpy(rng.standard_normal((2, len(slots), num_kv_heads, head_dim))).float()
    key_cache, value_cache = torch.zeros(2, num_blocks, num_kv_heads, block_size, head_dim)
    stored = slots >= 0
    taken = torch.zeros(num_slots, dtype=torch.bool)
    taken[slots[stored]] = True
    taken = taken.view(num_blocks, 1, block_size, 1)
    rows = stored[:, None, None]
    with checked({"key": rows, "value": rows, "key_cache": taken, "value_cache": taken}) as memory:
        write_kv(key, value, key_cache, value_cache, slots)
    many = int(stored.sum()) * num_kv_heads * head_dim * 4
    assert memory.loaded["key"] == memory.loaded["value"] == many
    assert memory.stored == ({"key_cache": many, "value_cache": many} if many else {})


@given(block_size=st.sampled_from(BLOCK_SIZES), layers=st.none() | st.integers(1, 3), data=st.data())
def test_copy_touches_sources_and_targets_alone(block_size, layers, data):
    num_blocks, num_kv_heads, head_dim = data.draw(st.integers(2, 6)), 3, 24
    order = data.draw(st.permutations(range(num_blocks)))
    copies = [(order[2 * i], order[2 * i + 1]) for i in range(data.draw(st.integers(1, num_blocks // 2)))]
    shape = (() if layers is None else (layers,)) + (num_blocks, num_kv_heads, block_size, head_dim)
    key_cache, value_cache = torch.randn(2, *shape)
    named = torch.zeros(num_blocks, dtype=torch.bool)
    named[[block for copy in copies for block in copy]] = True
    named = named[:, None, None, None]
    with checked({"key_cache": named, "value_cache": named}) as memory:
        copy_blocks(key_cache, value_cache, copies)
    many = len(copies) * (layers or 1) * num_kv_heads * block_size * head_dim * 4
    for cache in ("key_cache", "value_cache"):
        assert memory.loaded[cache] == memory.distinct[cache] == memory.stored[cache] == many
