from __future__ import annotations

import time

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import virtualcell as vc


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return vc.datasets.synthetic()


def shares(adata: ad.AnnData) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    return counts / counts.sum(axis=1, keepdims=True)


def effects(adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observed and true log fold changes (contexts x perturbations x genes), and the truth of the control profiles."""
    share, observed, truth = shares(adata), [], []
    contexts = list(adata.obs["cell_type"].cat.categories)
    for context in contexts:
        here = (adata.obs["cell_type"] == context).to_numpy()
        table = adata.varm[f"truth_{context}"]
        mean = {p: share[here & (adata.obs["target_gene"] == p).to_numpy()].mean(axis=0) for p in table}
        control = share[here & (adata.obs["target_gene"] == "non-targeting").to_numpy()].mean(axis=0)
        observed.append([np.log((mean[p] + 1e-5) / (control + 1e-5)) for p in table])
        truth.append(table.to_numpy().T)
    return np.array(observed), np.array(truth), adata.varm["truth_control"][contexts].to_numpy().T


def test_shape_labels_and_counts(screen):
    assert screen.shape == (4 * (20 * 50 + 200), 500)
    assert isinstance(screen.X, sparse.csr_matrix)
    assert screen.X.dtype == np.float32
    assert (screen.X.data == np.rint(screen.X.data)).all()
    sizes = screen.obs.groupby(["cell_type", "target_gene"], observed=True).size().unstack()
    assert (sizes["non-targeting"] == 200).all()
    assert (sizes.drop(columns="non-targeting") == 50).all(axis=None)
    assert set(sizes.columns) - {"non-targeting"} <= set(screen.var_names)
    assert screen.var_names[0] == "GENE001"
    total = np.asarray(screen.X.sum(axis=1)).ravel()
    assert np.median(total) == pytest.approx(2000, rel=0.05)
    assert np.std(np.log(total)) == pytest.approx(0.4, rel=0.1)


def test_controls_have_the_profile_of_the_truth(screen):
    share, truth = shares(screen), screen.varm["truth_control"]
    assert truth.sum().to_numpy() == pytest.approx(1)
    control = (screen.obs["target_gene"] == "non-targeting").to_numpy()
    for context in truth:
        found = share[control & (screen.obs["cell_type"] == context).to_numpy()].mean(axis=0)
        agreement = [np.corrcoef(np.log(found + 1e-6), np.log(truth[other] + 1e-6))[0, 1] for other in truth]
        assert max(agreement) > 0.98
        assert truth.columns[int(np.argmax(agreement))] == context


def test_observed_effects_recover_the_truth_and_its_context_specific_part(screen):
    observed, truth, control = effects(screen)
    expressed = control > 5e-4
    agreement = [
        np.corrcoef(observed[c, p, expressed[c]], truth[c, p, expressed[c]])[0, 1]
        for c, p in np.ndindex(truth.shape[:2])
    ]
    assert np.mean(agreement) > 0.85
    assert min(agreement) > 0.6
    # What is left after the mean over contexts is real too.
    everywhere = expressed.all(axis=0)
    specific = (truth - truth.mean(axis=0))[..., everywhere]
    found = (observed - observed.mean(axis=0))[..., everywhere]
    assert np.corrcoef(specific.ravel(), found.ravel())[0, 1] > 0.6
    assert 0.15 < specific.var() / truth[..., everywhere].var() < 0.6


def test_the_context_specific_part_follows_from_the_programmes(screen):
    activity = screen.uns["truth"]["programme_activity"].to_numpy()
    push = screen.uns["truth"]["programme_effect"]
    weights = screen.varm["programmes"].to_numpy()
    for c, context in enumerate(screen.obs["cell_type"].cat.categories):
        table = screen.varm[f"truth_{context}"]
        predicted = weights @ (push.loc[table.columns].to_numpy() * (1 + np.tanh(activity[c]))).T
        for p, name in enumerate(table):
            others = (screen.var_names != name).nonzero()[0]
            # Shares sum to one, which moves all genes of a cell alike.
            assert np.ptp(table[name].to_numpy()[others] - predicted[others, p]) < 1e-10


def test_targets_fall_to_the_stated_residual(screen):
    table = vc.pp.knockdown_efficiency(
        screen, perturbation_key="target_gene", control="non-targeting", context_key="cell_type"
    )
    assert (table["direction"] == "down").all()
    assert table["residual"].median() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(("argument", "value"), [("context_specificity", 0.0), ("effect_size", 0.0)])
def test_signal_can_be_switched_off(argument, value):
    adata = vc.datasets.synthetic(
        n_genes=100, n_perturbations=4, n_cells_per_group=2, n_control_cells=2, **{argument: value}
    )
    log_shift = np.stack([adata.varm[f"truth_type_{c}"].to_numpy() for c in range(1, 5)])
    # Removing what normalisation moves in all genes alike leaves the shift itself.
    log_shift -= np.median(log_shift, axis=1, keepdims=True)
    if argument == "context_specificity":
        np.testing.assert_allclose(log_shift - log_shift[:1], 0, atol=1e-10)
        assert np.abs(log_shift).mean() > 0.1
    else:
        moved = np.abs(log_shift) > 1e-10
        assert (moved.sum(axis=1) == 1).all()
        np.testing.assert_allclose(log_shift[moved], np.log(0.2), atol=1e-10)


def test_counts_are_overdispersed_as_stated():
    adata = vc.datasets.synthetic(
        n_contexts=1, n_perturbations=1, n_genes=200, n_cells_per_group=1, n_control_cells=3000, n_batches=1
    )
    counts = adata.X.toarray()[(adata.obs["target_gene"] == "non-targeting").to_numpy()]
    total = counts.sum(axis=1, keepdims=True)
    scaled = counts / total * 2000
    mean, variance = scaled.mean(axis=0), scaled.var(axis=0)
    high = mean > 10
    assert high.sum() > 20
    # Poisson noise at the cells' own depths, then dispersion 0.1 on top of cells that scatter by 0.3: e^0.09 (1.1) - 1.
    noise = mean * (2000 / total).mean()
    excess = ((variance - noise) / mean**2)[high]
    assert np.median(excess) == pytest.approx(np.exp(0.09) * 1.1 - 1, rel=0.15)


def test_the_seed_decides_and_the_global_state_does_not(screen):
    np.random.seed(1)  # noqa: NPY002
    small = {"n_genes": 60, "n_perturbations": 3, "n_cells_per_group": 5, "n_control_cells": 5}
    first = vc.datasets.synthetic(**small)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    second, third = vc.datasets.synthetic(**small), vc.datasets.synthetic(**small, seed=1)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert (first.X != second.X).nnz == 0
    assert first.obs.equals(second.obs)
    assert first.varm["truth_type_2"].equals(second.varm["truth_type_2"])
    assert (first.X != third.X).nnz > 0


def test_the_default_screen_takes_less_than_two_seconds():
    start = time.process_time()
    vc.datasets.synthetic(n_control_cells=50)
    assert time.process_time() - start < 2


def test_the_truth_survives_a_file_and_follows_the_genes(screen, tmp_path):
    part = screen[::20, ::-2].copy()
    part.write_h5ad(tmp_path / "screen.h5ad")
    again = ad.read_h5ad(tmp_path / "screen.h5ad")
    for key in ("truth_type_3", "truth_control", "programmes"):
        expected = screen.varm[key].loc[again.var_names]
        np.testing.assert_array_equal(again.varm[key].to_numpy(), expected.to_numpy())
    assert again.uns["truth"]["programme_effect"].equals(screen.uns["truth"]["programme_effect"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_perturbations": 60, "n_genes": 100}, "n_perturbations=60 must be from 1 to half of n_genes=100"),
        ({"context_specificity": 1.2}, "context_specificity=1.2 must lie between 0 and 1"),
        ({"dispersion": 0}, "dispersion=0 must be more than 0"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        vc.datasets.synthetic(**arguments)


def test_the_design_names_columns_that_are_there(screen):
    design = screen.uns["design"]
    assert (screen.obs[design["perturbation_key"]] == design["control"]).sum() == 800
    assert screen.obs[design["context_key"]].nunique() == 4
    assert screen.obs[design["batch_key"]].nunique() == 2
