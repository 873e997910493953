"""Formulas become MathML while the site is built, so that a browser draws them with no script and no font of ours.

pymdownx.arithmatex finds the formulas and marks them: <span class="arithmatex">\\(x\\)</span>. What is here turns the
marks into MathML (latex2mathml). A formula that cannot be turned stops the build.
"""

import html
import re

from latex2mathml.converter import convert

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def to_mathml(page: str) -> str:
    """The page with its marked formulas as MathML."""
    return _MARKED.sub(_formula, page)


def _formula(match: re.Match[str]) -> str:
    latex = html.unescape(match[3]).strip()
    display = "block" if match[1] == "div" else "inline"
    try:
        mathml = convert(latex, display=display)
    except Exception as error:
        raise ValueError(f"the formula {latex!r} cannot be turned into MathML: {error}") from error
    label = html.escape(latex, quote=True)
    return mathml.replace("<math ", f'<math data-latex="{label}" ', 1)
