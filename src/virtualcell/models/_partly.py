"""Train only a part of a network: frozen parameters, low-rank adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from virtualcell._errors import unknown_name
from virtualcell.modules import Ensemble

logger = logging.getLogger(__name__)

_BACKBONES = ("transformer_backbone", "transformer_encoder")  # of ST, of SE
_LORA = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}


def check_adapters(lora: Mapping[str, Any] | None) -> None:
    """Raise for options of adapters that there are not, or with a wrong value, and where `peft` is missing."""
    if lora is None:
        return
    if not isinstance(lora, Mapping):
        raise TypeError(f"lora={lora!r} must be a dictionary of options of the adapters, such as {{'r': 8}}.")
    for name, value in lora.items():
        if name not in _LORA:
            raise unknown_name("lora", name, _LORA, "These are the options of an adapter.")
        _check_adapter_option(name, value)
    if find_spec("peft") is None:
        raise ImportError('lora= needs peft: pip install "virtualcell[lora]"')


def _check_adapter_option(name: str, value: object) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if name == "r" and not (is_number and isinstance(value, Integral) and value >= 1):
        raise ValueError(f"lora['r']={value!r} is not a whole number of at least 1.")
    if name == "alpha" and not (is_number and value > 0):
        raise ValueError(f"lora['alpha']={value!r} is not a number above 0.")
    if name == "dropout" and not (is_number and 0 <= value < 1):
        raise ValueError(f"lora['dropout']={value!r} must be at least 0 and less than 1.")
    if name == "target_modules" and (isinstance(value, str) or not isinstance(value, Iterable) or not value):
        raise ValueError(f"lora['target_modules']={value!r} must be a list of names of layers.")


def check_partly(
    network: nn.Module, *, freeze: str | Sequence[str] = (), lora: Mapping[str, Any] | None = None
) -> set[str]:
    """Raise where a network has no such parts, or would have nothing left to train; return what stays as it is."""
    if isinstance(network, Ensemble) and (freeze or lora is not None):
        raise ValueError("freeze and lora are for a model of one network; init_from has several.")
    parameters = [name for name, _ in network.named_parameters()]
    frozen = _frozen(network, parameters, [freeze] if isinstance(freeze, str) else freeze)
    check_adapters(lora)
    if lora is not None:
        backbone = _backbone_name(network)
        linear = _linear_layers(network.get_submodule(backbone))
        for name in lora.get("target_modules", ()):
            if name not in linear:
                raise unknown_name("lora['target_modules']", name, linear)
        frozen |= {name for name in parameters if name.startswith(f"{backbone}.")}
    elif len(frozen) == len(parameters):
        raise ValueError(f"freeze={list(freeze)!r} leaves nothing to train.")
    return frozen


@contextmanager
def partly_trained(
    network: nn.Module, *, freeze: str | Sequence[str] = (), lora: Mapping[str, Any] | None = None, seed: int = 0
) -> Iterator[None]:
    """Train only some parameters inside the block; with `lora`, adapters of the backbone, merged at its end."""
    frozen = check_partly(network, freeze=freeze, lora=lora)
    parameters = dict(network.named_parameters())
    if lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _add_adapters(network.get_submodule(_backbone_name(network)), lora)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    try:
        if frozen:
            learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
            logger.info("%d parameters are trained, %d frozen.", learned, sum(parameters[n].numel() for n in frozen))
        yield
    finally:
        if lora is not None:
            _merge_adapters(network.get_submodule(_backbone_name(network)))
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def _backbone_name(network: nn.Module) -> str:
    return next(name for name in _BACKBONES if hasattr(network, name))


def _linear_layers(backbone: nn.Module) -> list[str]:
    return sorted({name.split(".")[-1] for name, m in backbone.named_modules() if isinstance(m, nn.Linear)})


def _frozen(network: nn.Module, parameters: Sequence[str], prefixes: Sequence[str]) -> set[str]:
    frozen: set[str] = set()
    for prefix in prefixes:
        found = {name for name in parameters if f"{name}.".startswith(f"{prefix.rstrip('.')}.")}
        if not found:
            valid = dict.fromkeys(name.split(".")[0] for name in parameters)
            deeper = [name for name, _ in network.named_modules() if "." in name]
            raise unknown_name("freeze", prefix, [*valid, *deeper], "It must be the beginning of a parameter's name.")
        frozen |= found
    return frozen


def _add_adapters(backbone: nn.Module, lora: Mapping[str, Any]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    options = {"target_modules": _linear_layers(backbone), **{_LORA[k]: v for k, v in lora.items()}}
    inject_adapter_in_model(LoraConfig(**options), backbone)


def _merge_adapters(backbone: nn.Module) -> None:
    """Add the product of the two factors to each weight, and put the plain layer back."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, module.get_base_layer())
