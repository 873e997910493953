"""Chapter 11. The charts of a report, as SVG. matplotlib is not needed for anything else, and imported only here."""

import importlib.util
from pathlib import Path
from typing import Any

from minipaged.simulator.report import Bars, Lines, Report

# Told apart by lightness too, for readers who see no red and green, and for a printer.
COLOURS = ["#1b4f72", "#d68910", "#7fb3d5", "#922b21", "#7d8a8c"]
MARKS = "o^sDv"


def check_matplotlib() -> None:
    """Raises ValueError, saying what to install, where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "figures need matplotlib: pip install 'minipaged[tutorials]', or --no-figures for tables alone"
        )


def draw(report: Report, path: Path) -> None:
    """All charts of a report, side by side, as one SVG file. The same numbers give the same bytes."""
    check_matplotlib()
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Ids from a salt and no date, so that a file that is checked in changes only with its numbers.
    with pyplot.rc_context(
        {"svg.hashsalt": report.name, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        count = len(report.charts)
        figure, axes = pyplot.subplots(1, count, figsize=(5.2 * count, 3.6), squeeze=False, layout="constrained")
        for chart, axis in zip(report.charts, axes[0], strict=True):
            if isinstance(chart, Bars):
                _bars(chart, axis)
            else:
                _lines(chart, axis)
            axis.set_title(chart.title, loc="left", fontsize=10)
            axis.set_ylabel(chart.ylabel)
            stacked = isinstance(chart, Bars) and chart.stacked  # bars up to the top: no room for a legend among them
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 3} if stacked else {}
            axis.legend(frameon=False, fontsize=8, **below)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _bars(chart: Bars, axis: Any) -> None:
    places = range(len(chart.groups))
    below = [0.0] * len(chart.groups)
    width = 0.6 if chart.stacked else 0.8 / len(chart.series)
    for number, (name, values) in enumerate(chart.series.items()):
        shift = 0.0 if chart.stacked else (number - (len(chart.series) - 1) / 2) * width
        where = [place + shift for place in places]
        bars = axis.bar(where, values, width, below if chart.stacked else 0, label=name, color=COLOURS[number])
        if chart.stacked:
            below = [a + b for a, b in zip(below, values, strict=True)]
        else:
            axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
        if name in chart.paper:
            axis.plot(places, chart.paper[name], "o", mfc="none", mec="black", label=f"paper: {name}")
    axis.set_xticks(list(places), chart.groups, fontsize=8)


def _lines(chart: Lines, axis: Any) -> None:
    from matplotlib import ticker

    for number, (name, points) in enumerate(chart.series.items()):
        xs, ys = zip(*points, strict=True)
        axis.plot(xs, ys, marker=MARKS[number], ms=4, lw=1.5, label=name, color=COLOURS[number])
    axis.set_xlabel(chart.xlabel)
    if chart.log_x:
        axis.set_xscale("log", base=2)
        ticks = sorted({x for points in chart.series.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        axis.minorticks_off()
    if chart.log_y:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axis.set_ylim(0, chart.y_max)
