"""One thing after another, done by the workers of a dask client."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client, Future

_AHEAD = 2  # tasks per thread of the workers that are sent or wait to be fetched
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
