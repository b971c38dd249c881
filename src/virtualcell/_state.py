"""A safetensors file of our own, with the numbers as tensors and everything else as JSON in its header."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from virtualcell._files import put_in_place
from virtualcell._reading import as_damaged, mapping_of, require_bounded

FORMAT = 2
_ENTRY = "virtualcell"  # of the file's header
_OF_SESSION = "_scvi_uuid"  # in a registry: the number of a set-up, another one whenever the same data is set up anew


@dataclass
class State:
    """What a model is: the name of its class, what JSON can hold, tensors, and the models that it carries by name."""

    kind: str
    meta: dict
    tensors: dict[str, Tensor]
    parts: dict[str, State] = field(default_factory=dict)


def write_state(state: State, path: Path) -> None:
    """Write a state as one file, which is put in place when it is whole."""
    content = packed(state)
    put_in_place(path, lambda part: part.write_bytes(content))


def read_file(path: Path) -> State:
    """Read what :func:`write_state` wrote."""
    return unpacked(path.read_bytes(), source=str(path))


def packed(state: State) -> bytes:
    """Return a state as the content of a file."""
    tensors: dict[str, Tensor] = {}
    described = json.dumps({"format": FORMAT, **_describe(state, "", tensors)}, default=_plain)
    return safetensors.torch.save(tensors, {_ENTRY: described})


def unpacked(content: bytes, *, source: str) -> State:
    """Read what :func:`packed` made; `source` names it in messages. Nothing is unpickled."""
    with as_damaged(source, "model of virtualcell", "Save the model again."):
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = header.get("__metadata__", {}).get(_ENTRY)
    if described is None:
        raise ValueError(f"{source} holds tensors, but no model of virtualcell.")
    with as_damaged(source, "model of virtualcell", "Save the model again."):
        meta = mapping_of(json.loads(described), source)
        version = int(meta["format"])
    if version > FORMAT:
        raise ValueError(f"{source} has format {version}, newer than {FORMAT}: update virtualcell.")
    with as_damaged(source, "model of virtualcell", "Save the model again."):
        require_bounded(meta, source)
        return _restore(meta, "", tensors)


def digest_of(state: State) -> str:
    """Return what tells a model from another: weights, set-up and all else that is saved, in whatever session."""
    found = hashlib.blake2b(digest_size=16)
    registry = {k: v for k, v in state.meta.get("registry", {}).items() if k != _OF_SESSION}
    found.update(json.dumps([state.kind, {**state.meta, "registry": registry}], default=_plain).encode())
    for name, tensor in state.tensors.items():
        found.update(name.encode())
        flat = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        found.update(flat.view(torch.uint8).numpy())
    for name, part in state.parts.items():
        found.update(f"{name}/{digest_of(part)}".encode())
    return found.hexdigest()


def _describe(state: State, prefix: str, tensors: dict[str, Tensor]) -> dict:
    """Collect the tensors under names of their own, and return the rest."""
    held = {_memory(tensor) for tensor in tensors.values()}
    for name, tensor in state.tensors.items():
        if f"{prefix}{name}" in tensors:
            raise ValueError(f"tensor {prefix}{name} is there twice: once of a model, and once of one that it carries.")
        tensor = tensor.detach().cpu().contiguous()
        # the file has no room for two names of one memory, such as tied weights
        tensors[f"{prefix}{name}"] = tensor.clone() if _memory(tensor) in held else tensor
        held.add(_memory(tensor))
    parts = {name: _describe(part, f"{prefix}{name}/", tensors) for name, part in state.parts.items()}
    return {"class": state.kind, "meta": state.meta, "tensors": list(state.tensors), "parts": parts}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _restore(described: dict, prefix: str, tensors: dict[str, Tensor]) -> State:
    own = {name: tensors[f"{prefix}{name}"] for name in described["tensors"]}
    parts = {name: _restore(part, f"{prefix}{name}/", tensors) for name, part in described["parts"].items()}
    return State(str(described["class"]), mapping_of(described["meta"], "the description of a model"), own, parts)


def _plain(value: object) -> object:
    """Turn numpy values into what JSON knows."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong into the description of a model")
