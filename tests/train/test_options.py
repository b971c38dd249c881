from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from virtualcell._errors import UnknownNameError
from virtualcell.train import TrainOptions


def test_what_is_stated_wins_over_the_model_and_the_model_over_what_is_common() -> None:
    for given in ({"lr": 1e-4, "seed": 3}, TrainOptions(lr=1e-4, seed=3)):
        options = TrainOptions.from_(given, lr=1e-3, max_steps=600, weight_decay=0.02)
        assert (options.lr, options.seed, options.max_steps, options.weight_decay) == (1e-4, 3, 600, 0.02)
        assert (options.warmup, options.patience, options.precision, options.devices) == (0.03, 10, "32-true", "auto")
    # also where the statement is what is common anyway
    assert TrainOptions.from_(
        {"weight_decay": 0.01, "early_stopping": False}, weight_decay=0.02, early_stopping=True
    ) == (TrainOptions.from_(None, weight_decay=0.01, early_stopping=False))
    assert TrainOptions.from_({"lr": None}, lr=1e-3).lr == 1e-3


def test_completed_options_stay_as_they_are() -> None:
    options = TrainOptions.from_({"max_steps": np.int64(5), "lr": np.float32(0.1)}, batch_size=8)
    assert TrainOptions.from_(options) == options
    assert dataclasses.replace(options, lr=0.2).max_steps == 5


def test_a_misspelt_option_is_named_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"training option='max_stepz' is unknown. Did you mean 'max_steps'"):
        TrainOptions.from_({"max_stepz": 5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr=-0.001 is not a number above 0. Use a small number such as 1e-3"),
        ({"lr": 0}, "lr=0 is not a number above 0"),
        ({"lr": "fast"}, "lr='fast' is not a number"),
        ({"lr": float("nan")}, "lr=nan is not a number"),
        ({"max_steps": 0}, "max_steps=0 is not a whole number of at least 1. Leave it out to let the model decide"),
        ({"max_steps": 1e3}, "max_steps=1000.0 is not a whole number"),
        ({"max_steps": True}, "max_steps=True is not a whole number"),
        ({"batch_size": 0}, "batch_size=0 is not a whole number"),
        ({"validate_every": 0}, "validate_every=0 .* some twenty validations"),
        ({"patience": 0}, "patience=0 .* Leave it out for 10"),
        ({"seed": -1}, "seed=-1 is not a whole number of at least 0"),
        ({"weight_decay": -1}, "weight_decay=-1 is not a number of at least 0"),
        ({"warmup": 1.5}, "warmup=1.5 is not a number between 0 and 1. It is a share of the steps"),
        ({"final_lr": 3}, "final_lr=3 is not a number between 0 and 1"),
        ({"gradient_clip": -1}, "gradient_clip=-1 .* Use 0 for gradients that are not clipped"),
        ({"early_stopping": "yes"}, "early_stopping='yes' is neither True nor False"),
        ({"accelerator": "gpus"}, "accelerator='gpus' is unknown. Valid: 'auto', 'cpu', 'gpu', 'cuda', 'mps'"),
        ({"strategy": "deepspeed"}, "strategy='deepspeed' is unknown. Valid: 'auto', 'ddp', 'ddp_spawn'"),
        ({"precision": "bf16-true"}, "weights stay in float32. Use 'bf16-mixed'"),
        ({"precision": "16-true"}, "weights stay in float32. Use '16-mixed'"),
        ({"precision": "bf16"}, "precision='bf16' is unknown. Valid: '32-true', 'bf16-mixed', '16-mixed'"),
        ({"devices": 0}, "devices=0 is not a number of devices"),
        ({"devices": []}, r"devices=\[\] is not a number of devices"),
        ({"devices": "2"}, "devices='2' is not a number of devices"),
    ],
)
def test_wrong_values_say_what_to_do(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions.from_(options)
    with pytest.raises(ValueError, match=message):
        TrainOptions(**options)


def test_what_is_no_options_is_refused() -> None:
    with pytest.raises(ValueError, match="training options 5 are neither TrainOptions nor a mapping"):
        TrainOptions.from_(5)
