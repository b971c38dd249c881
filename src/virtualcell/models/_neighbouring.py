"""What CRISPRi does to its target, and to genes that start beside it.

A repressor sits on the promoter of the target and silences what starts within a few thousand base pairs, whatever the
model says of the rest. Expression is in shares of that of control cells, on the scale of counts per 10,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pandas as pd

from virtualcell.data._labels import parts

# Distances between starts, in base pairs, and the most expression that is kept at the first: 15 % within it, rising
# with the logarithm of the distance to all of it at the second.
NEAR, FAR = 500, 5_000
MOST_KEPT_NEAR = 0.15
# Counts per 10,000 in control cells below which the share that is kept cannot be told.
LEAST_EXPRESSION = 0.1


def share_kept(distance: np.ndarray) -> np.ndarray:
    """Return the most expression that a gene keeps whose start is so many base pairs from the target's.

    Parameters
    ----------
    distance
        Distances, of any shape; NaN where it is not known.

    Returns
    -------
    Shares of the expression of control cells; infinite, no limit, beyond 5 kb and where the distance is not known.
    """
    distance = np.abs(np.asarray(distance, dtype=np.float64))
    along = np.log(np.maximum(distance, NEAR) / NEAR) / np.log(FAR / NEAR)
    return np.where(distance <= FAR, MOST_KEPT_NEAR + (1 - MOST_KEPT_NEAR) * along, np.inf)


@dataclass(frozen=True, eq=False)
class Knockdown:
    """How much of their expression targets keep in the cells where they are the target.

    Parameters
    ----------
    targets
        Target of each measurement, (n,); one that was measured in several contexts is there as often.
    shares
        Share of the expression of control cells that it keeps, (n,).
    """

    targets: np.ndarray
    shares: np.ndarray

    @classmethod
    def measure(
        cls,
        effects: np.ndarray,
        bases: np.ndarray,
        perturbations: Sequence[str],
        genes: Sequence[str],
        *,
        control: str | None = None,
    ) -> Self:
        """Look up the targets in measured effects.

        Parameters
        ----------
        effects
            Changes of mean log(1 + counts per 10,000), (n_rows, n_genes).
        bases
            That mean in the control cells of each row, (n_rows, n_genes).
        perturbations
            Label of each row; a combination "A+B" is a row of either target.
        genes
            Names of the genes, as labels use them.
        control
            Label of control cells.
        """
        column = {gene: i for i, gene in enumerate(genes)}
        found = []
        for row, label in enumerate(perturbations):
            for target in parts(label, control, column):
                if (gene := column.get(target)) is None:
                    continue
                before, after = (
                    np.expm1(np.float64(x)) for x in (bases[row, gene], bases[row, gene] + effects[row, gene])
                )
                if before >= LEAST_EXPRESSION:
                    found.append((target, max(after, 0.0) / before))
        return cls(np.array([t for t, _ in found], dtype=object), np.array([s for _, s in found], dtype=np.float64))

    def of_others(self, target: str) -> float:
        """Return the median share over targets other than this one, at most 1; NaN where none was measured."""
        others = self.shares[self.targets != target]
        return float(min(np.median(others), 1.0)) if len(others) else float("nan")


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The genes of a model and where they start.

    Parameters
    ----------
    genes
        Names of the model's genes, as labels of perturbations use them, (n_genes,).
    positions
        What :func:`virtualcell.pp.gene_positions` returned. Genes that it lacks have no neighbours and are none.
    """

    genes: np.ndarray
    positions: pd.DataFrame
    _chromosome: np.ndarray = field(init=False, repr=False)
    _start: np.ndarray = field(init=False, repr=False)
    _column: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if missing := [c for c in ("chromosome", "start") if c not in self.positions]:
            raise ValueError(f"positions lacks {missing}: give what `vc.pp.gene_positions` returned.")
        if not self.positions.index.is_unique:
            twice = self.positions.index[self.positions.index.duplicated()][0]
            raise ValueError(f"positions has {twice!r} more than once: give what `vc.pp.gene_positions` returned.")
        genes = np.asarray(self.genes, dtype=object)
        here = self.positions[["chromosome", "start"]].reindex(genes)
        object.__setattr__(self, "genes", genes)
        object.__setattr__(self, "_chromosome", here["chromosome"].to_numpy(dtype=object))
        object.__setattr__(self, "_start", here["start"].to_numpy(dtype=np.float64))
        object.__setattr__(self, "_column", {gene: i for i, gene in enumerate(genes)})

    def distance(self, target: str) -> np.ndarray:
        """Return the distance of each gene's start from the target's in base pairs, (n_genes,).

        NaN on other chromosomes, where a position is not known, and for the target itself.
        """
        if target not in self.positions.index:
            return np.full(len(self.genes), np.nan)
        chromosome, start = self.positions.loc[target, ["chromosome", "start"]]
        beside = (self._chromosome == chromosome) & (self.genes != target)
        return np.where(beside, np.abs(self._start - float(start)), np.nan)

    def most_kept(self, target: str) -> np.ndarray:
        """Return the most expression that each gene keeps when `target` is silenced, (n_genes,); see `share_kept`."""
        return share_kept(self.distance(target))

    def capped(
        self,
        effect: np.ndarray,
        base: np.ndarray,
        perturbation: str,
        *,
        knockdown: Knockdown | None = None,
        control: str | None = None,
    ) -> np.ndarray:
        """Put a predicted effect below what the neighbours of its targets can keep.

        Parameters
        ----------
        effect
            Predicted change of mean log(1 + counts per 10,000), (n_genes,), or rows of such.
        base
            That mean in control cells, (n_genes,).
        perturbation
            Label; of a combination "A+B" the neighbours of every part are capped.
        knockdown
            What targets keep elsewhere, to which the targets themselves are set. Without it, and where no other target
            was measured, they stay as they are predicted, unless one is the neighbour of another.
        control
            Label of control cells, which has no target.

        Returns
        -------
        The effect; genes that are neither targets nor near one as they were.
        """
        effect, base = np.array(effect), np.asarray(base)
        targets = parts(perturbation, control, self._column)
        for target in targets:
            gene = self._column.get(target)
            share = float("nan") if knockdown is None else knockdown.of_others(target)
            if gene is not None and not np.isnan(share):
                effect[..., gene] = _change(base[gene], share)
        for target in targets:
            most = self.most_kept(target)
            near = np.flatnonzero(np.isfinite(most))
            effect[..., near] = np.minimum(effect[..., near], _change(base[near], most[near]))
        return effect


def _change(base: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Change of mean log(1 + counts per 10,000) that leaves a share of the counts."""
    return np.log1p(share * np.expm1(base)) - base
