"""The call people make, which answers what a perturbation would do to these cells."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.utils import make_index_unique
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._design import Design, Scale, expression_modality, labels
from virtualcell._errors import UnknownNameError, unknown_name
from virtualcell.data._matrix import log_expression, matrix_name, raw_matrix
from virtualcell.io._save import unpack
from virtualcell.models import ST
from virtualcell.models._base import PerturbationModel
from virtualcell.models._feature_baselines import load_baseline

logger = logging.getLogger(__name__)


def predict_perturbation(
    adata: AnnData | MuData,
    perturbation: str | Sequence[str] | None = None,
    *,
    drug: str | None = None,
    dose: float | None = None,
    context: str | None = None,
    model: PerturbationModel | None = None,
    n_cells: int | None = None,
    n_samples: int | None = None,
    fallback: Literal["best"] | None = None,
    layer: str | None = None,
    scale: Scale | None = None,
    library_size_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | None = None,
    context_key: str | None = None,
    batch_key: str | None = None,
    min_gene_coverage: float = 1.0,
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
    drug, dose
        In place of the name, for models whose names hold both, such as "[('Dabrafenib', 0.5, 'uM')]" of Tahoe-100M; see
        :meth:`virtualcell.models.ST.perturbation_name`.
    context
        Take the control cells of this context, which may be one where the perturbation was never measured; all contexts
        where it is `None`.
    model
        A fitted :class:`virtualcell.models.ST` or one of the baselines; by default the ST in `uns["virtualcell"]`.
    n_cells
        Predicted cells per perturbation and context; by default one for every control cell.
    n_samples
        Estimate standard errors from so many draws of the control cells (20 are plenty; each costs as much as the
        prediction), see :meth:`virtualcell.models.ST.uncertainty`.
    fallback
        "best" uses the baseline that was better than ST on the validation cells of `fit_state`, where one was;
        `uns["virtualcell"]["predicted_by"]` of the result tells which model it was.
    layer, scale, library_size_key
        Where and how expression is stored in `adata`; as at fitting where left out. Models of
        :meth:`virtualcell.models.ST.from_arc` expect log(1 + counts per 10,000) unless `scale="counts"` is stated.
    perturbation_key, control, context_key, batch_key
        Columns of `obs` and label of the control cells, where they have other names than in the model's own data.
    min_gene_coverage
        Share of the model's genes that `adata` must have, by name. Below 1.0 the missing ones enter as 0, which the
        model never saw for a gene that is expressed, and are left out of the result.
    seed
        Of the draw of control cells. The order of cells and genes in `adata` does not matter.
    modality
        Expression modality of a MuData.

    Returns
    -------
    AnnData of predicted cells x the model's genes, log(1 + counts per 10,000): `obs` has the perturbation and the
    context under the names of their columns in `adata`, and `control_barcode`, the control cell each one started from,
    whose expression is `layers["control"]`. Ready for `scanpy.tl.rank_genes_groups` and, on that scale, for
    `anndata.concat`. With `n_samples`, `layers["standard_error"]` has the standard error of the predicted mean of each
    gene (the same for all cells of a perturbation and context), and `obs["expected_error"]` the mean absolute error of
    the mean that follows from them.

    Raises
    ------
    KeyError
        For an unknown perturbation, context, gene or column; the message names the closest ones and the remedy.
    ValueError
        If there is no fitted model, or the matrix is not on the stated scale.
    """
    if context is not None and not isinstance(context, str):
        raise TypeError(f"context={context!r} must be one label, as a string; leave it out for all contexts.")
    data, adata = adata, expression_modality(adata, modality)
    model = _stored_model(adata) if model is None else model
    if not isinstance(model, PerturbationModel):
        raise TypeError(f"model={model!r} is not a fitted model. Load a saved one with `vc.models.ST.load(folder)`.")
    if drug is not None:
        if perturbation is not None:
            raise ValueError(f"perturbation={perturbation!r} and drug={drug!r} were both given: give one of them.")
        if not isinstance(model, ST):
            raise TypeError(f"drug={drug!r} is found in the names of an ST, and model is a {type(model).__name__}.")
        perturbation = model.perturbation_name(drug=drug, dose=dose)
    names = _names(perturbation)
    for name in names:
        model.check_perturbation(name)
    if fallback is not None:
        model = _better_one(model, fallback, names)
    stated = {"layer": layer, "scale": scale, "library_size_key": library_size_key}
    stated |= {"perturbation_key": perturbation_key, "control": control}
    stated |= {"context_key": context_key, "batch_key": batch_key}
    for key in ("context_key", "batch_key"):
        if stated[key] is not None and getattr(model.design, key) is None:
            raise ValueError(f"{key}={stated[key]!r} was given, but the model was set up without {key}.")
    design = dataclasses.replace(model.design, **{k: v for k, v in stated.items() if v is not None})
    work = _control_cells(data, model, design, modality, min_gene_coverage, everywhere=context is None)
    their_obs = work.obs
    work.obs = _obs_of_model(model, design, their_obs)

    genes = adata.var_names[adata.var_names.isin(model.genes)]
    predicted = []
    for name in names:
        cells = model.predict(work, name, context=context, n_cells=n_cells, seed=seed)
        obs = their_obs.loc[cells.index].rename_axis(_keys.CONTROL_BARCODE).reset_index()
        obs[design.perturbation_key] = name
        keys = [k for k in (design.perturbation_key, design.context_key, design.batch_key) if k is not None]
        # a control cell occurs several times where more cells than controls were asked for
        obs.index = make_index_unique(pd.Index([f"{barcode}-{name}" for barcode in obs[_keys.CONTROL_BARCODE]]))
        one = AnnData(cells[genes].to_numpy(np.float32), obs=obs[[*keys, _keys.CONTROL_BARCODE]])
        one.layers[_keys.CONTROL_LAYER] = work[cells.index, genes].X.toarray()
        if n_samples is not None:
            error = model.uncertainty(work, name, context=context, n_samples=n_samples, seed=seed)[genes]
            of_cell = [""] * one.n_obs if design.context_key is None else one.obs[design.context_key].astype(str)
            one.layers[_keys.STANDARD_ERROR] = error.loc[of_cell].to_numpy(np.float32)
            # the mean absolute value of a normal variable is sqrt(2 / pi) of its standard deviation
            one.obs[_keys.EXPECTED_ERROR] = np.sqrt(2 / np.pi) * error.loc[of_cell].mean(axis=1).to_numpy()
        predicted.append(one)
    out = ad.concat(predicted)
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
    out.uns[_keys.UNS] = {"design": on_this_scale.to_uns(), "predicted_by": type(model).__name__}
    out.uns["log1p"] = {}  # tells scanpy that logarithms were taken
    return out


def _names(perturbation: str | Sequence[str] | None) -> list[str]:
    names = [perturbation] if isinstance(perturbation, str) else perturbation
    listed = isinstance(names, Sequence | np.ndarray | pd.Index | pd.Series)
    if not listed or not all(isinstance(n, str) for n in names):
        raise TypeError(f"perturbation={perturbation!r} must be a name, or a list of names, as strings.")
    if not len(names):
        raise ValueError("perturbation=[] names nothing to predict.")
    return list(dict.fromkeys(names))


def _stored_model(adata: AnnData) -> ST:
    left = adata.uns.get(_keys.UNS, {})
    if "st" not in left:
        raise ValueError(
            f"uns[{_keys.UNS!r}] holds no fitted model: run `vc.tl.fit_state(adata, ...)` first, or pass model= "
            "(`vc.models.ST.load(folder)`)."
        )
    model = ST._from_saved(*unpack(left["st"]))._put_on()
    if "fallback" in left:
        model.fallback = load_baseline(*unpack(left["fallback"]))
    return model


def _better_one(model: PerturbationModel, fallback: str, names: Sequence[str]) -> PerturbationModel:
    """Return the model that did better on the validation cells of `fit_state`."""
    if fallback != "best":
        raise ValueError(f"fallback={fallback!r} is unknown; valid are 'best' and None.")
    if getattr(model, "validation", None) is None:
        raise ValueError(
            "fallback='best' needs an ST that was validated: fit it with `vc.tl.fit_state(..., validate=True)` and "
            "validation cells, or leave fallback out."
        )
    if model.fallback is None:
        return model
    for name in names:
        try:
            model.fallback.check_perturbation(name)
        except UnknownNameError as reason:
            raise UnknownNameError(
                f"fallback='best': the better model, {type(model.fallback).__name__}, cannot predict {name!r}. Leave "
                f"fallback out to have ST predict it. {reason}"
            ) from reason
    logger.warning("%s predicts: on the validation cells it was better than ST.", type(model.fallback).__name__)
    return model.fallback


def _obs_of_model(model: PerturbationModel, design: Design, obs: pd.DataFrame) -> pd.DataFrame:
    """Give columns and control label the names that the model was set up with."""
    keys = [k for k in ("perturbation_key", "context_key", "batch_key") if getattr(design, k) is not None]
    obs = pd.DataFrame({model.setup[k]: obs[getattr(design, k)] for k in keys}, index=obs.index)
    obs[model.setup["perturbation_key"]] = model.control
    return obs


def _control_cells(
    data: AnnData | MuData,
    model: PerturbationModel,
    design: Design,
    modality: str,
    min_gene_coverage: float,
    *,
    everywhere: bool,
) -> AnnData:
    """Control cells of `data`: the model's genes, log1p CP10k, and the columns of obs that it needs.

    Contexts without any are named in a warning where predictions are wanted `everywhere`.
    """
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
    if everywhere and design.context_key is not None:
        contexts = obs[design.context_key]
        if without := sorted(set(contexts) - set(contexts[is_control])):
            logger.warning("No prediction for %s, which has no control cells to start from.", ", ".join(without))
    controls = adata[is_control]
    if not controls.obs_names.is_unique:
        raise ValueError("obs_names repeats control cells. Run `adata.obs_names_make_unique()` first.")
    rep = model.setup["use_rep"]
    if rep is not None:
        min_gene_coverage = None  # genes are no input here: those that the data lacks are only left out of the result
    genes = _common_genes(adata.var_names, model.genes, min_gene_coverage)
    fewer = design.n_genes is not None and adata.n_vars < 0.9 * design.n_genes
    if fewer and design.scale == "counts" and design.library_size_key is None:
        logger.warning(
            "The data has %d genes, the training data had %d: library sizes, summed over fewer genes, come out too "
            "small and expression too large. Keep all genes, or name the true totals with library_size_key=.",
            *(adata.n_vars, design.n_genes),
        )
    matrix = log_expression(
        controls,
        genes=genes,
        layer=design.layer,
        scale=design.scale,
        library_size_key=design.library_size_key,
        target_sum=design.target_sum,
    )
    if design.scale == "log1p":
        _check_log1p(raw_matrix(controls, design.layer), design)
    if len(genes) < len(model.genes):
        place = pd.Index(model.genes).get_indexer(genes)
        shape = (len(genes), len(model.genes))
        ones = np.ones(len(genes), np.float32)
        matrix = sparse.csr_matrix(matrix @ sparse.csr_matrix((ones, (np.arange(len(genes)), place)), shape=shape))
    work = AnnData(matrix, obs=obs[is_control], var=pd.DataFrame(index=model.genes))
    if model.setup["layer"] is not None:  # where a model that was set up by hand looks
        work.layers[model.setup["layer"]] = work.X
    if rep is not None:
        if rep not in controls.obsm:
            remedy = "Run `vc.tl.embed(adata, model.se)` first." if rep == _keys.X_STATE else "Compute it first."
            raise KeyError(f"the model works on obsm[{rep!r}], which this data does not have. {remedy}")
        work.obsm[rep] = np.asarray(controls.obsm[rep], dtype=np.float32)
    return work


def _common_genes(here: pd.Index, wanted: Sequence[str], min_coverage: float | None) -> list[str]:
    """Return the model's genes that the data has, and raise where these are too few."""
    if min_coverage is not None and not 0 < min_coverage <= 1:
        raise ValueError(f"min_gene_coverage={min_coverage!r} must be above 0 and at most 1.")
    genes = [g for g in wanted if g in here]
    share = len(genes) / len(wanted)
    logger.info("%d of the model's %d genes are in the data.", len(genes), len(wanted))
    if not genes or (min_coverage is not None and share < min_coverage):
        missing = next(g for g in wanted if g not in here)
        raise unknown_name(
            "genes",
            missing,
            here,
            f"{len(wanted) - len(genes)} of {len(wanted)} genes are missing; they are matched by name. Coverage is "
            f"{share:.1%}, below min_gene_coverage={min_coverage}: lower it to fill missing genes with 0.",
        )
    if share < 1:
        how = "left out of the result" if min_coverage is None else "filled with 0"
        logger.warning("%d of the model's genes are %s.", len(wanted) - len(genes), how)
    return genes


def _check_log1p(matrix: sparse.csr_matrix, design: Design) -> None:
    """Raise where log1p was stated, but cells do not add up to 10,000 counts or fewer."""
    where = matrix_name(design.layer)
    counts = matrix.expm1()
    total = float(np.median(np.asarray(counts.sum(axis=1))))
    if abs(total / design.target_sum - 1) > 0.05 and np.allclose(counts.data, np.rint(counts.data), rtol=0, atol=0.01):
        raise ValueError(
            f"scale='log1p', but {where} holds logarithms of whole numbers: of raw counts, not divided by their total. "
            "Give the raw counts, with scale='counts'."
        )
    if total > 1.05 * design.target_sum:
        raise ValueError(
            f"scale='log1p', but {where} holds {total:.4g} counts per cell (median) and not {design.target_sum:g}: it "
            "was normalised to another total. Normalise anew from raw counts, or give those with scale='counts'."
        )
