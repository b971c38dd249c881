from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pandas as pd
import pytest

import virtualcell as vc

GTF = """\
#!genome-build GRCh38
chr1\tHAVANA\tgene\t100\t900\t.\t+\t.\tgene_id "ENSG01.4"; gene_type "protein_coding"; gene_name "AA"; level 2;
chr1\tHAVANA\ttranscript\t100\t900\t.\t+\t.\tgene_id "ENSG01.4"; gene_name "AA"; transcript_id "ENST1";
chr1\tHAVANA\tgene\t1500\t2500\t.\t-\t.\tgene_id "ENSG02.1"; gene_name "BB";
chr2\tHAVANA\tgene\t10\t20\t.\t-\t.\tgene_id "ENSG03";
chrX\tHAVANA\tgene\t400\t500\t.\t+\t.\tgene_id "ENSG04.1"; gene_name "PAR";
chrY\tHAVANA\tgene\t300\t500\t.\t+\t.\tgene_id "ENSG04.1_PAR_Y"; gene_name "PAR";
chr3\tHAVANA\tgene\t1000\t5000\t.\t+\t.\tgene_id "ENSG05"; gene_name "NEARBY";
chr3\tHAVANA\tgene\t1300\t5000\t.\t+\t.\tgene_id "ENSG06"; gene_name "NEARBY";
chr3\tHAVANA\tgene\t1000\t5000\t.\t+\t.\tgene_id "ENSG07"; gene_name "APART";
chr3\tHAVANA\tgene\t9000\t9900\t.\t+\t.\tgene_id "ENSG08"; gene_name "APART";
chr4\tHAVANA\tgene\t1000\t5000\t.\t+\t.\tgene_id "ENSG09"; gene_name "TWO_CHR";
chr5\tHAVANA\tgene\t1000\t5000\t.\t+\t.\tgene_id "ENSG10"; gene_name "TWO_CHR";
"""


@pytest.fixture
def gtf(tmp_path: Path) -> Path:
    path = tmp_path / "genes.gtf"
    path.write_text(GTF)
    return path


def test_a_gene_starts_at_its_end_on_the_minus_strand(gtf):
    found = vc.pp.gene_positions(gtf)
    assert found.loc["AA"].to_dict() == {"chromosome": "chr1", "start": 100, "strand": "+", "gene_id": "ENSG01"}
    assert found.loc["BB", ["start", "strand"]].tolist() == [2500, "-"]
    assert found.loc["ENSG03", "start"] == 20  # it has no name
    assert found.index.name == "gene"
    assert found.index.is_monotonic_increasing


def test_a_name_at_several_places_has_none(gtf, caplog):
    with caplog.at_level(logging.INFO):
        found = vc.pp.gene_positions(gtf)
    assert "2 names stand for genes at several places and are left out, such as APART, TWO_CHR" in caplog.text
    assert not {"APART", "TWO_CHR"} & set(found.index)
    assert found.loc["PAR", ["chromosome", "start"]].tolist() == ["chrX", 400]
    assert found.loc["NEARBY", "start"] == 1000


def test_the_order_and_the_compression_of_the_file_do_not_matter(gtf, tmp_path):
    lines = GTF.splitlines(keepends=True)
    with gzip.open(tmp_path / "turned.gtf.gz", "wt") as file:
        file.writelines([lines[0], *lines[:0:-1]])
    pd.testing.assert_frame_equal(vc.pp.gene_positions(gtf), vc.pp.gene_positions(tmp_path / "turned.gtf.gz"))


def test_tables_of_several_kinds(gtf, tmp_path):
    found = vc.pp.gene_positions(gtf)
    pd.testing.assert_frame_equal(vc.pp.gene_positions(found), found)
    found.to_csv(tmp_path / "genes.csv.gz")
    pd.testing.assert_frame_equal(vc.pp.gene_positions(tmp_path / "genes.csv.gz"), found)
    table = pd.DataFrame(
        {"Symbol": ["NA", "B"], "chrom": [1, 1], "start": [5, 10], "end": [9, 30], "strand": ["+", "-"]}
    )
    table.to_csv(tmp_path / "genes.tsv", sep="\t", index=False)
    for given in (table, tmp_path / "genes.tsv"):
        found = vc.pp.gene_positions(given)
        assert found["start"].to_dict() == {"NA": 5, "B": 30}
        assert found["chromosome"].tolist() == ["1", "1"]
        assert "gene_id" not in found


def test_the_reference_of_10x(positions_file):
    found = vc.pp.gene_positions(positions_file)
    assert len(found) > 36_000
    assert found.loc["STAT1", ["chromosome", "start", "gene_id"]].tolist() == ["chr2", 191020960, "ENSG00000115415"]
    assert "CYB561D2" not in found.index  # twice, 15 kb apart
    assert found.loc["HSPA14", "start"] == 14838160  # twice, 146 bp apart


def test_errors(tmp_path, gtf):
    with pytest.raises(FileNotFoundError, match=r"missing\.gtf' does not exist"):
        vc.pp.gene_positions(tmp_path / "missing.gtf")
    (tmp_path / "genes.gff3").write_text("")
    with pytest.raises(ValueError, match=r"neither an annotation \(\.gtf\) nor a table \(\.tsv, \.txt, \.csv\)"):
        vc.pp.gene_positions(tmp_path / "genes.gff3")
    gtf.write_text(GTF.replace("\tgene\t", "\texon\t"))
    with pytest.raises(ValueError, match=r"no rows of the feature 'gene'.*GENCODE or Ensembl"):
        vc.pp.gene_positions(gtf)
    gtf.write_text(GTF.replace("\t900\t", "\tnine\t"))
    with pytest.raises(ValueError, match=r"genes\.gtf, line 2: a gene needs nine fields"):
        vc.pp.gene_positions(gtf)
    table = pd.DataFrame({"gene": ["A"], "chr": ["1"], "start": [1], "end": [2]})
    with pytest.raises(ValueError, match="a gene on the strand - starts at its end: give a column strand"):
        vc.pp.gene_positions(table)
    with pytest.raises(ValueError, match="none of which is the start of the gene: rename one to 'tss'"):
        vc.pp.gene_positions(table[["gene", "chr"]])
    with pytest.raises(ValueError, match="none of which is the chromosome: rename one to 'chromosome'"):
        vc.pp.gene_positions(table[["gene", "start"]])
    with pytest.raises(ValueError, match=r"column 'tss' holds 1\.5; positions are whole numbers"):
        vc.pp.gene_positions(table[["gene", "chr"]].assign(tss=1.5))
    with pytest.raises(ValueError, match=r"1 rows without a gene or a chromosome\. Drop them"):
        vc.pp.gene_positions(table[["gene", "start"]].assign(chr=None))
    with pytest.raises(ValueError, match="gtf has no rows"):
        vc.pp.gene_positions(table[:0])


@pytest.fixture
def small() -> pd.DataFrame:
    return pd.DataFrame({"gene": ["A", "B"], "chromosome": ["1", "chr2"], "tss": [1, 5]})


@pytest.mark.parametrize("backend", ["pyarrow", "numpy_nullable"])
def test_types_of_pandas_extensions(small, backend):
    expected = vc.pp.gene_positions(small)
    assert expected["start"].tolist() == [1, 5]
    for tss in ([1, 5], [1.0, 5.0]):
        table = small.assign(tss=tss).convert_dtypes(convert_floating=False, dtype_backend=backend)
        pd.testing.assert_frame_equal(vc.pp.gene_positions(table), expected)
    table = small.assign(tss=[1, None]).convert_dtypes(dtype_backend=backend)
    with pytest.raises(ValueError, match="column 'tss' holds <NA>; positions are whole numbers"):
        vc.pp.gene_positions(table)
    table = small.drop(columns="tss").assign(start=1, end=9, strand=["+", "-"]).convert_dtypes(dtype_backend=backend)
    assert vc.pp.gene_positions(table)["start"].tolist() == [1, 9]


def test_a_column_that_is_there_twice(small):
    for twice in (
        pd.concat([small, small[["gene"]]], axis=1),
        pd.concat([small, small[["tss"]] + 1], axis=1),
        small.assign(Gene=["X", "Y"]),
        small.assign(a="+", b="-").rename(columns={"a": "strand", "b": "strand"}),
    ):
        with pytest.raises(ValueError, match=r"gtf has the columns \['\w+', '\w+'\], of which one is needed") as error:
            vc.pp.gene_positions(twice)
        kept = eval(str(error.value).split("`")[1], {"table": twice})
        assert vc.pp.gene_positions(kept)["start"].tolist() == [1, 5]
    # of columns that are not looked at there may be two
    assert vc.pp.gene_positions(small.assign(a=1, b=2).rename(columns={"a": "x", "b": "x"}))["start"].tolist() == [1, 5]


def test_a_chromosome_has_one_name(caplog):
    table = pd.DataFrame({"gene": ["A", "A", "B", "C"], "chromosome": ["chr1", "1", "chr1", "chr2"]}).assign(
        tss=[300, 500, 10, 20]
    )
    with caplog.at_level(logging.INFO):
        found = vc.pp.gene_positions(table)
    assert found.to_dict("index") == {
        "A": {"chromosome": "1", "start": 300},
        "B": {"chromosome": "1", "start": 10},
        "C": {"chromosome": "chr2", "start": 20},
    }
    assert "several places" not in caplog.text
    found = vc.pp.gene_positions(table.assign(gene=[" A", "A ", 7.0, "C"], chromosome=[1.0, "1", " 1", "X "]))
    assert found["chromosome"].to_dict() == {"7": "1", "A": "1", "C": "X"}


def test_where_nothing_would_be_left(small):
    with pytest.raises(ValueError, match="1 names stand for genes at several places, such as A, and there are no oth"):
        vc.pp.gene_positions(small.assign(gene="A"))
    with pytest.raises(ValueError, match="1 rows without a gene or a chromosome"):
        vc.pp.gene_positions(small.assign(gene=["A", " "]))


@pytest.mark.parametrize(
    ("tss", "message"),
    [
        ([True, False], "is of the type bool; positions are whole numbers"),
        ([1j, 2], "is of the type complex128"),
        ([1e300, 2], r"holds 1e\+300; positions are whole numbers"),
    ],
)
def test_what_is_no_position(small, tss, message):
    with pytest.raises(ValueError, match=message):
        vc.pp.gene_positions(small.assign(tss=tss))


def test_tables_in_text_that_are_not_what_they_seem(small, tmp_path):
    path = tmp_path / "genes.csv"
    small.to_csv(path, sep=";", index=False)
    with pytest.raises(ValueError, match=r"genes\.csv has one column.*it is separated by ';', and not by ','") as error:
        vc.pp.gene_positions(path)
    eval(str(error.value).split("`")[1], {"pd": pd})
    assert vc.pp.gene_positions(path)["start"].tolist() == [1, 5]
    path.write_text("gene,chromosome,tss\nA,1,1,x\nB,2,5,y\n")
    with pytest.raises(ValueError, match="rows with more values than its first line has names"):
        vc.pp.gene_positions(path)
    with pytest.raises(TypeError, match="gtf= takes the path of a file or a DataFrame, and not dict"):
        vc.pp.gene_positions({"gene": ["A"]})
