"""What the notebooks say of other systems ("In the wild"), collected on one page, chapter by chapter."""

import re
from pathlib import Path
from typing import Any

from course import CHAPTERS
from notebooks import link_chapters


def collected(notebooks: dict[Path, dict[str, Any]], number: int) -> str:
    """What the notebook of a chapter says; "" where it says nothing, or there is none."""
    notebook = notebooks.get(CHAPTERS[number - 1].notebook)
    for cell in notebook["cells"] if notebook else []:
        found = re.match(r"## (?:\d+\. )?In the wild\s*\n(.*)", "".join(cell["source"]), flags=re.DOTALL)
        if found:
            text = re.split(r"^## ", found[1], flags=re.MULTILINE)[0].strip()
            return f"{link_chapters(text, 'course/')}\n"
    return ""
