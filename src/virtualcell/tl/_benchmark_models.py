"""What a benchmark compares: its models, with their arguments and how they are fitted, and its splits."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import models as _models
from virtualcell._errors import UnknownNameError, unknown_name
from virtualcell.data._counts import NoCountsError, counts_of, library_of
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._base import PerturbationModel
from virtualcell.models._baselines import Baseline
from virtualcell.models._effects import Effects
from virtualcell.models._feature_baselines import FeatureBaseline
from virtualcell.models._start import Start
from virtualcell.pp import split as split_cells
from virtualcell.tl._fit_options import FitOptions, NetworkOptions, SEOptions, check_call, choose_size
from virtualcell.tl._fit_st import build_st, train_st
from virtualcell.tl._questions import Asked
from virtualcell.tl._verdict import Verdict

logger = logging.getLogger(__name__)

Spec = str | type[PerturbationModel] | tuple[str | type[PerturbationModel], dict]

VCC2026 = "vcc2026"
_OF_ST = ("perturbation_features", "init_from", "size", "network", "training")


def model_specs(
    models: Sequence[str] | Mapping[str, Spec], floor: Sequence[str], features: pd.DataFrame | None
) -> dict[str, tuple[type, dict, str]]:
    """Class, arguments and source of each model by the name to show, those with something random in them first."""
    if isinstance(models, str):
        raise TypeError(f"models={models!r} must be a list of names, [{models!r}], or a dictionary.")
    if isinstance(floor, str):
        raise TypeError(f"floor={floor!r} must be a list of names, [{floor!r}].")
    given = dict(models) if isinstance(models, Mapping) else {name: name for name in models}
    if not given:
        raise ValueError(f"models={models!r} names no model.")
    out = {}
    for source, wanted in (("model", given), ("floor", {name: name for name in floor if name not in given})):
        for label, spec in wanted.items():
            kind, kwargs = spec if isinstance(spec, tuple) else (spec, {})
            kind = _class_of(kind, source, label)
            if issubclass(kind, _models.ST | FeatureBaseline):
                kwargs = {"perturbation_features": features, **kwargs}
            _check_arguments(label, kind, kwargs)
            out[label] = kind, dict(kwargs), "floor" if label in floor else source
    # the ceiling comes with the first score of each seed, so that a model fitted with every seed saves a round
    return dict(sorted(out.items(), key=lambda item: issubclass(item[1][0], Baseline)))


def _class_of(kind: str | type, source: str, label: str) -> type[PerturbationModel]:
    known = {n: k for n in _models.__all__ if issubclass(k := getattr(_models, n), PerturbationModel)}
    if isinstance(kind, str):
        if kind not in known:
            raise unknown_name("models" if source == "model" else "floor", kind, known)
        return known[kind]
    if not (inspect.isclass(kind) and issubclass(kind, PerturbationModel)):
        raise TypeError(f"models[{label!r}]={kind!r} must be the name or the class of a model.")
    return kind


def _check_arguments(label: str, kind: type[PerturbationModel], kwargs: Mapping[str, object]) -> None:
    """Raise for arguments that a model does not take, before any model is fitted."""
    is_st = issubclass(kind, _models.ST)
    taken = inspect.signature(kind.__init__).parameters
    valid = _OF_ST if is_st else [name for name in taken if name not in ("self", "data", "registry")]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    for name in kwargs:
        if name not in valid and (is_st or not takes_any):
            remedy = "Data and design are the same for all models."
            raise unknown_name(f"models[{label!r}]: argument", name, valid, remedy)
    if is_st:
        _st_options(kwargs)
    elif issubclass(kind, FeatureBaseline) and kwargs["perturbation_features"] is None:
        raise ValueError(f"models[{label!r}] predicts from features of perturbations: give perturbation_features=.")


def _st_options(kwargs: Mapping[str, object], seed: int = 0) -> tuple[FitOptions, NetworkOptions]:
    training, init_from = kwargs.get("training"), kwargs.get("init_from")
    options = FitOptions.from_(training, seed=seed, progress_bar=False)
    network = NetworkOptions.of(kwargs.get("network"))
    if network.use_rep is not None:
        raise ValueError(f"use_rep={network.use_rep!r} has no use here, where all models work on genes: leave it out.")
    if isinstance(init_from, _models.SE):
        raise TypeError("init_from must be an ST here, where no SE takes part.")
    of_se = SEOptions.of(False, init_from, network.use_rep, options)
    check_call(options, training, "split", kwargs.get("size", "auto"), init_from, of_se)  # there always is a split
    choose_size(kwargs.get("size", "auto"), 0)
    return options, network


def fit_st(
    screen: Screen, effects: Effects, kwargs: Mapping[str, object], seed: int, asked: Asked
) -> tuple[_models.ST, Verdict | None]:
    """Fit an ST with arguments of `fit_state` on a screen whose genes are chosen, for what the test cells ask.

    A form without a transferred effect has no weights to be chosen, and is spared the short fits and the verdict.
    """
    options, network = _st_options(kwargs, seed)
    features, init_from = kwargs.get("perturbation_features"), kwargs.get("init_from")
    size = choose_size(kwargs.get("size", "auto"), screen.n_cells)
    build = partial(build_st, features=features, init_from=init_from, size=size, network=network, options=options)
    st = build(screen)
    verdict = train_st(
        st,
        build=build,
        options=options,
        effects=effects,
        asked=asked if st.transfer else None,
        init_from=init_from,
    )
    return st, verdict


def reason_not_to_predict(model: PerturbationModel, perturbations: Sequence[str]) -> UnknownNameError | None:
    """Say why a model cannot predict one of these, if so."""
    for perturbation in perturbations:
        try:
            model.check_perturbation(perturbation)
        except UnknownNameError as reason:
            return reason
    return None


def hold_counts(begin: list[Start], suite: str | Sequence[str]) -> bool:
    """Tell whether control cells hold the counts that predicted cells are made of, and warn where they do not."""
    try:
        for start in begin:
            _ = start.counted
    except NoCountsError as reason:
        if suite == VCC2026:
            raise
        logger.warning(
            "What models return is scored as it is, and not cells made of it, which need whole counts: %s", reason
        )
        return False
    return True


def observed_cells(cells: Screen, unit: str) -> sparse.csr_matrix:
    """Return the real cells, as logarithms or as counts."""
    if unit == "log1p":
        return cells.expression.rows()
    if cells.design.scale == "counts":
        return cells.read_as("counts").expression.rows()
    log = cells.expression.rows()
    return counts_of(log, library_of(log))


def screens_of(
    data: AnnData | MuData,
    design: Design,
    split_key: str | None,
    splits: Mapping[str, str | Mapping] | None,
    modality: str,
) -> Iterator[tuple[str, Screen]]:
    """Yield the name of each split, and the cells in their parts."""
    if (split_key is None) == (splits is None):
        raise ValueError(
            "give either split_key=, a column of obs that `vc.pp.split` wrote, or splits=, such as "
            "{'K562 unseen': {'contexts': ['K562']}}."
        )
    if splits is not None and not len(splits):
        raise ValueError("splits={} holds nothing: name at least one, {'K562 unseen': {'contexts': ['K562']}}.")
    for name, how in ({split_key: split_key} if splits is None else splits).items():
        if isinstance(how, str):
            yield name, Screen.from_anndata(data, dataclasses.replace(design, split_key=how), modality=modality)
            continue
        screen = Screen.from_anndata(data, design, modality=modality)
        keys = {k: getattr(design, k) for k in ("perturbation_key", "context_key", "combination_separator", "dose_key")}
        cells = AnnData(obs=screen.as_written(screen.labels()))
        split_cells(cells, **keys, control=design.controls, holdout=how, key_added=name)
        # a split of its own, whatever it is called: no other cells are held out for validation
        design_of = dataclasses.replace(design, split_key=name)
        yield name, dataclasses.replace(screen, design=design_of, split=cells.obs[name].to_numpy().astype(str))
