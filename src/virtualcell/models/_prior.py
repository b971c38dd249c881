"""What is known of a perturbation before ST learns anything: closed forms of the shifts of the training cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from virtualcell.models._feature_shifts import ridge
from virtualcell.models._perturbations import PerturbationTable, known_parts
from virtualcell.models._shifts import ShiftTable, additive, similarity

# By how much (in correlation of control profiles) a context may be less similar before it counts 1/e; the largest is as
# good as the plain mean. Which one is chosen by leaving out each training context in turn.
BANDWIDTHS = (0.02, 0.05, 0.1, 0.2, 0.5, 10.0)
# Expression (log1p CP10k) below which a decrease is no longer told as a ratio, which would be noise over noise.
_FLOOR = 0.02

Kind = Literal["similar", "additive"]


@dataclass(frozen=True)
class ShiftPrior:
    """Predict a perturbation in a context as control * scale + shift, from the shifts of the training cells.

    "additive" is the additive baseline: scale 1 and its shift. "similar" averages the shifts that the perturbation had
    over contexts, weighted by exp(similarity / bandwidth) sqrt(n cells), where similarity is the correlation of mean
    control cells; where the context itself has other perturbations, its additive effect takes the place of that of the
    others. A mean that rises is shifted, one that falls is scaled, since a silent gene cannot fall. A
    perturbation that was never measured takes its shift from the ridge regression on features, where there are any.

    Parameters
    ----------
    kind
        "similar" or "additive".
    contexts, perturbations
        Sorted names of the training cells.
    row_context, row_perturbation, n_cells, shifts
        What was measured, as in :class:`virtualcell.models._shifts.ShiftTable`.
    controls
        Mean control cell of each context.
    bandwidth
        See `BANDWIDTHS`.
    context_effects, perturbation_effects
        The additive fit.
    coefficients, intercept
        The ridge regression, with no rows where there are no features.
    """

    kind: Kind
    contexts: list[str]
    perturbations: list[str]
    row_context: np.ndarray
    row_perturbation: np.ndarray
    n_cells: np.ndarray
    shifts: np.ndarray
    controls: np.ndarray
    bandwidth: float
    context_effects: np.ndarray
    perturbation_effects: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray

    @classmethod
    def fit(cls, table: ShiftTable, kind: Kind, features: PerturbationTable | None = None) -> Self:
        """Choose the bandwidth, fit the additive baseline, and the ridge regression where there are features."""
        fit = additive(table)
        n_genes = table.shifts.shape[1]
        coefficients, intercept = np.zeros((0, n_genes), np.float32), np.zeros(n_genes, np.float32)
        if features is not None:
            vectors = features.encode(table.perturbations).numpy()
            regression = ridge(vectors[:, :-1], fit.perturbation, vectors[:, -1])
            coefficients, intercept = regression.coefficients, regression.intercept
        return cls(
            kind=kind, contexts=table.contexts, perturbations=table.perturbations, row_context=table.context,
            row_perturbation=table.perturbation, n_cells=table.n_cells, shifts=table.shifts, controls=table.controls,
            bandwidth=_bandwidth(table), context_effects=fit.context, perturbation_effects=fit.perturbation,
            coefficients=coefficients, intercept=intercept,
        )  # fmt: skip

    def measured(self, perturbation: str, control: str) -> bool:
        """Whether the training cells hold a perturbation, or all parts of a combination."""
        return set(known_parts(perturbation, control, self.perturbations)) <= set(self.perturbations)

    def __call__(
        self,
        perturbation: str,
        *,
        control: str,
        context: str,
        base: np.ndarray,
        features: PerturbationTable | None = None,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return scale and shift, (n_genes,) each, where the mean control cell is `base`.

        `None` for a perturbation of which the training cells and the features say nothing.
        """
        scale, shift = np.ones_like(base), np.zeros_like(base)
        if perturbation == control:
            return scale, shift
        where = self.contexts.index(context) if context in self.contexts else -1
        if not self.measured(perturbation, control):
            if features is None or not len(self.coefficients):
                return None
            vector = features.encode([perturbation])[0].numpy()
            shift = vector[-1] * self.intercept + vector[:-1] @ self.coefficients
            if where >= 0:
                shift = shift + self.context_effects[where]
            level = base
        elif self.kind == "additive":
            rows = [self.perturbations.index(name) for name in known_parts(perturbation, control, self.perturbations)]
            shift = self.perturbation_effects[rows].sum(axis=0) + (self.context_effects[where] if where >= 0 else 0)
            return scale, shift.astype(np.float32)
        else:
            near = similarity(base[None], self.controls)[0]
            known = where >= 0 and (self.row_context == where).any()
            effects = known * self.context_effects
            level, shift = np.zeros_like(base), effects[where]
            names = known_parts(perturbation, control, self.perturbations)
            for name in names:
                rows = np.flatnonzero(self.row_perturbation == self.perturbations.index(name))
                there = self.row_context[rows]
                weights = _weights(near[there], self.n_cells[rows], self.bandwidth)
                shift = shift + weights @ (self.shifts[rows] - effects[there])
                level = level + weights @ self.controls[there] / len(names)
        if self.kind == "similar":
            falls = shift < 0
            scale[falls] = np.clip((level + shift + _FLOOR)[falls] / (level + _FLOOR)[falls], 0, 1)
            shift = np.where(falls, 0, shift)
        return scale, shift.astype(np.float32)


def _weights(near: np.ndarray, n_cells: np.ndarray, bandwidth: float) -> np.ndarray:
    weights = np.exp((near - near.max()) / bandwidth) * np.sqrt(n_cells)
    return (weights / weights.sum()).astype(np.float32)


def _bandwidth(table: ShiftTable, choices: Sequence[float] = BANDWIDTHS) -> float:
    """Choose the bandwidth with the smallest squared error of shifts predicted from the other contexts alone."""
    near = similarity(table.controls, table.controls)
    errors = np.zeros(len(choices))
    for p in range(len(table.perturbations)):
        rows = np.flatnonzero(table.perturbation == p)
        if len(rows) < 3:  # one other context is taken whatever the bandwidth
            continue
        for i in range(len(rows)):
            others = np.delete(rows, i)
            similar = near[table.context[rows[i]], table.context[others]]
            for k, bandwidth in enumerate(choices):
                predicted = _weights(similar, table.n_cells[others], bandwidth) @ table.shifts[others]
                errors[k] += np.square(predicted - table.shifts[rows[i]]).sum()
    return choices[int(np.argmin(errors))] if errors.any() else choices[-1]
