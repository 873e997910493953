"""The figures of Home and of "Ten minutes": the side-by-side and its recorded run, and our numbers beside the paper's.

<!-- side-by-side -->           two servers, the same memory, the same requests (docs/figures/side_by_side.js)
<!-- ours: a, NAME -->          our figure of that row of docs/paper/a.json, as the last `make reproduce` wrote it
"""

import gzip
import html
import json
from collections.abc import Callable

from course import ROOT

from minipaged.simulator.side_by_side import film

RECORDED = "figures/side_by_side.film"  # JSON, gzipped: no server takes the name for an encoding


def recorded() -> bytes:
    """The run that plays at once: the two servers of the paper's Figure 2, at 3 requests a second."""
    return gzip.compress(json.dumps(film(), separators=(",", ":")).encode(), mtime=0)


def ours(row: str) -> str:
    """What we measured in a row of a report of docs/paper/. Raises KeyError for a row that it does not have."""
    report, _, what = row.partition(", ")
    rows = json.loads((ROOT / "docs" / "paper" / f"{report}.json").read_text(encoding="utf-8"))["rows"]
    found = {each["what"]: each["ours"] for each in rows}[what]
    return f"{found:.0f}" if report == "b" else f"{found:.1f}"  # b counts requests


def side_by_side(here: Callable[[str], str], problem: str) -> str:
    """The element, and inside of it what a page without scripts shows. problem: why there is no Python, or ""."""
    missing = f' missing="{html.escape(problem, quote=True)}"' if problem else ""
    alt = "Two pools of one size: seven long runs, mostly empty, beside small blocks that fill the pool"
    picture = f'<noscript><img src="{here("figures/still/sideBySide.png")}" alt="{alt}"></noscript>'
    script = f'<script async type="module" src="{here("figures/side_by_side.js")}"></script>'
    return f'<div><side-by-side src="{here(RECORDED)}"{missing}>{picture}</side-by-side>{script}</div>'
