from __future__ import annotations

import dataclasses
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import virtualcell as vc
from virtualcell.models import Transfer, TransferSource
from virtualcell.models._transfer_slopes import _Squares

CONTROL = "non-targeting"
CELLS = {"perturbation_key": "target_gene", "control": CONTROL, "context_key": "cell_type"}


def table(effects, names=None, genes=None, contexts=None, **fields) -> TransferSource:
    """A source of effects, rows x genes."""
    effects = np.asarray(effects, dtype=float)
    names = [f"P{i:02}" for i in range(len(effects))] if names is None else names
    contexts = ["one"] * len(effects) if contexts is None else contexts
    genes = [f"G{i:03}" for i in range(effects.shape[1])] if genes is None else genes
    obs = pd.DataFrame({"p": list(names), "c": list(contexts)}, index=[f"row{i}" for i in range(len(effects))])
    adata = ad.AnnData(effects, obs=obs, var=pd.DataFrame(index=list(genes)))
    return TransferSource(adata, "p", kind="effects", context_key="c", **fields)


def signal(n=40, n_genes=60, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, n_genes))


def noisy(truth, noise, seed) -> np.ndarray:
    return truth + noise * np.random.default_rng(seed).normal(size=truth.shape)


def controls(genes, n=5) -> ad.AnnData:
    obs = pd.DataFrame({"perturbation": "control"}, index=[f"cell{i}" for i in range(n)])
    cells = np.full((n, len(genes)), 2.0, np.float32) + 0.1 * np.arange(len(genes), dtype=np.float32)
    return ad.AnnData(cells, obs=obs, var=pd.DataFrame(index=list(genes)))


def test_formula_against_numpy():
    effects = signal(3, 5)
    model = Transfer.fit([table(effects)], slope=0.5)
    others = effects[1:].mean(axis=0)
    np.testing.assert_allclose(model.effects(["P00"]).loc["P00"], 0.5 * (effects[0] - others) + others, rtol=1e-5)
    np.testing.assert_array_equal(model.effects(["control"]), np.zeros((1, 5)))


def test_the_only_perturbation_of_a_source_is_copied_once():
    model = Transfer.fit([table([[1.0, -2.0]], ["IFN"])], slope=1)
    np.testing.assert_allclose(model.effects(["IFN"]), [[1, -2]])


def test_sources_count_the_same_whatever_their_contexts():
    effects = signal(3, 5)
    several = table(np.concatenate([effects, effects + 1]), [*("ABC" * 2)], contexts=["x"] * 3 + ["y"] * 3)
    other = table(signal(3, 5, seed=1), [*"ABC"])
    model = Transfer.fit([several, other], slope=1)
    alone = [Transfer.fit([s], slope=1).arrays["effects"] for s in (several, other)]
    np.testing.assert_allclose(model.arrays["effects"], np.mean(alone, axis=0), rtol=1e-4, atol=1e-6)
    weighted = Transfer.fit([several, other], slope=1, weights={"source 2": 3})
    expected = 0.25 * alone[0] + 0.75 * alone[1]
    np.testing.assert_allclose(weighted.arrays["effects"], expected, rtol=1e-4, atol=1e-6)


def test_genes_and_perturbations_that_a_source_lacks_are_missing_and_not_zero():
    first = table(signal(3, 3), [*"ABC"], ["g1", "g2", "g3"])
    second = table(signal(3, 2, seed=1), [*"ABD"], ["g3", "g2"])
    model = Transfer.fit([first, second], slope=1, genes=["g1", "g2", "g3", "g4"])
    both = [Transfer.fit([s], slope=1) for s in (first, second)]
    found = {name: dict(zip(m.genes, m.arrays["effects"][m.known.index("A")], strict=True)) for name, m in
             zip(("all", "first", "second"), (model, *both), strict=True)}  # fmt: skip
    assert found["all"]["g1"] == pytest.approx(found["first"]["g1"])
    assert found["all"]["g2"] == pytest.approx((found["first"]["g2"] + found["second"]["g2"]) / 2)
    assert np.isnan(found["all"]["g4"])
    assert model.effects(["A"])["g4"].item() == 0
    alone = dict(zip(both[1].genes, both[1].arrays["effects"][2], strict=True))
    assert model.arrays["effects"][model.known.index("D"), 2] == pytest.approx(alone["g3"])


def test_nan_is_not_measured():
    effects = signal(4, 3)
    effects[1, 0] = np.nan
    model = Transfer.fit([table(effects)], slope=1)
    assert model.arrays["effects"][0, 0] == pytest.approx(effects[0, 0] - effects[2:, 0].mean(), rel=1e-5)
    assert np.isfinite(model.effects(["P01"])).all(axis=None)


def test_order_of_rows_and_genes_changes_nothing():
    truth = signal()
    first, second = noisy(truth, 1, 1), noisy(truth, 1, 2)
    features = pd.DataFrame(truth[:, :6], index=[f"P{i:02}" for i in range(40)])
    model = Transfer.fit({"a": table(first), "b": table(second)}, perturbation_features=features)
    rng = np.random.default_rng(0)
    shuffled = {
        name: dataclasses.replace(s, adata=s.adata[rng.permutation(40)][:, rng.permutation(60)].copy())
        for name, s in (("a", table(first)), ("b", table(second)))
    }
    genes = list(rng.permutation(model.genes))
    other = Transfer.fit(shuffled, genes=genes, perturbation_features=features.iloc[rng.permutation(40)])
    names = ["P03", "P17"]
    pd.testing.assert_frame_equal(other.effects(names)[model.genes], model.effects(names), check_exact=True)
    assert other.agreement("P03") == model.agreement("P03")


@pytest.mark.parametrize("by", ["sources", "contexts"])
def test_the_slope_is_what_carries_over(by):
    truth = signal(60, 200)
    measured = [noisy(truth, 1.5, seed) for seed in (1, 2)]
    if by == "sources":
        sources = [table(m) for m in measured]
    else:
        names = [f"P{i:02}" for i in range(60)] * 2
        sources = [table(np.concatenate(measured), names, contexts=["x"] * 60 + ["y"] * 60)]
    model = Transfer.fit(sources)
    # of two measurements with noise of variance 2.25, 1 / 3.25 carries over
    assert float(model.arrays["slope_of_effect"]) == pytest.approx(1 / 3.25, abs=0.03)
    new = noisy(truth, 0, 9)
    predicted = model.effects([f"P{i:02}" for i in range(60)]).to_numpy()
    assert ((predicted - new) ** 2).sum() < 0.9 * (new**2).sum()
    assert ((measured[0] - new) ** 2).sum() > (new**2).sum()  # unscaled it is worse than no change


def test_slopes_stay_in_the_box():
    squares, x = _Squares(2), signal(5, 50)
    squares.add(3 * x - signal(5, 50, 1), x, signal(5, 50, 1))
    assert squares.slopes() == [1.0, 0.0]
    assert np.isnan(_Squares(1).slopes()).all()


def test_smooth_effects_where_few_axes_hold_the_signal():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 150))
    sources = [table(noisy(truth, 3, seed)) for seed in (1, 2, 3)]
    model = Transfer.fit(sources)
    assert model.arrays["n_axes"] > 0
    names = [f"P{i:02}" for i in range(60)]
    plain = ((model.arrays["effects"] * 0.5 - truth) ** 2).sum()
    assert ((model.effects(names).to_numpy() - truth) ** 2).sum() < 0.8 * plain


def test_a_single_experiment_is_scaled_as_usual_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        model = Transfer.fit([table(signal(3, 5))])
    assert "multiplied by 0.2, which is usual" in caplog.text
    assert float(model.arrays["slope_of_effect"]) == 0.2


def test_other_units_change_nothing():
    truth = signal()
    first, second = table(noisy(truth, 1, 1)), noisy(truth, 1, 2)
    names = ["P00", "P01"]
    found = [Transfer.fit([first, table(second * c, unit="other")]).effects(names) for c in (1, 100)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
    halves = Transfer.fit([table(second, unit="log2fc")], slope=1).effects(names)
    np.testing.assert_allclose(halves, np.log(2) * Transfer.fit([table(second)], slope=1).effects(names), rtol=1e-4)


def test_errors_shrink_what_is_noise():
    truth = np.zeros((6, 400))
    truth[0, :20] = 4
    source = table(noisy(truth, 1, 0), error_layer="error")
    source.adata.layers["error"] = np.ones_like(truth)
    model = Transfer.fit([source], slope=1)
    assert np.abs(model.arrays["effects"][3]).mean() < 0.1
    assert model.arrays["effects"][0, :20].mean() > 2.5


def test_agreement_ranks_errors():
    truth, rng = signal(80, 100), np.random.default_rng(5)
    noise = np.linspace(0.3, 4, 80)[:, None]
    sources = [table(truth + noise * rng.normal(size=truth.shape)) for _ in range(3)]
    model = Transfer.fit(sources)
    agreement = pd.Series([model.agreement(p) for p in model.known], index=model.known)
    predicted = model.effects(model.known)
    right = pd.DataFrame(truth, index=[f"P{i:02}" for i in range(80)], columns=predicted.columns).loc[model.known]
    accuracy = (predicted * right).sum(axis=1) / np.linalg.norm(predicted, axis=1) / np.linalg.norm(right, axis=1)
    assert agreement.corr(accuracy, method="spearman") > 0.8
    assert np.isnan(Transfer.fit(sources[:1], slope=1).agreement("P00"))
    assert np.isnan(model.agreement("never measured"))


@pytest.fixture
def by_features() -> tuple[TransferSource, pd.DataFrame, np.ndarray]:
    """Effects that follow from eight groups that features tell apart; 16 of 96 are not measured."""
    rng = np.random.default_rng(0)
    group = np.arange(96) % 8
    features = pd.DataFrame(np.eye(8)[group] + 0.1 * rng.normal(size=(96, 8)), index=[f"P{i:02}" for i in range(96)])
    truth = rng.normal(size=(8, 50))[group]
    return table((truth + rng.normal(size=truth.shape))[:80]), features, truth


def test_unmeasured_perturbations_from_their_neighbours(by_features):
    source, features, truth = by_features
    model = Transfer.fit([source], perturbation_features=features, slope=None)
    new = [f"P{i:02}" for i in range(80, 96)]
    predicted = model.effects(new).to_numpy()
    assert ((predicted - truth[80:]) ** 2).sum() < 0.3 * (truth[80:] ** 2).sum()
    assert int(model.arrays["k"]) in (5, 10)
    assert 0.3 < model.agreement("P90") < 0.8  # of neighbours with as much noise as signal


def test_neighbours_help_where_both_are_known(by_features):
    source, features, truth = by_features
    second = table(noisy(truth[:80], 1, 7))
    with_features = Transfer.fit([source, second], perturbation_features=features)
    assert with_features.arrays["slope_of_neighbours"] > 0.2
    names = [f"P{i:02}" for i in range(80)]
    errors = [
        ((m.effects(names) - truth[:80]) ** 2).sum().sum() for m in (with_features, Transfer.fit([source, second]))
    ]
    assert errors[0] < errors[1]


def test_nothing_is_known_nothing_is_predicted(caplog):
    model = Transfer.fit([table(signal(3, 5))], slope=0.3)
    with caplog.at_level(logging.WARNING):
        assert (model.effects(["X1", "X1"]) == 0).all(axis=None)
    assert caplog.text.count("'X1' is in no source") == 1


def test_combinations():
    source = table(signal(4, 5), ["A", "B", "C", "B+A"])
    model = Transfer.fit([source], slope=1)
    assert model.known == ["A", "A+B", "B", "C"]
    found = model.effects(["A", "B", "C", "A+B", "B+A", "A+C"])
    np.testing.assert_array_equal(found.loc["A+B"], found.loc["B+A"])
    np.testing.assert_allclose(found.loc["A+C"], found.loc["A"] + found.loc["C"])
    assert not np.allclose(found.loc["A+B"], found.loc["A"] + found.loc["B"])


# -- cells ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(counts) -> dict[str, TransferSource]:
    """Two experiments of two cell types each, raw counts."""
    parts = {"one": ["type_1", "type_2"], "two": ["type_3", "type_4"]}
    return {n: TransferSource(counts[counts.obs["cell_type"].isin(t)].copy(), **CELLS) for n, t in parts.items()}


@pytest.fixture
def new_cells(counts) -> ad.AnnData:
    here = (counts.obs["cell_type"] == "type_5") & (counts.obs["target_gene"] == CONTROL)
    return counts[here.to_numpy()].copy()


HERE = {"perturbation_key": "target_gene", "control": CONTROL, "scale": "counts"}


def test_new_control_cells(counts, screen, sources, new_cells, targets):
    model = Transfer.fit(sources, **HERE)
    errors = []
    for target in targets:
        predicted = model.predict(new_cells, target)
        assert predicted.shape == (60, 80)
        of_type = screen[(screen.obs["cell_type"] == "type_5").to_numpy()]
        real = of_type[(of_type.obs["target_gene"] == target).to_numpy()].X.mean(axis=0)
        control = of_type[(of_type.obs["target_gene"] == CONTROL).to_numpy()].X.mean(axis=0)
        errors.append([((predicted.mean() - real) ** 2).sum(), ((control - real) ** 2).sum()])
    predicted, no_change = np.sum(errors, axis=0)
    assert predicted < 0.8 * no_change
    np.testing.assert_allclose(model.predict(new_cells, CONTROL), screen[new_cells.obs_names].X, atol=1e-5)


def test_genes_of_ones_own_cells(sources, new_cells, targets):
    model = Transfer.fit(sources, **HERE)
    names = list(new_cells.var_names)
    renamed = new_cells[:, names[::-1]].copy()
    renamed.var_names = ["unknown", *names[::-1][1:]]
    predicted = model.predict(renamed, targets[0])
    assert list(predicted.columns) == list(renamed.var_names)
    expected = model.predict(new_cells, targets[0])
    np.testing.assert_allclose(predicted[names[:-1]], expected.loc[predicted.index, names[:-1]], atol=1e-5)
    control = model.predict(renamed, CONTROL)
    np.testing.assert_allclose(predicted["unknown"], control["unknown"])
    with pytest.raises(KeyError, match="None of these genes"):
        model.on_genes(["a", "b"])


def test_predict_perturbation_and_files(sources, new_cells, targets, tmp_path):
    model = Transfer.fit(sources, genes=new_cells.var_names, **HERE)
    model.save(tmp_path)
    loaded = Transfer.load(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    pd.testing.assert_frame_equal(loaded.predict(new_cells, targets[1]), model.predict(new_cells, targets[1]))
    assert loaded.agreement(targets[1]) == model.agreement(targets[1])
    found = vc.tl.predict_perturbation(new_cells, targets[1], model=loaded)
    assert found.shape == (60, 80)
    assert set(found.obs["target_gene"]) == {targets[1]}


def test_pseudobulk_tells_what_cells_tell(counts, sources, targets):
    one = sources["one"].adata
    groups = one.obs.groupby(["cell_type", "target_gene"], observed=True).indices
    sums = np.stack([np.asarray(one.X[rows].sum(axis=0)).ravel() for rows in groups.values()])
    obs = pd.DataFrame(list(groups), columns=["cell_type", "target_gene"])
    obs.index = [f"bulk{i}" for i in obs.index]
    bulk = TransferSource(ad.AnnData(sums, obs=obs, var=one.var.copy()), kind="pseudobulk", **CELLS)
    found = [Transfer.fit([s], slope=1).arrays["effects"] for s in (bulk, sources["one"])]
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.9


def test_cells_without_controls_tell_all_but_the_mean(sources):
    with_controls = sources["one"]
    cells = with_controls.adata[(with_controls.adata.obs["target_gene"] != CONTROL).to_numpy()].copy()
    without = TransferSource(cells, "target_gene", context_key="cell_type")
    found = [Transfer.fit([s], slope=1).arrays for s in (without, with_controls)]
    assert np.corrcoef(found[0]["effects"].ravel(), found[1]["effects"].ravel())[0, 1] > 0.95
    assert (found[0]["mean"] == 0).all()


def test_own_data_is_a_source_and_sets_the_scale(screen, sources, targets, caplog):
    own = screen[screen.obs["cell_type"].isin(["type_3", "type_4", "type_5"])].copy()
    Transfer.setup_anndata(own, **CELLS, split_key="split")
    model = Transfer(own, sources={"one": sources["one"]})
    with caplog.at_level(logging.INFO):
        model.train()
    assert "own data has 6 perturbations in 2 contexts" in caplog.text
    assert "fitted on one's own data left out" in caplog.text
    assert model.predict(own, targets[0], context="type_5").shape == (60, 80)
    model.forget_data()
    assert model.sources == {}


def test_in_a_benchmark(screen, design, sources):
    scores = vc.tl.benchmark(
        screen,
        models={"Transfer": ("Transfer", {"sources": [sources["one"]]})},
        **design,
        split_key="split",
        scale="log1p",
        suite=["mae"],
        seeds=[0],
        floor=["NoChange"],
        ceiling=False,
    )
    mean = scores.groupby("model")["value"].mean()
    assert mean["Transfer"] < mean["NoChange"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "bulk"}, "kind='bulk' of a source is unknown; valid are cells, pseudobulk, effects"),
        ({"kind": "pseudobulk", "scale": "log1p"}, "sums of raw counts"),
        ({"unit": "other"}, "belongs to kind='effects'"),
        ({"pertubation": "x"}, "field='pertubation' is unknown"),
    ],
)
def test_errors_of_sources(fields, message):
    adata = table(signal(3, 3)).adata
    with pytest.raises((ValueError, KeyError), match=message):
        Transfer.fit([{"adata": adata, "perturbation_key": "p", **fields}])


def with_one(value, masked=False) -> np.ndarray:
    values = signal(3, 5)
    values[1, 2] = value
    return np.ma.masked_array(values, values == value) if masked else values


VALUES = [
    (with_one(7.0, masked=True), None, r"X is an array with masked values, which are missing"),
    (with_one(np.inf), None, r"X holds infinite effects\. Set them to NaN"),
    (signal(3, 5), np.abs(with_one(7.0, masked=True)), r"layers\['se'\] is an array with masked values"),
    (signal(3, 5), np.where(with_one(7.0) == 7, np.inf, 1), r"layers\['se'\] holds infinite standard errors"),
    (
        signal(3, 5),
        np.where(with_one(7.0) == 7, -0.25, 1),
        r"error_layer='se' holds 1 negative standard errors, among them -0\.25\. Set those that are not known to NaN",
    ),
]


@pytest.mark.parametrize(("effects", "errors", "message"), VALUES)
def test_values_of_sources(effects, errors, message):
    """They would be read as values: what a mask hides, and the size of an error below 0."""
    good, bad = table(signal(3, 5)), table(signal(3, 5), error_layer=None if errors is None else "se")
    bad.adata.X = effects
    if errors is not None:
        bad.adata.layers["se"] = errors
    with pytest.raises(ValueError, match=rf"^sources\['bad'\]: {message}"):
        Transfer.fit({"good": good, "bad": bad}, slope=1)
    bad.adata.X = np.where(np.isinf(effects), np.nan, np.ma.filled(effects, np.nan))  # as is advised
    if errors is not None:
        bad.adata.layers["se"] = np.where(np.isfinite(errors) & (errors > 0), np.ma.filled(errors, np.nan), np.nan)
    found = Transfer.fit({"good": good, "bad": bad}, slope=1).effects(["P00", "P01"])
    assert np.isfinite(found.to_numpy()).all()


def test_a_source_says_which_of_its_layers_lacks():
    source = dataclasses.replace(table(signal(3, 5)), error_layer="lfcSE")
    with pytest.raises(KeyError, match=r"sources\['mine'\]: error_layer='lfcSE' is unknown. There are none"):
        Transfer.fit({"mine": source})


def test_effects_on_disk_and_of_any_kind_are_read_alike(tmp_path):
    source = table(with_one(np.nan))
    expected = Transfer.fit([source], slope=1).effects(["P00", "P01"])
    as_sparse = ad.AnnData(sparse.csc_matrix(source.adata.X), obs=source.adata.obs, var=source.adata.var)
    as_sparse.write_h5ad(tmp_path / "effects.h5ad")
    for adata in (
        ad.read_h5ad(tmp_path / "effects.h5ad", backed="r"),
        as_sparse,
        ad.AnnData(source.adata.X.astype(object), obs=source.adata.obs, var=source.adata.var),
    ):
        found = Transfer.fit([dataclasses.replace(source, adata=adata)], slope=1).effects(["P00", "P01"])
        np.testing.assert_array_equal(found, expected)


def test_errors():
    with pytest.raises(ValueError, match="names no experiment"):
        Transfer.fit([])
    with pytest.raises(TypeError, match="must be a list"):
        Transfer.fit(table(signal(3, 3)))
    with pytest.raises(TypeError, match="TransferSource"):
        Transfer.fit([table(signal(3, 3)).adata])
    with pytest.raises(KeyError, match="source='source 2' is unknown"):
        Transfer.fit([table(signal(3, 3))], weights={"source 2": 1})
    with pytest.raises(ValueError, match="from 0 to 1"):
        Transfer.fit([table(signal(3, 3))], slope=2)
    with pytest.raises(ValueError, match=r"hold no numbers, \['gene'\]"):
        Transfer.fit([table(signal(3, 3))], perturbation_features=pd.DataFrame({"gene": ["A"]}))
    with pytest.raises(ValueError, match="no perturbation besides the control 'P00'"):
        Transfer.fit([table(signal(1, 3), control="P00")])
    with pytest.raises(KeyError, match="No gene of this source"):
        Transfer.fit([table(signal(3, 3))], genes=["other"])


def test_an_error_that_is_not_stated_is_no_certainty():
    source = table(np.random.default_rng(0).normal(size=(20, 40)), error_layer="se")
    source.adata.layers["se"] = np.full(source.adata.shape, 0.5)
    source.adata.layers["se"][:3] = np.nan
    measured = source.measure(list(source.adata.var_names))
    assert measured.variance.shape == (20, 40)
    assert np.ptp(measured.variance) == 0  # that of the others
    assert measured.variance[0, 0] > 0
