"""What a screen ranks perturbations by: the size of their effect, the way to a target, or a function of one's own."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd

from virtualcell._errors import unknown_name
from virtualcell.models._effects import Effects
from virtualcell.models._shrinkage import shrink
from virtualcell.tl._changes import LOG2, Changes, Setting

logger = logging.getLogger(__name__)

Target = str | Mapping[str, Sequence[str]] | Sequence[str]
_SIDES = {"up": 1, "down": -1}


class Objective(ABC):
    """What perturbations are ranked by."""

    name: str

    @abstractmethod
    def columns(self, changes: Changes) -> dict[str, np.ndarray]:
        """Return the score of each perturbation, its error, and what else there is to tell, (n,) each."""


@dataclass(frozen=True)
class EffectSize(Objective):
    """Root mean square of the changes over genes."""

    name: str = "effect"

    def columns(self, changes: Changes) -> dict[str, np.ndarray]:
        size, error = effect_size(changes)
        return {"score": size, "score_error": error}


def effect_size(changes: Changes) -> tuple[np.ndarray, np.ndarray]:
    """Return the root mean square of each perturbation's changes over genes, and its standard error (delta method).

    The error of an effect of nothing is the root mean square of the errors of its genes.
    """
    size = np.sqrt(np.square(changes.change).mean(axis=1))
    directions = changes.change / (np.maximum(size, 1e-30)[:, None] * changes.change.shape[1])
    error = changes.along(directions)[1]
    return size, np.where(size > 0, error, np.sqrt(np.square(changes.error).mean(axis=1)))


@dataclass(frozen=True, eq=False)
class Towards(Objective):
    """Progress in a direction, and where that leads to a population of cells, what is left of the way.

    Parameters
    ----------
    direction
        Weights of the genes in the score, (n_genes,).
    shift
        Change that leads to the population, (n_genes,).
    """

    direction: np.ndarray
    shift: np.ndarray | None = None
    name: str = "toward"

    @classmethod
    def population(cls, label: str, setting: Setting) -> Self:
        """Aim at the cells with a label: of a perturbation in the same context, or the control cells of another."""
        screen, control = setting.screen, setting.model.control
        here = np.asarray(screen.context == setting.context)
        name = screen.design.name_of(label)
        cells = here & np.asarray(screen.perturbation == name)
        if name == control or not cells.any():
            cells = np.asarray(screen.context == label) & screen.is_control & ~here
        if not cells.any():
            known = {*screen.perturbation[here & ~screen.is_control], *screen.context[screen.is_control & ~here]}
            raise unknown_name(
                "target",
                label,
                sorted(map(str, known)),
                f"It labels perturbed cells of {setting.context!r}, or the control cells of another context. Genes "
                "go into a list, or into {'up': [...], 'down': [...]}.",
            )
        shift = _shift(setting, cells)
        if not shift.any():
            raise ValueError(
                f"target={label!r}: its {cells.sum()} cells cannot be told from the control cells of "
                f"{setting.context!r}, so that nothing leads there. Name another population, or a list of genes."
            )
        return cls(shift / (shift @ shift), shift)

    @classmethod
    def signature(cls, target: Mapping[str, Sequence[str]] | Sequence[str], genes: pd.Index) -> Self:
        """Aim at a rise of some genes and a fall of others."""
        sides = dict(target) if isinstance(target, Mapping) else {"up": target}
        if unknown := [side for side in sides if side not in _SIDES]:
            raise unknown_name("target", unknown[0], _SIDES, "The signature says which genes go up, and which down.")
        direction, known = np.zeros(len(genes)), {}
        for side, names in sides.items():
            names = _gene_names(side, names)
            known[side] = [name for name in names if name in genes]
            if lacking := sorted(set(names) - set(known[side])):
                logger.warning(
                    "target[%r]: %d of %d genes are not among those of model and data, and do not count: %s%s.",
                    *(side, len(lacking), len(names), ", ".join(lacking[:5]), ", ..." if len(lacking) > 5 else ""),
                )
            place = genes.get_indexer(known[side])
            direction[place] += _SIDES[side] / max(len(place), 1)
        if both := sorted(set(known.get("up", ())) & set(known.get("down", ()))):
            raise ValueError(f"target has {both[0]!r} among the genes that go up and those that go down. Keep one.")
        if not any(known.values()):
            first = next((str(name) for names in sides.values() for name in names), "")
            raise unknown_name("target", first, genes, "None of the genes of the signature is in the model.")
        return cls(direction)

    def columns(self, changes: Changes) -> dict[str, np.ndarray]:
        progress, error = changes.along(self.direction)
        out = {"score": progress, "score_error": error}
        if self.shift is not None:
            left = np.linalg.norm(self.shift - changes.change, axis=1)
            out["distance"] = left / np.linalg.norm(self.shift)
        return out


@dataclass(frozen=True, eq=False)
class Own(Objective):
    """A function of the predicted changes."""

    function: Callable[[pd.DataFrame], object]
    name: str = "own"

    def columns(self, changes: Changes) -> dict[str, np.ndarray]:
        frame = pd.DataFrame(changes.change, index=changes.names, columns=changes.setting.genes)
        score = np.asarray(self.function(frame), dtype=np.float64)
        if score.shape != (len(frame),):
            raise ValueError(
                f"objective= returned numbers of the shape {score.shape} for {len(frame)} perturbations. It gets a "
                "DataFrame, perturbations x genes, and returns one number for each row."
            )
        return {"score": score, "score_error": np.full(len(frame), np.nan)}


def objective_of(objective: object, target: Target | None, setting: Setting) -> Objective:
    """Return the objective that was asked for.

    Raises
    ------
    UnknownNameError
        For an unknown objective, label or gene.
    ValueError
        For a target that is lacking, or has no use.
    """
    if objective == "toward":
        if target is None:
            raise ValueError(
                "objective='toward' needs a target=: the label of other cells, a list of genes that are to go up, or "
                "{'up': [...], 'down': [...]}."
            )
        return (
            Towards.population(target, setting) if isinstance(target, str) else Towards.signature(target, setting.genes)
        )
    if target is not None:
        raise ValueError(f"target={target!r} has no use with objective={objective!r}. Say objective='toward'.")
    if objective == "effect":
        return EffectSize()
    if callable(objective):
        return Own(objective)
    raise unknown_name("objective", objective, ("effect", "toward"), "Or give a function of a DataFrame of changes.")


def _gene_names(side: str, names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"target[{side!r}]={names!r} must be a list of names of genes.")
    return list(dict.fromkeys(names))


def _shift(setting: Setting, cells: np.ndarray) -> np.ndarray:
    """Difference of some cells from the control cells of the context, log2, shrunken by its error, (n_genes,)."""
    screen, control = setting.screen, setting.model.control
    start = np.asarray(screen.context == setting.context) & screen.is_control
    rows = np.flatnonzero(start | cells)
    labels = np.where(cells[rows], "target", control)
    relabelled = dataclasses.replace(
        screen.take(rows),
        perturbation=pd.Categorical(labels),
        context=pd.Categorical(np.full(len(rows), setting.context)),
    )
    effects = Effects.measure(relabelled)
    return shrink(effects.effects, effects.variance).mean[0].astype(np.float64) / LOG2
