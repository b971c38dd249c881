"""HDF5 files that others made: read once in a process of its own, which may die of it, before we read them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from virtualcell._reading import DamagedFileError

_TRIAL = Path(__file__).with_name("_hdf5_trial.py")
_SECONDS, _PER_MEGABYTE = 60, 10  # on the clock, where the system does not limit the time of the processor
_NOT_READ = "It was not read."


def check_h5(path: Path) -> None:
    """Raise for an HDF5 file that its library does not come through, or that holds more than is stored in it.

    For a file whose parts do not hang together that library may reserve gigabytes, stay in a loop, or end the process.
    Another process therefore reads it first, to its end, in a limited time and with memory for twice the file and for
    its largest piece (Linux; elsewhere memory is not limited). This takes 0.2 s, and as long as reading the file.

    Raises
    ------
    DamagedFileError
        For such a file, and for one whose arrays lie in other files.
    RuntimeError
        If no other process can be started.
    """
    room = path.stat().st_size
    told = _output_of_trial(path, room)
    try:
        found = json.loads(told)
    except json.JSONDecodeError as error:
        raise DamagedFileError(_damaged(path, "what reads it ends before it is through")) from error
    if "error" in found:
        raise DamagedFileError(_damaged(path, found["error"]))
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


def _output_of_trial(path: Path, room: int) -> str:
    """Return what the process says that reads the file first."""
    paths = json.dumps(sys.path, default=str)
    command = [sys.executable or "python", "-I", str(_TRIAL), paths, str(path.absolute())]
    longest = _SECONDS + _PER_MEGABYTE * room // 1_000_000 if os.name == "nt" else None
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, check=False, timeout=longest, **how)
    except subprocess.TimeoutExpired as error:
        raise DamagedFileError(_damaged(path, f"reading it takes more than {longest} s")) from error
    except OSError as error:
        raise RuntimeError(_not_checked(path, str(error))) from error
    begin, _, told = done.stdout.partition("\n")
    if begin != "ready":
        raise RuntimeError(_not_checked(path, done.stderr.strip()[-300:] or f"status {done.returncode}"))
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        why = "reading it takes too long" if name == "SIGXCPU" else f"what reads it ends by {name}"
        raise DamagedFileError(_damaged(path, why))
    return told


def _damaged(path: Path, why: str) -> str:
    return f"{path} is no HDF5 file, or it is cut off or damaged ({why}). {_NOT_READ}"


def _not_checked(path: Path, why: str) -> str:
    return (
        f"{path} was not read: another process reads it first, and {sys.executable!r} is not the Python of this one or "
        f"has not its packages ({why}). Set sys.executable to a Python that has h5py."
    )
