"""A line for each chapter in the place of a dot for each test: `pytest --by-chapter`, with or without pytest-xdist.

    chapter  6  the block allocator and the block table        31 passed               2.1 s
    chapter  8  the Triton kernels                             92 passed  1 skipped   14.0 s

A line is printed when the last test of its part has ended; the seconds are those of its tests, added up over all
processes. A failure is named as soon as it is known. Skips are counted here, and their reasons stand at the end.
"""

import re
from collections import Counter

import pytest

from minipaged.course.chapters import CHAPTERS

TITLES = {number: chapter.title for number, chapter in CHAPTERS.items()}
TITLES |= {11: "the simulator, the design space", 14: "the conformance kit"}
PARTS = {
    "bugs": "the museum of bugs",
    "cli": "the command line",
    "course": "the grader and the exercises",
    "fetch": "the model's download",
    "memory": "traces and imports",
    "notebooks": "the notebooks",
    "server": "the server",
    "oracle": "beside transformers",
    "smollm2": "SmolLM2",
    "viz": "the pictures",
}


def pytest_addoption(parser):
    parser.addoption("--by-chapter", action="store_true", help="print a line a chapter instead of a dot a test")


@pytest.hookimpl(trylast=True)  # after the terminal's own reporter is there
def pytest_configure(config):
    if config.getoption("--by-chapter") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ByChapter(config), "by-chapter")


def part_of(nodeid: str) -> str:
    """The words that name the part of the suite that a test belongs to, by its file's name."""
    stem = nodeid.partition("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")
    chapter = re.match(r"ch(\d\d)_", stem)
    if chapter:
        return f"chapter {int(chapter[1]):2}  {TITLES[int(chapter[1])]}"
    return f"{'':12}{PARTS.get(stem.partition('_')[0], stem)}"


class ByChapter:
    def __init__(self, config: pytest.Config):
        self.config = config
        self.left: Counter[str] = Counter()  # tests of each part that have not ended
        self.outcomes: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()
        self.failed: set[str] = set()

    def pytest_collection_finish(self, session):
        if not self.left:  # under pytest-xdist the items are in the workers, and this list is empty
            self.left.update(part_of(item.nodeid) for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        if not self.left:  # every worker has the same list
            self.left.update(map(part_of, ids))

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        """Counted as always, and no letter printed."""
        if report.failed:
            return ("error" if report.when != "call" else "failed"), "", ""
        if report.skipped and not hasattr(report, "wasxfail"):
            return "skipped", "", ""
        if report.passed and report.when == "call":
            return "passed", "", ""
        return None

    def pytest_runtest_logreport(self, report):
        part = part_of(report.nodeid)
        self.seconds[part] += report.duration
        counts = self.outcomes.setdefault(part, Counter())
        if report.failed:
            counts["failed"] += 1
            self.failed.add(report.nodeid)
            self.say(f"FAILED  {report.nodeid}", red=True)
        elif report.skipped:
            counts["skipped"] += 1
        elif report.when == "call":
            counts["passed"] += 1
        if report.when == "teardown":
            self.left[part] -= 1
            if not self.left[part]:
                self.line(part)

    def line(self, part: str) -> None:
        counts = self.outcomes[part]
        words = "  ".join(f"{counts[what]:3} {what}" for what in ("passed", "failed", "skipped") if counts[what])
        self.say(f"{part:<58} {words:<25} {self.seconds[part]:6.1f} s", red=bool(counts["failed"]))

    def say(self, words: str, red: bool) -> None:
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(words, red=red)
