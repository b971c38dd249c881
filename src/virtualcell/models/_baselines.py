"""Baselines that a model has to beat, with its interface: every one of them adds one shift to the control cells."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from anndata import AnnData
from mudata import MuData
from torch import Tensor, nn

from virtualcell._errors import unknown_name
from virtualcell.models._base import MOST_EXPRESSION, PerturbationModel
from virtualcell.models._perturbations import known_parts
from virtualcell.models._shifts import (
    AdditiveFit,
    NearestContextFit,
    ShiftTable,
    additive,
    nearest_context,
    shift_table,
)

logger = logging.getLogger(__name__)


class ShiftModel(PerturbationModel):
    """Control cells plus a shift of the mean, cut at 0 and at log(1 + 10,000), the most that a cell can hold.

    Shifts are differences of mean log1p CP10k between perturbed and control cells, in each context by itself. Cells
    marked `test` take no part.
    """

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        *,
        registry: dict | None = None,
        known: Sequence[str] = (),
        known_contexts: Sequence[str] = (),
    ) -> None:
        super().__init__(adata, registry=registry)
        self.known, self.known_contexts = list(known), list(known_contexts)  # of the training cells
        self.module = nn.Module()
        self._model_summary_string = f"{type(self).__name__} baseline, {len(self.genes)} genes."

    def _arguments(self) -> dict:
        return {"known": self.known, "known_contexts": self.known_contexts}

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        # their shapes follow from what was measured, which only they tell
        self._remember({k.removeprefix("network."): v for k, v in tensors.items()})

    def _remember(self, arrays: dict[str, np.ndarray | Tensor]) -> None:
        for name, values in sorted(arrays.items()):  # a file gives them in any order
            self.module.register_buffer(name, torch.as_tensor(values))

    def _array(self, name: str) -> np.ndarray:
        return self.module.get_buffer(name).cpu().numpy()

    @property
    def device(self) -> torch.device:
        """Where the shifts are."""
        return next(self.module.buffers(), torch.empty(0)).device

    def train(self) -> None:
        """Average the cells of each perturbation in each context, and learn from these shifts."""
        data = self._training_data()
        table = shift_table(
            self._expression(data),
            self._labels(data, "perturbation"),
            self._labels(data, "context"),
            control=self.control,
            mask=self._training_rows(data),
        )
        if not table.perturbations:
            raise ValueError(f"the training cells hold no perturbation, only {self.control!r}.")
        self.known, self.known_contexts = table.perturbations, table.contexts
        self._remember(self._fit(table))
        self.is_trained_ = True

    @abstractmethod
    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        """Return what is to be remembered, by name."""

    @abstractmethod
    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        """Return the shift, (n_genes,), of a perturbation in a known context (-1: a new one) with the mean `base`."""

    def _rows(self, perturbation: str) -> list[int]:
        """Rows of the known perturbations whose shifts add up to this one; a pair that was measured is one."""
        names = known_parts(perturbation, self.control, self.known)
        if unseen := [n for n in names if n not in self.known]:
            raise unknown_name(
                "perturbation",
                unseen[0],
                self.known,
                "This baseline copies shifts it has seen; Ridge and NearestPerturbations reach others from features.",
            )
        return [self.known.index(n) for n in names]

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that names the closest ones if this baseline has no shift for a perturbation."""

    def _predict_cells(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None
    ) -> np.ndarray:
        if perturbation == self.control:
            return cells
        row = self.known_contexts.index(context) if context in self.known_contexts else -1
        return np.clip(cells + self._shift(perturbation, row, base).astype(np.float32), 0, MOST_EXPRESSION)


class NoChange(ShiftModel):
    """Predict the control cells themselves."""

    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        return {}

    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return np.zeros(len(self.genes))


class PerturbationMean(ShiftModel):
    """Add the mean shift over all perturbations of the training data, whatever the perturbation.

    Each perturbation counts the same, and within it each of its contexts.
    """

    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        return {"mean": table.perturbation_means().mean(axis=0)}

    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return self._array("mean")


class ContextMean(ShiftModel):
    """Add the mean shift over the perturbations measured in the context, whatever the perturbation.

    A context in which none was measured gets the mean over the others, each counting the same.
    """

    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        means = table.context_means()
        overall = np.nanmean(means, axis=0)
        return {"means": np.where(np.isnan(means), overall, means), "overall": overall}

    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return self._array("overall") if context < 0 else self._array("means")[context]


class Additive(ShiftModel):
    """Add the shift of the context plus that of the perturbation; a new pair `A+B` gets A's plus B's.

    Both come from one fit over all measured pairs, see :func:`virtualcell.models._shifts.additive`. A context in which
    no perturbation was measured has shift 0: it gets the mean shift that this perturbation had elsewhere.
    """

    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        fit = additive(table)
        logger.info("Additive: shrinkage of context effects %.3g, in measured perturbations.", fit.shrinkage)
        return vars(fit)

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that names the closest ones if this baseline has no shift for a perturbation."""
        self._rows(perturbation)

    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        fit = AdditiveFit(**{name: self._array(name) for name in AdditiveFit.__dataclass_fields__})
        return fit.shift(self._rows(perturbation), context)


class NearestContext(ShiftModel):
    """Add the shift that the perturbation had in the context with the most similar control cells, shrunken.

    It is shrunken towards the additive fit, as far as measured contexts tell, see
    :func:`virtualcell.models._shifts.nearest_context`. A new pair `A+B` gets A's shift plus B's.
    """

    def _fit(self, table: ShiftTable) -> dict[str, np.ndarray]:
        fit = nearest_context(table)
        logger.info("NearestContext: deviations are copied times %s (zero-shot, few-shot).", fit.transfer)
        return vars(fit)

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that names the closest ones if this baseline has no shift for a perturbation."""
        self._rows(perturbation)

    def _shift(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        fit = NearestContextFit(**{name: self._array(name) for name in NearestContextFit.__dataclass_fields__})
        return fit.shift(self._rows(perturbation), base, context)
