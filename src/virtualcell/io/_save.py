"""Models as one file in a folder, or as bytes in `uns`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from virtualcell._state import State, packed, read_file, unpacked, write_state

FILE = "model.safetensors"


class Saved(Protocol):
    """A model that can be saved."""

    def state(self) -> State:
        """Return what is to be saved."""


def save(model: Saved, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a model and the models that it carries into a folder, as one file `model.safetensors`.

    The file is put in place when it is whole: a process that dies leaves the model that was there, or the new one.

    Parameters
    ----------
    model
        Any model of :mod:`virtualcell.models`.
    folder
        The folder, made where it is missing.
    overwrite
        Whether to replace a model that is there.

    Raises
    ------
    FileExistsError
        If the folder holds a model and `overwrite` is not set.

    Examples
    --------
    >>> vc.io.save(st, "my_model")
    >>> vc.io.load("my_model").genes == st.genes
    True
    """
    if not hasattr(model, "state"):
        raise TypeError(f"model={type(model).__name__} is no model of vc.models. Write data with its own `write`.")
    folder = Path(folder)
    if (folder / FILE).exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a model already. Pass overwrite=True to replace it.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file. Name a folder, which is made where it is missing.")
    write_state(model.state(), folder / FILE)


def read_state(folder: str | os.PathLike) -> State:
    """Read what :func:`save` wrote. Nothing is unpickled."""
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {FILE}: it is not a folder written by `model.save`.")
    return read_file(path)


def pack(model: Saved, *, without: Sequence[str] = ()) -> np.ndarray:
    """Return the file as bytes, (n,) uint8, which `uns` of an h5ad or zarr can hold, without some carried models."""
    state = model.state()
    state = replace(state, parts={name: part for name, part in state.parts.items() if name not in without})
    return np.frombuffer(packed(state), dtype=np.uint8)


def unpack(content: np.ndarray, *, source: str = "uns") -> State:
    """Read what :func:`pack` packed."""
    return unpacked(np.asarray(content, dtype=np.uint8).tobytes(), source=source)
