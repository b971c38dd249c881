from __future__ import annotations

import logging
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from virtualcell.train import TrainingPlan, run_training

WEIGHT = torch.tensor([[1.0, -2.0, 0.5]])


class Model:
    """What scvi's runner asks of a model."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1, bias=False))
        self.is_trained_, self.history_, self.trainer = False, None, None

    def to_device(self, device: torch.device) -> None:
        self.module.to(device)


def loader(n_batches: int, seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_batches, 8, 3, generator=generator)
    return DataLoader([{"x": b, "y": b @ WEIGHT.T} for b in x], batch_size=None, shuffle=False)


class Loss:
    """Mean square error that counts its training steps."""

    def __init__(self) -> None:
        self.n_training, self.n_validation = 0, 0

    def __call__(self, network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.n_training += network.training
        self.n_validation += not network.training
        error = network(batch["x"]) - batch["y"]
        return {"loss": error.square().mean(), "loss_absolute": error.abs().mean()}


OPTIONS = {
    "max_epochs": None,
    "max_steps": None,
    "default_steps": 5,
    "lr": 0.05,
    "weight_decay": 0.0,
    "gradient_clip": 10.0,
    "early_stopping": False,
    "early_stopping_patience": 2,
    "accelerator": "cpu",
    "devices": 1,
    "precision": "32-true",
    "seed": 0,
    "enable_progress_bar": False,
}


def train(
    model: Model, loss: object, n_batches: int = 3, validation: DataLoader | None = None, **options: object
) -> None:
    run_training(model, loss, loader(n_batches), validation, **{**OPTIONS, **options})


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


# -- the schedule -----------------------------------------------------------------------------------------------------


def plan(**options: object) -> TrainingPlan:
    return TrainingPlan(nn.Linear(1, 1), Loss(), **{"n_steps": 1000, "lr": 1e-3, **options})


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
    rates = [plan(n_steps=n_steps).rate(step) for step in range(n_steps)]
    assert rates[0] == 1  # one step of warm-up
    assert all(0 < r <= 1 for r in rates)


def test_optimizer_is_adamw_whose_rate_changes_every_step() -> None:
    p = plan(weight_decay=0.02)
    built = p.configure_optimizers()
    assert isinstance(built["optimizer"], torch.optim.AdamW)
    assert built["optimizer"].defaults["weight_decay"] == 0.02
    assert built["optimizer"].defaults["eps"] == 1e-8  # scvi's own plan has 0.01
    assert built["lr_scheduler"]["interval"] == "step"
    assert built["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-3 * p.rate(0))


# -- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 5),  # default_steps, over an incomplete second epoch
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 2, "max_steps": 100}, 6),
        ({"max_epochs": 100, "max_steps": 4}, 4),
        ({"max_steps": 1}, 1),
    ],
)
def test_length_is_whichever_ends_first(options: dict, steps: int) -> None:
    model, loss = Model(), Loss()
    train(model, loss, **options)
    assert loss.n_training == steps
    assert model.trainer.global_step == steps
    assert model.is_trained_
    assert not model.module.training
    assert len(model.history_["train_loss"]) == math.ceil(steps / 3)


def test_rate_at_the_last_step_is_that_of_the_schedule() -> None:
    model = Model()
    train(model, Loss(), max_steps=20)
    rate = model.trainer.optimizers[0].param_groups[0]["lr"]  # after the last step: that of the step to come
    assert rate == pytest.approx(0.0, abs=1e-9)


def test_training_finds_the_weights() -> None:
    model = Model()
    train(model, Loss(), n_batches=20, max_epochs=25)
    torch.testing.assert_close(model.module[1].weight.data, WEIGHT, atol=1e-3, rtol=0)
    values = model.history_["train_loss"].iloc[:, 0].to_numpy(dtype=float)
    assert values[-1] < 1e-4 < values[0]


def test_history_holds_every_loss_of_both_stages() -> None:
    model = Model()
    train(model, Loss(), validation=loader(2, seed=1), max_epochs=4)
    expected = {f"{stage}_{name}" for stage in ("train", "validation") for name in ("loss", "loss_absolute")}
    assert expected <= set(model.history_)
    for name in expected:
        assert len(model.history_[name]) == 4
        assert np.isfinite(model.history_[name].to_numpy(dtype=float)).all()
    # the value after the last epoch, computed anew
    losses = [Loss()(model.module, batch)["loss"].item() for batch in loader(2, seed=1)]
    assert model.history_["validation_loss"].iloc[-1, 0] == pytest.approx(np.mean(losses), rel=1e-4)


def test_validation_is_looked_at_some_twenty_times() -> None:
    model, loss = Model(), Loss()
    train(model, loss, n_batches=1, validation=loader(1, seed=1), max_epochs=60)
    assert 20 <= len(model.history_["validation_loss"].dropna()) <= 30


def test_early_stopping_ends_a_training_that_no_longer_gains() -> None:
    model, loss = Model(), Loss()
    train(
        model,
        loss,
        validation=loader(1, seed=1),
        max_epochs=200,
        lr=1e-12,
        early_stopping=True,
        early_stopping_patience=3,
        early_stopping_min_delta=1e-6,
    )
    assert loss.n_training <= 5 * 3
    assert model.is_trained_


def test_same_seed_same_weights_and_the_global_generators_are_left_alone() -> None:
    def weights(seed: int) -> Tensor:
        model = Model(dropout=0.5)
        random.seed(1)
        np.random.seed(2)  # noqa: NPY002
        torch.manual_seed(3)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        train(model, Loss(), seed=seed)
        assert random.getstate() == before[0]
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])
        return model.module[1].weight.detach().clone()

    first = weights(0)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_gradients_are_clipped() -> None:
    model, start = Model(), Model().module[1].weight.detach()
    # Adam's step does not depend on the gradient's size, its moments do
    train(model, Loss(), max_steps=1, gradient_clip=1e-3)
    moment = model.trainer.optimizers[0].state[model.module[1].weight]["exp_avg"]
    assert moment.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert not torch.equal(model.module[1].weight, start)


def test_training_leaves_no_files_behind(tmp_path: Path) -> None:
    train(Model(), Loss(), validation=loader(1, seed=1), max_epochs=2)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_say_what_to_do() -> None:
    model = Model()
    with pytest.raises(
        ValueError, match=r"early_stopping=True needs validation cells: give val_fraction > 0 or a split"
    ):
        train(model, Loss(), early_stopping=True)
    with pytest.raises(ValueError, match=r"early_stopping=True judges at the end of an epoch, which has \d+ steps"):
        train(model, Loss(), validation=loader(1, seed=1), early_stopping=True, max_steps=1)
    with pytest.raises(ValueError, match="nothing to train on: no perturbed training cells with matching controls"):
        run_training(model, Loss(), [], None, **OPTIONS)
    with pytest.raises(ValueError, match=r"max_epochs=None, max_steps=0: at least one step is needed"):
        train(model, Loss(), max_steps=0)
    with pytest.raises(ValueError, match=r"max_epochs=0, max_steps=10"):
        train(model, Loss(), max_epochs=0, max_steps=10)
    assert not model.is_trained_
