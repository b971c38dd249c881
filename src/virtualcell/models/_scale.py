"""The scale that effects are carried over on: logarithms of expression plus a constant."""

from __future__ import annotations

import dataclasses

import numpy as np

from virtualcell.models._effects import Effects

# Counts per 10,000 that are added before the logarithm is taken: 10 per million. What raises a gene from 1 to 2 counts
# per 10,000 in one cell type raises it from 10 to 20 in another; far below this constant, where a ratio is noise over
# noise, changes add. With 3 or 30 per million predictions for contexts left out of four data sets were as good or
# worse, and with 1 per 10,000, where changes of the mean logarithm add, worse in all.
OFFSET = 0.1


def on_ratio_scale(mean: np.ndarray) -> np.ndarray:
    """Return means of log(1 + counts per 10,000), m, as log(exp(m) - 1 + offset)."""
    return np.log(np.expm1(mean) + OFFSET)


def change_of_mean(base: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """Return the change of the mean that an effect on the scale of ratios makes where the mean is `base`."""
    return np.log1p(np.maximum(np.exp(on_ratio_scale(base) + effect) - OFFSET, 0)) - base


def slope_of_mean(base: np.ndarray) -> np.ndarray:
    """Return by how much the mean changes with an effect on the scale of ratios, where it is `base`."""
    return (np.expm1(base) + OFFSET) / np.exp(base)


def as_ratios(effects: Effects) -> Effects:
    """Return measured effects on the scale of ratios, with their errors (delta method)."""
    out, variance = np.empty_like(effects.effects), np.empty_like(effects.variance)
    for i, c in enumerate(effects.context):
        base = effects.controls[c]
        reached = np.maximum(base + effects.effects[i], 0)
        out[i] = on_ratio_scale(reached) - on_ratio_scale(base)
        variance[i] = effects.variance[i] / slope_of_mean(reached) ** 2
    return dataclasses.replace(effects, effects=out, variance=variance)
