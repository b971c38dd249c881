"""Reading and writing models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtualcell._lazy import attach

if TYPE_CHECKING:
    from virtualcell._unpickle import UnsafePickleError
    from virtualcell.io._download import download
    from virtualcell.io._load import load
    from virtualcell.io._save import save

__all__ = ["UnsafePickleError", "download", "load", "save"]

__getattr__, __dir__ = attach(__name__)
