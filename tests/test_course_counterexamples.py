"""The counterexample: a script that can be typed as it stands, and a drawing of what the pools really hold."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from minipaged.course import typed
from minipaged.course.chapters import chapter, repository
from minipaged.course.generate import source_of
from minipaged.course.grade import SMALL, WRONG, grade
from minipaged.course.log import Log
from minipaged.course.museum import load_bugs
from minipaged.course.report import disagreements, print_counterexample, to_snapshot
from minipaged.viz.terminal import draw

# A folder of exercises stands for our modules, and a test's calls are noted: what is printed is the script.
WATCH = """
import sys
from pathlib import Path
from minipaged.course import impl, recorder
impl.install(impl.choose(Path(sys.argv[1])), recorder.watch)
import minipaged.memory.block_manager, minipaged.engine.scheduler, minipaged.memory.swap
for name in recorder.WATCHED:
    if name in sys.modules:
        recorder.watch_classes(sys.modules[name])
exec(sys.argv[2])
print("\\n".join(call["call"] for call in recorder.log.script()))
"""
# Types a script, line by line, and holds what each line gives against its comment.
TYPE = """
import re, sys
for line in sys.stdin.read().splitlines():
    code, _, said = line.partition("  # ")
    try:
        try:
            given = eval(code)
        except SyntaxError:
            given = exec(code)
    except Exception as error:
        assert said.startswith(f"raises {type(error).__name__}"), (line, error)
    else:
        assert not said.startswith("raises"), line
        plain = said.startswith("-> ") and "." not in said  # numbers with a point are rounded
        assert not plain or repr(given) == said[3:], (line, given)
print("typed")
"""


def python(code, *arguments, cwd=None, stdin=None):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, input=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def watched(folder, code):
    return python(WATCH, folder, code)


@pytest.fixture
def folder(tmp_path):
    """Exercises of chapter 6, 9 and 10 that are right."""
    for file, module in {
        "ch06_block_allocator.py": "minipaged.memory.block_allocator",
        "ch09_sharing.py": "minipaged.memory.block_table",
        "ch09_swap.py": "minipaged.memory.swap",
        "ch10_scheduler.py": "minipaged.engine.scheduler",
    }.items():
        (tmp_path / file).write_text(source_of(module).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def test_a_script_has_imports_names_and_property_reads_and_can_be_typed(folder):
    code = """
from minipaged.memory.block_allocator import BlockAllocator
from minipaged.memory.block_table import BlockTable
from minipaged.memory.swap import Swap
pool, other = BlockAllocator(8), BlockAllocator(4)
swap = Swap(pool, other)
table = BlockTable(pool, 2)
table.append_tokens(3)
child = table.fork()
child.append_tokens(1)
for _ in range(5):
    pool.share(0)
swap.swap_out([child])
try:
    table.append_tokens(99)
except RuntimeError:
    pass
table.slot(2), child.blocks, pool.num_free
"""
    script = watched(folder, code)
    assert script.splitlines() == [
        "from ch06_block_allocator import BlockAllocator",
        "from ch09_sharing import BlockTable",
        "from ch09_swap import Swap",
        "device = BlockAllocator(8)",
        "host = BlockAllocator(4)",
        "swap = Swap(device, host)",
        "A = BlockTable(device, 2)",
        "A.append_tokens(3)  # -> []",
        "B = A.fork()",
        "B.append_tokens(1)  # -> [(1, 2)]",
        "for _ in range(5): device.share(0)",
        "swap.swap_out([B])  # -> [(0, 0), (2, 1)]",
        "A.append_tokens(99)  # raises OutOfBlocks: 99 tokens need 49 blocks, 6 are free",
        "device.num_free  # -> 6",
    ]
    assert python(TYPE, cwd=folder, stdin=script) == "typed\n"


def test_a_script_of_the_scheduler_has_requests_with_their_lengths_and_can_be_typed(folder):
    code = f"""
sys.path.insert(0, {str(repository() / "tests")!r})
from serving_model import Engine
engine = Engine(6, 2, max_model_len=16, watermark=0.0)
engine.add([0] * 4, 3), engine.add([1, 2], 2, n=2, cache_salt="a")
for _ in range(3):
    engine.step()
"""
    script = watched(folder, code)
    assert "s0_0 = Sequence('0', 0, [0, 0, 0, 0], SamplingParams(max_tokens=3))  # 4 tokens of prompt" in script
    assert "SamplingParams(n=2, max_tokens=2, temperature=1.0), cache_salt='a')" in script
    assert "output = scheduler.schedule()  # s0_0 computes 0 to 3, s1_0 computes 0 to 1" in script
    assert "s0_0.outputs.append(Token(" in script
    assert "scheduler.update_from_output(output)" in script and "scheduler.finish(s1_0)" in script
    assert python(TYPE, cwd=folder, stdin=script) == "typed\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ch01_window_one_too_wide",
        "ch04_upper_half_lost",
        "ch05_freed_by_the_first_to_leave",
        "ch06_count_in_a_byte",
        "ch06_truncate_leaks",
        "ch09_fork_without_a_reference",
        "ch09_last_partial_block_not_swapped",
        "ch10_leak_on_abort",
        "ch13_columns_behind_the_last_unit",
    ],
)
def test_the_script_of_a_planted_bug_can_be_typed(name, tmp_path):
    bug = next(bug for bug in load_bugs() if bug.name == name)
    bug.plant(tmp_path)
    found = grade(chapter(bug.chapter), tmp_path)
    assert found.exit_code == WRONG
    script = "\n".join(call["call"] for call in found.first_wrong["script"])
    assert python(TYPE, cwd=tmp_path, stdin=script) == "typed\n"


# ---- values ----------------------------------------------------------------------------------------------------------

numbers = st.floats(-100, 100).map(lambda number: float(f"{number:.2g}")) | st.sampled_from(
    (float("nan"), float("inf"))
)


@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=3), data=st.data())
def test_a_small_array_is_written_out_and_a_large_one_says_where_its_nan_is(shape, data):
    size = int(np.prod(shape))
    array = np.array(data.draw(st.lists(numbers, min_size=size, max_size=size))).reshape(shape)
    for made in (array, torch.from_numpy(array)):
        text = typed.value(made, Log())
        if size <= typed.ELEMENTS_UP_TO:
            again = eval(text, {"np": np, "torch": torch})
            assert type(again) is type(made) and again.dtype == made.dtype
            np.testing.assert_array_equal(np.asarray(again), array)
        else:
            assert str(tuple(shape)) in text
            assert ("NaN at" in text) == bool(np.isnan(array).any())
    assert "NaN at (0, 1, 2)" in typed.value(np.where(np.arange(30).reshape(1, 5, 6) == 8, np.nan, 0.0), Log())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([7] * 30, "[7] * 30"),
        ([*range(3, 40)], "[*range(3, 40)]"),
        ((1,), "(1,)"),
        (None, "None"),
        (torch.zeros(2, 3, device="meta"), "torch.empty((2, 3), device='meta')"),
        (torch.tensor([[0, -1]], dtype=torch.int32), "torch.tensor([[0, -1]], dtype=torch.int32)"),
    ],
)
def test_other_values(value, text):
    assert typed.value(value, Log()) == text


def test_what_cannot_be_described_does_not_fail_a_test():
    class Hostile:
        def __repr__(self):
            raise KeyError

    assert typed.value([1, Hostile()], Log()) == "[1, Hostile(...)]"


# ---- the drawing -----------------------------------------------------------------------------------------------------


def state(blocks, num_free, tables, on=(), host=None):
    pools = {"device": {"num_blocks": 4, "num_free": num_free, "blocks": blocks}}
    if host:
        pools["host"] = host
    where = {name: "host" if name in on else "device" for name in tables}
    return {
        "tables": tables,
        "num_tokens": {name: 2 * len(held) for name, held in tables.items()},
        "block_size": 2,
        "on": where,
        "pools": pools,
    }


def drawn(noted):
    console = Console(width=100, file=io.StringIO(), record=True, force_terminal=False)
    console.print(draw(to_snapshot(noted), 100))
    return console.export_text()


def test_a_lost_block_is_drawn_as_lost():
    """Block 1 has a count, and no table names it: text and picture say the same numbers."""
    noted = state({"0": [1, 1, 0, 0], "1": [1, 0, 0, 0]}, 2, {"A": [0]})
    text = drawn(noted)
    assert "2 of 4 in use, 2 free" in text and "1     │ lost: in no table, its count is 1" in text
    assert disagreements(noted) == []
    held = state({"0": [1, 1, 0, 0], "1": [1, 0, 0, 1]}, 2, {"A": [0]})
    assert "taken by a call" in drawn(held) and disagreements(held) == []


def test_what_an_allocator_says_otherwise_is_said():
    lost = state({"0": [1, 1, 0, 0]}, 1, {"A": [0]})
    assert disagreements(lost) == ["The allocator says num_free = 1, and 3 of 4 blocks are not in use."]
    shared = state({"0": [1, 2, 0, 0]}, 3, {"A": [0], "B": [0]})
    assert disagreements(shared) == ["Block 0 is named by 2 tables, and its count is 1."]
    cached = state({"0": [2, 1, 1, 0], "2": [1, 0, 1, 0]}, 3, {"A": [0]})
    assert disagreements(cached) == [] and "A#" in drawn(cached)


def test_the_host_is_drawn_as_the_host_also_where_all_is_on_it():
    host = {"num_blocks": 3, "num_free": 1, "blocks": {"0": [1, 1, 0, 0], "2": [1, 1, 0, 0]}}
    text = drawn(state({}, 4, {"A": [0, 2]}, on="A", host=host))
    assert "0 of 4 in use, 4 free" in text and "HOST: 2 of 3 in use, 1 free" in text and "→ h2" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ch06_truncate_leaks", r"lost: in no table, its count is 1"),
        ("ch09_fork_without_a_reference", r"named by 2 tables, and its count is 1"),
    ],
)
def test_the_drawing_of_a_planted_bug_names_the_block(name, said, tmp_path):
    bug = next(bug for bug in load_bugs() if bug.name == name)
    bug.plant(tmp_path)
    wrong = grade(chapter(bug.chapter), tmp_path).first_wrong
    assert wrong["events"] <= SMALL
    console = Console(width=100, file=io.StringIO(), record=True, force_terminal=False)
    print_counterexample(wrong, console)
    assert said in console.export_text()
