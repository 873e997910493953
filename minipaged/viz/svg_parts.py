"""What the SVG is drawn with: boxes, words, chips and lines, and one style sheet for dark and light.

The style sheet is inside the picture, and every name in it begins with `mp-`, since a style sheet in an inline SVG
holds for the whole page. A page that has a dark mode of its own (mkdocs-material, JupyterLab) is followed; elsewhere
the reader's system decides. A picture brings its own background, so it can be read on any page.
"""

from collections.abc import Sequence
from hashlib import sha256
from xml.sax.saxutils import escape, quoteattr

from minipaged.viz.colours import PALETTE, SHARED
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.words import describe, fit_columns, in_words

FONT_SIZE = 12  # pixels, as every length here
CHAR_WIDTH = 7.3  # one column of a fixed-width font of that size, and a little more
_FONTS = "ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace"
MARGIN = 18
SLOT_HEIGHT = 24
CHIP = 20
STRIPE = 6
RADIUS = 4

_LIGHT = "--mp-paper:#ffffff;--mp-ink:#1b1f24;--mp-soft:#59636e;--mp-line:#8c959f;--mp-empty:#f3f4f6"
_DARK = "--mp-paper:#14181d;--mp-ink:#e8eaed;--mp-soft:#a3abb5;--mp-line:#6b7480;--mp-empty:#20262d"


def _darker(colour: str) -> str:
    """The same hue, dark enough for a thin line on white."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.68):02X}" for i in (1, 3, 5))


def style() -> str:
    """The style sheet."""
    light = _LIGHT + "".join(f";--mp-c{i}:{_darker(colour)}" for i, colour in enumerate(PALETTE))
    dark = _DARK + "".join(f";--mp-c{i}:{colour}" for i, colour in enumerate(PALETTE))
    rules = [
        f".mp-picture{{{light}}}",
        f"@media (prefers-color-scheme:dark){{.mp-picture{{{dark}}}}}",
        f"[data-md-color-scheme=default] .mp-picture,[data-jp-theme-light=true] .mp-picture{{{light}}}",
        f"[data-md-color-scheme=slate] .mp-picture,[data-jp-theme-light=false] .mp-picture{{{dark}}}",
        f".mp-picture text{{font:{FONT_SIZE}px {_FONTS};fill:var(--mp-ink)}}",
        ".mp-picture .mp-title{font-size:15px;font-weight:bold}",
        ".mp-picture .mp-strong{font-weight:bold}",
        ".mp-picture .mp-soft{fill:var(--mp-soft)}",
        ".mp-picture .mp-on{fill:#111111}",  # on a colour of the palette, in both modes
        ".mp-paper{fill:var(--mp-paper)}",
        ".mp-empty{fill:var(--mp-empty);stroke:var(--mp-line)}",
        ".mp-kept{fill:var(--mp-line);fill-opacity:.35}",
        ".mp-edge{fill:none;stroke:var(--mp-line)}",
        ".mp-free{fill:none;stroke:var(--mp-line);stroke-dasharray:4 4}",
        ".mp-new{fill:none;stroke:var(--mp-ink);stroke-width:2.5}",
        ".mp-link{fill:none;stroke-width:2.5}",
        ".mp-copy{fill:none;stroke:var(--mp-ink);stroke-width:2}",
        ".mp-head{fill:var(--mp-ink)}",
        *(f".mp-l{i}{{stroke:var(--mp-c{i})}}" for i in range(len(PALETTE))),
    ]
    return f"<style>{''.join(rules)}</style>"


def page(snapshot: Snapshot, width: float, height: float, drawn: Sequence[str]) -> str:
    """What was drawn, with everything around it: size, title and description, style sheet, background."""
    description = describe(snapshot)
    name = "mp-" + sha256(f"{snapshot.step} {description}".encode()).hexdigest()[:12]  # ids of one page must differ
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mp-picture" role="img" '
        f'aria-labelledby="{name}-title {name}-desc" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" style="max-width:100%;height:auto">'
    )
    when = f", step {snapshot.step}" if snapshot.step or snapshot.events else ""
    title = f'<title id="{name}-title">Block tables and physical blocks{when}</title>'
    told = f'<desc id="{name}-desc">{escape(description)}</desc>'
    return "\n".join([head, title, told, style(), box(0, 0, width, height, "mp-paper", 8), *drawn, "</svg>"])


def heading(snapshot: Snapshot, width: float) -> tuple[list[str], float]:
    """What happened last, in words. Returns the drawing, and the y below it. Before the first step there is nothing."""
    if not snapshot.step and not snapshot.events:
        return [], MARGIN
    said = [in_words(event) for event in snapshot.events]
    shown = said if len(said) <= 3 else [*said[:2], f"and {len(said) - 2} more events"]
    drawn = [words(MARGIN, MARGIN + 14, f"Step {snapshot.step}", "mp-title")]
    for row, line in enumerate(shown):
        drawn.append(words(MARGIN + 90, MARGIN + 14 + 18 * row, line, room=width - 2 * MARGIN - 90))
    return drawn, MARGIN + 14.0 + 18 * max(1, len(shown))


def number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def element(name: str, **attributes: object) -> str:
    """An empty element; an underscore in a name stands for a hyphen, and one at its end for nothing."""
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}={quoteattr(number(value) if isinstance(value, float) else str(value))}"
        for key, value in attributes.items()
    )
    return f"<{name}{shown}/>"


def box(x: float, y: float, width: float, height: float, class_: str = "mp-edge", radius: int = RADIUS) -> str:
    return element("rect", x=x, y=y, width=width, height=height, rx=radius, class_=class_)


def words(x: float, y: float, text: str, class_: str = "", anchor: str = "start", room: float | None = None) -> str:
    """A line of text with its baseline at y, cut to what fits in `room`."""
    if room is not None:
        text = fit_columns(text, max(0, int(room / CHAR_WIDTH)))
    kind = f" class={quoteattr(class_)}" if class_ else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{number(x)}" y="{number(y)}"{kind}{side}>{escape(text)}</text>'


def filled(x: float, y: float, width: float, height: float, shades: Sequence[str]) -> str:
    """What is filled of a block, in the colour of its owner. Shared: grey, with a stripe of each owner's colour."""
    if not shades:
        return element("rect", x=x, y=y, width=width, height=height, class_="mp-kept")
    if len(shades) == 1:
        return element("rect", x=x, y=y, width=width, height=height, fill=shades[0])
    ground = element("rect", x=x, y=y, width=width, height=height, fill=SHARED)
    part = width / len(shades)
    return ground + "".join(
        element("rect", x=x + i * part, y=y + height - STRIPE, width=part, height=STRIPE, fill=shade)
        for i, shade in enumerate(shades)
    )


def chip(x: float, y: float, letter: str, shade: str | None) -> str:
    """A small square with a sequence's letter."""
    fill = {"fill": shade} if shade else {"class_": "mp-free"}
    square = element("rect", x=x, y=y, width=CHIP, height=CHIP, rx=RADIUS, **fill)
    return square + words(x + CHIP / 2, y + CHIP / 2 + 4, letter, "mp-strong" + " mp-on" * bool(shade), "middle")


def link(start: tuple[float, float], end: tuple[float, float], place: int) -> str:
    """A curve from an entry of a block table to its block, in the colour of the sequence."""
    middle = (start[0] + end[0]) / 2
    path = f"{_at('M', *start)}{_at('C', middle, start[1])}{_at(' ', middle, end[1])}{_at(' ', *end)}"
    kind = f"mp-link mp-l{place % len(PALETTE)}"
    return element("path", d=path, class_=kind) + element("circle", cx=end[0], cy=end[1], r=2, class_=kind)


def copy_arrow(x: float, y1: float, y2: float, bend: float) -> str:
    """An arrow at the right of the pool, from the block that was copied to its copy."""
    path = f"{_at('M', x, y1)}{_at('C', x + bend, y1)}{_at(' ', x + bend, y2)}{_at(' ', x + 7, y2)}"
    tip = f"{_at('M', x, y2)}l9 -4.5v9z"
    name = words(x + 2, min(y1, y2) - 12, "copy", "mp-strong")
    return element("path", d=path, class_="mp-copy") + element("path", d=tip, class_="mp-head") + name


def _at(command: str, x: float, y: float) -> str:
    return f"{command}{number(x)} {number(y)}"
