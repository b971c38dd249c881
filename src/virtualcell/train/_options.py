"""The options of a training, checked before anything runs."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

from virtualcell._arguments import require_whole
from virtualcell._errors import unknown_name
from virtualcell._settings import settings

# smallest value of whole numbers; bounds of others, with whether the lower one is valid
_WHOLE = {"max_steps": 1, "batch_size": 1, "validate_every": 1, "patience": 1, "seed": 0}
_NUMBERS = {
    "lr": (0, math.inf, False),
    "weight_decay": (0, math.inf, True),
    "warmup": (0, 1, True),
    "final_lr": (0, 1, True),
    "gradient_clip": (0, math.inf, True),
    "checkpoint_every": (0, math.inf, True),
}
_FLAGS = ("early_stopping", "progress_bar", "resume")
_CHOICES = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook", "fsdp"),
    "precision": ("32-true", "bf16-mixed", "16-mixed"),
}
_REMEDIES = {
    "max_steps": "Leave it out to let the model decide.",
    "batch_size": "Leave it out to let the model decide.",
    "validate_every": "Leave it out for some twenty validations.",
    "lr": "Use a small number such as 1e-3.",
    "gradient_clip": "Use 0 for gradients that are not clipped.",
    "warmup": "It is a share of the steps, such as 0.03.",
    "final_lr": "It is a share of lr, such as 0.1.",
}
# what no model decides otherwise
_COMMON = {
    "weight_decay": 0.01,
    "warmup": 0.03,
    "final_lr": 0.0,
    "gradient_clip": 10.0,
    "early_stopping": False,
    "patience": 10,
    "accelerator": "auto",
    "devices": "auto",
    "strategy": "auto",
    "precision": "32-true",
    "resume": False,
    "checkpoint_every": 300.0,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a network is trained. What is left out (`None`) is decided by the model, see :meth:`from_`.

    Parameters
    ----------
    max_steps
        Number of steps of the optimiser.
    lr
        Highest learning rate of AdamW.
    weight_decay
        Weight decay of AdamW, 0.01 unless the model says otherwise.
    warmup
        Share of the steps in which the learning rate rises from a third of `lr` to `lr`, 0.03 unless the model says
        otherwise.
    final_lr
        Learning rate at the end as a share of `lr`, to which it falls along a cosine, 0 unless the model says
        otherwise.
    gradient_clip
        Largest norm of the gradient, which is scaled down to it, 10 unless the model says otherwise; 0 leaves gradients
        as they are.
    batch_size
        Size of one step's batch over all processes, in the model's unit (sets of cells or cells).
    validate_every
        Number of steps between two validations, which is also that between two entries of the history; by default some
        twenty in a training, fewer where they would take ST more than a tenth of its time, and five of SE. The last
        step is always followed by a validation.
    early_stopping
        Whether training ends when the validation loss has not fallen for `patience` validations.
    patience
        Number of validations without a lower loss after which early stopping ends a training, 10 by default.
    accelerator
        "auto", "cpu", "gpu" ("cuda") or "mps"; "auto" uses a GPU where there is one.
    devices
        Number of devices (-1: all), a list of their numbers, or "auto" for one device.
    strategy
        How several devices are used. "ddp" starts the script once for each device; "ddp_spawn" starts processes from
        a script whose main part is guarded by `if __name__ == "__main__"`; "ddp_notebook" ("ddp_fork") forks, which
        notebooks need. "fsdp", which starts the script like "ddp", divides weights, gradients and the optimiser's
        states among the devices too, for networks that do not fit on one. "auto" is "ddp", in notebooks "ddp_notebook".
    precision
        "32-true", or "bf16-mixed" and "16-mixed" (GPUs alone), which compute in 16 bits and keep weights in 32. They
        are faster for large networks, on GPUs and on CPUs that multiply such numbers (avx512_bf16 or amx_bf16 among
        their flags), and an ST can lose its gradients by them.
    seed
        Seed of dropout and of whatever else is drawn while training; by default `vc.settings.seed`.
    progress_bar
        Whether a bar shows steps and loss; by default what `vc.settings.progress` says.
    checkpoint_dir
        Folder in which the training is kept, so that it can go on after its process was ended: weights, optimiser,
        random numbers and history, in one file without pickled code. A process that is told to end by SIGTERM or
        Ctrl-C keeps it once more.
    resume
        Whether to go on from what is in `checkpoint_dir`, with the result that an uninterrupted training would have
        had, bit for bit on a CPU. A folder that holds nothing yet is begun, so that a job can be sent again as it is; a
        training of other data or with other options is refused. `False`, the default, refuses any.
    checkpoint_every
        Seconds after which the training is kept again, 300 by default; 0 keeps it before every step.

    Examples
    --------
    >>> vc.models.TrainOptions(max_steps=500, lr=1e-3).stated
    {'max_steps': 500, 'lr': 0.001}
    """

    max_steps: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    final_lr: float | None = None
    gradient_clip: float | None = None
    batch_size: int | None = None
    validate_every: int | None = None
    early_stopping: bool | None = None
    patience: int | None = None
    accelerator: str | None = None
    devices: int | str | Sequence[int] | None = None
    strategy: str | None = None
    precision: str | None = None
    seed: int | None = None
    progress_bar: bool | None = None
    checkpoint_dir: str | os.PathLike | None = None
    resume: bool | None = None
    checkpoint_every: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.stated.items():
            if name in _WHOLE:
                _check_whole(name, value)
            elif name in _NUMBERS:
                _check_number(name, value)
            elif name in _FLAGS and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is neither True nor False.")
            elif name in _CHOICES and value not in _CHOICES[name]:
                _refuse_choice(name, value)
        if self.devices is not None:
            _check_devices(self.devices)
        if self.checkpoint_dir is not None and not isinstance(self.checkpoint_dir, str | os.PathLike):
            raise ValueError(f"checkpoint_dir={self.checkpoint_dir!r} is not the name of a folder.")

    @property
    def stated(self) -> dict[str, object]:
        """The options that are not left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_(cls, given: TrainOptions | Mapping[str, object] | None = None, **defaults: object) -> Self:
        """Complete the options that a user gave.

        Parameters
        ----------
        given
            Options or a mapping of their names to values; what it states wins.
        **defaults
            What the model decides where `given` says nothing.
        """
        if given is None or isinstance(given, TrainOptions):
            stated = {} if given is None else given.stated
        elif isinstance(given, Mapping):
            names = [field.name for field in dataclasses.fields(cls)]
            for name in given:
                if name not in names:
                    remedy = f"Options of a training: {', '.join(names)}."
                    raise unknown_name("training option", name, names, remedy)
            stated = cls(**given).stated
        else:
            raise ValueError(
                f"training options {given!r} are neither TrainOptions nor a mapping. "
                'Use a dictionary such as {"max_steps": 1000, "lr": 1e-3}.'
            )
        of_settings = {"seed": settings.seed, "progress_bar": settings.progress}
        whole = cls(**{**_COMMON, **of_settings, **cls(**defaults).stated, **stated})
        if whole.resume and whole.checkpoint_dir is None:
            raise ValueError("resume=True needs checkpoint_dir=, the folder in which the training was kept.")
        return whole


def _remedy(name: str) -> str:
    return _REMEDIES.get(name, f"Leave it out for {_COMMON[name]!r}." if name in _COMMON else "")


def _check_whole(name: str, value: object) -> None:
    require_whole(name, value, _WHOLE[name], _remedy(name))


def _check_number(name: str, value: object) -> None:
    low, high, inclusive = _NUMBERS[name]
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (value == low and not inclusive):
        bounds = (
            "above 0" if not inclusive else f"between {low} and {high}" if high < math.inf else f"of at least {low}"
        )
        raise ValueError(f"{name}={value!r} is not a number {bounds}. {_remedy(name)}")


def _refuse_choice(name: str, value: object) -> None:
    if name == "precision" and str(value).endswith("-true"):
        mixed = "bf16-mixed" if str(value).startswith("bf16") else "16-mixed"
        raise ValueError(f"precision={value!r} is not for these models: weights stay in float32. Use {mixed!r}.")
    valid = ", ".join(map(repr, _CHOICES[name]))
    raise ValueError(f"{name}={value!r} is unknown. Valid: {valid}. {_remedy(name)}")


def _check_devices(devices: Any) -> None:
    def is_whole(value: object) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool)

    if devices == "auto" or (is_whole(devices) and (devices >= 1 or devices == -1)):
        return
    is_list = isinstance(devices, Sequence) and not isinstance(devices, str)
    if not is_list or not devices or not all(is_whole(d) and d >= 0 for d in devices):
        raise ValueError(
            f'devices={devices!r} is not a number of devices. Use "auto" for one, a number such as 2, -1 for all, or a '
            "list of their numbers such as [0, 1]."
        )
