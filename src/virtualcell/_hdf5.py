"""HDF5 files that others made: read once in a process of its own, which may die of it, before we read them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from virtualcell._reading import DamagedFileError

_SECONDS = 5  # of the processor for any file, and one more for each megabyte
_SLOWER = 20  # how much longer it may wait for a disk, or for other work on the machine
_NOT_READ = "It was not read."


def check_h5(path: Path) -> None:
    """Raise for an HDF5 file that its library does not come through, or that holds more than is stored in it.

    For a file whose parts do not hang together that library may reserve gigabytes, stay in a loop, or end the process.
    Another process therefore reads it first, to its end, in a limited time and with memory for twice the file and its
    largest piece (on Linux; other systems do not limit memory). This takes 0.2 s, and as long as reading the file.

    Raises
    ------
    DamagedFileError
        For such a file, and for one whose arrays lie in other files.
    """
    room = path.stat().st_size
    seconds = _SECONDS + room // 1_000_000
    command = [
        sys.executable,
        "-P",
        str(Path(__file__).with_name("_hdf5_trial.py")),
        str(path.absolute()),
        str(seconds),
    ]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_SLOWER * seconds
        )
    except subprocess.TimeoutExpired as error:
        raise DamagedFileError(_told(path, f"reading it takes more than {_SLOWER * seconds} s")) from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        why = f"reading it takes more than {seconds} s" if name == "SIGXCPU" else f"what reads it ends by {name}"
        raise DamagedFileError(_told(path, why))
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise DamagedFileError(_told(path, f"what reads it ends: {done.stderr[-300:]!r}")) from error
    if "error" in found:
        raise DamagedFileError(_told(path, found["error"]))
    if found["elsewhere"]:
        raise DamagedFileError(
            f"{path}: {found['elsewhere']} lies in another file, and such files are not followed. Copy all into one, "
            "as `anndata.read_h5ad(...).write_h5ad(...)` does."
        )
    if not found["is_sound"]:
        raise DamagedFileError(
            f"{path} has {room:,} bytes and says that it holds {max(found['stored'], found['missing']):,} that are not "
            f"in it: it is damaged, or was made to fill the memory. {_NOT_READ}"
        )


def _told(path: Path, why: str) -> str:
    return f"{path} is no HDF5 file, or it is cut off or damaged ({why}). {_NOT_READ}"
