"""The course as the site shows it: its map (minipaged/course/course_map.toml), and the files of each chapter."""

import re
from dataclasses import dataclass
from pathlib import Path

from minipaged.course.course_map import course_map

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Chapter:
    number: int
    title: str  # where no notebook gives one yet
    modules: tuple[str, ...]  # glob patterns from the root; the first file found is shown open
    players: tuple[str, ...] = ()  # of docs/traces/
    command: str = ""  # in the place of an exercise

    @property
    def page(self) -> str:
        return f"course/ch{self.number:02d}.md"

    @property
    def notebook(self) -> Path | None:
        return next(iter(sorted((ROOT / "tutorials").glob(f"{self.number:02d}_*.ipynb"))), None)

    @property
    def suites(self) -> list[Path]:
        found = [path for suite in course_map()[self.number].suites for path in sorted((ROOT / "tests").glob(suite))]
        return list(dict.fromkeys(found))

    def sources(self) -> list[Path]:
        found = [path for pattern in self.modules for path in sorted(ROOT.glob(pattern))]
        return [path for path in dict.fromkeys(found) if path.name != "__init__.py" and "bench" not in path.name]


CHAPTERS = tuple(
    Chapter(chapter.number, chapter.title, chapter.modules, chapter.players, chapter.command)
    for chapter in course_map().values()
)


def questions() -> dict[int, str]:
    """The question of each chapter, with what it covers."""
    return {number: chapter.covers for number, chapter in course_map().items()}


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
