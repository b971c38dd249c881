"""One thing after another, done by several threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from virtualcell._settings import settings

_MOST = 8  # threads at most; numpy lets others run while it goes through a block


def most_threads() -> int:
    """Return how many threads :func:`in_threads` takes: `vc.settings.n_threads`, eight at most."""
    return min(_MOST, settings.n_threads or os.cpu_count() or 1)


def in_threads(function: Callable, items: Iterable, *, begin: Callable[[], None] | None = None) -> Iterator[Any]:
    """Yield what a function makes of each item, in order, by several threads, each of which calls `begin` first.

    Items are taken from the caller's thread, and no more of them than keep the threads busy: results wait for nobody.
    A single item is left to the caller's thread. What has not begun when one fails, or when the caller stops, is not
    begun.
    """
    n_threads = most_threads()
    if isinstance(items, Sized) and len(items) < 2:
        yield from map(function, items)
        return
    waiting: deque[Future] = deque()
    threads = ThreadPoolExecutor(n_threads, initializer=begin)
    try:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
