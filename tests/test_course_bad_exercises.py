"""No bad exercise passes: what is missing, ends the run, skips, does not end, prints, or is ours by another name."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.course.chapters import CHAPTERS, chapter, repository
from minipaged.course.generate import source_of, write_solutions
from minipaged.course.grade import HOLDS, NOT_WRITTEN, STOPPED, WRONG, grade
from minipaged.course.impl import unwritten
from minipaged.course.museum import load_bugs
from strategies import costly

SHIPPED = repository() / "tutorials" / "exercises"
FILES = {exercise.file: exercise.module for exercise in chapter(6).exercises}
FUNCTIONS = [(file, name) for file in FILES for name in unwritten(SHIPPED / file)]

ENDS = {  # a statement, at the import or in a function
    "exits": "import sys; sys.exit(0)",
    "ends the process": "import os; os._exit(0)",
    "ends pytest": "import pytest; pytest.exit('all hold', 0)",
    "skips": "import pytest; pytest.skip('not here', allow_module_level=True)",
    "skips as unittest does": "import unittest; raise unittest.SkipTest('no')",
    "expects to fail": "import pytest; pytest.xfail('later')",
    "refuses every example": "import hypothesis; hypothesis.assume(False)",
    "does not end": "while True: pass",
    "does not end, and catches all": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
}
TAKES_OURS = {  # the whole of a file
    "by its name": "from {module} import *",
    "past the finder": "import sys\nsys.meta_path.pop(0)\ndel sys.modules[__name__]\nfrom {module} import *",
    "by its path": "import runpy\nglobals().update(runpy.run_path({path!r}))",
    "by its text": "exec(open({path!r}).read())",
    "under another name": "import importlib.util as u\ns = u.spec_from_file_location('x', {path!r})\n"
    "m = u.module_from_spec(s)\ns.loader.exec_module(m)\nglobals().update(vars(m))",
    "as the reference kept aside": "from {module}__ours import *",
    "and prints": "print('Of 36 properties 36 hold.')",
}


def changed(source, name, statement):
    """The source, with a function that does this and nothing else; without it where there is no statement."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and f"{node.name}.{inner.name}" == name:
                    if statement is None:
                        node.body.remove(inner)
                    else:
                        inner.body = ast.parse(statement).body
    return ast.unparse(tree)


@st.composite
def bad_files(draw):
    """(a file, its text): bad in one way, and right in all others."""
    file, name = draw(st.sampled_from(FUNCTIONS))
    module = FILES[file]
    source = source_of(module).read_text(encoding="utf-8")
    class_name, _, function = name.partition(".")
    return file, draw(
        st.one_of(
            st.sampled_from(["", "pass", f"class {class_name}: pass"]),
            st.just(changed(source, name, None)),
            st.just(source.replace(f"def {function}(", f"def {function}_(")),
            st.just(source.replace(f"class {class_name}", f"class My{class_name}")),
            st.sampled_from(sorted(ENDS.values())).map(lambda ends: changed(source, name, ends)),
            st.sampled_from(sorted(ENDS.values())).map(lambda ends: f"{ends}\n{source}"),
            st.just(changed(source, name, "print('it holds')")),
            st.sampled_from(sorted(TAKES_OURS.values())).map(
                lambda text: text.format(module=module, path=str(source_of(module)))
            ),
        )
    )


@pytest.fixture
def solved(tmp_path):
    folder = tmp_path / "solved"
    folder.mkdir()
    write_solutions(folder)
    return folder


def graded(folder, number, examples=3, seconds=30, **options):
    """seconds: what an example may compute. Ten times what the slowest needs, since a busy machine computes slowly."""
    with mock.patch.dict(os.environ, MINIPAGED_SECONDS=str(seconds)):
        return grade(chapter(number), folder, examples, **options)


@pytest.mark.slow
@costly(0.2)
@given(bad=bad_files())
def test_no_bad_exercise_passes(solved, bad):
    file, text = bad
    (solved / file).write_text(text, encoding="utf-8")
    try:
        found = graded(solved, 6, seconds=10)  # what catches all is ended after twenty times as long
        assert found.exit_code in (WRONG, NOT_WRITTEN), (file, text, found)
    finally:
        shutil.copy(source_of(FILES[file]), solved / file)


def test_two_empty_files_are_not_written(tmp_path):
    for file in FILES:
        (tmp_path / file).write_text("", encoding="utf-8")
    found = graded(tmp_path, 6)
    assert found.exit_code == NOT_WRITTEN and not found.having("holds", "wrong")
    assert found.stubs == {file: unwritten(SHIPPED / file) for file in FILES}


@pytest.mark.parametrize(
    "ends",
    [
        "refuses every example",
        pytest.param("skips as unittest does", marks=pytest.mark.slow),
        pytest.param("expects to fail", marks=pytest.mark.slow),
    ],
)
def test_a_skip_of_the_exercises_own_is_wrong(ends, solved):
    file = "ch06_block_allocator.py"
    (solved / file).write_text(changed((solved / file).read_text(), "BlockAllocator.free", ENDS[ends]))
    found = graded(solved, 6)
    assert found.exit_code == WRONG and not found.having("skipped")


def test_a_loop_is_told_with_its_property_its_call_and_its_line(solved):
    """The other examples of chapter 5 take a tenth of a second."""
    file = "ch05_page_table.py"
    text = changed((solved / file).read_text(), "MultiLevelPageTable.unmap", "while True: pass")
    (solved / file).write_text(text)
    found = graded(solved, 5, seconds=3).first_wrong
    assert found["error"] == "TimeLimit" and found["property"]
    line = next(number for number, each in enumerate(text.splitlines(), start=1) if each.strip() == "while True:")
    assert f"{file}:{line}" in found["message"] or f"{file}:{line + 1}" in found["message"]
    assert "in unmap" in found["message"]
    assert re.search(r"\.unmap\(", found["script"][-1]["call"])


def test_an_error_at_the_import_has_a_file_and_a_line(solved):
    (solved / "ch06_block_allocator.py").write_text("import sys\n\nTOTAL = cdvi(3, 2)\n")
    found = graded(solved, 6)
    assert found.exit_code == WRONG
    assert found.errors == ["ch06_block_allocator.py:3: NameError: name 'cdvi' is not defined"]


def one_class_written(solved):
    """The other file is wrong, and the other classes of this one are not written."""
    (solved / "ch05_address_space.py").write_text("import sys; sys.exit(0)")
    text = (SHIPPED / "ch05_page_table.py").read_text()
    layout = ast.get_source_segment(source := source_of("minipaged.memory.page_table").read_text(), _class(source))
    (solved / "ch05_page_table.py").write_text(text.replace(ast.get_source_segment(text, _class(text)), layout))


def test_a_part_is_checked_alone(solved):
    one_class_written(solved)
    assert graded(solved, 5, only="AddressLayout").exit_code == HOLDS
    with pytest.raises(ValueError, match=r"it is none of .*ch05_page_table\.py, AddressLayout"):
        graded(solved, 5, only="AdressLayout")


@pytest.mark.slow
def test_a_file_is_checked_alone_and_what_is_not_written_does_not_hold(solved):
    one_class_written(solved)
    assert graded(solved, 5, only="MultiLevelPageTable").exit_code == NOT_WRITTEN
    shutil.copy(source_of("minipaged.memory.page_table"), solved / "ch05_page_table.py")
    assert graded(solved, 5, only="ch05_page_table.py").exit_code == HOLDS


def _class(source):
    return next(node for node in ast.parse(source).body if getattr(node, "name", "") == "AddressLayout")


def check(folder, number, *options, **settings):
    command = [sys.executable, "-m", "minipaged", "check", str(number), "--impl", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def test_ctrl_c_says_which_call_it_was(solved, tmp_path):
    mark = tmp_path / "mark"
    text = (solved / "ch05_page_table.py").read_text()
    loop = f"open({str(mark)!r}, 'w').close()\nwhile True: pass"
    (solved / "ch05_page_table.py").write_text(changed(text, "MultiLevelPageTable.map", loop))
    command = [sys.executable, "-m", "minipaged", "check", "5", "--impl", str(solved)]
    # A shell that starts the suite in the background has SIGINT ignored, and its children inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == STOPPED, said
    assert "Where it was stopped" in said and re.search(r"\.map\(", said)


@pytest.mark.slow
def test_the_line_for_more_examples_is_right_as_the_page_has_it(solved):
    page = (repository() / "docs" / "exercises.md").read_text(encoding="utf-8")
    [line] = re.findall(r"`HYPOTHESIS_PROFILE=thorough pytest (.*)`", page)
    arguments = line.replace("exercises", str(solved)).split()
    command = [sys.executable, "-m", "pytest", *arguments, "-k", "truncate"]
    done = subprocess.run(command, cwd=repository(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", CHAPTERS)
def test_the_reference_passes_each_chapter_as_a_learner_would_run_it(number, solved):
    done = check(solved, number)
    assert done.returncode == HOLDS, done.stdout


# `make bugs` checks them all.
SAMPLE = [bug for chapter_number in CHAPTERS for bug in [b for b in load_bugs() if b.chapter == chapter_number][:1]]


@pytest.mark.slow
@pytest.mark.bugs
@pytest.mark.parametrize("bug", SAMPLE, ids=lambda bug: bug.name)
def test_a_bug_among_right_files_is_refused_twice_in_the_same_words(bug, solved):
    bug.plant(solved)
    first = check(solved, bug.chapter)
    assert first.returncode == WRONG and "The first thing that is wrong" in first.stdout
    assert "Hint 1 of 3" in first.stdout
    assert check(solved, bug.chapter).stdout == first.stdout
