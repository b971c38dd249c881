"""Cells as sentences: the most expressed genes of each cell, highest first."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

# Entries sorted at a time: 8 MB of keys, about what the cache of one core holds.
_BLOCK_ENTRIES = 1 << 20
_PADDING = np.uint64(2**64 - 1)
_HALF = np.uint64(32)


def sentences(matrix: sparse.csr_matrix, tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `length` genes of the highest value in every cell, highest first, equal values by token.

    Value and token of an entry are packed into one integer, the inverted bits of the float above the token. Sorting
    these integers puts high values first and orders equal values by token, whatever the order of the columns; the
    largest integer, which fills the places left over, reads back as token -1 with value 0.

    Parameters
    ----------
    matrix
        Values, cells x genes, not negative. They are compared as float32; a zero is never part of a sentence.
    tokens
        Token of each gene (a row of the gene table), or -1 for a gene that takes no part. No token twice.
    length
        Places in a sentence.

    Returns
    -------
    Tokens (cells x length, int32, -1 where a cell has fewer genes) and values (cells x length, float32, 0 there).
    """
    n_cells = matrix.shape[0]
    out_tokens = np.full((n_cells, length), -1, dtype=np.int32)
    out_values = np.zeros((n_cells, length), dtype=np.float32)
    tokens = np.asarray(tokens, dtype=np.int32)
    step = max(1, _BLOCK_ENTRIES // max(1, int(np.diff(matrix.indptr).max(initial=0))))
    for start in range(0, n_cells, step):
        rows = slice(start, min(start + step, n_cells))
        keys = _sorted_keys(matrix[rows], tokens)[:, :length]
        width = keys.shape[1]
        out_tokens[rows, :width] = keys.astype(np.uint32).view(np.int32)
        out_values[rows, :width] = (~(keys >> _HALF).astype(np.uint32)).view(np.float32)
    return out_tokens, out_values


def _sorted_keys(block: sparse.csr_matrix, tokens: np.ndarray) -> np.ndarray:
    """Return the entries of each cell as sorted integers (cells x most entries of a cell), padded at the end."""
    if not block.has_canonical_format:
        block.sum_duplicates()
    token = tokens[block.indices]
    value = block.data.astype(np.float32, copy=False)
    keep = (token >= 0) & (value > 0)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    counts = np.diff(kept_before[block.indptr])
    packed = (~value[keep].view(np.uint32)).astype(np.uint64) << _HALF
    packed |= token[keep].astype(np.uint64)
    keys = np.full((block.shape[0], counts.max(initial=0)), _PADDING)
    keys[np.arange(keys.shape[1]) < counts[:, None]] = packed
    keys.sort(axis=1)
    return keys


def fill_with_unexpressed(sentence: Tensor, block: sparse.csr_matrix, tokens: np.ndarray) -> Tensor:
    """Put unexpressed genes, drawn with replacement, into the padding of sentences (cells x length).

    Every cell takes the same numbers in [0, 1) to its unexpressed genes in the order of the table, so that neither its
    name nor the order of cells and genes matters. A cell that expresses every gene stays padded.
    """
    numbers = np.random.default_rng(0).random(sentence.shape[1])
    filled = sentence.numpy().copy()
    embedded = np.sort(tokens[tokens >= 0])
    for i in np.flatnonzero((filled < 0).any(axis=1)):
        row = slice(block.indptr[i], block.indptr[i + 1])
        expressed = tokens[block.indices[row][block.data[row] > 0]]
        unexpressed = np.setdiff1d(embedded, expressed)
        if len(unexpressed):
            empty = filled[i] < 0
            filled[i, empty] = unexpressed[(numbers[empty] * len(unexpressed)).astype(int)]
    return torch.from_numpy(filled)
