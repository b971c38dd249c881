"""How predictions are combined: parts, weights, how a mean is put onto cells, and the standard error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from virtualcell.modules import STNetwork

TRANSFERRED = "same perturbation in other contexts"

# What can be asked: about a pair of context and perturbation that was measured, about a perturbation in a context where
# it was not, about a perturbation that was measured nowhere, or only in other experiments.
Question = Literal["cells", "contexts", "perturbations", "elsewhere"]
# Weight of the networks beside the transferred effect, where cells that were left out did not choose it. A measured
# pair has its own measurement, which networks can only blur.
NETWORKS: dict[str, float] = {"cells": 0.0, "contexts": 1 / 3, "perturbations": 1 / 3, "elsewhere": 0.0}
_LEAST_ERROR = 1e-12  # squared error that a head counts as having at least
_MOST_RAISE = 2.0  # factor by which expressed genes are raised before anything is added to silent ones


class Change(NamedTuple):
    """A transferred change of the mean of all control cells of a context, (G,), and that mean."""

    change: Tensor
    base: Tensor

    def of(self, mean: Tensor, *, nonnegative: bool = True) -> Tensor:
        """Return the changed mean of some of the cells, (..., G); expression falls by a factor, and rises by a sum."""
        if not nonnegative:
            return mean + self.change
        falls = (self.change < 0) & (self.base > 0)
        factor = torch.where(falls, (self.base + self.change) / self.base.clamp_min(1e-12), 1).clamp_min(0)
        return (mean * factor + torch.where(falls, 0, self.change)).clamp_min(0)


@dataclass(frozen=True)
class Mixture:
    """The weighted mean of what several parts predict: each head of the networks, and the transferred effect.

    A single head errs in its own way (a shift keeps the sampling noise of the control cells, a level predicted from the
    encoding loses their scatter), so that the average of the means is better than any. How much the networks are worth
    beside the transferred effect depends on what is asked, see :func:`virtualcell.models._stacking.choose_weight`.

    Parameters
    ----------
    heads
        Names of the heads.
    head_weights
        Their weights beside each other, which sum to 1.
    transferred
        Whether a transferred effect takes part.
    nonnegative
        Whether cells are expression, which is not negative, or embeddings.
    networks
        Weight of all heads together for each question, where a transferred effect takes part.
    """

    heads: tuple[str, ...]
    head_weights: tuple[float, ...]
    transferred: bool = False
    nonnegative: bool = True
    networks: Mapping[str, float] = field(default_factory=lambda: dict(NETWORKS))

    @classmethod
    def equal(cls, heads: Sequence[str], *, transferred: bool = False, nonnegative: bool = True) -> Mixture:
        """Weigh all heads alike."""
        return cls(tuple(heads), (1 / len(heads),) * len(heads), transferred, nonnegative)

    def with_networks(self, question: Question, weight: float) -> Mixture:
        """Return the mixture with another weight of the networks for a question."""
        return dataclasses.replace(self, networks={**self.networks, question: weight})

    def weighed(self, networks: Sequence[STNetwork], batches: Iterable[dict[str, Tensor]]) -> Mixture:
        """Weigh the heads by the inverse squared error of their means on training sets.

        Which of them is better differs between data sets by much, and shows on the cells that both have learned from.
        """
        if len(self.heads) == 1:
            return self
        errors = torch.zeros(len(self.heads), dtype=torch.float64)
        with torch.inference_mode():
            for batch in batches:
                wanted = batch["perturbed"].mean(dim=1)
                for network in networks:
                    heads = network(batch["control"], batch["perturbation"], batch.get("batch")).heads
                    off = torch.stack([x.mean(dim=1) - wanted for x in heads]).cpu().double()
                    errors += off.square().mean(dim=(1, 2))
        if not torch.isfinite(errors).all():
            raise FloatingPointError(
                "A head predicts NaN or infinite values for training cells. Use a lower learning rate (lr), and look "
                "for extreme or missing values in the data."
            )
        inverse = 1 / errors.clamp_min(_LEAST_ERROR)
        return dataclasses.replace(self, head_weights=tuple((inverse / inverse.sum()).tolist()))

    def of_networks(self, question: Question, transferred: bool | None = None) -> float:
        """Weight of all heads together."""
        takes_part = self.transferred if transferred is None else transferred
        return self.networks[question] if takes_part else 1.0

    def weights(
        self, question: Question = "contexts", *, transferred: bool | None = None, extrapolation: float = 0.0
    ) -> dict[str, float]:
        """Weight of each part by name.

        Parameters
        ----------
        question
            What is asked.
        transferred
            Whether there is a transferred effect; without one the heads share what it would have had.
        extrapolation
            How far the control cells lie outside of the training contexts, see
            :meth:`virtualcell.models._transferred.Transferred.extrapolation`. A level cannot leave the range of what
            was seen: beyond 1 the weight of that head falls with the square of the distance. NaN, unknown, is taken for
            inside.
        """
        heads = dict(zip(self.heads, self.head_weights, strict=True))
        if "level" in heads and len(heads) > 1 and extrapolation > 1:
            heads["level"] /= extrapolation**2
        total, of_networks = sum(heads.values()), self.of_networks(question, transferred)
        out = {name: w / total * of_networks for name, w in heads.items()}
        takes_part = self.transferred if transferred is None else transferred
        return {**out, TRANSFERRED: 1 - of_networks} if takes_part else out

    def describe(self, question: Question = "contexts") -> str:
        """One sentence about the parts and their weights."""
        weights = self.weights(question)
        if len(weights) == 1:
            return f"ST predicts by one head, {self.heads[0]}."
        listed = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
        return f"ST averages {len(weights)} predictions; weights: {listed}."

    def cells(
        self,
        outputs: Sequence[tuple[Tensor, ...]],
        control: Tensor,
        change: Change | None = None,
        *,
        question: Question = "contexts",
        extrapolation: float = 0.0,
    ) -> Tensor:
        """Combine predictions into cells, (B, S, G).

        Parameters
        ----------
        outputs
            What the heads of each network predict, (B, S, G) each; none where they have no weight.
        control
            The control cells, (B, S, G).
        change
            Transferred change of the mean.
        question, extrapolation
            As in :meth:`weights`.
        """
        if not outputs:
            return self._moved(control, change)
        heads = [torch.stack(of_head).mean(dim=0) for of_head in zip(*outputs, strict=True)]
        parts = heads if change is None else [*heads, self._moved(control, change)]
        if len(parts) == 1:
            return parts[0]
        weights = self.weights(question, transferred=change is not None, extrapolation=extrapolation).values()
        wanted = sum(w * p.mean(dim=1, keepdim=True) for w, p in zip(weights, parts, strict=True))
        return put_on_cells(parts[0], wanted, nonnegative=self.nonnegative)

    def means(
        self,
        outputs: Sequence[tuple[Tensor, ...]],
        control: Tensor,
        change: Change | None = None,
        *,
        question: Question = "contexts",
        extrapolation: float = 0.0,
    ) -> tuple[Tensor, np.ndarray]:
        """Mean of each set by each head of each network and by the transferred effect, (n_parts, B, G), and weights.

        Parameters as in :meth:`cells`.
        """
        parts = [cells for heads in outputs for cells in heads]
        weight = self.weights(question, transferred=change is not None, extrapolation=extrapolation)
        weights = np.tile([weight[name] for name in self.heads], len(outputs)) / max(len(outputs), 1)
        if change is not None:
            parts.append(self._moved(control, change))
            weights = np.append(weights, weight[TRANSFERRED])
        return torch.stack([p.mean(dim=1) for p in parts]), weights

    def _moved(self, control: Tensor, change: Change) -> Tensor:
        """Control cells whose means have changed."""
        wanted = change.of(control.mean(dim=1, keepdim=True), nonnegative=self.nonnegative)
        return put_on_cells(control, wanted, nonnegative=self.nonnegative)


def put_on_cells(cells: Tensor, wanted: Tensor, *, nonnegative: bool = True) -> Tensor:
    """Give sets of cells (B, S, G) other means (B, 1, G), and keep their scatter.

    Expression (`nonnegative`) is moved by a factor, which leaves zeros zero, and what a factor of 2 cannot raise is
    added; embeddings are shifted.
    """
    mean = cells.mean(dim=1, keepdim=True)
    if not nonnegative:
        return cells + wanted - mean
    factor = (wanted / mean.clamp_min(1e-8)).clamp_max(_MOST_RAISE)
    return cells * factor + (wanted - mean * factor).clamp_min(0)


def standard_error(means: np.ndarray, weights: np.ndarray, *, averaged: bool = False) -> np.ndarray:
    """Estimate the standard error of the weighted mean of several parts' predictions.

    Its variance between draws of control cells, plus the variance between parts times the sum of squared weights, which
    for equal weights divides it by their number.

    Parameters
    ----------
    means
        Predicted mean profiles, (n_draws, n_parts, n_genes).
    weights
        Weights of the parts, which sum to 1, (n_parts,).
    averaged
        Whether the prediction is the mean over the draws, which are of other cells each, and not one such draw. A
        single draw then tells nothing of their scatter.

    Returns
    -------
    (n_genes,), in the unit of `means`.
    """
    n, total = len(means), np.square(weights).sum()
    if averaged:
        variance = (weights @ means).var(axis=0, ddof=1) / n if n > 1 else np.zeros(means.shape[-1])
    else:
        variance = (weights @ means).var(axis=0, ddof=1)
    if total < 1 - 1e-9:  # otherwise one part has all the weight
        parts = means.mean(axis=0)
        between = weights @ np.square(parts - weights @ parts) / (1 - total)  # unbiased; by n - 1 if all are equal
        variance = variance + between * total
    return np.sqrt(variance)
