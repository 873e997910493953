"""What the course remembers of a learner, in one small JSON file beside their exercises.

Invariant: losing the file costs a learner nothing but the ticks of `minipaged progress`.
"""

import json
from pathlib import Path
from typing import Any

FILE = ".minipaged.json"


def load(folder: Path) -> dict[str, Any]:
    """{"chapters": {"6": {...}}}; an unreadable file counts as none."""
    try:
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = {}
    return state if isinstance(state, dict) else {}


def remember(folder: Path, section: str, key: str, value: Any) -> None:
    """Keep one value. A folder that cannot be written to is no reason to fail."""
    state = load(folder)
    entries = state.setdefault(section, {})
    if isinstance(entries, dict):
        entries[key] = value
        try:
            (folder / FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        except OSError:
            return


def recall(folder: Path, section: str, key: str) -> Any:
    entries = load(folder).get(section, {})
    return entries.get(key) if isinstance(entries, dict) else None


def is_done(folder: Path, chapter: int) -> bool:
    """Whether the last check of a chapter found that everything holds."""
    last = recall(folder, "chapters", str(chapter))
    return isinstance(last, dict) and last.get("code") == 0


def next_level(folder: Path, chapter: int, test: str, asked: bool, levels: int) -> int:
    """Which hint to show: the one shown last for this failure, or with `asked` the one after it. 1 to levels."""
    before = recall(folder, "hints", str(chapter))
    same = isinstance(before, dict) and before.get("test") == test and isinstance(before.get("level"), int)
    level = min(levels, before["level"] + asked) if same else 1
    remember(folder, "hints", str(chapter), {"test": test, "level": level})
    return level
