"""Fit several models on the same splits, genes and cells, and score them beside a floor and the ceiling."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import _settings
from virtualcell._arguments import require_whole
from virtualcell._interrupted import told_when_interrupted
from virtualcell._progress import Bar
from virtualcell._threads import count_threads, own_threads
from virtualcell.data._design import Design, Scale, check_library_sizes
from virtualcell.data._design_arguments import describes_design
from virtualcell.data._expression import MOST_EXPRESSION
from virtualcell.data._labels import expression_modality, is_several, var_of
from virtualcell.data._screen import Screen
from virtualcell.models import ST
from virtualcell.models._base import PerturbationModel
from virtualcell.models._baselines import Baseline
from virtualcell.models._effects import Effects
from virtualcell.models._start import Start, starts
from virtualcell.tl._benchmark_models import (
    VCC2026,
    Spec,
    fit_st,
    hold_counts,
    model_specs,
    observed_cells,
    reason_not_to_predict,
    screens_of,
)
from virtualcell.tl._emit import emitted_cells, predicted_effect
from virtualcell.tl._evaluate import evaluate
from virtualcell.tl._evaluate_checks import Suite, metric_names, warn_without_targets
from virtualcell.tl._prepare import choose_genes, prepared
from virtualcell.tl._questions import Asked, asked_by_split

logger = logging.getLogger(__name__)

COLUMNS = ["split", "seed", "source", "model", "context", "perturbation", "metric", "value"]
_TARGET = "name"  # column of var of the cells to score with the names of genes that perturbations go by


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


@describes_design
@own_threads()
@told_when_interrupted("The benchmark was interrupted, and nothing of it is kept: call it again.")
def benchmark(
    adata: AnnData | MuData,
    models: Sequence[str] | Mapping[str, Spec],
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    context_key: str | None = None,
    batch_key: str | None = None,
    combination_separator: str | None = "+",
    dose_key: str | None = None,
    gene_key: str | None = None,
    split_key: str | None = None,
    splits: Mapping[str, str | Mapping] | None = None,
    suite: Suite | Sequence[str] = "full",
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
    cells. Test cells are scored and nothing else. `adata` is not changed.

    What models predict is made cells of in one way, as :func:`virtualcell.tl.predict_perturbation` does: whole counts
    of control cells, changed as the model says. Where control cells hold no whole counts (`scale="log1p"` of corrected
    expression), what models return is scored as it is, with a warning. So there is for values above log(1 + 10,000),
    the most that a gene can have in a cell.

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
    perturbation_key, control, context_key, batch_key, combination_separator, dose_key, gene_key
        The design, as :func:`virtualcell.tl.fit_state` takes it.
    split_key
        Column with `train`, `val` and `test`, from :func:`virtualcell.pp.split`; or else give `splits`.
    splits
        Several splits, from a name to such a column or to what to hold out (`{"K562 unseen": {"contexts":
        ["K562"]}}`).
    suite
        "vcc2025", "vcc2026", "full", or names of metrics, as in :func:`virtualcell.tl.evaluate`.
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
        The expression, as :func:`virtualcell.tl.fit_state` takes it.
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
    One row per `split`, `seed`, `source` ("model", "floor", "ceiling" or "corrected ceiling"), `model`, `context`,
    `perturbation` and `metric`, with its `value`. A model that cannot predict a test perturbation of a split, as
    Additive one that was never measured, is left out of that split, with a warning. `.attrs` has what was asked for,
    the verdict of every ST on cells that it left out itself ("verdicts"), and the number of genes of each split. Drawn
    by :func:`virtualcell.pl.benchmark`.

    Raises
    ------
    KeyError
        For an unknown model, metric, column or label.
    ValueError
        If no split or no seed is given, or the data does not fit what was stated.

    Examples
    --------
    >>> scores = vc.tl.benchmark(
    ...     adata,
    ...     ["Additive", "NearestContext"],
    ...     perturbation_key="target_gene",
    ...     control="non-targeting",
    ...     context_key="cell_type",
    ...     splits={"type_3 unseen": {"contexts": ["type_3"]}},
    ...     suite=["pearson_delta", "mae"],
    ... )
    >>> sorted(scores.loc[scores["source"] == "model", "model"].unique())
    ['Additive', 'NearestContext']
    """
    specs = model_specs(models, floor, perturbation_features)
    metrics = metric_names(suite)  # a wrong name shows now, and not when all is fitted
    count_threads(n_jobs)
    if n_cells is not None:
        require_whole("n_cells", n_cells)
    if not is_several(seeds):
        raise TypeError(f"seeds={seeds!r} must be a list of numbers, such as ({seeds!r},).")
    if not len(seeds):
        raise ValueError("seeds=() is empty: give at least one, seeds=(0,).")
    for seed in seeds:
        require_whole("seeds", seed, 0)
    if suite == VCC2026:
        import_module("virtualcell.tl._vcc2026")  # an optional dependency: what is missing shows now
    check_library_sizes(scale, library_size_key)
    design = Design(
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        batch_key=batch_key,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
        combination_separator=combination_separator,
        dose_key=dose_key,
        gene_key=gene_key,
    )
    settings = _Settings(design, suite, seeds, ceiling, perturbation_features, n_top_genes, min_cells, n_cells, n_jobs)
    frames, n_genes, verdicts = [], {}, []
    for name, screen in screens_of(adata, design, split_key, splits, modality):
        if not n_genes:
            warn_without_targets(
                screen, screen.perturbation_names, metrics, var_of(expression_modality(adata, modality))
            )
        case = _Case.of(name, screen, settings)
        n_genes[name] = len(case.screen.genes)
        frames += case.scores(specs)
        verdicts += case.verdicts
    if not frames:
        raise ValueError("none of the models can predict the test cells of any split; the log says why for each.")
    out = pd.concat(frames, ignore_index=True)[COLUMNS]
    out.attrs = {
        "verdicts": verdicts,
        "suite": suite if isinstance(suite, str) else list(suite),
        "perturbation_key": perturbation_key,
        "control": design.control,
        "context_key": context_key,
        "models": [n for n, (_, _, source) in specs.items() if source == "model"],
        "floor": list(floor),
        "seeds": [int(s) for s in seeds],
        "n_genes": n_genes,
    }
    return out


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
    unit: str | None  # in which predicted cells are scored; None where they cannot be made of counts
    asked: Asked  # by the test cells
    real: AnnData
    pairs: list[tuple[str, str]]
    settings: _Settings
    verdicts: list[dict]  # of every ST that was fitted

    @classmethod
    def of(cls, name: str, screen: Screen, settings: _Settings) -> _Case:
        is_test = (screen.split == "test") & ~screen.is_control
        if not is_test.any():
            raise ValueError(f"split {name!r} has no test cells. Hold something out with `vc.pp.split`.")
        screen.expression.rows(np.arange(0))  # the first reading checks all cells, once for what is taken from them
        whole = screen.with_split(np.full(screen.n_cells, "train"))
        whole.check_controls(is_test)  # predictions start from those of test contexts
        targets = whole.targets()  # known beforehand, of test cells too
        asked = asked_by_split(screen, has_features=settings.features is not None)
        known = prepared(screen, min_cells=settings.min_cells, has_features=settings.features is not None)
        genes = choose_genes(known, settings.n_top_genes, targets=targets)
        known, screen = known.select(genes), screen.select(genes)
        scored = screen.take(is_test | screen.is_control)
        begin = list(starts(screen.take(screen.is_control)))
        unit = "counts" if settings.suite == VCC2026 else "log1p"
        targets_by = scored.target_names[scored.genes]
        return cls(
            name=name,
            screen=known,
            effects=Effects.measure(known, known.is_known),
            of_baselines=Effects.measure(known),
            starts=begin,
            unit=unit if hold_counts(begin, settings.suite) else None,
            asked=asked,
            real=AnnData(observed_cells(scored, unit), obs=scored.labels(), var=pd.DataFrame({_TARGET: targets_by})),
            pairs=sorted((p, c) for c, p in screen.pairs(is_test)),
            settings=settings,
            verdicts=[],
        )

    def scores(self, specs: dict[str, tuple[type, dict, str]]) -> list[pd.DataFrame]:
        """Scores of every model that can predict the test cells, with every seed."""
        settings, frames = self.settings, []
        missing = set(settings.seeds) if settings.ceiling else set()  # seeds for which the ceiling is still to be taken
        with Bar(f"benchmark: {self.name}", len(specs), unit="model") as bar:
            for label, (kind, kwargs, source) in specs.items():
                deterministic = issubclass(kind, Baseline)
                for seed in settings.seeds:
                    first = seed == settings.seeds[0]
                    if deterministic and not first and seed not in missing:
                        continue
                    if not deterministic or first:
                        model = self._fit(label, kind, kwargs, seed)
                        if (reason := reason_not_to_predict(model, sorted({p for p, _ in self.pairs}))) is not None:
                            logger.warning("%s is left out of split %r: %s", label, self.name, reason)
                            break
                        predicted = self._predict(model, seed)
                    scores = self._score(predicted, ceiling=seed in missing, seed=seed)
                    missing.discard(seed)
                    if deterministic and not first:
                        scores = scores[scores["source"] != "model"]
                    is_model = scores["source"] == "model"
                    scores["model"] = np.where(is_model, label, scores["source"])
                    scores["source"] = np.where(is_model, source, scores["source"])
                    frames.append(scores.assign(split=self.name, seed=seed))
                bar.step(label)
                logger.info("Split %r: %s is done.", self.name, label)
        for frame in frames:
            frame["perturbation"] = self.screen.spelled(frame["perturbation"])
        return frames

    def _fit(self, label: str, kind: Any, kwargs: dict, seed: int) -> PerturbationModel:
        """Fit a model on the cells that are not test."""
        if issubclass(kind, ST):
            st, verdict = fit_st(self.screen, self.effects, kwargs, seed, self.asked)
            if verdict is not None:
                said = {"outcome": verdict.outcome, "gains": verdict.gains, "weight": verdict.weight}
                self.verdicts.append({"split": self.name, "seed": seed, "model": label, **said})
            return st
        model = kind(self.screen, **kwargs)
        model.train(self.of_baselines)
        model.forget_data()
        return model

    def _predict(self, model: PerturbationModel, seed: int) -> tuple[sparse.csr_matrix | np.ndarray, pd.DataFrame]:
        """Predict every perturbation and context of the test cells from the control cells: expression and labels."""
        design, of_context = self.screen.design, {start.context: start for start in self.starts}
        keys = [k for k in (design.perturbation_key, design.context_key) if k is not None]
        cells, labels, highest = [], [], 0.0
        for perturbation, context in self.pairs:
            predicted, most = self._predict_pair(model, of_context[context], perturbation, seed)
            cells.append(predicted)
            pair = (perturbation, context)[: len(keys)]
            labels.append(pd.DataFrame([pair] * predicted.shape[0], columns=keys))
            highest = max(highest, most)
        if highest > MOST_EXPRESSION:
            logger.warning("%r predicts more than all counts of a cell, up to %.3g; cut to that.", model, highest)
        expression = sparse.vstack(cells, format="csr") if self.unit is not None else np.concatenate(cells)
        return expression, pd.concat(labels, ignore_index=True)

    def _predict_pair(
        self, model: PerturbationModel, start: Start, perturbation: str, seed: int
    ) -> tuple[sparse.csr_matrix | np.ndarray, float]:
        """Predicted cells of one perturbation and context, and the highest value that the model returned."""
        n_cells = self.settings.n_cells
        if self.unit is None:
            cells = model.predict_from(start, perturbation, n_cells=n_cells, seed=seed)[1]
            highest = float(cells.max(initial=0))
            return np.clip(cells, 0, MOST_EXPRESSION).astype(np.float32, copy=False), highest
        effect = predicted_effect(model, start, start, perturbation, n_cells=n_cells, seed=seed)
        cells = emitted_cells(effect, start, np.asarray(self.screen.genes), seed=seed)
        return cells.log if self.unit == "log1p" else cells.counts, effect.highest

    def _score(
        self, predicted: tuple[sparse.csr_matrix | np.ndarray, pd.DataFrame], *, ceiling: bool, seed: int
    ) -> pd.DataFrame:
        cells, obs = predicted
        index = "predicted_" + obs.index.astype(str)
        adata = AnnData(cells, obs=obs.set_index(index), var=pd.DataFrame(index=self.real.var_names))
        design, settings = self.settings.design, self.settings
        with _settings.settings.override(progress=False):  # the benchmark has a bar of its own
            return evaluate(
                adata,
                self.real,
                perturbation_key=design.perturbation_key,
                control=design.control,
                context_key=design.context_key,
                gene_key=_TARGET,
                suite=settings.suite,
                scale=self.unit or "log1p",
                predicted_scale=self.unit or "log1p",
                ceiling=ceiling,
                n_jobs=settings.n_jobs,
                seed=seed,
            )
