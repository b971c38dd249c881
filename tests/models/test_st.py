from __future__ import annotations

import gc
import weakref

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from mudata import MuData
from scipy import sparse

from virtualcell._errors import UnknownNameError
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models import ST, Additive, STTrainOptions

CONTROL = "non-targeting"
DESIGN = {"perturbation_key": "target_gene", "control": CONTROL, "context_key": "cell_type"}


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


def test_an_untrained_model_predicts_no_change_unless_published(screen, build, targets):
    cells = cells_of(screen, "type_1", CONTROL)
    shift = build(screen, head="shift")
    np.testing.assert_array_equal(shift.predict_embedding(cells, targets[0]), cells)
    level = build(screen, preset="published").predict_embedding(cells, targets[0])
    assert np.abs(level - cells).mean() > 0.3
    assert (level >= 0).all()


def test_the_published_preset_trains_by_the_published_loss(screen, fit, targets):
    st = fit(screen, preset="published", train={"max_steps": 40, "lr": 4e-3, "batch_size": 3, "validate_every": 10})
    loss = st.history["train_loss"]["train_loss"]
    assert loss.iloc[-1] < 0.8 * loss.iloc[0]
    assert set(st.history) == {"train_loss", "validation_loss"}  # no contrast
    options = st.train_options()
    assert (options.loss, options.mean_weight, options.contrast_weight) == ("energy", 0.0, 0.0)
    assert "head='level', without a transferred effect" in repr(st)
    assert (st.config.head, st.transfer, st.transferred) == ("level", False, None)
    assert (st.predict(screen, targets[0]).to_numpy() >= 0).all()
    # what is stated wins over the preset
    assert fit(screen, preset="published", head="shift").config.head == "shift"
    assert st.train_options(mean_weight=0.5).mean_weight == 0.5
    default = fit(screen).train_options()
    assert (default.mean_weight, default.contrast_weight, default.lr) == (1.0, 0.3, 1e-3)


@pytest.mark.parametrize("loss", ["sinkhorn", "energy+sinkhorn"])
def test_other_losses_train(screen, fit, loss):
    history = fit(screen, train={"loss": loss, "mean_weight": 0.0}).history["train_loss"]
    assert np.isfinite(history["train_loss"]).all()
    with pytest.raises(KeyError, match=r"loss='energi' is unknown\. Did you mean 'energy'"):
        fit(screen, train={"loss": "energi"})


# -- spaces, batches, combinations, features --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(session_screen) -> ad.AnnData:
    data = session_screen.copy()
    u, s, _ = np.linalg.svd(data.X - data.X.mean(axis=0), full_matrices=False)
    data.obsm["X_pca"] = (u * s)[:, :10]
    return data


def test_embedding_space_decodes_genes(embedded, fit, targets):
    st = fit(
        embedded.copy(),
        setup={"use_rep": "X_pca"},
        train={"max_steps": 80, "lr": 8e-3, "val_fraction": 0},
        decoder_hidden=(64,),
    )
    assert st.config.n_input == st.config.n_output == 10
    assert set(st.history) >= {"train_loss", "train_loss_genes"}
    cells = st.predict(embedded, targets[0], context="type_1")
    assert list(cells.columns) == list(embedded.var_names)
    assert (cells.to_numpy() >= 0).all()
    assert score(st, embedded, targets, "type_1")[0] > 0.6
    vectors = embedded.obsm["X_pca"][:20].astype(np.float32)
    assert st.predict_embedding(vectors, targets[0]).shape == (20, 10)
    base = vectors.mean(axis=0)
    assert st.predict_cells(vectors, targets[0], context="type_1", base=base).shape == (20, 80)


def test_embedding_of_another_width_is_refused(embedded, fit, targets):
    st = fit(embedded.copy(), setup={"use_rep": "X_pca"})
    other = embedded.copy()
    other.obsm["X_pca"] = other.obsm["X_pca"][:, :7]
    with pytest.raises(ValueError, match=r"obsm\['X_pca'\] has 7 columns, this model 10"):
        st.predict(other, targets[0])


def test_batches(screen, fit, targets):
    st = fit(
        screen, setup={"batch_key": "batch"}, train={"max_steps": 20, "lr": 3e-3, "val_fraction": 0.0}, head="shift"
    )
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


def test_parts_count_as_the_question_has_it(screen, fit, targets):
    """Measured here; measured elsewhere; measured nowhere, but with features."""
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(8, 5)), index=[*targets, "NEW", "OTHER"])
    is_out = (screen.obs["cell_type"] == "type_1") & (screen.obs["target_gene"] == targets[1])
    st = fit(screen[~is_out.to_numpy()].copy(), features)
    assert st.config.perturbation_dropout == 0.3
    st.mixture = st.mixture.with_networks("contexts", 0.5)
    controls = cells_of(screen, "type_1", CONTROL)[:32].astype(np.float32)
    start = {"context": "type_1", "base": controls.mean(axis=0)}
    weights = st.mixture.head_weights
    for name, share in ((targets[1], 0.5), ("NEW", 1 / 3), (f"{targets[0]}+{targets[1]}", 1 / 3)):
        (shift, level, known), shares = st.predict_parts(controls, name, **start)
        np.testing.assert_allclose(shares, [share * weights[0], share * weights[1], 1 - share], rtol=1e-5)
        expected = share * (weights[0] * shift + weights[1] * level) + (1 - share) * known
        got = st.predict_cells(controls, name, **start).mean(axis=0)
        np.testing.assert_allclose(got, expected, atol=1e-4)
    (known,), shares = st.predict_parts(controls, targets[0], **start)
    np.testing.assert_allclose(shares, [1.0])
    np.testing.assert_allclose(st.predict_cells(controls, targets[0], **start).mean(axis=0), known, atol=1e-4)


def test_networks_without_weight_are_not_run(screen, fit, targets):
    is_out = (screen.obs["cell_type"] == "type_1") & (screen.obs["target_gene"] == targets[1])
    st = fit(screen[~is_out.to_numpy()].copy(), n_networks=2)
    calls = []
    for network in st.networks:
        network.register_forward_hook(lambda *_: calls.append(1))
    start = {"context": "type_1", "base": cells_of(screen, "type_1", CONTROL).mean(axis=0).astype(np.float32)}
    controls = cells_of(screen, "type_1", CONTROL)[:40].astype(np.float32)
    counted = {}
    for name, weight in ((targets[0], 0.0), (targets[1], 1 / 3), (targets[1], 0.0)):
        st.mixture = st.mixture.with_networks("contexts", weight)
        calls.clear()
        st.predict_cells(controls, name, **start)
        st.predict_parts(controls, name, **start)
        counted[name, weight] = len(calls)
    assert counted == {(targets[0], 0.0): 0, (targets[1], 1 / 3): 4, (targets[1], 0.0): 0}


def test_apart_from_each_other_networks_and_transferred_effect_make_the_prediction(screen, fit, targets):
    from virtualcell.models._start import starts

    is_out = (screen.obs["cell_type"] == "type_1") & (screen.obs["target_gene"] == targets[1])
    data = screen[~is_out.to_numpy()].copy()
    st = fit(data)
    (start,) = starts(st.screen.take(st.screen.is_control & np.asarray(st.screen.context == "type_1")))
    for weight in (0.25, 1.0):
        st.mixture = st.mixture.with_networks("contexts", weight)
        networks, transferred = st.apart(start, targets[1], n_cells=48)  # three whole sets
        together = st.predict_from(start, targets[1], n_cells=48)[1].mean(axis=0)
        np.testing.assert_allclose(weight * networks + (1 - weight) * transferred, together, atol=1e-4)


def test_features_reach_unseen_perturbations_and_one_hot_refuses_them(screen, fit, targets):
    rng = np.random.default_rng(0)
    features = pd.DataFrame(rng.normal(size=(8, 5)), index=[*targets, "TWIN", "OTHER"])
    features.loc["TWIN"] = features.loc[targets[0]]
    st = fit(screen, features, transfer=False)  # it tells what was measured from what only has features
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


def test_length_follows_from_the_cells_unless_it_is_stated(screen, build, fit, caplog):
    for max_steps in (1, 7):
        history = fit(screen, train={"max_steps": max_steps}).history
        assert {table.index[-1] for table in history.values()} == {max_steps}
    with caplog.at_level("INFO", logger="virtualcell"):
        fit(screen, train={"max_steps": 10, "batch_size": 2, "val_fraction": 0.0})
    # every step shows 2 x 16 cells
    assert (
        f"each of {screen.n_obs} training cells about {10 * 32 / screen.n_obs:.3g} times, in 35 groups" in caplog.text
    )
    with pytest.raises(ValueError, match="max_steps=0 is not a whole number of at least 1"):
        build(screen).train(max_steps=0)


def test_history_has_losses_by_step(learned):
    assert set(learned.history) == {"train_loss", "train_loss_contrast"}  # the split holds no validation cells
    for name, frame in learned.history.items():
        assert frame.index.name == "step"
        assert list(frame.columns) == [name]
        assert list(frame.index) == list(range(10, 201, 10))  # some twenty entries
    loss = learned.history["train_loss"]["train_loss"]
    assert loss.iloc[-1] < 0.7 * loss.iloc[0]


def test_validation_cells_are_held_out_of_every_group(screen, fit, weights):
    st = fit(screen, train={"val_fraction": 0.2, "max_steps": 4, "validate_every": 1})
    assert list(st.history["validation_loss"].index) == [1, 2, 3, 4]
    without = fit(screen, train={"val_fraction": 0.0})
    assert set(without.history) == {"train_loss", "train_loss_contrast"}
    assert not np.array_equal(weights(st), weights(without))
    # those that the data has are taken as they are
    screen.obs["part"] = np.where(np.arange(screen.n_obs) % 5, "train", "val")
    marked = fit(screen, setup={"split_key": "part"}, train={"val_fraction": 0.9})
    changed = screen.copy()
    changed.X[(screen.obs["part"] == "val") & (screen.obs["target_gene"] != CONTROL)] = 1.5
    again = fit(changed, setup={"split_key": "part"})
    np.testing.assert_array_equal(weights(marked), weights(again))
    assert not marked.history["validation_loss"].equals(again.history["validation_loss"])


def test_early_stopping(screen, fit):
    still = {"lr": 1e-12, "max_steps": 12, "validate_every": 1, "batch_size": 2, "early_stopping": True, "patience": 2}
    still |= {"contrast_weight": 0.0, "weight_decay": 0.0}
    st = fit(screen, train={**still, "val_fraction": 0.2})
    assert list(st.history["validation_loss"].index) == [1, 2, 3]  # the first and two without gain
    with pytest.raises(
        ValueError, match="early_stopping=True needs validation cells: give val_fraction > 0 or a split"
    ):
        fit(screen, train={**still, "val_fraction": 0.0})
    screen.obs["none"] = "train"
    with pytest.raises(ValueError, match="early_stopping=True needs validation cells"):
        fit(screen, setup={"split_key": "none"}, train=still)


def test_options_of_the_training_are_checked_before_anything_runs(screen, build, weights):
    st = build(screen)
    before = weights(st)
    with pytest.raises(KeyError, match=r"training option='max_step' is unknown\. Did you mean 'max_steps'"):
        st.train(max_step=3)
    with pytest.raises(KeyError, match=r"training option='val_fractoin' is unknown\. Did you mean 'val_fraction'"):
        st.train({"val_fractoin": 0.2})
    for options, message in (
        ({"val_fraction": 1.0}, "val_fraction=1.0 must be at least 0 and less than 1"),
        ({"mean_weight": -1.0}, "mean_weight=-1.0 is not a number of at least 0. Use 0 to leave the term out"),
        ({"contrast_weight": float("nan")}, "contrast_weight=nan is not a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            st.train(**options)
    with pytest.raises(ValueError, match=r"max_steps=3 and options=\{'max_steps': ...\} were both given"):
        st.train({"max_steps": 5}, max_steps=3)
    np.testing.assert_array_equal(weights(st), before)
    # an object, a dictionary and names say the same
    assert st.train_options(STTrainOptions(max_steps=3, loss="sinkhorn"), lr=1e-4) == st.train_options(
        {"max_steps": 3, "loss": "sinkhorn", "lr": 1e-4}
    )


def test_seed_decides(screen, fit, weights):
    one, other = fit(screen), fit(screen)
    np.testing.assert_array_equal(weights(one), weights(other))
    assert not np.array_equal(weights(one), weights(fit(screen, train={"seed": 1})))
    assert not np.array_equal(weights(one), weights(fit(screen, seed=1)))


def test_training_leaves_the_global_random_state(screen, build):
    st = build(screen)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    st.train(max_steps=2, progress_bar=False)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("setup", [{}, {"batch_key": "batch"}], ids=["plain", "batches"])
def test_order_of_cells_and_genes_changes_no_bit(screen, fit, targets, weights, setup):
    rng = np.random.default_rng(0)
    by_cell = screen[rng.permutation(screen.n_obs)].copy()
    st = fit(screen, setup=setup)
    cells = st.predict(screen, targets[0], n_cells=20)
    error = st.uncertainty(screen, targets[0], n_samples=3)
    by_gene = by_cell[:, rng.permutation(screen.n_vars)].copy()
    for data in (by_cell, by_gene):
        assert st.predict(data, targets[0], n_cells=20).equals(cells)
        assert st.uncertainty(data, targets[0], n_samples=3).equals(error)
    again = fit(by_cell, setup=setup)
    np.testing.assert_array_equal(weights(again), weights(st))
    assert again.mixture == st.mixture
    assert again.predict(screen, targets[0], n_cells=20).equals(cells)


@pytest.mark.parametrize(
    ("scale", "setup"), [("log1p", {}), ("counts", {"batch_key": "batch"})], ids=["log1p", "counts, batches"]
)
def test_kind_of_matrix_changes_no_bit(screen, counts, fit, targets, weights, scale, setup):
    data, kinds = (screen, ("csr", "csc", "float64")) if scale == "log1p" else (counts, ("csr", "csc", "int64"))
    x = np.asarray(data.X.todense()) if sparse.issparse(data.X) else data.X

    def made(kind: str) -> tuple[ST, ad.AnnData]:
        matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}.get(kind, lambda v: v.astype(kind))(x)
        of_kind = ad.AnnData(matrix, obs=data.obs, var=data.var)
        return fit(of_kind, setup={"scale": scale, **setup}), of_kind

    reference, of_kind = made("float32")
    cells = reference.predict(of_kind, targets[0], n_cells=20)
    for kind in kinds:
        st, of_kind = made(kind)
        np.testing.assert_array_equal(weights(st), weights(reference), err_msg=kind)
        assert st.predict(of_kind, targets[0], n_cells=20).equals(cells), kind


def test_order_of_genes_changes_no_bit_of_a_model_that_sorts_them(screen, build, targets, weights):
    """As `fit_state` does: a Screen gives genes by name."""
    design = Design(**DESIGN, batch_key="batch", scale="log1p")
    genes = sorted(screen.var_names)
    rng = np.random.default_rng(0)
    moved = screen[rng.permutation(screen.n_obs), rng.permutation(screen.n_vars)].copy()
    models = []
    for data in (screen, moved):
        st = build(Screen.from_anndata(data, design).select(genes))
        st.train(max_steps=3, progress_bar=False)
        models.append(st)
    one, other = models
    np.testing.assert_array_equal(weights(one), weights(other))
    assert one.mixture == other.mixture
    assert one.predict(moved, targets[0]).equals(other.predict(screen, targets[0]))


def test_test_cells_are_never_seen(screen, fit, weights):
    options = {"setup": {"split_key": "split"}, "train": {"max_steps": 10}}
    st = fit(screen, **options)
    other = screen.copy()
    other.X[(other.obs["split"] == "test").to_numpy()] = 1.5
    np.testing.assert_array_equal(weights(st), weights(fit(other, **options)))
    other.X[(other.obs["split"] == "train").to_numpy()] *= 0.9
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


def test_training_goes_on_with_dropout(screen, fit):
    st = fit(screen)
    training = []
    st.module.register_forward_pre_hook(lambda module, _: training.append(module.training))
    st.train(max_steps=3, progress_bar=False, val_fraction=0.0)
    assert training[:3] == [True] * 3
    assert not any(training[3:])  # weighing the heads
    assert not st.module.training


@pytest.mark.parametrize("loss", ["energy", "sinkhorn"])
def test_a_loss_that_is_not_finite_stops_training_at_the_last_finite_weights(screen, build, weights, loss):
    st = build(screen, setup={"batch_key": "batch"})
    with pytest.raises(FloatingPointError, match=r"training loss of ST.*not finite in step \d+ of 30 \(contexts type_"):
        st.train(max_steps=30, lr=1e12, loss=loss, progress_bar=False)
    assert np.isfinite(weights(st)).all()
    assert not st.is_trained
    # from there it can be trained on
    st.train(max_steps=2, lr=1e-4, progress_bar=False)
    assert np.isfinite(st.predict(screen, st.perturbations[0]).to_numpy()).all()


def test_a_screen_alone_gives_the_same_model(screen, fit, targets, weights):
    design = Design(**DESIGN, batch_key="batch", split_key="split", scale="log1p")
    reference = fit(screen, setup={"batch_key": "batch", "split_key": "split"})
    alone = fit(Screen.from_anndata(screen, design))
    assert alone.adata is None
    np.testing.assert_array_equal(weights(alone), weights(reference))
    expected = reference.predict(screen, targets[0])
    assert alone.predict(screen, targets[0]).equals(expected)
    assert alone.predict(perturbation=targets[0]).equals(expected)
    assert repr(alone) == repr(reference)
    assert (alone.genes, alone.batches, alone.contexts) == (reference.genes, reference.batches, reference.contexts)


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
    assert "head='both', with a transferred effect" in text
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
    with pytest.raises(KeyError, match=r"^control='non-targeting' is unknown.*It labels the unperturbed cells"):
        learned.predict(only, targets[0])


def test_untrained_model_does_not_predict(screen, build, targets):
    with pytest.raises(RuntimeError, match="untrained"):
        build(screen).predict(screen, targets[0])


def test_context_of_a_model_without_contexts(screen, fit, targets):
    st = fit(screen, setup={"context_key": None})
    assert "1 contexts" in repr(st)
    assert len(st.predict(screen, targets[0])) == 300
    with pytest.raises(ValueError, match="context='type_1' was given, but the design has no contexts"):
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
        ({"use_rep": "X_state"}, KeyError, r"^use_rep='X_state' is unknown.*Run `vc.tl.embed\(adata, model\)`"),
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
    with pytest.raises(ValueError, match=r"scale='log1p' was stated, but X reaches .* Say scale='counts' if these"):
        fit(counts)
    for change, message in (
        (lambda x: x * 3, r"X holds fractions and reaches .*: these are neither raw counts nor log"),
        (lambda x: x - 1, "X holds negative values"),
        (lambda x: np.where(x == x.max(), np.nan, x), "X holds NaN"),
    ):
        data = screen.copy()
        data.X = change(screen.X)
        with pytest.raises(ValueError, match=message):
            fit(data)


def test_options(screen, build):
    with pytest.raises(KeyError, match=r"network option='n_heds' is unknown\. Did you mean 'n_heads'"):
        build(screen, n_heds=3)
    with pytest.raises(KeyError, match=r"network option='transfr' is unknown\. Did you mean 'transfer'"):
        build(screen, transfr=False)
    with pytest.raises(KeyError, match=r"size='tiny' is unknown\. Known: 'small', 'medium', 'large'"):
        build(screen, size="tiny")
    with pytest.raises(KeyError, match=r"preset='publishd' is unknown\. Did you mean 'published'"):
        build(screen, preset="publishd")
    with pytest.raises(ValueError, match="head='genes' is unknown; valid are"):
        build(screen, head="genes")
    for argument in ("n_networks", "set_size"):
        with pytest.raises(ValueError, match=f"{argument}=0 is not a whole number of at least 1"):
            build(screen, **{argument: 0})
    with pytest.raises(ValueError, match=r"perturbation_dropout=0\.2 hides features, and there are none"):
        build(screen, perturbation_dropout=0.2)


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
    with pytest.raises(ValueError, match=r"scale='log1p' was stated, but X reaches .* Say scale='counts'"):
        learned.predict(counts, targets[0])


# -- networks, mixture, uncertainty -----------------------------------------------------------------------------------


def test_networks_and_transferred_effect_come_back_from_a_file(screen, fit, targets, tmp_path):
    st = fit(screen, n_networks=2)
    assert "2 networks" in repr(st)
    first, second = (network.project_level[-1].weight for network in st.networks)
    assert not torch.equal(first, second)
    st.save(tmp_path)
    loaded = ST.load(tmp_path)
    assert repr(loaded) == repr(st)
    assert loaded.mixture == st.mixture
    assert loaded.predict(screen, targets[0]).equals(st.predict(screen, targets[0]))
    assert loaded.uncertainty(screen, targets[0], n_samples=2).equals(st.uncertainty(screen, targets[0], n_samples=2))


def test_level_heads_start_at_the_mean_training_cell(screen, build):
    st = build(screen, setup={"split_key": "split"}, n_networks=2)
    cells = screen.X[(screen.obs["split"] == "train").to_numpy()]  # and no validation cell
    still = {"lr": 1e-12, "progress_bar": False, "accelerator": "cpu"}
    st.train(max_steps=1, **still)
    for network in st.networks:
        bias = network.project_level[-1].bias
        np.testing.assert_allclose(bias.detach(), cells.mean(axis=0), atol=1e-5)
    with torch.no_grad():
        bias.fill_(7.0)
        bias[0] = 0.0
    st.train(max_steps=1, **still)  # goes on where it was
    np.testing.assert_allclose(bias.detach()[1:], 7.0, atol=1e-5)
    np.testing.assert_allclose(bias.detach()[0], cells[:, 0].mean(), atol=1e-5)


def test_the_better_head_weighs_more(screen, fit, build):
    st = fit(screen)
    still = {"lr": 1e-12, "max_steps": 1, "progress_bar": False}
    with torch.no_grad():
        st.module.project_level[-1].bias += 4
    st.train(**still)
    assert st.mixture.head_weights[0] > 0.9
    with torch.no_grad():
        st.module.project_level[-1].bias -= 4
        st.module.project_out[-1].bias += 4
    st.train(**still)
    assert st.mixture.head_weights[1] > 0.9


def test_a_transferred_effect_is_refused_in_embedding_space(embedded, build):
    with pytest.raises(ValueError, match="transfer=True is about genes, and this model works on embeddings: leave it"):
        build(embedded.copy(), setup={"use_rep": "X_pca"}, transfer=True)
    assert not build(embedded.copy(), setup={"use_rep": "X_pca"}).transfer


def test_a_cell_holds_no_more_than_all_its_counts(screen, fit, targets):
    st = fit(screen, transfer=False)
    with torch.no_grad():
        st.module.project_out[-1].bias += 50
    assert st.predict(screen, targets[0]).to_numpy().max() == np.float32(np.log1p(1e4))


@pytest.mark.parametrize("options", [{"transfer": False}, {"head": "shift", "transfer": True}])
def test_every_mixture_learns_and_predicts_an_unseen_context(screen, fit, targets, options):
    st = fit(screen, setup={"split_key": "split"}, train={"max_steps": 50, "lr": 6e-3}, **options)
    assert score(st, screen, targets, "type_5")[0] > 0.6


def test_standard_errors_fall_with_the_number_of_control_cells(learned, screen, targets):
    few = screen[(screen.obs["target_gene"] == CONTROL).to_numpy()]
    one = learned.uncertainty(few, targets[0], context="type_5", n_samples=30)
    assert one.shape == (1, screen.n_vars)
    order = np.random.default_rng(0).permutation(few.n_obs)
    assert one.equals(learned.uncertainty(few[order].copy(), targets[0], context="type_5", n_samples=30))
    small = few[np.flatnonzero(few.obs["cell_type"] == "type_5")[:8]].copy()
    assert learned.uncertainty(small, targets[0], n_samples=30).mean(axis=None) > 1.2 * one.mean(axis=None)
    with pytest.raises(ValueError, match="n_samples=1: at least 2 draws"):
        learned.uncertainty(few, targets[0], n_samples=1)
    with pytest.raises(ValueError, match="perturbation must be given"):
        learned.uncertainty(screen)


def test_parts_that_disagree_raise_the_standard_error(screen, fit, targets):
    st = fit(screen, setup={"split_key": "split"}, train={"max_steps": 20, "lr": 3e-3})
    before = st.uncertainty(screen, targets[0], context="type_5", n_samples=5)
    with torch.no_grad():
        st.module.project_level[-1].bias += 6
    assert (st.uncertainty(screen, targets[0], context="type_5", n_samples=5) > before).to_numpy().mean() > 0.9


# -- what must not be returned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_is_never_returned(embedded, fit, targets, value):
    st = fit(embedded.copy(), setup={"use_rep": "X_pca"}, decoder_hidden=(16,))
    broken = embedded.copy()
    cell = np.flatnonzero((broken.obs["target_gene"] == CONTROL) & (broken.obs["cell_type"] == "type_2"))[3]
    broken.obsm["X_pca"][cell, 0] = value
    with pytest.raises(
        FloatingPointError, match=r"ST predicts NaN or infinite values for .* in context 'type_2'\. Look"
    ):
        st.predict(broken, targets[0])
    with pytest.raises(FloatingPointError, match="in context 'type_2'"):
        st.uncertainty(broken, targets[0], context="type_2", n_samples=3)
    assert np.isfinite(st.predict(broken, targets[0], context="type_1").to_numpy()).all()


def test_an_embedding_that_is_not_finite_is_not_trained_on(embedded, build):
    broken = embedded.copy()
    broken.obsm["X_pca"][3, 0] = np.nan
    st = build(broken, setup={"use_rep": "X_pca"}, decoder_hidden=(16,))
    with pytest.raises(
        ValueError, match=rf"obsm\['X_pca'\] holds NaN or infinite values in 1 cells, among them.*{broken.obs_names[3]}"
    ):
        st.train(max_steps=1, progress_bar=False)
    broken.obs["part"] = np.where(np.arange(broken.n_obs) == 3, "test", "train")
    st = build(broken, setup={"use_rep": "X_pca", "split_key": "part"}, decoder_hidden=(16,))
    st.train(max_steps=1, progress_bar=False)
    assert st.is_trained


def test_infinite_weights_are_not_hidden_by_the_largest_expression(screen, fit, targets):
    st = fit(screen, head="shift", transfer=False)
    with torch.no_grad():
        st.module.project_out[-1].bias[0] = np.inf
    with pytest.raises(FloatingPointError, match="predicts NaN or infinite values"):
        st.predict(screen, targets[0])


# -- batches that a prediction does not need --------------------------------------------------------------------------


def test_an_unknown_batch_in_another_context_stops_no_prediction(screen, fit, targets):
    st = fit(screen, setup={"batch_key": "batch"})
    reference = st.predict(screen, targets[0], context="type_1")
    error = st.uncertainty(screen, targets[0], context="type_1", n_samples=2)
    screen.obs["batch"] = screen.obs["batch"].astype(str).where(screen.obs["cell_type"] == "type_1", "new")
    assert st.predict(screen, targets[0], context="type_1").equals(reference)
    assert st.uncertainty(screen, targets[0], context="type_1", n_samples=2).equals(error)
    with pytest.raises(KeyError, match="batch='new' is unknown"):  # of a measured pair networks say nothing
        st.predict(screen, f"{targets[0]}+{targets[1]}", context="type_2")


def test_a_batch_of_test_cells_alone_stays_unknown(screen, fit, targets, tmp_path):
    screen.obs["batch"] = screen.obs["batch"].astype(str).where(screen.obs["cell_type"] != "type_5", "another")
    screen.obs["part"] = np.where(screen.obs["cell_type"] == "type_5", "test", "train")
    st = fit(screen, setup={"batch_key": "batch", "split_key": "part"})
    st.save(tmp_path)
    for model in (st, ST.load(tmp_path)):
        assert model.batches == ["batch_1", "batch_2"]
        assert model.module.batch_encoder.num_embeddings == 2
        assert len(model.predict(screen, targets[0], context="type_1")) == 60
        with pytest.raises(KeyError, match=r"batch='another' is unknown.*only the batches it was trained on"):
            model.predict(screen, targets[0], context="type_5")
    screen.obs["part"] = screen.obs["part"].replace("test", "val")
    with pytest.raises(ValueError, match=r"batches \['another'\] occur in validation but in no training cells"):
        fit(screen, setup={"batch_key": "batch", "split_key": "part"})


# -- validation -------------------------------------------------------------------------------------------------------


def test_a_perturbation_of_validation_alone_needs_features(screen, fit, targets):
    last = (screen.obs["target_gene"] == targets[-1]).to_numpy()
    screen.obs["part"] = np.where(last, "val", "train")
    setup = {"split_key": "part"}
    with pytest.raises(ValueError, match=rf"\['{targets[-1]}'\] occur in validation but in no training cells"):
        fit(screen, setup=setup)
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)), index=targets)
    st = fit(screen, features, setup=setup)
    assert targets[-1] not in st.table.seen
    assert len(st.history["validation_loss"])
    # a pair whose parts are learned from may be validated on
    screen.obs["target_gene"] = screen.obs["target_gene"].astype(str).replace(targets[-1], "+".join(targets[:2]))
    st = fit(screen, setup=setup)
    assert "+".join(targets[:2]) not in st.table.seen
    assert len(st.history["validation_loss"])
