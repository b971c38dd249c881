"""Several files as one data set, of which the matrices stay where they are."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from virtualcell._reading import DamagedFileError, as_damaged
from virtualcell.data._dask import OF_FILES, dask_array
from virtualcell.data._lazy import lazy_matrix
from virtualcell.data._on_disk import LazyMatrix, place_of
from virtualcell.data._stored import canonical_rows

logger = logging.getLogger(__name__)

_CHUNK = 4096  # cells at most


def read_lazy(paths: str | os.PathLike | Sequence[str | os.PathLike], *, label: str | None = None) -> AnnData:
    """Open h5ad and zarr files as one data set that is larger than memory: matrices are read when they are needed.

    `X` and the layers that all files have become dask arrays (`pip install "virtualcell[dask]"`), one file below the
    other, of float32 in compressed rows. Every call of this package takes the result, and results can be written to
    it. `obs` and `var` are read. `obsm`, `uns` and other parts of the files are left out.

    Genes are matched by their `var_names`, which may stand in another order in each file; those that a file lacks are
    left out, and so are columns of `obs`. Both are said in a warning. `var` and the order of genes are those of the
    first file.

    Parameters
    ----------
    paths
        One file, or several: `.h5ad`, or folders of zarr.
    label
        Column of `obs` to write the name of each cell's file to, without its suffix; as a batch, for instance.

    Returns
    -------
    The cells of all files, one file after another. Where two files have cells of the same name, the names of all cells
    end with that of their file, `"AAACATTG-1-plate2"`.

    Raises
    ------
    FileNotFoundError
        For a file that is not there.
    ImportError
        Without dask.
    ValueError
        For a file that is damaged or no AnnData, repeats names of cells or genes, or shares no genes with the first.

    Examples
    --------
    >>> adata[:150].write_h5ad("plate1.h5ad")
    >>> adata[150:, ::-1].write_h5ad("plate2.h5ad")  # with its genes in another order
    >>> both = vc.pp.read_lazy(["plate1.h5ad", "plate2.h5ad"], label="plate")
    >>> both.shape == adata.shape, both.obs["plate"].unique().tolist()
    (True, ['plate1', 'plate2'])
    """
    dask_array("vc.pp.read_lazy")
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths) if isinstance(paths, Iterable) else [paths]
    if not given:
        raise ValueError("paths=[] names no file.")
    if wrong := [one for one in given if not isinstance(one, str | os.PathLike)]:
        raise TypeError(f"paths= takes the path of a file, or a list of these, and not {type(wrong[0]).__name__}.")
    files = [_File.of(Path(path)) for path in given]
    genes = _shared_genes(files)
    obs = _joined_obs(files)
    if label is not None:
        stems = [file.path.stem for file in files]
        obs[label] = pd.Categorical(np.repeat(stems, [len(file.obs) for file in files]))
    places = {None: "X"} | {name: f"layers/{name}" for name in files[0].layers}
    matrices = {
        name: _stacked(files, place, genes)
        for name, place in places.items()
        if all(file.has_x if name is None else name in file.layers for file in files)
    }
    if not matrices:
        what = {file.path.name: ["X"] * file.has_x + file.layers for file in files}
        raise ValueError(f"the files have no matrix in common, X or a layer of the same name: they hold {what}.")
    return AnnData(matrices.pop(None, None), obs=obs, var=files[0].var.loc[genes], layers=matrices)


class _File(NamedTuple):
    path: Path
    obs: pd.DataFrame
    var: pd.DataFrame
    has_x: bool
    layers: list[str]

    @classmethod
    def of(cls, path: Path) -> _File:
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}.")
        with _as_damaged(path), _opened(path) as group:
            _check_kind(group, path)
            obs, var = read_elem(group["obs"]), read_elem(group["var"])
            file = cls(path, obs, var, "X" in group, sorted(group["layers"]) if "layers" in group else [])
        for what, names in (("obs_names", obs.index), ("var_names", var.index)):
            if not names.is_unique:
                twice = list(names[names.duplicated()][:3])
                raise ValueError(f"{what} of {path} repeats {twice}. Read it, run `{what}_make_unique()`, write it.")
        return file


def _as_damaged(path: Path) -> AbstractContextManager[None]:
    """Name the file in what h5py, zarr and anndata raise. It is not read first, as other files are: it may be huge."""
    return as_damaged(path, "zarr store of AnnData" if path.is_dir() else "h5ad file", "Is it whole?")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.is_dir():
        import zarr

        if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            raise DamagedFileError(
                f"{path} is a folder, and no zarr store: it has neither zarr.json nor .zgroup. Name the files in it, "
                "or the folder that `write_zarr` wrote."
            )
        yield zarr.open_group(path, mode="r")
    else:
        try:
            opened = h5py.File(path, "r")
        except BlockingIOError as error:
            said = f"{path} is open for writing in another process, or is still being written. Close it there first."
            raise BlockingIOError(error.errno, said) from error
        with opened as file:
            yield file


def _check_kind(group: Any, path: Path) -> None:
    """Raise for what is no AnnData, and say how the formats that are known become one."""
    keys, name = set(group), str(path)
    if {"obs", "var"} <= keys and "mod" not in keys:
        return
    if "mod" in keys:
        modalities = sorted(group["mod"])
        one = "rna" if "rna" in modalities else [*modalities, "rna"][0]
        how = f"mudata.read_h5ad({name!r}, mod={one!r}).write_h5ad({f'{one}.h5ad'!r})"
        remedy = f"`vc.pp.read_lazy({f'{name}/mod/{one}'!r})` opens" if path.is_dir() else f"`{how}` writes"
        raise DamagedFileError(f"{path} is MuData, with the modalities {modalities}. {remedy} one of them.")
    if "matrix" in keys or any("barcodes" in group[key] for key in keys if hasattr(group[key], "keys")):
        kind, read = "10x Genomics", f"scanpy.read_10x_h5({name!r})"
        if "col_attrs" in keys:
            kind, read = "loom", f"anndata.io.read_loom({name!r})"
        raise DamagedFileError(
            f"{path} is a file of {kind}, and not of AnnData. Write it as one: "
            f"`{read}.write_h5ad({path.with_suffix('.h5ad').name!r})`."
        )
    raise DamagedFileError(
        f"{path} is no AnnData: it holds {sorted(keys)[:5]}, and neither of obs and var may lack. Give files that "
        "`write_h5ad` or `write_zarr` wrote."
    )


def _shared_genes(files: list[_File]) -> pd.Index:
    """Genes that all files have, in the order of the first one."""
    genes = files[0].var.index
    for file in files[1:]:
        genes = genes[genes.isin(file.var.index)]
    if not len(genes):
        raise ValueError(
            f"the {len(files)} files have no gene in common: they are matched by var_names, such as "
            f"{list(files[0].var.index[:2])} in {files[0].path.name} and {list(files[-1].var.index[:2])} in "
            f"{files[-1].path.name}. Put names of the same kind there."
        )
    every = files[0].var.index.append([file.var.index for file in files[1:]]).unique()
    if len(every) > len(genes):
        lacks = "; ".join(f"{file.path.name} lacks {len(every) - len(file.var)}" for file in files)
        logger.warning(
            "%d of %d genes are in all files, and the others are left out, among them %s: %s.",
            *(len(genes), len(every), list(every[~every.isin(genes)][:3]), lacks),
        )
    return genes


def _joined_obs(files: list[_File]) -> pd.DataFrame:
    """Columns of `obs` that all files have, with names that are unique."""
    names = pd.Index(np.concatenate([file.obs.index.to_numpy(dtype=object) for file in files]))
    tables = [file.obs for file in files]
    if not names.is_unique:
        stems = [file.path.stem for file in files]
        ends = stems if len(set(stems)) == len(stems) else [str(i) for i in range(1, len(files) + 1)]
        tables = [t.set_axis([f"{name}-{end}" for name in t.index]) for t, end in zip(tables, ends, strict=True)]
        logger.warning(
            "Files have cells of the same name, such as %r: names end with that of the file, such as %r.",
            *(names[names.duplicated()][0], tables[0].index[0]),
        )
    columns = list(dict.fromkeys(column for table in tables for column in table))
    if missing := [column for column in columns if not all(column in table for table in tables)]:
        where = {column: [f.path.name for f in files if column not in f.obs][:3] for column in missing[:5]}
        logger.warning("Columns of obs that a file lacks are left out, %s.", where)
    return ad.concat([AnnData(obs=table) for table in tables], join="inner").obs


# -- the matrix -------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """The matrix of one file: where it is, the first of its rows in the whole, and its columns in the wanted order."""

    path: Path
    place: str
    first: int
    columns: np.ndarray | None


def _matrix(group: Any, place: str) -> LazyMatrix:
    element = group[place]
    return lazy_matrix(sparse_dataset(element) if hasattr(element, "keys") else element, place)


def _edges(group: Any, place: str, file: _File) -> np.ndarray:
    """First rows of the blocks that a matrix is read in, and the number of rows."""
    matrix, expected = _matrix(group, place), (len(file.obs), len(file.var))
    if tuple(matrix.shape) != expected:
        raise DamagedFileError(
            f"{file.path} is damaged: {place} has the shape {tuple(matrix.shape)}, and obs and var say {expected}. "
            "Write it anew."
        )
    return np.unique([*range(0, len(file.obs), _CHUNK), *matrix.edges])


def _stacked(files: list[_File], place: str, genes: pd.Index) -> Any:
    """Matrices of all files as one dask array, whose name changes with any of them."""
    pieces, chunks, known, first = [], [], [], 0
    for file in files:
        where = file.var.index.get_indexer(genes)
        columns = None if np.array_equal(where, np.arange(len(file.var))) else where
        pieces.append(_Piece(file.path.resolve(), place, first, columns))
        with _as_damaged(file.path), _opened(file.path) as group:
            chunks += np.diff(_edges(group, place, file)).tolist()
            known.append((place_of(group[place]), where.tobytes()))
        first += len(file.obs)
    name = OF_FILES + hashlib.sha256(repr(known).encode()).hexdigest()

    def block(block_info: dict | None = None) -> sparse.csr_matrix:
        start, stop = block_info[None]["array-location"][0]
        piece = [piece for piece in pieces if piece.first <= start][-1]
        with _opened(piece.path) as group:
            found = _matrix(group, place).rows(slice(start - piece.first, stop - piece.first))
        return found if piece.columns is None else canonical_rows(found[:, piece.columns])

    meta = sparse.csr_matrix((0, 0), dtype=np.float32)
    da = dask_array("vc.pp.read_lazy")
    return da.map_blocks(block, chunks=(tuple(chunks), (len(genes),)), dtype=np.float32, meta=meta, name=name)
