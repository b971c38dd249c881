"""One thing after another, done by the workers of a dask client."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtualcell._settings import settings

if TYPE_CHECKING:
    from distributed import Client, Future

_AHEAD = 2  # tasks per thread of the workers that are sent or wait to be fetched
_TOLD = ("max_memory", "max_cache", "progress")  # settings that workers take over, beside the cache folder
_LOSSES = 3  # of what is shared, for one task, as often as dask lets workers die of one


def check_client(client: object) -> None:
    """Raise for what is neither `None` nor a client of dask.distributed."""
    if client is not None and not all(hasattr(client, name) for name in ("submit", "scatter", "nthreads")):
        raise TypeError(
            f'client={client!r} is not a `dask.distributed.Client`, which `pip install "virtualcell[dask]"` brings.'
        )


def n_threads_of(client: Client) -> int:
    """Return how many tasks the workers can do at a time."""
    return max(sum(client.nthreads().values()), 1)


def in_tasks(client: Client, function: Callable[[Any, Any], Any], shared: object, items: Iterable) -> Iterator[Any]:
    """Yield `function(shared, item)` of each item, in order; each is a task, which another worker repeats if one dies.

    Where all workers died that held what is shared, the cluster cancels the tasks that need it: it is sent anew then,
    and they with it.

    Parameters
    ----------
    client
        Of a cluster whose workers have this package.
    function
        Whose result depends on its two arguments alone.
    shared
        What all tasks need, sent to every worker once.
    items
        Taken from the caller's thread, and no more of them than keep the workers busy.

    Raises
    ------
    concurrent.futures.CancelledError
        If what is shared was lost four times while one task was waited for, or the client was closed.
    """
    tasks = _Tasks(client, function, shared)
    for item in items:
        tasks.send(item)
        if len(tasks.waiting) > _AHEAD * n_threads_of(client):
            yield tasks.first()
    while tasks.waiting:
        yield tasks.first()


class Workers:
    """Those who do one thing after another: the workers of a client or, without one, the calling process.

    Whatever is sent to a worker has no workers of its own.
    """

    def __init__(self, client: Client | None = None) -> None:
        self.client = client

    def __reduce__(self) -> tuple:
        return Workers, ()

    def each(
        self, function: Callable[[Any, Any], Any], shared: object, items: Iterable, *, at_once: int = 1
    ) -> Iterator[Any]:
        """Yield `function(shared, item)` of each item, in order; a worker is sent some items at once."""
        if self.client is None:
            yield from (function(shared, item) for item in items)
            return
        told = {name: getattr(settings, name) for name in _TOLD} | {"cache_dir": settings.cache_dir.absolute()}
        remaining = iter(items)
        portions = iter(lambda: list(itertools.islice(remaining, at_once)), [])
        for found in in_tasks(self.client, partial(_each, function, told), shared, portions):
            yield from found

    def require(self, path: Path) -> None:
        """Raise unless all workers see a file, on a disk that they share with this process."""
        if self.client is None:
            return
        seen = self.client.run(path.absolute().exists, on_error="ignore")
        lacking = [name for name, there in seen.items() if not there]
        if lacking:
            raise FileNotFoundError(
                f"{len(lacking)} workers of client= do not see {path.absolute()}, among them {lacking[0]}: have it on "
                "a disk that all of them and this process share (the cache is at `vc.settings.cache_dir`), or leave "
                "client out."
            )


def _each(function: Callable[[Any, Any], Any], told: dict[str, Any], shared: object, items: list) -> list:
    for name, value in told.items():  # for good: threads of a worker would take turns with a change that is undone
        setattr(settings, name, value)
    return [function(shared, item) for item in items]


class _Tasks:
    """Tasks that were sent and not fetched, with their items, and what they share."""

    def __init__(self, client: Client, function: Callable[[Any, Any], Any], shared: object) -> None:
        self.client, self.function, self.shared = client, function, shared
        self.waiting: deque[tuple[Any, Future]] = deque()
        self._share()

    def _share(self) -> None:
        # in a list: of a tuple or a dictionary, dask would send the elements
        (self.held,) = self.client.scatter([self.shared], broadcast=True, hash=False)

    def send(self, item: object) -> None:
        self.waiting.append((item, self._task(item)))

    def _task(self, item: object) -> Future:
        return self.client.submit(self.function, self.held, item, pure=False)

    def first(self) -> Any:
        """Wait for the result of the task that was sent first, and let go of it."""
        for _ in range(_LOSSES):
            try:
                found = self.waiting[0][1].result()
            except CancelledError:
                if self.client.status != "running":
                    raise
                self._share()
                self.waiting = deque(
                    (item, task if task.status == "finished" else self._task(item)) for item, task in self.waiting
                )
            else:
                self.waiting.popleft()
                return found
        return self.waiting.popleft()[1].result()
