"""Baselines that a model has to beat, with its interface: every one of them adds one shift to the control cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scipy import sparse
from torch import Tensor, nn

from virtualcell._errors import unknown_name
from virtualcell.models._base import PerturbationModel
from virtualcell.models._perturbations import parts


class ShiftModel(PerturbationModel):
    """Control cells plus a shift of the mean; expression below zero is cut.

    Shifts are differences of mean log1p CP10k between perturbed and control cells, in each context by itself. Cells
    marked `test` take no part.
    """

    def __init__(self, adata: AnnData | MuData | None = None, *, registry: dict | None = None) -> None:
        super().__init__(adata, registry=registry)
        self.module = nn.Module()  # the shift of each row's perturbation, (n_perturbations, n_genes)
        self.module.register_buffer("shifts", torch.zeros(len(self.perturbations), len(self.genes)))
        self.module.register_buffer("n_contexts", torch.zeros(len(self.perturbations)))
        self._model_summary_string = f"{type(self).__name__} baseline, {len(self.genes)} genes."

    def _arguments(self) -> dict:
        return {}

    @property
    def device(self) -> torch.device:
        """Where the shifts are."""
        return self.module.shifts.device

    def train(self) -> None:
        """Average the shift of each perturbation over the contexts in which it was measured, each counting the same."""
        data = self._training_data()
        matrix, seen = self._expression(data), self._training_rows(data)
        perturbation, contexts = self._labels(data, "perturbation"), self._labels(data, "context")
        rows_of = pd.Series(perturbation).groupby([contexts, perturbation]).indices
        self.module.shifts.zero_()
        self.module.n_contexts.zero_()
        for c in np.unique(contexts[seen]):
            here = {p: rows[seen[rows]] for (context, p), rows in rows_of.items() if context == c}
            control = here.pop(self.control, np.array([], int))
            if not len(control):
                raise ValueError(f"context {c!r} has no control cells ({self.control!r}). Drop it or add controls.")
            base = _mean(matrix, control)
            for p, rows in here.items():
                if len(rows):
                    i = self.perturbations.index(p)
                    self.module.shifts[i] += _mean(matrix, rows) - base
                    self.module.n_contexts[i] += 1
        if not self.module.n_contexts.any():
            raise ValueError(f"the training cells hold no perturbation, only {self.control!r}.")
        self.module.shifts /= self.module.n_contexts.clamp_min(1).unsqueeze(1)
        self.is_trained_ = True

    def _shift(self, perturbation: str) -> Tensor:
        raise NotImplementedError

    def _known(self) -> list[str]:
        return [p for p, n in zip(self.perturbations, self.module.n_contexts, strict=True) if n > 0]

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that names the closest ones if this baseline has no shift for a perturbation."""
        self._shift(perturbation)

    def _predict_cells(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None
    ) -> np.ndarray:
        return np.maximum(cells + self._shift(perturbation).cpu().numpy(), 0)


class NoChange(ShiftModel):
    """Predict the control cells themselves."""

    def _shift(self, perturbation: str) -> Tensor:
        return torch.zeros(len(self.genes))


class PerturbationMean(ShiftModel):
    """Add the mean shift over all perturbations of the training data, whatever the perturbation (0 for the control)."""

    def _shift(self, perturbation: str) -> Tensor:
        if perturbation == self.control:
            return torch.zeros(len(self.genes))
        return self.module.shifts[self.module.n_contexts > 0].mean(dim=0)


class Additive(ShiftModel):
    """Add the mean shift that this perturbation had in the training contexts; a new pair `A+B` gets A's plus B's."""

    def _shift(self, perturbation: str) -> Tensor:
        known = self._known()
        measured = {frozenset(parts(p, self.control)): p for p in known}  # B+A is A+B
        names = parts(measured.get(frozenset(parts(perturbation, self.control)), perturbation), self.control, known)
        if unseen := [n for n in names if n not in known]:
            raise unknown_name("perturbation", unseen[0], known, "This baseline copies shifts it has seen.")
        shifts = [self.module.shifts[self.perturbations.index(n)] for n in names]
        return torch.stack(shifts).sum(dim=0) if shifts else torch.zeros(len(self.genes))


def _mean(matrix: sparse.csr_matrix, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(matrix[rows].mean(axis=0), dtype=np.float32).ravel())
