from __future__ import annotations

import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._closed_forms import additive
from virtualcell.models._effects import Effects
from virtualcell.models._transferred import Transferred

DESIGN = Design(perturbation_key="target", control="ctrl", context_key="context", scale="log1p")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def screen_of(matrix, perturbation, context, names=None, batch=None) -> Screen:
    obs = pd.DataFrame({"target": perturbation, "context": context}, index=names)
    obs.index = obs.index.astype(str)
    if batch is None:
        return Screen.from_anndata(ad.AnnData(matrix, obs=obs), DESIGN)
    obs["batch"] = np.asarray(batch).astype(str)
    return Screen.from_anndata(ad.AnnData(matrix, obs=obs), dataclasses.replace(DESIGN, batch_key="batch"))


def by_hand(x, perturbation, context, batch) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Effect and squared standard error of every pair, group by group."""
    x = x.astype(float)
    controls = {}
    for c in np.unique(context):
        for b in np.unique(batch):
            cells = x[(context == c) & (batch == b) & (perturbation == "ctrl")]
            if len(cells):
                controls[c, b] = cells
    pairs = sorted({(c, p) for c, p in zip(context, perturbation, strict=True) if p != "ctrl"})
    groups = [*controls.values(), *(x[(context == c) & (perturbation == p)] for c, p in pairs)]
    scatter = sum(((g - g.mean(axis=0)) ** 2).sum(axis=0) for g in groups) / sum(len(g) - 1 for g in groups)

    def squared_error(cells):
        n = len(cells)
        return (((cells - cells.mean(axis=0)) ** 2).sum(axis=0) + 10 * scatter) / (n - 1 + 10) / n

    found = {}
    for c, p in pairs:
        is_here = (context == c) & (perturbation == p)
        weights = dict.fromkeys([pool for pool in controls if pool[0] == c], 0.0)
        n_controls = sum(len(controls[pool]) for pool in weights)
        for b in batch[is_here]:
            if (c, b) in weights:
                weights[c, b] += 1 / is_here.sum()
            else:
                for pool in weights:
                    weights[pool] += len(controls[pool]) / n_controls / is_here.sum()
        base = sum(w * controls[pool].mean(axis=0) for pool, w in weights.items())
        variance = sum(w**2 * squared_error(controls[pool]) for pool, w in weights.items())
        found[c, p] = x[is_here].mean(axis=0) - base, squared_error(x[is_here]) + variance
    return found


@pytest.mark.parametrize("n_batches", [1, 3])
def test_effects_against_a_slow_reference(rng, n_batches):
    x = (0.37 * rng.poisson(0.7, size=(300, 9))).astype(np.float32)
    context, perturbation = rng.choice(["x", "y", "z"], 300), rng.choice(["ctrl", "a", "b", "c"], 300)
    batch = rng.integers(n_batches, size=300)
    perturbation[(context == "z") & (perturbation != "ctrl")] = "a"
    if n_batches > 1:  # without control cells in one batch of one context
        perturbation[(context == "y") & (perturbation == "ctrl") & (batch == 1)] = "b"
    mask = rng.random(300) < 0.8
    alone = np.flatnonzero((context == "y") & (perturbation == "c"))
    mask[alone] = [True, *[False] * (len(alone) - 1)]
    screen = screen_of(sparse.csr_matrix(x), perturbation, context, batch=batch if n_batches > 1 else None)
    effects = Effects.measure(screen, mask)
    assert (effects.contexts, effects.perturbations) == (["x", "y", "z"], ["a", "b", "c"])
    pairs = [("xyz"[c], "abc"[p]) for c, p in zip(effects.context, effects.perturbation, strict=True)]
    assert pairs == [*((c, p) for c in "xy" for p in "abc"), ("z", "a")]
    expected = by_hand(x[mask], perturbation[mask], context[mask], batch[mask])
    for i, (c, p) in enumerate(pairs):
        effect, variance = expected[c, p]
        np.testing.assert_allclose(effects.effects[i], effect, atol=1e-6)
        np.testing.assert_allclose(effects.variance[i], variance, rtol=1e-5)
        assert effects.n_cells[i] == (mask & (context == c) & (perturbation == p)).sum()
    for i, c in enumerate("xyz"):  # all of a context, whatever the batch
        controls = x[mask & (context == c) & (perturbation == "ctrl")]
        np.testing.assert_allclose(effects.controls[i], controls.mean(axis=0), rtol=1e-5)
    assert effects.controls.base is None  # kept by models, without the table of all means
    assert (effects.n_cells == 1).sum() == 1
    assert (effects.rows() >= 0).sum() == 7
    assert effects.rows()[2].tolist() == [6, -1, -1]
    np.testing.assert_allclose(effects.perturbation_means()[1], effects.effects[[1, 4]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(effects.context_means()[2], effects.effects[6], rtol=1e-6)


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def confounded(rng) -> tuple[Screen, np.ndarray]:
    """Perturbations without any effect, each in one of two batches, in which the controls differ much; and by what."""
    n_genes, n_perturbations, n_cells = 200, 12, 60
    labels = np.repeat([*(f"p{i:02d}" for i in range(n_perturbations)), "ctrl"], [*[n_cells] * n_perturbations, 400])
    batch = np.concatenate([np.repeat(np.arange(n_perturbations) % 2, n_cells), np.tile([0, 1], 200)])
    mean = rng.gamma(2, 0.5, n_genes)
    of_batch = rng.normal(0, 0.3, n_genes)
    x = np.maximum(mean + np.outer(batch, of_batch) + rng.normal(0, 0.5, (len(batch), n_genes)), 0).astype(np.float32)
    controls = [x[(labels == "ctrl") & (batch == b)].mean(axis=0) for b in (0, 1)]
    return screen_of(x, labels, np.full(len(labels), "x"), batch=batch), controls[1] - controls[0]


def test_a_perturbation_measured_in_one_batch_does_not_have_the_effect_of_the_batch(confounded):
    screen, of_batch = confounded

    def correlation(predicted: np.ndarray) -> float:
        """Mean over perturbations of the correlation with the effect of their own batch against all controls."""
        signs = np.where(np.arange(12) % 2, 1, -1)
        return float(np.mean([np.corrcoef(s * e, of_batch)[0, 1] for s, e in zip(signs, predicted, strict=True)]))

    effects = Effects.measure(screen)
    base = effects.controls[0]
    assert abs(correlation(effects.effects)) < 0.2
    blind = Effects.measure(dataclasses.replace(screen, batch=None))
    assert correlation(blind.effects) > 0.7  # the trap is there
    fit = additive(effects)
    assert abs(correlation([fit.effect([p], 0) for p in range(12)])) < 0.2
    asked = {"control": "ctrl", "context": "x", "base": base}
    for measured, most in ((effects, 0.1), (blind, np.inf)):
        transferred = Transferred.fit(measured)
        predicted = np.stack([transferred(p, **asked) for p in measured.perturbations])
        if most < np.inf:
            assert np.sqrt(np.square(predicted).mean()) < most * np.sqrt(np.square(of_batch).mean())
            sure = predicted + 1e-9 * of_batch[::-1]  # a row of zeros has no correlation
            assert abs(correlation(sure)) < 0.2
        else:
            assert correlation(predicted) > 0.7


def test_cells_of_a_batch_without_controls_are_compared_with_the_whole_context(rng):
    x = rng.gamma(1, size=(12, 4)).astype(np.float32)
    labels = ["ctrl"] * 6 + ["a"] * 6
    batch = [0, 0, 0, 0, 1, 1, *[2] * 3, *[0] * 3]
    effects = Effects.measure(screen_of(x, labels, ["x"] * 12, batch=batch))
    expected = x[6:].mean(axis=0) - (x[:6].mean(axis=0) + x[:4].mean(axis=0)) / 2
    np.testing.assert_allclose(effects.effects[0], expected, atol=1e-6)


def test_controls_of_another_context_are_no_match(rng):
    """A batch that has controls in one context only does not lend them to another."""
    x = rng.gamma(1, size=(40, 4)).astype(np.float32)
    labels = np.array((["ctrl"] * 10 + ["a"] * 10) * 2)
    context = np.repeat(["x", "y"], 20)
    batch = np.array([0] * 10 + [1] * 10 + [1] * 20)
    effects = Effects.measure(screen_of(x, labels, context, batch=batch))
    np.testing.assert_allclose(effects.effects[0], x[10:20].mean(axis=0) - x[:10].mean(axis=0), atol=1e-6)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_cells", [1, 2, 5, 50])
def test_standard_errors_are_those_of_repeated_measurements(n_cells):
    rng = np.random.default_rng(n_cells)
    scatter = np.linspace(0.1, 0.8, 30)
    labels = ["ctrl"] * 100 + ["a"] * n_cells + ["b"] * 100
    measured = []
    for _ in range(60):
        x = 4.5 + scatter * rng.normal(size=(len(labels), 30))
        effects = Effects.measure(screen_of(x.astype(np.float32), labels, ["x"] * len(labels)))
        measured.append((effects.effects[0], effects.variance[0]))
    found, claimed = np.array(measured).transpose(1, 0, 2)
    ratio = np.square(found).mean(axis=0) / claimed.mean(axis=0)  # the true effect is 0
    assert ratio.mean() == pytest.approx(1, abs=0.12)


def test_some_rows_are_taken(rng):
    c, p = np.divmod(np.arange(12), 4)
    y = rng.normal(size=(12, 5)).astype(np.float32)
    effects = Effects.from_effects(y, [f"c{i}" for i in c], [f"p{i}" for i in p])
    rows = (c != 1) & (p != 2)
    taken = effects.take(rows)
    assert taken.contexts == effects.contexts  # their control cells are still there
    assert taken.perturbations == ["p0", "p1", "p3"]
    np.testing.assert_array_equal(taken.effects, y[rows])
    np.testing.assert_array_equal(taken.context, c[rows])
    assert [taken.perturbations[i] for i in taken.perturbation] == [f"p{i}" for i in p[rows]]
    assert taken.variance.shape == taken.effects.shape
    assert taken.rows()[1].tolist() == [-1, -1, -1]
    np.testing.assert_array_equal(effects.take(np.ones(12, bool)).effects, y)


def test_a_context_with_controls_alone_has_no_effects(rng):
    x = 0.3 * rng.gamma(1, size=(4, 5)).astype(np.float32)
    effects = Effects.measure(screen_of(x, ["ctrl", "a", "a", "ctrl"], ["x", "x", "x", "y"]))
    assert effects.contexts == ["x", "y"]
    assert effects.context.tolist() == [0]
    np.testing.assert_array_equal(effects.controls[1], x[3])
    assert np.isnan(effects.context_means()[1]).all()


def test_the_order_of_cells_changes_no_bit(rng):
    x = rng.gamma(1, size=(200, 7)).astype(np.float32)
    labels, contexts = rng.choice(["ctrl", "a", "b"], 200), rng.choice(["x", "y"], 200)
    names, order = np.array([f"cell {i}" for i in range(200)]), rng.permutation(200)
    batch = rng.integers(3, size=200)
    one = Effects.measure(screen_of(x, labels, contexts, names, batch))
    other = Effects.measure(screen_of(x[order], labels[order], contexts[order], names[order], batch[order]))
    for name in ("effects", "variance", "controls"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_context_without_controls():
    screen = screen_of(np.full((3, 2), 0.5, np.float32), ["ctrl", "a", "a"], ["x", "x", "y"])
    with pytest.raises(ValueError, match=r"context 'y' has no control cells \('ctrl'\)\. Drop it or add controls"):
        Effects.measure(screen)


def test_effects_in_any_order(rng):
    c, p = np.divmod(np.arange(12), 4)
    names = np.array([f"c{i}" for i in c]), np.array([f"p{i}" for i in p])
    y = rng.normal(size=(12, 5)).astype(np.float32)
    order = rng.permutation(12)
    one, again = Effects.from_effects(y, *names), Effects.from_effects(y[order], *(n[order] for n in names))
    np.testing.assert_array_equal(again.effects, one.effects)
    np.testing.assert_array_equal(one.effects, y)
    with pytest.raises(ValueError, match="several effects of one perturbation in one context"):
        Effects.from_effects(y[:2], ["x", "x"], ["p", "p"])
