"""Where what is fetched, measured or compiled once is kept."""

import os
from pathlib import Path


def home() -> Path:
    """MINIPAGED_HOME, or ~/.cache/minipaged. Raises ValueError where it begins with a user who is not known here."""
    name = os.environ.get("MINIPAGED_HOME") or "~/.cache/minipaged"
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"MINIPAGED_HOME is {name!r}, and there is no such home: {error}") from error
