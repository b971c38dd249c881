from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from virtualcell.models._perturbations import PerturbationTable
from virtualcell.models._prior import BANDWIDTHS, ShiftPrior, _bandwidth
from virtualcell.models._shifts import shift_table

CONTROL = "ctrl"


@pytest.fixture
def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts a and b alike, c unlike; the effect of P in c is another than in a and b."""
    rng = np.random.default_rng(0)
    profile = {c: rng.gamma(2, 1, 40) for c in "ac"}
    profile["b"] = profile["a"] + rng.normal(0, 0.05, 40).clip(-0.1)
    effect = {"a": rng.normal(0, 0.5, 40), "c": rng.normal(0, 0.5, 40)}
    effect["b"] = effect["a"]
    rows, perturbation, context = [], [], []
    for c in "abc":
        for p, n in ((CONTROL, 60), ("P", 30), ("Q", 20)):
            mean = profile[c] + {"P": effect[c], "Q": 0.5 * effect["c"]}.get(p, 0)
            rows.append(np.maximum(mean + rng.normal(0, 0.05, (n, 40)), 0))
            perturbation += [p] * n
            context += [c] * n
    return np.concatenate(rows).astype(np.float32), np.array(perturbation), np.array(context)


def fit(cells, kind="similar", keep=None, features=None) -> tuple[ShiftPrior, dict]:
    matrix, perturbation, context = cells
    keep = np.ones(len(context), bool) if keep is None else keep
    table = shift_table(matrix, perturbation, context, control=CONTROL, mask=keep)
    base = {c: matrix[(context == c) & (perturbation == CONTROL)].mean(axis=0) for c in "abc"}
    return ShiftPrior.fit(table, kind, features), base


def test_similar_contexts_decide(cells):
    matrix, perturbation, context = cells
    prior, base = fit(cells, keep=~((context == "b") & (perturbation != CONTROL)))
    scale, shift = prior("P", control=CONTROL, context="b", base=base["b"])
    predicted = base["b"] * scale + shift
    observed = matrix[(context == "b") & (perturbation == "P")].mean(axis=0)
    average, _ = fit(cells, "additive", keep=~((context == "b") & (perturbation != CONTROL)))
    far = base["b"] + average("P", control=CONTROL, context="b", base=base["b"])[1]
    # two contexts tell nothing of the bandwidth, so that both weigh the same; with a narrow one it is a that is copied
    narrow = ShiftPrior(**{**vars(prior), "bandwidth": BANDWIDTHS[0]})
    scale, shift = narrow("P", control=CONTROL, context="b", base=base["b"])
    assert np.abs(base["b"] * scale + shift - observed).mean() < 0.5 * np.abs(far - observed).mean()
    assert np.corrcoef(predicted - base["b"], far - base["b"])[0, 1] > 0.8


def test_the_bandwidth_is_the_one_that_predicts_left_out_contexts(cells):
    matrix, perturbation, context = cells
    assert _bandwidth(shift_table(matrix, perturbation, context, control=CONTROL)) < BANDWIDTHS[-1]
    alike = np.where(perturbation == "P", "Q", perturbation)
    assert _bandwidth(shift_table(matrix, alike, context, control=CONTROL, mask=context != "b")) == BANDWIDTHS[-1]


def test_falls_are_scaled_and_rises_are_added(cells):
    prior, base = fit(cells)
    scale, shift = prior("P", control=CONTROL, context="a", base=base["a"])
    assert ((scale == 1) | (shift == 0)).all()
    assert (scale >= 0).all()
    assert (scale <= 1).all()
    silent = np.zeros_like(base["a"])
    assert (silent * scale + shift >= 0).all()


def test_additive_is_the_additive_baseline(cells):
    prior, base = fit(cells, "additive")
    scale, shift = prior("P", control=CONTROL, context="a", base=base["a"])
    assert (scale == 1).all()
    where, row = prior.contexts.index("a"), prior.perturbations.index("P")
    np.testing.assert_allclose(shift, prior.perturbation_effects[row] + prior.context_effects[where], atol=1e-6)
    both = prior("Q+P", control=CONTROL, context="new", base=base["a"])[1]
    np.testing.assert_allclose(both, prior.perturbation_effects.sum(axis=0), atol=1e-6)


def test_the_control_does_nothing_and_the_unknown_is_unknown(cells):
    prior, base = fit(cells)
    scale, shift = prior(CONTROL, control=CONTROL, context="a", base=base["a"])
    assert (scale == 1).all()
    assert not shift.any()
    assert prior("R", control=CONTROL, context="a", base=base["a"]) is None


def test_features_reach_what_was_not_measured(cells):
    features = pd.DataFrame(np.eye(3)[[0, 1, 0]], index=["P", "Q", "R"])
    table = PerturbationTable.from_features(features, ["P", "Q"], CONTROL)
    prior, base = fit(cells, features=table)
    known = prior("R", control=CONTROL, context="a", base=base["a"], features=table)
    assert prior.measured("P", CONTROL)
    assert prior.measured("Q+P", CONTROL)
    assert not prior.measured("R", CONTROL)
    assert not prior.measured("P+R", CONTROL)
    shift = known[1] + base["a"] * (known[0] - 1)
    own = prior.perturbation_effects + prior.context_effects[prior.contexts.index("a")]
    assert np.corrcoef(shift, own[0])[0, 1] > np.corrcoef(shift, own[1])[0, 1]
