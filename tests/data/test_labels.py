from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import UnknownNameError
from virtualcell.data import _labels
from virtualcell.data._labels import Known, expression_modality, obs_column, parts, read_labels


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


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1, 2, 10], ["1", "2", "10"]),
        (["x", "y", "x"], ["x", "y", "x"]),
        (pd.Categorical(["x", "y", "x"], categories=["z", "y", "x"]), ["x", "y", "x"]),
        (pd.Categorical([3, 1, 3], categories=[1, 2, 3]), ["3", "1", "3"]),
        ([True, False, True], ["True", "False", "True"]),
        (pd.array(["x", "y", "x"], dtype="string"), ["x", "y", "x"]),
        (pd.array([1, 2, 1], dtype="Int64"), ["1", "2", "1"]),
        (np.array(["x", 1, True], dtype=object), ["x", "1", "True"]),
    ],
)
def test_labels_are_strings(adata: AnnData, column: object, expected: list[str]) -> None:
    adata.obs["label"] = column
    found = read_labels(adata, "label", argument="key")
    assert found.tolist() == expected
    assert {type(label) for label in found} == {str}
    assert list(found.index) == ["c1", "c2", "c3"]


@pytest.mark.parametrize(
    "column",
    [
        ["x", None, np.nan],
        [1.0, np.nan, np.nan],
        pd.Categorical(["x", None, None]),
        pd.array(["x", None, None], dtype="string"),
        pd.array([True, None, None], dtype="boolean"),
    ],
)
def test_no_label_may_be_missing(adata: AnnData, column: object) -> None:
    adata.obs["kind"] = column
    with pytest.raises(ValueError, match=r"context_key='kind': 2 cells have no label.*adata.obs\['kind'\].notna"):
        read_labels(adata, "kind", argument="context_key")


def test_cells_that_a_mudata_does_not_label_are_missing(mdata: MuData) -> None:
    mdata.obs["line"] = pd.Series({"c1": "K562", "c4": "RPE1"})
    with pytest.raises(ValueError, match=r"context_key='line': 2 cells have no label"):
        read_labels(mdata, "line", argument="context_key")
    mdata.obs["line"] = pd.Series({"c1": "K562", "c2": "A", "c3": "B"})  # protein alone may be without
    assert read_labels(mdata, "line", argument="context_key").tolist() == ["A", "B", "K562"]


def test_parts_of_a_label() -> None:
    assert parts("A+B", "ctrl") == ["A", "B"]
    assert parts("A+ctrl", "ctrl") == parts("ctrl+A", "ctrl") == ["A"]
    assert parts("ctrl", "ctrl") == []
    assert parts("ctrl+ctrl", "ctrl") == []
    assert parts("A") == ["A"]
    # a name with a plus of its own is one part where it is known
    assert parts("(+)-JQ1", "DMSO", ["(+)-JQ1"]) == ["(+)-JQ1"]
    assert parts("a+b", "a+b") == []


def test_known_names_are_taken_apart_once_however_often_they_are_asked_for(monkeypatch) -> None:
    """Predictions of thousands of perturbations ask for each of them several times."""
    known, cut = Known([f"A{i}+B{i}" for i in range(50)], "ctrl"), []
    assert known.parts("B7+A7") == ["A7+B7"]
    monkeypatch.setattr(_labels, "pieces", lambda name, separator="+": cut.append(name) or name.split("+"))
    assert known.parts("B9+A9") == ["A9+B9"]
    assert set(cut) <= {"B9+A9", "A9+B9"}


def test_parts_that_are_known() -> None:
    known = ["A", "B", "B+C", "D+ctrl"]
    assert Known(known, "ctrl").parts("A") == ["A"]
    assert Known(known, "ctrl").parts("B+C") == ["B+C"]
    assert Known(known, "ctrl").parts("C+B") == ["B+C"]  # the same, written in another order
    assert Known(known, "ctrl").parts("D") == Known(known, "ctrl").parts("ctrl+D") == ["D+ctrl"]
    assert Known(known, "ctrl").parts("A+B") == ["A", "B"]
    assert Known(known, "ctrl").parts("ctrl+A") == ["A"]
    assert Known(known, "ctrl").parts("X") == ["X"]
    assert Known(known, "ctrl").parts("ctrl") == []
