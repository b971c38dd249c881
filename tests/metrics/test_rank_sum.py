import numpy as np
import pytest
from scipy import sparse, stats

from virtualcell.metrics import _rank_sum


def of_scipy(matrix, codes):
    p = [
        stats.mannwhitneyu(matrix[codes == k], matrix[codes == 0], method="asymptotic", use_continuity=True).pvalue
        for k in range(1, codes.max() + 1)
    ]
    return np.nan_to_num(np.stack(p), nan=1)  # where all cells of both sets have one value


@pytest.mark.parametrize("kind", ["whole numbers", "fractions", "negative ones too"])
@pytest.mark.parametrize("n_control", [1, 15, 400])
def test_p_values_are_those_of_scipy_whatever_the_numbers_of_cells_and_ties(kind, n_control):
    rng = np.random.default_rng(n_control)
    codes = rng.permutation(np.repeat(np.arange(5), [n_control, 1, 2, 60, 900]))
    matrix = rng.poisson(rng.gamma(0.5, 2, 30), (len(codes), 30)).astype(np.float64)
    matrix[codes == 3, :10] += 2
    matrix[:, 0] = 0
    matrix[codes == 0, 1] = 0
    if kind == "fractions":
        matrix = np.log1p(matrix * rng.uniform(0.5, 2, (len(codes), 1))).astype(np.float32)
    if kind == "negative ones too":
        matrix -= 1
    expected = of_scipy(matrix.astype(np.float64), codes)
    for form in (matrix, sparse.csr_matrix(matrix)):
        p, fdr = _rank_sum.rank_sum_test(form, codes, n_jobs=2)
        np.testing.assert_allclose(p, expected, rtol=1e-9)
        np.testing.assert_allclose(fdr, stats.false_discovery_control(expected, axis=1), rtol=1e-9)


@pytest.mark.parametrize("sparsely", [True, False])
def test_genes_that_are_tested_a_few_at_a_time_give_the_same(monkeypatch, sparsely):
    rng = np.random.default_rng(0)
    matrix, codes = rng.poisson(0.7, (120, 23)).astype(np.float32), rng.integers(0, 4, 120)
    matrix = sparse.csr_matrix(matrix) if sparsely else matrix
    expected = _rank_sum.rank_sum_test(matrix, codes)[0]
    monkeypatch.setattr(_rank_sum, "_AT_A_TIME", 200)  # five genes
    before = matrix.copy()
    np.testing.assert_array_equal(_rank_sum.rank_sum_test(matrix, codes)[0], expected)
    assert (matrix != before).sum() == 0  # which is left as it was
