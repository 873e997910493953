"""Runs a chapter's suite over a learner's files, in a process of its own, and reads what the plugin found."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minipaged.course.chapters import Chapter, repository
from minipaged.course.impl import choose, unwritten
from minipaged.course.recorder import REPORT

HOLDS, WRONG, NOT_WRITTEN = 0, 1, 3  # exit codes; 2 is a mistake in the command
SMALL = 6  # calls that change something: a script of so many is read at a glance


@dataclass
class Grade:
    """What one run of a suite says."""

    chapter: Chapter
    findings: list[dict[str, Any]]
    errors: list[str] = field(default_factory=list)  # files that could not be imported
    stubs: dict[str, list[str]] = field(default_factory=dict)  # file -> what is still to be written
    used: list[Path] = field(default_factory=list)  # the learner's files that took part

    def having(self, *outcomes: str) -> list[dict[str, Any]]:
        return [finding for finding in self.findings if finding["outcome"] in outcomes]

    @property
    def first_wrong(self) -> dict[str, Any] | None:
        """The first one whose script can be read at a glance; where there is none, the one with the shortest."""
        wrong = self.having("wrong")
        return min(wrong, key=lambda finding: max(finding["events"], SMALL), default=None)

    @property
    def exit_code(self) -> int:
        if self.errors or self.having("wrong"):
            return WRONG
        return NOT_WRITTEN if self.having("not written") or any(self.stubs.values()) else HOLDS


def grade(chapter: Chapter, folder: Path, examples: int | None = None) -> Grade:
    """Run the suite of a chapter with the modules of `folder`. Raises ValueError where it cannot be run at all."""
    for package in ("pytest", "hypothesis"):
        if find_spec(package) is None:
            raise ValueError(f"the suites need {package}, which is not installed: pip install 'minipaged[dev]'")
    used = list(choose(folder, {chapter.number}).values())
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments(chapter, folder)],
            cwd=repository(),
            env={**os.environ, **environment(chapter, report, examples)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.is_file():
            said = (done.stderr or done.stdout).strip().splitlines()
            raise ValueError(f"pytest did not run: {said[-1] if said else f'it ended with code {done.returncode}'}")
        return read(chapter, report, used)


def arguments(chapter: Chapter, folder: Path) -> list[str]:
    """What pytest is called with."""
    tests = repository() / "tests"
    suites = [str(path) for pattern in chapter.suites for path in sorted(tests.glob(pattern))]
    only = ["-m", f"ch{chapter.number:02d} and not smollm2 and not oracle"]
    quiet = ["-p", "minipaged.course.plugin", "-p", "no:cacheprovider", "-q", "--tb=no"]
    return [*quiet, "--impl", str(folder.resolve()), *only, *suites]


def environment(chapter: Chapter, report: Path, examples: int | None = None) -> dict[str, str]:
    """What pytest and our plugin are told beside that."""
    return {
        REPORT: str(report),
        "HYPOTHESIS_PROFILE": "course",
        "MINIPAGED_EXAMPLES": str(examples or chapter.examples),
        "MINIPAGED_DESELECT": ",".join(chapter.deselect),
    }


def read(chapter: Chapter, report: Path, used: list[Path]) -> Grade:
    """The grade out of the plugin's file."""
    found = json.loads(report.read_text(encoding="utf-8"))
    files = {exercise.file for exercise in chapter.exercises}
    stubs = {path.name: unwritten(path) for path in used if path.name in files}
    return Grade(chapter, found["findings"], found["errors"], stubs, used)
