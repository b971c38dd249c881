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
