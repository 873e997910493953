"""What each benchmark wrote, as tables and a chart. A table has a line for whatever was timed; ours is the first."""

from itertools import groupby
from statistics import median
from typing import Any

import figures


def table(rows: list[dict[str, str]], texts: int = 1) -> str:
    """Markdown, a row a dictionary of heading -> cell. The first `texts` columns are words, the others are numbers."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    bounds = ["---"] * texts + ["---:"] * (len(headings) - texts)
    lines = [headings, bounds, *([row.get(heading, "") for heading in headings] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def where(machine: dict[str, Any]) -> str:
    return f"On {machine['platform']}, {machine['cores']} cores, Python {machine['python']}"


# ---- minipaged bench --------------------------------------------------------------


def bench(found: dict[str, Any]) -> str:
    """Each workload through each system: a table a workload, and bars of tokens a second for each type of number."""
    parts = [
        f"{where(found['machine'])}. Threads of each system: {found['threads']}. They took turns, and each figure is "
        f"the median of its rounds: {found['rounds']}.\n"
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for timing in found["timings"]:
        groups.setdefault((timing["dtype"], timing["workload"]), []).append(timing)
    for dtype in dict.fromkeys(dtype for dtype, _ in groups):
        panels = {
            f"Workload {work}, {dtype}": {timing["system"]: _rates(timing) for timing in group}
            for (of, work), group in groups.items()
            if of == dtype
        }
        parts.append(figures.bars(panels, "tokens a second, with the slowest and the quickest round"))
    for work in dict.fromkeys(work for _, work in groups):
        these = [group for (_, of), group in groups.items() if of == work]
        parts.append(f"**Workload {work}**, {these[0][0]['num_new']:,} new tokens\n")
        parts.append(table([_bench_row(timing, group[0]) for group in these for timing in group], texts=2))
    return "\n\n".join(parts)


def _rates(timing: dict[str, Any]) -> list[float]:
    return [timing["num_new"] / seconds for seconds in timing["seconds"]]


def _bench_row(timing: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    rates, first = _rates(timing), timing["first_token_seconds"]
    return {
        "system": timing["system"],
        "type": timing["dtype"],
        "tokens/s": f"{timing['tokens_per_second']:.1f}",
        "slowest to quickest": f"{min(rates):.1f} to {max(rates):.1f}",
        "ours is": f"{ours['tokens_per_second'] / timing['tokens_per_second']:.2f} x",
        "first token": f"{median(first):.2f} s" if first else "-",
        "peak memory": f"{timing['peak_bytes'] / 2**20:,.0f} MiB",
        "equal tokens": share(timing["equal_tokens"]),
        "slots with tokens": share(timing["slots_with_tokens"]),
    }


# ---- minipaged bench growth --------------------------------------------------------------

GROWTH = {  # what the command measured: title, unit of x, unit of y, factor, form of a cell
    "token": ("Time a token", "tokens of context", "milliseconds", 1e3, ".1f"),
    "step": ("Time a step", "sequences", "milliseconds", 1e3, ".1f"),
    "memory": ("Memory", "tokens held", "slots reserved", 1.0, ",.0f"),
}


def growth(found: dict[str, Any]) -> str:
    panels, tables = {}, []
    for name, (title, of_x, of_y, factor, form) in GROWTH.items():
        panel = {cache: [(x, y * factor) for x, y in points] for cache, points in found[name].items()}
        panels[title, of_x, of_y] = panel
        rows = [{"cache": cache, **{f"{x:,}": format(y, form) for x, y in points}} for cache, points in panel.items()]
        tables += [f"**{title}**: {of_y}, against {of_x}\n", table(rows)]
    said = (
        "Time a token against the context, time a step against the batch, slots reserved against tokens held. "
        "The tables below hold the numbers."
    )
    about = f"{where(found['machine'])}; the median of 12 tokens.\n"
    return "\n\n".join([about, figures.lines(panels, said), *tables])


# ---- make bench-attention --------------------------------------------------------------


def attention(found: dict[str, Any]) -> str:
    """One decode step's attention, in milliseconds: less is better. The floor reads the same bytes and no more."""
    machine = found["machine"]
    processor = f"{machine['processor']}. " if machine["processor"] else ""
    parts = [
        f"{processor}torch {machine['torch']}, {machine['threads']} threads; all of them in turn.\n",
        _beside_contiguous(found["tables"]),
    ]
    for dtype in dict.fromkeys(each["dtype"] for each in found["tables"]):
        pools = {each["pool"].capitalize(): each for each in found["tables"] if each["dtype"] == dtype}
        timed = {pool: each["ms"] for pool, each in pools.items()}
        parts += [f"### {dtype}\n", figures.bars(timed, "milliseconds, with the quickest and the slowest run")]
        for pool, each in pools.items():
            parts += [f"**{pool}**\n", table(_attention_rows(each["ms"], each["errors"]))]
    return "\n\n".join(parts)


def _attention_rows(timed: dict[str, list[float]], errors: dict[str, float]) -> list[dict[str, str]]:
    (ours, mine), *_ = timed.items()
    return [
        {
            "": name,
            "ms, median": f"{median(ms):.2f}",
            "quickest to slowest": f"{min(ms):.2f} to {max(ms):.2f}",
            f"{ours} takes": "" if name == ours else f"{median(mine) / median(ms):.2f} x",
            "by the best": "" if name == ours else f"{min(mine) / min(ms):.2f} x",
            "error": f"{errors[name]:.0e}" if name in errors else "",
        }
        for name, ms in timed.items()
    ]


def _beside_contiguous(tables: list[dict[str, Any]]) -> str:
    """What paging costs in the pools that were measured first: a sentence, with the figures that bear it out."""
    said, most = [], 0.0
    for dtype in dict.fromkeys(each["dtype"] for each in tables):
        medians = {
            name: median(ms) for name, ms in next(each["ms"] for each in tables if each["dtype"] == dtype).items()
        }
        ours = next(iter(medians.values()))
        ratios = {name: ours / ms for name, ms in medians.items() if name.startswith("contiguous")}
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
        timed = list(group)
        amount, scale, unit, ceiling = (
            ("flops", 1e12, "TFLOP/s", found["matmul"]) if prefill else ("kv_bytes", 1e9, "GB/s", found["copy"])
        )
        names = list(dict.fromkeys(name for row in timed for name in row["ms"]))
        rows = []
        for row in timed:
            rate = {name: row[amount] / ms * 1e3 for name, ms in row["ms"].items()}
            ours = "minipaged" in rate
            cells = {
                "sequences": str(row["num_seqs"]),
                "queries": str(row["num_queries"]),
                "context": f"{row['context']:,}",
                "minipaged, µs": f"{row['ms']['minipaged'] * 1e3:,.0f}" if ours else "-",
                "of the ceiling": f"{rate['minipaged'] / ceiling:.0%}" if ours else "-",
            }
            rows.append(cells | {name: f"{rate[name] / scale:,.0f}" if name in rate else "-" for name in names})
        parts.append(f"**{'Prefill' if prefill else 'Decode'}, {shape}**, in {unit}\n")
        parts.append(table(rows, texts=0))
    return "\n\n".join(parts)
