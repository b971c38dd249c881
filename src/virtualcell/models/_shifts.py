"""What perturbations did, as a table of mean shifts, and closed forms that carry it over: pure numpy, no AnnData.

A shift is the difference of mean expression between the perturbed and the control cells of one context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

_CELLS_AT_ONCE = 65_536  # copied in double precision while sums are taken


@dataclass(frozen=True)
class ShiftTable:
    """Mean shift of every (context, perturbation) that was measured, one row each, sorted by context.

    Parameters
    ----------
    contexts, perturbations
        Names that the codes stand for, sorted. A context may have control cells only, and then no row.
    context, perturbation
        Codes of the rows, (n_rows,).
    shifts
        The shifts, (n_rows, n_genes).
    variance
        Squared standard error of the perturbed cells' mean, (n_rows, n_genes). That of the control cells is common to
        the context, `control_variance`; a shift has both.
    n_cells
        Perturbed cells, (n_rows,).
    controls, control_variance
        Mean control cell of each context and its squared standard error, (n_contexts, n_genes).
    """

    contexts: list[str]
    perturbations: list[str]
    context: np.ndarray
    perturbation: np.ndarray
    shifts: np.ndarray
    variance: np.ndarray
    n_cells: np.ndarray
    controls: np.ndarray
    control_variance: np.ndarray

    @classmethod
    def from_effects(
        cls, shifts: np.ndarray, context: Sequence[str], perturbation: Sequence[str], controls: np.ndarray | None = None
    ) -> ShiftTable:
        """Take effects as they are published, without cells: their errors count as 0.

        `controls` has one row per context, in the order of the sorted names; without it all contexts are alike.
        """
        contexts, c = np.unique(np.asarray(context, dtype=str), return_inverse=True)
        perturbations, p = np.unique(np.asarray(perturbation, dtype=str), return_inverse=True)
        order = np.lexsort((p, c))
        if len(np.unique(c * len(perturbations) + p)) < len(order):
            raise ValueError("several effects of one perturbation in one context: average them first.")
        shifts = np.asarray(shifts, dtype=np.float32)[order]
        if controls is None:
            controls = np.zeros((len(contexts), shifts.shape[1]), np.float32)
        return cls(
            contexts=contexts.tolist(), perturbations=perturbations.tolist(), context=c[order], perturbation=p[order],
            shifts=shifts, variance=np.zeros_like(shifts), n_cells=np.ones(len(shifts), int),
            controls=controls, control_variance=np.zeros_like(controls),
        )  # fmt: skip

    def rows(self) -> np.ndarray:
        """Row of every context and perturbation, (n_contexts, n_perturbations); -1 where it was not measured."""
        return _row_of(self.context, self.perturbation, (len(self.contexts), len(self.perturbations)))

    def perturbation_means(self) -> np.ndarray:
        """Mean shift of each perturbation, each of its contexts counting the same, (n_perturbations, n_genes)."""
        return _group_means(self.shifts, self.perturbation, len(self.perturbations))

    def context_means(self) -> np.ndarray:
        """Mean shift over the perturbations of each context, (n_contexts, n_genes); NaN for one without any."""
        means = _group_means(self.shifts, self.context, len(self.contexts))
        means[np.bincount(self.context, minlength=len(self.contexts)) == 0] = np.nan
        return means


def shift_table(
    matrix: sparse.csr_matrix | np.ndarray,
    perturbation: np.ndarray,
    context: np.ndarray,
    *,
    control: str,
    mask: np.ndarray | None = None,
) -> ShiftTable:
    """Average cells into the shifts of a :class:`ShiftTable`.

    Parameters
    ----------
    matrix
        Expression, cells x genes.
    perturbation, context
        Labels of the cells.
    control
        Label of control cells.
    mask
        Cells that may be looked at; all by default.

    Raises
    ------
    ValueError
        For a context without control cells.
    """
    seen = np.arange(matrix.shape[0]) if mask is None else np.flatnonzero(mask)
    contexts, c = np.unique(context[seen].astype(str), return_inverse=True)
    labels, p = np.unique(perturbation[seen].astype(str), return_inverse=True)
    groups, group = np.unique(c * len(labels) + p, return_inverse=True)
    context_of, label_of = groups // len(labels), groups % len(labels)
    is_control = labels[label_of] == control
    without = np.setdiff1d(np.arange(len(contexts)), context_of[is_control])
    if len(without):
        raise ValueError(
            f"context {str(contexts[without[0]])!r} has no control cells ({control!r}). Drop it or add controls."
        )
    mean, variance, n = _moments(matrix, seen, group, len(groups))
    is_row = ~is_control
    perturbations, code = np.unique(labels[label_of[is_row]], return_inverse=True)
    controls = mean[is_control]  # groups are sorted by context, so this has one row per context in their order
    return ShiftTable(
        contexts=contexts.tolist(), perturbations=perturbations.tolist(), context=context_of[is_row], perturbation=code,
        shifts=mean[is_row] - controls[context_of[is_row]], variance=variance[is_row], n_cells=n[is_row],
        controls=controls, control_variance=variance[is_control],
    )  # fmt: skip


def _moments(
    matrix: sparse.csr_matrix | np.ndarray, seen: np.ndarray, group: np.ndarray, n_groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each group, its squared standard error, both (n_groups, n_genes), and the number of cells."""
    n = np.bincount(group, minlength=n_groups)
    ends = np.cumsum(n)
    order = seen[np.argsort(group, kind="stable")]
    mean = np.empty((n_groups, matrix.shape[1]), np.float32)
    variance = np.empty_like(mean)
    pooled, first = np.zeros(matrix.shape[1]), 0
    while first < n_groups:
        start = ends[first] - n[first]
        last = max(first + 1, int(np.searchsorted(ends, start + _CELLS_AT_ONCE, side="right")))
        cells = sparse.csr_matrix(matrix[order[start : ends[last - 1]]], dtype=np.float64)
        bounds = np.concatenate([[0], ends[first:last] - start])
        member = sparse.csr_matrix((np.ones(bounds[-1]), np.arange(bounds[-1]), bounds))
        size = n[first:last, None]
        m = (member @ cells).toarray() / size
        cells.data **= 2
        squares = np.maximum((member @ cells).toarray() - size * m**2, 0)
        pooled += squares.sum(axis=0)
        mean[first:last] = m
        variance[first:last] = squares / np.maximum(size - 1, 1) / size
        first = last
    # one cell tells nothing of its own scatter: it is that within all groups
    variance[n == 1] = pooled / max(len(seen) - n_groups, 1)
    return mean, variance, n


def _group_sums(values: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    ones = np.ones(len(group), values.dtype)
    return sparse.csr_matrix((ones, (group, np.arange(len(group)))), shape=(n_groups, len(group))) @ values


def _group_means(values: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    n = np.bincount(group, minlength=n_groups).astype(values.dtype)
    return _group_sums(values, group, n_groups) / np.maximum(n, 1)[:, None]


def _row_of(context: np.ndarray, perturbation: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows = np.full(shape, -1)
    rows[context, perturbation] = np.arange(len(context))
    return rows


# -- context + perturbation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdditiveFit:
    """`shift[c, p] = context[c] + perturbation[p]`; the context effects are 0 on average, and 0 for a new context.

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

    def shift(self, perturbations: Sequence[int], context: int = -1) -> np.ndarray:
        """Return the shift, (n_genes,), of perturbations applied together; `context=-1` is a new one."""
        shift = self.perturbation[list(perturbations)].sum(axis=0)
        return shift if context < 0 or not len(perturbations) else shift + self.context[context]


def additive(table: ShiftTable) -> AdditiveFit:
    r"""Fit what alternating least squares with shrunken context effects converges to, in closed form.

    .. math:: \min_{a, b} \sum_{(c, p)\ \mathrm{measured}} \|y_{cp} - a_c - b_p\|^2 + \lambda \sum_c \|a_c\|^2

    Contexts count the same whatever their number of cells. Where all have the same perturbations, the mean over
    contexts is what b comes to. The penalty is the ratio of two variances, of residuals and of context effects, summed
    over genes and estimated by fitting constants (Henderson's third method), with no search.
    """
    n_contexts, n_perturbations = len(table.contexts), len(table.perturbations)
    weights, vectors = np.linalg.eigh(_context_design(table)[0])
    means = table.perturbation_means()
    # what perturbations leave over, summed by context
    left = _group_sums(table.shifts, table.context, n_contexts) - _measured(table) @ means
    estimable = weights > 1e-9
    rotated = vectors.T @ left.astype(np.float64)
    explained = float((rotated[estimable] ** 2 / weights[estimable, None]).sum())
    n_per = np.bincount(table.perturbation, minlength=n_perturbations)
    within = _sum_of_squares(table.shifts) - float((n_per[:, None] * means.astype(np.float64) ** 2).sum())
    freedom = len(table.shifts) - n_perturbations - estimable.sum()
    shrinkage = np.inf
    if freedom > 0 and estimable.any():
        residual = max(within - explained, 0) / freedom
        between = (explained - estimable.sum() * residual) / weights.sum()
        shrinkage = residual / between if between > 0 else np.inf
    keep = np.where(estimable, 1 / (np.maximum(weights, 1e-9) + shrinkage), 0)
    effects = ((vectors * keep) @ rotated).astype(np.float32)
    own = _group_means(effects[table.context], table.perturbation, n_perturbations)
    return AdditiveFit(effects, means - own, float(shrinkage))


def additive_leave_one_out(table: ShiftTable, fit: AdditiveFit) -> np.ndarray:
    """Return what the fit would be for each row had it not been measured, (n_rows, n_genes), the penalty kept.

    Exact, from the leverages of the linear fit. NaN where the perturbation was measured in no other context.
    """
    free = (1 - _leverage(table, fit)).astype(np.float32)
    free[free < 1e-5] = np.nan
    return table.shifts - _residual(table, fit) / free[:, None]


def _residual(table: ShiftTable, fit: AdditiveFit) -> np.ndarray:
    return table.shifts - fit.context[table.context] - fit.perturbation[table.perturbation]


def _leverage(table: ShiftTable, fit: AdditiveFit) -> np.ndarray:
    """How much each row's fitted value depends on the row itself, (n_rows,); 1 for wholly."""
    n = np.bincount(table.perturbation, minlength=len(table.perturbations))[table.perturbation]
    if not np.isfinite(fit.shrinkage):
        return 1 / n
    design, share = _context_design(table)
    row = -share[:, table.perturbation].T
    row[np.arange(len(row)), table.context] += 1
    inverse = np.linalg.pinv(design + fit.shrinkage * np.eye(len(design)))
    return 1 / n + ((row @ inverse) * row).sum(axis=1)


def _measured(table: ShiftTable) -> np.ndarray:
    return (table.rows() >= 0).astype(np.float32)


def _context_design(table: ShiftTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the normal equations of context effects, given perturbations, and the share of contexts in those."""
    measured = _measured(table).astype(np.float64)
    share = measured / measured.sum(axis=0)
    return np.diag(measured.sum(axis=1)) - measured @ share.T, share


def _sum_of_squares(values: np.ndarray) -> float:
    return float(sum(np.einsum("ij,ij->", v, v, dtype=np.float64) for v in np.array_split(values, 64)))


# -- the most similar context -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearestContextFit:
    """The additive fit, and how far the deviation from it is copied from the most similar context.

    Parameters
    ----------
    context_effects, perturbation_effects
        The additive fit.
    row_context, row_perturbation, shifts
        The measured shifts, as in :class:`ShiftTable`.
    controls
        Mean control cell of each context, (n_contexts, n_genes).
    reliability
        Weight of each measured shift for its own context, (n_rows,).
    transfer
        Weights of another context's deviation, (2,): for a context with no perturbation measured, and for others.
    """

    context_effects: np.ndarray
    perturbation_effects: np.ndarray
    row_context: np.ndarray
    row_perturbation: np.ndarray
    shifts: np.ndarray
    controls: np.ndarray
    reliability: np.ndarray
    transfer: np.ndarray

    def shift(self, perturbations: Sequence[int], base: np.ndarray, context: int = -1) -> np.ndarray:
        """Return the shift, (n_genes,), where the mean control cell is `base`; `context=-1` is a new one."""
        nearest = np.argsort(-similarity(base[None], self.controls)[0], kind="stable")
        known = int(context >= 0 and (self.row_context == context).any())
        shift = known * self.context_effects[context] if len(perturbations) else 0 * base
        for p in perturbations:
            rows = np.flatnonzero(self.row_perturbation == p)
            own = rows[self.row_context[rows] == context]
            if len(own):
                row, weight, effect = own[0], self.reliability[own[0]], self.context_effects[context]
            else:
                row = rows[np.argmin(np.argsort(nearest)[self.row_context[rows]])]
                weight, effect = self.transfer[known], known * self.context_effects[self.row_context[row]]
            mean = self.perturbation_effects[p]
            shift = shift + mean + weight * (self.shifts[row] - effect - mean)
        return shift


def nearest_context(table: ShiftTable) -> NearestContextFit:
    r"""Copy deviations from the additive fit from the context with the most similar control cells, shrunken.

    Where the perturbation was measured in the context itself, its deviation counts by its reliability
    :math:`\tau^2 / (\tau^2 + s^2)`, of the variance between contexts and the squared standard error (empirical Bayes).
    Elsewhere it is copied from the most similar context (correlation of mean control cells) with it, times the
    least-squares slope, between 0 and 1, of one on the other over the measured pairs, each left out in turn.
    """
    fit, rows = additive(table), table.rows()
    measured = rows >= 0
    n = measured.sum(axis=0)
    alike = similarity(table.controls, table.controls)
    np.fill_diagonal(alike, -np.inf)
    means = table.perturbation_means()
    products, squares = np.zeros(2), np.zeros(2)
    for c in range(len(table.contexts)):
        # at least two others: of one alone, the mean over contexts is the copy
        own = np.flatnonzero(measured[c] & (n > 2))
        if not len(own):
            continue
        order = np.argsort(-alike[c], kind="stable")[:-1]  # the last is c itself
        donor = order[measured[order][:, own].argmax(axis=0)]
        for k in (0, 1):
            effects = k * fit.context
            centre = (fit.perturbation if k else means)[own]
            y, x = table.shifts[rows[c, own]] - effects[c], table.shifts[rows[donor, own]] - effects[donor]
            # the mean over the other contexts
            others = centre + (centre - y) / (n[own] - 1)[:, None]
            products[k] += np.einsum("ij,ij->", x - others, y - others, dtype=np.float64)
            squares[k] += _sum_of_squares(x - others)
    noise = table.variance.mean(axis=1)
    freedom = len(table.shifts) - _leverage(table, fit).sum()
    residual = _sum_of_squares(_residual(table, fit)) / table.shifts.shape[1]
    between = max(residual / freedom - noise.mean(), 0) if freedom > 1e-6 else 0.0
    reliability = between / np.maximum(between + noise, 1e-30)
    transfer = np.clip(products / np.maximum(squares, 1e-30), 0, 1)
    return NearestContextFit(
        fit.context, fit.perturbation, table.context, table.perturbation, table.shifts, table.controls,
        reliability.astype(np.float32), transfer.astype(np.float32),
    )  # fmt: skip


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation over genes of every profile of one table with every one of another, (n_a, n_b); 0 for a flat one."""
    return cosine(a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row of one table with every one of another, (n_a, n_b); 0 for a row of zeros."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (a, b))
    return a @ b.T
