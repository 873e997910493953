"""A pytest plugin: what a chapter's suite found, as one JSON file. `minipaged check` starts pytest with it.

Each test is one property. It holds, it is wrong, it is not written yet (a stub was called), or it was not tried: once
something is wrong, a learner waits for the answer and not for the rest of the list.
"""

import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minipaged.course import recorder
from minipaged.course.grade import SMALL
from minipaged.course.impl import not_written

SECONDS_AFTER_A_FAILURE = 6.0
SHRINKING_SECONDS = 8  # Hypothesis' own limit is 300: a smaller counterexample is worth less than an answer now
NO_LIMIT = "steps"  # of MINIPAGED_SHRINK: shrinking ends by Hypothesis' own count of steps, on any machine the same

_findings: list[dict[str, Any]] = []
_errors: list[str] = []
_first_wrong = float("inf")


def pytest_configure(config: pytest.Config) -> None:
    from hypothesis import stateful
    from hypothesis.internal.conjecture import engine

    if hasattr(engine, "MAX_SHRINKING_SECONDS"):
        limit = os.environ.get("MINIPAGED_SHRINK", str(SHRINKING_SECONDS))
        engine.MAX_SHRINKING_SECONDS = sys.maxsize if limit == NO_LIMIT else int(limit)
    start = stateful.RuleBasedStateMachine.__init__

    @functools.wraps(start)
    def restarted(self: Any) -> None:
        recorder.log.clear()
        start(self)

    stateful.RuleBasedStateMachine.__init__ = restarted  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gone = [name for name in os.environ.get("MINIPAGED_DESELECT", "").split(",") if name]
    items[:] = [item for item in items if not any(name in item.name for name in gone)]
    for name in recorder.WATCHED:
        if name in sys.modules:
            recorder.watch_classes(sys.modules[name])
    for item in items:
        _restart_with_each_example(item)


def _restart_with_each_example(item: pytest.Item) -> None:
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None or getattr(handle.inner_test, "restarts", False):
        return
    inner = handle.inner_test

    @functools.wraps(inner)
    def restarted(*arguments: Any, **options: Any) -> Any:
        recorder.log.clear()
        try:
            return inner(*arguments, **options)
        except Exception as error:
            if (name := not_written(error)) is not None:
                pytest.skip(f"not written: {name}")  # there is nothing to shrink
            raise

    restarted.restarts = True  # type: ignore[attr-defined]
    handle.inner_test = restarted


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - _first_wrong > SECONDS_AFTER_A_FAILURE:
        pytest.skip("not tried")
    recorder.log.clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    global _first_wrong
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        finding = _finding(item, call, report.outcome)
        _findings.append(finding)
        if finding["outcome"] == "wrong":
            _first_wrong = min(_first_wrong, time.monotonic())
            if "MINIPAGED_STOP" in os.environ and finding["events"] <= SMALL:
                item.session.shouldstop = "a small counterexample is found"


def _finding(item: pytest.Item, call: pytest.CallInfo[None], outcome: str) -> dict[str, Any]:
    error = call.excinfo.value if call.excinfo else None
    finding: dict[str, Any] = {
        "test": item.nodeid.rpartition("/")[2],
        "property": in_words(item),
        "about": _about(item),
        "outcome": {"passed": "holds", "failed": "wrong", "skipped": "skipped"}[outcome],
        "seconds": round(call.duration, 3),
        "examples": _examples(getattr(item, "hypothesis_statistics", "")),
        "shrunk": "shrinking was very slow" not in getattr(item, "hypothesis_statistics", ""),
    }
    said = str(error or "")
    if outcome == "skipped":
        finding["outcome"] = "not tried" if said == "not tried" else "skipped"
        if said.startswith("not written: "):
            finding |= {"outcome": "not written", "unwritten": said.partition(": ")[2]}
    elif error is not None and (name := not_written(error)) is not None:
        finding |= {"outcome": "not written", "unwritten": name}
    elif error is not None:
        script = recorder.log.script()
        finding |= {
            "error": type(error).__name__,
            "message": said.strip()[:1500],
            "where": _where(call),
            "script": script,
            "events": sum(not call["look"] and not call["made"] for call in script),
        }
    return finding


def _where(call: pytest.CallInfo[None]) -> str:
    """The last line of the traceback that is not a library's: file and line."""
    assert call.excinfo is not None
    here = [
        entry
        for entry in call.excinfo.traceback
        if "site-packages" not in str(entry.path) and "/course/" not in str(entry.path)
    ]
    return f"{Path(str(here[-1].path)).name}:{here[-1].lineno + 1}" if here else ""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    suite = report.nodeid.rpartition("/")[2]
    blank = {"test": suite, "about": "", "seconds": 0.0, "examples": None}
    if report.skipped and isinstance(report.longrepr, tuple):
        _findings.append(blank | {"property": f"all of {suite}: {report.longrepr[2]}", "outcome": "skipped"})
    if not report.failed:
        return
    said = str(report.longrepr)
    stub = re.search(r"NotImplementedError: (?:ch\d\d|not in \w+\.py): ([\w.]+)", said)
    if stub is None:
        _errors.append(said)
        return
    words = f"all of {suite}, which begins with {stub[1]}"
    _findings.append(blank | {"property": words, "outcome": "not written", "unwritten": stub[1]})


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get(recorder.REPORT)
    if path:
        Path(path).write_text(json.dumps({"findings": _findings, "errors": _errors}), encoding="utf-8")


def in_words(item: pytest.Item) -> str:
    """test_each_block_is_handed_out_once[3] -> each block is handed out once (3)."""
    name = item.name
    if name == "runTest":
        return f"any script of calls, in any order: {getattr(item.parent, 'name', '').removeprefix('Test')}"
    stem, _, case = name.removeprefix("test_").partition("[")
    return stem.replace("_", " ") + (f" ({case.removesuffix(']')})" if case else "")


def _about(item: pytest.Item) -> str:
    """The first line of the test's docstring, or of its state machine's."""
    documented = getattr(item, "obj", None)
    if item.name == "runTest":
        machine = getattr(item.parent, "obj", type(None)).__name__.partition(".")[0]
        documented = getattr(getattr(item, "module", None), machine, None)
    return (getattr(documented, "__doc__", None) or "").strip().partition("\n")[0]


def _examples(statistics: str) -> int | None:
    """How many examples Hypothesis ran until it had its answer."""
    counts = re.findall(r"(\d+) (passing|failing|invalid)", statistics.partition("shrink phase")[0])
    return sum(int(number) for number, _ in counts) if counts else None
