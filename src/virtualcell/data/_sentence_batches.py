"""Rows of an expression matrix to batches of cell sentences, with genes to predict where SE is trained."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from virtualcell.data._cell_sets import process_share
from virtualcell.data._sentences import fill_with_unexpressed, sentences


class RowBatchSampler(Sampler[np.ndarray]):
    """Batches of rows, shuffled anew every epoch by seed and epoch; in a fixed order where `shuffle` is off."""

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed, self.epoch = rows, batch_size, shuffle, seed, 0
        self._share = None if rank is None or world_size is None else (rank, world_size)

    def __len__(self) -> int:
        _, world_size = self._share or process_share()
        return -(-len(self.rows) // self.batch_size) // world_size

    def __iter__(self) -> Iterator[np.ndarray]:
        rows = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows) if self.shuffle else self.rows
        self.epoch += 1
        rank, world_size = self._share or process_share()
        starts = range(rank * self.batch_size, len(self) * world_size * self.batch_size, self.batch_size)
        for i in starts[::world_size]:
            yield rows[i : i + self.batch_size]


class SentenceDataset(Dataset):
    """Cell sentences by row, (B, length).

    "tokens" (B, L), rows of the gene table, -1 for padding; "expression" (B, L), 100 x_g / sum of x over the cell's
    embedded genes. With `n_targets` also "target_tokens" (B, T) and "targets" (B, T), the values x of T = P + N + S
    genes, the last S ("shared") the same for the whole batch, "n_shared", and "dataset" (B,).

    Parameters
    ----------
    matrix
        Values x = log(1 + count), cells x genes.
    tokens
        Row of the gene table of each gene, or -1, (n_genes,).
    length
        Genes in a sentence.
    n_targets
        Expressed, unexpressed and shared genes to predict per cell.
    dataset
        Code of each cell's dataset, (n_cells,).
    seed, ids
        Of targets and of the order of equal values, together with the ids of the cells asked for: their rows, or any
        numbers (n_cells,) that do not depend on the order of cells in a file.
    cls_expression, fill
        What the [CLS] place of each cell carries, (n_cells,), passed on as "cls_expression"; whether unexpressed genes
        take the places of padding. Both are habits of the published models.
    """

    def __init__(
        self,
        matrix: sparse.csr_matrix,
        tokens: np.ndarray,
        length: int,
        *,
        n_targets: tuple[int, int, int] | None = None,
        dataset: np.ndarray | None = None,
        seed: int = 0,
        ids: np.ndarray | None = None,
        cls_expression: np.ndarray | None = None,
        fill: bool = False,
    ) -> None:
        self.cls_expression, self.fill = cls_expression, fill
        self.ids = np.arange(matrix.shape[0]) if ids is None else ids
        self.matrix, self.length, self.n_targets, self.dataset = matrix, length, n_targets, dataset
        self.tokens = np.asarray(tokens, dtype=np.int32)
        self.columns = np.flatnonzero(self.tokens >= 0)
        self.seed = seed

    def __getitem__(self, rows: np.ndarray) -> dict[str, Tensor]:
        rng = np.random.default_rng(
            [self.seed, *self.ids[rows].tolist()]
        )  # the same cells together give the same batch again
        block = self.matrix[rows]
        total = np.asarray(block @ (self.tokens >= 0).astype(np.float32))  # of embedded genes
        if self.n_targets is None:
            tokens, values = sentences(block, self.tokens, self.length)
        else:
            # equal values come by token: number the tokens anew, so that no gene always loses its place to the others
            genes = rng.permutation(self.columns)
            numbers = np.full_like(self.tokens, -1)
            numbers[genes] = np.arange(len(genes))
            numbered, values = sentences(block, numbers, self.length)
            tokens = np.where(numbered >= 0, self.tokens[genes][numbered], -1)
        tokens = torch.from_numpy(tokens).long()
        batch = {
            "tokens": fill_with_unexpressed(tokens, block, self.tokens) if self.fill else tokens,
            "expression": torch.from_numpy(100 * values / np.maximum(total, 1e-12)[:, None]),
        }
        if self.cls_expression is not None:
            batch["cls_expression"] = torch.from_numpy(self.cls_expression[rows])
        if self.n_targets is not None:
            batch |= self._targets(self.matrix[rows][:, self.columns].toarray(), rng)
            batch["dataset"] = torch.from_numpy(self.dataset[rows]).long()
        return batch

    def _targets(self, x: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        expressed, unexpressed, shared = self.n_targets
        chosen = [
            _draw(x > 0, expressed, rng),
            _draw(x == 0, unexpressed, rng),
            np.tile(rng.choice(x.shape[1], shared, replace=shared > x.shape[1]), (len(x), 1)),
        ]
        columns = np.concatenate(chosen, axis=1)
        return {
            "target_tokens": torch.from_numpy(self.tokens[self.columns][columns]).long(),
            "targets": torch.from_numpy(np.take_along_axis(x, columns, axis=1)),
            "n_shared": torch.tensor(shared),
        }


def _draw(allowed: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n columns of each row where `allowed`, again and again the same ones where there are fewer."""
    keys = np.where(allowed, rng.random(allowed.shape, dtype=np.float32), 2)
    m = min(n, keys.shape[1])
    drawn = np.argpartition(keys, m - 1, axis=1)[:, :m] if m < keys.shape[1] else np.argsort(keys, axis=1)
    order = np.argsort(np.take_along_axis(keys, drawn, axis=1), axis=1)
    drawn = np.take_along_axis(drawn, order, axis=1)
    available = np.clip(allowed.sum(axis=1), 1, m)
    return np.take_along_axis(drawn, np.arange(n) % available[:, None], axis=1)
