"""What holds of every score: bounds, orders that do not matter, and that nothing is found where there is nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

import virtualcell as vc
from virtualcell import metrics

seeds = st.integers(0, 2**32 - 1)
LABELS = {"perturbation_key": "pert", "control": "NT", "context_key": "ctx"}

# predicted, observed and control profile to a score, and its range
PROFILES: dict[str, tuple[Callable, float, float]] = {
    "mae": (lambda p, o, c: metrics.mae(p, o), 0, np.inf),
    "mse": (lambda p, o, c: metrics.mse(p, o), 0, np.inf),
    "pearson_delta": (metrics.pearson_delta, -1, 1),
    "top_overlap": (lambda p, o, c: metrics.top_overlap(p, o, c, k=3), 0, 1),
}
PERFECT = {"mae": 0, "mse": 0, "pearson_delta": 1, "top_overlap": 1}


@pytest.mark.parametrize("name", PROFILES)
@given(seed=seeds, n_genes=st.integers(3, 30), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_scores_of_a_profile(name: str, seed: int, n_genes: int, size: float) -> None:
    score, least, most = PROFILES[name]
    rng = np.random.default_rng(seed)
    predicted, observed, control = size * rng.normal(1, 1, (3, n_genes))
    found = score(predicted, observed, control)
    assert least - 1e-9 <= found <= most + 1e-9
    assert score(observed, observed, control) == pytest.approx(PERFECT[name])
    order = rng.permutation(n_genes)
    assert score(predicted[order], observed[order], control[order]) == pytest.approx(found)
    if name != "top_overlap":  # both sides are treated alike
        assert score(observed, predicted, control) == pytest.approx(found)
    if name in ("pearson_delta", "top_overlap"):  # the size of the effect does not matter
        assert score(control + 3 * (predicted - control), observed, control) == pytest.approx(found)


@given(seeds, st.integers(2, 8), st.integers(2, 12), st.sampled_from(["l1", "l2", "cosine"]))
def test_discrimination(seed: int, n: int, n_genes: int, metric: str) -> None:
    rng = np.random.default_rng(seed)
    predicted, observed = rng.normal(size=(2, n, n_genes))
    control, targets = rng.normal(size=n_genes), rng.integers(-1, n_genes, n)
    options = {"metric": metric, "target_genes": targets}
    scores = metrics.discrimination_score(predicted, observed, control, **options)
    assert ((scores >= 1 / n - 1e-9) & (scores <= 1)).all()
    assert (metrics.discrimination_score(observed, observed, control, metric=metric) == 1).all()
    nothing = metrics.discrimination_score(np.tile(control, (n, 1)), observed, control, metric="cosine")
    np.testing.assert_allclose(nothing, (n + 1) / (2 * n))  # chance
    order, genes = rng.permutation(n), rng.permutation(n_genes)
    place = np.append(np.argsort(genes), -1)  # of each gene, and of no gene
    again = metrics.discrimination_score(
        predicted[order][:, genes], observed[order][:, genes], control[genes], metric=metric,
        target_genes=place[targets[order]],
    )  # fmt: skip
    np.testing.assert_allclose(again, scores[order])
    hidden = predicted.copy()  # what is predicted of the target does not matter
    hidden[np.arange(n)[targets >= 0], targets[targets >= 0]] += 100
    np.testing.assert_allclose(metrics.discrimination_score(hidden, observed, control, **options), scores)


@given(seeds, st.integers(2, 12), st.integers(2, 12), st.integers(1, 5))
def test_distances_between_sets(seed: int, n: int, m: int, n_genes: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, n_genes)), rng.normal(1, 1, (m, n_genes))
    for distance, least in ((metrics.energy_distance, -1e-9), (metrics.mmd, -np.inf)):
        found = distance(x, y)
        assert found >= least
        assert distance(rng.permutation(x), y[:, ::-1][:, ::-1]) == pytest.approx(found, abs=1e-9)
        genes = rng.permutation(n_genes)
        assert distance(x[:, genes], y[:, genes]) == pytest.approx(found, abs=1e-9)
        if m > 2 or distance is metrics.energy_distance:
            moved = distance(x + 5, y + 5)  # where both are does not matter
            assert moved == pytest.approx(found, abs=1e-6)
    assert metrics.energy_distance(x, y) == pytest.approx(metrics.energy_distance(y, x))
    assert metrics.energy_distance(x, x) == pytest.approx(0, abs=1e-9)


# log fold changes and adjusted p-values of one perturbation, predicted and observed, to a score
GENES: dict[str, Callable] = {
    "de_overlap": lambda p, q, o, r: metrics.de_overlap(p, o, predicted_fdr=q, observed_fdr=r),
    "de_precision": lambda p, q, o, r: metrics.de_precision(p, o, predicted_fdr=q, observed_fdr=r),
    "de_recall": lambda p, q, o, r: metrics.de_recall(q, r),
    "de_direction_match": lambda p, q, o, r: metrics.de_direction_match(p, o, observed_fdr=r),
    "de_spearman_lfc": lambda p, q, o, r: metrics.de_spearman_lfc(p, o, observed_fdr=r),
    "pr_auc": lambda p, q, o, r: metrics.pr_auc(q, r),
    "roc_auc": lambda p, q, o, r: metrics.roc_auc(q, r),
}


@pytest.mark.parametrize("name", GENES)
@given(seed=seeds, n_genes=st.integers(1, 30))
def test_scores_of_genes(name: str, seed: int, n_genes: int) -> None:
    rng = np.random.default_rng(seed)
    change, other = rng.normal(size=(2, n_genes))
    fdr, of_other = rng.random((2, n_genes)) ** 4
    found = GENES[name](change, fdr, other, of_other)
    assert np.isnan(found) or -1 - 1e-9 <= found <= 1 + 1e-9
    order = rng.permutation(n_genes)
    again = GENES[name](change[order], fdr[order], other[order], of_other[order])
    assert again == pytest.approx(found, nan_ok=True)
    perfect = GENES[name](other, of_other, other, of_other)
    assert np.isnan(perfect) or perfect == pytest.approx(1) or not (of_other < 0.05).any() or name == "de_spearman_lfc"


# -- differential expression ------------------------------------------------------------------------------------------


def cells_without_effect(seed: int, n_perturbations: int, n: int, n_genes: int) -> AnnData:
    """Counts of two contexts in which perturbations do nothing; cells differ in depth, genes in mean and dispersion."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        [(p, c) for c in "xy" for p in ["NT", *(f"P{i}" for i in range(n_perturbations))] for _ in range(n)],
        columns=["pert", "ctx"],
    )
    obs.index = [f"c{i}" for i in rng.permutation(len(obs))]
    level = np.where((obs["ctx"] == "x").to_numpy()[:, None], *(rng.gamma(0.5, 4, (2, 1, n_genes)) + 0.02))
    rate = level * rng.lognormal(0, 0.4, (len(obs), 1)) * rng.gamma(2, 0.5, (len(obs), n_genes))
    counts = rng.poisson(rate)
    counts[:, 0] += 1
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs)
    adata.var_names = [f"G{i}" for i in range(n_genes)]
    return adata


def logged(adata: AnnData) -> sparse.csr_matrix:
    counts = adata.X.astype(np.float64)
    scaled = sparse.diags(1e4 / np.asarray(counts.sum(axis=1)).ravel()) @ counts
    return scaled.log1p().tocsr()


@given(seeds, st.integers(1, 3), st.integers(5, 30), st.integers(1, 15), st.booleans())
def test_differential_expression(seed: int, n_perturbations: int, n: int, n_genes: int, dense: bool) -> None:
    rng = np.random.default_rng(seed)
    adata = cells_without_effect(seed, n_perturbations, n, n_genes)
    matrix, labels = logged(adata), adata.obs["pert"].to_numpy()
    table = metrics.differential_expression(matrix, labels, control="NT", genes=adata.var_names)
    assert table["p_value"].between(0, 1).all()
    assert (table["fdr"] >= table["p_value"] - 1e-12).all()
    assert table["fdr"].between(0, 1).all()
    index = ["perturbation", "gene"]
    cells, genes = rng.permutation(len(labels)), rng.permutation(n_genes)
    turned = matrix[cells][:, genes]
    again = metrics.differential_expression(
        turned.toarray() if dense else turned, pd.Categorical(labels[cells]), control="NT", genes=adata.var_names[genes]
    )
    one, other = (t.astype(dict.fromkeys(index, str)).set_index(index).sort_index() for t in (table, again))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)
    i = rng.integers(n_genes)  # one gene, by scipy
    values = matrix[:, i].toarray().ravel()
    wanted = stats.mannwhitneyu(values[labels == "P0"], values[labels == "NT"], method="asymptotic").pvalue
    assert one.loc[("P0", f"G{i}"), "p_value"] == pytest.approx(wanted if np.ptp(values) else 1, rel=1e-6)


def test_no_effect_in_no_differential_expression_out_of_the_test() -> None:
    """Of 300 perturbations without effect, a gene is found in no more than the test allows: about 5 %."""
    found = total = 0
    for seed in range(50):
        adata = cells_without_effect(seed, 3, 40, 60)
        for context in "xy":
            here = (adata.obs["ctx"] == context).to_numpy()
            table = metrics.differential_expression(logged(adata)[here], adata.obs["pert"][here], control="NT")
            hits = table.groupby("perturbation", observed=True)["fdr"].min() < 0.05
            found, total = found + int(hits.sum()), total + len(hits)
    assert total == 300
    assert found <= stats.binom.ppf(0.999, total, 0.05)


def n_found(adata: AnnData, model: vc.models.ST | vc.models.Additive) -> int:
    """How many genes differ between the control cells of y and what is predicted for P0 there."""
    predicted = vc.tl.predict_perturbation(adata, "P0", context="y", model=model)
    controls = adata[((adata.obs["pert"] == "NT") & (adata.obs["ctx"] == "y")).to_numpy()]
    both = sparse.vstack([sparse.csr_matrix(predicted.X), logged(controls)]).tocsr()
    labels = ["P0"] * predicted.n_obs + ["NT"] * controls.n_obs
    return int((metrics.differential_expression(both, labels, control="NT")["fdr"] < 0.05).sum())


def null_screen(seed: int, measured: bool) -> AnnData:
    """A screen without effects, in which P0 was measured in y, or in x alone."""
    adata = cells_without_effect(seed, 3, 40, 60)
    return adata if measured else adata[~((adata.obs["pert"] == "P0") & (adata.obs["ctx"] == "y")).to_numpy()].copy()


@given(seeds, st.booleans())
@settings(max_examples=4)
def test_no_effect_in_no_differential_expression_out_of_st(seed: int, measured: bool) -> None:
    adata = null_screen(seed, measured)
    training = {"max_steps": 30, "accelerator": "cpu", "progress_bar": False}
    fitted = vc.tl.fit_state(
        adata, **LABELS, se=False, n_top_genes=None, validate=False, size="small", training=training
    )
    assert n_found(adata, fitted) <= 1


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("model", ["ContextMean", "PerturbationMean", "Additive"])
def test_no_effect_in_little_differential_expression_out_of_a_baseline(model: str, measured: bool) -> None:
    """Baselines do not shrink what they measured, and so predict its noise: fewer than 5 % of genes differ."""
    found = []
    for seed in range(10):
        adata = null_screen(seed, measured)
        found.append(n_found(adata, vc.tl.fit_baseline(adata, model, **LABELS, scale="counts")))
    assert np.mean(found) < 0.05 * 60
