"""What can be chosen of an ST: sizes, presets, fields of the network, options of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from virtualcell._errors import unknown_name
from virtualcell.modules import STConfig
from virtualcell.train import TrainOptions

_MAY_BE_NONE = ("n_batches", "n_genes")

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
PRESETS: dict[str, dict[str, Any]] = {
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
        `virtualcell.modules._losses.contrast`.
    val_fraction
        Share of the cells of each context and perturbation kept for validation, where the data has no split of its own.

    Examples
    --------
    >>> vc.models.STTrainOptions(max_steps=500, mean_weight=0).stated
    {'max_steps': 500, 'mean_weight': 0}
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
        _check_value(name, network[name])
    options = {**SIZES[size], **network}
    if "decoder_hidden" in options:  # a list after JSON
        options["decoder_hidden"] = tuple(options["decoder_hidden"])
    return options


def _check_value(name: str, value: Any) -> None:
    """Raise for a value that a field of the configuration cannot have."""
    default = next(f.default for f in dataclasses.fields(STConfig) if f.name == name)
    kind, least = int if default is dataclasses.MISSING else type(default), int(name not in _MAY_BE_NONE)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither True nor False.")
    if kind is int and not _is_whole(value, least):
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}.")
    if kind is float and (not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1):
        raise ValueError(f"{name}={value!r} is not a number of at least 0 and less than 1.")
    if kind is tuple and (isinstance(value, str | int) or not all(_is_whole(v) for v in value)):
        raise ValueError(f"{name}={value!r} is not a list of whole numbers, such as (512,).")


def _is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least
