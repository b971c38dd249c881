from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell import _reading
from virtualcell.models._features import PerturbationTable
from virtualcell.pp import _relations


@pytest.fixture(scope="module")
def data(kang_file) -> Path:
    return kang_file.parent


def columns_agree(found: pd.DataFrame, expected: pd.DataFrame) -> float:
    """Least correlation of a component with its counterpart: scale and sign mean nothing."""
    pairs = zip(found.to_numpy(dtype=float).T, expected.to_numpy(dtype=float).T, strict=True)
    return min(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs)


def write(path: Path, lines: list[str]) -> Path:
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def pathways(n: int = 12, size: int = 10, seed: int = 0) -> dict[str, list[str]]:
    """Sets that overlap by half with the next one."""
    return {f"SET{s}": [f"G{s * size // 2 + i:03d}" for i in range(size)] for s in range(n)}


def gmt(sets: dict[str, list[str]]) -> list[str]:
    return ["\t".join([name, "http://somewhere", *genes]) for name, genes in sets.items()]


def blocks(n_blocks: int = 3, size: int = 12, seed: int = 0) -> pd.DataFrame:
    """A network of dense blocks with few links between them."""
    rng = np.random.default_rng(seed)
    genes = [f"G{b}_{i:02d}" for b in range(n_blocks) for i in range(size)]
    block = np.repeat(np.arange(n_blocks), size)
    a, b = np.triu_indices(len(genes), 1)
    linked = rng.random(len(a)) < np.where(block[a] == block[b], 0.7, 0.03)
    score = rng.integers(700, 1000, size=linked.sum()) / 1000
    return pd.DataFrame({"a": np.array(genes)[a[linked]], "b": np.array(genes)[b[linked]], "score": score})


@pytest.mark.parametrize(
    ("source", "benchmark"),
    [
        ("reactome_msigdb2023_2.gmt.gz", "gene_features_reactome_svd64.parquet"),
        ("string12_physical700_edges.tsv.gz", "gene_features_string_spectral64.parquet"),
    ],
)
def test_features_are_those_of_the_benchmarks(data, source, benchmark):
    found = vc.pp.gene_features(data / source)
    expected = vc.pp.read_gene_embeddings(data / benchmark)
    assert found.index.equals(expected.index)
    assert found.shape == (len(expected), 64)
    assert columns_agree(found, expected) > 0.999999


def test_links_of_string_give_what_their_list_of_genes_gives(data, tmp_path):
    edges = pd.read_csv(data / "string12_physical700_edges.tsv.gz", sep="\t").iloc[:8000]
    protein = {
        gene: f"9606.ENSP{i:011d}" for i, gene in enumerate(pd.unique(edges[["gene_a", "gene_b"]].to_numpy().ravel()))
    }
    rows = [(protein[a], protein[b], round(s * 1000)) for a, b, s in edges.itertuples(index=False)]
    rows += [(b, a, s) for a, b, s in rows]  # each link stands there twice
    rows += [(protein["A1BG"], p, 699) for p in list(protein.values())[:50]]  # below high confidence
    lines = ["protein1 protein2 combined_score", *(" ".join(map(str, row)) for row in rows)]
    links = write(tmp_path / "9606.protein.physical.links.v12.0.txt.gz", lines)
    head = "#string_protein_id\tpreferred_name\tprotein_size\tannotation"
    info = write(
        tmp_path / "9606.protein.info.v12.0.txt.gz", [head, *(f'{p}\t{g}\t100\tone " only' for g, p in protein.items())]
    )
    edges.to_csv(tmp_path / "edges.tsv", sep="\t", index=False)
    found = vc.pp.gene_features(links, names=info, n_comps=8)
    pd.testing.assert_frame_equal(found, vc.pp.gene_features(tmp_path / "edges.tsv", n_comps=8))
    more = vc.pp.gene_features(links, names=info, n_comps=8, min_score=0.6)
    assert not more.equals(found)


def test_the_components_of_a_network_are_eigenvectors_of_its_lazy_walk_and_find_its_blocks(tmp_path):
    edges = blocks()
    edges.to_csv(tmp_path / "edges.tsv", sep="\t", index=False)
    found = vc.pp.gene_features(tmp_path / "edges.tsv", n_comps=4)
    genes = list(found.index)
    weights = pd.DataFrame(np.eye(len(genes)), index=genes, columns=genes)
    for a, b, score in edges.itertuples(index=False):
        weights.loc[a, b] = weights.loc[b, a] = score
    degree = weights.sum(axis=1).to_numpy()
    walk = weights.to_numpy() / degree[:, None]
    values = np.sort(np.linalg.eigvals(walk).real)[::-1][1:5]
    vectors = found.to_numpy(dtype=float)
    np.testing.assert_allclose(walk @ vectors, vectors * values, atol=1e-6)
    # of mean square one under the stationary law of the walk, and apart from the constant one
    np.testing.assert_allclose(vectors.T @ (degree[:, None] / degree.sum() * vectors), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(degree @ vectors, 0, atol=1e-3)
    block = np.array([gene[1] for gene in genes])
    between = found.iloc[:, :2].groupby(block).mean()
    within = found.iloc[:, :2].groupby(block).std()
    for one, other in [("0", "1"), ("0", "2"), ("1", "2")]:
        assert (between.loc[one] - between.loc[other]).abs().max() > 3 * within.loc[[one, other]].max(axis=None)


def test_the_components_of_sets_explain_their_weighted_overlaps(tmp_path):
    sets = pathways()
    found = vc.pp.gene_features(write(tmp_path / "sets.gmt", gmt(sets)), n_comps=11)
    genes = list(found.index)
    member = np.array([[gene in of_set for of_set in sets.values()] for gene in genes], dtype=float)
    weighted = member * np.log(len(genes) / member.sum(axis=0))
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(weighted, full_matrices=False)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), values[:11], rtol=1e-5)
    expected = (left[:, :11] * values[:11]) @ (left[:, :11] * values[:11]).T
    np.testing.assert_allclose(found.to_numpy() @ found.to_numpy().T, expected, atol=1e-5)
    # genes of the same sets have the same features
    np.testing.assert_allclose(found.loc["G006"], found.loc["G007"], atol=1e-6)


def test_large_files_are_read_in_parts_and_must_end_somewhere(tmp_path, monkeypatch):
    edges = blocks()
    edges.to_csv(tmp_path / "edges.tsv", sep="\t", index=False)
    whole = vc.pp.gene_features(tmp_path / "edges.tsv", n_comps=4)
    monkeypatch.setattr(_relations, "_ROWS_AT_A_TIME", 7)
    pd.testing.assert_frame_equal(vc.pp.gene_features(tmp_path / "edges.tsv", n_comps=4), whole)
    monkeypatch.setattr(_relations, "_MOST_ROWS", 20)
    with pytest.raises(ValueError, match=r"edges\.tsv has more than 20 rows"):
        vc.pp.gene_features(tmp_path / "edges.tsv")
    monkeypatch.setattr(_reading, "_ALWAYS", 200)
    with pytest.raises(ValueError, match=r"sets\.gmt\.gz unfolds to more than 100 times its size"):
        vc.pp.gene_features(write(tmp_path / "sets.gmt.gz", ["A\t\t" + "G\t" * 100_000]))


@pytest.mark.parametrize("kind", ["sets.gmt", "edges.tsv.gz"])
def test_order_and_repetition_of_lines_do_not_matter(tmp_path, kind):
    rng = np.random.default_rng(1)
    if kind == "sets.gmt":
        lines = gmt(pathways())
        shuffled = ["\t".join([*line.split("\t")[:2], *rng.permutation(line.split("\t")[2:])]) for line in lines]
        header = []
    else:
        header, edges = ["a\tb\tscore"], blocks()
        lines = [f"{a}\t{b}\t{s}" for a, b, s in edges.itertuples(index=False)]
        shuffled = [
            f"{b}\t{a}\t{s}" if rng.random() < 0.5 else f"{a}\t{b}\t{s}" for a, b, s in edges.itertuples(index=False)
        ]
        shuffled += ["G0_00\tG0_00\t0.9"]  # a gene with itself says nothing
    first = vc.pp.gene_features(write(tmp_path / kind, header + lines), n_comps=6)
    (tmp_path / "other").mkdir()
    shuffled = [str(line) for line in rng.permutation([*shuffled, *shuffled[:5]])]
    second = vc.pp.gene_features(write(tmp_path / "other" / kind, header + shuffled), n_comps=6)
    pd.testing.assert_frame_equal(first, second)
    largest = first.to_numpy()[np.abs(first.to_numpy()).argmax(axis=0), np.arange(6)]
    assert (largest > 0).all()


def test_annotations_of_the_gene_ontology_give_what_their_sets_give(tmp_path):
    sets = pathways()
    rows = ["!gaf-version: 2.2"]
    for term, genes in sets.items():
        for gene in genes:
            fields = ["UniProtKB", f"P{gene}", gene, "involved_in", term, "PMID:1", "IDA", "", "P", "", "", "protein"]
            rows.append("\t".join([*fields, "taxon:9606", "20240101", "UniProt", "", ""]))
            rows.append(rows[-1].replace("IDA", "IPI"))  # other evidence for the same
    rows.append("\t".join(["UniProtKB", "PG000", "G000", "NOT|involved_in", "SET11", *["x"] * 12]))
    found = vc.pp.gene_features(write(tmp_path / "goa_human.gaf.gz", rows), n_comps=6)
    expected = vc.pp.gene_features(write(tmp_path / "sets.gmt", gmt(sets)), n_comps=6)
    # terms are taken in the order of their names, as sets are
    pd.testing.assert_frame_equal(found, expected)


def test_sizes_of_sets_and_scores_of_links_decide(tmp_path):
    sets = pathways() | {"ALL": [f"G{i:03d}" for i in range(65)], "TINY": ["ONLY", "HERE"]}
    path = write(tmp_path / "sets.gmt", gmt(sets))
    small = vc.pp.gene_features(path, n_comps=6, max_genes=50)
    pd.testing.assert_frame_equal(
        small, vc.pp.gene_features(write(tmp_path / "without.gmt", gmt(pathways())), n_comps=6)
    )
    assert "ONLY" not in small.index
    assert {"ONLY", "HERE"} <= set(vc.pp.gene_features(path, n_comps=6, min_genes=2).index)
    edges = pd.concat([blocks(), pd.DataFrame({"a": ["G0_00", "X"], "b": ["FAR", "Y"], "score": [0.5, 0.9]})])
    edges.to_csv(tmp_path / "edges.csv", index=False)
    assert not {"FAR", "X", "Y"} & set(vc.pp.gene_features(tmp_path / "edges.csv", n_comps=4).index)
    more = vc.pp.gene_features(tmp_path / "edges.csv", n_comps=4, min_score=0.4).index
    assert "FAR" in more
    assert "X" not in more  # not connected with the others


def test_fewer_components_than_asked_for_are_said(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        found = vc.pp.gene_features(write(tmp_path / "sets.gmt", gmt(pathways(n=4))))
    assert found.shape[1] == 3
    assert "n_comps=64 is more than sets.gmt allows: 3" in caplog.text


def test_models_take_the_table(tmp_path):
    table = vc.pp.gene_features(write(tmp_path / "sets.gmt", gmt(pathways())), n_comps=6)
    encoded = PerturbationTable.from_features(table, ["G001", "G010+G020"], "control", unseen=["G050"])
    vectors = encoded.encode(["G001", "G050", "control"]).numpy()
    assert vectors.shape == (3, 7)
    assert np.isfinite(vectors).all()
    assert not vectors[2].any()


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("sets.xml", ["x"], r"unknown suffix\. Known: \.gmt, \.gaf, \.txt, \.tsv, \.csv"),
        ("sets.gmt", ["one two three"], r"Line 1 of sets\.gmt is no gene set"),
        ("sets.gmt", gmt({"A": ["G1", "G2"]}), r"of 1 sets those with min_genes=5 to max_genes=500 genes, namely 0"),
        ("go.gaf", ["a\tb"], r"Line 1 of go\.gaf has 2 columns, not the 15"),
        ("links.txt", ["a b score", "x y 1"], r"not as STRING's files of links do.*must end in \.tsv or \.csv"),
        ("links.txt", ["protein1 protein2 combined_score", "9606.A 9606.B 900"], "Give names=, the file protein.info"),
        ("edges.tsv", ["a b", "x y"], "has one column, 'a b'"),
        ("edges.tsv", ["x\ty\t0.9", "x\tz\t0.8"], "has no header: it begins with"),
        ("edges.tsv", ["a\tb\tkind", "x\ty\tactivation"], "Column 'kind' of edges.tsv must hold scores"),
        (
            "edges.tsv",
            ["a\tb\tscore", "x\ty\t0.9"],
            r"largest connected part of edges\.tsv, after min_score=, namely 2",
        ),
        ("edges.tsv", ["a\tb\tscore", "x\ty\t0.1"], r"after min_score=, namely 0"),
        ("edges.tsv", [""], "is no table of pairs"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, lines, message):
    with pytest.raises(ValueError, match=message):
        vc.pp.gene_features(write(tmp_path / name, lines))


def test_missing_broken_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path=.*does not exist"):
        vc.pp.gene_features(tmp_path / "sets.gmt")
    path = write(tmp_path / "sets.gmt.gz", gmt(pathways(n=200)))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"sets\.gmt\.gz is no list of gene sets.*Is the download complete\?"):
        vc.pp.gene_features(path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"sets\.gmt\.gz is no list of gene sets.*Is the download complete\?"):
        vc.pp.gene_features(path)
    lines = [f"9606.P{i} 9606.P{i + 1} 900" for i in range(9)]
    links = write(tmp_path / "links.txt", ["protein1 protein2 combined_score", *lines])
    mouse = write(tmp_path / "info.txt", ["#string_protein_id\tpreferred_name", "10090.P1\tTrp53"])
    with pytest.raises(ValueError, match=r"names the proteins of 0 of 9 links.*another release or species"):
        vc.pp.gene_features(links, names=mouse)
    with pytest.raises(ValueError, match=r"it is no protein\.info"):
        vc.pp.gene_features(links, names=links)
    with pytest.raises(ValueError, match="n_comps=0 is not a whole number of at least 1"):
        vc.pp.gene_features(links, names=mouse, n_comps=0)


@pytest.fixture(scope="module")
def ring() -> pd.DataFrame:
    """A network of twenty genes, each linked to the two that follow."""
    numbers = np.arange(100, 120)
    ends = np.concatenate([np.stack([numbers, np.roll(numbers, -k)], axis=1) for k in (1, 2)])
    return pd.DataFrame(ends, columns=["a", "b"])


def test_names_are_text(tmp_path, ring):
    """Numbers are names too, as Entrez has them: as they are written, also where an end is missing."""
    for prefix, suffix in (("", ""), ("00", ""), ("", "E1"), ("", ".0")):
        lines = [f"{prefix}{a}{suffix}\t{prefix}{b}{suffix}" for a, b in ring.to_numpy()]
        found = vc.pp.gene_features(
            write(tmp_path / "edges.tsv", ["a\tb", *lines, f"{prefix}105{suffix}\t"]), n_comps=2
        )
        assert list(found.index) == [f"{prefix}{i}{suffix}" for i in range(100, 120)]


def test_spaces_around_names_are_no_part_of_them(tmp_path, ring):
    plain = vc.pp.gene_features(write(tmp_path / "plain.tsv", ["a\tb", *(f"g{a}\tg{b}" for a, b in ring.to_numpy())]))
    assert list(plain.index) == [f"g{i}" for i in range(100, 120)]
    spaced = ["a\tb", *(f" g{a}\tg{b} " for a, b in ring.to_numpy()), "g100\t ", " g101\tg101 "]
    pd.testing.assert_frame_equal(vc.pp.gene_features(write(tmp_path / "spaced.tsv", spaced)), plain)
    line = "UniProtKB\tid\t{}\tinvolved_in\tGO:{}\tPMID\tIDA\t\tP\t\t\tprotein\ttaxon\t2020\tUniProt"
    symbols = [(f" G{i} " if i % 2 else f"G{i}", t) for t in range(6) for i in range(t, t + 6)] + [(" ", 1), ("", 2)]
    found = vc.pp.gene_features(write(tmp_path / "go.gaf", [line.format(*one) for one in symbols]), n_comps=2)
    assert sorted(found.index) == sorted(f"G{i}" for i in range(11))


@pytest.mark.parametrize("has_score", [True, False])
def test_an_index_that_was_written_along_is_no_gene(tmp_path, ring, has_score):
    edges = "g" + ring.astype(str)
    edges = edges.assign(score=0.9) if has_score else edges
    edges.to_csv(tmp_path / "plain.csv", index=False)
    expected = vc.pp.gene_features(tmp_path / "plain.csv", n_comps=4)
    for rows in (edges.index, edges.index[::-1] + 7):
        edges.set_axis(rows).to_csv(tmp_path / "edges.csv")
        pd.testing.assert_frame_equal(vc.pp.gene_features(tmp_path / "edges.csv", n_comps=4), expected)
    # the first column is of genes
    edges.set_index("a").rename_axis(None).to_csv(tmp_path / "edges.csv")
    pd.testing.assert_frame_equal(vc.pp.gene_features(tmp_path / "edges.csv", n_comps=4), expected)
    ring.to_csv(tmp_path / "edges.csv")  # an index and two genes, or two genes and a score
    with pytest.raises(
        ValueError, match=r"numbers the rows\. Write the table without it, `to_csv\(\.\.\., index=False\)`"
    ):
        vc.pp.gene_features(tmp_path / "edges.csv")
    ring.set_axis(["0", "1"], axis=1).to_csv(
        tmp_path / "edges.csv", index=False
    )  # as pandas calls columns without names
    assert list(vc.pp.gene_features(tmp_path / "edges.csv").index) == [str(i) for i in range(100, 120)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["100\t101", "101\t102", "102\t103"], r"has no header: it begins with \['100', '101'\]"),
        (["A\tB", "B\tC", "C\tA"], r"has no header: it begins with \['A', 'B'\]"),
        (["0\tA\tB", "1\tB\tC"], r"has no header: it begins with \['0', 'A', 'B'\]"),
        (["a\tb", "A\tB\t0.9", "B\tC\t0.9"], "rows with more values than its first line has names"),
        (["a;b;score", "A;B;0.9"], r"it is separated by ';', and not by '\\t'.*sep='\\t', index=False\)"),
        (["a,b", "A,B"], r"it is separated by ',', and not by '\\t'"),
    ],
)
def test_tables_of_pairs_that_are_not_what_they_seem(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        vc.pp.gene_features(write(tmp_path / "edges.tsv", lines))
