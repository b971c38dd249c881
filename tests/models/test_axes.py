from __future__ import annotations

import logging

import numpy as np
import pytest

from virtualcell.models._axes import leading_axes, single_genes
from virtualcell.models._effects import Effects


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def programmes(rng, *, n_perturbations, n_contexts, n_programmes, n_genes=600, error=0.0) -> tuple[Effects, np.ndarray]:
    """Effects that are sums of few programmes, measured with an error; and the true ones."""
    c, p = np.divmod(np.arange(n_contexts * n_perturbations), n_perturbations)
    truth = rng.normal(size=(len(c), n_programmes)) @ rng.normal(size=(n_programmes, n_genes)) / n_programmes**0.5
    return with_error(rng, truth, c, p, error), truth


def with_error(rng, truth, context, perturbation, error) -> Effects:
    y = truth + error * rng.normal(size=truth.shape)
    effects = Effects.from_effects(y, [f"c{i:03d}" for i in context], [f"p{i:03d}" for i in perturbation])
    effects.variance[:] = error**2
    return effects


def test_of_few_effects_nothing_is_lost(rng):
    effects, _ = programmes(rng, n_perturbations=32, n_contexts=4, n_programmes=500, error=1.0)
    axes = leading_axes(effects.effects, effects.noise())
    assert axes.shape == (128, 600)
    np.testing.assert_allclose(axes @ axes.T, np.eye(128), atol=1e-6)
    np.testing.assert_allclose(effects.effects @ axes.T @ axes, effects.effects, atol=1e-5)
    assert not len(single_genes(effects, effects.effects @ axes.T, axes)[1])


def test_what_axes_leave_out_is_measurement_noise(rng, caplog):
    effects, truth = programmes(rng, n_perturbations=200, n_contexts=3, n_programmes=150, error=0.2)
    with caplog.at_level(logging.INFO):
        axes = leading_axes(effects.effects, effects.noise())
    assert 128 < len(axes) < 200
    assert f"600 measured effects are stored as {len(axes)} components, which hold 9" in caplog.text
    kept = effects.effects @ axes.T @ axes
    assert np.square(kept - effects.effects).sum() <= effects.noise()
    # and nearer to the truth than what was measured
    assert np.square(kept - truth).sum() < 0.9 * np.square(effects.effects - truth).sum()


def test_there_are_enough_axes_where_noise_is_most(rng):
    effects, truth = programmes(rng, n_perturbations=200, n_contexts=3, n_programmes=20, error=3.0)
    axes = leading_axes(effects.effects, effects.noise())
    assert len(axes) == 128
    kept = truth @ axes.T @ axes
    assert np.square(kept - truth).sum() < 0.3 * np.square(truth).sum()


def test_axes_of_effects_without_error(rng):
    effects, _ = programmes(rng, n_perturbations=200, n_contexts=2, n_programmes=140)
    axes = leading_axes(effects.effects, effects.noise())
    np.testing.assert_allclose(effects.effects @ axes.T @ axes, effects.effects, atol=1e-4)
    np.testing.assert_array_equal(axes, leading_axes(effects.effects, effects.noise()))
    assert len(leading_axes(np.zeros_like(effects.effects), 0.0)) >= 128


def test_the_target_of_each_perturbation_is_kept(rng):
    c, p = np.divmod(np.arange(900), 300)
    truth = rng.normal(size=(900, 10)) @ rng.normal(size=(10, 600)) / 10
    truth[np.arange(900), p] -= 1.5  # a knockdown of a gene of its own
    effects = with_error(rng, truth, c, p, 0.2)
    scores = effects.effects @ (axes := leading_axes(effects.effects, effects.noise())).T
    start, gene, effect = single_genes(effects, scores, axes)
    means, kept = np.stack([truth[p == i].mean(axis=0) for i in range(300)]), scores @ axes
    targets = []
    for i in range(300):
        own = slice(start[i], start[i + 1])
        told = kept[effects.perturbation == i].mean(axis=0)
        alone = told[i]
        told[gene[own]] += effect[own]
        targets.append((means[i, i], alone, told[i]))
    wanted, alone, told = np.mean(targets, axis=0)
    assert alone > 0.6 * wanted  # axes alone lose a good part of it
    assert told == pytest.approx(wanted, rel=0.05)
    assert len(gene) < 3 * 300
