"""Chapter 11. The simulator: the same scheduler over four memories, a clock, and an account that always adds up."""

import ast
import json
import math
import multiprocessing
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections import Counter, deque
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipaged.simulator
from minipaged.memory.kv_cache_size import KVShape
from minipaged.simulator import figures, paper
from minipaged.simulator.beams import choose
from minipaged.simulator.contiguous import ReservedMemory
from minipaged.simulator.cost import A100_40GB, COPY_CALL, H100, CostModel, Device, StepCost
from minipaged.simulator.latency import HIGHEST, curve
from minipaged.simulator.lengths import ALPACA, SHAREGPT, SPREAD, Lengths, fit_spread
from minipaged.simulator.memory_use import FULL_RATE, measure
from minipaged.simulator.report import Bars, Lines, Report, Row, cells, row, to_csv, to_json, to_markdown
from minipaged.simulator.reproduce import ALL, EXPERIMENTS, chosen, report_of, reproduce, write
from minipaged.simulator.servers import NUM_SLOTS, SERVERS, Server
from minipaged.simulator.simulate import Totals, cost_of, simulate
from minipaged.simulator.workloads import Request, arrivals, from_file, stream

pytestmark = pytest.mark.ch11

MODULES = sorted(Path(minipaged.simulator.__file__).parent.glob("*.py"))
PAGED_ALONE = CostModel(attention=1.0)  # as fast as contiguous memory: then time is no difference between servers


@st.composite
def scripts(draw, kinds=("one", "samples", "beams")):
    """A few requests, close together, whose prompts are short and whose answers are long: so they run out of room."""
    requests, now = [], 0.0
    for _ in range(draw(st.integers(1, 6) | st.integers(12, 20))):
        now += draw(st.sampled_from((0.0, 0.0, 0.0, 0.2)))
        kind = draw(st.sampled_from(kinds))
        prompt_len = draw(st.integers(1, 10))
        requests.append(
            Request(
                now,
                prompt_len,
                draw(st.integers(1, 45)),
                prefix_len=draw(st.integers(0, prompt_len)),
                n=draw(st.integers(2, 3)) if kind == "samples" else 1,
                beam_width=draw(st.integers(1, 3)) if kind == "beams" else 0,
            )
        )
    return requests


@st.composite
def servers(draw):
    """Any of the four, short of memory. The policy max cannot be had for less than one request of 2,048 slots."""
    name = draw(st.sampled_from((*SERVERS, "paged", "paged")))  # the one that can take back what it gave
    return Server(
        name,
        num_slots=draw(st.integers(2048, 7000) if name == "max" else st.integers(192, 256)),
        block_size=draw(st.sampled_from((1, 2, 3, 16))),
        prefix_caching=draw(st.booleans()),
        preemption=draw(st.sampled_from(("recompute", "swap"))),
        max_num_seqs=draw(st.sampled_from((3, 6, 40))),
        watermark=draw(st.sampled_from((0.0, 0.01, 0.3))),
    )


# ---- every run ---------------------------------------------------------------------------------------------------


@given(server=servers(), script=scripts(), seed=st.integers(0, 5))
def test_the_account_sums_to_the_pool_at_every_step_and_no_more_is_held_than_there_is(server, script, seed):
    def look(server, output, seconds):
        account = server.account()
        assert sum(account) == server.num_slots, f"{account} is {sum(account)} slots of {server.num_slots}"
        assert min(account) >= 0, f"{account}: a part of the pool is negative"
        assert account.held <= server.num_slots
        running = server.running
        written = [seq.num_computed + count for seq, count in output.num_scheduled_tokens.items()]
        assert account.held >= max(written, default=0), "a step computes tokens that no block holds"
        assert account.held <= sum(len(seq) for seq in running), "more is held than anybody has"
        assert not (server.scheduler.running and server.beams.running), "requests and searches run at once"
        assert seconds > 0

    simulate(script, server, on_step=look, seed=seed)


@given(server=servers(), script=scripts(), seed=st.integers(0, 5))
def test_every_request_ends_with_exactly_its_output(server, script, seed):
    chosen_tokens = Counter()
    answered = {}
    finish, advance = server.scheduler.finish, server.beams.advance

    def finished(seq):
        answered[seq.seq_id] = len(seq.outputs)
        finish(seq)

    def advanced(search, choices):
        if not choices:  # the last tokens, which are never stored: one for each beam
            answered[search.beams[0].request_id] = len(search.beams[0].outputs) + 1
        advance(search, choices)
        assert len(search.beams) == (search.params.beam_width if choices else 0)
        assert len({len(beam) for beam in search.beams}) <= 1, "beams of unequal lengths"

    server.scheduler.finish, server.beams.advance = finished, advanced
    result = simulate(script, server, seed=seed)
    assert len(result.latencies) == len(script), "a request got no answer, or two"
    assert all(latency > 0 for latency in result.latencies)
    for number, request in enumerate(script):
        if server.name != "paged":  # each sample, or beam, is a request of its own
            names = [f"{number}.{sample}.0" for sample in range(max(request.n, request.beam_width))]
        elif request.beam_width:
            names = [str(number)]
        else:
            names = [f"{number}.{sample}" for sample in range(request.n)]
        for name in names:
            assert answered.pop(name) == request.output_len
        chosen_tokens[number] = max(request.n, request.beam_width) * request.output_len
    assert not answered, "a sequence ended that no request asked for"
    assert result.tokens == sum(chosen_tokens.values())
    assert not any((each.running, each.waiting) != ([], deque()) for each in (server.scheduler, server.beams))
    account = server.account()
    assert account.held == account.reserved == account.over_reserved == 0, f"{account}: slots were left behind"


@given(script=scripts(kinds=("one",)))
def test_with_memory_without_limit_all_servers_give_the_same_schedule(script):
    def schedule(name):
        steps = []

        def look(server, output, seconds):
            counts = output.num_scheduled_tokens
            work = [(seq.request_id.partition(".")[0], seq.num_computed, counts[seq]) for seq in counts]
            steps.append((work, seconds))

        result = simulate(script, Server(name, num_slots=2048 * 32, cost=PAGED_ALONE), on_step=look)
        return steps, list(result.latencies)

    first = schedule("max")
    for name in SERVERS[1:]:
        assert schedule(name) == first, f"{name} schedules otherwise than max, and no memory is short"


@given(server=servers(), script=scripts(), seed=st.integers(0, 5))
def test_time_goes_on_and_a_token_takes_a_pass(server, script, seed):
    busy = [0.0]

    def look(server, output, seconds):
        busy[0] += seconds

    result = simulate(script, server, on_step=look, seed=seed)
    assert result.clock >= busy[0] - 1e-9, "steps took longer than the whole run"
    assert result.clock <= script[-1].arrival + busy[0] + 1e-9, "the clock stood still while a request waited"
    one = CostModel().one_pass(1, 0, 0)
    assert min(result.latencies) >= one * (1 - 1e-9), "a token was made in less time than its pass takes"
    assert result.latency * len(script) == pytest.approx(sum(result.latencies))


@given(script=scripts(), name=st.sampled_from(SERVERS))
def test_the_same_script_twice_is_the_same_run(script, name):
    def run():
        result = simulate(script, Server(name, num_slots=2048), seed=3)
        return result.clock, list(result.latencies), result.preemptions, result.totals

    assert run() == run()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_all_are_answered_when_memory_is_short(preemption):
    """Twenty prompts of 4 tokens fit into 256 slots at once, and twenty answers of 45 do not."""
    server = Server("paged", num_slots=256, preemption=preemption)
    result = simulate([Request(0.0, 4, 45)] * 20, server)
    assert result.preemptions > 0 and server.scheduler.counts[preemption] > 0
    assert len(result.latencies) == 20 and result.tokens == 20 * 45


def test_seconds_of_a_lone_request_by_hand():
    cost = CostModel()
    result = simulate([Request(5.0, 100, 3)], Server("paged", cost=cost))
    steps = [cost.one_pass(100, 100, 5050), cost.one_pass(1, 101, 101), cost.one_pass(1, 102, 102)]
    assert result.clock == pytest.approx(5.0 + sum(steps))
    assert result.latency == pytest.approx(sum(steps) / 3)
    assert result.totals.batch == pytest.approx(1.0)


def test_the_window_weighs_steps_with_their_seconds():
    server = Server("paged")
    result = simulate([Request(0.0, 16, 50), Request(0.0, 16, 100)], server)
    two = simulate([Request(0.0, 16, 50), Request(0.0, 16, 50)], Server("paged")).clock
    assert result.totals.batch == pytest.approx((2 * two + result.clock - two) / result.clock, rel=1e-9)
    assert result.totals.seconds == pytest.approx(result.clock)
    late = simulate([Request(0.0, 16, 50), Request(0.0, 16, 100)], Server("paged"), window=(two, math.inf)).totals
    assert late.batch == pytest.approx(1.0)
    assert late.finished == 1


@given(server=servers(), script=scripts(), seed=st.integers(0, 5), every=st.integers(0, 3), data=st.data())
def test_totals_are_what_the_steps_of_the_window_add_up_to(server, script, seed, every, data):
    """A second writing, from what each step shows. All arrive at once: so the clock is the sum of the steps."""
    script = [replace(request, arrival=0.0) for request in script]
    steps, clocks, blocks = [], [0.0], server.name == "paged"

    def look(server, output, seconds):
        account = server.account()
        parts = *account[:3], sum(account[3:])
        tables = [server.memory.blocks(seq.seq_id) for seq in server.running] if blocks else []
        steps.append((seconds, len(server.running), parts, sum(map(len, tables)), server.num_slots))
        clocks.append(clocks[-1] + seconds)

    whole = simulate(script, replace(server), on_step=look, seed=seed)
    first, last = sorted(data.draw(st.lists(st.integers(0, len(steps)), min_size=2, max_size=2), label="steps"))
    window = clocks[first], clocks[last]
    options = {"count_blocks": blocks, "seed": seed} | ({} if every == 1 else {"account_every": every})
    totals = simulate(script, replace(server), window=window, **options).totals
    inside = steps[first:last]
    assert totals.seconds == pytest.approx(sum(step[0] for step in inside))
    assert totals.sequences == pytest.approx(sum(step[0] * step[1] for step in inside))
    looked = [step for number, step in enumerate(inside, start=first + 1) if every and number % every == 0]
    assert totals.slots == pytest.approx([sum(step[0] * step[2][place] for step in looked) for place in range(4)])
    assert sum(totals.shares) == pytest.approx(100.0 if looked else 0.0)
    if looked:
        pool = sum(step[0] * step[4] for step in looked)
        assert totals.shares.held == pytest.approx(100 * sum(step[0] * step[2][0] for step in looked) / pool)
    if blocks:
        assert totals.tables == pytest.approx(sum(step[0] * step[3] for step in inside))
        assert 0.0 <= totals.saved < 1.0
    if inside:
        assert totals.batch == pytest.approx(totals.sequences / totals.seconds)
        assert totals.throughput == pytest.approx(totals.finished / totals.seconds)
    else:
        assert (totals.batch, totals.throughput, totals.saved) == (0.0, 0.0, 0.0)
    others = [(0.0, window[0]), (window[1], math.inf)]
    finished = [simulate(script, replace(server), window=each, seed=seed).totals.finished for each in others]
    assert totals.finished + sum(finished) == len(script) == whole.totals.finished


def test_samples_share_the_prompt_and_nothing_else():
    """Prompt of 32, blocks of 16: two samples name its two blocks, and have one of their own each from token 33 on."""
    seen = Totals(0.0, math.inf)

    def look(server, output, seconds):
        if len(server.running) == 2 and server.running[0].num_computed >= 32:
            seen.tables += 6
            seen.distinct += server.memory.num_blocks - server.memory.num_free

    simulate([Request(0.0, 32, 10, n=2)], Server("paged"), on_step=look)
    assert seen.saved == pytest.approx(2 / 6)
    apart = simulate([Request(0.0, 32, 10)] * 2, Server("paged"), count_blocks=True)
    assert apart.totals.saved == pytest.approx(0.0), "two requests share nothing"


@given(seed=st.integers(0, 1000), preemption=st.sampled_from(("recompute", "swap")), caching=st.booleans())
def test_no_sample_computes_a_full_block_of_the_prompt_that_another_has(seed, preemption, caching):
    """Whether it forks, enters when another ends, or comes back. And the blocks that it names are computed."""
    rng = random.Random(seed)
    size = rng.choice((1, 2, 3, 16))
    sizes = {"num_slots": rng.randint(192, 256), "block_size": size, "max_num_seqs": rng.choice((3, 6, 40))}
    script = [Request(0.0, rng.randint(1, 30), rng.randint(1, 45), n=rng.randint(1, 3)) for _ in range(12)]

    def look(server, output, seconds):
        for place, seq in enumerate(server.running):
            own = server.memory.blocks(seq.seq_id)
            for earlier in server.running[:place]:
                blocks = server.memory.blocks(earlier.seq_id)
                pairs = enumerate(zip(own, blocks, strict=False))
                num_shared = next((i for i, (one, other) in pairs if one != other), len(own))
                assert num_shared * size <= min(seq.num_computed, earlier.num_computed), "names what is not computed"
                assert caching or num_shared * size <= len(seq.prompt_token_ids), "shares what may differ"
                if earlier.request_id == seq.request_id and seq in output.num_scheduled_tokens:
                    full = min(len(seq.prompt_token_ids), len(seq) - 1) // size * size
                    assert seq.num_computed >= full, f"{seq.seq_id} computes what {earlier.seq_id} has"
                    full = (len(seq.prompt_token_ids) - 1) // size
                    assert caching or own[:full] == blocks[:full], f"{seq.seq_id} has blocks of its own for the prompt"

    simulate(script, Server("paged", preemption=preemption, prefix_caching=caching, **sizes), on_step=look)


def test_a_sample_without_a_place_shares_the_prompt_when_it_enters():
    """Three places, four sequences: the third sample enters when the other request ends, and computes 1 token of 33."""
    computed = []

    def look(server, output, seconds):
        computed.append(output.total_num_scheduled_tokens)

    result = simulate([Request(0.0, 10, 2), Request(0.0, 33, 6, n=3)], Server("paged", max_num_seqs=3), on_step=look)
    assert result.tokens == 2 + 3 * 6
    assert sum(computed) == (10 + 1) + (33 + 2 * 5) + (1 + 5)


def test_a_token_that_samples_share_is_held_once():
    server = Server("paged", num_slots=320)
    server.add(Request(0.0, 20, 10, n=3))
    server.scheduler.update_from_output(server.scheduler.schedule())  # now all three name the prompt's two blocks
    assert len(server.running) == 3
    account = server.account()
    assert (account.held, account.reserved, account.rounding) == (20, 10, 2)
    assert sum(account) == 320


def test_a_prefix_is_found_by_whoever_comes_later():
    script = [Request(0.0, 100, 5, prefix_len=80), Request(50.0, 100, 5, prefix_len=80)]
    result = simulate(script, Server("paged", prefix_caching=True))
    assert result.found == pytest.approx(80 / 200)
    without = simulate(script, Server("paged"))
    assert without.found == 0.0
    other = [Request(0.0, 100, 5), Request(50.0, 100, 5)]
    assert simulate(other, Server("paged", prefix_caching=True)).found == 0.0, "prompts have nothing in common"


def test_memory_does_not_grow_with_the_number_of_requests():
    tiny = Lengths(prompt_mean=6.0, output_mean=5.0, spread=0.3)

    def peak(num_requests):
        tracemalloc.start()
        simulate(stream(tiny, 30.0, num_requests, 0), Server("paged"))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(50)  # tables that are built once
    more = peak(2200) - peak(200)
    assert more < 2000 * 64, f"a request that is finished costs {more / 2000:.0f} bytes"


# ---- memories ----------------------------------------------------------------------------------------------------


def test_orca_max_has_seven_requests_and_the_paper_says_so():
    totals = measure("alpaca", 100.0, "max", (5.0, 20.0), 0)
    assert totals.batch == pytest.approx(7.0)
    assert totals.shares.external == pytest.approx(paper.MEMORY["max"].external, abs=0.1)
    assert sum(totals.shares) == pytest.approx(100.0)


def test_who_holds_more_tokens_serves_more_requests():
    totals = {name: measure("sharegpt", FULL_RATE, name, (30.0, 90.0), 0) for name in SERVERS}
    held = [totals[name].shares.held for name in SERVERS]
    batches = [totals[name].batch for name in SERVERS]
    assert held == sorted(held) and batches == sorted(batches)
    assert held[-1] == pytest.approx(paper.MEMORY_HELD["paged"], abs=3.0)


def test_slots_are_those_of_the_papers_table():
    assert NUM_SLOTS == 15_728


def test_a_run_has_one_owner():
    memory = ReservedMemory(4096, "oracle", 2048)
    memory.expect("a", 10, 5)
    assert memory.can_ever_fit(14) and not memory.can_ever_fit(2060)
    with pytest.raises(ValueError, match="2000 prompt and 100 output"):
        memory.expect("b", 2000, 100)
    assert memory.allocate_slots("a", 10) == [] and memory.num_tokens("a") == 10
    with pytest.raises(ValueError, match="one owner"):
        memory.fork("a", "b")
    assert memory.swap_out("a") is None, "a run stays where it is"
    with pytest.raises(ValueError, match="10 of its 15"):
        memory.allocate_slots("a", 16)
    memory.free("a")
    assert memory.num_tokens("a") == 0 and sum(memory.account()) == memory.account().free == 4096
    memory.expect("b", 10, 5)
    memory.expect("c", 10, 5)
    memory.free("b")  # it waits, and leaves
    assert memory.allocate_slots("c", 10) == [], "a sequence that is gone stands before it"


def test_after_a_reset_runs_are_given_in_the_same_order():
    memory = ReservedMemory(64, "oracle", 64)
    for seq_id in "abc":
        memory.expect(seq_id, 20, 12)  # two runs of 32 are there
    assert [memory.allocate_slots(seq_id, 20) for seq_id in "abc"] == [[], [], None]
    memory.reset()
    assert memory.account().free == 64 and memory.num_tokens("a") == memory.num_tokens("b") == 0
    with pytest.raises(AssertionError, match="c enters, and a is the first"):
        memory.allocate_slots("c", 20)
    assert [memory.allocate_slots(seq_id, 25) for seq_id in "abc"] == [[], [], None]
    assert memory.num_tokens("a") == 25


def test_a_request_that_could_never_run_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="2048"):
        Server("max", num_slots=1000).add(Request(0.0, 10, 5))
    with pytest.raises(ValueError, match="160 slots"):
        Server("paged", num_slots=160).add(Request(0.0, 100, 100))
    with pytest.raises(ValueError, match="max, pow2, oracle, paged"):
        Server("orca")


# ---- what is asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 2.0, 30.0])
def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process(rate):
    times = list(islice(arrivals(rate, random.Random(1)), 20_000))
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert times == sorted(times)
    assert statistics.fmean(gaps) == pytest.approx(1 / rate, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.05), (
        "gaps are exponential: mean and spread are equal"
    )


@pytest.mark.parametrize("lengths", [SHAREGPT, ALPACA, Lengths(40.0, 300.0, 0.4)])
def test_lengths_have_the_means_and_keep_the_cuts(lengths):
    rng = random.Random(2)
    drawn = [lengths.draw(rng) for _ in range(40_000)]
    assert statistics.fmean(p for p, _ in drawn) == pytest.approx(lengths.prompt_mean, rel=0.02)
    assert statistics.fmean(o for _, o in drawn) == pytest.approx(lengths.output_mean, rel=0.02)
    assert all(4 <= p <= 1024 and o >= 4 and p + o <= 2048 for p, o in drawn)
    squares = statistics.fmean(o * o for _, o in drawn)
    assert squares / lengths.output_mean == pytest.approx(lengths.output_moment(), rel=0.05)


def test_the_one_fitted_number_is_what_figure_2_says():
    assert fit_spread() == pytest.approx(SPREAD, abs=0.001)
    reserved = 7 * SHAREGPT.output_moment() / 2 / 15_728
    assert 100 * reserved == pytest.approx(paper.MEMORY["max"].reserved, abs=0.05)


def test_the_same_requests_at_another_rate():
    slow, fast = (list(stream("sharegpt", rate, 50, 7)) for rate in (1.0, 2.0))
    assert [(r.prompt_len, r.output_len) for r in slow] == [(r.prompt_len, r.output_len) for r in fast]
    assert [r.arrival for r in slow] == pytest.approx([2 * r.arrival for r in fast])
    assert list(stream("sharegpt", 1.0, 50, 8)) != slow
    assert slow == list(stream("sharegpt", 1.0, 50, 7))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lengths": "gpt"}, "sharegpt, alpaca"),
        ({"rate": 0.0}, "rate"),
        ({"rate": math.inf}, "rate"),
        ({"num_requests": -1}, "-1"),
        ({"n": 2, "beam_width": 2}, "not both"),
        ({"prefix_len": -1}, "prefix_len"),
        ({"prefix_len": 1025}, "prefix_len must be at most 1024"),
    ],
)
def test_a_wrong_stream_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        list(stream(**{"lengths": "alpaca", "rate": 1.0, "num_requests": 3, "seed": 0} | change))


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_a_request_fits_the_context_with_its_prefix(name):
    requests = list(stream(name, 1.0, 3000, 0, prefix_len=1024))
    assert all(request.prompt_len + request.output_len <= 2048 for request in requests)
    assert all(request.prompt_len > request.prefix_len == 1024 for request in requests)


@pytest.mark.parametrize("wrong", [{"prompt_mean": 2.0}, {"output_mean": 600.0}, {"spread": 3.0}])
def test_wrong_lengths_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SHAREGPT, **wrong)


def test_a_trace_from_a_file(tmp_path):
    table = tmp_path / "trace.csv"
    table.write_text("arrival,prompt_len,output_len\n0.5,10,3\n2.5,20,4\n")
    assert from_file(table, 1.0, 0) == [Request(0.5, 10, 3), Request(2.5, 20, 4)]
    listed = tmp_path / "trace.json"
    listed.write_text(json.dumps([{"prompt_len": 10, "output_len": 3}] * 3))
    requests = from_file(listed, 2.0, 0)
    assert [request.arrival for request in requests] == [r.arrival for r in stream("alpaca", 2.0, 3, 0)]
    assert len(simulate(requests, Server("oracle")).latencies) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no requests"),
        ("prompt_len,output_len\n10,x\n", "row 0"),
        ("prompt_len,output_len\n10,3\n2000,100\n", "row 1.*2000 . 100"),
        ("prompt_len,output_len\n0,3\n", "row 0"),
        ("arrival,prompt_len,output_len\n2,10,3\n1,10,3\n", "row 1.*arrival"),
        ("arrival,prompt_len,output_len\nnan,10,3\n", "row 0.*arrival"),
        ("prompt,output\n10,3\n", "row 0"),
    ],
)
def test_a_wrong_file_is_refused_with_the_row(tmp_path, text, says):
    table = tmp_path / "trace.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=says):
        from_file(table, 1.0, 0)


# ---- seconds -----------------------------------------------------------------------------------------------------


loads = st.builds(StepCost, *[st.integers(0, 3000)] * 4, st.floats(0, 1e6), *[st.integers(0, 300)] * 2)


@given(load=loads, which=st.sampled_from(StepCost._fields), more=st.integers(1, 500))
def test_more_to_do_never_takes_less_time(load, which, more):
    cost = CostModel()
    before, after = cost.step(load), cost.step(load._replace(**{which: getattr(load, which) + more}))
    assert after >= before >= 0


@given(
    load=loads.filter(lambda load: load.decodes + load.prompt_tokens), faster=st.sampled_from(("bandwidth", "flops"))
)
def test_a_faster_device_is_never_slower(load, faster):
    quick = replace(A100_40GB, **{faster: 2 * getattr(A100_40GB, faster)})
    assert CostModel(device=quick).step(load) <= CostModel().step(load)
    assert CostModel(device=H100).step(load) < CostModel().step(load)


@given(
    load=loads,
    peaks=st.tuples(*[st.sampled_from((1e9, 1e12, 1e16))] * 3),
    utilisation=st.sampled_from((0.5, 1.0)),
    shape=st.builds(KVShape, st.just("drawn"), *[st.integers(1, 99)] * 4, st.sampled_from((1, 2, 4))),
    parameters=st.floats(1e6, 1e11),
    block_size=st.integers(1, 64),
    attention=st.floats(1.0, 2.0),
)
def test_a_step_takes_what_its_bytes_and_operations_take(
    load, peaks, utilisation, shape, parameters, block_size, attention
):
    """A second writing, pass by pass: weights or their products, then K and V or theirs, after the copies."""
    device = Device("drawn", *peaks, utilisation)
    cost = CostModel(device, shape, parameters, block_size, attention)
    bandwidth, flops, link = peaks[0] * utilisation, peaks[1] * utilisation, peaks[2]
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.element_bytes  # of K and V
    block = token * block_size

    def one(tokens, context, pairs):
        matrices = max(parameters * shape.element_bytes / bandwidth, 2 * parameters * tokens / flops)
        products = 2 * pairs * (token / shape.element_bytes) / flops  # with K and with V, 2 operations an element
        return matrices + attention * max(context * token / bandwidth, products)

    decodes = load.decodes, load.decode_context, load.decode_context
    prompts = load.prompt_tokens, load.prompt_context, load.prompt_pairs
    passes = [each for each in (decodes, prompts) if each[0]]
    moved = load.swapped * max(2 * shape.num_layers * COPY_CALL, block / link) + 2 * load.copied * block / bandwidth
    assert cost.step(load) == pytest.approx(moved + sum(one(*each) for each in passes), rel=1e-9)
    n = load.prompt_tokens
    assert cost.recompute(n) == pytest.approx(one(n, n, sum(range(n + 1))), rel=1e-9)
    assert cost.step(StepCost()) == 0.0


def test_one_token_reads_all_weights_and_its_context():
    """26 GB, and 800 KiB for each token of the context, at 55 % of 1,555 GB/s."""
    idle, busy = CostModel().one_pass(1, 0, 0), CostModel().one_pass(1, 1000, 1000)
    assert idle == pytest.approx(26e9 / (0.55 * 1555e9))
    assert busy - idle == pytest.approx(1.23 * 1000 * 819_200 / (0.55 * 1555e9))
    many = CostModel().one_pass(5000, 0, 0)
    assert many == pytest.approx(2 * 13e9 * 5000 / (0.55 * 312e12)), "a long prompt is bound by its operations"


def test_swapping_small_blocks_is_calls_and_large_ones_bytes():
    assert CostModel(block_size=1).swap(16) == pytest.approx(16 * 80 * 2.9e-6)
    assert CostModel(block_size=256).swap(1) == pytest.approx(256 * 819_200 / 32e9)
    times = [CostModel(block_size=size).swap(256 // size) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("wrong", [{"bandwidth": 0.0}, {"flops": -1.0}, {"utilisation": 1.1}, {"utilisation": 0.0}])
def test_a_device_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(A100_40GB, **wrong)


def test_what_a_step_computes_is_counted():
    server = Server("paged")
    server.add(Request(0.0, 20, 5))
    assert cost_of(server.scheduler.schedule()) == StepCost(prompt_tokens=20, prompt_context=20, prompt_pairs=210.0)


def test_a_prompt_of_one_token_is_a_prompt():
    server = Server("paged")
    server.add(Request(0.0, 1, 5))
    assert cost_of(server.scheduler.schedule()).prompt_tokens == 1


# ---- beams -------------------------------------------------------------------------------------------------------


@given(scores=st.lists(st.floats(-50, 0), min_size=1, max_size=6), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_search_keeps_the_likeliest(scores, width, seed):
    chosen_beams = choose(scores, width, random.Random(seed))
    assert len(chosen_beams) == width
    found = [score for _, score in chosen_beams]
    assert found == sorted(found, reverse=True)
    assert all(score <= scores[beam] for beam, score in chosen_beams), "a text became likelier as it grew"
    best = max(range(len(scores)), key=scores.__getitem__)
    if all(scores[best] - score > 40 for place, score in enumerate(scores) if place != best):
        assert chosen_beams[0][0] == best


def test_beams_share_the_prompt_and_their_past():
    """Prompt of 32, blocks of 16, two beams: two tables of three blocks, of which the prompt's two are one."""
    seen = []

    def look(server, output, seconds):
        tables = [server.memory.blocks(beam.seq_id) for beam in server.running]
        if len(tables) == 2:
            seen.append(len(set(tables[0]) & set(tables[1])))
            assert tables[0][:2] == tables[1][:2] and tables[0][-1] != tables[1][-1], "two beams write one block"
            assert server.memory.num_blocks - server.memory.num_free == sum(map(len, tables)) - seen[-1]

    result = simulate([Request(0.0, 32, 40, beam_width=2)], Server("paged"), on_step=look)
    assert len(seen) == 39 and max(seen) > 2, "no search of 40 tokens parts at its first and never again"
    assert result.tokens == 80


def test_a_search_that_could_never_run_is_refused_with_the_numbers():
    server = Server("paged", num_slots=160, max_num_seqs=4)
    server.add(Request(0.0, 30, 3, beam_width=4))
    with pytest.raises(ValueError, match="4 beams of up to 50 stored tokens may take 16 blocks of 16 tokens, and 10"):
        server.add(Request(0.0, 30, 21, beam_width=4))
    with pytest.raises(ValueError, match="beam_width is 5, and at most 4"):
        server.add(Request(0.0, 1, 1, beam_width=5))


def test_searches_are_answered_when_memory_is_short():
    """Waiting searches hold no blocks, and running ones keep within max_num_seqs."""
    server = Server("paged", num_slots=256, max_num_seqs=12)

    def look(server, output, seconds):
        running = {beam.seq_id for search in server.beams.running for beam in search.beams}
        assert set(server.memory.tables) == running
        assert sum(search.params.beam_width for search in server.beams.running) <= 12

    result = simulate([Request(0.0, 4, 45, beam_width=3)] * 8, server, on_step=look)
    assert result.preemptions == server.beams.num_preempted > 0
    assert len(result.latencies) == 8 and result.tokens == 8 * 3 * 45


@pytest.mark.parametrize("first", ["beams", "samples"])
def test_requests_and_searches_take_turns(first):
    kinds = {"beams": Request(0.0, 8, 5, beam_width=2), "samples": Request(0.0, 8, 7, n=2)}
    script = [kinds[first], *(request for kind, request in kinds.items() if kind != first)]
    result = simulate(script, Server("paged"))
    alone = [simulate([script[place]], Server("paged")).clock for place in (0, 1)]
    assert result.clock == pytest.approx(sum(alone))
    assert len(result.latencies) == 2


# ---- reports -----------------------------------------------------------------------------------------------------

REPORT = Report(
    "x",
    "Title",
    "Figure 0",
    "Setting.",
    [row("share", "%", [22.0, 24.0], 20.4, 3.0), row("factor", "x", [3.0], (1.7, 2.7), 0.3), Row("alone", "", 1.0)],
    [
        Bars(
            "bars", "y", ["one", "two"], {"ours": [1.0, 2.0], "held": [3.0, 4.0]}, {"ours": [1.5, None]}, stacked=True
        ),
        Lines("lines", "x", "y", {"ours": [(1.0, 2.0), (2.0, 3.0)]}, log_x=True, log_y=True),
    ],
)


def test_differences_are_points_for_shares_and_parts_of_the_papers_value_otherwise():
    share, factor, alone = REPORT.rows
    assert share.difference == pytest.approx(2.6) and share.is_near and share.spread == pytest.approx(math.sqrt(2))
    assert factor.difference == pytest.approx(3.0 / 2.7 - 1) and factor.is_near
    assert Row("inside", "x", 2.0, None, (1.7, 2.7), 0.3).difference == 0.0
    assert Row("below", "x", 1.0, None, (1.7, 2.7), 0.3).is_near is False
    assert alone.difference is None and alone.is_near is None
    assert REPORT.num_near == (2, 2)
    assert cells(share) == ["share", "23.00 %", "± 1.41", "20.40", "+2.6 points", "yes"]


def test_a_report_as_json_and_csv():
    stored = json.loads(to_json(REPORT, [0, 1]))
    assert stored["seeds"] == [0, 1] and stored["charts"][1]["series"]["ours"] == [[1.0, 2.0], [2.0, 3.0]]
    assert [entry["near"] for entry in stored["rows"]] == [True, True, None]
    lines = to_csv(REPORT).splitlines()
    assert lines[1] == "x,share,%,23.0,1.41421,20.4,20.4,2.6,True"
    assert len(lines) == 4
    table = to_markdown(REPORT).splitlines()
    assert table[0] == "|  | ours | spread | paper | difference | near |"
    assert table[2] == "| share | 23.00 % | ± 1.41 | 20.40 | +2.6 points | yes |"
    alone = to_markdown(replace(REPORT, rows=REPORT.rows[2:])).splitlines()
    assert alone[0] == "|  | ours |", "columns in which nothing stands"


def test_files_of_a_report(tmp_path):
    pytest.importorskip("matplotlib", reason="charts need matplotlib: pip install 'minipaged[tutorials]'")
    paths = write(REPORT, [0], tmp_path / "new")
    assert [path.name for path in paths] == ["x.json", "x.csv", "x.txt", "x.svg"]
    drawn = paths[3].read_bytes()
    assert b"<svg" in drawn
    write(REPORT, [0], tmp_path / "new")
    assert paths[3].read_bytes() == drawn, "the same numbers, and another picture"


def test_an_interrupt_leaves_the_files_that_were_there(monkeypatch, tmp_path):
    write(REPORT, [0], tmp_path, figures=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(report, path):
        path.write_text("<svg")
        raise KeyboardInterrupt

    monkeypatch.setattr("minipaged.simulator.reproduce.draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(replace(REPORT, title="Another"), [0], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        figures.check_matplotlib()


def test_a_curve_rises_and_ends_where_the_server_is_full():
    points = curve("alpaca", "max", 0)
    assert points[0][1] < HIGHEST / 5 and points[-2][1] <= HIGHEST < points[-1][1]
    assert [rate for rate, _ in points] == sorted(rate for rate, _ in points)


def test_experiments_by_name():
    assert chosen([]) == list(ALL)
    assert chosen(["b", "a", "b"]) == ["b", "a"]
    with pytest.raises(ValueError, match="unknown experiment 'z'"):
        chosen(["a", "z"])
    assert set(ALL) < set(EXPERIMENTS)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_reports_come_in_order_with_the_results_of_their_own_jobs(monkeypatch, num_processes):
    def squares(name, numbers):
        def experiment(seeds):
            results = yield [(pow, (number, 2 + seed)) for number in numbers for seed in seeds]
            return Report(name, "", "", "", [row("power", "", [value]) for value in results], [])

        return experiment

    monkeypatch.setitem(EXPERIMENTS, "one", squares("one", range(7)))
    monkeypatch.setitem(EXPERIMENTS, "two", squares("two", range(3, 9)))
    reports, progress = [], []
    reproduce(["two", "one"], [0, 1], reports.append, lambda *seen: progress.append(seen), num_processes)
    assert [report.name for report in reports] == ["two", "one"]
    assert [each.ours for each in reports[1].rows] == [number**power for number in range(7) for power in (2, 3)]
    assert [each.ours for each in reports[0].rows] == [number**power for number in range(3, 9) for power in (2, 3)]
    expected = [("two", done, 12) for done in range(13)] + [("one", done, 14) for done in range(15)]
    assert progress == expected


def test_a_job_of_two_experiments_runs_once(monkeypatch, tmp_path):
    def experiment(seeds):
        yield [(_leave_a_line, (str(tmp_path / "lines"), seed)) for seed in (*seeds, *seeds)]
        return REPORT

    monkeypatch.setitem(EXPERIMENTS, "one", experiment)
    monkeypatch.setitem(EXPERIMENTS, "two", experiment)
    reproduce(["one", "two"], [0, 1], lambda report: None, lambda *seen: None, num_processes=2)
    assert sorted((tmp_path / "lines").read_text().split()) == ["0", "1"]


def test_a_job_that_fails_is_no_silence_and_leaves_no_worker(monkeypatch, tmp_path):
    def experiment(seeds):
        yield [(time.sleep, (0.01,)), (math.sqrt, (-1.0,)), (_leave_a_line_late, (str(tmp_path / "lines"), 600.0))]

    monkeypatch.setitem(EXPERIMENTS, "one", experiment)
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match="math domain error"):
        reproduce(["one"], [0], lambda report: None, lambda *seen: None, num_processes=2)
    assert not (tmp_path / "lines").exists(), "it waited for a job whose result is not needed"
    assert multiprocessing.active_children() == before


def _leave_a_line_late(path, seconds):
    time.sleep(seconds)
    _leave_a_line(path, 0)


def _leave_a_line(path, number):
    with open(path, "a") as file:
        file.write(f"{number}\n")


def test_a_table_costs_nothing_beside_its_pool():
    experiment = EXPERIMENTS["h"]([0])
    assert next(experiment) == [], "arithmetic needs no job"
    report = report_of(experiment, [])
    values = {entry.what: entry.ours for entry in report.rows}
    assert values["OPT-13B, blocks of 16: all tables"] == 983 * 4
    assert values["500 tokens of 2,048, one level"] == 128 * 4


# ---- the command -------------------------------------------------------------------------------------------------


def call(monkeypatch, capsys, *arguments):
    from minipaged.cli import main

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["minipaged", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_the_command_writes_what_it_shows(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = call(monkeypatch, capsys, "h", "--out", tmp_path / "here", "--no-figures", "--processes", 1)
    assert code == 0 and "Bytes of block tables" in out and "3,932" in out
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["h.csv", "h.json", "h.txt"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["z"], "unknown experiment 'z'"), (["h", "--seeds", "0"], "seeds"), (["h", "--processes", "0"], "processes")],
)
def test_the_command_refuses_in_one_line(monkeypatch, capsys, arguments, says):
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2 and not out
    assert says in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to one process is POSIX")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_leaves_no_process_and_no_file(tmp_path, how):
    """Each process of the run holds the writing end of one pipe: its end is read when the last of them has gone."""
    command = [sys.executable, "-m", "minipaged", "reproduce", "c", "--out", str(tmp_path), "--processes", "2"]
    reading, writing = os.pipe()
    run = subprocess.Popen(
        [*command, "--no-figures"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[writing],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )
    os.close(writing)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while run.poll() is None and len(children.read_text().split() if children.exists() else "ab") < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    run.send_signal(how)
    _, errors = run.communicate(timeout=600)
    ended, _, _ = select.select([reading], [], [], 600)
    os.close(reading)
    assert ended, "a worker is still there"
    assert run.returncode == (130 if how == signal.SIGINT else -how), errors
    assert b"Traceback" not in errors
    assert not list(tmp_path.iterdir())


# ---- what it is made of ------------------------------------------------------------------------------------------


def test_no_tensor_library_comes_along():
    names = [f"minipaged.simulator.{path.stem}" for path in MODULES if path.stem != "__init__"]
    code = f"import sys, {', '.join(names)}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "triton", "matplotlib"} & set(loaded)


def test_scheduler_and_memory_are_those_of_the_engine():
    server = Server("paged")
    assert type(server.scheduler).__module__ == "minipaged.engine.scheduler"
    assert type(server.memory).__module__ == "minipaged.memory.block_manager"
    assert type(server.beams).__module__ == "minipaged.engine.beam_scheduler"
    assert type(Server("max").scheduler) is type(server.scheduler)
    for path in MODULES:
        defined = [n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
        assert not [name for name in defined if "Scheduler" in name or "Allocator" in name]
