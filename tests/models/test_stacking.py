from __future__ import annotations

import numpy as np
import pytest

from virtualcell.models._stacking import WEIGHTS, choose_weight, errors_of_weights


def chosen(*, n_folds=5, n_per_fold=6, networks=1.0, transferred=1.0, seed=0, of_fold=0.0) -> float:
    """Weight for parts that err by so much, each in its own way, in folds that differ by `of_fold`."""
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(n_folds):
        harder = np.exp(of_fold * rng.normal())
        for _ in range(n_per_fold):
            observed = rng.normal(size=200)
            parts = (observed + size * harder * rng.normal(size=200) for size in (networks, transferred))
            errors.append(errors_of_weights(*parts, observed))
    return choose_weight(np.stack(errors), np.repeat(np.arange(n_folds), n_per_fold))


def test_errors_of_every_weight_by_hand():
    rng = np.random.default_rng(0)
    networks, transferred, observed = rng.normal(size=(3, 40))
    found = errors_of_weights(networks, transferred, observed)
    assert found.shape == (len(WEIGHTS),)
    for weight, error in zip(WEIGHTS, found, strict=True):
        assert error == pytest.approx(np.square(weight * networks + (1 - weight) * transferred - observed).sum())
    assert (WEIGHTS[0], WEIGHTS[-1]) == (0, 1)
    assert list(WEIGHTS) == sorted(WEIGHTS)


@pytest.mark.parametrize("n_folds", [1, 2, 3, 5])
def test_networks_that_are_noise_get_nothing_and_networks_that_are_right_get_all(n_folds):
    assert chosen(n_folds=n_folds, networks=3.0, transferred=0.1) == 0
    assert chosen(n_folds=n_folds, networks=0.0, transferred=1.0) == 1


def test_two_that_err_alike_in_their_own_ways_share():
    assert 0 < chosen(networks=1.0, transferred=1.0) < 1


def test_ties_go_to_the_smaller_weight():
    errors = np.ones((10, len(WEIGHTS)))
    assert choose_weight(errors, np.arange(10)) == 0
    errors[:, 0] = 2
    assert choose_weight(errors, np.arange(10)) == WEIGHTS[1]


def test_better_by_less_than_a_standard_error_is_not_better():
    """Over contexts networks are sometimes better and sometimes worse: they have not earned their weight."""
    gain = np.array([0.5, -0.35, 0.2, -0.3, 0.05])
    errors = 1 - np.outer(gain, np.array(WEIGHTS))
    assert gain.mean() > 0
    assert choose_weight(errors, np.arange(5)) == 0
    assert choose_weight(1 - np.outer(gain + 0.4, WEIGHTS), np.arange(5)) == 1


def test_a_single_prediction_goes_by_the_least_error():
    errors = np.array([[3.0, 2.0, 1.0, 2.0, 3.0]])
    assert choose_weight(errors, np.zeros(1, int)) == WEIGHTS[2]


def test_large_effects_count_for_more():
    """What is chosen has the least squared error over all that was left out, as the score of a model has."""
    gain, sizes = np.tile([0.3, -0.25, -0.25, -0.25, -0.25], 6), np.tile([100.0, 1, 1, 1, 1], 6)
    folds = np.repeat(np.arange(6), 5)
    relative = 1 - np.outer(gain, np.array(WEIGHTS))
    assert choose_weight(sizes[:, None] * relative, folds) > 0
    assert choose_weight(relative, folds) == 0


def test_predictions_of_one_fold_are_not_independent():
    """Networks that win in two contexts of three, with every perturbation there, have not earned their weight."""
    gain = np.repeat([0.4, 0.35, -0.35], 50) + 0.02 * np.random.default_rng(0).normal(size=150)
    errors = 1 - np.outer(gain, np.array(WEIGHTS))
    assert choose_weight(errors, np.repeat(np.arange(3), 50)) == 0
    assert choose_weight(errors, np.arange(150)) > 0


def test_order_of_predictions_decides_nothing():
    rng = np.random.default_rng(1)
    errors, order = rng.gamma(2, size=(30, len(WEIGHTS))), rng.permutation(30)
    folds = np.arange(30) % 4
    assert choose_weight(errors, folds) == choose_weight(errors[order], folds[order])
