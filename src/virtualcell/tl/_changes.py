"""Predicted changes of mean expression with their errors, of many perturbations and a chunk of them at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._tasks import in_tasks
from virtualcell.data._labels import expression_modality
from virtualcell.data._screen import Screen
from virtualcell.models._base import PerturbationModel
from virtualcell.models._effects import Effects
from virtualcell.models._from_start import SetMeans
from virtualcell.models._mixture import standard_error
from virtualcell.models._shrinkage import Signed, shrink_with_signs
from virtualcell.models._start import Start
from virtualcell.tl._emit import beyond_error
from virtualcell.tl._predict import checked_model, controls_of, starts_of, stored_model
from virtualcell.tl._predict_checks import check_columns, design_of_data, names_of, shared_genes

if TYPE_CHECKING:
    from distributed import Client

LOG2 = float(np.log(2))  # changes of natural logarithms are divided by it
_AT_ONCE = 64  # perturbations
ALL_FEATURES = "features"  # stands for every perturbation that the model has features of


@dataclass(frozen=True, eq=False)
class Changes:
    """Predicted changes of the mean of log2(1 + counts per 10,000) for some perturbations.

    Parameters
    ----------
    setting
        Where they were predicted.
    names
        The perturbations.
    change, error
        Changes and their standard errors, (n, n_genes); errors are NaN for a model that knows none.
    parts
        Changes of the natural logarithm by sets of control cells and parts of the model, for each perturbation.
    """

    setting: Setting
    names: list[str]
    change: np.ndarray
    error: np.ndarray
    parts: list[SetMeans]

    @cached_property
    def shrunken(self) -> Signed:
        """Changes shrunken by their errors, with the rates of false signs; NaN of a model that knows no errors."""
        if not self.setting.model.knows_error:
            nothing = np.full(self.change.shape, np.nan, np.float32)
            return Signed(nothing, nothing)
        return shrink_with_signs(self.change.astype(np.float32), np.square(self.error, dtype=np.float32))

    def along(self, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weighted sums of each perturbation's changes, with weights (n, n_genes) or (n_genes,), and their errors.

        The errors count how the parts of the model disagree on the sum itself, and how errors of genes go together.
        """
        directions = np.broadcast_to(directions, self.change.shape)
        error = np.array([self._error_along(i, directions[i]) for i in range(len(self.names))])
        return np.einsum("ng,ng->n", self.change, directions), error

    def _error_along(self, i: int, direction: np.ndarray) -> float:
        if not self.setting.model.knows_error:
            return np.nan
        means, weights = self.parts[i]
        apart = standard_error((means @ direction / LOG2)[..., None], weights, averaged=True)[0]
        whole = np.zeros(len(self.setting.model.genes))
        whole[self.setting.columns] = direction / LOG2
        return float(np.hypot(apart, self.setting.model.shared_error_along(whole, self.names[i], self.setting.context)))


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, and the control cells of the one context in which it is to predict.

    Parameters
    ----------
    model
        The model.
    screen
        All cells of the data, on the genes that model and data share.
    start
        What the model starts from.
    in_genes
        Expression of the same cells.
    columns
        Places of the shared genes among the model's.
    """

    model: PerturbationModel
    screen: Screen
    start: Start
    in_genes: Start
    columns: np.ndarray

    @classmethod
    def of(
        cls,
        data: AnnData | MuData,
        context: str | None,
        model: PerturbationModel | None,
        stated: Mapping[str, object],
        *,
        untreated: bool,
        min_gene_coverage: float,
        modality: str,
    ) -> Setting:
        """Find the model, the control cells and the genes, as `predict_perturbation` does.

        Raises
        ------
        ValueError
            If no context is stated where there are several.
        """
        expression = expression_modality(data, modality)
        model = checked_model(stored_model(expression) if model is None else model).on_genes(expression.var_names)
        design = design_of_data(model, data, stated, modality=modality)
        check_columns(data, design, modality=modality, untreated=untreated)
        screen = Screen.from_anndata(data, design, modality=modality, untreated=untreated)
        if context is None and len(there := list(screen.controls())) > 1:
            raise ValueError(f"context=None, but there are control cells of {there}. Name one of these contexts.")
        genes, columns = shared_genes(model, design, expression.var_names, min_gene_coverage)
        controls = controls_of(screen, context).select(genes)
        start, in_genes = next(starts_of(controls, model))
        return cls(model, screen.select(genes), start, in_genes, columns)

    @property
    def context(self) -> str:
        """The context."""
        return self.start.context

    @property
    def genes(self) -> pd.Index:
        """The genes."""
        return self.screen.genes

    def names(self, perturbations: str | Sequence[str] | None, stated: Mapping[str, object]) -> list[str]:
        """Names of the perturbations to predict, each of which the model must know or have features of."""
        if isinstance(perturbations, str) and perturbations == ALL_FEATURES:
            names = list(self.model.featured_names)
            if not names:
                raise ValueError(
                    "perturbations='features', but the model was fitted without features of perturbations. Fit it with "
                    "`vc.tl.fit_state(adata, ..., perturbation_features=table)`, or leave perturbations out."
                )
        else:
            names = list(names_of(self.model, perturbations, stated))
        names = [name for name in names if name != self.model.control]
        for name in names:
            self.model.check_perturbation(name)
        if not names:
            raise ValueError(f"perturbations={perturbations!r} holds nothing but the control to predict.")
        return names

    def chunks(
        self, names: Sequence[str], *, n_cells: int | None, seed: int, client: Client | None = None
    ) -> Iterator[Changes]:
        """Yield the predicted changes of some perturbations at a time, all from the same control cells."""
        n_cells = len(self.start.names) if n_cells is None else n_cells
        sets = self.model.control_sets(self.start, n_cells=n_cells, seed=seed)
        portions = [list(names[at : at + _AT_ONCE]) for at in range(0, len(names), _AT_ONCE)]
        if client is None:
            yield from (self.changes(some, sets) for some in portions)
            return
        # without the data, of which a prediction needs no more than where it starts
        shared = dataclasses.replace(self, screen=None), sets
        for found in in_tasks(client, _changes_of, shared, portions):
            yield dataclasses.replace(found, setting=self)

    def changes(self, names: list[str], sets: Sequence[np.ndarray]) -> Changes:
        """Return the predicted changes of some perturbations, from sets of control cells."""
        before = np.stack([self.in_genes.mean_of(rows) for rows in sets])
        changes, errors, parts = [], [], []
        for name, found in zip(names, self.model.means_from(self.start, names, sets), strict=True):
            moved = SetMeans(found.means[..., self.columns] - before[:, None], found.weights)
            change = np.einsum("p,spg->g", moved.weights, moved.means) / len(sets)
            change = beyond_error(change, self.model, self.start, name, columns=self.columns)
            shared = np.asarray(self.model.shared_error(name, self.context))
            shared = shared[self.columns] if shared.ndim else shared
            error = np.hypot(standard_error(moved.means, moved.weights, averaged=True), shared)
            changes.append(change)
            errors.append(error if self.model.knows_error else np.full_like(change, np.nan))
            parts.append(moved)
        return Changes(self, names, np.stack(changes) / LOG2, np.stack(errors) / LOG2, parts)

    def measured(self, wanted: np.ndarray) -> Effects:
        """Measure the effects of the marked cells of this context against its control cells.

        Their perturbations keep their names; effects are natural logarithms.
        """
        here = (self.screen.context == self.context) & (wanted | self.screen.is_control)
        return Effects.measure(self.screen.take(here))


def _changes_of(shared: tuple[Setting, Sequence[np.ndarray]], names: list[str]) -> Changes:
    setting, sets = shared
    return dataclasses.replace(setting.changes(names, sets), setting=None)  # which the caller has
