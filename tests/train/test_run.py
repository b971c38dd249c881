from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from virtualcell.train import TrainOptions, fit

sys.path.insert(0, str(Path(__file__).parent))  # where spawned processes find it too
from regression import WEIGHT, Network, Regression, results, square_loss

sys.path.pop(0)


def options(**given: object) -> TrainOptions:
    return TrainOptions.from_(
        given, max_steps=10, lr=0.05, weight_decay=0.0, batch_size=8, accelerator="cpu", progress_bar=False
    )


def train(network: Network, loss: object = square_loss, *, batches: object = None, **given: object) -> dict:
    validation = given.pop("validation", None)
    return fit(network, loss, batches or Regression(), options(**given), validation=validation)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class CountedLoss:
    """Mean square error that notes the learning mode of each call."""

    def __init__(self) -> None:
        self.training: list[bool] = []

    def __call__(self, network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.training.append(network.training)
        return square_loss(network, batch)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_training_finds_the_weights() -> None:
    network = Network()
    history = train(network, max_steps=500)
    torch.testing.assert_close(network.line.weight.data, WEIGHT, atol=1e-3, rtol=0)
    losses = history["train_loss"]["train_loss"]
    assert losses.iloc[-1] < 1e-4 < losses.iloc[0]
    assert not network.training


@pytest.mark.parametrize("n_steps", [1, 2, 7, 45])
def test_as_many_steps_as_asked_for_in_the_order_of_their_numbers(n_steps: int) -> None:
    shown = []

    class Noted(Regression):
        def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
            shown.append((i, rank, world_size, device.type))
            return super().step(i, rank, world_size, device)

    train(Network(), batches=Noted(), max_steps=n_steps)
    assert shown == [(i, 0, 1, "cpu") for i in range(n_steps)]


def test_equal_to_a_plain_loop_of_adamw_with_clipped_gradients() -> None:
    network, plain = Network(), Network()
    train(network, max_steps=30, gradient_clip=0.5, weight_decay=0.1, warmup=0.1, final_lr=0.2)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1)
    for i in range(30):
        rate = (1 + 2 * (i + 1) / 3) / 3 if i < 3 else 0.2 + 0.4 * (1 + np.cos(np.pi * (i - 3) / 27))
        optimizer.param_groups[0]["lr"] = 0.05 * rate
        optimizer.zero_grad()
        square_loss(plain, Regression().step(i, 0, 1, torch.device("cpu")))["loss"].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(network.line.weight, plain.line.weight, rtol=1e-6, atol=1e-6)


# -- history and validation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"max_steps": 10, "validate_every": 4}, [4, 8, 10]),
        ({"max_steps": 8, "validate_every": 4}, [4, 8]),
        ({"max_steps": 3, "validate_every": 100}, [3]),
        ({"max_steps": 1}, [1]),
        ({"max_steps": 60}, list(range(3, 61, 3))),
        ({"max_steps": 61}, [*range(3, 61, 3), 61]),
    ],
)
def test_validation_every_so_many_steps_and_at_the_end(given: dict, steps: list) -> None:
    network, loss = Network(), CountedLoss()
    validation = Regression(n_steps=2, seed=1)
    history = train(network, loss, validation=validation, **given)
    assert loss.training.count(False) == 2 * len(steps)
    assert loss.training.count(True) == steps[-1]
    assert set(history) == {f"{s}_{n}" for s in ("train", "validation") for n in ("loss", "loss_absolute")}
    for name, table in history.items():
        assert list(table.columns) == [name]
        pd.testing.assert_index_equal(table.index, pd.Index(steps, name="step"))
    # the last value, computed anew
    losses = [square_loss(network, validation.step(i, 0, 1, torch.device("cpu")))["loss"].item() for i in range(2)]
    assert history["validation_loss"].iloc[-1, 0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_loss_is_the_mean_since_the_last_entry_with_and_without_validation() -> None:
    each = train(Network(), max_steps=11, validate_every=1)["train_loss"]["train_loss"]
    for validation in (None, Regression(n_steps=1)):
        some = train(Network(), max_steps=11, validate_every=4, validation=validation)["train_loss"]["train_loss"]
        expected = [each.iloc[0:4].mean(), each.iloc[4:8].mean(), each.iloc[8:11].mean()]
        np.testing.assert_allclose(some, expected, rtol=1e-5)


def test_validation_does_not_change_what_is_learned() -> None:
    def noisy(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return square_loss(network, {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])})

    without, often = Network(dropout=0.5), Network(dropout=0.5)
    train(without, noisy, max_steps=12)
    validation = Regression(n_steps=3, seed=1)
    history = train(often, noisy, max_steps=12, validate_every=1, validation=validation)
    assert torch.equal(without.line.weight, often.line.weight)
    # noise is the same each time: equal weights have equal validation losses
    still = train(Network(), noisy, max_steps=4, validate_every=1, lr=1e-30, validation=validation)["validation_loss"]
    assert still["validation_loss"].nunique() == 1
    assert history["validation_loss"]["validation_loss"].nunique() > 1


def test_early_stopping_ends_a_training_that_no_longer_gains(caplog: pytest.LogCaptureFixture) -> None:
    validation, loss = Regression(n_steps=1, seed=1), CountedLoss()
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        history = train(
            Network(),
            loss,
            max_steps=200,
            validate_every=5,
            lr=1e-30,
            validation=validation,
            early_stopping=True,
            patience=3,
        )
    assert loss.training.count(True) == 20  # the first validation and three without a lower loss
    assert list(history["validation_loss"].index) == [5, 10, 15, 20]
    assert "after 20 steps of 200, since the validation loss had not fallen for 3 validations" in caplog.text
    gaining = train(Network(), max_steps=60, validation=validation, early_stopping=True, patience=1)
    assert gaining["validation_loss"].index[-1] == 60


# -- losses that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "last", "kept"), [(0, 30, 0), (7, 30, 0), (26, 40, 20), (33, 40, 24), (29, 30, 28)])
def test_a_missing_value_stops_with_its_step_and_restores_the_weights(bad: int, last: int, kept: int) -> None:
    every = {0: 100, 20: 100, 24: 12, 28: 4}[kept]  # looks are every 20 steps and at every entry of the history
    network, before = Network(), Network()
    loss = CountedLoss()
    pattern = rf"not finite in step {bad + 1} of {last} \(batch number {bad}\).*lower learning rate \(lr=0.05 here\)"
    with pytest.raises(FloatingPointError, match=pattern):
        train(network, loss, batches=Regression(bad=bad), max_steps=last, validate_every=every, warmup=0, final_lr=1)
    assert len(loss.training) <= bad + 20
    if kept:  # a constant rate, but for the first step: the same as a training that ends there
        train(before, max_steps=kept, warmup=0, final_lr=1)
    torch.testing.assert_close(network.line.weight, before.line.weight, rtol=0, atol=1e-6)
    assert not network.training


def test_a_gradient_that_is_not_finite_stops_in_its_own_step() -> None:
    def root(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (network(batch["x"]) - batch["y"]).abs().mean()
        return {"loss": error + (0 * error).sqrt()}  # finite, with an infinite slope at 0

    network, before = Network(), Network()
    with pytest.raises(
        FloatingPointError, match=r"or its gradient, is not finite in step 1 of 3 .* those of the start"
    ):
        train(network, root, max_steps=3)
    assert torch.equal(network.line.weight, before.line.weight)


def test_a_validation_loss_that_is_not_finite_stops_too() -> None:
    loss = CountedLoss()
    validation = Regression(n_steps=3, seed=1, bad=1)
    with pytest.raises(
        FloatingPointError, match=r"validation loss of ST is not finite \(batch number 1\).*after step 4"
    ):
        train(Network(), loss, max_steps=10, validate_every=4, validation=validation)
    assert loss.training.count(True) == 4


def test_a_rate_far_too_high_leaves_finite_weights() -> None:
    network = Network()
    with pytest.raises(FloatingPointError, match="lr=1e\\+30"):
        train(network, max_steps=50, lr=1e30)
    assert torch.isfinite(network.line.weight).all()


# -- processes --------------------------------------------------------------------------------------------------------


def test_two_processes_make_the_same_curve_as_one() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "regression.py"), "ddp_spawn", "ddp_fork"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stderr == ""
    one, two = results("auto", "auto"), json.loads(done.stdout)
    assert len(one["history"]["validation_loss"]) == 25
    assert set(one["history"]) == set(two["history"])
    for name, values in one["history"].items():
        np.testing.assert_allclose(two["history"][name], values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two["weights"], one["weights"], atol=1e-5)
    assert one["unused_is_left_alone"]
    assert two["unused_is_left_alone"]
    # the second process alone meets the missing value, and both stop
    assert "not finite in step 23 of 25 (batch number 22)" in one["error"]
    assert two["error"] == one["error"]
    np.testing.assert_allclose(two["broken_weights"], one["broken_weights"], atol=1e-5)


def test_a_batch_that_does_not_divide_by_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=7 does not divide by 2 processes. Use batch_size=8"):
        train(Network(), batch_size=7, devices=2, strategy="ddp_spawn")


# -- what is left as it was -------------------------------------------------------------------------------------------


def test_same_seed_same_weights_and_the_global_generators_are_left_alone() -> None:
    def weights(seed: int) -> Tensor:
        network = Network(dropout=0.5)
        random.seed(1)
        np.random.seed(2)  # noqa: NPY002
        torch.manual_seed(seed + 3)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        train(network, seed=seed, validation=Regression(n_steps=1))
        assert random.getstate() == before[0]
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])
        return network.line.weight.detach().clone()

    first = weights(0)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_nothing_is_printed_or_written_but_two_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    n_threads, level = torch.get_num_threads(), logging.getLogger("lightning.pytorch").level
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Network(), validation=Regression(n_steps=1))
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in caught] == []
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        "ST is trained for 10 steps of 8, with a validation every 1, on one CPU.",
        "ST: training ended after 10 steps",
    ]
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == n_threads
    assert logging.getLogger("lightning.pytorch").level == level


def test_progress_bar_shows_name_steps_and_loss(capfd: pytest.CaptureFixture) -> None:
    train(Network(), progress_bar=True, max_steps=40)
    assert "ST, step 40 of 40, loss " in capfd.readouterr().err


def test_interrupted_training_ends_as_python_does() -> None:
    def interrupted(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Network(), interrupted)


# -- wrong arguments --------------------------------------------------------------------------------------------------


def test_wrong_arguments_say_what_to_do_before_anything_runs() -> None:
    def never(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError

    with pytest.raises(ValueError, match=r"early_stopping=True needs validation cells: .* early_stopping=False"):
        train(Network(), never, early_stopping=True)
    with pytest.raises(ValueError, match=r"validation has n_steps=0: at least one batch is needed"):
        train(Network(), never, validation=Regression(n_steps=0))
    with pytest.raises(ValueError, match="max_steps=None: a training needs it"):
        fit(Network(), never, Regression(), TrainOptions(lr=1e-3, batch_size=8))
    with pytest.raises(ValueError, match=r"precision='16-mixed' is for GPUs. Use '32-true' or 'bf16-mixed'"):
        train(Network(), never, precision="16-mixed")
    with pytest.raises(ValueError, match=r"accelerator='mps', devices='auto', strategy='auto' cannot be used here"):
        train(Network(), never, accelerator="mps")


def test_bf16_keeps_weights_in_float32() -> None:
    network = Network()
    history = train(network, max_steps=200, precision="bf16-mixed")
    assert network.line.weight.dtype == torch.float32
    assert history["train_loss"].iloc[-1, 0] < 0.01
