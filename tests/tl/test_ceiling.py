"""The corrected ceiling is what the truth scores, on data of which the truth is known."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.tl._ceiling import CORRECTIONS, Sizes

KEYS = {"perturbation_key": "target", "control": "ctrl", "scale": "log1p"}
CLOSED = ["pearson_delta", "pearson_delta_top50_de", "mae", "mae_delta", "mse", "mse_delta"]
RANKS = ["discrimination_l1", "discrimination_l2", "discrimination_cosine", "pdisc_norm_l1"]
N_GENES, N_PERTURBATIONS = 300, 12


def screen(n: int, effect: float, *, n_predicted: int, seed: int, n_control: int = 300) -> list[ad.AnnData]:
    """Many cells of the truth, as the prediction, and few observed ones; overdispersed counts on a log scale."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(0.5, 1, N_GENES) + 1e-3
    rate = {"ctrl": base}
    for p in range(N_PERTURBATIONS):
        rate[f"p{p}"] = base * np.exp(rng.normal(0, effect, N_GENES) * (rng.random(N_GENES) < 0.2))

    def cells(sizes: dict[str, int]) -> ad.AnnData:
        drawn = [rng.poisson(3000 / base.sum() * rate[k] * rng.gamma(4, 0.25, (m, N_GENES))) for k, m in sizes.items()]
        labels = np.repeat(list(sizes), list(sizes.values()))
        obs = pd.DataFrame({"target": labels}, index=[f"cell{i}" for i in range(len(labels))])
        var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
        return ad.AnnData(np.log1p(np.concatenate(drawn) / 0.9).astype(np.float32), obs=obs, var=var)

    perturbed = [k for k in rate if k != "ctrl"]
    return [cells(dict.fromkeys(perturbed, n_predicted)), cells({**dict.fromkeys(perturbed, n), "ctrl": n_control})]


def means(screens: list[list[ad.AnnData]], suite: list[str], **options) -> pd.DataFrame:
    scored = [vc.tl.evaluate(*s, **KEYS, suite=suite, ceiling=True, **options) for s in screens]
    return pd.concat(scored).groupby(["metric", "source"])["value"].mean().unstack()


@pytest.fixture(scope="module")
def strong() -> pd.DataFrame:
    return means([screen(40, 0.3, n_predicted=1200, seed=s) for s in range(2)], [*CLOSED, *RANKS])


@pytest.fixture(scope="module")
def weak() -> pd.DataFrame:
    return means([screen(41, 0.1, n_predicted=1200, seed=s) for s in range(2)], [*CLOSED, *RANKS])


@pytest.mark.parametrize("effects", ["strong", "weak"])
def test_the_corrected_ceiling_is_the_score_of_the_truth(effects, request):
    found = request.getfixturevalue(effects)
    off = (found["corrected ceiling"] / found["model"] - 1).abs()
    for metric in ("mae", "mae_delta", "mse", "mse_delta", "pearson_delta"):  # 3 % of the noise is the prediction's
        assert off[metric] < 0.05, metric
    for metric in RANKS[:3]:
        assert off[metric] < 0.15, metric  # a rough guide, see below
    assert off["pearson_delta_top50_de"] < 0.15  # its genes are chosen by what is scored
    # halves alone are far from it
    raw = found["ceiling"] / found["model"] - 1
    assert (raw[["mae", "mse"]] > 0.9).all()
    assert raw["pearson_delta"] < -0.3


def test_halves_of_weak_effects_are_not_told_apart_as_the_truth_is(weak):
    raw = weak["ceiling"] / weak["model"] - 1
    better = weak["corrected ceiling"] / weak["model"] - 1
    assert (raw[RANKS[:3]] < -0.15).all()
    assert (better[RANKS[:3]] > raw[RANKS[:3]] + 0.05).all()
    assert (better[RANKS[:3]] < 0.02).all()  # short of the truth, not beyond
    norm = weak.loc[["discrimination_l1", "pdisc_norm_l1"], "corrected ceiling"].to_numpy()
    assert norm[1] == pytest.approx(2 * norm[0] - 1)


def test_without_effects_the_truth_is_not_told_apart_either():
    """What control cells do by chance, both sides share: it is part of the effect in the model's score too."""
    found = means([screen(30, 0.0, n_predicted=600, seed=s) for s in range(2)], ["pearson_delta", "discrimination_l2"])
    assert found.loc["discrimination_l2", "corrected ceiling"] == pytest.approx(0.55, abs=0.1)
    assert found.loc["pearson_delta", "corrected ceiling"] == pytest.approx(
        found.loc["pearson_delta", "model"], abs=0.1
    )


def test_the_energy_of_the_truth_depends_on_how_many_cells_are_predicted():
    few, many = (
        means([screen(40, 0.3, n_predicted=n, seed=0)], ["energy_distance"]).loc["energy_distance"] for n in (20, 400)
    )
    for found in (few, many):
        assert found["corrected ceiling"] == pytest.approx(found["model"], rel=0.05)
    assert many["ceiling"] > 3 * many["model"]
    assert few["corrected ceiling"] > 2 * many["corrected ceiling"]


def test_own_controls_of_either_half():
    """A prediction with control cells of its own, which are as good as all there are."""
    predicted, observed = screen(40, 0.3, n_predicted=600, seed=0)
    controls = screen(2, 0.3, n_predicted=2, seed=0, n_control=3000)[1]
    controls = controls[(controls.obs["target"] == "ctrl").to_numpy()]
    predicted = ad.concat([predicted, controls], index_unique="-")
    found = means([[predicted, observed]], ["pearson_delta", "mse_delta"], predicted_control=True)
    off = (found["corrected ceiling"] / found["model"] - 1).abs()
    assert off["pearson_delta"] < 0.06
    assert off["mse_delta"] < 0.06


def test_metrics_without_a_correction_have_no_row():
    predicted, observed = screen(20, 0.5, n_predicted=40, seed=0)
    scores = vc.tl.evaluate(predicted, observed, **KEYS, suite="full", ceiling=True)
    has = {s: set(scores.loc[scores["source"] == s, "metric"]) for s in ("ceiling", "corrected ceiling")}
    assert has["corrected ceiling"] < has["ceiling"]
    assert not {m for m in has["corrected ceiling"] if m.startswith("de_")}
    for left_out in ("mmd", "energy_distance_pca", "variance_ratio", "pearson_edistance", "top50_overlap"):
        assert left_out not in has["corrected ceiling"], left_out
    table = vc.tl.summarize(scores).set_index("metric")
    assert table.loc["mae", "ceiling_corrected"] < table.loc["mae", "ceiling"]
    assert np.isnan(table.loc["de_overlap", "ceiling_corrected"])


def test_a_perturbation_of_one_cell_has_no_ceiling(caplog):
    predicted, observed = screen(10, 0.5, n_predicted=20, seed=0)
    of_one = np.flatnonzero((observed.obs["target"] == "p0").to_numpy())[1:]
    observed = observed[np.setdiff1d(np.arange(observed.n_obs), of_one)].copy()
    with caplog.at_level(logging.WARNING):
        scores = vc.tl.evaluate(predicted, observed, **KEYS, suite=["mae"], ceiling=True)
    assert "1 perturbations of (all) have one cell and no ceiling" in caplog.text
    for source in ("ceiling", "corrected ceiling"):
        assert set(scores.loc[scores["source"] == source, "perturbation"]) == {f"p{p}" for p in range(1, 12)}


def test_closed_forms_by_hand():
    n = Sizes(whole=np.array([40, 3]), half=np.array([20, 1]), predicted=np.array([80, 80]))
    ones = np.ones(2)
    np.testing.assert_allclose(CORRECTIONS["mse"](ones, n), [1 / 4, 1 / 6])
    np.testing.assert_allclose(CORRECTIONS["mae"](ones, n), [1 / 2, 1 / 6**0.5])
    r = CORRECTIONS["pearson_delta"](np.array([0.5, 0.5]), n)
    np.testing.assert_allclose(np.square(r), [2 * 0.5 / 1.5, 3 * 0.5 / 2])
    np.testing.assert_array_equal(CORRECTIONS["pearson_delta"](np.array([-0.2, np.nan]), n), [-0.2, np.nan])
    np.testing.assert_allclose(CORRECTIONS["energy_distance"](ones, n), [10 * (1 / 80 + 1 / 40), (1 / 80 + 1 / 3) / 2])
