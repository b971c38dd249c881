"""Control cells that predictions start from, read once for all models and perturbations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from virtualcell.data._screen import Screen


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
    """

    context: str
    names: pd.Index
    cells: sparse.csr_matrix | np.ndarray
    base: np.ndarray
    batch: np.ndarray | None

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """Return some of the cells, (n, n_features)."""
        taken = self.cells[rows]
        return taken.toarray() if sparse.issparse(taken) else taken

    def batch_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the batches of some of the cells."""
        return None if self.batch is None else self.batch[rows]


def starts(screen: Screen, context: str | None = None) -> Iterator[Start]:
    """Yield the control cells of one context or of each, on the genes of the screen or in its embedding."""
    for name, rows in screen.controls(context).items():
        cells = screen.expression.rows(rows) if screen.rep is None else screen.rep[rows]
        base = np.asarray(cells.mean(axis=0, dtype=np.float64)).ravel().astype(np.float32)
        batch = None if screen.batch is None else np.asarray(screen.batch[rows]).astype(str)
        yield Start(name, screen.names[rows], cells, base, batch)
