"""The playground: Python in the browser gives what the same Python gives outside, and finds what is broken."""

import json
import re

import pytest
from built import PATIENCE, ROOT, RUNS_PLAYGROUND, Watched

SECONDS = 40_000 * PATIENCE  # milliseconds, to load Python and do what is asked
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
        page.wait_for_function("document.querySelector('#pg-film').document", timeout=SECONDS)
        assert page.evaluate("document.querySelector('#pg-film').document") == outside(settings), example
        assert len(outside(settings)["events"]) > 10


@needs_python
def test_what_cannot_run_is_said_in_one_line(opened):
    page = opened("playground/")
    page.locator("input[name=num_blocks]").fill("2")
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector("#pg-status.pg-error", timeout=SECONDS)
    said = page.locator("#pg-status").text_content()
    assert said.startswith("request 1: the request may reach 12 stored tokens") and "8 slots" in said


def graded(page, source):
    page.evaluate("source => document.querySelector('#pg-check').write(source)", source)
    page.get_by_role("button", name="Try the properties").click()
    page.wait_for_function("document.querySelector('#pg-result').dataset.wrong !== undefined", timeout=SECONDS)
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
    page = opened("playground/", width=360)
    said = graded(page, planted.planted())
    assert re.fullmatch(
        r"Caught(, after [1-9]\d* propert(y|ies) that holds?| by the first property that was tried)\.", said
    ), said
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#pg-result pre").first.text_content().strip()


@needs_python
def test_a_broken_block_table_is_drawn_as_tables(opened):
    from minipaged.course.museum import load_bugs

    planted = next(each for each in load_bugs() if each.name == "ch06_truncate_leaks")
    page = opened("playground/")
    page.locator("#pg-check select[name=file]").select_option("block_table.py")
    assert graded(page, planted.planted()).startswith("Caught")
    film = page.locator("#pg-counterexample")
    assert film.is_visible() and film.locator(".tp-block").count() >= 1
    assert film.locator(".tp-queues").count() == 0, "a script of calls has no queue"
    assert "append_tokens" in film.evaluate("player => player.film.document.events.map(event => event.words).join()")


@needs_python
def test_what_is_no_python_is_said(opened):
    page = opened("playground/")
    assert graded(page, "class BlockAllocator(:\n") == "The module could not be imported."
    assert "SyntaxError" in page.locator("#pg-result").text_content()


@needs_python
def test_an_example_plays_before_python_is_there(opened):
    page = opened("playground/")
    page.wait_for_function("document.querySelector('#pg-film').film?.length > 10")
    assert page.evaluate("performance.getEntriesByType('resource').filter(e => e.name.includes('wasm')).length") == 0


@needs_python
def test_an_example_plays_where_the_player_comes_last(browser, base):
    """The page's script has the examples before the player's module is there."""
    watched, held = Watched(browser, base), []
    watched.context.route("**/player/player.js", lambda route: held.append(route))
    watched.page.goto(f"{base}playground/", wait_until="commit")
    watched.page.wait_for_selector("select[name=example] option", state="attached")
    held.pop().continue_()
    watched.page.wait_for_function("document.querySelector('#pg-film').film?.length > 10")
    watched.context.close()
    assert watched.problems == []


@needs_python
def test_code_that_raises_is_shown_with_its_smallest_script(opened):
    page = opened("playground/")
    source = page.locator("#pg-check textarea").input_value()
    assert graded(page, source.replace("self._free.popleft()", "self._free.pop_left()")).startswith("Caught")
    assert "AttributeError" in page.locator("#pg-result").text_content()
    assert "pool.allocate()  # raises AttributeError" in page.locator(".pg-script").text_content()


@needs_python
def test_a_lost_block_is_drawn_as_lost(opened):
    from minipaged.course.museum import load_bugs

    planted = next(each for each in load_bugs() if each.name == "ch06_truncate_leaks")
    page = opened("playground/")
    page.locator("#pg-check select[name=file]").select_option("block_table.py")
    graded(page, planted.planted())
    assert page.locator("#pg-counterexample .tp-lost .tp-owners").first.text_content() == "lost"


@needs_python
def test_a_link_carries_the_code(opened):
    page = opened("playground/")
    page.locator("#pg-check select[name=file]").select_option("block_table.py")
    source = "# mine: \u00e9\nclass BlockTable:\n    pass\n"
    page.evaluate("source => document.querySelector('#pg-check').write(source)", source)
    page.get_by_role("button", name="A link to this code").click()
    page.wait_for_function("location.hash.length > 10")
    other = opened("playground/" + page.evaluate("location.hash"))
    other.wait_for_function("document.querySelector('#pg-check textarea').value.startsWith('# mine')")
    assert other.locator("#pg-check textarea").input_value() == source
    assert other.locator("#pg-check select[name=file]").input_value() == "block_table.py"
    assert (
        other.locator(".cm-lineNumbers").count() == 1 and other.locator(".tok-keyword").first.text_content() == "class"
    )


def test_recorded_runs_are_chosen_from_a_list(opened):
    page = opened("playground/")
    page.locator("#pg-recorded").select_option("fragmentation")
    page.wait_for_selector(".tp-memory")
