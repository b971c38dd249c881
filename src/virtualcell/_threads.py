"""Threads: how many a call may use, and that numba leaves those of torch alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import joblib
import numba
import torch


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Let code run that uses numba, without a change to the numbers of threads of torch and of numba itself.

    When numba starts its workers, once in a process, it sets OpenMP to all cores for the thread that it is called from,
    and so torch too, which is slow on a busy machine. They are started from a thread that ends here: the caller's
    number is never changed, so there is none to give back, and calls may overlap. What a callee sets by
    `numba.set_num_threads` holds for the calling thread alone, and is undone.
    """
    torch.get_num_threads()  # torch reads its number from OpenMP on first use
    starter = threading.Thread(target=numba.get_num_threads)
    starter.start()
    starter.join()
    n_numba = numba.get_num_threads()
    try:
        yield
    finally:
        numba.set_num_threads(n_numba)


def count_threads(n_jobs: int) -> int:
    """Return how many threads `n_jobs` means: as joblib has it, -1 for one per core."""
    if not isinstance(n_jobs, int) or n_jobs == 0:
        raise ValueError(f"n_jobs={n_jobs!r} must be a number of threads: 1 or more, or -1 for all cores.")
    return joblib.effective_n_jobs(n_jobs)
