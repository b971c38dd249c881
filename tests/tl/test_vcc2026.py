from __future__ import annotations

import builtins
import dataclasses
import logging
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.data._on_disk import CSROnDisk

cell_eval2 = pytest.importorskip("cell_eval2")
from cell_eval2 import anchor, baseline, competition, score  # noqa: E402

STRONG = ["STAT1", "JAK2", "IFNGR1", "IRF1", "CUL3"]
KEYS = {"perturbation_key": "target_gene", "control": "non-targeting"}
COUNTS = {**KEYS, "scale": "counts", "predicted_scale": "counts", "suite": "vcc2026"}


@pytest.fixture(scope="module")
def halves(papalexi_halves):
    """Without control cells among the predicted ones; the official scorer needs strong effects for its scale."""
    strong = [h[h.obs["target_gene"].isin([*STRONG, "non-targeting"]).to_numpy()].copy() for h in papalexi_halves]
    return strong[0][(strong[0].obs["target_gene"] != "non-targeting").to_numpy()].copy(), *strong


@pytest.fixture(scope="module")
def scores(halves):
    return vc.tl.evaluate(halves[0], halves[2], **COUNTS, baseline="generic", ceiling=True)


@pytest.fixture(scope="module")
def config():
    preset = cell_eval2.EvalConfig.from_preset("vcc2026")
    return dataclasses.replace(preset, pert_col="target_gene", control="non-targeting", num_threads=1)


@pytest.fixture(scope="module")
def direct(halves, config):
    """cell-eval2 itself, called on the files as they are: the half brings control cells that it does not look at."""
    return cell_eval2.compute_metrics(*halves[1:], config=config)


def test_it_is_what_the_official_scorer_says(scores, direct):
    expected = pd.DataFrame(direct.to_dict(as_series=False)).set_index(["perturbation", "metric"])["value"]
    model = scores[scores["source"] == "model"].set_index(["perturbation", "metric"])["value"]
    np.testing.assert_allclose(model.loc[expected.index], expected, rtol=1e-12)
    total = dict(zip(*(cell_eval2.aggregate_metrics(direct)[c] for c in ("metric", "mean")), strict=True))
    extra = model.drop(expected.index)
    assert list(extra.index) == [("(all)", "expr_mse_unbiased_capped_norm")]
    assert extra.iloc[0] == pytest.approx(total["expr_mse_unbiased_capped_norm"], rel=1e-12)


def test_the_challenge_score_is_the_official_one(scores, halves, direct, config, tmp_path):
    """(u - b) / (r - b) by way of the files and checks that the official command goes through."""
    _, predicted, observed = halves
    generic = cell_eval2.build_generic_baseline(observed, config=config)
    splits, replicate = anchor.compute_replicate_anchor(observed, config=config)
    names = anchor.metric_output_names(config)
    meta = anchor.build_meta(
        real_ad=observed,
        cfg=config,
        names=names,
        base_seed=0,
        n_splits=5,
        seeds=competition.derived_seeds(),
        metrics=names,
    )
    official = cell_eval2.score_metrics(
        cell_eval2.aggregate_metrics_wide(direct, metrics=names),
        generic.agg,
        anchor=anchor.write_anchor(str(tmp_path), splits, replicate, meta=meta) or str(tmp_path),
        anchor_expect=score.expect_from_run_meta(baseline.build_run_meta(config, observed, predicted)),
    )
    expected = dict(zip(official["metric"], official["from_replicate"], strict=True))
    table = vc.tl.summarize(scores).set_index("metric")
    for name in competition.competition_members():
        assert table.loc[name, "score"] == pytest.approx(expected[name], rel=1e-9), name
    assert table.loc["challenge_score", "score"] == pytest.approx(expected["avg_score"], rel=1e-9)


def test_without_a_ceiling_it_is_the_score_against_the_baseline(halves, scores):
    alone = scores[scores["source"] != "ceiling"].copy()
    alone.attrs = scores.attrs
    table = vc.tl.summarize(alone).set_index("metric")
    u, b = table.loc["pds_cosine", ["value", "baseline"]]
    assert table.loc["pds_cosine", "score"] == pytest.approx((u - b) / (1 - b))


def test_it_needs_counts(halves):
    for stated in ({"predicted_scale": "log1p"}, {"scale": "log1p"}):
        with pytest.raises(ValueError, match="suite='vcc2026' needs raw counts on both sides"):
            vc.tl.evaluate(halves[0], halves[2], **{**COUNTS, **stated})
    fractions = halves[0].copy()
    fractions.X = fractions.X * 0.5
    with pytest.raises(ValueError, match="predicted_scale='counts' was stated, but X of predicted holds fractions"):
        vc.tl.evaluate(fractions, halves[2], **COUNTS)
    with pytest.raises(TypeError, match=r"baseline='generic' must be predicted cells.*with suite='vcc2026'"):
        vc.tl.evaluate(halves[0], halves[2], **{**COUNTS, "suite": "vcc2025"}, baseline="generic")


def test_the_baseline_of_means_is_no_reason_to_warn(caplog):
    observed = vc.datasets.synthetic(n_contexts=1, n_perturbations=3, n_genes=60, effect_size=0.6, seed=0)
    predicted = observed[observed.obs["target_gene"] != "non-targeting"].copy()
    with caplog.at_level("WARNING"):
        scores = vc.tl.evaluate(predicted, observed, **COUNTS, baseline="generic")
        assert (scores["source"] == "baseline").any()
        assert "allow_fractional_counts" not in caplog.text
        logging.getLogger("cell_eval2.run").warning("allow_fractional_counts is heard of otherwise")
    assert "allow_fractional_counts" in caplog.text


def test_without_the_scorer_the_message_says_what_to_install(halves, monkeypatch):
    real_import = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "cell_eval2":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "virtualcell.tl._vcc2026", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "virtualcell\[eval\]"'):
        vc.tl.evaluate(halves[0], halves[2], **COUNTS)


def test_cells_on_disk_are_refused_before_any_are_read_unless_they_may_be_in_memory(
    halves, scores, tmp_path, monkeypatch
):
    def read(*_):
        raise AssertionError("cells were read")

    for name, cells in (("predicted", halves[0]), ("observed", halves[2])):
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    predicted, observed = (ad.read_h5ad(tmp_path / f"{name}.h5ad", backed="r") for name in ("predicted", "observed"))
    sides = {predicted.n_obs + observed.n_obs: predicted, observed.n_obs: halves[0]}
    with monkeypatch.context() as patch, vc.settings.override(max_memory=1e-4):
        patch.setattr(CSROnDisk, "read", read)
        for n, side in sides.items():
            with pytest.raises(ValueError, match=rf"and {n} of them are not there.*max_memory=0\.0001\. Say .*'full'"):
                vc.tl.evaluate(side, observed, **COUNTS)
    found = vc.tl.evaluate(predicted, observed, **COUNTS)  # they fit
    found, expected = (
        table.set_index(["metric", "perturbation"])["value"].sort_index()
        for table in (found, scores[scores["source"] == "model"])
    )
    pd.testing.assert_series_equal(found, expected, rtol=1e-6)
