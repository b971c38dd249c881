"""Train only a part of a network: frozen parameters, low-rank adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from virtualcell._errors import unknown_name
from virtualcell.modules import Ensemble

logger = logging.getLogger(__name__)

_BACKBONES = ("transformer_backbone", "transformer_encoder")  # of ST, of SE
_LORA = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}


@contextmanager
def partly_trained(
    network: nn.Module, *, freeze: Sequence[str] = (), lora: Mapping[str, object] | None = None, seed: int = 0
) -> Iterator[None]:
    """Train only some parameters inside the block; with `lora`, adapters of the backbone, merged at its end."""
    if isinstance(network, Ensemble) and (freeze or lora is not None):
        raise ValueError("freeze and lora are for a model of one network; init_from has several.")
    parameters = dict(network.named_parameters())
    frozen = _frozen(network, parameters, [freeze] if isinstance(freeze, str) else freeze)
    backbone = next((name for name in _BACKBONES if hasattr(network, name)), None)
    if lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _add_adapters(getattr(network, backbone), lora)
        frozen |= {name for name in parameters if name.startswith(f"{backbone}.")}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    try:
        learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
        if not learned:
            raise ValueError(f"freeze={list(freeze)!r} leaves nothing to train.")
        if frozen:
            logger.info("%d parameters are trained, %d frozen.", learned, sum(parameters[n].numel() for n in frozen))
        yield
    finally:
        if lora is not None:
            _merge_adapters(getattr(network, backbone))
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def _frozen(network: nn.Module, parameters: dict[str, nn.Parameter], prefixes: Sequence[str]) -> set[str]:
    frozen: set[str] = set()
    for prefix in prefixes:
        found = {name for name in parameters if f"{name}.".startswith(f"{prefix.rstrip('.')}.")}
        if not found:
            valid = dict.fromkeys(name.split(".")[0] for name in parameters)
            deeper = [name for name, _ in network.named_modules() if "." in name]
            raise unknown_name("freeze", prefix, [*valid, *deeper], "It must be the beginning of a parameter's name.")
        frozen |= found
    return frozen


def _add_adapters(backbone: nn.Module, lora: dict) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError('lora= needs peft: pip install "virtualcell[lora]"') from error
    for key in lora:
        if key not in _LORA:
            raise unknown_name("lora", key, _LORA, "These are the options of an adapter.")
    linear = sorted({name.split(".")[-1] for name, m in backbone.named_modules() if isinstance(m, nn.Linear)})
    for name in lora.get("target_modules", ()):
        if name not in linear:
            raise unknown_name("lora['target_modules']", name, linear)
    options = {"target_modules": linear, **{_LORA[k]: v for k, v in lora.items()}}
    inject_adapter_in_model(LoraConfig(**options), backbone)


def _merge_adapters(backbone: nn.Module) -> None:
    """Add the product of the two factors to each weight, and put the plain layer back."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, module.get_base_layer())
