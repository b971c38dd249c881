"""Read an HDF5 file whole, in a process that may die of it: run by :func:`virtualcell._hdf5.check_h5`, by its path.

It imports nothing of the package, whose import takes longer than a small file does.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

try:
    import resource
except ImportError:  # Windows: time is limited by who waits, memory is not
    resource = None

_MOST_TIMES = 2000  # zeros compress by a factor of a thousand, and no more
_OF_H5PY = {1, 2, 3, 4, 5, 6, 32000}  # filters that it brings; 32000 is lzf
_MOST_TIMES_ELSE = 50_000  # of others, as of Zstandard, which makes 4 bytes of 128 kB
_NEVER_STORED = 16_000_000  # bytes of arrays that were made and never filled
_PIECE = 1 << 22  # bytes of an array that lies in one piece that are read at a time
_BUFFERS = 64_000_000  # bytes of memory that the library takes for itself


class _Trial:
    """What was found in one file.

    Attributes
    ----------
    room
        Size of the file in bytes.
    stored, missing
        Bytes that its arrays and texts say they take of it, and bytes of arrays that nothing in it can become.
    largest
        Bytes of the largest piece of an array, which is unpacked as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.room, self.stored, self.missing, self.largest = path.stat().st_size, 0, 0, 0
        self.elsewhere: str | None = None

    @property
    def is_sound(self) -> bool:
        return not self.elsewhere and self.stored <= self.room and self.missing <= _NEVER_STORED

    def measure(self, name: str, found: h5py.Dataset | h5py.Group) -> str | None:
        """Add what an object says of its size; return its name where it lies in another file, which ends the visit."""
        attributes = [found.attrs.get_id(attribute) for attribute in found.attrs]
        sizes = [math.prod(one.shape or ()) * one.dtype.itemsize for one in attributes]
        self.missing += sum(max(0, size - self.room) for size in sizes)
        if not isinstance(found, h5py.Dataset) or found.shape is None:
            return None
        if found.external or found.is_virtual:
            return name
        here, filters = found.id.get_storage_size(), _filters(found)
        times = 1 if not filters else _MOST_TIMES if filters <= _OF_H5PY else _MOST_TIMES_ELSE
        piece = math.prod(found.chunks or ()) * found.dtype.itemsize
        self.largest = max(self.largest, piece)
        self.missing += max(0, max(found.size * found.dtype.itemsize, piece) - times * here)
        self.stored += here
        return None

    def read(self, _name: str, found: h5py.Dataset | h5py.Group) -> bool | None:
        """Read an object to its end, and add how long its texts are; return whether it is enough."""
        for attribute in found.attrs:
            self.stored += _length(found.attrs[attribute], found.attrs.get_id(attribute).dtype)
        if isinstance(found, h5py.Dataset) and all(h5py.h5z.filter_avail(one) for one in _filters(found)):
            for part in _parts(found):
                self.stored += _length(part, found.dtype)
                if self.stored > self.room:
                    return True
        return None


def _filters(found: h5py.Dataset) -> set[int]:
    """Return the filters that pieces of an array went through, by their numbers."""
    plist = found.id.get_create_plist()
    return {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}


def _parts(found: h5py.Dataset) -> Iterator[object]:
    """Yield what is stored of an array, a piece at a time."""
    if not found.shape:
        if found.shape is not None:
            yield found[()]
        return
    if found.chunks is None:
        step = max(1, _PIECE // max(1, math.prod(found.shape[1:]) * found.dtype.itemsize))
        for start in range(0, found.shape[0], step):
            yield found[start : start + step]
        return
    places: list[tuple[int, ...]] = []
    found.id.chunk_iter(lambda chunk: places.append(chunk.chunk_offset))
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
    if resource is not None:
        kind = getattr(resource, what)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _memory() -> int:
    """Return the bytes of addresses that this process has; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * resource.getpagesize() if status.exists() and resource else 0


def main() -> None:
    path, most_seconds = Path(sys.argv[1]), int(sys.argv[2])
    trial = _Trial(path)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_CPU", most_seconds)
    before = _memory()
    if before:
        _limit("RLIMIT_AS", before + 2 * trial.room + _BUFFERS)
    try:
        with h5py.File(path) as file:
            linked = file.visititems_links(lambda name, link: name if isinstance(link, h5py.ExternalLink) else None)
            trial.elsewhere = linked or trial.measure("/", file["/"]) or file.visititems(trial.measure)
            if trial.is_sound:
                if before:
                    _limit("RLIMIT_AS", before + 2 * trial.room + _BUFFERS + 3 * trial.largest)
                if not trial.read("/", file["/"]):
                    file.visititems(trial.read)
        told = {name: getattr(trial, name) for name in ("elsewhere", "stored", "missing", "is_sound")}
    except Exception as error:  # for a file that is made up it can be any; who waits makes a sentence of it
        told = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
