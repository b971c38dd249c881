"""Baselines that reach perturbations which were never measured, from features of theirs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from torch import Tensor

from virtualcell.models._baselines import Additive, ContextMean, NearestContext, NoChange, PerturbationMean, ShiftModel
from virtualcell.models._feature_shifts import nearest_perturbations, ridge
from virtualcell.models._perturbations import PerturbationTable, parts
from virtualcell.models._shifts import ShiftTable, additive

logger = logging.getLogger(__name__)


class FeatureShiftModel(ShiftModel):
    """A shift that follows from features of the perturbation, plus the context's part of the additive fit.

    Parameters
    ----------
    adata
        Data registered with `setup_anndata` or `setup_mudata`.
    perturbation_features
        One row of features per perturbation (gene embeddings, pathway membership); columns are standardised. Every
        perturbation of the training cells needs a row, and any other with a row can be predicted.
    """

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        perturbation_features: pd.DataFrame | None = None,
        *,
        registry: dict | None = None,
        names: Sequence[str] = (),
        **known: Sequence[str],
    ) -> None:
        super().__init__(adata, registry=registry, **known)
        self.names = list(names)  # of the rows of features
        if adata is None:
            return
        if perturbation_features is None:
            raise ValueError(
                f"perturbation_features=None: {type(self).__name__} predicts from features of perturbations. Give a "
                "table of them (rows named as the perturbations), such as gene embeddings."
            )
        seen = self._labels(adata, "perturbation")[self._training_rows(adata)]
        table = PerturbationTable.from_features(perturbation_features, seen, self.control)
        self.names = table.names
        self._remember({"features": table.vectors})

    def _arguments(self) -> dict:
        return {**super()._arguments(), "names": self.names}

    @property
    def _table(self) -> PerturbationTable:
        vectors = self.module.features.cpu()
        return PerturbationTable(self.names, vectors, control=self.control, seen=self.known, has_features=True)

    def _encode(self, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, n_dims) of labels, those of combinations summed, and how many each combines, (n,)."""
        vectors = self._table.encode(labels).numpy()
        return vectors[:, :-1], vectors[:, -1]

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that names the closest ones if a perturbation has no row of features."""
        self._table.check(perturbation)

    def _of_context(self, context: int) -> np.ndarray | float:
        return 0.0 if context < 0 else self._array("contexts")[context]


class Ridge(FeatureShiftModel):
    """Ridge regression from features of perturbations to their shifts (Ahlmann-Eltze et al. 2025).

    The intercept is the mean shift; the penalty is the one that predicts each training perturbation best from the
    others, see :func:`virtualcell.models._shifts.ridge`. A measured perturbation gets its fitted value, not a copy;
    `A+B` the sum of A's and B's.
    """

    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        parts_of = additive(table)
        features, count = self._encode(table.perturbations)
        fit = ridge(features, parts_of.perturbation, count)
        logger.info("Ridge: penalty %.3g, chosen by leave-one-out.", fit.penalty)
        return {"coefficients": fit.coefficients, "intercept": fit.intercept, "contexts": parts_of.context}

    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        features, count = self._encode([perturbation])
        shift = count[0] * self._array("intercept") + features[0] @ self._array("coefficients")
        return shift + self._of_context(context)


class NearestPerturbations(FeatureShiftModel):
    """Mean shift of the 10 measured perturbations with the most similar features (cosine).

    A measured perturbation is its own nearest neighbour, among ten. `A+B` gets the sum of A's and B's.
    """

    k = 10

    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        fit = additive(table)
        count = self._encode(table.perturbations)[1]
        # the shift of a pair is no neighbour of the shift of a single, where there are singles
        rows = np.flatnonzero(count == count.min())
        return {"rows": rows, "perturbations": fit.perturbation[rows], "contexts": fit.context}

    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        measured = self._encode([self.known[i] for i in self._array("rows")])[0]
        query = self._encode(parts(perturbation, self.control, self.names))[0]
        shifts = nearest_perturbations(measured, self._array("perturbations"), query, k=self.k)
        return shifts.sum(axis=0) + self._of_context(context)


def load_baseline(meta: dict, tensors: dict[str, Tensor]) -> ShiftModel:
    """Build the saved baseline, of whatever class it is."""
    kinds = (NoChange, ContextMean, PerturbationMean, Additive, NearestContext, Ridge, NearestPerturbations)
    return {kind.__name__: kind for kind in kinds}[meta["class"]]._from_saved(meta, tensors)
