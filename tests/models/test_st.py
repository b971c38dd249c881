from __future__ import annotations

import gc
import weakref

import anndata as ad
import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from mudata import MuData

from virtualcell._errors import UnknownNameError
from virtualcell.data._cell_sets import CellSetDataset, Rows
from virtualcell.models import ST, Additive
from virtualcell.modules import networks

CONTROL = "non-targeting"


def cells_of(data, context, perturbation) -> np.ndarray:
    return data.X[((data.obs["cell_type"] == context) & (data.obs["target_gene"] == perturbation)).to_numpy()]


def deltas(model, data, targets, context) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and observed shift of the mean, targets x genes."""
    base = cells_of(data, context, CONTROL).mean(axis=0)
    predicted = [model.predict(data, p, context=context).to_numpy().mean(axis=0) - base for p in targets]
    return np.array(predicted), np.array([cells_of(data, context, p).mean(axis=0) - base for p in targets])


def score(model, data, targets, context) -> tuple[float, float]:
    """Mean over targets of Pearson delta, and mean absolute error."""
    predicted, observed = deltas(model, data, targets, context)
    r = [np.corrcoef(p, o)[0, 1] for p, o in zip(predicted, observed, strict=True)]
    return float(np.mean(r)), float(np.abs(predicted - observed).mean())


# -- what it learns ---------------------------------------------------------------------------------------------------


def test_learns_effects_and_carries_them_to_an_unseen_context(learned, screen, design, targets):
    Additive.setup_anndata(screen, **design, split_key="split")
    additive = Additive(screen)
    additive.train()
    seen, unseen = (score(learned, screen, targets, c) for c in ("type_1", "type_5"))
    reference = score(additive, screen, targets, "type_5")
    _, observed = deltas(learned, screen, targets, "type_5")
    assert seen[0] > 0.88
    assert unseen[0] > reference[0] - 0.03
    assert unseen[1] < 1.1 * reference[1]
    assert unseen[1] < 0.65 * np.abs(observed).mean()  # the error of "no change"


def test_knocked_down_genes_fall_in_the_unseen_context(learned, screen, targets):
    predicted, observed = deltas(learned, screen, targets, "type_5")
    own = [list(screen.var_names).index(p) for p in targets]
    rows = np.arange(len(targets))
    assert (observed[rows, own] < -0.5).all()
    assert (predicted[rows, own] < -0.5).all()


def test_control_as_perturbation_changes_little(learned, screen, targets):
    base = cells_of(screen, "type_1", CONTROL).mean(axis=0)
    control = learned.predict(screen, CONTROL, context="type_1").to_numpy().mean(axis=0) - base
    predicted, _ = deltas(learned, screen, targets, "type_1")
    assert np.abs(control).mean() < 0.35 * np.abs(predicted).mean(axis=1).min()


def test_an_untrained_model_predicts_no_change_unless_published_form(screen, build, targets):
    cells = cells_of(screen, "type_1", CONTROL)
    shift = build(screen, residual="expression")
    np.testing.assert_array_equal(shift.predict_sets(cells, targets[0])["cells"], cells)
    hidden = build(screen, residual="hidden").predict_sets(cells, targets[0])["cells"]
    assert np.abs(hidden - cells).mean() > 0.3
    assert (hidden >= 0).all()


def test_published_form_trains(screen, fit, targets):
    st = fit(screen, residual="hidden", train={"max_steps": None, "max_epochs": 3, "lr": 3e-3, "batch_size": 3})
    loss = st.history["train_loss"].iloc[:, 0]
    assert loss.iloc[-1] < 0.8 * loss.iloc[0]
    assert "residual='hidden'" in repr(st)
    assert (st.predict(screen, targets[0]).to_numpy() >= 0).all()


@pytest.mark.parametrize("loss", ["sinkhorn", "energy+sinkhorn"])
def test_other_losses_train(screen, fit, loss):
    history = fit(screen, train={"max_steps": 3, "loss": loss, "mean_weight": 0.0}).history["train_loss"]
    assert np.isfinite(history["train_loss"].astype(float)).all()
    with pytest.raises(ValueError, match="loss='energi' is unknown; valid are 'energy', 'sinkhorn'"):
        fit(screen, train={"loss": "energi"})


# -- spaces, batches, combinations, features --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(session_screen) -> ad.AnnData:
    data = session_screen.copy()
    u, s, _ = np.linalg.svd(data.X - data.X.mean(axis=0), full_matrices=False)
    data.obsm["X_pca"] = (u * s)[:, :10]
    return data


def test_embedding_space_decodes_genes(embedded, fit, targets):
    st = fit(embedded.copy(), setup={"use_rep": "X_pca"}, train={"max_steps": 150, "lr": 4e-3}, decoder_hidden=(64,))
    assert st.config.n_input == st.config.n_output == 10
    assert set(st.history) >= {"train_loss", "train_loss_genes"}
    cells = st.predict(embedded, targets[0], context="type_1")
    assert list(cells.columns) == list(embedded.var_names)
    assert (cells.to_numpy() >= 0).all()
    assert score(st, embedded, targets, "type_1")[0] > 0.6
    sets = st.predict_sets(embedded.obsm["X_pca"][:20].astype(np.float32), targets[0])
    assert sets["cells"].shape == (20, 10)
    assert sets["genes"].shape == (20, 80)


def test_embedding_of_another_width_is_refused(embedded, fit, targets):
    st = fit(embedded.copy(), setup={"use_rep": "X_pca"})
    other = embedded.copy()
    other.obsm["X_pca"] = other.obsm["X_pca"][:, :7]
    with pytest.raises(ValueError, match=r"obsm\['X_pca'\] has 7 columns, this model 10"):
        st.predict(other, targets[0])


def test_batches(screen, fit, targets):
    st = fit(screen, setup={"batch_key": "batch"}, train={"max_steps": 30, "lr": 3e-3}, residual="expression")
    assert st.batches == ["batch_1", "batch_2"]
    cells = st.predict(screen, targets[0], context="type_1")
    moved = screen.copy()
    moved.obs["batch"] = moved.obs["batch"].astype(str).replace({"batch_2": "batch_1"})
    in_one = st.predict(moved, targets[0], context="type_1")
    first = (screen.obs.loc[cells.index, "batch"] == "batch_1").to_numpy()
    change = np.abs(cells.to_numpy() - in_one.to_numpy()).max(axis=1)
    assert change[~first].min() > change[first].max()  # its own batch matters most to a cell
    moved.obs["batch"] = "batch_9"
    with pytest.raises(KeyError, match=r"batch='batch_9' is unknown\. Did you mean .*only the batches it was trained"):
        st.predict(moved, targets[0])


def test_combinations_are_sums_of_encodings(screen, fit, targets):
    a, b, c = targets[:3]
    screen.obs["target_gene"] = screen.obs["target_gene"].astype(str).replace({c: f"{a}+{b}"})
    st = fit(screen)
    assert st.table.names == sorted(set(targets) - {c})
    one, other, both = st.table.encode([a, b, f"{a}+{b}"])
    torch.testing.assert_close(both, one + other)
    cells = st.predict(screen, f"{a}+{b}")
    assert cells.equals(st.predict(screen, f"{b}+{a}"))
    assert cells.equals(st.predict(screen, f"{a}+{CONTROL}+{b}"))
    assert not cells.equals(st.predict(screen, a))


def test_the_prior_leads_where_a_perturbation_was_never_measured(screen, fit, targets):
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(8, 5)), index=[*targets, "NEW", "OTHER"])
    st = fit(screen, features)
    assert st.config.perturbation_dropout == 0.3
    controls = screen.X[(screen.obs["target_gene"] == "non-targeting").to_numpy()][:32].astype(np.float32)
    base = controls.mean(axis=0)
    context = screen.obs["cell_type"].astype(str).iloc[0]
    (weights,) = {tuple(n.head_weights.tolist()) for n in networks(st.module)}
    for name, share in ((targets[0], 1 / 3), ("NEW", 2 / 3)):
        (shift, level, prior), shares = st._predict_means(controls, name, context=context, base=base, batch=None)
        np.testing.assert_allclose(shares, [(1 - share) * weights[0], (1 - share) * weights[1], share], rtol=1e-5)
        expected = (1 - share) * (weights[0] * shift + weights[1] * level) + share * prior
        got = st._predict_cells(controls, name, context=context, base=base, batch=None).mean(axis=0)
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_features_reach_unseen_perturbations_and_one_hot_refuses_them(screen, fit, targets):
    rng = np.random.default_rng(0)
    features = pd.DataFrame(rng.normal(size=(8, 5)), index=[*targets, "TWIN", "OTHER"])
    features.loc["TWIN"] = features.loc[targets[0]]
    st = fit(screen, features, prior=None)  # a prior tells what was measured from what only has features
    assert "(features)" in repr(st)
    assert st.predict(screen, "TWIN").equals(st.predict(screen, targets[0]))
    assert not st.predict(screen, "OTHER").equals(st.predict(screen, targets[0]))
    with pytest.raises(KeyError, match=r"^perturbation='NONE' is unknown.*no row in the feature table"):
        st.predict(screen, "NONE")
    with pytest.raises(UnknownNameError, match=r"^perturbation='TWIN' is unknown.*train with perturbation_features="):
        fit(screen).predict(screen, "TWIN")
    with pytest.raises(ValueError, match=rf"no row for 1 perturbations of the data: \['{targets[0]}'\]"):
        fit(screen, features.drop(index=targets[0]))


# -- training ---------------------------------------------------------------------------------------------------------


def test_length_is_that_of_steps_or_epochs_whichever_ends_first(screen, fit):
    assert fit(screen, train={"max_steps": 7}).trainer.global_step == 7
    by_epoch = fit(screen, train={"max_steps": None, "max_epochs": 2, "batch_size": 2})
    assert list(by_epoch.history["train_loss"].index) == [0, 1]
    assert by_epoch.trainer.global_step == 2 * len(by_epoch.trainer.train_dataloader)
    assert by_epoch.trainer.global_step >= 100  # an epoch is 50 steps at least
    assert fit(screen, train={"max_steps": 7, "max_epochs": 2}).trainer.global_step == 7
    for train in ({"max_steps": 0}, {"max_steps": None, "max_epochs": 0}):
        with pytest.raises(ValueError, match="at least one step is needed"):
            fit(screen, train=train)


def test_history_has_losses_by_epoch(learned):
    for name in ("train_loss", "validation_loss"):
        if name in learned.history:
            frame = learned.history[name]
            assert frame.index.name == "epoch"
            assert list(frame.columns) == [name]
    loss = learned.history["train_loss"]["train_loss"]
    assert loss.iloc[-1] < 0.7 * loss.iloc[0]


def test_early_stopping(screen, fit):
    still = {"lr": 0.0, "max_steps": None, "max_epochs": 12, "batch_size": 2}
    still |= {"early_stopping": True, "early_stopping_patience": 2}
    st = fit(screen, train={**still, "val_fraction": 0.2})
    assert len(st.history["validation_loss"]) == 3  # the first epoch and two without gain
    with pytest.raises(
        ValueError, match="early_stopping=True needs validation cells: give val_fraction > 0 or a split"
    ):
        fit(screen, train={**still, "val_fraction": 0.0})
    screen.obs["none"] = "train"
    with pytest.raises(ValueError, match="early_stopping=True needs validation cells"):
        fit(screen, setup={"split_key": "none"}, train=still)


def test_seed_decides(screen, fit, weights):
    one, other = fit(screen), fit(screen)
    np.testing.assert_array_equal(weights(one), weights(other))
    assert not np.array_equal(weights(one), weights(fit(screen, train={"seed": 1})))
    assert not np.array_equal(weights(one), weights(fit(screen, seed=1)))


def test_training_leaves_the_global_random_state(screen, build):
    st = build(screen)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    st.train(max_steps=2, enable_progress_bar=False)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_order_of_cells_and_genes_changes_nothing(screen, fit, targets):
    rng = np.random.default_rng(0)
    by_cell = screen[rng.permutation(screen.n_obs)].copy()
    st = fit(screen)
    cells = st.predict(screen, targets[0], n_cells=20)
    assert st.predict(by_cell, targets[0], n_cells=20).equals(cells)
    by_gene = by_cell[:, rng.permutation(screen.n_vars)].copy()
    assert st.predict(by_gene, targets[0], n_cells=20).equals(cells)
    assert fit(by_cell).predict(screen, targets[0], n_cells=20).equals(cells)


def test_test_cells_are_never_seen(screen, fit, weights):
    options = {"setup": {"split_key": "split"}, "train": {"max_steps": 10}}
    st = fit(screen, **options)
    other = screen.copy()
    other.X[(other.obs["split"] == "test").to_numpy()] = 1.5
    np.testing.assert_array_equal(weights(st), weights(fit(other, **options)))
    other.X[(other.obs["split"] == "train").to_numpy()] += 0.25
    assert not np.array_equal(weights(st), weights(fit(other, **options)))


def test_perturbations_of_test_cells_alone_stay_unknown(screen, fit, targets):
    screen.obs["split"] = np.where(screen.obs["target_gene"] == targets[0], "test", "train")
    st = fit(screen, setup={"split_key": "split"})
    assert st.table.names == targets[1:]
    with pytest.raises(KeyError, match=f"perturbation='{targets[0]}' is unknown"):
        st.predict(screen, targets[0])
    screen.obs["split"] = np.where(screen.obs["target_gene"] == CONTROL, "train", "test")
    with pytest.raises(ValueError, match="the training cells hold no perturbation, only 'non-targeting'"):
        fit(screen, setup={"split_key": "split"})


class Watch(pl.Callback):
    """Note whether dropout is on at every step."""

    def __init__(self) -> None:
        self.training = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.training.append(pl_module.network.training)


def test_training_on_keeps_dropout(screen, fit):
    st = fit(screen)
    watch = Watch()
    st.train(max_steps=3, enable_progress_bar=False, callbacks=[watch])
    assert watch.training == [True] * 3
    assert not st.module.training


# -- prediction -------------------------------------------------------------------------------------------------------


def test_every_control_cell_gives_one_by_default(learned, screen, targets):
    cells = learned.predict(screen, targets[0])
    controls = screen.obs_names[screen.obs["target_gene"] == CONTROL]
    assert sorted(cells.index) == sorted(controls)
    assert list(cells.columns) == list(screen.var_names)
    assert set(learned.predict(screen, targets[0], context="type_2").index) == set(
        screen.obs_names[(screen.obs["target_gene"] == CONTROL) & (screen.obs["cell_type"] == "type_2")]
    )
    assert learned.predict(screen, targets[0], context="type_2").equals(
        cells.loc[(screen.obs.loc[cells.index, "cell_type"] == "type_2").to_numpy()]
    )


def test_number_of_cells(learned, screen, targets):
    few = learned.predict(screen, targets[0], n_cells=3)
    assert len(few) == 3 * 5
    assert few.index.is_unique
    more = learned.predict(screen, targets[0], context="type_1", n_cells=16)
    assert few[few.index.isin(more.index)].equals(more.loc[few.index[few.index.isin(more.index)]])
    assert few.index.isin(more.index).sum() == 3  # a small request shows the model a full set all the same
    many = learned.predict(screen, targets[0], context="type_1", n_cells=150)  # of 60 controls
    assert len(many) == 150
    assert many.index.nunique() > 50
    with pytest.raises(ValueError, match="n_cells=0: at least one cell"):
        learned.predict(screen, targets[0], n_cells=0)


def test_seed_of_prediction_draws_cells(learned, screen, targets):
    a, b, c = (learned.predict(screen, targets[0], n_cells=10, seed=s) for s in (0, 0, 1))
    assert a.equals(b)
    assert list(a.index) != list(c.index)


def test_new_cells_with_more_genes(learned, screen, targets):
    known = learned.predict(screen, targets[0], context="type_5")
    wide = ad.AnnData(
        np.c_[np.ones((screen.n_obs, 2), np.float32), screen.X],
        obs=screen.obs,
        var=pd.DataFrame(index=["NEW1", "NEW2", *screen.var_names]),
    )
    assert learned.predict(wide, targets[0], context="type_5").equals(known)
    with pytest.raises(
        KeyError, match=r"genes='GENE001' is unknown.*1 of 80 genes are missing; they are matched by name"
    ):
        learned.predict(screen[:, 1:].copy(), targets[0])


def test_setup_is_reported(learned, build, screen):
    text = repr(learned)
    assert text.startswith("ST model: 6 perturbations (one-hot), 5 contexts, 80 dimensions of genes, sets of 16 cells")
    assert "Not trained" not in text
    assert repr(build(screen)).endswith("Not trained yet.")


# -- MuData -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["modality", "mudata"])
def test_mudata_gives_the_same_model_and_predictions(screen, fit, targets, where):
    reference = fit(screen).predict(screen, targets[0])
    rna = screen.copy()
    mdata = MuData({"gex": rna, "prot": ad.AnnData(np.ones((screen.n_obs, 2), np.float32), obs=screen.obs[[]])})
    if where == "mudata":
        mdata.obs = screen.obs[["target_gene", "cell_type"]].loc[mdata.obs_names]
        del rna.obs["target_gene"], rna.obs["cell_type"]
    st = fit(mdata, setup={"modality": "gex"})
    assert st.predict(perturbation=targets[0]).equals(reference)
    assert st.predict(mdata, targets[0]).equals(reference)
    assert st.predict(screen, targets[0]).equals(reference)  # an AnnData does as well
    with pytest.raises(KeyError, match=r"modality='rna' is unknown.*Name the modality"):
        fit(mdata)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_unknown_names(learned, screen, targets):
    with pytest.raises(KeyError, match=r"^context='type_9' is unknown\. Did you mean 'type_.*It needs control cells"):
        learned.predict(screen, targets[0], context="type_9")
    with pytest.raises(
        KeyError, match=rf"^perturbation='{targets[0].lower()}' is unknown\. Did you mean '{targets[0]}'"
    ):
        learned.predict(screen, targets[0].lower())
    with pytest.raises(ValueError, match="perturbation must be given"):
        learned.predict(screen)
    only = screen[screen.obs["target_gene"] != CONTROL].copy()
    with pytest.raises(KeyError, match=r"^control='non-targeting' is unknown.*Predictions start from control cells"):
        learned.predict(only, targets[0])


def test_untrained_model_does_not_predict(screen, build, targets):
    with pytest.raises(RuntimeError, match="untrained"):
        build(screen).predict(screen, targets[0])


def test_context_of_a_model_without_contexts(screen, fit, targets):
    st = fit(screen, setup={"context_key": None})
    assert "1 contexts" in repr(st)
    assert len(st.predict(screen, targets[0])) == 300
    with pytest.raises(ValueError, match="context='type_1' was given, but the model was set up without context_key"):
        st.predict(screen, targets[0], context="type_1")


@pytest.mark.parametrize(
    ("setup", "error", "message"),
    [
        (
            {"perturbation_key": "target"},
            KeyError,
            r"^perturbation_key='target' is unknown\. Did you mean 'target_gene'",
        ),
        ({"context_key": "celltype"}, KeyError, r"^context_key='celltype' is unknown\. Did you mean 'cell_type'"),
        ({"control": "NT"}, KeyError, r"^control='NT' is unknown\. .*It labels the unperturbed cells"),
        ({"layer": "lognorm"}, KeyError, r"^layer='lognorm' is unknown"),
        ({"use_rep": "X_state"}, KeyError, r"^use_rep='X_state' is unknown.*Run `vc.tl.embed` first"),
        (
            {"split_key": "cell_type"},
            ValueError,
            r"^split_key='cell_type' holds \['type_1',.*valid are \('train', 'val'",
        ),
    ],
)
def test_setup_refuses(screen, fit, setup, error, message):
    with pytest.raises(error, match=message):
        fit(screen, setup=setup)


@pytest.mark.parametrize("key", ["target_gene", "cell_type", "batch", "split"])
def test_missing_labels(screen, fit, key):
    screen.obs[key] = screen.obs[key].astype(object).where(np.arange(screen.n_obs) > 3)
    with pytest.raises(ValueError, match=rf"='{key}': 4 cells have no label there\. Give them one, or drop them"):
        fit(screen, setup={"batch_key": "batch", "split_key": "split"})


def test_no_training_cells(screen, fit):
    screen.obs["split"] = "test"
    with pytest.raises(ValueError, match="split_key='split' marks no cell as 'train'"):
        fit(screen, setup={"split_key": "split"})


def test_repeated_cells_and_contexts_without_controls(screen, fit):
    keep = ~((screen.obs["cell_type"] == "type_2") & (screen.obs["target_gene"] == CONTROL))
    with pytest.raises(ValueError, match=r"context 'type_2' has no control cells \('non-targeting'\) to start from"):
        fit(screen[keep].copy())
    screen.obs_names = ["cell"] * screen.n_obs
    with pytest.raises(ValueError, match=r"obs_names repeats cells\. Run `adata.obs_names_make_unique\(\)`"):
        fit(screen)


def test_expression_that_is_not_log1p(counts, screen, fit):
    with pytest.raises(ValueError, match=r"X holds whole numbers only: raw counts\? This model works on log"):
        fit(counts)
    for change, message in (
        (lambda x: x * 3, r"X reaches .*more than log1p of counts per 10,000 can"),
        (lambda x: x - 1, "X holds negative values"),
        (lambda x: np.where(x == x.max(), np.nan, x), "X holds NaN"),
    ):
        data = screen.copy()
        data.X = change(screen.X)
        with pytest.raises(ValueError, match=message):
            fit(data)


def test_options(screen, build):
    with pytest.raises(TypeError, match=r"ST has no option \['n_heds'\]; valid are \[.*'n_heads'"):
        build(screen, n_heds=3)
    with pytest.raises(ValueError, match=r"size='tiny' is unknown; valid are \['small', 'medium', 'large'\]"):
        build(screen, size="tiny")
    with pytest.raises(ValueError, match="residual='genes' is unknown"):
        build(screen, residual="genes")


def test_forget_data_frees_the_data(session_screen, fit, targets):
    data = session_screen.copy()
    st = fit(data)
    st.forget_data()
    gone = weakref.ref(data)
    del data
    gc.collect()
    assert gone() is None
    assert len(st.predict(session_screen, targets[0])) == 300
    with pytest.raises(ValueError, match="loaded without data: give the cells to start from"):
        st.predict(perturbation=targets[0])
    with pytest.raises(ValueError, match="this model holds no data to train on"):
        st.train(max_steps=1)


def test_prediction_from_raw_counts_is_refused(counts, learned, targets):
    with pytest.raises(ValueError, match=r"X holds whole numbers only: raw counts\?.*predict_perturbation"):
        learned.predict(counts, targets[0])


# -- members, prior, uncertainty --------------------------------------------------------------------------------------


def test_members_and_prior_come_back_from_a_file(screen, fit, targets, tmp_path):
    st = fit(screen, n_members=2, train={"max_steps": 20})
    assert "2 members" in repr(st)
    first, second = (m.project_level[-1].weight for m in st.module.members)
    assert not torch.equal(first, second)
    st.save(tmp_path)
    loaded = ST.load(tmp_path)
    assert repr(loaded) == repr(st)
    assert loaded.predict(screen, targets[0]).equals(st.predict(screen, targets[0]))
    with pytest.raises(ValueError, match="n_members=0: at least one network"):
        fit(screen, n_members=0)


def test_level_head_starts_at_the_mean_training_cell(screen, build):
    st = build(screen, setup={"split_key": "split"})
    cells = screen.X[(screen.obs["split"] == "train").to_numpy()]  # and no validation cell
    still = {"lr": 1e-12, "enable_progress_bar": False, "accelerator": "cpu"}
    st.train(max_steps=1, **still)
    bias = st.module.project_level[-1].bias
    np.testing.assert_allclose(bias.detach(), cells.mean(axis=0), atol=1e-5)
    with torch.no_grad():
        bias.fill_(7.0)
        bias[0] = 0.0
    st.train(max_steps=1, **still)  # goes on where it was
    np.testing.assert_allclose(bias.detach()[1:], 7.0, atol=1e-5)
    np.testing.assert_allclose(bias.detach()[0], cells[:, 0].mean(), atol=1e-5)


def test_the_better_head_weighs_more(screen, fit):
    st = fit(screen, train={"max_steps": 30})
    data, network = screen, st.module
    cells = CellSetDataset(Rows(st._cells(data)), st.table.encode)
    loader = st._loader(data, np.ones(data.n_obs, bool), cells, fixed=True, sets_per_batch=8, seed=0)
    with torch.no_grad():
        network.project_level[-1].bias += 4
    st._weigh_heads(loader)
    assert network.head_weights[0] > 0.9
    with torch.no_grad():
        network.project_level[-1].bias -= 4
        network.project_out[-1].bias += 4
    st._weigh_heads(loader)
    assert network.head_weights[1] > 0.9


def test_prior_is_refused_in_embedding_space(embedded, build):
    with pytest.raises(ValueError, match="prior='similar' is a shift of genes, and this model works on embeddings"):
        build(embedded.copy(), setup={"use_rep": "X_pca"}, prior="similar")
    assert build(embedded.copy(), setup={"use_rep": "X_pca"}).config.prior is None


def test_a_cell_holds_no_more_than_all_its_counts(screen, fit, targets):
    st = fit(screen)
    with torch.no_grad():
        st.module.project_out[-1].bias += 50
    assert st.predict(screen, targets[0]).to_numpy().max() == np.float32(np.log1p(1e4))


@pytest.mark.parametrize("prior", ["similar", "additive", None])
def test_every_prior_learns_and_predicts_an_unseen_context(screen, fit, targets, prior):
    st = fit(screen, setup={"split_key": "split"}, prior=prior, train={"max_steps": 200, "lr": 3e-3})
    assert score(st, screen, targets, "type_5")[0] > 0.6


def test_standard_errors_fall_with_the_number_of_control_cells(learned, screen, targets):
    few = screen[(screen.obs["target_gene"] == CONTROL).to_numpy()]
    one = learned.uncertainty(few, targets[0], context="type_5", n_samples=30)
    assert one.shape == (1, screen.n_vars)
    order = np.random.default_rng(0).permutation(few.n_obs)
    assert one.equals(learned.uncertainty(few[order].copy(), targets[0], context="type_5", n_samples=30))
    small = few[np.flatnonzero(few.obs["cell_type"] == "type_5")[:8]].copy()
    assert learned.uncertainty(small, targets[0], n_samples=30).mean(axis=None) > 1.3 * one.mean(axis=None)
    with pytest.raises(ValueError, match="n_samples=1: at least 2 draws"):
        learned.uncertainty(few, targets[0], n_samples=1)


def test_the_standard_error_is_that_of_the_weighted_average(learned, screen, targets, monkeypatch):
    parts, share = np.array([[0.0], [1.0], [4.0]]) * np.ones(screen.n_vars), np.array([0.2, 0.3, 0.5])
    monkeypatch.setattr(learned, "_predict_means", lambda *args, **kwargs: (parts, share))
    error = learned.uncertainty(screen, targets[0], context="type_5", n_samples=3).to_numpy()
    centre = 0.3 * 1 + 0.5 * 4
    total = 0.2**2 + 0.3**2 + 0.5**2
    between = (0.2 * centre**2 + 0.3 * (1 - centre) ** 2 + 0.5 * (4 - centre) ** 2) / (1 - total)
    np.testing.assert_allclose(error, np.sqrt(between * total), rtol=1e-6)
    with pytest.raises(ValueError, match="perturbation must be given"):
        learned.uncertainty(screen)


def test_parts_that_disagree_raise_the_standard_error(screen, fit, targets):
    st = fit(screen, train={"max_steps": 60, "lr": 3e-3})
    before = st.uncertainty(screen, targets[0], context="type_1", n_samples=5)
    with torch.no_grad():
        st.module.project_level[-1].bias += 3
    assert (st.uncertainty(screen, targets[0], context="type_1", n_samples=5) > before).to_numpy().mean() > 0.9
