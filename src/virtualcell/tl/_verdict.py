"""How well will the question be answered? ST and the baselines on cells that were left out as the question has it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from virtualcell._errors import UnknownNameError
from virtualcell._progress import Bar
from virtualcell.data._screen import Screen
from virtualcell.metrics import mae, pearson_delta
from virtualcell.models import (
    ST,
    Additive,
    ContextMean,
    NearestContext,
    NearestPerturbations,
    NoChange,
    PerturbationMean,
    Ridge,
)
from virtualcell.models._base import PerturbationModel
from virtualcell.models._baselines import Baseline
from virtualcell.models._effects import Effects
from virtualcell.models._stacking import choose_weight, errors_of_weights
from virtualcell.models._start import Start, starts
from virtualcell.tl._questions import Asked, Fold

logger = logging.getLogger(__name__)

_BASELINES = (NoChange, ContextMean, PerturbationMean, Additive, NearestContext)
_OF_FEATURES = (Ridge, NearestPerturbations)
_N_CELLS = 256  # predicted for each pair
_LEAST_SPREAD = 0.01
_ONE_SIDED = 0.84  # of a normal distribution lies below its mean plus one standard deviation
_SCOPES = {
    "contexts": "left-out contexts",
    "perturbations": "left-out perturbations",
    "cells": "left-out cells of measured pairs",
}

Trained = Callable[[Fold], ST]


@dataclass(frozen=True)
class Verdict:
    """What came of leaving cells out.

    Parameters
    ----------
    scores
        Mean `pearson_delta` and `mae` of every model over the pairs that were left out, their standard deviation over
        folds (`pearson_delta_spread`, `mae_spread`), and `n_groups` and `n_folds`; the model with the least absolute
        error comes first.
    sentence
        Whether ST is better than the best baseline, level with it or worse, on what, and by how much.
    outcome
        "better", "level" or "worse".
    weight
        Weight of the networks that the folds chose; `None` for a model without a transferred effect.
    best
        The best baseline, where ST is worse in the metric that it lost.
    gains
        For each metric how much better ST is than the best baseline in it, and how far that goes from fold to fold.
    """

    scores: pd.DataFrame
    sentence: str
    outcome: str
    weight: float | None
    best: str
    gains: dict[str, tuple[float, float]]

    @property
    def message(self) -> str:
        """The sentence, and what to do where ST is worse."""
        remedy = ' `predict_perturbation(..., fallback="best")` uses the baseline.' if self.outcome == "worse" else ""
        return self.sentence + remedy


def judge(
    train: Trained,
    folds: list[Fold],
    asked: Asked,
    features: pd.DataFrame | None,
    *,
    seed: int = 0,
    progress_bar: bool | None = None,
) -> Verdict:
    """Train ST and the baselines on what every fold leaves, predict what it leaves out, and compare.

    The weight of the networks is chosen from all folds for the model, and for the scores of each fold from the other
    folds, so that no prediction is scored with a weight that it took part in choosing, unless there is a single fold.

    Parameters
    ----------
    train
        Fits an ST on a fold.
    folds
        Training cells without what is left out, at least one.
    asked
        The question.
    features
        Features of perturbations, where there are any: ridge regression and neighbours join then.
    seed
        Seed of the draw of control cells that predictions start from.
    progress_bar
        Whether a bar shows which fold is left out; by default what `vc.settings.progress` says.
    """
    rows = []
    with Bar(f"verdict: {_SCOPES[asked.question]}", len(folds), unit="fold", shown=progress_bar) as bar:
        for k, fold in enumerate(folds):
            rows += _predicted(train, fold, k, asked, features, seed)
            bar.step()
    weight = None
    if rows and rows[0].errors is not None:
        weight = _choose(rows)
        for k in {row.fold for row in rows}:
            others = [row for row in rows if row.fold != k] or rows
            of_others = _choose(others)
            for row in rows:
                if row.fold == k:
                    row.score_st(of_others)
    scores, of_pair = _table(rows, len(folds))
    return _verdict(scores, of_pair, weight, asked)


@dataclass
class _Row:
    """One pair of a fold: its real mean, the mean of its control cells, and every model's prediction.

    Of ST the means of its networks and of the transferred effect, where it has one.
    """

    fold: int
    real: np.ndarray
    base: np.ndarray
    predicted: dict[str, np.ndarray]
    networks: np.ndarray | None = None
    transferred: np.ndarray | None = None
    errors: np.ndarray | None = None

    def score_st(self, weight: float) -> None:
        """Put what ST predicts with that weight of the networks among the predictions."""
        self.predicted["ST"] = weight * self.networks + (1 - weight) * self.transferred


def _choose(rows: list[_Row]) -> float:
    return choose_weight(np.stack([row.errors for row in rows]), np.array([row.fold for row in rows]))


def _predicted(
    train: Trained, fold: Fold, number: int, asked: Asked, features: pd.DataFrame | None, seed: int
) -> list[_Row]:
    st = train(fold)
    baselines = _trained_baselines(fold, features)
    screen, in_genes = fold.screen, _in_genes(fold.screen)
    is_start = screen.is_control & (screen.split != "test") & screen.context.isin({c for c, _ in fold.observed})
    of_rep = None if screen.rep is None else starts(screen.take(is_start))
    rows = []
    for start in starts(in_genes.take(is_start)):
        for_st = start if of_rep is None else next(of_rep)
        n_cells = min(len(start.names), _N_CELLS)
        off = _off(st, start, n_cells, seed)
        off_baselines = _off(baselines[NoChange.__name__], start, n_cells, seed)  # all start from the same draw
        for (context, perturbation), real in fold.observed.items():
            if context != start.context:
                continue
            predicted = {
                name: _mean(model, start, perturbation, n_cells, seed) + off_baselines
                for name, model in baselines.items()
            }
            row = _Row(number, real, start.base, predicted)
            if st.transferred is None:
                row.predicted["ST"] = _mean(st, for_st, perturbation, n_cells, seed) + off
            else:
                apart = st.apart(for_st, perturbation, n_cells=n_cells, seed=seed)
                row.networks, row.transferred = (mean + off for mean in apart)
                row.errors = errors_of_weights(row.networks, row.transferred, row.real)
            rows.append(row)
    st.forget_data()
    return rows


def trained_baseline(name: str, screen: Screen, effects: Effects, features: pd.DataFrame | None) -> Baseline:
    """Return a baseline that has learned from measured effects."""
    kind = next(k for k in (*_BASELINES, *_OF_FEATURES) if k.__name__ == name)
    in_genes = _in_genes(screen)
    model = kind(in_genes, features) if kind in _OF_FEATURES else kind(in_genes)
    model.train(effects)
    model.forget_data()
    return model


def _in_genes(screen: Screen) -> Screen:
    """Return the cells as baselines take them, which know no embedding."""
    return dataclasses.replace(screen, rep=None, design=dataclasses.replace(screen.design, use_rep=None))


def _trained_baselines(fold: Fold, features: pd.DataFrame | None) -> dict[str, Baseline]:
    """Baselines that can predict all that the fold leaves out."""
    out = {}
    for kind in (*_BASELINES, *(_OF_FEATURES if features is not None else ())):
        model = trained_baseline(kind.__name__, fold.screen, fold.effects, features)
        try:
            for _, perturbation in fold.observed:
                model.check_perturbation(perturbation)
        except UnknownNameError:
            logger.info("%s cannot predict all that is left out and is not compared with.", kind.__name__)
            continue
        out[kind.__name__] = model
    return out


def _off(model: PerturbationModel, start: Start, n_cells: int, seed: int) -> np.ndarray:
    """Return what makes up for the draw of control cells, whose noise is no error of a model."""
    return start.base - start.dense(model.rows_from(start, n_cells=n_cells, seed=seed)).mean(axis=0)


def _mean(model: PerturbationModel, start: Start, perturbation: str, n_cells: int, seed: int) -> np.ndarray:
    return model.predict_from(start, perturbation, n_cells=n_cells, seed=seed)[1].mean(axis=0)


def _table(rows: list[_Row], n_folds: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of the models that could predict everything, and those of every pair."""
    names = [name for name in rows[0].predicted if all(name in r.predicted for r in rows)]
    found = pd.DataFrame(
        [
            (name, r.fold, i, pearson_delta(r.predicted[name], r.real, r.base), mae(r.predicted[name], r.real))
            for i, r in enumerate(rows)
            for name in names
        ],
        columns=["model", "fold", "pair", *_METRICS],
    )
    of_fold = found.groupby(["model", "fold"])[list(_METRICS)].mean()
    scores = of_fold.groupby("model").mean()
    spread = of_fold.groupby("model").std(ddof=1).fillna(0.0)
    for metric in _METRICS:
        scores[f"{metric}_spread"] = spread[metric]
    scores["n_groups"], scores["n_folds"] = len(rows), n_folds
    return scores.sort_values("mae", kind="stable"), found


_METRICS = {"pearson_delta": 1, "mae": -1}
_HOW = {"better": "better than", "worse": "worse than"}
_TIE, _MIXED = "level with the best baseline, a tie", "neither better nor worse than the best baseline"
_NAMES = {"pearson_delta": "Pearson delta", "mae": "MAE"}


def compared(of_pair: pd.DataFrame, metric: str, sign: int) -> tuple[str, float, float]:
    """Return the baseline that is best in a metric, how much better ST is, and how far that goes from fold to fold.

    The spread is half of the interval in which a further fold would lie two times of three: the standard deviation over
    folds, made larger as few folds tell it badly (Student's t), and not less than what follows from that over the pairs
    of a fold, since few folds can be alike by luck. It is at least a hundredth, of the baseline's error or of a
    correlation: less nobody would notice.

    Parameters
    ----------
    of_pair
        Scores, with the columns `model`, `fold` and `pair`.
    metric, sign
        Which one, and whether more of it is better, 1, or less, -1.
    """
    wide = of_pair.pivot(index=["fold", "pair"], columns="model", values=metric) * sign
    of_fold = wide.groupby(level="fold").mean()
    best = of_fold.drop(columns="ST").mean().idxmax()
    gain = wide["ST"] - wide[best]
    least = _LEAST_SPREAD * (1.0 if sign > 0 else float(-of_fold[best].mean()))
    return best, float(gain.groupby(level="fold").mean().mean()), max(_spread(gain), least)


def _spread(gain: pd.Series) -> float:
    folds = gain.groupby(level="fold")
    n, further = folds.ngroups, np.sqrt(1 + 1 / folds.ngroups)
    between = folds.mean().std(ddof=1) * stats.t.ppf(_ONE_SIDED, n - 1) if n > 1 else 0.0
    within = gain - folds.transform("mean")
    freedom = len(gain) - n
    by_pairs = np.sqrt(np.square(within).sum() / freedom / (len(gain) / n)) if freedom else 0.0
    return float(further * max(between, by_pairs))


def outcome_of(gains: list[tuple[float, float]]) -> str:
    """Return "better", "level" or "worse": better in one metric by more than its spread, and worse in none."""
    better = any(gain > spread for gain, spread in gains)
    worse = any(gain < -spread for gain, spread in gains)
    if better == worse:
        return "level"
    return "better" if better else "worse"


def _verdict(scores: pd.DataFrame, of_pair: pd.DataFrame, weight: float | None, asked: Asked) -> Verdict:
    gains, parts, best_in, hows = {}, [], {}, set()
    for metric, sign in _METRICS.items():
        best, gain, spread = compared(of_pair, metric, sign)
        gains[metric], best_in[metric] = (gain, spread), best
        ours, theirs = scores.loc["ST", metric], scores.loc[best, metric]
        how = outcome_of([gains[metric]])
        hows.add(how)
        parts.append(
            f"{how} in {_NAMES[metric]}, {ours:.4g} against {theirs:.4g} of {best} (+-{spread:.2g} over folds)"
        )
    outcome = outcome_of(list(gains.values()))
    n_groups, n_folds = (int(scores[name].iloc[0]) for name in ("n_groups", "n_folds"))
    stands = f"{_HOW[outcome]} the best baseline" if outcome != "level" else _TIE if hows == {"level"} else _MIXED
    sentence = (
        f"On {_SCOPES[asked.question]} ST is {stands}: {'; '.join(parts)}. {n_groups} pairs "
        f"of context and perturbation were left out, in {n_folds} {'fold' if n_folds == 1 else 'folds'}."
    )
    # where ST is worse, what is better in that
    lost = [m for m, (gain, spread) in gains.items() if gain < -spread]
    best = best_in[lost[-1] if lost else "mae"]
    return Verdict(scores, sentence, outcome, weight, best, gains)
