"""What each benchmark wrote, as tables and a chart. A table has a line for whatever was timed; ours is the first."""

from itertools import groupby
from statistics import median
from typing import Any

import figures
from figures import Bar


def table(headings: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """Markdown. The first `texts` columns are words and stand left, the others are numbers and stand right."""
    bounds = ["---"] * texts + ["---:"] * (len(headings) - texts)
    lines = [headings, bounds, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def where(machine: dict[str, Any]) -> str:
    return f"On {machine['platform']}, {machine['cores']} cores, Python {machine['python']}"


# ---- minipaged bench --------------------------------------------------------------


def bench(found: dict[str, Any]) -> str:
    """Each workload through each system: a table a workload, and bars of tokens a second for each type of number."""
    timings = found["timings"]
    parts = [
        f"{where(found['machine'])}. Threads of each system: {found['threads']}. They took turns, and each figure is "
        f"the median of its rounds: {found['rounds']}.\n"
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for timing in timings:
        groups.setdefault((timing["dtype"], timing["workload"]), []).append(timing)
    for dtype in dict.fromkeys(dtype for dtype, _ in groups):
        panels = {
            f"Workload {work}, {dtype}": [_bar(t, t is group[0]) for t in group]
            for (of, work), group in groups.items()
            if of == dtype
        }
        parts.append(figures.bars(panels, "tokens a second, with the slowest and the quickest round", _said(panels)))
    for work in dict.fromkeys(work for _, work in groups):
        these = [group for (_, of), group in groups.items() if of == work]
        parts.append(f"**Workload {work}**, {these[0][0]['num_new']:,} new tokens\n")
        parts.append(table(BENCH, [_bench_row(timing, group[0]) for group in these for timing in group], texts=2))
    return "\n\n".join(parts)


BENCH = [
    "system",
    "type",
    "tokens/s",
    "slowest to quickest",
    "ours is",
    "first token",
    "peak memory",
    "equal tokens",
    "slots with tokens",
]


def _rates(timing: dict[str, Any]) -> list[float]:
    return [timing["num_new"] / seconds for seconds in timing["seconds"]]


def _bar(timing: dict[str, Any], ours: bool) -> Bar:
    rates = _rates(timing)
    return Bar(timing["system"], timing["tokens_per_second"], min(rates), max(rates), ours)


def _said(panels: dict[str, list[Bar]]) -> str:
    said = [f"{title}: {bar.name} {bar.median:.1f}" for title, panel in panels.items() for bar in panel]
    return f"Tokens a second. {'; '.join(said)}. The tables below say the same."


def _bench_row(timing: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    rates, first = _rates(timing), timing["first_token_seconds"]
    return [
        timing["system"],
        timing["dtype"],
        f"{timing['tokens_per_second']:.1f}",
        f"{min(rates):.1f} to {max(rates):.1f}",
        f"{ours['tokens_per_second'] / timing['tokens_per_second']:.2f} x",
        f"{median(first):.2f} s" if first else "-",
        f"{timing['peak_bytes'] / 2**20:,.0f} MiB",
        share(timing["equal_tokens"]),
        share(timing["slots_with_tokens"]),
    ]


# ---- minipaged bench growth --------------------------------------------------------------

GROWTH = {  # what the command measured: (title, unit of x, unit of y, factor)
    "token": ("Time a token", "tokens of context", "milliseconds", 1e3),
    "step": ("Time a step", "sequences", "milliseconds", 1e3),
    "memory": ("Memory", "tokens held", "slots reserved", 1.0),
}


def growth(found: dict[str, Any]) -> str:
    panels = {
        title: {cache: [(x, y * factor) for x, y in points] for cache, points in found[name].items()}
        for name, (title, _, _, factor) in GROWTH.items()
    }
    units = {title: (of_x, of_y) for title, of_x, of_y, _ in GROWTH.values()}
    said = "Time a token against the context, time a step against the batch, slots reserved against tokens held."
    parts = [
        f"{where(found['machine'])}; the median of 12 tokens.\n",
        figures.lines(panels, units, f"{said} The tables below hold the numbers."),
    ]
    for title, panel in panels.items():
        of_x, of_y = units[title]
        longest = max(panel.values(), key=len)
        rows = []
        for cache, points in panel.items():
            cells = [f"{y:,.0f}" if title == "Memory" else f"{y:.1f}" for _, y in points]
            rows.append([cache, *cells, *[""] * (len(longest) - len(cells))])
        parts.append(f"**{title}**: {of_y}, against {of_x}\n")
        parts.append(table(["cache", *(f"{x:,.0f}" for x, _ in longest)], rows))
    return "\n\n".join(parts)


# ---- make bench-attention --------------------------------------------------------------


def attention(found: dict[str, Any]) -> str:
    """One decode step's attention, in milliseconds: less is better. The floor reads the same bytes and no more."""
    machine = found["machine"]
    parts = [
        f"{_processor(machine)}torch {machine['torch']}, {machine['threads']} threads; all of them in turn.\n",
        _beside_contiguous(found["tables"]),
    ]
    for dtype in dict.fromkeys(each["dtype"] for each in found["tables"]):
        these = [each for each in found["tables"] if each["dtype"] == dtype]
        panels = {
            each["pool"].capitalize(): [
                Bar(name, each["medians"][name], min(ms), max(ms), name == next(iter(each["ms"])))
                for name, ms in each["ms"].items()
            ]
            for each in these
        }
        said = ", ".join(f"{bar.name} {bar.median:.1f} ({pool})" for pool, panel in panels.items() for bar in panel)
        parts.append(f"### {dtype}\n")
        parts.append(
            figures.bars(
                panels, "milliseconds, with the quickest and the slowest run", f"Milliseconds in {dtype}: {said}."
            )
        )
        for each in these:
            medians = each["medians"]
            ours = next(iter(each["ms"]))
            rows = [
                [
                    name,
                    f"{medians[name]:.2f}",
                    f"{min(ms):.2f} to {max(ms):.2f}",
                    "" if name == ours else f"{medians[ours] / medians[name]:.2f} x",
                    "" if name == ours else f"{min(each['ms'][ours]) / min(ms):.2f} x",
                    f"{each['errors'][name]:.0e}" if name in each["errors"] else "",
                ]
                for name, ms in each["ms"].items()
            ]
            parts.append(f"**{each['pool'].capitalize()}**\n")
            parts.append(
                table(["", "ms, median", "quickest to slowest", f"{ours} takes", "by the best", "error"], rows)
            )
    return "\n\n".join(parts)


def _processor(machine: dict[str, Any]) -> str:
    return f"{machine['processor']}. " if machine["processor"] else ""


def _beside_contiguous(tables: list[dict[str, Any]]) -> str:
    """What paging costs in the pools that were measured first: a sentence, with the figures that bear it out."""
    said, most = [], 0.0
    for dtype in dict.fromkeys(each["dtype"] for each in tables):
        medians = next(each["medians"] for each in tables if each["dtype"] == dtype)
        ours = next(iter(medians))
        ratios = {name: medians[ours] / ms for name, ms in medians.items() if name.startswith("contiguous")}
        said.append(f"in {dtype} " + " and ".join(f"{ratio:.2f} times ({name})" for name, ratio in ratios.items()))
        most = max([most, *ratios.values()])
    verdict = "Paging costs nothing here" if most <= 1.0 else "Paging has a price here"
    return f"**{verdict}.** It takes {', '.join(said)} as long as the same attention over contiguous memory.\n"


# ---- make bench-kernels --------------------------------------------------------------


def kernels(found: dict[str, Any]) -> str:
    """Decode as bytes a second beside a copy's, prefill as operations a second beside a matrix product's."""
    parts = [
        f"{found['machine']}. A copy moves {found['copy'] / 1e9:,.0f} GB/s, and a matrix product in bfloat16 does "
        f"{found['matmul'] / 1e12:,.0f} TFLOP/s.\n"
    ]
    for (shape, prefill), group in groupby(found["rows"], key=lambda row: (row["shape"], row["num_queries"] > 1)):
        rows = list(group)
        amount, scale, unit, ceiling = (
            ("flops", 1e12, "TFLOP/s", found["matmul"]) if prefill else ("kv_bytes", 1e9, "GB/s", found["copy"])
        )
        names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
        lines = []
        for row in rows:
            rate = {name: row[amount] / ms * 1e3 for name, ms in row["ms"].items()}
            cells = [str(row["num_seqs"]), str(row["num_queries"]), f"{row['context']:,}"]
            mine = rate.get("minipaged")
            cells += ["-", "-"] if mine is None else [f"{row['ms']['minipaged'] * 1e3:,.0f}", f"{mine / ceiling:.0%}"]
            lines.append(cells + [f"{rate[name] / scale:,.0f}" if name in rate else "-" for name in names])
        what = "Prefill" if prefill else "Decode"
        parts.append(f"**{what}, {shape}**, in {unit}\n")
        headings = ["sequences", "queries", "context", "minipaged, µs", "of the ceiling", *names]
        parts.append(table(headings, lines, texts=0))
    return "\n\n".join(parts)
