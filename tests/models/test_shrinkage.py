from __future__ import annotations

import numpy as np
import pytest

from virtualcell.models._shrinkage import shrink, shrink_with_signs


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def simulated(rng, *, n_rows=40, n_genes=1000, share=0.2, size=4.0, error=0.3):
    """True effects of a share of the genes, normal, and their measurement."""
    truth = size * error * rng.normal(size=(n_rows, n_genes)) * (rng.random((n_rows, n_genes)) < share)
    measured = truth + error * rng.normal(size=truth.shape)
    return truth.astype(np.float32), measured.astype(np.float32), np.full(truth.shape, error**2, np.float32)


@pytest.mark.parametrize("error", [1e-3, 0.3, 20.0])
def test_noise_becomes_nearly_nothing(rng, error):
    effects = error * rng.normal(size=(20, 500))
    found = shrink(effects, np.full(effects.shape, error**2))
    assert rms(found.mean) < 0.15 * error
    assert found.mean.dtype == found.variance.dtype == np.float32


def test_one_gene_far_beyond_its_error_stays_as_it_is(rng):
    effects = rng.normal(size=(10, 501))
    effects[:, 7] = 20 * np.sign(effects[:, 7])
    found = shrink(effects, np.ones(effects.shape)).mean
    np.testing.assert_allclose(found[:, 7], effects[:, 7], rtol=0.02)
    assert rms(np.delete(found, 7, axis=1)) < 0.25


def test_a_row_of_large_effects_is_hardly_shrunk(rng):
    truth = 6 * rng.normal(size=(10, 500))
    effects = truth + rng.normal(size=truth.shape)
    found = shrink(effects, np.ones(effects.shape)).mean
    assert (found * effects).sum() / np.square(effects).sum() > 0.95
    assert rms(found - truth) <= 1.02 * rms(effects - truth)


def test_effects_without_error_are_kept_and_say_nothing_of_the_others(rng):
    effects = rng.normal(size=(5, 300)).astype(np.float32)
    known = rng.random(effects.shape) < 0.3
    found = shrink(effects, np.where(known, 0, 1))
    np.testing.assert_array_equal(found.mean[known], effects[known])
    assert not found.variance[known].any()
    larger = np.where(known, 100 * effects, effects)
    np.testing.assert_array_equal(shrink(larger, np.where(known, 0, 1)).mean[~known], found.mean[~known])
    np.testing.assert_array_equal(shrink(effects, np.zeros(effects.shape)).mean, effects)


@pytest.mark.parametrize(("share", "size"), [(0.05, 6.0), (0.2, 4.0), (0.5, 2.0), (1.0, 3.0)])
def test_the_posterior_is_nearer_to_the_truth_and_knows_how_near(rng, share, size):
    truth, measured, variance = simulated(rng, share=share, size=size)
    found = shrink(measured, variance)
    off = found.mean - truth
    assert rms(off) < rms(measured - truth)
    # too much is claimed where few genes have an effect: the other ones are not told from those of small effects
    assert 0.85 < found.variance.mean() / np.square(off).mean() < 1.4
    inside = np.abs(off) <= 1.96 * np.sqrt(found.variance) + 1e-6
    assert 0.92 < inside.mean() <= 0.995
    # as near as with the prior that made them
    keep = size**2 / (size**2 + 1)
    z = measured.astype(float) / 0.3
    odds = share / max(1 - share, 1e-9) / np.sqrt(1 + size**2) * np.exp(np.minimum(z**2 / 2 * keep, 500))
    best = measured * keep * odds / (1 + odds)
    assert np.square(off).mean() < 1.08 * np.square(best - truth).mean()


def test_no_effect_changes_its_sign_or_grows(rng):
    _, measured, variance = simulated(rng)
    found = shrink(measured, variance)
    assert (found.mean * measured >= 0).all()
    assert (np.abs(found.mean) <= np.abs(measured) * (1 + 1e-6)).all()
    assert (found.variance >= 0).all()


def test_what_is_kept_grows_with_the_effect_in_units_of_its_error(rng):
    effects = np.concatenate([rng.normal(size=500), np.linspace(0.5, 30, 60)])[None]
    found = shrink(effects, np.ones(effects.shape)).mean[0, 500:] / effects[0, 500:]
    assert (np.diff(found) > -1e-4).all()


def test_it_is_the_ratio_to_the_error_that_counts(rng):
    _, measured, variance = simulated(rng)
    one, other = shrink(measured, variance), shrink(8 * measured, 64 * variance)
    np.testing.assert_allclose(other.mean, 8 * one.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other.variance, 64 * one.variance, rtol=1e-4, atol=1e-5)


def test_the_order_of_rows_and_genes_changes_nothing(rng):
    _, measured, variance = simulated(rng, n_rows=600, n_genes=80)  # more rows than are worked on at a time
    variance = variance * rng.gamma(3, 0.3, size=variance.shape).astype(np.float32)
    found = shrink(measured, variance)
    rows, genes = rng.permutation(600), rng.permutation(80)
    again = shrink(measured[rows][:, genes], variance[rows][:, genes])
    for a, b in zip(found, again, strict=True):
        np.testing.assert_allclose(b, a[rows][:, genes], atol=1e-6)


def test_the_size_of_effects_in_other_rows_is_nothing_to_a_row(rng):
    """Other rows tell which genes move, not how far all of them do."""
    _, measured, variance = simulated(rng, n_rows=4)
    loud = np.concatenate([measured[:1], 50 * rng.permuted(measured[1:], axis=1)])
    quiet = np.concatenate([measured[:1], rng.permuted(measured[1:], axis=1)])
    one = shrink(measured[:1], variance[:1]).mean[0]
    for others in (loud, quiet):
        assert rms(shrink(others, variance).mean[0] - one) < 0.25 * rms(one)


def test_effects_beyond_all_scales_and_no_effects_at_all():
    found = shrink(np.array([[0.0, 1e4, -1e4]]), np.ones((1, 3)))
    assert np.isfinite(found.mean).all()
    np.testing.assert_allclose(found.mean[0, 1:], [1e4, -1e4], rtol=0.02)
    nothing = shrink(np.zeros((2, 5)), np.ones((2, 5)))
    assert not nothing.mean.any()
    assert shrink(np.zeros((0, 5)), np.zeros((0, 5))).mean.shape == (0, 5)


def test_a_gene_that_moves_in_other_rows_is_believed_more(rng):
    truth = np.zeros((30, 800), np.float32)
    truth[:, :40] = 2 * rng.normal(size=(30, 40))  # few genes, and the same ones in all rows
    measured = truth + rng.normal(size=truth.shape)
    variance = np.ones(truth.shape, np.float32)
    together = shrink(measured, variance).mean
    apart = np.concatenate(
        [shrink(row, row_variance).mean for row, row_variance in zip(measured[:, None], variance[:, None], strict=True)]
    )
    assert np.square(together - truth).mean() < 0.8 * np.square(apart - truth).mean()
    order = rng.permutation(800)
    np.testing.assert_allclose(shrink(measured[:, order], variance[:, order]).mean, together[:, order], rtol=1e-5)
    order = rng.permutation(30)
    np.testing.assert_allclose(shrink(measured[order], variance[order]).mean, together[order], rtol=1e-5)


def test_local_false_sign_rates_are_rates_of_false_signs(rng):
    truth, measured, variance = simulated(rng, share=1.0, size=1.0)
    found = shrink_with_signs(measured, variance)
    alone = np.concatenate([shrink(measured[[i]], variance[[i]]).mean for i in range(3)])
    np.testing.assert_allclose(found.mean[:3], alone, rtol=1e-5)
    is_false = np.sign(truth) != np.sign(measured)
    for low, high in ((0, 0.05), (0.05, 0.15), (0.15, 0.3), (0.3, 1)):
        here = (found.false_sign >= low) & (found.false_sign < high)
        assert here.sum() > 300
        assert is_false[here].mean() == pytest.approx(found.false_sign[here].mean(), abs=0.08)


def test_few_of_the_sure_signs_are_false_where_most_effects_are_zero(rng):
    truth, measured, variance = simulated(rng)
    sure = shrink_with_signs(measured, variance).false_sign < 0.05
    assert 0.08 < sure.mean() < 0.2  # of the fifth that has an effect, those far enough from zero
    assert (np.sign(truth) != np.sign(measured))[sure].mean() < 0.05


def test_a_sign_is_surer_the_further_an_effect_is_from_zero(rng):
    _, measured, variance = simulated(rng, n_rows=1)
    order = np.argsort(np.abs(measured[0]))
    rates = shrink_with_signs(measured, variance).false_sign[0, order]
    assert (np.diff(rates) <= 1e-6).all()
    assert rates[0] > 0.8
    assert rates[-1] < 1e-6


def test_an_effect_without_error_has_its_sign_and_none_has_none():
    found = shrink_with_signs(np.array([[1.0, 0.0, -2.0]]), np.zeros((1, 3)))
    np.testing.assert_array_equal(found.false_sign, [[0, 1, 0]])
    np.testing.assert_array_equal(found.mean, [[1, 0, -2]])
