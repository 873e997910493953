"""The built site in a headless browser. (make test-site)

What the player shows is held against minipaged's own replay, what the playground runs against the same Python outside
of the browser. Every page is opened with the network cut: a request to anywhere else fails the test.

    WEBSITE=DIR    the built site (default: site/)        CHROMIUM=PATH    the browser (default: found on the PATH)
"""

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest

from minipaged.memory.trace import Trace
from minipaged.viz.replay import replay

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `site-test` brings playwright")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = Path(os.environ.get("WEBSITE", ROOT / "site"))
TRACES = sorted(path.stem for path in (ROOT / "docs" / "traces").glob("*.json") if path.stem != "fragmentation")
PAGES = sorted(path.relative_to(SITE).as_posix().removesuffix("index.html") for path in SITE.rglob("*.html"))
KINDS = [
    "",
    "course/",
    "course/ch04/",
    "course/ch06/",
    "playground/",
    "exercises/",
    "museum/",
    "museum/ch09_fork_without_a_reference/",
]
KINDS += [
    "paper/",
    "measured/",
    "reference/",
    "reference/memory/",
    "design/",
    "wild/",
    "glossary/",
    "teachers/",
    "404.html",
]
HOME_BYTES = 600_000
RUNS_PLAYGROUND = (SITE / "playground" / "manifest.json").is_file()

sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT / "docs" / "playground"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def base():
    """The address of the site, served from this machine."""
    assert (SITE / "index.html").is_file(), f"{SITE} holds no site: make site"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as play:
        yield play.chromium.launch(executable_path=path, args=["--no-sandbox"])


class Watched:
    """A page with the network cut. `problems` grows by every request that leaves, every error, every missing file."""

    def __init__(self, browser, base, width=1280, scheme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page, self.base, self.problems, self.bytes = self.context.new_page(), base, [], 0
        self.context.route("**/*", self._route)
        self.page.on("console", lambda m: m.type == "error" and self.problems.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("response", self._response)
        self.page.set_default_timeout(30_000)

    def _route(self, route):
        if route.request.url.startswith((self.base, "data:", "blob:")):
            route.continue_()
        else:
            self.problems.append(f"a request left the site: {route.request.url}")
            route.abort()

    def _response(self, response):
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")
        self.bytes += int(response.headers.get("content-length", 0))

    def open(self, path):
        self.page.goto(self.base + path, wait_until="networkidle")
        return self.page


@pytest.fixture
def opened(browser, base):
    made = []

    def open_page(path, **options):
        watched = Watched(browser, base, **options)
        made.append(watched)
        watched.open(path)
        return watched.page

    yield open_page
    for watched in made:
        watched.context.close()
    assert [problem for watched in made for problem in watched.problems] == []


@pytest.fixture
def player(opened):
    """Home, with its player showing a trace of docs/traces/ from the beginning."""

    def show(name, **options):
        page = opened("", **options)
        page.evaluate(
            """async (name) => {
                const player = document.querySelector('trace-player');
                await player.open(`traces/${name}.json`);
                player.go(0);
            }""",
            name,
        )
        return page

    return show


def document(name):
    return json.loads((ROOT / "docs" / "traces" / f"{name}.json").read_text(encoding="utf-8"))


# ---- the player ------------------------------------------------------------------------------------------------------

READ = """() => {
    const player = document.querySelector('trace-player'), stage = player.stage, frames = [];
    for (let i = 0; i < player.film.length; i++) {
        player.go(i);
        const blocks = {}, rows = {}, lanes = {};
        for (const block of stage.querySelectorAll('.tp-block')) {
            if (block.dataset.owners) blocks[block.dataset.block] = [block.dataset.owners, Number(block.dataset.fill),
                [...block.querySelectorAll('.tp-on')].map(slot => slot.textContent)];
        }
        for (const row of stage.querySelectorAll('.tp-row'))
            rows[`${row.dataset.seq}:${row.dataset.logical}`] = row.dataset.target;
        for (const lane of stage.querySelectorAll('.tp-lane'))
            lanes[lane.dataset.lane] = [...lane.querySelectorAll('.tp-chip')].map(chip => chip.dataset.seq);
        frames.push({blocks, rows, lanes, said: player.said.textContent});
    }
    return frames;
}"""


def snapshots(film):
    """The states after each event, by minipaged's own replay of the events in the document."""
    head = film["trace"]
    trace = Trace(head["num_blocks"], head["block_size"], head["num_host_blocks"])
    for item in film["events"]:
        event = dict(item["event"])
        trace.step = event.pop("step")
        trace.record(event.pop("event"), **event)
    return list(replay(trace))


@pytest.mark.parametrize("name", TRACES)
def test_each_frame_shows_the_state_of_the_trace(player, name):
    film = document(name)
    frames = player(name).evaluate(READ)
    states = snapshots(film)
    assert len(frames) == len(states) + 1
    assert frames[0]["blocks"] == {} == frames[0]["rows"]
    for number, (frame, state) in enumerate(zip(frames[1:], states, strict=True)):
        owned = {
            **{str(b): o for b, o in state.by_block().items()},
            **{f"h{b}": o for b, o in state.by_host_block().items()},
        }
        expected = {b: {f"{o.seq}:{o.logical}" for o in owners} for b, owners in owned.items() if owners}
        assert {b: set(shown[0].split()) for b, shown in frame["blocks"].items()} == expected, f"frame {number + 1}"
        for block, (_, fill, words) in frame["blocks"].items():
            if not block.startswith("h"):
                assert fill == state.block_fill(int(block)), f"frame {number + 1}, block {block}"
                assert words == film_words(state, int(block)), f"frame {number + 1}, block {block}"
        entries = {f"{seq}:{n}": state.place(seq, n) for seq in state.sequences for n in range(state.num_logical(seq))}
        assert frame["rows"] == entries, f"frame {number + 1}"
        assert frame["said"] == film["events"][number]["words"]
        shown = [seq for lane in frame["lanes"].values() for seq in lane]
        assert sorted(shown) == sorted(seq["name"] for seq in film["sequences"]), "everybody is in one lane"
        assert set(frame["lanes"]["running"]) >= set(state.tables) - set(frame["lanes"]["waiting"]) - set(
            frame["lanes"]["done"]
        )


def film_words(state, block):
    from minipaged.viz.words import visible

    return [visible(word) for word in state.block_words(block)]


@pytest.mark.parametrize("name", ["two_requests", "beam_search", "preemption_swap", "fragmentation"])
def test_a_step_and_a_step_back_give_the_same_picture(player, name):
    page = player(name)
    stage = "document.querySelector('trace-player').stage.innerHTML"
    forward = [page.evaluate(stage)]
    last = page.evaluate("document.querySelector('trace-player').film.length") - 1
    for _ in range(last):
        page.get_by_role("button", name="One event on").click()
        forward.append(page.evaluate(stage))
    assert len(set(forward)) > last // 2, "the pictures differ"
    for expected in reversed(forward[:-1]):
        page.get_by_role("button", name="One event back").click()
        assert page.evaluate(stage) == expected


def test_steps_of_the_engine_are_whole(player):
    page = player("two_requests")
    steps = [event["event"]["step"] for event in document("two_requests")["events"]]
    ends = [i for i in range(1, len(steps) + 1) if i == len(steps) or steps[i] != steps[i - 1]]
    frame = "document.querySelector('trace-player').frame"
    for end in ends:
        page.get_by_role("button", name="One step of the engine on").click()
        assert page.evaluate(frame) == end
    for end in [*reversed(ends[:-1]), 0]:
        page.get_by_role("button", name="One step of the engine back").click()
        assert page.evaluate(frame) == end


def test_the_keyboard_does_it_all(player):
    page = player("two_requests")
    frame, last = "document.querySelector('trace-player').frame", len(document("two_requests")["events"])
    page.locator(".tp-player").focus()
    for key, expected in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last), ("ArrowRight", last)]:
        page.keyboard.press(key)
        assert page.evaluate(frame) == expected, key
    page.keyboard.press("Home")
    assert page.evaluate(frame) == 0
    page.keyboard.press("PageDown")
    after_a_step = page.evaluate(frame)
    assert after_a_step > 1
    page.keyboard.press("PageUp")
    assert page.evaluate(frame) == 0
    slider = page.get_by_role("slider", name="Moment")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(frame) == 1
    assert slider.get_attribute("aria-valuetext").startswith(f"1 of {last}: ")


def test_play_pause_and_speed(player):
    page = player("two_requests")
    page.get_by_label("Speed").select_option("fast")
    page.locator(".tp-player").focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('trace-player').frame >= 3")
    assert page.get_by_role("button", name="Pause").is_visible()
    page.keyboard.press("Space")
    stopped = page.evaluate("document.querySelector('trace-player').frame")
    page.wait_for_timeout(600)
    assert page.evaluate("document.querySelector('trace-player').frame") == stopped
    page.get_by_role("button", name="Play").click()
    page.wait_for_function(
        "document.querySelector('trace-player').frame === document.querySelector('trace-player').film.length - 1"
    )
    page.get_by_role("button", name="Play").wait_for()  # at the end it rests


def test_the_first_press_of_play_begins_at_the_beginning(opened):
    page = opened("")
    assert page.evaluate("document.querySelector('trace-player').frame") > 10, "it opens like a poster"
    page.get_by_role("button", name="Play").click()
    assert page.evaluate("document.querySelector('trace-player').frame") <= 1


def test_words_tell_what_the_picture_shows(player):
    page = player("parallel_sampling")
    page.evaluate("document.querySelector('trace-player').go(30)")
    page.get_by_text("This moment in words").click()
    lines = page.locator(".tp-moment li").all_text_contents()
    state = snapshots(document("parallel_sampling"))[29]
    for seq in state.sequences:
        places = ", ".join(f"block {block}" for block in state.tables[seq])
        assert any(line.startswith(f"{seq} holds {state.num_tokens[seq]} token") and places in line for line in lines)
    assert lines[-1] == f"{len(state.by_block())} of {state.num_blocks} blocks are in use, {state.num_free} are free."
    assert page.locator(".tp-said").get_attribute("aria-live") == "polite"


def test_fragmentation_shows_each_run_and_loses_no_slot(player):
    film = document("fragmentation")
    page = player("fragmentation")
    shown = page.evaluate(
        """() => { const player = document.querySelector('trace-player'), frames = [];
            for (let i = 0; i < player.film.length; i++) { player.go(i);
                frames.push(Object.fromEntries([...player.stage.querySelectorAll('.tp-memory')].map(bar => [
                    bar.dataset.policy, [...bar.querySelectorAll('.tp-run')].map(run =>
                        [run.dataset.run, Number(run.dataset.held)])]))); }
            return frames; }"""
    )
    assert len(shown) == len(film["frames"])
    for frame, expected in zip(shown, film["frames"], strict=True):
        for policy, pool in expected["pools"].items():
            assert frame[policy] == [[run[0], run[2]] for run in pool["runs"]]
            assert sum(pool["account"]) == film["num_slots"]
            assert pool["account"][0] == sum(run[2] for run in pool["runs"])


@pytest.mark.parametrize("name", [*TRACES, "fragmentation"])
def test_the_player_fits_a_narrow_page(player, name):
    page = player(name, width=360)
    page.evaluate("document.querySelector('trace-player').go(20)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in page.locator(".tp-controls button").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and min(box["width"], box["height"]) >= 24


def test_a_film_of_another_version_is_refused(player):
    said = player("two_requests").evaluate(
        """() => { try {
            document.querySelector('trace-player').load({schema: 'minipaged.site', version: 2});
            return '';
        } catch (error) { return error.message; } }"""
    )
    assert "version 1, got minipaged.site version 2" in said


# ---- the playground --------------------------------------------------------------------------------------------------

needs_python = pytest.mark.skipif(
    not RUNS_PLAYGROUND, reason="the site was built without npm: the Playground cannot run"
)


def outside(settings):
    """The same run, in this Python."""
    import playground

    return json.loads(playground.run(settings))


@needs_python
def test_the_playground_gives_the_trace_of_python_outside(opened):
    page = opened("playground/")
    for example in page.locator("select[name=example] option").all_text_contents():
        page.locator("select[name=example]").select_option(example)
        settings = page.evaluate(
            """() => { const form = document.querySelector('#pg-run'), value = n => form.elements[n].value;
                return { requests: [...document.querySelectorAll('.pg-request')].map(row => ({
                    prompt: row.querySelector('[name=prompt]').value,
                    max_tokens: Number(row.querySelector('[name=max_tokens]').value),
                    n: Number(row.querySelector('[name=n]').value),
                    arrives: Number(row.querySelector('[name=arrives]').value)})),
                num_blocks: Number(value('num_blocks')), block_size: Number(value('block_size')),
                num_host_blocks: Number(value('num_host_blocks')), preemption: value('preemption'),
                prefix_caching: form.elements.prefix_caching.checked,
                max_num_batched_tokens: Number(value('max_num_batched_tokens')),
                max_num_seqs: Number(value('max_num_seqs')) }; }"""
        )
        page.evaluate("document.querySelector('#pg-film').document = null")
        page.get_by_role("button", name="Run", exact=True).click()
        page.wait_for_function("document.querySelector('#pg-film').document", timeout=40_000)
        assert page.evaluate("document.querySelector('#pg-film').document") == outside(settings), example
        assert len(outside(settings)["events"]) > 10


@needs_python
def test_what_cannot_run_is_said_in_one_line(opened):
    page = opened("playground/")
    page.locator("input[name=num_blocks]").fill("2")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector("#pg-status.pg-error", timeout=40_000)
    said = page.locator("#pg-status").text_content()
    assert said.startswith("request 1: the request may reach 12 stored tokens") and "8 slots" in said


def graded(page, source):
    page.locator("#pg-check textarea").fill(source)
    page.get_by_role("button", name="Try the properties").click()
    page.wait_for_function("document.querySelector('#pg-result').dataset.wrong !== undefined", timeout=40_000)
    return page.locator("#pg-status").text_content()


@needs_python
def test_the_allocator_as_it_is_keeps_all_properties(opened):
    page = opened("playground/")
    source = page.locator("#pg-check textarea").input_value()
    assert source == (ROOT / "minipaged" / "memory" / "block_allocator.py").read_text(encoding="utf-8")
    assert re.match(r"Right: all \d\d+ properties hold\.", graded(page, source))
    assert page.locator("#pg-counterexample").is_hidden()


@needs_python
@pytest.mark.parametrize("bug", ["ch06_count_not_raised", "ch06_freed_while_shared"])
def test_an_edit_that_breaks_the_allocator_is_caught_and_drawn(opened, bug):
    from minipaged.course.museum import load_bugs

    planted = next(each for each in load_bugs() if each.name == bug)
    page = opened("playground/")
    said = graded(page, planted.planted())
    assert re.match(r"Caught: \d+ properties hold, and [1-9]", said), said
    assert page.locator("#pg-result pre").text_content().strip()


@needs_python
def test_a_broken_block_table_is_drawn_as_tables(opened):
    from minipaged.course.museum import load_bugs

    planted = next(each for each in load_bugs() if each.name == "ch06_truncate_leaks")
    page = opened("playground/")
    page.locator("#pg-check select[name=file]").select_option("block_table.py")
    assert graded(page, planted.planted()).startswith("Caught")
    film = page.locator("#pg-counterexample")
    assert film.is_visible() and film.locator(".tp-block").count() >= 1
    assert "append_tokens" in film.evaluate("player => player.film.document.events.map(event => event.words).join()")


@needs_python
def test_what_is_no_python_is_said(opened):
    page = opened("playground/")
    assert graded(page, "class BlockAllocator(:\n") == "The module could not be imported."
    assert "SyntaxError" in page.locator("#pg-result").text_content()


def test_recorded_runs_are_chosen_from_a_list(opened):
    page = opened("playground/")
    page.locator("#pg-recorded").select_option("fragmentation")
    page.wait_for_selector(".tp-memory")


# ---- every page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_no_request_leaves_and_nothing_fails(opened, path):
    page = opened(path)
    assert page.locator("h1").count() == 1 and page.locator("h1").first.text_content().strip()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_search_finds_without_the_network(opened):
    page = opened("")
    page.locator(".md-search__input").click()
    page.keyboard.type("copy-on-write", delay=20)
    page.wait_for_selector(".md-search-result__item")
    assert page.locator(".md-search-result__item").count() >= 1


def test_home_loads_little(browser, base):
    watched = Watched(browser, base)
    watched.open("")
    watched.context.close()
    assert not watched.problems
    assert 50_000 < watched.bytes < HOME_BYTES, f"{watched.bytes} bytes"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", KINDS)
def test_axe_finds_nothing_serious(opened, path, scheme):
    page = opened(path, scheme=scheme)
    page.evaluate(axe())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        f"{each['id']} ({each['impact']}): {each['nodes'][0]['html'][:160]} and {len(each['nodes']) - 1} more"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []


@functools.cache
def axe():
    import assets

    found = assets.from_npm("axe-core", "4.14.1", ("axe.min.js",))
    if isinstance(found, str):
        pytest.skip(found)
    return found["axe.min.js"].read_text(encoding="utf-8")


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.title, self.description = [], set(), "", ""
        self._in_title = False

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        self.ids.add(values.get("name"))
        self.targets += [values[name] for name in ("href", "src") if values.get(name)]
        self._in_title |= tag == "title" and not self.title
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


def test_no_internal_link_is_broken():
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
    print("\nlinks that leave the site:\n  " + "\n  ".join(sorted(external)))
    assert broken == []


def test_every_page_has_a_title_and_a_description_of_its_own():
    titles = {path: links(file_of(path)).title for path in PAGES}
    doubled = {title for title in titles.values() if list(titles.values()).count(title) > 1}
    assert doubled == set()
    assert [path for path in KINDS if path != "404.html" and len(links(file_of(path)).description) < 30] == []


def test_next_leads_through_the_course_in_order(opened):
    page = opened("course/")
    for number in range(1, 14):
        page.locator("a.md-footer__link--next").click()
        page.wait_for_load_state()
        assert page.url.endswith(f"/course/ch{number:02d}/")
    page.locator("a.md-footer__link--prev").click()
    page.wait_for_load_state()
    assert page.url.endswith("/course/ch12/")


def test_listings_are_the_source(opened):
    for number, module in [(1, "minipaged/reference.py"), (6, "minipaged/memory/block_allocator.py")]:
        page = opened(f"course/ch{number:02d}/")
        shown = page.locator(".highlight", has_text=module).first.locator("code").text_content()
        assert shown.strip() == (ROOT / module).read_text(encoding="utf-8").strip()


def test_formulas_are_mathml(opened):
    page = opened("course/ch01/")
    assert page.locator("math").count() > 3
    assert page.locator("math mi").count() > 10 and "\\(" not in page.locator("article").inner_text()


def test_no_module_is_left_out_of_its_chapter():
    """Each of our modules that a chapter owns is shown on its page; those without a chapter are named here."""
    spec = importlib.util.spec_from_file_location("course", HERE / "course.py")
    course = importlib.util.module_from_spec(spec)
    sys.modules["course"] = course
    spec.loader.exec_module(course)
    shown = {path for chapter in course.CHAPTERS for path in chapter.sources()}
    for path in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "minipaged").glob("*/*.py")]:
        text = path.read_text(encoding="utf-8")
        if re.match(r'"""Chapters? \d', text) and path.name != "__init__.py" and "bench" not in path.name:
            assert path in shown, f"{path.relative_to(ROOT)} says that it belongs to a chapter, and no page shows it"
