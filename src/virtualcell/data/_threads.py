"""Blocks of cells, looked at by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from virtualcell._settings import settings

_READERS = 8  # threads at most; numpy lets others run while it goes through a block


def in_threads(function: Callable[[slice], object], items: Sequence[slice]) -> Iterator:
    """Yield what a function makes of each item, in order, by `vc.settings.n_threads` threads, eight at most."""
    if len(items) < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(min(_READERS, settings.n_threads or os.cpu_count() or 1)) as readers:
        yield from readers.map(function, items)
