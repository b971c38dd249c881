from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from virtualcell.data._counts import log_of
from virtualcell.data._emit import Dispersions, emit_counts, with_totals

N, GENES = 600, [f"G{i}" for i in range(80)]


def draw(n: int = N, dispersion: float = 0.3, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Negative binomial counts with means from .01 to 20, and library sizes that hold other genes too."""
    rng = np.random.default_rng(seed)
    depth = rng.lognormal(0, 0.4, n)
    mean = np.geomspace(0.01, 20, len(GENES)) * depth[:, None]
    rate = mean if dispersion == 0 else mean * rng.gamma(1 / dispersion, dispersion, mean.shape)
    return sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), np.rint(1000 + 3000 * depth)


def mean_log(counts: sparse.csr_matrix, library: np.ndarray) -> np.ndarray:
    return log_of(counts, library).toarray().astype(np.float64).mean(axis=0)


@pytest.fixture(scope="module")
def cells() -> tuple[sparse.csr_matrix, np.ndarray]:
    return draw()


@pytest.fixture(scope="module")
def change() -> np.ndarray:
    change = np.random.default_rng(1).normal(0, 0.3, len(GENES))
    change[::8] = 0
    return change


def test_means_are_met_to_within_one_count(cells, change):
    counts, library = cells
    got = emit_counts(counts, library, change, genes=GENES, dispersion=np.full(len(GENES), 0.3))
    np.testing.assert_array_equal(got.data, np.rint(got.data))
    assert got.data.min() >= 1
    before = mean_log(counts, library)
    one_count = np.log1p(1e4 / library.min()) / N
    np.testing.assert_allclose(mean_log(got, library), np.maximum(before + change, 0), atol=one_count)
    same = change == 0
    np.testing.assert_array_equal(got[:, same].toarray(), counts[:, same].toarray())
    falls = change < 0
    assert (got[:, falls].toarray() <= counts[:, falls].toarray()).all()
    rises = change > 0
    assert (got[:, rises].toarray() >= counts[:, rises].toarray()).all()


def test_a_gene_that_falls_to_nothing_but_for_rounding():
    """What is needed may be more than all counts by the last digit of a sum, and there is nothing left to draw then."""
    rng = np.random.default_rng(0)
    counts, library = sparse.csr_matrix(rng.poisson(1.0, (40, 400)).astype(np.float32)), rng.uniform(3e3, 2e4, 40)
    mean = np.log1p(counts.toarray().astype(np.float64) * (1e4 / library)[:, None]).mean(axis=0)
    genes = [f"G{i}" for i in range(400)]
    for short in (3e-16, 1e-15, 3e-15, 1e-14):
        assert emit_counts(counts, library, -mean * (1 - short), genes=genes).nnz == 0


def test_loss_is_binomial_and_gain_negative_binomial():
    n = 4000
    library, wanted = np.full(n, 5000.0), 6.0
    counts = sparse.csr_matrix(np.full((n, 1), 10, np.float32))
    fall = np.log1p(2 * stats.binom(10, 0.6).rvs(200_000, random_state=0)).mean() - np.log1p(20)
    left = emit_counts(counts, library, np.array([fall]), genes=["A"]).toarray().ravel()
    assert left.mean() == pytest.approx(6, rel=0.01)
    assert left.var() == pytest.approx(10 * 0.6 * 0.4, rel=0.1)
    none = sparse.csr_matrix((n, 1), dtype=np.float32)
    for dispersion in (0.0, 0.5):
        size = 1e9 if dispersion == 0 else 1 / dispersion
        law = stats.nbinom(size, size / (size + wanted))
        rise = np.log1p(2 * law.rvs(400_000, random_state=0)).mean()
        given = np.array([rise]), np.array([dispersion])
        got = emit_counts(none, library, given[0], genes=["A"], dispersion=given[1]).toarray().ravel()
        assert got.mean() == pytest.approx(wanted, rel=0.04)
        assert got.var() == pytest.approx(wanted + dispersion * wanted**2, rel=0.12)
        assert (got == 0).mean() == pytest.approx(law.pmf(0), abs=0.02)


def test_what_is_added_goes_by_library_size():
    library = np.repeat([2000.0, 8000.0], 2000)
    got = emit_counts(sparse.csr_matrix((4000, 1), dtype=np.float32), library, np.array([1.0]), genes=["A"])
    got = got.toarray().ravel()
    assert got[2000:].sum() / got[:2000].sum() == pytest.approx(4, rel=0.1)


def test_order_of_genes_changes_no_count_and_names_and_seed_do(cells, change):
    counts, library = cells
    how = {"dispersion": np.full(len(GENES), 0.3), "genes": GENES}
    one = emit_counts(counts, library, change, **how)
    order = np.random.default_rng(2).permutation(len(GENES))
    names = [GENES[i] for i in order]
    other = emit_counts(counts[:, order], library, change[order], genes=names, dispersion=how["dispersion"])
    np.testing.assert_array_equal(other.toarray(), one[:, order].toarray())
    alone = emit_counts(counts[:, :9], library, change[:9], genes=GENES[:9], dispersion=how["dispersion"][:9])
    np.testing.assert_array_equal(alone.toarray(), one[:, :9].toarray())
    for differently in ({"seed": 1}, {"key": "STAT1"}):
        assert (emit_counts(counts, library, change, **how, **differently) != one).nnz


def test_whole_libraries_keep_their_totals(cells, change):
    counts, _ = cells
    library = np.asarray(counts.sum(axis=1)).ravel().astype(float)
    got = emit_counts(counts, library, change, genes=GENES)
    np.testing.assert_array_equal(np.asarray(got.sum(axis=1)).ravel(), library)
    same = emit_counts(counts, library, np.zeros(len(GENES)), genes=GENES)
    np.testing.assert_array_equal(same.toarray(), counts.toarray())
    order = np.random.default_rng(2).permutation(len(GENES))
    other = emit_counts(counts[:, order], library, change[order], genes=[GENES[i] for i in order])
    np.testing.assert_array_equal(other.toarray(), got[:, order].toarray())


@pytest.mark.parametrize("change", [-50.0, 50.0])
def test_what_cannot_be_reached_stops_at_nothing_and_at_the_library(change):
    counts, library = sparse.csr_matrix(np.array([[3.0], [0.0], [7.0]], np.float32)), np.array([10.0, 20.0, 30.0])
    got = emit_counts(counts, library, np.array([change]), genes=["A"]).toarray().ravel()
    np.testing.assert_array_equal(got, 0 if change < 0 else library)


def test_totals_are_restored_in_proportion(cells):
    counts, _ = cells
    sums = np.asarray(counts.sum(axis=1)).ravel()
    for factor in (0.5, 2):
        got = with_totals(counts, np.rint(factor * sums), genes=GENES)
        np.testing.assert_array_equal(np.asarray(got.sum(axis=1)).ravel(), np.rint(factor * sums))
        high = np.asarray(counts.sum(axis=0)).ravel() > 1000
        ratio = np.asarray(got.sum(axis=0)).ravel()[high] / np.asarray(counts.sum(axis=0)).ravel()[high]
        np.testing.assert_allclose(ratio, factor, rtol=0.1)
        assert got.nnz <= counts.nnz
    empty = sparse.csr_matrix((1, len(GENES)), dtype=np.float32)
    with pytest.raises(ValueError, match="cell 0 of predicted expresses nothing"):
        with_totals(empty, np.array([5]), genes=GENES)
    filled = with_totals(empty, np.array([5]), genes=GENES, instead=counts[:1])
    assert filled.sum() == 5
    assert set(filled.indices) <= set(counts[:1].indices)


def test_dispersions_are_found_and_fall_with_the_mean_that_a_gene_rises_to():
    for dispersion in (0.0, 0.5):
        counts, library = draw(4000, dispersion, seed=3)
        library = library - 1000  # in proportion to the depth
        found = Dispersions.measure(counts, library)
        high = np.asarray(counts.mean(axis=0)).ravel() > 1
        assert np.median(found.own[high]) == pytest.approx(dispersion, abs=0.06)
    rare = counts.tolil()
    rare[:, 0] = 0
    rare[5, 0] = 40  # in one cell
    found = Dispersions.measure(rare.tocsr(), library)
    assert found.own[0] > 100
    assert found.after(np.full(len(GENES), 3.0))[0] < 2


def test_few_cells_and_silent_genes():
    counts, library = draw(5)
    assert (Dispersions.measure(counts, library).after(np.ones(len(GENES))) == 0).all()
    silent = Dispersions.measure(sparse.csr_matrix((40, 3), dtype=np.float32), np.full(40, 100.0))
    np.testing.assert_array_equal(silent.after(np.ones(3)), 0)
