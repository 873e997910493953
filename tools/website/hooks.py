"""MkDocs' hooks: pages that are made while the site is built, and marks in written pages that are filled in.

    <!-- player: two_requests -->       the player with docs/traces/two_requests.json
    <!-- film: ch06_freed_twice -->     the player with the smallest script of a bug of the museum
    <!-- course map -->                 the table of chapters
    <!-- measured: memory -->           the tables and charts of what a command wrote into docs/measured/
    <!-- workloads -->                  what minipaged bench runs
    <!-- in the wild: 9 -->             what a notebook says of other systems
    <!-- museum size -->                how many bugs there are
    <!-- side-by-side -->, <!-- ours -->    the figures of home.py
    <!-- clone -->, <!-- colab -->      how to get a copy, and to run a notebook elsewhere

A page's Markdown is made here and rendered by MkDocs like any other. The modules beside this file say how.
"""

import re
from collections.abc import Callable
from html import unescape
from itertools import pairwise
from pathlib import Path

import assets
import chapters
import home
import measured
import museum
import notebooks
from course import CHAPTERS, ROOT, Repository, front_matter, notebook_of, page_of
from figures import in_page
from mathml import to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

COLAB = (
    "Without an installation, *Open in Colab* at the top of each chapter runs its notebook on a machine of Google's: "
    "the first cell installs what is needed there."
)
_ran: dict = {}  # notebook -> what the build ran
_missing = ""  # why the playground cannot run


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The places of chapters and of the reference in the navigation: their titles are those of the pages."""
    config.edit_uri = "edit/main/docs/" if config.repo_url else ""
    made = {"Course": ["course/index.md", *map(page_of, CHAPTERS.values())]}
    made["Reference"] = ["reference/index.md", *(f"reference/{package}.md" for package in packages())]
    for entry in (each for each in config.nav or () if isinstance(each, dict)):
        entry.update((name, made[name]) for name in made.keys() & entry.keys())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are made now."""
    global _missing
    repository = Repository(config.repo_url or "")
    try:
        _ran.update(notebooks.executed(map(notebook_of, CHAPTERS.values())))
    except RuntimeError as error:
        raise PluginError(str(error)) from error
    made: dict[str, str | bytes | Path] = {}
    written = {}  # page -> where its text is changed, from docs/
    for chapter in CHAPTERS.values():
        made[page_of(chapter)] = chapters.page(chapter, _ran[notebook_of(chapter)], repository)
        made[f"course/{chapter.notebook}"] = notebook_of(chapter)
        written[page_of(chapter)] = f"../tutorials/{chapter.notebook}"
    for bug in museum.numbered().values():
        written[f"museum/{bug.name}.md"] = f"../tests/bugs/{bug.name}.toml"
    made |= museum.pages(repository)
    made |= {f"player/{path.name}": path for path in (ROOT / "minipaged" / "viz" / "player").iterdir()}
    made |= {home.RECORDED: home.recorded()} | reference() | assets.examples()
    try:
        made |= assets.playground()
        _missing = ""
    except RuntimeError as error:
        _missing = str(error)
        print(f"the Playground cannot run: {error}", flush=True)
    for path, content in made.items():
        source = {"abs_src_path": str(content)} if isinstance(content, Path) else {"content": content}
        file = File.generated(config, path, **source)
        file.edit_uri = written.get(path)
        files.append(file)
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """The bugs stand in no menu (there are many), and have a next and a previous one all the same."""
    exhibits = [file.page for file in files.documentation_pages() if file.src_uri.startswith("museum/ch") and file.page]
    exhibits.sort(key=lambda page: page.file.src_uri)
    for previous, following in pairwise(exhibits):
        previous.next_page, following.previous_page = following, previous
    return nav


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the marks."""
    repository = Repository(config.repo_url or "")

    def here(path: str) -> str:
        if files.get_file_from_path(path) is None:
            raise PluginError(f"{page.file.src_uri} names {path}, and there is no such file")
        return get_relative_url(path, page.url)

    fills = {
        "course map": lambda _: chapters.course_map(_ran, "" if page.url.startswith("course/") else "course/"),
        "measured": measured.shown,
        "workloads": lambda _: measured.workloads(),
        "in the wild": lambda number: chapters.in_the_wild(_ran, int(number)),
        "museum size": lambda _: str(len(museum.numbered())),
        "player": lambda name: player(here, f"traces/{name}.json"),
        "film": lambda name: player(here, f"museum/{name}.json"),
        "clone": lambda _: repository.clone(),
        "colab": lambda _: COLAB if repository.colab(ROOT / "README.md") else "",
        "playground": lambda _: _missing,
        "side-by-side": lambda _: home.side_by_side(here, _missing),
        "ours": home.ours,
    }
    return re.sub(rf"<!-- ({'|'.join(fills)})(?:: ?(.+?))? -->", lambda mark: fills[mark[1]](mark[2]), markdown)


def player(here: Callable[[str], str], film: str) -> str:
    """The element, and inside of it what a page without scripts shows; and its script, which is loaded once a page and
    for which no other script of the page waits."""
    words = f'The player needs JavaScript. Here is <a href="{here(film)}">the recorded trace</a>.'
    element = f'<trace-player src="{here(film)}"><noscript><p>{words}</p></noscript></trace-player>'
    return f'<div>{element}<script async type="module" src="{here("player/player.js")}"></script></div>'


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML; and listings are not searched, or the index would be larger than all pages that are read."""
    html = to_mathml(html)
    if page.file.src_uri == "paper.md":
        html = re.sub(r'<img alt="([^"]*)" src="[./\w]*?(\w+\.svg)"\s*/?>', chart, html)
    html = html.replace('<div class="highlight">', '<div class="highlight" data-search-exclude>')
    return re.sub(r"<(t[dh])>([^<]*[\u4e00-\u9fff][^<]*)</\1>", r'<\1 lang="zh-Hans">\2</\1>', html)


def chart(match: re.Match[str]) -> str:
    """A chart of docs/paper/ as a part of the page, so that it follows the page's colours."""
    return in_page((ROOT / "docs" / "paper" / match[2]).read_text(encoding="utf-8"), unescape(match[1]))


# ---- the reference --------------------------------------------------------------


def packages() -> dict[str, list[str]]:
    """Package -> its modules, as they are imported. What only commands use is left out."""
    folders = [path.parent for path in sorted((ROOT / "minipaged").glob("*/__init__.py"))]
    named = {folder.name: f"minipaged.{folder.name}" for folder in folders if folder.name not in ("bench", "cli")}
    modules = {
        name: [f"{package}.{path.stem}" for path in sorted((ROOT / package.replace(".", "/")).glob("*.py"))]
        for name, package in {**named, "kernels": "kernels"}.items()
    }
    modules["memory"].insert(0, "minipaged.reference")
    return {name: [each for each in found if not each.endswith("__init__")] for name, found in modules.items()}


def reference() -> dict[str, str]:
    """Path -> Markdown of the pages of the API."""
    index = ["Taken from the docstrings while this site was built.\n"]
    made = {}
    for name, modules in packages().items():
        inside = ", ".join(f"`{each.rpartition('.')[2]}`" for each in modules)
        index.append(f"- [minipaged.{name}]({name}.md): {inside}")
        note = "Installed as `minipaged.kernels`; in the repository it stands at the top level.\n" * (name == "kernels")
        parts = [f"# minipaged.{name}\n", note, *(f"::: {module}" for module in modules)]
        head = front_matter(f"minipaged.{name}", f"The API of minipaged.{name}, from its docstrings.", boost=0.3)
        made[f"reference/{name}.md"] = head + "\n\n".join(parts) + "\n"
    head = front_matter("Reference", "The API of minipaged, from its docstrings.", boost=0.3)
    return made | {"reference/index.md": f"{head}# Reference\n\n" + "\n".join(index) + "\n"}
