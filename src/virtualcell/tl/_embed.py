"""Write cell embeddings of an SE model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._interrupted import told_when_interrupted
from virtualcell._progress import Bar
from virtualcell._tasks import check_client, in_tasks, n_threads_of
from virtualcell.data._design import Scale
from virtualcell.data._fingerprint import digest
from virtualcell.data._labels import expression_modality, obs_of, var_of
from virtualcell.data._results import require_results
from virtualcell.io._cell_store import CellStore, made_for
from virtualcell.models import SE
from virtualcell.models._se_inference import Precision

if TYPE_CHECKING:
    from distributed import Client

_PORTION = 1 << 14  # cells that are embedded and written together

_INTERRUPTED = (
    "Embedding was interrupted: adata is as it was. With to= the same call goes on behind the cells that are written."
)


@told_when_interrupted(_INTERRUPTED)
def embed(
    adata: AnnData | MuData,
    model: SE,
    *,
    layer: str | None = None,
    scale: Scale = "counts",
    gene_key: str | None = None,
    key_added: str = _keys.X_STATE,
    batch_size: int | None = None,
    precision: Precision = "auto",
    modality: str = "rna",
    to: str | os.PathLike | None = None,
    client: object | None = None,
) -> None:
    """Write the cell vectors of an SE model to `obsm["X_state"]`: cell embedding and dataset embedding side by side.

    Parameters
    ----------
    adata
        Any cells; genes are matched by name to the model's gene table.
    model
        A trained :class:`virtualcell.models.SE`.
    layer
        Layer with the expression; `X` where it is `None`.
    scale
        Whether the expression is "counts" (raw) or "log1p" (of counts per 10,000).
    gene_key
        Column of `var` with the names that the gene table uses; `var_names` where it is `None`.
    key_added
        Key of `obsm`.
    batch_size
        Number of cells at a time; by default as many as fit the caches of a CPU, or keep a GPU busy.
    precision
        Numbers that the network computes with: "float32", or "bf16", which is several times faster on GPUs that have it
        and gives nearly the same vectors. "auto" takes bf16 on such a GPU, and float32 everywhere else. On CPUs with
        avx512_bf16 or amx_bf16 among their flags, bf16 makes medium and large models faster, and small ones not.
    modality
        Expression modality of a MuData.
    to
        An h5ad file or a zarr store to write the vectors to, in place of `adata`: an AnnData with the same `obs`, the
        vectors in `obsm`, and no genes. Cells are embedded some at a time, and after a process has died the same call
        goes on behind those that were written.
    client
        A `dask.distributed.Client` (`pip install "virtualcell[dask]"`): its workers embed some cells at a time, and
        what a worker did not finish another one does.

    Raises
    ------
    FileExistsError
        If `to` is there already.
    TypeError
        If the model is no SE.
    ValueError
        If too few genes of the data are in the gene table, or a cell expresses none of them.

    Examples
    --------
    >>> vc.tl.embed(adata, se)
    >>> adata.obsm["X_state"].shape[0] == adata.n_obs
    True
    """
    how = {"layer": layer, "scale": scale, "gene_key": gene_key, "batch_size": batch_size, "precision": precision}
    if not isinstance(model, SE):
        raise TypeError(
            f"model={model!r} is no SE, which embeds cells. Give the `se` of an ST that was fitted without se=False, "
            "or a saved one, `vc.models.SE.load(folder)`."
        )
    if not isinstance(key_added, str) or not key_added:
        raise TypeError(f"key_added={key_added!r} must be a name in obsm, such as {_keys.X_STATE!r}.")
    expression = expression_modality(adata, modality)
    check_client(client)
    if to is not None:
        _embed_to_disk(expression, model, to, key_added=key_added, how=how, client=client)
        return
    require_results(expression)
    if client is None:
        expression.obsm[key_added] = model.get_latent_representation(adata, modality=modality, **how)
        return
    expression.obsm[key_added] = np.concatenate(list(_embedded(expression, model, how, client)))


def _embed_to_disk(
    adata: AnnData, model: SE, to: str | os.PathLike, *, key_added: str, how: Mapping[str, Any], client: Client | None
) -> None:
    """Embed some cells at a time, and write their vectors; cells that are there already are not embedded again."""
    names = {"key_added": key_added, "cells": digest(adata.obs_names), "genes": digest(adata.var_names)}
    name, width = f"obsm/{key_added}", model.config.n_output + model.config.n_dataset
    store = CellStore(to, made_for=made_for(model, {**how, **names, "batch_size": None}), dense={name: width})
    with Bar("SE: embedding the cells", adata.n_obs, unit="cell", done=store.n_cells) as bar:
        for vectors in _embedded(adata, model, how, client, first=store.n_cells):
            cells = adata.obs_names[store.n_cells : store.n_cells + len(vectors)]
            store.add({name: vectors}, pd.DataFrame(index=cells), {})
            bar.show(store.n_cells)
    store.finish(AnnData(obs=obs_of(adata)))


def _embedded(
    adata: AnnData, model: SE, how: Mapping[str, Any], client: Client | None, *, first: int = 0
) -> Iterator[np.ndarray]:
    """Yield the vectors of some cells at a time, from number `first` on, in the order of the cells."""
    size = _PORTION if client is None else max(1, min(_PORTION, adata.n_obs // (4 * n_threads_of(client))))
    parts = (adata[start : start + size] for start in range(first, adata.n_obs, size))
    if client is None:
        yield from (model.get_latent_representation(part, progress_bar=False, **how) for part in parts)
        return
    layer, sent = how["layer"], {**how, "layer": None}
    yield from in_tasks(client, partial(_vectors, how=sent), model, (_bare(part, layer) for part in parts))


def _vectors(model: SE, cells: AnnData, how: Mapping[str, Any]) -> np.ndarray:
    return model.get_latent_representation(cells, progress_bar=False, **how)


def _bare(part: AnnData, layer: str | None) -> AnnData:
    """Return cells in memory, with nothing but their expression: what is sent to a worker."""
    matrix = part.X if layer is None else part.layers[layer]
    return AnnData(matrix, obs=pd.DataFrame(index=part.obs_names), var=var_of(part)).to_memory()
