"""The tables of "Measured", each from a file that a command wrote. Without the file, the page says so.

docs/measured/NAME.json     what a benchmark wrote with --json
docs/measured/NAME.txt      what it printed, where it writes no JSON
"""

import json
from typing import Any

from course import ROOT, fenced

FOLDER = ROOT / "docs" / "measured"


def table(name: str) -> str:
    """The figures of a file as Markdown, or the sentence that there are none."""
    data, text = FOLDER / f"{name}.json", FOLDER / f"{name}.txt"
    if data.is_file():
        return "\n\n".join(_tables(json.loads(data.read_text(encoding="utf-8")))) + "\n"
    if text.is_file():
        return fenced(text.read_text(encoding="utf-8"), "text")
    return "*Not measured yet: no file of this command is in `docs/measured/`.*\n{: .not-measured }\n"


def _tables(figures: Any, heading: str = "") -> list[str]:
    """Whatever a benchmark wrote: plain values as one line, rows of equal keys as a table, and so on inwards."""
    if isinstance(figures, list) and figures and all(isinstance(row, dict) for row in figures):
        if all(_is_flat(row) for row in figures):
            return [_rows(figures)]
        return [part for row in figures for part in _tables(row)]
    if not isinstance(figures, dict):
        return []
    plain = {key: value for key, value in figures.items() if not isinstance(value, dict | list)}
    parts = [", ".join(f"{_words(key)}: **{_shown(value)}**" for key, value in plain.items())] if plain else []
    for key, value in figures.items():
        if isinstance(value, dict) and value and all(not isinstance(v, dict | list) for v in value.values()):
            rows = [{_words(key): name, "": number} for name, number in value.items()]
            parts.append(_rows(rows))
        elif isinstance(value, dict | list):
            parts += _tables(value, key)
    return parts


def _is_flat(row: dict[str, Any]) -> bool:
    return not any(isinstance(value, dict | list) for value in row.values())


def _rows(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(map(_words, names)) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_shown(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
