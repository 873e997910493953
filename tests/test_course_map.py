"""One map of the course: pages and the grader say of a chapter what it says, and what it names is there."""

import json
import re
from pathlib import Path

import course_tables
import pytest

from minipaged.course.chapters import CHAPTERS
from minipaged.course.chapters import chapter as graded
from minipaged.course.course_map import course_map

ROOT = Path(__file__).parent.parent
MAP = course_map()
EVERY = pytest.mark.parametrize("chapter", MAP.values(), ids=lambda chapter: f"ch{chapter.number:02d}")


def named_suites():
    patterns = {suite for chapter in MAP.values() for suite in chapter.suites}
    return {path.name for pattern in patterns for path in (ROOT / "tests").glob(pattern)}


@pytest.mark.parametrize("name", course_tables.TABLES)
def test_the_table_of_a_page_is_the_maps(name):
    assert (ROOT / name).read_text(encoding="utf-8") == course_tables.written(name), (
        "run: python tools/course_tables.py"
    )


def test_every_notebook_and_every_suite_of_a_chapter_is_in_the_map():
    assert list(MAP) == list(range(1, len(MAP) + 1))
    notebooks = {path.name for path in (ROOT / "tutorials").glob("[0-9][0-9]_*.ipynb")}
    assert {chapter.notebook for chapter in MAP.values()} == notebooks
    suites = {path.name for path in (ROOT / "tests").glob("test_ch[0-9][0-9]_*.py")}
    assert named_suites() == suites


@EVERY
def test_what_a_chapter_names_is_there(chapter):
    assert all(list(ROOT.glob(pattern)) for pattern in chapter.modules), chapter.modules
    first = "".join(json.loads((ROOT / "tutorials" / chapter.notebook).read_text())["cells"][0]["source"])
    assert first.startswith(f"# Chapter {chapter.number}. "), chapter.notebook
    found = re.search(r"\*\*Minutes\.\*\* About (\d+) ", first)
    assert found and int(found[1]) == chapter.minutes, f"the notebook says {found and found[1]} minutes"


@EVERY
def test_a_chapter_is_graded_or_says_what_it_has_instead(chapter):
    assert (chapter.number in CHAPTERS) != bool(chapter.command)
    if chapter.command:
        with pytest.raises(ValueError, match=re.escape(chapter.command)):
            graded(chapter.number)
    else:
        assert set(CHAPTERS[chapter.number].suites) <= named_suites()
        assert CHAPTERS[chapter.number].suites[0] == chapter.suites[0]


def test_a_chapter_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=f"there are chapters 1 to {len(MAP)}"):
        graded(len(MAP) + 1)
