"""The figures of Home and of "Ten minutes": the side-by-side and its recorded run, and our numbers beside the paper's.

    <!-- side by side -->           two servers, the same memory, the same requests (docs/figures/side_by_side.js)
    <!-- ours: held max -->         a figure of docs/paper/, as the last `make reproduce` wrote it

The chapters that the side-by-side belongs to get it here, before their exercise.
"""

import gzip
import html
import json
import re
from collections.abc import Callable

from course import ROOT

from minipaged.simulator.side_by_side import film

RECORDED = "figures/side_by_side.film"  # JSON, gzipped: no server takes the name for an encoding
# The row of a report, and how it is written. docs/paper/a: memory; b: batches; c: requests a second.
OURS = {
    "held-max": ("a", "Orca (Max): holds tokens", "{:.1f}"),
    "held-pow2": ("a", "Orca (Pow2): holds tokens", "{:.1f}"),
    "held-oracle": ("a", "Orca (Oracle): holds tokens", "{:.1f}"),
    "held-paged": ("a", "paged (ours): holds tokens", "{:.1f}"),
    "batch-max": ("b", "sharegpt, Orca (Max)", "{:.0f}"),
    "batch-oracle": ("b", "sharegpt, Orca (Oracle)", "{:.0f}"),
    "batch-paged": ("b", "sharegpt, paged (ours)", "{:.0f}"),
    "factor-max": ("c", "sharegpt: paged over Orca (Max)", "{:.1f}"),
    "factor-oracle": ("c", "sharegpt: paged over Orca (Oracle)", "{:.1f}"),
}
CHAPTERS = {  # page -> what to look for there
    "course/ch04.md": "On the left each request reserves one run, as in this chapter. Choose another policy, and watch "
    "what it holds: even the exact length leaves most of the memory without a token. On the right is what the next "
    "chapters build.",
    "course/ch06.md": "On the right a request takes a block when its last one is full, wherever a free one lies. "
    "Choose another block size: in small blocks hardly a slot is empty, in large ones the last block of each request "
    "is half empty.",
    "course/ch11.md": "Both pools run under the scheduler of chapter 10, with the lengths and the clock of this "
    "chapter. Raise the arrivals until the right server has a queue, too: what it finishes from then on is what it "
    "sustains.",
}
BEFORE = re.compile(r"^## (\d+\. Exercise|The code|The module|Its properties)\b", re.MULTILINE)


def recorded() -> bytes:
    """The run that plays at once: the two servers of the paper's Figure 2, at 3 requests a second."""
    return gzip.compress(json.dumps(film(), separators=(",", ":")).encode(), mtime=0)


def ours(what: str) -> str:
    """One of our figures. Raises KeyError for one that no report has."""
    report, row, form = OURS[what]
    rows = json.loads((ROOT / "docs" / "paper" / f"{report}.json").read_text(encoding="utf-8"))["rows"]
    return form.format({each["what"]: each["ours"] for each in rows}[row])


def side_by_side(here: Callable[[str], str], problem: str) -> str:
    """The element, and inside of it what a page without scripts shows. problem: why there is no Python, or ""."""
    missing = f' missing="{html.escape(problem, quote=True)}"' if problem else ""
    alt = "Two pools of one size: seven long runs, mostly empty, beside small blocks that fill the pool"
    picture = f'<noscript><img src="{here("figures/still/sideBySide.png")}" alt="{alt}"></noscript>'
    return f'<div><side-by-side src="{here(RECORDED)}"{missing}>{picture}</side-by-side></div>'


def placed(markdown: str, path: str) -> str:
    """A chapter with the side-by-side in it; any other page as it is."""
    if path not in CHAPTERS or "<!-- side by side -->" in markdown:
        return markdown
    section = f"## The same traffic, contiguous beside paged\n\n{CHAPTERS[path]}\n\n<!-- side by side -->\n\n"
    found = BEFORE.search(markdown)
    at = found.start() if found else len(markdown)
    return f"{markdown[:at].rstrip()}\n\n{section}{markdown[at:]}"
