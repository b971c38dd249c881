"""Models in the style of scvi-tools: set up the data, build, train, predict, save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtualcell._lazy import attach

if TYPE_CHECKING:
    from virtualcell.models._baselines import Additive, ContextMean, NearestContext, NoChange, PerturbationMean
    from virtualcell.models._feature_baselines import NearestPerturbations, Ridge
    from virtualcell.models._fitted_on import FittedOn
    from virtualcell.models._se import SE
    from virtualcell.models._se_options import SETrainOptions
    from virtualcell.models._st import ST
    from virtualcell.models._st_options import STTrainOptions
    from virtualcell.models._transfer import Transfer
    from virtualcell.models._transfer_sources import TransferSource
    from virtualcell.modules import SEConfig, STConfig
    from virtualcell.train import TrainOptions

__all__ = [
    "SE",
    "ST",
    "Additive",
    "ContextMean",
    "FittedOn",
    "NearestContext",
    "NearestPerturbations",
    "NoChange",
    "PerturbationMean",
    "Ridge",
    "SEConfig",
    "SETrainOptions",
    "STConfig",
    "STTrainOptions",
    "TrainOptions",
    "Transfer",
    "TransferSource",
]

__getattr__, __dir__ = attach(__name__)
