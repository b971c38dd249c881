"""Fit several models on the same splits, genes and cells, and score them beside a floor and the ceiling."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import models as _models
from virtualcell._design import Design, Scale, check_library_sizes, expression_modality
from virtualcell._errors import UnknownNameError, unknown_name
from virtualcell.data._matrix import log_expression
from virtualcell.models._base import PerturbationModel
from virtualcell.models._baselines import ShiftModel
from virtualcell.models._feature_baselines import FeatureShiftModel
from virtualcell.pp import split as split_cells
from virtualcell.tl._evaluate import evaluate
from virtualcell.tl._fit import _check_controls, _enough_cells, _genes, _read_obs, _targets, fit_state

logger = logging.getLogger(__name__)

Spec = str | type[PerturbationModel] | tuple[str | type[PerturbationModel], dict]

COLUMNS = ["split", "seed", "source", "model", "context", "perturbation", "metric", "value"]
CEILING = "ceiling"
_SPLIT = "_split"
_MOST = np.float32(np.log1p(1e4))  # `evaluate` refuses a matrix above as being on another scale


def benchmark(
    adata: AnnData | MuData,
    models: Sequence[str] | Mapping[str, Spec],
    *,
    perturbation_key: str,
    control: str,
    context_key: str | None = None,
    batch_key: str | None = None,
    split_key: str | None = None,
    splits: Mapping[str, str | Mapping] | None = None,
    suite: Literal["vcc2025", "full"] | Sequence[str] = "full",
    seeds: Sequence[int] = (0, 1, 2),
    floor: Sequence[str] = ("NoChange", "PerturbationMean"),
    ceiling: bool = True,
    perturbation_features: pd.DataFrame | None = None,
    layer: str | None = None,
    scale: Scale = "counts",
    library_size_key: str | None = None,
    n_top_genes: int | None = 2000,
    min_cells: int = 10,
    n_cells: int | None = None,
    n_jobs: int = 1,
    modality: str = "rna",
) -> pd.DataFrame:
    """Fit models on splits of the data and score what they predict for the test cells.

    All models of a split work on the same normalised matrix, and on the same genes, which are chosen on its training
    cells. Test cells are scored and nothing else. Predictions above log(1 + 10,000), the most that a gene can have in
    a cell, are cut there, with a warning. `adata` is not changed.

    Parameters
    ----------
    adata
        Cells x genes of a screen, or a MuData with it in `modality`.
    models
        Names in :mod:`virtualcell.models` (`["ST", "Additive"]`), or a dictionary from the name to show to such a
        name, to a class, or to a pair of either and keyword arguments. For ST these are the arguments of
        :func:`virtualcell.tl.fit_state`, `{"published": ("ST", {"model_kwargs": {"residual": "hidden"}})}`; for others
        those of the class.
    perturbation_key, control, context_key, batch_key
        Columns of `obs`, and the label of control cells. Only ST uses the batch.
    split_key, splits
        Column with `train`, `val` and `test`, from :func:`virtualcell.pp.split`; or several splits, from a name to such
        a column or to what to hold out (`{"K562 unseen": {"contexts": ["K562"]}}`). One of the two.
    suite
        "vcc2025", "full", or names of metrics, as in :func:`virtualcell.tl.evaluate`.
    seeds
        ST is fitted once with each; baselines, in which nothing is random, once, under the first. The ceiling takes its
        halves by each.
    floor
        Models to fit beside, which any other has to beat.
    ceiling
        Score halves of the test cells against each other too.
    perturbation_features
        Features per perturbation, for the models that take them: Ridge, NearestPerturbations and ST. For an ST without,
        give it `{"perturbation_features": None}`.
    layer, scale, library_size_key
        Where the expression is, whether it is "counts" or "log1p", and the column with the library size.
    n_top_genes
        Highly variable genes of the training cells to model, and the targets; `None` for all.
    min_cells
        Perturbations with fewer training cells are not learned from.
    n_cells
        Predicted cells per perturbation and context; by default one for every control cell.
    n_jobs
        Threads of the scoring.
    modality
        Expression modality of a MuData.

    Returns
    -------
    One row per `split`, `seed`, `source` ("model", "floor" or "ceiling"), `model`, `context`, `perturbation` and
    `metric`, with its `value`. A model that cannot predict a test perturbation of a split, as Additive one that was
    never measured, is left out of that split, with a warning. `.attrs` has what was asked for, and the number of genes
    of each split. Drawn by :func:`virtualcell.pl.benchmark`.

    Raises
    ------
    KeyError
        For an unknown model, metric, column or label.
    ValueError
        If no split or no seed is given, or the data does not fit what was stated.
    """
    specs = _specs(models, floor)
    if not len(seeds):
        raise ValueError("seeds=() is empty: give at least one, seeds=(0,).")
    if suite == "vcc2026":
        raise ValueError(
            "suite='vcc2026' scores raw counts, which baselines do not predict. Say 'full' or 'vcc2025', or make "
            "counts of a prediction and call `vc.tl.evaluate`."
        )
    design = Design(
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        batch_key=batch_key,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
    )
    check_library_sizes(scale, library_size_key)
    data, adata = adata, expression_modality(adata, modality)
    matrix = log_expression(adata, layer=layer, scale=scale, library_size_key=library_size_key)
    frames, n_genes = [], {}
    for name, obs, split in _splits(data, design, split_key, splits, modality):
        has_features = perturbation_features is not None
        seen = (split != "test") & _enough_cells(obs[perturbation_key], split, control, min_cells, has_features)
        _check_controls(obs, seen, design)
        # the targets of the test cells too: which genes they are is known beforehand
        genes = _genes(
            matrix, adata.var_names, seen, _targets(adata, obs[perturbation_key], control, None), n_top_genes
        )
        n_genes[name] = len(genes)
        work = AnnData(matrix[:, adata.var_names.get_indexer(genes)], obs=obs.copy(), var=pd.DataFrame(index=genes))
        work.obs[_SPLIT] = np.where(seen, split, "test")
        is_control = (obs[perturbation_key] == control).to_numpy()
        test = (split == "test") & ~is_control
        if not test.any():
            raise ValueError(f"split {name!r} has no test cells. Hold something out with `vc.pp.split`.")
        real = work[test | is_control].copy()
        perturbations = sorted(set(obs.loc[test, perturbation_key]))
        run = {"features": perturbation_features, "min_cells": min_cells}
        score = {"suite": suite, "n_jobs": n_jobs, "design": design}
        missing = set(seeds) if ceiling else set()  # seeds for which the ceiling is still to be taken
        for label, (kind, kwargs, source) in specs.items():
            deterministic = issubclass(kind, ShiftModel)
            for seed in seeds:
                if deterministic and seed != seeds[0] and seed not in missing:
                    continue
                if not deterministic or seed == seeds[0]:
                    model = _fit(work, kind, kwargs, design, seed=seed, **run)
                    if (reason := _cannot(model, perturbations)) is not None:
                        logger.warning("%s is left out of split %r: %s", label, name, reason)
                        break
                    predicted = _predict(model, real, design, n_cells=n_cells, seed=seed)
                scores = _score(predicted, real, ceiling=seed in missing, seed=seed, **score)
                missing.discard(seed)
                if deterministic and seed != seeds[0]:
                    scores = scores[scores["source"] == CEILING]
                is_model = scores["source"] == "model"
                scores["model"] = np.where(is_model, label, CEILING)
                scores["source"] = np.where(is_model, source, CEILING)
                frames.append(scores.assign(split=name, seed=seed))
            logger.info("Split %r: %s is done.", name, label)
    if not frames:
        raise ValueError("none of the models can predict the test cells of any split; the log says why for each.")
    out = pd.concat(frames, ignore_index=True)[COLUMNS]
    out.attrs = {
        "suite": suite if isinstance(suite, str) else list(suite),
        "perturbation_key": perturbation_key,
        "control": control,
        "context_key": context_key,
        "models": [n for n, (_, _, source) in specs.items() if source == "model"],
        "floor": list(floor),
        "seeds": [int(s) for s in seeds],
        "n_genes": n_genes,
    }
    return out


def _specs(models: Sequence[str] | Mapping[str, Spec], floor: Sequence[str]) -> dict[str, tuple[type, dict, str]]:
    """Class, arguments and source of each model by the name to show, those with something random in them first."""
    if isinstance(models, str):
        raise TypeError(f"models={models!r} must be a list of names, [{models!r}], or a dictionary.")
    given = dict(models) if isinstance(models, Mapping) else {name: name for name in models}
    out = {}
    for source, wanted in (("model", given), ("floor", {name: name for name in floor if name not in given})):
        for label, spec in wanted.items():
            kind, kwargs = spec if isinstance(spec, tuple) else (spec, {})
            known = {n: k for n in _models.__all__ if issubclass(k := getattr(_models, n), PerturbationModel)}
            if isinstance(kind, str):
                if kind not in known:
                    raise unknown_name("models" if source == "model" else "floor", kind, known)
                kind = known[kind]
            if not (inspect.isclass(kind) and issubclass(kind, PerturbationModel)):
                raise TypeError(f"models[{label!r}]={kind!r} must be the name or the class of a model.")
            out[label] = kind, dict(kwargs), "floor" if label in floor else source
    if not given:
        raise ValueError(f"models={models!r} names no model.")
    # the ceiling comes with the first score of each seed, so that a model fitted with every seed saves a round
    return dict(sorted(out.items(), key=lambda item: issubclass(item[1][0], ShiftModel)))


def _splits(
    data: AnnData | MuData,
    design: Design,
    split_key: str | None,
    splits: Mapping[str, str | Mapping] | None,
    modality: str,
) -> Iterator[tuple[str, pd.DataFrame, np.ndarray]]:
    """Name, labels and split of the cells."""
    if (split_key is None) == (splits is None):
        raise ValueError(
            "give either split_key=, a column of obs that `vc.pp.split` wrote, or splits=, such as "
            "{'K562 unseen': {'contexts': ['K562']}}."
        )
    if splits is not None and not len(splits):
        raise ValueError("splits={} holds nothing: name at least one, {'K562 unseen': {'contexts': ['K562']}}.")
    for name, how in ({split_key: split_key} if splits is None else splits).items():
        obs, split = _read_obs(data, design, how if isinstance(how, str) else None, modality)
        if not isinstance(how, str):
            cells = AnnData(obs=obs)
            keys = {k: getattr(design, k) for k in ("perturbation_key", "control", "context_key")}
            split_cells(cells, **keys, holdout=how, key_added=_SPLIT)
            split = cells.obs[_SPLIT].to_numpy().astype(str)
        yield name, obs, split


def _fit(
    work: AnnData, kind: type, kwargs: dict, design: Design, *, features: pd.DataFrame | None, min_cells: int, seed: int
) -> PerturbationModel:
    """Fit a model on the cells of `work` that are not test."""
    keys = {k: getattr(design, k) for k in ("perturbation_key", "control", "context_key")} | {"split_key": _SPLIT}
    if issubclass(kind, _models.ST):
        defaults = {
            "batch_key": design.batch_key,
            "perturbation_features": features,
            "min_cells": min_cells,
            "se": False,
            "store_model": False,
            "validate": False,
            "enable_progress_bar": False,
        }
        return fit_state(work, **keys, scale="log1p", n_top_genes=None, seed=seed, **{**defaults, **kwargs})
    if issubclass(kind, FeatureShiftModel):
        kwargs = {"perturbation_features": features, **kwargs}
    kind.setup_anndata(work, **keys)
    model = kind(work, **kwargs)
    model.train()
    model.forget_data()
    return model


def _cannot(model: PerturbationModel, perturbations: Sequence[str]) -> UnknownNameError | None:
    """Say why a model cannot predict one of these, if so."""
    for perturbation in perturbations:
        try:
            model.check_perturbation(perturbation)
        except UnknownNameError as reason:
            return reason
    return None


def _predict(
    model: PerturbationModel, real: AnnData, design: Design, *, n_cells: int | None, seed: int
) -> tuple[np.ndarray, pd.DataFrame]:
    """Predict every perturbation and context of `real` from its control cells: expression and labels."""
    keys = [k for k in (design.perturbation_key, design.context_key) if k is not None]
    is_control = (real.obs[design.perturbation_key] == design.control).to_numpy()
    pairs = real.obs.loc[~is_control, keys].drop_duplicates().sort_values(keys)
    controls = real[is_control].copy()
    cells, labels = [], []
    for pair in pairs.itertuples(index=False):
        context = pair[1] if len(pair) > 1 else None
        predicted = model.predict(controls, pair[0], context=context, n_cells=n_cells, seed=seed)
        cells.append(predicted[list(real.var_names)].to_numpy(np.float32))
        labels.append(pd.DataFrame([pair] * len(predicted), columns=keys))
    expression = np.concatenate(cells)
    if (beyond := int((expression > _MOST).sum())) > 0:
        logger.warning("%r predicts more than all counts of a cell in %d entries; cut to that.", model, beyond)
    return np.minimum(expression, _MOST), pd.concat(labels, ignore_index=True)


def _score(
    predicted: tuple[np.ndarray, pd.DataFrame],
    real: AnnData,
    *,
    suite: str | Sequence[str],
    design: Design,
    ceiling: bool,
    n_jobs: int,
    seed: int,
) -> pd.DataFrame:
    cells, obs = predicted
    adata = AnnData(
        cells, obs=obs.set_index("predicted_" + obs.index.astype(str)), var=pd.DataFrame(index=real.var_names)
    )
    return evaluate(
        adata,
        real,
        perturbation_key=design.perturbation_key,
        control=design.control,
        context_key=design.context_key,
        suite=suite,
        scale="log1p",
        ceiling=ceiling,
        n_jobs=n_jobs,
        seed=seed,
    )
