"""An event in words, and token text made fit to be seen.

    {"event": "allocate", "seq": "A", "logical": 1, "block": 5}   ->   A takes physical block 5 for its logical block 1
    "\\nthe\\x1b[31m"                                                ->   ⏎the�[31m

Token text comes from a model or a user: it may hold control characters that move a terminal's cursor or break an XML
file, and marks that turn a line around. All three outputs (terminal, SVG, JSON in words) show it through `visible`.
"""

import unicodedata
from collections.abc import Iterable, Sequence

from minipaged.memory.trace import Event
from minipaged.viz.snapshot import Snapshot

SENTENCES_UP_TO = 64  # blocks in use: with more of them, a description lists their numbers
_SIGNS = {"\n": "⏎", "\r": "⏎", "\t": "⇥"}


def visible(text: str) -> str:
    """Text that can be shown on one line: a sign for a line break and a lone space, no control characters.

    Blanks at both ends are dropped (many tokens begin with one). Formatting marks that show nothing are dropped too.
    """
    shown = "".join(_SIGNS.get(sign) or _shown(sign) for sign in text)
    return shown.strip() or ("␣" if shown else "")


def joined(words: Sequence[str]) -> str:
    """The words of several tokens as one visible text. Where tokens bring their own blanks, none is put between."""
    return visible(("" if any(word.startswith(" ") for word in words) else " ").join(words))


def _shown(sign: str) -> str:
    category = unicodedata.category(sign)
    if category == "Cf":  # joiners and direction marks: they would turn the text beside them around
        return ""
    if category.startswith("C"):  # control characters, halves of surrogate pairs, what Unicode does not know
        return "\N{REPLACEMENT CHARACTER}"
    return " " if category.startswith("Z") else sign


def shorten(text: str, length: int = 60) -> str:
    """At most `length` characters; what is cut off shows as an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def columns(text: str) -> int:
    """How many columns of a fixed-width font the text takes: wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )


def fit_columns(text: str, width: int) -> str:
    """The text, cut to at most `width` columns; what is cut off shows as an ellipsis."""
    if columns(text) <= width:
        return text
    while text and columns(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…" * (width > 0)


def in_words(event: Event) -> str:
    """One event as a sentence, such as "A takes physical block 5 for its logical block 1"."""
    kind = event["event"]
    seq = shorten(visible(str(event.get("seq", ""))), 40)
    if kind == "allocate":
        return f"{seq} takes physical block {event['block']} for its logical block {event['logical']}"
    if kind == "share":
        return f"{seq} names physical block {event['block']} too, as its logical block {event['logical']}"
    if kind == "copy":
        what = f"physical block {event['source']} is shared: {seq} copies it to block {event['target']}"
        return f"{what}, its logical block {event['logical']} from now on (copy-on-write)"
    if kind == "fork":
        parent = shorten(visible(str(event["parent"])), 40)
        return f"{seq} is a fork of {parent}: it has the same first {_tokens(event['count'])} in the same blocks"
    if kind == "write":
        return _write_in_words(event, seq)
    if kind == "free":
        return f"{seq} lets go of block {event['block']}, its logical block {event['logical']}"
    if kind == "cache":
        return f"physical block {event['block']} is full: it can be found by its tokens from now on"
    if kind == "evict":
        return f"physical block {event['block']} has no owner and is needed: its tokens are forgotten, it is free"
    if kind == "swap_out":
        where = f"from physical block {event['block']} to host block {event['host_block']}"
        return f"{seq} moves its logical block {event['logical']} {where}"
    if kind == "swap_in":
        where = f"from host block {event['host_block']} back to physical block {event['block']}"
        return f"{seq} moves its logical block {event['logical']} {where}"
    if kind == "reset":
        return "the memory is reset: no block table is left, every block is free, and nothing is cached"
    if kind == "schedule":
        return f"this step computes {_listed(event['seqs'].items()) or 'nothing'}"
    if kind == "preempt":
        return f"{seq} must wait ({shorten(visible(str(event['mode'])), 20)}): there are too few free blocks"
    if kind == "finish":
        return f"{seq} is done ({shorten(visible(str(event['reason'])), 20)})"
    return f"{kind}: {event}"


def _write_in_words(event: Event, seq: str) -> str:
    start, count = event["start"], event["count"]
    if count == 0:
        return f"{seq} ends after {_tokens(start)}"
    where = f"position {start}" if count == 1 else f"positions {start} to {start + count - 1}"
    tokens = event.get("tokens")
    text = shorten(joined([str(token) for token in tokens])) if isinstance(tokens, list) else ""
    return f"{seq} stores {where}" + (f": {text}" if text else "")


def _listed(seqs: Iterable[tuple[str, int]]) -> str:
    parts = [f"{_tokens(count)} of {shorten(visible(str(seq)), 40)}" for seq, count in seqs]
    return ", ".join(parts[:8]) + (f" and of {len(parts) - 8} more" if len(parts) > 8 else "")


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def describe(snapshot: Snapshot) -> str:
    """The whole picture in sentences: for a screen reader, and wherever there is no picture."""
    size, blocks, lines = snapshot.block_size, snapshot.by_block(), list[str]()
    in_short = len(blocks) > SENTENCES_UP_TO
    for seq in snapshot.sequences:
        label, name = snapshot.labels[seq], visible(seq)
        who = f"Sequence {label}" + (f" ({name})" if name != label else "")
        lines.append(f"{who} holds {_tokens(snapshot.num_tokens.get(seq, 0))}.")
        if in_short:
            places = ", ".join(snapshot.place(seq, logical) for logical in range(snapshot.num_logical(seq)))
            lines.append(f"Its logical blocks are the physical blocks {places}.")
            continue
        for logical in range(snapshot.num_logical(seq)):
            text = shorten(joined(snapshot.words(seq, logical)))
            lies = snapshot.place(seq, logical)
            where = f"host block {lies[1:]}" if lies.startswith("h") else f"physical block {lies}"
            says = f" ({text})" if text else ""
            lines.append(
                f"Its logical block {logical}{says} is {where}, {snapshot.fill(seq, logical)} of {size} filled."
            )
    for block, owners in blocks.items():
        if len(owners) > 1:
            names = " and ".join(snapshot.labels[owner.seq] for owner in owners)
            lines.append(f"Physical block {block} is shared by {names}: reference count {len(owners)}.")
        elif not owners:
            lines.append(f"Physical block {block} has no owner and is kept, to be found by its tokens.")
    lines += [f"Block {source} was copied to block {target}." for source, target in snapshot.copies]
    lines.append(f"{len(blocks)} of {snapshot.num_blocks} physical blocks are in use, {snapshot.num_free} are free.")
    return " ".join(lines)
