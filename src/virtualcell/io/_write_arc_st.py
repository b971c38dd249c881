"""Write ST models as run folders that the reference package reads."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import torch
import yaml
from torch import Tensor

from virtualcell.io._arc import OURS
from virtualcell.modules import STConfig, STNetwork

_FILES = (
    *("config.yaml", "var_dims.pkl", "pert_onehot_map.pt", "batch_onehot_map.torch", "cell_type_onehot_map.torch"),
    *("data_module.torch", "checkpoints/final.ckpt"),
)
_VOCABULARY = 8  # rows of a token table that is never read, but that the reference package expects
_OPTIONS_OFF = (
    *("freeze_pert_backbone", "transformer_decoder", "finetune_vci_decoder", "mask_attn", "use_effect_gating_token"),
    *("randomize_mmd_chunks", "confidence_head"),
)


def write_st(
    folder: Path,
    network: STNetwork,
    *,
    setup: dict,
    genes: list[str],
    perturbations: dict[str, Tensor],
    batches: list[str],
    batch_key: str,
    contexts: list[str],
    set_size: int,
    overwrite: bool,
) -> None:
    """Write `config.yaml`, `var_dims.pkl`, the maps, `data_module.torch` and `checkpoints/final.ckpt`.

    Parameters
    ----------
    folder
        The run folder, made where it is missing.
    network, setup, genes, set_size
        Of the model.
    perturbations
        Vector of every perturbation, the control among them.
    batches, contexts
        Labels in the order of their codes.
    batch_key
        Column of `batches`, which a model may have without using it.
    overwrite
        Replace a run that is there.
    """
    _check(network, setup)
    there = [name for name in _FILES if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{folder} holds {', '.join(there)} already. Pass overwrite=True to replace them.")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for old in (folder / "checkpoints").glob("*.ckpt"):  # those of the model before would be read beside the new maps
        old.unlink()
    c = network.config
    sizes = {
        "input_dim": c.n_input,
        "gene_dim": c.n_genes or c.n_output,
        "hvg_dim": c.n_genes or c.n_output,
        "output_dim": c.n_output,
        "pert_dim": c.n_perturbation,
        "gene_names": list(genes),
        "batch_dim": c.n_batches or max(len(batches), 1),
        "pert_names": list(perturbations),
    }
    data, model = _data_options(c, setup, batch_key), _model_options(c, set_size)
    config = {
        "data": {"name": "PerturbationDataModule", "kwargs": data, "output_dir": None, "debug": False},
        "model": {"name": "state", "checkpoint": None, "device": "cuda", "kwargs": model},
        "training": {"batch_size": 16, "lr": 1e-4, "weight_decay": 5e-4, "gradient_clip_val": 10, "train_seed": 42},
        "name": folder.name,
        "output_dir": folder.name,
        "use_wandb": False,
        "overwrite": False,
        OURS: {k: setup[k] for k in ("context_key", "batch_key")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "var_dims.pkl").write_bytes(pickle.dumps(sizes, protocol=4))
    torch.save({name: v.detach().cpu().clone() for name, v in perturbations.items()}, folder / "pert_onehot_map.pt")
    for stem, labels in (("batch_onehot_map", batches), ("cell_type_onehot_map", contexts)):
        labels = labels or ["0"]
        torch.save(dict(zip(labels, torch.eye(len(labels)).unbind(), strict=True)), folder / f"{stem}.torch")
    module = {**{k: v for k, v in data.items() if k not in ("pert_rep", "basal_rep")}, "cell_sentence_len": set_size}
    torch.save({**module, "batch_size": 16, "random_seed": 42, "is_log1p": True}, folder / "data_module.torch")
    checkpoint = _checkpoint(network, sizes, data, model, set_size)
    torch.save(checkpoint, folder / "checkpoints" / "final.ckpt")


def _check(network: STNetwork, setup: dict) -> None:
    """Raise for what that format cannot express."""
    c = network.config
    if c.head in ("both", "shift"):
        raise ValueError(
            f"head={c.head!r} has no counterpart in Arc's format. Train with preset='published' to share a model."
        )
    if not isinstance(network, STNetwork):
        raise ValueError("n_networks: Arc's format holds one network. Train with n_networks=1 to share a model.")
    if c.relu != (setup["use_rep"] is None or not c.n_genes):
        raise ValueError(f"relu={c.relu} has no counterpart in Arc's format, where genes are never negative.")


def _data_options(c: STConfig, setup: dict, batch_key: str) -> dict:
    """Return `data.kwargs`."""
    return {
        "embed_key": "X_hvg" if setup["use_rep"] is None else setup["use_rep"],
        "output_space": "all" if c.head == "all" else "gene",
        "pert_rep": "onehot",
        "basal_rep": "sample",
        "batch_col": batch_key,
        "pert_col": setup["perturbation_key"],
        "cell_type_key": setup["context_key"] or "cell_type",
        "control_pert": setup["control"],
        "basal_mapping_strategy": "random",
        "n_basal_samples": 1,
        "should_yield_control_cells": True,
        "map_controls": True,
        "perturbation_features_file": None,
        "store_raw_basal": False,
        "barcode": True,
        "num_workers": 0,
    }


def _checkpoint(network: STNetwork, sizes: dict, data: dict, model: dict, set_size: int) -> dict:
    """Return what Lightning would have written."""
    c = network.config
    state = OrderedDict((k, v.detach().float().cpu().clone()) for k, v in network.state_dict().items())
    state["transformer_backbone.embed_tokens.weight"] = torch.zeros(_VOCABULARY, c.n_hidden)
    decoder = {
        "latent_dim": c.n_output,
        "gene_dim": c.n_genes or c.n_output,
        "hidden_dims": list(c.decoder_hidden),
        "dropout": c.decoder_dropout,
        "residual_decoder": c.decoder_residual,
    }
    shared = {k: data[k] for k in ("embed_key", "output_space", "control_pert", "basal_mapping_strategy")}
    run = {"dropout": c.dropout, "lr": 1e-4, "decoder_cfg": decoder, "batch_size": 16}
    run["transformer_backbone_kwargs"] = {**model["transformer_backbone_kwargs"], "n_positions": set_size}
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {**{k: v for k, v in sizes.items() if k != "pert_names"}, **shared, **model, **run},
    }


def _model_options(c: STConfig, set_size: int) -> dict:
    """Return `model.kwargs`."""
    return {
        "cell_set_len": set_size,
        "hidden_dim": c.n_hidden,
        "blur": 0.05,
        "loss": "energy",
        "distributional_loss": "energy",
        "n_encoder_layers": c.n_encoder_layers,
        "n_decoder_layers": c.n_decoder_layers,
        "predict_residual": c.head != "none",
        "softplus": True,
        "batch_encoder": c.n_batches > 0,
        "use_basal_projection": c.control_projection,
        "confidence_token": c.confidence_token,
        "gene_decoder_bool": c.n_genes > 0,
        "residual_decoder": c.decoder_residual,
        "init_from": None,
        "mmd_num_chunks": 1,
        **dict.fromkeys(_OPTIONS_OFF, False),
        "transformer_backbone_key": "llama",
        "transformer_backbone_kwargs": {
            "bidirectional_attention": True,
            "max_position_embeddings": set_size,
            "hidden_size": c.n_hidden,
            "intermediate_size": c.n_feedforward,
            "num_hidden_layers": c.n_layers,
            "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.n_heads,
            "head_dim": c.head_dim,
            "use_cache": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "layer_norm_eps": 1e-6,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "rotary_dim": 0,
            "use_rotary_embeddings": False,
            "vocab_size": _VOCABULARY,
        },
        "lora": {"enable": False},
    }
