from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing  # which tells ForkingPickler of tensors
from anndata import AnnData
from scipy import sparse

from virtualcell.data import _packed
from virtualcell.data._expression import Expression
from virtualcell.data._packed import DenseRows, PackedRows


def make_cells(n: int = 50, n_genes: int = 37) -> AnnData:
    """Counts with empty cells, a cell full of genes, and zeros that are stored."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.4, (n, n_genes)).astype(np.float32)
    counts[[0, 7, 8, n - 1]] = 0
    counts[3] = 1
    matrix = sparse.csr_matrix(counts)
    matrix.data[::9] = 0
    return AnnData(matrix, var=pd.DataFrame(index=[f"g{j}" for j in range(n_genes)]))


def expression(adata: AnnData) -> Expression:
    return Expression(adata, unit="log_counts")


INDICES = [
    np.array([[3, 7, 0], [49, 3, 12]]),
    np.array([5, 5, 8]),
    np.arange(50),
    np.array(4),
    np.zeros((0,), int),
    np.zeros((2, 0, 3), int),
    np.array([[[1]], [[2]]], dtype=np.int32),
    [1, 2],
]


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("n_genes", [37, 40_000])
def test_rows_are_those_of_the_matrix(tmp_path: Path, place: str, dtype: str, n_genes: int) -> None:
    adata = make_cells(n_genes=n_genes)
    expected = expression(adata).rows().toarray().astype(dtype).astype(np.float32)
    folder = tmp_path / "deep" / "store" if place == "disk" else None
    packed = PackedRows.pack(expression(adata), dtype=dtype, folder=folder)
    for index in INDICES:
        found = packed.rows(index)
        assert found.dtype == torch.float32
        assert found.shape == (*np.shape(index), n_genes)
        np.testing.assert_array_equal(found.numpy(), expected[np.asarray(index)])
        # as on a GPU, entry by entry
        flat = torch.from_numpy(np.ravel(index).astype(np.int64))
        assert torch.equal(packed.scattered(flat), found.view(len(flat), n_genes))
        n_entries = int(packed.lengths[flat.numpy()].sum())
        assert torch.equal(packed.scattered(flat, n_entries=n_entries), found.view(len(flat), n_genes))
    np.testing.assert_array_equal(packed.lengths, np.diff(adata.X.indptr))
    # rows may be written to without reaching the store
    packed.rows([3])[:] = -1
    np.testing.assert_array_equal(packed.rows([3])[0].numpy(), expected[3])
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again.rows(np.arange(50)), packed.rows(np.arange(50)))


def test_any_cells_and_genes_in_one_pass() -> None:
    """Rows are numbered as in the expression, which may be of some cells and genes, and of many blocks."""
    rng = np.random.default_rng(1)
    genes = [f"g{j}" for j in rng.permutation(37)[:20]]
    part = expression(make_cells(10_000)).take(rng.permutation(10_000)[:9_000]).select(genes)
    packed = PackedRows.pack(part)
    np.testing.assert_array_equal(packed.rows(np.arange(9_000)).numpy(), part.rows().toarray())
    nothing = PackedRows.pack(part.take([]))
    assert nothing.rows(np.zeros((0, 2), int)).shape == (0, 2, 20)


def test_numbers_take_few_bytes(tmp_path: Path) -> None:
    adata = make_cells()
    n = adata.X.nnz
    of_rows = 51 * 8
    assert PackedRows.pack(expression(adata)).nbytes == of_rows + 8 * n
    assert PackedRows.pack(expression(adata), folder=tmp_path / "a").nbytes == of_rows + 6 * n
    assert PackedRows.pack(expression(adata), dtype="float16", folder=tmp_path / "b").nbytes == of_rows + 4 * n
    assert (tmp_path / "b" / "genes").stat().st_size == (tmp_path / "b" / "values").stat().st_size == 2 * n
    wide = PackedRows.pack(expression(make_cells(n_genes=40_000)), folder=tmp_path / "c")
    assert wide.genes.dtype == torch.int32
    # on the way to a device, genes are made small
    sent = PackedRows.pack(expression(adata)).to("meta")
    assert sent.genes.dtype == torch.int16
    assert sent.nbytes == of_rows + 6 * n


def test_a_store_stays_where_it_is() -> None:
    packed = PackedRows.pack(expression(make_cells()))
    assert packed.to("cpu") is packed
    assert packed.to(torch.device("cpu", 0)) is packed


def test_a_store_is_opened_again(tmp_path: Path) -> None:
    adata = make_cells()
    packed = PackedRows.pack(expression(adata), folder=tmp_path)
    before = packed.rows(np.arange(50))
    opened = PackedRows.open(tmp_path)
    assert torch.equal(opened.rows(np.arange(50)), before)
    # of cells that express nothing
    empty = AnnData(sparse.csr_matrix((3, 4), dtype=np.float32))
    PackedRows.pack(Expression(empty, unit="counts"), folder=tmp_path / "empty")
    assert PackedRows.open(tmp_path / "empty").rows([[2, 0]]).tolist() == [[[0] * 4] * 2]
    # one that is written anew leaves what is open as it was
    PackedRows.pack(Expression(adata, unit="counts"), folder=tmp_path)
    assert torch.equal(opened.rows(np.arange(50)), before)
    np.testing.assert_array_equal(PackedRows.open(tmp_path).rows([3, 1]).numpy(), adata.X[[3, 1]].toarray())


class Interrupted(BaseException):
    """Ctrl-C at a bad moment."""


def test_an_interrupted_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no packed.json: it is no store of packed rows"):
        PackedRows.open(tmp_path)
    PackedRows.pack(expression(make_cells()), folder=tmp_path)  # over an old store, too
    real = _packed._Writer.add

    def interrupted(self: _packed._Writer, **arrays: np.ndarray) -> None:
        real(self, **arrays)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(_packed._Writer, "add", interrupted)
        with pytest.raises(Interrupted):
            PackedRows.pack(expression(make_cells()), folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="was interrupted"):
        PackedRows.open(tmp_path)
    PackedRows.pack(expression(make_cells()), folder=tmp_path)
    assert PackedRows.open(tmp_path).rows([3]).shape == (1, 37)


@pytest.mark.parametrize("name", ["genes", "values"])
def test_files_that_were_cut_off_are_refused(tmp_path: Path, name: str) -> None:
    PackedRows.pack(expression(make_cells()), folder=tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} is cut off or of another store. Pack the cells again"):
        PackedRows.open(tmp_path)


def test_what_float16_cannot_hold_is_refused() -> None:
    adata = AnnData(np.array([[70_000, 1]], np.float32))
    with pytest.raises(ValueError, match=r"dtype='float16' cannot hold 7e\+04. Say dtype='float32'"):
        PackedRows.pack(Expression(adata, unit="counts"), dtype="float16")
    assert PackedRows.pack(Expression(adata), dtype="float16").rows([0]).isfinite().all()


def test_a_store_that_was_sent_to_another_process_can_be_read_here_too() -> None:
    """Sending moves tensors into memory that processes share; what was there before is given to others."""
    adata = make_cells(2000, 300)
    rows = PackedRows.pack(expression(adata))
    before = rows.rows(np.arange(60))
    sent = [ForkingPickler.dumps(rows)]
    others = [np.full(rows.values.numel() // 7, -1, np.float32) for _ in range(8)]
    assert torch.equal(rows.rows(np.arange(60)), before)
    assert torch.equal(pickle.loads(pickle.dumps(rows)).rows(np.arange(60)), before)
    assert len(sent) + len(others) == 9


def test_dense_rows() -> None:
    matrix = torch.arange(12.0).view(4, 3)
    rows = DenseRows(matrix)
    assert rows.n_genes == 3
    assert rows.nbytes == 48
    assert torch.equal(rows.rows(np.array([[3, 0]])), matrix[[3, 0]][None])
    assert torch.equal(rows.to("cpu").rows([1]), matrix[[1]])
