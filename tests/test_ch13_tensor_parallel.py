"""Chapter 13. Any number of ranks writes the tokens of one, and exchanges what the formula says.

The algebra is tested with ranks that are threads, and processes with as few starts as can be: each takes seconds.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache
from multiprocessing import Pipe

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged import LLM, BeamSearchParams, SamplingParams
from minipaged.distributed import launch
from minipaged.distributed.group import thread_groups
from minipaged.distributed.layers import parallelise
from minipaged.distributed.load import from_transformer, open_source, slice_of
from minipaged.distributed.message import decode, encode, message_bytes
from minipaged.distributed.shares import local_config, shares, step_traffic, weight_bytes
from minipaged.distributed.team import Team, WorkerError
from minipaged.distributed.worker import serve
from minipaged.engine.runner import StepDescription
from minipaged.kvcache import PagedCache
from minipaged.model.contract import Scheduled, make_step
from minipaged.model.load import TINY, load_model, tiny_transformer
from minipaged.model.transformer import ModelConfig
from minipaged.simulator.replicas import POLICIES, Load, simulate_replicas
from model_files import SMALL, random_weights, transformer_of, write_folder, write_gguf

pytestmark = pytest.mark.ch13


def config(kv_heads, group, head_dim=4, hidden=8, inner=12, vocab=17, tied=True):
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=2,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=32,
        tie_embeddings=tied,
    )


@st.composite
def models_and_ranks(draw):
    made = config(
        draw(st.integers(1, 5)),
        draw(st.integers(1, 4)),
        inner=draw(st.sampled_from((12, 13, 64, 96))),
        vocab=draw(st.integers(12, 40)),
        tied=draw(st.booleans()),
    )
    return made, draw(st.integers(1, min(made.num_heads, 6)))


def in_threads(size, work):
    """work(rank) on every rank at once; what each returns, by rank."""
    results, errors = [None] * size, []

    def run(rank):
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


# ---- who holds what --------------------------------------------------------------------------------------------------


@given(models_and_ranks())
def test_shares_partition_the_model_and_every_query_head_has_its_kv_head(drawn):
    model, size = drawn
    found, group = shares(model, size), model.num_heads // model.num_kv_heads
    for name, total in (("heads", model.num_heads), ("inner", model.intermediate_size), ("vocab", model.vocab_size)):
        assert [i for share in found for i in getattr(share, name)] == list(range(total))
    for share in found:
        assert len(share.heads) % len(share.kv_heads) == 0
        local_group = len(share.heads) // len(share.kv_heads)
        for i, head in enumerate(share.heads):  # attention pairs them by their places on the rank
            assert share.kv_heads[i // local_group] == head // group
    held = [head for share in found for head in share.kv_heads]
    assert set(held) == set(range(model.num_kv_heads))
    if size <= model.num_kv_heads:
        assert len(held) == model.num_kv_heads, "a KV head is replicated although there are enough for all ranks"


def test_smollm2_on_two_ranks_is_divided_by_groups():
    two = shares(config(3, 3), 2)
    assert [share.heads for share in two] == [range(6), range(6, 9)]
    assert [share.kv_heads for share in two] == [range(2), range(2, 3)]


@pytest.mark.parametrize("size", [0, -1, 5, 1000])
def test_a_world_size_that_does_not_fit_is_refused_with_the_numbers(size):
    with pytest.raises(ValueError, match=rf"{size}.*(num_heads = 4|num_heads 4)" if size > 0 else f"got {size}"):
        LLM("tiny", tensor_parallel_size=size)


def test_what_cannot_be_divided_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(launch, "spawn", lambda size: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match="needs the model's name, file or folder"):
        LLM(tiny(), tensor_parallel_size=2)
    with pytest.raises(ValueError, match="distributed_timeout"):
        LLM("tiny", tensor_parallel_size=2, distributed_timeout=0.0)
    with pytest.raises(ValueError, match="max_num_seqs"):
        LLM("tiny", tensor_parallel_size=2, max_num_seqs=0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun started 3 processes, and tensor_parallel_size is 2"):
        LLM("tiny", tensor_parallel_size=2)


# ---- the algebra -----------------------------------------------------------------------------------------------------


@given(models_and_ranks(), st.integers(0, 3), st.booleans())
@settings(max_examples=25)
def test_ranks_together_compute_what_one_does_and_exchange_what_the_formula_says(drawn, seed, ends):
    model, size = drawn
    whole = tiny_transformer(torch.float64, seed, model)
    source = from_transformer(whole, lambda: None)
    batch = [Scheduled([1, 2, 3, 4, 5], 0, [2, 0]), Scheduled([7, 8], 0, [1])]
    rows = torch.tensor([4, 6]) if ends else torch.tensor([], dtype=torch.long)

    def run(transformer):
        cache = PagedCache(transformer.config, 3, 4, torch.float64)
        with torch.inference_mode():
            hidden = transformer(make_step(batch, 4), cache)
            return hidden, transformer.logits(hidden[rows])

    groups = thread_groups(size)
    found = shares(model, size)

    def rank_runs(rank):
        part = slice_of(source, found[rank], torch.float64)
        assert sum(p.nbytes for p in part.parameters()) == weight_bytes(local_config(model, found[rank]), torch.float64)
        parallelise(part, found[rank], model.vocab_size, groups[rank])
        return run(part)

    hidden, logits = run(whole)
    results = in_threads(size, rank_runs)
    for there, _ in results:
        torch.testing.assert_close(there, hidden, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0][1], logits, rtol=1e-9, atol=1e-9)
    expected = step_traffic(model, size, 7, len(rows), torch.float64)
    for group in groups:
        assert group.calls["all_reduce"] == expected.all_reduces
        assert group.bytes["all_reduce"] == expected.all_reduce_bytes
        assert (group.calls["gather"], group.bytes["gather"]) == (expected.gathers, expected.gather_bytes)


pairs = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=4)
scheduled = st.builds(
    Scheduled, st.lists(st.integers(0, 50_000), min_size=1, max_size=5), st.integers(0, 9), st.lists(st.integers(0, 99))
)


@given(pairs, pairs, pairs, st.lists(scheduled, min_size=1, max_size=5), st.data())
def test_a_step_comes_through_as_it_was_and_costs_what_the_formula_says(out, back, copies, batch, data):
    ends = sorted(data.draw(st.sets(st.integers(0, len(batch) - 1))))
    told = StepDescription(out, back, copies, batch, ends)
    assert decode(encode(told)) == told
    assert len(encode(told)) == message_bytes(told)
    with pytest.raises(ValueError, match="was announced"):
        decode(encode(told)[:-4])


# ---- slices of files -------------------------------------------------------------------------------------------------

DIVISIBLE = replace(SMALL, hidden_size=32, intermediate_size=96, num_heads=6, num_kv_heads=3, head_dim=32)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["safetensors", "F32", "F16", "Q4_1", "Q8_0"])
def test_slices_of_a_file_are_slices_of_its_model(tmp_path, kind, size):
    """Four ranks cut a group in two, and 32-number blocks of the quantised W^O too."""
    model = replace(DIVISIBLE, head_dim=16) if size == 4 else DIVISIBLE
    weights = random_weights(model)
    if kind == "safetensors":
        path = tmp_path / "folder"
        write_folder(path, model, weights, num_shards=2)
    else:
        path = tmp_path / "file.gguf"
        write_gguf(path, model, weights, gguf.GGMLQuantizationType[kind])
    whole = load_model(path).transformer
    if kind in ("safetensors", "F32"):
        assert torch.equal(whole.layers[0].qkv_proj.weight, transformer_of(model, weights).layers[0].qkv_proj.weight)
    from_file, in_memory = open_source(path), from_transformer(whole, lambda: None)
    for share in shares(model, size):
        ours, theirs = (slice_of(source, share, torch.float32).state_dict() for source in (from_file, in_memory))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_tensor_larger_than_the_configuration_says_is_refused(tmp_path):
    weights = random_weights(DIVISIBLE)
    write_folder(tmp_path / "m", replace(DIVISIBLE, intermediate_size=64), weights)
    with pytest.raises(ValueError, match=r"down_proj.weight has shape \[32, 96\].*\[32, 64\]"):
        LLM(tmp_path / "m", tensor_parallel_size=2)


# ---- the engine, over ranks that are threads -------------------------------------------------------------------------


@cache
def tiny():
    return load_model("tiny", dtype="float64")


@pytest.fixture
def ranks_are_threads(monkeypatch):
    def spawn(size):
        groups, connections = thread_groups(size), {}
        for rank in range(1, size):
            connections[rank], theirs = Pipe()
            arguments = (theirs, rank, size, lambda _timeout, _device, rank=rank: groups[rank])
            threading.Thread(target=serve, args=arguments, daemon=True).start()
        return Team(size, connections, {}, lambda _timeout, _device: groups[0])

    monkeypatch.setattr(launch, "spawn", spawn)


PROMPTS = [[7, 7, 1, 2, 3, 4, 5, 6], [7, 7, 1, 2, 3, 4, 9], [200] * 5, [7, 7, 1, 2, 3, 4, 5, 6, 100], [1], [3, 4, 5]]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=1, ignore_eos=True)


def answers(llm, params, prompts=PROMPTS):
    asked = [llm.add_request({"prompt_token_ids": prompt}, params) for prompt in prompts]
    while not all(answer.finished for answer in asked):
        llm.step()
    return [[output.token_ids for output in answer.outputs] for answer in asked]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_pool_too_small_a_prefix_cache_and_forks_change_no_token(ranks_are_threads, size, preemption):
    shape = {"max_model_len": 32, "block_size": 4}
    plain = LLM(tiny(), cache="recompute", **shape)
    llm = LLM(
        "tiny",
        dtype="float64",
        tensor_parallel_size=size,
        num_blocks=18,
        max_num_seqs=6,
        max_num_batched_tokens=9,
        preemption=preemption,
        watermark=0.0,
        **shape,
    )
    # NaN of rank 0 goes through the first sum to all: who reads an unwritten slot anywhere shows it everywhere.
    llm.cache.key_cache.fill_(torch.nan), llm.cache.value_cache.fill_(torch.nan)
    for params in (GREEDY, SAMPLED, BeamSearchParams(3, max_tokens=6)):
        assert answers(llm, params) == [answers(plain, params, [prompt])[0] for prompt in PROMPTS]
    metrics = llm.metrics()
    assert metrics.preemptions[preemption] > 0 and metrics.prefix_tokens_found > 0, "this test shows less than it says"
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        llm.generate("hi")


@pytest.mark.parametrize("cache", ["recompute", "contiguous"])
def test_the_other_caches_are_divided_too(ranks_are_threads, cache):
    llm = LLM("tiny", dtype="float64", tensor_parallel_size=3, cache=cache, max_model_len=32, num_blocks=12)
    assert answers(llm, GREEDY) == answers(LLM(tiny(), cache="recompute", max_model_len=32), GREEDY)


def test_a_rank_that_fails_is_named_with_its_reason(ranks_are_threads, monkeypatch):
    from minipaged.distributed import worker

    original = worker.load_slice

    def failing(name, rank, *arguments):
        if rank == 2:
            raise ValueError("the disk is on fire")
        return original(name, rank, *arguments)

    monkeypatch.setattr(worker, "load_slice", failing)
    with pytest.raises(WorkerError, match="rank 2 failed: ValueError: the disk is on fire"):
        LLM("tiny", dtype="float64", tensor_parallel_size=3)


# ---- processes -------------------------------------------------------------------------------------------------------


def started(size, **settings):
    llm = LLM("tiny", dtype="float64", tensor_parallel_size=size, num_blocks=64, **settings)
    return llm, {rank: process.pid for rank, process in llm.engine.runner.team.processes.items()}


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_three_processes_write_the_same_tokens_hold_their_shares_and_exchange_what_is_said():
    llm, pids = started(3)
    assert answers(llm, GREEDY) == answers(LLM(tiny(), max_model_len=512), GREEDY)
    metrics, reports = llm.metrics(), llm.engine.runner.reports()
    steps, tokens = metrics.num_steps, metrics.num_tokens_computed
    for share, found in zip(shares(TINY, 3), reports, strict=True):
        local = local_config(TINY, share)
        assert found["weight_bytes"] == weight_bytes(local, torch.float64)
        assert found["kv_bytes"] == 64 * 16 * local.kv_bytes_per_token(torch.float64)
        assert found["calls"] == {"all_reduce": steps * (2 * TINY.num_layers + 1), "gather": steps}
        assert found["bytes"]["all_reduce"] == step_traffic(TINY, 3, tokens, 0, torch.float64).all_reduce_bytes
        assert found["bytes"]["gather"] == metrics.num_tokens_generated * 86 * 8  # 86 = ceil(257 / 3)
    assert all(is_alive(pid) for pid in pids.values())
    del llm  # and nobody called close()
    assert not any(is_alive(pid) for pid in pids.values()), "a worker outlived the LLM"


BLOWS = [(1, signal.SIGKILL, "died .signal 9"), (2, signal.SIGSTOP, "did not answer")]


@pytest.mark.parametrize("victim, blow, word", BLOWS)
def test_a_rank_that_dies_or_stops_in_a_step_is_named_and_nobody_is_left(victim, blow, word):
    llm, pids = started(3, distributed_timeout=2.0)
    struck = []

    def strike():
        struck.append(time.monotonic())
        os.kill(pids[victim], blow)

    threading.Timer(0.2, strike).start()
    with pytest.raises(WorkerError, match=f"rank {victim} .*{word}"):
        while True:
            llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=200, ignore_eos=True))
    assert time.monotonic() - struck[0] < 2.0 + 2.0 + 2.0, "timeout, grace, and the clock of a busy machine"
    assert not any(is_alive(pid) for pid in pids.values())
    with pytest.raises(WorkerError, match=f"rank {victim}"):
        llm.generate("hi")


SCRIPT = """
import sys, time
from minipaged import LLM, SamplingParams
llm = LLM("tiny", tensor_parallel_size=2, num_blocks=64)
print(llm.engine.runner.team.processes[1].pid, flush=True)
while sys.argv[1] != "exit":
    llm.generate("abc", SamplingParams(max_tokens=100, ignore_eos=True))
"""


@pytest.mark.parametrize("how", ["exit", signal.SIGINT, signal.SIGKILL])
def test_however_rank_0_ends_its_worker_does(how):
    rank_0 = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(how)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs us in the background lets its children ignore Ctrl-C; nobody who presses it starts us so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    pid = int(rank_0.stdout.readline())
    if how != "exit":
        time.sleep(0.3)
        rank_0.send_signal(how)
    _, errors = rank_0.communicate(timeout=20)
    assert (b"KeyboardInterrupt" in errors) == (how == signal.SIGINT), errors
    until = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_torchrun_starts_ranks_of_which_only_the_first_speaks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    generate = ["-m", "minipaged", "generate", "abc", "--model", "tiny", "--dtype", "float64", "--max-tokens", "8"]
    alone = subprocess.run([sys.executable, *generate], capture_output=True, timeout=60)
    ranks = subprocess.run([*command, *generate], capture_output=True, timeout=60)
    assert (alone.returncode, ranks.returncode) == (0, 0), ranks.stderr.decode()
    assert ranks.stdout == alone.stdout


@pytest.mark.smollm2
@pytest.mark.parametrize("size", [2, 3])
def test_smollm2_writes_the_same_tokens_and_its_logits_agree(smollm2, size):
    params = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=3)
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time"]
    llm = LLM("smollm2-135m", tensor_parallel_size=size, num_blocks=8, block_size=7, max_model_len=40)
    plain = LLM(smollm2, max_model_len=40)
    for one, several in zip(plain.generate(prompts, params), llm.generate(prompts, params), strict=True):
        assert one.outputs[0].token_ids == several.outputs[0].token_ids
        for ours, theirs in zip(several.outputs[0].logprobs, one.outputs[0].logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert llm.metrics().preemptions["recompute"] > 0, "the pool was not too small"
    llm.close()


# ---- replicas --------------------------------------------------------------------------------------------------------

FEW = Load(num_requests=4_000, rate=80.0, num_prefixes=200)


def test_a_router_that_knows_prefixes_finds_more_and_waits_less():
    found = {policy: simulate_replicas(policy, 20, FEW, seed=0) for policy in POLICIES}
    blind = max(found["round_robin"].found, found["least_loaded"].found)
    assert found["prefix_aware"].found > 1.5 * blind
    assert found["prefix_aware"].mean_wait < min(found["round_robin"].mean_wait, found["least_loaded"].mean_wait)
    # The only prefix, and a cache for one: all but the first request of each replica find it.
    one = replace(FEW, num_prefixes=1, cached_tokens=1_024, max_wait=1e9)
    assert simulate_replicas("prefix_aware", 20, one, 0).found == pytest.approx(3_999 / 4_000 * 1_024 / 1_152)
    assert simulate_replicas("round_robin", 20, one, 0).found == pytest.approx(3_980 / 4_000 * 1_024 / 1_152)


def test_replicas_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="policy must be one of"):
        simulate_replicas("random", 2, FEW, 0)
    with pytest.raises(ValueError, match="num_replicas must be at least 1, got 0"):
        simulate_replicas("round_robin", 0, FEW, 0)
