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


def test_mse_squares():
    assert metrics.mse([1.0, 2.0], [1.5, 1.0]) == pytest.approx(0.625)


def test_top_overlap_by_hand():
    control = np.ones(6)
    observed = 1.0 + np.array([3, -2, 1, 0, 0, 0])
    predicted = 1.0 + np.array([0.1, 0, 0.2, -0.3, 0, 0])
    assert metrics.top_overlap(predicted, observed, control, k=2) == 0  # 3 and 2, against 0 and 1
    assert metrics.top_overlap(predicted, observed, control, k=3) == pytest.approx(2 / 3)
    assert metrics.top_overlap(observed, observed, control, k=3) == 1
    assert metrics.top_overlap(control, observed, control, k=3) == 0  # no effect has no largest genes
    rounded = control + 1e-8 * np.arange(len(control))  # as float32 means of the same cells are
    assert metrics.top_overlap(rounded, observed, control, k=3) == 0
    assert metrics.pearson_delta(rounded, observed, control) == 0
    assert metrics.top_overlap(predicted, observed, control, k=50) == pytest.approx(0.5)


def test_errors_name_what_is_wrong(profiles):
    control, observed, _ = profiles
    for function in (metrics.mae, metrics.mse):
        with pytest.raises(ValueError, match=r"same genes, got shapes \(200,\) and \(199,\)"):
            function(observed[0], observed[0, 1:])
    with pytest.raises(ValueError, match="k=0: at least one gene"):
        metrics.top_overlap(observed[0], observed[0], control, k=0)
