"""Read an HDF5 file whole, in a process that may die of it: run by :func:`virtualcell._hdf5.check_h5`, by its path.

It imports nothing of the package, whose import takes longer than a small file does.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])  # that of the process which will read the file

import h5py
import numpy as np

with contextlib.suppress(ImportError):
    import hdf5plugin  # noqa: F401  # brings filters, where it is installed
try:
    import resource
except ImportError:  # Windows: time is limited by who waits, memory is not
    resource = None

_MOST_TIMES = 2000  # zeros compress by a factor of a thousand, and no more
_OF_H5PY = {1, 2, 3, 4, 5, 6, 32000}  # filters that it brings; 32000 is lzf
_MOST_TIMES_ELSE = 50_000  # of others, as of Zstandard, which makes 4 bytes of 128 kB
_NEVER_STORED = 16_000_000  # bytes of arrays that were made and never filled
_PIECE = 1 << 22  # bytes of an array that lies in one piece that are read at a time
_TEXTS = 1024  # texts that are read at a time where the file may hold one for all of them
_BUFFERS = 64_000_000  # bytes of memory that the library takes for itself
_PER_OBJECT, _TO_COUNT = 16_000, 1_000_000_000  # and for each object; at most so many, before it is known how many
_TIMES_LARGEST = 5  # as many copies of a piece as its filters may need
_SECONDS, _PER_PATH, _PER_BYTE = 5, 0.002, 1e-8  # of the processor
_OTHER_PATHS = 1000  # ways to objects that were found before, beyond one for each


class _Trial:
    """What was found in one file.

    Attributes
    ----------
    room
        Size of the file in bytes.
    n_objects, n_paths
        Number of groups and arrays, and of the ways that lead to them, since a link may name any of them again.
    stored, missing
        Bytes that arrays and texts say they take of the file, at each path, and bytes of arrays that nothing in it can
        become.
    unpacked
        Bytes that its arrays come to.
    largest
        Bytes of the largest piece of an array, which is unpacked as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.room = path.stat().st_size
        self.n_objects = self.n_paths = self.stored = self.missing = self.unpacked = self.largest = 0
        self.elsewhere: str | None = None

    @property
    def is_sound(self) -> bool:
        return not self.elsewhere and self.stored <= 2 * self.room and self.missing <= _NEVER_STORED

    def count(self, _name: str, _found: h5py.Dataset | h5py.Group) -> None:
        self.n_objects += 1

    def walk(self, group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset | h5py.Group]]:
        """Yield what each path leads to, as those see it who read a file group by group."""
        self.n_paths += 1
        if self.n_paths > self.n_objects + 1 + _OTHER_PATHS:
            raise ValueError(f"more than {self.n_paths:,} paths lead to {self.n_objects:,} groups and arrays")
        yield group.name, group
        for name in group:
            found = group.get(name)
            if isinstance(found, h5py.Group):
                yield from self.walk(found)
            elif isinstance(found, h5py.Dataset):
                self.n_paths += 1
                yield found.name, found

    def measure(self, name: str, found: h5py.Dataset | h5py.Group) -> None:
        """Add what an object says of its size; note where it lies in another file."""
        attributes = [found.attrs.get_id(attribute) for attribute in found.attrs]
        sizes = [math.prod(one.shape or ()) * dtype.itemsize for one in attributes if (dtype := _dtype(one))]
        self.missing += sum(max(0, size - self.room) for size in sizes)
        if not isinstance(found, h5py.Dataset) or found.shape is None or (dtype := _dtype(found)) is None:
            return
        if found.external or found.is_virtual:
            self.elsewhere = name
            return
        here, filters = found.id.get_storage_size(), set(_filters(found))
        times = 1 if not filters else _MOST_TIMES if filters <= _OF_H5PY else _MOST_TIMES_ELSE
        piece, size = math.prod(found.chunks or ()) * dtype.itemsize, found.size * dtype.itemsize
        self.largest, self.unpacked = max(self.largest, piece), self.unpacked + size
        self.missing += max(0, max(size, piece) - times * here)
        self.stored += here

    def read(self, found: h5py.Dataset | h5py.Group) -> None:
        """Read an object to its end, or until there is too much of it, and add how long its texts are."""
        for attribute in found.attrs:
            if dtype := _dtype(found.attrs.get_id(attribute)):
                value = found.attrs[attribute]
                self.stored += _length(value, dtype)
                if attribute == "column-order" and len(set(np.ravel(value).tolist())) < np.size(value):
                    raise ValueError(f"{found.name} names a column twice")
        if isinstance(found, h5py.Dataset) and (dtype := _dtype(found)):
            for part in _parts(found):
                self.stored += _length(part, dtype)
                if not self.is_sound:
                    return


def _dtype(found: Any) -> np.dtype | None:
    """Return the type of an array or attribute; none where h5py knows none, so that nobody reads it."""
    try:
        return found.dtype
    except TypeError:
        return None


def _filters(found: h5py.Dataset) -> list[int]:
    """Return the filters that pieces of an array went through, in order, by their numbers."""
    plist = found.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def _parts(found: h5py.Dataset) -> Iterator[object]:
    """Yield an array a piece at a time: what is stored of it, or all where texts that are not stored are long too."""
    if not found.shape:
        if found.shape is not None:
            yield found[()]
        return
    plist = found.id.get_create_plist()
    is_filled = found.dtype.hasobject and plist.fill_value_defined() == h5py.h5d.FILL_VALUE_USER_DEFINED
    if found.chunks is None or is_filled:
        width = math.prod(found.shape[1:])
        step = max(1, (_TEXTS if is_filled else _PIECE // found.dtype.itemsize) // max(1, width))
        for start in range(0, found.shape[0], step):
            yield found[start : start + step]
        return
    unknown = sum(1 << i for i, one in enumerate(_filters(found)) if not h5py.h5z.filter_avail(one))
    places: list[tuple[int, ...]] = []

    def note(chunk: Any) -> None:
        if not unknown & ~chunk.filter_mask:  # of those that this piece did go through
            places.append(chunk.chunk_offset)

    found.id.chunk_iter(note)
    for place in places:
        yield found[tuple(slice(start, start + n) for start, n in zip(place, found.chunks, strict=True))]


def _length(value: Any, dtype: np.dtype) -> int:
    """Return the bytes of texts and lists, which lie apart from the array that they belong to."""
    if not dtype.hasobject:
        return 0
    if isinstance(value, bytes | str):
        return len(value if isinstance(value, bytes) else value.encode(errors="surrogateescape"))
    if dtype.names:
        return sum((_length(value[name], dtype[name]) for name in dtype.names), 0)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return sum((_length(one, dtype) for one in value.ravel()), 0)
    return getattr(value, "nbytes", 0)


def _limit(what: str, most: int) -> None:
    """Let this process end, or be refused memory, where it comes to more than is allowed."""
    if resource is not None and (what != "RLIMIT_AS" or _memory()):
        kind = getattr(resource, what)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _memory() -> int:
    """Return the bytes of addresses that this process has; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() and resource else 0


def _try(trial: _Trial, path: Path) -> None:
    """Read a file, with limits that grow with what is known of it."""
    memory = _memory() + 2 * trial.room + _BUFFERS
    seconds = _SECONDS + trial.room / 1e6
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_CPU", math.ceil(seconds))
    _limit("RLIMIT_AS", memory + min(8 * trial.room, _TO_COUNT))
    with h5py.File(path, locking=False) as file:  # who has it open for writing reads it too
        trial.elsewhere = file.visititems_links(
            lambda name, link: name if isinstance(link, h5py.ExternalLink) else None
        )
        if trial.elsewhere:
            return
        file.visititems(trial.count)
        memory += _PER_OBJECT * trial.n_objects
        _limit("RLIMIT_AS", memory)
        for name, found in trial.walk(file):
            trial.measure(name, found)
        if trial.is_sound:
            _limit("RLIMIT_CPU", math.ceil(seconds + _PER_PATH * trial.n_paths + _PER_BYTE * trial.unpacked))
            _limit("RLIMIT_AS", memory + _TIMES_LARGEST * trial.largest)
        trial.n_paths = 0
        for _, found in trial.walk(file):
            if not trial.is_sound:
                return
            trial.read(found)


def main() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    path = Path(sys.argv[2])
    trial = _Trial(path)
    try:
        _try(trial, path)
        told = {name: getattr(trial, name) for name in ("elsewhere", "stored", "missing", "is_sound")}
    except Exception as error:  # for a file that is made up it can be any; who waits makes a sentence of it
        told = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
