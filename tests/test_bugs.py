"""The bug museum: every planted bug still applies. That its chapter's own suite kills it, is proved by `make bugs`."""

import pytest

from minipaged.course import prove
from minipaged.course.chapters import CHAPTERS
from minipaged.course.generate import source_of
from minipaged.course.grade import SMALL
from minipaged.course.museum import function_at, load_bugs

BUGS = load_bugs()
pytestmark = pytest.mark.bugs


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_applies_to_the_reference_as_it_is_today(bug):
    source = source_of(bug.module).read_text(encoding="utf-8")
    planted = bug.planted()  # raises where its lines are not there exactly once
    assert planted != source
    changed = sum(a != b for a, b in zip(source.splitlines(), planted.splitlines(), strict=False))
    assert len(bug.lines()) <= 6 or changed <= 6, "a bug is a few lines"
    assert bug.chapter == int(bug.name[2:4]) == bug.exercise.chapter
    assert bug.functions(), "a learner must be able to name the function"
    assert bug.about.strip().endswith(".") and bug.source


def test_there_are_thirty_bugs_and_some_in_every_chapter():
    assert len(BUGS) >= 30
    assert {bug.chapter for bug in BUGS} == set(CHAPTERS)
    assert len({bug.planted() for bug in BUGS}) == len(BUGS)


def test_a_line_belongs_to_its_function():
    source = "def f():\n    return 1\n\n\nclass C:\n    def g(self):\n        return 2\n"
    assert [function_at(source, line) for line in range(1, 8)] == ["f", "f", "", "", "", "C.g", "C.g"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, None),
        ({"killed": False}, "SURVIVES"),
        ({"events": SMALL + 1}, "LARGE"),
        ({"events": SMALL + 1, "sequences": 2}, None),
    ],
)
def test_the_proof_refuses_a_survivor_and_a_counterexample_that_is_not_read_at_a_glance(row, said):
    whole = {"bug": "b", "chapter": 6, "killed": True, "property": "p", "examples": 1, "events": SMALL, "sequences": 3}
    whole |= row
    assert prove.complaint(whole) == said
    assert said is None or said in prove.line(whole)
