"""From a screen to what a model learns: perturbations with enough cells, validation cells, genes."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import nullcontext
from numbers import Integral

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from mudata import MuData

from virtualcell._threads import torch_threads_kept
from virtualcell.data._dask import as_dask, worked_on_by
from virtualcell.data._labels import expression_modality, looks_combined, looks_like_control, obs_column, parts
from virtualcell.data._screen import Screen

logger = logging.getLogger(__name__)


def with_enough_cells(screen: Screen, min_cells: int, *, has_features: bool) -> Screen:
    """Mark the cells of perturbations with fewer training cells than that "test", with a warning that names them.

    With features a perturbation may be met for the first time in validation, and so may a combination of perturbations
    that have enough cells.
    """
    control = screen.design.control
    counts = pd.Series(screen.perturbation[screen.is_train]).value_counts()
    counts = counts[counts > 0]
    enough = set(counts.index[counts >= min_cells]) - {control}
    if not enough:
        most = counts.drop(control, errors="ignore").max() if len(counts) else 0
        raise ValueError(
            f"no perturbation has min_cells={min_cells} training cells: there is nothing to train on."
            + (f" Lower min_cells (fit_state takes it in training=) to {most} or less." if most > 0 else "")
        )
    few = set(counts.index) - enough
    if not has_features and min_cells > 0:
        new = set(screen.perturbation[screen.is_val]) - set(counts.index)
        few |= {name for name in new if not set(parts(name, control)) <= enough}
    left_out = sorted(few - {control})
    if left_out:
        logger.warning(
            "%d perturbations have fewer than min_cells=%d training cells and are left out: %s%s.",
            *(len(left_out), min_cells, ", ".join(left_out[:10]), " ..." if len(left_out) > 10 else ""),
        )
    split = screen.split.copy()
    split[screen.perturbation.isin(left_out)] = "test"
    return screen.with_split(split)


def with_known_batches(screen: Screen) -> Screen:
    """Mark validation cells "test" whose batch has no training cells: a network has nothing to learn of it."""
    if screen.batch is None:
        return screen
    unknown = screen.is_val & ~screen.batch.isin(screen.batch[screen.is_train])
    if not unknown.any():
        return screen
    names = sorted(set(screen.batch[unknown]))
    logger.warning(
        "%d validation cells are left out: there are no training cells of their batches, %s%s.",
        *(unknown.sum(), ", ".join(names[:10]), " ..." if len(names) > 10 else ""),
    )
    return screen.with_split(np.where(unknown, "test", screen.split))


def _warn_of_controls(screen: Screen) -> None:
    """Warn of names of perturbations that are called like control cells: their guides target nothing."""
    found = [name for name in screen.perturbation_names if looks_like_control(name)]
    if found:
        every = [*screen.design.controls, *screen.spelled(found)]
        logger.warning(
            "%d perturbations are called like control cells, and are learned as if they targeted something: %s%s. If "
            "they do not, say control=%r.",
            *(len(found), ", ".join(found[:10]), " ..." if len(found) > 10 else "", every),
        )


def _warn_of_separators(screen: Screen) -> None:
    """Warn of names that look like combinations of others: each is learned as a perturbation of its own."""
    known = {*screen.perturbation_names, screen.design.control}
    found = {name: how for name in screen.perturbation_names if (how := looks_combined(name, known)) is not None}
    if found:
        name, (separator, of) = next(iter(found.items()))
        logger.warning(
            "%d perturbations look like combinations of others, as %r of %s, and are learned as if they were not. If "
            "they are, say combination_separator=%r.",
            *(len(found), name, " and ".join(map(repr, of)), separator),
        )


def prepared(screen: Screen, *, min_cells: int, has_features: bool, val_fraction: float = 0.1, seed: int = 0) -> Screen:
    """Return the cells to learn from and to validate on, after checking names and controls.

    Left out are test cells, of which nothing is read, not even which batches there are, and perturbations with few
    cells. Validation cells are held out here, before anything is chosen or learned, where the design names no split.
    """
    screen.require_unique_names()
    screen.require_control()
    _warn_of_controls(screen)
    _warn_of_separators(screen)
    screen = with_known_batches(with_enough_cells(screen, min_cells, has_features=has_features))
    is_seen = screen.split != "test"
    screen.check_controls(is_seen)
    screen = screen if is_seen.all() else screen.take(is_seen)
    if screen.design.split_key is None:
        screen = screen.hold_out(val_fraction, seed)
    # what follows reads rows many times, in any order
    return dataclasses.replace(screen, expression=screen.expression.at_hand())


_TOTALS = ("total_counts", "n_counts", "ncounts", "ncount_rna", "n_umi", "n_umis", "total_umis", "library_size")
_FAR_ABOVE = 1.5  # the sum over the genes that are there


def warn_of_panel(screen: Screen, data: AnnData | MuData, *, modality: str = "rna") -> None:
    """Warn where library sizes are sums over some of the genes, and a column of `obs` has the totals of all.

    Only such a column is named as `library_size_key` would take: numbers, none below the sum of its cell.
    """
    if screen.design.scale != "counts" or screen.design.library_size_key is not None:
        return
    screen.expression.rows(np.arange(0))  # the first reading sums up
    sums, adata = screen.expression.library_size, expression_modality(data, modality)
    columns = [*adata.obs.columns, *(data.obs.columns if isinstance(data, MuData) else ())]
    for key in columns:
        if key.removeprefix(f"{modality}:").casefold() not in _TOTALS:
            continue
        column = obs_column(data, key, argument="library_size_key", modality=modality)
        if not pd.api.types.is_numeric_dtype(column):
            continue
        totals = column.loc[screen.names].to_numpy(dtype=np.float64, na_value=np.nan)
        times = np.median(totals / sums)
        if times > _FAR_ABOVE and (totals >= 0.999 * sums).all():
            logger.warning(
                "obs[%r] is %.3g times the counts that the %d genes here add up to (median over cells), so that genes "
                "seem to be left out, and library sizes are too small. Say library_size_key=%r for the totals of all.",
                *(key, times, adata.n_vars, key),
            )
            return


def choose_genes(screen: Screen, n_top_genes: int | None, *, targets: list[str]) -> list[str]:
    """Names of the genes to model: the most variable ones of the training cells, and targets.

    They come sorted, so that the order of genes in a file changes nothing.
    """
    names = screen.genes
    if n_top_genes is not None and not (isinstance(n_top_genes, Integral) and n_top_genes >= 1):
        raise ValueError(f"n_top_genes={n_top_genes!r}: at least one gene is needed. Say None for all genes.")
    if n_top_genes is None or n_top_genes >= len(names):
        return sorted(names)
    screen.expression.rows(np.arange(0))  # the first reading checks all cells
    train = screen.expression.take(screen.in_order(screen.is_train))
    cells = AnnData(train.rows() if train.in_memory else as_dask(train), var=pd.DataFrame(index=names))
    with torch_threads_kept(), nullcontext() if train.in_memory else worked_on_by(train.workers):
        table = sc.pp.highly_variable_genes(cells, n_top_genes=n_top_genes, flavor="seurat", inplace=False)
    return sorted(set(names[table["highly_variable"].to_numpy()]) | set(targets))
