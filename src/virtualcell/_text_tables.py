"""Tables that others wrote as text: their separator, their header, and columns that only number the rows."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path

import pandas as pd

from virtualcell._reading import as_damaged, open_text

_ROWS = 100  # that tell what a column holds
_SEPARATORS = (";", "\t", "|", ",", " ")
_UNNAMED = re.compile(r"(Unnamed: \d+)?(\.\d+)*")  # what pandas calls a column without a name
_INDEX = re.compile(r"index|level_\d+|__index_level_\d+__")  # how an index is called that became a column
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


def head_of(path: Path, separator: str, what: str, remedy: str = "") -> pd.DataFrame:
    """Return the first rows of a table as text, with the names of its columns.

    Raises
    ------
    ValueError
        If its values are separated by something else, or its rows have more values than its header has names: of such
        a table pandas takes the first column for an index. That is right where it numbers the rows, as R does.
    """
    with as_damaged(path, what, remedy), open_text(path) as file:
        head = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, nrows=_ROWS)
    names, has_more = list(head.columns), not isinstance(head.index, pd.RangeIndex)
    for other in _SEPARATORS if len(names) == 1 else ():
        if other in names[0] and other != separator and not (other == " " and has_more):
            to = "" if separator == "," else f"sep={separator!r}, "
            raise ValueError(
                f"{path.name} has one column, {names[0][:80]!r}: it is separated by {other!r}, and not by "
                f"{separator!r}. Write it anew: `pd.read_csv({str(path)!r}, sep={other!r}, dtype=str, "
                f"keep_default_na=False).to_csv({str(path)!r}, {to}index=False)`."
            )
    if has_more and not counts_rows("index", head.index.to_series()):  # which write.table of R writes
        raise ValueError(
            f"{path.name} has rows with more values than its first line has names, {names[:3]}"
            f"{'...' if len(names) > 3 else ''}. Give every column a name there, that of the genes too."
        )
    return head


def is_unnamed(name: Hashable) -> bool:
    """Tell whether a column has no name."""
    return bool(_UNNAMED.fullmatch(str(name)))


def numbers_rows(name: Hashable, values: pd.Series) -> bool:
    """Tell whether a column is an index that was written along, of a table that may have been cut or sorted since."""
    if not (is_unnamed(name) or _INDEX.fullmatch(str(name))):
        return False
    return values.is_unique and bool(values.astype(str).str.fullmatch(r"\d+").all())


def counts_rows(name: Hashable, values: pd.Series) -> bool:
    """Tell whether a column is such an index, of all rows in their order, and nothing else."""
    if not numbers_rows(name, values):
        return False
    numbers = values.astype(str).tolist()
    return any(numbers == [str(i) for i in range(first, first + len(numbers))] for first in (0, 1))


def is_number(text: str) -> bool:
    """Tell whether a text is a number."""
    return bool(_NUMBER.fullmatch(text))


def are_values(names: Iterable[str]) -> bool:
    """Tell whether what should be names of columns are values of a first row, since there is no header.

    Numbers are names where they count columns: whole ones, of which none repeats, and in order unless all are there.
    """
    numbers = [float(name) for name in names if is_number(name)]
    whole = all(n.is_integer() and n >= 0 for n in numbers) and len(set(numbers)) == len(numbers)
    return not (whole and (numbers == sorted(numbers) or max(numbers) <= len(numbers)))
