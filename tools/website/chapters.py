"""A chapter's page: the notebook as the build ran it, what to play, the module from its source, its properties, its
exercise. Nothing of it is written by hand but the notebook and the code."""

import ast
import re
from pathlib import Path
from typing import Any

from course import CHAPTERS, ROOT, Chapter, Repository, folded, listing, questions
from notebooks import to_markdown


def page(chapter: Chapter, notebook: dict[str, Any] | None, repository: Repository) -> str:
    question = questions().get(chapter.number, "")
    if notebook is None:
        body = f"# Chapter {chapter.number}. {chapter.title}\n\n**The question.** {question}\n\n"
        body += "The notebook of this chapter is not written yet.\n"
    else:
        body = to_markdown(notebook)
    head = front_matter(title_of(chapter, body), question)
    return head + "\n\n".join(
        [body, play(chapter), modules(chapter, repository), properties(chapter, repository), exercise(chapter)]
    )


def front_matter(title: str, description: str) -> str:
    plain = re.sub(r"[`*$\[\]\\\"]", "", description)
    return f'---\ntitle: "{title}"\ndescription: "{plain}"\n---\n\n'


def title_of(chapter: Chapter, markdown: str) -> str:
    """The notebook's own title: "# Chapter 6. The block table" -> "6. The block table"."""
    found = re.search(r"^# Chapter \d+\. (.+)$", markdown, flags=re.MULTILINE)
    return f"{chapter.number}. {(found[1] if found else chapter.title).strip()}"


def minutes_of(notebook: dict[str, Any] | None) -> str:
    text = "".join(notebook["cells"][0]["source"]) if notebook else ""
    found = re.search(r"\*\*Minutes\.\*\* About (\d+)", text)
    return found[1] if found else ""


def play(chapter: Chapter) -> str:
    if not chapter.players:
        return ""
    players = "\n\n".join(f"<!-- player: {name} -->" for name in chapter.players)
    what = (
        "Recorded from our own allocator"
        if chapter.number == 4
        else "Recorded from SmolLM2, run by this repository's engine"
    )
    return f"## Play it\n\n{what}. Use the buttons, the slider or the arrow keys.\n\n{players}\n"


def modules(chapter: Chapter, repository: Repository) -> str:
    sources = chapter.sources()
    if not sources:
        return "## The module\n\nThe module of this chapter is not written yet.\n"
    first, *others = sources
    parts = [f"## The module\n\n{repository.link(first)}, as it is now:\n\n{listing(first)}"]
    if others:
        parts.append("The rest of this chapter's code:\n")
        parts += [folded(path.relative_to(ROOT).as_posix(), listing(path), "example") for path in others]
    return "\n".join(parts)


# ---- properties --------------------------------------------------------------


def properties(chapter: Chapter, repository: Repository) -> str:
    """The names of the tests as sentences, with their docstrings: a suite reads as a list of promises."""
    if not chapter.suites:
        return "## Its properties\n\nThe suite of this chapter is not written yet.\n"
    parts = [
        f"## Its properties\n\nWhoever keeps these promises is right, however the code is written. "
        f"`pytest -m ch{chapter.number:02d}` tries them.\n"
    ]
    for path in chapter.suites:
        found = promises(path)
        if found:
            lines = [
                f"- {repository.link(path, line, words)}{f'. {about}' if about else ''}" for words, about, line in found
            ]
            parts.append(f"**{repository.link(path)}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def promises(path: Path) -> list[tuple[str, str, int]]:
    """(in words, docstring's first sentence, line) of each test and each state machine of a file."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        about = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ") if _documented(node) else ""
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.append((node.name.removeprefix("test_").replace("_", " "), about, node.lineno))
        elif isinstance(node, ast.ClassDef) and any("Machine" in ast.unparse(base) for base in node.bases):
            found.append((f"any script of calls, in any order: {node.name}", about, node.lineno))
    return [(words, about.replace("[", "\\[").rstrip("."), line) for words, about, line in found]


def _documented(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


# ---- exercise --------------------------------------------------------------


def exercise(chapter: Chapter) -> str:
    files = sorted((ROOT / "tutorials" / "exercises").glob(f"ch{chapter.number:02d}_*.py"))
    if not files:
        return f"## The exercise\n\nThis chapter ends with an experiment:\n\n```\n{chapter.command}\n```\n"
    minutes = minutes_of_exercises()
    text = (
        "## The exercise\n\nThe module again, with the bodies taken out: write them until the properties hold.\n\n"
        f"```\nminipaged start exercises\nminipaged check {chapter.number} --impl exercises\n```\n\n"
    )
    for path in files:
        about = f", about {minutes[path.name]} minutes" if path.name in minutes else ""
        text += folded(f"{path.relative_to(ROOT).as_posix()}{about}", listing(path), "question")
    bugs = sorted((ROOT / "tests" / "bugs").glob(f"ch{chapter.number:02d}_*.toml"))
    if bugs:
        exhibits = f"[{len(bugs)} bugs of this chapter](../museum/index.md#chapter-{chapter.number})"
        text += f"\nAnd from the other side: {exhibits}"
        text += ", each of which the suite must kill.\n"
    return text


def minutes_of_exercises() -> dict[str, int]:
    """Exercise file -> minutes, from the course's own map; {} while there is none."""
    try:
        from minipaged.course.chapters import all_exercises
    except ImportError:
        return {}
    return {exercise.file: exercise.minutes for exercise in all_exercises()}


# ---- the map --------------------------------------------------------------


def course_map(notebooks: dict[Path, dict[str, Any]], folder: str) -> str:
    """The table of all chapters, for a page from which they lie in `folder`."""
    rows = ["| | the question | minutes |", "| --- | --- | ---: |"]
    asked = questions()
    for chapter in CHAPTERS:
        notebook = notebooks.get(chapter.notebook) if chapter.notebook else None
        title = title_of(chapter, "".join(notebook["cells"][0]["source"]) if notebook else "")
        minutes = minutes_of(notebook) or "to come"
        rows.append(f"| [{title}]({folder}ch{chapter.number:02d}.md) | {asked.get(chapter.number, '')} | {minutes} |")
    return "\n".join(rows)
