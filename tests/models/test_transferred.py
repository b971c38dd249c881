from __future__ import annotations

import dataclasses
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._closed_forms import additive, similarity
from virtualcell.models._effects import Effects
from virtualcell.models._features import PerturbationTable
from virtualcell.models._scale import as_ratios, change_of_mean
from virtualcell.models._transferred import Transferred, shrunken

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


def asked(effects: Effects, context: str) -> dict:
    """What is stated of a prediction in a context that has control cells."""
    return {"control": CONTROL, "context": context, "base": effects.controls[effects.contexts.index(context)]}


def test_similar_contexts_decide(screen):
    effects = Effects.measure(screen, without_b(screen))
    transferred, base = Transferred.fit(effects), mean(screen, "b", CONTROL)
    change = transferred("P", control=CONTROL, context="b", base=base)
    observed, average = mean(screen, "b", "P") - base, additive(effects).effect([effects.perturbations.index("P")])
    assert np.corrcoef(change, observed)[0, 1] > 0.95 > np.corrcoef(average, observed)[0, 1]
    assert np.square(change - observed).sum() < np.square(observed).sum()


def by_hand(effects: Effects, transferred: Transferred, perturbation: str, base: np.ndarray) -> np.ndarray:
    """Weighted mean of the shrunken effects, for a context in which nothing was measured."""
    ratios = as_ratios(effects)
    of_context = additive(ratios).context[effects.context]
    own = dataclasses.replace(ratios, effects=ratios.effects - of_context)
    ratios = shrunken(own).effects
    rows = np.flatnonzero(effects.perturbation == effects.perturbations.index(perturbation))
    near = similarity(base[None], effects.controls)[0].astype(np.float64)[effects.context[rows]]
    weights = np.sqrt(effects.n_cells[rows]) / np.maximum(1 - near, 1e-4) ** 2
    return change_of_mean(base, transferred.amplitude * (weights / weights.sum() @ ratios[rows]))


def test_against_a_weighted_mean_by_hand(screen):
    effects = Effects.measure(screen)
    transferred = Transferred.fit(effects)
    base = (0.7 * mean(screen, "b", CONTROL) + 0.3 * mean(screen, "c", CONTROL)).astype(np.float32)
    for p in ("P", "Q"):
        got = transferred(p, control=CONTROL, context="new", base=base)
        np.testing.assert_allclose(got, by_hand(effects, transferred, p, base), atol=1e-4)
        assert got.dtype == np.float32


def test_a_context_with_other_perturbations_keeps_its_own_effect():
    rng = np.random.default_rng(0)
    of_context, of_perturbation = rng.normal(size=(4, 60)), rng.normal(size=(12, 60))
    c, p = np.divmod(np.arange(48), 12)
    seen = (c < 3) | (p < 6)  # of the fourth context, half of the perturbations
    y = of_context[c] + of_perturbation[p] + 0.1 * rng.normal(size=(48, 60))
    names = [f"c{i}" for i in c[seen]], [f"p{i:02d}" for i in p[seen]]
    controls = (5 + rng.gamma(2, size=(4, 60))).astype(np.float32)
    effects = dataclasses.replace(
        Effects.from_effects(y[seen], *names, controls), variance=np.full((seen.sum(), 60), 0.01, np.float32)
    )
    transferred = Transferred.fit(effects)
    truth, errors = of_context[3] + of_perturbation[9], {}
    for context in ("c3", "new"):
        change = transferred("p09", control=CONTROL, context=context, base=controls[3])
        errors[context] = np.abs(change - truth).mean()
    assert errors["c3"] < 0.6 * errors["new"]


def test_the_control_does_nothing_and_the_unknown_is_unknown(screen):
    effects = Effects.measure(screen)
    transferred = Transferred.fit(effects)
    for label in (CONTROL, f"{CONTROL}+{CONTROL}"):
        assert not transferred(label, **asked(effects, "a")).any()
    assert transferred("R", **asked(effects, "a")) is None
    assert transferred("P+R", **asked(effects, "a")) is None


def test_effects_of_a_pair_add_up_as_ratios(screen):
    effects = Effects.measure(screen)
    transferred, base = Transferred.fit(effects), 5 + mean(screen, "a", CONTROL)

    def ratio(label: str) -> np.ndarray:
        change = transferred(label, control=CONTROL, context="new", base=base)
        return np.expm1(base + change) / np.expm1(base)

    np.testing.assert_allclose(ratio("Q+P"), ratio("P") * ratio("Q"), rtol=1e-2)
    np.testing.assert_array_equal(ratio("Q+P"), ratio("P+Q"))


def test_no_expression_falls_below_zero(screen):
    effects = Effects.measure(screen)
    transferred = Transferred.fit(effects)
    for base in (effects.controls[0], np.zeros(40, np.float32), 0.1 * effects.controls[2]):
        for label in ("P", "Q", "P+Q"):
            change = transferred(label, control=CONTROL, context="new", base=base)
            assert (base + change >= -1e-5).all()
            assert np.isfinite(change).all()


# -- measured pairs ---------------------------------------------------------------------------------------------------


def test_what_was_measured_well_in_the_very_context_is_used():
    """Ten contexts whose similarities tell nothing, half of every effect the context's own, 500 cells a group."""
    rng = np.random.default_rng(0)
    n_contexts, n_perturbations, n_genes, n = 10, 20, 500, 500
    controls = rng.gamma(1, 1, (n_contexts, n_genes)).astype(np.float32)
    truth = rng.normal(0, 0.2, (n_perturbations, n_genes)) + rng.normal(0, 0.2, (n_contexts, n_perturbations, n_genes))
    truth = np.maximum(truth, -controls[:, None])
    variance = 0.25 / n
    y = np.maximum(truth + rng.normal(0, np.sqrt(variance), truth.shape), -controls[:, None])
    c, p = np.divmod(np.arange(n_contexts * n_perturbations), n_perturbations)
    effects = Effects.from_effects(y.reshape(-1, n_genes), [f"c{i}" for i in c], [f"p{i:02d}" for i in p], controls)
    effects = dataclasses.replace(effects, n_cells=np.full(len(c), n), variance=np.full_like(effects.effects, variance))
    transferred, errors = Transferred.fit(effects), []
    for i in range(0, len(c), 3):
        change = transferred(f"p{p[i]:02d}", **asked(effects, f"c{c[i]}"))
        wanted = truth[c[i], p[i]]
        errors.append([np.square(x - wanted).mean() for x in (change, effects.effects[i])])
    ours, own = np.mean(errors, axis=0)
    assert ours < 1.5 * own


@pytest.fixture(scope="module")
def few_and_many() -> tuple[Effects, Effects]:
    """Effects measured with 5 cells a group, and those of 60 fresh ones."""
    options = {"n_contexts": 3, "n_perturbations": 20, "n_genes": 200, "n_control_cells": 200, "effect_size": 0.15}
    adata = vc.datasets.synthetic(n_cells_per_group=65, seed=2, **options)
    design = Design(perturbation_key="target_gene", control="non-targeting", context_key="cell_type", scale="counts")
    screen = Screen.from_anndata(adata, design)
    is_few = screen.is_control.copy()
    for cells in screen.pairs(~screen.is_control).values():
        is_few[cells[:5]] = True
    return Effects.measure(screen, is_few), Effects.measure(screen, ~is_few | screen.is_control)


def test_few_cells_are_better_than_nothing_and_than_themselves(few_and_many):
    few, many_cells = few_and_many
    transferred = Transferred.fit(few)
    found = {"ours": [], "nothing": [], "measured": []}
    for i, (c, p) in enumerate(zip(few.context, few.perturbation, strict=True)):
        change = transferred(
            few.perturbations[p], control="non-targeting", context=few.contexts[c], base=few.controls[c]
        )
        for name, x in (("ours", change), ("nothing", 0 * change), ("measured", few.effects[i])):
            found[name].append(np.square(x - many_cells.effects[i]).mean())
    ours, nothing, measured = (np.mean(x) for x in found.values())
    noise = many_cells.variance.mean()
    assert ours - noise < 0.9 * (nothing - noise)
    assert ours - noise < 0.5 * (measured - noise)


def test_shrinking_goes_to_the_other_contexts_and_then_to_nothing():
    rng = np.random.default_rng(0)
    c, p = np.divmod(np.arange(200), 40)
    common = rng.normal(size=(40, 300)) * (rng.random((40, 300)) < 0.2)
    for share, most in ((1.0, 0.5), (0.0, 0.1)):
        truth = share * common[p]
        effects = with_error(rng, truth, c, p, error=0.5)
        found = shrunken(effects)
        assert np.square(found.effects - truth).mean() < most * np.square(effects.effects - truth).mean()
        assert found.perturbations == effects.perturbations
        np.testing.assert_array_equal(found.context, effects.context)
    # a deviation of one context that is far beyond its error stays
    truth[3] = 0
    truth[3, :30] = 10
    effects = with_error(rng, truth, c, p, error=0.1)
    np.testing.assert_allclose(shrunken(effects).effects[3, :30], effects.effects[3, :30], rtol=0.02)


def with_error(rng, truth, context, perturbation, *, error, controls=None) -> Effects:
    y = truth + error * rng.normal(size=truth.shape)
    names = [f"c{i}" for i in context], [f"p{i:03d}" for i in perturbation]
    effects = Effects.from_effects(y, *names, controls)
    return dataclasses.replace(effects, variance=np.full_like(effects.effects, error**2), n_cells=np.full(len(y), 30))


# -- other contexts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "least", "most"), [(0.0, 0.0, 0.15), (0.5, 0.2, 0.8), (1.0, 0.9, 1.0)])
def test_effects_are_carried_over_as_far_as_contexts_share_them(shared, least, most):
    rng = np.random.default_rng(0)
    c, p = np.divmod(np.arange(160), 40)
    controls = (3 + rng.gamma(2, size=(4, 200))).astype(np.float32)
    common, own = rng.normal(size=(40, 200)), rng.normal(size=(160, 200))
    truth = 0.5 * (np.sqrt(shared) * common[p] + np.sqrt(1 - shared) * own)
    effects = with_error(rng, truth, c, p, error=0.05, controls=controls)
    assert least <= Transferred.fit(effects).amplitude <= most


def test_noise_is_not_carried_over():
    rng = np.random.default_rng(0)
    c, p = np.divmod(np.arange(160), 40)
    controls = (1 + rng.gamma(2, size=(4, 200))).astype(np.float32)
    effects = with_error(rng, np.zeros((160, 200)), c, p, error=0.3, controls=controls)
    transferred = Transferred.fit(effects)
    for context in ("c0", "new"):
        change = transferred("p003", control=CONTROL, context=context, base=controls[0])
        assert np.sqrt(np.square(change).mean()) < 0.05


def test_a_gene_that_doubles_here_doubles_where_it_is_expressed_ten_times_as_much():
    rng = np.random.default_rng(0)
    counts = np.exp(rng.normal(1, 0.5, 100))  # per 10,000
    doubled = np.arange(100) < 20
    base = np.log1p(counts)
    effect = np.log1p(np.where(doubled, 2, 1) * counts) - base
    effects = Effects.from_effects(effect[None], ["low"], ["P"], base[None].astype(np.float32))
    effects = dataclasses.replace(effects, variance=np.full_like(effects.effects, 1e-4))
    transferred = Transferred.fit(effects)
    high = np.log1p(10 * counts).astype(np.float32)
    ratio = np.expm1(high + transferred("P", control=CONTROL, context="high", base=high)) / np.expm1(high)
    np.testing.assert_allclose(ratio[doubled], 2, rtol=0.1)
    np.testing.assert_allclose(ratio[~doubled], 1, rtol=0.02)
    # which the same change of the mean logarithm would not be
    added = np.expm1(high + effect)[doubled] / np.expm1(high)[doubled]
    assert (np.abs(added - 2) > np.abs(ratio[doubled] - 2)).all()


def test_what_is_asked_and_how_far_it_is_from_home():
    rng = np.random.default_rng(0)
    effects = many(rng)
    transferred = Transferred.fit(effects)
    rows = zip(effects.context, effects.perturbation, strict=True)
    measured = {(effects.contexts[c], effects.perturbations[p]) for c, p in rows}
    for c in effects.contexts:
        for p in effects.perturbations[::9]:
            assert transferred.question(p, c, control=CONTROL) == ("cells" if (c, p) in measured else "contexts")
    assert transferred.question("p01", "new", control=CONTROL) == "contexts"
    for label in ("unheard of", "p01+p02"):
        assert transferred.question(label, "c1", control=CONTROL) == "perturbations"
    for context, base in zip(effects.contexts, effects.controls, strict=True):
        assert transferred.extrapolation(base, context) == 0
    like_one = effects.controls[0] + rng.gamma(1, 0.1, size=200)
    assert 0 < transferred.extrapolation(like_one, "new") < 1
    far = rng.gamma(2, size=200)
    assert transferred.extrapolation(far, "new") > 1
    # cells of a known name that are others
    assert transferred.extrapolation(far, effects.contexts[0]) > 1
    # one training context tells nothing of how far is far
    alone = Transferred.fit(effects.take(effects.context == 0))
    assert np.isnan(alone.extrapolation(like_one, "new"))
    assert alone.extrapolation(effects.controls[0], "c0") == 0
    far = effects.controls[-1]
    assert np.isnan(alone.extrapolation(far, effects.contexts[-1]))  # of which it saw control cells only


def test_a_combination_is_the_same_question_however_it_is_written():
    effects = Effects.from_effects(np.eye(3, 9), ["a", "a", "b"], ["A+B", "C", "C"], np.eye(2, 9, dtype=np.float32))
    transferred = Transferred.fit(effects)
    for label in ("A+B", "B+A", f"B+{CONTROL}+A"):
        assert transferred.question(label, "a", control=CONTROL) == "cells"
        assert transferred.question(label, "b", control=CONTROL) == "contexts"
    assert transferred.question("A+C", "a", control=CONTROL) == "perturbations"


def test_errors_are_larger_the_less_was_measured():
    rng = np.random.default_rng(0)
    n, n_genes = 40, 100
    c, p = np.divmod(np.arange(4 * n), n)
    truth = 0.5 * rng.normal(size=(n, n_genes))[p] + 0.5 * rng.normal(size=(4 * n, n_genes))
    controls = (3 + rng.gamma(2, size=(4, n_genes))).astype(np.float32)
    effects = with_error(rng, truth, c, p, error=0.05, controls=controls)
    names = [*effects.perturbations, "new"]
    table = pd.DataFrame(rng.normal(size=(n + 1, 3)), index=names)
    transferred = Transferred.fit(effects, PerturbationTable.from_features(table, effects.perturbations, CONTROL))
    own, elsewhere, unseen = (
        transferred.error_of(label, context, control=CONTROL)
        for label, context in (("p003", "c0"), ("p003", "other"), ("new", "c0"))
    )
    assert own.shape == elsewhere.shape == unseen.shape == (n_genes,)
    off = [transferred(f"p{i:03d}", **asked(effects, "c0")) - truth[i] for i in range(n)]
    assert own.mean() == pytest.approx(np.sqrt(np.square(off).mean()), rel=0.25)
    # as in this simulation, of the part that a context does not share with the three others
    left = truth - transferred.amplitude * (truth.reshape(4, n, -1).sum(axis=0)[p] - truth) / 3
    assert elsewhere.mean() == pytest.approx(np.sqrt(np.square(left).mean()), rel=0.15)
    # a mean over contexts without any hint is all that is to be told
    of_perturbation = truth.reshape(4, n, -1).mean(axis=0)
    assert unseen.mean() == pytest.approx(np.sqrt(np.square(of_perturbation).mean()), rel=0.15)


def test_a_context_with_control_cells_only_is_as_far_as_an_unknown_one(screen):
    effects = Effects.measure(screen, without_b(screen))
    transferred, base = Transferred.fit(effects), mean(screen, "c", CONTROL) + 0.3 * mean(screen, "a", CONTROL)
    assert transferred.extrapolation(base, "b") == transferred.extrapolation(base, "unheard of") > 0


# -- features ---------------------------------------------------------------------------------------------------------


def test_features_reach_what_was_not_measured(screen):
    features = pd.DataFrame(np.eye(3)[[0, 1, 0]], index=["P", "Q", "R"])
    table = PerturbationTable.from_features(features, ["P", "Q"], CONTROL)
    effects = Effects.measure(screen)
    transferred = Transferred.fit(effects, table)
    assert transferred("R", **asked(effects, "a")) is None  # features are asked for, not guessed
    transferred = dataclasses.replace(transferred, amplitude_unseen=1.0, n_neighbours=1)
    change = transferred("R", **asked(effects, "a"), features=table)
    fit = additive(effects)
    own = fit.perturbation + fit.context[effects.contexts.index("a")]
    assert np.corrcoef(change, own[0])[0, 1] > np.corrcoef(change, own[1])[0, 1]
    both = transferred("P+R", **asked(effects, "a"), features=table)
    assert np.corrcoef(both, own[0])[0, 1] > 0.5


def test_features_that_tell_predict_perturbations_that_were_left_out():
    rng = np.random.default_rng(0)
    n, n_genes = 60, 150
    features, programmes = rng.normal(size=(n, 4)), rng.normal(size=(4, n_genes))
    controls = (3 + rng.gamma(2, size=(2, n_genes))).astype(np.float32)
    c, p = np.divmod(np.arange(2 * n), n)
    truth = 0.3 * (features @ programmes)[p]
    names = [f"p{i:03d}" for i in range(n)]
    table = PerturbationTable.from_features(pd.DataFrame(features, index=names), names[:50], CONTROL)
    told = Transferred.fit(with_error(rng, truth, c, p, error=0.1, controls=controls).take(p < 50), table)
    assert told.amplitude_unseen > 0.5
    shuffled = pd.DataFrame(features[rng.permutation(n)], index=names)
    untold = PerturbationTable.from_features(shuffled, names[:50], CONTROL)
    guess = Transferred.fit(with_error(rng, truth, c, p, error=0.1, controls=controls).take(p < 50), untold)
    errors = []
    for i in range(50, n):
        options = {"control": CONTROL, "context": "c1", "base": controls[1]}
        predicted = told(names[i], **options, features=table), guess(names[i], **options, features=untold), 0
        errors.append([np.square(x - truth[i]).mean() for x in predicted])
    good, blind, nothing = np.mean(errors, axis=0)
    assert good < 0.4 * nothing
    assert blind < 1.1 * nothing


# -- stored with few numbers ------------------------------------------------------------------------------------------


def test_many_effects_take_little_room_and_predict_as_well():
    options = {"n_perturbations": 500, "n_genes": 600}
    effects = many(np.random.default_rng(2), **options)
    truth = many(np.random.default_rng(2), **options, error=0.0).effects
    transferred = Transferred.fit(effects)
    _, arrays = transferred.to_arrays()
    assert sum(a.nbytes for a in arrays.values()) < 0.35 * effects.effects.nbytes
    base, errors = effects.controls[0], []
    near = similarity(base[None], effects.controls)[0]
    for p in range(0, 500, 5):
        change = transferred(effects.perturbations[p], control=CONTROL, context="new", base=base)
        rows = np.flatnonzero(effects.perturbation == p)
        weights = np.sqrt(effects.n_cells[rows]) / np.maximum(1 - near[effects.context[rows]], 1e-4) ** 2
        weights /= weights.sum()
        whole, wanted = (np.maximum(weights @ x[rows], -base) for x in (effects.effects, truth))
        errors.append([np.square(x - wanted).mean() for x in (change, whole)])
    ours, whole = np.mean(errors, axis=0)
    assert ours < 0.8 * whole  # the mean of all measured effects, with their noise


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
            stated = {"control": CONTROL, "context": context, "base": effects.controls[2], "features": features}
            np.testing.assert_array_equal(again(label, **stated), transferred(label, **stated))
            questions = (x.question(label, context, control=CONTROL) for x in (again, transferred))
            assert len(set(questions)) == 1
            distances = (x.extrapolation(effects.controls[2], context) for x in (again, transferred))
            assert len(set(distances)) == 1


def test_no_error_is_nothing_however_few_contexts_there_are():
    rng = np.random.default_rng(0)
    n_contexts, n_genes, deviation = 6, 2000, 0.1
    c, p = np.arange(n_contexts), np.zeros(n_contexts, int)
    truth = 0.5 * rng.normal(size=(1, n_genes)) + deviation * rng.normal(size=(n_contexts, n_genes))
    controls = (3 + rng.gamma(2, size=(n_contexts, n_genes))).astype(np.float32)
    effects = with_error(rng, truth, c, p, error=0.1, controls=controls)
    error = Transferred.fit(effects).error_of(effects.perturbations[0], "a context never seen", control=CONTROL)
    assert error.min() > 0.02
    assert 1 < np.sqrt(np.square(error).mean()) / deviation < 1.6  # that of the mean of six is in it too


def test_the_error_of_a_sum_of_genes_is_that_of_the_gene_alone():
    effects = many(np.random.default_rng(0))
    fit = Transferred.fit(effects)
    perturbation, context = effects.perturbations[0], "a context never seen"
    of_genes = fit.error_of(perturbation, context, control=CONTROL)
    for gene in (0, 17):
        direction = 3 * np.eye(len(of_genes))[gene]
        found = fit.error_along(direction, perturbation, context, control=CONTROL)
        assert found == pytest.approx(3 * of_genes[gene], rel=1e-3)


def test_errors_of_genes_go_together_as_their_effects_do():
    """Two programmes of 20 genes each: errors add up within one, and cancel half of the time between them."""
    active = np.random.default_rng(0).normal(size=(60, 2)).repeat(20, axis=1)
    controls = np.full((1, 40), 2.0, np.float32)
    names = [f"P{i}" for i in range(60)]
    effects = Effects.from_effects(active, ["c"] * 60, names, controls)
    effects = dataclasses.replace(effects, variance=np.full(effects.effects.shape, 1e-4, np.float32))
    fit = Transferred.fit(effects)
    fit = dataclasses.replace(fit, error_elsewhere=np.ones(40, np.float32))
    one, both = np.zeros((2, 40))
    one[:20], both[:] = 1, 1

    def error(direction):
        return fit.error_along(direction, "P0", "another", control=CONTROL)

    assert error(one) == pytest.approx(20, rel=0.02)
    assert error(both) == pytest.approx(
        np.sqrt(20**2 + 20**2), rel=0.15
    )  # in 60 effects the two are nearly uncorrelated
