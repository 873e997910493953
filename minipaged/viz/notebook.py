"""What the notebooks would otherwise repeat in every cell: charts, pictures, a slider, a model, a counterexample.

    chart(...) -> figure, axes        matplotlib in the colours of the block pictures; both axes have a name and a unit
    show(figure, alt)                 as SVG whose ink follows the page: legible in a light and in a dark one
    play(pictures)                    a slider over pictures; where scripts are off, the pictures stand below each other
    holds(property), breaks(property) run a Hypothesis property; the second wants it to fail, and returns on what

matplotlib, IPython and hypothesis are imported when they are needed: the extra `tutorials` brings them.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from importlib import import_module
from io import StringIO
from itertools import count
from typing import Any

from minipaged.viz.colours import PALETTE
from minipaged.viz.snapshot import Snapshot
from minipaged.viz.svg import to_svg
from minipaged.viz.svg_parts import style

INK, SOFT = "#010203", "#040506"  # stand for the page's own colours in what matplotlib draws, and are replaced by them
_ids = count(1)


def needed(module: str) -> Any:
    """Import a library of the extra `tutorials`, or say how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"the notebooks need {package}: pip install -e '.[tutorials]', or make notebooks") from error


# ---- charts ----------------------------------------------------------------------------------------------------------


def chart(x: str, y: str, *, width: float = 7.2, height: float = 3.4, rows: int = 1, columns: int = 1) -> Any:
    """A matplotlib figure and its axes. x and y name the axes, with the unit: "context [tokens]"."""
    pyplot = needed("matplotlib.pyplot")
    inked = ("text.", "axes.label", "axes.title", "axes.edge", "xtick.", "ytick.", "hatch.", "patch.edge")
    look: dict[str, Any] = {f"{name}color": INK for name in inked}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10.5}
    look |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": SOFT, "grid.alpha": 0.25}
    look |= {"axes.prop_cycle": needed("cycler").cycler(color=PALETTE), "lines.linewidth": 2.0}
    look |= {"figure.facecolor": "none", "axes.facecolor": "none"}
    pyplot.rcParams.update(look)  # for what the cell adds to the chart, too
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_xlabel(x)
        axis.set_ylabel(y)
    return figure, axes[0, 0] if rows == columns == 1 else axes


def show(figure: Any, alt: str) -> None:
    """Display a chart. alt: what it shows, in a sentence, for who cannot see it."""
    _display(chart_svg(figure, alt))
    needed("matplotlib.pyplot").close(figure)  # or the notebook would draw it a second time


def chart_svg(figure: Any, alt: str) -> str:
    """The chart as one SVG element. Lines take the palette's darker shades on a light page, areas keep the colours."""
    sink = StringIO()
    with needed("matplotlib").rc_context({"svg.hashsalt": alt}):  # ids of two charts on one page must differ
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None}, bbox_inches="tight")
    svg = sink.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "var(--mp-ink)").replace(SOFT, "var(--mp-soft)")
    for place, colour in enumerate(PALETTE):
        svg = svg.replace(f"stroke: {colour.lower()}", f"stroke: var(--mp-c{place})")
    head = f'<svg class="mp-picture" role="img" aria-label="{escape(alt)}" style="max-width:100%;height:auto" '
    return svg.replace("<svg ", head, 1).replace("<defs>", f"{style()}<defs>", 1)


# ---- pictures --------------------------------------------------------------------------------------------------------


def show_svg(picture: Snapshot | str) -> None:
    """Display a snapshot of block tables, or an SVG element."""
    _display(to_svg(picture) if isinstance(picture, Snapshot) else picture)


def play(pictures: Iterable[Snapshot | str], labels: Iterable[str] = (), start: int = -1) -> None:
    """Display pictures under a slider, opened at picture `start`. Needs no kernel: it works in a published page too."""
    _display(player_html([to_svg(p) if isinstance(p, Snapshot) else p for p in pictures], list(labels), start))


def player_html(pictures: list[str], labels: list[str], start: int = -1) -> str:
    """The slider as HTML. All pictures lie in one cell of a grid, so the page does not jump; one is visible.

    With scripts switched off, the slider is not shown, and the picture `start` is: a static picture.
    """
    if not pictures:
        raise ValueError("pictures must not be empty")
    name, first, last = f"mp-play-{next(_ids)}", range(len(pictures))[start], len(pictures) - 1
    visible = ["visible" if i == first else "hidden" for i in range(len(pictures))]
    cells = "".join(
        f'<div class="mp-frame" style="grid-area:1/1;visibility:{seen}">{picture}</div>'
        for picture, seen in zip(pictures, visible, strict=True)
    )
    said = [labels[i] if i < len(labels) else f"{i + 1} of {len(pictures)}" for i in range(len(pictures))]
    texts = "".join(f"<span hidden>{escape(text)}</span>" for text in said)
    move = (
        f"const box=document.getElementById('{name}'),bar=box.querySelector('input'),say=box.querySelector('output'),"
        "frames=box.querySelectorAll('.mp-frame'),texts=box.querySelectorAll('.mp-says span');"
        "const go=n=>{bar.value=n;frames.forEach((f,i)=>f.style.visibility=i==n?'visible':'hidden');"
        "say.textContent=texts[n].textContent};"
        "bar.addEventListener('input',()=>go(+bar.value));"
        "box.querySelectorAll('button').forEach(b=>b.addEventListener('click',()=>"
        f"go(Math.max(0,Math.min({last},+bar.value+(+b.value))))));"
        "box.querySelector('.mp-bar').style.display='flex';go(+bar.value)"
    )
    bar = (
        '<div class="mp-bar" style="display:none;gap:.6em;align-items:center;margin:.4em 0">'
        '<button type="button" value="-1" aria-label="one back" style="padding:0 .7em;font:inherit;color:inherit;'
        'background:none;border:1px solid currentColor;border-radius:4px">&#8249;</button>'
        f'<input type="range" min="0" max="{last}" value="{first}" aria-label="step" style="flex:1;max-width:24em">'
        '<button type="button" value="1" aria-label="one on" style="padding:0 .7em;font:inherit;color:inherit;'
        'background:none;border:1px solid currentColor;border-radius:4px">&#8250;</button>'
        '<output aria-live="polite"></output></div>'
    )
    grid = f'<div style="display:grid">{cells}</div><div class="mp-says" hidden>{texts}</div>'
    return f'<div id="{name}">{bar}{grid}</div><script>(()=>{{{move}}})()</script>'


def _display(html: str) -> None:
    display = needed("IPython.display")
    display.display(display.HTML(html))


# ---- properties ------------------------------------------------------------------------------------------------------


def holds(test: Callable[[], None], examples: int = 200) -> None:
    """Run a Hypothesis property, the same examples each time, and say for how many it held. Raises where it fails."""
    ran = _recorded(test, examples)
    test()
    print(f"{test.__name__.replace('_', ' ')}: holds for {len(ran)} examples")


def breaks(test: Callable[[], None], examples: int = 500) -> dict[str, Any]:
    """Run a property that a planted bug must break. Prints the smallest counterexample, and returns its arguments.

    Raises AssertionError where the property holds: then the bug was not caught.
    """
    ran = _recorded(test, examples)
    try:
        test()
    except Exception as error:  # whatever the buggy code raised: that is what was to be shown
        smallest = ran[-1]  # Hypothesis runs what it found once more, at its end
        print(f"{test.__name__.replace('_', ' ')}: broken, after {len(ran)} runs. The smallest counterexample:\n")
        for name, value in smallest.items():
            print(f"    {name} = {value!r}")
        said = str(error).strip().splitlines() or ["no message"]
        print(f"\n{type(error).__name__}: {said[0]}")
        return smallest
    raise AssertionError(f"{test.__name__} held for {len(ran)} examples: the planted bug was not caught")


def _recorded(test: Any, examples: int) -> list[dict[str, Any]]:
    """Set the property to repeatable examples, and return a list that grows by the arguments of each run."""
    settings, phase = needed("hypothesis").settings, needed("hypothesis").Phase
    ran: list[dict[str, Any]] = []
    inner = getattr(test.hypothesis, "original_test", test.hypothesis.inner_test)

    @functools.wraps(inner)
    def recording(*args: Any, **arguments: Any) -> None:
        ran.append(arguments)
        inner(*args, **arguments)

    test.hypothesis.original_test, test.hypothesis.inner_test = inner, recording
    test._hypothesis_internal_use_settings = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        # Without Phase.explain, which traces every line: an interpreted kernel then takes minutes and not seconds.
        phases=[phase.explicit, phase.generate, phase.target, phase.shrink],
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
    )
    return ran


# ---- the model -------------------------------------------------------------------------------------------------------


def model_or_tiny(dtype: str = "float32") -> Any:
    """(name, model): SmolLM2-135M-Instruct where it has been fetched, else `tiny`, and a line that says so."""
    from minipaged.model import fetch
    from minipaged.model.load import load_model

    if fetch.is_fetched():
        return "smollm2-135m", load_model("smollm2-135m", dtype)
    print(
        "SmolLM2 is not on this machine (`minipaged fetch` brings it, 93 MB). Going on with `tiny`, a model of random\n"
        "weights: its text is noise, its times are short, and all that is said about memory holds for it too."
    )
    return "tiny", load_model("tiny", dtype)


def table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Display rows as a table; numbers stand at the right."""
    rows = list(rows)
    if not rows:
        raise ValueError("rows must not be empty")
    cells = "".join(f'<th style="text-align:right">{escape(str(name))}</th>' for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:right">{escape(_shown(v))}</td>' for v in row.values()) + "</tr>"
        for row in rows
    )
    _display(f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
