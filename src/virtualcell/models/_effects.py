"""What perturbations did: a table of measured effects, with their errors.

An effect is the difference of mean expression between the perturbed and the control cells of one context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import sparse

from virtualcell.data._screen import Screen

_FURTHER_CELLS = 10  # that the scatter of all groups counts as, in that of each
_ROWS = 1024  # worked on at a time


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
        The effects, (n_rows, n_genes): mean of the perturbed cells minus that of the control cells of their context
        and batch.
    variance
        Their squared standard errors, of both means, (n_rows, n_genes).
    n_cells
        Perturbed cells, (n_rows,).
    controls
        Mean control cell of each context, (n_contexts, n_genes).
    """

    contexts: list[str]
    perturbations: list[str]
    context: np.ndarray
    perturbation: np.ndarray
    effects: np.ndarray
    variance: np.ndarray
    n_cells: np.ndarray
    controls: np.ndarray

    @classmethod
    def measure(cls, screen: Screen, mask: np.ndarray | None = None) -> Self:
        """Average the cells of a screen into effects.

        Cells are compared with the control cells of their own context and batch, each batch weighing as much as it has
        perturbed cells; cells of a batch without control cells with all of their context. The scatter between the cells
        of a group is estimated from them and, as if from ten further cells, from all groups: few cells tell little of
        it, and a single one nothing.

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
        pools = _Pools.of(screen, [groups[c, control] for c in contexts])
        found = screen.expression.moments([*pools.rows, *(groups[pair] for pair in pairs)])
        variance, first = _squared_errors(found.variance, found.n), len(pools.rows)
        matched = pools.matched([groups[pair] for pair in pairs], context)
        differences, of_effects = found.mean[first:], variance[first:]
        for some in np.array_split(np.arange(len(pairs)), max(1, len(pairs) // _ROWS)):  # no second table of all
            differences[some] -= matched[some] @ found.mean[:first]
            of_effects[some] += matched[some].power(2) @ variance[:first]
        return cls(
            contexts=contexts, perturbations=perturbations, context=context,
            perturbation=_codes([p for _, p in pairs], perturbations),
            effects=differences, variance=of_effects, n_cells=found.n[first:],
            controls=pools.of_context(found.n[:first]) @ found.mean[:first],
        )  # fmt: skip

    def take(self, rows: np.ndarray) -> Self:
        """Return some of the rows, by a mask, with all contexts and the perturbations that are left."""
        left, codes = np.unique(self.perturbation[rows], return_inverse=True)
        return dataclasses.replace(
            self,
            perturbations=[self.perturbations[i] for i in left],
            context=self.context[rows],
            perturbation=codes,
            effects=self.effects[rows],
            variance=self.variance[rows],
            n_cells=self.n_cells[rows],
        )

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
            controls=controls,
        )  # fmt: skip

    def pairs(self) -> list[tuple[str, str]]:
        """Names of the context and the perturbation of each row."""
        return named_pairs(self.contexts, self.perturbations, self.context, self.perturbation)

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
        return float(self.variance.sum(dtype=np.float64))


@dataclass(frozen=True)
class _Pools:
    """Control cells of each context and batch.

    Parameters
    ----------
    rows
        Rows of the control cells of each pool.
    context
        Code of the context of each pool.
    number
        Pool of every context and batch, (n_contexts, n_batches); -1 where there is none.
    batch
        Code of the batch of every cell of the screen.
    """

    rows: list[np.ndarray]
    context: np.ndarray
    number: np.ndarray
    batch: np.ndarray

    @classmethod
    def of(cls, screen: Screen, controls: Sequence[np.ndarray]) -> Self:
        """Take the control cells of each context apart by batch."""
        batch = np.zeros(screen.n_cells, int) if screen.batch is None else screen.batch.codes.astype(int)
        number = np.full((len(controls), int(batch.max(initial=0)) + 1), -1)
        rows, context = [], []
        for c, cells in enumerate(controls):
            for b in np.unique(batch[cells]):
                number[c, b] = len(rows)
                rows.append(cells[batch[cells] == b])
                context.append(c)
        return cls(rows, np.array(context, int), number, batch)

    def of_context(self, n: np.ndarray) -> sparse.csr_matrix:
        """Weights of the pools in the mean over all control cells of each context, (n_contexts, n_pools)."""
        of_context = np.bincount(self.context, n, len(self.number))
        weights = (n / of_context[self.context]).astype(np.float32)
        shape = (len(self.number), len(n))
        return sparse.csr_matrix((weights, (self.context, np.arange(len(n)))), shape=shape)

    def matched(self, groups: Sequence[np.ndarray], context: np.ndarray) -> sparse.csr_matrix:
        """Weights of the pools that the cells of each group are compared with, (n_groups, n_pools)."""
        whole = self.of_context(np.array([len(r) for r in self.rows])).toarray()
        out = sparse.lil_matrix((len(groups), len(self.rows)), dtype=np.float32)
        for i, (cells, c) in enumerate(zip(groups, context, strict=True)):
            n = np.bincount(self.batch[cells], minlength=self.number.shape[1])
            pool = self.number[c]
            weights = whole[c] * (n[pool < 0].sum() / len(cells))
            np.add.at(weights, pool[pool >= 0], n[pool >= 0] / len(cells))
            where = np.flatnonzero(weights)
            out[i, where] = weights[where]
        return out.tocsr()


def named_pairs(
    contexts: Sequence[str], perturbations: Sequence[str], context: np.ndarray, perturbation: np.ndarray
) -> list[tuple[str, str]]:
    """Names of what the codes of contexts and perturbations stand for."""
    return [(contexts[c], perturbations[p]) for c, p in zip(context, perturbation, strict=True)]


def _codes(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    code = {name: i for i, name in enumerate(known)}
    return np.array([code[name] for name in names], dtype=int)


def _squared_errors(variance: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Turn the variance between the cells of each group into squared standard errors of their mean, in place."""
    freedom = (n - 1).astype(np.float32)
    pooled = np.einsum("i,ij->j", freedom, variance, dtype=np.float64) / max(freedom.sum(), 1)
    variance *= freedom[:, None]
    variance += (_FURTHER_CELLS * pooled).astype(np.float32)
    variance /= ((freedom + _FURTHER_CELLS) * n)[:, None]
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
