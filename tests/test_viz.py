"""The pictures tell the truth: what a trace replays to is what the real block tables hold, whatever wrote the tokens.

And they are safe to look at: no token text leaves its slot, whichever output shows it.
"""

import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from minipaged.cdiv import cdiv
from minipaged.memory.trace import EVENTS, Trace
from minipaged.viz.colours import colours
from minipaged.viz.export import MAPS, apply_changes, maps_of, to_json
from minipaged.viz.replay import at, at_step, replay, steps
from minipaged.viz.script import load_script, run_script
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.svg import to_svg
from minipaged.viz.svg_parts import CHAR_WIDTH
from minipaged.viz.terminal import draw, show
from minipaged.viz.trace_file import read_trace
from minipaged.viz.words import in_words, visible

SCRIPTS = Path(__file__).parent.parent / "tutorials" / "traces"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "<script>alert(1)</script>",
    "</text></svg>",
    "]]>",
    "&amp;&nbsp;",
    '" onload="x',
    "[red]red[/red]",
    "[/]",
    "\n",
    "\r\n\t",
    "\x1b[2J\x1b[31m",
    "\x07\x00\x7f\x9b",
    "日本語テキスト",
    "👩‍👩‍👧",
    "e\u0301" * 9,
    "\u202ereversed",
    "\ud800",
    "\ufffe",
    "\u2028",
    " ",
    "",
)
WORDS = st.sampled_from(("Four", "score", "and", "seven", "years")) | st.sampled_from(HOSTILE) | st.text(max_size=6)
NAMES = ("A", "B", "request-1", "[red]<b>\x1b")


@st.composite
def scripts(draw, words=WORDS):
    """Request scripts that can be run: an op that the memory refuses (no block is free) is left out."""
    script = {
        "num_blocks": draw(st.integers(4, 12), label="num_blocks"),
        "block_size": draw(st.sampled_from((1, 2, 3, 4, 16)), label="block_size"),
        "num_host_blocks": draw(st.sampled_from((0, 6, 12)), label="num_host_blocks"),
        "prefix_cache": draw(st.booleans(), label="prefix_cache"),
        "ops": [],
    }
    for _ in range(draw(st.integers(1, 12), label="number of ops")):
        held, away = [({}, set()), *model_of(script)][-1]
        here = [seq for seq in held if seq not in away]
        kinds = ["append"] * (len(away) < len(NAMES)) + ["append", "fork", "truncate", "free"] * bool(here)
        kinds += ["swap_out"] * bool(here and script["num_host_blocks"]) + ["swap_in"] * bool(away & {*held})
        op = {"op": draw(st.sampled_from(kinds))}
        if op["op"] == "append":
            op["seq"] = draw(st.sampled_from([name for name in NAMES if name not in away]))
            op |= draw(
                st.fixed_dictionaries({"tokens": st.lists(words, min_size=1, max_size=9)})
                | st.fixed_dictionaries({"count": st.integers(1, 9)})
            )
        elif op["op"] == "swap_in":
            op["seqs"] = draw(st.lists(st.sampled_from(sorted(away & {*held})), min_size=1, unique=True))
        elif op["op"] == "swap_out":
            op["seqs"] = draw(st.lists(st.sampled_from(here), min_size=1, unique=True))
        else:
            op["seq"] = draw(st.sampled_from(here if op["op"] == "fork" else [*held]))
            if op["op"] == "fork":
                op["as"] = draw(st.sampled_from(NAMES))
            elif op["op"] == "truncate":
                op["keep"] = draw(st.integers(0, len(held[op["seq"]])))
        longer = {**script, "ops": [*script["ops"], op]}
        try:
            run_script(longer)
        except ValueError:
            continue
        script = longer
    return script


traces = scripts().map(run_script)


def model_of(script):
    """The plain model, with no block in it: after each op, the words of every sequence, and which are on the host."""
    held, away = {}, set()
    for op in script["ops"]:
        if op["op"] == "append":
            held[op["seq"]] = held.get(op["seq"], []) + op.get("tokens", [""] * op.get("count", 0))
        elif op["op"] == "fork":
            held[op["as"]] = list(held[op["seq"]])
        elif op["op"] == "truncate":
            held[op["seq"]] = held[op["seq"]][: op["keep"]]
        elif op["op"] == "free":
            del held[op["seq"]]
            away.discard(op["seq"])
        else:
            (away.update if op["op"] == "swap_out" else away.difference_update)(op["seqs"])
        yield {seq: words for seq, words in held.items() if words}, set(away)


def run_and_look(script):
    """The trace, and after each op (state after it, real blocks by sequence, real number of free blocks)."""
    real = []
    trace = run_script(script, lambda tables: real.append({seq: table.blocks for seq, table in tables.items()}))
    by_step, snapshot, after = {snapshot.step: snapshot for snapshot in steps(trace)}, None, []
    for number, blocks in enumerate(real, start=1):
        snapshot = by_step.get(number, snapshot)  # an op that changes nothing leaves no event
        after.append((snapshot, {seq: table for seq, table in blocks.items() if table}))
    return trace, after


def printed(show_it, width, encoding="utf-8"):
    """What a pipe gets. show_it: something to print, or a function of the console."""
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, newline="\n")
    console = Console(file=stream, width=width)
    show_it(console) if callable(show_it) else console.print(show_it)
    stream.flush()
    return buffer.getvalue().decode(encoding)


def texts_in(svg):
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


# Replay: the trace gives the state back.


@given(scripts())
def test_after_each_op_the_replayed_tables_are_the_real_ones(script):
    _, after = run_and_look(script)
    for (snapshot, blocks), (_, away) in zip(after, model_of(script), strict=True):
        if snapshot is None:
            assert not blocks
            continue
        assert snapshot.tables == {seq: table for seq, table in blocks.items() if seq not in away}
        assert snapshot.host_tables == {seq: table for seq, table in blocks.items() if seq in away}


@given(scripts())
def test_read_through_its_table_a_sequence_has_the_words_it_was_given(script):
    _, after = run_and_look(script)
    for (snapshot, _), (words, _) in zip(after, model_of(script), strict=True):
        assert (snapshot.num_tokens if snapshot else {}) == {seq: len(held) for seq, held in words.items()}
        for seq, held in words.items():
            assert list(snapshot.texts.get(seq, [""] * len(held))) == held


def test_a_fork_sees_no_more_than_its_parent_where_a_third_sees_more():
    ops = [
        {"op": "append", "seq": "A", "tokens": ["Four", "score", "and"]},
        {"op": "fork", "seq": "A", "as": "B"},
        {"op": "truncate", "seq": "B", "keep": 1},
        {"op": "fork", "seq": "B", "as": "C"},
    ]
    snapshot = at(run_script({"num_blocks": 4, "block_size": 4, "ops": ops}), -1)
    assert snapshot.num_tokens == {"A": 3, "B": 1, "C": 1}
    assert snapshot.texts["C"] == ["Four"] and snapshot.block_words(0) == ["Four", "score", "and"]


@given(scripts())
def test_after_a_reset_the_pools_are_empty_and_the_same_events_may_follow(script):
    trace = run_script(script)
    twice = read_trace(trace.dumps().splitlines())
    twice.record("reset")
    number = len(twice.events)
    for event in trace.events:
        twice.record(event["event"], **{key: value for key, value in event.items() if key not in ("event", "step")})
    states = list(replay(twice))
    empty = states[number - 1]
    assert not (empty.tables or empty.host_tables or empty.num_tokens or empty.texts or empty.cached)
    assert empty.num_free == empty.num_blocks
    for before, after in zip(states[: number - 1], states[number:], strict=True):
        assert maps_of(before) == maps_of(after)


@given(scripts())
def test_references_fill_and_free_blocks_follow_from_the_tables(script):
    _, after = run_and_look(script)
    for snapshot, blocks in after:
        if snapshot is None:
            continue
        named = [block for table in snapshot.tables.values() for block in table]
        for block, owners in snapshot.by_block().items():
            assert len(owners) == len(snapshot.owners(block)) == named.count(block)
            assert owners or block in snapshot.cached
            assert snapshot.block_fill(block) >= max((owner.fill for owner in owners), default=0)
        assert snapshot.num_free == snapshot.num_blocks - len({*named, *snapshot.cached})
        for seq in blocks:
            fills = [snapshot.fill(seq, logical) for logical in range(snapshot.num_logical(seq))]
            assert sum(fills) == snapshot.num_tokens[seq]


@given(traces, st.data())
def test_at_gives_one_of_the_states_that_replay_goes_through(trace, data):
    states = list(replay(trace))
    assert len(states) == len(trace.events)
    if states:
        index = data.draw(st.integers(-len(states), len(states) - 1))
        assert at(trace, index) == states[index]
        step = states[index].step
        assert at_step(trace, step).tables == [state for state in states if state.step == step][-1].tables
    with pytest.raises(IndexError):
        at(trace, len(states))
    with pytest.raises(ValueError, match="no event of step 999"):
        at_step(trace, 999)


@given(traces)
def test_letters_and_colours_of_a_sequence_stay_the_same(trace):
    labels = [snapshot.labels for snapshot in replay(trace)]
    assert all(label == labels[0] for label in labels)
    assert all(len(set(label.values())) == len(label) for label in labels)


def test_a_one_letter_name_is_its_own_letter_and_others_get_the_ones_left():
    snapshot = Snapshot(4, 2, {"request-1": [0], "A": [1], "request-2": [2]}, {})
    assert snapshot.labels == {"request-1": "B", "A": "A", "request-2": "C"}
    many = Snapshot(60, 1, {f"request-{i}": [i] for i in range(60)}, {}).labels
    assert len(set(many.values())) == 60


@given(traces, st.data())
def test_an_event_that_happened_twice_is_refused_with_its_number(trace, data):
    kinds = ("allocate", "copy", "free", "evict", "swap_out", "swap_in")
    numbers = [number for number, event in enumerate(trace.events) if event["event"] in kinds]
    if numbers:
        number = data.draw(st.sampled_from(numbers))
        trace.events.insert(number, trace.events[number])
        with pytest.raises(ValueError, match=rf"^event {number + 1} \({trace.events[number]['event']}, step \d+\): "):
            list(replay(trace))


ALLOCATED = {"event": "allocate", "seq": "A", "logical": 0, "block": 0}
WRITTEN = {"event": "write", "seq": "A", "start": 0, "count": 2}
SHARED = {"event": "share", "seq": "B", "logical": 0, "block": 0}
NEXT = {**ALLOCATED, "logical": 1, "block": 1}
FORKED = {"event": "fork", "seq": "B", "parent": "A", "count": 2}


@pytest.mark.parametrize(
    "events, says",
    [
        ([{**ALLOCATED, "block": 4}], "no block 4: it has 4"),
        ([{**ALLOCATED, "block": -1}], "block must be an integer of at least 0, got -1"),
        ([{**ALLOCATED, "block": "0"}], "block must be an integer"),
        ([{**ALLOCATED, "seq": 7}], "seq must be a string, got 7"),
        ([{**ALLOCATED, "logical": 1}], "logical block 1 of A cannot be set: it has 0 blocks"),
        ([ALLOCATED, {**ALLOCATED, "seq": "B"}], "block 0 of the pool is not free: it has 1 owners"),
        ([ALLOCATED, {**ALLOCATED, "block": 1}], "logical block 0 of A cannot be set"),
        ([SHARED], "block 0 of the pool is free: it cannot be shared"),
        ([ALLOCATED, {"event": "free", "seq": "B", "logical": 0, "block": 0}], "B does not name block 0"),
        ([ALLOCATED, {"event": "free", "seq": "A", "logical": 0, "block": 1}], "A does not name block 1"),
        ([ALLOCATED, {"event": "copy", "seq": "A", "logical": 0, "source": 1, "target": 2}], "A does not name block 1"),
        ([ALLOCATED, SHARED, WRITTEN], "A writes position 0 into block 0, which 2 tables name"),
        ([ALLOCATED, {"event": "cache", "block": 0}, WRITTEN], "which a hash finds"),
        ([ALLOCATED, {**WRITTEN, "count": 3}], "A holds 0 tokens in room for 2: positions 0 to 3"),
        ([ALLOCATED, {**WRITTEN, "start": 1, "count": 1}], "A holds 0 tokens in room for 2"),
        ([ALLOCATED, {**WRITTEN, "tokens": ["one"]}], "tokens must be a list of 2"),
        ([{"event": "cache", "block": 0}], "block 0 is free: nothing in it can be found"),
        ([ALLOCATED, {"event": "evict", "block": 0}], "block 0 is not a cached block with no owner"),
        (
            [ALLOCATED, {"event": "swap_out", "seq": "A", "logical": 0, "block": 0, "host_block": 0}],
            "the host pool has no",
        ),
        ([{"event": "schedule", "seqs": 3}], "seqs must map a sequence to its tokens"),
        (
            [ALLOCATED, NEXT, {"event": "free", "seq": "A", "logical": 0, "block": 0}],
            "its last one is given back first",
        ),
        ([ALLOCATED, WRITTEN, FORKED], "B does not name the blocks of A"),
        ([ALLOCATED, NEXT, WRITTEN, SHARED, FORKED], "B does not name the blocks of A"),
        ([ALLOCATED, WRITTEN, SHARED, {**FORKED, "parent": "C"}], "B does not name the blocks of C"),
        ([ALLOCATED, SHARED, FORKED], "A holds 0 tokens in 1 blocks, and B has 2 of them"),
        ([ALLOCATED, WRITTEN, SHARED, {**FORKED, "count": 0}], "A holds 2 tokens in 1 blocks, and B has 0 of them"),
        ([ALLOCATED, {"event": "reset"}, WRITTEN], "A holds 0 tokens in room for 0"),
        ([ALLOCATED, {"event": "reset"}, SHARED], "block 0 of the pool is free: it cannot be shared"),
    ],
)
def test_an_event_that_contradicts_the_state_is_refused_with_its_number(events, says):
    trace = Trace(4, 2)
    for event in events:
        trace.record(event["event"], **{key: value for key, value in event.items() if key != "event"})
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        list(replay(trace))
    assert str(error.value).startswith(f"event {len(events) - 1} ({events[-1]['event']}, step 0): ")
    assert len(list(islice(replay(trace), len(events) - 1))) == len(events) - 1, "the states before it can be seen"


def test_a_snapshot_refuses_a_block_outside_its_pool():
    for wrong in ({"tables": {"A": [4]}}, {"tables": {"A": [-2]}}, {"host_tables": {"A": [0]}}, {"cached": {4}}):
        with pytest.raises(ValueError, match=r"block -?\d"):
            Snapshot(**{"num_blocks": 4, "block_size": 2, "tables": {}, "num_tokens": {"A": 1}, **wrong})
    with pytest.raises(ValueError, match="0 blocks of 2 tokens"):
        Snapshot(0, 2, {}, {})


# The terminal.


@given(traces, st.integers(1, 140), st.sampled_from(("utf-8", "ascii")))
def test_no_line_of_the_terminal_view_is_wider_than_asked(trace, width, encoding):
    for snapshot in steps(trace):
        for text in (printed(draw(snapshot, width=width), 200, encoding), printed(draw(snapshot), width, encoding)):
            assert max(map(cell_len, text.splitlines())) <= width


@given(traces, st.sampled_from((40, 80, 120)))
def test_the_terminal_view_names_every_sequence_and_every_block_in_use(trace, width):
    for snapshot in steps(trace):
        text = printed(draw(snapshot), width)
        for seq in snapshot.sequences:
            assert re.search(rf"^{snapshot.labels[seq]}( = |: )", text, re.M)
        in_use = {str(block): owners for block, owners in snapshot.by_block().items()}
        in_use |= {f"h{block}": owners for block, owners in snapshot.by_host_block().items()}
        for name, owners in in_use.items():
            assert re.search(rf"(^|\s){name} .*│ x{len(owners)}$", text, re.M)
        assert f"{len(snapshot.by_block())} of {snapshot.num_blocks} in use, {snapshot.num_free} free" in text


@given(traces, st.integers(20, 120))
def test_hostile_text_stays_in_its_slot_in_a_terminal(trace, width):
    text = printed(lambda console: show(trace, console), width)
    assert all(sign == "\n" or sign.isprintable() for sign in text)


def test_markup_and_hostile_names_are_shown_and_not_obeyed():
    snapshot = Snapshot(4, 2, {"[b]x": [0]}, {"[b]x": 2}, texts={"[b]x": ["[red]a", "\x1b[2J"]})
    text = printed(draw(snapshot), 80)
    assert "A = [b]x: 2 tokens" in text and "[red]a" in text and "\x1b" not in text
    ops = [{"op": "append", "seq": "[b]x", "tokens": ["[red]a[/red]", "[/]"]}]
    told = printed(lambda console: show(run_script({"num_blocks": 4, "block_size": 2, "ops": ops}), console), 80)
    assert "[b]x takes physical block 0" in told and "positions 0 to 1: [red]a[/red] [/]" in told


def test_a_pipe_gets_no_colour_and_a_terminal_gets_some():
    snapshot = at_step(run_script(load_script(SCRIPTS / "two_requests.json")), 8)
    assert "\x1b" not in printed(draw(snapshot), 80)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(draw(snapshot))
    for colour in colours(snapshot).values():
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert f"48;2;{red};{green};{blue}m" in console.file.getvalue()


@pytest.mark.parametrize("in_use", [3, 300])
def test_a_large_pool_shows_what_is_in_use_and_counts_the_rest(in_use):
    snapshot = Snapshot(512, 16, {"A": list(range(100, 100 + in_use))}, {"A": 16 * in_use}, cached={511})
    text = printed(draw(snapshot), 80)
    assert f"{in_use + 1} of 512 in use, {511 - in_use} free" in text
    assert len(text.splitlines()) < 40
    assert "A: " in text and "#" in text


# The SVG.


def svg_is_sound(svg):
    """Well-formed, and with nothing in it that runs or is fetched."""
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    names = root.get("aria-labelledby").split()
    assert [root.find(f"{SVG}title").get("id"), root.find(f"{SVG}desc").get("id")] == names
    for node in root.iter():
        kind = node.tag.removeprefix(SVG)
        assert kind in {"svg", "title", "desc", "style", "rect", "text", "path", "circle"}
        assert not any(name.startswith("on") or "href" in name for name in node.attrib)
    style = root.find(f"{SVG}style").text
    assert "url(" not in style and "@import" not in style
    rules = re.sub(r"@media [^{]*\{(.*?\})\}", r"\1", style)  # what is inside the media query, without it
    for selector in ",".join(re.findall(r"([^{}]+)\{", rules)).split(","):
        assert ".mp-" in selector, "a rule that holds for the page around the picture"
    return root


@given(traces)
def test_the_svg_is_sound_and_names_every_sequence_and_every_block_in_use(trace):
    for snapshot in steps(trace):
        svg = to_svg(snapshot)
        described = svg_is_sound(svg).find(f"{SVG}desc").text
        texts = texts_in(svg)
        for seq in snapshot.sequences:
            assert snapshot.labels[seq] in texts
            assert f"Sequence {snapshot.labels[seq]}" in described
        for block in snapshot.by_block():
            assert str(block) in texts
        for block in snapshot.by_host_block():
            assert f"h{block}" in texts
        for seq, table in snapshot.tables.items():
            for logical, block in enumerate(table):
                assert f"physical block {block}, {snapshot.fill(seq, logical)} of" in described


@given(st.lists(st.sampled_from(HOSTILE) | st.text(), min_size=1, max_size=8), st.sampled_from((1, 4, 16)))
def test_hostile_text_is_only_text_in_an_svg(words, block_size):
    blocks = list(range(cdiv(len(words), block_size)))
    name = words[0]
    snapshot = Snapshot(8, block_size, {name: blocks}, {name: len(words)}, texts={name: words})
    root = svg_is_sound(to_svg(snapshot))
    for node in root.iter():
        for text in (node.text or "", *node.attrib.values()):
            assert all(sign == "\n" or sign.isprintable() for sign in text)


def test_a_large_pool_is_a_map_in_the_svg_too():
    shared = list(range(200, 210))
    tables = {"A": [*shared, *range(100)], "<b>": [*shared, *range(300, 350)]}
    svg = to_svg(Snapshot(512, 16, tables, {"A": 110 * 16, "<b>": 900}, cached={511}, num_host_blocks=4))
    described, texts = svg_is_sound(svg).find(f"{SVG}desc").text, texts_in(svg)
    assert texts.count("A") == 1 + 100 and texts.count("B") == 1 + 50, (
        "its chip, and a letter for each block of its own"
    )
    assert texts.count("+") == 10 and texts.count("#") == 1
    assert "<b>, 900 tokens" in texts
    assert "161 of 512 physical blocks are in use, 351 are free." in described
    assert "Its logical blocks are the physical blocks 200, 201," in described


def test_copies_are_arrows_and_changed_blocks_are_marked():
    trace = run_script(load_script(SCRIPTS / "copy_on_write.json"))
    copied = [snapshot for snapshot in steps(trace) if snapshot.copies]
    assert len(copied) == 1
    for snapshot in steps(trace):
        classes = [node.get("class") for node in ET.fromstring(to_svg(snapshot)).iter(f"{SVG}path")]
        assert ("mp-copy" in classes) == bool(snapshot.copies)
        assert classes.count("mp-copy") == len(snapshot.copies)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_headings_of_narrow_blocks_do_not_run_into_each_other(block_size):
    svg = to_svg(Snapshot(3, block_size, {"A": [0]}, {"A": 1}))
    places = {node.text: float(node.get("x")) for node in ET.fromstring(svg).iter(f"{SVG}text")}
    for left, right in (("Logical blocks", "Block table"), ("Physical blocks", "owners")):
        assert places[left] + len(left) * CHAR_WIDTH < places[right]


def test_a_state_before_the_first_step_has_no_step():
    state = Snapshot(3, 4, {"A": [0]}, {"A": 1})
    assert "step" not in to_svg(state).lower()
    event = {"event": "allocate", "step": 0, "seq": "A", "logical": 0, "block": 0}
    assert "Step 0" in texts_in(to_svg(replace(state, events=[event])))
    assert "Step 3" in texts_in(to_svg(replace(state, step=3)))


def test_a_reader_of_the_screen_is_told_of_a_shared_block():
    svg = to_svg(Snapshot(4, 2, {"A": [3], "B": [3]}, {"A": 2, "B": 2}))
    described = ET.fromstring(svg).find(f"{SVG}desc").text
    assert "Physical block 3 is shared by A and B: reference count 2." in described


# The JSON.


@given(traces)
def test_the_json_gives_every_state_back(trace):
    document = json.loads(to_json(trace))
    assert (document["schema"], document["version"]) == ("minipaged.site", 1)
    assert document["trace"] == trace.header()
    assert [entry["event"] for entry in document["events"]] == json.loads(json.dumps(trace.events))
    state = {name: {} for name in MAPS}
    for entry, snapshot in zip(document["events"], replay(trace), strict=True):
        apply_changes(state, entry["changes"])
        assert state == maps_of(snapshot)
        assert entry["words"] == in_words(snapshot.events[0])
        assert {known["name"]: known["label"] for known in document["sequences"]} == snapshot.labels


@given(traces)
def test_hostile_text_is_harmless_in_the_json(trace):
    text = to_json(trace)
    assert text.isascii() and not {"<", ">", "&", "\n"} & {*text}
    for entry in json.loads(text)["events"]:
        texts = entry["changes"].get("texts", {}).values()
        shown = [entry["words"], *(word for words in texts if words for word in words)]
        assert all(sign.isprintable() for word in shown for sign in word)


@given(st.text())
def test_visible_text_is_one_printable_line_and_not_empty_where_there_was_a_sign(text):
    shown = visible(text)
    assert all(sign.isprintable() for sign in shown)
    assert shown == shown.strip() and visible(shown) == shown


@pytest.mark.parametrize(
    "text, shown",
    [(" the", "the"), (" ", "␣"), ("", ""), ("a\nb", "a⏎b"), ("\x1b[31m", "�[31m"), ("a\u202eb\u200dc", "abc")],
)
def test_what_is_shown_of_a_token(text, shown):
    assert visible(text) == shown


def test_every_event_of_the_schema_has_words():
    sample = {"seq": "A", "logical": 1, "block": 5, "source": 5, "target": 6, "start": 4, "count": 2, "host_block": 3}
    sample |= {"seqs": {"A": 2, "B": 1}, "mode": "swap", "reason": "stop", "parent": "C"}
    said = {kind: in_words({"event": kind, "step": 1, **{key: sample[key] for key in EVENTS[kind]}}) for kind in EVENTS}
    assert said["allocate"] == "A takes physical block 5 for its logical block 1"
    assert said["schedule"] == "this step computes 2 tokens of A, 1 token of B"
    assert said["fork"] == "A is a fork of C: it has the same first 2 tokens in the same blocks"
    assert len(set(said.values())) == len(EVENTS) and not any("{" in words for words in said.values())


# Scripts.


APPEND = {"op": "append", "seq": "A", "count": 3}


@pytest.mark.parametrize(
    "script, says",
    [
        ({}, "ops must be a list, got None"),
        ({"ops": [], "block_size": 4}, "num_blocks must be an integer from 1 to 1000000, got None"),
        ({"ops": [], "num_blocks": 0, "block_size": 4}, "num_blocks must be an integer from 1 to 1000000, got 0"),
        ({"ops": [], "num_blocks": True, "block_size": 4}, "num_blocks must be an integer"),
        ({"ops": [], "num_blocks": 4, "block_size": "4"}, "block_size must be an integer"),
        ({"ops": [], "num_blocks": 4, "block_size": 4, "size": 1}, "unknown key 'size'"),
        ({"ops": [], "num_blocks": 4, "block_size": 4, "prefix_cache": 1}, "prefix_cache must be true or false, got 1"),
    ],
)
def test_a_bad_head_of_a_script_is_refused(script, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        run_script(script)


@pytest.mark.parametrize(
    "ops, says",
    [
        ([3], "op 1 (3): an op is an object"),
        ([{"op": "jump", "seq": "A"}], "op 1 (jump): an op is an object whose `op` is one of append, fork"),
        ([{"op": ["append"]}], "op 1 ("),
        ([APPEND, {"op": "free"}], "op 2 (free): it needs seq"),
        ([APPEND, {"op": "fork", "seq": "A"}], "op 2 (fork): it needs as"),
        ([APPEND, {"op": "fork", "seq": "A", "as": "A"}], "op 2 (fork): 'A' is there already"),
        ([APPEND, {"op": "fork", "seq": "B", "as": "C"}], "op 2 (fork): there is no sequence 'B': there are A"),
        ([APPEND, {"op": "truncate", "seq": "A", "keep": 4}], "op 2 (truncate): cannot keep 4 tokens of 3"),
        ([APPEND, {"op": "truncate", "seq": "A", "keep": "1"}], "op 2 (truncate): keep must be of type int, got '1'"),
        ([APPEND, {"op": "truncate", "seq": "A", "keep": True}], "op 2 (truncate): keep must be of type int"),
        ([APPEND, {**APPEND, "count": 10}], "op 2 (append): 10 tokens need 5 blocks, 2 are free"),
        (
            [{**APPEND, "count": 10**15}],
            "op 1 (append): 1000000000000000 tokens need 500000000000000 blocks, 4 are free",
        ),
        ([{**APPEND, "count": 0}], "op 1 (append): it must append at least 1 token, got 0"),
        ([{**APPEND, "count": -2}], "op 1 (append): it must append at least 1 token, got -2"),
        ([{**APPEND, "tokens": ["a"]}], "op 1 (append): it needs either tokens or count"),
        ([{"op": "append", "seq": "A", "tokens": [1]}], "op 1 (append): tokens must be strings, got [1]"),
        ([{"op": "append", "seq": "A", "tokens": "abc"}], "op 1 (append): tokens must be of type list"),
        ([{"op": "append", "count": 1}], "op 1 (append): it needs seq"),
        ([{**APPEND, "sequence": "A"}], "op 1 (append): unknown field 'sequence'"),
        ([APPEND, {"op": "swap_out", "seqs": ["A"]}], "op 2 (swap_out): the script has no host pool"),
    ],
)
def test_an_op_that_cannot_be_done_is_refused_with_its_number(ops, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        run_script({"num_blocks": 4, "block_size": 2, "ops": ops})


@pytest.mark.parametrize("op", [APPEND, {"op": "fork", "seq": "A", "as": "B"}])
def test_a_sequence_on_the_host_must_come_back_before_it_grows_or_forks(op):
    ops = [APPEND, {"op": "swap_out", "seqs": ["A"]}, op]
    with pytest.raises(ValueError, match=r"op 3 \((append|fork)\): 'A' is swapped out"):
        run_script({"num_blocks": 4, "block_size": 2, "num_host_blocks": 2, "ops": ops})


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "\xff"])
def test_a_file_that_is_no_script_is_refused(tmp_path, text):
    path = tmp_path / "script.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape("script.json")):
        load_script(path)


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_example_scripts_run_and_every_event_is_told(path):
    trace = run_script(load_script(path))
    text = printed(lambda console: show(trace, console), 120)
    for event in trace.events:
        assert in_words(event) in text
    second = printed(lambda console: show(trace, console, step=2), 120)
    assert second in text and second.startswith("Step 2\n")


def test_two_requests_share_a_pool_and_no_block():
    trace = run_script(load_script(SCRIPTS / "two_requests.json"))
    both = [snapshot for snapshot in steps(trace) if {"A", "B"} <= {*snapshot.tables}][-1]
    assert not {*both.tables["A"]} & {*both.tables["B"]}
    assert any(b - a != 1 for a, b in pairwise(both.tables["A"])), "A's blocks lie apart"


# What it costs to import.


def test_viz_needs_no_torch_and_only_the_terminal_needs_rich():
    code = (
        "import sys; from minipaged.viz import export, replay, script, snapshot, svg;"
        "assert not {'torch', 'numpy', 'rich'} & {*sys.modules};"
        "from minipaged.viz import terminal; assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
