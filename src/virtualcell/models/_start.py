"""Control cells that predictions start from, read once for all models and perturbations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from virtualcell.data._counts import counts_of, library_of
from virtualcell.data._emit import Dispersions
from virtualcell.data._screen import Screen


@dataclass(frozen=True, eq=False)
class Counted:
    """Counts of the control cells of one context, (n_cells, n_genes), in the order of the cells' names.

    Parameters
    ----------
    counts
        Whole counts, float32 CSR.
    library
        Library size of each cell, (n_cells,).
    dispersions
        How the counts of each gene vary over the cells.
    target_sum
        Counts per cell after normalisation.
    """

    counts: sparse.csr_matrix
    library: np.ndarray
    dispersions: Dispersions
    target_sum: float

    @cached_property
    def by_gene(self) -> sparse.csc_matrix:
        """The same counts as CSC."""
        return self.counts.tocsc()


@dataclass(frozen=True, eq=False)
class Start:
    """Control cells of one context that predictions start from, read once, in the order of their names.

    Parameters
    ----------
    context
        The context.
    names
        Names of the cells.
    cells
        What the model works on, (n_cells, n_features): expression or cell embeddings.
    base
        Their mean, (n_features,).
    batch
        Name of each cell's batch, where there are batches.
    library
        Library size of each cell, (n_cells,), where `cells` was normalised from counts here.
    target_sum
        Counts per cell after normalisation.
    """

    context: str
    names: pd.Index
    cells: sparse.csr_matrix | np.ndarray
    base: np.ndarray
    batch: np.ndarray | None
    library: np.ndarray | None = None
    target_sum: float = 1e4

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """Return some of the cells, (n, n_features)."""
        taken = self.cells[rows]
        return taken.toarray() if sparse.issparse(taken) else taken

    def mean_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean of some of the cells, given by sorted rows, (n_features,), float64."""
        if np.array_equal(rows, np.arange(len(self.names))):
            return self._mean
        return self.dense(rows).mean(axis=0, dtype=np.float64)

    @cached_property
    def _mean(self) -> np.ndarray:
        return self.dense(np.arange(len(self.names))).mean(axis=0, dtype=np.float64)

    def batch_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the batches of some of the cells."""
        return None if self.batch is None else self.batch[rows]

    @cached_property
    def counted(self) -> Counted:
        """Counts that the expression was made of, found when they are first asked for.

        Without library sizes, the smallest value of a cell tells them, which is one count.

        Raises
        ------
        NoCountsError
            If the values are no whole numbers of counts.
        """
        library = library_of(self.cells, self.target_sum) if self.library is None else self.library
        counts = counts_of(self.cells, library, self.target_sum)
        return Counted(counts, library, Dispersions.measure(counts, library, self.target_sum), self.target_sum)


def starts(screen: Screen, context: str | None = None) -> Iterator[Start]:
    """Yield the control cells of one context or of each, on the genes of the screen or in its embedding."""
    for name, rows in screen.controls(context).items():
        cells = screen.expression.rows(rows) if screen.rep is None else screen.rep[rows]
        base = np.asarray(cells.mean(axis=0, dtype=np.float64)).ravel().astype(np.float32)
        batch = None if screen.batch is None else np.asarray(screen.batch[rows]).astype(str)
        sizes = screen.expression.library_size
        library = None if screen.rep is not None or sizes is None else np.asarray(sizes, dtype=np.float64)[rows]
        yield Start(name, screen.names[rows], cells, base, batch, library, screen.expression.target_sum)
