"""What Arc's two kinds of folder share: checking parameters by name, and the files beside them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml
from torch import Tensor, nn

from virtualcell._reading import DamagedFileError, as_damaged, mapping_of, require_bounded

logger = logging.getLogger(__name__)

OURS = "virtualcell"  # section of config.yaml with what the reference package has no entry for
_FEW = 1000  # sizes that need not be checked
_COMPILED = "_orig_mod."  # torch.compile puts it into names


def named_parameters(state: object, *, source: str) -> dict[str, Tensor]:
    """Return the parameters of a checkpoint under their own names, whether it was compiled or not."""
    state = mapping_of(state, source)
    if bad := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise DamagedFileError(f"{source}: {bad[:3]} must be parameters, but are no tensors.")
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
    with as_damaged(path, "configuration"):
        text = path.read_text(encoding="utf-8")
    return plain_config(text, source=str(path))


def plain_config(text: str, *, source: str) -> dict:
    """As :func:`read_config`, from the text itself."""
    with as_damaged(source, "configuration"):
        config = yaml.safe_load(text)
    if not isinstance(config, dict):
        raise ValueError(f"{source} holds no configuration.")
    require_bounded(config, source)
    return mapping_of(config, source)


def config_value(config: dict, key: str, *, source: str) -> object:
    """Return the value at `a.b.c`; an error names the whole path."""
    value: object = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{source} has no entry {key!r}, which this model cannot be built without.")
        value = value[part]
    return value


def whole_number(value: object, key: str, *, source: str) -> int:
    """Return a size as a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31 or value != int(value):
        raise ValueError(f"{source} has {key}: {str(value)[:50]}, which is no size: it must be a whole number.")
    return int(value)


def require_sizes(sizes: Mapping[str, object], tensors: Iterable[Tensor], *, source: str) -> None:
    """Raise for sizes of a network that cannot be those of its parameters, before it is built.

    Every layer has parameters of its own, and every place a number.
    """
    found = list(tensors)
    n_values = sum(tensor.numel() for tensor in found)
    for key, value in sizes.items():
        most = len(found) if "layers" in key or key == "n_networks" else max(n_values, _FEW)
        for size in value if isinstance(value, list | tuple) else [value]:
            if isinstance(size, int | float) and not 0 <= size <= most:
                raise DamagedFileError(
                    f"{source} has {key}={size}, but {len(found)} parameters of {n_values:,} numbers together: they "
                    "are not of one network."
                )
