"""Gene vectors from the data's own co-expression."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse
from scipy.linalg import lu

from virtualcell._arguments import require_whole
from virtualcell._settings import seed_of, settings
from virtualcell.data._design import Design, Scale, note_design, only_stated, require_columns
from virtualcell.data._design_arguments import LabelArguments, takes_design
from virtualcell.data._expression import Expression
from virtualcell.data._read_expression import read_expression
from virtualcell.data._screen import Screen

logger = logging.getLogger(__name__)

_ITERATIONS = 8
_OVERSAMPLING = 32
_CELLS_AT_A_TIME = 8192
_MOST_CELLS = 1 << 16  # with which correlations are known to 0.004

Blocks = Callable[[], Iterator[sparse.csr_matrix]]  # of a pass over the cells


@takes_design("they play no part here, and are noted for later calls", LabelArguments)
def expression_gene_embeddings(
    adata: AnnData | MuData,
    *,
    n_comps: int = 256,
    layer: str | None = None,
    scale: Scale = "counts",
    library_size_key: str | None = None,
    modality: str = "rna",
    seed: int | None = None,
    **stated: Unpack[LabelArguments],
) -> pd.DataFrame:
    r"""Give each gene a vector from its co-expression with all others, without anything but the data.

    Log expression is centred and divided by its standard deviation gene by gene (centred implicitly: the matrix stays
    sparse), and its truncated singular value decomposition :math:`Z \approx U S V^\top` taken. The vectors are the
    rows of :math:`V S / \sqrt{n}` for n cells, so the inner product of two genes approximates their correlation over
    cells, and a vector is shorter the less of the gene the components explain. Genes are taken in the order of their
    names and the largest entry of each component is positive: the order of cells and genes does not matter. Of more
    than 65,536 cells as many are drawn, by their names.

    Parameters
    ----------
    adata
        Cells; of a MuData, the modality named by `modality`.
    n_comps
        Dimensions of a vector; as many as the data allow, if fewer.
    layer
        Layer with the expression; `X` where it is in none.
    scale
        Whether it is "counts" (raw), which are normalised to log1p of counts per 10,000, or "log1p".
    library_size_key
        Column of `obs` with the library size, where it is not the row sum.
    modality
        Modality with gene expression, of a MuData.
    seed
        Seed of the start of the subspace iteration, and of the draw of cells; by default `vc.settings.seed`.
    **stated
        Labels of the design.

    Returns
    -------
    Genes x components, float32, in the order of `var_names`. Genes that no cell expresses, or all cells alike, have
    no row.

    Raises
    ------
    KeyError
        If the layer, a column, the label of the control or the modality does not exist.
    ValueError
        If the values are not on the stated scale, gene names repeat, or fewer than two genes vary.

    Examples
    --------
    >>> table = vc.pp.expression_gene_embeddings(adata, n_comps=8)
    >>> table.shape  # genes x dimensions
    (60, 8)
    """
    found = only_stated({**stated, "library_size_key": library_size_key})
    require_columns(adata, modality, **{k: v for k, v in found.items() if k.endswith("_key")})
    if {"perturbation_key", "control"} <= set(found):
        Screen.from_anndata(adata, Design(**only_stated(stated)), modality=modality).require_control()
    expression = read_expression(adata, modality=modality, layer=layer, scale=scale, library_size_key=library_size_key)
    vectors = coexpression_vectors(expression, n_comps=n_comps, seed=seed_of(seed))
    note_design(adata, found, modality)
    return vectors


def coexpression_vectors(expression: Expression, *, n_comps: int | None = None, seed: int = 0) -> pd.DataFrame:
    """As :func:`expression_gene_embeddings`, of cells that are read already; by default 256, or what they allow."""
    if n_comps is not None:
        require_whole("n_comps", n_comps)
    genes = sorted(expression.genes)
    cells = _some_cells(expression, seed).select(genes)
    n_cells, blocks = cells.n_cells, _blocks(cells)
    mean, sd = _moments(blocks, n_cells, len(genes))
    varies = sd > 0
    kept = pd.Index(genes)[varies]
    if varies.sum() < 2 or n_cells < 3:
        raise ValueError(f"{n_cells} cells with {int(varies.sum())} genes that vary are too few for co-expression.")
    if not varies.all():
        logger.info("%d of %d genes do not vary among these cells: no row for them.", (~varies).sum(), len(genes))
        blocks = _blocks(cells.select(list(kept)))
    vectors, explained = _principal_axes(blocks, n_cells, mean[varies], sd[varies], n_comps, seed)

    frame = pd.DataFrame(vectors.astype(np.float32), index=kept.rename("gene"))
    frame.columns = [f"expression_{i}" for i in range(frame.shape[1])]
    frame = frame.loc[expression.genes[expression.genes.isin(kept)].rename("gene")]
    frame.attrs = {
        "source": "expression",
        "n_cells": n_cells,
        "n_comps": frame.shape[1],
        "variance_explained": explained,
    }
    return frame


def _some_cells(expression: Expression, seed: int) -> Expression:
    """Draw cells by their names where there are more than are needed, after a look at all of them."""
    expression.rows(np.arange(0))  # the first reading checks all cells
    if expression.n_cells <= _MOST_CELLS:
        return expression
    by_name = np.argsort(expression.cells.to_numpy(dtype=str), kind="stable")
    drawn = np.random.default_rng(seed).choice(expression.n_cells, _MOST_CELLS, replace=False)
    return expression.take(np.sort(by_name[drawn]))


def _blocks(expression: Expression) -> Blocks:
    """Return what goes through the cells, some at a time in double precision, as often as it is called.

    Cells that are not in memory are read into it, or each time where `vc.settings.max_memory` does not allow that.
    """
    if not expression.in_memory and expression.n_cells * expression.entries_per_cell * 8 > settings.max_memory * 1e9:
        read = expression.at_hand().rows
    else:
        matrix = expression.rows()
        read = partial(_part, matrix if matrix.has_sorted_indices else matrix.sorted_indices())

    def blocks() -> Iterator[sparse.csr_matrix]:
        for rows in expression.slices(_CELLS_AT_A_TIME):
            part = read(rows)
            # sums go by entries: the order of genes in a file must not change them
            yield (part if part.has_sorted_indices else part.sorted_indices()).astype(np.float64)

    return blocks


def _part(matrix: sparse.csr_matrix, rows: slice) -> sparse.csr_matrix:
    return matrix[rows]


def _moments(blocks: Blocks, n: int, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each column (n_genes,); 0 where it is constant up to rounding."""
    mean, square = np.zeros(n_genes), np.zeros(n_genes)
    for part in blocks():
        mean += np.asarray(part.sum(axis=0)).ravel() / n
        square += np.asarray(part.multiply(part).sum(axis=0)).ravel() / n
    variance = square - mean**2
    return mean, np.sqrt(np.where(variance > 1e-10 * square, variance, 0))


def _principal_axes(
    blocks: Blocks, n_cells: int, mean: np.ndarray, sd: np.ndarray, n_comps: int | None, seed: int
) -> tuple[np.ndarray, float]:
    """Return V S / sqrt(n) of the standardised matrix (n_genes, n_comps), and the share of variance it explains.

    Subspace iteration on the correlation matrix (genes x genes), which is never formed (Halko et al. 2011, algorithm
    4.4). It starts from the genes' side, so that it takes the same path whatever the order of the cells.
    """
    n_genes = len(mean)
    limit = min(n_cells, n_genes) - 1
    if n_comps is None:
        n_comps = min(256, limit)
    elif n_comps > limit:
        logger.warning("n_comps=%d is more than %d cells x %d genes allow: %d.", n_comps, n_cells, n_genes, limit)
        n_comps = limit

    def correlate(axes: np.ndarray) -> np.ndarray:
        total, scaled = np.zeros_like(axes), axes / sd[:, None]
        for part in blocks():
            total += part.T @ (part @ scaled - mean @ scaled)
        return total / (n_cells * sd[:, None])

    width = min(n_comps + _OVERSAMPLING, n_genes)
    axes = np.random.default_rng(seed).standard_normal((n_genes, width))
    for _ in range(_ITERATIONS):
        axes = lu(correlate(axes), permute_l=True)[0]  # keeps the columns apart at a fraction of the cost of QR
    axes = np.linalg.qr(axes).Q
    values, rotation = np.linalg.eigh(axes.T @ correlate(axes))
    order = np.argsort(-values)[:n_comps]
    values, axes = np.maximum(values[order], 0), axes @ rotation[:, order]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(n_comps)])
    return axes * np.sqrt(values), float(values.sum() / n_genes)
