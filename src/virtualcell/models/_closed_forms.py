"""Effects in closed form: context + perturbation, and copied from the most similar context. Pure numpy, no AnnData."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from virtualcell.models._axes import leading_axes
from virtualcell.models._effects import Effects, group_means, group_sums, sum_of_squares

_MOST_KEPT = 64  # control means of which similarities are kept

# -- context + perturbation -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AdditiveFit:
    """`effect[c, p] = context[c] + perturbation[p]`; the context effects are 0 on average, and 0 for a new context.

    Parameters
    ----------
    context, perturbation
        The two parts, (n_contexts, n_genes) and (n_perturbations, n_genes).
    shrinkage
        Ridge penalty of the context effects, in measured perturbations: a context with n of them keeps about
        n / (n + shrinkage) of its own deviation; infinite where there is no sign that contexts differ.
    """

    context: np.ndarray
    perturbation: np.ndarray
    shrinkage: float

    def effect(self, perturbations: Sequence[int], context: int = -1) -> np.ndarray:
        """Return the effect, (n_genes,), of perturbations applied together; `context=-1` is a new one."""
        effect = self.perturbation[list(perturbations)].sum(axis=0)
        return effect if context < 0 or not len(perturbations) else effect + self.context[context]


def additive(effects: Effects) -> AdditiveFit:
    r"""Fit what alternating least squares with shrunken context effects converges to, in closed form.

    .. math:: \min_{a, b} \sum_{(c, p)\ \mathrm{measured}} \|y_{cp} - a_c - b_p\|^2 + \lambda \sum_c \|a_c\|^2

    Contexts count the same whatever their number of cells. Where all have the same perturbations, the mean over
    contexts is what b comes to. The penalty is the ratio of two variances, of residuals and of context effects, summed
    over genes and estimated by fitting constants (Henderson's third method), with no search.
    """
    n_contexts, n_perturbations = len(effects.contexts), len(effects.perturbations)
    weights, vectors = np.linalg.eigh(_context_design(effects)[0])
    means = effects.perturbation_means()
    # what perturbations leave over, summed by context
    left = group_sums(effects.effects, effects.context, n_contexts) - _measured(effects) @ means
    estimable = weights > 1e-9
    rotated = vectors.T @ left.astype(np.float64)
    explained = float((rotated[estimable] ** 2 / weights[estimable, None]).sum())
    n_per = np.bincount(effects.perturbation, minlength=n_perturbations)
    within = sum_of_squares(effects.effects) - float((n_per[:, None] * means.astype(np.float64) ** 2).sum())
    freedom = len(effects.effects) - n_perturbations - estimable.sum()
    shrinkage = np.inf
    if freedom > 0 and estimable.any():
        residual = max(within - explained, 0) / freedom
        between = (explained - estimable.sum() * residual) / weights.sum()
        shrinkage = residual / between if between > 0 else np.inf
    keep = np.where(estimable, 1 / (np.maximum(weights, 1e-9) + shrinkage), 0)
    of_context = ((vectors * keep) @ rotated).astype(np.float32)
    own = group_means(of_context[effects.context], effects.perturbation, n_perturbations)
    return AdditiveFit(of_context, means - own, float(shrinkage))


def additive_leave_one_out(effects: Effects, fit: AdditiveFit) -> np.ndarray:
    """Return what the fit would be for each row had it not been measured, (n_rows, n_genes), the penalty kept.

    Exact, from the leverages of the linear fit. NaN where the perturbation was measured in no other context.
    """
    free = (1 - _leverage(effects, fit)).astype(np.float32)
    free[free < 1e-5] = np.nan
    return effects.effects - _residual(effects, fit) / free[:, None]


def _residual(effects: Effects, fit: AdditiveFit) -> np.ndarray:
    return effects.effects - fit.context[effects.context] - fit.perturbation[effects.perturbation]


def _leverage(effects: Effects, fit: AdditiveFit) -> np.ndarray:
    """How much each row's fitted value depends on the row itself, (n_rows,); 1 for wholly."""
    n = np.bincount(effects.perturbation, minlength=len(effects.perturbations))[effects.perturbation]
    if not np.isfinite(fit.shrinkage):
        return 1 / n
    design, share = _context_design(effects)
    row = -share[:, effects.perturbation].T
    row[np.arange(len(row)), effects.context] += 1
    inverse = np.linalg.pinv(design + fit.shrinkage * np.eye(len(design)))
    return 1 / n + ((row @ inverse) * row).sum(axis=1)


def _measured(effects: Effects) -> np.ndarray:
    return (effects.rows() >= 0).astype(np.float32)


def _context_design(effects: Effects) -> tuple[np.ndarray, np.ndarray]:
    """Return the normal equations of context effects, given perturbations, and the share of contexts in those."""
    measured = _measured(effects).astype(np.float64)
    share = measured / measured.sum(axis=0)
    return np.diag(measured.sum(axis=1)) - measured @ share.T, share


# -- the most similar context -----------------------------------------------------------------------------------------


class SimilarContexts:
    """How similar a cell population is to each of several contexts, by the correlation of mean control cells.

    What was asked for last is kept: predictions of many perturbations start from the same few means.

    Parameters
    ----------
    controls
        Mean control cell of each context, (n_contexts, n_genes).
    """

    def __init__(self, controls: np.ndarray) -> None:
        self._unit = unit_rows(_centred(controls))
        self._kept: dict[bytes, np.ndarray] = {}

    def __call__(self, base: np.ndarray) -> np.ndarray:
        """Return the correlations, (n_contexts,), with a mean control cell, (n_genes,)."""
        key = base.tobytes()
        near = self._kept.get(key)
        if near is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            near = self._kept[key] = (unit_rows(_centred(base[None])) @ self._unit.T)[0]
        return near


@dataclass(frozen=True, eq=False)
class NearestContextFit:
    """The additive fit, and how far the deviation from it is copied from the most similar context.

    Parameters
    ----------
    context_effects, perturbation_effects
        The additive fit.
    row_context, row_perturbation
        What was measured, as in :class:`virtualcell.models._effects.Effects`, (n_rows,).
    scores, axes
        What the additive fit leaves of the measured effects, `scores @ axes`; (n_rows, n_axes) and (n_axes, n_genes).
    controls
        Mean control cell of each context, (n_contexts, n_genes).
    reliability
        Weight of each measured effect for its own context, (n_rows,).
    transfer
        Weights of another context's deviation, (2,): for a context with no perturbation measured, and for others.
    """

    context_effects: np.ndarray
    perturbation_effects: np.ndarray
    row_context: np.ndarray
    row_perturbation: np.ndarray
    scores: np.ndarray
    axes: np.ndarray
    controls: np.ndarray
    reliability: np.ndarray
    transfer: np.ndarray

    @cached_property
    def similar(self) -> SimilarContexts:
        """Similarity of a mean control cell to the contexts."""
        return SimilarContexts(self.controls)

    def effect(self, perturbations: Sequence[int], base: np.ndarray, context: int = -1) -> np.ndarray:
        """Return the effect, (n_genes,), where the mean control cell is `base`; `context=-1` is a new one."""
        nearest = np.argsort(-self.similar(base), kind="stable")
        known = int(context >= 0 and (self.row_context == context).any())
        effect = known * self.context_effects[context] if len(perturbations) else 0 * base
        for p in perturbations:
            rows = np.flatnonzero(self.row_perturbation == p)
            own = rows[self.row_context[rows] == context]
            if len(own):
                row, weight = own[0], self.reliability[own[0]]
            else:
                row, weight = rows[np.argmin(np.argsort(nearest)[self.row_context[rows]])], self.transfer[known]
            deviation = self.scores[row] @ self.axes
            if not known:  # then what all effects of the other context have in common is copied too
                deviation = deviation + self.context_effects[self.row_context[row]]
            effect = effect + self.perturbation_effects[p] + weight * deviation
        return effect


def nearest_context(effects: Effects) -> NearestContextFit:
    r"""Copy deviations from the additive fit from the context with the most similar control cells, shrunken.

    Where the perturbation was measured in the context itself, its deviation counts by its reliability
    :math:`\tau^2 / (\tau^2 + s^2)`, of the variance between contexts and the squared standard error (empirical Bayes).
    Elsewhere it is copied from the most similar context (correlation of mean control cells) with it, times the
    least-squares slope, between 0 and 1, of one on the other over the measured pairs, each left out in turn.
    """
    fit = additive(effects)
    residual = _residual(effects, fit)
    noise = effects.variance.mean(axis=1)
    freedom = len(effects.effects) - _leverage(effects, fit).sum()
    size = sum_of_squares(residual) / residual.shape[1]
    between = max(size / freedom - noise.mean(), 0) if freedom > 1e-6 else 0.0
    reliability = between / np.maximum(between + noise, 1e-30)
    axes = leading_axes(residual, effects.noise(), what="deviations from context + perturbation")
    return NearestContextFit(
        fit.context, fit.perturbation, effects.context, effects.perturbation, residual @ axes.T, axes, effects.controls,
        reliability.astype(np.float32), _slopes(effects, fit).astype(np.float32),
    )  # fmt: skip


def _slopes(effects: Effects, fit: AdditiveFit) -> np.ndarray:
    """Slope of a deviation on that in the most similar context, (2,): context effects left in, and taken off."""
    rows, measured_effects = effects.rows(), effects.effects
    measured = rows >= 0
    n = measured.sum(axis=0)
    alike = similarity(effects.controls, effects.controls)
    np.fill_diagonal(alike, -np.inf)
    means = effects.perturbation_means()
    products, squares = np.zeros(2), np.zeros(2)
    for c in range(len(effects.contexts)):
        # at least two others: of one alone, the mean over contexts is the copy
        own = np.flatnonzero(measured[c] & (n > 2))
        if not len(own):
            continue
        order = np.argsort(-alike[c], kind="stable")[:-1]  # the last is c itself
        donor = order[measured[order][:, own].argmax(axis=0)]
        for k in (0, 1):
            of_context = k * fit.context
            centre = (fit.perturbation if k else means)[own]
            y = measured_effects[rows[c, own]] - of_context[c]
            x = measured_effects[rows[donor, own]] - of_context[donor]
            # the mean over the other contexts
            others = centre + (centre - y) / (n[own] - 1)[:, None]
            products[k] += np.einsum("ij,ij->", x - others, y - others, dtype=np.float64)
            squares[k] += sum_of_squares(x - others)
    return np.clip(products / np.maximum(squares, 1e-30), 0, 1)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation over genes of every profile of one table with every one of another, (n_a, n_b); 0 for a flat one."""
    return cosine(_centred(a), _centred(b))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row of one table with every one of another, (n_a, n_b); 0 for a row of zeros."""
    return unit_rows(a) @ unit_rows(b).T


def _centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(axis=1, keepdims=True)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Divide every row by its length; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
