"""Files of cells and tables, read and written by their suffix; a file is put in place when it is whole."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from virtualcell._hdf5 import check_h5
from virtualcell._reading import as_damaged

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

TABLES = (".csv", ".parquet")
_NOT_WRITTEN = (
    "is not written, and what was there is as it was: {}. Free some space, see who may write into its folder, or name "
    "another one"
)
_LEFT_OVER = 3600  # seconds since a half-written file last grew, after which its writer is taken for dead


def read_cells(path: Path) -> AnnData | MuData:
    """Read an h5ad, h5mu or zarr store."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix in (".h5ad", ".h5mu"):
        check_h5(path)
    with as_damaged(path, f"{path.suffix.removeprefix('.')} file"):
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

        put_in_place(path, lambda part: mudata.write_h5mu(part, data))
    else:
        put_in_place(path, data.write_h5ad)
    logger.info("%s is written.", path)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table without its index, as csv or parquet."""
    write = frame.to_parquet if path.suffix == ".parquet" else frame.to_csv
    put_in_place(path, lambda part: write(part, index=False))
    logger.info("%s is written.", path)


def put_in_place(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside a file and put it in place when it is whole.

    A process that dies leaves the old file or the new one, and two that write at once leave that of one of them.

    Parameters
    ----------
    path
        The file; its folder is made where it is missing.
    write
        Writes a file of the name that it is given.

    Raises
    ------
    OSError
        For a full disk, or a folder that may not be written into; the message says what to do.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # or a computer that crashes has the new name and none of its content
        part.replace(path)
    except OSError as error:
        number = error.errno
        why = str(error).splitlines()[0] if number is None else os.strerror(number)
        said = f"{path} {_NOT_WRITTEN.format(why)}"
        raise (OSError(said) if number is None else OSError(number, said)) from error
    finally:
        with contextlib.suppress(OSError):  # of a folder that could not be made
            part.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left half written; what is younger may still be in the making."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - part.stat().st_mtime > _LEFT_OVER:
                part.unlink()
