"""One thing after another, done by the workers of a dask client."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client, Future

_AHEAD = 2  # tasks per thread of the workers that are sent or wait to be fetched


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
    """
    held = client.scatter(shared, broadcast=True, hash=False)
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(client.submit(function, held, item, pure=False))
        if len(waiting) > _AHEAD * n_threads_of(client):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
