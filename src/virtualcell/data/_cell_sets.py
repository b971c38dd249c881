"""Matched sets of cells: which rows go together (the sampler, which owns all randomness) and their tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import Dataset, Sampler

logger = logging.getLogger(__name__)

# A matrix up to this size is kept dense: slicing rows of a sparse one costs more than a small training step.
_DENSE_BYTES = 2**31


@dataclass(frozen=True)
class CellGroup:
    """Cells of one perturbation in one context (and batch), with the control cells that match them, as rows."""

    perturbation: str
    context: str
    batch: int
    perturbed: np.ndarray
    control: np.ndarray


@dataclass(frozen=True)
class CellSet:
    """One training example: S control rows and S perturbed rows."""

    perturbation: str
    context: str
    batch: int
    control: np.ndarray
    perturbed: np.ndarray


def cell_groups(
    perturbation: np.ndarray,
    context: np.ndarray,
    *,
    control: str,
    order: np.ndarray,
    batch: np.ndarray | None = None,
    target: np.ndarray | None = None,
    source: np.ndarray | None = None,
) -> list[CellGroup]:
    """Match perturbed cells to the control cells of their own context, and of their own batch where it has any.

    Parameters
    ----------
    perturbation, context
        Label of each cell, (n_cells,).
    control
        Label of the unperturbed cells.
    order
        Names of the cells: groups and rows come sorted by it, so that the order of cells in a file changes nothing.
    batch
        Code of each cell's batch.
    target, source
        Masks: cells that may be predicted, and control cells that may be drawn (all by default). Control cells are
        targets too: the network learns that no perturbation changes nothing.
    """
    n = len(perturbation)
    target = np.ones(n, bool) if target is None else target
    source = (perturbation == control) & (np.ones(n, bool) if source is None else source)
    by_name = np.argsort(order, kind="stable")
    contexts = context[by_name]
    unmatched = 0
    groups = []
    for c in np.unique(context[target]):
        rows = by_name[contexts == c]
        pool = rows[source[rows]]
        if not len(pool):
            raise ValueError(
                f"context {str(c)!r} has no control cells ({control!r}) to start from. Drop it or add controls."
            )
        rows = rows[target[rows]]
        batches = np.zeros(len(rows), int) if batch is None else batch[rows]
        for b in np.unique(batches):
            in_batch = rows[batches == b]
            matched = pool if batch is None else pool[batch[pool] == b]
            if not len(matched):
                unmatched += len(in_batch)
                matched = pool
            names, code = np.unique(perturbation[in_batch], return_inverse=True)
            cuts = np.cumsum(np.bincount(code))[:-1]
            cells = np.split(in_batch[np.argsort(code, kind="stable")], cuts)  # each still sorted by name
            groups += [CellGroup(str(p), str(c), int(b), of_p, matched) for p, of_p in zip(names, cells, strict=True)]
    if unmatched:
        logger.warning("%d cells lie in batches without control cells; controls of their context stand in.", unmatched)
    return groups


def process_share() -> tuple[int, int]:
    """Rank and number of processes of the running distributed training; (0, 1) outside one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class CellSetSampler(Sampler[list[CellSet]]):
    """Batches of cell sets. One pass shows every target cell about once.

    Parameters
    ----------
    groups
        From :func:`cell_groups`.
    set_size, sets_per_batch
        Cells in a set; sets in a training step.
    seed
        Of all draws, together with the epoch.
    min_batches
        Passes are repeated within an epoch until it has so many steps: a screen of 2,000 cells would otherwise spend
        its time on the bookkeeping between epochs.
    fixed
        Draw the same sets every epoch (validation).
    rank, world_size
        Share of the batches for this process; as `torch.distributed` says by default.
    """

    def __init__(
        self,
        groups: Sequence[CellGroup],
        *,
        set_size: int,
        sets_per_batch: int,
        seed: int = 0,
        min_batches: int = 1,
        fixed: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.groups = list(groups)
        self.set_size, self.sets_per_batch = set_size, sets_per_batch
        self.seed, self.fixed, self.epoch = seed, fixed, 0
        self._share = None if rank is None or world_size is None else (rank, world_size)
        n_sets = sum(-(-len(g.perturbed) // set_size) for g in self.groups)
        self.n_passes = max(1, -(-min_batches * sets_per_batch // max(n_sets, 1)))
        self.n_batches = -(-n_sets * self.n_passes // sets_per_batch)

    def __len__(self) -> int:
        _, world_size = self._share or process_share()
        return self.n_batches // world_size

    def __iter__(self) -> Iterator[list[CellSet]]:
        rng = np.random.default_rng([self.seed, 0 if self.fixed else self.epoch])
        self.epoch += 1
        sets = [s for _ in range(self.n_passes) for s in self._one_pass(rng)]
        batches = [sets[i : i + self.sets_per_batch] for i in range(0, len(sets), self.sets_per_batch)]
        rank, world_size = self._share or process_share()
        yield from batches[rank : len(self) * world_size : world_size]

    def _one_pass(self, rng: np.random.Generator) -> list[CellSet]:
        s = self.set_size
        sets = []
        for g in self.groups:
            rows = rng.permutation(g.perturbed)
            short = -len(rows) % s
            rows = np.concatenate([rows, rng.choice(g.perturbed, short, replace=short > len(g.perturbed))])
            for i in range(0, len(rows), s):
                control = rng.choice(g.control, s, replace=len(g.control) < s)
                sets.append(CellSet(g.perturbation, g.context, g.batch, control, rows[i : i + s]))
        return [sets[i] for i in rng.permutation(len(sets))]


class Rows:
    """Rows of a cells x features matrix by index, as float32 tensors."""

    def __init__(self, matrix: sparse.csr_matrix | np.ndarray) -> None:
        if sparse.issparse(matrix) and matrix.shape[0] * matrix.shape[1] * 4 <= _DENSE_BYTES:
            matrix = matrix.toarray()
        self.matrix = matrix.astype(np.float32, copy=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and features."""
        return self.matrix.shape

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """Return the rows (any shape of index), features last."""
        taken = self.matrix[rows.ravel()]
        taken = taken.toarray() if sparse.issparse(taken) else taken
        return torch.from_numpy(taken).unflatten(0, rows.shape)


class CellSetDataset(Dataset):
    """A list of B cell sets becomes tensors.

    "control" (B, S, n_input), "perturbed" (B, S, n_output), "perturbation" (B, n_perturbation), "batch" (B,), and
    "genes" (B, S, n_genes) where the model decodes genes from an embedding. With a `prior`, a function of perturbation
    and context, "prior_scale" and "prior_shift" (B, n_output).
    """

    def __init__(
        self,
        cells: Rows,
        encode: Callable[[Sequence[str]], Tensor],
        genes: Rows | None = None,
        prior: Callable[[str, str], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        self.cells, self.encode, self.genes, self.prior = cells, encode, genes, prior

    def __getitem__(self, sets: list[CellSet]) -> dict[str, Tensor]:
        perturbed = np.stack([s.perturbed for s in sets])
        batch = {
            "control": self.cells[np.stack([s.control for s in sets])],
            "perturbed": self.cells[perturbed],
            "perturbation": self.encode([s.perturbation for s in sets]),
            "batch": torch.tensor([s.batch for s in sets]),
        }
        if self.genes is not None:
            batch["genes"] = self.genes[perturbed]
        if self.prior is not None:
            known = [self.prior(s.perturbation, s.context) for s in sets]
            scale, shift = (torch.from_numpy(np.stack(x)) for x in zip(*known, strict=True))
            batch |= {"prior_scale": scale, "prior_shift": shift}
        return batch
