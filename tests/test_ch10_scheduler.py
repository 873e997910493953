"""Chapter 10. The scheduler over the real memory, with a model of a few lines: any script of requests, any shortage."""

import pytest
from hypothesis import example, given, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minipaged.engine.scheduler import Scheduler
from minipaged.engine.sequence import CompletionOutput, SamplingParams, Sequence, SequenceGroup
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.trace import Trace
from minipaged.memory.unpaged import NoMemory
from serving_model import ALPHABET, Engine

pytestmark = pytest.mark.ch10

MAX_MODEL_LEN = 16
prompts = st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=MAX_MODEL_LEN - 1)
# Prompts that are alike for a while, as with a system prompt.
alike = st.builds(lambda n, more: [0, 1, 2, 0, 1, 2, 0, 1][:n] + more, st.integers(1, 8), prompts.map(lambda p: p[:4]))


class ServingMachine(RuleBasedStateMachine):
    """Requests come, run, fork, run short, fail and are aborted, in any order. Each has the text it has alone."""

    @initialize(
        block_size=st.sampled_from((1, 2, 3, 4)),
        extra_blocks=st.integers(0, 12),
        host_share=st.sampled_from((0.0, 0.5, 1.0)),
        prefix_caching=st.booleans(),
        preemption=st.sampled_from(("recompute", "swap")),
        watermark=st.sampled_from((0.0, 0.01, 0.3)),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 12) | st.just(100),
    )
    def start(self, block_size, extra_blocks, host_share, max_num_seqs, extra_budget, **settings):
        num_blocks = -(-6 // block_size) + extra_blocks
        self.engine = Engine(
            num_blocks,
            block_size,
            num_host_blocks=int(num_blocks * host_share),
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            prefix_caching=settings.pop("prefix_caching"),
            **settings,
        )

    @rule(prompt=prompts | alike, max_tokens=st.integers(1, 6), n=st.integers(1, 3), salt=st.sampled_from((None, "a")))
    def ask(self, prompt, max_tokens, n, salt):
        self.add(prompt, max_tokens, n=n, salt=salt)

    @rule(prompt=prompts | alike, max_tokens=st.integers(1, 6), beam_width=st.integers(1, 3))
    def search(self, prompt, max_tokens, beam_width):
        self.add(prompt, max_tokens, beam_width=beam_width)

    def add(self, prompt, max_tokens, n=1, beam_width=0, salt=None):
        max_tokens = min(max_tokens, MAX_MODEL_LEN - len(prompt))
        block_size, seqs = self.engine.memory.block_size, max(n, beam_width)
        own = -(-(len(prompt) + max_tokens - 1) // block_size) - len(prompt) // block_size
        most = len(prompt) // block_size + seqs * own  # blocks, if it shares nothing but the prompt
        fits = most <= self.engine.memory.allocator.num_blocks and seqs <= self.engine.scheduler.max_num_seqs
        try:
            self.engine.add(prompt, max_tokens, n, beam_width, salt)
        except ValueError:
            assert not fits, "a request that fits the pool alone was refused"
        else:
            assert fits, "a request that cannot fit the pool was let in"

    @precondition(lambda self: self.engine.scheduler.has_unfinished())
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            output = self.engine.step()
            note(f"    {[(item.seq.seq_id, item.start, item.count) for item in output.work]}")
            self.engine.check_state()

    @precondition(lambda self: self.engine.scheduler.has_unfinished())
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(list(self.engine.scheduler.groups))))

    @precondition(lambda self: self.engine.scheduler.has_unfinished())
    @rule()
    def fail_in_the_model(self):
        self.engine.step(fail_in_model=True)

    @precondition(lambda self: self.engine.scheduler.has_unfinished())
    @rule(after=st.integers(0, 2))
    def fail_while_tokens_are_chosen(self, after):
        if not any(group.beam_width for group in self.engine.scheduler.groups.values()):
            self.engine.step(fail_after=after)

    @invariant()
    def the_state_is_sound(self):
        if hasattr(self, "engine"):
            self.engine.check_state()
            self.engine.check_answers()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.finish_all()


TestServing = ServingMachine.TestCase


# ---- many requests at once --------------------------------------------------------------------------------------

requests = st.tuples(
    prompts.map(lambda prompt: prompt[:8]) | alike,
    st.integers(1, 6),
    st.sampled_from(("one", "one", "samples", "beams")),
    st.integers(2, 3),
)


@given(
    burst=st.lists(requests, min_size=3, max_size=8),
    block_size=st.sampled_from((1, 2, 3)),
    spare=st.integers(0, 6),
    host=st.integers(0, 12),
    prefix_caching=st.booleans(),
    preemption=st.sampled_from(("recompute", "swap", "swap")),
    max_num_seqs=st.integers(6, 9),
    extra_budget=st.integers(0, 4) | st.just(100),
    failures=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3))),
)
@example(  # who gives way finds its prompt in a block of another, needs less than it had, and could come back at once
    burst=[([1, 0, 0, 0], 3, "one", 2), ([0, 0, 0], 4, "one", 2), ([0, 0], 3, "samples", 2)],
    block_size=1,
    spare=5,
    host=2,
    prefix_caching=True,
    preemption="swap",
    max_num_seqs=6,
    extra_budget=0,
    failures=[],
)
def test_a_burst_in_a_pool_that_is_hardly_larger_than_its_largest_request(
    burst, block_size, spare, host, prefix_caching, preemption, max_num_seqs, extra_budget, failures
):
    largest = 0
    for prompt, max_tokens, kind, width in burst:
        shared = len(prompt) // block_size
        own = -(-(len(prompt) + max_tokens - 1) // block_size) - shared
        largest = max(largest, shared + own * (1 if kind == "one" else width))
    engine = Engine(
        largest + spare,
        block_size,
        host,
        prefix_caching,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_budget,
        preemption=preemption,
        watermark=0.0,
    )
    for prompt, max_tokens, kind, width in burst:
        engine.add(prompt, max_tokens, width if kind == "samples" else 1, width if kind == "beams" else 0)
    searching = any(kind == "beams" for _, _, kind, _ in burst)
    for at, after in failures[:3]:
        for _ in range(at):
            if engine.scheduler.has_unfinished():
                engine.step()
                engine.check_state()
        if engine.scheduler.has_unfinished():
            engine.step(fail_in_model=searching or after == 3, fail_after=after)
            engine.check_state()
    engine.finish_all()


@given(
    script=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=12),
    block_size=st.sampled_from((1, 2, 3, 4)),
)
def test_what_growing_costs_is_what_was_said_before(script, block_size):
    """Forks of one table grow in any groups, by any number of tokens: no block more or less than was counted."""
    memory = BlockManager(200, block_size)
    memory.begin("0", [], 3)
    names = ["0"]
    for parent, others, more in script:
        memory.fork(names[parent % len(names)], str(len(names)))
        names.append(str(len(names)))
        lengths = {name: memory.length(name) + more for name in names[-1 - others :]}
        said, free = memory.blocks_to_grow(lengths), memory.num_free
        copies = memory.grow(lengths)
        assert memory.num_free == free - said
        assert all(memory.allocator.ref_count(source) >= 1 for source, _ in copies)
        assert {name: memory.length(name) for name in lengths} == lengths


@given(
    texts=st.lists(alike, min_size=1, max_size=6),
    gone=st.sets(st.integers(0, 5)),
    block_size=st.sampled_from((1, 2, 3)),
)
def test_what_beginning_costs_is_what_was_said_before(texts, gone, block_size):
    """A block that was found may be in use, or known to the prefix cache alone: then it is free, and taken."""
    memory = BlockManager(200, block_size, enable_prefix_caching=True)
    for number, text in enumerate(texts):
        found = memory.find(text)
        said, free = memory.blocks_to_begin(found, [len(text)], len(text)), memory.num_free
        memory.begin(str(number), found, len(text))
        assert memory.num_free == free - said
        memory.insert(str(number), text)
        if number in gone:
            memory.free(str(number))


# ---- single properties ------------------------------------------------------------------------------------------


@given(prompt=prompts, block_size=st.sampled_from((1, 2, 4)), salt=st.sampled_from((None, "a")))
def test_nobody_waits_for_a_block_that_it_could_not_use(prompt, block_size, salt):
    """Of another salt, or the last one, of which a token must be computed in any case."""
    engine = Engine(64, block_size, prefix_caching=True, max_model_len=MAX_MODEL_LEN, watermark=0.0)
    engine.add(prompt, 1)
    engine.add(prompt, 1, salt=salt)
    together = salt is not None or len(prompt) <= block_size
    assert [item.count for item in engine.step().work] == [len(prompt)] * (1 + together)
    engine.finish_all()


@given(prompt=prompts, block_size=st.sampled_from((1, 2, 4)), copies=st.integers(2, 4), known=st.integers(0, 8))
@example(prompt=[0, 0, 0], block_size=1, copies=2, known=1)
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
    while engine.scheduler.has_unfinished():
        computed += sum(item.count for item in engine.step().work)
        engine.check_state()
    engine.check_answers()
    full = (len(prompt) - 1) // block_size * block_size  # the last token is computed by everyone
    found = min(known // block_size * block_size, full)
    assert computed == len(prompt) - found + (copies - 1) * (len(prompt) - full)


@given(prompt=prompts.map(lambda p: p[:6]), width=st.integers(2, 3), after=st.integers(1, 8), spare=st.integers(0, 4))
def test_beams_that_start_over_with_a_small_budget_still_choose_together(prompt, width, after, spare):
    engine = Engine(40, 2, max_model_len=MAX_MODEL_LEN, max_num_seqs=3, max_num_batched_tokens=3 + spare)
    engine.add(prompt, 9, beam_width=width)
    for _ in range(after):
        if engine.scheduler.has_unfinished():
            engine.step()
    if engine.scheduler.has_unfinished():
        engine.step(fail_in_model=True)
        engine.check_state()
    engine.finish_all()


@given(
    prompt=prompts.map(lambda p: p[:8]),
    n=st.integers(2, 4),
    after=st.integers(0, 3),
    max_tokens=st.integers(1, 4),
    block_size=st.sampled_from((1, 2, 3, 4)),
)
def test_samples_of_which_some_have_their_first_token_start_over(prompt, n, after, max_tokens, block_size):
    """In the smallest pool that takes them: those without a token must fork from one that has none either."""
    shared = len(prompt) // block_size
    num_blocks = shared + n * (-(-(len(prompt) + max_tokens - 1) // block_size) - shared)
    engine = Engine(max(1, num_blocks), block_size, max_model_len=MAX_MODEL_LEN, max_num_seqs=4)
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
    assert engine.scheduler.num_found == (len(prompt) - 1) // block_size * block_size


@given(prompt=prompts, block_size=st.sampled_from((1, 2, 4)), max_tokens=st.integers(1, 6))
def test_an_answer_is_found_again_when_the_conversation_goes_on(prompt, block_size, max_tokens):
    """Also the block that was filled in the last step but one. The last token of an answer is never stored."""
    engine = Engine(64, block_size, prefix_caching=True, max_model_len=2 * MAX_MODEL_LEN)
    request_id = engine.add(prompt, max_tokens)
    engine.finish_all()
    text = prompt + engine.answers[request_id][0]
    engine.add(text, 1)
    engine.finish_all()
    assert engine.scheduler.num_found == (len(text) - 1) // block_size * block_size


@given(prompt=prompts.filter(lambda p: len(p) > 1), block_size=st.sampled_from((1, 2, 4)), data=st.data())
def test_who_goes_on_from_a_prompt_that_is_being_computed_waits_for_it(prompt, block_size, data):
    """The first prompt ends with its last block, and the second one has the same tokens and some more."""
    edge = data.draw(st.integers(0, (len(prompt) - 1) // block_size), label="full blocks") * block_size
    engine = Engine(64, block_size, prefix_caching=True, max_model_len=MAX_MODEL_LEN, watermark=0.0)
    for text in (prompt[:edge], prompt):
        if text:
            engine.add(text, 1)
    computed = 0
    while engine.scheduler.has_unfinished():
        computed += sum(item.count for item in engine.step().work)
    assert computed == len(prompt)


@given(n=st.integers(2, 4), prompt=prompts, block_size=st.sampled_from((1, 2, 3, 4)))
def test_samples_compute_the_prompt_once_and_share_its_blocks(n, prompt, block_size):
    engine = Engine(64, block_size, max_model_len=MAX_MODEL_LEN + 4)
    engine.add(prompt, 4, n=n)
    assert [(item.start, item.count) for item in engine.step().work] == [(0, len(prompt))]
    assert engine.memory.num_slots_reserved // block_size == -(-len(prompt) // block_size), "one prompt, one copy"
    output = engine.step()
    assert [item.count for item in output.work] == [1] * n
    partly_full = len(prompt) % block_size > 0
    assert len(output.copies) == (n - 1) * partly_full, "each but the last owner copies the block that is partly full"
    engine.finish_all()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_who_came_last_gives_way_and_comes_back_first(preemption):
    engine = Engine(6, 2, num_host_blocks=6, max_model_len=16, preemption=preemption, watermark=0.0)
    first, second = engine.add([0] * 4, 6), engine.add([1] * 4, 6)
    while not engine.scheduler.preemptions.total():
        engine.step()
    assert engine.scheduler.preemptions[preemption] == 1
    third = engine.add([2], 1)
    assert [group.request_id for group in engine.scheduler.running] == [first]
    assert [group.request_id for group in engine.scheduler.waiting] == [second, third]
    engine.finish_all()


def test_swapped_tokens_are_not_computed_again():
    counts = {}
    for preemption in ("recompute", "swap"):
        engine = Engine(6, 2, num_host_blocks=6, max_model_len=16, preemption=preemption, watermark=0.0)
        engine.add([0] * 4, 6), engine.add([1] * 4, 6)
        counts[preemption] = 0
        while engine.scheduler.has_unfinished():
            counts[preemption] += sum(item.count for item in engine.step().work)
        engine.check_answers()
        assert engine.scheduler.preemptions[preemption] >= 1
    assert counts["swap"] == 2 * (4 + 6 - 1) < counts["recompute"]


def test_a_host_that_is_too_small_falls_back_to_recompute():
    engine = Engine(6, 2, num_host_blocks=1, max_model_len=16, preemption="swap", watermark=0.0)
    engine.add([0] * 4, 6), engine.add([1] * 4, 6)
    engine.finish_all()
    assert engine.scheduler.preemptions["recompute"] >= 1 and engine.scheduler.preemptions["swap"] == 0


def test_who_needs_the_whole_pool_comes_back_to_it():
    """The first takes 1 block, the second 5 and then a sixth: it moves out, and returns when the pool is its own."""
    engine = Engine(6, 1, num_host_blocks=6, max_model_len=16, preemption="swap", watermark=0.0)
    engine.add([0], 2), engine.add([1] * 5, 2)
    engine.finish_all()
    assert engine.scheduler.preemptions["swap"] == 1


def test_without_a_cache_everybody_runs_and_computes_everything():
    scheduler = Scheduler(NoMemory(), 16)
    seqs = [Sequence(str(n), [0] * n, SamplingParams(max_tokens=3), CompletionOutput(0)) for n in (3, 1, 2)]
    for seq in seqs:
        scheduler.add(SequenceGroup(seq.seq_id, [seq]))
    for _ in range(3):
        output = scheduler.schedule()
        assert [(item.seq, item.start, item.count) for item in output.work] == [(seq, 0, len(seq)) for seq in seqs]
        for _, group, seq in scheduler.computed(output):
            seq.output.token_ids.append(0)
            assert seq.num_computed == 0 and group in scheduler.running, "nothing is kept"


def test_a_long_prompt_does_not_hold_up_those_who_decode():
    engine = Engine(64, 2, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=6)
    engine.add([0], 10)
    engine.step()
    engine.add([1] * 30, 2)
    for _ in range(4):
        assert [item.count for item in engine.step().work] == [1, 5]
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


def test_a_trace_tells_who_computed_how_much_in_which_step():
    trace = Trace(num_blocks=8, block_size=2)
    scheduler = Scheduler(BlockManager(8, 2, trace=trace), 16, max_num_seqs=2, max_num_batched_tokens=4, trace=trace)
    seq = Sequence("a", [0] * 6, SamplingParams(max_tokens=2), CompletionOutput(0))
    scheduler.add(SequenceGroup("a", [seq]))
    for _ in range(3):
        for _, group, ready in scheduler.computed(scheduler.schedule()):
            ready.output.token_ids.append(0)
            if len(ready.output.token_ids) == 2:
                scheduler.finish(group, ready, "length")
    told = [(event["step"], event["seqs"]) for event in trace.events if event["event"] == "schedule"]
    assert told == [(1, {"a": 4}), (2, {"a": 2}), (3, {"a": 1})]
    assert ("finish", 3) in [(event["event"], event["step"]) for event in trace.events]


def test_a_pool_that_came_through_unharmed_keeps_what_it_knows_and_another_is_built_anew():
    memory = BlockManager(4, 2, enable_prefix_caching=True)
    memory.begin("a", [], 4)
    memory.insert("a", [0, 1, 2, 0])
    memory.free("a")
    memory.recover()
    assert len(memory.find([0, 1, 2, 0, 1])) == 2
    memory.allocator.allocate()  # an interrupt came before a table could name it
    memory.recover()
    assert memory.num_free == 4


def test_a_host_with_as_many_blocks_as_are_held_takes_them():
    memory = BlockManager(4, 2, num_host_blocks=2)
    memory.begin("a", [], 3)
    memory.begin("b", [], 1)
    assert memory.can_swap_out(["a"]) and not memory.can_swap_out(["a", "b"])


def test_blocks_of_no_token_are_refused():
    with pytest.raises(ValueError, match="got 0"):
        BlockManager(4, 0)


def test_long_prompts_are_as_short_ones():
    """Numbers above 256, which Python keeps apart even where they are equal."""
    engine = Engine(4, 300, prefix_caching=True, max_model_len=600, watermark=0.0)
    for _ in range(2):
        engine.add([0] * 300, 1)
    assert [(item.count, item.reaches_end) for item in engine.step().work] == [(300, True)] * 2
    engine.finish_all()


def test_a_request_may_come_and_go_by_its_id():
    engine = Engine(8, 2, max_model_len=16)
    request_id = engine.add([0, 1], 3, n=2)
    engine.num_requests -= 1
    with pytest.raises(ValueError, match="there already"):
        engine.add([0], 1)
    engine.num_requests += 1
    engine.step()
    assert engine.scheduler.abort(request_id)
    assert not engine.scheduler.abort(request_id), "it is gone"
    assert engine.memory.num_slots_reserved == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_num_seqs": 0}, "got 0"),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 2}, "3 and 2"),
        ({"preemption": "hope"}, "'hope'"),
        ({"watermark": 1.0}, "1.0"),
        ({"watermark": -0.1}, "-0.1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValueError) as error:
        Scheduler(BlockManager(4, 2), 16, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (((), 1), "empty"),
        (((0,) * 16, 1), "16 tokens, and the context holds 16"),
        (((0,) * 6, 5), "10 stored tokens (6 of prompt, 5 new), and the whole pool has 8 slots"),
        (((0,) * 2, 4, 3), "each of 3 sequences may reach 5 stored tokens"),
        (((0,), 1, 9), "9 sequences, and at most 8"),
    ],
)
def test_what_can_never_run_is_refused_at_once_with_the_numbers(request_, said):
    """nano-vllm #274 asserts in the middle of a run, and #277 waits for ever."""
    engine = Engine(4, 2, max_model_len=16, max_num_seqs=8)
    with pytest.raises(ValueError) as error:
        engine.add(*request_)
    assert said in str(error.value)
    assert not engine.scheduler.has_unfinished()
    if len(request_) == 2:
        with pytest.raises(ValueError):
            engine.scheduler.check(len(request_[0]), request_[1])  # one sequence, where nothing else is said
