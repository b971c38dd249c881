"""HDF5 files that others made: what their arrays come to is held against what is stored, before any of it is read."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from virtualcell._reading import DamagedFileError, as_damaged

if TYPE_CHECKING:
    import h5py

_MOST_TIMES = 2000  # zeros compress by a factor of a thousand, and no more
_OF_H5PY = {1, 2, 3, 4, 5, 6, 32000}  # filters that it brings; 32000 is lzf
_MOST_TIMES_ELSE = 50_000  # of others, as of Zstandard, which makes 4 bytes of 128 kB
_NEVER_STORED = 16_000_000  # bytes of arrays that were made and never filled
_ATTRIBUTE, _CONTINUED = 0x0C, 0x10  # kinds of messages in the header of an object
# Where a text of any length is told: how long it is, and where in the file it lies.
_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])


def check_h5(path: Path) -> None:
    """Raise for an HDF5 file that does not hang together, or whose arrays are larger than what is stored of them.

    Its library reserves the size of an array, of each of its pieces and of each text before it finds nothing there, and
    may not come back from a file whose parts are damaged. The lengths of texts cannot be seen beforehand in tables of
    records, in arrays packed by other filters than gzip, and in attributes in HDF5's newer forms, which h5py and
    anndata do not write unasked; each of those reserves 4 GB at most.

    Raises
    ------
    DamagedFileError
        For such a file, and for one whose arrays lie in other files.
    """
    import h5py

    room, stored, missing = path.stat().st_size, 0, 0
    heaps: set[int] = set()

    def look(name: str, found: h5py.Dataset | h5py.Group) -> str | None:
        nonlocal stored, missing
        attributes = [found.attrs.get_id(attribute) for attribute in found.attrs]
        missing += max(0, sum(math.prod(one.shape or ()) * one.dtype.itemsize for one in attributes) - room)
        stored += _texts_of_attributes(found, path, heaps)
        if isinstance(found, h5py.Dataset) and found.shape is not None:
            if found.external or found.is_virtual:
                return name  # which ends the visit; its library mistakes an error for one of its own
            here = found.id.get_storage_size()
            filters = _filters(found)
            times = 1 if not filters else _MOST_TIMES if {*filters} <= _OF_H5PY else _MOST_TIMES_ELSE
            size = max(found.size, math.prod(found.chunks or ())) * found.dtype.itemsize  # a piece is read as a whole
            missing += max(0, size - times * here)
            stored += here + sum(_lengths(part, found.dtype, heaps) for part in _stored_parts(found, path))
        return None

    with as_damaged(path, "HDF5 file"), h5py.File(path) as file:
        linked = file.visititems_links(lambda name, link: name if isinstance(link, h5py.ExternalLink) else None)
        elsewhere = linked or look("/", file["/"]) or file.visititems(look)
        if not elsewhere and _goes_on_for_ever(heaps, file.userblock_size, path):
            raise DamagedFileError(f"{path} is a damaged HDF5 file: texts in it lead nowhere. It was not read.")
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


def _filters(found: h5py.Dataset) -> list[int]:
    """Return the filters that pieces of an array went through, in order, by their numbers."""
    plist = found.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def _is_apart(dtype: np.dtype) -> bool:
    """Whether values are texts of any length, or lists, which lie elsewhere in the file and are never compressed."""
    import h5py

    return h5py.check_string_dtype(dtype) is not None or h5py.check_vlen_dtype(dtype) is not None


def _lengths(raw: bytes, dtype: np.dtype, heaps: set[int]) -> int:
    """Add up how long such values say they are, and note the heaps that they lie in."""
    import h5py

    is_text = h5py.check_string_dtype(dtype) is not None
    width = 1 if is_text else np.dtype(h5py.check_vlen_dtype(dtype)).itemsize
    references = np.frombuffer(raw[: len(raw) // 16 * 16], _REFERENCE)
    heaps.update(np.unique(references["address"][references["length"] > 0]).tolist())
    return width * int(references["length"].sum(dtype=np.int64))


def _goes_on_for_ever(heaps: set[int], base: int, path: Path) -> bool:
    """Whether a heap of texts has an empty piece, at which HDF5's library would stay."""
    with path.open("rb") as file:
        for address in sorted(heaps):
            if base + address >= path.stat().st_size:
                continue
            file.seek(base + address)
            start = file.read(16)
            block = file.read(min(max(int.from_bytes(start[8:16], "little") - 16, 0), path.stat().st_size))
            at = 0
            while start[:4] == b"GCOL" and at + 16 <= len(block):
                index, size = struct.unpack_from("<H6xQ", block, at)
                step = 16 + -(-size // 8) * 8 if index else size
                if not step:
                    return True
                at += step
    return False


def _stored_parts(found: h5py.Dataset, path: Path) -> Iterator[bytes]:
    """Yield the bytes of an array of texts or lists as they lie in the file, unpacked where we can."""
    import h5py

    if found.dtype.kind != "O" or not _is_apart(found.dtype) or found.file.id.get_create_plist().get_sizes()[0] != 8:
        return
    filters = _filters(found)
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


def _texts_of_attributes(found: h5py.Dataset | h5py.Group, path: Path, heaps: set[int]) -> int:
    """Return what texts in attributes come to, as far as the header of their object is in the form that h5py writes."""
    total = 0
    for body in _attribute_messages(found, path):
        version, (name, kind, space) = body[0], struct.unpack_from("<3H", body, 2)
        start, pad = (9, 1) if version == 3 else (8, 8 if version == 1 else 1)
        label = body[start : start + name].split(b"\0")[0]
        if label not in found.attrs or not _is_apart((one := found.attrs.get_id(label)).dtype):
            continue
        at = start + sum(-(-part // pad) * pad for part in (name, kind, space))
        total += _lengths(body[at : at + 16 * math.prod(one.shape or ())], one.dtype, heaps)
    return total


def _attribute_messages(found: h5py.Dataset | h5py.Group, path: Path) -> Iterator[bytes]:
    """Yield the attributes of an object as they lie in the blocks of its header, of version 1."""
    import h5py

    base = found.file.userblock_size
    with path.open("rb") as file:
        file.seek(base + h5py.h5o.get_info(found.id).addr)
        start = file.read(16)
        if start[:1] != b"\1" or found.file.id.get_create_plist().get_sizes() != (8, 8):
            return
        blocks, seen = [(file.tell(), int.from_bytes(start[8:12], "little"))], set()
        while blocks:
            at, size = blocks.pop()
            if at in seen:
                continue
            seen.add(at)
            file.seek(at)
            block = file.read(min(size, path.stat().st_size))
            at = 0
            while at + 8 <= len(block):
                kind, length = struct.unpack_from("<2H", block, at)
                body = block[at + 8 : at + 8 + length]
                if kind == _ATTRIBUTE and len(body) > 8:
                    yield body
                elif kind == _CONTINUED and len(body) >= 16:
                    there, more = struct.unpack_from("<2Q", body)
                    blocks.append((base + there, more))
                at += 8 + length
