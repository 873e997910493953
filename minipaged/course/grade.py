"""Runs a chapter's suite over a learner's files, in a process of its own, and reads what the plugin found."""

import json
import os
import re
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

HOLDS, WRONG, NOT_WRITTEN, STOPPED = 0, 1, 3, 130  # exit codes; 2 is a mistake in the command
SMALL = 6  # calls that change something: a script of so many is read at a glance
EVERY = "MINIPAGED_EVERY"  # an environment variable: no test is left out behind a counterexample
SECONDS_TO_STOP = 100  # after Ctrl-C, which pytest is told too; a second one ends it at once


@dataclass
class Grade:
    """What one run of a suite says."""

    chapter: Chapter
    findings: list[dict[str, Any]]
    errors: list[str] = field(default_factory=list)  # files that could not be imported
    stubs: dict[str, list[str]] = field(default_factory=dict)  # file -> what is still to be written
    used: list[Path] = field(default_factory=list)  # the learner's files that took part
    only: str = ""  # the part that was checked alone

    def having(self, *outcomes: str) -> list[dict[str, Any]]:
        return [finding for finding in self.findings if finding["outcome"] in outcomes]

    @property
    def first_wrong(self) -> dict[str, Any] | None:
        """The first one whose script can be read at a glance; where there is none, the one with the shortest."""
        wrong = self.having("wrong") or self.having("stopped")
        return min(wrong, key=lambda finding: max(finding["events"], SMALL), default=None)

    @property
    def exit_code(self) -> int:
        """HOLDS only if something holds and nothing is left that was not tried."""
        if self.errors or self.having("wrong"):
            return WRONG
        if self.having("stopped"):
            return STOPPED
        untried = self.having("not written", "not tried") or any(self.stubs.values())
        return NOT_WRITTEN if untried or not self.having("holds") else HOLDS


def grade(chapter: Chapter, folder: Path, examples: int | None = None, only: str = "") -> Grade:
    """Run the suite of a chapter with the modules of `folder`. Raises ValueError where it cannot be run at all."""
    for package in ("pytest", "hypothesis"):
        if find_spec(package) is None:
            raise ValueError(f"the suites need {package}, which is not installed: pip install 'minipaged[dev]'")
    used = list(choose(folder, {chapter.number}, only).values())
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "output").open("w+") as output:
        report = Path(scratch) / "report.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments(chapter, folder, only)],
            cwd=repository(),
            env={**os.environ, **environment(chapter, report, examples)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
            code = STOPPED
        finally:
            process.kill()
        if not report.is_file():
            output.seek(0)
            said = output.read().strip().splitlines()
            raise ValueError(f"pytest did not run: {said[-1] if said else f'it ended with code {code}'}")
        return read(chapter, report, used, code, only)


def arguments(chapter: Chapter, folder: Path, only: str = "") -> list[str]:
    """What pytest is called with."""
    tests = repository() / "tests"
    suites = [str(path) for pattern in chapter.suites for path in sorted(tests.glob(pattern))]
    marks = ["-m", f"ch{chapter.number:02d} and not smollm2 and not oracle"]
    quiet = ["-p", "minipaged.course.plugin", "-p", "no:cacheprovider", "-q", "--tb=no"]
    part = ["--only", only] if only else []
    return [*quiet, "--impl", str(folder.resolve()), *part, *marks, *suites]


def environment(chapter: Chapter, report: Path, examples: int | None = None) -> dict[str, str]:
    """What pytest and our plugin are told beside that."""
    return {
        REPORT: str(report),
        "HYPOTHESIS_PROFILE": "course",
        "PYTHONHASHSEED": "0",  # the order of a set of strings is part of the answer
        "MINIPAGED_EXAMPLES": str(examples or chapter.examples),
        "MINIPAGED_DESELECT": ",".join(chapter.deselect),
    }


def read(chapter: Chapter, report: Path, used: list[Path], code: int = 0, only: str = "") -> Grade:
    """The grade out of the plugin's file."""
    found = json.loads(report.read_text(encoding="utf-8"))
    if found["running"]:  # pytest did not come to its end
        found["findings"].append(_ended(found["running"], report.with_suffix(".stack"), used, code))
    asked = {exercise.file for exercise in chapter.exercises}
    stubs = {path.name: unwritten(path) for path in used if path.name in asked}
    if only and only not in stubs:
        stubs = {file: [name for name in names if name.partition(".")[0] == only] for file, names in stubs.items()}
    return Grade(chapter, found["findings"], found["errors"], stubs, used, only)


def _ended(running: str, stack: Path, used: list[Path], code: int) -> dict[str, Any]:
    """A property in which the process ended: by the exercise itself, by the system, or after twice the limit."""
    lines = re.findall(r'File "([^"]+)", line (\d+) in (\w+)', stack.read_text() if stack.is_file() else "")
    theirs = [f"{Path(file).name}:{line}, in {name}" for file, line, name in lines if Path(file) in used]
    said = f"it did not end: {theirs[0]}" if theirs else f"the process ended here, with code {code}"
    return {
        "test": running,
        "property": running,
        "about": "",
        "outcome": "stopped" if code == STOPPED else "wrong",
        "error": "TimeLimit" if theirs else "Ended",
        "message": said,
        "check": running,
        "where": theirs[0].partition(",")[0] if theirs else "",
        "script": [],
        "events": 0,
        "examples": None,
    }
