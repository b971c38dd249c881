"""What can be chosen of an SE: sizes, fields of the network, options of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from virtualcell._errors import unknown_name
from virtualcell.modules import SEConfig
from virtualcell.train import TrainOptions

SIZES = {
    # its decoder is 80 wide, n_hidden + n_output + 1 + n_dataset: products of other widths take up to twice as long
    "small": {
        "n_hidden": 48,
        "n_layers": 2,
        "n_heads": 2,
        "n_feedforward": 96,
        "n_output": 21,
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


DEFAULTS = {"lr": 2e-3, "final_lr": 0.3, "gradient_clip": 0.8, "val_fraction": 0.1}
# Steps, and cells in each, where they are not stated; small networks learn as much from a batch of half the size.
N_STEPS, BATCH_SIZE = 1000, 32
N_STEPS_SMALL, BATCH_SIZE_SMALL = 1300, 16
SMALL = 64  # n_hidden
# Validations in a training, where nothing else is stated; early stopping decides at them.
N_VALIDATIONS, N_VALIDATIONS_TO_STOP = 5, 10


def train_options(
    options: TrainOptions | Mapping[str, object] | None, keywords: Mapping[str, object]
) -> SETrainOptions:
    """Complete the options of a training, up to its length, and raise for one that there is not or was given twice."""
    stated = options.stated if isinstance(options, TrainOptions) else dict(options or {})
    twice = sorted(set(stated) & set(keywords))
    if twice:
        raise ValueError(f"{twice[0]}={keywords[twice[0]]!r} and options={{{twice[0]!r}: ...}} were both given.")
    return SETrainOptions.from_({**stated, **keywords}, **DEFAULTS)


def completed(options: SETrainOptions, n_hidden: int) -> SETrainOptions:
    """Decide the length of a training, the size of a step and how often to validate."""
    is_small = n_hidden <= SMALL
    steps = options.max_steps or (N_STEPS_SMALL if is_small else N_STEPS)
    size = options.batch_size or (BATCH_SIZE_SMALL if is_small else BATCH_SIZE)
    n_validations = N_VALIDATIONS_TO_STOP if options.early_stopping else N_VALIDATIONS
    every = options.validate_every or max(1, round(steps / n_validations))
    return dataclasses.replace(options, max_steps=steps, batch_size=size, validate_every=every)


def network_options(size: str, network: Mapping[str, object]) -> dict:
    """Return what the size decides and the caller says of the network, its sentences and its targets."""
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    valid = [f.name for f in dataclasses.fields(SEConfig)]
    for name in network:
        if name not in valid:
            raise unknown_name("network option", name, valid, "See vc.models.SE for the others.")
    return {**SIZES[size], **network}
