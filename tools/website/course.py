"""The course as the site shows it: thirteen chapters, the modules of each, and the recorded runs that go with it."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Chapter:
    number: int
    title: str  # where no notebook gives one yet
    modules: tuple[str, ...]  # glob patterns from the root; the first file found is shown open
    players: tuple[str, ...] = ()  # of docs/traces/

    @property
    def page(self) -> str:
        return f"course/ch{self.number:02d}.md"

    @property
    def notebook(self) -> Path | None:
        return next(iter(sorted((ROOT / "tutorials").glob(f"{self.number:02d}_*.ipynb"))), None)

    @property
    def suites(self) -> list[Path]:
        return sorted((ROOT / "tests").glob(f"test_ch{self.number:02d}_*.py"))

    def sources(self) -> list[Path]:
        found = [path for pattern in self.modules for path in sorted(ROOT.glob(pattern))]
        return [path for path in dict.fromkeys(found) if path.name != "__init__.py" and "bench" not in path.name]


CHAPTERS = (
    Chapter(1, "Masked attention", ("minipaged/reference.py",)),
    Chapter(2, "A transformer that speaks", ("minipaged/model/transformer.py", "minipaged/model/*.py")),
    Chapter(
        3,
        "The contiguous cache",
        ("minipaged/kvcache/contiguous.py", "minipaged/attention/contiguous.py"),
    ),
    Chapter(4, "Where does the memory go?", ("minipaged/memory/reservation.py",), ("fragmentation",)),
    Chapter(5, "Page tables", ("minipaged/memory/page_table.py", "minipaged/memory/address_space.py")),
    Chapter(
        6,
        "The block table",
        ("minipaged/memory/block_allocator.py", "minipaged/memory/block_table.py"),
        ("two_requests",),
    ),
    Chapter(
        7,
        "Paged attention",
        ("minipaged/attention/gathered.py", "minipaged/attention/*.py", "minipaged/kvcache/paged.py"),
    ),
    Chapter(8, "Triton kernels", ("kernels/paged_decode.py", "kernels/*.py")),
    Chapter(
        9,
        "Sharing",
        (
            "minipaged/memory/prefix_cache.py",
            "minipaged/memory/swap.py",
            "minipaged/memory/block_manager.py",
            "minipaged/kvcache/swap_space.py",
            "minipaged/engine/beam_scheduler.py",
            "minipaged/engine/beam_search.py",
        ),
        ("parallel_sampling", "beam_search", "prefix_cache"),
    ),
    Chapter(
        10,
        "Serving",
        ("minipaged/engine/scheduler.py", "minipaged/engine/*.py"),
        ("preemption_recompute", "preemption_swap"),
    ),
    Chapter(11, "What did it buy?", ("minipaged/simulator/simulate.py", "minipaged/simulator/*.py")),
    Chapter(12, "What does the choice cost?", ("minipaged/simulator/blocks.py", "minipaged/memory/kv_cache_size.py")),
    Chapter(
        13,
        "More than one device",
        ("minipaged/distributed/shares.py", "minipaged/distributed/layers.py", "minipaged/distributed/*.py"),
    ),
)


def questions() -> dict[int, str]:
    """The question of each chapter, from the course map in docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, flags=re.MULTILINE)
    return {int(number): question for number, question in rows if int(number) <= len(CHAPTERS)}


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
