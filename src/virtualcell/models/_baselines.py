"""Baselines that a model has to beat, with its interface: every one of them adds one effect to the control cells."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import Self

import numpy as np
import torch
from anndata import AnnData
from mudata import MuData
from torch import nn

from virtualcell._errors import unknown_name
from virtualcell._state import State
from virtualcell.data._expression import MOST_EXPRESSION
from virtualcell.data._labels import Known
from virtualcell.data._screen import Screen
from virtualcell.models._base import PerturbationModel
from virtualcell.models._closed_forms import AdditiveFit, NearestContextFit, additive, nearest_context
from virtualcell.models._common import meta_of, restore_meta, training_screen
from virtualcell.models._effects import Effects
from virtualcell.models._fitted_on import FittedOn

logger = logging.getLogger(__name__)


class Baseline(PerturbationModel):
    """Control cells plus an effect on the mean, cut at 0 and at log(1 + 10,000), the most that a cell can hold.

    Effects are differences of mean log1p CP10k between perturbed and control cells, in each context by itself. Cells
    marked `test` take no part.
    """

    form: type | None = None  # of the fit that effects are taken from, for a baseline that has one
    copies = False  # whether effects are those of measured perturbations, so that no other one can be predicted

    def __init__(self, data: AnnData | MuData | Screen | None = None, *, registry: dict | None = None) -> None:
        super().__init__(data, registry=registry)
        self.known: list[str] = []  # perturbations of the training cells
        self._lookup = Known([], self.control)
        self.known_contexts: list[str] = []
        self.arrays: dict[str, np.ndarray] = {}  # what was learned, by name
        self._context_code: dict[str, int] = {}
        self.module = nn.Module()  # scvi-tools moves it between devices
        self._model_summary_string = f"{type(self).__name__} baseline, {len(self.genes)} genes."

    @property
    def device(self) -> torch.device:
        """Where predictions are made."""
        return torch.device("cpu")

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, effects: Effects | None = None) -> None:
        """Learn from the mean effect of each perturbation in each context, on all cells that are not "test".

        Parameters
        ----------
        effects
            Measured effects to learn from, where these are known already. No cell is read then, and `fitted_on` does
            not tell of any.
        """
        self.fitted_on = None
        if effects is None:
            screen = training_screen(self)
            self.fitted_on = FittedOn.of(screen)
            effects = Effects.measure(screen, screen.split != "test")
        if not effects.perturbations:
            raise ValueError(f"the training cells hold no perturbation, only {self.control!r}.")
        if effects.effects.shape[1] != len(self.genes):
            n = effects.effects.shape[1]
            raise ValueError(f"effects= has {n} genes, this model {len(self.genes)}. Measure them on the same genes.")
        self._remember(effects.perturbations, effects.contexts, self._fit(effects))
        self.is_trained_ = True

    def _remember(self, known: Sequence[str], contexts: Sequence[str], arrays: dict[str, np.ndarray]) -> None:
        self.known, self.known_contexts = list(known), list(contexts)
        self._lookup = Known(self.known, self.control)
        self._context_code = {name: i for i, name in enumerate(self.known_contexts)}
        # in the order of a file: products of arrays in another order differ in the last digit
        self.arrays = {name: np.asarray(values, order="C") for name, values in arrays.items()}
        if self.form is not None:
            names = {f.name for f in fields(self.form)}
            self.fitted = self.form(**{k: v for k, v in self.arrays.items() if k in names})

    @abstractmethod
    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        """Return what is to be remembered, by name."""

    # -- prediction ---------------------------------------------------------------------------------------------------

    @property
    def known_names(self) -> list[str]:
        """Names of the perturbations that the baseline learned from."""
        return self.known

    @property
    def lookup(self) -> Known:
        """The same, in which others are looked up."""
        return self._lookup

    @abstractmethod
    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        """Return the effect, (n_genes,), of a perturbation in a known context (-1: a new one) with the mean `base`."""

    def _rows(self, perturbation: str) -> list[int]:
        """Rows of the known perturbations whose effects add up to this one; a pair that was measured is one."""
        names = self.lookup.parts(perturbation)
        if unseen := [n for n in names if n not in self.lookup]:
            raise unknown_name(
                "perturbation",
                unseen[0],
                self.known,
                "This baseline copies effects it has seen; Ridge and NearestPerturbations reach others from features.",
            )
        return [self.lookup.code[n] for n in names]

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that names the closest ones if this baseline has no effect for a perturbation."""
        if self.copies:
            self._rows(perturbation)

    def predict_cells(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None = None
    ) -> np.ndarray:
        """Predict expression (n_cells, n_genes) from control cells of one context.

        Parameters as in `virtualcell.models._base.PerturbationModel.predict_cells`.
        """
        if perturbation == self.control:
            return cells
        effect = self._effect(perturbation, self._context_code.get(context, -1), base).astype(np.float32)
        predicted = cells + effect
        return np.clip(predicted, 0, MOST_EXPRESSION, out=predicted)

    # -- files --------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Return what is to be saved."""
        meta = {**meta_of(self), "known": self.known, "known_contexts": self.known_contexts}
        tensors = {k: torch.as_tensor(v) for k, v in self.arrays.items()}
        return State(type(self).__name__, meta, tensors)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Build the baseline that :meth:`state` described."""
        model = cls(registry=state.meta["registry"])
        arrays = {k: v.numpy() for k, v in state.tensors.items()}
        model._remember(state.meta["known"], state.meta["known_contexts"], arrays)
        restore_meta(model, state.meta)
        return model


class NoChange(Baseline):
    """Predict the control cells themselves.

    Parameters
    ----------
    data
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`, or a screen.
    registry
        What a saved model knows of its data.

    Examples
    --------
    >>> vc.models.NoChange.setup_anndata(logged, **design)
    >>> model = vc.models.NoChange(logged)
    >>> model.train()
    >>> predicted = vc.tl.predict_perturbation(logged, name, context="type_3", model=model, emit="mean")
    """

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        return {}

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return np.zeros(len(self.genes))


class PerturbationMean(Baseline):
    """Add the mean effect over all perturbations of the training data, whatever the perturbation.

    Each perturbation counts the same, and within it each of its contexts.

    Parameters
    ----------
    data
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`, or a screen.
    registry
        What a saved model knows of its data.

    Examples
    --------
    >>> vc.models.PerturbationMean.setup_anndata(logged, **design)
    >>> model = vc.models.PerturbationMean(logged)
    >>> model.train()
    >>> predicted = vc.tl.predict_perturbation(logged, name, context="type_3", model=model, emit="mean")
    """

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        return {"mean": effects.perturbation_means().mean(axis=0)}

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return self.arrays["mean"]


class ContextMean(Baseline):
    """Add the mean effect over the perturbations measured in the context, whatever the perturbation.

    A context in which none was measured gets the mean over the others, each counting the same.

    Parameters
    ----------
    data
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`, or a screen.
    registry
        What a saved model knows of its data.

    Examples
    --------
    >>> vc.models.ContextMean.setup_anndata(logged, **design)
    >>> model = vc.models.ContextMean(logged)
    >>> model.train()
    >>> predicted = vc.tl.predict_perturbation(logged, name, context="type_3", model=model, emit="mean")
    """

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        means = effects.context_means()
        overall = np.nanmean(means, axis=0)
        return {"means": np.where(np.isnan(means), overall, means), "overall": overall}

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return self.arrays["overall"] if context < 0 else self.arrays["means"][context]


class Additive(Baseline):
    """Add the effect of the context plus that of the perturbation; a new pair `A+B` gets A's plus B's.

    Both come from one fit over all measured pairs, see `virtualcell.models._closed_forms.additive`. A context in
    which no perturbation was measured has effect 0: it gets the mean effect that this perturbation had elsewhere.

    Parameters
    ----------
    data
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`, or a screen.
    registry
        What a saved model knows of its data.

    Examples
    --------
    >>> vc.models.Additive.setup_anndata(logged, **design)
    >>> model = vc.models.Additive(logged)
    >>> model.train()
    >>> predicted = vc.tl.predict_perturbation(logged, name, context="type_3", model=model, emit="mean")
    """

    form = AdditiveFit
    copies = True

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        fit = additive(effects)
        logger.info("Additive: shrinkage of context effects %.3g, in measured perturbations.", fit.shrinkage)
        return {f.name: getattr(fit, f.name) for f in fields(fit)}

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return self.fitted.effect(self._rows(perturbation), context)


class NearestContext(Baseline):
    """Add the effect that the perturbation had in the context with the most similar control cells, shrunken.

    It is shrunken towards the additive fit, as far as measured contexts tell, see
    `virtualcell.models._closed_forms.nearest_context`. A new pair `A+B` gets A's effect plus B's.

    Parameters
    ----------
    data
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`, or a screen.
    registry
        What a saved model knows of its data.

    Examples
    --------
    >>> vc.models.NearestContext.setup_anndata(logged, **design)
    >>> model = vc.models.NearestContext(logged)
    >>> model.train()
    >>> predicted = vc.tl.predict_perturbation(logged, name, context="type_3", model=model, emit="mean")
    """

    form = NearestContextFit
    copies = True

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        fit = nearest_context(effects)
        logger.info(
            "NearestContext: deviations from context + perturbation are copied times %.2f where no perturbation was "
            "measured, %.2f elsewhere.",
            *fit.transfer,
        )
        return {f.name: getattr(fit, f.name) for f in fields(fit)}

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return self.fitted.effect(self._rows(perturbation), base, context)
