"""Arc's SE folders: `config.yaml`, `model.safetensors` or a Lightning checkpoint, `protein_embeddings.pt`."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from virtualcell._reading import mapping_of
from virtualcell._unpickle import read_torch
from virtualcell.data._registry import scvi_registry
from virtualcell.data._tables import as_table
from virtualcell.io._arc import (
    OURS,
    checked_parameters,
    config_value,
    named_parameters,
    plain_config,
    read_config,
    require_sizes,
    whole_number,
)
from virtualcell.modules import SEConfig, SENetwork

logger = logging.getLogger(__name__)

# The first is a table of gene vectors kept as a parameter, the second the token encoder under its other name.
KNOWN_EXTRAS = ("pe_embedding.", "gene_embedding_layer.")
_TWIN = ("encoder.", "gene_embedding_layer.")
_WEIGHTS, _CONFIG, _GENES = "model.safetensors", "config.yaml", "protein_embeddings.pt"
_ALWAYS_ON = ("model.rda", "model.dataset_correction", "model.counts")


def read_se(
    folder: Path, *, gene_embeddings: pd.DataFrame | None, checkpoint: str | None
) -> tuple[dict, dict[str, Tensor], dict]:
    """Return arguments, tensors and registry of a :class:`virtualcell.models.SE`."""
    path = _weights_file(folder, checkpoint)
    content = _checkpoint(path)
    state = _with_both_names(named_parameters(content["state_dict"], source=str(path)), source=str(path))

    if (folder / _CONFIG).exists():
        config, source = read_config(folder / _CONFIG), str(folder / _CONFIG)
    elif isinstance(content.get("cfg_yaml"), str):
        config, source = plain_config(content["cfg_yaml"], source=str(path)), f"{path}['cfg_yaml']"
    else:
        raise FileNotFoundError(f"{folder} holds no {_CONFIG}, and {path.name} no 'cfg_yaml': the sizes are unknown.")
    for key in _ALWAYS_ON:
        if not config_value(config, key, source=source):
            raise ValueError(f"{source} has {key}: false. Models without it are not supported.")

    def size(key: str) -> int:
        return whole_number(config_value(config, key, source=source), key, source=source)

    classes = state.get("dataset_encoder.4.weight")
    sizes = SEConfig(
        n_token=size("tokenizer.token_dim"),
        n_hidden=size("model.emsize"),
        n_layers=size("model.nlayers"),
        n_heads=size("model.nhead"),
        n_feedforward=size("model.d_hid"),
        n_output=size("model.output_dim"),
        n_datasets=1 if classes is None else len(classes),
        dropout=float(config["model"].get("dropout", 0.1)),
    )
    require_sizes(asdict(sizes), state.values(), source=source)
    with torch.device("meta"):
        network = SENetwork(sizes)
    state = checked_parameters(state, network, known_extras=KNOWN_EXTRAS, source=str(path))
    names, vectors = _gene_table(folder, gene_embeddings, content)
    if vectors.shape[1] != sizes.n_token:
        raise ValueError(
            f"gene_embeddings has {vectors.shape[1]} dimensions, but this model was trained on {sizes.n_token}. Give "
            "the table that it was trained with."
        )
    dataset, ours = mapping_of(config["dataset"], f"dataset of {source}"), mapping_of(config.get(OURS, {}), source)
    arguments = {
        "length": size("dataset.pad_length") - 1,  # the first place is [CLS]
        "n_targets": [
            whole_number(dataset.get(k, n), k, source=source) for k, n in (("P", 512), ("N", 256), ("S", 512))
        ],
        "cls_expression_gene": ours.get("cls_expression_gene", size("dataset.cls_token_idx")),
        "fill_sentences": ours.get("fill_sentences", True),
        "genes": names,
        "config": asdict(sizes),
    }
    setup = {"layer": None, "scale": "counts", "dataset_key": None, "gene_key": None}
    states = {"X": {"column_names": names}, "dataset": {"categorical_mapping": [0]}}
    tensors = {"gene_embeddings": vectors, **{f"network.{k}": v for k, v in state.items()}}
    return arguments, tensors, scvi_registry("SE", setup, states)


def _checkpoint(path: Path) -> Mapping:
    """Return what a file of weights holds, of which "state_dict" are the weights: all that a safetensors file has."""
    if path.suffix == ".safetensors":
        try:
            return {"state_dict": safetensors.torch.load_file(path)}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is cut off, damaged, or a pointer of git LFS: {error}. Fetch it.") from error
    content = read_torch(path, stand_ins=True)
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise ValueError(f"{path} is no Lightning checkpoint: it has no entry 'state_dict'.")
    return content


def write_se(
    folder: Path, network: SENetwork, genes: pd.Index, vectors: Tensor, arguments: dict, *, overwrite: bool
) -> None:
    """Write `config.yaml`, `model.safetensors` and `protein_embeddings.pt` as the reference package writes them."""
    if network.config.n_dataset != SEConfig.n_dataset:
        raise ValueError(
            f"n_dataset={network.config.n_dataset}, but Arc's models have {SEConfig.n_dataset} numbers that tell data "
            "sets apart, and their files do not say so. Save it with `se.save`, or train one without n_dataset=."
        )
    files = [folder / name for name in (_WEIGHTS, _CONFIG, _GENES)]
    if not overwrite and (there := [f.name for f in files if f.exists()]):
        raise FileExistsError(f"{folder} holds {', '.join(there)} already. Pass overwrite=True to replace them.")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ckpt"):  # of the model before
        old.unlink()
    state = {k: v.detach().float().cpu().contiguous() for k, v in network.state_dict().items()}
    ours, theirs = _TWIN
    twins = {theirs + k.removeprefix(ours): v.clone() for k, v in state.items() if k.startswith(ours)}
    safetensors.torch.save_file({**state, **twins}, files[0])
    files[1].write_text(yaml.safe_dump(_config(network.config, arguments, n_genes=len(genes)), sort_keys=False))
    vectors = vectors.detach().cpu()
    torch.save({gene: vectors[i].clone() for i, gene in enumerate(genes)}, files[2])


def _config(sizes: SEConfig, arguments: dict, *, n_genes: int) -> dict:
    cls_gene, (p, n, s) = arguments["cls_expression_gene"], arguments["n_targets"]
    return {
        "experiment": {"name": "virtualcell"},
        "embeddings": {"current": "virtualcell", "virtualcell": {"size": sizes.n_token, "num": n_genes}},
        "dataset": {
            "current": "virtualcell",
            "virtualcell": {"num_datasets": sizes.n_datasets, "ds_type": "h5ad"},
            "pad_length": arguments["length"] + 1,
            "pad_token_idx": 0,
            "cls_token_idx": 3 if cls_gene is None else cls_gene,
            "P": p,
            "N": n,
            "S": s,
        },
        "tokenizer": {"token_dim": sizes.n_token},
        "model": {
            "name": "vci",
            "emsize": sizes.n_hidden,
            "d_hid": sizes.n_feedforward,
            "nhead": sizes.n_heads,
            "nlayers": sizes.n_layers,
            "dropout": sizes.dropout,
            "output_dim": sizes.n_output,
            "rda": True,
            "counts": True,
            "dataset_correction": True,
        },
        OURS: {"cls_expression_gene": cls_gene, "fill_sentences": arguments["fill_sentences"]},
    }


def _weights_file(folder: Path, checkpoint: str | None) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r} is no folder.")
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".ckpt"))
    if checkpoint is not None:
        if not (folder / checkpoint).is_file():
            raise FileNotFoundError(f"checkpoint={checkpoint!r} is not in {folder}; it holds {found}.")
        return folder / checkpoint
    if _WEIGHTS in found:
        return folder / _WEIGHTS
    checkpoints = [name for name in found if name.endswith(".ckpt")]
    if len(checkpoints) != 1:
        raise FileNotFoundError(f"{folder} holds no {_WEIGHTS}; of {found}, name one as checkpoint=.")
    return folder / checkpoints[0]


def _with_both_names(state: dict[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """Check that the token encoder is the same under its two names; a file may keep only the second."""
    state = dict(state)
    ours, theirs = _TWIN
    for name in [k for k in state if k.startswith(theirs)]:
        twin = ours + name.removeprefix(theirs)
        if not torch.equal(state.setdefault(twin, state[name]), state[name]):
            raise ValueError(f"{source}: {name} and {twin} must be one tensor, but they differ.")
    return state


def _gene_table(folder: Path, given: pd.DataFrame | None, content: Mapping) -> tuple[list[str], Tensor]:
    if given is not None:
        given = as_table(given, "gene_embeddings")
        return [str(g) for g in given.index], torch.from_numpy(given.to_numpy(dtype=np.float32))
    if (folder / _GENES).exists():
        table, source = read_torch(folder / _GENES), str(folder / _GENES)
    elif "protein_embeds_dict" in content:
        table, source = content["protein_embeds_dict"], "protein_embeds_dict of the checkpoint"
    else:
        raise FileNotFoundError(
            f"{folder} holds no {_GENES}. Give gene_embeddings=: the table that this model was trained with."
        )
    if not isinstance(table, (dict, OrderedDict)) or len({getattr(v, "shape", None) for v in table.values()}) != 1:
        raise ValueError(f"{source} must hold {{gene: vector}}, with vectors of one length.")
    if not all(isinstance(v, Tensor | np.ndarray) and v.ndim == 1 for v in table.values()):
        raise ValueError(f"{source} must hold {{gene: vector}}, with vectors of numbers.")
    return [str(g) for g in table], torch.stack([torch.as_tensor(v).detach().float() for v in table.values()])
