from __future__ import annotations

import math
import platform

import numpy as np
import pytest
import torch
from torch import nn

from virtualcell.train import TrainOptions
from virtualcell.train._plan import Means, TrainingPlan, keep_memory


def plan(**options: object) -> TrainingPlan:
    given = TrainOptions.from_(options, max_steps=1000, lr=1e-3, batch_size=8)
    return TrainingPlan(nn.Linear(1, 1), lambda network, batch: {}, None, given)


@pytest.mark.parametrize("final", [0.0, 0.3])
def test_rate_rises_from_a_third_and_falls_along_a_cosine(final: float) -> None:
    p = plan(final_lr=final, warmup=0.03)
    rates = np.array([p.rate(step) for step in range(1001)])
    assert rates[0] == pytest.approx(1 / 3, abs=0.03)
    assert rates[29] == pytest.approx(1)
    np.testing.assert_allclose(np.diff(rates[:30]), 2 / 90)  # 30 steps of warm-up, in a line
    assert (np.diff(rates[30:]) <= 0).all()
    for share in (0, 0.25, 0.5, 1):
        expected = final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
        assert p.rate(round(30 + share * 970)) == pytest.approx(expected, abs=2e-3)
    assert rates[1000] == pytest.approx(final, abs=1e-12)
    assert p.rate(5000) == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 10])
def test_rate_of_short_trainings_is_between_a_third_and_one(n_steps: int) -> None:
    rates = [plan(max_steps=n_steps).rate(step) for step in range(n_steps)]
    assert rates[0] == 1  # one step of warm-up
    assert all(0 < r <= 1 for r in rates)


def test_optimizer_is_adamw() -> None:
    optimizer = plan(weight_decay=0.02).configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 0.02
    assert optimizer.defaults["eps"] == 1e-8  # scvi's own plan has 0.01


@pytest.mark.parametrize(("max_steps", "every"), [(1, 1), (9, 1), (100, 5), (12345, 617)])
def test_some_twenty_validations_unless_told_otherwise(max_steps: int, every: int) -> None:
    assert plan(max_steps=max_steps).validate_every == every
    assert plan(max_steps=max_steps, validate_every=7).validate_every == 7


def test_means_are_weighted_and_remember_the_first_bad_batch() -> None:
    means = Means(torch.device("cpu"))
    for i, (value, weight) in enumerate([(1.0, 3), (5.0, 1), (math.inf, 1), (math.nan, 1)]):
        if i == 2:
            assert float(means.sums["loss"]) / means.weight == 2
        means.add({"loss": torch.tensor(value)}, i, weight=weight)
    assert int(means.first_bad) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has its own ways")
def test_memory_of_a_step_is_not_fetched_anew() -> None:
    import resource

    def fetched() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_memory()
    fetched()
    assert fetched() < 10 * 8 * 1024 / 10  # pages of 4 KiB
