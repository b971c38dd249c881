"""Baselines that reach perturbations which were never measured, from features of theirs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._state import State
from virtualcell.data._screen import Screen
from virtualcell.models._baselines import Baseline
from virtualcell.models._closed_forms import additive
from virtualcell.models._effects import Effects
from virtualcell.models._features import PerturbationTable
from virtualcell.models._regression import NeighboursFit, ridge

logger = logging.getLogger(__name__)


class FeatureBaseline(Baseline):
    """An effect that follows from features of the perturbation, plus the context's part of the additive fit.

    Parameters
    ----------
    data
        Data registered with `setup_anndata` or `setup_mudata`, or a screen.
    perturbation_features
        One row of features per perturbation (gene embeddings, pathway membership); columns are standardised. Every
        perturbation of cells that are not "test" needs a row, and any other with a row can be predicted.
    registry
        What a saved model knows of its data.
    """

    def __init__(
        self,
        data: AnnData | MuData | Screen | None = None,
        perturbation_features: pd.DataFrame | None = None,
        *,
        registry: dict | None = None,
    ) -> None:
        super().__init__(data, registry=registry)
        self.table: PerturbationTable | None = None
        if self.screen is None:
            return
        if perturbation_features is None:
            raise ValueError(
                f"perturbation_features=None: {type(self).__name__} predicts from features of perturbations. Give a "
                "table of them (rows named as the perturbations), such as gene embeddings."
            )
        seen = set(self.screen.perturbation[self.screen.split != "test"])
        self.table = PerturbationTable.from_features(self.design.named(perturbation_features), seen, self.control)

    def _encode(self, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, n_dims) of labels, those of combinations summed, and how many each combines, (n,)."""
        vectors = self.table.encode(labels).numpy()
        return vectors[:, :-1], vectors[:, -1]

    @property
    def featured_names(self) -> list[str]:
        """Names of all perturbations that the baseline has features of."""
        return self.table.names

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that names the closest ones if a perturbation has no row of features."""
        self.table.check(perturbation)

    def _of_context(self, context: int) -> np.ndarray | float:
        return 0.0 if context < 0 else self.arrays["contexts"][context]

    def state(self) -> State:
        """Return what is to be saved."""
        state = super().state()
        state.meta["table"] = {"names": self.table.names, "seen": self.table.seen}
        state.tensors["table"] = self.table.vectors
        return state

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Build the baseline that :meth:`state` described."""
        tensors = dict(state.tensors)
        vectors = tensors.pop("table")
        model = super().from_state(replace(state, tensors=tensors))
        model.table = PerturbationTable(
            vectors=vectors, control=model.control, has_features=True, **state.meta["table"]
        )
        return model


class Ridge(FeatureBaseline):
    """Ridge regression from features of perturbations to their effects (Ahlmann-Eltze et al. 2025).

    The intercept is the mean effect; the penalty is the one that predicts each training perturbation best from the
    others, see `virtualcell.models._regression.ridge`. A measured perturbation gets its fitted value, not a copy;
    `A+B` the sum of A's and B's.

    Examples
    --------
    >>> features = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 5)), index=adata.var_names)
    >>> vc.models.Ridge.setup_anndata(logged, **design)
    >>> model = vc.models.Ridge(logged, features)
    >>> model.train()
    >>> predicted = vc.tl.predict_perturbation(logged, adata.var_names[0], model=model, emit="mean")  # never measured
    """

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        parts_of = additive(effects)
        features, count = self._encode(effects.perturbations)
        fit = ridge(features, parts_of.perturbation, count)
        logger.info("Ridge: penalty %.3g, chosen by leave-one-out.", fit.penalty)
        return {"coefficients": fit.coefficients, "intercept": fit.intercept, "contexts": parts_of.context}

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        features, count = self._encode([perturbation])
        effect = count[0] * self.arrays["intercept"] + features[0] @ self.arrays["coefficients"]
        return effect + self._of_context(context)


class NearestPerturbations(FeatureBaseline):
    """Mean effect of the 10 measured perturbations with the most similar features (cosine).

    A measured perturbation is its own nearest neighbour, among ten. `A+B` gets the sum of A's and B's.

    Examples
    --------
    >>> features = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 5)), index=adata.var_names)
    >>> vc.models.NearestPerturbations.setup_anndata(logged, **design)
    >>> model = vc.models.NearestPerturbations(logged, features)
    >>> model.train()
    >>> predicted = vc.tl.predict_perturbation(logged, adata.var_names[0], model=model, emit="mean")  # never measured
    """

    form = NeighboursFit

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        fit = additive(effects)
        features, count = self._encode(effects.perturbations)
        # the effect of a pair is no neighbour of the effect of a single, where there are singles
        rows = np.flatnonzero(count == count.min())
        return {"features": features[rows], "effects": fit.perturbation[rows], "contexts": fit.context}

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        query = self._encode(self.table.parts(perturbation))[0]
        return self.fitted.effect(query).sum(axis=0) + self._of_context(context)
