"""The transferred effect: what a perturbation did in other contexts, carried over to the one that is asked about."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np

from virtualcell.data._labels import known_parts
from virtualcell.models._axes import leading_axes, single_genes
from virtualcell.models._closed_forms import SimilarContexts, additive, similarity
from virtualcell.models._effects import Effects
from virtualcell.models._features import PerturbationTable
from virtualcell.models._regression import ridge

logger = logging.getLogger(__name__)

# By how much (in correlation of control profiles) a context may be less similar before it counts 1/e; the largest is as
# good as the plain mean. Which one is chosen by leaving out each training context in turn.
BANDWIDTHS = (0.02, 0.05, 0.1, 0.2, 0.5, 10.0)
# Expression (log1p CP10k) below which a decrease is no longer told as a ratio, which would be noise over noise.
_FLOOR = 0.02


@dataclass(frozen=True, eq=False)
class Transferred:
    """Predict a perturbation in a context as control * scale + shift, from the effects in the training cells.

    The effects that the perturbation had are averaged over contexts, weighted by exp(similarity / bandwidth)
    sqrt(n cells), where similarity is the correlation of mean control cells; where the context itself has other
    perturbations, its additive effect takes the place of that of the others. A mean that rises is shifted, one that
    falls is scaled, since a silent gene cannot fall. A perturbation that was never measured takes its effect from the
    ridge regression on features, where there are any.

    All of these are linear in the measured effects, and are kept in few numbers, see
    :mod:`virtualcell.models._axes`: `scores @ axes` are effects, up to those of single genes.

    Parameters
    ----------
    contexts, perturbations
        Sorted names of the training cells.
    bandwidth
        By how much less similar a context counts 1/e, one of `BANDWIDTHS`.
    row_context, row_perturbation, n_cells
        What was measured, as in :class:`virtualcell.models._effects.Effects`, (n_rows,).
    scores
        Measured effects, (n_rows, n_axes).
    context_scores
        Context effects of the additive fit, (n_contexts, n_axes).
    coefficients, intercept
        The ridge regression, (n_features, n_axes) and (n_axes,); no coefficients where there are no features.
    axes
        Axes over genes, (n_axes, n_genes).
    single_start, single_gene, single_effect
        What single genes do beyond the axes: those of perturbation p are `single_start[p]` to `single_start[p + 1]`.
    controls
        Mean control cell of each context, (n_contexts, n_genes).
    """

    contexts: list[str]
    perturbations: list[str]
    bandwidth: float
    row_context: np.ndarray
    row_perturbation: np.ndarray
    n_cells: np.ndarray
    scores: np.ndarray
    context_scores: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray
    axes: np.ndarray
    single_start: np.ndarray
    single_gene: np.ndarray
    single_effect: np.ndarray
    controls: np.ndarray

    @classmethod
    def fit(cls, effects: Effects, features: PerturbationTable | None = None) -> Self:
        """Choose the bandwidth, fit context effects, and the ridge regression where there are features.

        Parameters
        ----------
        effects
            What was measured.
        features
            Features of perturbations, which reach those that were not measured.
        """
        fit = additive(effects)
        axes = leading_axes(effects.effects, effects.noise())
        scores = effects.effects @ axes.T
        start, gene, effect = single_genes(effects, scores, axes)
        coefficients, intercept = np.zeros((0, len(axes)), np.float32), np.zeros(len(axes), np.float32)
        if features is not None:
            vectors = features.encode(effects.perturbations).numpy()
            regression = ridge(vectors[:, :-1], fit.perturbation, vectors[:, -1])
            coefficients, intercept = regression.coefficients @ axes.T, axes @ regression.intercept
        bandwidth = choose_bandwidth(effects)
        if len(np.unique(effects.context)) == 1:
            logger.info("Effects were measured in one context, and every other is given the same.")
        elif bandwidth < BANDWIDTHS[-1]:
            logger.info(
                "Effects are transferred from contexts with similar control cells: an effect counts %.2f times as much "
                "where the correlation is lower by %g than in the most similar context.",
                *(1 / np.e, bandwidth),
            )
        else:
            logger.info("Effects are transferred from all other contexts alike, however similar their control cells.")
        return cls(
            contexts=effects.contexts, perturbations=effects.perturbations, bandwidth=bandwidth,
            row_context=effects.context, row_perturbation=effects.perturbation, n_cells=effects.n_cells,
            scores=scores, context_scores=fit.context @ axes.T, coefficients=coefficients, intercept=intercept,
            axes=axes, single_start=start, single_gene=gene, single_effect=effect, controls=effects.controls,
        )  # fmt: skip

    # -- in files -----------------------------------------------------------------------------------------------------

    def to_arrays(self) -> tuple[dict, dict[str, np.ndarray]]:
        """Return what JSON can hold, and the arrays, each by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
        return {k: v for k, v in values.items() if k not in arrays}, arrays

    @classmethod
    def from_arrays(cls, plain: dict, arrays: dict[str, np.ndarray]) -> Self:
        """Take back what :meth:`to_arrays` returned."""
        return cls(**plain, **arrays)

    # -- prediction ---------------------------------------------------------------------------------------------------

    @cached_property
    def _code(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.perturbations)}

    @cached_property
    def _similar(self) -> SimilarContexts:
        return SimilarContexts(self.controls)

    def measured(self, perturbation: str, control: str) -> bool:
        """Whether the training cells hold a perturbation, or all parts of a combination."""
        return all(name in self._code for name in known_parts(perturbation, control, self._code))

    def __call__(
        self,
        perturbation: str,
        *,
        control: str,
        context: str,
        base: np.ndarray,
        features: PerturbationTable | None = None,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return scale and shift, (n_genes,) each; `None` for what the training cells and the features do not tell.

        Parameters
        ----------
        perturbation, control
            What to predict, and the label of control cells, of which scale 1 and shift 0 are returned.
        context
            Where to predict it; a name that the training cells do not hold is a new context.
        base
            Mean control cell there, (n_genes,).
        features
            The features that the regression was fitted with.
        """
        names = known_parts(perturbation, control, self._code)
        if not names:
            return np.ones_like(base), np.zeros_like(base)
        where = self.contexts.index(context) if context in self.contexts else -1
        if all(name in self._code for name in names):
            return _scale_and_shift(*self._of_measured([self._code[name] for name in names], where, base))
        if features is None or not len(self.coefficients):
            return None
        vector = features.encode([perturbation])[0].numpy()
        scores = vector[-1] * self.intercept + vector[:-1] @ self.coefficients
        if where >= 0:
            scores = scores + self.context_scores[where]
        return _scale_and_shift(scores @ self.axes, base)

    def _of_measured(self, codes: list[int], where: int, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the effects of perturbations, and the mean control cell of where they were measured."""
        near = self._similar(base)
        known = where >= 0 and (self.row_context == where).any()
        scores = known * self.context_scores[where]
        level = np.zeros_like(base)
        for code in codes:
            rows = np.flatnonzero(self.row_perturbation == code)
            there = self.row_context[rows]
            weights = _weights(near[there], self.n_cells[rows], self.bandwidth)
            scores = scores + weights @ (self.scores[rows] - known * self.context_scores[there])
            level = level + weights @ self.controls[there] / len(codes)
        effect = scores @ self.axes
        for code in codes:
            own = slice(self.single_start[code], self.single_start[code + 1])
            effect[self.single_gene[own]] += self.single_effect[own]
        return effect, level


def _scale_and_shift(effect: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn an effect at a level of expression into a shift where it rises, and a factor where it falls."""
    scale, falls = np.ones_like(effect), effect < 0
    scale[falls] = np.clip((level + effect + _FLOOR)[falls] / (level + _FLOOR)[falls], 0, 1)
    return scale, np.where(falls, 0, effect).astype(np.float32)


def _weights(near: np.ndarray, n_cells: np.ndarray, bandwidth: float) -> np.ndarray:
    """Weights of contexts that are so similar, summing to 1 along the last axis."""
    weights = np.exp((near - near.max(axis=-1, keepdims=True)) / bandwidth) * np.sqrt(n_cells)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def choose_bandwidth(effects: Effects, choices: Sequence[float] = BANDWIDTHS) -> float:
    r"""Choose the bandwidth with the smallest squared error of effects predicted from the other contexts alone.

    With the effects E of one perturbation, (n_contexts, n_genes), and weights W of each context's others, the squared
    error is :math:`\|(W - 1) E\|^2 = \mathrm{tr}\,(W - 1) E E^T (W - 1)^T`: genes are summed over once, in the product
    of the effects with themselves, whatever the number of choices.
    """
    near = similarity(effects.controls, effects.controls)
    np.fill_diagonal(near, -np.inf)  # a context does not predict itself
    errors = np.zeros(len(choices))
    by_perturbation = np.argsort(effects.perturbation, kind="stable")
    n_rows = np.bincount(effects.perturbation, minlength=len(effects.perturbations))
    for rows in np.split(by_perturbation, np.cumsum(n_rows)[:-1]):
        if len(rows) < 3:  # one other context is taken whatever the bandwidth
            continue
        there = effects.context[rows]
        measured = effects.effects[rows].astype(np.float64)
        products = measured @ measured.T
        for k, bandwidth in enumerate(choices):
            off = _weights(near[np.ix_(there, there)], effects.n_cells[rows], bandwidth) - np.eye(len(rows))
            errors[k] += ((off @ products) * off).sum()
    return choices[int(np.argmin(errors))] if errors.any() else choices[-1]
