from __future__ import annotations

import numpy as np
import pytest

from virtualcell.models import Additive, NoChange, PerturbationMean

CONTROL = "non-targeting"


def train(kind, data, design, **setup):
    kind.setup_anndata(data, **design, **setup)
    model = kind(data)
    model.train()
    return model


def mean(data, context, perturbation) -> np.ndarray:
    """Mean expression of a group, in double precision."""
    here = ((data.obs["cell_type"] == context) & (data.obs["target_gene"] == perturbation)).to_numpy()
    return data.X[here].mean(axis=0, dtype=np.float64)


def shift(data, perturbation, contexts) -> np.ndarray:
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
    expected = np.mean([shift(screen, p, seen) for p in targets], axis=0)
    for perturbation in (targets[0], "never measured"):
        cells = model.predict(screen, perturbation, context="type_5")
        np.testing.assert_allclose(cells, np.maximum(screen[cells.index].X + expected, 0), atol=2e-6)
    cells = model.predict(screen, CONTROL, context="type_5")
    np.testing.assert_array_equal(cells.to_numpy(), screen[cells.index].X)


def test_additive_against_numpy(screen, design, targets, seen):
    model = train(Additive, screen, design, split_key="split")
    for p in targets:
        cells = model.predict(screen, p, context="type_5")
        expected = np.maximum(screen[cells.index].X + shift(screen, p, seen), 0)
        np.testing.assert_allclose(cells, expected, atol=2e-6)
        assert (cells.to_numpy() == 0).any()  # expression below zero is cut


def test_contexts_count_the_same_whatever_their_size(screen, design, targets, seen):
    p = targets[0]
    cells = np.flatnonzero((screen.obs["cell_type"] == "type_1") & (screen.obs["target_gene"] == p))
    few = screen[np.setdiff1d(np.arange(screen.n_obs), cells[3:])].copy()
    model = train(Additive, few, design, split_key="split")
    got = model.predict(few, p, context="type_5")
    np.testing.assert_allclose(got, np.maximum(few[got.index].X + shift(few, p, seen), 0), atol=2e-6)


def test_additive_sums_the_shifts_of_a_new_combination(screen, design, targets, seen):
    model = train(Additive, screen, design, split_key="split")
    a, b = targets[:2]
    both = model.predict(screen, f"{a}+{b}", context="type_5")
    expected = screen[both.index].X + shift(screen, a, seen) + shift(screen, b, seen)
    np.testing.assert_allclose(both, np.maximum(expected, 0), atol=3e-6)
    assert both.equals(model.predict(screen, f"{b}+{a}", context="type_5"))
    with_control = model.predict(screen, f"{a}+{CONTROL}", context="type_5")
    assert with_control.equals(model.predict(screen, a, context="type_5"))


def test_additive_copies_the_shift_of_a_combination_that_was_measured(screen, design, targets, seen):
    a, b, c = targets[:3]
    label = f"{a}+{b}"
    screen.obs["target_gene"] = screen.obs["target_gene"].astype(str).replace({c: label})
    model = train(Additive, screen, design, split_key="split")
    cells = model.predict(screen, label, context="type_5")
    np.testing.assert_allclose(cells, np.maximum(screen[cells.index].X + shift(screen, label, seen), 0), atol=2e-6)


@pytest.mark.parametrize("kind", [NoChange, PerturbationMean, Additive])
def test_test_cells_are_never_used(kind, screen, design, targets, weights):
    model = train(kind, screen, design, split_key="split")
    other = screen.copy()
    other.X[(other.obs["split"] == "test").to_numpy()] = 1.5
    assert np.array_equal(weights(model), weights(train(kind, other, design, split_key="split")))
    everything = train(kind, screen, design)
    assert not np.array_equal(weights(model), weights(everything))


def test_order_of_cells_and_genes_changes_nothing(screen, design, targets):
    rng = np.random.default_rng(0)
    permuted = screen[rng.permutation(screen.n_obs), rng.permutation(screen.n_vars)].copy()
    one = train(Additive, screen, design).predict(screen, targets[0])
    other = train(Additive, permuted, design).predict(permuted, targets[0])
    assert list(one.index) == list(other.index)
    np.testing.assert_allclose(one, other[one.columns], atol=1e-6)


def test_unknown_perturbation(screen, design, targets):
    model = train(Additive, screen, design)
    with pytest.raises(KeyError, match=rf"^perturbation='{targets[0]}x' is unknown\. Did you mean .*'{targets[0]}'"):
        model.predict(screen, f"{targets[0]}x")
    with pytest.raises(KeyError, match="copies shifts it has seen"):
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
