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


_SENTENCES = {
    "allocate": "{seq} takes physical block {block} for its logical block {logical}",
    "share": "{seq} names physical block {block} too, as its logical block {logical}",
    "copy": "physical block {source} is shared: {seq} copies it to block {target}, its logical block {logical} "
    "from now on (copy-on-write)",
    "fork": "{seq} is a fork of {parent}: it has the same first {tokens} in the same blocks",
    "write": "{seq} {stores}",
    "free": "{seq} lets go of block {block}, its logical block {logical}",
    "cache": "physical block {block} is full: it can be found by its tokens from now on",
    "evict": "physical block {block} has no owner and is needed: its tokens are forgotten, it is free",
    "swap_out": "{seq} moves its logical block {logical} from physical block {block} to host block {host_block}",
    "swap_in": "{seq} moves its logical block {logical} from host block {host_block} back to physical block {block}",
    "reset": "the memory is reset: no block table is left, every block is free, and nothing is cached",
    "schedule": "this step computes {scheduled}",
    "preempt": "{seq} must wait ({mode}): there are too few free blocks",
    "finish": "{seq} is done ({reason})",
}


def in_words(event: Event) -> str:
    """One event as a sentence, such as "A takes physical block 5 for its logical block 1"."""
    kind = event["event"]
    fields = {name: shorten(visible(str(value)), 40) for name, value in event.items() if isinstance(value, str | int)}
    if kind == "write":
        fields["stores"] = _stored(event)
    elif kind == "fork":
        fields["tokens"] = _tokens(event["count"])
    elif kind == "schedule":
        fields["scheduled"] = _listed(event["seqs"].items()) or "nothing"
    return _SENTENCES[kind].format_map(fields)


def _stored(event: Event) -> str:
    start, count, tokens = event["start"], event["count"], event.get("tokens")
    if count == 0:
        return f"ends after {_tokens(start)}"
    where = f"position {start}" if count == 1 else f"positions {start} to {start + count - 1}"
    text = shorten(joined([str(token) for token in tokens])) if isinstance(tokens, list) else ""
    return f"stores {where}" + (f": {text}" if text else "")


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
