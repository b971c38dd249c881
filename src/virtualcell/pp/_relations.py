"""Read what is known about genes: networks, gene sets and annotations, from files as their publishers offer them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from virtualcell._reading import SAFE_NUMBERS, as_damaged, lines_of, open_text

_MOST_ROWS = 200_000_000  # STRING has 14 million links for human; more is a broken or hostile file
_ROWS_AT_A_TIME = 1_000_000
_STRING_HEADER = ("protein1", "protein2")
_INFO_ID, _INFO_NAME = "string_protein_id", "preferred_name"
_SYMBOL, _QUALIFIER, _TERM = 2, 3, 4  # columns of a GAF file


def read_sets(path: Path) -> dict[str, set[str]]:
    """Read gene sets from GMT: name, description, and genes, separated by tabs; sets of one name are joined."""
    sets: dict[str, set[str]] = {}
    for number, line in lines_of(path, "list of gene sets"):
        if not line:
            continue
        name, *rest = line.split("\t")
        if len(rest) < 2:
            raise ValueError(f"Line {number} of {path.name} is no gene set: name, description and genes, with tabs.")
        sets.setdefault(name, set()).update(gene.strip() for gene in rest[1:] if gene.strip())
    return sets


def read_annotations(path: Path) -> dict[str, set[str]]:
    """Read the genes of each term from GAF, the format of the Gene Ontology; what a gene is *not* is left out."""
    terms: dict[str, set[str]] = {}
    for number, line in lines_of(path, "list of annotations"):
        if not line or line.startswith("!"):
            continue
        fields = line.split("\t")
        if len(fields) < 15:
            raise ValueError(f"Line {number} of {path.name} has {len(fields)} columns, not the 15 or more of GAF.")
        if "NOT" not in fields[_QUALIFIER].split("|"):
            terms.setdefault(fields[_TERM], set()).add(fields[_SYMBOL])
    return terms


def read_edges(path: Path, names: Path | None, min_score: float) -> pd.DataFrame:
    """Read pairs of genes with weights, `a`, `b`, `weight`: each pair once, a before b, none with itself."""
    is_string = path.name.removesuffix(".gz").endswith(".txt")
    separator = " " if is_string else "," if path.name.removesuffix(".gz").endswith(".csv") else "\t"
    # a gene may be called NA or nan; only what is empty is missing
    how = {"sep": separator, "keep_default_na": False, "na_values": [""], "chunksize": _ROWS_AT_A_TIME}
    kept, n_rows = [], 0
    for chunk in _chunks(path, **how):
        n_rows += len(chunk)
        if n_rows > _MOST_ROWS:
            raise ValueError(f"{path.name} has more than {_MOST_ROWS:,} rows.")
        kept.append(_edges(chunk, path, is_string, min_score))
    edges = pd.concat(kept, ignore_index=True)
    if is_string:
        edges = _named(edges, path, names)
    edges = edges[edges["a"] != edges["b"]]
    first, second = np.sort(edges[["a", "b"]].to_numpy(dtype=str), axis=1).T.astype(object)
    pairs = pd.DataFrame({"a": first, "b": second, "weight": edges["weight"].to_numpy()})
    return pairs.groupby(["a", "b"], sort=True, as_index=False)["weight"].max()


def _chunks(path: Path, **how: object) -> Iterator[pd.DataFrame]:
    with (
        as_damaged(path, "table of pairs", "Is the download complete?"),
        open_text(path) as file,
        pd.read_csv(file, **SAFE_NUMBERS, **how) as chunks,
    ):
        yield from chunks


def _edges(chunk: pd.DataFrame, path: Path, is_string: bool, min_score: float) -> pd.DataFrame:
    """Take the names and the weight of each row, and leave out what scores too low."""
    columns = list(chunk.columns)
    if is_string and (tuple(columns[:2]) != _STRING_HEADER or "combined_score" not in columns):
        raise ValueError(
            f"{path.name} begins with {columns[:3]}, not as STRING's files of links do: protein1 protein2 ... "
            "combined_score. Another list of pairs must end in .tsv or .csv."
        )
    if len(columns) < 2:
        raise ValueError(
            f"{path.name} has one column, {columns[0]!r}. Needed are two genes a row, and perhaps a score."
        )
    edges = chunk[columns[:2]].set_axis(["a", "b"], axis=1)
    if len(columns) == 2:
        return edges.dropna().astype(str).assign(weight=1.0)
    if _is_number(columns[2]):
        raise ValueError(f"{path.name} has no header: it begins with {columns[:3]}. Name its columns in a first line.")
    score = chunk["combined_score"] if is_string else chunk[columns[2]]
    if not pd.api.types.is_numeric_dtype(score) or not np.isfinite(score).all() or (score < 0).any():
        raise ValueError(f"Column {columns[2]!r} of {path.name} must hold scores: numbers of 0 or more.")
    score = score / 1000 if is_string else score
    keep = (score >= min_score) & (score > 0) & edges.notna().all(axis=1)
    return edges[keep].astype(str).assign(weight=score[keep].astype(float))


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _named(edges: pd.DataFrame, path: Path, names: Path | None) -> pd.DataFrame:
    """Put names of genes in place of STRING's identifiers of proteins."""
    if names is None:
        raise ValueError(
            f"{path.name} goes by proteins. Give names=, the file protein.info of the same release and species "
            "(such as 9606.protein.info.v12.0.txt.gz), which stands beside it at https://string-db.org/cgi/download."
        )
    with as_damaged(names, "table of proteins"), open_text(names) as file:
        used = {"usecols": lambda column: column.lstrip("#") in (_INFO_ID, _INFO_NAME), "nrows": _MOST_ROWS}
        info = pd.read_csv(file, sep="\t", keep_default_na=False, quoting=csv.QUOTE_NONE, dtype=str, **used)
    info.columns = [c.lstrip("#") for c in info.columns]
    if set(info.columns) != {_INFO_ID, _INFO_NAME}:
        raise ValueError(f"names={names.name!r} has no columns {_INFO_ID} and {_INFO_NAME}: it is no protein.info.")
    name = info.drop_duplicates(_INFO_ID).set_index(_INFO_ID)[_INFO_NAME]
    named = edges.assign(a=edges["a"].map(name), b=edges["b"].map(name)).dropna()
    if len(edges) and len(named) < len(edges) / 2:
        raise ValueError(
            f"{names.name} names the proteins of {len(named)} of {len(edges)} links in {path.name}, such as "
            f"{edges['a'].iloc[0]!r}: it is of another release or species."
        )
    return named
