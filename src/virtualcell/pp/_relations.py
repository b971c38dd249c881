"""Read what is known about genes: networks, gene sets and annotations, from files as their publishers offer them."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from virtualcell._reading import SAFE_NUMBERS, as_damaged, lines_of, open_text
from virtualcell._text_tables import counts_rows, head_of, is_number, is_unnamed, numbers_rows

logger = logging.getLogger(__name__)

_MOST_ROWS = 200_000_000  # STRING has 14 million links for human; more is a broken or hostile file
_ROWS_AT_A_TIME = 1_000_000
_STRING_HEADER = ("protein1", "protein2")
_INFO_ID, _INFO_NAME = "string_protein_id", "preferred_name"
_PAIRS, _COMPLETE = "table of pairs", "Is the download complete?"
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
            terms.setdefault(fields[_TERM], set()).update({fields[_SYMBOL].strip()} - {""})
    return terms


def read_edges(path: Path, names: Path | None, min_score: float) -> pd.DataFrame:
    """Read pairs of genes with weights, `a`, `b`, `weight`: each pair once, a before b, none with itself."""
    is_string = path.name.removesuffix(".gz").endswith(".txt")
    separator = " " if is_string else "," if path.name.removesuffix(".gz").endswith(".csv") else "\t"
    columns = _columns(head_of(path, separator, _PAIRS, _COMPLETE), path, is_string)
    # genes may be called by numbers, NA or nan; only what is empty is missing
    how = {"sep": separator, "keep_default_na": False, "na_values": [""], "dtype": dict.fromkeys(columns[:2], str)}
    kept, n_rows = [], 0
    for chunk in _chunks(path, **how):
        n_rows += len(chunk)
        if n_rows > _MOST_ROWS:
            raise ValueError(f"{path.name} has more than {_MOST_ROWS:,} rows.")
        kept.append(_edges(chunk[columns], path, is_string, min_score))
    edges = pd.concat(kept, ignore_index=True)
    if is_string:
        edges = _named(edges, path, names)
    rows, spelled = pd.factorize(edges[["a", "b"]].to_numpy(dtype=object).ravel())
    genes, row = np.unique(np.array([name.strip() for name in spelled], dtype=str), return_inverse=True)
    if not is_string and {column.strip() for column in columns[:2]} <= set(genes.tolist()):
        raise _no_header(path, columns)
    ends = np.sort(row[rows].reshape(-1, 2), axis=1)
    pairs = pd.DataFrame({"a": ends[:, 0], "b": ends[:, 1], "weight": edges["weight"].to_numpy()})
    pairs = pairs[(ends[:, 0] != ends[:, 1]) & ~np.isin(ends[:, 0], np.flatnonzero(genes == ""))]
    pairs = pairs.groupby(["a", "b"], sort=True, as_index=False)["weight"].max()
    return pairs.assign(**{end: genes[pairs[end]].astype(object) for end in ("a", "b")})


def _columns(head: pd.DataFrame, path: Path, is_string: bool) -> list[str]:
    """Return the columns of the two genes, and of the score if there is one, by the first rows."""
    columns = list(head.columns)
    if is_string:
        if tuple(columns[:2]) != _STRING_HEADER or "combined_score" not in columns:
            raise ValueError(
                f"{path.name} begins with {columns[:3]}, not as STRING's files of links do: protein1 protein2 ... "
                "combined_score. Another list of pairs must end in .tsv or .csv."
            )
        return [*_STRING_HEADER, "combined_score"]
    numbers = numbers_rows if is_unnamed(columns[0]) else counts_rows  # genes by number may be called index
    if len(columns) > 2 and numbers(columns[0], head[columns[0]]):
        if head[columns[2]].map(is_number).any():  # a score behind two genes, or a gene behind the index and another
            raise ValueError(
                f"{path.name} begins with a column {columns[0]!r} that numbers the rows. Write the table without it, "
                "`to_csv(..., index=False)`; or name it, if these are genes."
            )
        logger.info("%s: the column %r numbers its rows, and is left out.", path.name, columns[0])
        columns = columns[1:]
    if len(columns) < 2:
        raise ValueError(
            f"{path.name} has one column, {columns[0]!r}. Needed are two genes a row, and perhaps a score."
        )
    columns = columns[:3]
    places = [str(i) for i in range(len(columns))]  # as pandas calls columns without names
    are_places = columns[:2] == places[:2] and not any(is_number(name) and name != "2" for name in columns[2:])
    if any(map(is_number, columns)) and not are_places:
        raise _no_header(path, columns)
    return columns


def _no_header(path: Path, columns: list[str]) -> ValueError:
    return ValueError(f"{path.name} has no header: it begins with {columns}. Name its columns in a first line.")


def _chunks(path: Path, **how: object) -> Iterator[pd.DataFrame]:
    with (
        as_damaged(path, _PAIRS, _COMPLETE),
        open_text(path) as file,
        pd.read_csv(file, chunksize=_ROWS_AT_A_TIME, **SAFE_NUMBERS, **how) as chunks,
    ):
        yield from chunks


def _edges(chunk: pd.DataFrame, path: Path, is_string: bool, min_score: float) -> pd.DataFrame:
    """Give each row a weight, and leave out what scores too low."""
    edges = chunk.iloc[:, :2].set_axis(["a", "b"], axis=1)
    if chunk.shape[1] == 2:
        return edges.dropna().assign(weight=1.0)
    score = chunk.iloc[:, 2]
    if not pd.api.types.is_numeric_dtype(score) or not np.isfinite(score).all() or (score < 0).any():
        raise ValueError(f"Column {score.name!r} of {path.name} must hold scores: numbers of 0 or more.")
    score = score / 1000 if is_string else score
    keep = (score >= min_score) & (score > 0) & edges.notna().all(axis=1)
    return edges[keep].assign(weight=score[keep].astype(float))


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
