"""Match genes by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from anndata import AnnData

from virtualcell._errors import unknown_name
from virtualcell.data._labels import column_of, var_of

logger = logging.getLogger(__name__)

# Only Ensembl gene ids carry a version; C. elegans names such as Y74C9A.6 end in a number of their own.
ENSEMBL_VERSION = r"^(ENS[A-Z]*G\d+)\.\d+$"


def match_genes(
    adata: AnnData,
    gene_names: pd.Index,
    *,
    gene_key: str | None = None,
    aliases: Mapping[str, str] | None = None,
    min_coverage: float = 0.01,
) -> np.ndarray:
    """Find each gene of the data in a gene table, by name.

    A name is looked up as it is, then through `aliases`, then without Ensembl version (`ENSG00000115415.20`), then
    without regard to case. A looser way never takes a row that a stricter one has taken, and leaves out names of the
    table that it cannot tell apart. What was matched in which way is logged.

    Parameters
    ----------
    adata
        Cells x genes.
    gene_names
        Names of the gene table, each once.
    gene_key
        Column of `var` with the names that the gene table uses; `var_names` by default. A missing name matches nothing.
    aliases
        Names in the data mapped to names in the gene table.
    min_coverage
        Share of genes that must match, of the data or of the table, whichever is the smaller set.

    Returns
    -------
    Row of the gene table for each gene of the data, or -1 (n_vars, int32).

    Raises
    ------
    KeyError
        If `var` has no column `gene_key`.
    ValueError
        If too few genes match, two genes of the data match the same row, or the table names a gene twice.
    """
    table = pd.Index(gene_names).astype(str)
    require_unique(table, "The gene table")
    names = _names(adata, gene_key)
    aliases = dict(aliases or {})
    ways: dict[str, tuple[Callable, Callable]] = {
        "by name": (_same, _same),
        "by alias": (lambda n: n.map(lambda name: aliases.get(name)), _same),
        "without version": (_drop_version, _drop_version),
        "without regard to case": (_fold, _fold),
    }
    rows = np.full(adata.n_vars, -1, dtype=np.int32)
    found = {}
    for way, (of_data, of_table) in ways.items():
        todo = np.flatnonzero((rows < 0) & names.notna())
        free = np.setdiff1d(np.arange(len(table)), rows)
        keys = of_table(table[free])
        lookup = pd.Series(free, index=keys)[~keys.duplicated(keep=False)]
        match = lookup.index.get_indexer(of_data(names[todo]))
        hit = match >= 0
        rows[todo[hit]] = lookup.to_numpy()[match[hit]]
        found[way] = todo[hit]
    _check_no_row_twice(rows, names, table, gene_key)

    n_matched = int((rows >= 0).sum())
    if n_matched == 0 or n_matched < min_coverage * min(len(rows), len(table)):
        raise ValueError(_no_match(adata, names, table, gene_key, n_matched))
    logger.info(
        "%d of %d genes of the data are in the gene table of %d (%s).",
        n_matched,
        len(rows),
        len(table),
        ", ".join(f"{len(where)} {way}" for way, where in found.items() if len(where)),
    )
    loose = found["without regard to case"]
    if len(loose):
        pairs = ", ".join(f"{names[i]} = {table[rows[i]]}" for i in loose[:3])
        logger.warning("%d genes match the table only without regard to case: %s. Same species?", len(loose), pairs)
    return rows


def _same(names: pd.Index) -> pd.Index:
    return names


def _drop_version(names: pd.Index) -> pd.Index:
    return names.str.replace(ENSEMBL_VERSION, r"\1", regex=True)


def _fold(names: pd.Index) -> pd.Index:
    return _drop_version(names).str.casefold()


def _names(adata: AnnData, gene_key: str | None) -> pd.Index:
    """Return the names of the genes as strings, missing ones as None."""
    if gene_key is not None and gene_key not in adata.var:
        raise unknown_name("gene_key", gene_key, adata.var.columns, "Leave it out to match genes by var_names.")
    column = adata.var_names if gene_key is None else column_of(adata, "var", gene_key, "gene_key")
    return pd.Index([None if pd.isna(name) else str(name) for name in column], dtype=object)


def require_unique(names: pd.Index, what: str) -> None:
    """Raise if a name stands there twice."""
    doubled = names[names.duplicated()].unique()
    if len(doubled):
        raise ValueError(
            f"{what} names {len(doubled)} genes twice, among them {list(doubled[:3])}. Keep one row of each: "
            "`table[~table.index.duplicated()]`, or average them: `table.groupby(level=0).mean()`."
        )


def _check_no_row_twice(rows: np.ndarray, names: pd.Index, table: pd.Index, gene_key: str | None) -> None:
    """Raise if two genes of the data match the same row: which of them is meant cannot be known."""
    taken, counts = np.unique(rows[rows >= 0], return_counts=True)
    doubled = taken[counts > 1]
    if not len(doubled):
        return
    pairs = [(list(names[rows == row]), table[row]) for row in doubled]
    if any(len(set(same)) > 1 for same, _ in pairs):
        remedy = "Drop all but one of each from the data"
    elif gene_key is None:
        remedy = "`adata.var_names_make_unique()` keeps the first of each"
    else:
        remedy = f"`adata = adata[:, ~adata.var[{gene_key!r}].duplicated()].copy()` keeps the first of each"
    shown = "; ".join(f"{same} = {gene!r}" for same, gene in pairs[:3])
    raise ValueError(f"{len(doubled)} genes of the table match more than one gene of the data: {shown}. {remedy}.")


def _no_match(adata: AnnData, names: pd.Index, table: pd.Index, gene_key: str | None, n_matched: int) -> str:
    """Return the message for a table that does not fit, naming the column of `var` that would fit best."""
    here = "var_names" if gene_key is None else f"var[{gene_key!r}]"
    message = (
        f"Only {n_matched} of {len(names)} genes of the data are in the gene table of {len(table)}: {here} holds names "
        f"like {list(names[:3])}, the table like {list(table[:3])}."
    )
    known = _fold(table)
    share = {
        key: float(_fold(_names(adata, key).dropna().astype(str)).isin(known).sum()) / len(names)
        for key in (None, *var_of(adata).select_dtypes(["object", "string", "category"]).columns)
        if key != gene_key
    }
    best = max(share, key=share.get, default=None)
    if not share or share[best] * len(names) <= n_matched:
        return f"{message} No column of var fits better: translate the names into one, for gene_key=."
    if best is None:
        return f"{message} var_names match {share[best]:.0%}: leave gene_key out."
    return f"{message} var[{best!r}] matches {share[best]:.0%}: pass gene_key={best!r}."
