from __future__ import annotations

import dataclasses
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._closed_forms import additive, similarity
from virtualcell.models._effects import Effects
from virtualcell.models._features import PerturbationTable
from virtualcell.models._transferred import BANDWIDTHS, Transferred, choose_bandwidth

CONTROL = "ctrl"
DESIGN = Design(perturbation_key="target", control=CONTROL, context_key="context", scale="log1p")


@pytest.fixture
def screen() -> Screen:
    """Contexts a and b alike, c unlike; the effect of P in c is another than in a and b."""
    rng = np.random.default_rng(0)
    profile = {c: rng.gamma(2, 1, 40) for c in "ac"}
    profile["b"] = profile["a"] + rng.normal(0, 0.05, 40).clip(-0.1)
    effect = {"a": rng.normal(0, 0.5, 40), "c": rng.normal(0, 0.5, 40)}
    effect["b"] = effect["a"]
    rows, perturbation, context = [], [], []
    for c in "abc":
        for p, n in ((CONTROL, 60), ("P", 30), ("Q", 20)):
            mean = profile[c] + {"P": effect[c], "Q": 0.5 * effect["c"]}.get(p, 0)
            rows.append(np.maximum(mean + rng.normal(0, 0.05, (n, 40)), 0))
            perturbation += [p] * n
            context += [c] * n
    obs = pd.DataFrame({"target": perturbation, "context": context})
    obs.index = "cell" + obs.index.astype(str)
    return Screen.from_anndata(ad.AnnData(np.concatenate(rows).astype(np.float32), obs=obs), DESIGN)


def mean(screen: Screen, context: str, perturbation: str) -> np.ndarray:
    rows = screen.pairs()[context, perturbation]
    return screen.expression.rows(rows).toarray().mean(axis=0)


def without_b(screen: Screen) -> np.ndarray:
    return screen.is_control | np.asarray(screen.context != "b")


def many(rng, *, n_contexts=6, n_perturbations=80, n_genes=200, missing=0.3, error=0.3) -> Effects:
    """Effects in contexts of two families, with some missing."""
    families = rng.gamma(2, size=(2, n_genes))
    controls = np.repeat(families, n_contexts // 2, axis=0) + rng.gamma(1, 0.3, size=(n_contexts, n_genes))
    programmes = rng.normal(size=(10, n_genes)) / 3
    deviation = 0.5 * np.repeat(rng.normal(size=(2, n_perturbations, 10)), n_contexts // 2, axis=0)
    y = (rng.normal(size=(n_perturbations, 10)) + deviation) @ programmes
    c, p = np.nonzero(rng.random((n_contexts, n_perturbations)) >= missing)
    y = y[c, p] + error * rng.normal(size=(len(c), n_genes))
    effects = Effects.from_effects(y, [f"c{i}" for i in c], [f"p{i:02d}" for i in p], controls.astype(np.float32))
    return dataclasses.replace(effects, n_cells=rng.integers(10, 200, len(c)), variance=np.full_like(y, error**2))


def test_similar_contexts_decide(screen):
    effects = Effects.measure(screen, without_b(screen))
    transferred, base = Transferred.fit(effects), mean(screen, "b", CONTROL)
    observed, average = mean(screen, "b", "P"), base + additive(effects).effect([effects.perturbations.index("P")])
    # two contexts tell nothing of the bandwidth, so that both weigh the same
    scale, shift = transferred("P", control=CONTROL, context="b", base=base)
    assert np.corrcoef(base * scale + shift - base, average - base)[0, 1] > 0.8
    # with a narrow one it is a that is copied
    narrow = dataclasses.replace(transferred, bandwidth=BANDWIDTHS[0])
    scale, shift = narrow("P", control=CONTROL, context="b", base=base)
    assert np.abs(base * scale + shift - observed).mean() < 0.5 * np.abs(average - observed).mean()


def test_against_a_weighted_mean_by_hand(screen):
    effects, base = Effects.measure(screen), mean(screen, "b", CONTROL)
    transferred = Transferred.fit(effects)
    scale, shift = transferred("P", control=CONTROL, context="new", base=base)
    near = similarity(base[None], effects.controls)[0].astype(np.float64)
    rows = np.flatnonzero(effects.perturbation == effects.perturbations.index("P"))
    weights = np.exp((near - near.max()) / transferred.bandwidth) * np.sqrt(30)
    weights /= weights.sum()
    effect, level = weights @ effects.effects[rows], weights @ effects.controls
    np.testing.assert_allclose(shift, np.maximum(effect, 0), atol=1e-5)
    falls = effect < -1e-4
    np.testing.assert_allclose(scale[falls], ((level + effect + 0.02) / (level + 0.02)).clip(0)[falls], atol=1e-5)
    assert falls.any()
    assert (scale[effect > 0] == 1).all()


def test_a_context_with_other_perturbations_keeps_its_own_effect():
    rng = np.random.default_rng(0)
    of_context, of_perturbation = rng.normal(size=(4, 60)), rng.normal(size=(12, 60))
    c, p = np.divmod(np.arange(48), 12)
    seen = (c < 3) | (p < 6)  # of the fourth context, half of the perturbations
    y = of_context[c] + of_perturbation[p] + 0.1 * rng.normal(size=(48, 60))
    names = [f"c{i}" for i in c[seen]], [f"p{i:02d}" for i in p[seen]]
    controls = (5 + rng.gamma(2, size=(4, 60))).astype(np.float32)
    transferred = Transferred.fit(Effects.from_effects(y[seen], *names, controls))
    truth, errors = of_context[3] + of_perturbation[9], {}
    for context in ("c3", "new"):
        scale, shift = transferred("p09", control=CONTROL, context=context, base=controls[3])
        errors[context] = np.abs(controls[3] * (scale - 1) + shift - truth).mean()
    assert errors["c3"] < 0.3 * errors["new"]


def test_the_bandwidth_is_the_one_that_predicts_left_out_contexts(screen):
    assert choose_bandwidth(Effects.measure(screen)) < BANDWIDTHS[-1]
    assert choose_bandwidth(Effects.measure(screen, without_b(screen))) == BANDWIDTHS[-1]  # nothing to tell it by


def slow_errors(effects: Effects) -> np.ndarray:
    """Squared error of each bandwidth, context by context, as the definition says."""
    near, errors = similarity(effects.controls, effects.controls).astype(np.float64), np.zeros(len(BANDWIDTHS))
    for i in range(len(effects.effects)):
        same = effects.perturbation == effects.perturbation[i]
        others = np.flatnonzero(same & (np.arange(len(same)) != i))
        if len(others) < 2:
            continue
        for k, bandwidth in enumerate(BANDWIDTHS):
            weights = np.exp(near[effects.context[i], effects.context[others]] / bandwidth)
            weights *= np.sqrt(effects.n_cells[others])
            predicted = weights / weights.sum() @ effects.effects[others].astype(np.float64)
            errors[k] += np.square(predicted - effects.effects[i]).sum()
    return errors


@pytest.mark.parametrize("error", [0.05, 0.5, 2.0, 8.0])
def test_the_bandwidth_against_a_slow_reference(error):
    effects = many(np.random.default_rng(1), error=error)
    assert choose_bandwidth(effects) == BANDWIDTHS[np.argmin(slow_errors(effects))]


def test_bandwidths_differ_between_screens():
    chosen = {choose_bandwidth(many(np.random.default_rng(1), error=e)) for e in (0.05, 0.5, 2.0, 8.0)}
    assert len(chosen) > 1  # or the test above shows nothing


def test_falls_are_scaled_and_rises_are_added(screen):
    transferred, base = Transferred.fit(Effects.measure(screen)), mean(screen, "a", CONTROL)
    scale, shift = transferred("P", control=CONTROL, context="a", base=base)
    assert ((scale == 1) | (shift == 0)).all()
    assert (scale >= 0).all()
    assert (scale <= 1).all()
    silent = np.zeros_like(base)
    assert (silent * scale + shift >= 0).all()


def test_the_control_does_nothing_and_the_unknown_is_unknown(screen):
    transferred, base = Transferred.fit(Effects.measure(screen)), mean(screen, "a", CONTROL)
    for label in (CONTROL, f"{CONTROL}+{CONTROL}"):
        scale, shift = transferred(label, control=CONTROL, context="a", base=base)
        assert (scale == 1).all()
        assert not shift.any()
    assert transferred("R", control=CONTROL, context="a", base=base) is None


def test_effects_of_a_pair_add_up(screen):
    transferred, base = Transferred.fit(Effects.measure(screen)), 5 + mean(screen, "a", CONTROL)

    def effect(label: str) -> np.ndarray:
        _, shift = transferred(label, control=CONTROL, context="new", base=base)
        return np.where(shift > 0, shift, np.nan)

    both = effect("Q+P")
    assert np.isfinite(both).sum() > 5
    rises = np.isfinite(effect("P") + effect("Q"))
    np.testing.assert_allclose(both[rises], (effect("P") + effect("Q"))[rises], atol=1e-5)


def test_features_reach_what_was_not_measured(screen):
    features = pd.DataFrame(np.eye(3)[[0, 1, 0]], index=["P", "Q", "R"])
    table = PerturbationTable.from_features(features, ["P", "Q"], CONTROL)
    effects, base = Effects.measure(screen), mean(screen, "a", CONTROL)
    transferred = Transferred.fit(effects, table)
    scale, shift = transferred("R", control=CONTROL, context="a", base=base, features=table)
    for label, measured in {"P": True, "Q+P": True, "R": False, "P+R": False}.items():
        assert transferred.measured(label, CONTROL) == measured
    effect = shift + base * (scale - 1)
    fit = additive(effects)
    own = fit.perturbation + fit.context[effects.contexts.index("a")]
    assert np.corrcoef(effect, own[0])[0, 1] > np.corrcoef(effect, own[1])[0, 1]
    assert transferred("R", control=CONTROL, context="a", base=base) is None  # features are asked for, not guessed


# -- stored with few numbers ------------------------------------------------------------------------------------------


def test_many_effects_take_little_room_and_predict_as_well():
    options = {"n_perturbations": 500, "n_genes": 600}
    effects = many(np.random.default_rng(2), **options)
    truth = many(np.random.default_rng(2), **options, error=0.0).effects
    transferred = Transferred.fit(effects)
    _, arrays = transferred.to_arrays()
    assert sum(a.nbytes for a in arrays.values()) < 0.35 * effects.effects.nbytes
    base, errors = effects.controls[0], []
    for p in range(500):
        _, shift = transferred(effects.perturbations[p], control=CONTROL, context="new", base=base)
        rows = np.flatnonzero(effects.perturbation == p)
        weights = np.exp((similarity(base[None], effects.controls)[0, effects.context[rows]]) / transferred.bandwidth)
        weights *= np.sqrt(effects.n_cells[rows]) / (weights @ np.sqrt(effects.n_cells[rows]))
        whole, wanted = (np.maximum(weights @ x[rows], 0) for x in (effects.effects, truth))
        errors.append([np.square(x - wanted).mean() for x in (shift, whole)])
    ours, whole = np.mean(errors, axis=0)
    assert ours < 0.7 * whole  # the mean of all measured effects, with their noise


@pytest.mark.parametrize("n_perturbations", [10, 100])
def test_stored_and_read_it_is_the_same_to_the_bit(n_perturbations):
    rng = np.random.default_rng(3)
    effects = many(rng, n_perturbations=n_perturbations)
    names = [*effects.perturbations, "new"]
    features = PerturbationTable.from_features(
        pd.DataFrame(rng.normal(size=(len(names), 5)), index=names), effects.perturbations, CONTROL
    )
    transferred = Transferred.fit(effects, features)
    plain, arrays = transferred.to_arrays()
    again = Transferred.from_arrays(json.loads(json.dumps(plain)), {k: v.copy() for k, v in arrays.items()})
    assert all(a.dtype != object for a in arrays.values())
    for label in ("p03", "p04+p05", "new", "new+p01", CONTROL):
        for context in ("c1", "unheard of"):
            asked = {"control": CONTROL, "context": context, "base": effects.controls[2], "features": features}
            np.testing.assert_array_equal(again(label, **asked), transferred(label, **asked))
