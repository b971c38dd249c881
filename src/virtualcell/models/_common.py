"""What SE and the models of perturbations do alike: files, devices, histories, letting go of data."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model._utils import parse_device_args
from scvi.model.base import BaseModelClass
from torch import Tensor

from virtualcell._reading import as_damaged
from virtualcell._state import State
from virtualcell.data._screen import Screen
from virtualcell.io._arc import checked_parameters
from virtualcell.io._save import read_state
from virtualcell.models._fitted_on import FittedOn

KINDS: dict[str, Any] = {}  # classes that can be read from a file, by name; each enters itself
NETWORK = "network."  # beginning of the names of a network's tensors in a file


def model_of(state: State, source: str = "the file") -> BaseModelClass:
    """Build a saved model, of whatever class it is."""
    models = importlib.import_module("virtualcell.models")  # which imports this file
    for name in models.__all__:
        getattr(models, name)  # a class enters itself when its file is imported
    if state.kind not in KINDS:
        raise ValueError(f"this file holds a model of the class {state.kind!r}; known are {sorted(KINDS)}.")
    with as_damaged(source, f"saved {state.kind}", "Save the model again.", checked=True):
        return KINDS[state.kind].from_state(state)


def load_model(
    kind: type,
    folder: str | os.PathLike,
    data: AnnData | MuData | None,
    *,
    accelerator: str = "auto",
    device: int | str = "auto",
) -> BaseModelClass:
    """Read a model of the class `kind`, with the models that it carries, and put all on a device."""
    state = read_state(folder)
    if state.kind != kind.__name__:
        raise ValueError(f"this is a saved {state.kind}: load it with `vc.models.{state.kind}.load`.")
    model = model_of(state)
    model._adata = data
    return put_on(model, accelerator, device)


def put_on(model: BaseModelClass, accelerator: str = "auto", device: int | str = "auto") -> BaseModelClass:
    """Move a model's network, and those of the models it carries, to a device."""
    *_, where = parse_device_args(accelerator=accelerator, devices=device, return_device="torch")
    for one in (model, *model.parts().values()):
        one.to_device(where)
    return model


def network_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Tensors of a network under the names that they have in a file."""
    return {f"{NETWORK}{k}": v for k, v in module.state_dict().items()}


def load_network(module: torch.nn.Module, tensors: dict[str, Tensor], *, assign: bool = False) -> None:
    """Put tensors of a file into a network; with `assign` they become its own, without a copy."""
    own = {k.removeprefix(NETWORK): v for k, v in tensors.items() if k.startswith(NETWORK)}
    own = checked_parameters(own, module, known_extras=(), source="the file")
    module.load_state_dict(own, assign=assign)


def meta_of(model: BaseModelClass) -> dict:
    """Describe what every saved model has."""
    from virtualcell import __version__

    history = {
        k: {"index": v.index.tolist(), "values": v.iloc[:, 0].tolist()} for k, v in (model.history or {}).items()
    }
    return {
        "virtualcell_version": __version__,
        "registry": model.registry,
        "is_trained": bool(model.is_trained_),
        "history": history,
        "fitted_on": None if getattr(model, "fitted_on", None) is None else model.fitted_on.to_plain(),
    }


def restore_meta(model: BaseModelClass, meta: dict) -> None:
    """Give a model what :func:`meta_of` described."""
    model.is_trained_ = meta["is_trained"]
    if meta.get("fitted_on") is not None:
        model.fitted_on = FittedOn.from_plain(meta["fitted_on"])
    model.history_ = {
        k: pd.DataFrame({k: v["values"]}, index=pd.Index(v["index"], name="step")) for k, v in meta["history"].items()
    }


def forget_data(model: BaseModelClass) -> None:
    """Drop the training data, which scvi-tools would keep in memory for as long as the process lives."""
    if model._adata_manager is not None:
        model._setup_adata_manager_store.pop(model._adata_manager.adata_uuid, None)
    model._per_instance_manager_store.pop(model.id, None)
    model._adata = model._adata_manager = model.trainer = model.screen = None


def training_screen(model: BaseModelClass) -> Screen:
    """Return the cells that a model was built on, or that it was loaded with."""
    if model.screen is None and model.adata is not None:
        model.screen = Screen.from_anndata(model.adata, model.design, modality=model.modality, genes=model.genes)
        model.screen.require_unique_names()
        model.screen.require_control()
    if model.screen is None:
        raise ValueError(
            "this model holds no data to train on: it was loaded without, or `vc.tl.fit_state` let go of it. Give data "
            "to `load` as adata=, or build a new model on data that was set up."
        )
    return model.screen


def require_finite(model: BaseModelClass, predicted: np.ndarray, perturbation: str, context: str) -> None:
    """Raise where a prediction holds NaN or infinite values."""
    if not np.isfinite(predicted).all():
        raise FloatingPointError(
            f"{type(model).__name__} predicts NaN or infinite values for {perturbation!r} in context {context!r}. Look "
            "for such values in the control cells (and their obsm), or train again with a lower learning rate."
        )


def summary(model: BaseModelClass) -> str:
    """One line about a model."""
    return (model._model_summary_string + ("" if model.is_trained_ else " Not trained yet.")).strip()
