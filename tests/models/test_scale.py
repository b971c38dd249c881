from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from virtualcell.models._effects import Effects
from virtualcell.models._scale import OFFSET, as_ratios, change_of_mean, on_ratio_scale


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def effects_of(change: np.ndarray, controls: np.ndarray, variance: float = 0.0) -> Effects:
    """Effects of one perturbation, in each of several contexts."""
    names = [f"c{i}" for i in range(len(controls))]
    found = Effects.from_effects(change, names, ["p"] * len(names), controls)
    return dataclasses.replace(found, variance=np.full_like(found.effects, variance))


def test_the_way_there_and_back(rng):
    controls = rng.gamma(1, size=(3, 50)).astype(np.float32)
    change = rng.normal(size=(3, 50)).astype(np.float32)
    found = as_ratios(effects_of(change, controls)).effects
    np.testing.assert_allclose(change_of_mean(controls, found), np.maximum(change, -controls), atol=2e-5)
    assert not change_of_mean(controls, np.zeros(50)).round(5).any()


def test_a_gene_that_doubles_doubles_at_any_level():
    counts = np.array([[2.0, 20.0]])
    low, high = np.log1p(counts), np.log1p(10 * counts)
    effect = as_ratios(effects_of(np.log1p(2 * counts) - low, low)).effects[0]
    reached = np.expm1(high[0] + change_of_mean(high[0], effect))
    np.testing.assert_allclose(reached, 20 * counts[0], rtol=0.05)
    # far below the constant changes add: a ratio is noise over noise there
    silent = np.log1p(np.array([[1e-4]]))
    effect = as_ratios(effects_of(np.log1p([[1e-2]]) - silent, silent)).effects[0]
    assert np.expm1(high[0] + change_of_mean(high[0], effect))[0] < 1.2 * 10 * counts[0, 0]
    assert counts.min() > OFFSET


def test_no_effect_makes_expression_negative_and_a_rise_raises(rng):
    base = np.concatenate([[0.0], rng.gamma(1, size=99)])
    falls, rises = (change_of_mean(base, np.full(100, e)) for e in (-50.0, 1.0))
    np.testing.assert_allclose(base + falls, 0, atol=1e-6)
    assert (rises > 0).all()


def test_errors_by_the_delta_method(rng):
    base, error = np.log1p(np.array([0.5, 5.0, 50.0])), 0.02
    change = np.array([0.3, -0.2, 0.5])
    found = as_ratios(effects_of(change[None], base[None], error**2))
    draws = base + change + error * rng.normal(size=(20_000, 3))
    np.testing.assert_allclose(np.sqrt(found.variance[0]), on_ratio_scale(draws).std(axis=0), rtol=0.05)
    assert (found.n_cells == 1).all()
    assert found.perturbations == ["p"]
