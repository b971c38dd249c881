"""What can be chosen of an SE: sizes, fields of the network, options of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from virtualcell._errors import unknown_name
from virtualcell.modules import SEConfig
from virtualcell.train import TrainOptions

SIZES = {
    "small": {
        "n_hidden": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_feedforward": 128,
        "n_output": 64,
        "length": 128,
        "n_targets": (64, 32, 64),
    },
    "medium": {
        "n_hidden": 256,
        "n_layers": 4,
        "n_heads": 8,
        "n_feedforward": 512,
        "n_output": 256,
        "length": 512,
        "n_targets": (256, 128, 256),
    },
    # SE-600M
    "large": {
        "n_hidden": 2048,
        "n_layers": 16,
        "n_heads": 16,
        "n_feedforward": 2048,
        "n_output": 2048,
        "length": 2047,
        "n_targets": (512, 256, 512),
    },
}


@dataclass(frozen=True, kw_only=True)
class SETrainOptions(TrainOptions):
    """How an SE is trained: :class:`virtualcell.models.TrainOptions`, and what concerns its cells.

    Parameters
    ----------
    val_fraction
        Share of the cells kept for validation.

    Examples
    --------
    >>> vc.models.SETrainOptions(max_steps=500, val_fraction=0.05).stated
    {'max_steps': 500, 'val_fraction': 0.05}
    """

    val_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction!r} must be at least 0 and less than 1.")


N_VALIDATIONS = 10  # in a training, where nothing else is stated

DEFAULTS = {
    "max_steps": 1000,
    "batch_size": 32,
    "lr": 2e-3,
    "final_lr": 0.3,
    "gradient_clip": 0.8,
    "val_fraction": 0.1,
}


def train_options(
    options: TrainOptions | Mapping[str, object] | None, keywords: Mapping[str, object]
) -> SETrainOptions:
    """Complete the options of a training, and raise for one that there is not or that was given twice."""
    stated = options.stated if isinstance(options, TrainOptions) else dict(options or {})
    twice = sorted(set(stated) & set(keywords))
    if twice:
        raise ValueError(f"{twice[0]}={keywords[twice[0]]!r} and options={{{twice[0]!r}: ...}} were both given.")
    complete = SETrainOptions.from_({**stated, **keywords}, **DEFAULTS)
    every = complete.validate_every or max(1, round(complete.max_steps / N_VALIDATIONS))
    return dataclasses.replace(complete, validate_every=every)


def network_options(size: str, network: Mapping[str, object]) -> dict:
    """Return what the size decides and the caller says of the network, its sentences and its targets."""
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    valid = [f.name for f in dataclasses.fields(SEConfig)]
    for name in network:
        if name not in valid:
            raise unknown_name("network option", name, valid, "See vc.models.SE for the others.")
    return {**SIZES[size], **network}
