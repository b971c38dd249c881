"""What can be chosen of an ST: sizes, presets, fields of the network, options of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from virtualcell._errors import unknown_name
from virtualcell.modules import STConfig
from virtualcell.train import TrainOptions

SIZES = {
    "small": {"n_hidden": 128, "n_layers": 2, "n_heads": 4, "head_dim": 32, "n_feedforward": 256},
    "medium": {"n_hidden": 256, "n_layers": 4, "n_heads": 8, "head_dim": 32, "n_feedforward": 768},
    # ST-HVG-Replogle of the paper
    "large": {
        "n_hidden": 328,
        "n_layers": 8,
        "n_heads": 12,
        "head_dim": 64,
        "n_feedforward": 3072,
        "n_encoder_layers": 4,
        "n_decoder_layers": 4,
    },
}

# What a preset decides where the caller says nothing: heads, transferred effect, and weights of the loss.
PRESETS = {
    "default": {"head": "both", "mean_weight": 1.0, "contrast_weight": 0.3},
    "published": {"head": "level", "mean_weight": 0.0, "contrast_weight": 0.0},
}


@dataclass(frozen=True, kw_only=True)
class STTrainOptions(TrainOptions):
    """How an ST is trained: :class:`virtualcell.models.TrainOptions`, and what concerns sets of cells.

    Parameters
    ----------
    loss
        Distance between predicted and observed set: "energy" (energy distance, published default), "sinkhorn" (Sinkhorn
        divergence), or "energy+sinkhorn", the former plus 0.01 of the latter.
    mean_weight
        Weight of the distance between the means of the two sets, which the published loss leaves out.
    contrast_weight
        Weight of a term that tells the perturbations of a batch apart, see
        :func:`virtualcell.modules._losses.contrast`.
    val_fraction
        Share of the cells of each context and perturbation kept for validation, where the data has no split of its own.
    """

    loss: str | None = None
    mean_weight: float | None = None
    contrast_weight: float | None = None
    val_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("energy", "sinkhorn", "energy+sinkhorn")
        if self.loss is not None and self.loss not in kinds:
            raise unknown_name("loss", self.loss, kinds)
        for name in ("mean_weight", "contrast_weight"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"{name}={value!r} is not a number of at least 0. Use 0 to leave the term out.")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction!r} must be at least 0 and less than 1.")


def network_options(size: str, preset: str, network: Mapping[str, object]) -> dict:
    """Fields of the configuration that the caller decides, or the size does."""
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    valid = [f.name for f in dataclasses.fields(STConfig)]
    for name in network:
        if name not in valid:
            ours = ("head", "transfer", "n_networks", "set_size", "preset")
            raise unknown_name("network option", name, sorted({*valid, *ours}), "See vc.models.STConfig.")
    options = {**SIZES[size], **network}
    if "decoder_hidden" in options:  # a list after JSON
        options["decoder_hidden"] = tuple(options["decoder_hidden"])
    return options
