from __future__ import annotations

import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import virtualcell as vc
from virtualcell.pp._genes import match_genes

GENES = ["STAT1", "NA", "1E5", "MYC", "JAK2"]
VALUES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
TABLE = pd.DataFrame(VALUES, index=pd.Index(GENES, name="gene"), columns=["a", "b", "c"])


def test_arcs_file(golden: Path) -> None:
    path = golden / "se" / "protein_embeddings.pt"
    frame = vc.pp.read_gene_embeddings(path)
    expected = torch.load(path, weights_only=True)
    assert list(frame.index) == list(expected)
    assert frame.index.name == "gene"
    np.testing.assert_array_equal(frame.to_numpy(), torch.stack(list(expected.values())).numpy())
    assert (frame.dtypes == np.float32).all()
    # 20 of its 200 genes have no vector.
    cells = anndata.read_h5ad(golden / "se" / "cells.h5ad")
    assert (match_genes(cells, frame.index) >= 0).sum() == 180


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # NA is the name of a gene here, not a missing value.
    table = pd.DataFrame(
        rng.normal(size=(4, 3)).astype(np.float32), index=["STAT1", "NA", "nan", "MYC"], columns=["a", "b", "c"]
    )
    table.to_parquet(tmp_path / "index.parquet")
    table.rename_axis("gene").reset_index().to_parquet(tmp_path / "column.parquet")
    table.to_csv(tmp_path / "first.csv")
    table.assign(gene=table.index).to_csv(tmp_path / "named.csv.gz", index=False)
    np.savez(tmp_path / "t.npz", genes=np.array(table.index, dtype=str), embeddings=table.to_numpy())
    AnnData(table.to_numpy(), obs=table[[]], var=table.T[[]]).write_h5ad(tmp_path / "t.h5ad")
    torch.save(
        {g: torch.tensor(v).bfloat16() for g, v in zip(table.index, table.to_numpy(), strict=True)}, tmp_path / "t.pt"
    )
    for path in tmp_path.iterdir():
        frame = vc.pp.read_gene_embeddings(str(path))
        assert list(frame.index) == list(table.index), path
        np.testing.assert_allclose(frame.to_numpy(), table.to_numpy(), atol=2e-2 if path.suffix == ".pt" else 1e-7)


def test_real_feature_tables(kang_file: Path) -> None:
    path = kang_file.parent / "gene_features_reactome_svd64.parquet"
    frame = vc.pp.read_gene_embeddings(path)
    assert frame.shape == (10826, 64)
    assert frame.index.name == "gene"
    np.testing.assert_array_equal(frame.loc["STAT1"], pd.read_parquet(path).set_index("gene").loc["STAT1"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"gene": ["A", "B", "A"], "x": [1.0, 2, 3]}), r"names 1 genes twice, among them \['A'\]"),
        (pd.DataFrame({"gene": ["A"], "x": [1.0], "kind": ["kinase"]}), r"columns that are not numbers: \['kind'\]"),
        (pd.DataFrame({"gene": ["A", "B"], "x": [1.0, np.nan]}), r"NaN or infinite values for 1 genes.*\['B'\]"),
        (pd.DataFrame({"gene": ["A", None], "x": [1.0, 2]}), "1 rows without the name of a gene"),
        (pd.DataFrame({"gene": ["A"]}), r"holds no gene vectors \(shape \(1, 0\)\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_bad_tables(tmp_path: Path, table: pd.DataFrame, message: str, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    with pytest.raises(ValueError, match=message):
        vc.pp.read_gene_embeddings(path)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown suffix. Known: .pt, .parquet, .csv, .npz, .h5ad, .csv.gz"):
        vc.pp.read_gene_embeddings(tmp_path / "table.tsv")
    with pytest.raises(FileNotFoundError, match=r"none\.pt' does not exist"):
        vc.pp.read_gene_embeddings(tmp_path / "none.pt")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.csv' is a folder"):
        vc.pp.read_gene_embeddings(tmp_path / "folder.csv")
    torch.save({"A": torch.ones(2), "B": torch.ones(3)}, tmp_path / "lengths.pt")
    with pytest.raises(ValueError, match=r"vectors of different lengths: \[2, 3\]"):
        vc.pp.read_gene_embeddings(tmp_path / "lengths.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dictionary"):
        vc.pp.read_gene_embeddings(tmp_path / "list.pt")
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    with pytest.raises(ValueError, match=r"'genes' and 'embeddings', but holds \['x'\]"):
        vc.pp.read_gene_embeddings(tmp_path / "other.npz")
    pd.DataFrame({"x": [1.0]}).to_parquet(tmp_path / "nameless.parquet")
    with pytest.raises(ValueError, match="no column 'gene', and its index holds no names"):
        vc.pp.read_gene_embeddings(tmp_path / "nameless.parquet")


def read(path: Path, text: str) -> pd.DataFrame:
    path.write_text(text)
    return vc.pp.read_gene_embeddings(path)


def of_remedy(error: pytest.ExceptionInfo, which: int = -1) -> str:
    """The code between backticks in a message."""
    return re.findall("`([^`]+)`", str(error.value))[which]


@pytest.mark.parametrize(
    "rows",
    [
        pd.RangeIndex(5),
        pd.RangeIndex(1, 6),  # as R counts
        pd.Index([7, 2, 40, 3, 11]),  # of a table that was cut and sorted
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_an_index_that_was_written_along_is_no_feature(tmp_path: Path, rows: pd.Index, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    table = TABLE.reset_index().set_index(rows)
    table.to_csv(path) if suffix != ".parquet" else table.rename_axis("index").reset_index().to_parquet(path)
    np.testing.assert_array_equal(vc.pp.read_gene_embeddings(path), VALUES)
    twice = tmp_path / "twice.csv"
    table.to_csv(twice)
    pd.read_csv(twice, keep_default_na=False).to_csv(twice)
    found = vc.pp.read_gene_embeddings(twice)
    assert list(found.columns) == ["a", "b", "c"]
    assert list(found.index) == GENES


def test_a_first_column_without_a_name_holds_the_names_unless_it_counts_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    TABLE.rename_axis(None).set_axis([5, 10, 200], axis=1).to_csv(path)
    found = vc.pp.read_gene_embeddings(path)
    assert list(found.index) == GENES
    assert list(found.columns) == ["5", "10", "200"]
    TABLE.set_axis([1000, 1001, 1002, 3, 7]).to_csv(path)  # Entrez
    assert list(vc.pp.read_gene_embeddings(path).index) == ["1000", "1001", "1002", "3", "7"]
    for text in (TABLE.reset_index(drop=True).to_csv(), TABLE.rename_axis("symbol").reset_index().to_csv()):
        with pytest.raises(ValueError, match=r"its first one only counts the rows\. Call the column with the names"):
            read(path, text)
    with pytest.raises(ValueError, match=r"holds numbers such as '0\.1257.*' in its column 'a', where the names"):
        read(path, TABLE.to_csv(index=False))
    with pytest.raises(
        ValueError, match=r"has 1 columns without a name, with values such as 'nan'\. Commas at the ends"
    ):
        read(path, "gene,a,\nSTAT1,1,\nMYC,2,\n")


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    for text in (TABLE.to_csv(header=False), TABLE.reset_index().to_csv(header=False), "MYC,1,0,1\nSTAT1,0,1,1\n"):
        with pytest.raises(ValueError, match=r"table\.csv has no header: it begins with \['.*that of the genes 'gene'"):
            read(tmp_path / "table.csv", text)
    # in the order of their text
    columns = [str(i) for i in sorted(range(12), key=str)]
    wide = pd.DataFrame(np.ones((2, 12)), index=pd.Index(["A", "B"], name="symbol"), columns=columns)
    assert list(read(tmp_path / "table.csv", wide.to_csv()).columns) == columns


def test_names_above_other_columns_than_their_own_are_refused(tmp_path: Path) -> None:
    for text in ("gene,a\nMYC,1,\nJAK2,2,\n", "a,b\nMYC,1,2\nJAK2,2,3\n", "# vectors\ngene,a\nMYC,1\n"):
        with pytest.raises(ValueError, match="rows with more values than its first line has names"):
            read(tmp_path / "table.csv", text)


@pytest.mark.parametrize("separator", [";", "\t", " ", "|"])
@pytest.mark.parametrize("name", ["gene", None])
def test_another_separator_is_named_and_the_remedy_works(tmp_path: Path, separator: str, name: str | None) -> None:
    path = tmp_path / "table.csv"
    TABLE.drop("NA").rename_axis(name).to_csv(path, sep=separator)
    with pytest.raises(ValueError, match=re.escape(f"it is separated by {separator!r}, and not by ','")) as error:
        vc.pp.read_gene_embeddings(path)
    eval(of_remedy(error), {"pd": pd})
    np.testing.assert_array_equal(vc.pp.read_gene_embeddings(path), TABLE.drop("NA"))


def test_decimal_commas_are_named(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    TABLE.drop("NA").to_csv(path, sep=";", decimal=",")
    with pytest.raises(ValueError, match="separated by ';'") as error:
        vc.pp.read_gene_embeddings(path)
    eval(of_remedy(error), {"pd": pd})
    with pytest.raises(ValueError, match=r"such as '0,1257\d*'\. Read them with `pd\.read_csv\(\.\.\., decimal=','\)`"):
        vc.pp.read_gene_embeddings(path)


def test_spaces_around_names_are_no_part_of_them(tmp_path: Path) -> None:
    assert list(read(tmp_path / "table.csv", "gene,a\n MYC ,1\nJAK2 ,2\n").index) == ["MYC", "JAK2"]
    with pytest.raises(ValueError, match=r"names 1 genes twice, among them \['MYC'\]"):
        read(tmp_path / "table.csv", "gene,a\n MYC,1\nMYC,2\n")


def test_tensors_of_a_trained_network_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table.pt"
    trained = torch.tensor(VALUES, requires_grad=True)
    rows = dict(zip(GENES, trained * 1, strict=True))
    for table in (
        rows,
        {gene: torch.nn.Parameter(row.detach().clone()) for gene, row in rows.items()},
        {gene: row.detach().clone().requires_grad_() for gene, row in rows.items()},
        {gene.encode(): row.detach() for gene, row in rows.items()},
    ):
        torch.save(table, path)
        found = vc.pp.read_gene_embeddings(path)
        np.testing.assert_array_equal(found, VALUES)
        assert list(found.index) == GENES


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {("MYC", "iso1"): torch.ones(2)},
            r"names a gene \('MYC', 'iso1'\), of several parts\. Give each row one name",
        ),
        ({"A": torch.ones(2), ("B", "x"): torch.ones(2)}, r"names a gene \('B', 'x'\), of several parts"),
        ({1.5: torch.ones(2)}, r"names a gene 1\.5\. Give each row one name, which is text"),
        ({"weight": torch.ones(3, 2)}, r"'weight' is a tensor of shape \(3, 2\)\. Write it anew"),
        ({"A": torch.ones(2, dtype=torch.complex64)}, r"'A' is a tensor of shape \(2,\) of complex numbers"),
        ({"A": np.ones(2)}, r"'A' is an array\. Write it anew: `torch\.save"),
        ({"A": [1.0, 2.0]}, "'A' is of type list"),
    ],
)
def test_dictionaries_of_something_else(tmp_path: Path, table: dict, message: str) -> None:
    torch.save(table, tmp_path / "table.pt")
    with pytest.raises(ValueError, match=message):
        vc.pp.read_gene_embeddings(tmp_path / "table.pt")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            TABLE.set_axis(pd.MultiIndex.from_product([GENES, ["x"]])),
            r"names a gene \('STAT1', 'x'\), of several parts",
        ),
        (TABLE.set_axis(pd.MultiIndex.from_product([["v"], list("abc")]), axis=1), r"several parts, as \('v', 'a'\)"),
        (
            pd.DataFrame({"gene": ["A"], "esm": [[1.0, 2.0]]}),
            r"Give each value a column: `pd\.DataFrame\(table\['esm'\]",
        ),
        (pd.DataFrame({"gene": [1.0, 2.5], "a": [1, 2]}), r"names a gene 1\.0\. Give each row one name, which is text"),
    ],
)
def test_parquet_files_of_another_layout(tmp_path: Path, table: pd.DataFrame, message: str) -> None:
    path = tmp_path / "table.parquet"
    table.to_parquet(path)
    with pytest.raises(ValueError, match=message):
        vc.pp.read_gene_embeddings(path)


def test_arrays_of_objects_and_of_other_shapes(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    genes, embeddings = np.array(GENES, dtype=object), VALUES.astype(object)
    np.savez(path, genes=genes, embeddings=VALUES)
    with pytest.raises(ValueError, match="holds 'genes' as Python objects, which are not read") as error:
        vc.pp.read_gene_embeddings(path)
    np.savez(path, embeddings=embeddings, **eval(f"dict({of_remedy(error)})", {"genes": genes}))
    with pytest.raises(ValueError, match="holds 'embeddings' as Python objects") as error:
        vc.pp.read_gene_embeddings(path)
    names = {"embeddings": embeddings, "np": np}
    np.savez(path, genes=genes.astype(str), **eval(f"dict({of_remedy(error)})", names))
    pd.testing.assert_frame_equal(vc.pp.read_gene_embeddings(path).set_axis(["a", "b", "c"], axis=1), TABLE)
    for shape, other in (((4,), (5, 3)), ((5, 1), (5, 3)), ((5,), (5,)), ((5,), (5, 3, 1))):
        np.savez(path, genes=np.full(shape, "A"), embeddings=np.ones(other))
        with pytest.raises(ValueError, match=re.escape(f"and their shapes are {shape} and {other}.")):
            vc.pp.read_gene_embeddings(path)


def test_vectors_beside_an_empty_matrix(tmp_path: Path) -> None:
    path, obs = tmp_path / "table.h5ad", pd.DataFrame(index=GENES)
    for table in (AnnData(obs=obs), AnnData(np.zeros((5, 0)), obs=obs)):
        table.write_h5ad(path)
        with pytest.raises(ValueError, match=r"has no values in X.*Nor has it any in obsm or varm"):
            vc.pp.read_gene_embeddings(path)
        table.obsm["X_esm"] = VALUES
        table.write_h5ad(path)
        with pytest.raises(ValueError, match=r"no values in X.* obsm holds \['X_esm'\]: give a table") as error:
            vc.pp.read_gene_embeddings(path)
        names: dict = {"anndata": anndata, "pd": pd}
        exec(of_remedy(error, 0), names)
        np.testing.assert_array_equal(eval(of_remedy(error, 1), names).loc[GENES], VALUES)
    AnnData(var=obs, varm={"esm": VALUES}).write_h5ad(path)
    with pytest.raises(ValueError, match=r"varm holds \['esm'\].*index=adata\.var_names"):
        vc.pp.read_gene_embeddings(path)
