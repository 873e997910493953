"""Chapter 10. Ctrl-C before any line of the engine, of memory and of the caches: nothing is lost, doubled or leaked.

Every scenario is run once undisturbed, and then with a KeyboardInterrupt at its k-th executed line. What comes out is
that KeyboardInterrupt. The user goes on, and gets the answers and the streams of the undisturbed run; every request is
counted once, and every block is back.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interrupting import Interrupts, User
from minipaged import BeamSearchParams, SamplingParams
from minipaged.model.load import TINY, Model, tiny_transformer
from minipaged.model.tokenizer import byte_tokenizer

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


class Refusing(tuple):
    """Stop tokens that cannot be asked for: the request alone fails."""

    def __contains__(self, token):
        raise LookupError("injected")


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
    user.add([40, 41], greedy(stop_token_ids=Refusing()))
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


SCENARIOS = [requests_and_steps, generate, stream, beam_search]


@cache
def model():
    """One layer, as small as can be: the text runner does not even call it."""
    config = replace(TINY, num_layers=1, max_position=32)
    return Model(tiny_transformer(torch.float64, config=config), byte_tokenizer())


def play(scenario, *lines, text_runner=True):
    """Run a scenario with interrupts before these lines."""
    user = User(model(), Interrupts(*lines), text_runner, **SETTINGS)
    scenario(user)
    user.finish()
    return user


@cache
def undisturbed(scenario, text_runner=True):
    """(outcome, lines)"""
    user = play(scenario, text_runner=text_runner)
    return user.outcome(), user.interrupts.count


def check(scenario, *lines, text_runner=True):
    expected, _ = undisturbed(scenario, text_runner)
    interrupts = Interrupts(*lines)
    user = User(model(), interrupts, text_runner, **SETTINGS)
    try:
        scenario(user)
        user.finish()
        assert user.outcome() == expected
    except BaseException as error:
        error.add_note(str(interrupts))
        raise
    return user


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


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@given(data=st.data())
def test_an_interrupt_at_some_line(scenario, data):
    check(scenario, data.draw(st.integers(1, undisturbed(scenario)[1]), label="line"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@given(data=st.data())
def test_an_interrupt_and_another_one_soon_after(scenario, data):
    """The second one falls into the clean-up of the call, into the recovery, or behind it."""
    line = data.draw(st.integers(1, undisturbed(scenario)[1]), label="line")
    check(scenario, line, line + data.draw(st.integers(1, 300), label="lines between"))


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_at_every_line(scenario):
    for line in range(1, undisturbed(scenario)[1] + 1):
        check(scenario, line)
