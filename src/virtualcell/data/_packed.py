"""Rows of the model's genes, packed: what training reads, in memory, on a GPU or on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from virtualcell.data._expression import Expression

_INDEX = "packed.json"


class PackedRows:
    """Cells x features as compressed rows whose numbers take few bytes; any rows come out as a dense float32 tensor.

    A gene is a 16-bit number where there are at most 32,767 of them, a value 32 or 16 bits. Rows are put together
    where the store lives, on the CPU or a GPU.

    Parameters
    ----------
    indptr
        Start of each row's entries, (n_cells + 1,), int64.
    genes, values
        Column and value of each entry, (n_entries,).
    n_genes
        Columns of a dense row.
    """

    def __init__(self, indptr: Tensor, genes: Tensor, values: Tensor, n_genes: int) -> None:
        self.indptr, self.genes, self.values, self.n_genes = indptr, genes, values, n_genes

    @classmethod
    def pack(
        cls,
        expression: Expression,
        *,
        dtype: Literal["float32", "float16"] = "float32",
        folder: str | os.PathLike | None = None,
    ) -> Self:
        """Read a matrix once, in the order of its file, and keep it packed.

        Parameters
        ----------
        expression
            What to read.
        dtype
            Precision of the values; float16 keeps 3 to 4 digits.
        folder
            Write the store there and map it from disk, in place of holding it in memory.
        """
        gene_type = np.int16 if len(expression.genes) <= np.iinfo(np.int16).max else np.int32
        sizes, out = [np.zeros(1, np.int64)], _Writer(folder, {"genes": gene_type, "values": np.dtype(dtype)})
        for _, block in expression.blocks():
            sizes.append(np.diff(block.indptr).astype(np.int64))
            out.add(genes=block.indices.astype(gene_type), values=block.data.astype(dtype))
        indptr = np.cumsum(np.concatenate(sizes))
        if folder is None:
            return cls(torch.from_numpy(indptr), out.tensor("genes"), out.tensor("values"), len(expression.genes))
        np.save(Path(folder) / "indptr.npy", indptr)
        described = {"n_genes": len(expression.genes), "genes": np.dtype(gene_type).name, "values": dtype}
        (Path(folder) / _INDEX).write_text(json.dumps(described))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Self:
        """Map a store that :meth:`pack` wrote; rows are read from disk as they are asked for."""
        folder = Path(folder)
        if not (folder / _INDEX).exists():
            raise FileNotFoundError(f"{folder} holds no {_INDEX}: it is no store of packed rows.")
        described = json.loads((folder / _INDEX).read_text())
        indptr = np.load(folder / "indptr.npy")

        def mapped(name: str) -> Tensor:
            if not indptr[-1]:
                return torch.from_numpy(np.empty(0, described[name]))
            return torch.from_numpy(np.memmap(folder / name, dtype=described[name], mode="c", shape=(indptr[-1],)))

        return cls(torch.from_numpy(indptr), mapped("genes"), mapped("values"), described["n_genes"])

    @property
    def nbytes(self) -> int:
        """Bytes that the store takes."""
        return sum(t.numel() * t.element_size() for t in (self.indptr, self.genes, self.values))

    def to(self, device: torch.device | str) -> Self:
        """Return the store on another device; itself where it is there already."""
        if self.indptr.device == torch.device(device):
            return self
        return type(self)(*(t.to(device) for t in (self.indptr, self.genes, self.values)), self.n_genes)

    def rows(self, index: np.ndarray) -> Tensor:
        """Return rows, (*shape of index, n_genes), float32, on the device of the store."""
        device = self.indptr.device
        flat = torch.from_numpy(np.ravel(index)).to(device)
        start = self.indptr[flat]
        length = self.indptr[flat + 1] - start
        n = int(length.sum())
        # of every entry: its row in the result, and how far it lies from the first entry of the first row
        row = torch.repeat_interleave(torch.arange(len(flat), device=device), length, output_size=n)
        entry = torch.arange(n, device=device) + (start - length.cumsum(0) + length).index_select(0, row)
        place = row * self.n_genes + self.genes.index_select(0, entry)
        dense = torch.zeros(len(flat) * self.n_genes, device=device)
        dense.scatter_(0, place, self.values.index_select(0, entry).float())
        return dense.view(*np.shape(index), self.n_genes)


class DenseRows:
    """Rows of a dense float32 matrix, such as cell embeddings, with the methods of :class:`PackedRows`."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.n_genes = matrix, matrix.shape[1]

    def to(self, device: torch.device | str) -> DenseRows:
        """Return the rows on another device."""
        return DenseRows(self.matrix.to(device))

    def rows(self, index: np.ndarray) -> Tensor:
        """Return rows, (*shape of index, n_features), float32."""
        return self.matrix[torch.from_numpy(np.asarray(index)).to(self.matrix.device)]


class _Writer:
    """Arrays that grow by blocks, in memory or as files in a folder."""

    def __init__(self, folder: str | os.PathLike | None, dtypes: dict[str, np.dtype | type]) -> None:
        self.folder, self.dtypes = None if folder is None else Path(folder), dtypes
        self.blocks: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _INDEX).unlink(missing_ok=True)  # it comes last: an interrupted store is none
            for name in dtypes:
                (self.folder / name).unlink(missing_ok=True)

    def add(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            if self.folder is None:
                self.blocks[name].append(array)
            else:
                with (self.folder / name).open("ab") as file:
                    array.tofile(file)

    def tensor(self, name: str) -> Tensor:
        """Return all blocks as one, and let go of them."""
        blocks, self.blocks[name] = self.blocks[name], []
        return torch.from_numpy(np.concatenate([np.empty(0, self.dtypes[name]), *blocks]))
