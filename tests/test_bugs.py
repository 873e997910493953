"""The bug museum: every planted bug still applies, and its chapter's own suite kills it.

The proof runs each chapter's suite once a bug, so it takes a minute or two: `pytest -m bugs -s` prints its table.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from minipaged.course.chapters import CHAPTERS, repository
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


def test_every_bug_is_killed_by_its_chapters_suite(tmp_path):
    """And by a counterexample that can be read at a glance: few events, or few sequences."""
    report = tmp_path / "proof.json"
    command = [sys.executable, "-m", "minipaged.course.prove", "--json", str(report)]
    done = subprocess.run(command, cwd=repository(), capture_output=True, text=True, check=False)
    print("\n" + done.stdout)
    rows = json.loads(report.read_text(encoding="utf-8"))
    skipped = set() if find_spec("triton") else {8}
    survivors = [row["bug"] for row in rows if not row["killed"] and row["chapter"] not in skipped]
    assert not survivors, f"no property of their chapter refuses {survivors}"
    large = [row["bug"] for row in rows if row["events"] > SMALL and row["sequences"] > 2]
    assert not large, f"counterexamples of {large} take more than {SMALL} events and 2 sequences"
