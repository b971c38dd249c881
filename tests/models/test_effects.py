from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._effects import Effects

DESIGN = Design(perturbation_key="target", control="ctrl", context_key="context", scale="log1p")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def screen_of(matrix, perturbation, context, names=None) -> Screen:
    obs = pd.DataFrame({"target": perturbation, "context": context}, index=names)
    obs.index = obs.index.astype(str)
    return Screen.from_anndata(ad.AnnData(matrix, obs=obs), DESIGN)


def test_effects_against_numpy(rng):
    x = (0.37 * rng.poisson(0.7, size=(300, 9))).astype(np.float32)
    context = rng.choice(["x", "y", "z"], 300)
    perturbation = rng.choice(["ctrl", "a", "b", "c"], 300)
    perturbation[(context == "z") & (perturbation != "ctrl")] = "a"
    mask = rng.random(300) < 0.8
    alone = np.flatnonzero((context == "y") & (perturbation == "c"))
    mask[alone] = [True, *[False] * (len(alone) - 1)]
    effects = Effects.measure(screen_of(sparse.csr_matrix(x), perturbation, context), mask)
    assert (effects.contexts, effects.perturbations) == (["x", "y", "z"], ["a", "b", "c"])
    assert list(zip(effects.context, effects.perturbation, strict=True)) == [
        *((c, p) for c in (0, 1) for p in (0, 1, 2)),
        (2, 0),
    ]
    groups = {
        (c, p): x[mask & (context == c) & (perturbation == p)].astype(float)
        for c in "xyz"
        for p in ("ctrl", "a", "b", "c")
    }
    pooled = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups.values() if len(g))
    pooled /= sum(len(g) - 1 for g in groups.values() if len(g))
    for i, (c, p) in enumerate(zip(effects.context, effects.perturbation, strict=True)):
        cells, controls = groups["xyz"[c], "abc"[p]], groups["xyz"[c], "ctrl"]
        np.testing.assert_allclose(effects.effects[i], cells.mean(0) - controls.mean(0), atol=1e-6)
        expected = cells.var(0, ddof=1) / len(cells) if len(cells) > 1 else pooled
        np.testing.assert_allclose(effects.variance[i], expected, rtol=1e-5)
        assert effects.n_cells[i] == len(cells)
        np.testing.assert_allclose(effects.controls[c], controls.mean(0), rtol=1e-6)
        np.testing.assert_allclose(effects.control_variance[c], controls.var(0, ddof=1) / len(controls), rtol=1e-5)
    assert effects.controls.base is None  # kept by models, without the table of all means
    assert (effects.n_cells == 1).sum() == 1
    assert (effects.rows() >= 0).sum() == 7
    assert effects.rows()[2].tolist() == [6, -1, -1]
    np.testing.assert_allclose(effects.perturbation_means()[1], effects.effects[[1, 4]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(effects.context_means()[2], effects.effects[6], rtol=1e-6)


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
    one = Effects.measure(screen_of(x, labels, contexts, names))
    other = Effects.measure(screen_of(x[order], labels[order], contexts[order], names[order]))
    for name in ("effects", "variance", "controls", "control_variance"):
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
