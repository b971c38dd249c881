"""How predictions are combined: parts, weights, how a mean is put onto cells, and the standard error."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from virtualcell.modules import STNetwork

logger = logging.getLogger(__name__)

TRANSFERRED = "same perturbation in other contexts"

# Weight of the transferred effect beside the heads. Of a perturbation that was never measured the heads know less: both
# lean on one encoding of its features, while the regression chose its penalty by leaving perturbations out.
WEIGHT, WEIGHT_UNSEEN = 1 / 3, 2 / 3
_LEAST_ERROR = 1e-12  # squared error that a head counts as having at least
_MOST_RAISE = 2.0  # factor by which expressed genes are raised before anything is added to silent ones


@dataclass(frozen=True)
class Mixture:
    """The weighted mean of what several parts predict: each head of the networks, and the transferred effect.

    A single head errs in its own way (a shift keeps the sampling noise of the control cells, a level predicted from the
    encoding loses their scatter), so that the average of the means is better than any.

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
    """

    heads: tuple[str, ...]
    head_weights: tuple[float, ...]
    transferred: bool = False
    nonnegative: bool = True

    @classmethod
    def equal(cls, heads: Sequence[str], *, transferred: bool = False, nonnegative: bool = True) -> Mixture:
        """Weigh all heads alike."""
        return cls(tuple(heads), (1 / len(heads),) * len(heads), transferred, nonnegative)

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
        weights = inverse / inverse.sum()
        return Mixture(self.heads, tuple(weights.tolist()), self.transferred, self.nonnegative)

    def weights(self, *, measured: bool = True, transferred: bool | None = None) -> dict[str, float]:
        """Weight of each part by name; of a perturbation that was `measured` or not, with a transferred effect or not.

        Without one the heads share what it would have had.
        """
        takes_part = self.transferred if transferred is None else transferred
        rest = (WEIGHT if measured else WEIGHT_UNSEEN) if takes_part else 0.0
        out = {name: w * (1 - rest) for name, w in zip(self.heads, self.head_weights, strict=True)}
        return {**out, TRANSFERRED: rest} if takes_part else out

    def describe(self) -> str:
        """One sentence about the parts and their weights."""
        weights = self.weights()
        if len(weights) == 1:
            return f"ST predicts by one head, {self.heads[0]}."
        told = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
        return f"ST averages {len(weights)} predictions; weights: {told}."

    def cells(
        self,
        outputs: Sequence[tuple[Tensor, ...]],
        control: Tensor,
        effect: tuple[Tensor, Tensor] | None = None,
        *,
        measured: bool = True,
    ) -> Tensor:
        """Combine predictions into cells, (B, S, G).

        Parameters
        ----------
        outputs
            What the heads of each network predict, (B, S, G) each.
        control
            The control cells, (B, S, G).
        effect
            Factor and shift, (G,) each, of a transferred effect.
        measured
            Whether the perturbation was measured anywhere.
        """
        heads = [torch.stack(of_head).mean(dim=0) for of_head in zip(*outputs, strict=True)]
        parts = heads if effect is None else [*heads, self._transferred(control, effect)]
        if len(parts) == 1:
            return parts[0]
        weights = self.weights(measured=measured, transferred=effect is not None).values()
        wanted = sum(w * p.mean(dim=1, keepdim=True) for w, p in zip(weights, parts, strict=True))
        return put_on_cells(parts[0], wanted, nonnegative=self.nonnegative)

    def means(
        self,
        outputs: Sequence[tuple[Tensor, ...]],
        control: Tensor,
        effect: tuple[Tensor, Tensor] | None = None,
        *,
        measured: bool = True,
    ) -> tuple[Tensor, np.ndarray]:
        """Mean of each set by each head of each network and by the transferred effect, (n_parts, B, G), and weights.

        Parameters as in :meth:`cells`.
        """
        parts = [cells for heads in outputs for cells in heads]
        weight = self.weights(measured=measured, transferred=effect is not None)
        weights = np.tile([weight[name] for name in self.heads], len(outputs)) / len(outputs)
        if effect is not None:
            parts.append(self._transferred(control, effect))
            weights = np.append(weights, weight[TRANSFERRED])
        return torch.stack([p.mean(dim=1) for p in parts]), weights

    def _transferred(self, control: Tensor, effect: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = effect
        cells = control * scale + shift
        return cells.clamp_min(0) if self.nonnegative else cells


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


def standard_error(means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Estimate the standard error of the weighted mean of several parts' predictions.

    Its variance between draws of control cells, plus the variance between parts times the sum of squared weights, which
    for equal weights divides it by their number.

    Parameters
    ----------
    means
        Predicted mean profiles, (n_draws, n_parts, n_genes).
    weights
        Weights of the parts, which sum to 1, (n_parts,).

    Returns
    -------
    (n_genes,), in the unit of `means`.
    """
    variance, total = (weights @ means).var(axis=0, ddof=1), np.square(weights).sum()
    if total < 1 - 1e-9:  # otherwise one part has all the weight
        parts = means.mean(axis=0)
        between = weights @ np.square(parts - weights @ parts) / (1 - total)  # unbiased; by n - 1 if all are equal
        variance = variance + between * total
    return np.sqrt(variance)
