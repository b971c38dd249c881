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
from virtualcell._design import Design, expression_modality, labels, obs_column
from virtualcell._errors import UnknownNameError


@pytest.fixture
def adata() -> AnnData:
    obs = pd.DataFrame({"gene": ["A", "B", "ctrl"], "n": [1, 2, 3]}, index=["c1", "c2", "c3"])
    return AnnData(np.eye(3, dtype=np.float32), obs=obs)


@pytest.fixture
def mdata(adata: AnnData) -> MuData:
    """Modality rna has cells in its own order, and one cell less than the whole."""
    protein = AnnData(np.eye(4, dtype=np.float32), obs=pd.DataFrame(index=["c4", "c3", "c2", "c1"]))
    mdata = MuData({"rna": adata[["c2", "c3", "c1"]].copy(), "prot": protein})
    mdata.obs["donor"] = pd.Series({"c1": "d1", "c2": "d2", "c3": "d3", "c4": "d4"})
    return mdata


def test_modality(adata: AnnData, mdata: MuData) -> None:
    assert expression_modality(adata) is adata
    assert expression_modality(adata, "anything") is adata
    assert expression_modality(mdata) is mdata.mod["rna"]
    assert expression_modality(mdata, "prot") is mdata.mod["prot"]
    with pytest.raises(UnknownNameError, match=r"modality='RNA' is unknown. Did you mean 'rna'"):
        expression_modality(mdata, "RNA")
    with pytest.raises(TypeError, match=r"Expected an AnnData or a MuData, got DataFrame"):
        expression_modality(adata.obs)


def test_columns_are_aligned_to_the_cells_of_the_modality(adata: AnnData, mdata: MuData) -> None:
    pd.testing.assert_series_equal(obs_column(adata, "gene", argument="key"), adata.obs["gene"])
    assert obs_column(mdata, "gene", argument="key").to_dict() == {"c2": "B", "c3": "ctrl", "c1": "A"}
    donors = obs_column(mdata, "donor", argument="key")
    assert list(donors.items()) == [("c2", "d2"), ("c3", "d3"), ("c1", "d1")]
    # a column that MuData pulled up under the name of its modality
    mdata.obs["rna:pulled"] = pd.Series({"c1": 1.0, "c2": 2.0, "c3": 3.0})
    assert list(obs_column(mdata, "pulled", argument="key")) == [2, 3, 1]
    # the modality's own column wins
    mdata.obs["gene"] = "other"
    assert "other" not in set(obs_column(mdata, "gene", argument="key"))


def test_unknown_column(adata: AnnData, mdata: MuData) -> None:
    with pytest.raises(
        UnknownNameError, match=r"batch_key='Gene' is unknown. Did you mean 'gene'.*Name a column of obs"
    ):
        obs_column(adata, "Gene", argument="batch_key")
    with pytest.raises(UnknownNameError, match=r"batch_key='doner' is unknown. Did you mean 'donor'"):
        obs_column(mdata, "doner", argument="batch_key")


def test_labels_are_strings_and_none_is_missing(adata: AnnData) -> None:
    adata.obs["kind"] = pd.Categorical(["x", "y", "x"])
    assert list(labels(adata, "n", argument="key")) == ["1", "2", "3"]
    assert list(labels(adata, "kind", argument="key")) == ["x", "y", "x"]
    adata.obs.loc["c2", "kind"] = np.nan
    with pytest.raises(ValueError, match=r"context_key='kind': 1 cells have no label.*adata.obs\['kind'\].notna"):
        labels(adata, "kind", argument="context_key")


def test_design_survives_a_file(adata: AnnData, tmp_path: Path) -> None:
    design = Design("gene", "ctrl", context_key="n", library_size_key="n", target_sum=1e3)
    adata.uns[_keys.UNS] = {"design": design.to_uns()}
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    assert Design.from_data(read) == design
    assert Design(**json.loads(json.dumps(design.to_uns()))) == design


def test_what_is_stated_wins_over_what_was_left(adata: AnnData, mdata: MuData) -> None:
    left = Design("gene", "ctrl", context_key="n")
    for data, holder in ((adata, adata), (mdata, mdata.mod["rna"])):
        holder.uns[_keys.UNS] = {"design": left.to_uns()}
        assert Design.from_data(data, control="A", context_key=None) == Design("gene", "A", context_key="n")


def test_missing_design_says_what_to_give(adata: AnnData) -> None:
    with pytest.raises(ValueError, match=r"perturbation_key and control must be given.*fit_state"):
        Design.from_data(adata)
    with pytest.raises(ValueError, match=r"^control must be given"):
        Design.from_data(adata, perturbation_key="gene")
    with pytest.raises(ValueError, match=r"scale='lognorm' is unknown. Say 'counts'"):
        Design("gene", "ctrl", scale="lognorm")
