"""The transferred effect: what a perturbation did in other contexts, carried over to the one that is asked about."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np
from scipy.stats import norm

from virtualcell.data._labels import Known
from virtualcell.models._axes import leading_axes, single_genes
from virtualcell.models._closed_forms import SimilarContexts, additive, similarity
from virtualcell.models._effects import Effects, group_sums, named_pairs
from virtualcell.models._features import PerturbationTable
from virtualcell.models._mixture import Question
from virtualcell.models._regression import FeatureFit, fit_features
from virtualcell.models._scale import as_ratios, change_of_mean, slope_of_mean
from virtualcell.models._shrinkage import shrink

logger = logging.getLogger(__name__)

_SAME, _LEAST_DISTANCE = 1e-3, 0.01  # 1 - correlation: of the same cells, and that contexts lie apart at least
_NEAREST = 1e-4  # distance that contexts count as having at least
_MOST_TRIED = 400  # perturbations that the amplitude is estimated from


@dataclass(frozen=True, eq=False)
class Transferred:
    """Predict the change of the mean that a perturbation makes in a context, from the effects in the training cells.

    A perturbation that was measured in the very context has the effect that was measured there, shrunken towards that
    in the other contexts (empirical Bayes). Elsewhere the effects that it had are averaged over contexts, weighted by
    sqrt(n cells) / (1 - r)^2, where r is the correlation of mean control cells; where the context has other
    perturbations, its additive effect takes the place of that of the others. The average is multiplied by `amplitude`,
    which is what such averages were worth for training contexts that were left out. A perturbation that was never
    measured takes its effect from features, where there are any.

    Effects are differences on the scale of :mod:`virtualcell.models._scale`. All of them are linear in the measured
    ones, and are kept in few numbers, see :mod:`virtualcell.models._axes`: `scores @ axes` are effects, up to those of
    single genes.

    Parameters
    ----------
    contexts, perturbations
        Sorted names of the training cells.
    amplitude, amplitude_unseen
        What effects of other contexts are multiplied by, and those that follow from features.
    n_neighbours
        How many perturbations with similar features are averaged.
    row_context, row_perturbation, n_cells
        What was measured, as in :class:`virtualcell.models._effects.Effects`, (n_rows,).
    scores
        Measured effects without that of the context, shrunken, (n_rows, n_axes).
    context_effects
        Context effects of the additive fit, shrunken, (n_contexts, n_genes).
    context_noise
        What was left of them by that: above all the noise of the control cells, which all effects of a context have in
        common, and predictions from the same control cells too.
    coefficients, intercept, neighbours, neighbour_scores
        Of :class:`virtualcell.models._regression.FeatureFit`, the effects as scores; empty where there are no features.
    axes
        Axes over genes, (n_axes, n_genes).
    single_start, single_gene, single_effect
        What single genes do beyond the axes: those of perturbation p are `single_start[p]` to `single_start[p + 1]`.
    controls
        Mean control cell of each context, (n_contexts, n_genes).
    error, error_elsewhere, error_unseen
        Error of a predicted change of the mean, typical of each gene, (n_genes,): of what was measured in the very
        context (posterior standard deviation), of what other contexts predicted for one that was left out (root mean
        square, without the noise of what they were compared with), and of what features predicted for perturbations
        left out.
    """

    contexts: list[str]
    perturbations: list[str]
    amplitude: float
    amplitude_unseen: float
    n_neighbours: int
    row_context: np.ndarray
    row_perturbation: np.ndarray
    n_cells: np.ndarray
    scores: np.ndarray
    context_effects: np.ndarray
    context_noise: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray
    neighbours: np.ndarray
    neighbour_scores: np.ndarray
    axes: np.ndarray
    single_start: np.ndarray
    single_gene: np.ndarray
    single_effect: np.ndarray
    controls: np.ndarray
    error: np.ndarray
    error_elsewhere: np.ndarray
    error_unseen: np.ndarray

    @classmethod
    def fit(cls, effects: Effects, features: PerturbationTable | None = None) -> Self:
        """Find out what effects are worth in other contexts, shrink what was measured, and fit what features tell.

        Parameters
        ----------
        effects
            What was measured.
        features
            Features of perturbations, which reach those that were not measured.
        """
        on_scale = as_ratios(effects)
        amplitude, error_elsewhere = worth_elsewhere(effects, on_scale)
        fit = additive(on_scale)
        of_context, noise = _effects_of_contexts(fit.context, on_scale)
        own = dataclasses.replace(on_scale, effects=on_scale.effects - fit.context[effects.context])
        measured = shrunken(own)
        axes = leading_axes(measured.effects, own.noise())
        scores = measured.effects @ axes.T
        start, gene, effect = single_genes(dataclasses.replace(measured, variance=own.variance), scores, axes)
        told = FeatureFit.none()
        if features is not None:
            vectors = features.encode(effects.perturbations).numpy()
            told = fit_features(vectors[:, :-1], fit.perturbation, vectors[:, -1]).on(axes)
        return cls(
            contexts=effects.contexts, perturbations=effects.perturbations, amplitude=amplitude,
            amplitude_unseen=told.amplitude,
            row_context=effects.context, row_perturbation=effects.perturbation, n_cells=effects.n_cells,
            scores=scores, context_effects=of_context, context_noise=noise, coefficients=told.coefficients,
            intercept=told.intercept, neighbours=told.features, neighbour_scores=told.effects,
            n_neighbours=told.k, axes=axes,
            single_start=start, single_gene=gene, single_effect=effect, controls=effects.controls,
            error=np.sqrt(measured.variance.mean(axis=0)) * slope_of_mean(effects.controls.mean(axis=0)),
            error_elsewhere=error_elsewhere,
            error_unseen=told.error * slope_of_mean(effects.controls.mean(axis=0)) if len(told.error) else told.error,
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
    def _lookups(self) -> dict[str, Known]:
        return {}

    def lookup(self, control: str) -> Known:
        """Return the measured perturbations, in which others are looked up."""
        if control not in self._lookups:
            self._lookups[control] = Known(self.perturbations, control)
        return self._lookups[control]

    @cached_property
    def _similar(self) -> SimilarContexts:
        return SimilarContexts(self.controls)

    @cached_property
    def _own(self) -> dict[tuple[int, int], int]:
        """Row of each context and perturbation."""
        return {pair: i for i, pair in enumerate(zip(self.row_context, self.row_perturbation, strict=True))}

    @cached_property
    def _with_effects(self) -> np.ndarray:
        """Mask of the contexts in which perturbations were measured."""
        return np.isin(np.arange(len(self.contexts)), self.row_context)

    @cached_property
    def _furthest(self) -> float:
        """How far the most outlying training context lies from the one that is most similar to it."""
        there = self._with_effects
        near = similarity(self.controls[there], self.controls[there])
        np.fill_diagonal(near, -1)
        return float(1 - near.max(axis=1).min())

    def pairs(self) -> list[tuple[str, str]]:
        """Names of the contexts and perturbations that were measured."""
        return named_pairs(self.contexts, self.perturbations, self.row_context, self.row_perturbation)

    def question(self, perturbation: str, context: str, *, control: str) -> Question:
        """Return what is asked: "cells" of a measured pair, new "contexts", or new "perturbations" and combinations."""
        known = self.lookup(control)
        names = known.parts(perturbation)  # B+A was measured where A+B was
        if len(names) != 1 or names[0] not in known:
            return "perturbations"
        return "cells" if (self._where(context), known.code[names[0]]) in self._own else "contexts"

    def error_of(self, perturbation: str, context: str, *, control: str) -> np.ndarray:
        """Return the error that the change of each gene's mean is expected to have, (n_genes,)."""
        question = self.question(perturbation, context, control=control)
        by_question = {"cells": self.error, "contexts": self.error_elsewhere, "perturbations": self.error_unseen}
        return by_question[question] if len(by_question[question]) else self.error_elsewhere

    @cached_property
    def _spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Second moments of the scores of measured effects, (n_axes, n_axes), and each gene's typical effect."""
        moments = self.scores.T.astype(np.float64) @ self.scores / max(len(self.scores), 1)
        return moments, np.sqrt(np.maximum(np.einsum("ag,ab,bg->g", self.axes, moments, self.axes, optimize=True), 0))

    def error_along(self, direction: np.ndarray, perturbation: str, context: str, *, control: str) -> float:
        """Return the error of a weighted sum of the changes of genes' means, with weights (n_genes,).

        Errors of single genes are those of :meth:`error_of`. How they go together is not known; what goes together in
        measured effects, over contexts and perturbations, is taken to go together in the errors.
        """
        moments, typical = self._spread
        weighed = direction * self.error_of(perturbation, context, control=control)
        moved = typical > 0
        scores = self.axes[:, moved].astype(np.float64) @ (weighed[moved] / typical[moved])
        return float(np.sqrt(scores @ moments @ scores + np.square(weighed[~moved]).sum()))

    def extrapolation(self, base: np.ndarray, context: str) -> float:
        """Return how far control cells lie from the most similar training context, 1 - correlation of means.

        In units of the largest such distance that a training context has from the others: above 1 is outside of what
        was seen. Cells of a context in which perturbations were measured are compared with those seen there; NaN for
        other contexts of a model that saw a single one, which has no measure of distance.
        """
        where, near = self._where(context), self._similar(base)
        known = where >= 0 and self._with_effects[where]
        off = max(1 - float(near[where] if known else near[self._with_effects].max()), 0.0)
        if off < _SAME:
            return 0.0
        return off / max(self._furthest, _LEAST_DISTANCE) if self._with_effects.sum() > 1 else np.nan

    def __call__(
        self,
        perturbation: str,
        *,
        control: str,
        context: str,
        base: np.ndarray,
        features: PerturbationTable | None = None,
    ) -> np.ndarray | None:
        """Return the change of the mean, (n_genes,); `None` for what the training cells and the features do not tell.

        Parameters
        ----------
        perturbation, control
            What to predict, and the label of control cells, which change by 0.
        context
            Where to predict it; a name that the training cells do not hold is a new context.
        base
            Mean control cell there, (n_genes,).
        features
            The features that were fitted with.
        """
        known = self.lookup(control)
        names = known.parts(perturbation)
        if not names:
            return np.zeros_like(base)
        where = self._where(context)
        if all(name in known for name in names):
            effect = self._of_measured([known.code[name] for name in names], where, base)
        elif features is None or not len(self.intercept):
            return None
        else:
            vectors = features.encode(features.parts(perturbation)).numpy()[:, :-1]
            scores = self._told.effect(vectors).sum(axis=0)
            effect = self.amplitude_unseen * (scores @ self.axes) + self._of_context(where, base)
        return change_of_mean(base, effect).astype(np.float32)

    @cached_property
    def _told(self) -> FeatureFit:
        return FeatureFit(self.coefficients, self.intercept, self.neighbours, self.neighbour_scores, self.n_neighbours)

    def _where(self, context: str) -> int:
        return self.contexts.index(context) if context in self.contexts else -1

    def _of_context(self, where: int, base: np.ndarray) -> np.ndarray | float:
        """Return what the context does to any perturbation, and the noise of its control cells if it starts there."""
        if where < 0 or not self._with_effects[where]:
            return 0.0
        same = np.allclose(base, self.controls[where], rtol=1e-3, atol=1e-4)
        return self.context_effects[where] + same * self.context_noise[where]

    def _of_measured(self, codes: list[int], where: int, base: np.ndarray) -> np.ndarray:
        """Sum of the effects of perturbations."""
        near = self._similar(base)
        effect = np.zeros_like(base) + self._of_context(where, base)
        for code in codes:
            rows = np.flatnonzero(self.row_perturbation == code)
            if (where, code) in self._own:
                scores, amplitude = self.scores[self._own[where, code]], 1.0
            else:
                there = self.row_context[rows]
                weights = _weights(near[there], self.n_cells[rows])
                scores, amplitude = weights @ self.scores[rows], self.amplitude
            own = slice(self.single_start[code], self.single_start[code + 1])
            of_this = scores @ self.axes
            of_this[self.single_gene[own]] += self.single_effect[own]
            effect = effect + amplitude * of_this
        return effect


def _effects_of_contexts(found: np.ndarray, effects: Effects) -> tuple[np.ndarray, np.ndarray]:
    """Shrink context effects, and return them and what was taken off.

    Their error is above all that of the mean control cell, at most the least error of an effect in the context.
    """
    there = np.unique(effects.context)
    error = np.stack([effects.variance[effects.context == c].min(axis=0) for c in there])
    kept = np.zeros_like(found)
    kept[there] = shrink(found[there], error).mean
    return kept, found - kept


def shrunken(effects: Effects) -> Effects:
    """Shrink measured effects: the mean of each perturbation towards zero, its contexts towards that mean.

    How far follows from the errors, see :func:`virtualcell.models._shrinkage.shrink`. An effect that was measured well
    and differs from that in other contexts stays as it is; one of few cells becomes the mean of the others, and the
    mean of noise becomes nothing. The variance of what is returned is the posterior one.
    """
    n = len(effects.perturbations)
    sizes = np.sqrt(effects.n_cells).astype(np.float32)
    weights = sizes / np.bincount(effects.perturbation, sizes, n).astype(np.float32)[effects.perturbation]
    means = group_sums(weights[:, None] * effects.effects, effects.perturbation, n)
    errors = group_sums(weights[:, None] ** 2 * effects.variance, effects.perturbation, n)
    out, uncertain = (part[effects.perturbation] for part in shrink(means, errors))
    several = np.flatnonzero(np.bincount(effects.perturbation, minlength=n)[effects.perturbation] > 1)
    deviation = effects.effects[several] - means[effects.perturbation[several]]
    # the mean has a part of this effect's own error
    variance = effects.variance[several] * (1 - 2 * weights[several, None]) + errors[effects.perturbation[several]]
    of_deviation = shrink(deviation, np.maximum(variance, 0))
    out[several] += of_deviation.mean
    uncertain[several] += of_deviation.variance
    return dataclasses.replace(effects, effects=out, variance=uncertain)


def _weights(near: np.ndarray, n_cells: np.ndarray) -> np.ndarray:
    """Weights of contexts that are so similar, summing to 1 along the last axis.

    With the inverse square of the distance nothing has to be chosen, which few contexts choose badly: over four data
    sets it was as good as the best bandwidth of an exponential, and better than one that was chosen by leaving out.
    """
    weights = np.sqrt(n_cells) / np.maximum(1 - near, _NEAREST) ** 2
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def worth_elsewhere(effects: Effects, on_scale: Effects) -> tuple[float, np.ndarray]:
    """Return what effects of other contexts have to be multiplied by, between 0 and 1, and the error that is left.

    That is the least-squares slope of observed changes of the mean on those predicted from the other contexts, over all
    contexts and at most 400 perturbations. Where no perturbation was measured in two contexts it is 1, and the error
    that of a measured effect. The error is one for each gene, (n_genes,).
    """
    near = similarity(effects.controls, effects.controls)
    np.fill_diagonal(near, -np.inf)  # a context does not predict itself
    order = np.argsort(effects.perturbation, kind="stable")
    n_rows = np.bincount(effects.perturbation, minlength=len(effects.perturbations))
    several = [rows for rows in np.split(order, np.cumsum(n_rows)[:-1]) if len(rows) > 1]
    products, squares, observed, noise = np.zeros((4, effects.effects.shape[1]))
    n = 0
    for i in np.unique(np.linspace(0, len(several) - 1, min(len(several), _MOST_TRIED)).astype(int)):
        rows = several[i]
        there = effects.context[rows]
        weights = _weights(near[np.ix_(there, there)], effects.n_cells[rows])
        carried = shrink(weights @ on_scale.effects[rows], weights**2 @ on_scale.variance[rows]).mean
        predicted = change_of_mean(effects.controls[there], carried)
        products += (predicted * effects.effects[rows]).sum(axis=0)
        squares += (predicted**2).sum(axis=0)
        observed += (effects.effects[rows] ** 2).sum(axis=0)
        noise += effects.variance[rows].sum(axis=0)
        n += len(rows)
    if not several:
        logger.info("No perturbation was measured in two contexts: a new one is given what was measured elsewhere.")
        return 1.0, np.sqrt(np.median(effects.variance, axis=0))
    worth = float(np.clip(products.sum() / max(squares.sum(), 1e-30), 0, 1))
    logger.info("Effects of other contexts are transferred times %.2f, their worth for contexts left out.", worth)
    residual = (observed - 2 * worth * products + worth**2 * squares) / n
    error = np.maximum(residual, noise / n) * np.sqrt(2 / n)
    return worth, np.sqrt(_not_negative(residual - noise / n, error)).astype(np.float32)


def _not_negative(estimate: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the mean of variances of which is known that they are not negative, given normal estimates of them.

    Of few rows an estimate is often below 0, and no variance at all would be claimed to be known for certain.
    """
    known = error > 0
    at = np.clip(estimate[known] / error[known], -30, None)
    out = np.maximum(estimate, 0)
    out[known] = error[known] * (at + np.exp(norm.logpdf(at) - norm.logcdf(at)))
    return out
