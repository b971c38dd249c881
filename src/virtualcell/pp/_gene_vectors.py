"""Read tables of gene vectors."""

from __future__ import annotations

import logging
import math
import re
import zipfile
from collections.abc import Callable, Hashable
from numbers import Integral
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from scipy import sparse

from virtualcell._hdf5 import check_h5
from virtualcell._reading import SAFE_NUMBERS, DamagedFileError, as_damaged, open_text, require_room
from virtualcell._text_tables import are_values, counts_rows, head_of, is_number, is_unnamed, numbers_rows
from virtualcell._unpickle import read_torch
from virtualcell.pp._genes import require_unique

logger = logging.getLogger(__name__)

_DECIMAL_COMMA = re.compile(r"-?\d*,\d+(e-?\d+)?", re.IGNORECASE)


def read_gene_embeddings(path: str | Path) -> pd.DataFrame:
    """Read a table of gene vectors.

    ============  ==================================================================================================
    suffix        layout
    ============  ==================================================================================================
    `.pt`         dictionary {gene: vector}, as Arc's `protein_embeddings.pt`; read without unpickling objects
    `.parquet`    one row per gene; the name in a column `gene`, or else in the index
    `.csv(.gz)`   a header, then one row per gene; the name in a column `gene`, or else in the first one
    `.npz`        arrays `genes` (n, text) and `embeddings` (n x dimensions)
    `.h5ad`       one observation per gene: `obs_names` and `X`
    ============  ==================================================================================================

    Parameters
    ----------
    path
        File to read; the suffix tells the format.

    Returns
    -------
    Genes x dimensions, float32, indexed by gene name. An index that was written along is left out: a column without a
    name, or called `index`, of whole numbers that do not repeat.

    Raises
    ------
    ValueError
        If the suffix is unknown, the layout is another, a gene is named twice, or a value is missing or no number.

    Examples
    --------
    >>> table = pd.DataFrame(np.eye(3), index=["STAT1", "JAK2", "IRF1"])
    >>> table.rename(columns=str).to_parquet("embeddings.parquet")
    >>> vc.pp.read_gene_embeddings("embeddings.parquet").shape
    (3, 3)
    """
    path = Path(path)
    name = path.name.removesuffix(".gz") if path.name.endswith(".csv.gz") else path.name
    reader = _READERS.get(Path(name).suffix)
    if reader is None:
        raise ValueError(f"path={str(path)!r} has an unknown suffix. Known: {', '.join(_READERS)}, .csv.gz.")
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}.")
    frame = _of_features(reader(path), path)
    names = [_name(name, path) for name in frame.index]
    if missing := names.count(""):
        raise ValueError(f"{path.name} has {missing} rows without the name of a gene.")
    with as_damaged(path, "table of gene vectors"):
        frame = frame.astype(np.float32)
    frame.index = pd.Index(names, name="gene")
    frame.columns = frame.columns.astype(str)
    require_unique(frame.index, path.name)
    bad = ~np.isfinite(frame.to_numpy()).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{path.name} holds NaN or infinite values for {int(bad.sum())} genes, among them "
            f"{list(frame.index[bad][:3])}. Drop them: `table.dropna()`, and write the table again."
        )
    frame.attrs = {"source": path.name}
    logger.info("%s: %d genes x %d dimensions.", path.name, *frame.shape)
    return frame


def _of_features(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Leave out an index that was written along, and raise for columns that are no features."""
    columns = list(zip(frame.columns, (column for _, column in frame.items()), strict=True))
    is_index = np.array([numbers_rows(name, column) for name, column in columns], dtype=bool)
    if is_index.any():
        logger.info("%s: the columns %s number its rows, and are left out.", path.name, list(frame.columns[is_index]))
    columns = [one for one, without in zip(columns, is_index, strict=True) if not without]
    if nameless := [column for name, column in columns if is_unnamed(name)]:
        held = f", with values such as {str(nameless[0].iloc[0])[:50]!r}" if len(frame) else ""
        raise ValueError(
            f"{path.name} has {len(nameless)} columns without a name{held}. Commas at the ends of lines make empty "
            "ones. Drop them, or name them if they are features."
        )
    text = [(name, column) for name, column in columns if not _is_real(column)]
    if text:
        name, first = text[0][0], text[0][1].iloc[0] if len(frame) else None
        remedy = "Drop them, or call the one with the names of the genes 'gene'."
        if isinstance(first, str) and _DECIMAL_COMMA.fullmatch(first):
            remedy = "Read them with `pd.read_csv(..., decimal=',')`, and write the table again."
        if isinstance(first, list | np.ndarray):
            remedy = f"Give each value a column: `pd.DataFrame(table[{name!r}].tolist(), index=table.index)`."
        raise ValueError(
            f"{path.name} holds columns that are not numbers: {[name for name, _ in text[:5]]}, with values such as "
            f"{str(first)[:50]!r}. {remedy}"
        )
    frame = frame.loc[:, ~is_index]
    if frame.empty:
        raise ValueError(f"{path.name} holds no gene vectors (shape {frame.shape}).")
    return frame


def _is_real(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_complex_dtype(column)


def _name(name: Hashable, path: Path) -> str:
    """Return the name of a gene without spaces around it, nothing for one that is missing."""
    if isinstance(name, bytes):
        with as_damaged(path, "table of gene vectors"):
            name = name.decode()
    if isinstance(name, str | Integral) and not isinstance(name, bool):
        return str(name).strip()
    if not isinstance(name, tuple) and pd.isna(name):
        return ""
    parts = ", of several parts" if isinstance(name, tuple) else ""
    raise ValueError(f"{path.name} names a gene {name!r}{parts}. Give each row one name, which is text.")


def _read_pt(path: Path) -> pd.DataFrame:
    table = read_torch(path)
    if not isinstance(table, dict):
        raise ValueError(f"{path.name} holds {type(table).__name__}, and must hold a dictionary {{gene: vector}}.")
    for name, vector in table.items():
        if not isinstance(vector, torch.Tensor) or vector.ndim != 1 or vector.is_complex():
            raise ValueError(
                f"{path.name} must hold a dictionary {{gene: vector}} of one-dimensional tensors of real numbers, and "
                f"{name!r} is {_described(vector)}. Write it anew: `torch.save({{gene: torch.as_tensor(vector) for "
                "gene, vector in zip(genes, vectors)}, path)`."
            )
    lengths = {len(v) for v in table.values()}
    if len(lengths) > 1:
        raise ValueError(f"{path.name} holds vectors of different lengths: {sorted(lengths)[:5]}.")
    require_room(path, 4 * sum(len(v) for v in table.values()))
    with as_damaged(path, "table of gene vectors"):
        # those of a network that was trained carry gradients
        vectors = torch.stack(list(table.values())).detach().float().numpy() if table else np.empty((0, 0))
    return pd.DataFrame(vectors, index=pd.Index(table, tupleize_cols=False))


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return "an array" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}{' of complex numbers' if value.is_complex() else ''}"


def _read_parquet(path: Path) -> pd.DataFrame:
    with as_damaged(path, "parquet file"):
        described = pq.read_metadata(path)
        require_room(path, 4 * described.num_rows * described.num_columns)
        frame = pd.read_parquet(path)
    if isinstance(frame.columns, pd.MultiIndex):
        raise ValueError(
            f"{path.name} has columns with names of several parts, as {frame.columns[0]!r}. Give each one name: "
            "`table.columns = range(table.shape[1])`, and write the table again."
        )
    if "gene" in frame:
        return frame.set_index("gene")
    if pd.api.types.is_numeric_dtype(frame.index):
        raise ValueError(
            f"{path.name} has no column 'gene', and its index holds no names. Call the column with the names of the "
            "genes 'gene'."
        )
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    what = "table of gene vectors"
    header = list(head_of(path, ",", what).columns)
    gene = "gene" if "gene" in header else header[0]
    if gene != "gene" and not is_unnamed(gene) and are_values(header):
        raise ValueError(
            f"{path.name} has no header: it begins with {header[:3]}. Name its columns in a first line, that of the "
            "genes 'gene'."
        )
    with as_damaged(path, what), open_text(path) as file:
        # a converter keeps a gene called NA from being read as a missing value
        frame = pd.read_csv(file, converters={gene: str}, **SAFE_NUMBERS)
    if counts_rows(gene, frame[gene]):
        raise ValueError(
            f"{path.name} has no column 'gene', and its first one only counts the rows. Call the column with the names "
            "of the genes 'gene'."
        )
    if gene != "gene" and frame[gene].map(is_number).all() and not frame[gene].str.isdigit().all():
        raise ValueError(
            f"{path.name} holds numbers such as {frame[gene].iloc[0]!r} in its column {gene!r}, where the names of the "
            "genes should be. Write them into a column 'gene'."
        )
    return frame.set_index(gene)


def _read_npz(path: Path) -> pd.DataFrame:
    with as_damaged(path, "npz file"):
        with zipfile.ZipFile(path) as entries:
            require_room(path, sum(entry.file_size for entry in entries.infolist()))
            names = [name.removesuffix(".npy") for name in entries.namelist()]
            if not {"genes", "embeddings"} <= set(names):
                raise DamagedFileError(f"{path.name} must hold arrays 'genes' and 'embeddings', but holds {names}.")
            shapes = [_shape_of(path, entries, name) for name in ("genes", "embeddings")]
            if [len(shape) for shape in shapes] != [1, 2] or shapes[0][0] != shapes[1][0]:
                raise DamagedFileError(
                    f"{path.name} must hold arrays 'genes' (n) and 'embeddings' (n x dimensions), and their shapes are "
                    f"{shapes[0]} and {shapes[1]}."
                )
        with np.load(path, allow_pickle=False) as arrays:
            return pd.DataFrame(arrays["embeddings"], index=pd.Index(arrays["genes"]))


def _shape_of(path: Path, entries: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Return the shape of an array, by its header, or raise where it is too large or of objects."""
    with entries.open(f"{name}.npy") as entry:
        version = np.lib.format.read_magic(entry)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(entry)
    if dtype.hasobject:
        kind = "str" if name == "genes" else "np.float32"
        raise DamagedFileError(
            f"{path.name} holds {name!r} as Python objects, which are not read, since unpickling them could run code. "
            f"Write it anew with `{name}={name}.astype({kind})`."
        )
    require_room(path, math.prod(shape) * dtype.itemsize)
    return shape


def _read_h5ad(path: Path) -> pd.DataFrame:
    with as_damaged(path, "h5ad file"):
        check_h5(path)
        table = anndata.read_h5ad(path)
        require_room(path, 4 * table.n_obs * table.n_vars)
    if table.X is None or not table.n_vars:
        raise ValueError(
            f"{path.name} has no values in X, where the vectors of its observations would be.{_elsewhere(path, table)}"
        )
    with as_damaged(path, "h5ad file"):
        vectors = table.X.toarray() if sparse.issparse(table.X) else np.asarray(table.X)
        return pd.DataFrame(vectors, index=table.obs_names, columns=table.var_names)


def _elsewhere(path: Path, table: anndata.AnnData) -> str:
    """Say which other matrices a file has, and how one of them becomes a table."""
    for where, rows in (("obsm", "obs_names"), ("varm", "var_names")):
        if keys := list(getattr(table, where)):
            return (
                f" {where} holds {keys}: give a table in place of the file, with `adata = "
                f"anndata.read_h5ad({str(path)!r})`: `pd.DataFrame(adata.{where}[{keys[0]!r}], index=adata.{rows})`."
            )
    return " Nor has it any in obsm or varm."


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".pt": _read_pt,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".npz": _read_npz,
    ".h5ad": _read_h5ad,
}
