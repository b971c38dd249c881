"""Public names that are imported when they are first touched."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from importlib import import_module


def attach(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package whose imports stand in its `if TYPE_CHECKING:` block.

    torch, scvi-tools, Lightning and scanpy take seconds to import, most of which a user of one function never needs.
    The block is what type checkers and editors read; here it says where a name comes from, so that a name is imported
    from one line and nothing has to be listed twice.

    Parameters
    ----------
    package
        Name of the package, its `__name__`.

    Returns
    -------
    The two functions, to be bound to `__getattr__` and `__dir__` of the package.
    """
    module = sys.modules[package]
    tree = ast.parse(inspect.getsource(module))
    blocks = [b for b in tree.body if isinstance(b, ast.If) and ast.unparse(b.test) == "TYPE_CHECKING"]
    imports = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
    homes = {alias.name: str(line.module) for line in imports for alias in line.names}

    def __getattr__(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)  # the next look-up finds it without a call
        return value

    def __dir__() -> list[str]:  # what is public, and not what this file needs
        return sorted([*homes, *(name for name in vars(module) if name.startswith("__"))])

    return __getattr__, __dir__
