"""Chapter 11. A report: what we got, beside what the paper printed, and the difference. As a table or a file.

Invariant: a report holds all numbers of its charts, so that a chart can be drawn from the JSON file alone.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from rich.table import Table

from minipaged.simulator.paper import Value


@dataclass(frozen=True)
class Row:
    """One number. `spread` is the standard deviation over seeds. `tolerance`: how far from the paper is still near;
    in percentage points where the unit is %, and otherwise a share of the paper's value."""

    what: str
    unit: str
    ours: float
    spread: float | None = None
    paper: Value | None = None
    tolerance: float | None = None

    @property
    def difference(self) -> float | None:
        """From the paper's value, or from the near end of its range; points for %, and otherwise a share. 0 inside."""
        if self.paper is None:
            return None
        low, high = self.paper if isinstance(self.paper, tuple) else (self.paper, self.paper)
        end = low if self.ours < low else high if self.ours > high else self.ours
        return self.ours - end if self.unit == "%" else self.ours / end - 1

    @property
    def is_near(self) -> bool | None:
        """Whether the paper's value is met; None where there is nothing to compare."""
        if self.difference is None or self.tolerance is None:
            return None
        return abs(self.difference) <= self.tolerance


@dataclass(frozen=True)
class Bars:
    """Groups of bars, one of each series. `paper` is drawn beside them, as hollow marks, where the names agree."""

    title: str
    ylabel: str
    groups: Sequence[str]
    series: dict[str, list[float]]
    paper: dict[str, list[float | None]] = field(default_factory=dict)
    stacked: bool = False


@dataclass(frozen=True)
class Lines:
    """Curves of (x, y) points."""

    title: str
    xlabel: str
    ylabel: str
    series: dict[str, list[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False
    y_max: float | None = None


@dataclass(frozen=True)
class Report:
    name: str  # of the experiment: "a"
    title: str
    source: str  # of the paper's values
    setting: str
    rows: list[Row]
    charts: Sequence[Bars | Lines]
    notes: list[str] = field(default_factory=list)

    @property
    def num_near(self) -> tuple[int, int]:
        """Rows that meet the paper, and rows that are compared."""
        compared = [row.is_near for row in self.rows if row.is_near is not None]
        return sum(compared), len(compared)


def row(
    what: str, unit: str, values: Iterable[float], paper: Value | None = None, tolerance: float | None = None
) -> Row:
    """The mean of values, one for each seed, with their spread."""
    numbers = [*values]
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Row(what, unit, statistics.fmean(numbers), spread, paper, tolerance)


def to_table(report: Report) -> Table:
    near, compared = report.num_near
    caption = f"{report.setting} {near} of {compared} near the paper." if compared else report.setting
    table = Table(
        title=f"({report.name}) {report.title}", caption=caption, title_justify="left", caption_justify="left"
    )
    table.add_column("what")
    for column in ("ours", "spread", "paper", "difference", "near"):
        table.add_column(column, justify="right")
    for each in report.rows:
        table.add_row(*cells(each))
    return table


def cells(each: Row) -> list[str]:
    """A row as text: what, ours, spread, paper, difference, near."""
    paper = each.paper
    shown = (
        "" if paper is None else "{} - {}".format(*map(_number, paper)) if isinstance(paper, tuple) else _number(paper)
    )
    difference = ""
    if each.difference is not None:
        difference = f"{each.difference:+.1f} points" if each.unit == "%" else f"{each.difference:+.0%}"
    spread = "" if each.spread is None else f"± {_number(each.spread)}"
    near = {None: "", True: "yes", False: "no"}[each.is_near]
    return [each.what, f"{_number(each.ours)} {each.unit}".rstrip(), spread, shown, difference, near]


def to_markdown(report: Report) -> str:
    """The same table for a page of the site. Columns in which nothing stands are left out."""
    table = [["", "ours", "spread", "paper", "difference", "near"], *map(cells, report.rows)]
    kept = [column for column in range(6) if column == 0 or any(line[column] for line in table[1:])]
    lines = [" | ".join(line[column] for column in kept) for line in table]
    rule = " | ".join("---" if column == 0 else "---:" for column in kept)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:])) + "\n"


def to_json(report: Report, seeds: Sequence[int]) -> str:
    rows = [asdict(each) | {"difference": each.difference, "near": each.is_near} for each in report.rows]
    charts = [{"kind": type(chart).__name__.lower()} | asdict(chart) for chart in report.charts]
    names = ("name", "title", "source", "setting", "notes")
    fields = {name: getattr(report, name) for name in names}
    return json.dumps(_rounded(fields | {"seeds": [*seeds], "rows": rows, "charts": charts}), indent=1) + "\n"


def to_csv(report: Report) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["experiment", "what", "unit", "ours", "spread", "paper_from", "paper_to", "difference", "near"])
    for each in report.rows:
        ends = each.paper if isinstance(each.paper, tuple) else (each.paper, each.paper)
        values = [each.ours, each.spread, *ends, each.difference]
        writer.writerow([report.name, each.what, each.unit, *map(_rounded, values), each.is_near])
    return out.getvalue()


def _rounded(value):  # type: ignore[no-untyped-def]
    """Six digits: the last bits differ from machine to machine, and files that are checked in should not."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value


def _number(value: float) -> str:
    """Three or four digits, with commas where there are many before the point."""
    size = abs(value)
    if isinstance(value, int) or size < 1e-6 or size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}" if size >= 0.01 else f"{value:.2g}"
