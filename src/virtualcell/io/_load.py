"""A saved model, of whatever class it is."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from virtualcell.io._save import read_state

if TYPE_CHECKING:
    from scvi.model.base import BaseModelClass


def load(folder: str | os.PathLike, *, accelerator: str = "auto", device: int | str = "auto") -> BaseModelClass:
    """Read a model that :func:`save` wrote, with the models that it carries. Nothing is unpickled.

    Parameters
    ----------
    folder
        The folder.
    accelerator
        Kind of device to put the network on, as in scvi-tools: "auto", "cpu", "gpu" or another of Lightning's.
    device
        Number of the device, or "auto".

    Returns
    -------
    The model, of the class that was saved: an :class:`virtualcell.models.ST`, an SE or a baseline.

    Raises
    ------
    FileNotFoundError
        If the folder holds no model.
    ValueError
        If the file is damaged, or of a newer version.

    Examples
    --------
    >>> st.save("my_st")
    >>> type(vc.io.load("my_st")).__name__
    'ST'
    """
    common = importlib.import_module("virtualcell.models._common")  # a floor above this one
    return common.put_on(common.model_of(read_state(folder)), accelerator, device)
