"""A network whose weights, gradients and optimiser states are divided among processes (FSDP)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from virtualcell.train._run import Loss


class Sharded:
    """A copy of a network of which every process holds a part, while it is trained.

    Each process makes it at once. All start from the weights of the first one, as with DDP. The network that it is a
    copy of stays whole, where it is. Modules with an attribute `is_unit`, which are only ever called, are put together
    one after another, so that no more than two of them are whole at a time.

    Parameters
    ----------
    network, loss
        See :func:`virtualcell.train.fit`.
    device
        Where this process computes.
    """

    def __init__(self, network: nn.Module, loss: Loss, device: torch.device) -> None:
        self.original, self.original_loss = network, loss
        self.network = copy.deepcopy(network)
        with torch.no_grad():
            for tensor in self.network.state_dict().values():
                sent = tensor.to(device)
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for module in [module for module in self.network.modules() if getattr(module, "is_unit", False)]:
            fully_shard(module, mesh=mesh)
        self._root = fully_shard(_Whole(self.network), mesh=mesh)

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of the copy."""
        return self._root(lambda: self.original_loss(network, batch))

    def put_apart(self) -> None:
        """Let go of the weights of others, which stay after a forward pass that no backward pass follows."""
        self._root.reshard()

    @torch.no_grad()
    def put_together(self) -> tuple[nn.Module, Loss]:
        """Return the original, which now has the weights of the copy, and its loss; every process does so at once."""
        own = self.original.state_dict()
        for name, tensor in self.network.state_dict().items():
            own[name].copy_(whole(tensor))
        return self.original, self.original_loss


class _Whole(nn.Module):
    """A network whose weights, but for those of units, are whole while a function runs: losses call many methods."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return function()


def part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as a whole; of one that is divided every process asks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(other: Tensor, tensor: Tensor) -> Tensor:
    """Return of a tensor, which every process has as a whole, what is to stand beside another one of its shape."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:  # such as a number of steps
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
