"""Distances between two sets of cells, (B, S, G) against (B, S', G), one value per set (B,); the loss of ST."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from virtualcell.modules._st import Ensemble, STNetwork


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y)  # (B, S, S')


def _self_distances(x: Tensor) -> Tensor:
    # float32 cdist gives up to 0.04 instead of 0 between a cell and itself at 2,000 genes
    return _distances(x, x).masked_fill(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), 0.0)


def _from_products(x: Tensor, both: Tensor) -> Tensor:
    """Distances between the first n cells of `both`, which are `x`, and all of them."""
    n = x.shape[-2]
    squares = torch.linalg.vecdot(both, both)
    sums = squares[..., :n].unsqueeze(-1) + squares.unsqueeze(-2)
    distances = sums - torch.matmul(x, both.mT).mul_(2)
    rounding = 4 * torch.finfo(x.dtype).eps * sums  # what is left between a cell and its copy
    distances = distances.masked_fill_(distances <= rounding, 0).sqrt_()
    distances[..., :n].diagonal(dim1=-2, dim2=-1).zero_()
    return distances


class _MeanDistances(torch.autograd.Function):
    """Mean distance between x and y less half of that within x, (B,), of x (B, S, G) and y + origin, y (B, S', G).

    Both are read once each way, as one matrix: on a CPU half of a step was spent on what cdist reads and writes. They
    are taken from the mean of x: a difference of squares loses digits where cells lie far closer together than to the
    origin, and predictions that hardly differ from one another may lie far from what was observed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, origin: Tensor) -> Tensor:
        n = x.shape[-2]
        both = x.new_empty(*x.shape[:-2], n + y.shape[-2], x.shape[-1])
        mean = x.mean(dim=-2, keepdim=True)
        torch.sub(x, mean, out=both[..., :n, :])
        torch.sub(y, mean - origin, out=both[..., n:, :])
        x = both[..., :n, :]
        distances = _from_products(x, both)
        ctx.save_for_backward(both, distances)
        within, between = distances.split([n, y.shape[-2]], dim=-1)
        return between.mean(dim=(-2, -1)) - within.mean(dim=(-2, -1)) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        both, distances = ctx.saved_tensors
        n, m = distances.shape[-2], distances.shape[-1] - distances.shape[-2]
        pull = torch.where(distances > 0, distances.reciprocal(), 0.0)  # the same cell pulls in no direction
        pull[..., :n] /= n * n
        pull[..., n:] /= -n * m
        pull *= gradient[..., None, None]
        pull[..., :n].diagonal(dim1=-2, dim2=-1).sub_(pull.sum(dim=-1))
        return torch.matmul(pull, both), None, None


class Target:
    """A set of cells to compare predictions with, (B, S', G), and what is the same for all of them.

    Cells are taken from their mean: distances do not change, but cdist subtracts squares and loses fewer digits near
    the origin.
    """

    def __init__(self, cells: Tensor) -> None:
        cells = cells.float()
        self.centre = cells.detach().mean(dim=-2, keepdim=True)
        self.cells = cells - self.centre
        self._within: Tensor | None = None

    def shifted(self, x: Tensor) -> Tensor:
        """Return other cells from the same origin."""
        return x.float() - self.centre

    @property
    def within(self) -> Tensor:
        """Mean distance between the cells of a set, (B,)."""
        if self._within is None:
            self._within = _from_products(self.cells, self.cells).mean(dim=(-2, -1))
        return self._within


def energy_distance(x: Tensor, y: Tensor | Target) -> Tensor:
    """E|x-y| - E|x-x'| / 2 - E|y-y'| / 2 over all pairs, self-pairs included as zeros (an MMD with kernel -|x-y|).

    This is the loss of STATE (Adduri et al. 2025), half of the energy distance of Székely and Rizzo (2013).
    """
    y = y if isinstance(y, Target) else Target(y)
    with torch.autocast(x.device.type, enabled=False):  # sums over genes of squares want 32 bits, as in cdist
        return _MeanDistances.apply(x.float(), y.cells, y.centre) - y.within / 2


def mean_distance(x: Tensor, y: Tensor | Target) -> Tensor:
    """Euclidean distance between the two mean cells."""
    y = y if isinstance(y, Target) else Target(y)
    difference = y.shifted(x).mean(dim=-2) - y.cells.mean(dim=-2)
    return difference.square().sum(dim=-1).clamp_min(1e-12).sqrt()


def sinkhorn_divergence(x: Tensor, y: Tensor | Target, blur: float = 0.05) -> Tensor:
    """Debiased entropic transport cost, ground cost |x-y|^2 / 2, temperature blur^2 (Feydy et al. 2019, eq. 3).

    The temperature falls from the squared diameter by a factor of 4 a step; potentials are held fixed in the backward
    pass, where the envelope theorem makes the gradient that of the last step.
    """
    y = y if isinstance(y, Target) else Target(y)
    x, y = y.shifted(x), y.cells
    costs = {
        "xy": _distances(x, y).square() / 2,
        "xx": _self_distances(x).square() / 2,
        "yy": _self_distances(y).square() / 2,
    }
    diameter = float(costs["xy"].detach().max().mul(2).sqrt().clamp_min(2 * blur))
    if not math.isfinite(diameter):  # a training stops at such a loss, and says in which step
        return costs["xy"].mean(dim=(-2, -1)) * math.nan
    n_steps = math.ceil(math.log(diameter / blur) / math.log(2))
    temperatures = [max(diameter * 0.5**i, blur) ** 2 for i in range(n_steps + 1)] + [blur**2] * 2

    def soft_min(cost: Tensor, potential: Tensor, temperature: float) -> Tensor:
        n = cost.shape[-1]
        return -temperature * (torch.logsumexp((potential.unsqueeze(-2) - cost) / temperature, dim=-1) - math.log(n))

    def potentials(cost: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            f, g = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
            for t in temperatures:
                f, g = (f + soft_min(cost, g, t)) / 2, (g + soft_min(cost.mT, f, t)) / 2
            last = soft_min(cost.mT, f, temperatures[-1])
        # either potential alone has the whole gradient, the transport plan: through both it would count twice
        return soft_min(cost, g, temperatures[-1]), last

    f, g = potentials(costs["xy"])
    f_x, g_x = potentials(costs["xx"])
    f_y, g_y = potentials(costs["yy"])
    return (f - (f_x + g_x) / 2).mean(dim=-1) + (g - (f_y + g_y) / 2).mean(dim=-1)


def set_loss(predicted: Tensor, target: Tensor | Target, *, kind: str = "energy", mean_weight: float = 0.0) -> Tensor:
    """Loss of each set: "energy", "sinkhorn" or "energy+sinkhorn" (0.01 Sinkhorn), plus the distance of set means."""
    if kind == "energy":
        loss = energy_distance(predicted, target)
    elif kind == "sinkhorn":
        loss = sinkhorn_divergence(predicted, target)
    elif kind == "energy+sinkhorn":
        loss = energy_distance(predicted, target) + 0.01 * sinkhorn_divergence(predicted, target)
    else:
        raise ValueError(f"loss={kind!r} is unknown; valid are 'energy', 'sinkhorn' and 'energy+sinkhorn'.")
    return loss + mean_weight * mean_distance(predicted, target) if mean_weight else loss


def contrast(predicted: Tensor, batch: dict[str, Tensor], temperature: float = 0.1) -> Tensor:
    """Tell the sets of a batch apart: cross-entropy of the cosines between predicted and observed effects of the mean.

    Every prediction has to lie nearer to the effect of its own set than to those of other perturbations (InfoNCE, van
    den Oord et al. 2018); sets of the same perturbation do not count against each other. Effects are differences from
    the "base" of the batch, where it has one: the sampled control cells of a set, taken off the prediction and off what
    was observed, would tell sets apart whatever is predicted. Where several processes share a batch, each compares its
    predictions with the observed sets of all, and the mean over processes is the loss of the whole batch.
    """
    base = batch["base"].float() if "base" in batch else batch["control"].float().mean(dim=1)
    effect, target = (F.normalize(x.float().mean(dim=1) - base, dim=-1) for x in (predicted, batch["perturbed"]))
    own = batch["perturbation"]
    (targets, vectors), first, n_processes = _from_all_processes(target, own)
    rows = torch.arange(first, first + len(own), device=own.device)
    same = (own.unsqueeze(1) == vectors.unsqueeze(0)).all(dim=-1)
    itself = rows.unsqueeze(1) == torch.arange(len(vectors), device=own.device)
    scores = (effect @ targets.T / temperature).masked_fill(same & ~itself, -torch.inf)
    losses = F.cross_entropy(scores, rows, reduction="none")
    perturbed = vectors.any(dim=-1)  # the control has no effect and so no direction
    return (losses * perturbed[rows]).sum() * n_processes / perturbed.sum().clamp_min(1)


def _from_all_processes(*tensors: Tensor) -> tuple[list[Tensor], int, int]:
    """Tensors of all processes one after another, where those of this one begin, and the number of processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(tensors), 0, 1
    rank, n = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gathered = []
    for tensor in tensors:
        parts = [torch.empty_like(tensor) for _ in range(n)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        gathered.append(torch.cat(parts))
    return gathered, rank * len(tensors[0]), n


def st_loss(
    network: STNetwork | Ensemble,
    batch: dict[str, Tensor],
    *,
    kind: str = "energy",
    mean_weight: float = 0.0,
    contrast_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Mean set loss over the heads, plus that of decoded genes (weight 1) and of the confidence token, where any are.

    Heads, and the networks of an ensemble, are trained each by itself: averaged, one would learn to make up for the
    other's errors on cells it has seen.
    """
    if isinstance(network, Ensemble):
        options = {"kind": kind, "mean_weight": mean_weight, "contrast_weight": contrast_weight}
        each = [st_loss(one, batch, **options) for one in network.networks]
        return {name: torch.stack([losses[name] for losses in each]).mean() for name in each[0]}
    out = network(batch["control"], batch["perturbation"], batch.get("batch"))

    def distance(cells: list[Tensor], observed: Tensor) -> Tensor:
        target = Target(observed)
        return torch.stack([set_loss(c, target, kind=kind, mean_weight=mean_weight) for c in cells]).mean(dim=0)

    per_set = distance(out.heads, batch["perturbed"])
    losses = {"loss": per_set.mean()}
    if contrast_weight:
        losses["loss_contrast"] = torch.stack([contrast(cells, batch) for cells in out.heads]).mean()
        losses["loss"] = losses["loss"] + contrast_weight * losses["loss_contrast"]
    if "genes" in batch:
        losses["loss_genes"] = distance([network.decode(cells) for cells in out.heads], batch["genes"]).mean()
        losses["loss"] = losses["loss"] + losses["loss_genes"]
    if out.confidence is not None:
        losses["loss_confidence"] = F.mse_loss(out.confidence, 10 * per_set.detach())
        losses["loss"] = losses["loss"] + losses["loss_confidence"]
    return losses
