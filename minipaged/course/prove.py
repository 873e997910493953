"""Kills every planted bug with its chapter's own suite: `python -m minipaged.course.prove [--json FILE] [NAME ...]`.

    bug                              chapter  property that caught it            examples  events
    ch09_fork_without_a_reference    9        any script of calls: Sharing             15       2

Exit code 1 where a bug survives, or where its smallest counterexample cannot be read at a glance.

Each bug gets a pytest of its own, as a learner's exercise does. What all of them import (pytest, Hypothesis, torch,
Triton) is imported once, before each is forked off: that is most of the time a suite takes. One runs on each core.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from glob import glob
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from minipaged.course.chapters import chapter, repository
from minipaged.course.grade import SMALL, Grade, arguments, environment, grade, read
from minipaged.course.museum import Bug, load_bugs
from minipaged.course.plugin import NO_LIMIT

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prove(bugs: list[Bug]) -> Iterator[dict[str, Any]]:
    """One row a bug, in their order: killed, property, examples, events, sequences, message, seconds."""
    if not hasattr(os, "fork"):
        for bug in bugs:
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                bug.plant(Path(folder))
                yield _row(bug, grade(chapter(bug.chapter), Path(folder)), time.monotonic() - began)
        return
    _warm_up()
    fork, rows = get_context("fork"), dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        waiting, running = list(bugs), dict[Any, tuple[Any, Bug, float]]()
        for bug in bugs:
            while bug.name not in rows:
                while waiting and len(running) < WORKERS:
                    following = waiting.pop(0)
                    process = fork.Process(target=_run, args=(following, Path(scratch) / following.name))
                    process.start()
                    running[process.sentinel] = (process, following, time.monotonic())
                for sentinel in wait(list(running)):
                    process, done, began = running.pop(sentinel)
                    process.join()
                    found = _found(done, Path(scratch) / done.name)
                    rows[done.name] = _row(done, found, time.monotonic() - began)
            yield rows[bug.name]


def _warm_up() -> None:
    """The heavy libraries, and none of our modules that a bug could be planted in."""
    if not glob("/dev/nvidia[0-9]*") and not glob("/dev/kfd"):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in ("pytest", "hypothesis.stateful", "numpy", "torch", "triton"):
        try:
            import_module(name)
        except ImportError:  # without Triton its chapter is skipped, and says so
            continue
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _run(bug: Bug, folder: Path) -> None:
    """In the child: plant, run, and end with nothing printed."""
    import pytest

    bug.plant(folder)
    os.chdir(repository())
    os.environ |= environment(chapter(bug.chapter), folder / "report.json")
    os.environ |= {"MINIPAGED_STOP": "1", "MINIPAGED_SHRINK": NO_LIMIT}  # not seconds: a busy machine proves the same
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    pytest.main(arguments(chapter(bug.chapter), folder))
    os._exit(0)


def _found(bug: Bug, folder: Path) -> Grade:
    report = folder / "report.json"
    if not report.is_file():
        return Grade(chapter(bug.chapter), [], ["pytest ended without a report"])
    return read(chapter(bug.chapter), report, [folder / bug.exercise.file])


def _row(bug: Bug, found: Grade, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"bug": bug.name, "chapter": bug.chapter, "killed": False, "seconds": round(seconds, 1)}
    wrong = found.first_wrong
    if wrong is None:
        return row | {
            "property": "; ".join(found.errors)[:200] or "none",
            "examples": None,
            "events": 0,
            "sequences": 0,
            "shrunk": True,
        }
    states = [call["state"] for call in wrong["script"] if call.get("state")]
    return row | {
        "killed": True,
        "property": wrong["property"],
        "test": wrong["test"],
        "message": wrong["message"].partition("\n")[0],
        "examples": wrong["examples"],
        "events": wrong["events"],
        "sequences": len(states[-1]["tables"]) if states else 0,
        "shrunk": wrong.get("shrunk", True),
        "script": [{name: call.get(name) for name in ("call", "state")} for call in wrong["script"]],
    }


def complaint(row: dict[str, Any]) -> str | None:
    """What is wrong with a row: no property refuses the bug, or none with a script that is read at a glance.

    A counterexample that Hypothesis did not shrink to the end has no size that could be judged.
    """
    if not row["killed"]:
        return "SURVIVES"
    return "LARGE" if row["shrunk"] and row["events"] > SMALL and row["sequences"] > 2 else None


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    examples = "-" if row["examples"] is None else row["examples"]
    caught = ": ".join(filter(None, [complaint(row), row["property"]]))
    shown = caught if len(caught) <= 52 else caught[:51] + "…"
    return f"{row['bug']:<42} {row['chapter']:>2}  {shown:<52} {examples:>8} {row['events']:>6} {row['sequences']:>9}"


HEADER = f"{'bug':<42} {'ch':>2}  {'property that caught it':<52} {'examples':>8} {'events':>6} {'sequences':>9}"


def main(arguments: list[str]) -> int:
    target = None
    if "--json" in arguments:
        at = arguments.index("--json")
        target, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    bugs = [bug for bug in load_bugs() if not arguments or any(bug.name.startswith(name) for name in arguments)]
    began, rows = time.monotonic(), []
    print(HEADER)
    for row in prove(bugs):
        rows.append(row)
        print(line(row), flush=True)
    killed = sum(row["killed"] for row in rows)
    largest = max((row["events"] for row in rows), default=0)
    seconds = time.monotonic() - began
    print(f"{killed} of {len(rows)} planted bugs are killed, by at most {largest} events, in {seconds:.0f} s")
    if target is not None:
        lasting = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
        target.write_text("[\n" + ",\n".join(map(json.dumps, lasting)) + "\n]\n", encoding="utf-8")
    return int(any(map(complaint, rows)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
