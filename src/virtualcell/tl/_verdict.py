"""Does ST beat the baselines on cells it has not learned from? `fit_state` ends by asking."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pandas as pd

from virtualcell._errors import UnknownNameError
from virtualcell.data._screen import Screen
from virtualcell.metrics import mae, pearson_delta
from virtualcell.models import ST, Additive, ContextMean, NearestContext, NoChange, PerturbationMean, Ridge
from virtualcell.models._base import PerturbationModel
from virtualcell.models._effects import Effects
from virtualcell.models._start import starts

logger = logging.getLogger(__name__)

_BASELINES = (NoChange, ContextMean, PerturbationMean, Additive, NearestContext)
_MOST_GROUPS = 200  # of (context, perturbation), drawn where there are more
_N_CELLS = 256  # predicted for each

Groups = dict[tuple[str, str], np.ndarray]


def compare_with_baselines(
    st: ST, screen: Screen, effects: Effects, features: pd.DataFrame | None, *, seed: int = 0
) -> tuple[pd.DataFrame, PerturbationModel]:
    """Score ST and the baselines on validation cells, and say in one line what came out.

    Control cells are read once per context, for all models and perturbations.

    Parameters
    ----------
    st
        Trained on the training cells of the screen.
    screen
        All cells, with their parts.
    effects
        Measured effects of the training cells, from which the baselines learn.
    features
        Features of perturbations: ridge regression joins then.
    seed
        Seed of the draws of groups and of control cells.

    Returns
    -------
    Mean `pearson_delta` and `mae` over the validation groups, and how many those were, for each model, with the highest
    Pearson delta first; and the best baseline.
    """
    in_genes = dataclasses.replace(screen, rep=None, design=dataclasses.replace(screen.design, use_rep=None))
    models: dict[str, PerturbationModel] = {"ST": st}
    for kind in (*_BASELINES, *([Ridge] if features is not None else [])):
        model = kind(in_genes, features) if kind is Ridge else kind(in_genes)
        model.train(effects)
        model.forget_data()
        models[kind.__name__] = model
    groups = _groups(screen, np.random.default_rng(seed))
    for name, model in list(models.items()):
        try:
            for _, perturbation in groups:
                model.check_perturbation(perturbation)
        except UnknownNameError as reason:
            logger.info("%s cannot predict all that is validated on and is left out: %s", name, reason)
            del models[name]
    scores = pd.DataFrame(_rows(models, screen, in_genes, groups, seed), columns=["model", "pearson_delta", "mae"])
    scores = scores.groupby("model").mean()
    scores["n_groups"] = len(groups)
    scores = scores.sort_values("pearson_delta", ascending=False)
    best = next(name for name in scores.index if name != "ST")
    _say(scores, best)
    return scores, models[best]


def _groups(screen: Screen, rng: np.random.Generator) -> Groups:
    """Rows of the validation cells of every context and perturbation, or of as many as are drawn."""
    found = screen.pairs(screen.is_val & ~screen.is_control)
    if len(found) <= _MOST_GROUPS:
        return found
    names = list(found)
    drawn = sorted(rng.choice(len(names), _MOST_GROUPS, replace=False))
    return {names[i]: found[names[i]] for i in drawn}


def _rows(
    models: dict[str, PerturbationModel], screen: Screen, in_genes: Screen, groups: Groups, seed: int
) -> list[tuple[str, float, float]]:
    """Scores of every model on every group."""
    observed = dict(zip(groups, screen.expression.moments(list(groups.values())).mean, strict=True))
    is_start = screen.is_control & (screen.split != "test") & screen.context.isin({c for c, _ in groups})
    rows = []
    of_rep = None if screen.rep is None else starts(screen.take(is_start))
    for of_genes in starts(in_genes.take(is_start)):
        for_st = of_genes if of_rep is None else next(of_rep)
        n_cells = min(len(of_genes.names), _N_CELLS)
        for context, perturbation in groups:
            if context != of_genes.context:
                continue
            for name, model in models.items():
                begin = for_st if name == "ST" else of_genes
                mean = model.predict_from(begin, perturbation, n_cells=n_cells, seed=seed)[1].mean(axis=0)
                real = observed[context, perturbation]
                rows.append((name, pearson_delta(mean, real, of_genes.base), mae(mean, real)))
    return rows


def _say(scores: pd.DataFrame, best: str) -> None:
    ours, theirs = scores.loc["ST"], scores.loc[best]
    figures = (
        f"Pearson delta {ours['pearson_delta']:.3f} against {theirs['pearson_delta']:.3f}, MAE {ours['mae']:.4f} "
        f"against {theirs['mae']:.4f}, {int(ours['n_groups'])} groups of validation cells"
    )
    if ours["pearson_delta"] > theirs["pearson_delta"]:
        logger.info("ST beats the best baseline, %s: %s.", best, figures)
    else:
        logger.warning(
            'ST does not beat the baseline %s: %s. `predict_perturbation(..., fallback="best")` uses the better one.',
            *(best, figures),
        )
