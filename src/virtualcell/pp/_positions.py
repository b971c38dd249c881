"""Where genes start on the genome, from an annotation or a table."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from virtualcell._numbers import as_numbers
from virtualcell._reading import as_damaged, lines_of, open_text
from virtualcell._text_tables import head_of
from virtualcell.pp._genes import ENSEMBL_VERSION

logger = logging.getLogger(__name__)

# Names that tables have for the same thing, the most telling first. "start" is special, see `_starts`.
_SYMBOL = ("gene_symbol", "gene_name", "symbol", "gene")
_CHROMOSOME = ("chromosome", "chrom", "chr", "seqname", "seqnames")
_TSS = ("tss_position", "tss", "position")
_ID = ("gene_id", "ensembl_id")
_TABLES = {".tsv": "\t", ".txt": "\t", ".csv": ","}
# Starts this close to one another make no difference to what is near them.
_SAME_PLACE = 500
_PLACE, _FARTHEST = re.compile(r"[0-9]{1,12}"), 10**12


def gene_positions(gtf: str | Path | pd.DataFrame) -> pd.DataFrame:
    """Read where each gene starts, its transcription start site.

    A name that stands for several places has no position, and is left out; the log says how many these are. There are
    two exceptions: starts within 500 bp of one another count as one, that of the lowest coordinate, and a gene of the
    pseudo-autosomal regions, which X and Y share, is on X. A gene of an annotation that has no name goes by its id.

    Parameters
    ----------
    gtf
        Annotation of GENCODE or Ensembl (`.gtf` or `.gtf.gz`), of which the rows of the feature "gene" are read; or a
        table, a DataFrame or a `.tsv`, `.txt` or `.csv` file (perhaps with `.gz` behind), with columns for the name
        (`gene_symbol`, `gene_name`, `symbol` or `gene`), the `chromosome` (or `chrom`, `chr`, `seqname`), and the start
        (`tss_position`, `tss` or `position`; or `start` with `end` and `strand`; or `start` alone); `strand` and
        `gene_id` (or `ensembl_id`) where there are any. What this function returned is such a table too.

    Returns
    -------
    One row per gene, sorted by name, which is the index ("gene"): `chromosome` as the source writes it ("1" where it
    writes that and "chr1"); `start`, the position of the first transcribed base, counted from 1 as in the source
    (`start` of the annotation on the strand +, `end` on the strand -); `strand` ("+", "-", or missing) and `gene_id`
    without its version, where they are known.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind, holds no genes, lacks a column or a position or has a column twice, or if no
        gene has one place.

    Examples
    --------
    >>> table = pd.DataFrame({"gene": ["JAK2", "STAT1"], "chromosome": ["9", "2"], "tss": [4984390, 191020960]})
    >>> vc.pp.gene_positions(table)["start"].to_dict()
    {'JAK2': 4984390, 'STAT1': 191020960}
    >>> positions = vc.pp.gene_positions("gencode.v47.annotation.gtf.gz")  # doctest: +SKIP
    """
    if not isinstance(gtf, str | os.PathLike | pd.DataFrame):
        raise TypeError(f"gtf= takes the path of a file or a DataFrame, and not {type(gtf).__name__}.")
    table = _of_table(gtf) if isinstance(gtf, pd.DataFrame) else _read(Path(gtf))
    out = _one_place_each(table)
    out["gene_id"] = out["gene_id"].str.replace(ENSEMBL_VERSION, r"\1", regex=True)
    for column in ("strand", "gene_id"):
        if out[column].isna().all():
            out = out.drop(columns=column)
    return out


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"gtf={str(path)!r} does not exist.")
    suffix = Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()
    if suffix == ".gtf":
        return _of_annotation(path)
    if suffix in _TABLES:
        how = {"sep": _TABLES[suffix], "dtype": str, "keep_default_na": False, "na_values": [""]}  # a gene called NA
        what, remedy = "table of genes", "Is the download complete?"
        head_of(path, _TABLES[suffix], what, remedy)
        with as_damaged(path, what, remedy), open_text(path) as file:
            table = pd.read_csv(file, **how)
        return _of_table(table)
    raise ValueError(
        f"gtf={str(path)!r} is neither an annotation (.gtf) nor a table ({', '.join(_TABLES)}), each perhaps with .gz "
        "behind. GENCODE and Ensembl offer GTF beside GFF3; or read the file into a DataFrame and give that."
    )


# -- annotations ------------------------------------------------------------------------------------------------------


def _of_annotation(path: Path) -> pd.DataFrame:
    columns = ["gene", "chromosome", "start", "strand", "gene_id"]
    table = pd.DataFrame(_genes_of(path), columns=columns)
    if table.empty:
        raise ValueError(
            f"{path.name} has no rows of the feature 'gene' with a gene_name or gene_id. Take the annotation of "
            "GENCODE or Ensembl, which has them; or give a table of genes with columns gene_name, chromosome, tss."
        )
    return table


def _genes_of(path: Path) -> Iterator[tuple]:
    """Yield name, chromosome, start, strand and id of every gene."""
    for number, line in lines_of(path, "annotation"):
        if line.startswith("#") or "\tgene\t" not in line:
            continue
        fields = line.split("\t")
        if len(fields) != 9 or fields[6] not in ("+", "-") or not all(_PLACE.fullmatch(f) for f in fields[3:5]):
            raise ValueError(
                f"{path.name}, line {number}: a gene needs nine fields between tabs, with whole numbers in the "
                "fourth and fifth and a strand, + or -, in the seventh. Take the file from its source again."
            )
        if fields[2] != "gene":
            continue
        name, gene_id = (_attribute(fields[8], key) for key in ("gene_name", "gene_id"))
        if name or gene_id:
            yield name or gene_id, fields[0], int(fields[3 if fields[6] == "+" else 4]), fields[6], gene_id


def _attribute(text: str, key: str) -> str | None:
    found = re.search(rf'\b{key} "([^"]+)"', text)
    return found[1] if found else None


# -- tables -----------------------------------------------------------------------------------------------------------


def _of_table(table: pd.DataFrame) -> pd.DataFrame:
    if table.index.name in _SYMBOL and not set(_SYMBOL) & set(table):
        table = table.reset_index()
    lowered = _lowered(table)
    columns = {}
    for what, names in (("gene", _SYMBOL), ("chromosome", _CHROMOSOME), ("strand", ("strand",)), ("gene_id", _ID)):
        found = next((lowered[n] for n in names if n in lowered), None)
        if found is None and what in ("gene", "chromosome"):
            raise ValueError(
                f"gtf has the columns {list(table)}, none of which is the {what}: rename one to {names[0]!r} (known "
                f"are {', '.join(names)})."
            )
        columns[what] = table[found].astype(object) if found is not None else np.full(len(table), None)
    if not len(table):
        raise ValueError("gtf has no rows: give a table with a row per gene.")
    out = pd.DataFrame(columns, index=table.index)
    out["start"] = _starts(table, lowered)
    for column in ("gene", "chromosome"):
        out[column] = out[column].map(_text, na_action="ignore").replace("", None)
    if (missing := out[["gene", "chromosome"]].isna().any(axis=1)).any():
        raise ValueError(
            f"gtf has {int(missing.sum())} rows without a gene or a chromosome. Drop them first: give "
            "table.dropna(subset=[...])."
        )
    return out[["gene", "chromosome", "start", "strand", "gene_id"]]


def _lowered(table: pd.DataFrame) -> dict[str, str]:
    """Map names of columns in lower case to columns; raise where a name that is known stands for two."""
    names = [str(c).lower() for c in table]
    known = {*_SYMBOL, *_CHROMOSOME, *_TSS, *_ID, "start", "end", "strand"}
    if twice := [name for name in dict.fromkeys(names) if name in known and names.count(name) > 1]:
        same = [c for c, name in zip(table, names, strict=True) if name == twice[0]]
        raise ValueError(
            f"gtf has the columns {same}, of which one is needed: keep that, as with `table.loc[:, "
            "~table.columns.str.lower().duplicated()]`."
        )
    return dict(zip(names, table, strict=True))


def _text(value: object) -> str:
    """Return a name without spaces around it; chromosome 1 is also called so where a missing value made it 1.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _starts(table: pd.DataFrame, lowered: dict[str, str]) -> pd.Series:
    """Return the position where transcription starts."""
    tss = next((lowered[n] for n in _TSS if n in lowered), None)
    if tss is None and "start" not in lowered:
        raise ValueError(
            f"gtf has the columns {list(table)}, none of which is the start of the gene: rename one to 'tss' (known "
            f"are {', '.join(_TSS)}, or start with end and strand)."
        )
    if tss is None and "end" in lowered:
        strand = table[lowered["strand"]] if "strand" in lowered else pd.Series(None, table.index, dtype=object)
        if not strand.isin(["+", "-"]).all():
            raise ValueError(
                "gtf has start and end, and a gene on the strand - starts at its end: give a column strand of '+' and "
                "'-' for every gene, or one of transcription starts, 'tss'."
            )
        ends = [_whole_numbers(table, lowered[c]) for c in ("start", "end")]
        return ends[0].where(strand == "+", ends[1])
    return _whole_numbers(table, lowered["start"] if tss is None else tss)


def _whole_numbers(table: pd.DataFrame, column: str) -> pd.Series:
    given = table[column]
    if pd.api.types.is_bool_dtype(given) or pd.api.types.is_complex_dtype(given):
        raise ValueError(f"gtf: column {column!r} is of the type {given.dtype}; positions are whole numbers.")
    numbers = as_numbers(given).to_numpy(dtype=np.float64, na_value=np.nan)  # types of pyarrow have no remainder
    wrong = ~((numbers >= 0) & (numbers < _FARTHEST) & (numbers == np.floor(numbers)))
    if wrong.any():
        raise ValueError(
            f"gtf: column {column!r} holds {given[wrong].iloc[0]}; positions are whole numbers of base pairs, of every "
            f"gene. Drop the {int(wrong.sum())} rows that have none."
        )
    return pd.Series(numbers.astype(np.int64), index=table.index)


# -- names that stand for several genes -------------------------------------------------------------------------------


def _one_place_each(table: pd.DataFrame) -> pd.DataFrame:
    """Index by gene, each of which has one place; in an order of its own, so that the file's does not matter."""
    bare = table["chromosome"].str.removeprefix("chr")
    one_way = table.groupby(bare)["chromosome"].transform("min")  # chr1 is 1, where both are written
    table = table.assign(chromosome=one_way).sort_values(["gene", "chromosome", "start"], kind="stable")
    bare = table["chromosome"].str.removeprefix("chr")
    on_sex = [set(table.loc[bare == c, "gene"]) for c in "XY"]
    elsewhere = set(table.loc[~bare.isin(["X", "Y"]), "gene"])
    table = table[~((bare == "Y") & table["gene"].isin((on_sex[0] & on_sex[1]) - elsewhere))]
    by = table.groupby("gene")
    spread = by["start"].transform("max") - by["start"].transform("min")
    unclear = (by["chromosome"].transform("nunique") > 1) | (spread > _SAME_PLACE)
    if unclear.any():
        names = table.loc[unclear, "gene"].unique()
        several = f"{len(names)} names stand for genes at several places"
        if unclear.all():
            raise ValueError(
                f"gtf: {several}, such as {', '.join(names[:3])}, and there are no others. Name each once."
            )
        logger.info("%s and are left out, such as %s.", several, ", ".join(names[:3]))
    return table[~unclear].drop_duplicates("gene").set_index("gene")
