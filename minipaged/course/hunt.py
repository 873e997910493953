"""The hunt: a planted bug without its name. Run the suite, look at the counterexample, say where it is.

minipaged hunt                             the next one of a chapter that you have done: a file, and what its suite says
minipaged hunt 7 --answer FUNCTION:LINE    the function and the line, in that file

The file is the reference with a few lines changed, so a puzzle shows how its chapter is solved.
"""

import re
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from rich.console import Console
from rich.text import Text

from minipaged.course import state
from minipaged.course.chapters import chapter
from minipaged.course.grade import HOLDS, NOT_WRITTEN, WRONG, grade
from minipaged.course.museum import Bug, load_bugs
from minipaged.course.report import print_counterexample, say


def hunt(number: int | None, folder: Path, answer: str | None, console: Console, exercises: Path | None = None) -> int:
    """Returns 0 for a right answer, 1 for a wrong one, 3 where there was none yet."""
    puzzles = in_order(load_bugs())
    if number is None:
        known = [n for n, bug in enumerate(puzzles, start=1) if exercises and state.is_done(exercises, bug.chapter)]
        number = next((n for n in known if not _found(folder, n)), None)
    if number is None:
        say(
            console,
            "No puzzle is left of the chapters that you have done, and one of another chapter would show you how",
        )
        say(console, f"it is solved. If you want it all the same: minipaged hunt NUMBER, from 1 to {len(puzzles)}")
        return NOT_WRITTEN
    if not 1 <= number <= len(puzzles):
        raise ValueError(f"there is no puzzle {number}: there are 1 to {len(puzzles)}")
    bug = puzzles[number - 1]
    file = folder / f"puzzle_{number:02d}_{bug.module.rpartition('.')[2]}.py"
    if answer is None:
        show(number, len(puzzles), bug, file, console)
        if not sys.stdin.isatty():
            say(console, f"\nYour answer: minipaged hunt {number} --answer FUNCTION:LINE")
            return NOT_WRITTEN
        answer = f"{input('Which function? ')}:{input(f'Which line of {file}? ')}"
    return judge(number, bug, folder, answer, console)


def in_order(bugs: list[Bug]) -> list[Bug]:
    """By chapter, and within one by chance that is the same for every learner."""
    return sorted(bugs, key=lambda bug: (bug.chapter, sha256(bug.name.encode()).digest()))


def show(number: int, total: int, bug: Bug, file: Path, console: Console) -> None:
    """Write the broken module, and print the counterexample of its suite."""
    which = chapter(bug.chapter)
    console.print(Text(f"Puzzle {number} of {total}, chapter {bug.chapter}: {which.title}", style="bold"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(bug.planted(), encoding="utf-8")
    say(console, f"One thing in {file} is wrong. It is {bug.module}, with a few lines changed.")
    with tempfile.TemporaryDirectory() as planted, console.status("running its chapter's properties"):
        bug.plant(Path(planted))
        found = grade(which, Path(planted))
    if found.first_wrong is None:
        raise ValueError(f"puzzle {number} cannot be shown here: its suite finds nothing ({found.errors or 'skipped'})")
    print_counterexample(found.first_wrong, console)


def judge(number: int, bug: Bug, folder: Path, answer: str, console: Console) -> int:
    """Compare an answer with where the bug is: the function by its name, with or without the class, and the line."""
    said = re.fullmatch(r"\s*([\w.]+)\s*:\s*(\d+)\s*", answer)
    if said is None:
        raise ValueError(f"an answer is FUNCTION:LINE, such as BlockTable.fork:110, got {answer!r}")
    name, line = said[1], int(said[2])
    right_function = any(name in (whole, whole.rpartition(".")[2]) for whole in bug.functions())
    # What was left out shows between two lines: either of them is right.
    right_line = bug.lines().start - 1 <= line <= bug.lines().stop
    if right_function and right_line:
        say(console, f"Found. {' '.join(bug.about.split())}")
        say(console, f"Seen: {bug.source}.")
        state.remember(folder, "hunt", str(number), True)
        return HOLDS
    if right_function:
        say(
            console,
            f"The function is right, line {line} is not. Read the script again: which call makes the first mistake?",
        )
    else:
        say(console, f"Not in {name}. Which state is the first that should not be, and which call made it?")
    return WRONG


def _found(folder: Path, number: int) -> bool:
    return state.recall(folder, "hunt", str(number)) is True
