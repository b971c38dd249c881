"""The call people make, which answers what a perturbation would do to these cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._design import Design, Scale, expression_modality, labels
from virtualcell.data._matrix import log_expression
from virtualcell.io._save import unpack
from virtualcell.models import ST
from virtualcell.models._base import PerturbationModel


def predict_perturbation(
    adata: AnnData | MuData,
    perturbation: str | Sequence[str],
    *,
    context: str | None = None,
    model: PerturbationModel | None = None,
    n_cells: int | None = None,
    layer: str | None = None,
    scale: Scale | None = None,
    library_size_key: str | None = None,
    seed: int = 0,
    modality: str = "rna",
) -> AnnData:
    """Predict the cells that a perturbation would make of the control cells.

    Parameters
    ----------
    adata
        Data that :func:`virtualcell.tl.fit_state` was run on, or, with `model`, any data with control cells, the
        model's genes and the same columns of `obs`. It is not changed.
    perturbation
        Name of a perturbation, a combination `A+B`, or several names.
    context
        Take the control cells of this context, which may be one where the perturbation was never measured; all contexts
        where it is `None`.
    model
        A fitted :class:`virtualcell.models.ST` or one of the baselines; by default the ST in `uns["virtualcell"]`.
    n_cells
        Predicted cells per perturbation and context; by default one for every control cell.
    layer, scale, library_size_key
        Where and how expression is stored in `adata`; as at fitting where left out.
    seed
        Of the draw of control cells. The order of cells and genes in `adata` does not matter.
    modality
        Expression modality of a MuData.

    Returns
    -------
    AnnData of predicted cells x the model's genes, log(1 + counts per 10,000): `obs` has the perturbation and the
    context under the names of their columns in `adata`, and `control_barcode`, the control cell each one started from,
    whose expression is `layers["control"]`. Ready for `scanpy.tl.rank_genes_groups` and, on that scale, `anndata.concat`.

    Raises
    ------
    KeyError
        For an unknown perturbation, context, gene or column; the message names the closest ones and the remedy.
    ValueError
        If there is no fitted model, or the matrix is not on the stated scale.
    """
    names = [perturbation] if isinstance(perturbation, str) else list(perturbation)
    if not names:
        raise ValueError("perturbation=[] names nothing to predict.")
    data, adata = adata, expression_modality(adata, modality)
    model = _stored_model(adata) if model is None else model
    for name in names:
        model.check_perturbation(name)
    stated = {"layer": layer, "scale": scale, "library_size_key": library_size_key}
    design = dataclasses.replace(model.design, **{k: v for k, v in stated.items() if v is not None})
    work = _control_cells(data, model, design, modality)

    genes = [g for g in adata.var_names if g in set(model.genes)]
    predicted = []
    for name in names:
        cells = model.predict(work, name, context=context, n_cells=n_cells, seed=seed)
        obs = work.obs.loc[cells.index].rename_axis(_keys.CONTROL_BARCODE).reset_index()
        obs[design.perturbation_key] = name
        keys = [k for k in (design.perturbation_key, design.context_key, design.batch_key) if k is not None]
        one = AnnData(cells[genes].to_numpy(np.float32), obs=obs[[*keys, _keys.CONTROL_BARCODE]])
        one.layers[_keys.CONTROL_LAYER] = work[cells.index, genes].X.toarray()
        predicted.append(one)
    out = ad.concat(predicted)
    out.obs_names = pd.Index(
        out.obs[_keys.CONTROL_BARCODE].astype(str) + "-" + out.obs[design.perturbation_key].astype(str)
    )
    out.obs_names_make_unique()
    out.var = adata.var.loc[genes].copy()
    for key in keys:
        out.obs[key] = pd.Categorical(out.obs[key])
    on_this_scale = Design(
        perturbation_key=design.perturbation_key,
        control=design.control,
        context_key=design.context_key,
        batch_key=design.batch_key,
        scale="log1p",
    )
    out.uns[_keys.UNS] = {"design": on_this_scale.to_uns()}
    out.uns["log1p"] = {}  # tells scanpy that logarithms were taken
    return out


def _stored_model(adata: AnnData) -> ST:
    left = adata.uns.get(_keys.UNS, {})
    if "st" not in left:
        raise ValueError(
            f"uns[{_keys.UNS!r}] holds no fitted model: run `vc.tl.fit_state(adata, ...)` first, or pass model= "
            "(`vc.models.ST.load(folder)`)."
        )
    return ST._from_saved(*unpack(left["st"]))


def _control_cells(data: AnnData | MuData, model: PerturbationModel, design: Design, modality: str) -> AnnData:
    """Control cells of `data` as the model knows them: its genes, log1p CP10k, its columns of obs."""
    adata = expression_modality(data, modality)
    roles = {"perturbation_key": design.perturbation_key}
    roles |= {r: getattr(design, r) for r in ("context_key", "batch_key") if getattr(design, r) is not None}
    obs = pd.DataFrame(
        {key: labels(data, key, argument=role, modality=modality) for role, key in roles.items()}, index=adata.obs_names
    )
    is_control = (obs[design.perturbation_key] == design.control).to_numpy()
    if not is_control.any():
        raise ValueError(
            f"obs[{design.perturbation_key!r}] has no {design.control!r} cells: predictions start from control cells."
        )
    controls = adata[is_control]
    work = AnnData(
        log_expression(
            controls,
            genes=model.genes,
            layer=design.layer,
            scale=design.scale,
            library_size_key=design.library_size_key,
            target_sum=design.target_sum,
        ),
        obs=obs[is_control],
        var=pd.DataFrame(index=model.genes),
    )
    rep = model.setup["use_rep"]
    if rep is not None:
        if rep not in controls.obsm:
            remedy = "Run `vc.tl.embed(adata, model.se)` first." if rep == _keys.X_STATE else "Compute it first."
            raise KeyError(f"the model works on obsm[{rep!r}], which this data does not have. {remedy}")
        work.obsm[rep] = np.asarray(controls.obsm[rep], dtype=np.float32)
    return work
