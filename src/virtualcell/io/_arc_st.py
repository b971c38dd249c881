"""Arc's ST run folders: `config.yaml`, `var_dims.pkl`, one-hot maps and `checkpoints/*.ckpt`; or a checkpoint alone."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from virtualcell._reading import mapping_of, require_bounded
from virtualcell._unpickle import read_pickle, read_torch
from virtualcell.data._registry import scvi_registry
from virtualcell.io._arc import (
    OURS,
    checked_parameters,
    config_value,
    named_parameters,
    read_config,
    require_sizes,
    whole_number,
)
from virtualcell.modules import STConfig, STNetwork

logger = logging.getLogger(__name__)

# The token table of a backbone that is fed vectors, and a classifier that only training used.
KNOWN_EXTRAS = ("transformer_backbone.embed_tokens.", "batch_classifier.")
GENE_SPACE = ("X_hvg", "", None)  # values of embed_key
# Options that change the arithmetic into one that is not described anywhere.
_UNSUPPORTED = ("mask_attn", "transformer_decoder", "finetune_vci_decoder", "use_effect_gating_token")
_N_LAYERS = 4  # of encoders and decoder, as the paper has them, where a checkpoint does not say


def read_st(
    path: Path,
    *,
    checkpoint: str,
    gene_names: Sequence[str] | None,
    perturbations: Sequence[str] | Mapping[str, Sequence[float]] | pd.DataFrame | None,
) -> tuple[dict, dict[str, Tensor], dict]:
    """Return arguments, tensors and registry of a :class:`virtualcell.models.ST`."""
    file = _checkpoint_file(path, checkpoint)
    folder = path if path.is_dir() else None
    content = read_torch(file, stand_ins=True)
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise ValueError(f"{file} is no Lightning checkpoint: it has no entry 'state_dict'.")
    data, ours, sizes, h = _hyper_parameters(folder, content)
    state = named_parameters(content["state_dict"], source=str(file))
    config = st_config(h, state, source=str(file))
    require_sizes(asdict(config), state.values(), source=str(file))
    with torch.device("meta"):
        network = STNetwork(config)
    state = checked_parameters(state, network, known_extras=KNOWN_EXTRAS, source=str(file))

    genes = _gene_names(gene_names, [sizes, h], config, source=str(file))
    control = str(h.get("control_pert", "non-targeting"))
    names, vectors, control = _perturbations(folder, perturbations, config.n_perturbation, control)
    one_hot = torch.equal(vectors.sort(dim=1).values[:, -1:], torch.ones(len(vectors), 1)) and bool(
        (vectors.count_nonzero(dim=1) == 1).all()
    )
    batches = _names_in_order(folder, "batch_onehot_map") or [str(i) for i in range(config.n_batches)]
    if config.n_batches and len(batches) != config.n_batches:
        raise ValueError(f"{folder} names {len(batches)} batches, but the network has {config.n_batches}.")
    contexts = _names_in_order(folder, "cell_type_onehot_map")
    embed_key = h.get("embed_key")
    setup = {
        "perturbation_key": data.get("pert_col", "perturbation"),
        "control": control,
        "context_key": data.get("cell_type_key", "cell_type") if contexts else None,
        "batch_key": data.get("batch_col", "batch") if config.n_batches else None,
        "layer": None,
        "scale": "log1p",
        "use_rep": None if embed_key in GENE_SPACE else embed_key,
        "split_key": None,
        **ours,
    }
    states = {
        "X": {"column_names": genes},
        "perturbation": {"categorical_mapping": names},
        "context": {"categorical_mapping": contexts or [0]},  # type: ignore[list-item]
        "batch": {"categorical_mapping": batches or [0], "original_key": data.get("batch_col", "batch")},  # type: ignore[list-item]
        "rep": {},
    }
    arguments = {
        "sizes": {
            "set_size": whole_number(
                config_value(h, "cell_set_len", source=str(file)), "cell_set_len", source=str(file)
            ),
            "preset": "published",
        },
        "config": asdict(config),
        "table": {"names": names, "seen": [n for n in names if n != control], "has_features": not one_hot},
    }
    tensors = {"perturbations": vectors, **{f"network.{k}": v for k, v in state.items()}}
    return arguments, tensors, scvi_registry("ST", setup, states, {"rep": {"n_rep": config.n_input}})


def st_config(h: Mapping, state: Mapping[str, Tensor], *, source: str) -> STConfig:
    """Translate hyper-parameters; what could change the arithmetic without a trace in the parameters is an error."""

    def value(key: str) -> Any:
        return config_value(h, key, source=source)

    def size(key: str, otherwise: int | None = None) -> int:
        found = value(key) if otherwise is None else h.get(key, otherwise)
        return whole_number(found, key, source=source)

    backbone = mapping_of(value("transformer_backbone_kwargs"), f"{source}: transformer_backbone_kwargs")
    wrong = [f"{k}={h[k]!r}" for k in _UNSUPPORTED if h.get(k)]
    wrong += [f"{k}={backbone[k]!r}" for k in ("use_rotary_embeddings", "rotary_dim") if backbone.get(k)]
    if h.get("transformer_backbone_key", "llama").lower() != "llama":
        wrong.append(f"transformer_backbone_key={h['transformer_backbone_key']!r}")
    if backbone.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act={backbone['hidden_act']!r}")
    # without the key, the version that wrote the file had no other kind
    if not backbone.get("bidirectional_attention", True):
        wrong.append("bidirectional_attention=False")
    if backbone.get("rms_norm_eps", 1e-6) != 1e-6:
        wrong.append(f"rms_norm_eps={backbone['rms_norm_eps']!r}")
    if wrong:
        raise ValueError(f"{source} uses {', '.join(wrong)}, which virtualcell does not implement.")

    n_hidden, n_heads = size("hidden_dim"), size("transformer_backbone_kwargs.num_attention_heads")
    in_genes = h.get("embed_key") in GENE_SPACE
    decoder = h.get("decoder_cfg") if h.get("gene_decoder_bool", True) and not in_genes else None
    head = "none"
    if h.get("predict_residual", True):
        head = "all" if h.get("output_space") == "all" else "level"
    return STConfig(
        n_input=size("input_dim"),
        n_output=size("output_dim"),
        n_perturbation=size("pert_dim"),
        n_hidden=n_hidden,
        n_layers=size("transformer_backbone_kwargs.num_hidden_layers"),
        n_heads=n_heads,
        head_dim=whole_number(backbone.get("head_dim") or n_hidden // max(n_heads, 1), "head_dim", source=source),
        n_feedforward=size("transformer_backbone_kwargs.intermediate_size"),
        n_encoder_layers=size("n_encoder_layers", _N_LAYERS),
        n_decoder_layers=size("n_decoder_layers", _N_LAYERS),
        dropout=float(h.get("dropout", 0.1)),
        head=head,
        relu=in_genes or decoder is None,
        control_projection=bool(h.get("use_basal_projection", True)),
        n_batches=size("batch_dim") if h.get("batch_encoder") else 0,
        batch_token="batch_token" in state,
        confidence_token=bool(h.get("confidence_token")) or "confidence_token.confidence_token" in state,
        n_genes=whole_number(decoder["gene_dim"], "gene_dim", source=source) if decoder else 0,
        decoder_hidden=tuple(whole_number(n, "hidden_dims", source=source) for n in decoder["hidden_dims"])
        if decoder
        else (),
        decoder_residual=bool(decoder.get("residual_decoder")) if decoder else False,
        decoder_dropout=float(decoder.get("dropout", 0.1)) if decoder else 0.1,
    )


def _checkpoint_file(path: Path, checkpoint: str) -> Path:
    if path.is_file():
        return path
    for file in (path / "checkpoints" / checkpoint, path / checkpoint):
        if file.is_file():
            return file
    found = sorted(str(p.relative_to(path)) for p in path.rglob("*.ckpt")) if path.is_dir() else []
    raise FileNotFoundError(f"checkpoint={checkpoint!r} is not in {path}; it holds {found}.")


def _hyper_parameters(folder: Path | None, content: Mapping) -> tuple[dict, dict, dict, dict]:
    """Options of the data, what :func:`write_st` adds, sizes; hyper-parameters, of which the checkpoint's own win."""
    data: dict = {}
    ours: dict = {}
    model: dict = {}
    sizes: dict = {}
    if folder is not None and (folder / "config.yaml").exists():
        config = read_config(folder / "config.yaml")
        ours = {k: config.get(OURS, {}).get(k) for k in ("context_key", "batch_key") if OURS in config}
        source = str(folder / "config.yaml")
        data = mapping_of(config_value(config, "data.kwargs", source=source), f"data.kwargs of {source}")
        model = mapping_of(config_value(config, "model.kwargs", source=source), f"model.kwargs of {source}")
    if folder is not None and (folder / "var_dims.pkl").exists():
        sizes = mapping_of(read_pickle(folder / "var_dims.pkl"), str(folder / "var_dims.pkl"))
    known = {k: data[k] for k in ("embed_key", "output_space", "control_pert") if k in data}
    own = mapping_of(content.get("hyper_parameters", {}), "hyper_parameters of the checkpoint")
    found = {**sizes, **known, **model, **own}
    require_bounded(found, "hyper_parameters of the checkpoint")
    return data, ours, sizes, found


def _gene_names(given: Sequence[str] | None, sources: Sequence[Mapping], config: STConfig, *, source: str) -> list[str]:
    n = config.n_genes or config.n_output
    if given is not None:
        names = [str(g) for g in given]
        if len(names) != n:
            raise ValueError(f"gene_names holds {len(names)} names, but {source} predicts {n} genes.")
    else:
        found = [[str(g) for g in s["gene_names"]] for s in sources if s.get("gene_names") is not None]
        fitting = [names for names in found if len(names) == n]
        if not fitting:
            counts = sorted({len(names) for names in found})
            has = f"{' and '.join(map(str, counts))} gene names" if found else "no gene names"
            raise ValueError(
                f"{source} predicts {n} genes and carries {has}. Give gene_names=: the {n} names in the order of "
                "training. Genes are never matched by position alone."
            )
        names = fitting[0]
    if len(set(names)) < n:
        raise ValueError(f"gene_names names {n - len(set(names))} genes twice.")
    return names


def _perturbations(folder: Path | None, given: Any, n_dims: int, control: str) -> tuple[list[str], Tensor, str]:
    """Return names, vectors, and the control as it is called among the names."""
    if given is None and folder is not None and (folder / "pert_onehot_map.pt").exists():
        given, source = read_torch(folder / "pert_onehot_map.pt"), "pert_onehot_map.pt"
    elif given is None:
        raise ValueError(
            "perturbations must be given, because there is no pert_onehot_map.pt: the names in the order of training, "
            "or {name: vector}."
        )
    else:
        source = "perturbations"
    if isinstance(given, pd.DataFrame):
        given = dict(zip(given.index, given.to_numpy(dtype=np.float32), strict=True))
    if isinstance(given, Mapping):
        names = [str(name) for name in given]
        rows = [torch.as_tensor(vector).detach().float().flatten() for vector in given.values()]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"{source} must hold {{name: vector}}, with vectors of one length.")
        vectors = torch.stack(rows)
    else:
        names = [str(name) for name in given]
        vectors = torch.eye(len(names))
    if vectors.shape[1] != n_dims:
        raise ValueError(
            f"{source} holds {len(names)} perturbations of {vectors.shape[1]} dimensions, but this model takes "
            f"{n_dims} dimensions."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{source} names {len(names) - len(set(names))} perturbations twice.")
    if control not in names:
        # Tahoe's configuration says "DMSO_TF", its map "[('DMSO_TF', 0.0, 'uM')]"
        drug = [name for name in names if name.startswith(f"[({control!r},")]
        if len(drug) == 1:
            logger.info("The control, %r by the checkpoint, is %r here.", control, drug[0])
            return names, vectors, drug[0]
        close = difflib.get_close_matches(control, names, n=3)
        raise ValueError(f"{source} has no row for the control, {control!r} by the checkpoint. Closest: {close}.")
    return names, vectors, control


def _names_in_order(folder: Path | None, stem: str) -> list[str]:
    """Names of a one-hot map by the place of their one; empty where there is no map."""
    readers = {"torch": read_torch, "pkl": read_pickle, "pt": read_torch}
    for suffix, read in readers.items():
        file = None if folder is None else folder / f"{stem}.{suffix}"
        if file is None or not file.exists():
            continue
        codes = {
            str(name): int(torch.as_tensor(vector).argmax())
            for name, vector in mapping_of(read(file), str(file)).items()
        }
        if sorted(codes.values()) != list(range(len(codes))):
            raise ValueError(f"{file} is no one-hot map: its rows point at {sorted(codes.values())[:5]} ...")
        return sorted(codes, key=codes.get)
    return []
