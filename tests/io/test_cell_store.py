from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from scipy import sparse

from virtualcell.io._cell_store import CellStore, opened

N, GENES = 40, 30
PORTIONS = [sparse.random(N, GENES, 0.2, format="csr", dtype=np.float32, random_state=i) for i in range(3)]


def store_of(path: Path, made_for: str = "these") -> CellStore:
    return CellStore(path, made_for=made_for, matrices=["X", "layers/counts"], n_genes=GENES)


def add(store: CellStore, *numbers: int) -> None:
    for i in numbers:
        table = pd.DataFrame({"portion": np.full(N, i)}, index=[f"cell_{i}_{j}" for j in range(N)])
        counts = sparse.csr_matrix(abs(PORTIONS[i]) > 0.5, dtype=np.float32)  # with entries of its own
        store.add({"X": PORTIONS[i], "layers/counts": counts}, table, {"change": np.full(2, i)})


def finish(store: CellStore) -> None:
    rest = AnnData(obs=store.table(), var=pd.DataFrame(index=[f"G{i}" for i in range(GENES)]))
    rest.varm["change"] = np.stack([arrays["change"] for arrays in store.arrays()], axis=1)[:1].repeat(GENES, axis=0)
    rest.uns["virtualcell"] = {"predicted_by": "ST"}
    store.finish(rest)


def check(path: Path) -> None:
    read = ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
    whole = sparse.vstack(PORTIONS)
    for cells in (read, opened(path).to_memory()):
        np.testing.assert_array_equal(cells.X.toarray(), whole.toarray())
        np.testing.assert_array_equal(cells.layers["counts"].toarray(), abs(whole).toarray() > 0.5)
        assert cells.obs["portion"].tolist() == [0] * N + [1] * N + [2] * N
        assert cells.varm["change"][5].tolist() == [0, 1, 2]
        assert cells.uns["virtualcell"]["predicted_by"] == "ST"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing beside it


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_died_goes_on_behind_the_last_whole_portion(tmp_path, suffix):
    path = tmp_path / f"cells{suffix}"
    add(store_of(path), 0, 1)
    root = zarr.open_group(tmp_path / f"cells{suffix}.part", mode="r+")
    root["X/data"].append(np.full(7, 9, np.float32))  # of a portion that was not written to the end
    root["layers/counts/indptr"].append(np.full(3, 9))
    assert not path.exists()
    store = store_of(path)
    assert store.n_portions == 2
    add(store, 2)
    finish(store)
    check(path)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_places_that_are_the_same_are_packed_once(tmp_path, suffix):
    path = tmp_path / f"cells{suffix}"

    def store_of_both() -> CellStore:
        return CellStore(path, made_for="x", matrices=["X", "layers/counts"], n_genes=GENES, same_places=True)

    def add_both(store: CellStore, *numbers: int) -> None:
        for i in numbers:
            table = pd.DataFrame({"portion": np.full(N, i)}, index=[f"cell_{i}_{j}" for j in range(N)])
            store.add({"X": PORTIONS[i], "layers/counts": PORTIONS[i] * 7}, table, {"change": np.full(2, i)})

    add_both(store_of_both(), 0, 1)
    root = zarr.open_group(tmp_path / f"cells{suffix}.part", mode="r+")
    root["layers/counts/data"].append(np.full(7, 9, np.float32))
    assert list(root["layers/counts"]) == ["data"]
    store = store_of_both()
    add_both(store, 2)
    finish(store)
    read, whole = ad.read_zarr(path) if suffix == ".zarr" else ad.read_h5ad(path), sparse.vstack(PORTIONS)
    for cells in (read, opened(path).to_memory()):
        for found, factor in ((cells.X, 1), (cells.layers["counts"], 7)):
            assert found.has_canonical_format
            np.testing.assert_array_equal(found.toarray(), whole.toarray() * np.float32(factor))
    with pytest.raises(ValueError, match="layers/counts has entries at other places than X"):
        add(CellStore(tmp_path / "y.zarr", made_for="", matrices=["X", "layers/counts"], same_places=True), 0)


def test_a_folder_that_was_not_removed_to_the_end_is_not_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "cells.h5ad"
    store = store_of(path)
    add(store, 0, 1, 2)

    def died(folder: Path) -> None:
        (folder / "X" / "data" / "0").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", died)
        with pytest.raises(KeyboardInterrupt):
            finish(store)
    path.unlink()
    again = store_of(path)
    assert again.n_portions == 0
    add(again, 0, 1, 2)
    finish(again)
    check(path)


def test_what_is_there_stays(tmp_path):
    path = tmp_path / "cells.zarr"
    add(store_of(path), 0)
    with pytest.raises(ValueError, match=r"cells\.zarr\.part holds the begin of another result"):
        store_of(path, made_for="others")
    store = store_of(path)
    add(store, 1, 2)
    finish(store)
    with pytest.raises(FileExistsError, match=r"is there already\. Delete it, or name another file"):
        store_of(path)
    check(path)


def test_results_that_could_not_be_written_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.h5ad or \.zarr"):
        store_of(tmp_path / "cells.csv")
    with pytest.raises(FileNotFoundError, match="Make it first"):
        store_of(tmp_path / "missing" / "cells.zarr")
