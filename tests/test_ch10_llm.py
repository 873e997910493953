"""Chapter 10. The whole engine on `tiny`: any script of requests, steps, aborts and failures, in any shortage."""

import random
import time
from dataclasses import replace
from functools import cache
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alone import alone as answer_alone
from alone import beams_alone
from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.cdiv import cdiv
from minipaged.model.load import load_model
from minipaged.model.tokenizer import TextTokenizer
from minipaged.viz.metrics_table import metrics_table
from minipaged.viz.replay import at
from minipaged.viz.trace_file import load_trace

pytestmark = pytest.mark.ch10

CONTEXT = 32


@cache
def tiny():
    return load_model("tiny", dtype="float64")


def engine(**settings):
    llm = LLM(tiny(), **{"max_model_len": CONTEXT, "block_size": 4, **settings})
    for tensor in (llm.runner.cache.key_cache, llm.runner.cache.value_cache):
        tensor.fill_(torch.nan)
    return llm


@cache
def alone(prompt, params):
    """A request by itself, with no cache: the tokens of its samples, or of its hypotheses."""
    if isinstance(params, BeamSearchParams):
        return [o.token_ids for o in beams_alone(tiny(), prompt, params, CONTEXT)]
    return [o.token_ids for o in answer_alone(tiny(), prompt, params, max_model_len=CONTEXT).outputs]


class Refusing(tuple):
    """Stop tokens that fail when a token of the residue class is looked up: only the sequence that has them fails."""

    def __contains__(self, token):
        if token % 4 == self[0]:
            raise LookupError("injected")
        return False


def refusing(residue):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    vars(params)["stop_token_ids"] = Refusing([residue])  # a user cannot: they are checked, and kept as numbers
    return params


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
    n=st.integers(1, 4),
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
        extra_blocks=st.integers(0, 40),
        caching=st.booleans(),
        host=st.none() | st.integers(1, 30),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 20),
        watermark=st.sampled_from((0.0, 0.2)),
    )
    def start(self, block_size, extra_blocks, caching, host, max_num_seqs, extra_budget, watermark):
        longest = 14 + 8
        self.llm = engine(
            block_size=block_size,
            num_blocks=cdiv(longest, block_size) + extra_blocks,
            enable_prefix_caching=caching,
            preemption="recompute" if host is None else "swap",
            num_host_blocks=host,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            watermark=watermark,
            trace=True,
        )
        self.failing = Failing(self.llm.runner.cache)
        self.asked = []  # (request, prompt, params)
        self.pieces = {}  # sequence -> what a reader of its stream got, counted

    def attempt(self, call):
        """A call in which the model may fail. Returns whether it did."""
        try:
            call()
        except RuntimeError as error:
            assert str(error) == "injected"
            return True
        finally:
            self.failing.countdown = None
        return False

    @rule(prompt=prompts, params=greedy | sampled | st.integers(0, 3).map(refusing))
    def ask(self, prompt, params):
        request = self.llm.add_request({"prompt_token_ids": list(prompt)}, params)
        self.asked.append((request, prompt, params))
        self.pieces |= {seq: [] for seq in request.seqs}

    @rule(texts=st.lists(prompts, min_size=1, max_size=2), params=searches, layer=st.none() | st.integers(1, 12))
    def search(self, texts, params, layer):
        """Whole searches beside the requests; the model may fail in the middle."""
        blocks, found = self.llm.blocks, []
        self.failing.countdown = layer
        try:
            request = [{"prompt_token_ids": list(text)} for text in texts]
            failed = self.attempt(lambda: found.append(self.llm.beam_search(request, params)))
        except ValueError:
            needed = max(params.beam_width * blocks.blocks_for(len(text) + params.max_tokens - 1) for text in texts)
            assert needed > blocks.num_free or params.beam_width > self.llm.scheduler.max_num_seqs
            return
        if not failed:
            for text, output in zip(texts, found[0], strict=True):
                assert [o.token_ids for o in output.outputs] == alone(text, params)

    @precondition(lambda self: self.unfinished())
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            had = {seq: len(seq.outputs) for seq in self.pieces}
            got = self.llm.step()
            assert {seq for seq in had if len(seq.outputs) > had[seq] or (seq in got and seq.error)} == set(got)
            self.read()

    def read(self):
        for seq, pieces in self.pieces.items():
            pieces += seq.pieces(len(pieces))

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def abort(self, data):
        chosen = data.draw(st.lists(st.sampled_from(self.unfinished()), min_size=1, max_size=3))
        self.llm.abort(*(request.request_id for request in chosen))
        for request in chosen:
            assert request.finished and request.request_id not in self.llm.requests
            assert {o.finish_reason for o in request.output().outputs} >= {"abort"}

    @precondition(lambda self: self.unfinished())
    @rule(layer=st.integers(1, 4))
    def fail(self, layer):
        self.failing.countdown = layer
        self.attempt(self.llm.step)

    def unfinished(self):
        return [request for request, _, _ in self.asked if not request.finished]

    @invariant()
    def what_is_finished_is_what_it_is_alone(self):
        for request, prompt, params in getattr(self, "asked", []):
            whole = alone(prompt, replace(params, stop_token_ids=()))
            for output, tokens, seq in zip(request.output().outputs, whole, request.seqs, strict=True):
                assert output.token_ids == tokens[: len(output.token_ids)]
                if output.finish_reason in ("stop", "length"):
                    assert output.token_ids == tokens
                self.pieces[seq] += seq.pieces(len(self.pieces[seq]))
                pieces = self.pieces[seq]
                given = [piece.token_id for piece in pieces if piece.token_id is not None]
                assert given == output.token_ids, "a token was not given, or twice"
                if output.finish_reason:
                    assert "".join(piece.text for piece in pieces) == output.text
                    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [output.finish_reason]
                    assert (output.error is not None) == (output.finish_reason == "error")

    @invariant()
    def the_trace_tells_which_sequence_holds_which_blocks(self):
        if getattr(self, "llm", None) and self.llm.trace.events:
            state = at(self.llm.trace, -1)  # raises where an event contradicts what was there
            held = {seq_id: table.blocks for seq_id, table in self.llm.blocks.tables.items() if table.blocks}
            told = {**state.tables, **state.host_tables}
            assert {seq_id: blocks for seq_id, blocks in told.items() if blocks} == held

    def teardown(self):
        if not hasattr(self, "llm"):
            return
        for _ in range(2_000):
            if not self.llm.has_unfinished():
                break
            self.llm.step()
        assert not self.unfinished(), "it does not end"
        self.llm.step()  # a search that failed is cleaned up by the next call
        self.what_is_finished_is_what_it_is_alone()
        assert not self.llm.blocks.tables and not self.llm.requests
        metrics = self.llm.metrics()
        assert (
            metrics.num_blocks_used == metrics.num_host_blocks_used == metrics.num_running == metrics.num_waiting == 0
        )
        assert metrics.num_finished + metrics.num_aborted + metrics.num_failed == len(self.asked)
        assert metrics.num_tokens_generated == sum(len(seq.outputs) for seq in self.pieces)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(stateful_step_count=20)


@pytest.mark.parametrize("num_requests", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_after_a_long_life_with_aborts_and_failures_every_block_is_free(num_requests):
    """No property with a shrunk script, but a long life: what leaks one block in a thousand requests shows here."""
    rng = random.Random(0)
    llm = engine(num_blocks=30, max_num_seqs=16, max_num_batched_tokens=64, preemption="swap", num_host_blocks=4)
    failing = Failing(llm.runner.cache)
    llm.runner.cache.key_cache.nan_to_num_(), llm.runner.cache.value_cache.nan_to_num_()
    requests = []
    num_asked = num_failures = num_aborts = num_searches = 0
    while num_asked < num_requests or requests:
        while len(requests) < 24 and num_asked < num_requests:
            prompt = _prefix[: rng.randrange(11)] + [rng.randrange(256) for _ in range(rng.randrange(1, 4))]
            n = rng.choice((1, 1, 1, 2, 3))
            params = SamplingParams(n=n, temperature=float(n > 1), max_tokens=rng.choice((1, 1, 2, 3, 9)))
            requests.append(llm.add_request({"prompt_token_ids": prompt}, params))
            num_asked += 1
        if rng.random() < 0.05:
            failing.countdown = rng.randrange(1, 3)
        try:
            llm.step()
            if rng.random() < 0.1:
                params = BeamSearchParams(rng.randrange(1, 4), rng.randrange(1, 3))
                llm.beam_search({"prompt_token_ids": _prefix[: rng.randrange(1, 11)]}, params)
                num_searches += 1
        except RuntimeError:
            num_failures += 1
        except ValueError:
            pass  # the requests hold so many blocks that the search is refused
        failing.countdown = None
        requests = [request for request in requests if not request.finished]
        if rng.random() < 0.1 and requests:
            llm.abort(rng.choice(requests).request_id)
            num_aborts += 1
            requests = [request for request in requests if not request.finished]
    metrics = llm.metrics()
    events = (num_failures, num_aborts, num_searches, *metrics.preemptions.values())
    assert min(events) > num_requests / 1_000, "a quieter life than it should be"
    assert (metrics.num_finished, metrics.num_aborted) == (num_requests - num_aborts, num_aborts)
    assert metrics.num_blocks_used == metrics.num_host_blocks_used == 0 and not llm.blocks.tables
    # A block that only the prefix cache remembers has one owner, the cache; every other one has none.
    owners = [llm.blocks.device.ref_count(block) for block in range(30)]
    assert sum(owners) == metrics.num_blocks_cached and set(owners) <= {0, 1}
    assert all(llm.blocks.host.ref_count(block) == 0 for block in range(4))
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    for prompt in [(1, 2, 3), tuple(_prefix)]:
        assert [o.token_ids for o in llm.generate({"prompt_token_ids": list(prompt)}, params)[0].outputs] == alone(
            prompt, params
        )


@given(
    params=st.lists(greedy | sampled, min_size=1, max_size=3),
    residue=st.integers(0, 3),
    place=st.integers(0, 3),
    caching=st.booleans(),
)
def test_a_request_that_fails_says_why_and_no_other_fails_or_moves(params, residue, place, caching):
    """Its tokens so far remain, the one at which it failed among them. The engine does not recover: that would compute
    the tokens of all requests again."""
    llm = engine(num_blocks=60, enable_prefix_caching=caching, trace=True)
    prompt = (1, 2, 3, 4, 5)
    every = [*params[:place], refusing(residue), *params[place:]]
    requests = [llm.add_request({"prompt_token_ids": list(prompt)}, each) for each in every]
    while llm.has_unfinished():
        llm.step()
    for request, each in zip(requests, every, strict=True):
        outputs = request.output().outputs
        whole = alone(prompt, replace(each, stop_token_ids=()))
        if isinstance(each.stop_token_ids, Refusing):
            at_token = next((i for i, token in enumerate(whole[0]) if token % 4 == residue), None)
            num_failed = int(at_token is not None)
            assert outputs[0].finish_reason == ("error" if num_failed else "length")
            assert outputs[0].error == ("LookupError('injected')" if num_failed else None)
            assert outputs[0].token_ids == whole[0][: at_token + 1 if num_failed else None]
        else:
            assert [o.token_ids for o in outputs] == whole and {o.error for o in outputs} == {None}
    metrics = llm.metrics()
    assert (metrics.num_finished, metrics.num_failed, metrics.num_aborted) == (len(every) - num_failed, num_failed, 0)
    assert "reset" not in {event["event"] for event in llm.trace.events} and not llm.blocks.tables


def test_a_step_in_which_every_request_fails_returns():
    llm = engine()
    [[first, *_]] = alone(tuple(llm.tokenizer.encode("abc")), SamplingParams(max_tokens=1, ignore_eos=True))
    requests = [llm.add_request("abc", refusing(first % 4)) for _ in range(3)]
    assert llm.step() == [seq for request in requests for seq in request.seqs]
    assert {request.output().outputs[0].finish_reason for request in requests} == {"error"}
    assert not llm.has_unfinished() and llm.metrics().num_failed == 3


def test_a_text_that_cannot_be_finished_fails_its_request_and_no_step():
    class Unfinished(TextTokenizer):
        def stream(self, prompt_token_ids=()):
            stream = super().stream(prompt_token_ids)
            stream.finish = lambda: 1 / 0
            return stream

    tokenizer = tiny().tokenizer
    llm = LLM(
        tiny()._replace(tokenizer=Unfinished(tokenizer._tokenizer, tokenizer.eos_token_ids)), max_model_len=CONTEXT
    )
    requests = [llm.add_request("abc", SamplingParams(max_tokens=n, ignore_eos=True)) for n in (2, 3, 9)]
    for _ in range(3):
        llm.step()
    llm.abort(requests[2].request_id)
    reasons = [request.output().outputs[0].finish_reason for request in requests]
    assert reasons == ["error", "error", "abort"] and not llm.has_unfinished()


def test_ctrl_c_in_the_middle_of_a_step_gives_back_everything():
    llm = engine()
    attend = llm.runner.cache.attend
    calls = iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return attend(*arguments)

    llm.runner.cache.attend = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "def"], SamplingParams(max_tokens=20, ignore_eos=True))
    assert not llm.blocks.tables and not llm.has_unfinished()
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    answer = llm.generate("abc", params)[0]
    assert [answer.outputs[0].token_ids] == alone(tuple(answer.prompt_token_ids), params)


@pytest.mark.parametrize("n", [1, 2])
def test_ctrl_c_at_the_last_token_leaves_a_finished_request(n):
    """Its tokens are there: so the next call finds it finished, and counts it once."""
    llm = engine()
    params = SamplingParams(n=n, temperature=1.0, max_tokens=2, ignore_eos=True)
    request, other = llm.add_request("abc", params), llm.add_request("abc", replace(params, max_tokens=4))
    llm.step()
    for _ in request.seqs:  # an interrupt at each one's end
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(llm.scheduler, "finish", Mock(side_effect=KeyboardInterrupt))
            llm.step()
    llm.step()
    assert [len(seq.outputs) for seq in request.seqs] == [2] * n
    assert request.finished and list(llm.requests) == [other.request_id]
    while llm.has_unfinished():
        llm.step()
    assert llm.metrics().num_finished == 2 and not llm.blocks.tables


def test_a_request_is_added_once_and_can_be_aborted_once():
    llm = engine()
    request = llm.add_request("abc", SamplingParams(n=2, temperature=1.0))
    with pytest.raises(ValueError, match="request '0' is there already"):
        llm.add(request)
    other = llm.add_request("def")
    with pytest.raises(ValueError, match="no unfinished request 'x'"):
        llm.abort(other.request_id, "x")
    assert list(llm.requests) == ["0", "1"], "a refused abort changed something"
    llm.abort("0", "1", "0")
    assert request.finished and other.finished and not llm.has_unfinished()
    with pytest.raises(ValueError, match="no unfinished request '0'"):
        llm.abort("0")


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
    for cache_salt in salts:
        prompt = {"prompt_token_ids": list(range(12)), **({} if cache_salt is None else {"cache_salt": cache_salt})}
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
    assert not llm.blocks.tables
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
    assert len(metrics_table(metrics)) > 5


def test_a_trace_tells_how_much_of_which_sequence_each_step_computes():
    llm = engine(trace=True, num_blocks=8, block_size=2, max_num_seqs=2, max_num_batched_tokens=4)
    llm.generate({"prompt_token_ids": [1] * 6}, SamplingParams(max_tokens=2, ignore_eos=True))
    told = [(event["step"], event["seqs"]) for event in llm.trace.events if event["event"] == "schedule"]
    assert told == [(1, {"0.0": 4}), (2, {"0.0": 2}), (3, {"0.0": 1})]
    written = [
        (event["step"], event["start"], event["count"]) for event in llm.trace.events if event["event"] == "write"
    ]
    assert written == [(1, 0, 4), (2, 4, 2), (3, 6, 1)]
    assert ("finish", 3) in [(event["event"], event["step"]) for event in llm.trace.events]


def test_a_run_is_saved_as_a_trace(tmp_path):
    path = tmp_path / "run.jsonl"
    llm = engine(trace=path, num_blocks=8, preemption="swap", num_host_blocks=8)
    llm.generate(["abcdefg", "hijklmn", "opqrstu"], SamplingParams(max_tokens=9, ignore_eos=True))
    saved = load_trace(path)
    kinds = {event["event"] for event in saved.events}
    assert kinds >= {"allocate", "write", "free", "schedule", "preempt", "swap_out", "swap_in", "finish", "cache"}
    assert saved.num_host_blocks == 8
    written = [word for event in saved.events if event["event"] == "write" for word in event["tokens"]]
    assert "".join(written[:7]) == "abcdefg"
    assert not at(saved, -1).tables
