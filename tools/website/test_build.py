"""The built site as files, with no browser: links, titles, and what the build makes out of what commands wrote."""

import copy
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlparse

import assets
import chapters
import course
import measured
import measured_tables
import museum
import pytest
from built import HERE, KINDS, PAGES, ROOT, SITE

FORMS = {  # what the benchmarks write, in small: the fields of minipaged/bench
    "bench": {
        "machine": {"platform": "Linux", "python": "3.11.7", "cores": 2},
        "threads": 2,
        "rounds": 3,
        "timings": [
            {
                "workload": work,
                "system": system,
                "dtype": "float32",
                "num_new": 128,
                "seconds": [2.0 * slow, 1.6 * slow, 4.0 * slow],
                "first_token_seconds": first,
                "peak_bytes": 900 << 20,
                "equal_tokens": 1.0,
                "slots_with_tokens": None if system == "transformers" else 0.8,
                "scheduler_share": None,
                "tokens_per_second": 64.0 / slow,
            }
            for work in "AB"
            for system, slow, first in (("paged", 1.0, [0.1, 0.3, 0.2]), ("transformers", 2.5, []))
        ],
    },
    "growth": {
        "machine": {"platform": "Linux", "python": "3.11.7", "cores": 2},
        "token": {"recompute": [[64, 0.1], [128, 0.2]], "paged": [[64, 0.02], [128, 0.02], [256, 0.021]]},
        "step": {"paged": [[1, 0.02], [2, 0.03]]},
        "memory": {"contiguous": [[140, 2048], [280, 4096]], "paged": [[140, 144], [280, 288]]},
    },
    "attention": {
        "machine": {"torch": "2.13.0", "threads": 2, "processor": "A processor (avx2 fma)"},
        "tables": [
            {
                "dtype": "float32",
                "pool": "no block free",
                "ms": {"minipaged": [4.0, 5.0, 6.0], "contiguous, padded": [9.0, 10.0, 12.0], "bandwidth floor": [3.0]},
                "errors": {"minipaged": 1e-7, "contiguous, padded": 2e-7},
                "best": {"minipaged": 4.0, "contiguous, padded": 9.0, "bandwidth floor": 3.0},
                "medians": {"minipaged": 5.0, "contiguous, padded": 10.0, "bandwidth floor": 3.0},
            }
        ],
    },
    "kernels": {
        "machine": "a GPU",
        "copy": 2e12,
        "matmul": 6e14,
        "rows": [
            {
                "shape": "smollm2",
                "num_seqs": 4,
                "context": 1024,
                "num_queries": queries,
                "kv_bytes": 1e9,
                "flops": 3e11,
                "ms": {"minipaged": 1.0, "peer": 2.0},
            }
            for queries in (1, 1024)
        ],
    },
}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.title, self.description = [], set(), "", ""
        self._in_title, self.edit = False, None

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        self.ids.add(values.get("name"))
        self.targets += [values[name] for name in ("href", "src") if values.get(name)]
        self._in_title |= tag == "title" and not self.title
        if values.get("rel") == "edit":
            self.edit = values["href"]
        if tag == "meta" and values.get("name") == "description":
            self.description = values.get("content", "")

    def handle_data(self, text):
        if self._in_title:
            self.title += text

    def handle_endtag(self, tag):
        if tag == "title":
            self._in_title = False


@functools.cache
def links(path):
    parser = Links()
    parser.feed((SITE / path).read_text(encoding="utf-8"))
    return parser


def file_of(path):
    return f"{path}index.html" if path == "" or path.endswith("/") else path


# ---- all pages --------------------------------------------------------------


def test_no_internal_link_is_broken(capsys):
    broken, external = [], set()
    for path in PAGES:
        if path == "404.html":  # its links begin at the root of the site
            continue
        for target in links(file_of(path)).targets:
            if urlparse(target).scheme in ("http", "https"):
                external.add(target)
                continue
            if urlparse(target).scheme:
                continue
            there = urlparse(urljoin(f"/{path}", target))
            name = file_of(unquote(there.path).lstrip("/"))
            if not (SITE / name).is_file():
                broken.append(f"{path}: {target}")
            elif there.fragment and name.endswith(".html") and unquote(there.fragment) not in links(name).ids:
                broken.append(f"{path}: {target} (no such place on that page)")
    with capsys.disabled():
        print(f"\n{len(external)} links leave the site:\n  " + "\n  ".join(sorted(external)))
    assert broken == []


def test_every_page_has_a_title_and_a_description_of_its_own():
    titles = {path: links(file_of(path)).title for path in PAGES}
    doubled = {title for title in titles.values() if list(titles.values()).count(title) > 1}
    assert doubled == set()
    described = {path: links(file_of(path)).description for path in PAGES if path != "404.html"}
    assert [path for path, text in described.items() if len(text) < 25] == []
    assert [path for path in KINDS if path != "404.html" and len(described[path]) > 240] == []


def test_edit_links_name_files_that_exist():
    without = []
    for path in PAGES:
        url = links(file_of(path)).edit
        if url is None:
            without.append(path)
        else:
            assert (ROOT / url.partition("/edit/main/")[2]).is_file(), url
    made = [path for path in without if not path.startswith("reference/")]
    if len(without) == len(PAGES):
        pytest.skip("the site was built without MINIPAGED_REPO: it links to no repository")
    assert made == ["404.html", "museum/"], "only pages that are made out of several files have no edit link"


def test_no_module_is_left_out_of_its_chapter():
    """Each of our modules that a chapter owns is shown on its page; those without a chapter are named here."""
    shown = {path for chapter in course.CHAPTERS.values() for path in course.sources(chapter)}
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "minipaged").glob("*/*.py")]:
        text = path.read_text(encoding="utf-8")
        if (
            re.match(r'"""Chapters? \d', text)
            and path.name != "__init__.py"
            and "bench" not in str(path.relative_to(ROOT))
        ):
            assert path in shown, f"{path.relative_to(ROOT)} says that it belongs to a chapter, and no page shows it"


def test_what_builds_the_site_stays_small():
    tests = {"built.py", "conftest.py"}
    files = [path for path in HERE.rglob("*.*") if path.suffix in (".py", ".js", ".html") and path.name not in tests]
    lines = {path.name: len(path.read_text().splitlines()) for path in files if not path.name.startswith("test_")}
    assert len(lines) > 10 and sum(lines.values()) <= 1300, lines


# ---- single pages --------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_measured_shows_what_a_command_wrote(name, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    assert "Not measured yet" in measured.shown(name)
    (tmp_path / f"{name}.json").write_text(json.dumps(FORMS[name]), encoding="utf-8")
    shown = measured.shown(name)
    assert "Not measured" not in shown
    assert "paged" in shown and "\n| --- |" in shown.replace("| ---: ", "| --- ").replace("|---", "| ---")
    for svg in re.findall(r"<svg.*?</svg>", shown):
        assert "\n" not in svg and "currentColor" in svg and 'id="axes' not in svg
    assert ("<svg" in shown) == (name != "kernels")


def test_the_table_of_the_bench_has_the_right_numbers():
    shown = measured_tables.bench(FORMS["bench"])
    ours, peer = [line for line in shown.splitlines() if line.startswith(("| paged", "| transformers"))][:2]
    assert ours == "| paged | float32 | 64.0 | 32.0 to 80.0 | 1.00 x | 0.20 s | 900 MiB | 100.0% | 80.0% |"
    assert peer == "| transformers | float32 | 25.6 | 12.8 to 32.0 | 2.50 x | - | 900 MiB | 100.0% | - |"


def test_paging_costs_nothing_only_where_the_figures_say_so():
    found = copy.deepcopy(FORMS["attention"])
    shown = measured_tables.attention(found)
    assert "Paging costs nothing here" in shown and "in float32 0.50 times (contiguous, padded)" in shown
    assert "A processor (avx2 fma). torch" in shown
    assert "| contiguous, padded | 10.00 | 9.00 to 12.00 | 0.50 x | 0.44 x | 2e-07 |" in shown
    found["tables"][0]["ms"]["contiguous, padded"] = [4.8, 4.9, 5.0]
    found["tables"][0]["medians"]["contiguous, padded"] = 4.9
    assert "Paging has a price here" in measured_tables.attention(found)


def test_a_file_of_another_form_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    (tmp_path / "bench.json").write_text('{"timings": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"docs/measured/bench\.json is not what its command writes"):
        measured.shown("bench")


def test_make_measured_writes_what_the_page_names():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("@$(BIN)/", "")
    recipe = makefile.partition("\nmeasured:")[2].partition("\n\n")[0]
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    commands = dict(
        re.findall(r"^```\n(.+ docs/measured/([\w-]+)\..+)\n```\n\n<!-- measured: \2 -->", page, re.MULTILINE)
    )
    assert [*commands.values()] == re.findall("<!-- measured: (.+) -->", page)
    by_hand = {"bench", "growth"}  # they take up to an hour
    assert {name for command, name in commands.items() if command not in recipe} == by_hand


def test_in_the_wild_speaks_of_every_chapter_and_names_commits():
    text = (ROOT / "docs" / "wild.md").read_text(encoding="utf-8")
    for number in range(1, 15):
        assert f"### Chapter {number}\n\n<!-- in the wild: {number} -->" in text
        assert f"[{number}](course/ch{number:02d}.md)" in text.partition("## Chapter by chapter")[0]
    defined = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, flags=re.MULTILINE))
    for name, url in defined.items():
        commit = re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/blob/([0-9a-f]{40})/\S+", url)
        assert commit, url
        said = set(re.findall(rf"\]\[{name}\][^|\n]*?\(([0-9a-f]{{7}})\)", text))
        assert said == {commit[1][:7]}, f"{name}: the page says {said}, and the link {commit[1][:7]}"
    html = (SITE / "wild" / "index.html").read_text(encoding="utf-8")
    parts = re.split(r'<h3 id="chapter-\d+">', html)[1:]
    assert len(parts) == 14 and all("<code>" in part for part in parts)


def test_the_glossary_has_chinese_for_each_term_and_all_chapters():
    rows = re.findall(
        r"^\| (?!term|---)(.+) \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    chapters = []
    for row in rows:
        term, chinese, meaning, chapter = row.split(" | ")
        assert re.search(r"[\u4e00-\u9fff]", chinese), term
        assert meaning and re.fullmatch(r"\[(\d+)\]\(course/ch(\d\d)\.md\)", chapter), term
        chapters.append(int(re.match(r"\[(\d+)", chapter)[1]))
    assert chapters == sorted(chapters) and set(chapters) == set(range(1, 15))
    assert len({row.split(" | ")[0] for row in rows}) == len(rows)


def test_a_chapter_opens_in_colab_where_the_repository_is_on_github():
    notebook = ROOT / "tutorials" / "06_block_table.ipynb"
    there = "https://colab.research.google.com/github/someone/minipaged/blob/main/tutorials/06_block_table.ipynb"
    assert course.Repository("https://github.com/someone/minipaged/").colab(notebook) == there
    assert course.Repository("https://example.org/minipaged").colab(notebook) is None
    chapter = course.CHAPTERS[6]
    assert f"[Open in Colab]({there})" in chapters.ways_in(
        chapter, course.Repository("https://github.com/someone/minipaged")
    )
    assert "[Download the notebook](06_block_table.ipynb)" in chapters.ways_in(chapter, course.Repository(""))


def test_the_museum_asks_before_it_tells():
    """The name of a bug, its text and its lines are folded; what is seen and the smallest script are not."""
    for number, bug in museum.numbered().items():
        html = (SITE / "museum" / bug.name / "index.html").read_text(encoding="utf-8")
        asked = re.sub(
            r"<details.*?</details>", "", html.partition("<article")[2].partition("</article")[0], flags=re.DOTALL
        )
        assert f"Bug {number}" in asked and "What is seen." in asked and "<details" in html
        assert " ".join(bug.about.split())[:40] not in asked and "@@" not in asked
    index = (SITE / "museum" / "index.html").read_text(encoding="utf-8")
    assert "a classic" not in index.partition("<article")[2]


def test_every_bug_has_its_smallest_script():
    seen = json.loads((ROOT / "docs" / "museum.json").read_text(encoding="utf-8"))
    assert [row["bug"] for row in seen] == sorted(bug.name for bug in museum.load_bugs()), "run: make bugs"
    assert all(row["killed"] for row in seen)
    drawn = [row["bug"] for row in seen if museum.film_of(row)]
    assert len(drawn) > len(seen) // 3


def test_without_npm_the_playground_says_why_it_cannot_run(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "KEPT", tmp_path)
    monkeypatch.setattr(assets.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="npm is not on this machine, and brings Python for the browser"):
        assets.playground()


RUN = """
import json, sys, playground
requests = [{"prompt": "a b c d e", "max_tokens": 4, "n": 2, "arrives": 0}]
settings = {"requests": requests, "preemption": "swap", "prefix_caching": True, "max_num_seqs": 4}
sizes = {"num_blocks": 8, "block_size": 2, "num_host_blocks": 4, "max_num_batched_tokens": 8}
film = json.loads(playground.run(settings | sizes))
assert any(item["event"]["event"] == "fork" for item in film["events"])
assert not {"torch", "numpy"} & {*sys.modules}
"""
CHECK = """
import json, playground
source = open("minipaged/memory/block_allocator.py").read()
assert json.loads(playground.check("block_allocator.py", source + "    share = None", "."))["wrong"]
"""
FILM = """
import sys
from minipaged.simulator.side_by_side import film
assert film(rate=1.0, policy="oracle")["pools"][1]["frames"][-1]["queues"][2] > 0
assert not {"torch", "numpy"} & {*sys.modules}
"""


@pytest.mark.parametrize("script", [RUN, CHECK, FILM], ids=["run", "check", "film"])
def test_what_the_browser_is_given_runs_by_itself(script, tmp_path):
    """In a process that finds no other module of ours."""
    zipfile.ZipFile(io.BytesIO(assets.ours())).extractall(tmp_path)
    shutil.copy(ROOT / "docs" / "playground" / "playground.py", tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
