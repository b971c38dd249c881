"""Fit models, embed cells, predict perturbations."""

from virtualcell.tl._embed import embed
from virtualcell.tl._fit import fit_state
from virtualcell.tl._predict import predict_perturbation

__all__ = ["embed", "fit_state", "predict_perturbation"]
