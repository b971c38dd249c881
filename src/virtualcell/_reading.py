"""Files that others made: how much they may unfold to, and one sentence for whatever is wrong with them."""

from __future__ import annotations

import errno
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError
from typing import TextIO

# Text and tables shrink to a tenth or so when they are compressed; what unfolds to more was made to fill the memory.
_MOST_TIMES, _ALWAYS = 100, 100_000_000
_LONGEST_LINE = 10_000_000
# For pandas: its own parser of numbers ends the process at an exponent of many digits, such as 1e991000000000.
SAFE_NUMBERS = {"float_precision": "round_trip"}
_OF_THE_SYSTEM = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_OF_THE_DISK = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ESTALE, errno.EAGAIN)  # the last: it is locked
_MOST_VALUES, _DEEPEST = 10_000_000, 100  # of a configuration


class DamagedFileError(ValueError):
    """A file that is cut off, damaged, or of another kind than it should be."""


@contextmanager
def as_damaged(path: str | Path, what: str, remedy: str = "", *, checked: bool = False) -> Iterator[None]:
    """Turn what parsers raise into a sentence about the file, since for a file that is made up they can raise anything.

    Parameters
    ----------
    path, what
        The file, and what it should be.
    remedy
        What to do.
    checked
        Whether what runs inside is our own code, whose errors of value and name have their sentences.
    """
    try:
        yield
    except (DamagedFileError, ImportError):
        raise
    except Exception as error:
        is_ours = checked and isinstance(error, ValueError | KeyError | PickleError) and not _is_bare(error)
        if is_ours or isinstance(error, _OF_THE_SYSTEM) or getattr(error, "errno", None) in _OF_THE_DISK:
            raise
        told = f"{type(error).__name__}: {str(error)[:300]}" if str(error) else type(error).__name__
        raise DamagedFileError(
            f"{path} is no {what}, or it is cut off or damaged ({told}). {remedy}".strip()
        ) from error


def _is_bare(error: Exception) -> bool:
    """Whether an error says no more than which key is missing, or which byte is wrong."""
    return type(error) is KeyError or isinstance(error, UnicodeError | json.JSONDecodeError)


def most_bytes(path: Path) -> int:
    """Return what the content of a compressed file may come to."""
    return _MOST_TIMES * path.stat().st_size + _ALWAYS


def require_room(path: Path, n_bytes: int) -> None:
    """Raise for a file that says that it holds far more than fits into its size, before anything is allocated."""
    if n_bytes > most_bytes(path):
        raise DamagedFileError(
            f"{path} has {path.stat().st_size:,} bytes and says that it holds {n_bytes:,}, more than {_MOST_TIMES} "
            "times as many: it is damaged, or was made to fill the memory. It was not read."
        )


class _Bounded(io.RawIOBase):
    """Bytes of a compressed file, up to what it may come to."""

    def __init__(self, path: Path) -> None:
        self._file, self._path, self._left = gzip.GzipFile(path, "rb"), path, most_bytes(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        n = self._file.readinto(buffer)
        self._left -= n
        if self._left < 0:
            raise DamagedFileError(
                f"{self._path} unfolds to more than {_MOST_TIMES} times its size: it was made to fill the memory."
            )
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def open_text(path: Path) -> TextIO:
    """Open a text file in UTF-8, compressed where its name ends in .gz."""
    if path.suffix != ".gz":
        return path.open(encoding="utf-8")
    return io.TextIOWrapper(io.BufferedReader(_Bounded(path), 1 << 16), encoding="utf-8")


def lines_of(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line of a text file, perhaps compressed, without the characters at its end."""
    number = 0
    with as_damaged(path, what, "Is the download complete?"), open_text(path) as file:
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE:
                raise DamagedFileError(f"{path} is no {what}: line {number} has {_LONGEST_LINE:,} characters or more.")
            yield number, line.rstrip("\r\n")


def read_json(path: Path, what: str) -> dict:
    """Read a dictionary from a JSON file."""
    with as_damaged(path, what):
        return mapping_of(json.loads(path.read_text(encoding="utf-8")), str(path))


def mapping_of(value: object, source: str) -> dict:
    """Return a dictionary whose keys are text, or raise."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DamagedFileError(f"{source} must hold names with their values, but holds {type(value).__name__}.")
    return dict(value)


def require_bounded(value: object, source: str) -> None:
    """Raise for nested values that are too deep, or that unfold to too many, as where a list holds another many times.

    Such values take little memory until somebody copies, compares or prints them.
    """
    _n_unfolded(value, source, {}, 0)


def _n_unfolded(value: object, source: str, known: dict[int, int], depth: int) -> int:
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    else:
        return 1
    if id(value) not in known:
        if depth > _DEEPEST:
            raise DamagedFileError(f"{source} holds lists or dictionaries nested more than {_DEEPEST} deep.")
        known[id(value)] = _MOST_VALUES  # within itself
        known[id(value)] = 1 + sum(_n_unfolded(one, source, known, depth + 1) for one in inside)
    if known[id(value)] >= _MOST_VALUES:
        raise DamagedFileError(
            f"{source} holds lists or dictionaries that unfold to more than {_MOST_VALUES:,} values."
        )
    return known[id(value)]
