"""The tables and figures of "Measured", each from a file that a command wrote. Without it, the page names the command.

docs/measured/NAME.json     what a benchmark wrote
docs/measured/NAME.txt      what it printed, where it writes no JSON

The commands stand on the page. A test holds the Makefile's `measured` against them.
"""

import ast
import json
import textwrap
from collections.abc import Callable
from typing import Any

import measured_tables
from course import ROOT, fenced

FOLDER = ROOT / "docs" / "measured"
SHAPES: dict[str, Callable[[Any], str]] = {
    "bench": measured_tables.bench,
    "growth": measured_tables.growth,
    "attention": measured_tables.attention,
    "kernels": measured_tables.kernels,
}


def shown(name: str) -> str:
    """What is in a file, as Markdown, or the sentence that it is not there yet."""
    data, text = FOLDER / f"{name}.json", FOLDER / f"{name}.txt"
    if data.is_file():
        found = json.loads(data.read_text(encoding="utf-8"))
        try:
            return SHAPES[name](found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"docs/measured/{data.name} is not what its command writes now ({error!r})") from error
    if text.is_file():
        return fenced(text.read_text(encoding="utf-8"), "text")
    return "*Not measured yet: the command above writes the file that this page reads.*\n{: .not-measured }\n"


def workloads() -> str:
    """What A to S are, from the module that makes them: the drawing in its header."""
    header = ast.get_docstring(ast.parse((ROOT / "minipaged" / "bench" / "workloads.py").read_text(encoding="utf-8")))
    assert header is not None
    return fenced(textwrap.dedent(header.split("\n\n")[1]), "text")
