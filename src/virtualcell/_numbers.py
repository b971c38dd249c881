"""Numbers that stand in a table as text."""

from __future__ import annotations

import math

import pandas as pd


def as_numbers(values: pd.Series, *, strict: bool = False) -> pd.Series:
    """Return a column as numbers, NaN where it holds none; a column of numbers as it is, not a copy.

    As `pandas.to_numeric`, whose parser ends the process at exponents of many digits, such as 1e991000000000.

    Parameters
    ----------
    values
        A column of any type.
    strict
        Whether to raise for text that is no number.

    Raises
    ------
    ValueError
        For such text, where asked to; the message names the first.
    """
    if pd.api.types.is_numeric_dtype(values.dtype):
        return values
    values = values.astype(object)
    numbers = values.map({value: as_number(value) for value in values.unique()}).astype(float)
    wrong = numbers.isna() & values.notna()
    if strict and wrong.any():
        raise ValueError(f"{values[wrong].iloc[0]!r} is no number")
    return numbers


def as_number(value: object) -> float:
    """Return a number, or text that holds one, as a float; NaN for anything else."""
    if isinstance(value, str) and "_" in value:  # which Python takes for a thousands separator
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
