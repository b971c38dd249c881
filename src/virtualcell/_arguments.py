"""Checks of arguments that many functions take."""

from __future__ import annotations

import math
from numbers import Integral, Real


def require_whole(argument: str, value: object, least: int = 1, remedy: str = "") -> int:
    """Return a whole number, or raise for what is none or too small."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{argument}={value!r} is not a whole number of at least {least}. {remedy}".strip())
    return int(value)


def require_number(argument: str, value: object, least: float = 0, below: float = math.inf) -> float:
    """Return a number, or raise for what is none or out of bounds."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not (least <= value < below or value == below == math.inf)
    ):
        bound = f" and less than {below}" if below < math.inf else ""
        raise ValueError(f"{argument}={value!r} is not a number of at least {least}{bound}.")
    return float(value)
