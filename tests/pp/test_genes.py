from __future__ import annotations

import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from virtualcell.pp._genes import match_genes

IDS = ["ENSG00000115415.20", "ENSG00000096968", "ENSG00000136997.5", "ENSG00000141867"]
SYMBOLS = ["STAT1", "JAK2", "MYC", "BRD4"]


def genes(names: list[str], **columns: list) -> AnnData:
    return AnnData(np.ones((2, len(names)), np.float32), var=pd.DataFrame(columns, index=names))


def test_by_name_never_by_position() -> None:
    assert match_genes(genes(SYMBOLS), pd.Index(["MYC", "X", "STAT1"])).tolist() == [2, -1, 0, -1]


def test_versions_are_dropped_on_either_side() -> None:
    table = pd.Index(["ENSG00000096968.13", "ENSG00000115415", "ENSG00000136997.9"])
    assert match_genes(genes(IDS), table).tolist() == [1, 0, 2, -1]
    # Names that end in a number of their own are whole.
    adata = genes(["Y74C9A.6", "AC000001.1", "A"])
    assert match_genes(adata, pd.Index(["Y74C9A.2", "AC000001", "A"])).tolist() == [-1, -1, 2]


def test_stricter_ways_come_first(caplog: pytest.LogCaptureFixture) -> None:
    adata = genes(["Stat1", "STAT1", "c9orf72", "OLD", "MYC"])
    table = pd.Index(["STAT1", "C9orf72", "NEW", "MYC"])
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        rows = match_genes(adata, table, aliases={"OLD": "NEW", "MYC": "STAT1"})
    assert rows.tolist() == [-1, 0, 1, 2, 3]
    assert caplog.messages == [
        "4 of 5 genes of the data are in the gene table of 4 (2 by name, 1 by alias, 1 without regard to case).",
        "1 genes match the table only without regard to case: c9orf72 = C9orf72. Same species?",
    ]


def test_names_of_the_table_that_differ_only_in_case_are_left_alone() -> None:
    assert match_genes(genes(["ABC", "D"]), pd.Index(["Abc", "abc", "D"])).tolist() == [-1, 2]


def test_gene_key_with_missing_names() -> None:
    adata = genes(IDS, symbol=pd.Categorical(["STAT1", None, "MYC", "BRD4"]))
    assert match_genes(adata, pd.Index(["MYC", "nan", "None", "STAT1"]), gene_key="symbol").tolist() == [3, -1, 0, -1]
    with pytest.raises(KeyError, match=r"gene_key='symbols' is unknown. Did you mean 'symbol'\?"):
        match_genes(adata, pd.Index(["MYC"]), gene_key="symbols")


def test_no_match_names_the_column_that_would_fit() -> None:
    adata = genes(IDS, biotype=["protein_coding"] * 4, gene_symbols=[*SYMBOLS[:3], "NOVEL"])
    with pytest.raises(ValueError, match=r"Only 0 of 4 genes .*var\['gene_symbols'\] matches 75%") as error:
        match_genes(adata, pd.Index([*SYMBOLS, "OTHER"]))
    assert str(error.value).endswith("pass gene_key='gene_symbols'.")
    with pytest.raises(ValueError, match="var_names match 75%: leave gene_key out"):
        match_genes(adata, pd.Index([i.split(".")[0] for i in IDS[:3]]), gene_key="gene_symbols")
    with pytest.raises(ValueError, match="No column of var fits better: translate the names"):
        match_genes(adata, pd.Index(["FBgn0000001"]))


def test_a_handful_of_accidental_matches_is_an_error(kang_file: Path) -> None:
    adata = anndata.read_h5ad(kang_file)[:3].copy()
    adata.var["symbol"] = adata.var_names
    adata.var_names = ["ISG15", *(f"ENSG{i:011d}" for i in range(1, adata.n_vars))]
    with pytest.raises(ValueError, match=r"Only 1 of 6998 .*var\['symbol'\] matches 100%: pass gene_key='symbol'"):
        match_genes(adata, pd.Index(adata.var["symbol"]))
    # A small table that is found whole is not: coverage is of the smaller set.
    assert (match_genes(adata, pd.Index(["ISG15"])) >= 0).sum() == 1


def test_two_genes_for_one_row() -> None:
    adata = genes(IDS, symbol=["STAT1", "STAT1", "MYC", "BRD4"])
    with pytest.raises(ValueError, match=r"1 genes .*\['STAT1', 'STAT1'\] = 'STAT1'") as error:
        match_genes(adata, pd.Index(SYMBOLS), gene_key="symbol")
    remedy = "adata[:, ~adata.var['symbol'].duplicated()].copy()"
    assert remedy in str(error.value)
    assert match_genes(eval(remedy, {"adata": adata}), pd.Index(SYMBOLS), gene_key="symbol").tolist() == [0, 2, 3]

    adata = genes(["STAT1", "MYC", "STAT1"])
    with pytest.raises(ValueError, match=r"`adata.var_names_make_unique\(\)` keeps the first"):
        match_genes(adata, pd.Index(SYMBOLS))
    adata.var_names_make_unique()
    assert match_genes(adata, pd.Index(SYMBOLS)).tolist() == [0, 2, -1]

    with pytest.raises(ValueError, match="Drop all but one of each from the data"):
        match_genes(genes(["ENSG00000115415.1", "ENSG00000115415.2"]), pd.Index(["ENSG00000115415"]))
    with pytest.raises(ValueError, match=r"The gene table names 1 genes twice, among them \['MYC'\]"):
        match_genes(genes(["MYC"]), pd.Index(["MYC", "MYC"]))
