"""Charts as SVG inside of the page: black is written as currentColor, so that one picture serves both palettes. The
table beside a chart holds the same numbers.
"""

import html
import io
import re
from statistics import median

import matplotlib
from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's own text colour; no chart uses it for anything else
OURS, OTHERS = "#3f83c9", "#8b9099"  # told from both backgrounds at 3:1
LINES = ("#3f83c9", "#d0741c", "#3d9970")
MARKS = "os^"
FOR_BOTH = {"#1b4f72": "#3f83c9", "#922b21": "#c8594a", "#7d8a8c": "#8b9099"}  # of the simulator's charts
_INK_OF = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
LOOK = dict.fromkeys(_INK_OF, INK) | {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@matplotlib.rc_context(LOOK)
def bars(panels: dict[str, dict[str, list[float]]], unit: str) -> str:
    """Panels of horizontal bars from zero, one above the other: title -> name -> what each round gave. A bar is the
    median, with a whisker from the least to the most. The first bar of a panel is ours.
    """
    count = sum(len(panel) for panel in panels.values())
    figure = Figure(figsize=(6.4, 0.3 * count + 0.65 * len(panels) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(panel) + 0.5 for panel in panels.values()])
    said = []
    for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        for place, (name, rounds) in enumerate(panel.items()):
            middle = median(rounds)
            whisker = [[middle - min(rounds)], [max(rounds) - middle]]
            colour = OTHERS if place else OURS
            axis.barh(
                place, middle, 0.62, xerr=whisker, color=colour, ecolor=INK, capsize=2, error_kw={"elinewidth": 1}
            )
            said.append(f"{title}: {name} {middle:.1f}")
        axis.set_yticks(range(len(panel)), panel)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel(unit)
    return _svg(figure, f"{unit.capitalize()}. {'; '.join(said)}. The tables below say the same.")


@matplotlib.rc_context(LOOK)
def lines(panels: dict[tuple[str, str, str], dict[str, list[tuple[float, float]]]], said: str) -> str:
    """Panels of lines, side by side: (title, unit of x, unit of y) -> name -> points. said: for a screen reader."""
    figure = Figure(figsize=(3.1 * len(panels), 2.7), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axis, ((title, of_x, of_y), panel) in zip(axes[0], panels.items(), strict=True):
        for name, points in panel.items():
            place = names.index(name)
            x, y = zip(*points, strict=True)
            axis.plot(x, y, color=LINES[place], marker=MARKS[place], markersize=4, linewidth=1.5, label=name)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(of_x)
        axis.set_ylabel(of_y)
    axes[0, 0].legend(frameon=False)
    return _svg(figure, said)


def _svg(figure: Figure, said: str) -> str:
    """The picture as one line of HTML, without ids that another picture on the page could have too."""
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": said}):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    return in_page(sink.getvalue(), said)


def in_page(svg: str, said: str) -> str:
    """matplotlib's picture as a part of a page, in its colours: what is black there takes the page's ink."""
    svg = svg[svg.index("<svg") :].replace('style="fill: #ffffff"', 'fill="none"')
    for colour, shown in {INK: "currentColor", "#000000": "currentColor", **FOR_BOTH}.items():
        svg = svg.replace(colour, shown)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)  # axes_1, patch_2; what is referred to has a hash for its id
    svg = re.sub(r' width="([\d.]+)pt" height="[\d.]+pt"', _narrowest, svg, count=1)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    return (
        f'<div class="measured-figure" role="img" tabindex="0" aria-label="{html.escape(said, quote=True)}">{svg}</div>'
    )


def _narrowest(size: re.Match[str]) -> str:
    """As wide as there is room for, and no narrower than its words can be read at: beyond that it scrolls."""
    return f' role="presentation" style="min-width: {float(size[1]) / 20:.0f}rem"'
