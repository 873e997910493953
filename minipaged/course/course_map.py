"""The course, chapter by chapter, as data: `course_map.toml`. The exercises of a chapter are in `chapters.py`."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class ChapterOfCourse:
    number: int
    title: str
    question: str
    covers: str  # the question again, with what the chapter covers
    minutes: int  # of the notebook, about
    notebook: str  # in tutorials/
    modules: tuple[str, ...]  # glob patterns from the root; the first file is the one to read
    suites: tuple[str, ...]  # glob patterns in tests/; the first is a file, and the exercise's own
    command: str = ""  # what a chapter without an exercise has instead


def course_map() -> dict[int, ChapterOfCourse]:
    text = files("minipaged.course").joinpath("course_map.toml").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = tomllib.loads(text)["chapter"]
    for row in rows:
        row.update({name: tuple(value) for name, value in row.items() if isinstance(value, list)})
    return {row["number"]: ChapterOfCourse(**row) for row in rows}
