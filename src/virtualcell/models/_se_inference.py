"""What a trained SE network is asked for: vectors of cells, and expression back from these."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from torch import Tensor

from virtualcell._arguments import require_whole
from virtualcell._errors import unknown_name
from virtualcell._progress import Bar
from virtualcell._threads import own_threads
from virtualcell.data._device_sentences import DeviceSentences
from virtualcell.data._labels import expression_modality
from virtualcell.data._stored import row_sums
from virtualcell.models._se_data import Cells, check_not_empty, refuse_empty
from virtualcell.modules import SENetwork
from virtualcell.modules._transformer import add_norm

logger = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bf16"]

SENTENCES_ON = ("cuda",)  # devices that make the sentences themselves
_PLACES_ON_CPU = 1 << 14  # more at a time leave the caches, and are no faster
COMPILED_ON = ("cuda",)  # devices for which the joints of wide networks are compiled
_WIDE = 1024
_PLACES_ON_GPU = 1 << 18
_RESULTS = 1 << 26  # numbers that wait on the device

_DEVICES = {"cpu": "CPU", "cuda": "GPU", "mps": "Apple GPU"}


def check_precision(precision: str) -> None:
    """Raise for numbers that are not known."""
    if precision not in ("auto", "float32", "bf16"):
        raise unknown_name("precision", precision, ("auto", "float32", "bf16"))


@own_threads()
@torch.inference_mode()
def embed(
    network: SENetwork, cells: Cells, *, batch_size: int | None, precision: Precision, progress_bar: bool | None = None
) -> np.ndarray:
    """Return cell and dataset embedding side by side, (n_cells, n_output + n_dataset)."""
    network.eval()
    device = next(network.parameters()).device
    dtype = _dtype(precision, device, len(cells.names))
    genes = network.encode_genes(cells.vectors.to(device))
    if dtype != torch.float32:  # the model itself keeps its weights
        network = network.with_products_in(dtype, _add_norm(network, device, dtype))
    out = np.empty((len(cells.names), network.config.n_output + network.config.n_dataset), np.float32)
    size = (
        _cells_at_once(network, cells.sentences.length, device)
        if batch_size is None
        else require_whole("batch_size", batch_size)
    )
    parts, found = [], []  # results wait on the device, so that it need not wait for the CPU

    def fetch() -> None:
        if parts:
            out[np.concatenate(parts)] = torch.cat(found).cpu().numpy()
        parts.clear()
        found.clear()

    with Bar("SE: embedding the cells", len(out), unit="cell", shown=progress_bar) as bar:
        for part, batch in sentence_batches(cells, size, device):
            embedded = network(genes, **batch)
            parts.append(part)
            found.append(torch.cat([embedded.cell.float(), embedded.dataset.float()], dim=1))
            if device.type == "cpu" or sum(map(len, parts)) * out.shape[1] > _RESULTS:
                fetch()
            bar.show(bar.done + len(part))
    fetch()
    return out


def _add_norm(network: SENetwork, device: torch.device, dtype: torch.dtype) -> Callable:
    """Return what joins the parts of a layer: compiled into one kernel on a GPU, for networks that are worth it.

    Compiling takes some seconds, about as long as it takes to load a network so large.
    """
    width = network.config.n_hidden
    if device.type not in COMPILED_ON or width < _WIDE:
        return add_norm
    compiled, norm = torch.compile(add_norm), copy.deepcopy(network.transformer_encoder.layers[0].norm1)
    try:
        for n in (3, 5):  # after which the numbers of cells and places are known to vary
            x = torch.ones(n, n + 4, width, device=device)
            compiled(x, x.to(dtype), norm.weight, norm.bias, norm.eps, dtype)
    except Exception as error:  # whatever a compiler may lack: the same is computed without it
        logger.warning("SE embeds about a tenth slower, since torch.compile failed: %s", error)
        return add_norm
    return compiled


def sentence_batches(
    cells: Cells, batch_size: int, device: torch.device
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield row numbers and sentences of all cells, made on a GPU where the network is on one.

    The sentences of Arc's models, which are filled up with unexpressed genes, are made on the CPU in any case.
    """
    rows, sentences = cells.in_order(), cells.sentences
    if device.type in SENTENCES_ON and not sentences.fill and sentences.cls_gene is None:
        sentences = sentences.at_hand()
        most_bytes = _free_memory(device) // 3
        made = DeviceSentences(
            sentences, device, most_bytes=most_bytes, refuse=lambda empty: refuse_empty(cells.names[empty])
        )
        yield from made.batches(rows, batch_size)
        return
    if sentences.expression.is_lazy:
        yield from _in_one_pass(cells, batch_size, device)
        return
    check_not_empty(cells)
    for part in np.split(rows, range(batch_size, len(rows), batch_size)):
        yield part, {name: value.to(device) for name, value in sentences.rows(part).items()}


def _in_one_pass(cells: Cells, batch_size: int, device: torch.device) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Yield the same of cells that are read once, in the blocks and in the order of their file."""
    for rows, block in cells.sentences.expression.blocks():
        is_empty = row_sums(block) <= 0
        if is_empty.any():
            refuse_empty(cells.names[rows[is_empty]])
        for part in np.split(np.arange(len(rows)), range(batch_size, len(rows), batch_size)):
            sentences = cells.sentences.of(block[part])
            yield rows[part], {name: value.to(device) for name, value in sentences.items()}


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; of a CPU's memory, a part that does no harm."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30


def _cells_at_once(network: SENetwork, length: int, device: torch.device) -> int:
    """Choose how many cells to embed at a time: on a GPU as many as keep it busy, in a third of its free memory."""
    if device.type != "cuda":
        return max(1, _PLACES_ON_CPU // (length + 2))
    config, bytes_each = network.config, next(network.parameters()).element_size()
    per_place = bytes_each * (10 * config.n_hidden + 3 * config.n_feedforward)  # what a layer holds at one time
    return max(1, min(_PLACES_ON_GPU, _free_memory(device) // (3 * per_place)) // (length + 2))


def _dtype(precision: Precision, device: torch.device, n_cells: int) -> torch.dtype:
    """Choose the numbers to embed with, and say so."""
    check_precision(precision)
    where = _DEVICES.get(device.type, device.type)
    has_bf16 = (
        device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if precision == "bf16" or (precision == "auto" and has_bf16):
        logger.info(
            "SE embeds %d cells in bf16 (numbers of 16 bits), on the %s. Say precision='float32' for those of 32 bits.",
            *(n_cells, where),
        )
        return torch.bfloat16
    logger.info("SE embeds %d cells in float32, on the %s.", n_cells, where)
    return torch.float32


@torch.inference_mode()
def decode(network: SENetwork, vectors: np.ndarray, genes: Tensor, read_depth: float) -> np.ndarray:
    """Predict log(1 + count) of genes given by their embeddings, from cell vectors: (n_cells, n_genes)."""
    sizes = [network.config.n_output, network.config.n_dataset]
    if vectors.ndim != 2 or vectors.shape[1] != sum(sizes):
        raise ValueError(f"cell vectors have shape {vectors.shape}; this model makes (n_cells, {sum(sizes)}).")
    network.eval()
    device = next(network.parameters()).device
    cell, dataset = torch.from_numpy(vectors).to(device).split(sizes, dim=1)
    depth = torch.full((len(vectors),), read_depth, device=device)
    return network.decode(genes.to(device), cell, dataset, depth).float().cpu().numpy()


def cell_vectors(
    data: AnnData | MuData | np.ndarray, use_rep: str, modality: str
) -> tuple[np.ndarray, pd.Index | None]:
    """Return cell vectors and, where they were written to `obsm`, the names of their cells."""
    if not isinstance(data, AnnData | MuData):
        return np.asarray(data, dtype=np.float32), None
    adata = expression_modality(data, modality)
    if use_rep not in adata.obsm:
        raise unknown_name("use_rep", use_rep, adata.obsm, "Run `vc.tl.embed(adata, model)` first.")
    return np.asarray(adata.obsm[use_rep], dtype=np.float32), adata.obs_names
