from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell.data._design import Design, check_library_sizes, check_scale, note_design, noted_design


@pytest.fixture
def adata() -> AnnData:
    obs = pd.DataFrame({"gene": ["A", "B", "ctrl"], "n": [1, 2, 3]}, index=["c1", "c2", "c3"])
    return AnnData(np.eye(3, dtype=np.float32), obs=obs)


@pytest.fixture
def mdata(adata: AnnData) -> MuData:
    return MuData({"rna": adata.copy(), "prot": AnnData(np.eye(3, dtype=np.float32), obs=adata.obs[[]])})


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_design_survives_a_file(adata: AnnData, tmp_path: Path, kind: str) -> None:
    design = Design("gene", "ctrl", context_key="n", library_size_key="n", target_sum=1e3, n_genes=7)
    adata.uns[_keys.UNS] = {"design": design.to_uns()}
    getattr(adata, f"write_{kind}")(tmp_path / f"a.{kind}")
    read = getattr(ad, f"read_{kind}")(tmp_path / f"a.{kind}")
    assert Design.from_data(read) == design
    assert Design(**json.loads(json.dumps(design.to_uns()))) == design


def test_split_and_embedding_belong_to_a_model_and_are_not_noted() -> None:
    noted = Design("gene", "ctrl", split_key="split", use_rep="X_state", batch_key="lane").to_uns()
    assert noted == {
        "perturbation_key": "gene", "control": "ctrl", "batch_key": "lane", "scale": "counts", "target_sum": 1e4,
        "combination_separator": "+",
    }  # fmt: skip


def test_another_column_of_perturbations_has_labels_of_its_own(adata: AnnData) -> None:
    note_design(adata, {"perturbation_key": "drug", "control": "DMSO", "dose_key": "dose", "context_key": "n"})
    with pytest.raises(ValueError, match="control must be given"):
        Design.from_data(adata, perturbation_key="gene")
    assert Design.from_data(adata, perturbation_key="gene", control="ctrl") == Design("gene", "ctrl", context_key="n")
    assert Design.from_data(adata, perturbation_key="drug").dose_key == "dose"
    note_design(adata, {"perturbation_key": "gene"})
    assert noted_design(adata) == {"perturbation_key": "gene", "context_key": "n"}


def test_what_is_stated_wins_over_what_was_noted(adata: AnnData, mdata: MuData) -> None:
    noted = Design("gene", "ctrl", context_key="n")
    for data, holder in ((adata, adata), (mdata, mdata.mod["rna"])):
        assert noted_design(data) == {}
        holder.uns[_keys.UNS] = {"design": noted.to_uns()}
        assert Design.from_data(data, control="A", context_key=None) == Design("gene", "A", context_key="n")


def test_missing_design_says_what_to_give(adata: AnnData) -> None:
    with pytest.raises(ValueError, match=r"perturbation_key and control must be given.*fit_state"):
        Design.from_data(adata)
    with pytest.raises(ValueError, match=r"^control must be given"):
        Design.from_data(adata, perturbation_key="gene")


def test_scale_and_library_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"scale='lognorm' is unknown. Say 'counts'"):
        Design("gene", "ctrl", scale="lognorm")
    with pytest.raises(ValueError, match=r"predicted_scale='lognorm' is unknown"):
        check_scale("lognorm", "predicted_scale")
    with pytest.raises(ValueError, match=r"library_size_key='depth' has no use with scale='log1p'"):
        check_library_sizes("log1p", "depth")
    check_library_sizes("counts", "depth")
    check_library_sizes("log1p", None)
    counts = Design("gene", "ctrl")
    assert counts.restated(library_size_key="depth", layer=None) == Design("gene", "ctrl", library_size_key="depth")
    with pytest.raises(ValueError, match="has no use"):
        counts.restated(library_size_key="depth", scale="log1p")


def test_predicted_cells_have_their_expression_in_x() -> None:
    design = Design("gene", "ctrl", "line", "lane", "split", "symbol", "X_state", "raw", library_size_key="depth")
    assert design.of_predicted() == Design("gene", "ctrl", "line", scale="log1p")
    assert design.of_predicted("counts") == Design("gene", "ctrl", "line", library_size_key="depth")
    assert design.plain() == Design("gene", "ctrl", "line", layer="raw", library_size_key="depth")


def test_a_statement_replaces_what_goes_with_it(adata: AnnData) -> None:
    note_design(adata, {"control": ["ctrl", "mock"], "scale": "counts", "layer": "raw", "library_size_key": "n"})
    noted = noted_design(adata)
    assert (noted["control"], list(noted["other_controls"])) == ("ctrl", ["mock"])
    note_design(adata, {"batch_key": "lane"})
    assert noted_design(adata)["layer"] == "raw"
    note_design(adata, {"control": "mock", "scale": "log1p"})  # of X, where nothing is divided by library sizes
    assert noted_design(adata) == {"control": "mock", "scale": "log1p", "batch_key": "lane"}


def test_controls_in_a_set_can_be_written(adata: AnnData, tmp_path: Path) -> None:
    note_design(adata, {"perturbation_key": "gene", "control": {"mock", "ctrl"}})
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = Design.from_data(ad.read_h5ad(tmp_path / "a.h5ad"))
    assert found.controls == ("ctrl", "mock")


def test_another_scale_is_that_of_another_matrix(adata: AnnData) -> None:
    note_design(adata, {"perturbation_key": "gene", "control": "ctrl", "scale": "counts", "layer": "raw"})
    note_design(adata, {"library_size_key": "n"})
    same = Design.from_data(adata, scale="counts")
    assert (same.layer, same.library_size_key) == ("raw", "n")
    other = Design.from_data(adata, scale="log1p")
    assert (other.layer, other.library_size_key) == (None, None)
    assert Design.from_data(adata, scale="log1p", layer="logs").layer == "logs"
