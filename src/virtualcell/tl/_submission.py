"""The file that the Virtual Cell Challenge takes, from predicted cells."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._design import Design, Scale, expression_modality, labels, obs_column
from virtualcell._errors import unknown_name
from virtualcell.data._counts import Sampling, depth_matched_counts
from virtualcell.data._matrix import check_matches_scale, columns_by_name, log_expression, matrix_name, raw_matrix
from virtualcell.io._vcc import vcc_meta, write_vcc
from virtualcell.tl._submission_checks import (
    CELL_TYPE,
    CONTEXT,
    CONTROL,
    KEY,
    check_arguments,
    check_labels,
    check_matrix,
    gene_list,
)

logger = logging.getLogger(__name__)


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
    sampling: Sampling = "systematic",
    missing_genes: Literal["error", "control"] = "error",
    perturbation_key: str | None = None,
    control: str | None = None,
    context_key: str | None = None,
    layer: str | None = None,
    scale: Scale | None = None,
    overwrite: bool = False,
    seed: int = 0,
    modality: str = "rna",
) -> AnnData:
    r"""Check predicted cells by the rules of the Virtual Cell Challenge and write the file that it takes.

    In 2025 that is log(1 + counts per 10,000), with real control cells; in 2026 whole counts, with an exact number of
    cells per context and perturbation, and no control cells.

    Counts are drawn from a prediction on the log scale at the depth :math:`N_i` of the real control cell that it
    started from: with :math:`r_{ig} = e^{x_{ig}} - 1`, the expected counts are
    :math:`m_{ig} = N_i r_{ig} / \sum_h r_{ih}`. Either way of drawing keeps every cell's total at :math:`N_i` and the
    mean of every count at :math:`m_{ig}`; they differ in the noise:

    * `sampling="systematic"` rounds each :math:`m_{ig}` up or down by chance, with a variance of at most 1/4. It is for
      models that predict cells, whose variation has the noise of counting in it already: those that shift real control
      cells, or learned the distribution of real cells.
    * `sampling="multinomial"` counts molecules anew, with a variance of about :math:`m_{ig}`. It is for models that
      predict profiles free of noise, such as one mean for all cells; on top of a real cell it is that noise twice.

    Parameters
    ----------
    predicted
        Predicted cells, as of :func:`virtualcell.tl.predict_perturbation`. It is not changed.
    path
        File to write, ending in `.vcc`.
    year
        Whose rules.
    genes
        The challenge's gene list. Cells must have exactly these genes, in any order; the file has them in this one.
    perturbations
        The challenge's list, the same in every context or one per context; the control in it is passed over. Cells must
        have exactly these. Needed for 2026, checked for 2025 if given.
    contexts
        2026: the contexts that the file must cover, such as `["A", "B", "C"]` (`D`, `E`, `F` in the final phase).
    n_cells
        Cells of each perturbation in each context; 400 by default for 2026, not checked by default for 2025.
    controls
        Real control cells, and no others. They go into the file of 2025. For 2026 those that `predicted` started from
        give the depths, summed over `genes`.
    controls_layer, controls_scale
        Where and how expression is stored in `controls`; as `fit_state` noted there, else raw counts in `X`.
    depths
        2026, in place of `controls`: the total of each cell, or the column of `obs` that holds it.
    sampling
        2026: how counts are drawn; see above.
    missing_genes
        What to do where the model predicts only some of `genes`: "control" takes the others from the control cell that
        the prediction started from, which says that nothing happened to them.
    perturbation_key, control, context_key, layer, scale
        Columns of `obs`, label of the control cells, and where and how expression is stored in `predicted`; as noted by
        `predict_perturbation` where left out. The file has the challenge's own names whatever they are. In 2025 a
        `context_key` given here becomes the column `celltype`.
    overwrite
        Replace the file if there is one.
    seed
        Of the draw of counts. The order of genes does not matter to it.
    modality
        Expression modality of a MuData.

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
    """
    path = Path(path)
    if path.suffix != ".vcc":
        raise ValueError(f"path={str(path)!r} must end in '.vcc'.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"path={str(path)!r} exists. Say overwrite=True, or choose another path.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}. Create it first.")
    check_arguments(year, perturbations, contexts, depths, sampling, missing_genes)
    genes, contexts = gene_list(genes, year), None if contexts is None else list(contexts)
    stated = {"perturbation_key": perturbation_key, "control": control, "context_key": context_key}
    design = Design.from_data(predicted, modality=modality, layer=layer, scale=scale, **stated)
    if year == 2026 and design.context_key is None:
        raise ValueError("context_key must be given: in 2026 every cell names the context it was predicted for.")
    column = CONTEXT if year == 2026 else CELL_TYPE if context_key is not None else None
    cells = _Cells.read("predicted", predicted, design, column, modality)
    if controls is not None:
        stated = {"perturbation_key": design.perturbation_key, "control": design.control, "context_key": context_key}
        stated |= {"layer": controls_layer, "scale": controls_scale}
        of_controls = Design.from_data(controls, modality=modality, **stated)
        controls = _Cells.read("controls", controls, of_controls, column if year == 2025 else None, modality)
        controls.check_genes(genes)
    check_labels(cells.obs, None if controls is None else controls.obs, design, year, perturbations, contexts, n_cells)

    if missing_genes == "control":
        matrix = _filled(cells, controls, genes)
    else:
        cells.check_genes(genes)
        matrix = cells.counts(genes) if year == 2026 and design.scale == "counts" else cells.log(genes)
    obs = cells.obs
    if year == 2025 and controls is not None:
        of_controls = controls.log(genes)
        _check_same_scale(cells, controls, of_controls, genes)
        matrix, obs = sparse.vstack([matrix, of_controls], format="csr"), pd.concat([obs, controls.obs])
    elif year == 2026:
        totals = _depths(cells, controls, depths, genes)
        if totals is not None:
            matrix = depth_matched_counts(matrix, totals, genes=genes, sampling=sampling, seed=seed)
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


@dataclass(frozen=True)
class _Cells:
    """Cells as given to the argument `name`, and their `obs` under the challenge's names."""

    name: str
    adata: AnnData
    design: Design
    obs: pd.DataFrame

    @classmethod
    def read(cls, name: str, data: AnnData | MuData, design: Design, column: str | None, modality: str) -> _Cells:
        key = design.perturbation_key
        label = labels(data, key, argument="perturbation_key", modality=modality)
        if design.control != CONTROL and (label == CONTROL).any():
            raise ValueError(
                f"control={design.control!r}, but obs[{key!r}] of {name} has {CONTROL!r} cells too, and that is the "
                "control's name in the file. Rename them."
            )
        obs = pd.DataFrame({KEY: label.mask(label == design.control, CONTROL)})
        if column is not None:
            obs[column] = labels(data, design.context_key, argument="context_key", modality=modality)
        adata = expression_modality(data, modality)
        if not adata.n_obs:
            raise ValueError(f"{name} holds no cells.")
        if len(again := adata.var_names[adata.var_names.duplicated()]):
            raise ValueError(f"var_names of {name} repeats {again[0]!r}. Keep one column of each gene.")
        if not adata.obs_names.is_unique and name == "controls":
            raise ValueError("controls repeats obs_names. Run `controls.obs_names_make_unique()` first.")
        matrix = adata.X if design.layer is None else adata.layers.get(design.layer)
        if sparse.issparse(matrix):
            try:  # compiled code would read outside of a matrix that was put together wrongly
                matrix.check_format(full_check=True)
            except ValueError as error:
                raise ValueError(
                    f"{matrix_name(design.layer)} of {name} is a broken sparse matrix ({error}). Build it again, with "
                    "`scipy.sparse.vstack` or `anndata.concat`."
                ) from error
        return cls(name, adata, design, obs)

    def check_genes(self, genes: pd.Index) -> None:
        """Raise unless the cells have exactly these genes."""
        here = self.adata.var_names
        if missing := [g for g in genes if g not in here]:
            remedy = " Fit with n_top_genes=None, or say missing_genes='control'." if self.name == "predicted" else ""
            raise unknown_name(
                "genes", missing[0], here, f"{len(missing)} of {len(genes)} genes are missing in {self.name}.{remedy}"
            )
        self.check_no_other_genes(genes)

    def check_no_other_genes(self, genes: pd.Index) -> None:
        """Raise if there is a gene that the list does not have."""
        if len(extra := self.adata.var_names.difference(genes)):
            raise unknown_name(
                f"var_names of {self.name}",
                extra[0],
                genes,
                f"{len(extra)} genes are not in the list: drop them with {self.name}[:, genes].copy().",
            )

    def log(self, genes: pd.Index) -> sparse.csr_matrix:
        """Return log(1 + counts per 10,000) of these genes."""
        names = ("layer", "scale", "library_size_key", "target_sum")
        return log_expression(self.adata, genes=genes, **{n: getattr(self.design, n) for n in names})

    def counts(self, genes: pd.Index) -> sparse.csr_matrix:
        """Return raw counts of these genes, in memory of their own."""
        matrix = raw_matrix(self.adata, self.design.layer)
        check_matches_scale(matrix, "counts", f"{matrix_name(self.design.layer)} of {self.name}")
        matrix = columns_by_name(matrix, self.adata.var_names, genes).copy()
        matrix.eliminate_zeros()
        return matrix


def _start_cells(cells: _Cells, controls: _Cells) -> np.ndarray:
    """Return the rows of `controls` that predictions started from."""
    if _keys.CONTROL_BARCODE not in cells.adata.obs:
        raise KeyError(
            f"predicted.obs has no {_keys.CONTROL_BARCODE!r} to find control cells by. Take predicted from "
            "`vc.tl.predict_perturbation`, or give depths= (and all genes)."
        )
    barcodes = cells.adata.obs[_keys.CONTROL_BARCODE].astype(str)
    rows = controls.adata.obs_names.get_indexer(barcodes)
    if (rows < 0).any():
        remedy = f"{(rows < 0).sum()} predicted cells started from cells that controls= lacks: pass the same ones."
        raise unknown_name(_keys.CONTROL_BARCODE, barcodes.iloc[np.argmin(rows)], controls.adata.obs_names, remedy)
    return rows


def _check_same_scale(cells: _Cells, controls: _Cells, log: sparse.csr_matrix, genes: pd.Index) -> None:
    """Raise where control cells, `log`, come out otherwise than as the cells that predictions started from."""
    adata = cells.adata
    if _keys.CONTROL_BARCODE not in adata.obs or _keys.CONTROL_LAYER not in adata.layers:
        return
    rows = controls.adata.obs_names.get_indexer(adata.obs[_keys.CONTROL_BARCODE].astype(str))
    known = np.flatnonzero(rows >= 0)[:100]
    before = sparse.csr_matrix(adata.layers[_keys.CONTROL_LAYER][known])
    off = abs(before - columns_by_name(log[rows[known]], genes, adata.var_names))
    if off.nnz and off.max() > 0.01:
        raise ValueError(
            f"controls differs by up to {off.max():.3g} from layers[{_keys.CONTROL_LAYER!r}] of predicted, the same "
            "cells as predictions started from them: their counts were divided by other totals. Give them as log(1 + "
            "counts per 10,000), controls_scale='log1p', or with all genes."
        )


def _filled(cells: _Cells, controls: _Cells | None, genes: pd.Index) -> sparse.csr_matrix:
    """Return log expression, with the genes that were not predicted as in the control cell."""
    if controls is None or cells.design.scale != "log1p":
        raise ValueError("missing_genes='control' needs controls=, and predictions with scale='log1p'.")
    cells.check_no_other_genes(genes)
    rest = genes.difference(cells.adata.var_names, sort=False)
    logger.info("%d of %d genes are not predicted and taken from the control cells.", len(rest), len(genes))
    joined = sparse.hstack([cells.log(None), controls.log(rest)[_start_cells(cells, controls)]], format="csr")
    return columns_by_name(joined, cells.adata.var_names.append(rest), genes)


def _depths(
    cells: _Cells, controls: _Cells | None, depths: str | Sequence[int] | None, genes: pd.Index
) -> np.ndarray | None:
    """Return the total that each predicted cell is to have; None where it has counts already."""
    if cells.design.scale == "counts":
        if controls is not None or depths is not None:
            raise ValueError("scale='counts': predicted holds counts already. Leave out controls= and depths=.")
        return None
    if isinstance(depths, str):
        totals = obs_column(cells.adata, depths, argument="depths").to_numpy(dtype=np.float64)
    elif depths is not None:
        totals = np.asarray(depths, dtype=np.float64)
        if totals.shape != (cells.adata.n_obs,):
            raise ValueError(f"depths has shape {totals.shape}: give one number for each of {cells.adata.n_obs} cells.")
    elif controls is None:
        raise ValueError(
            "controls or depths must be given: counts are drawn at the depth of the control cell that a prediction "
            "started from. Pass the control cells with their raw counts, or the totals."
        )
    elif controls.design.scale != "counts":
        raise ValueError("controls_scale='log1p': depths are read off raw counts. Name their layer, or give depths=.")
    else:
        totals = np.asarray(controls.counts(genes).sum(axis=1), dtype=np.float64).ravel()[_start_cells(cells, controls)]
    bad = ~((totals >= 1) & (totals == np.rint(totals)))
    if bad.any():
        raise ValueError(f"depths must be whole numbers from 1: {bad.sum()} are not, among them {totals[bad][0]:g}.")
    return totals.astype(np.int64)
