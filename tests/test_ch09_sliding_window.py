"""Chapters 9 and 12. Where all layers have a window, a request holds the blocks of its window and no more."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged import LLM, SamplingParams
from minipaged.cdiv import cdiv
from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import Sequence, Token
from minipaged.memory.block_manager import BlockManager
from minipaged.model.load import TINY, Model, tiny_transformer
from minipaged.model.recompute import generate
from minipaged.model.tokenizer_files import byte_tokenizer
from strategies import generators

pytestmark = pytest.mark.ch09


def own_blocks(blocks, seq_id, num_computed, window):
    """The blocks of tokens that a later query sees, and of those that are not computed yet."""
    first = max(0, num_computed + 1 - window) // blocks.block_size
    return blocks.blocks(seq_id)[first:]


@given(
    block_size=st.integers(1, 4),
    window=st.integers(1, 12),
    prompt_len=st.integers(1, 20),
    num_new=st.integers(1, 30),
    caching=st.booleans(),
    data=st.data(),
)
def test_a_request_holds_the_blocks_of_its_window_alone(block_size, window, prompt_len, num_new, caching, data):
    """Whatever happens to it meanwhile: forks, swaps, and other requests that take what it gave back."""
    longest = prompt_len + num_new
    num_blocks = 3 * cdiv(longest, block_size) + 4
    blocks = BlockManager(
        num_blocks, block_size, sliding_window=window, enable_prefix_caching=caching, num_host_blocks=num_blocks
    )
    assert blocks.num_used == 0 and blocks.num_slots == num_blocks * block_size
    tokens = list(range(longest))
    blocks.allocate_slots("a", prompt_len)
    bound = cdiv(window - 1, block_size) + 1
    names = ["a"]
    for num_computed in range(prompt_len, longest):
        for name in names:
            seen = own_blocks(blocks, name, num_computed, window)
            blocks.cache_blocks(name, tokens[:num_computed])
            blocks.remove_skipped_blocks(name, num_computed)
            assert own_blocks(blocks, name, num_computed, window) == seen, "a block that is still read has moved"
            assert len(seen) <= bound
        alive = [own_blocks(blocks, name, num_computed, window) for name in names]
        assert blocks.num_used == len({block for seen in alive for block in seen})
        skipped = max(0, num_computed + 1 - window) // block_size * block_size
        assert blocks.num_stored_tokens == sum(blocks.num_tokens(name) - skipped for name in names)
        what = data.draw(st.sampled_from(("go on", "fork", "swap", "another comes and goes")), label="then")
        if what == "fork" and len(names) < 2:
            stored = blocks.num_stored_tokens
            blocks.fork("a", "b")
            assert blocks.num_stored_tokens == 2 * stored
            names.append("b")
        elif what == "swap" and len(names) == 1:
            stored = blocks.num_stored_tokens
            assert blocks.swap_out("a") is not None and blocks.is_swapped("a") and blocks.num_used == 0
            assert blocks.swap_in("a", num_computed) is not None and blocks.num_stored_tokens == stored
            assert blocks.num_used == len(own_blocks(blocks, "a", num_computed, window))
        elif what == "another comes and goes":
            other = blocks.get_computed_blocks([*tokens[: num_computed - 1], -1])
            if blocks.allocate_slots("other", num_computed, other) is not None:
                taken = set(blocks.blocks("other")) - set(other)
                assert not taken & {block for name in names for block in own_blocks(blocks, name, num_computed, window)}
                blocks.free("other")
        for name in names:
            assert blocks.allocate_slots(name, num_computed + 1) is not None
    for name in names:
        blocks.free(name)
    assert blocks.num_used == blocks.num_stored_tokens == 0
    assert blocks.device.num_free == num_blocks - 1, "one block stands for what was given back"


@given(
    block_size=st.integers(1, 4),
    window=st.integers(1, 12),
    chunk=st.integers(3, 12),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    num_new=st.integers(1, 8),
    caching=st.booleans(),
    num_host_blocks=st.sampled_from((0, 30)),
    spare=st.integers(0, 30),
)
def test_a_long_prompt_holds_a_window_and_a_chunk(
    block_size, window, chunk, lengths, num_new, caching, num_host_blocks, spare
):
    """However long it is, and whatever comes between: a full pool, preemption, a prefix that is found."""
    num_blocks = cdiv(max(lengths) + num_new - 1, block_size) + 1 + spare
    blocks = BlockManager(
        num_blocks, block_size, sliding_window=window, enable_prefix_caching=caching, num_host_blocks=num_host_blocks
    )
    scheduler = Scheduler(blocks, 100, max_num_seqs=3, max_num_batched_tokens=chunk)
    seqs = [
        Sequence(str(i), 0, [token % 5 for token in range(length)], SamplingParams(max_tokens=num_new))
        for i, length in enumerate(lengths)
    ]
    scheduler.add(seqs)
    bound = cdiv(window - 1 + chunk, block_size) + 1
    while scheduler.running or scheduler.waiting:
        output = scheduler.schedule()
        assert output.num_scheduled_tokens, "a step without a token never ends"
        for seq, count in output.num_scheduled_tokens.items():
            assert blocks.num_tokens(seq.seq_id) >= seq.num_computed + count, "a token has no slot"
        if not caching:  # a prefix that was found is named as a whole until the step has run
            assert blocks.num_used <= bound * len(scheduler.running)
        scheduler.update_from_output(output)
        for seq in list(output.sampled):
            seq.outputs.append(Token(7, None, 0.0))
            if len(seq.outputs) == num_new:
                scheduler.finish(seq)
    assert all(len(seq.outputs) == num_new for seq in seqs) and blocks.num_used == 0


def test_a_layer_that_sees_all_keeps_all():
    assert replace(TINY, sliding_windows=(4, None)).widest_window is None
    assert replace(TINY, sliding_windows=(4, 9)).widest_window == 9
    assert TINY.widest_window is None


@given(
    windows=st.tuples(*[st.integers(1, 12)] * 2) | st.just((4, None)),
    lengths=st.lists(st.integers(1, 24) | st.integers(30, 48), min_size=1, max_size=4),
    rng=generators(),
    block_size=st.integers(1, 5),
    chunk=st.integers(4, 24),
    caching=st.booleans(),
    preemption=st.sampled_from(("recompute", "swap")),
    spare=st.integers(0, 20),
    n=st.integers(1, 2),
)
def test_windowed_greedy_tokens_are_those_without_a_cache(
    windows, lengths, rng, block_size, chunk, caching, preemption, spare, n
):
    """Blocks that were given back are in use by other sequences by then, or full of NaN: a read of one would show."""
    num_new, prompts = 12, [rng.integers(0, 256, length).tolist() for length in lengths]
    model = tiny_transformer(torch.float64, config=replace(TINY, sliding_windows=windows))
    longest = max(map(len, prompts)) + num_new
    llm = LLM(
        Model(model, byte_tokenizer()), block_size=block_size, num_blocks=cdiv(longest, block_size) + 1 + spare,
        max_model_len=80, max_num_seqs=4, max_num_batched_tokens=chunk, enable_prefix_caching=caching,
        preemption=preemption,
    )  # fmt: skip
    llm.runner.cache.key_cache.fill_(torch.nan)
    llm.runner.cache.value_cache.fill_(torch.nan)
    params = SamplingParams(max_tokens=num_new, ignore_eos=True, n=n, temperature=1.0, top_k=1)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, progress=False)
    expected = zip(*generate(model, prompts, num_new), strict=True)
    for output, tokens in zip(outputs, expected, strict=True):
        assert [each.token_ids for each in output.outputs] == [list(tokens)] * n
    assert llm.blocks.num_used == 0
