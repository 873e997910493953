"""Chapter 11. The film of two servers says what their own accounts say, and no slot in it has two owners."""

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.simulator import side_by_side
from minipaged.simulator.lengths import SHAREGPT, Lengths
from minipaged.simulator.servers import SERVERS, Server
from minipaged.simulator.side_by_side import BLOCK_SIZES, LEFT_BLOCK_SIZE, RATES, SPREADS, film
from minipaged.simulator.simulate import simulate
from minipaged.simulator.workloads import stream
from strategies import costly

pytestmark = pytest.mark.ch11

SECONDS = 15
SETTINGS = st.fixed_dictionaries(
    {
        "rate": st.sampled_from((0.2, 2.0, *RATES[1:])),
        "spread": st.sampled_from((SPREADS[0], 0.866, SPREADS[1])),
        "block_size": st.sampled_from(BLOCK_SIZES),
        "policy": st.sampled_from(SERVERS),
    }
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(side_by_side, "SECONDS", SECONDS)


def places(pool):
    """Of each frame: request -> the slots that it has, told from the first frame on as a player is told."""
    before = {}
    for frame in pool["frames"]:
        now = {}
        for request in frame["tokens"]:
            news = frame["given"].get(request)
            if news is None:
                now[request] = before[request]
            elif pool["block_size"]:
                now[request] = before.get(request, [])[: news[0]] + news[1:]
            else:
                now[request] = news
        before = now
        if pool["block_size"]:
            size = pool["block_size"]
            yield {r: [b * size + slot for b in blocks for slot in range(size)] for r, blocks in now.items()}
        else:
            yield {r: [*range(start, start + size)] for r, (start, _, _, size) in now.items()}


@costly(0.2)
@given(settings=SETTINGS)
def test_a_film_has_a_frame_a_second_and_no_slot_has_two_owners(settings):
    made = film(**settings)
    assert made["settings"] == settings
    paged_left = LEFT_BLOCK_SIZE if settings["policy"] == "paged" else None
    assert [pool["block_size"] for pool in made["pools"]] == [paged_left, settings["block_size"]]
    for pool in made["pools"]:
        assert len(pool["frames"]) == SECONDS + 1
        for frame, owned in zip(pool["frames"], places(pool), strict=True):
            slots = [slot for each in owned.values() for slot in each]
            assert len(slots) == len(set(slots)), "a slot has two owners"
            assert all(0 <= slot < made["num_slots"] for slot in slots)
            assert sum(frame["account"]) == made["num_slots"]
            assert frame["account"][0] == sum(frame["tokens"].values()), "held is what the requests store"
            assert all(len(owned[request]) >= tokens for request, tokens in frame["tokens"].items())
            running, waiting, finished = frame["queues"]
            assert running == len(frame["tokens"]) and running + waiting + finished <= made["requests"]
        finished = [frame["queues"][2] for frame in pool["frames"]]
        assert finished == sorted(finished), "a request that is finished stays so"


@costly(0.2)
@given(settings=SETTINGS, left=st.booleans())
def test_the_counters_are_the_servers_own_account_at_that_second(settings, left):
    """The same server once more, looked at step by step. Its clock is the sum of its steps and of its pauses."""
    size, name = (LEFT_BLOCK_SIZE, settings["policy"]) if left else (settings["block_size"], "paged")
    lengths = Lengths(SHAREGPT.prompt_mean, SHAREGPT.output_mean, settings["spread"])
    drawn = stream(lengths, settings["rate"], 1000, seed=0)
    requests = [*takewhile(lambda request: request.arrival < SECONDS, drawn)]
    steps = []  # what was seen in each step

    def look(server, output, seconds):
        running, waiting = len(server.running), len(server.scheduler.waiting)
        queues = [running, waiting, server.num_requests - running - waiting]
        steps.append((seconds, server.num_requests, {"account": [*server.account()], "queues": queues}))

    simulate(requests, Server(name, block_size=size), until=SECONDS + 1, on_step=look)
    frames = film(**settings)["pools"][0 if left else 1]["frames"]
    begin, arrived = 0.0, 0
    for seconds, number, seen in steps:
        if number > arrived:
            begin = max(begin, requests[arrived].arrival)
        arrived = number
        for second in range(SECONDS + 1):
            if begin <= second < begin + seconds:
                shown = {key: frames[second][key] for key in seen}
                assert shown == seen, f"second {second}, the step from {begin} to {begin + seconds}"
        begin += seconds


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": RATES[1] * 2},
        {"rate": 0.0},
        {"spread": 9.0},
        {"spread": float("nan")},
        {"block_size": 3},
        {"policy": "best"},
    ],
)
def test_what_cannot_be_filmed_is_refused_with_the_numbers(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        film(**wrong)
