"""Entries of the cache folder: kept from removal while they are used, and removed when they are too many."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import filelock

from virtualcell._settings import settings

try:
    import fcntl
except ImportError:  # of Windows, where nothing is removed
    fcntl = None

logger = logging.getLogger(__name__)

_LOCK, _MAKING = "in_use.lock", "in_the_making.lock"
# beginnings of names of entries that are of no use after the process that made them
_OF_PROCESS = _SESSION, _SCRATCH, _REMOVED = "session-", "scratch-", "removed-"


def home() -> Path:
    """Return the folder whose folders are the entries: whatever is made of data and quicker to read than to make."""
    return settings.cache_dir / "rows"


class Hold:
    """Keeps an entry, which need not be there yet, from being removed by any process for as long as this object lives.

    Parameters
    ----------
    folder
        The entry. Its index, the JSON file in it, tells by its time when the entry was used for the last time: now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = _locked(folder, exclusive=False)
        for index in folder.glob("*.json"):
            with contextlib.suppress(OSError):  # of a cache that another user keeps
                os.utime(index)

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:  # Python warns of a file that nobody closes
            self._lock.close()


@contextmanager
def made_alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes an entry, and keep others waiting while this one does."""
    with filelock.FileLock(folder / _MAKING):
        yield


def make_once(folder: Path, *, is_whole: Callable[[], bool], make: Callable[[], object]) -> None:
    """Make an entry unless it is whole, or another process makes it meanwhile, for which this one waits.

    One that is whole may be another user's, and only to be read: nothing is locked then.
    """
    if is_whole():
        return
    with made_alone(folder):
        if not is_whole():
            make()


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Say what helps where a file cannot be written; numpy says of a full disk how many numbers it holds."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} is not written: {error}. Free some space, or name a folder on a larger disk: `vc.settings."
            "cache_dir = path` for the cache, of which `vc.settings.max_cache = GB` has less kept. What is whole is "
            "kept, and the next call goes on from there."
        ) from error


def is_of_process(folder: Path) -> bool:
    """Tell whether an entry is of no use after the process that made it."""
    return folder.name.startswith(_OF_PROCESS)


class Scratch(tempfile.TemporaryDirectory):
    """An entry that is removed with the object, or by the next process that makes room where this one was killed."""

    def __init__(self, prefix: str = _SCRATCH) -> None:
        home().mkdir(parents=True, exist_ok=True)
        super().__init__(prefix=prefix, dir=home(), ignore_cleanup_errors=True)
        self._hold = Hold(Path(self.name))

    @classmethod
    def of_session(cls) -> Scratch:
        """Return an entry for what nothing tells apart after this process."""
        return cls(_SESSION)


def make_room(needed: int = 0) -> None:
    """Remove entries that nobody uses, the least recently used ones first, until so many bytes more are within bounds.

    What processes left behind that were killed goes in any case. The bound is `vc.settings.max_cache`.
    """
    if not home().is_dir():
        return
    entries = sorted((path for path in home().iterdir() if path.is_dir()), key=_last_used)
    for entry in [entry for entry in entries if entry.name.startswith(_OF_PROCESS)]:
        if _remove(entry):
            entries.remove(entry)
    if settings.max_cache is None:
        return
    sizes = {entry: _size(entry) for entry in entries}
    total, most = sum(sizes.values()) + needed, settings.max_cache * 1e9
    for entry in entries:
        if total <= most:
            return
        used = _last_used(entry)
        if _remove(entry):
            total -= sizes[entry]
            logger.info(
                "%s, %.3g GB of the cache, is removed: vc.settings.max_cache=%g GB, and it was used last on %s.",
                *(entry, sizes[entry] / 1e9, settings.max_cache, time.strftime("%Y-%m-%d", time.localtime(used))),
            )
    if total > most:
        logger.warning(
            "The cache in %s takes up to %.3g GB, more than vc.settings.max_cache=%g: what is left of it is in use.",
            *(home(), total / 1e9, settings.max_cache),
        )


def _locked(folder: Path, *, exclusive: bool) -> IO[str] | None:
    """Return the open lock of an entry.

    `None` where somebody uses it, for an exclusive one, and where the disk has no locks: nobody can remove it then.
    """
    path = folder / _LOCK
    while True:
        if not exclusive:
            folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        try:
            file = path.open("a")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except OSError:
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # of an entry that was removed while this process waited


def _remove(entry: Path) -> bool:
    """Remove an entry unless somebody uses it; tell whether it is removed."""
    lock = _locked(entry, exclusive=True)
    if lock is None:
        return False
    with lock:
        gone = entry.with_name(f"{_REMOVED}{secrets.token_hex(4)}")
        entry.replace(gone)  # at once: nobody finds half of it
        shutil.rmtree(gone, ignore_errors=True)
    return True


def _last_used(entry: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        return max((path.stat().st_mtime for path in entry.glob("*.json")), default=entry.stat().st_mtime)
    return 0.0


def _size(entry: Path) -> int:
    total = 0
    for folder, _, files in os.walk(entry):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total
