"""Threads: how many a call may use, and that numba leaves those of torch alone."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import joblib
import numba
import torch

from virtualcell._settings import settings

logger = logging.getLogger(__name__)

_IMPORTED = time.monotonic()


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Let code run that uses numba, without a change to the numbers of threads of torch and of numba itself.

    When numba starts its workers, once in a process, it sets OpenMP to all cores for the thread that it is called from,
    and so torch too, which is slow on a busy machine. They are started from a thread that ends here: the caller's
    number is never changed, so there is none to give back, and calls may overlap. What a callee sets by
    `numba.set_num_threads` holds for the calling thread alone, and is undone.
    """
    torch.get_num_threads()  # torch reads its number from OpenMP on first use
    in_new_thread(numba.get_num_threads)
    n_numba = numba.get_num_threads()
    try:
        yield
    finally:
        numba.set_num_threads(n_numba)


class _Own:
    """Calls that run now, and the number of threads that torch is to have after the last of them."""

    lock = threading.Lock()
    here = threading.local()  # with `inside` while the thread is in a call
    n_calls = 0
    n_after = 0
    was_said = False  # that the machine is busy


@contextmanager
def own_threads() -> Iterator[None]:
    """Give torch `vc.settings.n_threads` threads, or as many as it was told to take, while a call runs.

    What it was told by `torch.set_num_threads` or OMP_NUM_THREADS shows in a new thread, also where numba, for scanpy
    for instance, has set the thread of the caller to all cores. The caller has that number afterwards.
    """
    if getattr(_Own.here, "inside", False):  # one call in another
        yield
        return
    with _Own.lock:
        if _Own.n_calls == 0:
            _Own.n_after = in_new_thread(torch.get_num_threads)
        _Own.n_calls += 1
    _Own.here.inside = True
    try:
        with _Own.lock:
            _set(_Own.n_after if settings.n_threads is None else settings.n_threads)
        _note_busy_machine(torch.get_num_threads())
        yield
    finally:
        _Own.here.inside = False
        with _Own.lock:
            _Own.n_calls -= 1
            _set(_Own.n_after)


def in_new_thread(function: Callable, *arguments: object) -> Any:
    """Return what a function returns in a thread of its own, whose settings and generators end with it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def share_threads(n_threads: int) -> None:
    """Give torch so many threads in this one, until it ends: others run beside it, and new ones get what they got."""
    _Own.here.inside = True
    with _Own.lock:
        everywhere = torch.get_num_threads()  # which a thread takes over when it asks first, and only then
        torch.set_num_threads(n_threads)
        in_new_thread(torch.set_num_threads, everywhere)


def _set(n_threads: int) -> None:
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)


def others_running() -> float:
    """Return how many cores other processes have kept busy in the last minute; 0 where the system does not say."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # of Windows, and of containers that hide it
        return 0.0
    own = time.process_time() / max(time.monotonic() - _IMPORTED, 60.0)
    return max(load - own, 0.0)


def _note_busy_machine(n_threads: int) -> None:
    """Say once that threads of torch, which wait for each other, are slow beside other busy processes."""
    passive = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    if _Own.was_said or passive or n_threads == 1:
        return
    others, n_cores = others_running(), os.cpu_count() or 1
    if others + n_threads > 1.5 * n_cores:
        _Own.was_said = True
        logger.info(
            "Other processes keep %.1f of %d cores busy, and torch's %d threads spend much of their time waiting for "
            "each other: `vc.settings.n_threads = 1`, or OMP_WAIT_POLICY=PASSIVE in the environment of Python, is "
            "faster.",
            *(others, n_cores, n_threads),
        )


def count_threads(n_jobs: int) -> int:
    """Return how many threads `n_jobs` means: as joblib has it, -1 for one per core."""
    if not isinstance(n_jobs, int) or n_jobs == 0:
        raise ValueError(f"n_jobs={n_jobs!r} must be a number of threads: 1 or more, or -1 for all cores.")
    return joblib.effective_n_jobs(n_jobs)
