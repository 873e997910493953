"""The map: each chapter's exercises, what is left to write in them, and what the last `minipaged check` said.

    ch   exercise                                                written   last check
     6   [x] the block allocator and the block table               13/13   36 of 36 hold
     7   [.] paged attention                                         2/6   not checked yet

It reads files and runs nothing, so it answers at once.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from minipaged.course import state
from minipaged.course.chapters import CHAPTERS, Chapter, repository
from minipaged.course.grade import HOLDS, NOT_WRITTEN, WRONG
from minipaged.course.impl import unwritten


def print_progress(folder: Path, console: Console) -> int:
    """Returns 0 if every chapter is done, 1 if the last check of one was wrong, 3 otherwise."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: `minipaged start {folder}` makes one")
    _line(console, f"{folder}\n")
    _line(console, f"{'ch':>2}      {'exercise':<44} {'written':>8}   last check")
    codes = []
    for chapter in CHAPTERS.values():
        last = state.recall(folder, "chapters", str(chapter.number))
        done, total = _written(chapter, folder)
        code = last.get("code") if isinstance(last, dict) else None
        if done < total and code == HOLDS:
            code = NOT_WRITTEN  # a file was put back since
        codes.append(NOT_WRITTEN if code is None else code)
        mark = {HOLDS: "x", WRONG: "!"}.get(codes[-1], "." if done else " ")
        said = _last_check(last, code)
        if isinstance(verdict := state.recall(folder, "properties", str(chapter.number)), int):
            said += "; properties " + {HOLDS: "done", WRONG: "wrong"}.get(verdict, "not written")
        _line(console, f"{chapter.number:>2}  [{mark}] {chapter.title:<44} {f'{done}/{total}':>8}   {said}")
    finished = sum(code == HOLDS for code in codes)
    _line(console, f"\n{finished} of {len(codes)} chapters are done. [x] done  [!] wrong  [.] begun")
    if WRONG in codes:
        return WRONG
    return HOLDS if finished == len(codes) else NOT_WRITTEN


def _written(chapter: Chapter, folder: Path) -> tuple[int, int]:
    """Functions that are written, of those that are to be written."""
    done = total = 0
    for exercise in chapter.exercises:
        size = len(unwritten(repository() / "tutorials" / "exercises" / exercise.file))
        total += size
        mine = folder / exercise.file
        done += max(0, size - len(unwritten(mine))) if mine.is_file() else 0
    return done, total


def _last_check(last: Any, code: int | None) -> str:
    if not isinstance(last, dict) or code is None:
        return "not checked yet"
    return f"{last.get('holds')} of {last.get('of')} hold"


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True, highlight=False)
