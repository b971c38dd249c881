"""Reading and writing models."""

from virtualcell.io._download import download
from virtualcell.io._unpickle import UnsafePickleError

__all__ = ["UnsafePickleError", "download"]
