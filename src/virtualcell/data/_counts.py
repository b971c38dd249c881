"""From expression on a continuous scale to whole counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import sparse

Sampling = Literal["systematic", "multinomial"]
_ROWS = 1000  # drawn at a time, which bounds the memory


def depth_matched_counts(
    log_expression: sparse.csr_matrix,
    depths: Sequence[int],
    *,
    genes: Sequence[str],
    sampling: Sampling = "systematic",
    seed: int = 0,
) -> sparse.csr_matrix:
    """Draw whole counts with the given total of each cell; :func:`virtualcell.tl.prepare_submission` says why and how.

    Parameters
    ----------
    log_expression
        Cells x genes, log(1 + expression) in any unit: only the shares within a cell enter.
    depths
        Total of each cell.
    genes
        Names of the columns. Draws go by them, so that the order of the columns does not matter.
    sampling
        "systematic" rounds each expected count up or down; "multinomial" counts molecules.
    seed
        Of the draws.

    Returns
    -------
    Counts as float32 CSR, without stored zeros.
    """
    by_name = np.argsort(np.asarray(genes, dtype=str))
    back = np.argsort(by_name)
    rng = np.random.default_rng(seed)
    draw = rng.multinomial if sampling == "multinomial" else lambda n, share: _round_at_random(n * share, rng)
    blocks = []
    for start in range(0, log_expression.shape[0], _ROWS):
        block = sparse.csr_matrix(log_expression[start : start + _ROWS][:, by_name], dtype=np.float64)
        block.sort_indices()
        block.eliminate_zeros()
        np.expm1(block.data, out=block.data)
        for i, (begin, end) in enumerate(zip(block.indptr[:-1], block.indptr[1:], strict=True)):
            rate = block.data[begin:end]
            if not rate.size:
                raise ValueError(f"cell {start + i} of predicted expresses nothing, so that it has no counts to draw.")
            rate[:] = draw(int(depths[start + i]), rate / rate.sum())
        block.eliminate_zeros()
        blocks.append(block[:, back].astype(np.float32))
    return sparse.vstack(blocks, format="csr")


def _round_at_random(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round to whole numbers, each up or down, with the same means and, as that is whole, the same sum."""
    # marks one apart, laid at a random place along the cumulated values; shuffled, so that no two genes are tied
    order = rng.permutation(len(expected))
    edges = np.floor(np.cumsum(expected[order]) + rng.random())
    edges[-1] = np.rint(expected.sum())
    rounded = np.empty_like(expected)
    rounded[order] = np.diff(edges, prepend=0)
    return rounded
