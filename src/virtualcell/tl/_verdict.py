"""Does ST beat the baselines on cells it has not learned from? `fit_state` ends by asking."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from anndata import AnnData

from virtualcell._errors import UnknownNameError
from virtualcell.metrics import mae, pearson_delta
from virtualcell.models import ST, Additive, ContextMean, NearestContext, NoChange, PerturbationMean, Ridge
from virtualcell.models._base import PerturbationModel
from virtualcell.models._baselines import ShiftModel

logger = logging.getLogger(__name__)

_BASELINES = (NoChange, ContextMean, PerturbationMean, Additive, NearestContext)
_MOST_GROUPS = 200  # of (context, perturbation), drawn where there are more
_N_CELLS = 256  # predicted for each
_SPLIT = "_verdict"


def judge(
    st: ST, cells: AnnData, validation: np.ndarray, features: pd.DataFrame | None, *, seed: int
) -> tuple[pd.DataFrame, ShiftModel]:
    """Score ST and the baselines on validation cells, and say in one line what came out.

    Parameters
    ----------
    st
        Trained on the cells that are neither test nor validation.
    cells
        All cells, as ST was set up with.
    validation
        Mask of the validation cells.
    features
        Features of perturbations: ridge regression joins then.
    seed
        Of the draws of groups and of control cells.

    Returns
    -------
    Mean `pearson_delta` and `mae` over the validation groups, and how many those were, for each model, with the highest
    Pearson delta first; and the best baseline, fitted on what ST was.
    """
    keys = {k: st.setup[k] for k in ("perturbation_key", "control", "context_key")}
    is_control = st._labels(cells, "perturbation") == st.control
    hidden = (validation & ~is_control) | ~st._training_rows(cells)  # control cells are what predictions start from
    cells = AnnData(cells.X, obs=cells.obs.copy(), var=cells.var, obsm=dict(cells.obsm))
    cells.obs[_SPLIT] = np.where(hidden, "test", "train")
    models: dict[str, PerturbationModel] = {"ST": st}
    for kind in (*_BASELINES, *([Ridge] if features is not None else [])):
        kind.setup_anndata(cells, **keys, split_key=_SPLIT)
        model = kind(cells, features) if kind is Ridge else kind(cells)
        model.train()
        model.forget_data()
        models[kind.__name__] = model
    groups = _groups(st, cells, validation, np.random.default_rng(seed))
    for name, model in list(models.items()):
        try:
            for _, perturbation, _ in groups:
                model.check_perturbation(perturbation)
        except UnknownNameError as reason:
            logger.info("%s cannot predict all that is validated on and is left out: %s", name, reason)
            del models[name]
    rows = []
    controls = is_control & ~hidden
    for context, perturbation, members in groups:
        here = controls & (st._labels(cells, "context") == context)
        base, n_cells = _mean(cells, here), min(int(here.sum()), _N_CELLS)
        observed = _mean(cells, members)
        for name, model in models.items():
            within = context if st.setup["context_key"] is not None else None
            predicted = model.predict(cells[controls], perturbation, context=within, n_cells=n_cells, seed=seed)
            mean = predicted.to_numpy().mean(axis=0)
            rows.append((name, pearson_delta(mean, observed, base), mae(mean, observed)))
    scores = pd.DataFrame(rows, columns=["model", "pearson_delta", "mae"]).groupby("model").mean()
    scores["n_groups"] = len(groups)
    scores = scores.sort_values("pearson_delta", ascending=False)
    best = next(name for name in scores.index if name != "ST")
    _say(scores, best)
    return scores, models[best]


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


def _groups(
    st: ST, cells: AnnData, validation: np.ndarray, rng: np.random.Generator
) -> list[tuple[str, str, np.ndarray]]:
    """Context, perturbation and members of every group of validation cells, in the order of their names."""
    perturbation, context = st._labels(cells, "perturbation"), st._labels(cells, "context")
    taken = validation & (perturbation != st.control)
    named = sorted(set(zip(context[taken], perturbation[taken], strict=True)))
    if len(named) > _MOST_GROUPS:
        named = [named[i] for i in sorted(rng.choice(len(named), _MOST_GROUPS, replace=False))]
    return [(str(c), str(p), taken & (context == c) & (perturbation == p)) for c, p in named]


def _mean(cells: AnnData, mask: np.ndarray) -> np.ndarray:
    return np.asarray(cells.X[np.flatnonzero(mask)].mean(axis=0), dtype=np.float64).ravel()
