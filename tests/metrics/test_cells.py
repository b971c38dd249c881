from __future__ import annotations

import time

import numpy as np
import pytest

from virtualcell import metrics
from virtualcell.metrics._cells import mean_distance, mean_distances


def test_energy_distance_against_a_loop_over_all_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 5)), rng.normal(1, 2, size=(9, 5))

    def mean_distance(a, b):
        return np.mean([np.sqrt(((p - q) ** 2).sum()) for p in a for q in b])

    expected = mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2
    assert metrics.energy_distance(x, y) == pytest.approx(expected)
    assert metrics.energy_distance(x, x) == pytest.approx(0)


def test_energy_distance_of_float32_far_from_the_origin_keeps_its_digits():
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (30, 8))
    assert metrics.energy_distance(x + 1e3, x + 1e3) == pytest.approx(0, abs=1e-9)
    expected = metrics.energy_distance(x, x[:10] + 0.5)
    assert metrics.energy_distance(x + 1e3, x[:10] + 1e3 + 0.5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "kind", ["one cell repeated", "copies of real cells", "two profiles", "little noise", "a line"]
)
def test_distances_between_cells_that_are_nearly_the_same(kind):
    rng = np.random.default_rng(6)
    y = rng.gamma(1, 1, (60, 40)).astype(np.float32)
    x = {
        "one cell repeated": np.repeat(y[:1], 90, axis=0),
        "copies of real cells": y[rng.integers(60, size=90)],
        "two profiles": y[rng.integers(2, size=90)],
        "little noise": y.mean(axis=0) + rng.normal(0, rng.choice([1e-4, 0.03], (90, 1)), (90, 40)),
        "a line": y[0] + np.linspace(0, 1, 90)[:, None] * y[1],
    }[kind].astype(np.float32)

    def loop(a, b):
        return np.mean([np.linalg.norm(p - q) for p in a.astype(np.float64) for q in b.astype(np.float64)])

    expected = loop(x, x), loop(y, y), loop(x, y)
    assert mean_distances(np.concatenate([x, y]), 90) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert mean_distance(x, y) == pytest.approx(expected[2], rel=1e-5)
    assert mean_distance(x, x) == pytest.approx(expected[0], rel=1e-5, abs=1e-12)


def test_a_prediction_of_one_profile_costs_about_as_much_as_one_of_cells():
    rng = np.random.default_rng(7)
    x, y = rng.random((2, 600, 1000), dtype=np.float32)

    def seconds(cells):
        start = time.perf_counter()
        metrics.energy_distance(cells, y)
        return time.perf_counter() - start

    # 180,000 pairs, of which each took longer on its own than all of them do now
    profile = np.repeat(x[:1], 600, axis=0)
    assert min(seconds(profile) for _ in range(3)) < 20 * min(seconds(x) for _ in range(3))


def test_mmd_against_a_loop_over_all_pairs():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 3)), rng.normal(1, 2, size=(7, 3))

    def squared(a, b):
        return ((a - b) ** 2).sum()

    scale = np.median([squared(y[i], y[j]) for i in range(7) for j in range(i)])

    def kernel(a, b):
        return np.mean([np.exp(-squared(a, b) / (2 * w**2 * scale)) for w in (0.5, 1, 2)])

    own = np.mean([kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    other = np.mean([kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    cross = np.mean([kernel(p, q) for p in x for q in y])
    assert metrics.mmd(x, y) == pytest.approx(own + other - 2 * cross)
    assert np.isnan(metrics.mmd(x[:1], y))
    assert np.isnan(metrics.mmd(x, np.ones((4, 3))))


def test_mmd_is_about_zero_for_two_samples_of_one_distribution():
    rng = np.random.default_rng(4)
    draws = [metrics.mmd(rng.normal(size=(80, 5)), rng.normal(size=(80, 5))) for _ in range(20)]
    assert abs(np.mean(draws)) < 2e-3
    assert metrics.mmd(rng.normal(0.5, 1, (80, 5)), rng.normal(size=(80, 5))) > 10 * np.abs(draws).max() / 3


def test_variance_ratio_sees_mode_collapse():
    rng = np.random.default_rng(5)
    real = rng.normal(0, [1, 2, 3], (4000, 3))
    assert metrics.variance_ratio(real.var(0), real.var(0)) == 1
    assert metrics.variance_ratio((real / 2).var(0), real.var(0)) == pytest.approx(0.25)
    # the mean of the ratios, weighted by the real variance
    assert metrics.variance_ratio([1.0, 8.0], [4.0, 4.0]) == pytest.approx((1 / 4 * 4 + 8 / 4 * 4) / 8)
    assert np.isnan(metrics.variance_ratio([1.0], [0.0]))


def test_errors_name_what_is_wrong():
    x = np.zeros((5, 4))
    for function in (metrics.energy_distance, metrics.mmd):
        with pytest.raises(ValueError, match="cells x the same genes"):
            function(x, x[:, 1:])
    with pytest.raises(ValueError, match=r"same genes, got shapes \(4,\) and \(3,\)"):
        metrics.variance_ratio(np.ones(4), np.ones(3))
