"""The bug museum as pages, one a bug, from tests/bugs/. The bug itself is folded away: hunt first, then look."""

import difflib
from collections.abc import Iterator
from itertools import groupby

from chapters import front_matter
from course import ROOT, Repository, fenced, folded


def bugs() -> list:
    """All bugs, in the order of the chapters; [] while there are none."""
    folder = ROOT / "tests" / "bugs"
    if not any(folder.glob("ch*.toml")):
        return []
    from minipaged.course.museum import load_bugs

    return sorted(load_bugs(folder), key=lambda bug: (bug.chapter, bug.name))


def title(bug) -> str:
    words = bug.name.partition("_")[2].replace("_", " ")
    return words[0].upper() + words[1:]


def pages(repository: Repository) -> Iterator[tuple[str, str]]:
    """(path of the page, Markdown): the list, then each bug."""
    found = bugs()
    yield "museum/index.md", index(found)
    for bug in found:
        yield f"museum/{bug.name}.md", page(bug, repository)


def index(found: list) -> str:
    about = "Real bugs of real systems, and classics, each planted in our code and killed by a suite."
    head = front_matter("Bug museum", about) + "# The bug museum\n\n"
    if not found:
        return head + "The museum has no exhibit yet.\n"
    systems = sum(bug.source != "a classic" for bug in found)
    text = (
        f"{len(found)} bugs, {systems} of them seen in a real system, planted one at a time in a copy of one module. A "
        "test proves that the suite of the chapter kills every one. `minipaged hunt` hands you one without saying "
        "which: find it from the counterexample.\n"
    )
    for chapter, group in groupby(found, key=lambda bug: bug.chapter):
        lines = [f"- [{title(bug)}]({bug.name}.md): {bug.source}" for bug in group]
        text += f"\n## Chapter {chapter}\n\n" + "\n".join(lines) + "\n"
    return head + text


def page(bug, repository: Repository) -> str:
    module = ROOT / "kernels" / f"{bug.module.rpartition('.')[2]}.py"
    if not bug.module.startswith("minipaged.kernels."):
        module = ROOT / (bug.module.replace(".", "/") + ".py")
    about = " ".join(bug.about.split())
    planted = bug.planted()
    ours = module.read_text(encoding="utf-8")
    difference = "\n".join(list(difflib.unified_diff(ours.splitlines(), planted.splitlines(), lineterm="", n=4))[2:])
    where = ", ".join(f"`{name}`" for name in bug.functions()) or "the module itself"
    shown = f"In {where} of {repository.link(module)}:\n\n" + fenced(difference, "diff")
    chapter = f"[{bug.chapter}](../course/ch{bug.chapter:02d}.md)"
    return (
        front_matter(f"{title(bug)} (chapter {bug.chapter})", about)
        + f"# {title(bug)}\n\n{about}\n\n**Seen in:** {bug.source}. **Chapter:** {chapter}.\n\n"
        "Which lines would you look at first? Which property must fail, and on what smallest script?\n\n"
        f"{folded('The bug', shown, 'bug')}\n"
        f"`minipaged check {bug.chapter}` runs the suite that kills it. All exhibits: [the museum](index.md).\n"
    )
