"""Cells as batches of sentences, with genes to predict where SE is trained."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from virtualcell.data._expression import Expression
from virtualcell.data._sentences import fill_with_unexpressed, sentences

# A validation looks at no more batches than these, whose cells and targets are the same each time: each costs half as
# much as a training step.
MOST_VALIDATION_STEPS = 4


class Sentences:
    """Sentences of the cells of a matrix: "tokens" (B, L), -1 for padding, and "expression" (B, L).

    The expression of a place is 100 x_g / (sum of x over the cell), where x = log(1 + count).

    Parameters
    ----------
    expression
        Values x of the genes that have an embedding; gene j of the matrix is token j.
    length
        Number of genes in a sentence.
    cls_gene
        Token of the gene whose expression the [CLS] place carries, passed on as "cls_expression" (B,). A habit of the
        published models.
    fill
        Whether unexpressed genes take the places of padding. A habit of the published models, too.
    """

    def __init__(self, expression: Expression, length: int, *, cls_gene: int | None = None, fill: bool = False) -> None:
        self.expression, self.length, self.cls_gene, self.fill = expression, length, cls_gene, fill
        self.n_genes = len(expression.genes)

    def at_hand(self) -> Sentences:
        """Return the same sentences of cells that are quick to read in any order."""
        return Sentences(self.expression.at_hand(), self.length, cls_gene=self.cls_gene, fill=self.fill)

    def rows(self, index: np.ndarray) -> dict[str, Tensor]:
        """Return the sentences of some cells, genes of the same value in the order of the tokens."""
        return self.of(self.expression.rows(index))

    def of(self, block: sparse.csr_matrix, order: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the sentences of rows of the matrix, genes of the same value in `order`, a permutation of tokens."""
        tokens = np.arange(self.n_genes, dtype=np.int32)
        if order is None:
            found, values = sentences(block, tokens, self.length)
        else:
            numbered, values = sentences(block, np.argsort(order), self.length)
            found = np.where(numbered >= 0, order[numbered], -1)
        # float32 logarithms add up in float64 without rounding, so that the order of genes in a file does not matter
        total = block @ np.ones((self.n_genes, 1))
        share = (100 / np.maximum(total, 1e-12)).astype(np.float32)
        found = torch.from_numpy(found).long()
        batch = {
            "tokens": fill_with_unexpressed(found, block, tokens) if self.fill else found,
            "expression": torch.from_numpy(values * share),
        }
        if self.cls_gene is not None:
            batch["cls_expression"] = torch.from_numpy((block[:, [self.cls_gene]].toarray() * share)[:, 0])
        return batch


class SentenceBatches:
    """Numbered batches of sentences with genes to predict: see :class:`virtualcell.train.Batches`.

    To "tokens", "expression" and "cls_expression" come "target_tokens" (B, T) and "targets" (B, T), the values x of T =
    P + N + S genes, the last S ("n_shared") the same for the whole step; "genes" (n, n_token), the vectors of the genes
    that occur, which both kinds of tokens number; and "dataset" (B,).

    Training shows the cells in passes, each over all of them in an order of its own. What is drawn depends on the
    number of the step and on a cell's place in it, neither on how many processes share it nor on the order of a file.

    Parameters
    ----------
    cells
        The sentences.
    rows
        Rows of the cells to show, in an order that does not depend on the file, such as that of their names.
    names
        Names of all cells, for messages.
    vectors
        Gene embeddings by token, (n_genes, n_token).
    dataset
        Code of each cell's dataset, (n_cells,).
    n_targets
        Number of expressed, unexpressed and shared genes to predict per cell.
    batch_size
        Number of cells in a step, over all processes.
    seed
        Seed of the passes, of targets, and of the order of equal values.
    is_validation
        Whether these are the batches of a validation, which show every cell once, up to a limit.
    """

    def __init__(
        self,
        cells: Sentences,
        rows: np.ndarray,
        *,
        names: pd.Index,
        vectors: Tensor,
        dataset: np.ndarray,
        n_targets: tuple[int, int, int],
        batch_size: int,
        seed: int = 0,
        is_validation: bool = False,
    ) -> None:
        self.cells, self._rows, self.names, self.vectors, self.dataset = cells, rows, names, vectors, dataset
        self.n_targets, self.batch_size, self.seed = n_targets, batch_size, seed
        self.n_steps = min(-(-len(rows) // batch_size), MOST_VALIDATION_STEPS) if is_validation else None
        self._latest: tuple[int, np.ndarray] = (-1, rows)  # the order of the latest pass, to be used again

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return the share of step `i` that belongs to a process, on its device."""
        rows = self.rows(i)
        if len(rows) < world_size:  # at the end of a validation: nobody goes without
            rows = np.resize(rows, world_size)
        mine = np.arange(rank, len(rows), world_size)
        stage = int(self.n_steps is not None)
        rng = np.random.default_rng([self.seed, 1 + stage, i])
        block = self.cells.expression.rows(rows[mine])
        # equal values come in an order drawn anew, so that no gene always loses its place to the others
        batch = self.cells.of(block, rng.permutation(self.cells.n_genes))
        shared = _distinct(self.cells.n_genes, self.n_targets[2], rng)
        draws = [np.random.default_rng([self.seed, 3 + stage, i, k]) for k in mine]
        targets, values = self._targets(block, shared, draws)
        batch = {name: value.to(device) for name, value in batch.items()}
        return {
            **self._numbered(batch, torch.from_numpy(targets).to(device)),
            "targets": torch.from_numpy(values).to(device),
            "dataset": torch.from_numpy(self.dataset[rows[mine]]).long().to(device),
            "n_shared": torch.tensor(self.n_targets[2]),  # read on the CPU
        }

    def is_fetched(self, device: torch.device) -> bool:
        """Tell that a step is made where it is asked for: gene embeddings lie on the device."""
        return False

    def rows(self, i: int) -> np.ndarray:
        """Return the rows of all cells of step `i`."""
        places = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
        if self.n_steps is not None:
            return self._rows[places[places < len(self._rows)]]
        passes, places = np.divmod(places, len(self._rows))
        return np.concatenate([self._pass(k)[places[passes == k]] for k in np.unique(passes)])

    def describe(self, i: int) -> str:
        """Name some cells of step `i`."""
        names = [str(name) for name in self.names[self.rows(i)]]
        return f"cells {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def _pass(self, k: int) -> np.ndarray:
        if self._latest[0] != k:
            self._latest = k, np.random.default_rng([self.seed, 0, k]).permutation(self._rows)
        return self._latest[1]

    def _targets(
        self, block: sparse.csr_matrix, shared: np.ndarray, draws: list[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values, (B, T) each, of the genes that each cell is to predict."""
        tokens, values = [], []
        for i, rng in enumerate(draws):
            entries = slice(block.indptr[i], block.indptr[i + 1])
            positive = block.data[entries] > 0
            expressed, x = block.indices[entries][positive], block.data[entries][positive]
            order = np.argsort(expressed)
            expressed, x = expressed[order], x[order]
            chosen = np.concatenate([*self._draw(expressed, rng), shared])
            tokens.append(chosen)
            if len(expressed):
                place = np.searchsorted(expressed, chosen).clip(max=len(expressed) - 1)
                values.append(np.where(expressed[place] == chosen, x[place], np.float32(0)))
            else:
                values.append(np.zeros(len(chosen), np.float32))
        return np.stack(tokens).astype(np.int64), np.stack(values)

    def _draw(self, expressed: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw expressed and unexpressed genes of a cell; where it has none of a kind, any."""
        (n_expressed, n_unexpressed, _), n = self.n_targets, self.cells.n_genes
        some = _distinct(len(expressed), n_expressed, rng)
        rank = _distinct(n - len(expressed), n_unexpressed, rng)
        # the unexpressed gene of rank r comes after those expressed genes that have at most r unexpressed before them
        after = np.searchsorted(expressed - np.arange(len(expressed)), rank, side="right")
        return (
            expressed[some] if len(expressed) else _distinct(n, n_expressed, rng),
            rank + after if len(expressed) < n else _distinct(n, n_unexpressed, rng),
        )

    def _numbered(self, batch: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Give numbers to the genes that occur, so that each is encoded once, however many cells name it."""
        self.vectors = self.vectors.to(targets.device)  # up to 400 MB: once, not every step
        tokens = batch["tokens"]
        occurring, places = torch.cat([tokens.clamp_min(0), targets], dim=1).unique(return_inverse=True)
        in_sentence, in_targets = places.split([tokens.shape[1], targets.shape[1]], dim=1)
        return {
            **batch,
            "tokens": in_sentence.where(tokens >= 0, -1),
            "target_tokens": in_targets,
            "genes": self.vectors[occurring],
        }


def _distinct(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `k` of `n` numbers, again and again the same ones where there are fewer."""
    return np.resize(rng.choice(n, min(n, k), replace=False), k) if n else np.zeros(k, np.int64)
