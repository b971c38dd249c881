"""Gene vectors from protein language models."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import os
import urllib.error
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from virtualcell._arguments import require_whole
from virtualcell._errors import unknown_name
from virtualcell._progress import tqdm
from virtualcell._settings import settings
from virtualcell._threads import own_threads
from virtualcell.pp._fasta import isoforms_of_genes

logger = logging.getLogger(__name__)

MODELS = (
    "esm2_t6_8M_UR50D",
    "esm2_t12_35M_UR50D",
    "esm2_t30_150M_UR50D",
    "esm2_t33_650M_UR50D",
    "esm2_t36_3B_UR50D",
    "esm2_t48_15B_UR50D",
)
_WEIGHTS = "https://dl.fbaipublicfiles.com/fair-esm/models/{}.pt"


@own_threads()
def gene_embeddings(
    sequences: str | Path | Mapping[str, str | Sequence[str]],
    *,
    model: str | Path = "esm2_t33_650M_UR50D",
    max_length: int = 1022,
    residues_per_batch: int = 16_384,
    cache: str | Path | None = None,
    device: str = "auto",
    progress_bar: bool | None = None,
) -> pd.DataFrame:
    """Give each gene a vector from the sequences of its proteins, through ESM-2 (Lin et al. 2023).

    The vectors of the last layer are averaged over the residues of an isoform (without start and end token), then over
    the distinct isoforms of the gene: a sequence that several transcripts share counts once. A protein longer than
    `max_length` is cut into the fewest windows of equal length (up to one residue, no overlap), and the mean is taken
    over the residues of all of them, so that each residue counts once.

    Parameters
    ----------
    sequences
        FASTA file (may be gzipped) whose headers name the gene: `gene_symbol:` or else `gene:` (Ensembl's `pep.all`),
        or `GN=` (UniProt); several records of a gene are its isoforms. Or a mapping {gene: sequence or isoforms}.
        A stop codon at the end is dropped; inside, `*` and `J` are read as X (unknown), which is logged.
    model
        Name of an ESM-2 model, downloaded once into torch's hub folder, or the path of a weight file (`.pt`) in
        fair-esm's format. Arc's tables use `"esm2_t48_15B_UR50D"` (60 GB of memory).
    max_length
        Residues in a window; ESM-2 was trained on 1,022.
    residues_per_batch
        Residues, with padding, that go through the model at a time. It bounds the memory and changes no vector.
    cache
        Folder in which vectors are kept as they are computed, by weights and sequence: a run that was interrupted, or
        another with more proteins, computes only what is not there. Nothing is kept by default.
    device
        `"auto"` for a GPU where there is one, or a torch device such as `"cpu"` or `"cuda:1"`.
    progress_bar
        Whether a bar shows progress, in residues; by default what `vc.settings.progress` says.

    Returns
    -------
    Genes x dimensions, float32, in the order of `sequences`, indexed by gene; `attrs` says how it was made.

    Raises
    ------
    ImportError
        If fair-esm is not installed.
    KeyError
        If `model` is no ESM-2 model.
    ValueError
        If no header names a gene, a sequence is empty or holds other characters, or a weight file is not ESM-2's.

    Examples
    --------
    >>> table = vc.pp.gene_embeddings("proteins.fasta", model="esm2_t6_8M_UR50D")  # doctest: +SKIP
    >>> table.to_parquet("gene_embeddings.parquet")  # doctest: +SKIP
    """
    require_whole("max_length", max_length)
    require_whole("residues_per_batch", residues_per_batch)
    progress_bar = settings.progress if progress_bar is None else progress_bar
    isoforms = isoforms_of_genes(sequences)
    network, alphabet, identity = _load(model, progress_bar)
    network = network.eval().to(_device(device))

    parts = {s: _windows(s, max_length) for distinct in isoforms.values() for s in distinct}
    vectors = _embed(
        {window for windows in parts.values() for window in windows},
        network,
        alphabet,
        residues_per_batch,
        None if cache is None else _Cache(cache, identity),
        progress_bar,
    )
    proteins = {
        s: np.average([vectors[w] for w in windows], axis=0, weights=[len(w) for w in windows])
        for s, windows in parts.items()
    }
    frame = pd.DataFrame(
        np.stack([np.mean([proteins[s] for s in distinct], axis=0) for distinct in isoforms.values()]),
        index=pd.Index(isoforms, name="gene"),
        columns=[f"esm2_{i}" for i in range(network.embed_dim)],
        dtype=np.float32,
    )
    frame.attrs = {
        "source": "esm2",
        "model": identity,
        "layer": network.num_layers,
        "max_length": max_length,
        "n_genes": len(isoforms),
        "n_isoforms": sum(map(len, isoforms.values())),
        "n_proteins_in_windows": sum(len(windows) > 1 for windows in parts.values()),
        "fair_esm_version": version("fair-esm"),
    }
    return frame


def _windows(sequence: str, max_length: int) -> list[str]:
    """Cut a sequence into the fewest parts of at most `max_length`, equal up to one residue."""
    n = -(-len(sequence) // max_length)
    cuts = [len(sequence) * i // n for i in range(n + 1)]
    return [sequence[a:b] for a, b in itertools.pairwise(cuts)]


def _device(device: str) -> torch.device:
    """Return the device named, or the GPU where there is one."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load(model: str | Path, progress_bar: bool) -> tuple[torch.nn.Module, Any, str]:
    """Return network, alphabet and what identifies the weights: the name, or the hash of a local file."""
    try:
        from esm.pretrained import load_model_and_alphabet_core
    except ImportError as error:
        raise ImportError(
            'Gene vectors from ESM-2 need fair-esm: pip install "virtualcell[esm]". '
            "(The package `esm` of another publisher has the same import name and does not serve.)"
        ) from error
    # fair-esm's own loaders stumble over the Namespace in its files since torch 2.6, and want a second file of weights
    # for contact maps, which play no part here.
    with torch.serialization.safe_globals([argparse.Namespace]):
        if str(model) in MODELS:
            identity = str(model)
            weights = _download(identity, progress_bar)
        else:
            path = Path(model)
            if path.suffix != ".pt":
                raise unknown_name("model", model, MODELS, "Or give the path of a weight file (.pt).")
            if not path.exists():
                raise FileNotFoundError(f"model={str(path)!r} does not exist.")
            with path.open("rb") as file:
                identity = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not {"cfg", "model"} <= set(weights):
        raise ValueError(f"model={str(model)!r} holds no ESM-2 weights: entries 'cfg' and 'model' are expected.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        network, alphabet = load_model_and_alphabet_core("esm2", weights)
    return network, alphabet, identity


def _download(name: str, progress_bar: bool) -> dict:
    """Return published weights from torch's hub folder, downloaded if they are not there."""
    url = _WEIGHTS.format(name)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=progress_bar, weights_only=True)
    except urllib.error.URLError as error:
        raise ConnectionError(
            f"Could not download {url} ({error.reason}). Fetch it elsewhere and give its path: model='.../{name}.pt'."
        ) from error


def _embed(
    windows: set[str],
    network: torch.nn.Module,
    alphabet: Any,
    residues_per_batch: int,
    cache: _Cache | None,
    progress_bar: bool,
) -> dict[str, np.ndarray]:
    """Return the mean residue vector of every window, from the cache or computed."""
    vectors = {} if cache is None else cache.read(windows)
    if vectors:
        logger.info("%d of %d windows are in the cache.", len(vectors), len(windows))
    # Longest first: what does not fit into memory fails at the start. The second key makes the order one of its own.
    todo = sorted(windows - vectors.keys(), key=lambda w: (-len(w), w))
    with tqdm(total=sum(map(len, todo)), unit="aa", unit_scale=True, disable=not progress_bar, desc="ESM-2") as bar:
        for batch in _batches(todo, residues_per_batch):
            computed = dict(zip(batch, _mean_residue_vectors(batch, network, alphabet), strict=True))
            if cache is not None:
                cache.write(computed)
            vectors |= computed
            bar.update(sum(map(len, batch)))
    return vectors


def _batches(windows: list[str], residues_per_batch: int) -> Iterator[list[str]]:
    """Yield windows, longest first, as many at a time as the budget allows with padding, and at least one."""
    start = 0
    while start < len(windows):
        stop = start + max(1, residues_per_batch // len(windows[start]))
        yield windows[start:stop]
        start = stop


@torch.inference_mode()
def _mean_residue_vectors(batch: list[str], network: torch.nn.Module, alphabet: Any) -> np.ndarray:
    """Return the mean over residues of the last layer (windows x dimensions, float32)."""
    width = max(map(len, batch))
    tokens = torch.full((len(batch), width + 2), alphabet.padding_idx)
    for row, window in zip(tokens, batch, strict=True):
        row[: len(window) + 2] = torch.tensor(
            [alphabet.cls_idx, *(alphabet.tok_to_idx[residue] for residue in window), alphabet.eos_idx]
        )
    layer = network.num_layers
    device = next(network.parameters()).device
    residues = network(tokens.to(device), repr_layers=[layer])["representations"][layer][:, 1:]
    return torch.stack([r[: len(w)].mean(0) for r, w in zip(residues, batch, strict=True)]).float().cpu().numpy()


class _Cache:
    """Vectors on disk by weights and sequence: one safetensors file per batch, which appears whole or not at all."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder = Path(folder) / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = identity

    def read(self, windows: set[str]) -> dict[str, np.ndarray]:
        """Return the vectors that are there."""
        wanted = {_key(w): w for w in windows}
        found = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                found |= {wanted[k]: file.get_tensor(k) for k in wanted.keys() & set(file.keys())}
        return found

    def write(self, vectors: dict[str, np.ndarray]) -> None:
        """Add the vectors of a batch."""
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({_key(w): v for w, v in vectors.items()}, partial, metadata={"model": self.identity})
        os.replace(partial, path)


def _key(sequence: str) -> str:
    return hashlib.sha256(sequence.encode()).hexdigest()
