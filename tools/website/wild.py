"""What the notebooks say of other systems ("In the wild"), collected on one page, chapter by chapter."""

import re
from pathlib import Path
from typing import Any

from course import CHAPTERS
from notebooks import link_chapters


def collected(notebooks: dict[Path, dict[str, Any]]) -> str:
    parts = []
    for chapter in CHAPTERS:
        notebook = notebooks.get(chapter.notebook) if chapter.notebook else None
        for cell in notebook["cells"] if notebook else []:
            found = re.match(r"## (?:\d+\. )?In the wild\s*\n(.*)", "".join(cell["source"]), flags=re.DOTALL)
            if found:
                text = re.split(r"^## ", found[1], flags=re.MULTILINE)[0].strip()
                parts.append(f"### Chapter {chapter.number}\n\n{link_chapters(text, 'course/')}\n")
    return "\n".join(parts) or "No notebook has such a section yet.\n"
