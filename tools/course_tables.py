"""The tables of chapters in README.md and docs/design.md: `python tools/course_tables.py` writes them from the map."""

import re
from pathlib import Path

from minipaged.course.course_map import ChapterOfCourse, course_map

ROOT = Path(__file__).resolve().parents[1]


def first_file(chapter: ChapterOfCourse) -> str:
    return next(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(chapter.modules[0])))


def readme_row(chapter: ChapterOfCourse) -> str:
    module, suite = first_file(chapter), f"tests/{chapter.suites[0]}"
    read = f"[`{module.removeprefix('minipaged/')}`]({module})"
    properties = f"[`{suite[6:15]}`]({suite})"
    return (
        f"| [{chapter.number}](tutorials/{chapter.notebook}) | {chapter.question} | {chapter.minutes} "
        f"| {read} | {properties} |"
    )


def design_row(chapter: ChapterOfCourse) -> str:
    modules = ", ".join(f"`{module}`" for module in chapter.modules)
    suite = chapter.suites[0].removeprefix("test_").removesuffix(".py")
    return f"| {chapter.number} | {chapter.covers} | {modules} | `{suite}` |"


TABLES = {
    "README.md": ("| chapter | the question | minutes | read | its properties |", readme_row),
    "docs/design.md": ("| ch | the question | module | test and exercise |", design_row),
}


def written(name: str) -> str:
    """The file, with its table as the map has it."""
    head, row = TABLES[name]
    text = (ROOT / name).read_text(encoding="utf-8")
    table = re.compile(rf"({re.escape(head)}\n\|[-:| ]+\|\n)(\|.*\n)+")
    if not table.search(text):
        raise ValueError(f"{name} has no table that begins with {head}")
    rows = "".join(f"{row(chapter)}\n" for chapter in course_map().values())
    return table.sub(lambda found: found[1] + rows, text, count=1)


if __name__ == "__main__":
    for name in TABLES:
        (ROOT / name).write_text(written(name), encoding="utf-8")
