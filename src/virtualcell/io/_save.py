"""Our own model format: `model.safetensors` for the numbers, `model.json` for everything else. Nothing is pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor

FORMAT = 1


def write_folder(folder: str | os.PathLike, meta: dict, tensors: dict[str, Tensor], *, overwrite: bool = False) -> None:
    """Write a model; an existing one is kept unless `overwrite`."""
    folder = Path(folder)
    if (folder / "model.json").exists() and not overwrite:
        raise FileExistsError(f"{folder} holds a model already. Pass overwrite=True to replace it.")
    folder.mkdir(parents=True, exist_ok=True)
    packed = pack(meta, tensors)
    files = {"model.safetensors": packed["weights"].tobytes(), "model.json": packed["json"].encode()}
    for name, content in files.items():
        (folder / f"{name}.part").write_bytes(content)
    # the description goes first and comes last: an interrupted save leaves none that stands beside other weights
    (folder / "model.json").unlink(missing_ok=True)
    for name in files:
        (folder / f"{name}.part").replace(folder / name)


def read_folder(folder: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Read what :func:`write_folder` wrote."""
    folder = Path(folder)
    if not (folder / "model.json").exists():
        raise FileNotFoundError(f"{folder} holds no model.json: it is not a folder written by `model.save`.")
    return unpack(
        {
            "json": (folder / "model.json").read_text(),
            "weights": np.frombuffer((folder / "model.safetensors").read_bytes(), dtype=np.uint8),
        }
    )


def pack(meta: dict, tensors: dict[str, Tensor]) -> dict[str, str | np.ndarray]:
    """Return the two files as a string and an array of bytes, which `uns` of an h5ad or zarr can hold."""
    weights = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    return {
        "json": json.dumps({"format": FORMAT, **meta}, indent=1, default=_plain),
        "weights": np.frombuffer(weights, dtype=np.uint8),
    }


def unpack(packed: dict[str, str | np.ndarray]) -> tuple[dict, dict[str, Tensor]]:
    """Read what :func:`pack` packed."""
    meta = json.loads(str(packed["json"]))
    if meta["format"] > FORMAT:
        raise ValueError(f"this model has format {meta['format']}, newer than {FORMAT}: update virtualcell.")
    return meta, safetensors.torch.load(np.asarray(packed["weights"]).tobytes())


def _plain(value: object) -> object:
    """Turn numpy values into what JSON knows."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong into a model.json")
