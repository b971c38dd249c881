"""The ceiling of a score: real cells against real cells, as they are and corrected for having half of them.

One half of the cells of each perturbation predicts the other half. Both halves carry noise, that of half of the cells,
whereas a prediction of the true mean is compared with all cells and has none: the raw ceiling lies below what a good
prediction reaches. The corrected one estimates what the truth itself would score against all n observed cells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from virtualcell.tl._cells import Cells
from virtualcell.tl._evaluate_checks import COLUMNS
from virtualcell.tl._scores import MAX_CELLS, Comparison, score_rows

logger = logging.getLogger(__name__)

# Sources of the rows in tables of scores.
CEILING, CORRECTED_CEILING = "ceiling", "corrected ceiling"

_N_SPLITS = 5


@dataclass(frozen=True)
class Sizes:
    """Numbers of cells of each perturbation: all that were observed, of either half, and of the scored prediction."""

    whole: np.ndarray
    half: np.ndarray
    predicted: np.ndarray


def ceilings(cells: Cells, context: str, kept: dict, *, own_control: bool, n_predicted: dict[str, int]) -> pd.DataFrame:
    """Score halves of real cells against each other, the mean over five splits, and correct that for the halves.

    Splits in which a metric is not defined are left out of its mean.

    Parameters
    ----------
    cells
        Real cells of one context, perturbed and control.
    context
        Its name.
    kept
        What the comparison with the prediction was made with: arguments of :class:`Comparison` beside the cells.
    own_control
        Whether each half has its own half of the controls; they share all of them otherwise.
    n_predicted
        Number of cells that the prediction has of each perturbation: the truth is given as many.

    Returns
    -------
    Rows of the sources "ceiling" and "corrected ceiling"; the latter for metrics for which there is a correction.
    """
    control, perturbations = kept["control"], kept["perturbations"]
    rows = {name: np.arange(*cells.span[name]) for name in cells.names}
    split = [p for p in perturbations if len(rows[p]) > 1]
    if len(split) < len(perturbations):
        logger.warning("%d perturbations of %s have one cell and no ceiling.", len(perturbations) - len(split), context)
    if not split:
        return pd.DataFrame(columns=COLUMNS)
    runs = []
    for i in range(_N_SPLITS):
        rng = np.random.default_rng([kept["seed"], i])
        halves = ({}, {control: rows[control]})
        for p in [*split, control] if own_control else split:
            shuffled = rng.permutation(rows[p])
            middle = len(shuffled) // 2
            halves[0][p], halves[1][p] = shuffled[:middle], shuffled[middle : 2 * middle]
        comparison = Comparison(*(cells.take(h) for h in halves), **{**kept, "perturbations": split})
        runs.append(score_rows(comparison, CEILING, context))
    values = np.ma.masked_invalid([run["value"].to_numpy() for run in runs])  # halves may have no significant gene
    raw = runs[0].assign(value=values.mean(axis=0).filled(np.nan))
    whole = np.array([len(rows[p]) for p in split])
    sizes = Sizes(whole, whole // 2, np.array([n_predicted[p] for p in split]))
    return pd.concat([raw, _corrected(raw, sizes)], ignore_index=True)


def _corrected(raw: pd.DataFrame, sizes: Sizes) -> pd.DataFrame:
    """Rows of the corrected ceiling, from the means over splits: a mean has less noise to bend than its parts."""
    known = [(name, rows) for name, rows in raw.groupby("metric", sort=False) if name in CORRECTIONS]
    frames = [
        rows.assign(value=CORRECTIONS[name](rows["value"].to_numpy(), sizes), source=CORRECTED_CEILING)
        for name, rows in known
    ]
    return pd.concat(frames) if frames else raw[:0]


def _squared(raw: np.ndarray, n: Sizes) -> np.ndarray:
    """Take off noise: two halves differ by that of both, 2 s² / half, the truth by that of all cells, s² / whole."""
    return raw * n.half / (2 * n.whole)


def _absolute(raw: np.ndarray, n: Sizes) -> np.ndarray:
    """Take the root: the mean size of a normal error is proportional to the root of its variance."""
    return raw * np.sqrt(n.half / (2 * n.whole))


def _correlation(raw: np.ndarray, n: Sizes) -> np.ndarray:
    """Correct by Spearman and Brown: the reliability r of a half becomes R = k r / (1 + (k - 1) r) of k halves.

    Halves correlate by their reliability, the truth with all cells by its root. Halves that do not correlate have no
    root, and stay as they are.
    """
    k = n.whole / n.half
    positive = np.maximum(raw, 0)
    return np.where(raw > 0, np.sqrt(k * positive / (1 + (k - 1) * positive)), raw)


def _energy(raw: np.ndarray, n: Sizes) -> np.ndarray:
    """Take off bias: a cell's distance to itself counts, so that D (1 / n + 1 / m) / 2 is expected for n and m cells.

    D is the mean distance of two cells of the same distribution. Halves are expected to be at D / half.
    """
    whole, half, predicted = (np.minimum(size, MAX_CELLS) for size in (n.whole, n.half, n.predicted))
    return raw * half / 2 * (1 / predicted + 1 / whole)


def _pdisc_norm(raw: np.ndarray, n: Sizes) -> np.ndarray:
    """Treat the score as a correlation, on a scale where chance (1 / perturbations) is 0 and the best 1.

    It is no correlation, and this is a rough guide: where all effects are equally weak, the truth is above it.
    """
    if len(raw) < 2:  # nothing to be told apart from
        return raw
    chance = 1 / len(raw)
    return chance + (1 - chance) * _correlation((raw - chance) / (1 - chance), n)


def _discrimination(raw: np.ndarray, n: Sizes) -> np.ndarray:
    """Correct it on the scale of the challenge."""
    return (1 + _pdisc_norm(2 * raw - 1, n)) / 2


CORRECTIONS: dict[str, Callable[[np.ndarray, Sizes], np.ndarray]] = {
    **dict.fromkeys(("pearson_delta", "pearson_delta_top50_de", "pearson_delta_top100_de"), _correlation),
    **dict.fromkeys(("mae", "mae_delta"), _absolute),
    **dict.fromkeys(("mse", "mse_delta"), _squared),
    "energy_distance": _energy,
    **dict.fromkeys(("discrimination_l1", "discrimination_l2", "discrimination_cosine"), _discrimination),
    **dict.fromkeys(("pdisc_norm_l1", "pdisc_norm_cosine"), _pdisc_norm),
}
