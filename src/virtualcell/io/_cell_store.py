"""Results that are written to disk portion by portion, so that they need not fit into memory nor be made in one go."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from numcodecs import Blosc
from scipy import sparse

from virtualcell._files import put_in_place
from virtualcell._state import digest_of
from virtualcell.io._save import Saved

logger = logging.getLogger(__name__)

SUFFIXES = (".h5ad", ".zarr")

_CHUNK = 1 << 19  # entries
_AT_ONCE = 1 << 22  # entries that are copied at a time
_CODEC = Blosc(cname="lz4", clevel=1, shuffle=Blosc.BITSHUFFLE)
_PROGRESS = "progress.json"
_ARRAYS = {"data": np.float32, "indices": np.int32, "indptr": np.int64}


class CellStore:
    """Matrices and a table of cells, and arrays of whatever else a portion holds, in a folder beside the result.

    A portion counts as soon as it is written to the end. A process that dies leaves the portions before, and the next
    one that is made for the same goes on behind them.

    Parameters
    ----------
    path
        The result, an h5ad file or a zarr store, which is put in place when it is whole.
    made_for
        What decides about its content, as text: portions of something else are not taken.
    matrices
        Where sparse matrices of all cells are in the result: "X", "layers/counts".
    n_genes
        Number of their columns.
    dense
        Where dense matrices of all cells are, "obsm/X_state", and the number of their columns.
    same_places
        Whether the sparse matrices have their entries at the same places, as counts and their logarithms do: these are
        packed once, and copied in the end.

    Raises
    ------
    ValueError
        For another suffix, or where the folder holds portions of something else.
    FileExistsError
        If the result is there already.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        made_for: str,
        matrices: Sequence[str] = (),
        n_genes: int = 0,
        dense: Mapping[str, int] | None = None,
        same_places: bool = False,
    ) -> None:
        self.path, self.matrices, self.n_genes = checked_path(path), list(matrices), n_genes
        self.dense = list(dense or {})
        self._with_places = self.matrices[:1] if same_places else self.matrices
        self.folder = self.path.with_name(f"{self.path.name}.part")
        self._progress: dict[str, Any] = {
            "made_for": made_for,
            "portions": 0,
            "cells": 0,
            "entries": dict.fromkeys(matrices, 0),
        }
        if (self.folder / _PROGRESS).exists():
            self._go_on(made_for)
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # of a process that died before it had begun
        self._root = zarr.open_group(self.folder, mode="w", zarr_format=2)  # which every anndata reads and writes
        for name in self.matrices:
            group = self._root.require_group(name)
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            for part in self._parts_of(name):
                group.create_array(part, shape=(0,), dtype=_ARRAYS[part], chunks=(_CHUNK,), compressors=_CODEC)
            if "indptr" in group:
                group["indptr"].append(np.zeros(1, np.int64))
        for name, width in (dense or {}).items():
            chunks = (max(_CHUNK // max(width, 1), 1), width)
            array = self._root.create_array(name, shape=(0, width), dtype=np.float32, chunks=chunks, compressors=_CODEC)
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        self._note()

    def _parts_of(self, name: str) -> list[str]:
        """Return which arrays of a sparse matrix are written for itself."""
        return list(_ARRAYS) if name in self._with_places else ["data"]

    def _go_on(self, made_for: str) -> None:
        progress = json.loads((self.folder / _PROGRESS).read_text())
        if progress["made_for"] != made_for:
            raise ValueError(
                f"{self.folder} holds the begin of another result, of other cells, another model or other options. "
                "Delete that folder, or name another file."
            )
        self._progress = progress
        self._root = zarr.open_group(self.folder, mode="r+")
        for name in self.matrices:  # without what a portion left that was not written to the end
            for part in self._parts_of(name):
                size = progress["cells"] + 1 if part == "indptr" else progress["entries"][name]
                self._root[name][part].resize((size,))
        for name in self.dense:
            self._root[name].resize((progress["cells"], self._root[name].shape[1]))
        if progress["portions"]:
            logger.info("%s goes on behind %d cells that are there.", self.path.name, progress["cells"])

    @property
    def n_portions(self) -> int:
        """How many portions are there."""
        return self._progress["portions"]

    @property
    def n_cells(self) -> int:
        """How many cells are there."""
        return self._progress["cells"]

    def add(
        self,
        matrices: Mapping[str, sparse.csr_matrix | np.ndarray],
        table: pd.DataFrame,
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        """Write a portion: matrices, (n_cells, n_columns), a table of its cells, other arrays."""
        entries = dict(self._progress["entries"])
        for name in self.matrices:
            matrix, group, first = matrices[name], self._root[name], matrices[self._with_places[0]]
            group["data"].append(matrix.data.astype(np.float32, copy=False))
            if name in self._with_places:
                group["indices"].append(matrix.indices.astype(np.int32, copy=False))
                group["indptr"].append(matrix.indptr[1:].astype(np.int64) + entries[name])
            elif not (np.array_equal(matrix.indptr, first.indptr) and np.array_equal(matrix.indices, first.indices)):
                raise ValueError(f"{name} has entries at other places than {self._with_places[0]}.")
            entries[name] += matrix.nnz
        for name in self.dense:
            self._root[name].append(matrices[name])
        number = self.n_portions
        table.to_parquet(self.folder / f"{number}.parquet")
        np.savez(self.folder / f"{number}.npz", **arrays)
        self._progress |= {"portions": number + 1, "cells": self.n_cells + len(table), "entries": entries}
        self._note()

    def _note(self) -> None:
        put_in_place(self.folder / _PROGRESS, lambda part: part.write_text(json.dumps(self._progress)))

    def table(self) -> pd.DataFrame:
        """Return the table of all cells."""
        return pd.concat([pd.read_parquet(self.folder / f"{i}.parquet") for i in range(self.n_portions)])

    def arrays(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the other arrays of each portion."""
        for i in range(self.n_portions):
            with np.load(self.folder / f"{i}.npz", allow_pickle=False) as arrays:
                yield dict(arrays)

    def finish(self, rest: AnnData) -> None:
        """Put the result in place: the matrices, and what `rest`, which has none, holds beside them."""
        shape = [self.n_cells, self.n_genes]
        for name in self.matrices:
            self._root[name].attrs["shape"] = shape
        if self.path.suffix == ".h5ad":
            put_in_place(self.path, lambda part: self._write_h5ad(part, rest))
            (self.folder / _PROGRESS).unlink()  # first: a folder that has it, and lacks pieces, would be gone on with
            shutil.rmtree(self.folder)
            return
        for name, part in self._places_to_copy():
            to = self.folder / name / part
            shutil.rmtree(to, ignore_errors=True)  # of a process that died here
            shutil.copytree(self.folder / self._with_places[0] / part, to)
        _write_rest(self._root, rest)
        self.folder.replace(self.path)  # before anything is removed that going on would need
        for i in range(self.n_portions):
            (self.path / f"{i}.parquet").unlink(missing_ok=True)
            (self.path / f"{i}.npz").unlink(missing_ok=True)
        (self.path / _PROGRESS).unlink()

    def _places_to_copy(self) -> list[tuple[str, str]]:
        return [(name, part) for name in self.matrices for part in _ARRAYS if part not in self._parts_of(name)]

    def _write_h5ad(self, path: Path, rest: AnnData) -> None:
        with h5py.File(path, "w") as file:
            for name in self.matrices:
                group, attrs = file.require_group(name), dict(self._root[name].attrs)
                group.attrs.update({**attrs, "shape": np.array(attrs["shape"])})
                for part in self._parts_of(name):
                    _copy(self._root[name][part], group, part)
            for name, part in self._places_to_copy():
                _copy(self._root[self._with_places[0]][part], file[name], part)
            for name in self.dense:
                _copy(self._root[name], file, name)
            _write_rest(file, rest)


def made_for(model: Saved, how: Mapping[str, object], arrays: Iterable[np.ndarray] = ()) -> str:
    """Return what decides about a result, as text: a model, what JSON can hold, and arrays."""
    found = blake2b(json.dumps(how, default=str).encode(), digest_size=16)
    found.update(digest_of(model.state()).encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def checked_path(path: str | os.PathLike) -> Path:
    """Return where a result is to be written, or raise where it cannot be."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"to={str(path)!r} must end in {' or '.join(SUFFIXES)}, which say how it is written.")
    if path.exists():
        raise FileExistsError(f"to={str(path)!r} is there already. Delete it, or name another file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"to={str(path)!r}: there is no folder {str(path.parent)!r}. Make it first.")
    return path


def opened(path: Path) -> AnnData:
    """Open cells whose matrices stay on disk, and are read by rows as they are asked for."""
    file: Any = h5py.File(path, "r") if path.suffix == ".h5ad" else zarr.open_group(path, mode="r")
    held = {name: ad.io.read_elem(file[name]) for name in ("obs", "var", "obsm", "varm", "uns")}
    out = AnnData(obs=held["obs"], var=held["var"], obsm=held["obsm"], varm=held["varm"], uns=held["uns"])
    if "X" in file:
        out.X = ad.io.sparse_dataset(file["X"])
    for name in file.get("layers", ()):
        out.layers[name] = ad.io.sparse_dataset(file["layers"][name])
    return out


def _write_rest(root: Any, rest: AnnData) -> None:
    """Write what is small."""
    for name in ("obs", "var"):
        ad.io.write_elem(root, name, getattr(rest, name))
    for name in ("obsm", "varm", "uns"):
        if name not in root:
            ad.io.write_elem(root, name, dict(getattr(rest, name)))
    for name in ("layers", "obsm"):
        if name in root:
            root[name].attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def _copy(array: Any, group: Any, name: str) -> None:
    """Copy an array into another file, some rows of it at a time."""
    copied = group.create_dataset(name, shape=array.shape, dtype=array.dtype)
    copied.attrs.update(array.attrs)
    rows = max(_AT_ONCE // max(int(np.prod(array.shape[1:])), 1), 1)
    for start in range(0, array.shape[0], rows):
        copied[start : start + rows] = array[start : start + rows]
