"""A chapter's page: the notebook as the build ran it, its picture and films where they belong, the exercise, and after
it the module from its source and its properties. Nothing of it is written by hand but the notebook and the code."""

import ast
import re
from pathlib import Path
from typing import Any

from course import CHAPTERS, ROOT, Repository, folded, found, front_matter, listing, notebook_of, sources
from notebooks import link_chapters, one_block, to_markdown

from minipaged.course.chapters import all_exercises
from minipaged.course.course_map import ChapterOfCourse

RECORDED = "*Recorded while our engine ran SmolLM2. Play it, or go to one of the numbered moments.*"


def page(chapter: ChapterOfCourse, notebook: dict[str, Any], repository: Repository) -> str:
    first, *cells = notebook["cells"]
    head = front_matter(title_of(chapter, notebook), chapter.covers, boost=4)
    title, _, opening = to_markdown(first).partition("\n")
    parts = [title, picture(chapter), opening, ways_in(chapter, repository)]
    for cell in cells:
        parts.append(to_markdown(cell))
        for tag in cell["metadata"].get("tags", ()):
            if tag.startswith("player:") and tag != "player:fragmentation":
                parts.append(RECORDED)
            if tag.startswith(("player:", "side-by-side")):
                parts.append(f"<!-- {tag} -->")
        if re.search(r"^## \d+\. Exercise", "".join(cell["source"]), flags=re.MULTILINE):
            parts.append(exercise(chapter))
    return head + "\n\n".join([*parts, modules(chapter, repository), properties(chapter, repository)])


def title_of(chapter: ChapterOfCourse, notebook: dict[str, Any]) -> str:
    """The notebook's own title: "# Chapter 6. The block table" -> "6. The block table"."""
    title = re.match(r"# Chapter \d+\. (.+)", "".join(notebook["cells"][0]["source"]))
    return f"{chapter.number}. {(title[1] if title else chapter.title).strip()}"


def ways_in(chapter: ChapterOfCourse, repository: Repository) -> str:
    links = [f'[Download the notebook]({chapter.notebook}){{ download="{chapter.notebook}" }}', "[Set up](../setup.md)"]
    if colab := repository.colab(notebook_of(chapter)):
        links.insert(0, f"[Open in Colab]({colab})")
    return " · ".join(links) + "\n{: .ways-in }"


def picture(chapter: ChapterOfCourse) -> str:
    """The chapter's idea, drawn: inside of the page, so that it follows the page's colours."""
    svg = (ROOT / "docs" / "pictures" / f"ch{chapter.number:02d}.svg").read_text(encoding="utf-8")
    return f'<figure class="opening" data-search-exclude>{one_block(svg)}</figure>'


def exercise(chapter: ChapterOfCourse) -> str:
    """What the notebook's own words on the exercise speak of: the files to write in, and the bugs of the chapter."""
    minutes = {each.file: each.minutes for each in all_exercises()}
    files = found((f"ch{chapter.number:02d}_*.py",), ROOT / "tutorials" / "exercises")
    about = {path: f", about {minutes[path.name]} minutes" if path.name in minutes else "" for path in files}
    parts = [folded(f"{path.relative_to(ROOT).as_posix()}{about[path]}", listing(path), "question") for path in files]
    if bugs := found((f"ch{chapter.number:02d}_*.toml",), ROOT / "tests" / "bugs"):
        parts.append(
            f"From the other side: [{len(bugs)} bugs of this chapter](../museum.md#chapter-{chapter.number}), "
            "each of which the suite must find.\n"
        )
    return "\n".join(parts)


def modules(chapter: ChapterOfCourse, repository: Repository) -> str:
    parts = [
        "## The code\n\nThe modules of this chapter as they are now. They answer the exercise, so write yours first.\n"
    ]
    for path in sources(chapter):
        link = f"{repository.link(path)}\n\n" if repository.url else ""
        parts.append(folded(path.relative_to(ROOT).as_posix(), link + listing(path), "example"))
    return "\n".join(parts)


# ---- properties --------------------------------------------------------------


def properties(chapter: ChapterOfCourse, repository: Repository) -> str:
    """The names of the tests as sentences, with their docstrings: a suite reads as a list of promises."""
    suites = f"`pytest -m ch{chapter.number:02d}`"
    parts = [
        f"## Its properties\n\nCode that keeps these promises is right, however it is written. {suites} tries them.\n"
    ]
    for path in found(chapter.suites, ROOT / "tests"):
        lines = [
            f"- {repository.link(path, line, words)}{f'. {about}' if about else ''}"
            for words, about, line in promises(path)
        ]
        if lines:
            parts.append(f"**{repository.link(path)}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def promises(path: Path) -> list[tuple[str, str, int]]:
    """(in words, docstring's first sentence, line) of each test and each state machine of a file."""
    named = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            words = node.name.removeprefix("test_").replace("_", " ")
        elif isinstance(node, ast.ClassDef) and any("Machine" in ast.unparse(base) for base in node.bases):
            words = f"any script of calls, in any order: {node.name}"
        else:
            continue
        about = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
        named.append((words, about.replace("[", "\\[").rstrip("."), node.lineno))
    return named


# ---- the map --------------------------------------------------------------


def course_map(notebooks: dict[Path, dict[str, Any]], folder: str) -> str:
    """The table of all chapters, for a page from which they lie in `folder`: the questions are README's."""
    rows = ["| | the question | minutes |", "| --- | --- | ---: |"]
    for chapter in CHAPTERS.values():
        title = title_of(chapter, notebooks[notebook_of(chapter)])
        rows.append(f"| [{title}]({folder}ch{chapter.number:02d}.md) | {chapter.question} | {chapter.minutes} |")
    return "\n".join(rows)


def in_the_wild(notebooks: dict[Path, dict[str, Any]], number: int) -> str:
    """What the notebook of a chapter says of other systems, for the page that collects it."""
    for cell in notebooks[notebook_of(CHAPTERS[number])]["cells"]:
        said = re.match(r"## (?:\d+\. )?In the wild\s*\n(.*)", "".join(cell["source"]), flags=re.DOTALL)
        if said:
            return link_chapters(re.split(r"^## ", said[1], flags=re.MULTILINE)[0].strip(), "course/") + "\n"
    return ""
