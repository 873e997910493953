"""The grader: what it says of the exercises as they ship, of the reference, and of a planted bug."""

import io
import re
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from minipaged.course import hints, state
from minipaged.course.chapters import CHAPTERS, chapter, repository
from minipaged.course.generate import source_of
from minipaged.course.grade import HOLDS, NOT_WRITTEN, SMALL, WRONG, grade
from minipaged.course.hunt import hunt, in_order
from minipaged.course.museum import load_bugs
from minipaged.course.progress import print_progress
from minipaged.course.properties import PROPERTIES, grade_properties
from minipaged.course.report import print_counterexample, print_grade

SHIPPED = repository() / "tutorials" / "exercises"
# Chapters of plain Python: the others need seconds for their libraries. `make test` tries one of them.
PLAIN = [6, *(pytest.param(number, marks=pytest.mark.slow) for number in (4, 5, 9, 10, 13))]


def console():
    return Console(width=100, record=True, file=io.StringIO(), force_terminal=False)


def printed(*calls):
    to = console()
    for call in calls:
        call(to)
    return to.export_text()


@pytest.fixture
def folder(tmp_path):
    """The exercises as a learner has them on the first day."""
    for path in SHIPPED.glob("ch*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", PLAIN)
def test_what_ships_is_not_written_and_the_reference_holds(number, folder):
    shipped = grade(chapter(number), folder, examples=3)
    assert shipped.exit_code == NOT_WRITTEN and not shipped.having("wrong") and not shipped.errors
    assert "not written" in printed(lambda to: print_grade(shipped, to))
    for exercise in chapter(number).exercises:
        shutil.copy(source_of(exercise.module), folder / exercise.file)
    reference = grade(chapter(number), folder, examples=3)
    assert reference.exit_code == HOLDS, reference.first_wrong
    assert "WRONG" not in printed(lambda to: print_grade(reference, to))


@pytest.mark.slow
def test_a_chapter_can_be_done_before_the_ones_before_it(folder):
    """Chapter 6 is not written, and chapter 9 is judged all the same."""
    for exercise in chapter(9).exercises:
        shutil.copy(source_of(exercise.module), folder / exercise.file)
    assert grade(chapter(9), folder, examples=5).exit_code == HOLDS


@pytest.mark.slow
def test_a_planted_bug_is_shown_by_a_small_script_drawn(tmp_path):
    bug = next(bug for bug in load_bugs() if bug.name == "ch09_fork_without_a_reference")
    bug.plant(tmp_path)
    found = grade(chapter(9), tmp_path)
    assert found.exit_code == WRONG and found.first_wrong["events"] <= SMALL
    text = printed(lambda to: print_grade(found, to), lambda to: print_counterexample(found.first_wrong, to))
    assert re.search(r"Found +2 tables name block 0, and its count is 1", text)
    assert "B = A.fork()" in text, "a line that can be typed"
    assert text.count("LOGICAL") == 2, "the block tables before and after"
    assert "\x1b" not in text, "no escape sequence in a pipe"
    assert max(map(len, text.splitlines())) < 240


def test_a_file_that_is_no_python_is_named(tmp_path):
    (tmp_path / "ch06_block_allocator.py").write_text("class BlockAllocator:\n    def allocate(self:\n")
    found = grade(chapter(6), tmp_path, examples=5)
    assert found.exit_code == WRONG
    text = printed(lambda to: print_grade(found, to))
    assert "cannot be imported" in text and "SyntaxError" in text


def test_there_is_a_hint_for_every_failure_and_the_next_one_on_request(tmp_path):
    assert set(hints.all_hints()) == set(CHAPTERS)
    for number, found in hints.all_hints().items():
        assert [hint for hint in found if "of" not in hint] == found[-1:], "the last takes what no other does"
        assert all(len({hint["look"], hint["wrong"], hint["tell"]}) == 3 for hint in found)
        suites = [path for pattern in chapter(number).suites for path in (repository() / "tests").glob(pattern)]
        models = (repository() / "tests").glob("*_model.py")
        said = " ".join(path.read_text(encoding="utf-8") for path in [*suites, *models])
        lost = [words for hint in found for words in hint.get("of", ()) if words not in said and words != "nan"]
        assert not lost, f"chapter {number}: no property says {lost}"
    levels = [state.next_level(tmp_path, 6, "a", asked, 3) for asked in (False, False, True, True, True)]
    assert levels == [1, 1, 2, 3, 3]
    assert state.next_level(tmp_path, 6, "another failure", True, 3) == 1
    (tmp_path / state.FILE).write_text("no JSON")
    assert state.next_level(tmp_path, 6, "a", True, 3) == 1, "a damaged file counts as none"


def test_what_a_learners_code_says_chooses_no_hint():
    here = hints.hints_for(6, {"check": "test_truncate_does_not_lengthen", "message": "a block was handed out"})
    assert here == hints.hints_for(6, {"check": "test_truncate_does_not_lengthen"})


def test_a_hunt_shows_nothing_of_a_chapter_that_is_not_done(tmp_path):
    to = console()
    assert hunt(None, tmp_path / "hunt", None, to, tmp_path) == NOT_WRITTEN
    assert "No puzzle is left" in to.export_text() and not (tmp_path / "hunt").exists()


def test_progress_is_a_map_of_all_chapters(folder):
    assert print_progress(folder, console()) == NOT_WRITTEN
    shutil.copy(source_of("minipaged.reference"), folder / "ch01_masked_attention.py")
    state.remember(folder, "chapters", "1", {"code": HOLDS, "holds": 18, "of": 18})
    state.remember(folder, "chapters", "6", {"code": WRONG, "holds": 3, "of": 36})
    text = printed(lambda to: print_progress(folder, to))
    assert text.startswith(str(folder))
    assert "[x] masked attention" in text and "4/4   18 of 18 hold" in text
    assert "[!] the block allocator" in text and f"1 of {len(CHAPTERS)} chapters are done" in text


@pytest.mark.slow
@pytest.mark.parametrize("number", PROPERTIES)
def test_a_right_property_is_good_and_what_ships_is_not_written(number):
    if number == 7:
        pytest.importorskip("torch")
    good = grade_properties(chapter(number), repository() / "tests" / "property_solutions")
    assert [verdict.code for verdict in good] == [HOLDS] * len(good), good
    assert {verdict.code for verdict in grade_properties(chapter(number), SHIPPED)} == {NOT_WRITTEN}


@pytest.mark.slow
def test_a_property_that_says_nothing_or_too_much_is_not_good(tmp_path):
    names = list(PROPERTIES[10])
    (tmp_path / "ch10_properties.py").write_text(f"def {names[0]}(): pass\n\n\ndef {names[1]}(): assert False, 'no'\n")
    weak, strict = grade_properties(chapter(10), tmp_path)
    assert weak.code == strict.code == WRONG
    assert weak.missed and not weak.problem
    assert "no" in strict.problem


def test_a_hunt_takes_the_function_and_the_line(tmp_path):
    puzzles = in_order(load_bugs())
    number = next(n for n, bug in enumerate(puzzles, start=1) if bug.name == "ch06_not_translated")
    bug = puzzles[number - 1]
    line = bug.lines().start
    to = console()
    assert hunt(number, tmp_path, f"BlockTable.slot:{line}", to) == HOLDS
    assert "The slot is that of the logical block" in to.export_text()
    assert hunt(number, tmp_path, f"slot:{line}", console()) == HOLDS
    assert hunt(number, tmp_path, f"slot:{line + 30}", console()) == WRONG
    assert hunt(number, tmp_path, f"BlockTable.fork:{line}", console()) == WRONG
    for wrong in ("slot", "slot:x", ""):
        with pytest.raises(ValueError, match="FUNCTION:LINE"):
            hunt(number, tmp_path, wrong, console())
    with pytest.raises(ValueError, match="there are 1 to"):
        hunt(len(puzzles) + 1, tmp_path, "f:1", console())


def command(*arguments, cwd=None):
    run = [sys.executable, "-m", "minipaged", *map(str, arguments)]
    return subprocess.run(run, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_start_overwrites_nothing(tmp_path):
    folder = tmp_path / "mine"
    assert command("start", folder).returncode == 0
    shipped = {path.name for path in SHIPPED.glob("ch*.py")}
    assert {path.name for path in folder.iterdir()} == shipped
    (folder / "ch06_block_table.py").write_text("# mine\n")
    (folder / "ch01_masked_attention.py").unlink()
    again = command("start", folder)
    assert "1 exercises copied" in again.stdout
    assert (folder / "ch06_block_table.py").read_text() == "# mine\n"
    assert {path.name for path in folder.iterdir()} == shipped


@pytest.mark.slow
def test_exit_codes_and_errors_of_the_commands(tmp_path):
    folder = tmp_path / "mine"
    command("start", folder)
    checked = command("check", 6, cwd=folder)
    assert (checked.returncode, checked.stderr) == (NOT_WRITTEN, "")
    assert re.search(r"Of (\d+) properties \1 are not written yet", checked.stdout) and "\x1b" not in checked.stdout
    for exercise in chapter(6).exercises:
        shutil.copy(source_of(exercise.module), folder / exercise.file)
    assert command("check", 6, "--impl", folder).returncode == HOLDS
    assert re.search(r"13/13 +(\d+) of \1 hold", command("progress", "--impl", folder).stdout)
    for bad in (("check", 11), ("check", 6, "--impl", tmp_path / "no"), ("check", 5, "--properties"), ("hunt", 1000)):
        refused = command(*bad, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


def test_without_the_repository_it_says_what_is_missing(tmp_path):
    """As from an installed wheel, which brings neither tests/ nor tutorials/."""
    site = tmp_path / "site"
    shutil.copytree(repository() / "minipaged", site / "minipaged", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from minipaged.course.chapters import repository; repository()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "clone minipaged" in done.stderr
