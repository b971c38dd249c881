from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import sparse

from virtualcell.models._feature_shifts import PENALTIES, nearest_perturbations, ridge
from virtualcell.models._shifts import (
    ShiftTable,
    additive,
    additive_leave_one_out,
    cosine,
    nearest_context,
    shift_table,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def effects(
    rng, *, n_contexts=4, n_perturbations=12, n_genes=30, context=0.5, noise=0.3, missing=0.0
) -> tuple[ShiftTable, np.ndarray, np.ndarray]:
    """Context + perturbation + noise, with some pairs missing; and the two parts."""
    a = context * rng.normal(size=(n_contexts, n_genes))
    b = rng.normal(size=(n_perturbations, n_genes))
    c, p = np.nonzero(rng.random((n_contexts, n_perturbations)) >= missing)
    y = a[c] + b[p] + noise * rng.normal(size=(len(c), n_genes))
    table = ShiftTable.from_effects(y, [f"c{i:02d}" for i in c], [f"p{i:02d}" for i in p])
    return table, a, b


def without(table: ShiftTable, rows: np.ndarray) -> ShiftTable:
    keep = np.setdiff1d(np.arange(len(table.shifts)), rows)
    row_fields = ("context", "perturbation", "shifts", "variance", "n_cells")
    return dataclasses.replace(table, **{f: getattr(table, f)[keep] for f in row_fields})


@pytest.mark.parametrize("cells_at_once", [1, 50, 65_536])
def test_table_against_numpy(rng, monkeypatch, cells_at_once):
    monkeypatch.setattr("virtualcell.models._shifts._CELLS_AT_ONCE", cells_at_once)
    x = rng.poisson(0.7, size=(300, 9)).astype(np.float32)
    context = rng.choice(["x", "y", "z"], 300)
    perturbation = rng.choice(["ctrl", "a", "b", "c"], 300)
    perturbation[(context == "z") & (perturbation != "ctrl")] = "a"
    mask = rng.random(300) < 0.8
    alone = np.flatnonzero((context == "y") & (perturbation == "c"))
    mask[alone] = [True, *[False] * (len(alone) - 1)]
    table = shift_table(sparse.csr_matrix(x), perturbation, context, control="ctrl", mask=mask)
    assert (table.contexts, table.perturbations) == (["x", "y", "z"], ["a", "b", "c"])
    assert list(zip(table.context, table.perturbation, strict=True)) == [
        *((c, p) for c in (0, 1) for p in (0, 1, 2)),
        (2, 0),
    ]
    groups = {
        (c, p): x[mask & (context == c) & (perturbation == p)].astype(float)
        for c in "xyz"
        for p in ("ctrl", "a", "b", "c")
    }
    pooled = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups.values() if len(g))
    pooled /= sum(len(g) - 1 for g in groups.values() if len(g))
    for i, (c, p) in enumerate(zip(table.context, table.perturbation, strict=True)):
        cells, controls = groups["xyz"[c], "abc"[p]], groups["xyz"[c], "ctrl"]
        np.testing.assert_allclose(table.shifts[i], cells.mean(0) - controls.mean(0), atol=1e-6)
        expected = cells.var(0, ddof=1) / len(cells) if len(cells) > 1 else pooled
        np.testing.assert_allclose(table.variance[i], expected, rtol=1e-5)
        assert table.n_cells[i] == len(cells)
        np.testing.assert_allclose(table.controls[c], controls.mean(0), rtol=1e-6)
        np.testing.assert_allclose(table.control_variance[c], controls.var(0, ddof=1) / len(controls), rtol=1e-5)
    dense = shift_table(x, perturbation, context, control="ctrl", mask=mask)
    np.testing.assert_array_equal(dense.shifts, table.shifts)
    assert (table.rows() >= 0).sum() == 7
    assert table.rows()[2].tolist() == [6, -1, -1]
    np.testing.assert_allclose(table.perturbation_means()[1], table.shifts[[1, 4]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(table.context_means()[2], table.shifts[6], rtol=1e-6)


def test_context_without_controls(rng):
    with pytest.raises(ValueError, match=r"context 'y' has no control cells \('ctrl'\)\. Drop it or add controls"):
        shift_table(np.ones((3, 2)), np.array(["ctrl", "a", "a"]), np.array(["x", "x", "y"]), control="ctrl")


def test_effects_in_any_order(rng):
    table, *_ = effects(rng)
    order = rng.permutation(len(table.shifts))
    names = (
        [table.contexts[i] for i in table.context[order]],
        [table.perturbations[i] for i in table.perturbation[order]],
    )
    again = ShiftTable.from_effects(table.shifts[order], *names)
    np.testing.assert_array_equal(again.shifts, table.shifts)
    with pytest.raises(ValueError, match="several effects of one perturbation in one context"):
        ShiftTable.from_effects(table.shifts[:2], ["x", "x"], ["p", "p"])


def alternating_least_squares(table: ShiftTable, penalty: float, n_rounds: int = 1000):
    """Fit context and perturbation effects by turns, as the definition says."""
    in_context = np.equal.outer(np.arange(len(table.contexts)), table.context).astype(float)
    of_perturbation = np.equal.outer(np.arange(len(table.perturbations)), table.perturbation).astype(float)
    a = np.zeros((len(table.contexts), table.shifts.shape[1]))
    for _ in range(n_rounds):
        b = of_perturbation @ (table.shifts - a[table.context])
        b /= of_perturbation.sum(axis=1, keepdims=True).clip(1)
        a = in_context @ (table.shifts - b[table.perturbation])
        a /= in_context.sum(axis=1, keepdims=True) + penalty
    return a, b


def test_additive_is_where_alternating_least_squares_ends(rng):
    table, *_ = effects(rng, missing=0.4)
    fit = additive(table)
    assert 0 < fit.shrinkage < 5
    a, b = alternating_least_squares(table, fit.shrinkage)
    np.testing.assert_allclose(fit.context, a, atol=1e-5)
    np.testing.assert_allclose(fit.perturbation, b, atol=1e-5)


def test_shrinkage_is_the_ratio_of_variances(rng):
    table, a, _ = effects(rng, n_contexts=30, n_perturbations=40, n_genes=200, context=0.2, noise=0.6, missing=0.3)
    assert additive(table).shrinkage == pytest.approx(0.6**2 / a.var(axis=0, ddof=1).mean(), rel=0.05)


def test_balanced_contexts_give_the_mean(rng):
    table, *_ = effects(rng)
    fit = additive(table)
    np.testing.assert_allclose(fit.perturbation, table.perturbation_means(), atol=1e-6)
    np.testing.assert_allclose(fit.shift([3]), table.shifts[table.perturbation == 3].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(fit.shift([3, 4]), fit.shift([3]) + fit.shift([4]), atol=1e-6)
    assert not fit.shift([], 1).any()


def test_additive_with_nothing_to_tell_contexts_apart(rng):
    one, *_ = effects(rng, n_contexts=1)
    several, *_ = effects(rng, n_perturbations=1)
    for table in (one, several):
        fit = additive(table)
        assert np.isinf(fit.shrinkage)
        assert not fit.context.any()
        np.testing.assert_allclose(fit.perturbation, table.perturbation_means(), rtol=1e-6)


def test_additive_beats_the_mean_where_contexts_are_unbalanced(rng):
    table, a, b = effects(rng, n_contexts=3, n_perturbations=30)
    held_out = np.flatnonzero((table.context == 2) & (table.perturbation >= 8))
    seen = without(table, held_out)
    truth = a[2] + b[8:]
    fit = additive(seen)
    error = np.abs(np.stack([fit.shift([p], 2) for p in range(8, 30)]) - truth).mean()
    assert error < 0.6 * np.abs(seen.perturbation_means()[8:] - truth).mean()


def test_leave_one_out_is_a_fit_without_the_row(rng):
    table, *_ = effects(rng, missing=0.5, n_perturbations=8)
    fit = additive(table)
    out = additive_leave_one_out(table, fit)
    n = np.bincount(table.perturbation, minlength=8)
    assert (n > 1).any()
    for i, (c, p) in enumerate(zip(table.context, table.perturbation, strict=True)):
        if n[p] == 1:
            assert np.isnan(out[i]).all()
            continue
        a, b = alternating_least_squares(without(table, np.array([i])), fit.shrinkage)
        np.testing.assert_allclose(out[i], a[c] + b[p], atol=1e-4)


def similar_contexts(rng, noise: float, n_genes=40):
    """Contexts in two families with alike control cells and alike effects."""
    families = rng.normal(size=(2, n_genes))
    controls = families[[0, 0, 0, 1, 1, 1]] + 0.2 * rng.normal(size=(6, n_genes))
    b = rng.normal(size=(10, n_genes))
    deviation = rng.normal(size=(2, 10, n_genes))
    y = b + deviation[[0, 0, 0, 1, 1, 1]] + noise * rng.normal(size=(6, 10, n_genes))
    c, p = np.divmod(np.arange(60), 10)
    table = ShiftTable.from_effects(y.reshape(60, -1), [f"c{i}" for i in c], [f"p{i}" for i in p], controls)
    return table, controls, y


def test_nearest_context_copies_where_similar_contexts_agree(rng):
    table, controls, y = similar_contexts(rng, noise=0.1)
    seen = without(table, np.flatnonzero(table.context == 5))
    fit = nearest_context(seen)
    assert (fit.transfer > 0.9).all()
    copied, mean = (
        np.abs(np.stack([f([p]) for p in range(10)]) - y[5]).mean()
        for f in (lambda p: fit.shift(p, controls[5]), lambda p: additive(seen).shift(p))
    )
    assert copied < 0.4 * mean
    # measured in the context itself, without error: a copy
    np.testing.assert_allclose(fit.shift([2], controls[1], context=1), y[1, 2], atol=1e-5)


def test_nearest_context_gives_the_mean_where_similarity_tells_nothing(rng):
    table, controls, _ = similar_contexts(rng, noise=0.1)
    table = dataclasses.replace(table, controls=rng.normal(size=controls.shape))
    y = rng.normal(size=table.shifts.shape).astype(np.float32)
    fit = nearest_context(dataclasses.replace(table, shifts=y))
    assert (fit.transfer < 0.1).all()


def test_own_shift_counts_by_its_reliability(rng):
    table, controls, _ = similar_contexts(rng, noise=1.0)
    noisy = dataclasses.replace(table, variance=np.full_like(table.shifts, 1.0))
    fit = nearest_context(noisy)
    # two families of three, 2 apart on average in squares: a variance of 2 / 4 * 6 / 5 beside the error of 1
    assert fit.reliability == pytest.approx(0.6 / 1.6, abs=0.03)
    mean, own = additive(noisy).shift([2], 0), table.shifts[table.rows()[0, 2]]
    expected = mean + fit.reliability[0] * (own - mean)
    np.testing.assert_allclose(fit.shift([2], controls[0], context=0), expected, atol=1e-5)
    assert (nearest_context(table).reliability == 1).all()  # no error stated


def test_ridge_against_the_normal_equations(rng):
    x, y, query = rng.normal(size=(25, 6)), rng.normal(size=(25, 4)) + 2, rng.normal(size=(3, 6))
    fit = ridge(x, y, penalties=np.array([0.3]))
    unit = ((x - x.mean(0)) ** 2).sum() / len(x)

    def solve(x, y, query):
        xm, ym = x.mean(0), y.mean(0)
        gram = (x - xm).T @ (x - xm) + 0.3 * unit * np.eye(6)
        return ym + (query - xm) @ np.linalg.solve(gram, (x - xm).T @ (y - ym))

    np.testing.assert_allclose(fit.shift(query), solve(x, y, query), rtol=1e-5)
    for i in range(25):
        rest = np.arange(25) != i
        np.testing.assert_allclose(fit.leave_one_out[i], solve(x[rest], y[rest], x[i]), rtol=1e-5)


def test_ridge_chooses_the_penalty_that_leave_one_out_would(rng):
    x = rng.normal(size=(40, 10))
    y = x @ rng.normal(size=(10, 5)) + 3 * rng.normal(size=(40, 5))
    fit = ridge(x, y)
    errors = [((ridge(x, y, penalties=np.array([p])).leave_one_out - y) ** 2).sum() for p in PENALTIES]
    assert fit.penalty == PENALTIES[np.argmin(errors)]
    assert PENALTIES[0] < fit.penalty < PENALTIES[-1]
    assert ridge(x, rng.normal(size=(40, 50))).penalty > 30 * fit.penalty  # nothing to find


def test_ridge_sums_over_combinations(rng):
    x, a = rng.normal(size=(30, 4)), rng.normal(size=(4, 3))
    pairs = rng.integers(30, size=(20, 2))
    features = np.concatenate([x, x[pairs].sum(axis=1)])
    count = np.repeat([1.0, 2.0], [30, 20])
    fit = ridge(features, features @ a + count[:, None] * 5, count)
    np.testing.assert_allclose(fit.intercept, 5, atol=0.02)
    np.testing.assert_allclose(fit.shift(x[0] + x[1], 2), (x[0] + x[1]) @ a + 10, atol=0.05)


def test_nearest_perturbations_by_hand(rng):
    features, shifts, query = rng.normal(size=(8, 3)), rng.normal(size=(8, 5)), rng.normal(size=(2, 3))
    got = nearest_perturbations(features, shifts, query, k=3)
    for q, g in zip(query, got, strict=True):
        similar = [q @ f / np.linalg.norm(q) / np.linalg.norm(f) for f in features]
        np.testing.assert_allclose(g, shifts[np.argsort(similar)[-3:]].mean(0))
    np.testing.assert_allclose(nearest_perturbations(features, shifts, query, k=50), [shifts.mean(0)] * 2)
    np.testing.assert_allclose(nearest_perturbations(features, shifts, 9 * query, k=3), got)
    with pytest.raises(ValueError, match="k=0: at least one neighbour"):
        nearest_perturbations(features, shifts, query, k=0)


def test_cosine_of_nothing_is_zero():
    assert cosine(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [[0]]
