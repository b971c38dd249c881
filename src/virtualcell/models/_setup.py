"""Data registered with scvi-tools, and the design that was stated there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

import numpy as np
from anndata import AnnData
from mudata import MuData
from scvi.data import AnnDataManager
from scvi.data import fields as scvi_fields
from scvi.model.base import BaseModelClass

from virtualcell.data._design import Design
from virtualcell.data._labels import expression_modality
from virtualcell.data._registry import scvi_registry
from virtualcell.data._screen import Screen


def registry_without_cells(kind: str, design: Design, genes: Sequence[str]) -> dict:
    """Return the registry of a model that knows the design and genes of cells to come, and no cells."""
    states: dict[str, dict] = {role: {"categorical_mapping": []} for role in _ROLES}
    states["X"] = {"column_names": [str(gene) for gene in genes]}
    return scvi_registry(kind, {**asdict(design), "modality": "rna"}, states)


def register(
    cls: type[BaseModelClass], data: AnnData | MuData, setup_method_args: dict, modality: str | None = None
) -> None:
    """Check data and register its matrix and labels for a class of models; a MuData is one with a `modality`."""
    setup = setup_method_args["setup_args"]
    _check(data, design_of(setup), modality or "rna")
    if modality is None:
        found = [scvi_fields.LayerField("X", setup["layer"], is_count_data=False)]
        found += [scvi_fields.CategoricalObsField(role, setup[f"{role}_key"]) for role in _ROLES]
        if setup["use_rep"] is not None:
            found.append(scvi_fields.ObsmField("rep", setup["use_rep"]))
    else:
        here = {"mod_key": modality, "mod_required": True}
        found = [scvi_fields.MuDataLayerField("X", setup["layer"], is_count_data=False, **here)]
        columns = expression_modality(data, modality).obs.columns
        for role in _ROLES:
            key = setup[f"{role}_key"]
            mod_key = modality if key is None or key in columns else None
            found.append(scvi_fields.MuDataCategoricalObsField(role, key, mod_key=mod_key))
        if setup["use_rep"] is not None:
            found.append(scvi_fields.MuDataObsmField("rep", setup["use_rep"], **here))
    manager = AnnDataManager(fields=found, setup_method_args=setup_method_args)
    manager.register_fields(data)
    cls.register_manager(manager)


_ROLES = ("perturbation", "context", "batch")


def design_of(setup: dict) -> Design:
    """Return the design that was stated at `setup_anndata`."""
    known = {f.name for f in fields(Design)}
    return Design(**{"scale": "log1p", **{k: v for k, v in setup.items() if k in known}})


def named_registry(registry: dict, screen: Screen) -> dict:
    """Return a registry of scvi-tools with the names of perturbations, contexts and batches in place of their labels.

    Data is not needed to predict from a saved model, and the names tell what it knows.
    """
    states, ours = dict(registry["field_registries"]), screen.registry("")["field_registries"]
    for role in _ROLES:
        states[role] = {**states[role], "state_registry": ours[role]["state_registry"]}
    setup = registry["setup_args"] | {k: getattr(screen.design, k) for k in ("control", "other_controls")}
    return {**registry, "field_registries": states, "setup_args": setup}


def _check(data: AnnData | MuData, design: Design, modality: str) -> None:
    """Raise for what would otherwise be found out in the middle of a training."""
    screen = Screen.from_anndata(data, design, modality=modality)
    screen.require_unique_names()
    screen.require_control()
    if not screen.is_train.any():
        raise ValueError(f"split_key={design.split_key!r} marks no cell as 'train'.")
    screen.expression.rows(np.arange(1))  # the first reading checks the whole matrix
