"""ST trained by two processes is ST trained by one."""

from __future__ import annotations

import numpy as np
import pytest

from virtualcell.models import ST

# nothing is drawn by the processes themselves, and the contrast compares the sets of both
NETWORK = {"dropout": 0.0, "n_hidden": 32, "n_feedforward": 32, "set_size": 8, "n_networks": 2}
TRAINING = {"max_steps": 12, "lr": 3e-3, "batch_size": 4, "validate_every": 4, "contrast_weight": 1.0}


@pytest.fixture(scope="module")
def models(session_screen, build) -> list[ST]:
    """The same model trained by one process and by two."""
    models = []
    for processes in ({"devices": 1}, {"devices": 2, "strategy": "ddp_spawn"}):
        st = build(session_screen.copy(), setup={"batch_key": "batch"}, **NETWORK)
        st.train(**TRAINING, **processes, accelerator="cpu", progress_bar=False)
        models.append(st)
    return models


def test_two_processes_make_the_loss_curve_of_one(models):
    one, two = models
    assert set(one.history) == set(two.history) >= {"train_loss", "train_loss_contrast", "validation_loss"}
    for name, table in one.history.items():
        assert list(table.index) == list(two.history[name].index) == [4, 8, 12]
        np.testing.assert_allclose(two.history[name], table, rtol=1e-4, err_msg=name)
    contrast = one.history["train_loss_contrast"]["train_loss_contrast"]
    assert contrast.iloc[-1] < contrast.iloc[0]


def test_two_processes_make_the_model_of_one(models, session_screen, targets):
    one, two = models
    assert two.is_trained
    for a, b in zip(one.module.state_dict().values(), two.module.state_dict().values(), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)
    np.testing.assert_allclose(two.mixture.head_weights, one.mixture.head_weights, rtol=1e-3)
    a, b = (st.predict(session_screen, targets[0], n_cells=10) for st in models)
    np.testing.assert_allclose(b, a, atol=1e-3)
