"""A pytest plugin: what a chapter's suite found, as one JSON file. `minipaged check` starts pytest with it.

Each test is one property. It holds, it is wrong, it is not written yet (a stub was called), or it was not tried: behind
the first small counterexample the rest is left, and nothing of it counts as held. What ends the search is counted and
never timed, so the same file gives the same answer on a busy machine. The file is written before each test, so that it
says what was tried if the process is ended from inside.
"""

import faulthandler
import functools
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import pytest

from minipaged.course import recorder
from minipaged.course.grade import EVERY, SMALL
from minipaged.course.impl import CannotImport, chain, not_written

MOST_WRONG = 3  # properties that are shrunk where none has a small counterexample
# What one example may take, ten times what the slowest of ours does: seconds of computing, which other programs do not
# take from it, and seconds in which it may wait.
COMPUTING = float(os.environ.get("MINIPAGED_SECONDS", "30"))
WAITING = 10 * COMPUTING

_findings: list[dict[str, Any]] = []
_errors: list[str] = []
_items: list[pytest.Item] = []
_running: list[pytest.Item] = []  # the one that is tried now
_folder = ""  # of the learner's files


class TimeLimit(BaseException):
    """An example does not end. No Exception: what catches those is not to go on."""


def pytest_configure(config: pytest.Config) -> None:
    global _folder
    from hypothesis import errors, stateful
    from hypothesis.internal.conjecture import engine

    if hasattr(engine, "MAX_SHRINKING_SECONDS"):
        engine.MAX_SHRINKING_SECONDS = sys.maxsize  # its own count of steps ends it
    if folder := config.getoption("--impl", None):
        _folder = str(Path(folder).resolve()) + os.sep
    start, give_up = stateful.RuleBasedStateMachine.__init__, errors.UnsatisfiedAssumption.__init__

    @functools.wraps(start)
    def restarted(self: Any) -> None:
        _begin_example()
        start(self)

    @functools.wraps(give_up)
    def only_for_a_suite(self: Any, *arguments: Any, **options: Any) -> None:
        caller = sys._getframe(1)
        while caller.f_back and f"{os.sep}hypothesis{os.sep}" in caller.f_code.co_filename:
            caller = caller.f_back
        if _is_theirs(caller.f_code.co_filename):
            raise AssertionError(f"the exercise refuses an example: {_place(caller)}")
        give_up(self, *arguments, **options)

    stateful.RuleBasedStateMachine.__init__ = restarted  # type: ignore[method-assign]
    errors.UnsatisfiedAssumption.__init__ = only_for_a_suite  # type: ignore[method-assign]
    if _is_timed():
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _too_long)
    _write("the imports")


def _is_timed() -> bool:
    """Only where an exercise is graded, and not in a browser, which has no such clock."""
    return recorder.is_on() and hasattr(signal, "setitimer") and sys.platform != "emscripten"


def _begin_example() -> None:
    recorder.log.clear()
    _arm()


def _arm() -> None:
    """The time of an example begins. A call in which Python itself does not come to its turn ends the process."""
    if _is_timed():
        signal.setitimer(signal.ITIMER_PROF, COMPUTING, 1)  # and each second again, if it is caught
        signal.setitimer(signal.ITIMER_REAL, WAITING, 1)
        faulthandler.dump_traceback_later(2 * WAITING, exit=True, file=_stack())


@functools.cache
def _stack() -> Any:
    return Path(os.environ[recorder.REPORT]).with_suffix(".stack").open("w")


def _too_long(number: int, frame: FrameType | None) -> None:
    limit = f"{COMPUTING:g} s of computing" if number == signal.SIGPROF else f"{WAITING:g} s of waiting"
    places = map(_place, filter(None, [frame, *sys._current_frames().values()]))  # another thread's, in chapter 13
    raise TimeLimit(f"it had not ended after {limit}: {next(filter(None, places), 'in the suite')}")


def _is_theirs(file: str) -> bool:
    return bool(_folder) and file.startswith(_folder)


def _place(frame: FrameType | None) -> str:
    """The innermost line of the learner's, "" where there is none."""
    while frame is not None and not _is_theirs(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, in {frame.f_code.co_name}" if frame else ""


def pytest_collectstart(collector: pytest.Collector) -> None:
    _arm()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gone = [name for name in os.environ.get("MINIPAGED_DESELECT", "").split(",") if name]
    items[:] = [item for item in items if not any(name in item.name for name in gone)]
    for name in recorder.WATCHED:
        if name in sys.modules:
            recorder.watch_classes(sys.modules[name])
    for item in items:
        _restart_with_each_example(item)
    _items[:] = items


def _restart_with_each_example(item: pytest.Item) -> None:
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None or getattr(handle.inner_test, "restarts", False):
        return
    inner = handle.inner_test

    @functools.wraps(inner)
    def restarted(*arguments: Any, **options: Any) -> Any:
        _begin_example()
        try:
            return inner(*arguments, **options)
        except Exception as error:
            if (name := not_written(error)) is not None:
                pytest.skip(f"not written: {name}")  # there is nothing to shrink
            raise

    restarted.restarts = True  # type: ignore[attr-defined]
    handle.inner_test = restarted


def pytest_runtest_setup(item: pytest.Item) -> None:
    _running[:] = [item]
    _write(in_words(item))
    _begin_example()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    raised = call.excinfo  # pytest exchanges a SkipTest for a skip of its own, and brings what a TestCase raised
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when != "call" and report.outcome == "passed":
        return
    finding = _finding(item, raised or call.excinfo, report.outcome) | {"seconds": round(call.duration, 3)}
    _findings.append(finding)
    wrong = [each for each in _findings if each["outcome"] == "wrong"]
    if finding not in wrong or (EVERY in os.environ and finding["error"] != "TimeLimit"):
        return
    if finding["events"] <= SMALL or len(wrong) == MOST_WRONG or finding["error"] == "TimeLimit":
        item.session.shouldstop = "a counterexample is found"


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Ctrl-C, and pytest.exit in an exercise."""
    if isinstance(excinfo.value, pytest.Session.Interrupted):  # pytest's own word for an end that was asked for
        return
    stopped = "stopped" if isinstance(excinfo.value, KeyboardInterrupt) else "wrong"
    if _running:
        _findings.append(_finding(_running[0], excinfo, "failed") | {"outcome": stopped})
    else:
        _errors.append("stopped at the imports")


def _finding(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException] | None, outcome: str) -> dict[str, Any]:
    error = excinfo.value if excinfo else None
    statistics = getattr(item, "hypothesis_statistics", "")
    finding: dict[str, Any] = {
        "test": item.nodeid.rpartition("/")[2],
        "property": in_words(item),
        "about": _about(item),
        "outcome": {"passed": "holds", "failed": "wrong", "skipped": "skipped"}[outcome],
        "seconds": 0.0,
        "examples": _examples(statistics),
    }
    said = str(error or "")
    theirs = any(
        _is_theirs(frame.f_code.co_filename) for each in chain(error) for frame, _ in walk_tb(each.__traceback__)
    )
    if said.startswith("not written: "):
        return finding | {"outcome": "not written", "unwritten": said.partition(": ")[2]}
    if error is None or (outcome == "skipped" and not theirs):  # a skip of the suite's: it needs another machine
        return finding
    if (name := not_written(error)) is not None:
        return finding | {"outcome": "not written", "unwritten": name}
    script = recorder.log.script()
    ours = [entry for entry in excinfo.traceback if Path(str(entry.path)).parent.name == "tests"] if excinfo else []
    return finding | {
        "outcome": "wrong",
        "error": type(error).__name__,
        "message": said.strip()[:1500],
        "check": " ".join([item.name, *(entry.name for entry in ours), "" if theirs else said[:1500]]),
        "where": _where(excinfo),
        "script": script,
        "events": sum(not call["look"] and not call["made"] for call in script),
    }


def _where(excinfo: pytest.ExceptionInfo[BaseException] | None) -> str:
    """The last line of the traceback that is not a library's: file and line."""
    here = [
        entry
        for entry in (excinfo.traceback if excinfo else [])
        if "site-packages" not in str(entry.path) and "/course/" not in str(entry.path)
    ]
    return f"{Path(str(here[-1].path)).name}:{here[-1].lineno + 1}" if here else ""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _not_collected(report, "not tried", f"all of {_suite(report)}: {report.longrepr[2]}")


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: pytest.CollectReport | pytest.TestReport
) -> None:
    """A suite that cannot be imported, by the first cause that says where."""
    if not isinstance(report, pytest.CollectReport) or call.excinfo is None:
        return
    error = call.excinfo.value
    name = not_written(error)
    if name is not None:
        words = f"all of {_suite(report)}, which begins with {name}"
        _not_collected(report, "not written", words, unwritten=name)
        return
    behind = chain(error)
    cause = next((each for each in behind if isinstance(each, CannotImport)), behind[-1])
    said = str(cause) if isinstance(cause, CannotImport) else f"{type(cause).__name__}: {cause}"
    if said not in _errors:
        _errors.append(said)


def _suite(report: pytest.CollectReport) -> str:
    return report.nodeid.rpartition("/")[2]


def _not_collected(report: pytest.CollectReport, outcome: str, words: str, **more: str) -> None:
    blank = {"test": _suite(report), "about": "", "seconds": 0.0, "examples": None}
    _findings.append(blank | {"property": words, "outcome": outcome} | more)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    tried = {finding["test"] for finding in _findings}
    left = [item for item in _items if item.nodeid.rpartition("/")[2] not in tried]
    _findings.extend(_finding(item, None, "passed") | {"outcome": "not tried"} for item in left)
    if _is_timed():
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    _write("")


def pytest_unconfigure(config: pytest.Config) -> None:
    if any(finding.get("error") == "TimeLimit" for finding in _findings):
        os._exit(1)  # a thread that does not end would keep the process


def _write(running: str) -> None:
    """What is known by now, and what is tried now."""
    if path := os.environ.get(recorder.REPORT):
        found = {"findings": _findings, "errors": _errors, "running": running}
        Path(path).write_text(json.dumps(found), encoding="utf-8")


def in_words(item: pytest.Item) -> str:
    """test_each_block_is_handed_out_once[3] -> each block is handed out once (3)."""
    name = item.name
    if name == "runTest":
        return f"any script of calls, in any order: {getattr(item.parent, 'name', '').removeprefix('Test')}"
    stem, _, case = name.removeprefix("test_").partition("[")
    case = "-".join(part for part in case.removesuffix("]").split("-") if "<lambda>" not in part)
    return stem.replace("_", " ") + (f" ({case})" if case else "")


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
