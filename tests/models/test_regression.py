from __future__ import annotations

import numpy as np
import pytest

from virtualcell.models._regression import PENALTIES, FeatureFit, fit_features, nearest_perturbations, ridge


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_ridge_against_the_normal_equations(rng):
    x, y, query = rng.normal(size=(25, 6)), rng.normal(size=(25, 4)) + 2, rng.normal(size=(3, 6))
    fit = ridge(x, y, penalties=np.array([0.3]))
    unit = ((x - x.mean(0)) ** 2).sum() / len(x)

    def solve(x, y, query):
        xm, ym = x.mean(0), y.mean(0)
        gram = (x - xm).T @ (x - xm) + 0.3 * unit * np.eye(6)
        return ym + (query - xm) @ np.linalg.solve(gram, (x - xm).T @ (y - ym))

    np.testing.assert_allclose(fit.effect(query), solve(x, y, query), rtol=1e-5)
    for i in range(25):
        rest = np.arange(25) != i
        np.testing.assert_allclose(fit.leave_one_out[i], solve(x[rest], y[rest], x[i]), rtol=1e-5)


def test_ridge_chooses_the_penalty_that_leave_one_out_would(rng):
    x = rng.normal(size=(40, 10))
    y = x @ rng.normal(size=(10, 5)) + 3 * rng.normal(size=(40, 5))
    fit = ridge(x, y)
    errors = [((ridge(x, y, penalties=np.array([p])).leave_one_out - y) ** 2).sum() for p in PENALTIES]
    assert fit.penalty == PENALTIES[np.argmin(errors)]
    assert PENALTIES[0] < fit.penalty < PENALTIES[-1]
    assert ridge(x, rng.normal(size=(40, 50))).penalty > 30 * fit.penalty  # nothing to find


def test_ridge_sums_over_combinations(rng):
    x, a = rng.normal(size=(30, 4)), rng.normal(size=(4, 3))
    pairs = rng.integers(30, size=(20, 2))
    features = np.concatenate([x, x[pairs].sum(axis=1)])
    count = np.repeat([1.0, 2.0], [30, 20])
    fit = ridge(features, features @ a + count[:, None] * 5, count)
    np.testing.assert_allclose(fit.intercept, 5, atol=0.02)
    np.testing.assert_allclose(fit.effect(x[0] + x[1], 2), (x[0] + x[1]) @ a + 10, atol=0.05)


def test_nearest_perturbations_by_hand(rng):
    features, effects, query = rng.normal(size=(8, 3)), rng.normal(size=(8, 5)), rng.normal(size=(2, 3))
    got = nearest_perturbations(features, effects, query, k=3)
    for q, g in zip(query, got, strict=True):
        similar = [q @ f / np.linalg.norm(q) / np.linalg.norm(f) for f in features]
        np.testing.assert_allclose(g, effects[np.argsort(similar)[-3:]].mean(0))
    np.testing.assert_allclose(nearest_perturbations(features, effects, query, k=50), [effects.mean(0)] * 2)
    np.testing.assert_allclose(nearest_perturbations(features, effects, 9 * query, k=3), got)
    with pytest.raises(ValueError, match="k=0: at least one neighbour"):
        nearest_perturbations(features, effects, query, k=0)


# -- the better one ---------------------------------------------------------------------------------------------------


def clusters(rng, *, error=0.3) -> tuple[np.ndarray, np.ndarray]:
    """Perturbations of eight pathways, whose effects are not linear in the two features."""
    angle = np.repeat(np.arange(8), 8) * np.pi / 4
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.02 * rng.normal(size=(64, 2))
    effects = np.repeat(rng.normal(size=(8, 30)), 8, axis=0)
    return features, effects + error * rng.normal(size=effects.shape)


def test_neighbours_are_taken_where_effects_go_by_pathway(rng):
    features, effects = clusters(rng)
    fit = fit_features(features, effects, np.ones(64))
    assert len(fit.features) == 64
    assert fit.k == 5
    assert not fit.coefficients.any()
    assert not fit.intercept.any()
    assert fit.amplitude > 0.9
    expected = nearest_perturbations(features.astype(np.float32), effects.astype(np.float32), features[:3], k=5)
    np.testing.assert_allclose(fit.effect(features[:3]), expected, rtol=1e-5)


def test_the_regression_is_taken_where_it_is_clearly_better(rng):
    features = rng.normal(size=(60, 6))
    effects = features @ rng.normal(size=(6, 30)) + 0.3 * rng.normal(size=(60, 30)) + 1
    fit = fit_features(features, effects, np.ones(60))
    assert not len(fit.features)
    assert fit.amplitude > 0.9
    expected = ridge(features, effects)
    np.testing.assert_allclose(fit.effect(2 * features[:3]), expected.effect(2 * features[:3]), rtol=1e-5)


def test_neighbours_are_taken_where_neither_tells_anything(rng, caplog):
    features, effects = rng.normal(size=(60, 6)), rng.normal(size=(60, 30))
    with caplog.at_level("INFO", logger="virtualcell"):
        fit = fit_features(features, effects, np.ones(60))
    assert len(fit.features) == 60
    assert np.square(fit.amplitude * fit.effect(features)).mean() < 0.02  # of 1
    assert "never measured follow from features by their" in caplog.text


def test_combinations_are_no_neighbours(rng):
    features, effects = clusters(rng)
    pairs = rng.integers(64, size=(30, 2))
    x = np.concatenate([features, features[pairs].sum(axis=1)])
    y = np.concatenate([effects, effects[pairs].sum(axis=1)])
    fit = fit_features(x, y, np.repeat([1.0, 2.0], [64, 30]))
    assert len(fit.features) == 64
    np.testing.assert_allclose(fit.effects, effects, rtol=1e-5)


def test_the_order_of_perturbations_decides_nothing(rng):
    features, effects = clusters(rng)
    order = rng.permutation(64)
    one, other = (fit_features(features[i], effects[i], np.ones(64)) for i in (np.arange(64), order))
    assert (one.k, len(one.features)) == (other.k, len(other.features))
    np.testing.assert_allclose(other.effect(features[:5]), one.effect(features[:5]), atol=1e-5)


def test_effects_as_scores_on_axes_are_the_same_effects(rng):
    for features, effects in (clusters(rng), (x := rng.normal(size=(60, 6)), x @ rng.normal(size=(6, 30)))):
        fit = fit_features(features, effects, np.ones(len(features)))
        axes = np.linalg.svd(effects, full_matrices=False)[2].astype(np.float32)
        np.testing.assert_allclose(fit.on(axes).effect(features) @ axes, fit.effect(features), atol=1e-4)


def test_one_or_two_perturbations_and_no_features(rng):
    for n in (1, 2):
        fit = fit_features(rng.normal(size=(n, 3)), rng.normal(size=(n, 4)), np.ones(n))
        assert np.isfinite(fit.effect(rng.normal(size=(5, 3)))).all()
        assert 0 <= fit.amplitude <= 1
    assert not len(FeatureFit.none().intercept)
