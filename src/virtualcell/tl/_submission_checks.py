"""The rules of the Virtual Cell Challenge, as cell-eval 0.8.2 (2025) and vcc-cli 0.3.0 (2026) check them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from virtualcell._errors import unknown_name
from virtualcell.data._counts import Sampling
from virtualcell.data._design import Design
from virtualcell.data._labels import is_several
from virtualcell.data._screen import Screen

logger = logging.getLogger(__name__)

# Names in the file.
KEY, CONTROL, CELL_TYPE, CONTEXT = "target_gene", "non-targeting", "celltype", "context"
_N_GENES = {2025: 18_080, 2026: 18_533}
_MAX_CELLS = {2025: 200_000, 2026: 400_000}
_N_CELLS_2026 = 400
_MAX_TOTAL_2026 = 1_000_000
_MAX_STORED_2026 = 4_750_000_000


def check_path(path: str | os.PathLike, overwrite: bool) -> Path:
    """Raise unless the file can be written."""
    path = Path(path)
    if path.suffix != ".vcc":
        raise ValueError(f"path={str(path)!r} must end in '.vcc'.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"path={str(path)!r} exists. Say overwrite=True, or choose another path.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(path.parent)!r}. Create it first.")
    return path


def check_arguments(
    year: int, perturbations: object, contexts: object, depths: object, sampling: str | None, missing_genes: str
) -> None:
    """Raise for what can be seen without the data."""
    if year not in _N_GENES:
        raise ValueError(f"year={year!r} is unknown. Say 2025 or 2026.")
    if sampling is not None and sampling not in get_args(Sampling):
        raise unknown_name("sampling", sampling, get_args(Sampling))
    if missing_genes not in ("error", "control"):
        raise unknown_name("missing_genes", missing_genes, ("error", "control"))
    if year == 2025 and (contexts is not None or depths is not None or isinstance(perturbations, Mapping)):
        raise ValueError(
            "contexts=, depths= and perturbations= by context have no meaning in year=2025: leave them out."
        )
    if year == 2025 and sampling is not None:
        raise ValueError(f"sampling={sampling!r} has no meaning in year=2025, which takes no counts: leave it out.")
    if year == 2026 and perturbations is None:
        raise ValueError(
            "perturbations must be given in 2026: the column target_gene of the challenge's pert_counts.csv."
        )
    if year == 2026 and contexts is None:
        raise ValueError(
            "contexts must be given in 2026: ['A', 'B', 'C'] in the validation phase, ['D', 'E', 'F'] in the final one."
        )
    for argument, value in (("contexts", contexts), ("perturbations", perturbations)):
        if isinstance(value, str):
            raise TypeError(f"{argument}={value!r} must be a list of names.")


def gene_list(genes: Sequence[str], year: int) -> pd.Index:
    """Return the list as an index of distinct names; another length than the challenge's is only noted, as they do."""
    if not is_several(genes):
        raise TypeError(f"genes={genes!r} must be a list of names, such as `pd.read_csv(file)['gene_name']`.")
    names = pd.Index(genes, dtype=str)
    if not names.is_unique:
        raise ValueError(f"genes repeats {list(names[names.duplicated()][:3])}: a gene stands in the list once.")
    if len(names) != _N_GENES[year]:
        logger.warning("genes has %d names; the list of %d had %d.", len(names), year, _N_GENES[year])
    return names


def check_cells(name: str, adata: AnnData, layer: str | None) -> None:
    """Raise for cells that cannot be read: none, names that stand twice, a matrix that was put together wrongly."""
    if not adata.n_obs:
        raise ValueError(f"{name} holds no cells.")
    if len(again := adata.var_names[adata.var_names.duplicated()]):
        raise ValueError(f"var_names of {name} repeats {again[0]!r}. Keep one column of each gene.")
    if not adata.obs_names.is_unique and name == "controls":
        raise ValueError("controls repeats obs_names. Run `controls.obs_names_make_unique()` first.")
    matrix = adata.X if layer is None else adata.layers.get(layer)
    if sparse.issparse(matrix):
        try:  # compiled code would read outside of such a matrix
            matrix.check_format(full_check=True)
        except ValueError as error:
            where = "X" if layer is None else f"layers[{layer!r}]"
            raise ValueError(
                f"{where} of {name} is a broken sparse matrix ({error}). Build it again, with `scipy.sparse.vstack` or "
                "`anndata.concat`."
            ) from error


def check_genes(name: str, here: pd.Index, genes: pd.Index) -> None:
    """Raise unless cells have exactly these genes."""
    if missing := [g for g in genes if g not in here]:
        remedy = " Fit with n_top_genes=None, or say missing_genes='control'." if name == "predicted" else ""
        raise unknown_name(
            "genes", missing[0], here, f"{len(missing)} of {len(genes)} genes are missing in {name}.{remedy}"
        )
    check_no_other_genes(name, here, genes)


def check_no_other_genes(name: str, here: pd.Index, genes: pd.Index) -> None:
    """Raise if there is a gene that the list does not have."""
    if len(extra := here.difference(genes)):
        raise unknown_name(
            f"var_names of {name}",
            extra[0],
            genes,
            f"{len(extra)} genes are not in the list: drop them with {name}[:, genes].copy().",
        )


def file_labels(screen: Screen, name: str, column: str | None) -> pd.DataFrame:
    """Return the labels of cells under the challenge's names, their contexts in `column` where there is one."""
    design, label = screen.design, pd.Series(np.asarray(screen.perturbation))
    if design.control != CONTROL and (label == CONTROL).any():
        raise ValueError(
            f"control={design.control!r}, but obs[{design.perturbation_key!r}] of {name} has {CONTROL!r} cells too, "
            "and that is the control's name in the file. Rename them."
        )
    labels = pd.DataFrame({KEY: label.mask(label == design.control, CONTROL)})
    if column is not None and design.context_key is not None:
        labels[column] = np.asarray(screen.context)
    return labels


def check_labels(
    obs: pd.DataFrame,
    control_obs: pd.DataFrame | None,
    design: Design,
    year: int,
    perturbations: Sequence[str] | Mapping[str, Sequence[str]] | None,
    contexts: Sequence[str] | None,
    n_cells: int | Mapping[str, int] | None,
) -> None:
    """Raise unless the right perturbations are there, in the right contexts and numbers, with or without controls."""
    key, control = design.perturbation_key, design.control
    is_control = obs[KEY] == CONTROL
    if year == 2026 and is_control.any():
        raise ValueError(
            f"predicted holds {is_control.sum()} cells of control={control!r}, and the scorer of 2026 takes its own. "
            f"Drop them: predicted[predicted.obs[{key!r}] != {control!r}].copy()."
        )
    if year == 2025 and is_control.any() and control_obs is not None:
        raise ValueError(f"predicted holds cells of control={control!r}, and controls= was given too: leave one out.")
    if year == 2025 and not is_control.any() and control_obs is None:
        raise ValueError(
            f"controls must be given: the file of 2025 holds control cells, and predicted has none labelled "
            f"{control!r}. Pass real ones, adata[adata.obs[{key!r}] == {control!r}]."
        )
    if control_obs is not None and (others := control_obs[KEY] != CONTROL).any():
        raise ValueError(
            f"controls holds cells of {control_obs[KEY][others].iloc[0]!r}. Keep only those of control={control!r}."
        )
    obs = obs[~is_control]
    if year == 2026:
        for name in obs[CONTEXT].unique():
            if name not in contexts:
                raise unknown_name(f"predicted.obs[{design.context_key!r}]", name, contexts, "See contexts=.")
        if absent := [c for c in contexts if not (obs[CONTEXT] == c).any()]:
            raise ValueError(
                f"contexts={list(contexts)}: predicted has no cells of {absent}. One file covers them all."
            )
    n_cells = _N_CELLS_2026 if n_cells is None and year == 2026 else n_cells
    for name in contexts or [None]:
        count = (obs if name is None else obs[obs[CONTEXT] == name])[KEY].value_counts()
        listed = count.index if perturbations is None else perturbations
        if isinstance(listed, Mapping):
            if name not in listed:
                raise unknown_name("contexts", name, listed, "perturbations= has no list for it.")
            listed = listed[name]
        listed = [p for p in listed if p not in (control, CONTROL)]
        where = "" if name is None else f" in context {name!r}"
        if len(other := count.index.difference(listed)):
            remedy = f"{len(other)} perturbations{where} are not in the challenge's list. Drop or rename their cells."
            raise unknown_name(f"predicted.obs[{key!r}]", other[0], listed, remedy)
        if absent := [p for p in listed if p not in count.index]:
            raise ValueError(
                f"perturbations: {len(absent)} of {len(listed)} are not predicted{where}, among them {absent[:5]}. "
                "Predict them; `vc.models.PerturbationMean` has a guess for those that a model does not know."
            )
        if n_cells is not None:
            _check_numbers(count[listed], n_cells, where)


def _check_numbers(count: pd.Series, n_cells: int | Mapping[str, int], where: str) -> None:
    """Raise unless every perturbation has its number of cells."""
    for name, has in count.items():
        if isinstance(n_cells, Mapping) and name not in n_cells:
            raise unknown_name("n_cells", name, n_cells, "Name a number of cells for every perturbation.")
        wanted = n_cells[name] if isinstance(n_cells, Mapping) else n_cells
        if has != wanted:
            raise ValueError(
                f"n_cells={wanted}: predicted has {has} cells of {name!r}{where}. The number is fixed, since it sets "
                f"what is significant. Predict as many: `vc.tl.predict_perturbation(..., n_cells={wanted})`."
            )


def check_matrix(submission: AnnData, year: int) -> None:
    """Raise if the file would be too large, or hold cells that say nothing."""
    if submission.n_obs > _MAX_CELLS[year]:
        raise ValueError(f"predicted: the file of {year} holds up to {_MAX_CELLS[year]} cells, not {submission.n_obs}.")
    totals = np.asarray(submission.X.sum(axis=1), dtype=np.float64).ravel()
    most = pd.Series(totals).groupby(submission.obs[KEY].to_numpy(), observed=True).max()
    if (most == 0).any():
        raise ValueError(
            f"predicted is zero throughout for {list(most.index[most == 0][:5])}: was it predicted at all?"
        )
    if year == 2026 and submission.X.nnz > _MAX_STORED_2026:
        raise ValueError(
            f"predicted has {submission.X.nnz} values other than 0, and the scorer takes {_MAX_STORED_2026}. Set the "
            "smallest to 0."
        )
    if year == 2026 and totals.max() > _MAX_TOTAL_2026:
        raise ValueError(
            f"predicted has {(totals > _MAX_TOTAL_2026).sum()} cells of more than {_MAX_TOTAL_2026} counts, up to "
            f"{totals.max():g}, which the scorer refuses. Lower depths=."
        )
