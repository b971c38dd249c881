from __future__ import annotations

import numpy as np
import pytest

from virtualcell.models._regression import PENALTIES, nearest_perturbations, ridge


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
