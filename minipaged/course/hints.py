"""Three hints for each property, from `hints.toml`: the first asks where to look, the last nearly tells."""

import tomllib
from importlib.resources import files
from typing import Any


def all_hints() -> dict[int, list[dict[str, Any]]]:
    """Chapter -> its hints, in the order in which they are tried: of, look, wrong, tell."""
    text = files("minipaged.course").joinpath("hints.toml").read_text(encoding="utf-8")
    return {int(chapter): hints for chapter, hints in tomllib.loads(text).items()}


def hints_for(chapter: int, finding: dict[str, Any]) -> tuple[str, str, str]:
    """The three hints for a property that does not hold. What the learner's own code said is no part of `check`."""
    for hint in all_hints()[chapter]:
        if not hint.get("of") or any(words in finding["check"] for words in hint["of"]):
            return hint["look"], hint["wrong"], hint["tell"]
    raise ValueError(f"chapter {chapter} has no hint for {finding['check']}")
