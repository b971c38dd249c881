"""What tells data apart from other data: digests of names and labels, and numbers that rounding leaves close."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import sparse

from virtualcell.data._expression import Expression
from virtualcell.data._screen import Screen

_ROWS = 1000  # of which numbers are taken


def of_screen(screen: Screen) -> dict[str, object]:
    """Describe the cells of a screen, in whatever order their file has them: names of what may differ, to values.

    A value is a digest, or numbers that only need to be close, since computers round logarithms in their own ways. All
    labels and library sizes take part, and the expression of a thousand cells.
    """
    rows = screen.in_order(np.ones(screen.n_cells, bool))
    labels = {"perturbations": screen.perturbation, "contexts": screen.context, "batches": screen.batch}
    found: dict[str, object] = {k: digest(np.asarray(v)[rows]) for k, v in labels.items() if v is not None}
    found |= {"split": digest(screen.split[rows]), **of_expression(screen.names, screen.expression)}
    if screen.rep is not None:
        found["embedding"] = numbers(screen.rep[_some(rows)])
    return found


def of_expression(names: pd.Index, expression: Expression) -> dict[str, object]:
    """Describe cells of which nothing but names and expression is known."""
    rows = np.argsort(names.to_numpy(dtype=str), kind="stable")
    found: dict[str, object] = {"cells": digest(names[rows]), "genes": digest(expression.genes)}
    order = np.argsort(expression.genes.to_numpy(dtype=str), kind="stable")
    found["expression"] = numbers(expression.rows(_some(rows))[:, order])
    if expression.library_size is not None:  # sums of whole numbers
        found["library sizes"] = hashlib.blake2b(expression.library_size[rows].astype(np.float64).tobytes()).hexdigest()
    return found


def digest(names: Iterable[object]) -> str:
    """Return a digest of names in their order."""
    return hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=16).hexdigest()


def numbers(matrix: np.ndarray | sparse.spmatrix) -> list[float]:
    """Return one number for each row, or for some of many rows, in which every column counts differently."""
    some = matrix[_some(np.arange(matrix.shape[0]))]
    weights = np.random.default_rng(0).uniform(0.5, 1.5, some.shape[1])
    return [float(value) for value in some.astype(np.float64) @ weights]


def _some(rows: np.ndarray) -> np.ndarray:
    return rows[np.unique(np.linspace(0, len(rows) - 1, _ROWS).astype(int))] if len(rows) > _ROWS else rows
