"""The networks and losses, in torch alone: they run on a machine that has nothing else of virtualcell's."""

from virtualcell.modules._losses import energy_distance, mean_distance, set_loss, sinkhorn_divergence, st_loss
from virtualcell.modules._se import SEConfig, SENetwork, se_loss
from virtualcell.modules._st import Ensemble, STConfig, STNetwork, STOutput, networks

__all__ = [
    "Ensemble",
    "SEConfig",
    "SENetwork",
    "STConfig",
    "STNetwork",
    "STOutput",
    "energy_distance",
    "mean_distance",
    "networks",
    "se_loss",
    "set_loss",
    "sinkhorn_divergence",
    "st_loss",
]
