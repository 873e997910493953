"""Chapter 10. The whole engine on `tiny`: any script of requests, steps, aborts and failures, in any shortage."""

import random
import time
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.memory.trace import Trace
from minipaged.model.load import load_model
from minipaged.viz.replay import at

pytestmark = pytest.mark.ch10

CONTEXT = 32


@cache
def tiny():
    return load_model("tiny", dtype="float64")


def engine(**settings):
    llm = LLM(tiny(), **{"max_model_len": CONTEXT, "block_size": 4, **settings})
    for name in ("key_cache", "value_cache"):
        if hasattr(llm.cache, name):
            getattr(llm.cache, name).fill_(torch.nan)
    return llm


@cache
def alone(prompt, params, seed=None):
    """A request by itself, with no cache: the tokens of its samples, or of its hypotheses."""
    llm = LLM(tiny(), max_model_len=CONTEXT, cache="recompute")
    request = {"prompt_token_ids": list(prompt)}
    if isinstance(params, BeamSearchParams):
        return [o.token_ids for o in llm.beam_search(request, params)[0].outputs]
    return [o.token_ids for o in llm.generate(request, params)[0].outputs]


class Failing:
    """A cache whose `attend` can be told to fail in a layer, before or after it has written."""

    def __init__(self, cache):
        self.attend = cache.attend
        self.countdown = None
        cache.attend = self

    def __call__(self, *arguments):
        if self.countdown is None:
            return self.attend(*arguments)
        self.countdown -= 1
        if self.countdown == 0:
            raise RuntimeError("injected")
        out = self.attend(*arguments)
        if self.countdown == 1:
            raise RuntimeError("injected")
        return out


_tokens = st.integers(0, 256)
_prefix = [7, 7, 1, 2, 3, 4, 5, 6, 7, 8]  # prompts that begin alike, as with a system prompt
prompts = (
    st.lists(_tokens, min_size=1, max_size=14)
    | st.builds(lambda n, more: _prefix[:n] + more, st.integers(1, 10), st.lists(_tokens, min_size=1, max_size=4))
).map(tuple)
greedy = st.builds(SamplingParams, max_tokens=st.integers(1, 8), ignore_eos=st.just(True))
sampled = st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    temperature=st.sampled_from((0.7, 2.0)),
    top_p=st.sampled_from((0.9, 1.0)),
    repetition_penalty=st.sampled_from((1.0, 1.3)),
    max_tokens=st.integers(1, 8),
    seed=st.integers(0, 5),
    ignore_eos=st.booleans(),
)
searches = st.builds(BeamSearchParams, st.integers(1, 3), st.integers(1, 6))


class EngineMachine(RuleBasedStateMachine):
    """Each request gets the tokens that it gets alone, whatever happens around it and to it."""

    @initialize(
        block_size=st.sampled_from((1, 2, 3, 16)),
        extra_blocks=st.integers(0, 20),
        caching=st.booleans(),
        host=st.none() | st.integers(1, 30),
        max_num_seqs=st.integers(3, 6),
        extra_budget=st.integers(0, 20),
        watermark=st.sampled_from((0.0, 0.2)),
    )
    def start(self, block_size, extra_blocks, caching, host, max_num_seqs, extra_budget, watermark):
        longest = 14 + 8
        self.llm = engine(
            block_size=block_size,
            num_blocks=3 * -(-longest // block_size) + extra_blocks,
            enable_prefix_caching=caching,
            preemption="recompute" if host is None else "swap",
            num_host_blocks=host,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            watermark=watermark,
            trace=True,
        )
        self.failing = Failing(self.llm.cache)
        self.asked = []  # (answer, prompt, params)
        self.given = {}  # (request, sample) -> tokens that steps gave

    @rule(prompt=prompts, params=greedy | sampled | searches)
    def ask(self, prompt, params):
        answer = self.llm.add_request({"prompt_token_ids": list(prompt)}, params)
        self.asked.append((answer, prompt, params))

    @precondition(lambda self: self.unfinished())
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            self.take(self.llm.step())

    def take(self, new):
        for item in new:
            self.given.setdefault((item.request_id, item.index), []).append(item.token_id)

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def abort(self, data):
        answer = data.draw(st.sampled_from(self.unfinished()))
        self.llm.abort(answer.request_id)
        assert answer.finished
        assert {o.finish_reason for o in answer.outputs} >= {"abort"}

    @precondition(lambda self: self.unfinished())
    @rule(layer=st.integers(1, 4))
    def fail(self, layer):
        self.failing.countdown = layer
        try:
            self.take(self.llm.step())
        except RuntimeError as error:
            assert str(error) == "injected"
        self.failing.countdown = None

    def unfinished(self):
        return [answer for answer, _, _ in self.asked if not answer.finished]

    @invariant()
    def what_is_finished_is_what_it_is_alone(self):
        for answer, prompt, params in getattr(self, "asked", []):
            if answer.finished and "abort" not in {o.finish_reason for o in answer.outputs}:
                tokens = [output.token_ids for output in answer.outputs]
                assert tokens == alone(prompt, params)
                if isinstance(params, SamplingParams):
                    assert tokens == [self.given[answer.request_id, i] for i in range(params.n)], (
                        "a token was not given"
                    )
            elif not answer.finished and isinstance(params, SamplingParams):
                for output, whole in zip(answer.outputs, alone(prompt, params), strict=True):
                    assert output.token_ids == whole[: len(output.token_ids)]

    @invariant()
    def the_trace_tells_who_holds_what(self):
        if getattr(self, "llm", None) and self.llm.trace.events:
            state = at(self.llm.trace, -1)  # raises where an event contradicts what was there
            held = {}
            for group in self.llm.scheduler.groups.values():
                for seq in group.seqs:
                    if blocks := self.llm.memory.blocks(seq.seq_id):
                        held[seq.seq_id] = blocks
            assert {**state.tables, **state.host_tables} == held

    def teardown(self):
        if not hasattr(self, "llm"):
            return
        for _ in range(2_000):
            if not self.unfinished():
                break
            self.take(self.llm.step())
        assert not self.unfinished(), "it does not end"
        self.what_is_finished_is_what_it_is_alone()
        assert self.llm.memory.num_slots_reserved == 0
        assert not self.llm.scheduler.has_unfinished()
        metrics = self.llm.metrics()
        assert (
            metrics.num_blocks_used == metrics.num_host_blocks_used == metrics.num_running == metrics.num_waiting == 0
        )
        assert metrics.num_finished + metrics.num_aborted == len(self.asked)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(stateful_step_count=20)


@pytest.mark.parametrize("num_requests", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_after_a_long_life_with_aborts_and_failures_every_block_is_free(num_requests):
    """No property with a shrunk script, but a long life: what leaks one block in a thousand requests shows here."""
    rng = random.Random(0)
    llm = engine(num_blocks=30, max_num_seqs=16, max_num_batched_tokens=64, preemption="swap", num_host_blocks=4)
    failing = Failing(llm.cache)
    llm.cache.key_cache.nan_to_num_(), llm.cache.value_cache.nan_to_num_()
    answers = {}
    num_asked = num_failures = num_aborts = 0
    while num_asked < num_requests or answers:
        while len(answers) < 24 and num_asked < num_requests:
            prompt = _prefix[: rng.randrange(11)] + [rng.randrange(256) for _ in range(rng.randrange(1, 4))]
            if rng.random() < 0.05:
                params = BeamSearchParams(rng.randrange(1, 4), rng.randrange(1, 3))
            else:
                n = rng.choice((1, 1, 1, 2, 3))
                params = SamplingParams(n=n, temperature=float(n > 1), max_tokens=rng.choice((1, 1, 2, 3, 9)))
            answer = llm.add_request({"prompt_token_ids": prompt}, params)
            answers[answer.request_id] = answer
            num_asked += 1
        if rng.random() < 0.05:
            failing.countdown = rng.randrange(1, 3)
        try:
            llm.step()
        except RuntimeError:
            num_failures += 1
        failing.countdown = None
        if rng.random() < 0.1 and answers:
            request_id = rng.choice(list(answers))
            if not answers[request_id].finished:
                llm.abort(request_id)
                num_aborts += 1
        answers = {request_id: answer for request_id, answer in answers.items() if not answer.finished}
    metrics = llm.metrics()
    events = (num_failures, num_aborts, *metrics.preemptions.values())
    assert min(events) > num_requests / 1_000, "a quieter life than it should be"
    assert metrics.num_finished == num_requests - num_aborts
    assert metrics.num_blocks_used == metrics.num_host_blocks_used == 0
    # A block that only the prefix cache remembers has one owner, the cache; every other one has none.
    owners = [llm.memory.allocator.ref_count(block) for block in range(30)]
    assert sum(owners) == metrics.num_blocks_cached and set(owners) <= {0, 1}
    assert all(llm.memory.host.ref_count(block) == 0 for block in range(4))
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for prompt in [(1, 2, 3), tuple(_prefix)]:
        assert [o.token_ids for o in llm.generate({"prompt_token_ids": list(prompt)}, params)[0].outputs] == alone(
            prompt, params
        )


def test_ctrl_c_in_the_middle_of_a_step_gives_back_everything():
    llm = engine()
    attend = llm.cache.attend
    calls = iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return attend(*arguments)

    llm.cache.attend = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "def"], SamplingParams(max_tokens=20, ignore_eos=True))
    assert llm.memory.num_slots_reserved == 0
    assert not llm.scheduler.has_unfinished()
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    answer = llm.generate("abc", params)[0]
    assert [answer.outputs[0].token_ids] == alone(tuple(answer.prompt_token_ids), params)


# ---- prefix cache, chat, streams, abort -------------------------------------------------------------------------


def test_a_second_turn_of_a_chat_computes_only_what_is_new():
    llm = engine(max_model_len=64)
    first = list(range(20))
    answer = llm.generate({"prompt_token_ids": first}, SamplingParams(max_tokens=9, ignore_eos=True))[0].outputs[0]
    second = [*first, *answer.token_ids, 5, 6, 7]
    before = llm.metrics()
    llm.generate({"prompt_token_ids": second}, SamplingParams(max_tokens=1))
    after = llm.metrics()
    assert after.prefix_tokens_found - before.prefix_tokens_found == 28  # 28 of the 28 that were stored, in blocks of 4
    assert after.num_tokens_computed - before.num_tokens_computed == len(second) - 28


@pytest.mark.parametrize("salts", [("a", "b"), (None, "a"), ("", None)])
def test_unequal_salts_share_nothing(salts):
    llm = engine()
    for salt in salts:
        prompt = {"prompt_token_ids": list(range(12)), **({} if salt is None else {"cache_salt": salt})}
        llm.generate(prompt, SamplingParams(max_tokens=1))
    assert llm.metrics().prefix_tokens_found == 0


def test_abort_ends_a_stream_with_what_was_held_back():
    llm = engine()
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop="\x00\x00\x00\x00\x00\x00\x00\x00\x00")
    pieces = []
    for new in llm.stream("abc", params):
        pieces.append(new)
        if len(pieces) == 12:
            llm.abort(new.request_id)
    assert pieces[-1].finish_reason == "abort" and pieces[-1].token_id is None
    assert len(pieces) == 13
    whole = llm.generate("abc", replace(params, stop=None, max_tokens=12))[0].outputs[0]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert llm.memory.num_slots_reserved == 0
    with pytest.raises(ValueError, match="no unfinished request"):
        llm.abort(pieces[0].request_id)


def test_chat_is_the_models_own_format():
    messages = [{"role": "user", "content": "Hi"}]
    tokenizer = tiny().tokenizer
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    talking = type(tokenizer)(tokenizer._tokenizer, tokenizer.eos_token_ids, template)
    llm = LLM(tiny()._replace(tokenizer=talking), max_model_len=64)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    one = llm.chat(messages, params)
    assert one[0].prompt == "<user>Hi<bot>"
    two = llm.chat([messages, messages], params)
    assert [o.outputs[0].token_ids for o in two] == [one[0].outputs[0].token_ids] * 2
    with pytest.raises(ValueError, match="chat"):
        engine().chat(messages, params)


# ---- what it says of itself -------------------------------------------------------------------------------------


@given(n=st.integers(1, 3), texts=st.lists(prompts, min_size=1, max_size=4))
@settings(max_examples=20)
def test_metrics_add_up(n, texts):
    llm = engine(num_blocks=100)
    start = time.perf_counter()
    params = SamplingParams(n=n, temperature=1.0, max_tokens=3, ignore_eos=True)
    llm.generate([{"prompt_token_ids": list(text)} for text in texts], params)
    passed = time.perf_counter() - start
    metrics = llm.metrics()
    assert metrics.num_blocks_used + metrics.num_blocks_cached + metrics.num_blocks_free == metrics.num_blocks == 100
    assert metrics.num_finished == len(texts)
    assert metrics.num_tokens_generated == 3 * n * len(texts)
    assert metrics.num_tokens_computed == sum(map(len, texts)) - metrics.prefix_tokens_found + 2 * n * len(texts)
    assert metrics.time_to_first_token.count == len(texts)
    assert metrics.time_between_tokens.count == 2 * n * len(texts)
    assert 0 < metrics.time_to_first_token.mean <= metrics.time_to_first_token.p99 <= passed
    assert 0 < metrics.scheduler_seconds < metrics.step_seconds <= passed
    assert len(metrics.rows()) > 5


def test_a_run_is_saved_as_a_trace(tmp_path):
    path = tmp_path / "run.jsonl"
    llm = engine(trace=path, num_blocks=8, preemption="swap", num_host_blocks=8)
    llm.generate(["abcdefg", "hijklmn", "opqrstu"], SamplingParams(max_tokens=9, ignore_eos=True))
    saved = Trace.load(path)
    kinds = {event["event"] for event in saved.events}
    assert kinds >= {"allocate", "write", "free", "schedule", "preempt", "swap_out", "swap_in", "finish", "cache"}
    assert saved.num_host_blocks == 8
    written = [word for event in saved.events if event["event"] == "write" for word in event["tokens"]]
    assert "".join(written[:7]) == "abcdefg"
    assert not at(saved, -1).tables
