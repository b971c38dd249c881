from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from virtualcell import metrics

# six genes: really significant are 0, 1, 2, 3; predicted 1, 2, 4; strongest first 3, 2, 1, 0 and 4, 2, 1
REAL = {"lfc": np.array([1.0, -2, 3, 4, 0.1, 0]), "fdr": np.array([0.01, 0.01, 0.001, 0.04, 0.5, 1])}
PREDICTED = {"lfc": np.array([0.5, 1, 2, -0.2, 3, 0]), "fdr": np.array([0.2, 0.02, 0.01, 0.6, 1e-5, 1])}
LFC = (PREDICTED["lfc"], REAL["lfc"])
FDR = {"predicted_fdr": PREDICTED["fdr"], "observed_fdr": REAL["fdr"]}


@pytest.fixture(scope="module")
def cells():
    """log1p of counts with ties, a gene that is absent everywhere and one that is absent from the control."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["b", "ctrl", "a"], [25, 40, 30])
    counts = rng.poisson(rng.gamma(1, 1, 40) * np.where(labels == "b", 2, 1)[:, None])
    counts[:, 7] = 0
    counts[labels == "ctrl", 8] = 0
    return sparse.csr_matrix(np.log1p(counts).astype(np.float32)), labels


def test_differential_expression_is_the_rank_sum_test_of_scipy(cells):
    matrix, labels = cells
    table = metrics.differential_expression(matrix, labels, control="ctrl", genes=[f"g{i}" for i in range(40)])
    assert list(table) == ["perturbation", "gene", "log2_fold_change", "p_value", "fdr"]
    assert list(table["perturbation"].cat.categories) == ["a", "b"]
    assert len(table) == 80
    dense = matrix.toarray().astype(np.float64)
    for name, one in table.groupby("perturbation", observed=True):
        assert list(one["gene"]) == [f"g{i}" for i in range(40)]
        x, y = dense[labels == name], dense[labels == "ctrl"]
        p = np.nan_to_num(stats.mannwhitneyu(x, y, method="asymptotic", use_continuity=True).pvalue, nan=1)
        np.testing.assert_allclose(one["p_value"], p, rtol=1e-9)
        np.testing.assert_allclose(one["fdr"], stats.false_discovery_control(p), rtol=1e-9)
        expected = np.log2((np.expm1(x.mean(0)) + 1e-9) / (np.expm1(y.mean(0)) + 1e-9))
        np.testing.assert_allclose(one["log2_fold_change"], expected, rtol=1e-6)
    assert table["log2_fold_change"].to_numpy()[[7, 47]].tolist() == [0, 0]


def test_how_values_are_stored_does_not_matter(cells):
    matrix, labels = cells
    expected = metrics.differential_expression(matrix, labels, control="ctrl")
    n, n_genes = matrix.shape
    full = sparse.csr_matrix(
        (matrix.toarray().ravel(), np.tile(np.arange(n_genes), n), np.arange(n + 1) * n_genes), shape=matrix.shape
    )
    assert (full.data == 0).any()  # zeros that are stored, in some of the cells
    mixed = sparse.vstack([matrix[:40], full[40:70], matrix[70:]], format="csr")
    halves = sparse.csr_matrix(
        (np.repeat(matrix.data / 2, 2), np.repeat(matrix.indices, 2), matrix.indptr * 2), shape=matrix.shape
    )
    for other in (full, mixed, halves):
        before = other.copy()
        pd.testing.assert_frame_equal(metrics.differential_expression(other, labels, control="ctrl"), expected)
        assert other.nnz == before.nnz  # and is left as it was
    with pytest.raises(ValueError, match="perturbations has cells without a label"):
        metrics.differential_expression(matrix, [None, *labels[1:]], control="ctrl")
    with pytest.raises(ValueError, match="genes has 1 names for 40 columns"):
        metrics.differential_expression(matrix, labels, control="ctrl", genes=["g"])
    broken = matrix.copy()
    broken.data[3] = np.nan
    for wrong in (broken, broken.toarray()):
        with pytest.raises(ValueError, match="cells holds NaN or infinite values"):
            metrics.differential_expression(wrong, labels, control="ctrl")


def test_without_a_pseudocount_a_gene_that_appears_changes_infinitely(cells):
    matrix, labels = cells
    table = metrics.differential_expression(matrix, labels, control="ctrl", pseudocount=0)
    assert table["log2_fold_change"].to_numpy()[[7, 8]].tolist() == [0, np.inf]


def test_sparse_and_dense_unsorted_and_permuted_agree(cells, capfd):
    matrix, labels = cells
    table = metrics.differential_expression(matrix, labels, control="ctrl")
    order = np.random.default_rng(1).permutation(len(labels))
    genes = np.random.default_rng(2).permutation(40)
    dense = metrics.differential_expression(matrix.toarray()[order], labels[order], control="ctrl", n_jobs=2)
    pd.testing.assert_frame_equal(dense, table, rtol=1e-6)
    permuted = metrics.differential_expression(matrix[:, genes], labels, control="ctrl", genes=genes)
    permuted = permuted.assign(gene=permuted["gene"].astype(int)).sort_values(["perturbation", "gene"])
    np.testing.assert_allclose(permuted["fdr"], table["fdr"])
    assert capfd.readouterr() == ("", "")


def test_with_a_pseudocount_of_1_the_change_is_the_difference_of_means(cells):
    matrix, labels = cells
    dense = matrix.toarray().astype(np.float64)
    for form in (matrix, matrix.toarray()):
        table = metrics.differential_expression(form, labels, control="ctrl", pseudocount=1)
        for name, one in table.groupby("perturbation", observed=True):
            difference = dense[labels == name].mean(0) - dense[labels == "ctrl"].mean(0)
            np.testing.assert_allclose(one["log2_fold_change"], difference / np.log(2), atol=1e-12)


def test_calls_in_threads_leave_stderr_alone_and_write_nothing_to_it(cells, capfd):
    matrix, labels = cells
    stderr, seen = sys.stderr, []
    expected = metrics.differential_expression(matrix, labels, control="ctrl")

    def call():
        for _ in range(3):
            seen.append(metrics.differential_expression(matrix, labels, control="ctrl", n_jobs=2))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        assert sys.stderr is stderr  # what others write meanwhile is not lost either
        time.sleep(1e-4)
    for table in seen:
        pd.testing.assert_frame_equal(table, expected)
    assert len(seen) == 12
    assert capfd.readouterr() == ("", "")


def test_numbers_of_threads_are_left_alone_in_overlapping_calls():
    # in a process of its own: numba sets the number once, when it starts
    script = """
import threading, numba, numpy as np, torch
from scipy import sparse
from virtualcell import metrics
torch.set_num_threads(1)
found = []
def call(n):
    x = sparse.csr_matrix(np.random.default_rng(0).poisson(1, (n, 30)), dtype=np.float32)
    metrics.differential_expression(x, np.arange(n) % 2, control="0")
    found.append((torch.get_num_threads(), numba.get_num_threads()))
threads = [threading.Thread(target=call, args=(n,)) for n in (400, 4000)]
[t.start() for t in threads], [t.join() for t in threads], call(100)
assert found == [(1, numba.config.NUMBA_NUM_THREADS)] * 3, found
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_minus_one_means_all_cores(cells):
    matrix, labels = cells
    expected = metrics.differential_expression(matrix, labels, control="ctrl")
    for n_jobs in (-1, 1000):  # and more than there are do no harm
        table = metrics.differential_expression(matrix, labels, control="ctrl", n_jobs=n_jobs)
        pd.testing.assert_frame_equal(table, expected)
    with pytest.raises(ValueError, match="n_jobs=0 must be a number of threads: 1 or more, or -1"):
        metrics.differential_expression(matrix, labels, control="ctrl", n_jobs=0)


def test_overlap_and_precision_by_hand():
    assert metrics.de_overlap(*LFC, **FDR) == pytest.approx(2 / 4)
    assert metrics.de_overlap(*LFC, **FDR, k=2) == pytest.approx(1 / 2)  # 3, 2 against 4, 2
    assert metrics.de_precision(*LFC, **FDR) == pytest.approx(2 / 3)  # 4, 2, 1 against 3, 2, 1
    assert metrics.de_precision(*LFC, **FDR, k=1) == 0


def test_where_more_are_predicted_than_are_true_only_the_strongest_count():
    fdr = {"predicted_fdr": np.zeros(6), "observed_fdr": np.array([0, 1, 1, 0, 1, 1])}
    assert metrics.de_overlap([1.0, 5, 6, -7, 0, 0], REAL["lfc"], **fdr) == 0.5  # 3 and 2 count, 0 does not


def test_recall_direction_and_rank_by_hand():
    assert metrics.de_recall(PREDICTED["fdr"], REAL["fdr"]) == pytest.approx(2 / 4)
    assert metrics.de_direction_match(*LFC, observed_fdr=REAL["fdr"]) == pytest.approx(2 / 4)
    expected = stats.spearmanr([0.5, 1, 2, -0.2], [1, -2, 3, 4]).statistic
    assert metrics.de_spearman_lfc(*LFC, observed_fdr=REAL["fdr"]) == pytest.approx(expected)


def test_areas_by_hand():
    # by predicted p: 4 (no), 2 (yes), 1 (yes), 0 (yes), 3 (yes), 5 (no)
    assert metrics.pr_auc(PREDICTED["fdr"], REAL["fdr"]) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4)
    assert metrics.roc_auc(PREDICTED["fdr"], REAL["fdr"]) == pytest.approx(4 / 8)
    # everything below the floor ties
    tiny, true = np.array([1e-300, 1e-200, 0.5]), np.array([1.0, 0.0, 1.0])
    assert metrics.roc_auc(tiny, true) == pytest.approx(0.75)
    assert metrics.roc_auc(tiny, true, floor=0.0 + 1e-320) == pytest.approx(0.5)


def test_the_truth_is_perfect_and_nothing_to_find_is_said():
    fdr = {"predicted_fdr": REAL["fdr"], "observed_fdr": REAL["fdr"]}
    lfc = (REAL["lfc"], REAL["lfc"])
    assert metrics.de_overlap(*lfc, **fdr) == metrics.de_precision(*lfc, **fdr) == 1
    assert metrics.de_spearman_lfc(*lfc, observed_fdr=REAL["fdr"]) == pytest.approx(1)
    assert metrics.de_direction_match(*lfc, observed_fdr=REAL["fdr"]) == 1
    assert metrics.de_recall(**fdr) == metrics.pr_auc(**fdr) == metrics.roc_auc(**fdr) == 1
    none = np.ones(6)
    assert metrics.de_overlap(*lfc, predicted_fdr=none, observed_fdr=none) == 0
    assert metrics.de_precision(*lfc, predicted_fdr=none, observed_fdr=none) == 0
    for value in (
        metrics.de_recall(none, none),
        metrics.pr_auc(none, none),
        metrics.roc_auc(none, none),
        metrics.de_direction_match(*lfc, observed_fdr=none),
        metrics.de_spearman_lfc(*lfc, observed_fdr=none),
    ):
        assert np.isnan(value)


def test_errors_name_what_is_wrong(cells):
    matrix, labels = cells
    with pytest.raises(ValueError, match=r"control='DMSO' must label some of the cells.*found \['a', 'b', 'ctrl'\]"):
        metrics.differential_expression(matrix, labels, control="DMSO")
    with pytest.raises(ValueError, match="perturbations has 94 labels for 95 cells"):
        metrics.differential_expression(matrix, labels[1:], control="ctrl")
    with pytest.raises(ValueError, match="one perturbation and the same genes"):
        metrics.de_recall(np.ones(5), np.ones(6))
