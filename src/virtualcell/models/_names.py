"""What is asked of a model: the perturbation by any of its names, and the control cells to start from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from anndata import AnnData
from mudata import MuData

from virtualcell.data._doses import name_at
from virtualcell.data._labels import is_several, text
from virtualcell.data._screen import Screen

if TYPE_CHECKING:
    from virtualcell.models._base import PerturbationModel


def perturbation_name(self: PerturbationModel, *, drug: str, dose: float | None = None) -> str:
    """Find the perturbation of a drug at a dose that was measured.

    Names hold both where the data has a column of doses ("Dabrafenib_0.5"), or in themselves, as those of Tahoe-100M:
    "[('Dabrafenib', 0.5, 'uM')]".

    Parameters
    ----------
    drug
        Name of the drug, in any case of letters.
    dose
        Dose, in the unit of the names; it may be left out where there is one.

    Raises
    ------
    KeyError
        For an unknown drug or dose; the message names those there are.
    """
    return name_at(self.names, drug, dose)


def name_of(self: PerturbationModel, label: object, known: Collection[str] | None = None) -> str:
    """Return the name under which the model knows a perturbation, however it is written; `known` are its names."""
    name = text(label)
    return name if name in (self.names if known is None else known) else self.design.name_of(name)


def asked_name(self: PerturbationModel, perturbation: object) -> str:
    """Return the name of the perturbation that is asked for, which the model must be able to predict."""
    self._check_if_trained(warn=False)
    if perturbation is None:
        raise ValueError("perturbation must be given: which one is to be predicted?")
    if is_several(perturbation):
        raise TypeError(f"perturbation={perturbation!r} must be one name; `vc.tl.predict_perturbation` takes several.")
    name = self.name_of(perturbation)
    self.check_perturbation(name)
    return name


def start_cells(model: PerturbationModel, data: AnnData | MuData | None) -> Screen:
    """Return the control cells of some data, or of that which the model holds."""
    if data is None and model.screen is not None:
        screen = model.screen
    else:
        data = model.adata if data is None else data
        if data is None:
            raise ValueError("adata=None, but this model was loaded without data: give the cells to start from.")
        # what only training needs may lack
        design = replace(model.design, split_key=None, gene_key=None)
        screen = Screen.from_anndata(data, design, modality=model.modality, genes=model.genes)
    screen.require_control()
    return screen.take(screen.is_control)
