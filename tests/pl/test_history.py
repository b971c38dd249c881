from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc


@pytest.fixture
def history() -> dict[str, pd.DataFrame]:
    epoch = pd.Index(range(20), name="epoch")
    validation = pd.Series(np.square(np.arange(20) - 12.0) + 3, index=epoch).where(np.arange(20) % 2 == 0)
    return {
        "train_loss_step": pd.DataFrame({"train_loss_step": [1.0]}),
        "train_loss_epoch": pd.DataFrame({"train_loss_epoch": np.arange(20, 0, -1.0)}, index=epoch, dtype=object),
        "validation_loss": validation,
        "lr": pd.DataFrame({"lr": np.ones(20)}, index=epoch),
    }


def test_curves_and_the_best_epoch(history):
    ax = vc.pl.training_history(SimpleNamespace(history=history))
    train, validation, best = ax.lines
    np.testing.assert_array_equal(train.get_ydata(), np.arange(20, 0, -1))
    np.testing.assert_array_equal(validation.get_xdata(), np.arange(0, 20, 2))  # validated every other epoch
    assert (best.get_xdata(), best.get_ydata()) == ([12], [3.0])
    assert [t.get_text() for t in ax.get_legend().texts] == ["train", "validation", "lowest: 3 (epoch 12)"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")


def test_a_history_over_steps_says_so(history):
    steps = {k: pd.DataFrame(v).rename_axis("step") for k, v in history.items()}
    ax = vc.pl.training_history(steps)
    assert ax.get_xlabel() == "step"
    assert ax.get_legend().texts[-1].get_text() == "lowest: 3 (step 12)"


def test_metrics_are_chosen_and_axes_are_used(history):
    _, ax = plt.subplots()
    assert vc.pl.training_history(history, metrics=["lr"], ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    assert [line.get_label() for line in ax.lines] == ["lr"]
    assert ax.get_ylabel() == "value"


def test_scvi_history(kang_control_file):
    import anndata as ad
    import scvi

    adata = ad.read_h5ad(kang_control_file)[:200, :50].copy()
    adata = adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_hidden=8, n_latent=2)
    with pytest.raises(ValueError, match=r"SCVI has no training history. Train the model first"):
        vc.pl.training_history(model)
    model.train(3, check_val_every_n_epoch=1, accelerator="cpu", enable_progress_bar=False)
    ax = vc.pl.training_history(model)
    assert [t.get_text() for t in ax.get_legend().texts][:2] == ["train", "validation"]
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["train"], model.history["train_loss"].iloc[:, 0].astype(float))
    np.testing.assert_allclose(lines["validation"], model.history["validation_loss"].iloc[:, 0].astype(float))


def test_errors(history):
    with pytest.raises(KeyError, match=r"metrics='validation_los' is unknown. Did you mean 'validation_loss'"):
        vc.pl.training_history(history, metrics=["validation_los"])
    with pytest.raises(ValueError, match=r"has no train_loss_epoch or .*, only \['lr', 'train_loss_step'\]. Name some"):
        vc.pl.training_history({k: history[k] for k in ("lr", "train_loss_step")})
    with pytest.raises(ValueError, match="8 metrics do not fit one picture; name at most 7"):
        vc.pl.training_history(history, metrics=["lr"] * 8)
