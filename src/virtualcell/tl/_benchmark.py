"""Fit several models on the same splits, genes and cells, and score them beside a floor and the ceiling."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._threads import count_threads
from virtualcell.data._design import Design, Scale, check_library_sizes
from virtualcell.data._expression import MOST_EXPRESSION
from virtualcell.data._screen import Screen
from virtualcell.models import ST
from virtualcell.models._base import PerturbationModel
from virtualcell.models._baselines import Baseline
from virtualcell.models._effects import Effects
from virtualcell.models._start import Start, starts
from virtualcell.pp import split as split_cells
from virtualcell.tl._benchmark_models import Spec, fit_st, model_specs, reason_not_to_predict
from virtualcell.tl._evaluate import evaluate
from virtualcell.tl._evaluate_checks import metric_names
from virtualcell.tl._prepare import choose_genes, prepared

logger = logging.getLogger(__name__)

COLUMNS = ["split", "seed", "source", "model", "context", "perturbation", "metric", "value"]
CEILING = "ceiling"


@dataclass(frozen=True)
class _Settings:
    """What holds for all splits and models."""

    design: Design
    suite: str | Sequence[str]
    seeds: Sequence[int]
    ceiling: bool
    features: pd.DataFrame | None
    n_top_genes: int | None
    min_cells: int
    n_cells: int | None
    n_jobs: int


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
        :func:`virtualcell.tl.fit_state`, `{"published": ("ST", {"network": {"preset": "published"}})}`, of which
        `perturbation_features`, `init_from`, `size`, `network` and `training` have a meaning here; for others those of
        the class.
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
    specs = model_specs(models, floor, perturbation_features)
    metric_names(suite)  # a wrong name shows now, and not when all is fitted
    count_threads(n_jobs)
    if n_cells is not None and n_cells < 1:
        raise ValueError(f"n_cells={n_cells!r}: at least one cell is needed.")
    if not len(seeds):
        raise ValueError("seeds=() is empty: give at least one, seeds=(0,).")
    if suite == "vcc2026":
        raise ValueError(
            "suite='vcc2026' scores raw counts, which baselines do not predict. Say 'full' or 'vcc2025', or make "
            "counts of a prediction and call `vc.tl.evaluate`."
        )
    check_library_sizes(scale, library_size_key)
    design = Design(
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        batch_key=batch_key,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
    )
    settings = _Settings(design, suite, seeds, ceiling, perturbation_features, n_top_genes, min_cells, n_cells, n_jobs)
    frames, n_genes = [], {}
    for name, screen in _splits(adata, design, split_key, splits, modality):
        case = _Case.of(name, screen, settings)
        n_genes[name] = len(case.screen.genes)
        frames += case.scores(specs)
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


def _splits(
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
        keys = {k: getattr(design, k) for k in ("perturbation_key", "control", "context_key")}
        cells = AnnData(obs=screen.labels())
        split_cells(cells, **keys, holdout=how, key_added=name)
        # a split of its own, whatever it is called: no other cells are held out for validation
        design_of = dataclasses.replace(design, split_key=name)
        yield name, dataclasses.replace(screen, design=design_of, split=cells.obs[name].to_numpy().astype(str))


@dataclass(frozen=True)
class _Case:
    """One split: the cells to learn from on the genes to model, what they tell, and the test cells to predict.

    Control cells are read once, for all models and perturbations. Baselines have no use for validation cells and learn
    from them too: what a model has to beat is the best that the cells which are not test allow.
    """

    name: str
    screen: Screen
    effects: Effects  # of training cells
    of_baselines: Effects  # of validation cells too
    starts: list[Start]
    real: AnnData
    pairs: list[tuple[str, str]]
    settings: _Settings

    @classmethod
    def of(cls, name: str, screen: Screen, settings: _Settings) -> _Case:
        is_test = (screen.split == "test") & ~screen.is_control
        if not is_test.any():
            raise ValueError(f"split {name!r} has no test cells. Hold something out with `vc.pp.split`.")
        screen.expression.rows(np.arange(0))  # the first reading checks all cells, once for what is taken from them
        whole = screen.with_split(np.full(screen.n_cells, "train"))
        whole.check_controls(is_test)  # predictions start from those of test contexts
        targets = whole.targets()  # known beforehand, of test cells too
        known = prepared(screen, min_cells=settings.min_cells, has_features=settings.features is not None)
        genes = choose_genes(known, settings.n_top_genes, targets=targets)
        known, screen = known.select(genes), screen.select(genes)
        scored = screen.take(is_test | screen.is_control)
        real = AnnData(scored.expression.rows(), obs=scored.labels(), var=pd.DataFrame(index=genes))
        return cls(
            name=name,
            screen=known,
            effects=Effects.measure(known, known.is_known),
            of_baselines=Effects.measure(known),
            starts=list(starts(screen.take(screen.is_control))),
            real=real,
            pairs=sorted((p, c) for c, p in screen.pairs(is_test)),
            settings=settings,
        )

    def scores(self, specs: dict[str, tuple[type, dict, str]]) -> list[pd.DataFrame]:
        """Scores of every model that can predict the test cells, with every seed."""
        settings, frames = self.settings, []
        missing = set(settings.seeds) if settings.ceiling else set()  # seeds for which the ceiling is still to be taken
        for label, (kind, kwargs, source) in specs.items():
            deterministic = issubclass(kind, Baseline)
            for seed in settings.seeds:
                first = seed == settings.seeds[0]
                if deterministic and not first and seed not in missing:
                    continue
                if not deterministic or first:
                    model = self._fit(kind, kwargs, seed)
                    if (reason := reason_not_to_predict(model, sorted({p for p, _ in self.pairs}))) is not None:
                        logger.warning("%s is left out of split %r: %s", label, self.name, reason)
                        break
                    predicted = self._predict(model, seed)
                scores = self._score(predicted, ceiling=seed in missing, seed=seed)
                missing.discard(seed)
                if deterministic and not first:
                    scores = scores[scores["source"] == CEILING]
                is_model = scores["source"] == "model"
                scores["model"] = np.where(is_model, label, CEILING)
                scores["source"] = np.where(is_model, source, CEILING)
                frames.append(scores.assign(split=self.name, seed=seed))
            logger.info("Split %r: %s is done.", self.name, label)
        return frames

    def _fit(self, kind: type, kwargs: dict, seed: int) -> PerturbationModel:
        """Fit a model on the cells that are not test."""
        if issubclass(kind, ST):
            return fit_st(self.screen, self.effects, kwargs, seed)
        model = kind(self.screen, **kwargs)
        model.train(self.of_baselines)
        model.forget_data()
        return model

    def _predict(self, model: PerturbationModel, seed: int) -> tuple[np.ndarray, pd.DataFrame]:
        """Predict every perturbation and context of the test cells from the control cells: expression and labels."""
        design, of_context = self.screen.design, {start.context: start for start in self.starts}
        keys = [k for k in (design.perturbation_key, design.context_key) if k is not None]
        cells, labels = [], []
        for perturbation, context in self.pairs:
            start = of_context[context]
            predicted = model.predict_from(start, perturbation, n_cells=self.settings.n_cells, seed=seed)[1]
            cells.append(predicted.astype(np.float32, copy=False))
            pair = (perturbation, context)[: len(keys)]
            labels.append(pd.DataFrame([pair] * len(predicted), columns=keys))
        expression = np.concatenate(cells)
        if (beyond := int((expression > MOST_EXPRESSION).sum())) > 0:
            logger.warning("%r predicts more than all counts of a cell in %d entries; cut to that.", model, beyond)
        return np.minimum(expression, MOST_EXPRESSION), pd.concat(labels, ignore_index=True)

    def _score(self, predicted: tuple[np.ndarray, pd.DataFrame], *, ceiling: bool, seed: int) -> pd.DataFrame:
        cells, obs = predicted
        index = "predicted_" + obs.index.astype(str)
        adata = AnnData(cells, obs=obs.set_index(index), var=pd.DataFrame(index=self.real.var_names))
        design, settings = self.settings.design, self.settings
        return evaluate(
            adata,
            self.real,
            perturbation_key=design.perturbation_key,
            control=design.control,
            context_key=design.context_key,
            suite=settings.suite,
            scale="log1p",
            ceiling=ceiling,
            n_jobs=settings.n_jobs,
            seed=seed,
        )
