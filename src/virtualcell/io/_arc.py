"""What Arc's two kinds of folder share: checking parameters by name, and the files beside them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import yaml
from torch import Tensor, nn

logger = logging.getLogger(__name__)

OURS = "virtualcell"  # section of config.yaml with what the reference package has no entry for
_COMPILED = "_orig_mod."  # torch.compile puts it into names


def named_parameters(state: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint under their own names, whether it was compiled or not."""
    named = {name.replace(_COMPILED, ""): value for name, value in state.items()}
    if len(named) < len(state):
        raise ValueError(f"{source} holds parameters twice, with and without {_COMPILED!r} in their names.")
    return named


def checked_parameters(
    state: dict[str, Tensor], network: nn.Module, *, known_extras: Sequence[str], source: str
) -> dict[str, Tensor]:
    """Return what `network` (on any device, meta too) needs, in float32; an error lists whatever does not fit.

    Parameters
    ----------
    state
        Parameters by name.
    network
        Only its names and shapes are read.
    known_extras
        Beginnings of names that published checkpoints carry and no output depends on.
    source
        The file, for messages.
    """
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    extras = sorted(name for name in state if name not in wanted and name.startswith(tuple(known_extras)))
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted) - set(extras))
    misshapen = [
        f"{name} {tuple(state[name].shape)} for {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or unexpected or misshapen:
        problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{source} does not fit the network that its configuration describes. Parameters {told}.")
    if extras:
        logger.info("%s: not needed and left out: %s.", source, ", ".join(extras))
    return {name: state[name].float() for name in wanted}


def read_config(path: Path) -> dict:
    """Read a `config.yaml` without building any object that it names."""
    return plain_config(path.read_text(), source=str(path))


def plain_config(text: str, *, source: str) -> dict:
    """As :func:`read_config`, from the text itself."""
    config = yaml.safe_load(text)
    if not isinstance(config, dict):
        raise ValueError(f"{source} holds no configuration.")
    return config


def config_value(config: dict, key: str, *, source: str) -> object:
    """Return the value at `a.b.c`; an error names the whole path."""
    value: object = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{source} has no entry {key!r}, which this model cannot be built without.")
        value = value[part]
    return value
