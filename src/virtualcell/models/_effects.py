"""What perturbations did: a table of measured effects, with their errors.

An effect is the difference of mean expression between the perturbed and the control cells of one context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import sparse

from virtualcell.data._screen import Screen


@dataclass(frozen=True, eq=False)
class Effects:
    """Mean effect of every (context, perturbation) that was measured, one row each, sorted by context.

    Parameters
    ----------
    contexts, perturbations
        Names that the codes stand for, sorted. A context may have control cells only, and then no row.
    context, perturbation
        Codes of the rows, (n_rows,).
    effects
        The effects, (n_rows, n_genes).
    variance
        Squared standard error of the perturbed cells' mean, (n_rows, n_genes). That of the control cells is common to
        the context, `control_variance`; an effect has both.
    n_cells
        Perturbed cells, (n_rows,).
    controls, control_variance
        Mean control cell of each context and its squared standard error, (n_contexts, n_genes).
    """

    contexts: list[str]
    perturbations: list[str]
    context: np.ndarray
    perturbation: np.ndarray
    effects: np.ndarray
    variance: np.ndarray
    n_cells: np.ndarray
    controls: np.ndarray
    control_variance: np.ndarray

    @classmethod
    def measure(cls, screen: Screen, mask: np.ndarray | None = None) -> Self:
        """Average the cells of a screen into effects.

        A single cell tells nothing of its own scatter, which is then taken to be that within all groups.

        Parameters
        ----------
        screen
            The experiment.
        mask
            Cells that may be looked at; all by default.

        Raises
        ------
        ValueError
            For a context without control cells.
        """
        groups, control = screen.pairs(mask), screen.design.control
        contexts = sorted({c for c, _ in groups})
        if without := [c for c in contexts if (c, control) not in groups]:
            raise ValueError(f"context {without[0]!r} has no control cells ({control!r}). Drop it or add controls.")
        pairs = sorted(pair for pair in groups if pair[1] != control)
        perturbations = sorted({p for _, p in pairs})
        context = _codes([c for c, _ in pairs], contexts)
        found = screen.expression.moments([groups[pair] for pair in [*((c, control) for c in contexts), *pairs]])
        variance = _squared_errors(found.variance, found.n)
        first = len(contexts)  # row of the first group that is no control
        controls = found.mean[:first].copy()  # models keep them, and would keep the whole table with a view
        differences = found.mean[first:]
        for c in range(len(contexts)):
            differences[slice(*np.searchsorted(context, [c, c + 1]))] -= controls[c]
        return cls(
            contexts=contexts, perturbations=perturbations, context=context,
            perturbation=_codes([p for _, p in pairs], perturbations),
            effects=differences, variance=variance[first:], n_cells=found.n[first:],
            controls=controls, control_variance=variance[:first],
        )  # fmt: skip

    @classmethod
    def from_effects(
        cls,
        effects: np.ndarray,
        context: Sequence[str],
        perturbation: Sequence[str],
        controls: np.ndarray | None = None,
    ) -> Self:
        """Take effects as they are published, without cells: their errors count as 0.

        Parameters
        ----------
        effects
            The effects, (n_rows, n_genes).
        context, perturbation
            Names of the rows, in any order.
        controls
            Mean control cells, one row per context in the order of the sorted names; without them all are alike.
        """
        contexts, c = np.unique(np.asarray(context, dtype=str), return_inverse=True)
        perturbations, p = np.unique(np.asarray(perturbation, dtype=str), return_inverse=True)
        order = np.lexsort((p, c))
        if len(np.unique(c * len(perturbations) + p)) < len(order):
            raise ValueError("several effects of one perturbation in one context: average them first.")
        effects = np.asarray(effects, dtype=np.float32)[order]
        if controls is None:
            controls = np.zeros((len(contexts), effects.shape[1]), np.float32)
        return cls(
            contexts=contexts.tolist(), perturbations=perturbations.tolist(), context=c[order], perturbation=p[order],
            effects=effects, variance=np.zeros_like(effects), n_cells=np.ones(len(effects), int),
            controls=controls, control_variance=np.zeros_like(controls),
        )  # fmt: skip

    def rows(self) -> np.ndarray:
        """Row of every context and perturbation, (n_contexts, n_perturbations); -1 where it was not measured."""
        rows = np.full((len(self.contexts), len(self.perturbations)), -1)
        rows[self.context, self.perturbation] = np.arange(len(self.context))
        return rows

    def perturbation_means(self) -> np.ndarray:
        """Mean effect of each perturbation, each of its contexts counting the same, (n_perturbations, n_genes)."""
        return group_means(self.effects, self.perturbation, len(self.perturbations))

    def context_means(self) -> np.ndarray:
        """Mean effect over the perturbations of each context, (n_contexts, n_genes); NaN for one without any."""
        means = group_means(self.effects, self.context, len(self.contexts))
        means[np.bincount(self.context, minlength=len(self.contexts)) == 0] = np.nan
        return means

    def noise(self) -> float:
        """Sum of the squared standard errors of all effects."""
        n_effects = np.bincount(self.context, minlength=len(self.contexts))
        of_controls = self.control_variance.sum(axis=1, dtype=np.float64)
        return float(self.variance.sum(dtype=np.float64) + n_effects @ of_controls)


def _codes(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    code = {name: i for i, name in enumerate(known)}
    return np.array([code[name] for name in names], dtype=int)


def _squared_errors(variance: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Turn the variance between the cells of each group into squared standard errors of their mean, in place."""
    # one cell tells nothing of its own scatter: it is that within all groups
    pooled = np.einsum("i,ij->j", n - 1.0, variance) / max((n - 1).sum(), 1)
    variance /= n[:, None]
    variance[n == 1] = pooled
    return variance


def group_sums(values: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum of the rows of each group, (n_groups, n_columns)."""
    ones = np.ones(len(group), values.dtype)
    return sparse.csr_matrix((ones, (group, np.arange(len(group)))), shape=(n_groups, len(group))) @ values


def group_means(values: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean of the rows of each group, (n_groups, n_columns); 0 for a group without any."""
    n = np.bincount(group, minlength=n_groups).astype(values.dtype)
    return group_sums(values, group, n_groups) / np.maximum(n, 1)[:, None]


def sum_of_squares(values: np.ndarray) -> float:
    """Sum of the squared entries, in double precision without a copy of the table."""
    return float(sum(np.einsum("ij,ij->", v, v, dtype=np.float64) for v in np.array_split(values, 64)))
