"""The bug museum as pages, one a bug, from tests/bugs/ and docs/museum.json: the smallest script of each, drawn.

A page asks before it tells. What is seen stands first, and which lines are to blame is folded away. docs/museum.json is
what `make bugs` found: of each bug the property that it breaks, and the smallest script, with tables after each call.
"""

import difflib
import json
import re
from collections.abc import Iterator
from itertools import groupby

from course import ROOT, Repository, fenced, folded, front_matter
from playground import film_of

from minipaged.course.generate import source_of
from minipaged.course.museum import Bug, load_bugs


def numbered() -> dict[str, Bug]:
    """All bugs by their numbers, "9.4", in the order of the chapters."""
    bugs = sorted(load_bugs(ROOT / "tests" / "bugs"), key=lambda bug: (bug.chapter, bug.name))
    return {
        f"{chapter}.{place}": bug
        for chapter, group in groupby(bugs, key=lambda bug: bug.chapter)
        for place, bug in enumerate(group, start=1)
    }


def pages(repository: Repository) -> Iterator[tuple[str, str]]:
    """(path, content): the list, then of each bug its page, and its film where there is something to draw."""
    rows = json.loads((ROOT / "docs" / "museum.json").read_text(encoding="utf-8"))
    bugs = numbered()
    blank = {"property": "not recorded yet: make bugs", "message": "not recorded yet", "script": []}
    seen = {bug.name: blank for bug in bugs.values()} | {row["bug"]: row for row in rows}
    yield "museum.md", index(bugs, seen)
    for number, bug in bugs.items():
        film = film_of(seen[bug.name])
        yield f"museum/{bug.name}.md", page(number, bug, seen[bug.name], film is not None, repository)
        if film is not None:
            yield f"museum/{bug.name}.json", json.dumps(film)


def index(bugs: dict[str, Bug], seen: dict[str, dict]) -> str:
    about = "Bugs of a paged KV cache, each planted in our code: what is seen, and the smallest script that shows it."
    real = sum(not is_classic(bug) for bug in bugs.values())
    text = (
        f"{len(bugs)} bugs, planted one at a time in a copy of one module. For each, this page names the property that "
        "fails, or what a script of calls finds. Which line is it? Each page has the smallest script that shows the "
        f"bug, and the answer is folded. {real} were seen in a real system, which is named; the others are mistakes "
        "that many have made. `minipaged hunt` hands you one without saying which, and `make bugs` proves that the "
        "suites find every one.\n"
    )
    for chapter, group in groupby(bugs.items(), key=lambda item: item[1].chapter):
        text += f"\n## Chapter {chapter}\n\n| | what fails |\n| --- | --- |\n"
        for number, bug in group:
            source = "" if is_classic(bug) else f"<br>*Seen in:* {linked(bug.source)}"
            text += f"| [{number}](museum/{bug.name}.md) | {symptom(seen[bug.name])}{source} |\n"
    return front_matter("Bug museum", about) + "# The bug museum\n\n" + text


def page(number: str, bug: Bug, row: dict, has_film: bool, repository: Repository) -> str:
    module = source_of(bug.module)
    ours, planted = module.read_text(encoding="utf-8"), bug.planted()
    difference = "\n".join(list(difflib.unified_diff(ours.splitlines(), planted.splitlines(), lineterm="", n=4))[2:])
    where = ", ".join(f"`{name}`" for name in bug.functions()) or "the module itself"
    about = " ".join(bug.about.split())
    parts = [
        front_matter(
            f"Bug {number}", f"A planted bug of chapter {bug.chapter}. What fails: {row['property']}", boost=0.5
        ),
        f"# Bug {number}\n",
        f"A module of [chapter {bug.chapter}](../course/ch{bug.chapter:02d}.md) has a wrong line. What fails:\n",
        f"> {plain(row['property'])}\n",
        f"**What is seen.** {plain(row['message'])}\n",
    ]
    if row["script"]:
        script = "\n".join(call["call"] for call in row["script"])
        parts.append(f"The smallest script that shows it:\n\n{fenced(script, 'python')}")
    if has_film:
        parts.append(f"<!-- film: {bug.name} -->\n")
    answer = f"**{title(bug)}.** {about}\n\n**Seen in:** {linked(bug.source)}.\n\n{fenced(difference, 'diff')}"
    parts += [
        "**Before you go on.** In which call does it go wrong, and what should have happened? Which line would you "
        "look at first?\n",
        folded("Where it is", f"In {where} of {repository.link(module)}.", "question"),
        folded("The bug", answer, "bug"),
        f"`minipaged check {bug.chapter}` runs the suite that finds it. All of them: [the museum](../museum.md).\n",
    ]
    return "\n".join(parts)


def title(bug: Bug) -> str:
    words = bug.name.partition("_")[2].replace("_", " ")
    return words[0].upper() + words[1:]


def symptom(row: dict) -> str:
    """What fails: of a script of calls what was found, of any other property its name."""
    text = row["message"] if row["property"].startswith("any script of calls") else row["property"]
    return plain(text if len(text) <= 160 else text[:159] + "…")


def plain(text: str) -> str:
    """Text of which Markdown makes nothing."""
    return re.sub(r"[\\`*_\[\]<>|&]", lambda sign: f"&#{ord(sign[0])};", text)


def is_classic(bug: Bug) -> bool:
    return bug.source.startswith("a classic")


def linked(source: str) -> str:
    """GitHub's short form, owner/name#number, as a link to the issue or the pull request."""
    return re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", r"[\g<0>](https://github.com/\1/issues/\2)", source)
