"""The figures of "Ten minutes" and the side-by-side in a browser: each reacts, and says what Python says."""

import json
import math

import pytest
from built import PATIENCE, ROOT, RUNS_PLAYGROUND, Watched

from minipaged.memory.page_table import AddressLayout
from minipaged.simulator.side_by_side import film

SECONDS = 60_000 * PATIENCE  # milliseconds, to load Python and run both servers
TEN_MINUTES_BYTES = 900_000
SIDE_BY_SIDE = ("", "course/ch04/", "course/ch06/", "course/ch11/")
needs_python = pytest.mark.skipif(
    not RUNS_PLAYGROUND, reason="the site was built without npm: no Python in the browser"
)


# ---- the side-by-side ------------------------------------------------------------------------------------------------

SHOWN = """second => { const figure = document.querySelector('side-by-side');
    figure.go(second);
    return figure.panels.map(panel =>
        Object.fromEntries(panel.counters.map(c => [c.dataset.count, c.textContent]))); }"""


def counters(made, second):
    """What both panels must show, from the servers' accounts."""
    return [
        {
            "holds tokens": f"{100 * frame['account'][0] / made['num_slots']:.1f} %",
            **dict(zip(("running", "waiting", "finished"), map(str, frame["queues"]), strict=True)),
        }
        for frame in (pool["frames"][second] for pool in made["pools"])
    ]


@pytest.fixture
def beside(opened):
    def show(path="", **options):
        page = opened(path, **options)
        page.wait_for_function("document.querySelector('side-by-side')?.film")
        page.evaluate("const f = document.querySelector('side-by-side'); f.seen?.disconnect(); f.pause()")
        return page

    return show


@pytest.mark.parametrize("path", SIDE_BY_SIDE)
def test_the_recorded_run_shows_the_account_of_the_simulator(beside, path):
    page, made = beside(path), film()
    for second in range(0, made["seconds"] + 1, 7):
        assert page.evaluate(SHOWN, second) == counters(made, second), f"second {second}"


AREA = """second => { const figure = document.querySelector('side-by-side');
    figure.go(second);
    const area = path => [...(path.getAttribute('d') ?? '').matchAll(/h([\\d.]+)v/g)]
        .reduce((sum, match) => sum + Number(match[1]), 0);
    return figure.panels.map(panel => { const sum = kind => Object.entries(panel.paths)
        .filter(([name]) => name.startsWith(kind)).reduce((total, [, path]) => total + area(path), 0);
        return [sum('held') / 0.5, sum('later') / 0.5, sum('never') / 0.5]; }); }"""


def test_what_is_drawn_is_the_account_too(beside):
    """Slots by their area. Around blocks a gap is left, so the right side is drawn a little smaller than it is."""
    page, made = beside(), film()
    for second in (20, 60, 120):
        (held, later, never), (paged, *_) = page.evaluate(AREA, second)
        account = made["pools"][0]["frames"][second]["account"]
        assert (held, later, never) == pytest.approx((account[0], account[1], account[2] + account[3]))
        held = made["pools"][1]["frames"][second]["account"][0]
        assert 0.9 * held < paged <= held


def test_it_plays_when_it_comes_into_sight_and_can_be_stopped(opened):
    page = opened("")
    page.wait_for_function("document.querySelector('side-by-side').timer")
    page.get_by_role("button", name="Pause", exact=True).click()
    assert page.evaluate("document.querySelector('side-by-side').timer") is None
    page.locator("side-by-side .fig-controls input").press("End")
    assert page.evaluate("document.querySelector('side-by-side').frame") == 120


@needs_python
def test_sliders_run_both_servers_in_the_browser_as_python_outside_does(browser, base):
    watched = Watched(browser, base)
    page = watched.open("")
    page.wait_for_function("document.querySelector('side-by-side')?.film")
    assert not [name for name in watched.sizes if name.startswith("playground/")], "no Python before a slider moves"
    page.get_by_label("Left: reserve").select_option("pow2")
    page.get_by_label("Right: block size").press("ArrowRight")
    page.get_by_label("Arrivals").press("ArrowRight")
    page.get_by_label("Spread of lengths").press("ArrowLeft")
    page.wait_for_function(
        """() => { const figure = document.querySelector('side-by-side');
            return figure.film.settings.policy === 'pow2' && !figure.hasAttribute('aria-busy'); }""",
        timeout=SECONDS,
    )
    page.evaluate("document.querySelector('side-by-side').pause()")
    settings = page.evaluate("document.querySelector('side-by-side').film.settings")
    assert settings == {"rate": 3.25, "spread": pytest.approx(0.766), "block_size": 32, "policy": "pow2"}
    made = film(**settings)
    assert page.evaluate("document.querySelector('side-by-side').film") == json.loads(json.dumps(made))
    for second in (0, 60, 120):
        assert page.evaluate(SHOWN, second) == counters(made, second), f"second {second}"
    watched.context.close()
    assert watched.problems == []


# ---- ten minutes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def figure(opened):
    """The page, and one of its figures, drawn."""

    def show(name, **options):
        page = opened("ten_minutes/", **options)
        place = page.locator(f"[data-figure={name}]")
        place.locator(".fig-said").wait_for()
        return place

    return show


def said(place):
    return place.locator(".fig-said").text_content()


def slide(slider, value):
    slider.evaluate("(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value)


def test_query_key_value(figure):
    """Each step computes three vectors, or three for each token where nothing was kept; no later query is read."""
    place = figure("queryKeyValue")
    for step in (1, 4, 8):
        slide(place.get_by_label("Step"), step)
        states = place.locator("[data-cell]").evaluate_all("cells => cells.map(c => [c.dataset.cell, c.dataset.state])")
        for cell, state in states:
            row = int(cell[1:]) + 1
            past = "unused" if cell[0] == "q" else "read"
            assert state == ("computed" if row == step else past if row < step else "later"), (step, cell)
        assert place.get_attribute("data-computed") == "3"
        weights = [float(text) for text in place.locator(".fig-weight").all_text_contents() if text]
        scores = [float(text) for text in place.locator(".fig-qk").all_text_contents() if text]
        total = sum(map(math.exp, scores))
        assert len(weights) == step and weights == pytest.approx([math.exp(s) / total for s in scores], abs=0.01)
    place.locator("label", has_text="no").click()
    assert place.get_attribute("data-computed") == "24" and "24 vectors" in said(place)


def test_growing_cache(figure):
    place = figure("growingCache")
    for tokens, requests in ((1, 1), (2048, 7), (2048, 8), (300, 64)):
        slide(place.get_by_label("Tokens of a request"), tokens)
        slide(place.get_by_label("Requests"), requests)
        need = tokens * requests * 800 * 1024
        assert int(place.get_attribute("data-bytes")) == need
        fits = 12 * 2**30 // (tokens * 800 * 1024)
        assert int(place.get_attribute("data-fit")) == fits
        assert ("It fits" in said(place)) == (requests <= fits)
    place.get_by_role("button", name="Write").click()
    place.page.wait_for_function(
        "document.querySelector('[data-figure=growingCache]').dataset.bytes > 64 * 310 * 819200"
    )
    place.get_by_role("button", name="Stop").click()


def test_reservations(figure):
    """The slots by kind are those that the allocator gave its account of."""
    recorded = json.loads((ROOT / "docs" / "traces" / "fragmentation.json").read_text(encoding="utf-8"))
    place = figure("reservations")
    for policy, words in (("max", "the longest"), ("pow2", "a power of two"), ("oracle", "the exact length")):
        place.locator("label", has_text=words).click()
        for step in (0, 9, len(recorded["frames"]) - 1):
            slide(place.get_by_label("Step"), step)
            pool = recorded["frames"][step]["pools"][policy]
            assert place.get_attribute("data-account") == " ".join(map(str, pool["account"]))
            assert place.locator(".fig-run").count() == len(pool["runs"])
            assert f"{pool['account'][0]} of 64 slots" in said(place)


def test_page_tables(figure):
    place = figure("pageTables")
    for words in ("one level", "three levels"):
        place.locator("label", has_text=words).click()
        slide(place.get_by_label("Address"), 501)
        assert place.get_attribute("data-physical") == str(6 * 8 + 501 % 8)
    assert "entries 3, 3, 2" in said(place)
    place.locator("label", has_text="block table").click()
    slide(place.get_by_label("Token"), 9)
    assert place.get_attribute("data-physical") == str(6 * 4 + 1)
    assert "4 MiB" in place.locator(".fig-costs").text_content()
    assert "512 GiB" in place.locator(".fig-costs").text_content()
    layout = AddressLayout(index_bits=(12, 12, 12), offset_bits=12, entry_bytes=8)
    for position in (0, 25, 40, 60):
        slide(place.get_by_label("Pages or blocks in use"), position)
        pages = math.floor(10 ** (position / 10) + 0.5)
        assert place.get_attribute("data-tree") == str(layout.dense_bytes(pages))


OWNED = """place => ({ owners: [...place.querySelectorAll('[data-block]')].map(b => b.dataset.owner),
    rows: Object.fromEntries([...place.querySelectorAll('[data-row]')]
        .map(row => [row.dataset.row, Number(row.dataset.target)])) })"""


def test_block_table(figure):
    """Whatever is pressed, a block has one owner, and a table names exactly the blocks of its request."""
    place = figure("blockTable")
    lengths = {"A": 7, "B": 0}
    presses = [
        "B arrives",
        *["A writes a token"] * 4,
        *["B writes a token"] * 4,
        "A ends",
        *["B writes a token"] * 3,
        "A arrives",
    ]
    for press in presses:
        place.get_by_role("button", name=press).click()
        name = press[0]
        lengths[name] = {"arrives": 7 if name == "A" else 5, "ends": 0}.get(press[2:], lengths[name] + 1)
        now = place.evaluate(OWNED)
        expected = {f"{seq}:{i}" for seq, n in lengths.items() for i in range(math.ceil(n / 4))}
        assert set(now["rows"]) == expected, press
        assert {row: now["owners"].index(row) for row in now["rows"]} == now["rows"], press
        assert len([owner for owner in now["owners"] if owner]) == len(expected)
        assert f"{8 - len(expected)} of 8 blocks are free" in said(place), press
    slide(place.get_by_label("Find a token of A"), 5)
    block = place.evaluate(OWNED)["rows"]["A:1"]
    assert f"+ 1 = {4 * block + 1}." in said(place)


def test_a_pool_that_is_full_is_said(figure):
    place = figure("blockTable")
    place.get_by_role("button", name="B arrives").click()
    for name in "AB" * 9 + "A":
        place.get_by_role("button", name=f"{name} writes a token").click()
    assert "waits" in said(place) and "0 of 8 blocks" in said(place)


def test_lines_end_at_the_block_that_the_table_names(figure):
    place = figure("blockTable")
    place.get_by_role("button", name="B arrives").click()
    ends = place.evaluate(
        """place => { const frame = place.querySelector('.fig-stage').getBoundingClientRect();
        return [...place.querySelectorAll('.fig-links path')].map(path => {
            const end = path.getPointAtLength(path.getTotalLength()), y = end.y + frame.top, x = end.x + frame.left;
            const at = [...place.querySelectorAll('.fig-pool [data-block]')].find(b => {
                const box = b.getBoundingClientRect();
                return box.top <= y && y <= box.bottom && Math.abs(box.left - x) < 2; });
            return at && Number(at.dataset.block); }); }"""
    )
    assert ends == list(place.evaluate(OWNED)["rows"].values())


def test_online_softmax(figure):
    """In any order, with any scores, a / l is what softmax over all scores gives."""
    place = figure("onlineSoftmax")
    scores, values = [0.5, 1.5, -0.5, 1.0, 2.0, 0.0, -1.0, 0.5, 1.0, 3.0], [2, 7, 1, 4, 6, 3, 9, 5, 8, 1]

    def holds():
        weights = [math.exp(score) for score in scores]
        right = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert float(place.get_attribute("data-whole")) == pytest.approx(right)
        assert float(place.get_attribute("data-answer")) == pytest.approx(right)

    for order in ((5, 1, 6), (6, 5, 1), (1, 6, 5)):
        place.get_by_role("button", name="Start again").click()
        for block in order:
            place.get_by_role("button", name=f"Read block {block}").click()
        holds()
        for token in (0, 6, 9):
            scores[token] = 3.0 - scores[token]
            slide(place.get_by_label(f"Score of token {token}", exact=True), scores[token])
            holds()
    place.get_by_role("button", name="In another order").click()
    holds()


def test_kernel_program(figure):
    """Each program reads the blocks of its own sequence, in the order of its table, and writes one answer."""
    place = figure("kernelProgram")
    for program, table in (("A, head 0", [5, 1, 6]), ("A, head 1", [5, 1, 6]), ("B, head 0", [2, 7])):
        place.locator("label", has_text=program).click()
        slide(place.get_by_label("Step of the program"), 0)
        read = []
        for _ in range(2 + 5 * len(table)):
            place.get_by_role("button", name="Next").click()
            lit = place.locator(".fig-pool .fig-block.fig-now").evaluate_all(
                "all => all.map(b => Number(b.dataset.block))"
            )
            read += [block for block in lit if block not in read]
        assert read == table, program
        assert math.isfinite(float(place.get_attribute("data-answer")))
        assert "writes a / l" in said(place)


CROSSED = """place => { const frame = place.querySelector('.fig-links').getBoundingClientRect();
    const path = place.querySelector('.fig-links path'), length = path.getTotalLength();
    const entries = [...place.querySelectorAll('.fig-entry:not(.fig-now)')].map(e => e.getBoundingClientRect());
    return Array.from({ length: 101 }, (_, i) => path.getPointAtLength(i * length / 100)).some(({ x, y }) =>
        entries.some(box => box.left < x + frame.left && x + frame.left < box.right &&
                            box.top < y + frame.top && y + frame.top < box.bottom)); }"""


def test_the_line_to_a_block_crosses_no_other_entry(figure):
    place = figure("kernelProgram")
    for program, steps in (("A, head 0", (4, 9, 14)), ("B, head 0", (4, 9))):
        place.locator("label", has_text=program).click()
        for step in steps:
            slide(place.get_by_label("Step of the program"), step)
            assert not place.evaluate(CROSSED), (program, step)


@pytest.mark.parametrize("width", [360, 1280])
def test_every_figure_is_used_by_keyboard_and_says_what_it_shows(opened, width):
    page = opened("ten_minutes/", width=width)
    assert page.locator("[data-figure]").count() == 7
    for place in page.locator("[data-figure]").all():
        place.locator(".fig-said").wait_for()
        before = said(place)
        reached = place.locator("input:not([type=radio]), button").first
        reached.focus()
        page.keyboard.press("ArrowRight" if reached.evaluate("e => e.type") == "range" else "Enter")
        assert said(place) != before or place.get_attribute("data-figure") == "onlineSoftmax"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_ten_minutes_loads_little(browser, base, capsys):
    watched = Watched(browser, base)
    watched.open("ten_minutes/")
    watched.context.close()
    total = sum(watched.sizes.values())
    with capsys.disabled():
        print(f"\nTen minutes, first visit: {total:,} bytes in {len(watched.sizes)} requests")
    assert not watched.problems and 50_000 < total < TEN_MINUTES_BYTES


@pytest.mark.parametrize("path", ["", "ten_minutes/"])
def test_a_still_picture_where_scripts_are_off(browser, base, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(base + path)
    pictures = page.locator("figure.fig img, side-by-side img")
    assert pictures.count() == (7 if path else 1)
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        assert picture.bounding_box()["height"] > 50 and picture.get_attribute("alt")
    context.close()
