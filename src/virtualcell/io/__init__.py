"""Reading and writing models."""

from virtualcell.io._download import download
from virtualcell.io._load import load
from virtualcell.io._save import save
from virtualcell.io._unpickle import UnsafePickleError

__all__ = ["UnsafePickleError", "download", "load", "save"]
