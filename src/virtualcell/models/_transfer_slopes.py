"""How much of an effect carries over to another experiment, fitted on experiments left out. Pure numpy, no AnnData."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from sklearn.utils.extmath import randomized_svd

from virtualcell.models._closed_forms import unit_rows
from virtualcell.models._transfer_fit import Part, combine, neighbours_mean, neighbours_of_each

logger = logging.getLogger(__name__)

_MOST_COMPARED = 500  # perturbations that are told apart, spread evenly over all
_FEWEST = 20  # perturbations that have axes to speak of
# What effects of one experiment are worth in another where nothing tells: copied as they are, they are worse than no
# change, and slopes that could be fitted lay between .14 and .35.
USUAL_SLOPE = 0.2
AXES = (5, 10, 20, 40, 80)  # numbers of axes to choose from


@dataclass(frozen=True, eq=False)
class Fold:
    """A part that is left out, and what predicts it.

    Parameters
    ----------
    target
        The part that is left out.
    rest
        The mean of the others.
    neighbours
        What the neighbours of perturbations are looked up in.
    """

    target: Part
    rest: Part
    neighbours: Part


def folds_of(units: Mapping[str, Part], weights: Sequence[float], own: str | None = None) -> list[Fold]:
    """Leave parts out: `own` alone where it is named, else each in turn, if it shares perturbations with the others."""
    names, parts, out = list(units), list(units.values()), []
    for i, name in enumerate(names if len(names) > 1 else []):
        if own is not None and name != own:
            continue
        others = [j for j in range(len(names)) if j != i]
        rest = combine([parts[j] for j in others], [weights[j] for j in others])
        if len(np.intersect1d(rest.rows, parts[i].rows)):
            # one's own perturbations that were not measured have neighbours in one's own data too
            out.append(Fold(parts[i], rest, combine(parts, weights) if name == own else rest))
    return out


@dataclass(frozen=True, eq=False)
class Slopes:
    """How much of each part of a prediction carries over to another experiment, each from 0 to 1.

    Parameters
    ----------
    effect, smooth, neighbours
        Those of a measured perturbation: of its own effect, of the part of it that lies on the leading axes of all
        effects, and of the mean effect of its neighbours.
    unmeasured
        That of the neighbours' effects for a perturbation that was never measured.
    mean
        That of the mean effect over perturbations.
    n_axes
        How many axes there are.
    """

    effect: float
    smooth: float
    neighbours: float
    unmeasured: float
    mean: float
    n_axes: int

    @classmethod
    def fit(cls, folds: Sequence[Fold], features: np.ndarray, k: int) -> Slopes:
        """Fit on parts left out; NaN where nothing can be.

        Parameters
        ----------
        folds
            What is left out, and what predicts it.
        features
            As in :func:`virtualcell.models._transfer_fit.neighbours_of_each`.
        k
            Number of neighbours.
        """
        unmeasured, means, measured, cases = _Squares(1), _Squares(1), {0: _Squares(2)}, []
        fewest = min((len(fold.rest.rows) for fold in folds), default=0)
        ranks = [n for n in AXES if fewest >= _FEWEST and n <= fewest // 2]
        measured |= {n: _Squares(3) for n in ranks}
        for fold in folds:
            target, rest, pool = fold.target, fold.rest, fold.neighbours
            means.add(target.mean, rest.mean)
            found = neighbours_of_each(features, pool.rows, target.rows, k)
            near = neighbours_mean(pool.effects, [np.searchsorted(pool.rows, rows) for rows in found])
            has = np.array([len(rows) > 0 for rows in found])
            unmeasured.add(target.effects[has], near[has])
            _, here, there = np.intersect1d(target.rows, rest.rows, return_indices=True)
            truth, own, near = target.effects[here], rest.effects[there], near[here]
            measured[0].add(truth, own, near)
            axes = _axes(rest.effects, ranks[-1]) if ranks else None
            for n in ranks:
                measured[n].add(truth, own, near, on_axes(axes, n, there))
            if ranks:
                cases.append((truth, own, near, axes, there))
        best = next(n for n in sorted(measured, key=lambda n: measured[n].least()) if _keeps_apart(cases, measured, n))
        effect, neighbours, smooth = [*measured[best].slopes(), 0.0][:3]
        (of_unmeasured,), (of_mean,) = unmeasured.slopes(), means.slopes()
        return cls(effect, smooth, neighbours, of_unmeasured, of_mean, n_axes=best if smooth else 0)

    def report(self, k: int | None, left_out: str) -> None:
        """Say what the slopes are: of `k` neighbours where there are any, fitted on what was left out."""
        logger.info(
            "Transfer: effects are multiplied by %.2f, the mean effect by %.2f; fitted on %s.",
            *(self.effect, self.mean, left_out),
        )
        if self.n_axes:
            logger.info(
                "Transfer: what lies on the %d leading axes of effects is added times %.2f.", self.n_axes, self.smooth
            )
        if k is not None:
            logger.info(
                "Transfer: the mean of %d neighbours is added times %.2f, or times %.2f where it is all there is.",
                *(k, self.neighbours, self.unmeasured),
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all by the names that they have in a file."""
        return {k if k == "n_axes" else f"slope_of_{k}": np.array(v) for k, v in asdict(self).items()}

    def carried(self, effects: np.ndarray) -> np.ndarray:
        """Return what of measured effects carries over, (n_perturbations, n_genes); NaN where not measured."""
        out = np.float32(self.effect) * effects
        if self.n_axes:
            axes, every = _axes(effects, self.n_axes), np.arange(len(effects))
            out += np.float32(self.smooth) * on_axes(axes, self.n_axes, every)
        return out


def choose_slopes(
    folds: Sequence[Fold], whole: Part, features: np.ndarray, k: int, *, stated: float | None = None
) -> Slopes:
    """Fit slopes on what is left out, or take the stated one, or the usual one where there is neither."""
    found = Slopes.fit(folds, features, k)
    if stated is not None:
        found = replace(found, effect=stated, smooth=0.0, n_axes=0, neighbours=0.0, unmeasured=stated)
    elif np.isnan(found.effect):
        logger.warning(
            "Transfer: there is no second source, context or data of one's own with the same perturbations, so that "
            "how much carries over cannot be told. Effects are multiplied by %g, which is usual between experiments. "
            "State slope=, or add a source.",
            USUAL_SLOPE,
        )
        found = replace(found, effect=USUAL_SLOPE, neighbours=0.0)
    if np.isnan(found.unmeasured):
        found = replace(found, unmeasured=float(np.nan_to_num(slope_within(whole, features, k))))
    return replace(found, mean=1.0) if np.isnan(found.mean) else found


def slope_within(whole: Part, features: np.ndarray, k: int) -> float:
    """Slope of measured effects on those of their neighbours, within one table; NaN without features."""
    nothing = replace(whole, rows=whole.rows[:0], effects=whole.effects[:0], share=whole.share[:0])
    return Slopes.fit([Fold(whole, nothing, whole)], features, k).unmeasured


class _Squares:
    """Least squares of truths on predictors, every truth counting the same, with all slopes in [0, 1]."""

    def __init__(self, n: int) -> None:
        self.left, self.right, self.n = np.zeros((n, n)), np.zeros(n), 0

    def add(self, truth: np.ndarray, *predictors: np.ndarray) -> None:
        """Add a truth and its predictors, arrays of one shape, NaN where not known."""
        here = ~(np.isnan(truth) | np.any([np.isnan(x) for x in predictors], axis=0))
        y, xs = truth[here].astype(np.float64), [x[here].astype(np.float64) for x in predictors]
        if (size := float(y @ y)) > 0:
            self.left += np.array([[a @ b for b in xs] for a in xs]) / size
            self.right += np.array([x @ y for x in xs]) / size
            self.n += 1

    def slopes(self) -> list[float]:
        """Return the slopes; NaN where there is nothing to fit on."""
        out = np.zeros(len(self.right))
        if not self.left.any():
            return [float("nan")] * len(out)
        for _ in range(500):  # coordinate descent, exact for a convex problem in a box
            for i in np.flatnonzero(np.diag(self.left) > 0):
                out[i] = np.clip(out[i] + (self.right[i] - self.left[i] @ out) / self.left[i, i], 0, 1)
        return out.tolist()

    def least(self) -> float:
        """Return the sum over truths of what the slopes leave of them."""
        x = np.nan_to_num(self.slopes())
        return float(self.n - 2 * self.right @ x + x @ self.left @ x)


def _axes(effects: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of effects on their leading principal axes, and the axes; genes not measured count as unchanged."""
    u, s, axes = randomized_svd(np.nan_to_num(effects), n, n_iter=4, random_state=0)
    return u * s, axes


def on_axes(axes: tuple[np.ndarray, np.ndarray], n: int, rows: np.ndarray) -> np.ndarray:
    """Return the part of some effects that lies on the first n axes."""
    return axes[0][rows, :n] @ axes[1][:n]


def _keeps_apart(cases: Sequence[tuple], measured: Mapping[int, _Squares], n_axes: int) -> bool:
    """Tell whether smoothing costs at most one standard error of what tells perturbations apart.

    It makes perturbations more alike, which may lessen the error and yet lose what is particular to each.
    """
    if n_axes == 0:
        return True
    lost = _told_apart(cases, measured[0].slopes(), 0) - _told_apart(cases, measured[n_axes].slopes(), n_axes)
    return bool(lost.mean() <= lost.std() / np.sqrt(len(lost)))


def _told_apart(cases: Sequence[tuple], slopes: Sequence[float], n_axes: int) -> np.ndarray:
    """Share of other predictions that match what was left out worse than its own does (Pearson)."""
    shares = []
    for truth, own, near, axes, rows in cases:
        some = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_COMPARED)).astype(int))
        missing = np.isnan(truth[some]) | np.isnan(own[some])
        predicted = slopes[0] * own[some] + slopes[1] * near[some]
        if n_axes:
            predicted = predicted + slopes[2] * on_axes(axes, n_axes, rows[some])
        x, y = (np.where(missing, 0, values).astype(np.float64) for values in (predicted, truth[some]))
        match = unit_rows(y - y.mean(axis=1, keepdims=True)) @ unit_rows(x - x.mean(axis=1, keepdims=True)).T
        other = ~np.eye(len(some), dtype=bool)
        shares.append(((match < np.diag(match)[:, None]) & other).sum(axis=1) / max(len(some) - 1, 1))
    return np.concatenate(shares)
