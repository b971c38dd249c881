"""Knockdown efficiency: did the perturbation reach its own target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse, stats

from virtualcell import _keys
from virtualcell._arguments import require_number, require_whole
from virtualcell.data._design import Design, Scale, note_design, require_columns
from virtualcell.data._labels import expression_modality, parts
from virtualcell.data._results import ours, require_results
from virtualcell.data._screen import Screen

logger = logging.getLogger(__name__)

# Residuals at which a perturbation (mean of its cells) and a single cell count as having responded.
_THRESHOLDS = {"down": (0.30, 0.50), "up": (2.0, 1.5)}
_ALPHA = 0.05
_MEASURED = ("mean", "control_mean", "residual", "pvalue")


def knockdown_efficiency(
    adata: AnnData | MuData,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    context_key: str | None = None,
    batch_key: str | None = None,
    combination_separator: str | None = "+",
    dose_key: str | None = None,
    layer: str | None = None,
    scale: Scale = "counts",
    library_size_key: str | None = None,
    gene_key: str | None = None,
    direction: Literal["down", "up"] = "down",
    threshold: float | None = None,
    cell_threshold: float | None = None,
    min_cells: int = 30,
    modality: str = "rna",
) -> pd.DataFrame:
    r"""Measure the residual expression of each target in its own cells, and mark those that responded.

    With :math:`y` the counts per 10,000 of the target (linear, not log), in the cells of one context,

    .. math:: \text{residual} = \bar y_\text{target cells} / \bar y_\text{control cells}, \qquad
              \text{residual}_i = y_i / \bar y_\text{control cells}

    so 1 is no change, 0.2 a knockdown by 80 % and 3 a threefold activation. As Arc filtered the Replogle screens for
    STATE, a perturbation has responded in a context when its residual is at most `threshold`, and at least
    `min_cells` of its cells have a residual of at most `cell_threshold`; those cells have responded.
    For activation, `direction="up"`, it is "at least" instead.

    A target that is not measured, or that no control cell of the context expresses, has no residual: it cannot be
    judged, so it is reported as "unmeasured" and its cells are kept. Each target of a combination "A+B" has a row of
    its own; the combination responded if all its measured targets did, and a cell's residual is that of the target
    that responded least.

    Parameters
    ----------
    adata
        Cells. In a MuData, the modality is read and written.
    perturbation_key
        Column of `obs` with the perturbation of each cell, whose labels are names of targets.
    control
        Label of the control cells, or several.
    context_key
        Column of `obs` with the context. Without it all cells are of one, "(all)".
    batch_key
        Column of `obs` with the experimental batch, which plays no part here and is noted for later calls.
    combination_separator
        What stands between the parts of a combination, such as "+"; `None` where every label is one perturbation.
    dose_key
        Column of `obs` with the dose of a drug, which plays no part here and is noted for later calls.
    layer
        Layer with the expression; `X` where it is in none.
    scale
        Whether the expression is "counts" (raw) or "log1p" (of counts per 10,000).
    library_size_key
        Column of `obs` with the total counts of a cell; needed where `adata` holds only a panel of genes, whose row
        sums say little. Row sums by default.
    gene_key
        Column of `var` with the gene names that the labels use; `var_names` by default.
    direction
        What the screen was meant to do to its targets: "down" (knockdown, knockout) or "up" (activation).
    threshold
        Residual at which a perturbation has responded; by default 0.30 for "down" and 2 for "up".
    cell_threshold
        Residual at which a cell has responded; by default 0.50 for "down" and 1.5 for "up".
    min_cells
        Least number of responding cells.
    modality
        Modality of a MuData with the expression.

    Returns
    -------
    One row per context, perturbation and target with `n_cells` and `n_control`; `mean` and `control_mean` (counts per
    10,000); `residual`; `pvalue` (Mann-Whitney, two-sided) and `pvalue_adj` (Benjamini-Hochberg over the table);
    `direction` ("down" or "up" where `pvalue_adj` < 0.05, else "flat", or "unmeasured"); `n_responding`, the cells of
    the perturbation that pass `cell_threshold`; and `responded` (missing where unmeasured).

    Also written: the table to `uns["virtualcell"]["knockdown"]`; each cell's residual to `obs["knockdown"]` (NaN for
    controls and unmeasured targets); and `obs["knockdown_responded"]`, false for the cells to leave out:
    `adata[adata.obs["knockdown_responded"]]`. Controls and cells of unmeasured targets are true.

    Raises
    ------
    KeyError
        A column or the control label is not there.
    ValueError
        No target is among the genes, a name stands for several genes, or a context has no control cells.

    Examples
    --------
    >>> table = vc.pp.knockdown_efficiency(adata, perturbation_key="target_gene", control="non-targeting")
    >>> bool((table["residual"] < 0.5).all())  # of the target's expression in control cells
    True
    """
    if direction not in _THRESHOLDS:
        raise ValueError(
            f"direction={direction!r} is unknown. Say 'down' for knockdown or knockout, 'up' for activation."
        )
    threshold = _THRESHOLDS[direction][0] if threshold is None else threshold
    cell_threshold = _THRESHOLDS[direction][1] if cell_threshold is None else cell_threshold
    for argument, value in (("threshold", threshold), ("cell_threshold", cell_threshold)):
        require_number(argument, value)
    require_whole("min_cells", min_cells, 0)
    expression = expression_modality(adata, modality)
    beside = {"batch_key": batch_key, "dose_key": dose_key}
    require_columns(adata, modality, **beside)
    require_results(expression)
    design = Design(
        perturbation_key, control, context_key, layer=layer, scale=scale, library_size_key=library_size_key,
        combination_separator=combination_separator, gene_key=gene_key,
    )  # fmt: skip
    control = design.control
    screen = Screen.from_anndata(adata, design, modality=modality)
    screen.require_control()
    label, context = (np.asarray(x).astype(str) for x in (screen.perturbation, screen.context))
    is_control = screen.is_control
    if without := [name for name in screen.context_names if name not in screen.controls()]:
        raise ValueError(
            f"Context {without[0]!r} has no control cells ({control!r}) to compare with. Drop its cells, or leave "
            "context_key out to compare with the controls of all contexts."
        )

    perturbed = np.unique(label[~is_control])
    targets = {p: parts(p, control) for p in perturbed}
    genes = _match(screen, sorted({t for of_label in targets.values() for t in of_label}))
    linear = screen.expression.select(list(genes.values())).rows().tocsc()
    linear.data = np.expm1(linear.data.astype(np.float64))
    column_of = {target: i for i, target in enumerate(genes)}

    cells = pd.DataFrame({"context": context, "perturbation": label})
    table, residual = _measure(cells, control, targets, linear, column_of, np.max if direction == "down" else np.min)
    table, keep = _judge(table, cells, residual, direction, threshold, cell_threshold, min_cells)
    table["perturbation"] = screen.spelled(table["perturbation"])
    expression.obs[_keys.KNOCKDOWN] = residual
    expression.obs[_keys.RESPONDED] = keep
    expression.uns[_keys.UNS] = {**ours(expression), _keys.KNOCKDOWN: table.copy()}
    note_design(adata, design.to_uns() | beside, modality)
    logger.info(
        "%d of %d targets are measured; %d of %d (context, target) pairs that can be judged responded; %d of %d "
        "perturbed cells are kept.",
        len(genes),
        table["target"].nunique(),
        int(table["responded"].sum()),
        int(table["responded"].notna().sum()),
        int((keep & ~is_control).sum()),
        int((~is_control).sum()),
    )
    return table


def _match(screen: Screen, targets: list[str]) -> dict[str, str]:
    """Map the targets that are measured to their `var_names`."""
    names, gene_key = pd.Series(screen.genes, index=screen.target_names.to_numpy()), screen.design.gene_key
    found = names[names.index.isin(targets)]
    if found.empty:
        where = "var_names" if gene_key is None else f"var[{gene_key!r}]"
        raise ValueError(
            f"None of the {len(targets)} targets, such as {targets[0]!r}, is in {where}, which holds names such as "
            f"{names.index[0]!r}. Name the column of var with the targets' names as gene_key."
        )
    if not found.index.is_unique:
        twice = found.index[found.index.duplicated()][0]
        raise ValueError(
            f"Target {twice!r} stands for {int((found.index == twice).sum())} genes. Keep one of them, or sum them."
        )
    return found.to_dict()


def _measure(
    cells: pd.DataFrame,
    control: str,
    targets: dict[str, list[str]],
    linear: sparse.csc_matrix,
    column_of: dict[str, int],
    least: Callable,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Compare each target with the controls of its context; `least` picks, for a cell, the target least changed."""
    rows_of = cells.groupby(["context", "perturbation"]).indices
    records, residual = [], np.full(len(cells), np.nan)
    for (context, perturbation), rows in rows_of.items():
        if perturbation == control:
            continue
        controls = rows_of[context, control]
        of_cells = []
        for target in targets[perturbation]:
            record = dict.fromkeys(_MEASURED, np.nan)
            if target in column_of:
                column = linear[:, [column_of[target]]].toarray().ravel()
                record["mean"], record["control_mean"] = column[rows].mean(), column[controls].mean()
                if record["control_mean"] > 0:
                    record["residual"] = record["mean"] / record["control_mean"]
                    record["pvalue"] = stats.mannwhitneyu(column[rows], column[controls], method="asymptotic").pvalue
                    of_cells.append(column[rows] / record["control_mean"])
            group = {"context": context, "perturbation": perturbation, "target": target}
            records.append(group | {"n_cells": len(rows), "n_control": len(controls)} | record)
        if of_cells:
            residual[rows] = least(of_cells, axis=0)
    return pd.DataFrame(records), residual


def _judge(
    table: pd.DataFrame,
    cells: pd.DataFrame,
    residual: np.ndarray,
    direction: str,
    threshold: float,
    cell_threshold: float,
    min_cells: int,
) -> tuple[pd.DataFrame, np.ndarray]:
    """Add what is concluded to the table, and return it with the cells to keep."""
    groups = ["context", "perturbation"]
    known = table["residual"].notna()
    table["pvalue_adj"] = np.nan
    table.loc[known, "pvalue_adj"] = stats.false_discovery_control(table.loc[known, "pvalue"])
    changed = np.where(table["residual"] < 1, "down", "up")
    table["direction"] = np.where(~known, "unmeasured", np.where(table["pvalue_adj"] < _ALPHA, changed, "flat"))

    # NaN compares as false, so cells without a residual are not counted as responding.
    sign = 1 if direction == "down" else -1
    cell_passes = sign * residual <= sign * cell_threshold
    number = cells.assign(n_responding=cell_passes).groupby(groups, as_index=False)["n_responding"].sum()
    table = table.merge(number, on=groups, how="left", validate="many_to_one")
    target_passes = ~known | (sign * table["residual"] <= sign * threshold)
    all_pass = target_passes.groupby([table[g] for g in groups]).transform("all")
    table["responded"] = (all_pass & (table["n_responding"] >= min_cells)).astype("boolean").mask(~known)

    responded = pd.MultiIndex.from_frame(table.loc[table["responded"].fillna(False), groups])
    keep = np.isnan(residual) | (pd.MultiIndex.from_frame(cells[groups]).isin(responded) & cell_passes)
    return table, keep
