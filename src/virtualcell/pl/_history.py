"""How the loss fell in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from virtualcell._errors import unknown_name
from virtualcell.pl._style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    axes_or_new,
    despine,
    ink_of,
    write_title,
)

_NAMES = {"train_loss_epoch": "train", "train_loss": "train", "validation_loss": "validation", "val_loss": "validation"}
_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)


def training_history(
    model: object | Mapping[str, pd.DataFrame | pd.Series],
    *,
    metrics: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the training and the validation loss over the steps, or the epochs, of a training.

    A circle marks where the validation loss was lowest.

    Parameters
    ----------
    model
        A trained model with a `history`, or that history: metric -> Series or one-column DataFrame over "step" or
        "epoch", as its index is named.
    metrics
        Entries of the history to draw; by default the training and the validation loss.
    ax
        Axes to draw in; a new figure by default.

    Returns
    -------
    Axes
        The axes.

    Raises
    ------
    UnknownNameError
        If an entry of `metrics` is not in the history.
    ValueError
        If the model has not been trained, or nothing of the history can be drawn.

    Examples
    --------
    >>> ax = vc.pl.training_history(st)
    """
    history = model if isinstance(model, Mapping) else getattr(model, "history", None)
    if not history:
        raise ValueError(f"{type(model).__name__} has no training history. Train the model first, or give its history.")
    if metrics is None:
        metrics = [k for k in _NAMES if k in history]
        if not metrics:
            raise ValueError(f"The history has no {' or '.join(_NAMES)}, only {sorted(history)}. Name some: metrics=.")
    for metric in metrics:
        if metric not in history:
            raise unknown_name("metrics", metric, history, "Name entries of the history.")
    if len(metrics) > len(_COLOURS):
        raise ValueError(f"{len(metrics)} metrics do not fit one picture; name at most {len(_COLOURS)}: metrics=.")

    ax = axes_or_new(ax, figsize=(5.5, 3.6))
    ink = ink_of(ax)
    unit = next((h.index.name for m in metrics if (h := history[m]).index.name), "epoch")
    colours = [ink.visible(colour) for colour in _COLOURS]
    for metric, colour in zip(metrics, colours, strict=False):
        # A metric that is logged only now and then has gaps, which the line should bridge.
        curve = pd.DataFrame(history[metric]).iloc[:, 0].astype(float).dropna()
        label = _NAMES.get(metric, metric)
        ax.plot(curve.index, curve, color=colour, lw=1.8, marker="o" if len(curve) < 15 else None, ms=4, label=label)
        if label == "validation" and len(curve):
            best = curve.idxmin()
            ax.plot(best, curve[best], "o", ms=9, mfc="none", mec=colour, mew=1.6)
            ax.lines[-1].set_label(f"lowest: {curve[best]:.4g} ({unit} {best})")
    ax.set_xlabel(unit)
    ax.set_ylabel("loss" if all("loss" in m for m in metrics) else "value")
    ax.xaxis.get_major_locator().set_params(integer=True)
    write_title(ax, "Training" if isinstance(model, Mapping) else f"Training of {type(model).__name__}")
    despine(ax)
    ax.legend(frameon=False, fontsize="small", labelcolor=ink.foreground)
    return ax
