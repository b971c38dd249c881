from __future__ import annotations

import numpy as np
import pytest

from virtualcell import metrics


@pytest.fixture
def profiles():
    rng = np.random.default_rng(0)
    control = rng.gamma(1, 1, 200)
    observed = control + rng.normal(0, 1, (6, 200))
    return control, observed, observed + rng.normal(0, 0.8, (6, 200))


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_discrimination_counts_the_real_effects_that_lie_nearer(profiles, metric):
    control, observed, predicted = profiles
    distance = {
        "l1": lambda a, b: np.abs(a - b).sum(),
        "l2": lambda a, b: np.sqrt(((a - b) ** 2).sum()),
        "cosine": lambda a, b: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b),
    }[metric]
    expected = []
    for p in range(6):
        d = [distance(predicted[p] - control, observed[q] - control) for q in range(6)]
        expected.append(1 - sum(x < d[p] for x in d) / 6)
    np.testing.assert_allclose(metrics.discrimination_score(predicted, observed, control, metric=metric), expected)
    assert (metrics.discrimination_score(observed, observed, control, metric=metric) == 1).all()


def test_discrimination_of_one_prediction_for_all_is_chance(profiles):
    control, observed, _ = profiles
    same = np.tile(observed.mean(axis=0), (6, 1))
    assert metrics.discrimination_score(same, observed, control).mean() == pytest.approx(1 - 2.5 / 6)
    # no effect at all has no direction: every distance ties, and half of the others count as nearer
    np.testing.assert_allclose(
        metrics.discrimination_score(np.tile(control, (6, 1)), observed, control, metric="cosine"), 1 - 2.5 / 6
    )


def test_discrimination_leaves_the_targets_own_gene_out(profiles):
    control, observed, _ = profiles
    predicted = observed.copy()
    predicted[0, 3] += 1e4  # wrong only in the gene that was perturbed
    assert metrics.discrimination_score(predicted, observed, control, target_genes=[3, -1, -1, -1, -1, -1])[0] == 1
    away = observed.copy()
    away[1:, 3] += 1e4
    assert metrics.discrimination_score(predicted, away, control)[0] < 1


def test_ties_count_half_or_nothing(profiles):
    control, observed, _ = profiles
    same = np.tile(control, (6, 1))
    half = metrics.discrimination_score(same, observed, control, metric="cosine", ties="midrank")
    none = metrics.discrimination_score(same, observed, control, metric="cosine", ties="rank")
    np.testing.assert_allclose(half, 1 - 2.5 / 6)
    rounded = same + 1e-9 * np.random.default_rng(1).normal(size=same.shape)
    np.testing.assert_array_equal(metrics.discrimination_score(rounded, observed, control, metric="cosine"), half)
    np.testing.assert_allclose(none, 1)


def test_pdisc_norm_is_1_for_perfect_and_0_for_chance(profiles):
    control, observed, predicted = profiles
    scores = metrics.discrimination_score(predicted, observed, control)
    np.testing.assert_allclose(metrics.pdisc_norm(scores), 1 - 2 * (1 - scores))
    np.testing.assert_allclose(metrics.pdisc_norm([1, 0.5, 0]), [1, 0, -1])


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_leaving_a_gene_out_is_having_it_removed(profiles, metric):
    control, observed, predicted = profiles
    scores = metrics.discrimination_score(predicted, observed, control, metric=metric, target_genes=np.full(6, 9))
    without = metrics.discrimination_score(
        *(np.delete(x, 9, axis=-1) for x in (predicted, observed, control)), metric=metric
    )
    np.testing.assert_allclose(scores, without)


def test_errors_name_what_is_wrong(profiles):
    control, observed, predicted = profiles
    with pytest.raises(ValueError, match=r"metric='l3' is unknown; valid are \['l1', 'l2', 'cosine'\]"):
        metrics.discrimination_score(predicted, observed, control, metric="l3")
    with pytest.raises(ValueError, match="ties='best' is unknown"):
        metrics.discrimination_score(predicted, observed, control, ties="best")
