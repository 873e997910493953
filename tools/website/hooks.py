"""MkDocs' hooks: pages that are made while the site is built, and marks in written pages that are filled in.

    <!-- player: two_requests -->       the player with docs/traces/two_requests.json
    <!-- course map -->                 the table of chapters
    <!-- measured: memory -->           a command, and the tables and charts of what it wrote into docs/measured/
    <!-- workloads -->                  what minipaged bench runs
    <!-- in the wild: 9 -->             what a notebook says of other systems
    <!-- museum size -->                how many bugs there are

A page's Markdown is made here and rendered by MkDocs like any other. The modules beside this file say how.
"""

import re
from itertools import pairwise
from pathlib import Path

import assets
import chapters
import home
import measured
import museum
import notebooks
import wild
from course import CHAPTERS, ROOT, Repository
from mathml import to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

PACKAGES = (
    "memory",
    "attention",
    "kvcache",
    "model",
    "engine",
    "simulator",
    "distributed",
    "server",
    "viz",
    "course",
    "kernels",
)
_ran: dict = {}  # notebook -> what the build ran
_kept: dict[str, str] = {}  # page -> its Markdown, and why the playground cannot run


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The chapters' place in the navigation: their titles are those of the pages."""
    for entry in config.nav:
        if isinstance(entry, dict) and "Course" in entry:
            entry["Course"] = ["course/index.md", *(chapter.page for chapter in CHAPTERS)]
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"] = ["reference/index.md", *(f"reference/{package}.md" for package in packages())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are made now."""
    files.append(File.generated(config, home.RECORDED, content=home.recorded()))
    repository = Repository(config.repo_url or "")
    paths = [chapter.notebook for chapter in CHAPTERS if chapter.notebook]
    try:
        _ran.update(notebooks.executed(paths))
    except RuntimeError as error:
        raise PluginError(str(error)) from error
    for chapter in CHAPTERS:
        notebook = _ran.get(chapter.notebook) if chapter.notebook else None
        _add(files, config, chapter.page, chapters.page(chapter, notebook, repository))
        if chapter.notebook:
            _add(files, config, f"course/{chapter.notebook.name}", chapter.notebook.read_bytes())
    for path, markdown in museum.pages(repository):
        _add(files, config, path, markdown)
    _add(files, config, "reference/index.md", reference_index())
    for path in sorted((ROOT / "minipaged" / "viz" / "player").iterdir()):
        files.append(File.generated(config, f"player/{path.name}", abs_src_path=str(path)))
    for package, modules in packages().items():
        _add(files, config, f"reference/{package}.md", reference(package, modules))
    for path, title in (("paper.md", "The paper and ours"), ("exercises.md", "Exercises")):
        if files.get_file_from_path(path) is None:  # written by a command, or by a hand that has not come to it
            _add(files, config, path, f"# {title}\n\nThis page is not written yet.\n")
    made, problem = assets.playground()
    if problem:
        print(f"the Playground cannot run: {problem}", flush=True)
    _kept["problem"] = problem
    for path, content in made.items():
        if isinstance(content, Path):
            files.append(File.generated(config, path, abs_src_path=str(content)))
        else:
            _add(files, config, path, content)
    return files


def _add(files: Files, config: MkDocsConfig, path: str, content: str | bytes) -> None:
    files.append(File.generated(config, path, content=content))


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """The bugs stand in no menu (there are many), and have a next and a previous one all the same."""
    exhibits = [file.page for file in files.documentation_pages() if file.src_uri.startswith("museum/ch") and file.page]
    exhibits.sort(key=lambda page: page.file.src_uri)
    for previous, following in pairwise(exhibits):
        previous.next_page, following.previous_page = following, previous
    return nav


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the marks."""
    page.edit_url = edit_url(page, config)

    def here(path: str) -> str:
        return get_relative_url(path, page.url)

    fills = {
        "course map": lambda _: chapters.course_map(_ran, "" if page.url.startswith("course/") else "course/"),
        "measured": measured.shown,
        "workloads": lambda _: measured.workloads(),
        "in the wild": lambda number: wild.collected(_ran, int(number)),
        "museum size": lambda _: str(len(museum.bugs())),
        "player": lambda name: player(name, here, frame="75%" if page.is_homepage else "50%"),
        "playground": lambda _: _kept["problem"],
        "side by side": lambda _: home.side_by_side(here, _kept["problem"]),
        "ours": home.ours,
    }
    markdown = home.placed(markdown, page.file.src_uri)

    def filled(match: re.Match[str]) -> str:
        return fills[match[1]](match[2] or "")

    markdown = re.sub(rf"<!-- ({'|'.join(fills)})(?:: ([\w-]+))? -->", filled, markdown)
    if "<trace-player" in markdown:  # loaded by the pages that have one
        markdown += f'\n\n<script type="module" src="{here("player/player.js")}"></script>\n'
    if "<side-by-side" in markdown:
        markdown += f'\n\n<script type="module" src="{here("figures/side_by_side.js")}"></script>\n'
    return markdown


def player(name: str, here, frame: str) -> str:
    """The element, opened at a frame, and inside of it what a page without scripts shows."""
    if not (ROOT / "docs" / "traces" / f"{name}.json").is_file():
        raise PluginError(f"there is no docs/traces/{name}.json to play: make traces")
    picture = f'<img src="{here("two_requests.svg")}" alt="Block tables of two requests, and the pool of blocks">'
    link = f'<a href="{here(f"traces/{name}.json")}">the recorded trace</a>'
    if name != "two_requests":
        picture = ""
    return (
        f'<div><trace-player src="{here(f"traces/{name}.json")}" frame="{frame}"><noscript>{picture}'
        f"<p>The player needs JavaScript. Here is {link}.</p></noscript></trace-player></div>"
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML; and listings are not searched, or the index would be larger than all pages that are read."""
    html = to_mathml(html)
    html = re.sub(r'<div class="(highlight|nb-html)">', r'<div class="\1" data-search-exclude>', html)
    html = re.sub(r"<(t[dh])>([^<]*[\u4e00-\u9fff][^<]*)</\1>", r'<\1 lang="zh-Hans">\2</\1>', html)
    html = html.replace('<div class="nb-html"', '<div class="nb-html" tabindex="0"')  # it may scroll
    return html.replace('<pre class="nb-text">', '<pre class="nb-text" tabindex="0" data-search-exclude>')


def edit_url(page: Page, config: MkDocsConfig) -> str | None:
    """Where the text of a page is changed: a chapter's in its notebook, a bug's in its file."""
    repository = Repository(config.repo_url or "")
    path = page.file.src_uri
    if found := re.fullmatch(r"course/ch(\d\d)\.md", path):
        notebook = CHAPTERS[int(found[1]) - 1].notebook
        return repository.edit(notebook) if notebook else None
    if found := re.fullmatch(r"museum/(ch\w+)\.md", path):
        return repository.edit(ROOT / "tests" / "bugs" / f"{found[1]}.toml")
    written = ROOT / "docs" / path
    return repository.edit(written) if written.is_file() else None


# ---- the reference --------------------------------------------------------------


def packages() -> dict[str, list[str]]:
    """Package -> its modules, as they are imported."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        folder = ROOT / "kernels" if package == "kernels" else ROOT / "minipaged" / package
        prefix = "kernels" if package == "kernels" else f"minipaged.{package}"
        modules = [f"{prefix}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
        if modules:
            found[package] = modules
    found["memory"].insert(0, "minipaged.reference")
    return found


def reference_index() -> str:
    lines = ['---\ntitle: Reference\ndescription: "The API of minipaged, from its docstrings."\n---\n\n# Reference\n']
    lines.append("Taken from the docstrings while this site was built.\n")
    for package, modules in packages().items():
        names = ", ".join(f"`{module.rpartition('.')[2]}`" for module in modules)
        lines.append(f"- [minipaged.{package}]({package}.md): {names}")
    return "\n".join(lines) + "\n"


def reference(package: str, modules: list[str]) -> str:
    note = (
        "\nInstalled as `minipaged.kernels`; in the repository it stands at the top level.\n"
        if package == "kernels"
        else ""
    )
    head = (
        f'---\ntitle: minipaged.{package}\ndescription: "The API of minipaged.{package}, from its docstrings."\n---\n\n'
    )
    return head + f"# minipaged.{package}\n{note}\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
