"""The course as the site shows it: the files of each chapter of its map, and pieces of Markdown for pages."""

import re
import sys
from pathlib import Path

from minipaged.course.course_map import ChapterOfCourse, course_map

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = course_map()  # number -> chapter
sys.path += [str(ROOT / "docs" / "playground"), str(ROOT / "tutorials")]  # what the browser and `make notebooks` run


def page_of(chapter: ChapterOfCourse) -> str:
    return f"course/ch{chapter.number:02d}.md"


def notebook_of(chapter: ChapterOfCourse) -> Path:
    return ROOT / "tutorials" / chapter.notebook


def found(patterns: tuple[str, ...], folder: Path = ROOT) -> list[Path]:
    """The files of glob patterns, each once, in the order of the patterns."""
    return list(dict.fromkeys(path for pattern in patterns for path in sorted(folder.glob(pattern))))


def sources(chapter: ChapterOfCourse) -> list[Path]:
    """The chapter's modules; the first one is the one to read."""
    return [path for path in found(chapter.modules) if path.name != "__init__.py" and "bench" not in path.name]


class Repository:
    """Links into the repository. Without a URL (MINIPAGED_REPO is not set) a path is text and no link."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def link(self, path: Path, line: int | None = None, text: str | None = None) -> str:
        name = path.relative_to(ROOT).as_posix()
        shown = text or f"`{name}`"
        if not self.url:
            return shown
        return f"[{shown}]({self.url}/blob/main/{name}{f'#L{line}' if line else ''})"

    def edit(self, path: Path) -> str | None:
        return f"{self.url}/edit/main/{path.relative_to(ROOT).as_posix()}" if self.url else None

    def clone(self) -> str:
        lines = (
            [f"git clone {self.url}", f"cd {self.url.rpartition('/')[2]}"]
            if self.url
            else ["cd minipaged  # your clone"]
        )
        return fenced("\n".join([*lines, "make demo"]))

    def colab(self, path: Path) -> str | None:
        """Where Google Colab opens a notebook of a repository on GitHub."""
        _, on_github, name = self.url.partition("https://github.com/")
        there = path.relative_to(ROOT).as_posix()
        return f"https://colab.research.google.com/github/{name}/blob/main/{there}" if on_github else None


def listing(path: Path, language: str = "python") -> str:
    """A file as a code block, taken from the source now."""
    return fenced(path.read_text(encoding="utf-8"), language, path.relative_to(ROOT).as_posix())


def fenced(text: str, language: str = "", title: str = "") -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    head = f'{language} title="{title}"' if title else language
    return f"{fence}{head}\n{text.rstrip()}\n{fence}\n"


def folded(title: str, markdown: str, kind: str = "quote") -> str:
    """Markdown behind a title that opens it (pymdownx.details)."""
    inner = "\n".join(f"    {line}" if line.strip() else "" for line in markdown.splitlines())
    return f'??? {kind} "{title}"\n\n{inner}\n'


def front_matter(title: str, description: str, boost: float = 1.0) -> str:
    """boost: of the page among what a search finds; chapters come first."""
    plain = re.sub(r"[`*$\[\]\\\"]", "", description)
    return f'---\ntitle: "{title}"\ndescription: "{plain}"\nsearch:\n  boost: {boost}\n---\n\n'
