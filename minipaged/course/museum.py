"""The bug museum, tests/bugs/: bugs of real systems, and classics, each a few lines of the reference exchanged.

    chapter = 9                                    the chapter whose suite must kill it
    module = "minipaged.memory.prefix_cache"
    about = "..."                                  what goes wrong, and how one meets it
    source = "GeeeekExplorer/nano-vllm#163"        where a system had it; "a classic" where many have
    find = '''...'''                               lines of the module, which stand there exactly once
    replace = '''...'''

A planted module is put where a learner's would be, and graded as theirs is.
"""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

from minipaged.course.chapters import Exercise, chapter, repository
from minipaged.course.generate import source_of

_FIELDS = ("chapter", "module", "about", "source", "find", "replace")


@dataclass(frozen=True)
class Bug:
    name: str
    chapter: int
    module: str
    about: str
    source: str
    find: str
    replace: str

    @property
    def exercise(self) -> Exercise:
        """The exercise whose file the planted module takes."""
        for exercise in chapter(self.chapter).exercises:
            if exercise.module == self.module:
                return exercise
        raise ValueError(f"{self.name}: chapter {self.chapter} has no exercise on {self.module}")

    def planted(self) -> str:
        """The module with the bug in it. Raises ValueError where the lines are not there exactly once, or no Python."""
        source = source_of(self.module).read_text(encoding="utf-8")
        count = source.count(self.find)
        if count != 1:
            raise ValueError(f"{self.name}: the lines to replace stand in {self.module} {count} times, not once")
        text = source.replace(self.find, self.replace)
        ast.parse(text)
        return text

    def plant(self, folder: Path) -> Path:
        """Write the planted module into a folder, under its exercise's name."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.exercise.file
        path.write_text(self.planted(), encoding="utf-8")
        return path

    def lines(self) -> range:
        """The lines of the planted module that differ from the reference, counted from 1; what was only left out
        counts as the line that stands in its place."""
        ours = source_of(self.module).read_text(encoding="utf-8").splitlines()
        theirs = self.planted().splitlines()
        start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs) - 1)
        end = 0
        while end < len(theirs) - start - 1 and end < len(ours) - start - 1 and ours[-1 - end] == theirs[-1 - end]:
            end += 1
        return range(start + 1, max(start + 1, len(theirs) - end) + 1)

    def functions(self) -> list[str]:
        """The functions that the lines belong to, innermost: ["BlockTable.fork"]."""
        source, lines = self.planted(), self.lines()
        found = {function_at(source, line) for line in lines} - {""}
        # What was taken off the end of a function leaves the blank line behind it.
        return sorted(found or {function_at(source, lines.start - 1)} - {""})


def function_at(source: str, line: int) -> str:
    """The function or method a line stands in, "" outside of all."""
    best = ""
    for node in ast.parse(source).body:
        for inner in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            if isinstance(inner, ast.FunctionDef) and inner.lineno <= line <= (inner.end_lineno or inner.lineno):
                best = f"{node.name}.{inner.name}" if isinstance(node, ast.ClassDef) else inner.name
    return best


def load_bugs(folder: Path | None = None) -> list[Bug]:
    """All bugs, by name. Raises ValueError with the file's name where one is not as the header says."""
    bugs = []
    for path in sorted((folder or repository() / "tests" / "bugs").glob("ch*.toml")):
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if set(fields) != set(_FIELDS):
            raise ValueError(f"{path.name} must have {', '.join(_FIELDS)}; it has {', '.join(fields)}")
        bugs.append(Bug(path.stem, **fields))
    return bugs
