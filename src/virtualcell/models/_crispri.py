"""What CRISPRi does whatever a model says: its target is silenced, and what starts beside it falls too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd

from virtualcell._errors import unknown_name
from virtualcell.models._effects import Effects
from virtualcell.models._neighbouring import Knockdown, Neighbours

MODALITIES = ("CRISPRi",)


@dataclass(frozen=True, eq=False)
class CRISPRi:
    """Where genes start, and what is left of targets.

    Parameters
    ----------
    neighbours
        The genes of a model and their positions.
    knockdown
        How much of their expression targets keep.
    control
        Label of control cells.
    """

    neighbours: Neighbours
    knockdown: Knockdown
    control: str

    @classmethod
    def measure(cls, effects: Effects, genes: Sequence[str], positions: pd.DataFrame | None, control: str) -> Self:
        """Look up how much targets keep in measured effects; without `positions` no gene has neighbours.

        Parameters
        ----------
        effects
            Measured effects.
        genes
            Names of their genes, as labels of perturbations use them.
        positions
            What :func:`virtualcell.pp.gene_positions` returned.
        control
            Label of control cells.
        """
        labels = [perturbation for _, perturbation in effects.pairs()]
        bases = effects.controls[effects.context]
        knockdown = Knockdown.measure(effects.effects, bases, labels, genes, control=control)
        if positions is None:
            positions = pd.DataFrame({"chromosome": [], "start": []}, index=pd.Index([], dtype=str))
        return cls(Neighbours(np.asarray(genes), positions), knockdown, control)

    def put_on(
        self,
        predicted: np.ndarray,
        base: np.ndarray,
        perturbation: str,
        *,
        measured: bool,
        mean: np.ndarray | None = None,
    ) -> np.ndarray:
        """Lower predicted cells (n_cells, n_genes) of a perturbation where CRISPRi does; `base` is the control mean.

        The target of a pair that was `measured` stays as it was measured. Of rows that are no cells, (..., n_genes),
        `mean` is what they stand for.
        """
        mean = predicted.mean(axis=0, dtype=np.float64) if mean is None else mean
        capped = base + self.neighbours.capped(
            mean - base, base, perturbation, knockdown=None if measured else self.knockdown, control=self.control
        )
        moved = np.abs(capped - mean) > 1e-6 * np.maximum(mean, 1)
        if not moved.any():
            return predicted
        out = predicted.copy()
        out[..., moved] *= capped[moved] / np.maximum(mean[moved], 1e-12)
        return out

    def to_plain(self) -> dict:
        """Return what JSON can hold."""
        here = self.neighbours.positions[["chromosome", "start"]]
        return {
            "genes": self.neighbours.genes.tolist(),
            "positions": [here.index.tolist(), here["chromosome"].astype(str).tolist(), here["start"].tolist()],
            "targets": self.knockdown.targets.tolist(),
            "shares": self.knockdown.shares.tolist(),
            "control": self.control,
        }

    @classmethod
    def from_plain(cls, plain: dict) -> Self:
        """Take back what :meth:`to_plain` returned."""
        names, chromosome, start = plain["positions"]
        positions = pd.DataFrame({"chromosome": chromosome, "start": start}, index=pd.Index(names, dtype=str))
        knockdown = Knockdown(np.array(plain["targets"], dtype=object), np.array(plain["shares"], dtype=np.float64))
        return cls(Neighbours(np.array(plain["genes"]), positions), knockdown, plain["control"])


def check_modality(modality: str | None) -> None:
    """Raise for a kind of perturbation of which nothing is known beforehand."""
    if modality is not None and modality not in MODALITIES:
        raise unknown_name(
            "modality_of_perturbation", modality, MODALITIES, "Leave it out for knockouts, activation and drugs."
        )
