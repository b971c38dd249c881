"""Against the official preparers: cell-eval (2025) and vcc-cli (2026)."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from mudata import MuData
from scipy import sparse

import virtualcell as vc

N_CELLS = 12
CONTEXTS = ["type_1", "type_2"]
DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}


@pytest.fixture(scope="module")
def data() -> ad.AnnData:
    """Raw counts: 2 cell types x (4 targets of 20 cells, 30 controls) x 60 genes."""
    return vc.datasets.synthetic(
        n_contexts=2, n_perturbations=4, n_genes=60, n_cells_per_group=20, n_control_cells=30, seed=3
    )


@pytest.fixture(scope="module")
def names(data) -> list[str]:
    return sorted(set(data.obs["target_gene"]) - {"non-targeting"})


@pytest.fixture(scope="module")
def controls(data) -> ad.AnnData:
    return data[data.obs["target_gene"] == "non-targeting"].copy()


@pytest.fixture(scope="module")
def genes(data) -> list[str]:
    return list(data.var_names[np.random.default_rng(0).permutation(data.n_vars)])


@pytest.fixture(scope="module")
def session_predicted(data, names) -> ad.AnnData:
    work = data.copy()
    work.X = log1p_cp10k(data.X)
    vc.models.Additive.setup_anndata(work, **DESIGN)
    model = vc.models.Additive(work)
    model.train()
    return vc.tl.predict_perturbation(data, names, **DESIGN, model=model, scale="counts", n_cells=N_CELLS)


@pytest.fixture
def predicted(session_predicted) -> ad.AnnData:
    return session_predicted.copy()


@pytest.fixture
def write_2025(tmp_path, genes, controls) -> Callable[..., ad.AnnData]:
    def write(predicted, **changed):
        options = {"year": 2025, "genes": genes, "controls": controls} | changed
        return vc.tl.prepare_submission(predicted, tmp_path / "ours.vcc", overwrite=True, **options)

    return write


@pytest.fixture
def write_2026(tmp_path, genes, names, controls) -> Callable[..., ad.AnnData]:
    def write(predicted, **changed):
        options = {"year": 2026, "genes": genes, "perturbations": names, "contexts": CONTEXTS, "n_cells": N_CELLS}
        options = options | {"controls": controls} | changed
        return vc.tl.prepare_submission(predicted, tmp_path / "ours.vcc", overwrite=True, **options)

    return write


@pytest.fixture
def counts(write_2026, predicted) -> ad.AnnData:
    """A right submission of 2026, as cells."""
    return write_2026(predicted)


def log1p_cp10k(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    dense = counts.toarray()
    return sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4).astype(np.float32))


def read(path: Path) -> tuple[list[str], dict[str, bytes], ad.AnnData]:
    """Names of members in order, contents, and the cells, through another zstd than the one that wrote."""
    zstandard = pytest.importorskip("zstandard")
    with tarfile.open(path, "r:") as tar:
        order = tar.getnames()
        members = {name: tar.extractfile(name).read() for name in order}
    h5ad = io.BytesIO()
    zstandard.ZstdDecompressor().copy_stream(io.BytesIO(members["pred.h5ad.zst"]), h5ad)
    return order, members, ad.read_h5ad(h5ad)


def assert_same_cells(one: ad.AnnData, other: ad.AnnData, rtol: float = 0) -> None:
    assert sparse.isspmatrix_csr(one.X)
    assert sparse.isspmatrix_csr(other.X)
    assert one.X.dtype == other.X.dtype == np.float32
    assert one.X.nnz == other.X.nnz
    np.testing.assert_allclose(one.X.toarray(), other.X.toarray(), rtol=rtol)
    pd.testing.assert_frame_equal(one.obs, other.obs)
    pd.testing.assert_frame_equal(one.var, other.var)
    assert [*one.layers, *one.obsm, *one.uns] == []


# 2025


def test_2025_equals_the_file_of_cell_eval(write_2025, predicted, controls, genes, tmp_path):
    official = pytest.importorskip("cell_eval._cli._prep")
    if shutil.which("zstd") is None:
        pytest.skip("cell-eval needs the program zstd")
    both = ad.AnnData(
        np.vstack([predicted.X.toarray(), log1p_cp10k(controls.X).toarray()]),
        obs=pd.concat([predicted.obs, controls.obs])[["target_gene", "cell_type"]].astype(str),
        var=predicted.var,
    )
    official.strip_anndata(both, str(tmp_path / "theirs.vcc"), genes, celltype_col="cell_type", encoding=32)
    write_2025(predicted, context_key="cell_type")
    order, members, ours = read(tmp_path / "ours.vcc")
    their_order, their_members, theirs = read(tmp_path / "theirs.vcc")
    assert order == their_order == ["pred.h5ad.zst", "watermark.txt"]
    assert members["watermark.txt"] == their_members["watermark.txt"] == b"vcc-prep"
    assert_same_cells(ours, theirs, rtol=1e-6)
    assert ours.var_names.tolist() == genes
    assert ours.obs["target_gene"].value_counts()["non-targeting"] == controls.n_obs


def test_2025_passes_cell_eval_unchanged(write_2025, predicted, genes, tmp_path):
    official = pytest.importorskip("cell_eval._cli._prep")
    ours = write_2025(predicted)
    official.strip_anndata(ours.copy(), str(tmp_path / "theirs.vcc"), genes, encoding=32)
    assert_same_cells(read(tmp_path / "theirs.vcc")[2], ours)
    assert list(ours.obs) == ["target_gene"]


def test_2025_takes_controls_that_the_prediction_holds(write_2025, predicted, controls, names):
    work = controls.copy()
    work.X = log1p_cp10k(controls.X)
    together = ad.concat([predicted, work[:, predicted.var_names]], join="inner")
    design = {**DESIGN, "scale": "log1p"}
    del design["context_key"]
    one = write_2025(together, controls=None, **design)
    np.testing.assert_allclose(one.X.toarray(), write_2025(predicted).X.toarray(), rtol=1e-6)
    with pytest.raises(ValueError, match="controls= was given too"):
        write_2025(together, **design)
    with pytest.raises(ValueError, match="controls must be given"):
        write_2025(predicted, controls=None)
    with pytest.raises(ValueError, match=f"controls holds cells of '{names[0]}'"):
        write_2025(predicted, controls=together[together.obs["target_gene"].isin([names[0]])].copy(), **DESIGN)


def test_2025_refuses_what_cell_eval_refuses(write_2025, predicted, controls, genes, tmp_path, monkeypatch):
    official = pytest.importorskip("cell_eval._cli._prep")
    good = write_2025(predicted)
    stated = {"perturbation_key": "target_gene", "control": "non-targeting", "scale": "log1p", "controls": None}

    def refused(broken, match, **options):
        listed = options.get("genes", genes)
        with pytest.raises(ValueError, match=r"(?s)."):
            official.strip_anndata(broken.copy(), str(tmp_path / "theirs.vcc"), list(listed), encoding=32)
        with pytest.raises((ValueError, KeyError), match=match):
            write_2025(broken, **{**stated, **options})

    refused(good[:, 1:].copy(), "genes='.*1 of 60 genes are missing in predicted")
    refused(good, "var_names of predicted='.*1 genes are not in the list", genes=genes[1:])
    refused(good[good.obs["target_gene"] != "non-targeting"].copy(), "controls must be given")
    renamed = good.copy()
    renamed.obs.columns = ["gene"]
    refused(renamed, "perturbation_key='target_gene' is unknown")
    negative = good.copy()
    negative.X.data[0] = -0.5
    refused(negative, "negative")
    mixed = good.copy()
    mixed.X.data[:50] = np.expm1(mixed.X.data[:50])
    refused(mixed, "reaches .*: these are neither raw counts nor log")
    monkeypatch.setattr("virtualcell.tl._submission_checks._MAX_CELLS", {2025: 10})
    with pytest.raises(ValueError, match="exceeds maximum"):
        official.strip_anndata(good.copy(), str(tmp_path / "theirs.vcc"), genes, encoding=32, max_cell_dim=10)
    with pytest.raises(ValueError, match="holds up to 10 cells"):
        write_2025(good, **stated)


def test_2025_checks_the_list_of_perturbations_if_given(write_2025, predicted, names):
    write_2025(predicted, perturbations=[*names, "non-targeting"], n_cells=dict.fromkeys(names, 2 * N_CELLS))
    with pytest.raises(KeyError, match=f"'{names[0]}' is unknown.*not in the challenge's list"):
        write_2025(predicted, perturbations=names[1:])
    with pytest.raises(ValueError, match=f"n_cells=5: predicted has {2 * N_CELLS} cells"):
        write_2025(predicted, n_cells=5)
    with pytest.raises(KeyError, match="n_cells='"):
        write_2025(predicted, n_cells={names[0]: 2 * N_CELLS})
    with pytest.raises(ValueError, match="no meaning in year=2025"):
        write_2025(predicted, contexts=["A"])


# 2026


@pytest.fixture
def vcc_prep(tmp_path, genes, names) -> Callable[..., object]:
    """vcc-cli's own preparer on cells, with the challenge's lists as files."""
    official = pytest.importorskip("vcc.prep")
    pd.Series(genes, name="gene_name").to_csv(tmp_path / "gene_names.csv", index=False)
    pd.Series(names, name="target_gene").to_csv(tmp_path / "pert_counts.csv", index=False)

    def prep(cells, **options):
        cells.write_h5ad(tmp_path / "cells.h5ad")
        return official.run_prep(
            input_path=str(tmp_path / "cells.h5ad"),
            genes_path=str(tmp_path / "gene_names.csv"),
            perts_path=str(tmp_path / "pert_counts.csv"),
            output_path=str(tmp_path / "theirs.vcc"),
            required_contexts=tuple(CONTEXTS),
            cells_per_pert=N_CELLS,
            force=True,
            **options,
        )

    return prep


def test_2026_equals_the_file_of_vcc_cli(counts, vcc_prep, tmp_path):
    from vcc.vccfile import contexts_from_vcc, nnz_from_vcc, validate_vcc

    result = vcc_prep(counts)
    assert result.normalization == "counts-preserved"
    assert result.verified_targets
    order, members, ours = read(tmp_path / "ours.vcc")
    their_order, their_members, theirs = read(tmp_path / "theirs.vcc")
    assert order == their_order == ["meta.json", "pred.h5ad.zst"]
    assert_same_cells(ours, theirs)
    assert_same_cells(ours, counts)
    meta, their_meta = json.loads(members["meta.json"]), json.loads(their_members["meta.json"])
    assert meta.pop("written_by").startswith("virtualcell ")
    their_meta.pop("cli_version")
    assert meta == their_meta
    validate_vcc(tmp_path / "ours.vcc")
    assert nnz_from_vcc(tmp_path / "ours.vcc") == ours.X.nnz
    assert contexts_from_vcc(tmp_path / "ours.vcc") == tuple(CONTEXTS)


def test_2026_is_accepted_as_counts_by_the_scorer(counts):
    norm = pytest.importorskip("cell_eval2.norm")
    norm.validate_input_type(counts, "counts", allow_fractional=False)


def test_2026_counts_have_the_depth_of_the_control_cell_and_the_mean_of_the_prediction(
    write_2026, predicted, controls, genes
):
    depth = pd.Series(controls.X.toarray().sum(axis=1), controls.obs_names)[predicted.obs["control_barcode"]]
    own = write_2026(predicted)
    np.testing.assert_array_equal(own.X.toarray(), predicted[:, genes].layers["counts"].toarray())
    np.testing.assert_array_equal(own.X.toarray().sum(axis=1), depth)
    assert_same_cells(write_2026(predicted, controls=None), own)
    counts = write_2026(predicted, sampling="systematic")
    np.testing.assert_array_equal(counts.X.toarray().sum(axis=1), depth)
    share = np.expm1(predicted[:, genes].X.toarray().astype(np.float64))
    expected = share / share.sum(axis=1, keepdims=True) * depth.to_numpy()[:, None]
    assert (np.abs(counts.X.toarray() - expected) < 1).all()
    assert counts.obs["context"].tolist() == predicted.obs["cell_type"].tolist()
    many = np.mean([write_2026(predicted, seed=s, sampling="multinomial").X.toarray() for s in range(40)], axis=0)
    z = (many - expected) / np.sqrt(expected / 40 + 1e-9)
    assert np.sqrt(np.mean(z[expected > 1] ** 2)) == pytest.approx(1, abs=0.05)


def test_2026_the_averaged_file_has_less_scatter_than_cells_and_the_same_means(write_2026, predicted, genes):
    cells, averages = (write_2026(predicted, sampling=how).X.toarray() for how in ("systematic", "averaged"))
    np.testing.assert_array_equal(averages, np.rint(averages))
    np.testing.assert_array_equal(averages.sum(axis=1), cells.sum(axis=1))
    group = predicted.obs.groupby(["target_gene", "cell_type"], observed=True).ngroup().to_numpy()
    means = {g: [x[group == g].mean(axis=0) for x in (cells, averages)] for g in set(group)}
    scatter = [x - np.stack([means[g][i] for g in group]) for i, x in enumerate((cells, averages))]
    high = cells.mean(axis=0) > 5
    assert np.median(scatter[1][:, high].var(axis=0) / scatter[0][:, high].var(axis=0)) < 0.6
    np.testing.assert_allclose(averages.mean(axis=0)[high], cells.mean(axis=0)[high], rtol=0.1)


def test_2026_depths_may_be_given(write_2026, predicted):
    predicted.obs["depth"] = np.arange(100, 100 + predicted.n_obs)
    by_column = write_2026(predicted, controls=None, depths="depth")
    np.testing.assert_array_equal(by_column.X.toarray().sum(axis=1), predicted.obs["depth"])
    by_array = write_2026(predicted, controls=None, depths=predicted.obs["depth"].to_numpy())
    assert_same_cells(by_column, by_array)
    for depths, match in (
        ([10], "one number for each of 96 cells"),
        (np.full(predicted.n_obs, 0.5), "whole numbers from 1"),
        (np.full(predicted.n_obs, 2_000_000), "more than 1000000 counts"),
    ):
        with pytest.raises(ValueError, match=match):
            write_2026(predicted, controls=None, depths=depths)
    del predicted.layers["counts"]
    with pytest.raises(ValueError, match="controls or depths must be given"):
        write_2026(predicted, controls=None)


def test_2026_order_of_genes_and_seed(write_2026, predicted, controls, genes, tmp_path):
    write_2026(predicted)
    first = (tmp_path / "ours.vcc").read_bytes()
    order = np.random.default_rng(5).permutation(predicted.n_vars)
    write_2026(predicted[:, order].copy(), controls=controls[:, order[::-1]].copy())
    assert (tmp_path / "ours.vcc").read_bytes() == first
    drawn = [write_2026(predicted, seed=seed, sampling="multinomial").X for seed in (0, 1)]
    assert (drawn[0] != drawn[1]).nnz
    other = write_2026(predicted, genes=genes[::-1])
    np.testing.assert_array_equal(other[:, genes].X.toarray(), read_back(first).X.toarray())


def read_back(content: bytes) -> ad.AnnData:
    zstandard = pytest.importorskip("zstandard")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        packed = tar.extractfile("pred.h5ad.zst").read()
    return ad.read_h5ad(io.BytesIO(zstandard.ZstdDecompressor().decompressobj().decompress(packed)))


def drop_gene(cells):
    return cells[:, 1:].copy()


def add_gene(cells):
    more = sparse.hstack([cells.X, np.ones((cells.n_obs, 1), np.float32)], format="csr")
    return ad.AnnData(more, obs=cells.obs, var=pd.DataFrame(index=[*cells.var_names, "OTHER"]))


def repeat_gene(cells):
    cells.var_names = [cells.var_names[1], *cells.var_names[1:]]
    return cells


def rename_context(cells):
    cells.obs["context"] = cells.obs["context"].astype(str).replace("type_2", "B")
    return cells


def drop_context(cells):
    return cells[cells.obs["context"] != "type_2"].copy()


def no_context(cells):
    del cells.obs["context"]
    return cells


def drop_perturbation(cells):
    return cells[cells.obs["target_gene"] != cells.obs["target_gene"].iloc[0]].copy()


def construct_label(cells):
    first = cells.obs["target_gene"].iloc[0]
    cells.obs["target_gene"] = cells.obs["target_gene"].astype(str).replace(first, f"{first}-1")
    return cells


def drop_cell(cells):
    return cells[1:].copy()


def with_controls(cells):
    cells.obs["target_gene"] = cells.obs["target_gene"].astype(str)
    cells.obs.loc["0", "target_gene"] = "non-targeting"
    return cells


def negative(cells):
    cells.X.data[0] = -3
    return cells


def fractional(cells):
    cells.X.data[0] = 2.7
    return cells


def not_a_number(cells):
    cells.X.data[0] = np.nan
    return cells


def empty_perturbation(cells):
    silent = (cells.obs["target_gene"] == cells.obs["target_gene"].iloc[0]).to_numpy()
    cells.X = sparse.csr_matrix(cells.X.multiply(~silent[:, None]), dtype=np.float32)
    return cells


def too_deep(cells):
    cells.X.data[0] = 1_000_001
    return cells


def no_cells(cells):
    return cells[:0].copy()


def broken_rows(cells):
    cells.X.indptr[1], cells.X.indptr[2] = cells.X.indptr[2], cells.X.indptr[1]
    return cells


def broken_columns(cells):
    cells.X.indices[0] = cells.n_vars + 7
    return cells


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (drop_gene, "genes='.*1 of 60 genes are missing in predicted"),
        (add_gene, "var_names of predicted='OTHER'.*1 genes are not in the list"),
        (repeat_gene, "var_names of predicted repeats 'GENE"),
        (rename_context, r"predicted.obs\['context'\]='B' is unknown.*Known: 'type_1', 'type_2'"),
        (drop_context, "predicted has no cells of .'type_2'"),
        (no_context, "context_key='context' is unknown"),
        (drop_perturbation, "1 of 4 are not predicted in context 'type_1'"),
        (construct_label, r"predicted.obs\['target_gene'\]='(.*)-1' is unknown. Did you mean '\1'"),
        (drop_cell, "n_cells=12: predicted has 11 cells of '.*' in context 'type_1'"),
        (with_controls, "1 cells of control='non-targeting'"),
        (negative, "negative"),
        (fractional, "scale='counts' was stated, but X of predicted holds fractions"),
        (not_a_number, "NaN"),
        (empty_perturbation, "zero throughout"),
        (too_deep, "1 cells of more than 1000000 counts"),
        (no_cells, "no cells"),
        (broken_rows, "X of predicted is a broken sparse matrix"),
        (broken_columns, "X of predicted is a broken sparse matrix"),
    ],
)
def test_2026_refuses_what_vcc_cli_refuses(counts, vcc_prep, write_2026, tmp_path, spoil, match):
    from vcc.prep import PrepError

    broken = spoil(counts.copy())
    with pytest.raises(PrepError):
        vcc_prep(broken)
    (tmp_path / "ours.vcc").unlink()
    stated = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "context"}
    with pytest.raises((ValueError, KeyError), match=match):
        write_2026(broken, controls=None, **stated)
    assert not (tmp_path / "ours.vcc").exists()
    assert write_2026(counts, controls=None, **stated).n_obs == counts.n_obs  # what is not broken goes through both
    assert vcc_prep(counts, dry_run=True).n_cells == counts.n_obs


def test_2026_refuses_too_many_cells_and_values(counts, write_2026, monkeypatch):
    stated = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "context", "controls": None}
    monkeypatch.setattr("virtualcell.tl._submission_checks._MAX_STORED_2026", counts.X.nnz - 1)
    with pytest.raises(ValueError, match="values other than 0"):
        write_2026(counts, **stated)
    monkeypatch.setattr("virtualcell.tl._submission_checks._MAX_CELLS", {2026: 10})
    with pytest.raises(ValueError, match="holds up to 10 cells"):
        write_2026(counts, **stated)


def test_the_limits_are_the_official_ones():
    _prep = pytest.importorskip("cell_eval._cli._prep")
    prep = pytest.importorskip("vcc.prep")

    from virtualcell.tl import _submission_checks as ours

    assert {2025: _prep.MAX_CELL_DIM, 2026: prep.MAX_CELL_DIM} == ours._MAX_CELLS
    assert {2025: _prep.EXPECTED_GENE_DIM, 2026: prep.EXPECTED_GENE_DIM} == ours._N_GENES
    assert prep.EXPECTED_CELLS_PER_PERT == ours._N_CELLS_2026
    assert prep.MAX_NNZ == ours._MAX_STORED_2026
    assert prep.MAX_COUNTS_PER_CELL == ours._MAX_TOTAL_2026


def test_2026_lists_as_columns_of_a_table(write_2026, predicted, names, genes, counts):
    lists = {"perturbations": pd.Series(names), "contexts": pd.Series(CONTEXTS), "genes": pd.Series(genes)}
    assert_same_cells(write_2026(predicted, **lists), counts)


def test_2026_counts_are_written_as_they_are(write_2026, counts, genes):
    stated = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "context"}
    again = write_2026(counts, controls=None, **stated)
    assert_same_cells(again, counts)
    assert not np.shares_memory(again.X.data, counts.X.data)


def test_lists_by_context(write_2026, predicted, names):
    other = predicted[~((predicted.obs["cell_type"] == "type_2") & (predicted.obs["target_gene"] == names[0]))].copy()
    listed = {"type_1": names, "type_2": names[1:]}
    assert write_2026(other, perturbations=listed).n_obs == 7 * N_CELLS
    with pytest.raises(KeyError, match=r"contexts='type_2'.*no list for it"):
        write_2026(other, perturbations={"type_1": names})


# both


def test_from_fit_state_with_genes_that_are_not_predicted(fitted, targets, design, tmp_path, caplog):
    predicted = vc.tl.predict_perturbation(fitted, targets, n_cells=10)
    controls = fitted[fitted.obs["target_gene"] == "non-targeting"].copy()
    genes, contexts = list(fitted.var_names), sorted(fitted.obs["cell_type"].unique())
    options = {"genes": genes, "controls": controls}
    with pytest.raises(KeyError, match=r"30 of 90 genes are missing in predicted\. Fit with n_top_genes=None"):
        vc.tl.prepare_submission(predicted, tmp_path / "a.vcc", year=2025, **options)
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        log = vc.tl.prepare_submission(predicted, tmp_path / "a.vcc", year=2025, missing_genes="control", **options)
    assert "30 of 90 genes are not predicted" in caplog.text
    of_model = log[: predicted.n_obs, predicted.var_names].X.toarray()
    np.testing.assert_allclose(of_model, predicted.X.toarray(), rtol=1e-6)
    rest = [g for g in genes if g not in predicted.var_names]
    started = controls.obs_names.get_indexer(predicted.obs["control_barcode"])
    np.testing.assert_allclose(
        log[: predicted.n_obs, rest].X.toarray(),
        log1p_cp10k(controls.X)[started][:, controls.var_names.get_indexer(rest)].toarray(),
        rtol=1e-5,
    )
    counts = vc.tl.prepare_submission(
        predicted,
        tmp_path / "b.vcc",
        year=2026,
        missing_genes="control",
        perturbations=targets,
        contexts=contexts,
        n_cells=10,
        **options,
    )
    np.testing.assert_array_equal(
        counts.X.toarray().sum(axis=1), controls.X[started].sum(axis=1).A1, err_msg="depths of the control cells"
    )


def test_controls_that_were_divided_by_other_totals_are_refused(fitted, targets, tmp_path):
    predicted = vc.tl.predict_perturbation(fitted, targets, n_cells=10)
    genes = list(predicted.var_names)
    controls = fitted[fitted.obs["target_gene"] == "non-targeting", genes].copy()
    del controls.uns["virtualcell"]
    where = {"year": 2025, "genes": genes, "controls": controls}
    with pytest.raises(ValueError, match=r"controls differs by up to .* from layers\['control'\] of predicted"):
        vc.tl.prepare_submission(predicted, tmp_path / "a.vcc", **where)
    all_genes = fitted[fitted.obs["target_gene"] == "non-targeting"].copy()
    controls.layers["log"] = log1p_cp10k(all_genes.X)[:, all_genes.var_names.get_indexer(genes)]
    how = {"controls_layer": "log", "controls_scale": "log1p"}
    vc.tl.prepare_submission(predicted, tmp_path / "a.vcc", **where, **how)


def test_no_change_gives_the_control_cells_back(data, controls, names, write_2026, genes):
    work = data.copy()
    work.X = log1p_cp10k(data.X)
    vc.models.NoChange.setup_anndata(work, **DESIGN)
    model = vc.models.NoChange(work)
    model.train()
    same = vc.tl.predict_perturbation(data, names, **DESIGN, model=model, scale="counts", n_cells=N_CELLS)
    real = controls[same.obs["control_barcode"], genes].X.toarray()
    np.testing.assert_array_equal(write_2026(same).X.toarray(), real)
    drawn = write_2026(same, sampling="systematic").X.toarray()
    assert (drawn == real).all(axis=1).mean() > 0.95


def test_other_names_of_columns_and_control(data, write_2025, predicted, controls):
    def renamed(cells):
        cells = cells.copy()
        cells.obs = cells.obs.rename(columns={"target_gene": "guide"})
        cells.obs["guide"] = cells.obs["guide"].astype(str).replace("non-targeting", "ctrl")
        return cells

    ours = write_2025(
        renamed(predicted), controls=renamed(controls), perturbation_key="guide", control="ctrl", scale="log1p"
    )
    assert_same_cells(ours, write_2025(predicted))


def test_controls_as_mudata(write_2025, predicted, controls):
    assert_same_cells(write_2025(predicted, controls=MuData({"rna": controls})), write_2025(predicted))


def test_input_is_not_changed(write_2025, write_2026, predicted, controls, session_predicted):
    before = controls.copy()
    write_2025(predicted)
    write_2026(predicted)
    np.testing.assert_array_equal(predicted.X.toarray(), session_predicted.X.toarray())
    pd.testing.assert_frame_equal(predicted.obs, session_predicted.obs)
    assert (controls.X != before.X).nnz == 0


def test_errors_of_the_call(write_2025, write_2026, predicted, controls, genes, tmp_path):
    def call(path="a.vcc", **options):
        vc.tl.prepare_submission(
            predicted, tmp_path / path, **{"year": 2025, "genes": genes, "controls": controls} | options
        )

    call()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        call()
    assert [p.name for p in tmp_path.iterdir()] == ["a.vcc"]  # nothing is left beside it
    with pytest.raises(ValueError, match=r"path='.*a.h5ad' must end in '.vcc'"):
        call("a.h5ad")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        call("nowhere/a.vcc")
    with pytest.raises(ValueError, match="year=2024 is unknown"):
        call("b.vcc", year=2024)
    with pytest.raises(ValueError, match="genes repeats"):
        call("b.vcc", genes=[*genes, genes[0]])
    with pytest.raises(KeyError, match=r"missing_genes='zero' is unknown\. Did you mean 'error'"):
        call("b.vcc", missing_genes="zero")
    with pytest.raises(ValueError, match="sampling='multinomial' has no meaning in year=2025"):
        call("b.vcc", sampling="multinomial")
    with pytest.raises(ValueError, match="perturbations must be given"):
        write_2026(predicted, perturbations=None)
    with pytest.raises(ValueError, match="contexts must be given in 2026"):
        write_2026(predicted, contexts=None)
    with pytest.raises(TypeError, match="contexts='ABC' must be a list"):
        write_2026(predicted, contexts="ABC")
    with pytest.raises(KeyError, match="sampling='poisson' is unknown"):
        write_2026(predicted, sampling="poisson")
    with pytest.raises(ValueError, match="predicted holds counts already"):
        write_2026(controls_as_prediction(predicted, controls), scale="counts")
    with pytest.raises(KeyError, match=r"control_barcode=.*is unknown"):
        write_2026(predicted, controls=controls[5:].copy())
    log = controls.copy()
    log.X = log1p_cp10k(controls.X)
    with pytest.raises(ValueError, match="controls_scale='log1p'"):
        write_2026(predicted, controls=log, controls_scale="log1p")
    predicted.obs = predicted.obs.drop(columns="control_barcode")
    with pytest.raises(KeyError, match="no 'control_barcode'"):
        write_2026(predicted)


def controls_as_prediction(predicted, controls):
    rows = controls.obs_names.get_indexer(predicted.obs["control_barcode"])
    counts = predicted.copy()
    counts.X = controls[rows, predicted.var_names].X
    return counts
