"""Differential expression, and how well predicted genes match the real ones.

The comparisons take one perturbation: log fold changes and adjusted p-values over the same genes in the same order, as
:func:`differential_expression` gives them. A gene is significant where its adjusted p-value is below `threshold`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse, stats

from virtualcell.metrics._profiles import largest
from virtualcell.metrics._rank_sum import rank_sum_test

# What scanpy adds to both means, so that a gene that is absent on one side has a finite fold change.
_PSEUDOCOUNT = 1e-9


def differential_expression(
    cells: sparse.csr_matrix | np.ndarray,
    perturbations: ArrayLike,
    *,
    control: str,
    genes: ArrayLike | None = None,
    pseudocount: float = _PSEUDOCOUNT,
    n_jobs: int = 1,
) -> pd.DataFrame:
    """Test every gene of every perturbation against the control cells.

    Wilcoxon's rank-sum test, two-sided, normal approximation with correction for ties and continuity; the p-values of
    each perturbation are adjusted after Benjamini and Hochberg. A sparse matrix is made dense some cells and genes at a
    time.

    Parameters
    ----------
    cells
        Expression as log(1 + counts per 10,000), (n_cells, n_genes), sparse or dense.
    perturbations
        Label of each cell, (n_cells,).
    control
        Label that control cells have.
    genes
        Names of the columns; their numbers by default.
    pseudocount
        Number c that is added to both means of the fold change log2((expm1(m_p) + c) / (expm1(m_0) + c)), with m the
        means of `cells`; the default is that of scanpy. With 1 it is the difference of the means divided by ln 2, which
        is small for genes with few counts. With 0, a gene that is absent from one group has an infinite fold change.
    n_jobs
        Number of threads; -1 takes one per core.

    Returns
    -------
    One row per perturbation (sorted) and gene (in the order of `cells`): `perturbation`, `gene`, `log2_fold_change`,
    `p_value` and `fdr`, the adjusted p-value.

    Examples
    --------
    >>> screen = adata[adata.obs["cell_type"] == "type_1"]
    >>> table = vc.metrics.differential_expression(
    ...     logged[screen.obs_names].X, screen.obs["target_gene"], control="non-targeting", genes=screen.var_names
    ... )
    >>> list(table.columns)
    ['perturbation', 'gene', 'log2_fold_change', 'p_value', 'fdr']
    >>> own = table[table["gene"] == table["perturbation"]]  # what was knocked down is lower
    >>> bool((own["log2_fold_change"] < 0).all())
    True
    """
    if pd.isna(np.asarray(perturbations, dtype=object)).any():
        raise ValueError("perturbations has cells without a label. Give them one, or drop them.")
    labels = pd.Categorical(np.asarray(perturbations).astype(str))
    matrix = sparse.csr_matrix(cells) if sparse.issparse(cells) else np.asarray(cells)
    if len(labels) != matrix.shape[0]:
        raise ValueError(f"perturbations has {len(labels)} labels for {matrix.shape[0]} cells.")
    if genes is not None and len(genes) != matrix.shape[1]:
        raise ValueError(f"genes has {len(genes)} names for {matrix.shape[1]} columns.")
    groups = [str(g) for g in labels.categories]
    if control not in groups or len(groups) < 2:
        raise ValueError(f"control={control!r} must label some of the cells, and others be perturbed; found {groups}.")
    tested = [g for g in groups if g != control]
    genes = np.arange(matrix.shape[1]).astype(str) if genes is None else np.asarray(genes).astype(str)
    codes = np.array([groups.index(control), *(groups.index(g) for g in tested)]).argsort()[labels.codes]
    p, fdr = rank_sum_test(matrix, codes, n_jobs=n_jobs)
    means = group_means(matrix, codes, len(groups))
    change = log2_fold_change(means[1:], means[0], pseudocount=pseudocount)
    return pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(np.repeat(np.arange(len(tested)), len(genes)), tested),
            "gene": np.tile(genes, len(tested)),
            "log2_fold_change": change.ravel(),
            "p_value": p.ravel(),
            "fdr": fdr.ravel(),
        }
    )


def log2_fold_change(means: np.ndarray, control: np.ndarray, *, pseudocount: float = _PSEUDOCOUNT) -> np.ndarray:
    """log2 ratio of means of log(1 + x), each put back to the scale of x, with `pseudocount` added; the only one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2((np.expm1(means) + pseudocount) / (np.expm1(control) + pseudocount))
    change[np.isnan(change)] = 0  # absent from both groups
    return change


def group_means(matrix: sparse.csr_matrix | np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean over the cells of each group in float64, (n_groups, n_genes)."""
    n_genes = matrix.shape[1]
    sums = np.zeros(n_groups * n_genes)
    for start in range(0, matrix.shape[0], 4096):
        rows = sparse.csr_matrix(matrix[start : start + 4096])
        place = np.repeat(codes[start : start + 4096].astype(np.int64) * n_genes, np.diff(rows.indptr)) + rows.indices
        sums += np.bincount(place, weights=rows.data, minlength=len(sums))
    return sums.reshape(n_groups, n_genes) / np.bincount(codes, minlength=n_groups)[:, None]


def de_overlap(
    predicted_lfc: ArrayLike,
    observed_lfc: ArrayLike,
    *,
    predicted_fdr: ArrayLike,
    observed_fdr: ArrayLike,
    k: int | None = None,
    threshold: float = 0.05,
) -> float:
    """Share of the really changed genes that are predicted to change: DE_p of the Virtual Cell Challenge 2025.

    `|G_pred ∩ G_true| / n_true` with the significant genes of either side; where more are predicted than are true, only
    the n_true predicted ones with the largest absolute log fold change count. `overlap_at_N` of cell-eval.

    Parameters
    ----------
    predicted_lfc
        Predicted log fold changes, (n_genes,).
    observed_lfc
        Real log fold changes, (n_genes,).
    predicted_fdr
        Predicted adjusted p-values, (n_genes,).
    observed_fdr
        Real adjusted p-values, (n_genes,).
    k
        Compare only the k significant genes of largest absolute log fold change on either side (`overlap_at_k`).
    threshold
        Adjusted p-value below which a gene is significant.

    Returns
    -------
    The share, 1 is perfect; 0, as in the challenge, where no gene is really significant.

    Examples
    --------
    >>> predicted, observed = [2.0, 1.0, 0.1], [2.5, 0.1, -1.0]  # log fold changes of three genes
    >>> vc.metrics.de_overlap(predicted, observed, predicted_fdr=[0.01, 0.01, 0.9], observed_fdr=[0.01, 0.9, 0.01])
    0.5
    """
    predicted, observed = _ranked(predicted_lfc, predicted_fdr, observed_lfc, observed_fdr, threshold)
    return _overlap(predicted, observed, len(observed) if k is None else min(k, len(observed)))


def de_precision(
    predicted_lfc: ArrayLike,
    observed_lfc: ArrayLike,
    *,
    predicted_fdr: ArrayLike,
    observed_fdr: ArrayLike,
    k: int | None = None,
    threshold: float = 0.05,
) -> float:
    """Share of the genes predicted to change that are among as many of the really changed ones.

    `precision_at_N` of cell-eval: the n_pred significant predicted genes against the n_pred really significant ones
    with the largest absolute log fold change.

    Parameters
    ----------
    predicted_lfc
        Predicted log fold changes, (n_genes,).
    observed_lfc
        Real log fold changes, (n_genes,).
    predicted_fdr
        Predicted adjusted p-values, (n_genes,).
    observed_fdr
        Real adjusted p-values, (n_genes,).
    k
        Compare only the k significant genes of largest absolute log fold change on either side.
    threshold
        Adjusted p-value below which a gene is significant.

    Returns
    -------
    The share, 1 is perfect; 0 where no gene is predicted to be significant.

    Examples
    --------
    >>> predicted, observed = [2.0, 1.0, 0.1], [2.5, 0.1, -1.0]  # log fold changes of three genes
    >>> vc.metrics.de_precision(predicted, observed, predicted_fdr=[0.01, 0.01, 0.9], observed_fdr=[0.01, 0.9, 0.01])
    0.5
    """
    predicted, observed = _ranked(predicted_lfc, predicted_fdr, observed_lfc, observed_fdr, threshold)
    return _overlap(predicted, observed, len(predicted) if k is None else min(k, len(predicted)))


def de_spearman_lfc(
    predicted_lfc: ArrayLike, observed_lfc: ArrayLike, *, observed_fdr: ArrayLike, threshold: float = 0.05
) -> float:
    """Spearman correlation of log fold changes over the really significant genes.

    Parameters
    ----------
    predicted_lfc
        Predicted log fold changes, (n_genes,).
    observed_lfc
        Real log fold changes, (n_genes,).
    observed_fdr
        Real adjusted p-values, (n_genes,).
    threshold
        Adjusted p-value below which a gene is significant.

    Returns
    -------
    The correlation, 1 is perfect; NaN where fewer than two genes are significant or one side is constant over them.

    Examples
    --------
    >>> vc.metrics.de_spearman_lfc([2.0, 1.0, -1.0], [2.5, 0.5, -0.2], observed_fdr=[0.01, 0.01, 0.04])
    1.0
    """
    predicted, observed, fdr = _same_genes(predicted_lfc, observed_lfc, observed_fdr)
    x, y = (stats.rankdata(v[fdr < threshold]) for v in (predicted, observed))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def de_direction_match(
    predicted_lfc: ArrayLike, observed_lfc: ArrayLike, *, observed_fdr: ArrayLike, threshold: float = 0.05
) -> float:
    """Share of the really significant genes whose predicted change has the right sign.

    Parameters
    ----------
    predicted_lfc
        Predicted log fold changes, (n_genes,).
    observed_lfc
        Real log fold changes, (n_genes,).
    observed_fdr
        Real adjusted p-values, (n_genes,).
    threshold
        Adjusted p-value below which a gene is significant.

    Returns
    -------
    The share, 1 is perfect; NaN where no gene is significant.

    Examples
    --------
    >>> predicted, observed = [2.0, 1.0, 0.1], [2.5, 0.1, -1.0]  # log fold changes of three genes
    >>> vc.metrics.de_direction_match(predicted, observed, observed_fdr=[0.01, 0.9, 0.01])
    0.5
    """
    predicted, observed, fdr = _same_genes(predicted_lfc, observed_lfc, observed_fdr)
    true = fdr < threshold
    return float((np.sign(predicted) == np.sign(observed))[true].mean()) if true.any() else float("nan")


def de_recall(predicted_fdr: ArrayLike, observed_fdr: ArrayLike, *, threshold: float = 0.05) -> float:
    """Share of the really significant genes that are predicted to be, however many are predicted.

    Parameters
    ----------
    predicted_fdr
        Predicted adjusted p-values, (n_genes,).
    observed_fdr
        Real adjusted p-values, (n_genes,).
    threshold
        Adjusted p-value below which a gene is significant.

    Returns
    -------
    The share, 1 is perfect; NaN where no gene is significant.

    Examples
    --------
    >>> vc.metrics.de_recall([0.01, 0.2, 0.01], [0.01, 0.01, 0.9])
    0.5
    """
    predicted, observed = _same_genes(predicted_fdr, observed_fdr)
    true = observed < threshold
    return float((predicted < threshold)[true].mean()) if true.any() else float("nan")


def pr_auc(
    predicted_fdr: ArrayLike, observed_fdr: ArrayLike, *, threshold: float = 0.05, floor: float = 1e-10
) -> float:
    """Average precision of finding the really significant genes by the predicted adjusted p-value.

    Parameters
    ----------
    predicted_fdr
        Predicted adjusted p-values, (n_genes,).
    observed_fdr
        Real adjusted p-values, (n_genes,).
    threshold
        Adjusted p-value below which a gene is significant.
    floor
        Adjusted p-values below it tie, as in cell-eval.

    Returns
    -------
    The area, 1 is perfect, the share of significant genes chance; NaN where all genes are significant, or none.

    Examples
    --------
    >>> round(vc.metrics.pr_auc([0.01, 0.02, 0.9], [0.01, 0.9, 0.01]), 3)
    0.833
    """
    true, score = _retrieval(predicted_fdr, observed_fdr, threshold, floor)
    if not 0 < true.sum() < len(true):
        return float("nan")
    order = np.argsort(-score, kind="stable")
    found, score = np.cumsum(true[order]), score[order]
    last = np.flatnonzero(np.append(np.diff(score) != 0, True))  # of the genes that tie
    precision = found[last] / (last + 1)
    return float(precision @ np.diff(found[last], prepend=0) / found[-1])


def roc_auc(
    predicted_fdr: ArrayLike, observed_fdr: ArrayLike, *, threshold: float = 0.05, floor: float = 1e-10
) -> float:
    """Area under the ROC curve of finding the really significant genes by the predicted adjusted p-value.

    Parameters
    ----------
    predicted_fdr
        Predicted adjusted p-values, (n_genes,).
    observed_fdr
        Real adjusted p-values, (n_genes,).
    threshold
        Adjusted p-value below which a gene is significant.
    floor
        Adjusted p-values below it tie, as in cell-eval.

    Returns
    -------
    The area, 1 is perfect, 0.5 chance; NaN where all genes are significant, or none.

    Examples
    --------
    >>> vc.metrics.roc_auc([0.01, 0.02, 0.9], [0.01, 0.9, 0.01])
    0.5
    """
    true, score = _retrieval(predicted_fdr, observed_fdr, threshold, floor)
    n = int(true.sum())
    if not 0 < n < len(true):
        return float("nan")
    return float((stats.rankdata(score)[true].sum() - n * (n + 1) / 2) / (n * (len(true) - n)))


def _retrieval(predicted_fdr, observed_fdr, threshold: float, floor: float) -> tuple[np.ndarray, np.ndarray]:
    predicted, observed = _same_genes(predicted_fdr, observed_fdr)
    return observed < threshold, -np.log10(predicted.clip(floor, 1))


def _ranked(predicted_lfc, predicted_fdr, observed_lfc, observed_fdr, threshold: float) -> list[np.ndarray]:
    """Significant genes of either side, by falling |log fold change|."""
    arrays = _same_genes(predicted_lfc, predicted_fdr, observed_lfc, observed_fdr)
    significant = [np.flatnonzero(fdr < threshold) for fdr in arrays[1::2]]
    return [genes[largest(np.abs(lfc[genes]), None)] for lfc, genes in zip(arrays[::2], significant, strict=True)]


def _overlap(predicted: np.ndarray, observed: np.ndarray, k: int) -> float:
    return len(np.intersect1d(predicted[:k], observed[:k])) / k if k else 0.0


def _same_genes(*arrays: ArrayLike) -> list[np.ndarray]:
    out = [np.asarray(a, dtype=np.float64) for a in arrays]
    if len({a.shape for a in out}) > 1 or out[0].ndim != 1:
        raise ValueError(f"all must be of one perturbation and the same genes, got shapes {[a.shape for a in out]}.")
    return out
