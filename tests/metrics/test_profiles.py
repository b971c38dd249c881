from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from virtualcell import metrics


@pytest.fixture
def profiles():
    rng = np.random.default_rng(0)
    control = rng.gamma(1, 1, 200)
    observed = control + rng.normal(0, 1, (6, 200))
    return control, observed, observed + rng.normal(0, 0.8, (6, 200))


def test_pearson_delta_is_the_correlation_of_effects(profiles):
    control, observed, predicted = profiles
    r = stats.pearsonr(predicted[0] - control, observed[0] - control).statistic
    assert metrics.pearson_delta(predicted[0], observed[0], control) == pytest.approx(r)


def test_pearson_delta_of_no_effect_is_zero_also_after_rounding(profiles):
    control, observed, _ = profiles
    assert metrics.pearson_delta(control, observed[0], control) == 0
    assert metrics.pearson_delta(control.astype(np.float32), observed[0], control) == 0


def test_mae_is_in_the_unit_of_the_profiles():
    assert metrics.mae([1.0, 2.0], [1.5, 1.0]) == pytest.approx(0.75)


def test_energy_distance_against_a_loop_over_all_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 5)), rng.normal(1, 2, size=(9, 5))

    def mean_distance(a, b):
        return np.mean([np.sqrt(((p - q) ** 2).sum()) for p in a for q in b])

    expected = mean_distance(x, y) - mean_distance(x, x) / 2 - mean_distance(y, y) / 2
    assert metrics.energy_distance(x, y) == pytest.approx(expected)
    assert metrics.energy_distance(x, x) == pytest.approx(0)


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


def test_errors_name_what_is_wrong(profiles):
    control, observed, predicted = profiles
    with pytest.raises(ValueError, match=r"same genes, got shapes \(200,\) and \(199,\)"):
        metrics.mae(observed[0], observed[0, 1:])
    with pytest.raises(ValueError, match=r"metric='l3' is unknown; valid are \['l1', 'l2', 'cosine'\]"):
        metrics.discrimination_score(predicted, observed, control, metric="l3")
    with pytest.raises(ValueError, match="cells x the same genes"):
        metrics.energy_distance(observed, observed[:, 1:])
