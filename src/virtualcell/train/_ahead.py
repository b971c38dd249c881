"""Batches that are put together on the CPU, each while the device works on the one before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from virtualcell.train._run import Batches

THREAD = "next-batch"  # beginning of the thread's name


class Ahead:
    """Batches of which the next is put together by a thread: while one is in use, no more than one other is there.

    What goes wrong in the thread is raised by the step that it was for.

    Parameters
    ----------
    batches
        The batches, whose `step` the thread calls with the CPU as its device.
    n_steps
        Number of steps that there are.
    """

    def __init__(self, batches: Batches, n_steps: int) -> None:
        self.batches, self.n_steps = batches, n_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        self._coming: tuple[int, Future[dict[str, Tensor]]] | None = None

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return the batch of a step on a device, which fetches it by itself, and have the next one put together."""
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != i:  # the first of a training or of a validation
            coming = i, self._thread.submit(self._put_together, i, rank, world_size, device)
        batch = coming[1].result()
        if i + 1 < self.n_steps:
            self._coming = i + 1, self._thread.submit(self._put_together, i + 1, rank, world_size, device)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def _put_together(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        batch = self.batches.step(i, rank, world_size, torch.device("cpu"))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if device.type == "cuda" else batch

    def close(self) -> None:
        """Wait for the thread to end."""
        self._coming = None
        self._thread.shutdown(cancel_futures=True)


def ahead(batches: Batches, n_steps: int, device: torch.device) -> Ahead | Batches:
    """Return batches that are put together ahead, where that is how a device gets them; otherwise themselves."""
    return Ahead(batches, n_steps) if batches.is_fetched(device) else batches
