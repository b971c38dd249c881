"""How effects of several experiments become one: centred, shrunken, averaged, scaled. Pure numpy, no AnnData."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from virtualcell.data._tables import as_table
from virtualcell.models._closed_forms import unit_rows
from virtualcell.models._shrinkage import shrink
from virtualcell.models._transfer_sources import SourceEffects

logger = logging.getLogger(__name__)

NEIGHBOURS = (5, 10, 20, 30, 50, 100)  # numbers of neighbours to choose from
_N_AXES = 100  # principal axes of the features
_N_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Part:
    """What one context of a source, or a source as the mean of its contexts, tells of perturbations.

    Parameters
    ----------
    rows
        Numbers of the perturbations it has, sorted.
    effects
        Their effects relative to the mean of the others, (n_rows, n_genes); NaN where not measured.
    mean
        Mean effect over its perturbations, (n_genes,); NaN where fewer than two were measured, or without controls.
    share
        Share of each perturbation in that mean, (n_rows,).
    """

    rows: np.ndarray
    effects: np.ndarray
    mean: np.ndarray
    share: np.ndarray


def parts_of(source: SourceEffects, perturbations: Sequence[str], genes: Sequence[str]) -> dict[str, Part]:
    """Centre and shrink the effects of each context, on genes and perturbations that are common to all sources."""
    number = {name: i for i, name in enumerate(perturbations)}
    place = pd.Index(source.genes).get_indexer(pd.Index(genes))
    out = {}
    for context in np.unique(source.context):
        here = source.context == context
        rows = np.array([number[p] for p in source.perturbation[here]])
        centred, mean = centre(source.effects[here], has_control=source.has_control)
        if source.variance is not None:
            missing = np.isnan(centred)
            error = np.where(missing, 0, source.variance[here]).astype(np.float32)
            centred = np.where(missing, np.nan, shrink(np.nan_to_num(centred), error).mean)
        order = np.argsort(rows, kind="stable")
        effects = np.full((len(rows), len(genes)), np.nan, np.float32)
        effects[:, place >= 0] = centred[order][:, place[place >= 0]]
        means = np.full(len(genes), np.nan, np.float32)
        if source.has_control:
            means[place >= 0] = mean[place[place >= 0]]
        out[str(context)] = Part(rows[order], effects, means, np.full(len(rows), 1 / len(rows)))
    return out


def centre(effects: np.ndarray, *, has_control: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Take from each row the mean of the others; return the rows, and the mean of all.

    A row without others stays as it is where it is an effect, and tells nothing where it is a level; it is no mean.
    """
    measured = ~np.isnan(effects)
    n = measured.sum(axis=0)
    total = np.where(measured, effects, 0).sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        others = (total - effects) / (n - 1)
        mean = np.where(n > 1, total / n, np.nan).astype(np.float32)
    alone = 0.0 if has_control else np.nan
    return (effects - np.where(n > 1, others, alone)).astype(np.float32), mean


def combine(parts: Sequence[Part], weights: Sequence[float] | None = None) -> Part:
    """Average parts gene by gene, over those that have the gene and the perturbation."""
    weights = np.ones(len(parts)) if weights is None else np.asarray(weights, dtype=float)
    rows = np.unique(np.concatenate([part.rows for part in parts]))
    shape = (len(rows), parts[0].effects.shape[1])
    total, weight = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    means, mean_weight = np.zeros(shape[1]), np.zeros(shape[1])
    share, share_weight = np.zeros(len(rows)), np.zeros(len(rows))
    for part, w in zip(parts, weights, strict=True):
        at = np.searchsorted(rows, part.rows)
        total[at] += w * np.nan_to_num(part.effects)
        weight[at] += w * ~np.isnan(part.effects)
        share[at] += w * part.share
        share_weight[at] += w
        means += w * np.nan_to_num(part.mean)
        mean_weight += w * ~np.isnan(part.mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Part(rows, total / weight, (means / mean_weight).astype(np.float32), share / share_weight)


def rescaled(part: Part, reference: Part) -> Part:
    """Bring a part to the spread that the reference has on the perturbations and genes that both have."""
    _, here, there = np.intersect1d(part.rows, reference.rows, return_indices=True)
    ours, theirs = part.effects[here], reference.effects[there]
    both = ~(np.isnan(ours) | np.isnan(theirs))
    if not both.any():
        ours, theirs = part.effects, reference.effects
        ours, theirs = ours[~np.isnan(ours)], theirs[~np.isnan(theirs)]
    else:
        ours, theirs = ours[both], theirs[both]
    spread = np.sqrt(np.mean(ours**2, dtype=np.float64))
    factor = np.float32(np.sqrt(np.mean(theirs**2, dtype=np.float64)) / spread if spread > 0 else 1)
    return replace(part, effects=part.effects * factor, mean=part.mean * factor)


def in_one_unit(units: dict[str, Part], other: Sequence[str]) -> dict[str, Part]:
    """Bring the parts named in `other`, in units of their own, to the spread of the rest, or else of the first."""
    if not other:
        return units
    plain = [part for name, part in units.items() if name not in other]
    if not plain:
        logger.warning("Transfer: all sources have unit='other', and so have predictions, which are added to cells.")
    reference = combine(plain) if plain else units[other[0]]
    return {name: rescaled(part, reference) if name in other else part for name, part in units.items()}


# -- trust ------------------------------------------------------------------------------------------------------------


def agreements(parts: Sequence[Part], n: int) -> np.ndarray:
    """Mean cosine between the effects that parts give a perturbation, (n,); NaN where fewer than two have it.

    Cosines are of the genes that all of these parts have.
    """
    has = np.zeros((len(parts), n), bool)
    for i, part in enumerate(parts):
        has[i, part.rows] = True
    out = np.full(n, np.nan, np.float32)
    for p in np.flatnonzero(has.sum(axis=0) > 1):
        found = [parts[i].effects[np.searchsorted(parts[i].rows, p)] for i in np.flatnonzero(has[:, p])]
        out[p] = mean_cosine(np.stack(found))
    return out


def mean_cosine(effects: np.ndarray) -> float:
    """Mean cosine between every two rows, on the genes that all have."""
    here = effects[:, ~np.isnan(effects).any(axis=0)].astype(np.float64)
    k = len(here)
    if k < 2 or not here.size:
        return float("nan")
    return float(((unit_rows(here).sum(axis=0) ** 2).sum() - (here.any(axis=1)).sum()) / (k * (k - 1)))


# -- neighbours -------------------------------------------------------------------------------------------------------


def standardised(features: np.ndarray) -> np.ndarray:
    """Features at mean 0 and variance 1 on their first 100 principal axes, each row at unit length."""
    values = StandardScaler().fit_transform(np.asarray(features, dtype=np.float64))
    if min(values.shape) > _N_AXES:
        values = PCA(_N_AXES, random_state=0).fit_transform(values)
    return unit_rows(values).astype(np.float32)


def checked_features(features: pd.DataFrame) -> pd.DataFrame:
    """Return the features, standardised, in the order of their names."""
    index = features.index.astype(str)
    if not index.is_unique:
        doubled = list(index[index.duplicated()][:3])
        raise ValueError(f"perturbation_features has several rows for {doubled}; keep one of each.")
    values = as_table(features, "perturbation_features").to_numpy()
    order = np.argsort(index.to_numpy(dtype=str), kind="stable")
    return pd.DataFrame(standardised(values[order]), index=index[order])


def nearest(query: np.ndarray, features: np.ndarray, k: int, *, allowed: np.ndarray | None = None) -> np.ndarray:
    """Numbers of the k rows of features with the largest cosine to each query, (n_query, k)."""
    match = query @ features.T
    if allowed is not None:
        match = np.where(allowed, match, -np.inf)
    return np.argsort(-match, axis=1, kind="stable")[:, :k]


def neighbours_mean(effects: np.ndarray, neighbours: Sequence[np.ndarray]) -> np.ndarray:
    """Mean effect of the neighbours that have the gene, (n_query, n_genes); 0 where none has."""
    out = np.zeros((len(neighbours), effects.shape[1]), np.float32)
    for i, rows in enumerate(neighbours):
        found = effects[rows]
        here = ~np.isnan(found)
        out[i] = np.where(here, found, 0).sum(axis=0) / np.maximum(here.sum(axis=0), 1)
    return out


def choose_k(features: np.ndarray, effects: np.ndarray) -> int:
    """Choose the number of neighbours whose mean is the most like perturbations left out (mean cosine, five folds)."""
    n = len(features)
    choices = [k for k in NEIGHBOURS if k < n - n // _N_FOLDS] or [max(1, min(NEIGHBOURS[0], n - 1))]
    if len(choices) == 1:
        return choices[0]
    values = np.nan_to_num(effects).astype(np.float64)
    products = values @ values.T  # all that cosines of means need
    fold = np.arange(n) % _N_FOLDS
    order = nearest(features, features, choices[-1], allowed=fold[:, None] != fold)
    length = np.sqrt(np.maximum(np.diag(products), 1e-30))
    scores = []
    for k in choices:
        member = np.zeros((n, n))
        np.put_along_axis(member, order[:, :k], 1 / k, axis=1)
        crossed = member @ products
        own = np.einsum("ij,ij->i", crossed, member)
        scores.append(np.mean(np.diag(crossed) / length / np.sqrt(np.maximum(own, 1e-30))))
    return choices[int(np.argmax(scores))]


def neighbours_of_each(features: np.ndarray, rows: np.ndarray, wanted: np.ndarray, k: int) -> list[np.ndarray]:
    """Numbers of the k neighbours of each wanted perturbation among others; none for one without features.

    Parameters
    ----------
    features
        Rows of features of the perturbations, (n_perturbations, n_dims), zeros for one without.
    rows
        Perturbations that may be neighbours.
    wanted
        Perturbations whose neighbours are looked for; none is its own.
    k
        How many there are at most.
    """
    has = features.any(axis=1)
    rows = rows[has[rows]]
    order = nearest(features[wanted], features[rows], k + 1)
    return [rows[o[rows[o] != p]][:k] if has[p] else rows[:0] for o, p in zip(order, wanted, strict=True)]


def report_coverage(tables: Mapping[str, SourceEffects], learned: Mapping[str, np.ndarray], n_genes: int) -> None:
    """Say what each source has of a model's genes, and what all of them have together."""
    for name, table in tables.items():
        logger.info(
            "Transfer: %s has %d perturbations in %d contexts and %d of %d genes.",
            *(name, len(set(table.perturbation)), len(set(table.context)), len(table.genes), n_genes),
        )
    effects, n_agree = learned["effects"], int((~np.isnan(learned["agreement"])).sum())
    n_silent = int(np.isnan(effects).all(axis=0).sum())
    logger.info(
        "Transfer: %d perturbations, %d of them measured more than once; %d of %d genes are in no source and "
        "stay as they are.",
        *(len(effects), n_agree, n_silent, n_genes),
    )
