from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from virtualcell.data._screen import Screen
from virtualcell.models import Additive, PerturbationMean
from virtualcell.models._base import PerturbationModel
from virtualcell.models._start import Start, starts


def start_of(data, model, context: str) -> Start:
    screen = Screen.from_anndata(data, model.design, genes=model.genes)
    return next(starts(screen.take(screen.is_control), context))


def features_of(names, seed: int = 0) -> pd.DataFrame:
    values = np.random.default_rng(seed).normal(size=(len(names), 6))
    return pd.DataFrame(values, index=list(names))


@pytest.fixture
def featured(screen, targets, fit):
    """An ST with features, of all targets and of two genes that were not measured."""
    return fit(screen, features_of([*targets, "NEW1", "NEW2"]), n_networks=2, train={"max_steps": 40})


@pytest.mark.parametrize("context", ["type_1", "type_5"])
def test_many_perturbations_together_are_what_each_is_alone(screen, targets, featured, context):
    start = start_of(screen, featured, context)
    sets = featured.control_sets(start, n_cells=48)
    names = [*targets[:2], "NEW1", f"{targets[0]}+NEW2"]
    together = list(featured.means_from(start, names, sets))
    alone = list(PerturbationModel.means_from(featured, start, names, sets))
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.weights, other.weights)
        np.testing.assert_allclose(one.means, other.means, atol=2e-5)
    moved = np.ptp([np.einsum("p,spg->g", m.weights, m.means) for m in together], axis=0)
    assert moved.max() > 0.05  # they differ from each other


def test_batches_reach_the_networks(screen, targets, fit):
    screen.obs["batch"] = np.where(np.arange(screen.n_obs) % 2, "b1", "b2")
    st = fit(screen, setup={"batch_key": "batch"}, transfer=False, train={"max_steps": 20, "lr": 1e-2})
    start = start_of(screen, st, "type_1")
    sets = st.control_sets(start, n_cells=32)
    (found,) = st.means_from(start, [targets[0]], sets)
    (expected,) = PerturbationModel.means_from(st, start, [targets[0]], sets)
    np.testing.assert_allclose(found.means, expected.means, atol=2e-5)


@pytest.mark.parametrize("context", ["type_1", "type_5"])
def test_means_are_those_of_the_predicted_cells(screen, targets, learned, context):
    start = start_of(screen, learned, context)
    sets = learned.control_sets(start, n_cells=48, seed=3)
    (found,) = learned.means_from(start, targets[:1], sets)
    _, cells = learned.predict_from(start, targets[0], n_cells=48, seed=3)
    mean = np.einsum("p,spg->g", found.weights, found.means) / len(sets)
    np.testing.assert_allclose(mean, cells.mean(axis=0), atol=2e-5)


def test_targets_of_crispri_are_silenced_in_the_means(screen, targets, fit):
    st = fit(screen, modality_of_perturbation="CRISPRi")
    start = start_of(screen, st, "type_1")
    sets = st.control_sets(start, n_cells=48)
    (found,) = st.means_from(start, targets[:1], sets)
    _, cells = st.predict_from(start, targets[0], n_cells=48)
    mean = np.einsum("p,spg->g", found.weights, found.means) / len(sets)
    np.testing.assert_allclose(mean, cells.mean(axis=0), atol=2e-5)


def test_sets_are_disjoint_and_full(screen, learned):
    start = start_of(screen, learned, "type_1")  # 60 control cells, sets of 16
    assert learned.control_sets(start, n_cells=40).shape == (2, 16)
    assert learned.control_sets(start, n_cells=1000).shape == (3, 16)
    assert learned.control_sets(start, n_cells=3).shape == (1, 16)  # a network sees a full set
    sets = learned.control_sets(start, n_cells=1000)
    assert len(np.unique(sets)) == sets.size


def test_a_baseline_has_one_set_and_one_part(screen, targets):
    Additive.setup_anndata(screen, perturbation_key="target_gene", control="non-targeting", context_key="cell_type")
    model = Additive(screen)
    model.train()
    start = start_of(screen, model, "type_1")
    sets = model.control_sets(start, n_cells=30)
    assert sets.shape == (1, 30)
    (found,) = model.means_from(start, targets[:1], sets)
    assert found.means.shape == (1, 1, screen.n_vars)
    expected = model.predict_cells(start.dense(sets[0]), targets[0], context="type_1", base=start.base).mean(axis=0)
    np.testing.assert_allclose(found.means[0, 0], expected, atol=1e-6)


def test_where_a_perturbation_was_measured(screen, targets, featured, learned):
    assert featured.where_measured(targets[0], "type_1") == "here"
    assert featured.where_measured(targets[0], "elsewhere_1") == "elsewhere"
    assert featured.where_measured("NEW1", "type_1") == "no"
    assert featured.where_measured(f"{targets[0]}+{targets[1]}", "type_1") == "no"
    assert learned.where_measured(targets[0], "type_5") == "elsewhere"  # its cells were held out
    assert featured.known_names == targets
    assert featured.featured_names == [*targets, "NEW1", "NEW2"]
    assert learned.featured_names == []
    PerturbationMean.setup_anndata(
        screen, perturbation_key="target_gene", control="non-targeting", context_key="cell_type"
    )
    model = PerturbationMean(screen)
    model.train()
    assert model.where_measured(targets[0], "type_1") == "somewhere"
    assert model.where_measured("NEW1", "type_1") == "no"
    assert model.known_names == targets
