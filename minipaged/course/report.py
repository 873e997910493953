"""A grade in the chapter's words: what holds, what is not written, and the first thing that is wrong, drawn.

Words carry everything, and colour repeats it: the output reads the same in a pipe.
"""

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from minipaged.course.grade import Grade
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.terminal import draw

_STYLES = {"holds": "green", "wrong": "bold red", "stopped": "bold red", "not written": "yellow"}
_SCRIPT_UP_TO = 40  # lines of a script that are printed; of a longer one, the last so many


def print_grade(grade: Grade, console: Console) -> None:
    """The list of properties, and what to write next."""
    chapter = grade.chapter
    console.print(Text(f"Chapter {chapter.number}: {chapter.title}", style="bold"))
    say(console, _whose(grade))
    console.print()
    for error in grade.errors:
        say(console, f"cannot be imported: {error}", "bold red")
    for words, outcome, count in _grouped(grade.findings):
        outcome, _, wanting = outcome.partition(",")
        line = Text(
            f"{outcome.upper() if outcome in ('wrong', 'stopped') else outcome:<12} ", style=_STYLES.get(outcome, "dim")
        )
        line.append(words + (f" ({count} cases)" if count > 1 else ""), style="not bold default")
        line.append(f",{wanting}" if wanting else "", style="not bold dim")
        say(console, line)
    say(console, "\n" + _sum(grade))
    for file, names in grade.stubs.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            say(console, f"To write in {file}: {', '.join(names[:4])}{more}")
    if grade.having("not tried") and grade.first_wrong:
        say(console, "Not tried: behind a small counterexample the rest waits until it is mended.")
    if grade.only and not grade.exit_code:
        say(console, f"The chapter is done when all of it holds: the same without --only {grade.only}.")


def print_counterexample(finding: dict[str, Any], console: Console) -> None:
    """The property, the smallest script, and the memory before and after its last call."""
    console.print()
    stopped = finding["outcome"] == "stopped"
    console.print(Text("Where it was stopped" if stopped else "The first thing that is wrong", style="bold"))
    say(console, f"Property  {finding['property']}")
    if finding["about"]:
        say(console, f"          {finding['about']}")
    for number, line in enumerate(_message(finding)):
        say(console, ("Found     " if number == 0 else "          ") + line)
    if finding["where"]:
        say(console, f"Seen at   {finding['where']}")
    script = finding["script"]
    if script:
        events = finding["events"]
        console.print()
        unfinished = stopped or finding["error"] == "TimeLimit"
        words = "The script so far" if unfinished else "The smallest script that shows it"
        say(console, f"{words}{f' ({_events(events)})' if events else ''}:\n")
        lines = [call["call"] for call in script]
        if (more := len(lines) - _SCRIPT_UP_TO) > 0:
            lines = [f"# the last {_SCRIPT_UP_TO} of {len(lines)} lines", *lines[more:]]
        for line in lines:  # nothing before a line, so that it can be copied as it is
            say(console, line)
    _draw_states([call.get("state") for call in script], console)


def print_hint(hint: str, level: int, levels: int, command: str, console: Console) -> None:
    console.print()
    say(console, f"Hint {level} of {levels}: {hint}", "cyan")
    if level < levels:
        say(console, f"The next one: {command} --hint")


def check_command(chapter: int, folder: Path, only: str = "") -> str:
    """What was typed for this, and can be typed again anywhere in the clone."""
    return f"minipaged check {chapter} --impl {folder}{f' --only {only}' if only else ''}"


def _grouped(findings: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """Cases of one property with one outcome are one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        stem = finding["property"].partition(" (")[0]
        needs = f", for want of {finding['unwritten']}" if "unwritten" in finding else ""
        groups.setdefault((stem, finding["outcome"] + needs), []).append(finding["property"])
    lines: list[tuple[str, str, int]] = []
    for (stem, outcome), names in groups.items():
        if stem.startswith("any script of calls"):
            lines += [(name, outcome, 1) for name in names]
        else:
            lines.append((names[0] if len(names) == 1 else stem, outcome, len(names)))
    return lines


def _whose(grade: Grade) -> str:
    """Whose modules were at work."""
    mine = {exercise.file for exercise in grade.chapter.exercises}
    names = sorted(path.name for path in grade.used)
    others = [name for name in names if name not in mine]
    said = f"Yours: {', '.join(name for name in names if name in mine) or 'nothing of this chapter'}"
    if grade.only and grade.only not in names:
        said = f"Yours: {grade.only} of {names[0]}"
    if others:
        said += f"; of other chapters, since finished: {', '.join(others)}"
    return f"{said}; everything else is ours."


def _sum(grade: Grade) -> str:
    counts = [
        (len(grade.having("holds")), "hold", "holds"),
        (len(grade.having("wrong")), "are wrong", "is wrong"),
        (len(grade.having("not written")), "are not written yet", "is not written yet"),
        (len(grade.having("stopped")), "were stopped", "was stopped"),
        (len(grade.having("not tried")), "were not tried", "was not tried"),
        (len(grade.having("skipped")), "need another machine", "needs another machine"),
    ]
    said = ", ".join(f"{count} {one if count == 1 else many}" for count, many, one in counts if count)
    return f"Of {len(grade.findings)} properties {said}." if said else "No property was tried."


def _message(finding: dict[str, Any]) -> list[str]:
    """The assertion in its own words, without what pytest and Hypothesis add; where arrays differ, where."""
    lines: list[str] = []
    for line in finding["message"].splitlines():
        text = line.strip()
        if re.match(r"(Failing test case|Falsifying example|You can reproduce|state = |state\.|teardown)", text):
            break
        if text.startswith("assert "):
            if not lines:
                lines.append(f"it is not so that {text.removeprefix('assert ')}")
            break
        if text:
            lines.append(text)
    at = re.search(r"at index \((\d+), (\d+), (\d+)\)", finding["message"])
    if at:
        lines.append(f"that is token {at[1]}, head {at[2]}, dimension {at[3]}")
    kind = finding["error"]
    if not lines:
        lines = ["an assertion without words" if kind == "AssertionError" else kind]
    if kind not in ("AssertionError", "Failed", "CannotImport", "TimeLimit", "Ended"):
        lines[0] = f"{kind}: {lines[0]}" if lines[0] != kind else kind
    return [line if len(line) <= 200 else line[:199] + "…" for line in lines[:10]]


def _events(count: int) -> str:
    return "1 event" if count == 1 else f"{count} events"


def _draw_states(states: list[dict[str, Any] | None], console: Console) -> None:
    known = [state for state in states if state]
    if not known:
        return
    pair = [("Before the last change", known[-2]), ("After it", known[-1])] if len(known) > 1 else []
    for words, state in pair or [("The block tables", known[-1])]:
        try:
            snapshot = to_snapshot(state)
        except ValueError as error:  # a table names a block that does not exist: say it, there is no picture
            say(console, f"\n{words}: {_tables_in_words(state)} ({error})")
            continue
        console.print()
        say(console, f"{words}:")
        console.print(Padding(draw(snapshot, min(console.width - 2, 100)), (0, 0, 0, 2), expand=False))
        for line in disagreements(state):
            say(console, f"  {line}")


def to_snapshot(state: dict[str, Any]) -> Snapshot:
    """A noted state as the picture's data: the tables, and what the two pools say of their blocks."""
    on, device, host = state["on"], state["pools"]["device"], state["pools"].get("host")
    said = {int(block): counts for block, counts in device["blocks"].items()}
    taken = {block: _why_taken(counts) for block, counts in said.items() if not counts[1] and not counts[2]}
    return Snapshot(
        num_blocks=device["num_blocks"],
        block_size=state["block_size"],
        tables={seq: blocks for seq, blocks in state["tables"].items() if on[seq] == "device"},
        num_tokens=state["num_tokens"],
        num_host_blocks=host["num_blocks"] if host else 0,
        host_tables={seq: blocks for seq, blocks in state["tables"].items() if on[seq] == "host"},
        cached={block for block, counts in said.items() if counts[2]},
        taken=taken,
        names=list(state["tables"]),
    )


def _why_taken(counts: list[int]) -> str:
    """Of a block that no table names: [its count, references of tables, of the cache, of the test]."""
    return "taken by a call" if counts[3] else f"lost: no table, count {counts[0]}"


def disagreements(state: dict[str, Any]) -> list[str]:
    """Where a pool says something else of its blocks than the tables do."""
    lines = []
    for role, pool in state["pools"].items():
        of = " of the host" * (role == "host")
        in_use = 0
        for block, (count, named, cached, held) in pool["blocks"].items():
            in_use += named > 0 or held > 0 or (count > 0 and not cached)
            if named and count != named + cached + held:
                by = (
                    f"{named} table{'s' * (named != 1)}" + " and the prefix cache" * cached + " and a call" * bool(held)
                )
                lines.append(f"Block {block}{of} is named by {by}, and its count is {count}.")
        unused = pool["num_blocks"] - in_use
        if pool["num_free"] not in (None, unused):
            said = f"num_free = {pool['num_free']}, and {unused} of {pool['num_blocks']} blocks are not in use"
            lines.append(f"The allocator{of} says {said}.")
    return lines


def _tables_in_words(state: dict[str, Any]) -> str:
    return ", ".join(
        f"{seq} {blocks} holds {state['num_tokens'][seq]} tokens" for seq, blocks in state["tables"].items()
    )


def say(console: Console, text: str | Text, style: str = "") -> None:
    """Print a line as it is: no markup, no coloured numbers, no break that a pipe would not have."""
    line = text if isinstance(text, Text) else Text(text, style=style)
    console.print(line, soft_wrap=True, highlight=False)
