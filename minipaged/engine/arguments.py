"""Chapter 10. Arguments of users, checked: what passes here cannot fail in a step, where it would fail for all.

A whole number is what `operator.index` takes, NumPy's integers among it, and it becomes Python's. True and False are
no numbers. Each function raises ValueError with the argument's name, its value, and what it takes.
"""

import operator
from numbers import Real


def whole(name: str, value: object, least: int | None = None) -> int:
    if not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
        else:
            if least is None or number >= least:
                return number
    raise ValueError(f"{name} must be a whole number{'' if least is None else f', at least {least}'}, got {value!r}")


def number(name: str, value: object) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # a whole number that is larger than any float
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    return value


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value


def items(name: str, value: object) -> list[object]:
    if not isinstance(value, str | bytes):
        try:
            return list(value)  # type: ignore[call-overload]
        except TypeError:
            pass
    raise ValueError(f"{name} must be a list, got {value!r}")
