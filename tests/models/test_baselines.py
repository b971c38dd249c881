from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models import (
    Additive,
    ContextMean,
    NearestContext,
    NearestPerturbations,
    NoChange,
    PerturbationMean,
    Ridge,
)
from virtualcell.models._effects import Effects

CONTROL = "non-targeting"
FROM_FEATURES = [Ridge, NearestPerturbations]
LEARNING = [PerturbationMean, ContextMean, Additive, NearestContext, *FROM_FEATURES]


def train(kind, data, design, features=None, **setup):
    kind.setup_anndata(data, **design, **setup)
    if kind in FROM_FEATURES and features is None:
        features = table(set(data.obs["target_gene"]) - {CONTROL})
    model = kind(data) if kind not in FROM_FEATURES else kind(data, features)
    model.train()
    return model


def table(names, n_dims=4) -> pd.DataFrame:
    """Features drawn for each name."""
    names = sorted(names)
    return pd.DataFrame(np.random.default_rng(0).normal(size=(len(names), n_dims)), index=names)


def learned(model) -> np.ndarray:
    """Every number of a baseline, as one vector."""
    return np.concatenate([np.ravel(values).astype(float) for values in model.arrays.values()])


def mean(data, context, perturbation) -> np.ndarray:
    """Mean expression of a group, in double precision."""
    here = ((data.obs["cell_type"] == context) & (data.obs["target_gene"] == perturbation)).to_numpy()
    return data.X[here].mean(axis=0, dtype=np.float64)


def effect(data, perturbation, contexts) -> np.ndarray:
    return np.mean([mean(data, c, perturbation) - mean(data, c, CONTROL) for c in contexts], axis=0)


@pytest.fixture(scope="module")
def seen() -> list[str]:
    return ["type_1", "type_2", "type_3", "type_4"]


def controls(data, context) -> np.ndarray:
    return data.X[((data.obs["cell_type"] == context) & (data.obs["target_gene"] == CONTROL)).to_numpy()]


def test_no_change_is_the_control_cells(screen, design, targets):
    model = train(NoChange, screen, design, split_key="split")
    cells = model.predict(screen, targets[0], context="type_5")
    np.testing.assert_array_equal(cells.to_numpy(), screen[cells.index].X)
    assert len(cells) == 60


def test_perturbation_mean_against_numpy(screen, design, targets, seen):
    model = train(PerturbationMean, screen, design, split_key="split")
    expected = np.mean([effect(screen, p, seen) for p in targets], axis=0)
    for perturbation in (targets[0], "never measured"):
        cells = model.predict(screen, perturbation, context="type_5")
        np.testing.assert_allclose(cells, np.maximum(screen[cells.index].X + expected, 0), atol=2e-6)
    cells = model.predict(screen, CONTROL, context="type_5")
    np.testing.assert_array_equal(cells.to_numpy(), screen[cells.index].X)


def test_additive_against_numpy(screen, design, targets, seen):
    model = train(Additive, screen, design, split_key="split")
    for p in targets:
        cells = model.predict(screen, p, context="type_5")
        expected = np.maximum(screen[cells.index].X + effect(screen, p, seen), 0)
        np.testing.assert_allclose(cells, expected, atol=2e-6)
        assert (cells.to_numpy() == 0).any()  # expression below zero is cut


def test_contexts_count_the_same_whatever_their_size(screen, design, targets, seen):
    p = targets[0]
    cells = np.flatnonzero((screen.obs["cell_type"] == "type_1") & (screen.obs["target_gene"] == p))
    few = screen[np.setdiff1d(np.arange(screen.n_obs), cells[3:])].copy()
    model = train(Additive, few, design, split_key="split")
    got = model.predict(few, p, context="type_5")
    np.testing.assert_allclose(got, np.maximum(few[got.index].X + effect(few, p, seen), 0), atol=2e-6)


def test_additive_sums_the_effects_of_a_new_combination(screen, design, targets, seen):
    model = train(Additive, screen, design, split_key="split")
    a, b = targets[:2]
    both = model.predict(screen, f"{a}+{b}", context="type_5")
    expected = screen[both.index].X + effect(screen, a, seen) + effect(screen, b, seen)
    np.testing.assert_allclose(both, np.maximum(expected, 0), atol=3e-6)
    assert both.equals(model.predict(screen, f"{b}+{a}", context="type_5"))
    with_control = model.predict(screen, f"{a}+{CONTROL}", context="type_5")
    assert with_control.equals(model.predict(screen, a, context="type_5"))


def test_additive_copies_the_effect_of_a_combination_that_was_measured(screen, design, targets, seen):
    a, b, c = targets[:3]
    label = f"{a}+{b}"
    screen.obs["target_gene"] = screen.obs["target_gene"].astype(str).replace({c: label})
    model = train(Additive, screen, design, split_key="split")
    cells = model.predict(screen, label, context="type_5")
    np.testing.assert_allclose(cells, np.maximum(screen[cells.index].X + effect(screen, label, seen), 0), atol=2e-6)


@pytest.mark.parametrize("kind", LEARNING)
def test_test_cells_are_never_used(kind, screen, design, targets):
    model = train(kind, screen, design, split_key="split")
    other = screen.copy()
    other.X[(other.obs["split"] == "test").to_numpy()] = 1.5
    assert np.array_equal(learned(model), learned(train(kind, other, design, split_key="split")))
    everything = train(kind, screen, design)
    assert not np.array_equal(learned(model), learned(everything))


@pytest.mark.parametrize("kind", [NoChange, *LEARNING])
def test_order_of_cells_and_genes_changes_nothing(kind, screen, design, targets):
    rng = np.random.default_rng(0)
    permuted = screen[rng.permutation(screen.n_obs), rng.permutation(screen.n_vars)].copy()
    one = train(kind, screen, design).predict(screen, targets[0])
    other = train(kind, permuted, design).predict(permuted, targets[0])
    assert list(one.index) == list(other.index)
    np.testing.assert_allclose(one, other[one.columns], atol=1e-6)


def test_unknown_perturbation(screen, design, targets):
    model = train(Additive, screen, design)
    with pytest.raises(KeyError, match=rf"^perturbation='{targets[0]}x' is unknown\. Did you mean .*'{targets[0]}'"):
        model.predict(screen, f"{targets[0]}x")
    with pytest.raises(KeyError, match="copies effects it has seen"):
        model.predict(screen, f"{targets[0]}+nothing")


def test_perturbations_of_test_cells_alone_are_unknown(screen, design, targets):
    screen.obs["split"] = np.where(screen.obs["target_gene"] == targets[0], "test", "train")
    model = train(Additive, screen, design, split_key="split")
    with pytest.raises(KeyError, match=f"perturbation='{targets[0]}' is unknown"):
        model.predict(screen, targets[0])
    assert not model.predict(screen, targets[1]).isna().any(axis=None)


def test_nothing_to_average(screen, design):
    screen.obs["split"] = np.where(screen.obs["target_gene"] == CONTROL, "train", "test")
    with pytest.raises(ValueError, match="hold no perturbation, only 'non-targeting'"):
        train(PerturbationMean, screen, design, split_key="split")


def test_context_without_controls(screen, design):
    keep = ~((screen.obs["cell_type"] == "type_2") & (screen.obs["target_gene"] == CONTROL))
    with pytest.raises(ValueError, match=r"context 'type_2' has no control cells \('non-targeting'\)\. Drop it or add"):
        train(Additive, screen[keep].copy(), design)


def test_untrained_baseline_does_not_predict(screen, design, targets):
    Additive.setup_anndata(screen, **design)
    with pytest.raises(RuntimeError, match="untrained"):
        Additive(screen).predict(screen, targets[0])


def test_repr(screen, design):
    Additive.setup_anndata(screen, **design)
    model = Additive(screen)
    assert repr(model) == "Additive baseline, 80 genes. Not trained yet."
    model.train()
    assert repr(model) == "Additive baseline, 80 genes."


def test_no_gene_exceeds_all_the_counts_of_a_cell(screen, design, targets):
    here = (screen.obs["target_gene"] == targets[0]).to_numpy()
    screen.X[here, 0] = 9
    screen.X[~here, 0] = 5
    screen.X[np.flatnonzero(~here)[:40], 0] = 8.5
    cells = train(Additive, screen, design).predict(screen, targets[0])
    assert cells[screen.var_names[0]].max() == np.float32(np.log1p(1e4))


# -- few-shot: some perturbations were measured in the new context ----------------------------------------------------


@pytest.fixture
def few_shot(screen, targets):
    """`screen` with two of its six targets in type_5 for training."""
    is_test = (screen.obs["cell_type"] == "type_5") & screen.obs["target_gene"].isin(targets[2:])
    screen.obs["split"] = np.where(is_test, "test", "train")
    return screen


def error(model, data, context, perturbations) -> float:
    """Mean absolute error of the mean shift."""
    predicted = [model.predict(data, p, context=context).to_numpy().mean(axis=0) for p in perturbations]
    return np.abs(np.array(predicted) - [mean(data, context, p) for p in perturbations]).mean()


def test_context_mean_against_numpy(few_shot, design, targets, seen):
    model = train(ContextMean, few_shot, design, split_key="split")
    own = np.mean([effect(few_shot, p, ["type_5"]) for p in targets[:2]], axis=0)
    cells = model.predict(few_shot, targets[4], context="type_5")
    np.testing.assert_allclose(cells, np.maximum(few_shot[cells.index].X + own, 0), atol=2e-6)
    few_shot.obs["split"] = np.where(few_shot.obs["cell_type"] == "type_5", "test", "train")
    model = train(ContextMean, few_shot, design, split_key="split")
    overall = np.mean([effect(few_shot, p, seen) for p in targets], axis=0)
    cells = model.predict(few_shot, targets[4], context="type_5")
    np.testing.assert_allclose(cells, np.maximum(few_shot[cells.index].X + overall, 0), atol=2e-6)


def test_additive_takes_part_of_the_own_deviation_of_the_context(few_shot, design, targets, seen):
    model = train(Additive, few_shot, design, split_key="split")
    p = targets[4]
    cells = model.predict(few_shot, p, context="type_5")
    own = np.mean([effect(few_shot, q, ["type_5"]) - effect(few_shot, q, seen) for q in targets[:2]], axis=0)
    extra = cells.to_numpy() - few_shot[cells.index].X - effect(few_shot, p, seen)
    extra = extra[:, (cells > 0).all(axis=0)].mean(axis=0)
    own = own[(cells > 0).all(axis=0)]
    slope = (extra @ own) / (own @ own)
    assert 0.05 < slope < 1
    assert np.corrcoef(extra, own)[0, 1] > 0.95


def test_baselines_in_order_of_what_they_know(few_shot, design, targets):
    errors = [
        error(train(kind, few_shot, design, split_key="split"), few_shot, "type_5", targets[2:])
        for kind in (NearestContext, Additive, PerturbationMean, NoChange)
    ]
    assert errors[0] <= 1.02 * errors[1]
    assert errors[1] < errors[2] < errors[3]


def test_nearest_context_of_a_measured_pair_is_near_its_own_effect(screen, design, targets):
    model, plain = (train(kind, screen, design) for kind in (NearestContext, Additive))
    assert error(model, screen, "type_2", targets) < 0.8 * error(plain, screen, "type_2", targets)


def test_nearest_context_takes_new_contexts_and_pairs(screen, design, targets, seen):
    known = screen[screen.obs["cell_type"].isin(seen).to_numpy()].copy()
    model = train(NearestContext, known, design)
    a, b = targets[:2]
    one, other, both = (model.predict(screen, p, context="type_5").to_numpy() for p in (a, b, f"{b}+{a}"))
    base = controls(screen, "type_5")
    inside = (np.minimum(one, other) > 0) & (both > 0) & (np.max([one, other, both], axis=0) < 9.2)
    np.testing.assert_allclose((both - base)[inside], (one + other - 2 * base)[inside], atol=1e-5)
    with pytest.raises(KeyError, match="Ridge and NearestPerturbations reach others from features"):
        model.predict(screen, "nothing")


# -- from features ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """A larger screen whose effects follow from the programmes of the targets, a third of which is held out."""
    adata = vc.datasets.synthetic(
        n_contexts=2, n_perturbations=60, n_genes=150, n_cells_per_group=20, effect_size=0.5, context_specificity=0.3,
        n_programmes=4, seed=3,
    )  # fmt: skip
    features = adata.varm["programmes"]
    names = sorted(set(adata.obs["target_gene"]) - {CONTROL})
    adata.X = np.log1p(adata.X.toarray() / np.asarray(adata.X.sum(axis=1)) * 1e4).astype(np.float32)
    adata.obs["split"] = np.where(adata.obs["target_gene"].isin(names[::3]), "test", "train")
    return adata, features, names[::3]


@pytest.mark.parametrize("kind", FROM_FEATURES)
def test_unseen_perturbations_from_features(kind, many, design):
    adata, features, unseen = many
    model = train(kind, adata, design, features, split_key="split")
    mean_only = train(PerturbationMean, adata, design, split_key="split")
    scores = []
    for m in (model, mean_only):
        rs = []
        for p in unseen:
            delta = m.predict(adata, p, context="type_1").mean().to_numpy() - mean(adata, "type_1", CONTROL)
            rs.append(np.corrcoef(delta, effect(adata, p, ["type_1"]))[0, 1])
        scores.append(np.mean(rs))
    assert scores[0] > 0.6
    assert scores[0] > scores[1] + 0.3


@pytest.mark.parametrize("kind", FROM_FEATURES)
def test_features_of_pairs_add_up(kind, many, design):
    adata, features, unseen = many
    model = train(kind, adata, design, features, split_key="split")
    a, b = unseen[:2]
    base = controls(adata, "type_1")
    one, other, both = (model.predict(adata, p, context="type_1").to_numpy() for p in (a, b, f"{a}+{b}"))
    own = model._of_context(model.known_contexts.index("type_1"))  # counts once
    inside = (np.minimum(one, other) > 0) & (both > 0) & (np.max([one, other, both], axis=0) < 9.2)
    expected = one + other - 2 * base - own
    np.testing.assert_allclose((both - base)[inside], expected[inside], atol=1e-5)


def test_ridge_is_a_fit_also_for_measured_perturbations(many, design):
    adata, features, _ = many
    model = train(Ridge, adata, design, features, split_key="split")
    p = model.known[0]
    predicted = model.predict(adata, p, context="type_1").to_numpy().mean(axis=0) - mean(adata, "type_1", CONTROL)
    assert np.abs(predicted - effect(adata, p, ["type_1"])).max() > 0.05


@pytest.mark.parametrize("kind", FROM_FEATURES)
def test_features_must_be_there(kind, screen, design, targets):
    kind.setup_anndata(screen, **design)
    with pytest.raises(ValueError, match=rf"^perturbation_features=None: {kind.__name__} predicts from features"):
        kind(screen)
    with pytest.raises(ValueError, match=rf"no row for 1 perturbations of the data: \['{targets[0]}'\]"):
        kind(screen, table(targets[1:]))
    # effects are learned from validation cells too, and those of test cells need no row
    for part in ("val", "test"):
        screen.obs["part"] = np.where(screen.obs["target_gene"] == targets[0], part, "train")
        if part == "test":
            train(kind, screen, design, table(targets[1:]), split_key="part")
            continue
        kind.setup_anndata(screen, **design, split_key="part")
        with pytest.raises(ValueError, match=rf"no row for 1 perturbations of the data: \['{targets[0]}'\]"):
            kind(screen, table(targets[1:]))
    model = train(kind, screen, design, table([*targets, "new"]))
    assert not model.predict(screen, "new").isna().any(axis=None)
    with pytest.raises(KeyError, match="no row in the feature table"):
        model.predict(screen, "nothing")


# -- where effects come from ------------------------------------------------------------------------------------------


def screen_of(data, **options) -> Screen:
    design = Design(
        perturbation_key="target_gene", control=CONTROL, context_key="cell_type", split_key="split", scale="log1p"
    )
    return Screen.from_anndata(data, design, **options)


@pytest.mark.parametrize("kind", [NoChange, *LEARNING])
def test_built_from_a_screen_alone(kind, few_shot, design, targets):
    features = [table(targets)] if kind in FROM_FEATURES else []
    model = kind(screen_of(few_shot), *features)
    model.train()
    usual = train(kind, few_shot, design, *features, split_key="split")
    for p in (targets[0], targets[4]):
        assert model.predict(perturbation=p).equals(usual.predict(few_shot, p))


@pytest.mark.parametrize("kind", [NoChange, *LEARNING])
def test_trained_from_effects_that_are_known_already(kind, few_shot, design, targets):
    usual = train(kind, few_shot, design, split_key="split")
    screen = screen_of(few_shot)
    effects = Effects.measure(screen, screen.is_known)
    kind.setup_anndata(few_shot, **design, split_key="split")
    model = kind(few_shot, table(targets)) if kind in FROM_FEATURES else kind(few_shot)
    model.forget_data()
    model.train(effects)
    assert model.predict(few_shot, targets[3]).equals(usual.predict(few_shot, targets[3]))
    fewer = dataclasses.replace(effects, effects=effects.effects[:, 1:])
    with pytest.raises(ValueError, match="effects= has 79 genes, this model 80"):
        model.train(fewer)


@pytest.mark.parametrize("kind", [NoChange, *LEARNING])
def test_arrays_in_arrays_out(kind, few_shot, design, targets):
    model = train(kind, few_shot, design, split_key="split")
    cells = controls(few_shot, "type_5")
    before, base = cells.copy(), cells.mean(axis=0)
    for p in (targets[0], f"{targets[1]}+{targets[4]}", CONTROL):
        predicted = model.predict_cells(cells[:7], p, context="type_5", base=base)
        assert predicted.dtype == np.float32
        whole = model.predict_cells(cells, p, context="type_5", base=base)
        np.testing.assert_array_equal(predicted, whole[:7])  # each cell by itself
    np.testing.assert_array_equal(cells, before)


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NoChange, *LEARNING])
def test_saved_and_loaded_without_the_data(kind, few_shot, design, targets, tmp_path):
    model = train(kind, few_shot, design, split_key="split")
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", accelerator="cpu")
    for p in (targets[0], targets[4], f"{targets[0]}+{targets[3]}", CONTROL):
        assert loaded.predict(few_shot, p).equals(model.predict(few_shot, p))
    if kind not in (NoChange, PerturbationMean, ContextMean):
        with pytest.raises(KeyError, match="'nothing' is unknown"):
            loaded.check_perturbation("nothing")


@pytest.mark.parametrize("kind", [NoChange, *LEARNING])
def test_without_contexts(kind, screen, targets):
    design = {"perturbation_key": "target_gene", "control": CONTROL}
    model = train(kind, screen, design)
    cells = model.predict(screen, targets[0])
    assert cells.shape == (300, 80)
    assert not cells.isna().any(axis=None)


@pytest.mark.parametrize("kind", LEARNING)
def test_training_again_forgets_what_was_learned(kind, screen, design):
    model = train(kind, screen, design)
    before = learned(model)
    model.train()
    np.testing.assert_array_equal(learned(model), before)
