"""What a refusal must say: the numbers, in any words."""

import re


def says(error, *wanted):
    """Whether the message has each of these numbers or names, whole. Of a set, one of them."""
    return all(any(_has(str(error), each) for each in (one if isinstance(one, set) else {one})) for one in wanted)


def _has(message, wanted):
    return re.search(rf"(?<![\w-]){re.escape(str(wanted))}(?!\w|\.\d)", message) is not None
