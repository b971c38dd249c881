from __future__ import annotations

import gc
import logging
import warnings
import weakref

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import virtualcell as vc
from virtualcell.metrics._rank_sum import rank_sum_test
from virtualcell.models import Additive, ContextMean, NearestContext, NoChange, PerturbationMean
from virtualcell.tl import _predict, _predict_checks

CONTROL = "non-targeting"


def log1p_cp10k(adata) -> pd.DataFrame:
    counts = adata.X.toarray().astype(np.float64)
    return pd.DataFrame(
        np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4), index=adata.obs_names, columns=adata.var_names
    )


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else matrix


def assert_same(one, other) -> None:
    np.testing.assert_array_equal(dense(one), dense(other))


# -- what comes back --------------------------------------------------------------------------------------------------


def test_output_contract(fitted, model, targets):
    before = fitted.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells = vc.tl.predict_perturbation(fitted, targets[:2], context="type_2")
    assert cells.shape == (2 * 40, len(model.genes))
    assert cells.X.dtype == np.float32
    assert sparse.isspmatrix_csr(cells.X)
    assert np.isfinite(cells.X.data).all()
    counts = cells.layers["counts"]
    np.testing.assert_array_equal(counts.data, np.rint(counts.data))
    sizes = cells.obs["library_size"].to_numpy()
    np.testing.assert_allclose(dense(cells.X), np.log1p(dense(counts) / sizes[:, None] * 1e4), atol=1e-5)
    assert list(cells.var_names) == [g for g in fitted.var_names if g in set(model.genes)]
    assert list(cells.obs) == ["target_gene", "cell_type", "library_size", "control_barcode", "extrapolation"]
    assert list(cells.obs["target_gene"].cat.categories) == targets[:2]
    assert set(cells.obs["cell_type"]) == {"type_2"}
    assert cells.obs_names.is_unique
    barcodes = cells.obs["control_barcode"]
    assert list(cells.obs_names) == [f"{b}-{p}" for b, p in zip(barcodes, cells.obs["target_gene"], strict=True)]
    source = fitted.obs.loc[barcodes]
    assert set(source["target_gene"]) == {CONTROL}
    assert set(source["cell_type"]) == {"type_2"}
    expected = log1p_cp10k(fitted).loc[barcodes, cells.var_names]
    np.testing.assert_allclose(dense(cells.layers["control"]), expected, atol=1e-5)
    assert cells.uns["virtualcell"]["design"]["scale"] == "log1p"
    # the data is as it was
    assert (fitted.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(fitted.obs, before.obs)
    assert set(fitted.obsm) == set(before.obsm)


def test_it_is_what_the_model_predicts(fitted, model, targets):
    cells = vc.tl.predict_perturbation(fitted, targets[1], n_cells=30, seed=3)
    controls = fitted[fitted.obs["target_gene"] == CONTROL]
    direct = model.predict(controls, targets[1], n_cells=30, seed=3)
    assert list(direct.index) == list(cells.obs["control_barcode"])
    context = cells.obs["cell_type"].to_numpy()
    expected = direct[list(cells.var_names)].groupby(context).mean()
    means = pd.DataFrame(dense(cells.X), columns=cells.var_names).groupby(context).mean()
    largest_step = np.log1p(1e4 / cells.obs["library_size"].min()) / 30  # of one count in one of 30 cells
    np.testing.assert_allclose(means, expected, atol=largest_step / 2 + 1e-5)
    profiles = vc.tl.predict_perturbation(fitted, targets[1], n_cells=30, seed=3, emit="mean")
    assert list(profiles.obs_names) == [f"{c}-{targets[1]}" for c in expected.index]
    np.testing.assert_allclose(dense(profiles.X), expected, atol=1e-5)
    assert list(profiles.layers) == ["control"]
    with_model = vc.tl.predict_perturbation(fitted, targets[1], n_cells=30, seed=3, model=model)
    assert_same(with_model.X, cells.X)


def test_var_of_the_data_comes_along(fitted, targets):
    fitted.var["chromosome"] = np.arange(fitted.n_vars)
    cells = vc.tl.predict_perturbation(fitted, targets[0])
    assert (cells.var["chromosome"] == fitted.var.loc[cells.var_names, "chromosome"]).all()


def test_ready_for_scanpy_and_concat(fitted, targets, tmp_path):
    cells = vc.tl.predict_perturbation(fitted, targets[0], context="type_1")
    controls = fitted[(fitted.obs["target_gene"] == CONTROL) & (fitted.obs["cell_type"] == "type_1")]
    log = log1p_cp10k(controls)[list(cells.var_names)]
    labels = controls.obs[["target_gene", "cell_type"]]
    observed = ad.AnnData(sparse.csr_matrix(log, dtype=np.float32), obs=labels, var=cells.var[[]])
    both = ad.concat([cells, observed], join="outer")
    assert both.obs_names.is_unique
    both.uns["log1p"] = cells.uns["log1p"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*log.*")
        sc.tl.rank_genes_groups(both, "target_gene", reference=CONTROL, method="wilcoxon")
    top = sc.get.rank_genes_groups_df(both, targets[0]).set_index("names")["logfoldchanges"]
    assert top[targets[0]] < -0.5  # the target itself goes down
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert_same(again.X, cells.X)
    assert_same(again.layers["control"], cells.layers["control"])


def test_h5ad_keeps_the_model(fitted, targets, tmp_path):
    cells = vc.tl.predict_perturbation(fitted, targets[0])
    fitted.write_h5ad(tmp_path / "fitted.h5ad")
    again = vc.tl.predict_perturbation(ad.read_h5ad(tmp_path / "fitted.h5ad"), targets[0])
    assert_same(again.X, cells.X)
    assert list(again.obs_names) == list(cells.obs_names)
    pd.testing.assert_frame_equal(again.obs, cells.obs)


def test_number_of_cells_and_seed(fitted, targets):
    few = vc.tl.predict_perturbation(fitted, targets[0], n_cells=7)
    assert few.obs["cell_type"].value_counts().to_dict() == dict.fromkeys(["type_1", "type_2", "type_3"], 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = vc.tl.predict_perturbation(fitted, targets[0], context="type_1", n_cells=100)
    assert many.n_obs == 100
    assert many.obs_names.is_unique
    same = vc.tl.predict_perturbation(fitted, targets[0], n_cells=7)
    other = vc.tl.predict_perturbation(fitted, targets[0], n_cells=7, seed=1)
    assert list(few.obs_names) == list(same.obs_names) != list(other.obs_names)
    with pytest.raises(ValueError, match="n_cells=0"):
        vc.tl.predict_perturbation(fitted, targets[0], n_cells=0)


def test_lists_are_what_single_calls_give(fitted, targets):
    both = vc.tl.predict_perturbation(fitted, np.array([targets[1], targets[0], targets[1]]), context="type_1")
    single = [vc.tl.predict_perturbation(fitted, p, context="type_1") for p in (targets[1], targets[0])]
    assert_same(both.X, np.concatenate([dense(s.X) for s in single]))
    with pytest.raises(ValueError, match=r"perturbation=\[\] names nothing to predict"):
        vc.tl.predict_perturbation(fitted, [])


def test_order_of_cells_and_genes_changes_no_bit(fitted, targets):
    rng = np.random.default_rng(0)
    other = fitted[rng.permutation(fitted.n_obs), rng.permutation(fitted.n_vars)].copy()
    one, two = (vc.tl.predict_perturbation(data, targets[0], n_cells=9) for data in (fitted, other))
    assert list(one.obs_names) == list(two.obs_names)
    assert list(one.var_names) != list(two.var_names)
    assert_same(one.X, two[:, one.var_names].X)


# -- other data, other models -----------------------------------------------------------------------------------------


@pytest.fixture
def new_cells(fitted) -> ad.AnnData:
    """Control cells of another experiment: new names, another context, more genes, no model in uns."""
    rng = np.random.default_rng(0)
    cells = ad.AnnData(fitted.X.toarray()[:60], var=fitted.var[[]])
    more = ad.AnnData(rng.poisson(1, (60, 3)).astype(np.float32), var=pd.DataFrame(index=["NEW1", "NEW2", "NEW3"]))
    cells = ad.concat([more, cells], axis="var")
    cells.obs_names = [f"new_{i}" for i in range(60)]
    cells.obs["target_gene"], cells.obs["cell_type"] = CONTROL, "organoid"
    return cells


def test_new_data_with_a_model(new_cells, model, targets):
    cells = vc.tl.predict_perturbation(new_cells, targets[0], model=model)
    assert set(cells.obs["cell_type"]) == {"organoid"}
    assert list(cells.var_names) == [g for g in new_cells.var_names if g in set(model.genes)]
    counts = new_cells.X if isinstance(new_cells.X, np.ndarray) else new_cells.X.toarray()
    expected = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    expected = pd.DataFrame(expected, index=new_cells.obs_names, columns=new_cells.var_names)
    expected = expected.loc[cells.obs["control_barcode"], cells.var_names]
    np.testing.assert_allclose(dense(cells.layers["control"]), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"holds no fitted model: run `vc\.tl\.fit_state"):
        vc.tl.predict_perturbation(new_cells, targets[0])


def test_new_data_on_another_scale(new_cells, model, targets):
    cells = vc.tl.predict_perturbation(new_cells, targets[0], model=model)
    counts = np.asarray(new_cells.X)
    log = new_cells.copy()
    log.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    again = vc.tl.predict_perturbation(log, targets[0], model=model, scale="log1p")
    np.testing.assert_allclose(dense(again.X), dense(cells.X), atol=1e-4)
    with pytest.raises(ValueError, match="scale='counts' was stated, but X holds fractions"):
        vc.tl.predict_perturbation(log, targets[0], model=model)
    log.X = counts * 1000
    with pytest.raises(ValueError, match="scale='log1p' was stated, but X reaches"):
        vc.tl.predict_perturbation(log, targets[0], model=model, scale="log1p")


def test_a_layer_that_the_model_was_fitted_on_is_named(screen, fit, targets):
    fitted = screen.copy()
    fitted.layers["raw"] = fitted.X.copy()
    model = fit(fitted, layer="raw", validate=False)
    with pytest.raises(KeyError, match=r"layer='raw' is unknown.*adata\.layers\['raw'\] = adata\.X"):
        vc.tl.predict_perturbation(screen, targets[0], model=model)
    screen.layers["raw"] = screen.X
    ours, same = (vc.tl.predict_perturbation(x, targets[0], model=model) for x in (fitted, screen))
    assert_same(ours.X, same.X)


def test_genes_of_another_kind_of_name_are_not_a_matter_of_coverage(new_cells, model, targets):
    other = new_cells.copy()
    other.var_names = [f"ENSG{i:05d}" for i in range(other.n_vars)]
    with pytest.raises(KeyError, match=rf"none of the model's .*{model.genes[0]}.*ENSG00000.*adata\.var_names = "):
        vc.tl.predict_perturbation(other, targets[0], model=model)
    other.var["symbol"] = new_cells.var_names.to_numpy()
    other.var_names = other.var["symbol"].astype(str)
    ours, same = (vc.tl.predict_perturbation(x, targets[0], model=model) for x in (new_cells, other))
    assert_same(ours.X, same.X)


def test_genes_must_all_be_there_unless_said_otherwise(new_cells, model, targets, caplog):
    gone = model.genes[0]
    part = new_cells[:, new_cells.var_names != gone].copy()
    with pytest.raises(KeyError, match=rf"genes='{gone}' is unknown.*1 of {len(model.genes)} genes are missing"):
        vc.tl.predict_perturbation(part, targets[-1], model=model)
    with caplog.at_level(logging.WARNING, "virtualcell"):
        cells = vc.tl.predict_perturbation(part, targets[-1], model=model, min_gene_coverage=0.9)
    assert "1 of the model's genes are filled with 0" in caplog.text
    assert gone not in cells.var_names
    assert cells.n_vars == len(model.genes) - 1
    # as if the gene had never been counted, but for the library size
    zero = new_cells.copy()
    zero.X = np.where(zero.var_names == gone, 0, np.asarray(zero.X)).astype(np.float32)
    expected = vc.tl.predict_perturbation(zero, targets[-1], model=model)
    assert_same(cells.X, expected[:, cells.var_names].X)


def test_mudata_and_anndata_are_the_same(fitted, targets):
    cells = vc.tl.predict_perturbation(fitted, targets[0])
    mdata = md.MuData({"rna": fitted})
    assert_same(vc.tl.predict_perturbation(mdata, targets[0]).X, cells.X)


@pytest.mark.parametrize("layer", [None, "lognorm"])
@pytest.mark.parametrize("kind", [NoChange, Additive])
def test_baselines_that_were_set_up_by_hand(screen, design, targets, kind, layer):
    log = log1p_cp10k(screen).to_numpy(np.float32)
    if layer is None:
        screen.X = log
    else:
        screen.layers[layer] = log
    kind.setup_anndata(screen, **design, layer=layer, split_key="split")
    baseline = kind(screen)
    baseline.train()
    cells = vc.tl.predict_perturbation(screen, targets[0], context="type_3", model=baseline)
    direct = baseline.predict(screen, targets[0], context="type_3")
    means = vc.tl.predict_perturbation(screen, targets[0], context="type_3", model=baseline, emit="mean")
    np.testing.assert_allclose(dense(means.X)[0], direct.mean(axis=0), atol=1e-5)
    if kind is NoChange:
        np.testing.assert_allclose(dense(cells.X), dense(cells.layers["control"]), atol=1e-5)


def test_batches_come_along(screen, fit, targets):
    fit(screen, batch_key="batch")
    cells = vc.tl.predict_perturbation(screen, targets[0])
    assert (cells.obs["batch"].to_numpy() == screen.obs["batch"].loc[cells.obs["control_barcode"]].to_numpy()).all()
    # a batch that is new in another context, or among perturbed cells, does not matter to this one
    screen.obs["batch"] = screen.obs["batch"].astype(str)
    here = (screen.obs["cell_type"] == "type_1").to_numpy()
    screen.obs.loc[~here | (screen.obs["target_gene"] != CONTROL).to_numpy(), "batch"] = "batch_7"
    alone = vc.tl.predict_perturbation(screen, targets[0], context="type_1")
    assert_same(alone.X, cells[cells.obs["cell_type"] == "type_1"].X)
    # nor does it where networks have no weight, as for a measured pair; of a new combination they have
    vc.tl.predict_perturbation(screen, targets[0])
    with pytest.raises(KeyError, match=r"batch='batch_7' is unknown.*only the batches it was trained on"):
        vc.tl.predict_perturbation(screen, f"{targets[0]}+{targets[1]}")


# -- cells that are cells ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def null_screen() -> ad.AnnData:
    """Perturbations without any effect, not even on their own genes."""
    adata = vc.datasets.synthetic(
        n_contexts=3, n_perturbations=6, n_genes=200, n_cells_per_group=60, n_control_cells=150, effect_size=0.0,
        residual_expression=0.999, library_size=1500, n_batches=1, seed=3,
    )  # fmt: skip
    vc.pp.split(adata, perturbation_key="target_gene", control=CONTROL, context_key="cell_type",
                holdout={"contexts": ["type_3"]})  # fmt: skip
    return adata


def trained(kind, data, design, **options):
    kind.setup_anndata(data, **design, **options)
    model = kind(data)
    model.train()
    return model


@pytest.mark.parametrize("kind", [Additive, NearestContext, PerturbationMean])
def test_perturbations_without_effect_yield_no_differential_expression(null_screen, design, kind):
    model = trained(kind, null_screen, design, scale="counts", split_key="split")
    names = sorted(set(null_screen.obs["target_gene"]) - {CONTROL})
    cells = vc.tl.predict_perturbation(null_screen, names, context="type_3", model=model)
    control = cells[cells.obs["target_gene"] == names[0]].layers["control"]
    codes = np.concatenate([np.zeros(control.shape[0], int), cells.obs["target_gene"].cat.codes + 1])
    fdr = rank_sum_test(sparse.vstack([control, cells.X], format="csr"), codes)[1]
    assert (fdr < 0.05).mean() <= 0.01
    real = null_screen[(null_screen.obs["cell_type"] == "type_3") & (null_screen.obs["target_gene"] != CONTROL)]
    log = log1p_cp10k(real).to_numpy()
    assert abs((dense(cells.X) == 0).mean() - (log == 0).mean()) < 0.01
    is_on = log.mean(axis=0) > 0.1
    assert 0.9 < np.median(dense(cells.X).var(axis=0)[is_on] / log.var(axis=0)[is_on]) < 1.1


@pytest.mark.parametrize("kind", ["ST", NoChange, Additive, ContextMean])
def test_the_control_label_predicts_the_control_cells(fitted, model, design, kind):
    model = model if kind == "ST" else trained(kind, fitted.copy(), design, scale="counts")
    cells = vc.tl.predict_perturbation(fitted, CONTROL, model=model)
    source = fitted[cells.obs["control_barcode"], cells.var_names]
    assert_same(cells.layers["counts"], source.X)
    assert_same(cells.X, cells.layers["control"])
    few = model.predict(fitted, CONTROL, n_cells=4)
    expected = log1p_cp10k(fitted).loc[few.index, model.genes]
    np.testing.assert_allclose(few, expected, atol=1e-5)


def test_a_gene_in_few_cells_stays_in_few_cells(fitted, model, design, targets, monkeypatch):
    counts = fitted.X.tolil()
    rare = model.genes[3]
    controls = np.flatnonzero(fitted.obs["target_gene"] == CONTROL)
    counts[:, list(fitted.var_names).index(rare)] = 0
    counts[controls[0], list(fitted.var_names).index(rare)] = 1
    fitted.X = counts.tocsr()
    monkeypatch.setattr(type(model), "effect_error", lambda self, *args, **kwargs: np.where(
        np.array(self.genes) == rare, np.inf, 0.0))  # fmt: skip
    cells = vc.tl.predict_perturbation(fitted, targets[0], model=model)
    assert (dense(cells[:, rare].X) > 0).sum() == 1
    other = np.array([g for g in cells.var_names if g != rare])
    assert abs(cells[:, other].X - cells[:, other].layers["control"]).nnz


def test_effects_below_the_error_of_the_model_are_no_change(fitted, model, targets, monkeypatch):
    monkeypatch.setattr(type(model), "effect_error", lambda self, *args, **kwargs: 100.0)
    cells = vc.tl.predict_perturbation(fitted, targets[0], model=model)
    assert_same(cells.X, cells.layers["control"])
    means = vc.tl.predict_perturbation(fitted, targets[0], model=model, emit="mean")
    np.testing.assert_allclose(dense(means.X), dense(means.layers["control"]), atol=1e-6)


def test_library_sizes_come_under_the_name_of_their_column(screen, fit, targets):
    screen.obs["n_total"] = np.asarray(screen.X.sum(axis=1)).ravel() + 500
    fit(screen, library_size_key="n_total", n_top_genes=None, training={"max_steps": 2})
    cells = vc.tl.predict_perturbation(screen, targets[0])
    source = screen.obs["n_total"].loc[cells.obs["control_barcode"]]
    np.testing.assert_array_equal(cells.obs["n_total"], source)
    assert "library_size" not in cells.obs
    logs = np.log1p(dense(cells.layers["counts"]) / source.to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(dense(cells.X), logs, atol=1e-5)


def test_all_genes_keep_the_totals_of_cells(screen, design, targets):
    model = trained(Additive, screen, design, scale="counts")
    cells = vc.tl.predict_perturbation(screen, targets[0], model=model)
    before = screen[cells.obs["control_barcode"]].X.sum(axis=1)
    np.testing.assert_array_equal(cells.layers["counts"].sum(axis=1), before)
    assert (cells.layers["counts"] != screen[cells.obs["control_barcode"], cells.var_names].X).nnz


def test_logarithms_that_hold_no_counts_have_mean_profiles_only(screen, design, targets):
    log = log1p_cp10k(screen).to_numpy(np.float32)
    screen.X = sparse.csr_matrix(log * np.random.default_rng(0).uniform(0.8, 1, log.shape).astype(np.float32))
    model = trained(Additive, screen, design)
    with pytest.raises(ValueError, match=r"cells are not made of whole counts.*scale='counts'.*emit='mean'"):
        vc.tl.predict_perturbation(screen, targets[0], model=model)
    means = vc.tl.predict_perturbation(screen, targets[0], model=model, emit="mean", n_samples=2)
    assert means.n_obs == 3
    assert list(means.obs) == ["target_gene", "cell_type", "expected_error"]
    # a row of the means is the mean of the control cells and the change of its column
    np.testing.assert_allclose(dense(means.layers["control"]) + means.varm["change"].T, dense(means.X), atol=1e-5)
    assert list(means.uns["virtualcell"]["groups"]["context"]) == list(means.obs["cell_type"])
    expected = model.predict(screen, targets[0], context="type_2").mean(axis=0)
    np.testing.assert_allclose(dense(means["type_2-" + targets[0]].X)[0], expected, atol=1e-5)


def test_models_of_embeddings_change_the_counts_of_the_same_cells(screen, fit, targets):
    screen.obsm["X_pca"] = np.random.default_rng(0).normal(size=(screen.n_obs, 5)).astype(np.float32)
    fit(screen, network={"use_rep": "X_pca"}, training={"max_steps": 2}, validate=False)
    same, other = (vc.tl.predict_perturbation(screen, name, n_cells=10) for name in (CONTROL, targets[0]))
    assert list(same.obs["control_barcode"]) == list(other.obs["control_barcode"])
    assert_same(same.layers["counts"], screen[same.obs["control_barcode"], same.var_names].X)
    np.testing.assert_array_equal(other.layers["counts"].data, np.rint(other.layers["counts"].data))


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_names", [1, 5])
def test_control_cells_are_read_once_whatever_is_predicted(fitted, targets, rows_read, n_names):
    vc.tl.predict_perturbation(fitted, targets[:n_names], n_samples=2)
    assert sum(rows_read) == 3 * 40
    rows_read.clear()
    vc.tl.predict_perturbation(fitted, targets[:n_names], context="type_2")
    assert sum(rows_read) == 40


def test_other_cells_do_not_matter(fitted, targets):
    reference = vc.tl.predict_perturbation(fitted, targets[:2], context="type_2")
    counts = fitted.X.toarray()
    here = (fitted.obs["target_gene"] == CONTROL) & (fitted.obs["cell_type"] == "type_2")
    elsewhere = np.flatnonzero(~here)
    counts[elsewhere[:5], 0] = [np.nan, np.inf, -1, 0.5, 1e30]
    counts[elsewhere[5:]] = 0
    fitted.X = counts
    fitted.obsm["X_state"][elsewhere] = np.nan
    found = vc.tl.predict_perturbation(fitted, targets[:2], context="type_2")
    assert_same(found.X, reference.X)
    counts[np.flatnonzero(here)[0], 0] = np.nan
    with pytest.raises(ValueError, match="X holds NaN or infinite values"):
        vc.tl.predict_perturbation(fitted, targets[0], context="type_2")


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.toarray(),
        lambda x: x.toarray().astype(np.float64),
        lambda x: x.tocsc(),
        lambda x: x.astype(np.int64),
    ],
    ids=["dense", "dense float64", "csc", "csr int64"],
)
def test_any_matrix_of_counts_gives_the_same(fitted, targets, form):
    reference = vc.tl.predict_perturbation(fitted, targets[:2], n_cells=9)
    fitted.X = form(fitted.X)
    found = vc.tl.predict_perturbation(fitted, targets[:2], n_cells=9)
    assert_same(found.X, reference.X)
    assert_same(found.layers["control"], reference.layers["control"])


# -- the model in uns -------------------------------------------------------------------------------------------------


@pytest.fixture
def unpacked(monkeypatch) -> list:
    """Models that are read from `uns` from now on."""
    calls, unpack = [], _predict.unpack
    monkeypatch.setattr(_predict, "unpack", lambda *args, **kw: calls.append(args) or unpack(*args, **kw))
    return calls


def test_the_stored_model_is_read_once_and_let_go_with_the_data(session_fitted, targets, unpacked):
    adata = session_fitted[0].copy()
    gc.collect()
    before = len(_predict._LOADED)
    for name in targets:
        vc.tl.predict_perturbation(adata, name, n_cells=2)
    vc.tl.predict_perturbation(md.MuData({"rna": adata}), targets[0], n_cells=2)
    assert len(unpacked) == 1
    (loaded,) = (weakref.ref(m) for ref, m in _predict._LOADED.values() if ref() is adata.uns["virtualcell"]["st"])
    assert len(_predict._LOADED) == before + 1
    unpacked.clear()
    del adata
    gc.collect()
    assert loaded() is None
    assert len(_predict._LOADED) == before


def test_another_fit_is_another_model(screen, fit, targets, unpacked):
    predicted = []
    for seed in (0, 1):
        fit(screen, seed=seed, validate=False)
        predicted.append(vc.tl.predict_perturbation(screen, targets[0], n_cells=3).X)
    assert len(unpacked) == 2
    assert (predicted[0] != predicted[1]).nnz


def test_copies_views_and_files_predict_the_same_bits(fitted, model, targets, tmp_path):
    names = [targets[0], f"{targets[1]}+{targets[2]}"]
    expected = vc.tl.predict_perturbation(fitted, names, model=model, n_samples=3)
    fitted.write_h5ad(tmp_path / "fitted.h5ad")
    fitted.write_zarr(tmp_path / "fitted.zarr")
    model.save(tmp_path / "model")
    again = {
        "copy": (fitted.copy(), None),
        "view": (fitted[fitted.obs["target_gene"] == CONTROL], None),
        "h5ad": (ad.read_h5ad(tmp_path / "fitted.h5ad"), None),
        "zarr": (ad.read_zarr(tmp_path / "fitted.zarr"), None),
        "folder": (fitted, vc.models.ST.load(tmp_path / "model")),
    }
    for data, of_file in again.values():
        found = vc.tl.predict_perturbation(data, names, model=of_file, n_samples=3)
        assert_same(found.X, expected.X)
        for key in ("change", "standard_error"):
            np.testing.assert_array_equal(found.varm[key], expected.varm[key])
        assert list(found.obs_names) == list(expected.obs_names)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_unknown_names(fitted, targets):
    with pytest.raises(
        KeyError, match=rf"^perturbation='{targets[0]}X' is unknown\. Did you mean '{targets[0]}'.*_features="
    ):
        vc.tl.predict_perturbation(fitted, f"{targets[0]}X")
    with pytest.raises(KeyError, match=r"^context='type_4' is unknown\. Did you mean 'type_.*needs control cells"):
        vc.tl.predict_perturbation(fitted, targets[0], context="type_4")
    with pytest.raises(KeyError, match=r"^layer='raw' is unknown"):
        vc.tl.predict_perturbation(fitted, targets[0], layer="raw")
    del fitted.obs["cell_type"]
    with pytest.raises(KeyError, match=r"^context_key='cell_type' is unknown"):
        vc.tl.predict_perturbation(fitted, targets[0])


def test_drugs_are_found_in_names(fitted, design):
    with pytest.raises(KeyError, match=r"drug='STAT1' is unknown.*ask for perturbation="):
        vc.tl.predict_perturbation(fitted, drug="STAT1")
    NoChange.setup_anndata(fitted, **design, scale="counts")
    baseline = NoChange(fitted)
    baseline.train()
    with pytest.raises(KeyError, match=r"drug='aspirin' is unknown.*ask for perturbation="):
        vc.tl.predict_perturbation(fitted, drug="aspirin", model=baseline)


def test_arguments_of_the_wrong_kind(fitted, targets):
    with pytest.raises(TypeError, match=r"^context=\['type_1', 'type_2'\] must be one label"):
        vc.tl.predict_perturbation(fitted, targets[0], context=["type_1", "type_2"])
    with pytest.raises(TypeError, match=r"^model='folder' is not a fitted model\. Load .*ST\.load"):
        vc.tl.predict_perturbation(fitted, targets[0], model="folder")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_cells": 2.5}, TypeError, r"^n_cells=2\.5 must be a whole number"),
        ({"n_cells": "all"}, TypeError, r"^n_cells='all' must be a whole number"),
        ({"emit": "cell"}, KeyError, r"^emit='cell' is unknown\. Did you mean 'cells'\? Say 'cells'.*, 'mean' for"),
        ({"n_samples": 1}, ValueError, r"^n_samples=1: at least 2 draws are needed"),
        ({"seed": 0.5}, ValueError, r"^seed=0\.5 is not a whole number of at least 0"),
        ({"seed": -1}, ValueError, r"^seed=-1 is not a whole number of at least 0"),
        ({"min_gene_coverage": 0}, ValueError, r"^min_gene_coverage=0 must be above 0"),
        ({"dose": 0.5}, ValueError, r"^dose=0\.5 was given without drug="),
        (
            {"batch_key": "batch"},
            ValueError,
            r"^batch_key='batch' was given, but the model was set up without batch_key",
        ),
        (
            {"scale": "log1p", "library_size_key": "n"},
            ValueError,
            r"^library_size_key='n' has no use with scale='log1p'",
        ),
    ],
)
def test_arguments_with_wrong_values(fitted, targets, options, error, message):
    with pytest.raises(error, match=message):
        vc.tl.predict_perturbation(fitted, targets[0], **options)


@pytest.mark.parametrize("stored", ["model", np.zeros(3, np.uint8), None])
def test_what_is_no_model_is_said_to_be_none(fitted, targets, stored):
    whole = fitted.uns["virtualcell"]["st"]
    for damaged in (stored, whole[:-100]):
        fitted.uns["virtualcell"]["st"] = damaged
        with pytest.raises(ValueError, match=r"^uns\['virtualcell'\].*(no model|no fitted model)"):
            vc.tl.predict_perturbation(fitted, targets[0])


def test_data_without_controls_or_with_repeated_cells(fitted, targets):
    only = fitted[fitted.obs["target_gene"] != CONTROL].copy()
    with pytest.raises(KeyError, match=r"^control='non-targeting' is unknown.*It labels the unperturbed cells"):
        vc.tl.predict_perturbation(only, targets[0])
    fitted.obs_names = ["cell"] * fitted.n_obs
    with pytest.raises(ValueError, match=r"obs_names repeats control cells\. Run `adata\.obs_names_make_unique\(\)`"):
        vc.tl.predict_perturbation(fitted, targets[0])
    fitted.obs_names_make_unique()
    fitted.obs["cell_type"] = fitted.obs["cell_type"].astype(object).where(np.arange(fitted.n_obs) > 2)
    with pytest.raises(ValueError, match=r"context_key='cell_type': 3 cells have no label"):
        vc.tl.predict_perturbation(fitted, targets[0])


def test_contexts_without_controls_are_named(fitted, targets, caplog):
    is_control, there = fitted.obs["target_gene"] == "non-targeting", fitted.obs["cell_type"]
    lost = there.unique()[0]
    cells = fitted[~(is_control & (there == lost)).to_numpy()].copy()
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        predicted = vc.tl.predict_perturbation(cells, targets[0])
    assert lost not in set(predicted.obs["cell_type"])
    assert f"No prediction for {lost}, which has no control cells" in caplog.text


def test_empty_controls(fitted, targets):
    first = np.flatnonzero(fitted.obs["target_gene"] == CONTROL)[0]
    fitted.X = fitted.X.toarray()
    fitted.X[first] = 0
    with pytest.raises(ValueError, match=rf"1 cells have no counts, among them \['{fitted.obs_names[first]}'\]"):
        vc.tl.predict_perturbation(fitted, targets[0])


def test_fewer_genes_than_at_fitting_are_reported_because_library_sizes_shrink(fitted, fit, targets, caplog):
    others = pd.DataFrame(index=[f"other{i}" for i in range(fitted.n_vars)])
    silent = ad.AnnData(sparse.csr_matrix((fitted.n_obs, fitted.n_vars), dtype=np.float32), obs=fitted.obs, var=others)
    wide = ad.concat([fitted, silent], axis=1, merge="same")
    fit(wide, n_top_genes=20, training={"max_steps": 1})
    vc.tl.predict_perturbation(wide, targets[0])
    assert "library sizes" not in caplog.text
    few = wide[:, fitted.var_names].copy()
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        vc.tl.predict_perturbation(few, targets[0])
    assert "library sizes, summed over fewer genes, come out too small" in caplog.text


@pytest.mark.parametrize("wrong", [{"STAT1": 1}, ["STAT1", ["JAK2"]], [None]])
def test_perturbations_are_names(fitted, wrong):
    with pytest.raises(TypeError, match="must be a name, or a list of names"):
        vc.tl.predict_perturbation(fitted, wrong)


def test_all_that_was_learned_is_predicted_where_nothing_is_named(fitted, targets, monkeypatch):
    named = vc.tl.predict_perturbation(fitted, targets, context="type_2", n_cells=3)
    unnamed = vc.tl.predict_perturbation(fitted, context="type_2", n_cells=3)
    assert sorted(set(unnamed.obs["target_gene"])) == sorted(targets)
    assert_same(unnamed[named.obs_names].X, named.X)
    monkeypatch.setattr(_predict_checks, "MOST_UNASKED", 3 * len(targets))
    assert vc.tl.predict_perturbation(fitted, context="type_2", n_cells=3).n_obs == 3 * len(targets)
    assert vc.tl.predict_perturbation(fitted, context="type_2", emit="mean").n_obs == len(targets)
    with pytest.raises(ValueError, match=f"asks for {len(targets)} perturbations of 4 cells each"):
        vc.tl.predict_perturbation(fitted, context="type_2", n_cells=4)
