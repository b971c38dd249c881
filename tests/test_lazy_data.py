"""Data that is not in memory, through every call that reads expression: the results of the same data in memory."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import h5py
import mudata as md
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata.io import sparse_dataset
from scipy import sparse

import virtualcell as vc
from virtualcell.data import _copied
from virtualcell.data._expression import Expression
from virtualcell.tl._cells import CellsOnDisk

da = pytest.importorskip("dask.array")

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
FIT = {"n_top_genes": 30, "size": "small", "training": {"max_steps": 3, "accelerator": "cpu", "progress_bar": False}}


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path) -> Iterator[None]:
    # so little memory that every matrix is read in several blocks
    with vc.settings.override(cache_dir=tmp_path / "cache", max_memory=2e-5, progress=False):
        yield


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    adata = vc.datasets.synthetic(n_contexts=2, n_perturbations=4, n_genes=60, n_cells_per_group=25, n_control_cells=50)
    adata.X = sparse.csr_matrix(adata.X)
    adata.var["symbol"] = adata.var_names.to_numpy()
    return adata


def with_x(adata: ad.AnnData, x: object) -> ad.AnnData:
    return ad.AnnData(x, obs=adata.obs.copy(), var=adata.var.copy())


def written(adata: ad.AnnData, folder: Path, kind: Callable, suffix: str = "h5ad") -> Path:
    copy = with_x(adata, kind(adata.X))
    path = folder / f"cells.{suffix}"
    copy.write_h5ad(path) if suffix == "h5ad" else copy.write_zarr(path)
    return path


def dense(matrix: sparse.csr_matrix) -> np.ndarray:
    return matrix.toarray()


def backed(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.read_h5ad(written(adata, folder, sparse.csr_matrix), backed="r")


def backed_by_columns(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.read_h5ad(written(adata, folder, sparse.csc_matrix), backed="r")


def backed_dense(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.read_h5ad(written(adata, folder, dense), backed="r")


def lazy_h5ad(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.experimental.read_lazy(written(adata, folder, sparse.csr_matrix))


def lazy_by_columns(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.experimental.read_lazy(written(adata, folder, sparse.csc_matrix))


def lazy_zarr(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.experimental.read_lazy(written(adata, folder, sparse.csr_matrix, "zarr"))


def lazy_dense_zarr(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.experimental.read_lazy(written(adata, folder, dense, "zarr"))


def sparse_of_h5ad(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return with_x(adata, sparse_dataset(h5py.File(written(adata, folder, sparse.csr_matrix))["X"]))


def sparse_of_zarr(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return with_x(adata, sparse_dataset(zarr.open_group(written(adata, folder, sparse.csc_matrix, "zarr"))["X"]))


def array_of_h5(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return with_x(adata, h5py.File(written(adata, folder, dense))["X"])


def array_of_zarr(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return with_x(adata, zarr.open_group(written(adata, folder, dense, "zarr"))["X"])


def dask_dense(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return with_x(adata, da.from_array(adata.X.toarray(), chunks=(40, 25)))


def dask_sparse(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    blocks = da.from_array(adata.X.toarray(), chunks=(40, -1)).map_blocks(sparse.csr_matrix)
    return with_x(adata, blocks)


def of_zarr_3(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    with ad.settings.override(zarr_write_format=3):
        return ad.experimental.read_lazy(written(adata, folder, sparse.csr_matrix, "zarr"))


def dense_of_zarr_3(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    with ad.settings.override(zarr_write_format=3):
        return vc.pp.read_lazy(written(adata, folder, dense, "zarr"))


def dask_in_one_chunk(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return with_x(adata, da.from_array(adata.X.toarray(), chunks=adata.shape))


def dask_sparse_arrays(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return with_x(adata, da.from_array(adata.X.toarray(), chunks=(40, -1)).map_blocks(sparse.csr_array))


def backed_of_16_bits(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.read_h5ad(written(adata, folder, lambda x: x.astype(np.uint16)), backed="r")


def lazy_dense_of_16_bits(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.experimental.read_lazy(written(adata, folder, lambda x: x.toarray().astype(np.uint16)))


def by_columns_of_64_bits(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return vc.pp.read_lazy(written(adata, folder, lambda x: sparse.csc_matrix(x.astype(np.int64))))


def backed_float64(adata: ad.AnnData, folder: Path) -> ad.AnnData:
    return ad.read_h5ad(written(adata, folder, lambda x: x.astype(np.float64)), backed="r")


def in_mudata(adata: ad.AnnData, folder: Path) -> md.MuData:
    return md.MuData({"rna": with_x(adata, dask_sparse(adata, folder).X)})


def backed_mudata(adata: ad.AnnData, folder: Path) -> md.MuData:
    md.MuData({"rna": adata}).write(folder / "cells.h5mu")
    return md.read_h5mu(folder / "cells.h5mu", backed="r")


WHOLE = [
    backed, backed_by_columns, backed_dense, lazy_h5ad, lazy_by_columns, lazy_zarr, lazy_dense_zarr, sparse_of_h5ad,
    sparse_of_zarr, array_of_h5, array_of_zarr, dask_dense, dask_sparse, in_mudata, backed_mudata, of_zarr_3,
    dense_of_zarr_3, dask_in_one_chunk, dask_sparse_arrays, backed_of_16_bits, lazy_dense_of_16_bits,
    by_columns_of_64_bits, backed_float64,
]  # fmt: skip


def refuse_to_load(*_: object, **__: object) -> None:
    raise AssertionError("the whole matrix was loaded")


@pytest.fixture(scope="module")
def fitted(cells: ad.AnnData) -> dict[str, object]:
    """What comes of the calls below on data in memory."""
    adata = cells.copy()
    return {"results": results(adata), "adata": adata}


def results(data: ad.AnnData | md.MuData) -> dict[str, np.ndarray | pd.DataFrame]:
    """Numbers that come of every call that reads expression."""
    adata = data["rna"] if isinstance(data, md.MuData) else data
    vc.pp.split(data, **DESIGN, holdout={"fraction": 0.2})
    st = vc.tl.fit_state(data, **DESIGN, split_key="split", validate="cells", se={"max_steps": 2}, **FIT)
    names = st.perturbations[:2]
    predicted = vc.tl.predict_perturbation(data, names, context="type_1")
    table = vc.pp.knockdown_efficiency(data, **DESIGN)
    found = {
        "split": np.asarray(adata.obs["split"]).astype(str),
        "genes": np.array(st.genes),
        "embedding": np.asarray(adata.obsm["X_state"]),
        "predicted": predicted.X.toarray() if sparse.issparse(predicted.X) else predicted.X,
        "control": pd.DataFrame(predicted.obs["control_barcode"]).to_numpy(dtype=str),
        "scores": vc.tl.evaluate(predicted, data, scale="counts", suite="standard", genes=st.genes, ceiling=True),
        "all scores": vc.tl.evaluate(predicted, data, scale="counts", suite="full", genes=st.genes),
        "screen": vc.tl.screen(data, context="type_1"),
        "knockdown": table,
        "baseline": means(data, names, vc.tl.fit_baseline(data, "Additive", **DESIGN, n_top_genes=30)),
        "benchmark": vc.tl.benchmark(
            data, ["Additive"], **DESIGN, split_key="split", suite=["mae", "pearson_delta"], n_top_genes=30
        ),
        "vectors": vc.pp.expression_gene_embeddings(data, n_comps=5),
        "effects": vc.tl.effects(data, names[0], context="type_1"),
    }
    vc.tl.embed(data, st.se, key_added="again")
    found["again"] = np.asarray(adata.obsm["again"])
    vc.pp.cell_sentences(data, found["vectors"], length=8)
    found["sentences"] = np.asarray(adata.obsm["cell_sentence"])
    return found


def means(data: ad.AnnData | md.MuData, names: list[str], model: object) -> np.ndarray:
    predicted = vc.tl.predict_perturbation(data, names, model=model, emit="mean").X
    return predicted.toarray() if sparse.issparse(predicted) else predicted


def compare(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(found[name], value, rtol=1e-4, atol=1e-5, obj=name)
        elif value.dtype.kind in "fc":
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


# all others differ from these in nothing but how rows are read, which is tested for each below
@pytest.mark.parametrize("kind", [backed, lazy_by_columns, lazy_zarr, dask_sparse, backed_mudata])
def test_results_are_those_of_data_in_memory(
    kind: Callable, cells: ad.AnnData, fitted: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = kind(cells, tmp_path)
    kept = data["rna"].X if isinstance(data, md.MuData) else data.X
    monkeypatch.setattr(ad.AnnData, "to_memory", refuse_to_load)
    compare(results(data), fitted["results"])
    after = data["rna"].X if isinstance(data, md.MuData) else data.X
    assert type(after) is type(kept)


INDICES = [
    slice(None), slice(10, 130), slice(50, 3), slice(0, 200, 7), np.array([7, 199, 3, 3, 60]), np.zeros(0, int),
    np.arange(100)[::-1], np.array([5]),
]  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_rows_are_those_of_the_matrix_in_memory(kind: Callable, cells: ad.AnnData, tmp_path: Path) -> None:
    data = kind(cells, tmp_path)
    lazy = data["rna"] if isinstance(data, md.MuData) else data
    expected = Expression(cells, unit="counts").rows()
    expression = Expression(lazy, unit="counts")
    assert not expression.in_memory
    for found in (expression, expression.at_hand(), pickle.loads(pickle.dumps(expression.at_hand()))):
        for index in INDICES:
            block = found.rows(index)
            assert block.dtype == np.float32
            np.testing.assert_array_equal(block.toarray(), expected[index].toarray())
        whole = [block for _, block in found.blocks()]
        np.testing.assert_array_equal(sparse.vstack(whole).toarray(), expected.toarray())
    if kind in (backed, backed_dense, sparse_of_h5ad):  # others are read in the chunks that they have
        assert len(expression.slices()) > 1
    part = Expression(lazy, genes=cells.var_names[[40, 3, 7]]).take([90, 4, 150])
    np.testing.assert_array_equal(
        part.rows().toarray(),
        Expression(cells, genes=cells.var_names[[40, 3, 7]]).take([90, 4, 150]).rows().toarray(),
    )


@pytest.mark.parametrize("kind", [backed, backed_dense, backed_by_columns, lazy_h5ad, sparse_of_h5ad, dask_dense])
def test_views_are_read_without_what_they_leave_out(
    kind: Callable, cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = kind(cells, tmp_path)
    is_one = (cells.obs["cell_type"] == "type_1").to_numpy()
    monkeypatch.setattr(ad.AnnData, "to_memory", refuse_to_load)
    for rows, genes in ((is_one, slice(None)), (slice(3, 90), [9, 2, 30]), (np.array([60, 5, 17]), slice(4, 20))):
        view, here = data[rows, genes], cells[rows, genes].copy()
        for expression in (Expression(view), Expression(view).at_hand()):
            np.testing.assert_array_equal(expression.rows().toarray(), Expression(here).rows().toarray())
        assert view.is_view
    part = data[is_one]
    here = cells[is_one].copy()
    options = {**DESIGN, "se": False, "validate": False, "n_top_genes": 20, "size": "small"}
    options |= {"training": FIT["training"]}
    st, known = vc.tl.fit_state(part, **options), vc.tl.fit_state(here, **options)
    asked = {"model": st, "perturbation_key": "target_gene"}
    found = vc.tl.predict_perturbation(part, st.perturbations[0], **asked)
    expected = vc.tl.predict_perturbation(here, st.perturbations[0], **{**asked, "model": known})
    np.testing.assert_array_equal(found.layers["counts"].toarray(), expected.layers["counts"].toarray())


def test_results_are_not_written_to_views_of_files(
    cells: ad.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    view = backed(cells, tmp_path)[:150]
    options = {**DESIGN, "se": False, "validate": False, "n_top_genes": 20, "size": "small"}
    vc.tl.fit_state(view, **options, training=FIT["training"])
    assert "view of data that is not in memory, to which nothing can be written" in caplog.text
    assert view.is_view
    table = pd.DataFrame(np.eye(60, dtype=np.float32), index=cells.var_names)
    calls = [
        lambda: vc.pp.split(view, **DESIGN, holdout={"fraction": 0.2}),
        lambda: vc.pp.knockdown_efficiency(view, **DESIGN),
        lambda: vc.pp.cell_sentences(view, table),
        lambda: vc.tl.embed(view, vc.models.SE(cells, table)),
    ]
    vc.models.SE.setup_anndata(cells)
    for call in calls:
        with pytest.raises(ValueError, match=r"adata is a view of data that is not in memory.*adata\.to_memory\(\)"):
            call()


def test_scores_are_computed_in_portions(cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = backed(cells, tmp_path), []
    real = CellsOnDisk.portions

    def counted(self: CellsOnDisk, names: list[str]) -> Iterator[list[str]]:
        read.append(list(real(self, names)))
        yield from read[-1]

    monkeypatch.setattr(CellsOnDisk, "portions", counted)
    real_cells = cells[cells.obs["target_gene"] != "non-targeting"].copy()
    vc.tl.evaluate(real_cells, data, **DESIGN, scale="counts", predicted_scale="counts", suite=["de_overlap"])
    assert [len(portions) > 1 for portions in read] == [True, True]  # of the observed cells of two contexts


class Killed(BaseException):
    """The process dies."""


def test_a_copy_goes_on_after_a_kill_and_is_used_again(
    cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (backed, backed_by_columns):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        data = kind(cells, folder)
        read: list[int] = []
        real = _copied._write_block

        def counted(home: Path, i: int, block: object, read: list[int] = read, real: Callable = real) -> None:
            if len(read) == 2 and i not in read:
                read.append(-1)
                raise Killed
            read.append(i)
            real(home, i, block)

        with monkeypatch.context() as patch:
            patch.setattr(_copied, "_write_block", counted)
            with pytest.raises(Killed):
                Expression(data).at_hand()
            assert Expression(data).at_hand(make=False)._matrix.is_lazy  # what is not whole is not taken
            copy = Expression(data).at_hand()
            assert read[:3] == [0, 1, -1]
            assert read[3] == 2  # finished blocks are not made again
            n = len(read)
            again = Expression(ad.read_h5ad(folder / "cells.h5ad", backed="r"))
            np.testing.assert_array_equal(again.at_hand().rows().toarray(), copy.rows().toarray())
            assert len(read) == n
        np.testing.assert_array_equal(copy.rows().toarray(), Expression(cells).rows().toarray())
        data.file.close()


def test_a_file_that_was_written_anew_is_copied_anew(cells: ad.AnnData, tmp_path: Path) -> None:
    other = cells.copy()
    other.X = other.X * 2
    for suffix in ("h5ad", "zarr"):
        for adata in (cells, other):
            path = written(adata, tmp_path, sparse.csr_matrix, suffix)
            group = h5py.File(path) if suffix == "h5ad" else zarr.open_group(path)
            lazy = with_x(adata, sparse_dataset(group["X"]))
            found = Expression(lazy, unit="counts").at_hand().rows()
            np.testing.assert_array_equal(found.toarray(), adata.X.toarray())
            if suffix == "h5ad":
                group.close()


def test_copies_of_what_nothing_identifies_are_kept_for_the_session(cells: ad.AnnData, tmp_path: Path) -> None:
    expression = Expression(dask_sparse(cells, tmp_path))
    folder = expression.at_hand()._matrix.folder
    assert folder.name.startswith("session-")
    assert Expression(dask_sparse(cells, tmp_path)).at_hand()._matrix.folder == folder
    _copied._OF_SESSION.clear()
    assert not folder.exists()


def test_parts_and_arrays_that_are_alike_in_some_rows_are_copied_each() -> None:
    values = np.zeros((1000, 4), np.float32)
    values[1:9] = [1, 2, 3, 4]  # none of which is looked at to tell copies apart
    data, doubled = (ad.AnnData(da.from_array(x, chunks=(100, 4))) for x in (values, values * 2))
    for part, expected in ((data[:, :2], [8, 16]), (data[:, 2:], [24, 32]), (doubled[:, :2], [16, 32])):
        found = Expression(part, unit="counts").at_hand().rows()
        np.testing.assert_array_equal(found.toarray().sum(axis=0), expected)


def test_a_file_that_was_replaced_while_it_was_open(cells: ad.AnnData, tmp_path: Path) -> None:
    other = cells.copy()
    other.X = cells.X.toarray()
    other.X[1] += 1  # none of the rows that are looked at
    path = written(cells, tmp_path, sparse.csr_matrix)
    with h5py.File(path) as before:
        other.X = sparse.csr_matrix(other.X)
        other.write_h5ad(tmp_path / "other.h5ad")
        os.replace(tmp_path / "other.h5ad", path)
        with h5py.File(path) as now:
            for group, adata in ((before, cells), (now, other)):
                found = Expression(with_x(adata, sparse_dataset(group["X"])), unit="counts").at_hand().rows()
                np.testing.assert_array_equal(found.toarray(), adata.X.toarray())


def test_files_that_are_in_memory_or_of_another_folder(
    cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO(written(cells, tmp_path, sparse.csr_matrix).read_bytes())
    monkeypatch.chdir(tmp_path)
    path = next(tmp_path.glob("*.h5ad")).name
    with h5py.File(content) as in_memory, h5py.File(path) as file:
        monkeypatch.chdir("/")
        for group in (in_memory, file):
            expression = Expression(with_x(cells, sparse_dataset(group["X"])), unit="counts")
            np.testing.assert_array_equal(expression.at_hand().rows().toarray(), cells.X.toarray())


def test_values_keep_their_digits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for most, kind in ((200, np.uint8), (60_000, np.uint16), (100_000, np.float32), (0.5, np.float32)):
        values = rng.random((300, 20)) * most
        values = np.rint(values) if most > 1 else values
        adata = ad.AnnData(da.from_array(values.astype(np.float32), chunks=(30, 20)))
        copy = Expression(adata, unit="counts", scale="counts" if most > 1 else "log1p").at_hand()
        assert copy._matrix._block(0)[1].dtype == kind
        np.testing.assert_array_equal(copy._matrix.rows(None).toarray(), values.astype(np.float32))


def test_what_is_wrong_with_lazy_data_is_said(
    cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = with_x(cells, dask_sparse(cells, tmp_path).X * 0.5)
    halves.layers["raw"] = dask_sparse(cells, tmp_path).X
    with pytest.raises(ValueError, match=r"X holds fractions.*layers\['raw'\] holds whole numbers"):
        Expression(halves).rows()
    monkeypatch.setattr(_copied.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"has no room in .*vc\.settings\.cache_dir = path"):
        Expression(backed(cells, tmp_path)).at_hand()


def five_files(adata: ad.AnnData, folder: Path) -> list[Path]:
    """The cells in five files of several kinds, each with its genes in another order."""
    rng, paths = np.random.default_rng(0), []
    kinds = [(sparse.csr_matrix, "h5ad"), (sparse.csc_matrix, "h5ad"), (dense, "h5ad"), (sparse.csr_matrix, "zarr")]
    for i, rows in enumerate(np.array_split(np.arange(adata.n_obs), 5)):
        part = adata[rows, rng.permutation(adata.n_vars) if i else slice(None)].copy()
        (folder / f"plate{i}").mkdir()
        kind, suffix = kinds[i % 4]
        paths.append(written(part, folder / f"plate{i}", kind, suffix))
        paths[-1] = paths[-1].rename(folder / f"plate{i}.{suffix}")
    return paths


def test_files_with_genes_in_other_orders_are_one_data_set(cells: ad.AnnData, fitted: dict, tmp_path: Path) -> None:
    paths = five_files(cells, tmp_path)
    data = vc.pp.read_lazy(paths, label="plate")
    np.testing.assert_array_equal(data.var_names, cells.var_names)
    np.testing.assert_array_equal(data.obs_names, cells.obs_names)
    pd.testing.assert_frame_equal(data.obs[cells.obs.columns], cells.obs)
    assert data.obs["plate"].value_counts().to_dict() == {f"plate{i}": 60 for i in range(5)}
    expected = Expression(cells).rows().toarray()
    np.testing.assert_array_equal(Expression(data).rows().toarray(), expected)
    compare(results(data), fitted["results"])
    # the copy is found again, and no more when a file has changed
    folder = Expression(data).at_hand()._matrix.folder
    assert not folder.name.startswith("session-")
    assert Expression(vc.pp.read_lazy(paths)).at_hand(make=False)._matrix.folder == folder
    os.utime(paths[0], ns=(0, 0))
    assert Expression(vc.pp.read_lazy(paths)).at_hand(make=False)._matrix.is_lazy
    # results are written with the data
    data.write_h5ad(tmp_path / "all.h5ad")
    again = ad.read_h5ad(tmp_path / "all.h5ad")
    np.testing.assert_array_equal(again.obsm["X_state"], data.obsm["X_state"])
    np.testing.assert_array_equal(again.X.toarray(), cells.X.toarray())
    assert vc.tl.predict_perturbation(again, fitted["results"]["screen"].index[0], context="type_1").n_obs == 50


def test_what_files_lack_is_said(cells: ad.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = cells[:100].copy(), cells[100:, 10:].copy()
    two.obs_names = one.obs_names[:100].tolist() + two.obs_names[100:].tolist()
    del two.obs["cell_type"]
    one.layers["other"] = one.X.copy()
    one.write_h5ad(tmp_path / "one.h5ad")
    two.write_zarr(tmp_path / "two.zarr")
    data = vc.pp.read_lazy([tmp_path / "one.h5ad", tmp_path / "two.zarr"])
    assert data.shape == (300, 50)
    assert not data.layers
    assert "cell_type" not in data.obs
    assert "50 of 60 genes are in all files" in caplog.text
    assert "two.zarr lacks 10" in caplog.text
    assert "Columns of obs that a file lacks are left out, {'cell_type': ['two.zarr']}" in caplog.text
    assert data.obs_names[0] == f"{one.obs_names[0]}-one"
    assert data.obs_names.is_unique
    np.testing.assert_array_equal(data[150:].X.compute().toarray(), cells[150:, 10:].X.toarray())
    # one file
    assert vc.pp.read_lazy(tmp_path / "one.h5ad").layers["other"].shape == (100, 60)


def test_files_with_other_categories_and_the_same_cell_names_are_one_screen(cells: ad.AnnData, tmp_path: Path) -> None:
    """The second file holds labels as text and cells that are called like those of the first."""
    order = np.random.default_rng(0).permutation(cells.n_obs)
    parts = [cells[order[:170]].copy(), cells[order[170:]].copy()]
    parts[0].obs["cell_type"] = pd.Categorical(parts[0].obs["cell_type"], categories=["type_9", "type_2", "type_1"])
    parts[1].obs["target_gene"] = parts[1].obs["target_gene"].astype(str)
    parts[1].obs_names = parts[0].obs_names[: parts[1].n_obs]
    for i, part in enumerate(parts):
        part.write_h5ad(tmp_path / f"plate{i}.h5ad")
    data = vc.pp.read_lazy([tmp_path / "plate0.h5ad", tmp_path / "plate1.h5ad"], label="plate")
    part = data[::2][:, ::-1][5:]  # views of views
    whole = ad.AnnData(sparse.vstack([p.X for p in parts]).tocsr(), obs=data.obs.copy(), var=cells.var.copy())
    for found, expected in ((data, whole), (part, whole[::2][:, ::-1][5:].copy())):
        models = [
            vc.tl.fit_baseline(one, "Additive", **DESIGN, batch_key="plate", n_top_genes=30)
            for one in (found, expected)
        ]
        assert models[0].genes == models[1].genes
        assert models[0].contexts == models[1].contexts == ["type_1", "type_2"]
        for name, array in models[1].arrays.items():
            np.testing.assert_array_equal(models[0].arrays[name], array, err_msg=name)
        asked = {"perturbation": models[0].perturbations[:2], "context": "type_1"}
        counts = [
            vc.tl.predict_perturbation(one, model=model, **asked).layers["counts"].toarray()
            for one, model in zip((found, expected), models, strict=True)
        ]
        np.testing.assert_array_equal(*counts)


def test_files_that_do_not_go_together(cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "one.h5ad")
    other = cells.copy()
    other.var_names = [f"ENSG{i}" for i in range(60)]
    other.write_h5ad(tmp_path / "two.h5ad")
    other.var_names = ["a"] * 60
    other.write_h5ad(tmp_path / "three.h5ad")
    with pytest.raises(ValueError, match=r"no gene in common: .*'ENSG0'.*names of the same kind"):
        vc.pp.read_lazy([tmp_path / "one.h5ad", tmp_path / "two.h5ad"])
    with pytest.raises(ValueError, match=r"var_names of .*three.h5ad repeats \['a'.*make_unique"):
        vc.pp.read_lazy(tmp_path / "three.h5ad")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*four.h5ad"):
        vc.pp.read_lazy([tmp_path / "four.h5ad"])
    with pytest.raises(ValueError, match="names no file"):
        vc.pp.read_lazy([])


def test_damaged_files_are_named(cells: ad.AnnData, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "whole.h5ad")
    whole = (tmp_path / "whole.h5ad").read_bytes()
    for name, content in (("x", b"x" * 100), ("empty", b""), ("half", whole[: len(whole) // 2]), ("end", whole[:-10])):
        path = tmp_path / f"{name}.h5ad"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.h5ad is no h5ad file, or it is cut off or damaged \(OSError"):
            vc.pp.read_lazy([tmp_path / "whole.h5ad", path])
    for lost in ("X/indices", "obs/cell_type/codes", "obs/target_gene/categories"):
        cells.write_h5ad(tmp_path / "lost.h5ad")
        with h5py.File(tmp_path / "lost.h5ad", "r+") as file:
            del file[lost]
        with pytest.raises(ValueError, match=r"lost\.h5ad is no h5ad file, or it is cut off or damaged \(KeyError"):
            vc.pp.read_lazy(tmp_path / "lost.h5ad")
    for x in (np.zeros(5), np.zeros((300, 7)), np.zeros((299, 60))):
        with h5py.File(tmp_path / "whole.h5ad", "r+") as file:
            del file["X"]
            file["X"] = x
        with pytest.raises(ValueError, match=rf"whole\.h5ad is damaged: X has the shape \({x.shape[0]}.*\(300, 60\)"):
            vc.pp.read_lazy(tmp_path / "whole.h5ad")
    with h5py.File(tmp_path / "whole.h5ad", "r+") as file:
        del file["X"]
    with pytest.raises(ValueError, match=r"no matrix in common, .*: they hold \{'whole\.h5ad': \[\]\}"):
        vc.pp.read_lazy(tmp_path / "whole.h5ad")


def test_a_file_that_is_being_written_is_not_called_damaged(cells: ad.AnnData, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with (tmp_path / "cells.h5ad").open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match=r"cells\.h5ad is open for writing in another process"):
            vc.pp.read_lazy(tmp_path / "cells.h5ad")
    assert vc.pp.read_lazy(tmp_path / "cells.h5ad").shape == (300, 60)


def test_folders_that_are_no_zarr_store(cells: ad.AnnData, tmp_path: Path) -> None:
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ValueError, match=r"empty\.zarr is a folder, and no zarr store.*Name the files in it"):
        vc.pp.read_lazy(tmp_path / "empty.zarr")
    cells.write_zarr(tmp_path / "cells.zarr")
    shutil.rmtree(tmp_path / "cells.zarr" / "obs")
    with pytest.raises(ValueError, match=r"cells\.zarr is no zarr store of AnnData, or it is cut off or damaged"):
        vc.pp.read_lazy(tmp_path / "cells.zarr")


def test_mudata_is_told_and_the_remedy_works(
    cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = md.MuData({"adt": cells[:, :5].copy(), "rna": cells.copy()})
    both.write_h5mu(tmp_path / "both.h5mu")
    both.write_zarr(tmp_path / "both.zarr")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "both.h5mu", tmp_path / "both.zarr"):
        with pytest.raises(ValueError, match=r"is MuData, with the modalities \['adt', 'rna'\]\. `.*rna") as error:
            vc.pp.read_lazy(path)
        opened = eval(str(error.value).split("`")[1], {"vc": vc, "mudata": md})
        opened = vc.pp.read_lazy("rna.h5ad") if opened is None else opened
        np.testing.assert_array_equal(opened.X.compute().toarray(), cells.X.toarray())


def test_files_of_other_programs(tmp_path: Path) -> None:
    def written_with(name: str, *groups: str) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            for group in groups:
                file.create_group(group)
        return tmp_path / name

    for groups in (("matrix/barcodes", "matrix/features"), ("GRCh38/barcodes", "GRCh38/genes")):
        with pytest.raises(ValueError, match=r"is a file of 10x Genomics.*`scanpy\.read_10x_h5\(.*'filtered\.h5ad'\)`"):
            vc.pp.read_lazy(written_with("filtered.h5", *groups))
    with pytest.raises(ValueError, match=r"is a file of loom.*`anndata\.io\.read_loom\("):
        vc.pp.read_lazy(written_with("a.loom", "matrix", "col_attrs", "row_attrs"))
    with pytest.raises(ValueError, match=r"is no AnnData: it holds \['obs', 'stuff'\]"):
        vc.pp.read_lazy(written_with("b.h5ad", "obs", "stuff"))
    with pytest.raises(TypeError, match=r"paths= takes the path of a file, or a list of these, and not AnnData"):
        vc.pp.read_lazy([ad.AnnData(np.ones((2, 2)))])
    with pytest.raises(TypeError, match="not NoneType"):
        vc.pp.read_lazy(None)
