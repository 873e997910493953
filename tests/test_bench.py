"""Benchmarks take turns, time what they say, and write down all of it. What a figure is, no test says."""

import gc
import json
import os
import subprocess
import sys
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.bench import attention, engine, kernels, memory
from minipaged.bench.compare import WORKER
from minipaged.bench.kernel_peers import Problem, Shape
from minipaged.bench.timing import in_turn, turns
from minipaged.processor import processor
from test_cli import home, run  # noqa: F401

names = st.sets(st.text(max_size=3), min_size=1, max_size=5)


@pytest.fixture(autouse=True)
def little_to_collect():
    """A benchmark collects garbage before it times: here without a walk through all that the suite has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@given(names, st.integers(1, 4))
def test_each_has_its_turn_in_each_round_and_a_round_more_to_warm_up(these, rounds):
    seen = list(turns(these, rounds))
    assert [number for number, _ in seen] == [number for number in range(rounds + 1) for _ in these]
    assert all({name for place, name in seen if place == number} == these for number in range(rounds + 1))


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=4), st.integers(1, 4))
def test_what_timed_itself_is_believed_and_the_first_round_does_not_count(own, rounds):
    calls = {name: iter([9.0] + [seconds] * rounds) for name, seconds in own.items()}
    found = in_turn({name: calls[name].__next__ for name in own}, rounds)
    assert found == {name: [seconds] * rounds for name, seconds in own.items()}


def test_garbage_is_collected_again_even_after_a_run_that_fails():
    def fails():
        assert not gc.isenabled()
        raise KeyError("broken")

    with pytest.raises(KeyError):
        in_turn({"one": fails}, 3)
    assert gc.isenabled()


def test_the_scheduler_is_timed_and_the_figures_are_written(run, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(engine, "BATCHES", (2, 4))
    monkeypatch.setattr(engine, "POOLS", (100, 200))
    monkeypatch.setattr(engine, "STEPS", 3)
    code, out, _ = run("bench", "engine", "--rounds", 2, "--json", tmp_path / "found.json")
    assert code == 0 and "64 times the pool" in out and "SmolLM2 is not here" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert {(row["sequences"], row["blocks"]) for row in found} == {(2, 100), (2, 200), (4, 100), (4, 200)}
    assert all(row["seconds"] > 0 for row in found)


def test_the_allocator_is_timed_and_the_figures_are_written(run, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(memory, "SIZES", [1000, 2000])
    code, out, _ = run("bench", "memory", "--rounds", 1, "--json", tmp_path / "found.json")
    assert code == 0 and "".join(processor().split()) in "".join(out.split())
    found = json.loads((tmp_path / "found.json").read_text())
    assert [*found] == ["1000", "2000"] and "prefix: match, a block" in found["1000"]
    assert all(nanoseconds > 0 for column in found.values() for nanoseconds in column.values())


def test_attention_is_timed_beside_peers_that_answer_the_same(run, monkeypatch, tmp_path):  # noqa: F811
    for name, value in (("NUM_SEQS", 2), ("SHORTEST", 20), ("LONGEST", 50), ("SHARED_TOKENS", 32)):
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(attention, "flex", lambda batch: {}["no compiler"])
    code, out, _ = run("bench", "attention", "--rounds", 1, "--json", tmp_path / "found.json")
    assert code == 0 and "flex_attention does not run here" in out and "bandwidth floor" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["tables"]) == 6 and found["machine"]["processor"] == processor()
    for table in found["tables"]:
        for peer, times in table["ms"].items():
            assert len(times) == 3 and min(times) == table["best"][peer] <= table["medians"][peer] == median(times)
    monkeypatch.setattr(attention, "gathered", lambda batch: lambda: batch.query + 1)
    with pytest.raises(RuntimeError, match="gathered is off by"):
        run("bench", "attention", "--rounds", 1)


def test_kernels_are_timed_beside_the_peers_that_run_here(monkeypatch, capsys):
    """Without a GPU: its clock and its memory are made up, and so are the kernels."""
    testing = pytest.importorskip("triton.testing", reason="the kernels need Triton, which runs on Linux")
    problem = Problem(Shape("small", 2, 1, 4), 3, 8, torch.float32, "cpu")

    def right(problem, seed):
        return lambda: problem.query(seed)

    def wrong(problem, seed):
        return lambda: problem.query(seed) + 1

    def absent(problem, seed):
        raise ImportError("no such package")

    clock = iter(range(1, 1000))
    monkeypatch.setattr(testing, "do_bench", lambda call, **how: call() is not None and [float(next(clock))] * 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(kernels, "minipaged", right)
    monkeypatch.setattr(kernels, "PEERS", {"right": right, "wrong": wrong, "absent": absent})
    told = set()
    rows = [kernels.measure(problem, ["right", "wrong", "absent"], 3, told) for _ in range(2)]
    said = capsys.readouterr().err
    assert said.count("wrong: ArithmeticError") == said.count("absent: ImportError: no such package") == 1
    for row in rows:
        assert row["ms"].keys() == {"minipaged", "right"}
        assert all(row["best"][name] < row["ms"][name] < row["worst"][name] for name in row["ms"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1 << 40))
    assert kernels.measure(problem, ["right"], 1, told)["ms"] == {}, "there is no memory for it"


def test_a_peer_finds_no_module_of_ours_in_place_of_its_own(tmp_path):
    """transformers asks whether there is a `kernels`: the benchmark of this name stands beside the worker."""
    names = sorted(path.stem for path in WORKER.parent.glob("*.py"))
    fake = f"import importlib.util, sys\nprint([importlib.util.find_spec(name) for name in {names}], file=sys.stderr)"
    (tmp_path / "vllm.py").write_text(f"{fake}\nLLM = lambda *_, **__: None\nSamplingParams = None\n")
    command = [sys.executable, str(WORKER), "vllm", "a-model", "float32"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr.startswith("["), done.stderr
    assert "kernels" in names and str(WORKER.parent) not in done.stderr
