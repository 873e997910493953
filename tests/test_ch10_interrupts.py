"""Chapter 10. Ctrl-C before any line of the engine, of memory and of the caches: nothing is lost, doubled or leaked.

Every scenario is run once undisturbed, and then with a KeyboardInterrupt at its k-th executed line. What comes out is
that KeyboardInterrupt. The user goes on, and gets the answers and the streams of the undisturbed run; every request is
counted once, and every block is back.
"""

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interrupting import ALL, RUNNER, Interrupts, User
from minipaged import BeamSearchParams, SamplingParams
from minipaged.model.load import TINY, Model, tiny_transformer
from minipaged.model.tokenizer_files import byte_tokenizer
from strategies import costly

pytestmark = pytest.mark.ch10

SETTINGS = {
    "max_model_len": 24,
    "block_size": 2,
    "num_blocks": 11,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 6,
    "preemption": "swap",
    "num_host_blocks": 4,
    "watermark": 0.0,
    "trace": True,
}


# Every line of every scenario takes hours (HYPOTHESIS_PROFILE=thorough); without that, every 97th.
STRIDE = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 97


class Refusing(tuple):
    """Stop tokens that cannot be asked for: the request alone fails."""

    def __contains__(self, token):
        raise LookupError("injected")


def refusing(params):
    vars(params)["stop_token_ids"] = Refusing([0])  # a user cannot: they are checked, and kept as numbers
    return params


def greedy(**fields):
    return SamplingParams(**{"max_tokens": 5, "ignore_eos": True, **fields})


def sampled(**fields):
    return greedy(n=2, temperature=1.0, seed=7, **fields)


# ---- scenarios --------------------------------------------------------------------------------------------------


def requests_and_steps(user):
    """Prompts in chunks, one found in the prefix cache, samples that fork and copy, both preemptions, an abort, a
    request that fails, and ends."""
    user.add([1, 2, 3, 4, 5, 6, 7, 8, 9], greedy(logprobs=1, max_tokens=7))
    user.add([1, 2, 3, 4, 20], sampled(stop="zz", max_tokens=6))
    user.step(2)
    aborted = user.add([30] * 5, greedy(max_tokens=17))
    user.add([40, 41], refusing(greedy()))
    user.step(3)
    user.add([50, 51, 52], sampled(max_tokens=6))
    user.step(4)
    user.abort(aborted)
    user.step(1)


def generate(user):
    user.add([1, 2, 3, 4, 5], greedy(max_tokens=9))
    user.step(2)
    prompts = [{"prompt_token_ids": tokens} for tokens in ([1, 2, 3, 4, 6, 7, 8], [9, 9])]
    user.call("generate", prompts, sampled(max_tokens=4))


def stream(user):
    user.add([1, 2, 3, 4, 5], sampled(max_tokens=6))
    user.step(1)
    user.call("stream", [{"prompt_token_ids": [1, 2, 3, 4, 6]}, {"prompt_token_ids": [9]}], greedy(max_tokens=4))


def beam_search(user):
    """Three searches of which one is preempted, beside a request that holds blocks."""
    user.add([1, 2, 3, 4, 5, 6, 7], greedy(max_tokens=3))
    user.step(1)
    prompts = [{"prompt_token_ids": tokens} for tokens in ([1, 2, 3, 4], [9, 9, 9], [8, 8])]
    user.call("beam_search", prompts, BeamSearchParams(2, max_tokens=3, ignore_eos=True))


def given_up(user):
    """The clean-up of a call aborts its requests, which run or wait, beside one that goes on."""
    user.add([1, 2, 3, 4, 5], greedy(max_tokens=9))
    user.step(2)
    user.call_once("generate", [{"prompt_token_ids": [1, 2, 3, 4, 6, 7, 8]}, {"prompt_token_ids": [9]}], sampled())


SCENARIOS = [requests_and_steps, generate, stream, beam_search]


@cache
def model():
    """One layer, as small as can be: the text runner does not even call it."""
    config = replace(TINY, num_layers=1, max_position=32)
    return Model(tiny_transformer(torch.float64, config=config), byte_tokenizer())


def play(scenario, *lines, files=ALL):
    """Run a scenario with interrupts before these lines."""
    user = User(model(), Interrupts(*lines, files=files), **SETTINGS)
    try:
        scenario(user)
        user.finish()
    except BaseException as error:
        error.add_note(str(user.interrupts))
        raise
    return user


@cache
def undisturbed(scenario, files=ALL):
    """(outcome, lines)"""
    user = play(scenario, files=files)
    return user.outcome(), user.interrupts.count


def check(scenario, *lines, files=ALL):
    user = play(scenario, *lines, files=files)
    assert user.outcome() == undisturbed(scenario, files)[0], str(user.interrupts)


# ---- the property -----------------------------------------------------------------------------------------------


def test_the_scenarios_have_everything_in_them():
    events = {}
    for scenario in SCENARIOS:
        llm = play(scenario).llm
        events[scenario] = {event["event"] for event in llm.trace.events}
        assert "reset" not in events[scenario]
    user = play(requests_and_steps)
    assert events[requests_and_steps] >= {
        "allocate", "share", "copy", "fork", "write", "free", "cache", "evict", "swap_out", "swap_in", "schedule",
        "preempt", "finish",
    }  # fmt: skip
    assert user.llm.metrics().preemptions["recompute"] and user.llm.metrics().preemptions["swap"]
    assert {r for request in user.own for r in [seq.finish_reason for seq in request.seqs]} >= {
        "length", "abort", "error",
    }  # fmt: skip
    assert events[beam_search] >= {"fork", "copy", "preempt", "share"}


every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)


@costly(2 / 5)
@every_scenario
@given(data=st.data())
def test_an_interrupt_at_some_line(scenario, data):
    check(scenario, data.draw(st.integers(1, undisturbed(scenario)[1]), label="line"))


@costly(2 / 5)
@every_scenario
@given(data=st.data(), between=st.integers(1, 300))
def test_an_interrupt_and_another_one_soon_after(scenario, data, between):
    """The second one falls into the clean-up of the call, into the recovery, or behind it."""
    line = data.draw(st.integers(1, undisturbed(scenario)[1]), label="line")
    check(scenario, line, line + between)


@given(data=st.data(), between=st.integers(1, 150))
def test_a_clean_up_that_is_interrupted_is_completed_by_the_next_calls(data, between):
    line = data.draw(st.integers(1, undisturbed(given_up)[1]), label="line")
    check(given_up, line, line + between)


@costly(1 / 5)
@every_scenario
@given(data=st.data())
def test_an_interrupt_at_some_line_of_the_runner_and_the_cache(scenario, data):
    """On the real model: block copies, K and V that are half written."""
    check(scenario, data.draw(st.integers(1, undisturbed(scenario, RUNNER)[1]), label="line"), files=RUNNER)


@pytest.mark.slow
@every_scenario
@pytest.mark.parametrize("files", [ALL, RUNNER], ids=["engine, memory, cache", "runner and cache of the model"])
def test_an_interrupt_at_every_line(scenario, files):
    for line in range(1, undisturbed(scenario, files)[1] + 1, STRIDE):
        check(scenario, line, files=files)


@pytest.mark.slow
def test_every_second_interrupt_after_some_lines_of_a_call_that_is_given_up():
    num_lines = undisturbed(given_up)[1]
    for line in range(num_lines // 8, num_lines, num_lines // 8):
        for between in range(1, 301, STRIDE):
            check(given_up, line, line + between)
