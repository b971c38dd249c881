"""Rows of the model's genes, packed: what training reads, in memory, on a GPU or on disk."""

from __future__ import annotations

import json
import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from virtualcell._files import put_in_place
from virtualcell.data._cache import Hold, Scratch, home, make_once, make_room, written
from virtualcell.data._expression import Expression
from virtualcell.data._stored import ranges

logger = logging.getLogger(__name__)

_INDEX = "packed.json"
_VERSION = 1


class PackedRows:
    """Cells x features as compressed rows; any rows come out as a dense float32 tensor, where the store lives.

    On a GPU or on disk a gene is a 16-bit number where there are at most 32,767 of them, and a value 32 or 16 bits. In
    the memory of a CPU a gene takes 32 bits, with which rows are put together three to seven times as fast.

    Parameters
    ----------
    indptr
        Start of each row's entries, (n_cells + 1,), int64.
    genes, values
        Column and value of each entry, (n_entries,).
    n_genes
        Number of columns of a dense row.
    """

    def __init__(self, indptr: Tensor, genes: Tensor, values: Tensor, n_genes: int) -> None:
        self.indptr, self.genes, self.values, self.n_genes = indptr, genes, values, n_genes
        self._scipy: sparse.csr_matrix | None = None
        self._folder: Path | None = None  # where it is mapped from
        self._kept_by: Hold | Scratch | None = None  # which keeps these files for as long as the store lives

    def __reduce__(self) -> tuple:
        if self._folder is not None:
            return type(self).open, (self._folder,)  # another process maps the same files
        return type(self), (self.indptr, self.genes, self.values, self.n_genes)  # once, not twice

    @property
    def _compressed(self) -> sparse.csr_matrix | None:
        """The same memory, where scipy can read it."""
        if (
            (self.indptr.device.type, self.genes.dtype, self.values.dtype) != ("cpu", torch.int32, torch.float32)
            or len(self.genes) > np.iinfo(np.int32).max  # beyond, scipy would copy the genes
        ):
            return None
        # what goes to another process is moved into shared memory, also here, and scipy would read where it was
        if self._scipy is None or self._scipy.data.ctypes.data != self.values.data_ptr():
            arrays = self.values.numpy(), self.genes.numpy(), self.indptr.numpy()
            self._scipy = sparse.csr_matrix(arrays, shape=(len(self.indptr) - 1, self.n_genes), copy=False)
        return self._scipy

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
            Precision of the values; float16 keeps 3 to 4 digits, up to 65,504.
        folder
            Write the store there and map it from disk, in place of holding it in memory. Of a matrix that is not in
            memory the store is not either, but in the cache folder, where other processes and later calls find it.

        Raises
        ------
        ValueError
            For values that float16 cannot hold.
        """
        if folder is None and not expression.in_memory:
            return cls._kept(expression, dtype)
        return cls._packed(expression, dtype, folder)

    @classmethod
    def _kept(cls, expression: Expression, dtype: str) -> Self:
        """Return the store that the cache has of a matrix on disk; the first process that asks for it packs it."""
        key = expression.key
        kept = Scratch() if key is None else Hold(home() / f"packed-{key}-{dtype}-{_VERSION}")
        folder = Path(kept.name) if isinstance(kept, Scratch) else kept.folder

        def make() -> None:
            logger.info("%d cells x %d genes are packed in %s.", expression.n_cells, len(expression.genes), folder)
            cls._packed(expression, dtype, folder, goes_on=True)
            make_room()

        make_once(folder, is_whole=(folder / _INDEX).exists, make=make)
        store = cls.open(folder)
        store._kept_by = kept
        return store

    @classmethod
    def _packed(
        cls, expression: Expression, dtype: str, folder: str | os.PathLike | None, *, goes_on: bool = False
    ) -> Self:
        n_genes = len(expression.genes)
        gene_type = np.int32 if folder is None and dtype == "float32" else _gene_type(n_genes)
        out = _Writer(folder, {"genes": gene_type, "values": np.dtype(dtype), "lengths": np.dtype(np.int64)})
        slices = expression.slices()
        first = out.begin([rows.start for rows in slices] if goes_on else [])
        for rows in slices:
            if rows.start < first:
                continue
            block = expression.rows(rows)
            if block.data.max(initial=0) > np.finfo(dtype).max:
                raise ValueError(f"dtype={dtype!r} cannot hold {block.data.max():.4g}. Say dtype='float32'.")
            out.add(genes=block.indices, values=block.data, lengths=np.diff(block.indptr))
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(out.whole("lengths"))])
        if folder is None:
            genes, values = (torch.from_numpy(out.whole(name)) for name in ("genes", "values"))
            return cls(torch.from_numpy(indptr), genes, values, n_genes)
        out.finish(indptr, {"n_genes": n_genes, "genes": np.dtype(gene_type).name, "values": dtype})
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Self:
        """Map a store that :meth:`pack` wrote; rows are read from disk as they are asked for.

        Raises
        ------
        FileNotFoundError
            If the folder holds no store, or one that was not written to the end.
        ValueError
            If its files were cut off.
        """
        folder = Path(folder)
        if not (folder / _INDEX).exists():
            raise FileNotFoundError(f"{folder} holds no {_INDEX}: it is no store of packed rows, or was interrupted.")
        described = json.loads((folder / _INDEX).read_text())
        indptr = np.load(folder / "indptr.npy")

        def mapped(name: str) -> Tensor:
            dtype, n = np.dtype(described[name]), int(indptr[-1])
            if not n:
                return torch.from_numpy(np.empty(0, dtype))
            if (folder / name).stat().st_size != n * dtype.itemsize:
                raise ValueError(
                    f"{folder / name} is cut off or of another store. Pack the cells again: remove the folder."
                )
            return torch.from_numpy(np.memmap(folder / name, dtype=dtype, mode="c", shape=(n,)))

        store = cls(torch.from_numpy(indptr), mapped("genes"), mapped("values"), described["n_genes"])
        store._folder = folder
        store._kept_by = Hold(folder) if folder.parent == home() else None
        return store

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of entries of each row, (n_cells,), in the memory of the CPU."""
        return self.indptr.diff().cpu().numpy()

    @property
    def nbytes(self) -> int:
        """Bytes that the store takes."""
        return sum(t.numel() * t.element_size() for t in (self.indptr, self.genes, self.values))

    @property
    def on_disk(self) -> bool:
        """Whether rows are read from disk when they are asked for."""
        return self._folder is not None

    def to(self, device: torch.device | str) -> Self:
        """Return the store on another device, with genes in few bytes; itself where it is there already."""
        device, here = torch.device(device), self.indptr.device
        if device.type == here.type and (here.type == "cpu" or device.index in (None, here.index)):
            return self
        genes = self.genes.to(getattr(torch, np.dtype(_gene_type(self.n_genes)).name))
        return type(self)(self.indptr.to(device), genes.to(device), self.values.to(device), self.n_genes)

    def rows(self, index: np.ndarray) -> Tensor:
        """Return rows, (*shape of index, n_genes), float32, on the device of the store."""
        flat = np.ravel(index).astype(np.int64, copy=False)
        if (compressed := self._compressed) is not None:
            dense = torch.from_numpy(compressed[flat].toarray())
        elif self.indptr.device.type == "cpu":
            dense = torch.from_numpy(self._gathered(flat).toarray())
        else:
            dense = self.scattered(sent(flat, self.indptr.device), n_entries=int(self.lengths[flat].sum()))
        return dense.view(*np.shape(index), self.n_genes)

    def _gathered(self, flat: np.ndarray) -> sparse.csr_matrix:
        """Return rows that are put together from one stretch of the store each."""
        indptr = self.indptr.numpy()
        start = indptr[flat]
        length = indptr[flat + 1] - start
        entries, ends = ranges(start, length), np.cumsum(np.concatenate([[0], length]))
        arrays = self.values.numpy()[entries].astype(np.float32), self.genes.numpy()[entries].astype(np.int32)
        return sparse.csr_matrix((*arrays, ends), shape=(len(flat), self.n_genes))

    def scattered(self, flat: Tensor, *, n_entries: int | None = None) -> Tensor:
        """Return rows (n, n_genes) that are put together entry by entry, as a GPU does it best.

        With their number of entries, the CPU need not wait for what the GPU is busy with.
        """
        device = flat.device
        start = self.indptr[flat]
        length = self.indptr[flat + 1] - start
        n = int(length.sum()) if n_entries is None else n_entries
        # of every entry: its row in the result, and how far it lies from the first entry of the first row
        row = torch.repeat_interleave(torch.arange(len(flat), device=device), length, output_size=n)
        entry = torch.arange(n, device=device) + (start - length.cumsum(0) + length).index_select(0, row)
        place = row * self.n_genes + self.genes.index_select(0, entry)
        dense = torch.zeros(len(flat) * self.n_genes, device=device)
        dense.scatter_(0, place, self.values.index_select(0, entry).float())
        return dense.view(len(flat), self.n_genes)


class DenseRows:
    """Rows of a dense float32 matrix, such as cell embeddings, with the methods of :class:`PackedRows`."""

    on_disk = False

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.n_genes = matrix, matrix.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return self.matrix.numel() * self.matrix.element_size()

    def to(self, device: torch.device | str) -> DenseRows:
        """Return the rows on another device; themselves where they are there already."""
        return DenseRows(self.matrix.to(device))

    def rows(self, index: np.ndarray) -> Tensor:
        """Return rows, (*shape of index, n_features), float32."""
        return self.matrix[sent(np.asarray(index), self.matrix.device)]


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without waiting for what a GPU is busy with; on a CPU it is shared."""
    return pinned(array, device).to(device, non_blocking=True)


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor from where a device can fetch it by itself; for a CPU it is shared."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _gene_type(n_genes: int) -> type:
    return np.int16 if n_genes <= np.iinfo(np.int16).max else np.int32


class _Writer:
    """Arrays that grow by blocks, in memory or as files in a folder."""

    def __init__(self, folder: str | os.PathLike | None, dtypes: dict[str, np.dtype | type]) -> None:
        self.folder, self.dtypes = None if folder is None else Path(folder), dtypes
        self.blocks: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}

    def begin(self, starts: list[int]) -> int:
        """Return the row to go on from, the last of `starts` before which all was written, or 0 to begin anew."""
        if self.folder is None:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _INDEX).unlink(missing_ok=True)  # it comes last: an interrupted store is none
        paths = {name: self.folder / name for name in self.dtypes}
        if all(path.exists() for path in paths.values()):
            lengths = np.fromfile(paths["lengths"], np.int64)
            first = max((start for start in starts if start <= len(lengths)), default=0)
            n = {"genes": (n_entries := int(lengths[:first].sum())), "values": n_entries, "lengths": first}
            sizes = {name: n[name] * np.dtype(dtype).itemsize for name, dtype in self.dtypes.items()}
            if first and all(paths[name].stat().st_size >= size for name, size in sizes.items()):
                for name, size in sizes.items():
                    os.truncate(paths[name], size)
                return first
        for path in paths.values():
            path.unlink(missing_ok=True)
            path.touch()
        return 0

    def add(self, **arrays: np.ndarray) -> None:
        """Add a block to each array; the last one tells what is whole."""
        for name, array in arrays.items():
            array = array.astype(self.dtypes[name])
            if self.folder is None:
                self.blocks[name].append(array)
            else:
                with written(self.folder / name), (self.folder / name).open("ab") as file:
                    array.tofile(file)

    def whole(self, name: str) -> np.ndarray:
        """Return all blocks as one, and let go of each when it is copied."""
        if self.folder is not None:
            return np.fromfile(self.folder / name, self.dtypes[name])
        blocks, self.blocks[name] = self.blocks[name][::-1], []
        whole, end = np.empty(sum(map(len, blocks)), self.dtypes[name]), 0
        while blocks:
            block = blocks.pop()
            whole[end : end + len(block)] = block
            end += len(block)
        return whole

    def finish(self, indptr: np.ndarray, described: dict[str, object]) -> None:
        """Write the rest of a store, and in the end what says that it is one."""
        np.save(self.folder / "indptr.npy", indptr)
        (self.folder / "lengths").unlink()
        for name in ("genes", "values", "indptr.npy"):
            with (self.folder / name).open("rb+") as file:
                os.fsync(file.fileno())  # or a computer that crashes has the index and none of what it is of
        put_in_place(self.folder / _INDEX, lambda part: part.write_text(json.dumps(described)))
