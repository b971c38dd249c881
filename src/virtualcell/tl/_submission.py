"""The file that the Virtual Cell Challenge takes, from predicted cells."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal, Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell._settings import seed_of
from virtualcell.data._counts import Sampling, averaged, depth_matched_counts
from virtualcell.data._design import Design, Scale, note_design, require_columns
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.data._emit import with_totals
from virtualcell.data._labels import expression_modality, obs_column
from virtualcell.data._screen import Screen
from virtualcell.data._stored import columns_of
from virtualcell.io._vcc import vcc_meta, write_vcc
from virtualcell.tl._submission_checks import (
    CELL_TYPE,
    CONTEXT,
    check_arguments,
    check_cells,
    check_genes,
    check_labels,
    check_matrix,
    check_no_other_genes,
    check_path,
    file_labels,
    gene_list,
)

logger = logging.getLogger(__name__)


@takes_design("they are then as `predict_perturbation` noted them in `predicted`")
def prepare_submission(
    predicted: AnnData | MuData,
    path: str | os.PathLike,
    *,
    year: Literal[2025, 2026],
    genes: Sequence[str],
    perturbations: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    contexts: Sequence[str] | None = None,
    n_cells: int | Mapping[str, int] | None = None,
    controls: AnnData | MuData | None = None,
    controls_layer: str | None = None,
    controls_scale: Scale | None = None,
    depths: str | Sequence[int] | None = None,
    sampling: Sampling | None = None,
    missing_genes: Literal["error", "control"] = "error",
    overwrite: bool = False,
    seed: int | None = None,
    modality: str = "rna",
    **stated: Unpack[DesignArguments],
) -> AnnData:
    r"""Check predicted cells by the rules of the Virtual Cell Challenge and write the file that it takes.

    In 2025 that is log(1 + counts per 10,000), with real control cells; in 2026 whole counts, with an exact number of
    cells per context and perturbation, and no control cells.

    Predictions of :func:`virtualcell.tl.predict_perturbation` hold whole counts, which go into the file of 2026 as they
    are; with `controls`, each cell has the total of the control cell that it started from.

    For other predictions, and wherever `sampling` is stated, counts are drawn from expression on the log scale at the
    depth :math:`N_i` of that control cell: with :math:`r_{ig} = e^{x_{ig}} - 1`, the expected counts are
    :math:`m_{ig} = N_i r_{ig} / \sum_h r_{ih}`. Each way of drawing keeps every cell's total at :math:`N_i`; they
    differ in the noise:

    * `sampling="systematic"` rounds each :math:`m_{ig}` up or down by chance, with a variance of at most 1/4. It is for
      models that predict cells, whose variation has the noise of counting in it already: those that shift real control
      cells, or learned the distribution of real cells.
    * `sampling="multinomial"` counts molecules anew, with a variance of about :math:`m_{ig}`. It is for models that
      predict profiles free of noise, such as one mean for all cells; on top of a real cell it is that noise twice.
    * `sampling="averaged"` first puts the mean of four predicted cells of its perturbation and context in the place of
      each cell, and then rounds. Such a file scores higher by an artefact of the scorer: averages have less noise than
      cells, which its tests and distances take for a better prediction. They are no cells, and nothing else should be
      made of them.

    Parameters
    ----------
    predicted
        Predicted cells, as :func:`virtualcell.tl.predict_perturbation` returns them. They are not changed.
    path
        File to write, ending in `.vcc`.
    year
        Year of the challenge whose rules hold.
    genes
        The challenge's gene list. Cells must have exactly these genes, in any order; the file has them in this one.
    perturbations
        The challenge's list, the same in every context or one per context; the control in it is passed over. Cells must
        have exactly these. It is needed for 2026, and checked for 2025 if given.
    contexts
        Contexts that the file of 2026 must cover, such as `["A", "B", "C"]` (`D`, `E`, `F` in the final phase).
    n_cells
        Number of cells of each perturbation in each context; 400 by default for 2026, not checked by default for 2025.
    controls
        Real control cells, and no others. They go into the file of 2025. For 2026 those that `predicted` started from
        give the depths, summed over `genes`, and the counts of genes that were not predicted.
    controls_layer
        Layer with the expression of `controls`; by default as `fit_state` noted there, or else `X`.
    controls_scale
        Scale of `controls`, "counts" or "log1p"; by default as `fit_state` noted there, or else "counts".
    depths
        Total of each cell for 2026, or the column of `obs` that holds it, in place of `controls`. With it, counts
        are drawn.
    sampling
        How the counts of 2026 are drawn; see above. By default they are those of `predicted`, and drawn "systematic"
        where it has none.
    missing_genes
        What to do where the model predicts only some of `genes`: "control" takes the others from the control cell that
        the prediction started from, which says that nothing happened to them.
    overwrite
        Whether a file that is there is replaced.
    seed
        Seed of the draw of counts; by default `vc.settings.seed`. The order of genes does not matter to it.
    modality
        Modality of a MuData that holds gene expression.
    context_key
        Column of `obs` with the context. In 2025 one that is given here becomes the column `celltype` of the file,
        which has the challenge's own names whatever those of `predicted` are.
    batch_key
        Column of `controls` with the experimental batch, which plays no part.
    layer
        Layer of `predicted` with the expression; `X` where it is in none.
    scale
        Whether the expression of `predicted` is "counts" (raw) or "log1p" (of counts per 10,000).
    library_size_key
        Column of `controls` with the library size that divides its counts, where row sums are not those of all genes.
    **stated
        The design.

    Returns
    -------
    The cells as written.

    Raises
    ------
    KeyError
        For an unknown gene, perturbation, context, column or control cell.
    ValueError
        If the file would break a rule, or an argument is missing or has no use in that year.
    FileExistsError
        If there is a file and `overwrite` is not set.

    Examples
    --------
    >>> genes, targets = pd.read_csv("gene_names.csv")["gene_name"], ["STAT1", "JAK2"]  # doctest: +SKIP
    >>> predicted = vc.tl.predict_perturbation(adata, targets, n_cells=400)  # doctest: +SKIP
    >>> vc.tl.prepare_submission(
    ...     predicted, "a.vcc", year=2026, genes=genes, perturbations=targets, contexts=["A", "B", "C"]
    ... )  # doctest: +SKIP
    """
    path = check_path(path, overwrite)
    check_arguments(year, perturbations, contexts, depths, sampling, missing_genes)
    genes, contexts = gene_list(genes, year), None if contexts is None else list(contexts)
    batch, context_key = {"batch_key": stated.get("batch_key")}, stated.get("context_key")
    of_labels = {k: v for k, v in stated.items() if k not in ("batch_key", "library_size_key")}
    design = Design.from_data(predicted, modality=modality, **of_labels)
    if year == 2026 and design.context_key is None:
        raise ValueError("context_key must be given: in 2026 every cell names the context it was predicted for.")
    column = CONTEXT if year == 2026 else CELL_TYPE if context_key is not None else None
    own = expression_modality(predicted, modality)
    redrawn = any(given is not None for given in (sampling, depths, stated.get("layer"), stated.get("scale")))
    emitted = year == 2026 and not redrawn and _keys.COUNTS_LAYER in own.layers and design.scale == "log1p"
    if emitted:
        design = replace(design, layer=_keys.COUNTS_LAYER, scale="counts", library_size_key=None)
    cells = _read("predicted", predicted, design, column, modality)
    predicted = expression_modality(predicted, modality)
    if controls is not None:
        of_labels |= {"perturbation_key": design.perturbation_key, "control": design.controls}
        of_labels |= {"layer": controls_layer, "scale": controls_scale}
        require_columns(controls, modality, **batch)
        of_labels["library_size_key"] = stated.get("library_size_key")
        given, of_controls = controls, Design.from_data(controls, modality=modality, **of_labels)
        controls = _read("controls", controls, of_controls, column if year == 2025 else None, modality)
        check_genes("controls", controls.genes, genes)
        note_design(given, batch, modality)
    obs = file_labels(cells, "predicted", column)
    control_obs = None if controls is None else file_labels(controls, "controls", column)
    check_labels(obs, control_obs, design, year, perturbations, contexts, n_cells)

    seed = seed_of(seed)
    if missing_genes == "control":
        matrix = _filled(predicted, cells, controls, genes, counts=emitted)
    else:
        matrix = _expression(cells, genes, year)
    if year == 2025 and controls is not None:
        _check_same_scale(predicted, cells, controls)
        matrix = sparse.vstack([matrix, controls.select(genes).expression.rows()], format="csr")
        obs = pd.concat([obs, control_obs])
    elif year == 2026:
        totals = _depths(predicted, cells, controls, depths, genes, emitted=emitted)
        if emitted and totals is not None:
            matrix = with_totals(matrix, totals, genes=genes, seed=seed)
        elif totals is not None:
            if sampling == "averaged":
                matrix = averaged(matrix, obs.groupby(list(obs), observed=True).ngroup().to_numpy(), seed=seed)
            matrix = depth_matched_counts(matrix, totals, genes=genes, sampling=sampling or "systematic", seed=seed)
    matrix.sort_indices()
    obs = obs.set_index(np.arange(len(obs)).astype(str)).astype("category")
    submission = AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes))
    check_matrix(submission, year)
    if year == 2025:
        write_vcc(path, submission, {"watermark.txt": "vcc-prep"})
    else:
        by_context = perturbations.values() if isinstance(perturbations, Mapping) else [perturbations]
        write_vcc(path, submission, {"meta.json": vcc_meta(submission, contexts, chain.from_iterable(by_context))})
    logger.info("%d cells x %d genes written to %s.", *submission.shape, path)
    return submission


def _read(name: str, data: AnnData | MuData, design: Design, column: str | None, modality: str) -> Screen:
    """Return the cells given to the argument `name`, with their contexts where the file has a column of them."""
    adata = expression_modality(data, modality)
    check_cells(name, adata, design.layer)
    design = design.plain() if column is not None else replace(design.plain(), context_key=None)
    of_controls = name == "controls"
    argument = "controls_scale" if of_controls else "scale"
    return Screen.from_anndata(
        data, design, modality=modality, side=name, scale_argument=argument, measured=of_controls
    )


def _expression(cells: Screen, genes: pd.Index, year: int) -> sparse.csr_matrix:
    """Return whole counts where they are there and wanted, or else log(1 + counts per 10,000), of these genes."""
    check_genes("predicted", cells.genes, genes)
    cells = cells.select(genes)
    if year == 2026 and cells.design.scale == "counts":
        cells = cells.read_as("counts")
    matrix = cells.expression.rows(np.arange(cells.n_cells))  # in memory of its own
    matrix.eliminate_zeros()
    return matrix


def _barcodes(predicted: AnnData) -> pd.Series | None:
    """Return the names of the control cells that predictions started from, if they are noted."""
    try:
        return obs_column(predicted, _keys.CONTROL_BARCODE, argument="control_barcode").astype(str)
    except KeyError:
        return None


def _start_cells(predicted: AnnData, controls: Screen) -> np.ndarray:
    """Return the rows of `controls` that predictions started from."""
    barcodes = _barcodes(predicted)
    if barcodes is None:
        raise KeyError(
            f"predicted.obs has no {_keys.CONTROL_BARCODE!r} to find control cells by. Take predicted from "
            "`vc.tl.predict_perturbation`, or give depths= (and all genes)."
        )
    rows = controls.names.get_indexer(barcodes)
    if (rows < 0).any():
        remedy = f"{(rows < 0).sum()} predicted cells started from cells that controls= lacks: pass the same ones."
        raise unknown_name(_keys.CONTROL_BARCODE, barcodes.iloc[np.argmin(rows)], controls.names, remedy)
    return rows


def _check_same_scale(predicted: AnnData, cells: Screen, controls: Screen) -> None:
    """Raise where control cells come out otherwise than as the cells that predictions started from."""
    barcodes = _barcodes(predicted)
    if barcodes is None or _keys.CONTROL_LAYER not in predicted.layers:
        return
    rows = controls.names.get_indexer(barcodes)
    known = np.flatnonzero(rows >= 0)[:100]
    design = cells.design.of_predicted().restated(layer=_keys.CONTROL_LAYER)
    before = Screen.from_anndata(predicted, design, side="predicted", measured=False).take(known)
    off = abs(before.expression.rows() - controls.take(rows[known]).select(before.genes).expression.rows())
    if off.nnz and off.max() > 0.01:
        raise ValueError(
            f"controls differs by up to {off.max():.3g} from layers[{_keys.CONTROL_LAYER!r}] of predicted, the same "
            "cells as predictions started from them: their counts were divided by other totals. Give them as log(1 + "
            "counts per 10,000), controls_scale='log1p', or with all genes."
        )


def _filled(
    predicted: AnnData, cells: Screen, controls: Screen | None, genes: pd.Index, *, counts: bool
) -> sparse.csr_matrix:
    """Return log expression or counts, with the genes that were not predicted as in the control cell."""
    if controls is None or (cells.design.scale != "log1p" and not counts):
        raise ValueError("missing_genes='control' needs controls=, and predictions with scale='log1p'.")
    if counts:
        _require_counts(controls)
        cells, controls = cells.read_as("counts"), controls.read_as("counts")
    check_no_other_genes("predicted", cells.genes, genes)
    rest = genes.difference(cells.genes, sort=False)
    logger.info("%d of %d genes are not predicted and taken from the control cells.", len(rest), len(genes))
    start = controls.select(rest).expression.rows(_start_cells(predicted, controls))
    joined = sparse.hstack([cells.expression.rows(), start], format="csr")
    columns = columns_of(cells.genes.append(rest), genes)
    return joined if columns is None else joined[:, columns]


def _depths(
    predicted: AnnData,
    cells: Screen,
    controls: Screen | None,
    depths: str | Sequence[int] | None,
    genes: pd.Index,
    *,
    emitted: bool,
) -> np.ndarray | None:
    """Return the total that each predicted cell is to have; None where it has counts already.

    Counts of `predict_perturbation` (`emitted`) may come with the control cells that they started from.
    """
    if emitted and controls is None:
        return None
    if cells.design.scale == "counts" and not emitted:
        if controls is not None or depths is not None:
            raise ValueError("scale='counts': predicted holds counts already. Leave out controls= and depths=.")
        return None
    if isinstance(depths, str):
        totals = obs_column(predicted, depths, argument="depths").to_numpy(dtype=np.float64)
    elif depths is not None:
        totals = np.asarray(depths, dtype=np.float64)
        if totals.shape != (cells.n_cells,):
            raise ValueError(f"depths has shape {totals.shape}: give one number for each of {cells.n_cells} cells.")
    elif controls is None:
        raise ValueError(
            "controls or depths must be given: counts are drawn at the depth of the control cell that a prediction "
            "started from. Pass the control cells with their raw counts, or the totals."
        )
    else:
        _require_counts(controls)
        counts = controls.read_as("counts").select(genes).expression.rows()
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()[_start_cells(predicted, controls)]
    bad = ~((totals >= 1) & (totals == np.rint(totals)))
    if bad.any():
        raise ValueError(f"depths must be whole numbers from 1: {bad.sum()} are not, among them {totals[bad][0]:g}.")
    return totals.astype(np.int64)


def _require_counts(controls: Screen) -> None:
    """Raise unless control cells have raw counts."""
    if controls.design.scale != "counts":
        raise ValueError("controls_scale='log1p': depths are read off raw counts. Name their layer, or give depths=.")
