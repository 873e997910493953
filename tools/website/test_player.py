"""The player in a browser: what it shows at each moment is what minipaged's own replay of the trace gives."""

import json
import math

import pytest
from built import FILMS, ROOT, TRACES

from minipaged.memory.trace import Trace
from minipaged.viz.replay import replay


def document(name):
    return json.loads((ROOT / "docs" / "traces" / f"{name}.json").read_text(encoding="utf-8"))


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
    done = set()
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
        assert done <= set(frame["lanes"]["done"]), "a request that is preempted waits, and is not done"
        done = set(frame["lanes"]["done"])
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
    buttons = page.locator("trace-player").first  # the page has a second thing that plays, below
    assert buttons.get_by_role("button", name="Pause").is_visible()
    page.keyboard.press("Space")
    stopped = page.evaluate("document.querySelector('trace-player').frame")
    page.wait_for_timeout(600)
    assert page.evaluate("document.querySelector('trace-player').frame") == stopped
    buttons.get_by_role("button", name="Play").click()
    page.wait_for_function(
        "document.querySelector('trace-player').frame === document.querySelector('trace-player').film.length - 1"
    )
    buttons.get_by_role("button", name="Play").wait_for()  # at the end it rests


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


LINKS = """() => {
    const player = document.querySelector('trace-player'), stage = player.stage, frames = [];
    for (let i = 0; i < player.film.length; i++) {
        player.go(i);
        const box = (e) => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
        const lines = [...stage.querySelectorAll('.tp-links path[data-seq]')].map((path) => {
            const matrix = path.getScreenCTM(), at = (n) => path.getPointAtLength(n).matrixTransform(matrix);
            const [from, to] = [at(0), at(path.getTotalLength())];
            return {key: `${path.dataset.seq}:${path.dataset.logical}`, ends: [from.x, from.y, to.x, to.y],
                    strong: path.classList.contains('tp-strong')};
        });
        const rows = [...stage.querySelectorAll('.tp-row')].map((row) => ({
            key: `${row.dataset.seq}:${row.dataset.logical}`, seq: row.dataset.seq,
            entry: box(row.querySelector('.tp-entry')), target: row.dataset.target,
            block: box(stage.querySelector(`.tp-block[data-block="${row.dataset.target}"]`))}));
        const lefts = [...stage.querySelectorAll('.tp-block')].map((block) => Math.round(box(block)[0]));
        frames.push({lines, rows, columns: new Set(lefts).size, seq: player.film.event(i)?.seq ?? null});
    }
    return frames;
}"""


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("name", TRACES)
def test_a_line_ends_at_the_block_that_its_entry_names(player, name, width):
    """Every entry of every table has one, at every moment; those of the request that the event is about are strong."""
    for number, frame in enumerate(player(name, width=width).evaluate(LINKS)):
        assert frame["columns"] == 1, "the pool is one column"
        lines = {line["key"]: line for line in frame["lines"]}
        assert len(lines) == len(frame["lines"]) == len(frame["rows"]), f"frame {number}"
        for row in frame["rows"]:
            x1, y1, x2, y2 = lines[row["key"]]["ends"]
            left, top, right, bottom = row["entry"]
            assert abs(x1 - right) < 1 and top < y1 < bottom, f"frame {number}: {row['key']} begins elsewhere"
            left, top, right, bottom = row["block"]
            assert abs(x2 - left) < 1 and top < y2 < bottom, f"frame {number}: {row['key']} ends elsewhere"
            assert lines[row["key"]]["strong"] == (row["seq"] == frame["seq"])


@pytest.mark.parametrize("name", FILMS)
def test_a_film_has_marks_that_lead_to_the_moments_that_matter(player, name):
    page, marks = player(name), document(name)["marks"]
    assert 3 <= len(marks) <= 5 and marks == sorted(marks)
    for number, (frame, caption) in enumerate(marks, start=1):
        page.get_by_role("button", name=f"Moment {number}: ").click()
        assert page.evaluate("document.querySelector('trace-player').frame") == frame
        assert page.locator(".tp-caption.tp-now").text_content() == caption


def test_the_sums_of_paged_attention_are_those_of_all_scores_at_once(player):
    film, seen = document("paged_attention"), {}
    page = player("paged_attention")
    for frame, item in enumerate(film["events"], start=1):
        event = item["event"]
        if event["event"] != "read":
            continue
        assert event["block"] == film["base"]["tables"][event["seq"]][event["logical"]]
        scores = seen.setdefault(event["seq"], [])
        scores += event["scores"]
        assert event["m"] == max(scores)
        assert event["l"] == pytest.approx(sum(math.exp(score - max(scores)) for score in scores), rel=0.03)
        page.evaluate(f"document.querySelector('trace-player').go({frame})")
        shown = page.locator(".tp-new .tp-on").all_text_contents()
        assert shown == [f"{score:g}" for score in event["scores"]]
    lengths = {seq: film["base"]["num_tokens"][seq] + 1 for seq in seen}
    assert {seq: len(scores) for seq, scores in seen.items()} == lengths, "each query reads the whole context"


@pytest.mark.parametrize("name", FILMS)
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
