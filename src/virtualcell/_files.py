"""Files of cells and tables, read and written by their suffix; a file is put in place when it is whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

TABLES = (".csv", ".parquet")


def read_cells(path: Path) -> AnnData | MuData:
    """Read an h5ad, h5mu or zarr store."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix == ".h5mu":
        import mudata

        return mudata.read_h5mu(path)
    import anndata

    if path.suffix == ".h5ad":
        return anndata.read_h5ad(path)
    if path.suffix == ".zarr":
        return anndata.read_zarr(path)
    raise ValueError(f"{path} must end in .h5ad, .h5mu or .zarr, which say how it is read.")


def require_free(path: Path, *, overwrite: bool, suffixes: Sequence[str] = ()) -> None:
    """Raise, before anything is computed, for output that could not be written in the end."""
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"--output {path} must end in {' or '.join(suffixes)}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already. Name another file, or pass --overwrite to replace it.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise PermissionError(f"{path} cannot be written: {there} is no folder that this user may write into.")


def suffix_like(data: Path) -> tuple[str]:
    """Return the suffix that cells are written under which were read from `data`."""
    return (".h5mu",) if data.suffix == ".h5mu" else (".h5ad",)


def write_cells(data: AnnData | MuData, path: Path) -> None:
    """Write cells as h5ad, or as h5mu where that is the suffix."""
    if path.suffix == ".h5mu":
        import mudata

        _put(path, lambda part: mudata.write_h5mu(part, data))
    else:
        _put(path, data.write_h5ad)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table without its index, as csv or parquet."""
    write = frame.to_parquet if path.suffix == ".parquet" else frame.to_csv
    _put(path, lambda part: write(part, index=False))


def _put(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the file and put it in place, so that a job that is killed leaves what was there."""
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    logger.info("%s is written.", path)
