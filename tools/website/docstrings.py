"""Docstrings as Markdown: they are written for the eye, so brackets in running text are brackets and no links."""

import re
from typing import Any

import griffe


class PlainBrackets(griffe.Extension):
    """Escapes [ outside of code: `tables[i][j]` in a sentence would be read as a reference to a page."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(_escaped(line) for line in obj.docstring.value.split("\n"))


def _escaped(line: str) -> str:
    if line.startswith("    "):  # a drawing: Markdown shows it as it is
        return line
    pieces = re.split(r"(`[^`]*`)", line)
    pieces[::2] = [piece.replace("[", "\\[").replace("<", "&lt;").replace("*", "\\*") for piece in pieces[::2]]
    return "".join(pieces)
