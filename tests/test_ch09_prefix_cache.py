"""Chapter 9. The prefix cache: what was written once is found again, for the same tokens and for nothing else.

Any implementation that keeps the contract passes: no block id is pinned, no key, and no order among equals.
"""

from itertools import takewhile

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from memory_model import BLOCK_SIZES, state
from minipaged.memory.block_allocator import OutOfBlocks
from minipaged.memory.block_table import BlockTable
from minipaged.memory.prefix_cache import PrefixCache, block_keys
from operations import Counted
from sharing_model import PrefixMachine

pytestmark = pytest.mark.ch09

TestPrefixCache = PrefixMachine.TestCase

END = 0  # one more token behind a prompt, so that all of the prompt may be found


def written(cache, tokens, cache_salt=None):
    """A sequence that computed its whole prompt, found or not, and cached it."""
    table = BlockTable(cache, cache.block_size)
    table.append_shared(cache.match(tokens, cache_salt))
    table.append_tokens(len(tokens) - table.num_tokens)
    cache.cache_blocks(table, tokens, cache_salt)
    return table


def num_found(cache, tokens, cache_salt=None):
    return len(cache.match([*tokens, END], cache_salt))


TOKENS = st.lists(st.integers(0, 3) | st.integers(-(2**63), 2**63 - 1), max_size=8)
SALTS = st.sampled_from([None, "a", "A", "a "]) | st.text(max_size=4)


@given(same=TOKENS, tokens=TOKENS, other=TOKENS, cache_salt=SALTS, other_salt=SALTS, block_size=BLOCK_SIZES)
def test_a_prompt_finds_the_common_prefix_in_whole_blocks(same, tokens, other, cache_salt, other_salt, block_size):
    cache = PrefixCache(20, block_size)
    table = written(cache, same + tokens, cache_salt)
    pairs = zip(same + tokens, same + other, strict=False)
    num_common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    expected = min(num_common, max(0, len(same + other) - 1)) // block_size if cache_salt == other_salt else 0
    assert cache.match(same + other, other_salt) == table.blocks[:expected]


@pytest.mark.parametrize(
    ("tokens", "other"),
    [
        ([1, 23], [12, 3]),
        ([1, 256], [256, 1]),
        ([0, 0], [0, 2**32]),
        ([-1, 5], [-2, 5]),  # Python's hash() takes these two for one,
        ([0, 5], [2**61 - 1, 5]),  # and these
    ],
)
def test_different_tokens_have_different_keys(tokens, other):
    cache = PrefixCache(4, 2)
    written(cache, tokens)
    assert (num_found(cache, tokens), num_found(cache, other)) == (1, 0)


def test_keys_are_as_wide_as_they_are_said_to_be():
    """32 bytes that all depend on the tokens: of keys cut to 24 bits, two of these 2^15 would be equal."""
    keys = [*block_keys(range(2**15), 1)]
    assert {len(key) for key in keys} == {32}, f"keys of {len(keys[0])} bytes, and 32 are promised"
    assert len(set(keys)) == len(keys), "two prefixes have one key: one user would be answered from another's text"
    constant = [place for place in range(32) if len({key[place] for key in keys[:64]}) == 1]
    assert not constant, f"bytes {constant} are the same in all keys"


def test_a_call_costs_the_same_however_large_the_cache_is():
    """Entries of the cache's lists, deques, dictionaries and sets that a call looks at: O(1), and O(1) a block."""
    cache = PrefixCache(1_000, 1)
    written(cache, range(600)).release()  # these are evictable
    table = written(cache, range(1_000, 1_300))
    block, counted = table.blocks[0], Counted(cache)
    for name, call in {
        "num_free": lambda: cache.num_free,
        "num_evictable": lambda: cache.num_evictable,
        "is_evictable": lambda: cache.is_evictable(block),
        "ref_count": lambda: cache.ref_count(block),
        "match, of one block,": lambda: cache.match([0, END]),
        "share": lambda: cache.share(block),
        "free": lambda: cache.free(block),
        "share, of an evictable block,": lambda: cache.share(cache.match([0, END])[0]),
        "free, of a cached block,": lambda: cache.free(cache.match([0, END])[0]),
        "allocate": cache.allocate,
    }.items():
        entries = counted.of(call)
        assert entries < 50, f"{name} looks at {entries} entries in a cache of 1000 blocks, and is to be O(1)"
    for _ in range(cache.num_free - cache.num_evictable):
        cache.allocate()
    entries = counted.of(cache.allocate)
    assert entries < 50, f"allocate, with an eviction, looks at {entries} entries, and is to be O(1)"


def test_equal_tokens_behind_another_prefix_are_another_block():
    """K and V of a token depend on all tokens before it, so [3, 4] behind [1, 2] is not [3, 4] behind [9, 9]."""
    cache = PrefixCache(8, 2)
    written(cache, [1, 2, 3, 4])
    assert num_found(cache, [9, 9, 3, 4]) == 0
    assert num_found(cache, [3, 4]) == 0
    written(cache, [9, 9])
    assert num_found(cache, [9, 9, 3, 4]) == 1


@pytest.mark.parametrize(
    ("cache_salt", "other"),
    [
        (None, ""), ("a", "b"), (None, "None"), ("", "a"), ("a", "aa"), ("Tenant", "tenant"), ("a", "a "),
        ("\u00e9", "e\u0301"),  # one letter in two spellings
    ],
)  # fmt: skip
def test_tenants_do_not_find_each_other(cache_salt, other):
    """The same prompt under two salts: not even that another user sent it may show."""
    cache = PrefixCache(8, 2)
    written(cache, [1, 2, 3, 4], cache_salt)
    assert (num_found(cache, [1, 2, 3, 4], cache_salt), num_found(cache, [1, 2, 3, 4], other)) == (2, 0)
    assert not set(written(cache, [1, 2, 3, 4], other).blocks) & set(cache.match([1, 2, 3, 4, END], cache_salt))


@given(num_tokens=st.integers(0, 20), block_size=st.integers(1, 5))
def test_a_hit_leaves_a_token_to_compute(num_tokens, block_size):
    """A prompt found whole would leave nothing to run the model on, and so no logits for the first new token."""
    cache = PrefixCache(20, block_size)
    prompt = list(range(num_tokens))
    written(cache, prompt).release()
    hits = cache.match(prompt)
    assert len(hits) * block_size < max(num_tokens, 1)
    assert len(hits) == max(0, num_tokens - 1) // block_size, "and not one token more than a block is computed again"


def test_what_is_planned_is_not_found():
    cache = PrefixCache(8, 2)
    table = BlockTable(cache, 2)
    table.append_tokens(4)
    assert num_found(cache, [1, 2, 3, 4]) == 0, "there is room for these tokens, and nothing in it"
    cache.cache_blocks(table, [1, 2, 3])
    assert num_found(cache, [1, 2, 3, 4]) == 1, "a block that is not full would still be written"
    cache.cache_blocks(table, [1, 2, 3, 4])
    assert num_found(cache, [1, 2, 3, 4]) == 2


@given(num_same=st.integers(0, 12), num_requests=st.integers(2, 4), chunk=st.integers(1, 6), block_size=BLOCK_SIZES)
def test_of_requests_of_one_step_the_first_is_found_and_each_keeps_its_own_blocks(
    num_same, num_requests, chunk, block_size
):
    """Admitted together, none finds the others, and each computes all. No table is changed because of it."""
    cache = PrefixCache(100, block_size)
    prompts = [list(range(num_same)) + [100 + request] * 5 for request in range(num_requests)]
    tables = [BlockTable(cache, block_size) for _ in prompts]
    for start in range(0, num_same + 5, chunk):
        for table, prompt in zip(tables, prompts, strict=True):
            assert start > 0 or cache.match(prompt) == []
            table.append_tokens(len(prompt[start : start + chunk]))
        before = [table.blocks for table in tables]
        for table, prompt in zip(tables, prompts, strict=True):
            cache.cache_blocks(table, prompt[: start + chunk])
        assert [table.blocks for table in tables] == before
        for table, prompt in zip(tables, prompts, strict=True):
            written = prompt[: start + chunk]
            found = table.blocks[: len(written) // block_size]
            if table is not tables[0] and num_same >= block_size:  # the block that its first one's key finds is another
                found = tables[0].blocks[: min(len(written), num_same) // block_size]
            assert cache.match([*written, END]) == found
    named = [block for table in tables for block in table.blocks]
    assert cache.num_blocks - cache.num_free == len(named) == len(set(named))


def test_a_table_and_its_fork_stay_as_they_are_where_another_block_has_the_key():
    """Two tables that name one block name the same blocks before it: a table that took the cached block in the place
    of its own would leave its fork behind another prefix."""
    cache = PrefixCache(8, 2)
    other = written(cache, [1, 2, 9, 9])
    table = BlockTable(cache, 2)
    table.append_tokens(4)
    fork, own = table.fork(), table.blocks
    for each in (table, fork, table):
        cache.cache_blocks(each, [1, 2, 3, 4])
        assert table.blocks == fork.blocks == own
        assert cache.match([1, 2, 9, 9, END]) == other.blocks
        assert cache.match([1, 2, 3, 4, END]) == other.blocks[:1], "nor is the block behind it found"


def test_a_twin_is_cached_when_the_block_that_had_its_key_is_gone():
    """Its blocks were written all the time. From then on a request finds them."""
    cache = PrefixCache(4, 2)
    first, twin = written(cache, [1, 2]), BlockTable(cache, 2)
    twin.append_tokens(4)
    cache.cache_blocks(twin, [1, 2, 3, 4])
    assert cache.match([1, 2, 3, 4, END]) == first.blocks
    first.release()
    BlockTable(cache, 2).append_tokens(4)  # the whole pool is in use: this evicts what the first one left
    assert num_found(cache, [1, 2, 3, 4]) == 0
    cache.cache_blocks(twin, [1, 2, 3, 4])
    assert cache.match([1, 2, 3, 4, END]) == twin.blocks


def test_the_keys_of_a_step_say_who_may_wait():
    """A scheduler that keeps the first key which each request of a step computes sees that a second one would too."""
    cache = PrefixCache(8, 2)
    written(cache, [1, 2])
    prompts = [1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7, 8], [1, 2, 9, 9]
    first = [list(block_keys(prompt, 2))[len(cache.match(prompt))] for prompt in prompts]
    assert first[0] == first[1] != first[2]
    assert len(list(block_keys([1, 2, 3], 2))) == 1, "a partial block has no key"


def test_released_blocks_are_found_and_count_as_free():
    cache = PrefixCache(4, 2)
    table = written(cache, [1, 2, 3, 4, 5])
    blocks = table.blocks
    assert cache.num_free == 1
    table.release()
    assert cache.num_free == 4
    again = BlockTable(cache, 2)
    again.append_shared(cache.match([1, 2, 3, 4, 5]))
    assert again.blocks == blocks[:2]
    assert cache.num_free == 2, "in use again"
    with pytest.raises(OutOfBlocks):
        BlockTable(cache, 2).append_tokens(6)
    assert num_found(cache, [1, 2, 3, 4]) == 2, "a refusal evicts nothing"


def test_nothing_is_evicted_while_a_block_is_free():
    cache = PrefixCache(4, 2)
    written(cache, [1, 2, 3, 4]).release()
    BlockTable(cache, 2).append_tokens(4)
    assert num_found(cache, [1, 2, 3, 4]) == 2


def test_the_leaf_goes_before_its_parent():
    cache = PrefixCache(4, 1)
    written(cache, [1, 2, 3, 4]).release()
    for left in (3, 2, 1, 0):
        BlockTable(cache, 1).append_tokens(1)
        assert num_found(cache, [1, 2, 3, 4]) == left, "without its parent a block cannot be found: it goes first"


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(6, 1)
    for prompt in ([1, 10], [2, 20], [3, 30]):
        written(cache, prompt).release()
    written(cache, [1, 10]).release()  # the first prompt comes again
    BlockTable(cache, 1).append_tokens(2)
    assert [num_found(cache, prompt) for prompt in ([1, 10], [2, 20], [3, 30])] == [2, 0, 2]
    BlockTable(cache, 1).append_tokens(3)
    assert [num_found(cache, prompt) for prompt in ([1, 10], [2, 20], [3, 30])] == [1, 0, 0]


def test_a_shared_prefix_outlives_the_leaves():
    """Two requests behind one system prompt: it is used as recently as the later of the two."""
    cache = PrefixCache(4, 1)
    first, second = written(cache, [1, 2, 3]), written(cache, [1, 2, 4])
    second.release()
    first.release()
    found = []
    for _ in range(4):
        BlockTable(cache, 1).append_tokens(1)
        found.append((num_found(cache, [1, 2, 3]), num_found(cache, [1, 2, 4])))
    assert found == [(3, 2), (2, 2), (1, 1), (0, 0)]


def test_a_block_in_use_is_never_evicted():
    cache = PrefixCache(3, 1)
    owner = written(cache, [1, 2, 3])
    with pytest.raises(OutOfBlocks):
        BlockTable(cache, 1).append_tokens(1)
    assert num_found(cache, [1, 2, 3]) == 3
    owner.truncate(2)
    other = BlockTable(cache, 1)
    other.append_tokens(1)
    assert num_found(cache, [1, 2, 3]) == 2
    with pytest.raises(OutOfBlocks):
        other.append_tokens(1)


@given(tokens=st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_a_reused_block_is_found_no_more_by_what_it_held(tokens):
    """The stale hash: a block goes to a new owner and keeps its old key. (nano-vllm, issue 163.)"""
    assume(tokens != [0, 0, 1, 1])
    cache = PrefixCache(2, 2)
    written(cache, [0, 0, 1, 1]).release()
    new = BlockTable(cache, 2)
    new.append_tokens(4)  # takes both blocks; nothing is written yet
    assert num_found(cache, [0, 0, 1, 1]) == 0
    cache.cache_blocks(new, tokens)
    assert num_found(cache, [0, 0, 1, 1]) == (1 if tokens[:2] == [0, 0] else 0)
    assert num_found(cache, tokens) == 2


def test_a_cached_block_is_not_written_by_its_last_owner():
    """A sequence is cut back into a full block, and goes on differently: its finder must not see that."""
    cache = PrefixCache(4, 2)
    table = written(cache, [1, 2, 3, 4])
    old = table.blocks[1]
    table.truncate(3)
    assert table.append_tokens(1) == [(old, table.blocks[1])]
    assert table.blocks[1] != old
    assert cache.match([1, 2, 3, 4, END]) == [table.blocks[0], old]
    cache.cache_blocks(table, [1, 2, 3, 5])
    assert cache.match([1, 2, 3, 5, END]) == table.blocks


def test_caching_twice_is_caching_once():
    cache = PrefixCache(4, 2)
    table = written(cache, [1, 2, 3, 4])
    other = table.fork()
    before = state(cache, table, other)
    cache.cache_blocks(table, [1, 2, 3, 4])
    cache.cache_blocks(table, [1, 2])
    cache.cache_blocks(other, [1, 2, 3, 4])
    assert state(cache, table, other) == before
    assert num_found(cache, [1, 2, 3, 4]) == 2


def test_a_block_freed_twice():
    """A shared block: two tables, two frees. The third would take it from a sequence that finds it."""
    cache = PrefixCache(4, 2)
    table = written(cache, [1, 2])
    (block,) = table.blocks
    other = table.fork()
    other.release()
    table.release()
    before = state(cache)
    with pytest.raises(ValueError):
        cache.free(block)
    assert state(cache) == before
    assert num_found(cache, [1, 2]) == 1


def test_a_free_block_is_neither_freed_nor_shared():
    cache = PrefixCache(4, 2)
    table = BlockTable(cache, 2)
    table.append_tokens(2)
    (block,) = table.blocks
    table.release()
    before = state(cache)
    for bad in (block, -1, 4):
        for verb in (cache.free, cache.share):
            with pytest.raises(ValueError):
                verb(bad)
            assert state(cache) == before


def test_what_cannot_be_cached():
    cache = PrefixCache(6, 2)
    table = BlockTable(cache, 2)
    table.append_tokens(5)
    foreign, wider, narrower = BlockTable(PrefixCache(6, 2), 2), BlockTable(cache, 4), BlockTable(cache, 1)
    foreign.append_tokens(2)
    wider.append_tokens(4)
    narrower.append_tokens(2)
    before = state(cache, table, wider, narrower)
    for bad, tokens in (
        (table, [1, 2, 3, 4, 5, 6]),  # longer than its table
        (table, [1, 2, 3, 2**63]),  # no token id; and the block before it must not be cached after
        (foreign, [1, 2]),
        (wider, [1, 2]),
        (narrower, [1, 2]),
    ):
        with pytest.raises(ValueError):
            cache.cache_blocks(bad, tokens)
        assert state(cache, table, wider, narrower) == before
        assert num_found(cache, [1, 2]) == 0


def test_blocks_of_more_tokens_than_small_numbers_are_cached():
    """Numbers up to 256 are single objects in CPython; two equal ones above are not."""
    cache, tokens = PrefixCache(2, int("300")), list(range(300))
    table = BlockTable(cache, int("300"))
    table.append_tokens(300)
    cache.cache_blocks(table, tokens)
    assert num_found(cache, tokens) == 1


@pytest.mark.parametrize("sizes", [(0, 2), (-1, 2), (2, 0)])
def test_a_cache_has_blocks_and_they_have_slots(sizes):
    with pytest.raises(ValueError):
        PrefixCache(*sizes)
