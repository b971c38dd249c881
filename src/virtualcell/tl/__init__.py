"""Fit models, embed cells, predict perturbations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtualcell._lazy import attach

if TYPE_CHECKING:
    from virtualcell.tl._benchmark import benchmark
    from virtualcell.tl._effects import effects
    from virtualcell.tl._embed import embed
    from virtualcell.tl._evaluate import evaluate
    from virtualcell.tl._fit import fit_state
    from virtualcell.tl._fit_baseline import fit_baseline
    from virtualcell.tl._fit_options import FitOptions
    from virtualcell.tl._predict import predict_perturbation
    from virtualcell.tl._screen import screen
    from virtualcell.tl._submission import prepare_submission
    from virtualcell.tl._summarize import summarize

__all__ = [
    "FitOptions",
    "benchmark",
    "effects",
    "embed",
    "evaluate",
    "fit_baseline",
    "fit_state",
    "predict_perturbation",
    "prepare_submission",
    "screen",
    "summarize",
]

__getattr__, __dir__ = attach(__name__)
