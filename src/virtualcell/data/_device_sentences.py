"""Cells as sentences, made on the device that the network is on: a GPU makes millions a second, a CPU core 20,000."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from virtualcell.data._packed import PackedRows, pinned, sent
from virtualcell.data._sentence_batches import Sentences

_CELLS_AT_ONCE = 4096  # read from the matrix and sent to the device together
_ENTRIES_AT_ONCE = 1 << 24  # sorted together, 8 bytes each
_READERS = 6  # threads that read them
_LAST = (1 << 31) - 1


class DeviceSentences:
    """The sentences of some cells, token by token those of :class:`virtualcell.data._sentence_batches.Sentences`.

    Rows are sent as they are stored, some ahead of those that the device works on; it drops the genes without a token,
    takes logarithms, and finds the highest values by `torch.topk`. Value and token of an entry are one 64-bit number,
    so that equal values come in the order of tokens, whatever the order of genes in the file.

    Parameters
    ----------
    cells
        The sentences, of no model that fills them up or that gives the [CLS] place an expression.
    device
        Where they are made.
    most_bytes
        Memory that rows may take on the device. What is more is sent in stretches of as many cells as fit.
    refuse
        What to call with the rows of cells that express no gene with a token, before any sentence of theirs.
    """

    def __init__(
        self,
        cells: Sentences,
        device: torch.device,
        *,
        most_bytes: int,
        refuse: Callable[[np.ndarray], None],
    ) -> None:
        if cells.fill or cells.cls_gene is not None:
            raise ValueError("sentences that are filled up, or that have a [CLS] gene, are made on the CPU.")
        self.expression, self.length, self.device = cells.expression, cells.length, device
        self.n_genes, self.refuse = cells.n_genes, refuse
        self._gene_of_column = torch.from_numpy(self.expression.gene_of_column.astype(np.int32)).to(device)
        # an entry takes up to 8 bytes, and twice as many while the blocks are put together
        self._cells_that_fit = max(1, int(most_bytes / (16 * max(self.expression.entries_per_cell, 1))))

    def batches(self, rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Yield row numbers and sentences, "tokens" and "expression" (B, L), of all cells, some at a time.

        Cells with sentences of about the same length go together, so that few places are padding: by length, and among
        those of one length in the order of `rows`.
        """
        for start in range(0, len(rows), self._cells_that_fit):
            stretch = rows[start : start + self._cells_that_fit]
            ordered = np.sort(stretch)  # all cells of a file are read from beginning to end
            packed = self._packed(ordered)
            place = np.searchsorted(ordered, stretch)
            lengths = packed.lengths[place]
            if not lengths.all():
                self.refuse(np.sort(stretch[lengths == 0]))
            order = np.argsort(np.minimum(lengths, self.length), kind="stable")
            for part in np.split(order, range(batch_size, len(order), batch_size)):
                yield stretch[part], self._sentences(packed, place[part])

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _packed(self, rows: np.ndarray) -> PackedRows:
        """Rows, in ascending order, as the device keeps them."""
        sizes, genes, values = [torch.zeros(1, dtype=torch.int64, device=self.device)], [], []
        for block in self._ahead(np.split(rows, range(_CELLS_AT_ONCE, len(rows), _CELLS_AT_ONCE))):
            indptr, columns, stored = (tensor.to(self.device, non_blocking=True) for tensor in block)
            gene = self._gene_of_column[columns]
            keep = (gene >= 0) & (stored > 0)
            sizes.append(F.pad(keep.cumsum(0), (1, 0))[indptr].diff())
            genes.append(gene[keep])
            values.append(self._values(stored[keep]))
        return PackedRows(torch.cat(sizes).cumsum(0), torch.cat(genes), torch.cat(values), self.n_genes)

    def _ahead(self, parts: list[np.ndarray]) -> Iterator[tuple[Tensor, ...]]:
        """Read blocks of rows by several threads, the next while the device works on one."""
        with ThreadPoolExecutor(_READERS) as readers:
            reading: deque[Future] = deque()
            for part in parts:
                reading.append(readers.submit(self._read, part))
                if len(reading) > _READERS:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()

    def _read(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        in_one_piece = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
        block = self.expression.stored(slice(rows[0], rows[-1] + 1) if in_one_piece else rows)
        arrays = block.indptr.astype(np.int64), block.indices.astype(np.int32, copy=False), block.data
        return tuple(pinned(array, self.device) for array in arrays)

    def _values(self, stored: Tensor) -> Tensor:
        """Values on the scale of the model; in double precision a logarithm is rounded once, as a CPU does it."""
        return stored.double().log1p().float() if self.expression.takes_logarithm else stored

    # -- sentences ----------------------------------------------------------------------------------------------------

    def _sentences(self, packed: PackedRows, place: np.ndarray) -> dict[str, Tensor]:
        width = int(packed.lengths[place].max(initial=1))  # of the longest row; the longest sentence is no longer
        pieces = np.split(
            place, range(max(1, _ENTRIES_AT_ONCE // width), len(place), max(1, _ENTRIES_AT_ONCE // width))
        )
        tokens, expression = zip(*(self._highest(packed, piece, width) for piece in pieces), strict=True)
        return {"tokens": torch.cat(tokens), "expression": torch.cat(expression)}

    def _highest(self, packed: PackedRows, place: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
        index = sent(place, self.device)
        start, stop = packed.indptr[index, None], packed.indptr[index + 1, None]
        entry = start + torch.arange(width, device=self.device)
        is_there = entry < stop
        entry = entry.clamp_max(len(packed.values) - 1)
        value = torch.where(is_there, packed.values[entry], 0)
        key = (value.view(torch.int32).long() << 32) + (_LAST - packed.genes[entry].long())
        key = torch.where(is_there, key, 0).topk(min(self.length, width), dim=1).values
        tokens = torch.where(key > 0, _LAST - (key & 0xFFFFFFFF), -1)
        # float32 logarithms add up in float64 without rounding, so that the order of genes in a file does not matter
        share = (100 / value.double().sum(dim=1, keepdim=True).clamp_min(1e-12)).float()
        return tokens, (key >> 32).int().view(torch.float32) * share
