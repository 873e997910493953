"""Chapter 10. The scheduler over the real memory, with a model of a few lines: any script of requests, any shortage."""

import sys

import pytest
from hypothesis import example, given, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from messages import says
from minipaged.cdiv import cdiv
from minipaged.engine.scheduler import Scheduler
from minipaged.memory.block_manager import BlockManager
from serving_model import ALPHABET, Engine

pytestmark = pytest.mark.ch10

MAX_MODEL_LEN = 16
prompts = st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=MAX_MODEL_LEN - 1)
# Prompts that are alike for a while, as with a system prompt.
alike = st.builds(lambda n, more: [0, 1, 2, 0, 1, 2, 0, 1][:n] + more, st.integers(1, 8), prompts.map(lambda p: p[:4]))


class ServingMachine(RuleBasedStateMachine):
    """Requests come, run, fork, run short, fail and are aborted, in any order, and beam searches run beside them. Each
    has the text it has alone."""

    @initialize(
        block_size=st.sampled_from((1, 2, 3, 4, MAX_MODEL_LEN)),  # the last one is a contiguous cache
        extra_blocks=st.integers(0, 12),
        host_share=st.sampled_from((0.0, 0.5, 1.0)),
        prefix_caching=st.booleans(),
        watermark=st.sampled_from((0.0, 0.01, 0.3)),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 12) | st.just(100),
    )
    def start(self, block_size, extra_blocks, host_share, prefix_caching, watermark, max_num_seqs, extra_budget):
        num_blocks = cdiv(6, block_size) + extra_blocks
        self.engine = Engine(
            num_blocks,
            block_size,
            int(num_blocks * host_share),
            prefix_caching,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            watermark=watermark,
        )

    @rule(
        prompt=prompts | alike,
        max_tokens=st.integers(1, 6),
        n=st.integers(1, 4),
        cache_salt=st.sampled_from((None, "a")),
    )
    def ask(self, prompt, max_tokens, n, cache_salt):
        max_tokens = min(max_tokens, MAX_MODEL_LEN - len(prompt))
        blocks = self.engine.blocks
        fits = cdiv(len(prompt) + max_tokens - 1, blocks.block_size) <= blocks.num_blocks
        try:
            self.engine.add(prompt, max_tokens, n, cache_salt)
        except ValueError:
            assert not fits, "a request whose samples fit the pool one by one was refused"
        else:
            assert fits, "a request that cannot fit the pool was let in"

    @rule(
        texts=st.lists(prompts | alike, min_size=1, max_size=3),
        max_tokens=st.integers(1, 6),
        width=st.integers(1, 3),
        most_steps=st.none() | st.integers(0, 6),
    )
    def search(self, texts, max_tokens, width, most_steps):
        """A whole search, or some of its steps and then an interrupt."""
        blocks = self.engine.blocks
        longest = max(min(len(text) + max_tokens, MAX_MODEL_LEN) - 1 for text in texts)
        room = width * cdiv(longest, blocks.block_size) <= blocks.num_free
        fits = room and width <= self.engine.scheduler.max_num_seqs
        try:
            self.engine.search(texts, max_tokens, width, most_steps)
        except ValueError:
            assert not fits, "searches that fit beside the requests were refused"
        else:
            assert fits, "a search that cannot fit was let in"

    @precondition(lambda self: self.engine.unfinished)
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            if self.engine.unfinished:
                output = self.engine.step()
                counts = {seq.seq_id: count for seq, count in output.num_scheduled_tokens.items()}
                note(f"    {counts}")
                self.engine.check_state()

    @precondition(lambda self: self.engine.unfinished)
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(self.engine.unfinished)).request_id)

    @precondition(lambda self: self.engine.unfinished)
    @rule()
    def fail_in_the_model(self):
        self.engine.step(fail_in_model=True)

    @precondition(lambda self: self.engine.unfinished)
    @rule(after=st.integers(0, 3))
    def fail_while_tokens_are_chosen(self, after):
        self.engine.step(fail_after=after)

    @precondition(lambda self: self.engine.unfinished)
    @rule(place=st.integers(0, 3))
    def one_sequence_fails(self, place):
        self.engine.step(error_at=place)

    @invariant()
    def the_state_is_sound(self):
        if hasattr(self, "engine"):
            self.engine.check_state()
            self.engine.check_answers()

    def teardown(self):
        if hasattr(self, "engine") and sys.exc_info()[0] is None:  # after a failure nothing more is to be seen
            self.engine.finish_all()


TestServing = ServingMachine.TestCase


# ---- many requests at once --------------------------------------------------------------------------------------

requests = st.tuples(
    prompts.map(lambda prompt: prompt[:8]) | alike,
    st.integers(1, 6),
    st.sampled_from((1, 1, 2, 3)),
)


@given(
    burst=st.lists(requests, min_size=3, max_size=8),
    block_size=st.sampled_from((1, 2, 3, MAX_MODEL_LEN)),
    spare=st.integers(0, 6),
    host=st.integers(0, 12),
    prefix_caching=st.booleans(),
    max_num_seqs=st.integers(1, 9),
    extra_budget=st.integers(0, 4) | st.just(100),
    failures=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3))),
)
@example(  # a preempted sequence finds its prompt in a block of another, and so needs less than it had
    burst=[([1, 0, 0, 0], 3, 1), ([0, 0, 0], 4, 1), ([0, 0], 3, 2)],
    block_size=1,
    spare=5,
    host=2,
    prefix_caching=True,
    max_num_seqs=6,
    extra_budget=0,
    failures=[],
)
def test_a_burst_in_a_pool_that_is_hardly_larger_than_its_largest_request(
    burst, block_size, spare, host, prefix_caching, max_num_seqs, extra_budget, failures
):
    largest = max(cdiv(len(prompt) + max_tokens - 1, block_size) for prompt, max_tokens, _ in burst)
    engine = Engine(
        largest + spare,
        block_size,
        host,
        prefix_caching,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_budget,
        watermark=0.0,
    )
    for prompt, max_tokens, n in burst:
        engine.add(prompt, max_tokens, n)
    for at, after in failures[:3]:
        for _ in range(at):
            if engine.unfinished:
                engine.step()
                engine.check_state()
        if engine.unfinished:
            engine.step(fail_in_model=after == 3, fail_after=after)
            engine.check_state()
    engine.finish_all()


@given(
    texts=st.lists(prompts | alike, min_size=2, max_size=5),
    max_tokens=st.integers(1, 6),
    width=st.integers(1, 3),
    block_size=st.sampled_from((1, 2, 3, MAX_MODEL_LEN)),
    spare=st.integers(0, 6),
    prefix_caching=st.booleans(),
    max_num_seqs=st.integers(3, 9),
    extra_budget=st.integers(0, 4) | st.just(100),
)
def test_searches_in_a_pool_that_is_hardly_larger_than_the_largest_needs(
    texts, max_tokens, width, block_size, spare, prefix_caching, max_num_seqs, extra_budget
):
    """They are preempted and start over; the beams of a search choose together also where the budget is small."""
    longest = max(min(len(text) + max_tokens, MAX_MODEL_LEN) - 1 for text in texts)
    engine = Engine(
        width * cdiv(longest, block_size) + spare,
        block_size,
        prefix_caching=prefix_caching,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_budget,
    )
    engine.search(texts, max_tokens, width)
    engine.finish_all()


# ---- single properties ------------------------------------------------------------------------------------------


@given(prompt=prompts, block_size=st.sampled_from((1, 2, 4)), cache_salt=st.sampled_from((None, "a")))
def test_no_request_waits_for_a_block_that_it_could_not_use(prompt, block_size, cache_salt):
    """Of another salt, or the last one, of which a token must be computed in any case."""
    engine = Engine(64, block_size, prefix_caching=True, max_model_len=MAX_MODEL_LEN, watermark=0.0)
    engine.add(prompt, 1)
    engine.add(prompt, 1, cache_salt=cache_salt)
    together = cache_salt is not None or len(prompt) <= block_size
    assert [*engine.step().num_scheduled_tokens.values()] == [len(prompt)] * (1 + together)
    engine.finish_all()


@given(prompt=prompts, block_size=st.sampled_from((1, 2, 4)), copies=st.integers(2, 4), known=st.integers(0, 8))
@example(prompt=[0, 0, 0], block_size=1, copies=2, known=1)
@example(prompt=[0] * 6, block_size=2, copies=2, known=2)
def test_equal_prompts_that_come_together_are_computed_once(prompt, block_size, copies, known):
    """Admitted in one step, they would each compute all of it (nano-vllm #219 then counts the block twice). Some of
    their first tokens may be known from an earlier request."""
    engine = Engine(64, block_size, prefix_caching=True, max_model_len=MAX_MODEL_LEN, watermark=0.0)
    if known:
        engine.add(prompt[:known], 1)
        engine.finish_all()
    for _ in range(copies):
        engine.add(prompt, 1)
    computed = 0
    while engine.unfinished:
        computed += engine.step().total_num_scheduled_tokens
        engine.check_state()
    engine.check_answers()
    full = (len(prompt) - 1) // block_size * block_size  # the last token is computed by each
    found = min(known // block_size * block_size, full)
    assert computed == len(prompt) - found + (copies - 1) * (len(prompt) - full)


@given(
    prompt=prompts.map(lambda p: p[:8]),
    n=st.integers(2, 4),
    after=st.integers(0, 3),
    max_tokens=st.integers(1, 4),
    block_size=st.sampled_from((1, 2, 3, 4)),
)
def test_samples_of_which_some_have_their_first_token_start_over(prompt, n, after, max_tokens, block_size):
    """In the smallest pool that takes them: those without a token must fork from one that has none either."""
    num_blocks = cdiv(len(prompt) + max_tokens - 1, block_size)
    engine = Engine(num_blocks, block_size, max_model_len=MAX_MODEL_LEN, max_num_seqs=4)
    engine.add(prompt, max_tokens, n=n)
    engine.step(fail_after=after)
    engine.check_state()
    engine.finish_all()


@given(prompt=prompts, block_size=st.sampled_from((1, 2, 4)), max_tokens=st.integers(1, 4))
def test_a_prompt_that_is_wholly_cached_leaves_a_token_to_compute(prompt, block_size, max_tokens):
    engine = Engine(32, block_size, prefix_caching=True, max_model_len=2 * MAX_MODEL_LEN)
    for _ in range(2):
        engine.add(prompt, max_tokens)
        engine.finish_all()
    assert engine.scheduler.counts["found"] == (len(prompt) - 1) // block_size * block_size


@given(prompt=prompts, block_size=st.sampled_from((1, 2, 4)), max_tokens=st.integers(1, 6))
def test_an_answer_is_found_again_when_the_conversation_goes_on(prompt, block_size, max_tokens):
    """Also the block that was filled in the last step but one. The last token of an answer is never stored."""
    engine = Engine(64, block_size, prefix_caching=True, max_model_len=2 * MAX_MODEL_LEN)
    [seq] = engine.add(prompt, max_tokens)
    engine.finish_all()
    text = seq.tokens(0, len(seq))
    engine.add(text, 1)
    engine.finish_all()
    assert engine.scheduler.counts["found"] == (len(text) - 1) // block_size * block_size


@given(prompt=prompts.filter(lambda p: len(p) > 1), block_size=st.sampled_from((1, 2, 4)), data=st.data())
def test_a_prompt_that_continues_one_that_is_being_computed_waits_for_it(prompt, block_size, data):
    """The first prompt ends with its last block, and the second one has the same tokens and some more."""
    edge = data.draw(st.integers(0, (len(prompt) - 1) // block_size), label="full blocks") * block_size
    engine = Engine(64, block_size, prefix_caching=True, max_model_len=MAX_MODEL_LEN, watermark=0.0)
    for text in (prompt[:edge], prompt):
        if text:
            engine.add(text, 1)
    computed = 0
    while engine.unfinished:
        computed += engine.step().total_num_scheduled_tokens
    assert computed == len(prompt)


@given(n=st.integers(2, 4), prompt=prompts, block_size=st.sampled_from((1, 2, 3, 4, 20)))
def test_samples_compute_the_prompt_once_and_share_its_blocks(n, prompt, block_size):
    """A sample that has its first token shares all blocks but the last, partly full one, which all but one copy."""
    engine = Engine(64, block_size, max_model_len=MAX_MODEL_LEN + 4)
    seqs = engine.add(prompt, 4, n=n)
    output = engine.step()
    assert output.num_scheduled_tokens == {seqs[0]: len(prompt)} and [*output.sampled] == seqs
    assert engine.blocks.num_blocks - engine.blocks.num_free == cdiv(len(prompt), block_size), "one prompt, one copy"
    output = engine.step()
    assert output.num_scheduled_tokens == dict.fromkeys(seqs, 1)
    partly_full = len(prompt) % block_size > 0
    assert len(output.copies) == (n - 1) * partly_full, "each but the last owner copies the block that is partly full"
    engine.finish_all()


@given(n=st.integers(1, 9), max_num_seqs=st.integers(1, 4), prompt=prompts, others=st.integers(0, 3))
def test_more_samples_than_run_at_once(n, max_num_seqs, prompt, others):
    """As many fork as there are sequence slots; each further one computes the prompt, or finds it."""
    engine = Engine(64, 2, max_model_len=MAX_MODEL_LEN + 4, max_num_seqs=max_num_seqs)
    seqs = engine.add(prompt, 3, n=n)
    for _ in range(others):
        engine.add(prompt, 3)
    output = engine.step()
    assert [seq for seq in output.sampled if seq in seqs] == seqs[:max_num_seqs]
    engine.check_state()
    engine.finish_all()


@given(n=st.integers(2, 4), prompt=prompts, block_size=st.sampled_from((1, 2, 3, 4, 20)), ends_after=st.integers(1, 3))
@example(n=2, prompt=[0] * 3, block_size=2, ends_after=1)
def test_a_sample_that_enters_late_begins_with_the_full_blocks_of_one_that_runs(n, prompt, block_size, ends_after):
    """A request that ends leaves it a place, while the other samples decode; nothing is cached."""
    engine = Engine(64, block_size, max_model_len=MAX_MODEL_LEN + 8, max_num_seqs=n)
    engine.add([1], ends_after)
    late = engine.add(prompt, 8, n=n)[-1]
    while late not in (output := engine.step()).num_scheduled_tokens:
        engine.check_state()
    full = (len(prompt) - 1) // block_size * block_size  # of the last block it computes a token in any case
    assert output.num_scheduled_tokens[late] == len(prompt) - full
    engine.finish_all()


@given(
    lens=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    n=st.integers(2, 3),
    num_blocks=st.integers(7, 16),
    max_num_seqs=st.integers(2, 6),
)
def test_samples_that_wait_to_fork_keep_their_places_over_preemptions(lens, n, num_blocks, max_num_seqs):
    """A long prompt in chunks, samples that wait for it, and later requests that enter meanwhile and are preempted."""
    engine = Engine(
        num_blocks, 2, max_model_len=16, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs, watermark=0.0
    )
    for i, length in enumerate(lens):
        engine.add([i % ALPHABET] * length, 2, n=n)
    engine.finish_all()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_sequence_that_came_last_is_preempted_and_comes_back_first(preemption):
    engine = Engine(6, 2, 6 * (preemption == "swap"), max_model_len=16, watermark=0.0)
    first, second = engine.add([0] * 4, 6), engine.add([1] * 4, 6)
    while not (output := engine.step()).preempted:
        pass
    assert output.preempted == {second[0]: preemption} and engine.scheduler.counts[preemption] == 1
    third = engine.add([2], 1)
    assert engine.scheduler.running == first and [*engine.scheduler.waiting] == [*second, *third]
    engine.finish_all()


@given(st.integers(1, 5), st.integers(2, 5), st.sampled_from((1, 2)))
def test_what_is_aborted_on_the_host_leaves_no_block_there(first_tokens, second_tokens, block_size):
    pool = cdiv(first_tokens + 6, block_size) + cdiv(second_tokens, block_size)
    engine = Engine(pool, block_size, num_host_blocks=pool, max_model_len=16, watermark=0.0)
    engine.add([0] * first_tokens, 7), engine.add([1] * second_tokens, 7)
    while engine.unfinished and not engine.scheduler.counts["swap"]:
        engine.step()
    for seq in [seq for seq in engine.unfinished if engine.blocks.is_swapped(seq.seq_id)]:
        engine.abort(seq.request_id)
    engine.finish_all()


def test_swapped_tokens_are_not_computed_again():
    counts = {}
    for preemption in ("recompute", "swap"):
        engine = Engine(6, 2, 6 * (preemption == "swap"), max_model_len=16, watermark=0.0)
        engine.add([0] * 4, 6), engine.add([1] * 4, 6)
        counts[preemption] = 0
        while engine.unfinished:
            counts[preemption] += engine.step().total_num_scheduled_tokens
        engine.check_answers()
        assert engine.scheduler.counts[preemption] >= 1
    assert counts["swap"] == 2 * (4 + 6 - 1) < counts["recompute"]


def test_a_host_that_is_too_small_falls_back_to_recompute():
    engine = Engine(6, 2, num_host_blocks=1, max_model_len=16, watermark=0.0)
    engine.add([0] * 4, 6), engine.add([1] * 4, 6)
    engine.finish_all()
    assert engine.scheduler.counts["recompute"] >= 1 and engine.scheduler.counts["swap"] == 0


def test_a_sequence_that_needs_the_whole_pool_comes_back_to_it():
    """The first takes 1 block, the second 5 and then a sixth: it moves out, and returns when the pool is its own."""
    engine = Engine(6, 1, num_host_blocks=6, max_model_len=16, watermark=0.0)
    engine.add([0], 2), engine.add([1] * 5, 2)
    engine.finish_all()
    assert engine.scheduler.counts["swap"] == 1


def test_a_long_prompt_does_not_delay_sequences_that_decode():
    engine = Engine(64, 2, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=6)
    engine.add([0], 10)
    engine.step()
    engine.add([1] * 30, 2)
    for _ in range(4):
        assert [*engine.step().num_scheduled_tokens.values()] == [1, 5]
    engine.finish_all()


def test_what_enters_leaves_the_watermark_free():
    engine = Engine(10, 2, max_model_len=16, watermark=0.3)
    engine.add([0] * 8, 2)
    engine.add([1] * 8, 2)  # 4 blocks of the 6 that are free: 2 would be left, and 3 must be
    engine.step()
    assert len(engine.scheduler.running) == 1
    engine.finish_all()


def test_what_leaves_the_watermark_free_enters():
    engine = Engine(10, 2, max_model_len=16, watermark=0.3)
    engine.add([0] * 8, 2)
    engine.add([1] * 6, 2)  # 3 blocks of the 6 that are free: 3 are left
    engine.step()
    assert len(engine.scheduler.running) == 2
    engine.finish_all()


def test_long_prompts_are_as_short_ones():
    """Numbers above 256, which Python keeps apart even where they are equal."""
    engine = Engine(4, 300, prefix_caching=True, max_model_len=600, watermark=0.0)
    for _ in range(2):
        engine.add([0] * 300, 1)
    output = engine.step()
    assert [*output.num_scheduled_tokens.values()] == [300] * 2 and len(output.sampled) == 2
    engine.finish_all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_num_seqs": 0}, (0,)),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 2}, (3, 2)),
        ({"watermark": 1.0}, (1.0,)),
        ({"watermark": -0.1}, (-0.1,)),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValueError) as error:
        Scheduler(BlockManager(4, 2), 16, **settings)
    assert says(error.value, *said), f"the message does not name {said}: {error.value}"


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (((), 1), ()),
        (((0,) * 16, 1), (16,)),
        (((0,) * 6, 5), ({5, 6, 10, 11}, {4, 8})),  # of the request, in tokens; of the pool, in blocks or slots
    ],
)
def test_what_can_never_run_is_refused_at_once_with_the_numbers(request_, said):
    """nano-vllm #274 asserts in the middle of a run, and #277 waits for ever."""
    engine = Engine(4, 2, max_model_len=16, max_num_seqs=8)
    with pytest.raises(ValueError) as error:
        engine.add(*request_)
    assert says(error.value, *said), f"the message does not name {said}: {error.value}"
    assert not engine.scheduler.waiting and not engine.scheduler.running


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ((((0,),), 1, 9), "beam_width is 9, and at most 8 sequences may run"),
        ((((0,) * 2,), 4, 3), "3 beams of up to 5 stored tokens may take 9 blocks of 2 tokens, and 3 are free"),
    ],
)
def test_a_search_that_cannot_run_beside_the_requests_is_refused_with_the_numbers(search, said):
    engine = Engine(4, 2, max_model_len=16, max_num_seqs=8)
    engine.add([0], 2)
    engine.step()
    with pytest.raises(ValueError) as error:
        engine.search(*search)
    assert said in str(error.value)
    engine.check_state()
    engine.finish_all()
