"""Files from the internet, fetched once into the cache folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pooch
from anndata import AnnData
from mudata import MuData
from pooch.utils import unique_file_name
from requests.exceptions import RequestException

from virtualcell._files import read_cells
from virtualcell._interrupted import told_when_interrupted
from virtualcell._settings import settings

_SUFFIXES = (".h5ad", ".h5mu")


def fetch(url: str, *, known_hash: str | None, folder: str | Path | None = None) -> AnnData | MuData:
    """Download an `.h5ad` or `.h5mu` file once, check it, and read it.

    Parameters
    ----------
    url
        Address of the file.
    known_hash
        Checksum such as "sha256:..."; a file that differs is refused. None accepts any file, and pooch logs the
        checksum that it found.
    folder
        Where to keep the file; `vc.settings.cache_dir` by default.

    Raises
    ------
    ValueError
        The address ends in neither suffix, or the file differs from `known_hash`.
    ConnectionError
        The file cannot be downloaded. The message says where to put it by hand.

    Examples
    --------
    >>> adata = vc.datasets.fetch("https://example.org/screen.h5ad", known_hash="sha256:...")  # doctest: +SKIP
    """
    name = PurePosixPath(urlsplit(url).path).name
    suffix = PurePosixPath(name).suffix
    if suffix not in _SUFFIXES:
        raise ValueError(f"url={url!r} must end in {' or '.join(_SUFFIXES)}; {name!r} does not.")
    return read_cells(retrieve(url, name=unique_file_name(url), known_hash=known_hash, folder=folder))


@told_when_interrupted("The download was interrupted: the same call fetches the file again.")
def retrieve(url: str, *, name: str, known_hash: str | None, folder: str | Path | None = None) -> Path:
    """Return the path of a file under `name` in `folder`, downloaded unless one with that checksum is there."""
    folder = settings.cache_dir if folder is None else Path(folder)
    there = (folder / name).exists()
    try:
        return Path(pooch.retrieve(url, known_hash=known_hash, fname=name, path=folder, progressbar=settings.progress))
    except RequestException as error:
        reason = type(error).__name__ if error.response is None else f"HTTP status {error.response.status_code}"
        other = " The file of that name that is there now has another checksum." if there else ""
        raise ConnectionError(
            f"{url} could not be downloaded ({reason}).{other} To go on without internet here, download "
            f"that address elsewhere and save it as {name!r} in the folder {str(folder)!r}; then repeat the call."
        ) from error


def retrieve_unpinned(url: str, *, name: str, folder: str | Path | None = None) -> Path:
    """Return the path of a file whose checksum is not known beforehand: that of the first download is kept beside it.

    A file that was damaged since is downloaded again; one that the server has replaced is refused.
    """
    folder = settings.cache_dir if folder is None else Path(folder)
    note = folder / f"{name}.sha256"
    if not note.exists():
        level = pooch.get_logger().level
        pooch.get_logger().setLevel("WARNING")  # it would explain how to pin the file, which is what follows
        try:
            path = retrieve(url, name=name, known_hash=None, folder=folder)
        finally:
            pooch.get_logger().setLevel(level)
        note.write_text(pooch.file_hash(path))
        return path
    try:
        return retrieve(url, name=name, known_hash=f"sha256:{note.read_text().strip()}", folder=folder)
    except ValueError as error:
        raise ValueError(
            f"{url} is no longer the file that was downloaded first, by the checksum in {str(note)!r}. Delete that "
            "note to take the new file; results may change."
        ) from error
