"""Charts as SVG inside of the page: black is written as currentColor, so that one picture serves both palettes. The
table beside a chart holds the same numbers; matplotlib draws, and only where there are numbers to draw.
"""

import html
import io
import re
from dataclasses import dataclass
from typing import Any

INK = "#010203"  # stands for the page's own text colour; no chart uses it for anything else
OURS, OTHERS = "#3f83c9", "#8b9099"  # told from both backgrounds at 3:1
LINES = ("#3f83c9", "#d0741c", "#3d9970")
MARKS = "os^"
FOR_BOTH = {"#1b4f72": "#3f83c9", "#922b21": "#c8594a", "#7d8a8c": "#8b9099"}  # of the simulator's charts


@dataclass(frozen=True)
class Bar:
    """One bar with its whisker, in the chart's unit: the median, and the least and most of all rounds."""

    name: str
    median: float
    least: float
    most: float
    ours: bool = False


def bars(panels: dict[str, list[Bar]], unit: str, said: str) -> str:
    """Panels of horizontal bars from zero, one above the other. said: what a screen reader says of the picture."""
    count = sum(len(panel) for panel in panels.values())

    def drawn(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(
            len(panels),
            figsize=(6.4, 0.3 * count + 0.65 * len(panels) + 0.3),
            squeeze=False,
            layout="constrained",
            height_ratios=[len(panel) + 0.5 for panel in panels.values()],
        )
        for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
            places = range(len(panel))
            colours = [OURS if bar.ours else OTHERS for bar in panel]
            axis.barh(places, [bar.median for bar in panel], height=0.62, color=colours)
            whiskers = [[bar.median - bar.least for bar in panel], [bar.most - bar.median for bar in panel]]
            axis.errorbar(
                [bar.median for bar in panel], places, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1, capsize=2
            )
            axis.set_yticks(places, [bar.name for bar in panel])
            axis.invert_yaxis()
            axis.set_xlim(left=0)
            axis.set_title(title, loc="left", fontsize=10)
        axes[-1, 0].set_xlabel(unit)
        return figure

    return _svg(drawn, said)


def lines(panels: dict[str, dict[str, list[tuple[float, float]]]], units: dict[str, tuple[str, str]], said: str) -> str:
    """Panels of lines, side by side. panels: title -> name -> points; units: title -> (of x, of y)."""

    def drawn(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(3.1 * len(panels), 2.7), squeeze=False, layout="constrained"
        )
        names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
        for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
            for name, points in panel.items():
                place = names.index(name)
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=LINES[place], marker=MARKS[place], markersize=4, linewidth=1.5, label=name)
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel(units[title][0])
            axis.set_ylabel(units[title][1])
        axes[0, 0].legend(frameon=False)
        return figure

    return _svg(drawn, said)


def _svg(drawn: Any, said: str) -> str:
    """The picture as one line of HTML, without ids that another picture on the page could have too."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "xtick.labelcolor")
    look = dict.fromkeys((*ink, "ytick.labelcolor"), INK)
    look |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": said}
    with pyplot.rc_context(look):
        figure = drawn(pyplot)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
        pyplot.close(figure)
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
