"""SE in files: our own format, and Arc's folders."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from virtualcell._reading import as_damaged
from virtualcell._state import State
from virtualcell.io._arc import require_sizes
from virtualcell.io._arc_se import read_se, write_se
from virtualcell.models._common import load_network, meta_of, network_tensors, restore_meta

if TYPE_CHECKING:
    from virtualcell.models._se import SE

logger = logging.getLogger(__name__)


def state_of(self: SE) -> State:
    """Return what is to be saved."""
    meta = {**meta_of(self), "arguments": _arguments(self)}
    tensors = {**network_tensors(self.module), "gene_embeddings": self.gene_embeddings}
    return State(type(self).__name__, meta, tensors)


def from_state(cls: type[SE], state: State) -> SE:
    """Build the model that :meth:`state` described."""
    with torch.device("meta"):  # without weights of its own to throw away
        model = _from_arguments(cls, state.meta["arguments"], state.tensors, state.meta["registry"])
    load_network(model.module, state.tensors, assign=True)
    restore_meta(model, state.meta)
    return model


def _arguments(self: SE) -> dict:
    return {
        "length": self.length,
        "n_targets": self.n_targets,
        "cls_expression_gene": self.cls_expression_gene,
        "fill_sentences": self.fill_sentences,
        "genes": list(self.gene_names),
        "config": dataclasses.asdict(self.config),
    }


def _from_arguments(cls: type[SE], arguments: dict, tensors: dict[str, Tensor], registry: dict) -> SE:
    require_sizes(arguments["config"], tensors.values(), source="the file")
    table = pd.DataFrame(tensors["gene_embeddings"].numpy(), index=arguments["genes"])
    options = {k: v for k, v in arguments.items() if k not in ("genes", "config")}
    return cls(gene_embeddings=table, registry=registry, **options, **arguments["config"])


def from_arc(
    cls: type[SE],
    folder: str | os.PathLike,
    *,
    gene_embeddings: pd.DataFrame | None = None,
    checkpoint: str | None = None,
) -> SE:
    """Read a model in Arc's format (SE-600M, SE-100M, or your own of `arc-state`). No code in its files is run.

    Parameters
    ----------
    folder
        Holds `config.yaml`, `model.safetensors` or a Lightning checkpoint, and `protein_embeddings.pt`.
    gene_embeddings
        Genes x dims, the table that the model was trained with or one made in the same way for other genes; by
        default that of the folder, or else of the checkpoint.
    checkpoint
        File with the weights; by default `model.safetensors`, or else the only `.ckpt`.

    Raises
    ------
    ValueError
        If parameters are missing, unexpected or misshapen, or the gene table has another width.
    UnsafePickleError
        If a file asks for anything but data.
    """
    path = Path(folder)
    with as_damaged(path, "folder of an SE model", checked=True):
        arguments, tensors, registry = read_se(path, gene_embeddings=gene_embeddings, checkpoint=checkpoint)
    with torch.device("meta"):  # without weights of its own to throw away
        model = _from_arguments(cls, arguments, tensors, registry)
    load_network(model.module, tensors, assign=True)
    model.module.eval()
    model.is_trained_ = True
    logger.info("%s: %r", path.name, model)
    return model


def to_arc(self: SE, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write `config.yaml`, `model.safetensors` and `protein_embeddings.pt`, which `arc-state` reads.

    That package always does what `cls_expression_gene` and `fill_sentences` describe. A model without them gives
    other embeddings there than here; :meth:`from_arc` finds in `config.yaml` that it is without them.

    Parameters
    ----------
    folder
        The folder, made where it is missing.
    overwrite
        Whether to replace a model that is there.
    """
    if self.cls_expression_gene is None or not self.fill_sentences:
        logger.warning("arc-state will embed with cls_expression_gene and fill_sentences, this model is without.")
    write_se(Path(folder), self.module, self.gene_names, self.gene_embeddings, _arguments(self), overwrite=overwrite)
