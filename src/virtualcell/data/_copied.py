"""Copies of lazy matrices in the cache folder: rows in blocks of mapped files, quick to read in any order."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from virtualcell._files import put_in_place
from virtualcell._progress import Bar
from virtualcell._tasks import Workers
from virtualcell.data._cache import Hold, Scratch, home, is_of_process, make_once, make_room, written
from virtualcell.data._stored import StoredMatrix, canonical_rows, ranges

if TYPE_CHECKING:
    from virtualcell.data._on_disk import ByColumns, LazyMatrix

logger = logging.getLogger(__name__)

_INDEX = "copy.json"
_VERSION = 1
_PARTS = ("genes", "values", "indptr")  # the last one says that a block is finished
_BYTES_PER_ENTRY = 6  # at most: a gene of 16 bits, a value of 32

# Copies that are in use, by their folders.
_OPEN: weakref.WeakValueDictionary[Path, CopiedRows] = weakref.WeakValueDictionary()
# Copies of what nothing tells apart after this process, by what tells it apart in it.
_OF_SESSION: dict[str, Scratch] = {}
# Python 3.11 parses the beginning of an array's file wrongly at times where several threads do so at once.
_LOADING = threading.Lock()


def copy_of(matrix: LazyMatrix, *, make: bool, workers: Workers) -> CopiedRows | None:
    """Return the copy of a lazy matrix, made where there is none and one is to be made.

    It is made block by block, by this process or by workers that open the same files. What is finished is kept when
    the process dies, and the next call goes on from there. While the copy is made or used, no process removes it from
    the cache.

    Raises
    ------
    OSError
        If the disk has no room for it.
    """
    folder = _folder_of(matrix, make=make)
    if folder is None or (not make and not CopiedRows.is_whole(folder)):
        return None
    hold = Hold(folder)
    copied = partial(_make, matrix, folder.absolute(), workers)
    make_once(hold.folder, is_whole=partial(CopiedRows.is_whole, folder), make=copied)
    if (copy := _OPEN.get(folder)) is None:  # whoever maps files twice has their pages twice
        _OPEN[folder] = copy = CopiedRows(folder)
    return copy


def key_of(matrix: LazyMatrix) -> str:
    """Return what tells a matrix from any other: where it is, when it was written, and some of its rows."""
    source = matrix.here if matrix.source is None else matrix.source
    known = repr((_VERSION, matrix.shape, source)).encode()
    return hashlib.sha256(known + matrix.sample()).hexdigest()[:24]


def _folder_of(matrix: LazyMatrix, *, make: bool) -> Path | None:
    """Return where the copy of a matrix is or is to be: in the cache folder, or in one for this session alone."""
    key = key_of(matrix)
    if matrix.source is not None:
        return home() / key
    if key not in _OF_SESSION:
        if not make:
            return None
        _OF_SESSION[key] = Scratch.of_session()
    return Path(_OF_SESSION[key].name)


def _make(matrix: LazyMatrix, folder: Path, workers: Workers) -> None:
    """Copy a matrix, or what of it is not copied yet."""
    index = folder / _INDEX
    if not index.exists():
        needed = _bytes_of(matrix)
        make_room(needed)
        _check_room(needed, folder)
        described = {
            "shape": [int(n) for n in matrix.shape],
            "edges": matrix.edges.tolist(),
            "is_sparse": matrix.is_sparse,
        }
        put_in_place(index, lambda part: part.write_text(json.dumps(described)))
    edges = json.loads(index.read_text())["edges"]
    n_cells, n_genes = matrix.shape
    logger.info(
        "The %d cells x %d genes are not in memory, and are copied to %s, in one pass: rows are then quick to read in "
        "any order, for this call and for later ones.",
        *(n_cells, n_genes, folder),
    )
    spans = [(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    todo = [span for span in spans if not _is_finished(folder, span[0])]
    turned = None if not hasattr(matrix, "columns") else _turned(matrix, folder, edges)
    with Bar("Copying the matrix", n_cells, unit="cell") as bar:
        bar.show(n_cells - sum(b - a for _, a, b in todo))
        if turned is None:
            workers.require(index)
            copied = workers.each(_copy_block, (matrix, folder), todo)
        else:  # of pieces of columns, which are put together here
            copied = (_copy_turned(turned, folder, span) for span in todo)
        for n_copied in copied:
            bar.show(bar.done + n_copied)
    shutil.rmtree(folder / "turned", ignore_errors=True)
    make_room()


def _bytes_of(matrix: LazyMatrix) -> int:
    """Return how large a copy gets at most; 0 of a dense matrix, of which nothing tells how many values are 0."""
    if not matrix.is_sparse:
        return 0
    return int(matrix.entries_per_cell * matrix.shape[0] * _BYTES_PER_ENTRY * (1 + hasattr(matrix, "columns")))


def _check_room(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"a copy of the matrix, of up to {needed / 1e9:.3g} GB, has no room in {folder}, where {free / 1e9:.3g} GB "
            "are free. Name a folder on a larger disk, `vc.settings.cache_dir = path`, or have fewer copies kept, "
            "`vc.settings.max_cache = GB`."
        )


def _copy_block(shared: tuple[LazyMatrix, Path], span: tuple[int, int, int]) -> int:
    (matrix, folder), (i, start, stop) = shared, span
    _write_block(folder, i, matrix.read(start, stop))
    return stop - start


def _copy_turned(turned: Callable[[int], sparse.csr_matrix], folder: Path, span: tuple[int, int, int]) -> int:
    i, start, stop = span
    _write_block(folder, i, turned(i))
    return stop - start


def _write_block(folder: Path, i: int, block: sparse.csr_matrix) -> None:
    """Write the arrays of a block, whole or not at all, in few bytes."""
    n_genes = block.shape[1]
    arrays = {
        "genes": block.indices.astype(np.uint16 if n_genes <= 1 << 16 else np.int32),
        "values": _in_few_bytes(block.data),
        "indptr": block.indptr.astype(np.int64),
    }
    for name in _PARTS:
        part = folder / f"{i:06d}.{name}.{os.getpid()}.part"
        with written(part), part.open("wb") as file:
            np.save(file, arrays[name])
        part.replace(folder / f"{i:06d}.{name}.npy")


def _is_finished(folder: Path, i: int) -> bool:
    return (folder / f"{i:06d}.{_PARTS[-1]}.npy").exists()


def _in_few_bytes(values: np.ndarray) -> np.ndarray:
    """Return counts as integers of 8 or 16 bits where these hold them, and other numbers as they are."""
    if len(values) and not (values.min() >= 0 and values.max() < 1 << 16):  # NaN is neither
        return values
    whole = values.astype(np.uint16)
    if not np.array_equal(whole, values):
        return values
    return whole if whole.max(initial=0) >= 1 << 8 else whole.astype(np.uint8)


# -- what is stored by columns ----------------------------------------------------------------------------------------


def _turned(matrix: ByColumns, folder: Path, edges: list[int]) -> Callable[[int], sparse.csr_matrix]:
    """Cut columns into pieces by blocks of rows, on disk, and return what puts the pieces of a block together.

    Each column is read once, and no more is in memory than some columns or one block of rows.
    """
    home, n = folder / "turned", 0
    for columns in matrix.columns():
        done = home / f"{n:05d}"
        n += 1
        if done.exists():
            continue
        part = home / f"{done.name}.{os.getpid()}.part"
        part.mkdir(parents=True, exist_ok=True)
        by_rows = sparse.csr_matrix(columns)
        for i, (start, stop) in enumerate(itertools.pairwise(edges)):
            sparse.save_npz(part / f"{i:06d}.npz", by_rows[start:stop], compressed=False)
        part.replace(done)

    def block(i: int) -> sparse.csr_matrix:
        pieces = [sparse.load_npz(home / f"{j:05d}" / f"{i:06d}.npz") for j in range(n)]
        return canonical_rows(sparse.hstack(pieces, format="csr"))

    return block


# -- reading ----------------------------------------------------------------------------------------------------------


class CopiedRows(StoredMatrix):
    """A copy of a matrix; any rows of it are put together from stretches of the files.

    Parameters
    ----------
    folder
        Where it is.
    """

    in_memory = False

    def __init__(self, folder: Path) -> None:
        self.folder, self._hold = folder, Hold(folder)
        described = json.loads((folder / _INDEX).read_text())
        self.shape, self.is_sparse = tuple(described["shape"]), described["is_sparse"]
        self._edges = np.array(described["edges"])
        self._open: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __reduce__(self) -> tuple:
        return type(self), (self.folder.absolute(),)  # another process maps the same files

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Tell whether all blocks of a copy are there."""
        if not (folder / _INDEX).exists():
            return False
        n_blocks = len(json.loads((folder / _INDEX).read_text())["edges"]) - 1
        return all(_is_finished(folder, i) for i in range(n_blocks))

    @property
    def key(self) -> str | None:
        """What tells the matrix from any other."""
        return None if is_of_process(self.folder) else self.folder.name

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row."""
        n = sum(self._block(i)[2][-1] for i in range(len(self._edges) - 1))
        return float(n) / max(self.shape[0], 1)

    def _block(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Columns, values and row starts of a block."""
        if i not in self._open:
            paths = [self.folder / f"{i:06d}.{name}.npy" for name in _PARTS]
            with _LOADING:
                # an empty file cannot be mapped
                genes, values, indptr = (np.load(p, mmap_mode="r" if p.stat().st_size > 128 else None) for p in paths)
            self._open[i] = genes, values, indptr
        return self._open[i]

    def rows(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows, float32, in memory of their own."""
        if index is None or isinstance(index, slice):
            start, stop, step = (index or slice(None)).indices(self.shape[0])
            if step == 1:
                return self._together(list(self._slices(start, max(start, stop))))
            index = np.arange(start, stop, step)
        index = np.asarray(index)
        if not len(index):
            return self._together([])
        block_of = np.searchsorted(self._edges, index, side="right") - 1
        order = np.argsort(block_of, kind="stable")
        blocks, first = np.unique(block_of[order], return_index=True)
        parts = np.split(index[order], first[1:])
        found = self._together([self._gathered(int(i), part) for i, part in zip(blocks, parts, strict=True)])
        if not np.array_equal(order, np.arange(len(order))):
            found = found[np.argsort(order)]
            found.has_canonical_format = True
        return found

    def _slices(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        for i in range(first, int(np.searchsorted(self._edges, stop))):
            a, b = max(start, self._edges[i]) - self._edges[i], min(stop, self._edges[i + 1]) - self._edges[i]
            if b > a:
                genes, values, indptr = self._block(i)
                entries = slice(int(indptr[a]), int(indptr[b]))
                yield genes[entries], values[entries], np.diff(indptr[a : b + 1])

    def _gathered(self, i: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        genes, values, indptr = self._block(i)
        start = indptr[index - self._edges[i]]
        length = indptr[index - self._edges[i] + 1] - start
        entries = ranges(start, length)
        return genes[entries], values[entries], length

    def _together(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> sparse.csr_matrix:
        parts = [(np.zeros(0, np.uint16), np.zeros(0, np.uint8), np.zeros(0, np.int64)), *parts]
        genes, values, lengths = zip(*parts, strict=True)
        n, n_rows = sum(map(len, genes)), sum(map(len, lengths))
        ends = np.zeros(n_rows + 1, np.int32 if n < 1 << 31 else np.int64)
        np.cumsum(np.concatenate(lengths), out=ends[1:])
        data, indices, at = np.empty(n, np.float32), np.empty(n, ends.dtype), 0
        for g, v in zip(genes, values, strict=True):
            indices[at : at + len(g)], data[at : at + len(v)] = g, v
            at += len(g)
        out = sparse.csr_matrix((data, indices, ends), shape=(n_rows, self.shape[1]), copy=False)
        out.has_canonical_format = True  # as it was when it was copied
        return out
