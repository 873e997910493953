"""Kills every planted bug with its chapter's own suite: `python -m minipaged.course.prove [--json FILE] [NAME ...]`.

    bug                              chapter  property that caught it            examples  events
    ch09_fork_without_a_reference    9        any script of calls: Sharing             15       2

Exit code 1 where a bug survives, or where its smallest counterexample cannot be read at a glance.

Each is planted in a folder of the reference's files and checked as a learner's folder is. One runs on each core.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minipaged.course.chapters import chapter
from minipaged.course.generate import write_solutions
from minipaged.course.grade import SMALL, Grade, grade
from minipaged.course.museum import Bug, load_bugs

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prove(bugs: list[Bug]) -> Iterator[dict[str, Any]]:
    """One row a bug, in their order: killed, property, examples, events, sequences, message, seconds."""
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(_check, bugs)


def _check(bug: Bug) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        write_solutions(Path(folder))
        bug.plant(Path(folder))
        return _row(bug, grade(chapter(bug.chapter), Path(folder)), time.monotonic() - began)


def _row(bug: Bug, found: Grade, seconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"bug": bug.name, "chapter": bug.chapter, "killed": False, "seconds": round(seconds, 1)}
    wrong = found.first_wrong
    if wrong is None:
        return row | {
            "property": "; ".join(found.errors)[:200] or "none",
            "examples": None,
            "events": 0,
            "sequences": 0,
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
        "script": [{name: call.get(name) for name in ("call", "state")} for call in wrong["script"]],
    }


def complaint(row: dict[str, Any]) -> str | None:
    """What is wrong with a row: no property refuses the bug, or none with a script that is read at a glance."""
    if not row["killed"]:
        return "SURVIVES"
    return "LARGE" if row["events"] > SMALL and row["sequences"] > 2 else None


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
