"""Every page in a browser with the network cut: nothing leaves, nothing fails, nothing is wider than the screen."""

import functools
import json

import pytest
from built import KINDS, PAGES, ROOT, Watched

HOME_BYTES = 600_000  # of the first visit to Home, without the playground's runtime
PLAYERS = {  # page -> what its players play, in order
    "": ["two_requests"],
    "course/": ["parallel_sampling"],
    "course/ch04/": ["fragmentation"],
    "course/ch06/": ["two_requests"],
    "course/ch07/": ["paged_attention"],
    "course/ch09/": ["parallel_sampling", "beam_search", "prefix_cache"],
    "course/ch10/": ["preemption_recompute", "preemption_swap"],
    "playground/": ["two_requests"],
}
RECORDED = {name for names in PLAYERS.values() for name in names}  # on the playground they are a list to choose from


@pytest.mark.parametrize("paths", [PAGES[i : i + 8] for i in range(0, len(PAGES), 8)], ids=lambda paths: paths[0])
def test_no_request_leaves_and_nothing_fails(browser, base, paths):
    tabs = [Watched(browser, base) for _ in paths]  # side by side, since most of the time goes into waiting
    for tab, path in zip(tabs, paths, strict=True):
        tab.page.goto(base + path, wait_until="commit")
    for tab, path in zip(tabs, paths, strict=True):
        tab.settled()
        assert tab.page.locator("h1").count() == 1 and tab.page.locator("h1").first.text_content().strip(), path
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 1280, path
        tab.context.close()
        assert tab.problems == [], path


@pytest.mark.parametrize("path", KINDS)
def test_a_page_fits_a_narrow_screen(opened, path):
    page = opened(path, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # What is wider scrolls by itself, and a keyboard can reach it to scroll it.
    stuck = page.evaluate(
        """() => [...document.querySelectorAll('article *')].filter(e =>
            e.scrollWidth > e.clientWidth + 1 && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) &&
            e.checkVisibility() && e.tabIndex < 0 && !e.querySelector('a, button, input, [tabindex="0"]') &&
            !e.closest('trace-player')).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert stuck == []


@pytest.mark.parametrize("path", PLAYERS)
def test_players_stand_where_they_belong_and_play(opened, path):
    page = opened(path)
    elements = page.locator("trace-player[src]")
    sources = elements.evaluate_all("players => players.map(player => player.getAttribute('src'))")
    assert [source.rpartition("/")[2].removesuffix(".json") for source in sources] == PLAYERS[path]
    for element in elements.all():
        length = element.evaluate("player => player.film.length")
        assert length > 10
        element.evaluate("player => player.go(0)")
        element.get_by_role("button", name="One event on").click()
        assert element.evaluate("player => player.frame") == 1
        assert element.locator(".tp-said").text_content().strip()


def test_the_playground_offers_all_recorded_runs(opened):
    page = opened("playground/")
    offered = page.locator("#pg-recorded option").evaluate_all("options => options.map(o => o.value)")
    assert set(offered) == RECORDED and len(offered) == len(RECORDED)
    for name in offered:
        page.locator("#pg-recorded").select_option(name)
        title = json.loads((ROOT / "docs" / "traces" / f"{name}.json").read_text(encoding="utf-8"))["title"]
        page.wait_for_function(f"document.querySelector('trace-player[src]').film.document.title === '{title}'")


def test_the_search_finds_without_the_network(opened):
    page = opened("")
    page.locator(".md-search__input").click()
    page.keyboard.type("copy-on-write", delay=20)
    page.wait_for_selector(".md-search-result__item")
    assert page.locator(".md-search-result__item").count() >= 1


def test_the_search_speaks_chinese_too(opened):
    page = opened("glossary/")
    page.locator(".md-search__input").click()
    page.keyboard.type("写时复制", delay=20)
    page.wait_for_selector(".md-search-result__item")
    assert "glossary" in page.locator(".md-search-result__link").first.get_attribute("href")


def test_home_loads_little(browser, base, capsys):
    watched = Watched(browser, base)
    watched.open("")
    watched.context.close()
    total = sum(watched.sizes.values())
    with capsys.disabled():
        print(f"\nHome, first visit: {total:,} bytes in {len(watched.sizes)} requests")
    assert not watched.problems
    assert not [name for name in watched.sizes if name.startswith("playground/") or "search_index" in name]
    assert 50_000 < total < HOME_BYTES


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

    try:
        found = assets.from_npm()
    except RuntimeError as error:
        pytest.skip(str(error))
    return (found / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def test_a_keyboard_gets_from_the_top_of_a_page_to_its_text(opened):
    page = opened("course/ch04/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.md-skip')")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('article') !== null")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "what has the focus is seen"


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
        shown = page.locator(".highlight:has(.filename)").filter(has=page.get_by_text(module, exact=True))
        shown = shown.last.locator("code").text_content()
        assert shown.strip() == (ROOT / module).read_text(encoding="utf-8").strip()


def test_formulas_are_mathml(opened):
    page = opened("course/ch01/")
    assert page.locator("math").count() > 3
    assert page.locator("math mi").count() > 10 and "\\(" not in page.locator("article").inner_text()


@pytest.mark.parametrize("ratio", [1, 1.5, 2])
@pytest.mark.parametrize("path", ["course/ch01/", "course/ch07/"])
def test_no_display_formula_is_cut(opened, path, ratio):
    page = opened(path, ratio=ratio)
    cut = page.evaluate(
        """async () => {
            await document.fonts.ready;
            return [...document.querySelectorAll('math[display=block]')].filter(m => m.scrollHeight > m.clientHeight)
                .map(m => m.dataset.latex);
        }"""
    )
    assert cut == []
    assert page.evaluate("document.fonts.check('16px \"STIX Two Math\"')")


@pytest.mark.parametrize("number", range(1, 15))
def test_a_chapter_opens_with_its_picture_and_the_exercise_comes_before_the_answer(opened, number):
    page = opened(f"course/ch{number:02d}/")
    order = """() => { const top = (selector) => [...document.querySelectorAll(selector)].map(e => e.offsetTop)[0];
        const heading = (words) =>
            [...document.querySelectorAll('h2')].find(h => h.textContent.includes(words)).offsetTop;
        return [top('.opening'), top('.ways-in'), heading('1. '), heading('Exercise'), heading('The code'),
                heading('Its properties')]; }"""
    places = page.evaluate(order)
    assert places == sorted(places)
    assert page.locator(".opening svg").get_attribute("aria-label")
    assert page.get_by_role("link", name="Download the notebook").get_attribute("download")
    assert page.locator("details.example[open]").count() == 0, "the answer is folded"


def test_the_search_leads_to_chapters_first(opened):
    page = opened("")
    for words, chapter in [("block table", "ch06"), ("online softmax", "ch07"), ("copy-on-write", "ch09")]:
        page.locator(".md-search__input").click()
        page.locator(".md-search__input").fill("")
        page.keyboard.type(words, delay=20)
        page.wait_for_selector(".md-search-result__item")
        page.wait_for_timeout(500)
        first = page.locator(".md-search-result__link").first.get_attribute("href")
        assert "/course/" in first, f"{words}: {first}, not {chapter}"
