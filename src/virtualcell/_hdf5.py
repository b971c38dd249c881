"""HDF5 files that others made: what their arrays come to is held against what is stored, before any of it is read."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from virtualcell._reading import DamagedFileError, as_damaged

if TYPE_CHECKING:
    import h5py

_MOST_TIMES = 2000  # zeros compress by a factor of a thousand, and no more
_NEVER_STORED = 16_000_000  # bytes of arrays that were made and never filled
# Where a text of any length is told: how long it is, and where in the file it lies.
_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])


def check_h5(path: Path) -> None:
    """Raise for an HDF5 file that does not hang together, or whose arrays are larger than what is stored of them.

    Its library reserves the size of an array, of each of its pieces and of each text before it finds nothing there, and
    may not come back from a file whose parts are damaged. The lengths of texts cannot be seen beforehand in attributes,
    in tables of records, and in arrays packed by other filters than gzip; each of those reserves 4 GB at most.

    Raises
    ------
    DamagedFileError
        For such a file, and for one whose arrays lie in other files.
    """
    import h5py

    room, stored, missing = path.stat().st_size, 0, 0

    def look(name: str, found: h5py.Dataset | h5py.Group) -> str | None:
        nonlocal stored, missing
        attributes = [found.attrs.get_id(attribute) for attribute in found.attrs]
        missing += max(0, sum(math.prod(one.shape or ()) * one.dtype.itemsize for one in attributes) - room)
        if isinstance(found, h5py.Dataset) and found.shape is not None:
            if found.external or found.is_virtual:
                return name  # which ends the visit; its library mistakes an error for one of its own
            here = found.id.get_storage_size()
            times = _MOST_TIMES if found.id.get_create_plist().get_nfilters() else 1
            size = max(found.size, math.prod(found.chunks or ())) * found.dtype.itemsize  # a piece is read as a whole
            missing += max(0, size - times * here)
            stored += here + _size_of_texts(found, path)
        return None

    with as_damaged(path, "HDF5 file"), h5py.File(path) as file:
        linked = file.visititems_links(lambda name, link: name if isinstance(link, h5py.ExternalLink) else None)
        elsewhere = linked or file.visititems(look)
    if elsewhere:
        raise DamagedFileError(
            f"{path}: {elsewhere} lies in another file, and such files are not followed. Copy all into one, as "
            "`anndata.read_h5ad(...).write_h5ad(...)` does."
        )
    if stored > room or missing > _NEVER_STORED:
        raise DamagedFileError(
            f"{path} has {room:,} bytes and says that it holds {max(stored, missing):,} that are not in it: it is "
            "damaged, or was made to fill the memory. It was not read."
        )


def _size_of_texts(found: h5py.Dataset, path: Path) -> int:
    """Return what texts of any length, or lists, come to, which lie apart from the array and are never compressed."""
    import h5py

    of_one = h5py.check_vlen_dtype(found.dtype)
    is_text = h5py.check_string_dtype(found.dtype) is not None
    if found.dtype.kind != "O" or not (is_text or of_one) or found.file.id.get_create_plist().get_sizes()[0] != 8:
        return 0
    width = 1 if is_text else np.dtype(of_one).itemsize
    return sum(
        width * int(np.frombuffer(raw[: len(raw) // 16 * 16], _REFERENCE)["length"].sum(dtype=np.int64))
        for raw in _stored_parts(found, path)
    )


def _stored_parts(found: h5py.Dataset, path: Path) -> Iterator[bytes]:
    """Yield the bytes of an array as they lie in the file, unpacked where we can."""
    import h5py

    plist = found.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if found.chunks is None:
        at = found.id.get_offset()  # None where nothing is stored, or in the header, which is small
        if at is not None:
            with path.open("rb") as file:
                file.seek(at)
                yield file.read(min(found.id.get_storage_size(), path.stat().st_size))
        return
    if not set(filters) <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}:
        return
    places: list[tuple[int, ...]] = []
    found.id.chunk_iter(lambda chunk: places.append(chunk.chunk_offset))
    size = math.prod(found.chunks) * _REFERENCE.itemsize
    for place in places:
        skipped, raw = found.id.read_direct_chunk(place)
        for i, one in reversed(list(enumerate(filters))):
            if skipped & 1 << i:
                continue
            if one == h5py.h5z.FILTER_DEFLATE:
                raw = zlib.decompressobj().decompress(raw, size)
            else:
                raw = np.frombuffer(raw[: len(raw) // 16 * 16], np.uint8).reshape(16, -1).T.tobytes()
        yield raw
