"""One step of AdamW on one device: recorded as a CUDA graph where it can be, and then launched as a whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before the recording, in which libraries and the optimiser allocate what they need

# What the CPU waits for, or whose shape depends on values, cannot be part of a recording.
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waits(TorchDispatchMode):
    """Note the operations that cannot be recorded: those that wait for values, or that fetch from another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.names = device, set()

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        waits = bool(_WAITING.intersection(func.tags))
        if func is torch.ops.aten.index.Tensor:  # whose shape depends on the values of a mask alone
            waits = any(x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if isinstance(x, Tensor))
        if waits or any(x.dim() and x.device.type != self.device.type for x in tensors):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class Step:
    """Forward pass, backward pass, clipping and update of the weights, for one batch after another.

    On a GPU a step of a small network takes the CPU far longer to launch, operation by operation, than the GPU to
    compute. After a few steps whose batches are of the same shape, the next is therefore recorded (a CUDA graph) and
    from then on launched as a whole; a batch of another shape makes an ordinary step. A step that needs values on the
    CPU, such as one of the Sinkhorn loss, is never recorded, and the log says so.

    Parameters
    ----------
    network, loss
        See :func:`virtualcell.train.fit`.
    optimizer
        Optimiser of the network's parameters; on a GPU with `capturable=True` and its rate in a tensor.
    clip
        Largest norm of the gradient, 0 for none.
    name
        Name of the model in the log.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        name: str,
    ) -> None:
        self.network, self.loss, self.optimizer, self.clip, self.name = network, loss, optimizer, clip or math.inf, name
        self.parameters = list(network.parameters())
        self.device = self.parameters[0].device
        self.can_record: bool | None = None  # unknown before the first step
        self._launch: Callable[[], None] | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._shapes: dict[str, torch.Size] = {}
        self._n_alike = 0  # steps so far whose batches had these shapes
        self._batch: dict[str, Tensor] = {}  # what a recording reads
        self._result: tuple[dict[str, Tensor], Tensor] = ({}, torch.empty(0))  # and writes

    @property
    def is_recorded(self) -> bool:
        """Whether there is a recording."""
        return self._launch is not None

    def __call__(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Make a step, and return its losses and the norm of the gradient before it was clipped.

        What is returned is overwritten by the next step.
        """
        shapes = {name: tensor.shape for name, tensor in batch.items()}
        if shapes != self._shapes and self.is_recorded:
            return self._ordinary(batch)
        self._n_alike = self._n_alike + 1 if shapes == self._shapes else 1
        self._shapes = shapes
        if self.can_record is None:
            return self._first(batch)
        if self.can_record and not self.is_recorded and self._n_alike > WARM_UP:
            self._record(batch)
        if not self.is_recorded:
            return self._ordinary(batch)
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name])
        self._launch()
        return self._result

    def _compute(self, batch: dict[str, Tensor], watch: Waits | None = None) -> tuple[dict[str, Tensor], Tensor]:
        with watch or nullcontext():
            losses = self.loss(self.network, batch)
            # the backward pass follows the precision of the forward one; its own operations keep theirs
            with torch.autocast(self.device.type, enabled=False):
                losses["loss"].backward()
                norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()  # which waits for nothing on a GPU
        self.optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in losses.items()}, norm.detach()

    def _ordinary(self, batch: dict[str, Tensor], watch: Waits | None = None) -> tuple[dict[str, Tensor], Tensor]:
        if self._stream is None:
            return self._compute(batch, watch)
        # beside the default stream, where nothing can be recorded
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            result = self._compute(batch, watch)
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return result

    def _first(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Make an ordinary step, and see whether others like it can be recorded."""
        waits = Waits(self.device)
        result = self._ordinary(batch, waits)
        self.can_record = not waits.names
        if waits.names:
            found = ", ".join(sorted(waits.names))
            logger.info(
                "%s: steps are launched operation by operation, since they wait for values (%s).", self.name, found
            )
        return result

    def _record(self, batch: dict[str, Tensor]) -> None:
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        if self._stream is None:  # the same steps, for computers without a GPU
            self._launch = self._repeat
            return
        graph = torch.cuda.CUDAGraph()
        kind = self.device.type
        mixed = torch.is_autocast_enabled(kind)
        half = torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False) if mixed else nullcontext()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"), half:
                self._result = self._compute(self._batch)
        except RuntimeError as error:
            self.can_record = False
            logger.warning(
                "%s: a step could not be recorded as a CUDA graph, so steps are launched operation by operation: %s",
                *(self.name, error),
            )
            return
        self._launch = graph.replay

    def _repeat(self) -> None:
        self._result = self._compute(self._batch)
