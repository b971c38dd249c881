from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from virtualcell.data import _device_sentences
from virtualcell.data._device_sentences import DeviceSentences
from virtualcell.data._expression import Expression
from virtualcell.data._sentence_batches import Sentences

CPU = torch.device("cpu")
N, N_GENES, LENGTH = 90, 60, 12
GENES = [f"g{j}" for j in np.random.default_rng(3).permutation(N_GENES)[:45] if j != 7]  # not in the file's order


def make_cells() -> AnnData:
    """Counts with many equal values, of cells with fewer genes than places, with more, and with one."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.choice([0.05, 0.3, 2], (N, 1)), (N, N_GENES)).astype(np.float32)
    matrix = sparse.csr_matrix(counts)
    matrix.data[::13] = 0  # stored zeros
    matrix = matrix.tolil()
    matrix[:, 7] = 1
    return AnnData(matrix.tocsr(), var=pd.DataFrame(index=[f"g{j}" for j in range(N_GENES)]))


def sentences(adata: AnnData, *, scale: str = "counts", genes: list[str] = GENES) -> Sentences:
    return Sentences(Expression(adata, scale=scale, unit="log_counts").select([*genes, "g7"]), LENGTH)


def refuse(rows: np.ndarray) -> None:
    raise ValueError(f"empty: {rows.tolist()}")


def of_device(cells: Sentences, rows: np.ndarray, *, batch_size: int = 16, most_bytes: int = 1 << 30) -> dict:
    """Tokens and expression of each cell, without padding, and the order in which the cells came."""
    found, order = {}, []
    for part, batch in DeviceSentences(cells, CPU, most_bytes=most_bytes, refuse=refuse).batches(rows, batch_size):
        order.append(part)
        for i, tokens, expression in zip(part, batch["tokens"], batch["expression"], strict=True):
            n = int((tokens >= 0).sum())
            assert (tokens[n:] == -1).all()
            assert (expression[n:] == 0).all()
            found[int(i)] = tokens[:n].tolist(), expression[:n].numpy()
    return {"cells": found, "order": np.concatenate(order)}


@pytest.mark.parametrize("most_bytes", [1 << 30, 16 * 400])
@pytest.mark.parametrize("kind", ["sparse", "dense", "by columns"])
def test_sentences_are_those_of_the_cpu(most_bytes: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device_sentences, "_CELLS_AT_ONCE", 11)
    monkeypatch.setattr(_device_sentences, "_ENTRIES_AT_ONCE", 100)
    adata = make_cells()
    if kind != "sparse":
        adata.X = adata.X.toarray() if kind == "dense" else adata.X.tocsc()
    cells = sentences(adata)
    expected = cells.rows(np.arange(N))
    rows = np.random.default_rng(1).permutation(N)[:70]
    found = of_device(cells, rows, most_bytes=most_bytes)
    assert sorted(found["order"]) == sorted(rows)
    lengths = set()
    for i, (tokens, expression) in found["cells"].items():
        n = len(tokens)
        lengths.add(n)
        assert tokens == expected["tokens"][i, :n].tolist()
        assert (expected["tokens"][i, n:] == -1).all()
        np.testing.assert_allclose(expression, expected["expression"][i, :n], rtol=3e-7)
    assert {1, LENGTH} < lengths  # and some in between


def test_logarithms_are_taken_as_they_are() -> None:
    adata = make_cells()
    adata.X = adata.X.copy()
    adata.X.data = np.log1p(adata.X.data * np.float32(0.37))
    cells = sentences(adata, scale="log1p")
    expected, found = cells.rows(np.arange(N)), of_device(cells, np.arange(N))
    for i, (tokens, expression) in found["cells"].items():
        assert tokens == expected["tokens"][i, : len(tokens)].tolist()
        np.testing.assert_array_equal(expression, expected["expression"][i, : len(tokens)].numpy())


def test_order_of_genes_and_cells_changes_no_bit() -> None:
    adata, rng = make_cells(), np.random.default_rng(2)
    expected = of_device(sentences(adata), np.arange(N))
    cells, genes = rng.permutation(N), rng.permutation(N_GENES)
    by_name = np.argsort(cells)  # the rows of the cells in their former order
    found = of_device(sentences(adata[cells][:, genes].copy()), by_name)
    np.testing.assert_array_equal(cells[found["order"]], expected["order"])
    for row, (tokens, expression) in found["cells"].items():
        assert tokens == expected["cells"][cells[row]][0]
        np.testing.assert_array_equal(expression, expected["cells"][cells[row]][1])


def test_cells_of_one_length_go_together_without_padding() -> None:
    cells = sentences(make_cells())
    n_full = int((cells.rows(np.arange(N))["tokens"][:, -1] >= 0).sum())
    batches = list(DeviceSentences(cells, CPU, most_bytes=1 << 30, refuse=refuse).batches(np.arange(N), 8))
    assert {len(part) for part, _ in batches[:-1]} == {8}
    widths = [batch["tokens"].shape[1] for _, batch in batches]
    assert widths == sorted(widths)
    assert sum(bool((batch["tokens"] >= 0).all()) for _, batch in batches) >= n_full // 8


def test_what_only_the_cpu_makes_is_refused() -> None:
    expression = sentences(make_cells()).expression
    for options in ({"fill": True}, {"cls_gene": 3}):
        with pytest.raises(ValueError, match="are made on the CPU"):
            DeviceSentences(Sentences(expression, LENGTH, **options), CPU, most_bytes=1, refuse=refuse)


def test_cells_without_genes_are_named() -> None:
    adata = make_cells()
    counts = adata.X.toarray()
    counts[[5, 40]] = 0
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(ValueError, match=r"empty: \[5, 40\]"):
        of_device(sentences(adata), np.random.default_rng(0).permutation(N))
