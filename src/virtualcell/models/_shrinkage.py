"""What of a measured effect is signal: empirical Bayes, with a mixture of normals around zero as the prior."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Standard deviations of true effects, in standard errors of their measurement.
_SCALES = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
# Genes without an effect that are added to those measured: where there is no sign of an effect, there is none.
_NULL = 1.0
_STEPS = 200  # of the EM algorithm
_BINS = np.concatenate([np.linspace(0, 8, 161), np.geomspace(8.2, 400, 80)])  # of |effect| / standard error
_ROWS = 512  # worked on at a time


class Shrunken(NamedTuple):
    """Posterior mean and variance of effects, (n_rows, n_genes) each."""

    mean: np.ndarray
    variance: np.ndarray


def shrink(effects: np.ndarray, variance: np.ndarray) -> Shrunken:
    """Shrink the effects of each row towards zero, as far as the row as a whole looks like noise.

    The true effects of a row are taken to come from a mixture of normal distributions around zero, whose standard
    deviations are multiples, 0 to 64, of the standard error of the measurement; how many genes belong to which of them
    is estimated from the row (adaptive shrinkage, Stephens 2017, with a penalty that favours zero). So a row of noise
    goes to zero, while a gene far beyond its error stays as it is.

    Parameters
    ----------
    effects
        Measured effects, (n_rows, n_genes).
    variance
        Their squared standard errors, (n_rows, n_genes). An effect with the error 0 is taken as it is.
    """
    mean, uncertain = np.empty_like(effects, dtype=np.float32), np.empty_like(effects, dtype=np.float32)
    for start in range(0, len(effects), _ROWS):
        rows = slice(start, start + _ROWS)
        mean[rows], uncertain[rows] = _shrink_block(effects[rows], variance[rows])
    return Shrunken(mean, uncertain)


def _shrink_block(effects: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    error = np.sqrt(variance, dtype=np.float32)
    known = error == 0
    z = np.abs(effects) / np.where(known, 1, error)
    bins = np.minimum(np.searchsorted(_BINS, z, side="right") - 1, len(_BINS) - 1)
    counts = np.zeros((len(z), len(_BINS)))
    np.add.at(counts, (np.repeat(np.arange(len(z)), (~known).sum(axis=1)), bins[~known]), 1)
    keep, spread = _curves(_mixture(counts))
    mean, uncertain = np.empty_like(z), np.empty_like(z)
    for i in range(len(z)):
        mean[i] = effects[i] * np.where(known[i], 1, np.interp(z[i], _BINS, keep[i]))
        uncertain[i] = variance[i] * np.interp(z[i], _BINS, spread[i])
    return mean, uncertain


def _mixture(counts: np.ndarray) -> np.ndarray:
    """Share of the genes in each component, (n_rows, n_components), by the EM algorithm on binned |z|."""
    middle = np.append((_BINS[:-1] + _BINS[1:]) / 2, _BINS[-1])
    likely = _likelihood(middle)
    shares = np.full((len(counts), len(_SCALES)), 1 / len(_SCALES))
    for _ in range(_STEPS):
        total = np.maximum(shares @ likely.T, 1e-300)
        shares = shares * ((counts / total) @ likely)
        shares[:, 0] += _NULL
        shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _likelihood(z: np.ndarray) -> np.ndarray:
    """Density of |z| under each component, (n, n_components), up to what is common to all components of one z."""
    variance = 1 + _SCALES**2
    log = -0.5 * (z[:, None] ** 2 / variance + np.log(variance))
    return np.exp(log - log.max(axis=1, keepdims=True))


def _curves(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of an effect is kept, and its posterior variance in squared standard errors, at each of `_BINS`."""
    posterior = shares[:, None, :] * _likelihood(_BINS)
    posterior /= np.maximum(posterior.sum(axis=2, keepdims=True), 1e-300)
    of_component = _SCALES**2 / (1 + _SCALES**2)
    keep = posterior @ of_component
    between = posterior @ of_component**2 - keep**2
    return keep, posterior @ of_component + np.maximum(between, 0) * _BINS**2
