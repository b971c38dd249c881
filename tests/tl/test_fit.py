from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
import weakref

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models import SE, ST, _transferred
from virtualcell.models._effects import Effects

CONTROL = "non-targeting"


def weights(st) -> np.ndarray:
    return torch.cat([v.flatten().float() for v in st.module.state_dict().values()]).numpy()


def dense(matrix) -> np.ndarray:
    """Predictions are sparse where the data is."""
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def log1p_cp10k(counts, total=None) -> np.ndarray:
    counts = counts.toarray() if sparse.issparse(counts) else np.asarray(counts)
    total = counts.sum(axis=1) if total is None else np.asarray(total)
    return np.log1p(counts / total[:, None] * 1e4)


# -- what is written, and what is not ---------------------------------------------------------------------------------


def test_only_x_state_and_uns_are_written(screen, fit):
    screen.layers["other"] = screen.X.astype(np.float64) * 2
    before = screen.copy()
    options = {"split_key": "split", "batch_key": "batch", "n_top_genes": 60, "validate": True}
    st = fit(screen, se={"max_steps": 2}, **options)
    assert screen.X.dtype == before.X.dtype
    assert (screen.X != before.X).nnz == 0
    assert (screen.layers["other"] != before.layers["other"]).nnz == 0
    assert set(screen.layers) == {"other"}
    pd.testing.assert_frame_equal(screen.obs, before.obs)
    pd.testing.assert_frame_equal(screen.var, before.var)
    assert set(screen.varm) == set(before.varm)
    assert set(screen.obsm) == {"X_state"}
    assert screen.obsm["X_state"].shape == (420, st.se.config.n_output + st.se.config.n_dataset)
    assert set(screen.uns) == set(before.uns) == {"truth", "design", "virtualcell"}
    assert set(screen.uns["virtualcell"]) == {"split_manifest", "design", "st", "validation", "verdict"}
    assert screen.uns["virtualcell"]["st"].dtype == np.uint8
    assert screen.uns["virtualcell"]["st"].ndim == 1
    manifests = screen.uns["virtualcell"]["split_manifest"], before.uns["virtualcell"]["split_manifest"]
    assert manifests[0]["split"]["holdout"] == manifests[1]["split"]["holdout"] == {"contexts": ["type_3"]}
    assert screen.uns["virtualcell"]["design"] == {
        "perturbation_key": "target_gene",
        "control": CONTROL,
        "n_genes": 90,
        "context_key": "cell_type",
        "batch_key": "batch",
        "combination_separator": "+",
        "scale": "counts",
        "target_sum": 1e4,
    }


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.toarray(),
        lambda x: x.toarray().astype(np.uint16),
        lambda x: x.toarray().astype(np.float64),
        lambda x: x.tocsc(),
        lambda x: x.tocsc().astype(np.float64),
        lambda x: x.astype(np.int64),
    ],
    ids=["dense", "dense uint16", "dense float64", "csc", "csc float64", "csr int64"],
)
def test_any_matrix_of_counts_gives_the_same_and_stays_as_it_is(screen, fit, targets, form):
    reference = weights(fit(screen))
    predicted = vc.tl.predict_perturbation(screen, targets[:2], n_cells=9)
    screen.X = form(screen.X)
    before = screen.X.copy()
    np.testing.assert_array_equal(weights(fit(screen)), reference)
    again = vc.tl.predict_perturbation(screen, targets[:2], n_cells=9)
    np.testing.assert_array_equal(dense(again.X), dense(predicted.X))
    assert type(screen.X) is type(before)
    assert screen.X.dtype == before.dtype
    assert (before != screen.X).sum() == 0


def test_without_se_there_is_no_embedding(screen, fit):
    st = fit(screen, se=False)
    assert st.se is None
    assert not screen.obsm


def test_st_can_predict_when_the_training_of_se_is_interrupted(screen, fit, targets, monkeypatch, capsys):
    st = fit(screen.copy(), se={"max_steps": 1}, training={"max_steps": 2})
    assert "se=False leaves it out" in capsys.readouterr().out

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(SE, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(screen, se={"max_steps": 1}, training={"max_steps": 2})
    assert "X_state" not in screen.obsm
    predicted = vc.tl.predict_perturbation(screen, targets[0])
    np.testing.assert_array_equal(dense(predicted.X), dense(vc.tl.predict_perturbation(screen, targets[0], model=st).X))


def test_nothing_but_named_bars_the_verdict_and_what_follows_is_shown():
    """In a fresh process, as a user sees it, with each message of Lightning and of other libraries."""
    code = """
import virtualcell as vc
adata = vc.datasets.synthetic(n_contexts=2, n_perturbations=2, n_genes=60, n_cells_per_group=20, n_control_cells=40)
keys = dict(perturbation_key="target_gene", control="non-targeting", context_key="cell_type")
vc.tl.fit_state(adata, **keys, training={"max_steps": 2}, se={"max_steps": 2})
predicted = vc.tl.predict_perturbation(adata, "non-targeting", context="type_1")
predicted = vc.tl.predict_perturbation(adata, sorted(set(adata.obs["target_gene"]))[0], context="type_1")
vc.tl.evaluate(predicted, adata, genes=predicted.var_names, suite=["mae"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    verdict, follows, control = done.stdout.decode().splitlines()
    assert verdict.startswith("On left-out contexts ST is ")
    assert follows.startswith("ST is fitted")
    assert control.startswith("'non-targeting' is the label of control cells: it is predicted to be the control cells")
    # each bar is drawn over itself, and stays as it was last
    bars = [line.split("\r")[-1].split(" |")[0].rstrip() for line in done.stderr.decode().strip("\n").split("\n")]
    loss = re.compile(r", loss [\d.e+]+")
    assert [loss.sub("", bar) for bar in bars] == [
        "ST: effects of perturbations, step 2 of 2",
        "verdict: left-out contexts, fold 2 of 2",
        "SE: cell embedding, step 2 of 2",
        "SE: embedding the cells, cell 160 of 160",
        "evaluation, 1 of 1, model of type_1",
    ]


def test_without_bars_nothing_is_drawn(screen, fit, capfd):
    fit(screen, se={"max_steps": 1, "val_fraction": 0.0}, validate=True)
    assert capfd.readouterr().err == ""


def test_another_fit_leaves_nothing_of_the_one_before(screen, fit, targets):
    fit(screen, split_key="split", batch_key="batch", validate=True)
    st = fit(screen)
    assert set(screen.uns["virtualcell"]) == {"split_manifest", "design", "st"}
    assert "batch_key" not in screen.uns["virtualcell"]["design"]
    cells = vc.tl.predict_perturbation(screen, targets[0])
    np.testing.assert_array_equal(dense(cells.X), dense(vc.tl.predict_perturbation(screen, targets[0], model=st).X))


def test_effects_of_many_perturbations_are_stored_in_little_and_predict_as_well(fit, design, monkeypatch):
    adata = vc.datasets.synthetic(
        n_contexts=5, n_perturbations=300, n_genes=2400, n_cells_per_group=1, n_control_cells=15, seed=2
    )
    network = {"n_hidden": 8, "n_feedforward": 8, "n_heads": 1, "head_dim": 8, "set_size": 3}
    st = fit(adata, n_top_genes=None, network=network, training={"max_steps": 1, "min_cells": 1})
    effects = Effects.measure(Screen.from_anndata(adata, Design(**design)).select(st.genes))
    assert adata.uns["virtualcell"]["st"].nbytes < effects.effects.nbytes / 5
    monkeypatch.setattr(_transferred, "leading_axes", lambda table, noise: np.eye(table.shape[1], dtype=np.float32))
    exact = _transferred.Transferred.fit(effects)
    missed, size = [], []
    for name in effects.perturbations[::20]:
        asked = {"control": CONTROL, "context": "new", "base": effects.controls[0]}
        got, wanted = (each(name, **asked) for each in (st.transferred, exact))
        missed.append(got - wanted)
        size.append(wanted)
    noise = effects.noise() / effects.effects.size / 5  # of the mean over five contexts
    assert np.mean(np.square(missed)) < noise
    assert np.mean(np.square(missed)) < np.mean(np.square(size))


def test_nothing_holds_on_to_the_data(session_screen, fit):
    adata = session_screen.copy()
    st = fit(adata, se={"max_steps": 1})
    gone = weakref.ref(adata)
    del adata
    gc.collect()
    assert gone() is None
    assert st.adata is None
    with pytest.raises(ValueError, match=r"`vc\.tl\.fit_state` let go of it"):
        st.train(max_steps=1)


def test_random_states_and_threads_are_left_alone(screen, fit):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(screen, se={"max_steps": 1}, n_top_genes=60)
    assert torch.get_num_threads() == 1  # numba inside scanpy would set it to all cores
    torch.set_num_threads(threads)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


# -- what is learned from ---------------------------------------------------------------------------------------------


def test_matrix_is_log1p_of_counts_per_ten_thousand(screen, fit, targets):
    st = fit(screen)
    controls = screen[screen.obs["target_gene"] == CONTROL]
    unchanged = vc.tl.predict_perturbation(screen, targets[0], model=st)
    expected = pd.DataFrame(log1p_cp10k(controls.X), index=controls.obs_names, columns=controls.var_names)
    expected = expected.loc[unchanged.obs["control_barcode"], unchanged.var_names]
    np.testing.assert_allclose(dense(unchanged.layers["control"]), expected, atol=1e-5)


def test_counts_and_their_log1p_give_the_same_model(screen, fit):
    st = fit(screen)
    log = ad.AnnData(np.ones(screen.shape, np.float32), obs=screen.obs, var=screen.var[[]])
    log.layers["lognorm"] = sparse.csr_matrix(log1p_cp10k(screen.X).astype(np.float32))
    other = fit(log, layer="lognorm", scale="log1p")
    np.testing.assert_allclose(weights(other), weights(st), atol=1e-3)
    assert log.uns["virtualcell"]["design"]["layer"] == "lognorm"


def test_library_size_of_a_column(screen, fit, targets):
    part = screen[:, 10:].copy()
    part.obs["total"] = screen.X.sum(axis=1).A1
    fit(part, library_size_key="total")
    cells = vc.tl.predict_perturbation(part, targets[0])
    everything = pd.DataFrame(log1p_cp10k(screen.X), index=screen.obs_names, columns=screen.var_names)
    expected = everything.loc[cells.obs["control_barcode"], cells.var_names]
    np.testing.assert_allclose(dense(cells.layers["control"]), expected, atol=1e-5)
    with pytest.raises(KeyError, match=r"library_size_key='totals' is unknown\. Did you mean 'total'"):
        fit(part, library_size_key="totals")


@pytest.mark.parametrize("axis", ["cells", "genes", "both"])
def test_order_of_the_input_changes_no_bit_of_the_prediction(screen, fit, targets, axis):
    rng = np.random.default_rng(0)
    other = screen
    if axis != "genes":
        other = other[rng.permutation(screen.n_obs)]
    if axis != "cells":
        other = other[:, rng.permutation(screen.n_vars)]
    other = other.copy()
    for data in (screen, other):
        fit(data, n_top_genes=60, training={"max_steps": 30})
    one, two = (vc.tl.predict_perturbation(data, targets[0], n_cells=15) for data in (screen, other))
    assert list(one.obs_names) == list(two.obs_names)
    np.testing.assert_array_equal(dense(one.X), dense(two[:, one.var_names].X))
    assert list(two.var_names) == [g for g in other.var_names if g in set(one.var_names)]


def test_order_of_genes_moves_x_state_only_by_rounding(screen, fit):
    other = screen[:, np.random.default_rng(0).permutation(screen.n_vars)].copy()
    for data in (screen, other):
        fit(data, se={"max_steps": 2}, training={"max_steps": 1})
    np.testing.assert_allclose(other.obsm["X_state"], screen.obsm["X_state"], atol=1e-5)


def test_order_of_real_cells_and_genes_changes_no_bit(kang, kang_design, fit):
    rng = np.random.default_rng(0)
    other = kang[rng.permutation(kang.n_obs), rng.permutation(kang.n_vars)].copy()
    options = {**kang_design, "n_top_genes": 300, "training": {"max_steps": 8}}
    one, two = fit(kang, **options), fit(other, **options)
    assert one.genes == two.genes
    np.testing.assert_array_equal(weights(one), weights(two))


def test_seed_decides(screen, fit):
    one, two, three = (fit(screen, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(weights(one), weights(two))
    assert not np.array_equal(weights(one), weights(three))


SPLIT = {"split_key": "split", "n_top_genes": 60, "se": {"max_steps": 1}}


@pytest.fixture(scope="module")
def on_split(session_screen, fit) -> ST:
    return fit(session_screen.copy(), **SPLIT)


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("what", ["counts", "labels"])
def test_test_and_validation_cells_choose_nothing(screen, fit, on_split, part, what):
    rows = np.flatnonzero(screen.obs["split"] == part)
    if what == "counts":
        counts = screen.X.toarray()
        counts[rows] = np.random.default_rng(0).permuted(counts[rows], axis=1)  # other genes vary there now
        screen.X = sparse.csr_matrix(counts)
    else:
        labels = screen.obs["target_gene"].astype(str).to_numpy()
        labels[rows[::2]] = sorted(set(screen.var_names) - set(on_split.genes))[0]
        screen.obs["target_gene"] = labels
    again = fit(screen, **SPLIT)
    assert again.genes == on_split.genes
    assert again.table.names == on_split.table.names
    np.testing.assert_array_equal(weights(again), weights(on_split))
    np.testing.assert_array_equal(weights(again.se), weights(on_split.se))
    assert again.mixture == on_split.mixture
    blind = fit(screen, n_top_genes=60)
    assert blind.genes != on_split.genes  # which shows that they would have mattered


def test_batches_of_test_cells_are_unknown_to_the_model(screen, fit, targets):
    screen.obs["batch"] = np.where(screen.obs["split"] == "test", "late", screen.obs["batch"].astype(str))
    st = fit(screen, split_key="split", batch_key="batch")
    assert st.batches == ["batch_1", "batch_2"]  # a vector of "late" would never be trained
    assert vc.tl.predict_perturbation(screen, targets[0], context="type_3").n_obs == 40


def test_what_test_cells_hold_does_not_matter(screen, fit):
    counts = screen.X.toarray()
    counts[np.flatnonzero(screen.obs["split"] == "test")[:5], 3] = [np.nan, -1, 0.5, np.inf, 1e9]
    screen.X = counts
    assert fit(screen, split_key="split").is_trained


def test_a_perturbation_that_validation_alone_holds_is_not_predicted_from_an_untrained_vector(screen, fit, targets):
    known = screen[screen.obs["target_gene"] != targets[0]].copy()
    st = fit(known)
    screen.obs["split"] = np.where(screen.obs["target_gene"] == targets[0], "val", "train")
    for start in (None, st):
        with pytest.raises(ValueError, match=rf"^\['{targets[0]}'\] occur in validation but in no training cells"):
            fit(screen, split_key="split", init_from=start, training={"min_cells": 0})


def test_a_training_that_diverges_stops_and_leaves_nothing(screen, fit):
    before = screen.copy()
    for options, message in (
        ({"training": {"lr": 1e12, "max_steps": 50}}, r"ST.* not finite.*lower learning rate \(lr=1e\+12 here\)"),
        ({"training": {"lr": 1e30, "max_steps": 1, "val_fraction": 0.0}}, r"NaN or infinite.*lower learning rate"),
    ):
        with pytest.raises(FloatingPointError, match=message):
            fit(screen, **options)
        assert not screen.obsm
        assert set(screen.uns) == set(before.uns)
        assert set(screen.uns["virtualcell"]) == set(before.uns["virtualcell"])
        pd.testing.assert_frame_equal(screen.obs, before.obs)


def test_an_se_that_diverges_leaves_the_st(screen, fit, targets):
    with pytest.raises(FloatingPointError, match=r"SE.* not finite.*lower learning rate \(lr=1e\+12 here\)"):
        fit(screen, se={"lr": 1e12, "max_steps": 50})
    assert not screen.obsm
    assert vc.tl.predict_perturbation(screen, targets[0], n_cells=2).n_obs == 6


@pytest.mark.parametrize(
    ("n_steps", "early_stopping", "n"), [(1, False, 1), (5, True, 5), (5, False, 1), (50, True, 25)]
)
def test_there_are_validation_losses_however_few_steps_there_are(screen, fit, n_steps, early_stopping, n):
    # a pass over all cells would take 12 steps; what is left out of them takes two
    st = fit(
        screen,
        network={"set_size": 4},
        training={"max_steps": n_steps, "validate_every": None, "early_stopping": early_stopping, "patience": 50},
    )
    for name in ("train_loss", "validation_loss"):
        losses = st.history[name][name]
        assert losses.index[-1] == n_steps
        assert np.isfinite(losses).all()
        assert len(losses) == n


@pytest.mark.parametrize(
    ("options", "n"),
    [({}, 1), ({"validate": "contexts"}, 1), ({"validate": "contexts", "network": {"transfer": False}}, 1),
     ({"validate": "cells"}, 3), ({"network": {"transfer": False}}, 0)],
)  # fmt: skip
def test_effects_are_measured_once(screen, fit, monkeypatch, options, n):
    """Folds take theirs from what was measured, but for halves of cells, each of which is measured once."""
    calls, measure = [], Effects.measure
    monkeypatch.setattr(Effects, "measure", lambda *args: calls.append(args) or measure(*args))
    fit(screen, **options)
    assert len(calls) == n


def test_highly_variable_genes_are_those_of_the_training_cells_and_targets_come_along(screen, fit, targets):
    import scanpy as sc

    st = fit(screen, split_key="split", n_top_genes=20)
    seen = screen[screen.obs["split"] == "train"]
    reference = ad.AnnData(log1p_cp10k(seen.X).astype(np.float32), var=seen.var[[]])
    sc.pp.highly_variable_genes(reference, n_top_genes=20)
    assert set(st.genes) == set(reference.var_names[reference.var["highly_variable"]]) | set(targets)
    assert st.genes == sorted(st.genes)
    assert fit(screen, n_top_genes=None).genes == sorted(screen.var_names)


def test_perturbations_with_few_cells_are_left_out(screen, fit, targets, caplog):
    rare = targets[0]
    cells = np.flatnonzero(screen.obs["target_gene"] == rare)
    few = screen[np.setdiff1d(np.arange(screen.n_obs), cells[6:])].copy()
    with caplog.at_level(logging.WARNING, "virtualcell"):
        st = fit(few)
    assert f"1 perturbations have fewer than min_cells=10 training cells and are left out: {rare}." in caplog.text
    assert st.table.names == targets[1:]
    assert rare in st.genes
    with pytest.raises(KeyError, match=f"perturbation='{rare}' is unknown"):
        vc.tl.predict_perturbation(few, rare)
    assert fit(few, training={"min_cells": 6}).table.names == targets
    with pytest.raises(
        ValueError,
        match=r"no perturbation has min_cells=99 training cells: there is nothing to .* Lower .* to \d+ or less",
    ):
        fit(few, training={"min_cells": 99})


# -- SE, gene tables, embedding space, features -----------------------------------------------------------------------


def test_a_trained_se_is_used_as_it_is(screen, model, fit):
    before = weights(model.se)
    st = fit(screen, se=model.se)
    assert st.se is model.se
    np.testing.assert_array_equal(weights(model.se), before)
    np.testing.assert_array_equal(screen.obsm["X_state"], model.se.get_latent_representation(screen))


def test_a_gene_table_may_use_names_of_a_column(screen, fit):
    table = vc.pp.expression_gene_embeddings(screen, n_comps=8)
    one_step = {"training": {"max_steps": 1}}
    with_table = {"se": {"gene_embeddings": table, "max_steps": 1}, **one_step}
    reference = fit(screen, **with_table)
    assert reference.se.config.n_token == 8
    ensembl = screen.copy()
    ensembl.var["symbol"] = ensembl.var_names.to_numpy()
    ensembl.var_names = [f"ENSG{i:011d}" for i in range(ensembl.n_vars)]
    fit(ensembl, gene_key="symbol", **with_table)
    np.testing.assert_allclose(ensembl.obsm["X_state"], screen.obsm["X_state"], atol=1e-5)
    fit(
        ensembl, gene_key="symbol", se={"max_steps": 1}, **one_step
    )  # the table from the data has the names of the data
    with pytest.raises(ValueError, match=r"Only 0 of 90 genes.*gene_key='symbol'"):
        fit(ensembl, **with_table)


def test_working_on_x_state(screen, fit, targets):
    st = fit(screen, se={"max_steps": 2}, network={"use_rep": "X_state", "decoder_hidden": (16,)})
    assert st.config.n_input == 31
    cells = vc.tl.predict_perturbation(screen, targets[0], context="type_3")
    assert cells.shape == (40, 90)
    assert (dense(cells.X) >= 0).all()
    other = screen.copy()
    del other.obsm["X_state"]
    with pytest.raises(
        KeyError, match=r"works on obsm\['X_state'\], which this data does not have\. Run `vc\.tl\.embed"
    ):
        vc.tl.predict_perturbation(other, targets[0])
    vc.tl.embed(other, st.se)
    again = vc.tl.predict_perturbation(other, targets[0], context="type_3")
    np.testing.assert_array_equal(dense(again.X), dense(cells.X))
    with pytest.raises(KeyError, match=r"use_rep='X_pca' is unknown.*'X_state'"):
        fit(screen, network={"use_rep": "X_pca"})


def test_features_reach_unseen_perturbations(screen, fit, targets):
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 4)), index=[*targets, "UNSEEN"])
    fit(screen, perturbation_features=features)
    assert vc.tl.predict_perturbation(screen, "UNSEEN").n_obs == 120
    fit(screen)
    with pytest.raises(KeyError, match=r"perturbation='UNSEEN' is unknown.*train with perturbation_features="):
        vc.tl.predict_perturbation(screen, "UNSEEN")


def test_published_form_and_other_options_get_through(screen, fit):
    st = fit(
        screen,
        batch_key="batch",
        network={"preset": "published", "n_networks": 2},
        training={"loss": "energy+sinkhorn", "batch_size": 1, "validate_every": 2},
    )
    assert (st.config.head, st.transfer, st.n_networks, st.set_size) == ("level", False, 2, 16)
    assert st.batches == ["batch_1", "batch_2"]
    assert list(st.history["train_loss"].index) == [2, 4, 5]


# -- MuData -----------------------------------------------------------------------------------------------------------


def test_mudata_with_keys_of_its_own_gives_the_same(screen, fit, targets, tmp_path):
    screen.obs["total"] = screen.X.sum(axis=1).A1 * 2
    options = {"se": {"max_steps": 1}, "library_size_key": "total"}
    fit(screen, **options)
    reference = vc.tl.predict_perturbation(screen, targets[0], context="type_2")
    rna = ad.AnnData(screen.X, obs=screen.obs[["target_gene"]], var=screen.var[[]])
    mdata = md.MuData({"gex": rna, "prot": ad.AnnData(np.ones((screen.n_obs, 2), np.float32), obs=screen.obs[[]])})
    for key in ("cell_type", "total"):
        mdata.obs[key] = screen.obs[key].loc[mdata.obs_names].to_numpy()
    fit(mdata, modality="gex", **options)
    np.testing.assert_array_equal(mdata["gex"].obsm["X_state"], screen.obsm["X_state"])
    assert mdata["gex"].uns["virtualcell"]["design"]["library_size_key"] == "total"
    cells = vc.tl.predict_perturbation(mdata, targets[0], context="type_2", modality="gex")
    np.testing.assert_array_equal(dense(cells.X), dense(reference.X))
    assert list(cells.obs["cell_type"]) == ["type_2"] * 40
    mdata.write_h5mu(tmp_path / "screen.h5mu")
    again = md.read_h5mu(tmp_path / "screen.h5mu")
    again = vc.tl.predict_perturbation(again, targets[0], context="type_2", modality="gex")
    np.testing.assert_array_equal(dense(again.X), dense(reference.X))
    np.testing.assert_array_equal(dense(cells.layers["control"]), dense(reference.layers["control"]))
    with pytest.raises(KeyError, match=r"modality='rna' is unknown"):
        fit(mdata)
    with pytest.raises(KeyError, match=r"library_size_key='totals' is unknown\. Did you mean 'total'"):
        fit(mdata, modality="gex", library_size_key="totals")


def test_papalexi_screen(papalexi_file, fit):
    mdata = md.read_h5mu(papalexi_file)
    keep = mdata["rna"].obs["guide_confident"] & mdata["rna"].obs["target_gene"].isin(
        ["STAT1", "JAK2", "CD86", CONTROL]
    )
    mdata = mdata[keep.to_numpy()].copy()
    st = fit(
        mdata,
        context_key=None,
        batch_key="batch",
        library_size_key="total_counts",
        training={"max_steps": 120, "lr": 3e-3},
    )
    assert len(st.genes) == 303
    rna = mdata["rna"]
    cells = vc.tl.predict_perturbation(mdata, "STAT1")
    assert cells.n_obs == (rna.obs["target_gene"] == CONTROL).sum()
    log = pd.DataFrame(log1p_cp10k(rna.X, rna.obs["total_counts"]), index=rna.obs_names, columns=rna.var_names)
    controls = log.loc[cells.obs["control_barcode"]]
    np.testing.assert_allclose(dense(cells.layers["control"]), controls[cells.var_names], atol=1e-5)
    observed = log[(rna.obs["target_gene"] == "STAT1").to_numpy()].mean() - controls.mean()
    predicted = pd.Series(dense(cells.X).mean(axis=0), index=cells.var_names) - controls.mean()
    assert np.corrcoef(observed, predicted[observed.index])[0, 1] > 0.7, "effects of STAT1"
    assert predicted["STAT1"] < -0.3


def test_norman_combinations(norman_file, fit):
    adata = ad.read_h5ad(norman_file)
    adata = adata[adata.obs["cell_type"] == "K562"].copy()
    training = {"max_steps": 200, "lr": 6e-3}
    st = fit(adata, context_key=None, library_size_key="total_counts", n_top_genes=100, training=training)
    assert "KLF1+MAP2K6" in st.table.seen
    assert {"KLF1", "MAP2K6", "BPGM", "SAMD1"} <= set(st.table.names)
    assert not [n for n in st.table.names if "+" in n]
    assert "TMSB4X" in st.genes
    names = ["KLF1+MAP2K6", "MAP2K6+KLF1", "TMSB4X", "KLF1", "KLF1+TMSB4X"]
    cells = vc.tl.predict_perturbation(adata, names)
    written = set(adata.obs["target_gene"]) & set(names[:2])  # one combination, spelled as in the data
    assert list(cells.obs["target_gene"].unique()) == [*written, *names[2:]]
    shift = pd.DataFrame(dense(cells.X) - dense(cells.layers["control"]), columns=cells.var_names)
    shift = shift.groupby(cells.obs["target_gene"].to_numpy()).mean()
    assert shift.loc["TMSB4X", "TMSB4X"] > 0.3  # activated, nine times up in the data
    again = [vc.tl.predict_perturbation(adata, name).X for name in names[:2]]
    np.testing.assert_array_equal(*(dense(x) for x in again))
    log = pd.DataFrame(log1p_cp10k(adata.X, adata.obs["total_counts"]), columns=adata.var_names)[shift.columns]
    mean = log.groupby(adata.obs["target_gene"].to_numpy()).mean()
    observed = mean.loc["KLF1+MAP2K6"] - mean.loc[CONTROL]
    assert np.corrcoef(shift.loc["KLF1+MAP2K6"], observed)[0, 1] > 0.5
    # a pair that was not measured is not either of its parts
    assert np.abs(shift.loc["KLF1+TMSB4X"] - shift.loc["KLF1"]).max() > 0.05
    assert np.abs(shift.loc["KLF1+TMSB4X"] - shift.loc["TMSB4X"]).max() > 0.05


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"perturbation_key": "target"},
            KeyError,
            r"^perturbation_key='target' is unknown\. Did you mean 'target_gene'",
        ),
        ({"context_key": "celltype"}, KeyError, r"^context_key='celltype' is unknown\. Did you mean 'cell_type'"),
        ({"control": "NT"}, KeyError, r"^control='NT' is unknown.*It labels the unperturbed cells"),
        ({"batch_key": "bach"}, KeyError, r"^batch_key='bach' is unknown\. Did you mean 'batch'"),
        ({"split_key": "splt"}, KeyError, r"^split_key='splt' is unknown\. Did you mean 'split'"),
        ({"split_key": "batch"}, ValueError, r"^split_key='batch' holds \['batch_1', 'batch_2'\]; valid are \('train'"),
        ({"layer": "counts"}, KeyError, r"^layer='counts' is unknown\. There are none\. Leave it out to use X"),
        ({"n_top_genes": 0}, ValueError, r"^n_top_genes=0: at least one gene is needed\. Say None for all"),
        ({"scale": "log"}, ValueError, r"^scale='log' is unknown\. Say 'counts' for raw counts or 'log1p'"),
        ({"scale": "log1p"}, ValueError, r"^scale='log1p' was stated, but X reaches \d+.*Say scale='counts'"),
    ],
)
def test_arguments_that_do_not_fit(screen, fit, options, error, message):
    with pytest.raises(error, match=message):
        fit(screen, **options)
    assert not screen.obsm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.log1p, r"scale='counts' was stated, but X holds fractions.*layer=.*scale='log1p'"),
        (lambda x: x / 3, r"scale='counts' was stated, but X holds fractions and reaches .*layer=.*np\.rint"),
        (lambda x: x - 1, r"X holds negative values \(least -1\), so it is scaled"),
        (lambda x: np.where(x == x.max(), np.nan, x), r"X holds NaN or infinite values"),
        (lambda x: np.where(np.arange(len(x))[:, None] < 2, 0, x), r"2 cells have no counts, among them \['cell_"),
    ],
    ids=["logarithms", "fractions", "negative", "NaN", "empty cells"],
)
def test_matrices_that_do_not_fit(screen, fit, change, message):
    screen.X = change(screen.X.toarray()).astype(np.float32)
    with pytest.raises(ValueError, match=message):
        fit(screen)


def test_labels_that_do_not_fit(screen, fit):
    for key in ("target_gene", "cell_type"):
        data = screen.copy()
        data.obs[key] = data.obs[key].astype(object).where(np.arange(data.n_obs) > 1)
        with pytest.raises(ValueError, match=rf"{key}': 2 cells have no label there\. Give them one, or drop them"):
            fit(data)
    keep = ~((screen.obs["cell_type"] == "type_1") & (screen.obs["target_gene"] == CONTROL))
    with pytest.raises(ValueError, match=r"context 'type_1' has no control cells \('non-targeting'\)"):
        fit(screen[keep].copy())
    for axis, message in (("obs", "obs_names repeats cells"), ("var", r"var_names repeats (genes|\[)")):
        data = screen.copy()
        setattr(data, f"{axis}_names", ["same"] * data.shape[axis == "var"])
        with pytest.raises(ValueError, match=message):
            fit(data)
    with pytest.raises(TypeError, match="Expected an AnnData or a MuData, got DataFrame"):
        fit(screen.to_df())


def test_fit_returns_a_trained_st(model):
    assert isinstance(model, ST)
    assert model.is_trained
    assert model.design.scale == "counts"
    assert "Not trained" not in repr(model)


def test_targets_come_along_where_var_names_are_ids(screen, targets, fit):
    screen.var["symbol"] = screen.var_names
    screen.var_names = [f"ENSG{i:011d}" for i in range(screen.n_vars)]
    st = fit(screen, n_top_genes=10, gene_key="symbol")
    assert set(targets) <= set(screen.var["symbol"][st.genes])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("controls", {}, r"^context 'type_2' has no control cells \('non-targeting'\) to start from\."),
        ("whole", {"scale": "log1p"}, r"X holds whole numbers only\. Say scale='counts'"),
    ],
)
def test_wrong_data_is_refused_before_anything_is_trained(screen, fit, change, options, message):
    if change == "controls":
        there = (screen.obs["cell_type"] == "type_2") & (screen.obs["target_gene"] == "non-targeting")
        screen = screen[~there].copy()
    else:
        screen.X.data = np.minimum(screen.X.data, 9)
    with pytest.raises(ValueError, match=message):
        fit(screen, se={"max_steps": 2}, **options)
    assert "X_state" not in screen.obsm
