"""What every model of perturbations shares: registering data, control cells to start from, the frame it returns."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scvi.model.base import BaseModelClass

from virtualcell._settings import seed_of
from virtualcell._state import State
from virtualcell.data._design import Scale
from virtualcell.data._design_arguments import describes_design
from virtualcell.data._labels import Known, expression_modality
from virtualcell.data._screen import Screen
from virtualcell.io._save import save
from virtualcell.models._common import KINDS, forget_data, load_model, summary
from virtualcell.models._fitted_on import FittedOn
from virtualcell.models._from_start import (
    control_sets,
    error_from,
    means_from,
    predict_from,
    rows_from,
    uncertainty,
    where_measured,
)
from virtualcell.models._names import asked_name, name_of, perturbation_name, start_cells
from virtualcell.models._setup import design_of, named_registry, register
from virtualcell.models._start import Start, starts


class PerturbationModel(BaseModelClass):
    """A model that turns control cells and a perturbation into perturbed cells: ST, and the baselines beside it.

    Built from data that was registered with :meth:`setup_anndata` or :meth:`setup_mudata`, or from a
    `virtualcell.data._screen.Screen` alone.
    """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        KINDS[cls.__name__] = cls

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str,
        control: str | Sequence[str],
        context_key: str | None = None,
        batch_key: str | None = None,
        layer: str | None = None,
        scale: Scale = "log1p",
        library_size_key: str | None = None,
        use_rep: str | None = None,
        split_key: str | None = None,
        combination_separator: str | None = "+",
        dose_key: str | None = None,
    ) -> None:
        """Register the data.

        Parameters
        ----------
        adata
            Cells x genes.
        perturbation_key
            Column of `obs` with the perturbation of each cell; combinations are written `A+B`, in any order.
        control
            Label of the unperturbed cells in that column; several labels are one control, by the name of the first.
        context_key
            Column with the context (cell type, cell line); control cells are matched within it.
        batch_key
            Column with the experimental batch; control cells are matched within it too, and ST learns an embedding.
        layer
            Layer with the expression; `X` where it is `None`.
        scale
            Whether that is `"log1p"`, log(1 + counts per 10,000), or `"counts"`, raw counts. It is checked, never
            guessed.
        library_size_key
            Column with the library size of raw counts; by default it is the row sum.
        use_rep
            Key of `obsm` with cell embeddings (`"X_state"`): ST then works there and decodes genes.
        split_key
            Column with `train`, `val` and `test`, from :func:`virtualcell.pp.split`; test cells are never seen.
        combination_separator
            What stands between the parts of a combination; `None` where every label is one perturbation.
        dose_key
            Column with the dose of the drug in `perturbation_key`; perturbations are then called "drug_1.0".
        """
        register(cls, adata, cls._get_setup_method_args(**locals()))

    @classmethod
    @describes_design
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        perturbation_key: str,
        control: str | Sequence[str],
        modality: str = "rna",
        context_key: str | None = None,
        batch_key: str | None = None,
        layer: str | None = None,
        scale: Scale = "log1p",
        library_size_key: str | None = None,
        use_rep: str | None = None,
        split_key: str | None = None,
        combination_separator: str | None = "+",
        dose_key: str | None = None,
    ) -> None:
        """Register the expression modality of a MuData; see :meth:`setup_anndata`.

        Columns are looked up in the modality's `obs`, then in the MuData's.

        Parameters
        ----------
        mdata
            MuData with the expression in `mdata.mod[modality]`.
        modality
            Name of that modality.
        perturbation_key, control, context_key, batch_key, layer, scale, library_size_key
            The design, as in :meth:`setup_anndata`.
        use_rep
            Key of `obsm` with cell embeddings, as in :meth:`setup_anndata`.
        split_key
            Column with `train`, `val` and `test`, as in :meth:`setup_anndata`.
        combination_separator, dose_key
            The design, as in :meth:`setup_anndata`.
        """
        register(cls, mdata, cls._get_setup_method_args(**locals()), modality)

    def __init__(self, data: AnnData | MuData | Screen | None = None, *, registry: dict | None = None) -> None:
        if isinstance(data, Screen):
            super().__init__(None, data.registry(type(self).__name__))
        else:
            super().__init__(data, registry)
        self.screen = data if isinstance(data, Screen) else None
        self.fitted_on: FittedOn | None = None  # comes with training
        if self.adata is not None:
            setup = self.registry["setup_args"]
            modality = setup.get("modality") or "rna"
            self.screen = Screen.from_anndata(self.adata, design_of(setup), modality=modality)
            self.registry_ = named_registry(self.registry, self.screen)
        setup = self.registry["setup_args"]
        states = {k: v["state_registry"] for k, v in self.registry["field_registries"].items()}
        self.modality = setup.get("modality") or "rna"
        self.design = design_of(setup)
        self.control: str = self.design.control
        self.genes = [str(g) for g in states["X"]["column_names"]]
        self.batches = [str(b) for b in states["batch"]["categorical_mapping"]] if self.design.batch_key else []
        self.contexts = [str(c) for c in states["context"]["categorical_mapping"]] if self.design.context_key else []
        self.perturbations = sorted({str(p) for p in states["perturbation"]["categorical_mapping"]} - {self.control})

    # -- files --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def state(self) -> State:
        """Return what is to be saved."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: State) -> Self:
        """Build the model that :meth:`state` described."""

    def parts(self) -> dict[str, BaseModelClass]:
        """Models that this one carries, by the name they are saved under."""
        return {}

    def save(self, dir_path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write `model.safetensors` into a folder, an ST with its SE and its fallback in the same file.

        Parameters
        ----------
        dir_path
            The folder, made where it is missing.
        overwrite
            Replace a model that is there.

        Raises
        ------
        FileExistsError
            If the folder holds a model and `overwrite` is not set.
        """
        save(self, dir_path, overwrite=overwrite)

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike,
        adata: AnnData | MuData | None = None,
        *,
        accelerator: str = "auto",
        device: int | str = "auto",
    ) -> Self:
        """Read a model that :meth:`save` wrote; no data is needed, and nothing is unpickled.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Data to predict on where a method is given none, or to train on; `None` leaves the model without data.
        accelerator
            Kind of device to put the network on, as in scvi-tools: "auto", "cpu", "gpu" or another of
            Lightning's.
        device
            Number of the device, or "auto".
        """
        return load_model(cls, dir_path, adata, accelerator=accelerator, device=device)

    def forget_data(self) -> None:
        """Drop the training data, which scvi-tools would keep in memory for as long as the process lives."""
        forget_data(self)

    def __repr__(self) -> str:
        return summary(self)

    @property
    def names(self) -> list[str]:
        """Names of the perturbations that it learned from or has features of."""
        return list(dict.fromkeys([*self.known_names, *self.featured_names]))

    perturbation_name = perturbation_name
    name_of = name_of

    # -- prediction from arrays ---------------------------------------------------------------------------------------

    n_seen_together = 1  # control cells that one prediction looks at together

    @abstractmethod
    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that says why, if this model cannot predict a perturbation."""

    @abstractmethod
    def predict_cells(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None = None
    ) -> np.ndarray:
        """Predict expression from control cells of one context.

        Parameters
        ----------
        cells
            Control cells, (n_cells, n_features): log(1 + counts per 10,000) of the model's genes, or cell embeddings.
        perturbation
            What to predict.
        context
            Their context, which may be new to the model.
        base
            Mean of all control cells of the context, (n_features,).
        batch
            Name of each cell's batch, (n_cells,), for a model with batches.

        Returns
        -------
        Predicted cells, (n_cells, n_genes), log(1 + counts per 10,000).
        """

    def predict_parts(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict mean profiles (n_parts, n_genes) by each part of the model, and return their weights (n_parts,)."""
        predicted = self.predict_cells(cells, perturbation, context=context, base=base, batch=batch)
        return predicted.mean(axis=0, keepdims=True), np.ones(1)

    predict_from = predict_from
    rows_from = rows_from
    control_sets = control_sets
    means_from = means_from
    error_from = error_from

    # -- what is known of a prediction --------------------------------------------------------------------------------

    @property
    def known_names(self) -> list[str]:
        """Labels of the perturbations that the model learned from, without the control."""
        return self.perturbations

    @property
    @abstractmethod
    def lookup(self) -> Known:
        """Perturbations that the model learned from cells of, in which others are looked up."""

    @property
    def featured_names(self) -> list[str]:
        """Names of all perturbations that the model has features of; none by default."""
        return []

    where_measured = where_measured

    @property
    def knows_error(self) -> bool:
        """Whether the model knows how wrong its predictions were where cells were left out."""
        return False

    def trust(self, start: Start, perturbation: str) -> dict[str, float]:
        """Return what is known of how far a prediction from `start` can be trusted, by name; nothing by default."""
        return {}

    def on_genes(self, genes: Sequence[str]) -> Self:
        """Return the model for other genes, where it can be had for any; by default it is the same."""
        return self

    def effect_error(self, perturbation: str, *, context: str, base: np.ndarray) -> np.ndarray | float:
        """Error of the predicted effect on each gene's mean, (n_genes,) or one for all, log(1 + counts per 10,000).

        Where predicted cells are made, a smaller effect counts as none. A model that knows no error has none.
        Parameters as in :meth:`predict_cells`.
        """
        return 0.0

    def shared_error(self, perturbation: str, context: str) -> np.ndarray | float:
        """Error that all parts have in common, of the change of each gene's mean: (n_genes,); 0 where none is known."""
        return 0.0

    def shared_error_along(self, direction: np.ndarray, perturbation: str, context: str) -> float:
        """Return the same error of a weighted sum of the changes, with one weight per gene, (n_genes,)."""
        return 0.0

    # -- prediction from data -----------------------------------------------------------------------------------------

    def predict(
        self,
        adata: AnnData | MuData | None = None,
        perturbation: str | None = None,
        *,
        context: str | None = None,
        n_cells: int | None = None,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Predict perturbed cells from control cells.

        Parameters
        ----------
        adata
            Cells with the columns of `obs` and the scale that the model was set up with; the training data where it
            is `None`.
        perturbation
            What to predict: a label of the training data, `A+B`, or, for a model with features, any name in its table.
        context
            Take the control cells of this context, which may be one where the perturbation was never measured; all
            contexts where it is `None`.
        n_cells
            Number of predicted cells per context, drawn without replacement where there are enough controls; by
            default every control cell gives one.
        seed
            Seed of the draw and of how control cells fall into sets; by default `vc.settings.seed`. The order of cells
            in `adata` does not matter.

        Returns
        -------
        Predicted expression, cells x genes, log(1 + counts per 10,000). The index names the control cell that each
        predicted cell started from.

        Raises
        ------
        KeyError
            For an unknown perturbation, context, gene or column.
        """
        if n_cells is not None and n_cells < 1:
            raise ValueError(f"n_cells={n_cells!r}: at least one cell is needed.")
        perturbation = asked_name(self, perturbation)
        model = self if adata is None else self.on_genes(expression_modality(adata, self.modality).var_names)
        frames = []
        for start in starts(start_cells(model, adata), context):
            rows, predicted = model.predict_from(start, perturbation, n_cells=n_cells, seed=seed_of(seed))
            frames.append(pd.DataFrame(predicted, index=start.names[rows], columns=model.genes))
        return pd.concat(frames)

    uncertainty = uncertainty
