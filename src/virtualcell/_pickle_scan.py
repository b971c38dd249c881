"""Look through pickles before they are run: without building anything, for what would take memory or the process."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from virtualcell._reading import as_damaged, require_room

# Deeper ones are hashed and compared without end by C code, which then takes the process down.
_DEEPEST = 500
_LONGEST_ROW = 5  # pickles before the numbers of torch's format of before 1.6


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle that asks for more than data."""


def check_whole(path: Path) -> None:
    """Raise for what comes out of a transfer that went wrong, before a message about pickles tells nothing."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty. Fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of git LFS and not the file. Fetch the file: `git lfs pull`.")
    with as_damaged(path, "file of torch", "Fetch it again."):
        is_cut = start.startswith(b"PK") and not zipfile.is_zipfile(path)
    if is_cut:
        raise ValueError(f"{path} is cut off or damaged. Fetch it again.")


def look_into(path: Path, *, is_zip: bool) -> None:
    """Look through the pickles of a file of torch, an archive, or a row in the format of before 1.6."""
    if is_zip:
        _look_into_zip(path)
        return
    with path.open("rb") as file:
        look_through_row(path.name, file, path.stat().st_size)


def _look_into_zip(path: Path) -> None:
    """Raise for an archive that unfolds to far more than its size, and look through its pickles."""
    with as_damaged(path, "file of torch"), zipfile.ZipFile(path) as archive:
        require_room(path, sum(entry.file_size for entry in archive.infolist()))
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    for content in pickles:
        look_through(path.name, io.BytesIO(content), path.stat().st_size)


def look_through_row(name: str, file: IO[bytes], size: int) -> None:
    """Look through a row of pickles, in torch's format of before 1.6; what follows them are numbers."""
    if not _is_at_pickle(file):
        raise UnsafePickleError(f"{name} is not a file of torch.save. It was not read.")
    for _ in each_of_row(file):
        look_through(name, file, size)


def each_of_row(file: IO[bytes]) -> Iterator[None]:
    """Stop at each pickle of a row, which is to be read before the next."""
    for _ in range(_LONGEST_ROW):
        if not _is_at_pickle(file):
            return
        yield


def _is_at_pickle(file: IO[bytes]) -> bool:
    """Say whether a pickle as torch writes them begins here, and not numbers, the end, or one of protocol 0 or 1."""
    start = file.read(1)
    file.seek(-len(start), io.SEEK_CUR)
    return start == pickle.PROTO


def look_through(name: str, file: IO[bytes], size: int) -> None:
    """Raise for a pickle that would take more memory than its `size` in bytes, or the process down, before it is run.

    Python's own reader fills memory up to the highest number that a pickle gives an object, and reserves what a byte
    array says that it will hold; objects within objects it goes through by recursion without a limit.
    """
    try:
        highest = _highest_number(file)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{name} {error}. It was not read, and nothing in it was run.") from error
    except Exception as error:  # the tools of the standard library raise what they like
        raise UnsafePickleError(f"{name} cannot be read as data: {error}") from error
    if highest > size:
        raise UnsafePickleError(f"{name} numbers an object {highest:,}, and cannot hold so many. It was not read.")


def _highest_number(file: IO[bytes]) -> int:
    """Follow a pickle without building anything; return the highest number of an object, and raise for deep ones."""
    stack: list[int] = []  # depth of what a reader would have there
    marks: list[int] = []  # where it would have marks
    memo: dict[int, int] = {}
    highest = 0
    for op, argument, _ in pickletools.genops(file):
        if op.name == "MARK":
            marks.append(len(stack))
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if op.name == "MEMOIZE" else int(argument)
            memo[number], highest = stack[-1], max(highest, number)
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif op.name == "DUP":
            stack.append(stack[-1])
        elif op.name not in ("PROTO", "FRAME", "STOP"):
            takes_mark = pickletools.markobject in op.stack_before
            start = marks.pop() if takes_mark else len(stack)
            start -= sum(one not in (pickletools.markobject, pickletools.stackslice) for one in op.stack_before)
            if start < 0:
                raise UnsafePickleError("takes objects that it has not given")
            inside = stack[start:]
            del stack[start:]
            if op.stack_after:
                stack += [1 + max(inside, default=0)] * len(op.stack_after)
                if stack[-1] > _DEEPEST:
                    raise UnsafePickleError(f"holds objects nested more than {_DEEPEST} deep")
    return highest
