"""What of a measured effect is signal: empirical Bayes, with a mixture of normals around zero as the prior."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import norm

# Standard deviations of true effects, in standard errors of their measurement.
_SCALES = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
# Genes without an effect that are added to those measured: where there is no sign of an effect, there is none.
_NULL = 1.0
_STEPS = 200  # of the EM algorithm
_BINS = np.concatenate([np.linspace(0, 8, 161), np.geomspace(8.2, 400, 80)])  # of |effect| / standard error
_ROWS = 512  # worked on at a time
# By how much a gene moves more, or less, than others: factors of the standard deviations of its true effects.
_FACTORS = np.array([0.25, 0.5, 1.0, 2.0, 4.0])
_COMMON = int(np.flatnonzero(_FACTORS == 1)[0])
_FURTHER_ROWS = 5.0  # that a gene counts as having beside the others, in which it moves as far as all genes do
_LEAST_MOVED, _MOST_MOVED = 0.1, 16.0  # of a row, and of a gene in one row, in standard errors


class Shrunken(NamedTuple):
    """Posterior mean and variance of effects, (n_rows, n_genes) each."""

    mean: np.ndarray
    variance: np.ndarray


class Signed(NamedTuple):
    """Posterior mean of effects, and their local false sign rates, (n_rows, n_genes) each.

    That is the probability that the true effect has not the sign of the measured one, being zero or on the other side.
    """

    mean: np.ndarray
    false_sign: np.ndarray


def shrink(effects: np.ndarray, variance: np.ndarray) -> Shrunken:
    """Shrink the effects of each row towards zero, as far as the row looks like noise, and the gene in other rows.

    The true effects of a row are taken to come from a mixture of normal distributions around zero, whose standard
    deviations are multiples, 0 to 64, of the standard error of the measurement; how many genes belong to which of them
    is estimated from the row (adaptive shrinkage, Stephens 2017, with a penalty that favours zero). So a row of noise
    goes to zero, while a gene far beyond its error stays as it is. Then it is done again with standard deviations that
    differ between genes: a gene that moves far in the other rows is believed more, one that never moves less. With one
    row, all genes are alike.

    Parameters
    ----------
    effects
        Measured effects, (n_rows, n_genes).
    variance
        Their squared standard errors, (n_rows, n_genes). An effect with the error 0 is taken as it is.
    """
    mean, uncertain = np.empty_like(effects, dtype=np.float32), np.empty_like(effects, dtype=np.float32)
    blocks = [slice(start, start + _ROWS) for start in range(0, len(effects), _ROWS)]
    common = np.full(effects.shape, _COMMON, np.int8)
    for rows in blocks:
        mean[rows], uncertain[rows] = _shrink_block(effects[rows], variance[rows], common[rows])
    if len(effects) > 1:
        factors = _factors_of_genes(mean, variance)
        for rows in blocks:
            mean[rows], uncertain[rows] = _shrink_block(effects[rows], variance[rows], factors[rows])
    return Shrunken(mean, uncertain)


def shrink_with_signs(effects: np.ndarray, variance: np.ndarray) -> Signed:
    """Shrink the effects of each row by itself, and tell how likely each has the sign that it seems to have.

    What :func:`shrink` does with a single row, so that other rows change nothing.

    Parameters
    ----------
    effects, variance
        As in :func:`shrink`.
    """
    out = Signed(np.empty_like(effects, dtype=np.float32), np.empty_like(effects, dtype=np.float32))
    for start in range(0, len(effects), _ROWS):
        rows = slice(start, start + _ROWS)
        z, known = _standardised(effects[rows], variance[rows])
        shares = _mixture(_counts(z, known, np.full(z.shape, _COMMON, np.int8)))
        keep, wrong = _curves(shares)[0][_COMMON], _false_signs(shares)
        out.mean[rows] = effects[rows] * np.where(known, 1, _at(z, keep))
        out.false_sign[rows] = np.where(known, effects[rows] == 0, _at(z, wrong))
    return out


def _at(z: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Read each row's curve, (n_rows, n_bins), at the values of that row."""
    return np.stack([np.interp(x, _BINS, curve) for x, curve in zip(z, curves, strict=True)])


def _false_signs(shares: np.ndarray) -> np.ndarray:
    """Probability that an effect has not the sign of its measurement, at each of `_BINS`, (n_rows, n_bins)."""
    of_component = norm.cdf(-np.sqrt(_SCALES**2 / (1 + _SCALES**2)) * _BINS[:, None])
    of_component[:, _SCALES == 0] = 1  # no effect has no sign
    return (_posterior(shares, _SCALES) * of_component).sum(axis=2)


def _factors_of_genes(kept: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return, as codes of `_FACTORS`, how far each gene moves in the other rows, compared with all genes there."""
    moved = np.square(np.minimum(np.abs(kept) / np.sqrt(np.where(variance > 0, variance, np.inf)), _MOST_MOVED))
    of_row = np.maximum(moved.mean(axis=1, keepdims=True), _LEAST_MOVED)
    further = _FURTHER_ROWS * np.median(of_row)
    ratio = (moved.sum(axis=0) - moved + further) / (of_row.sum() - of_row + further)
    between = np.sqrt(_FACTORS[:-1] * _FACTORS[1:])
    return np.searchsorted(between, np.sqrt(ratio)).astype(np.int8)


def _shrink_block(effects: np.ndarray, variance: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z, known = _standardised(effects, variance)
    keep, spread = _curves(_mixture(_counts(z, known, factors)))
    mean, uncertain = effects.astype(np.float32), np.zeros_like(z, dtype=np.float32)
    for f in np.unique(factors):
        for i in range(len(z)):
            genes = np.flatnonzero((factors[i] == f) & ~known[i])
            mean[i, genes] *= np.interp(z[i, genes], _BINS, keep[f, i])
            uncertain[i, genes] = variance[i, genes] * np.interp(z[i, genes], _BINS, spread[f, i])
    return mean, uncertain


def _standardised(effects: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return |effect| / error, and which effects are known without error."""
    error = np.sqrt(variance, dtype=np.float32)
    known = error == 0
    return np.abs(effects) / np.where(known, 1, error), known


def _counts(z: np.ndarray, known: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """How many genes of each row lie in each bin, by their factor: (n_factors, n_rows, n_bins)."""
    bins = np.minimum(np.searchsorted(_BINS, z, side="right") - 1, len(_BINS) - 1)
    counts = np.zeros((len(_FACTORS), len(z), len(_BINS)))
    rows = np.repeat(np.arange(len(z)), (~known).sum(axis=1))
    np.add.at(counts, (factors[~known], rows, bins[~known]), 1)
    return counts


def _mixture(counts: np.ndarray) -> np.ndarray:
    """Share of the genes in each component, (n_rows, n_components), by the EM algorithm on binned |z|.

    `counts` is of shape (n_factors, n_rows, n_bins).
    """
    middle = np.append((_BINS[:-1] + _BINS[1:]) / 2, _BINS[-1])
    likely = {f: _likelihood(middle, _SCALES * _FACTORS[f]) for f in np.flatnonzero(counts.any(axis=(1, 2)))}
    shares = np.full((counts.shape[1], len(_SCALES)), 1 / len(_SCALES))
    for _ in range(_STEPS):
        n_genes = np.zeros_like(shares)
        for f, p in likely.items():
            n_genes += shares * ((counts[f] / np.maximum(shares @ p.T, 1e-300)) @ p)
        n_genes[:, 0] += _NULL
        shares = n_genes
        shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _likelihood(z: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Density of |z| under each component, (n, n_components), up to what is common to all components of one z."""
    variance = 1 + scales**2
    log = -0.5 * (z[:, None] ** 2 / variance + np.log(variance))
    return np.exp(log - log.max(axis=1, keepdims=True))


def _posterior(shares: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Probability of each component at each of `_BINS`, (n_rows, n_bins, n_components)."""
    posterior = shares[:, None, :] * _likelihood(_BINS, scales)
    posterior /= np.maximum(posterior.sum(axis=2, keepdims=True), 1e-300)
    return posterior


def _curves(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of an effect is kept, and its posterior variance in squared standard errors.

    For each of `_FACTORS`, at each of `_BINS`: (n_factors, n_rows, n_bins) each.
    """
    kept, spread = [], []
    for scales in _SCALES * _FACTORS[:, None]:
        posterior = _posterior(shares, scales)
        of_component = scales**2 / (1 + scales**2)
        keep = posterior @ of_component
        between = posterior @ of_component**2 - keep**2
        kept.append(keep)
        spread.append(posterior @ of_component + np.maximum(between, 0) * _BINS**2)
    return np.stack(kept), np.stack(spread)
