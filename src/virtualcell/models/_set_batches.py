"""Numbered batches of cell sets, from rows that live on the training device."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from virtualcell.data._cell_sets import CellGroups, SetSampler
from virtualcell.data._packed import DenseRows, PackedRows, sent
from virtualcell.models._features import PerturbationTable

logger = logging.getLogger(__name__)

BOUNDED_ON = ("cuda",)  # devices with a memory of their own
_SHARE = 0.5  # of what is free there, that rows may take
_CPU = torch.device("cpu")

# A validation looks at no more sets than this many batches hold, spread over all groups.
MOST_VALIDATION_STEPS = 64
_ROWS_AT_ONCE = 1024
_PASSES, _FEWEST_STEPS, _MANY_STEPS = 20, 400, 20_000
_SETS_ON_CPU, _SETS_ON_GPU = 8, 64
_VALIDATIONS, _SHARE_OF_VALIDATIONS = 20, 0.1


@dataclass
class SetSource:
    """What sets are made of. Training and validation share one, so that a device holds the rows once.

    Parameters
    ----------
    rows
        What the network works on: packed expression, or cell embeddings.
    table
        Vectors of the perturbations.
    batch
        Code of each cell's batch, (n_cells,), or `None`.
    genes
        Expression to decode to, of a model in embedding space.
    """

    rows: PackedRows | DenseRows
    table: PerturbationTable
    batch: np.ndarray | None = None
    genes: PackedRows | None = None
    _fits: dict[torch.device, bool] = field(default_factory=dict, init=False, repr=False)

    def fits(self, device: torch.device) -> bool:
        """Tell whether rows may lie on a device, by the memory that was free there when this was first asked."""
        if device not in self._fits:
            self._fits[device] = device.type not in BOUNDED_ON or self._is_small(device)
        return self._fits[device]

    def _is_small(self, device: torch.device) -> bool:
        stores = [rows for rows in (self.rows, self.genes) if rows is not None]
        needed = sum(rows.nbytes for rows in stores)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0  # tests say that a CPU has none
        if needed <= _SHARE * free:
            return True
        logger.info(
            "The rows that ST is trained on take %.3g GB, more than half of the %.3g GB that are free on the GPU. They "
            "are fetched from %s, for each step while the GPU works on the one before.",
            *(needed / 1e9, free / 1e9, "disk" if any(rows.on_disk for rows in stores) else "memory"),
        )
        return False

    def move(self, device: torch.device) -> None:
        """Put the rows on a device, where they are not there already."""
        self.rows = self.rows.to(device)
        self.genes = None if self.genes is None else self.genes.to(device)


class SetBatches:
    """Batches of sets as tensors: a function of the number of the step, see :class:`virtualcell.train.Batches`.

    "control" (B, S, n_input), "perturbed" (B, S, n_output), "perturbation" (B, n_perturbation), with batches "batch"
    (B, S), that of the perturbed cells, "genes" (B, S, n_genes) where the model decodes genes from an embedding, and
    where it is asked for "base" (B, n_input), the mean of all control cells that those of the set were drawn from.

    Parameters
    ----------
    sampler
        Which rows go together.
    source
        What they are rows of.
    is_validation
        Whether these are the batches of a validation, whose number is that of the sampler's steps.
    with_base
        Whether batches have a "base".
    """

    def __init__(
        self, sampler: SetSampler, source: SetSource, *, is_validation: bool = False, with_base: bool = False
    ) -> None:
        self.sampler, self.source, self.with_base = sampler, source, with_base
        self.n_steps = sampler.n_steps if is_validation else None
        names = sorted(set(sampler.groups.perturbation))
        self.vectors = source.table.encode(names)
        code = {name: i for i, name in enumerate(names)}
        self.code = np.array([code[name] for name in sampler.groups.perturbation])

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return the share of the sets of step `i` that belongs to a process."""
        if self.source.fits(device):
            return self._step(i, rank, world_size, device)
        return {name: tensor.to(device) for name, tensor in self._step(i, rank, world_size, _CPU).items()}

    def is_fetched(self, device: torch.device) -> bool:
        """Tell whether steps are put together on the CPU, since the rows do not fit on a device."""
        return not self.source.fits(device)

    def _step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        group, perturbed, control = (part[rank::world_size] for part in self.sampler.step(i))
        source = self.source
        source.move(device)
        self.vectors = self.vectors.to(device)
        batch = {
            "control": source.rows.rows(control),
            "perturbed": source.rows.rows(perturbed),
            "perturbation": self.vectors[sent(self.code[group], device)],
        }
        if source.batch is not None:
            batch["batch"] = sent(source.batch[perturbed], device)
        if source.genes is not None:
            batch["genes"] = source.genes.rows(perturbed)
        if self.with_base:
            pools = sent(self._pool_of_row[control], device)
            share = F.one_hot(pools, len(self.sampler.groups.pools)).float().mean(dim=1)
            batch["base"] = share @ self._pool_means.to(device)
        return batch

    @cached_property
    def _pool_of_row(self) -> np.ndarray:
        """Pool that each control cell lies in; the smallest where there are several."""
        pools = self.sampler.groups.pools
        pool = np.zeros(1 + max(int(rows.max()) for rows in pools), int)
        for i in sorted(range(len(pools)), key=lambda i: -len(pools[i])):
            pool[pools[i]] = i
        return pool

    @cached_property
    def _pool_means(self) -> Tensor:
        """Mean control cell of each pool, (n_pools, n_input)."""
        means = []
        for rows in self.sampler.groups.pools:
            pieces = np.array_split(rows, -(-len(rows) // _ROWS_AT_ONCE))
            means.append(sum(self.source.rows.rows(piece[None])[0].sum(dim=0) for piece in pieces) / len(rows))
        return torch.stack(means)

    def describe(self, i: int) -> str:
        """Name the contexts of step `i`."""
        contexts = sorted({self.sampler.groups.context[g] for g in self.sampler.step(i).group})
        return f"contexts {', '.join(contexts[:10])}{', ...' if len(contexts) > 10 else ''}"


def auto_batch_size(groups: CellGroups, set_size: int, *, on_gpu: bool, n_devices: int = 1) -> int:
    """Choose the sets per step: 8 on a CPU; on a GPU, where many cost no more, up to 64 as the data allow."""
    if not on_gpu:
        return _SETS_ON_CPU * n_devices
    fitting = _PASSES * groups.n_sets(set_size) // _FEWEST_STEPS
    return int(np.clip(fitting // 8 * 8, _SETS_ON_CPU, _SETS_ON_GPU)) * n_devices


def default_steps(groups: CellGroups, set_size: int, batch_size: int) -> int:
    """Count the steps of 20 passes over the cells, at least 400; above 20,000 fewer passes, but at least one."""
    one_pass = -(-groups.n_sets(set_size) // batch_size)
    return max(min(max(_PASSES * one_pass, _FEWEST_STEPS), _MANY_STEPS), one_pass)


def validation_interval(n_steps: int, n_each: int) -> int:
    """Choose the steps of training between two validations of `n_each` steps, each of which costs a third of one.

    Some twenty validations in a training, fewer where they would take more than a tenth of its time.
    """
    return max(1, round(n_steps / _VALIDATIONS), math.ceil(n_each / 3 / _SHARE_OF_VALIDATIONS))


def validation_steps(groups: CellGroups, set_size: int, batch_size: int) -> int:
    """Count the steps in which every validation cell has a place, up to a limit."""
    return min(-(-groups.n_sets(set_size) // batch_size), MOST_VALIDATION_STEPS)
