"""Predictions of drugs at doses between those that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from virtualcell._errors import UnknownNameError
from virtualcell.data._doses import asked_dose, at_dose, between_doses, check_between, doses_of, drug_and_dose
from virtualcell.models._base import PerturbationModel
from virtualcell.models._start import Start
from virtualcell.tl._emit import Effect, predicted_effect


@dataclass(frozen=True)
class Asked:
    """A perturbation to predict.

    Parameters
    ----------
    name
        Its name.
    dose
        Its dose, where that lies between those that were measured.
    measured
        Names of the same drug at these, by dose; empty where the model predicts the perturbation by its name.
    """

    name: str
    dose: float | None
    measured: dict[float, str]

    @classmethod
    def of(cls, model: PerturbationModel, name: str, *, drug: bool) -> Asked:
        """Find out whether a name is one of a drug at another dose; `drug` says that the caller said so."""
        known = drug_and_dose(name) if drug or model.design.dose_key is not None else None
        if known is None or name in model.names:
            return cls(name, None, {})
        try:
            measured = doses_of(model.names, known[0])
        except UnknownNameError:  # the model says which names it has
            return cls(name, None, {})
        check_between(*known, list(measured))
        return cls(name, known[1], measured)

    @property
    def names(self) -> list[str]:
        """Names that the model predicts for it."""
        return list(self.measured.values()) or [self.name]

    @property
    def around(self) -> list[str]:
        """The names at the doses next to its own."""
        if not self.measured:
            return [self.name]
        doses = sorted(self.measured)
        above = int(np.searchsorted(doses, self.dose))
        return [self.measured[d] for d in doses[above - 1 : above + 1]]

    def effect(self, model: PerturbationModel, start: Start, in_genes: Start, **how: object) -> Effect:
        """Predict its effect; see :func:`virtualcell.tl._emit.predicted_effect`."""
        if not self.measured:
            return predicted_effect(model, start, in_genes, self.name, **how)
        found = {d: predicted_effect(model, start, in_genes, name, **how) for d, name in self.measured.items()}
        change = between_doses({d: effect.change for d, effect in found.items()}, self.dose)
        return replace(found[min(found)], perturbation=self.name, change=change)

    def trust(self, model: PerturbationModel, start: Start) -> dict[str, float]:
        """Return what is known of how far it can be trusted, at the lower of the doses next to its own."""
        return model.trust(start, self.around[0])


def of_drug(
    model: PerturbationModel, perturbation: str | Sequence[str] | None, drug: str | None, dose: float | None
) -> str | Sequence[str] | None:
    """Return the perturbation, or the name of a drug at a dose in its place."""
    if drug is None:
        if dose is not None:
            raise ValueError(f"dose={dose!r} was given without drug=, whose dose it would be.")
        return perturbation
    if perturbation is not None:
        raise ValueError(f"perturbation={perturbation!r} and drug={drug!r} were both given: give one of them.")
    measured = doses_of(model.names, drug)
    if dose is None or (dose := asked_dose(dose)) in measured:
        return model.perturbation_name(drug=drug, dose=dose)
    check_between(drug, dose, list(measured))
    return at_dose(next(iter(measured.values())), dose)
