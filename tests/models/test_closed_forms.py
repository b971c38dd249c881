from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from virtualcell.models._closed_forms import (
    SimilarContexts,
    additive,
    additive_leave_one_out,
    cosine,
    nearest_context,
    similarity,
)
from virtualcell.models._effects import Effects


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def made_up(
    rng, *, n_contexts=4, n_perturbations=12, n_genes=30, context=0.5, noise=0.3, missing=0.0
) -> tuple[Effects, np.ndarray, np.ndarray]:
    """Context + perturbation + noise, with some pairs missing; and the two parts."""
    a = context * rng.normal(size=(n_contexts, n_genes))
    b = rng.normal(size=(n_perturbations, n_genes))
    c, p = np.nonzero(rng.random((n_contexts, n_perturbations)) >= missing)
    y = a[c] + b[p] + noise * rng.normal(size=(len(c), n_genes))
    table = Effects.from_effects(y, [f"c{i:02d}" for i in c], [f"p{i:02d}" for i in p])
    return table, a, b


def without(table: Effects, rows: np.ndarray) -> Effects:
    keep = np.setdiff1d(np.arange(len(table.effects)), rows)
    row_fields = ("context", "perturbation", "effects", "variance", "n_cells")
    return dataclasses.replace(table, **{f: getattr(table, f)[keep] for f in row_fields})


def alternating_least_squares(table: Effects, penalty: float, n_rounds: int = 1000):
    """Fit context and perturbation effects by turns, as the definition says."""
    in_context = np.equal.outer(np.arange(len(table.contexts)), table.context).astype(float)
    of_perturbation = np.equal.outer(np.arange(len(table.perturbations)), table.perturbation).astype(float)
    a = np.zeros((len(table.contexts), table.effects.shape[1]))
    for _ in range(n_rounds):
        b = of_perturbation @ (table.effects - a[table.context])
        b /= of_perturbation.sum(axis=1, keepdims=True).clip(1)
        a = in_context @ (table.effects - b[table.perturbation])
        a /= in_context.sum(axis=1, keepdims=True) + penalty
    return a, b


def test_additive_is_where_alternating_least_squares_ends(rng):
    table, *_ = made_up(rng, missing=0.4)
    fit = additive(table)
    assert 0 < fit.shrinkage < 5
    a, b = alternating_least_squares(table, fit.shrinkage)
    np.testing.assert_allclose(fit.context, a, atol=1e-5)
    np.testing.assert_allclose(fit.perturbation, b, atol=1e-5)


def test_shrinkage_is_the_ratio_of_variances(rng):
    table, a, _ = made_up(rng, n_contexts=30, n_perturbations=40, n_genes=200, context=0.2, noise=0.6, missing=0.3)
    assert additive(table).shrinkage == pytest.approx(0.6**2 / a.var(axis=0, ddof=1).mean(), rel=0.05)


def test_balanced_contexts_give_the_mean(rng):
    table, *_ = made_up(rng)
    fit = additive(table)
    np.testing.assert_allclose(fit.perturbation, table.perturbation_means(), atol=1e-6)
    np.testing.assert_allclose(fit.effect([3]), table.effects[table.perturbation == 3].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(fit.effect([3, 4]), fit.effect([3]) + fit.effect([4]), atol=1e-6)
    assert not fit.effect([], 1).any()


def test_additive_with_nothing_to_tell_contexts_apart(rng):
    one, *_ = made_up(rng, n_contexts=1)
    several, *_ = made_up(rng, n_perturbations=1)
    for table in (one, several):
        fit = additive(table)
        assert np.isinf(fit.shrinkage)
        assert not fit.context.any()
        np.testing.assert_allclose(fit.perturbation, table.perturbation_means(), rtol=1e-6)


def test_additive_beats_the_mean_where_contexts_are_unbalanced(rng):
    table, a, b = made_up(rng, n_contexts=3, n_perturbations=30)
    held_out = np.flatnonzero((table.context == 2) & (table.perturbation >= 8))
    seen = without(table, held_out)
    truth = a[2] + b[8:]
    fit = additive(seen)
    error = np.abs(np.stack([fit.effect([p], 2) for p in range(8, 30)]) - truth).mean()
    assert error < 0.6 * np.abs(seen.perturbation_means()[8:] - truth).mean()


def test_leave_one_out_is_a_fit_without_the_row(rng):
    table, *_ = made_up(rng, missing=0.5, n_perturbations=8)
    fit = additive(table)
    out = additive_leave_one_out(table, fit)
    n = np.bincount(table.perturbation, minlength=8)
    assert (n > 1).any()
    for i, (c, p) in enumerate(zip(table.context, table.perturbation, strict=True)):
        if n[p] == 1:
            assert np.isnan(out[i]).all()
            continue
        a, b = alternating_least_squares(without(table, np.array([i])), fit.shrinkage)
        np.testing.assert_allclose(out[i], a[c] + b[p], atol=1e-4)


def similar_contexts(rng, noise: float, n_genes=40):
    """Contexts in two families with alike control cells and alike effects."""
    families = rng.normal(size=(2, n_genes))
    controls = families[[0, 0, 0, 1, 1, 1]] + 0.2 * rng.normal(size=(6, n_genes))
    b = rng.normal(size=(10, n_genes))
    deviation = rng.normal(size=(2, 10, n_genes))
    y = b + deviation[[0, 0, 0, 1, 1, 1]] + noise * rng.normal(size=(6, 10, n_genes))
    c, p = np.divmod(np.arange(60), 10)
    table = Effects.from_effects(y.reshape(60, -1), [f"c{i}" for i in c], [f"p{i}" for i in p], controls)
    return table, controls, y


def test_nearest_context_copies_where_similar_contexts_agree(rng):
    table, controls, y = similar_contexts(rng, noise=0.1)
    seen = without(table, np.flatnonzero(table.context == 5))
    fit = nearest_context(seen)
    assert (fit.transfer > 0.9).all()
    copied, mean = (
        np.abs(np.stack([f([p]) for p in range(10)]) - y[5]).mean()
        for f in (lambda p: fit.effect(p, controls[5]), lambda p: additive(seen).effect(p))
    )
    assert copied < 0.4 * mean
    # measured in the context itself, without error: a copy
    np.testing.assert_allclose(fit.effect([2], controls[1], context=1), y[1, 2], atol=1e-5)


def test_nearest_context_gives_the_mean_where_similarity_tells_nothing(rng):
    table, controls, _ = similar_contexts(rng, noise=0.1)
    table = dataclasses.replace(table, controls=rng.normal(size=controls.shape))
    y = rng.normal(size=table.effects.shape).astype(np.float32)
    fit = nearest_context(dataclasses.replace(table, effects=y))
    assert (fit.transfer < 0.1).all()


def test_own_effect_counts_by_its_reliability(rng):
    table, controls, _ = similar_contexts(rng, noise=1.0)
    noisy = dataclasses.replace(table, variance=np.full_like(table.effects, 1.0))
    fit = nearest_context(noisy)
    # two families of three, 2 apart on average in squares: a variance of 2 / 4 * 6 / 5 beside the error of 1
    assert fit.reliability == pytest.approx(0.6 / 1.6, abs=0.03)
    mean, own = additive(noisy).effect([2], 0), table.effects[table.rows()[0, 2]]
    expected = mean + fit.reliability[0] * (own - mean)
    np.testing.assert_allclose(fit.effect([2], controls[0], context=0), expected, atol=1e-5)
    assert (nearest_context(table).reliability == 1).all()  # no error stated


def test_cosine_of_nothing_is_zero():
    assert cosine(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [[0]]


def test_similarity_to_contexts_is_a_correlation(rng):
    controls, base = rng.gamma(2, size=(5, 40)).astype(np.float32), rng.gamma(2, size=40).astype(np.float32)
    similar = SimilarContexts(controls)
    expected = [np.corrcoef(base, c)[0, 1] for c in controls]
    for _ in range(2):  # asked again, it is what was kept
        np.testing.assert_allclose(similar(base), expected, atol=1e-6)
    np.testing.assert_array_equal(similar(base), similarity(base[None], controls)[0])
    others = [similar(c) for c in rng.gamma(2, size=(200, 40)).astype(np.float32)]
    np.testing.assert_allclose(similar(base), expected, atol=1e-6)
    assert len(np.unique(others, axis=0)) == 200
