"""Save a split, and replay it elsewhere."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell._keys import SPLITS
from virtualcell._reading import as_damaged, mapping_of, read_json, require_bounded
from virtualcell.data._design import Design
from virtualcell.data._labels import expression_modality, read_labels
from virtualcell.data._results import ours
from virtualcell.pp._split import cells_of, require_own_column, write_split

logger = logging.getLogger(__name__)


def save_split(
    adata: AnnData | MuData, path: str | Path, *, split_key: str = _keys.SPLIT, modality: str = "rna"
) -> None:
    """Save a split as JSON: how it was made and the names of the cells of each part.

    Parameters
    ----------
    adata
        Cells that :func:`split` divided.
    path
        File to write.
    split_key
        Column of `obs` with the split.
    modality
        Modality of a MuData with the split.

    Raises
    ------
    KeyError
        There is no split of that name.

    Examples
    --------
    >>> vc.pp.split(adata, perturbation_key="target_gene", control="non-targeting", holdout={"fraction": 0.2})
    >>> vc.pp.save_split(adata, "split.json")
    """
    expression = expression_modality(adata, modality)
    manifests = ours(expression).get(_keys.SPLIT_MANIFEST, {})
    if split_key not in manifests:
        raise unknown_name("split_key", split_key, manifests, "Run `vc.pp.split` first.")
    assigned = read_labels(adata, split_key, argument="split_key", modality=modality)
    record = {k: v for k, v in manifests[split_key].items() if k != "groups"}
    record["cells"] = {name: sorted(assigned.index[assigned == name]) for name in SPLITS}
    # `uns` comes back from a file with numpy scalars and arrays, which JSON does not know.
    Path(path).write_text(json.dumps(record, indent=1, default=lambda value: value.tolist()) + "\n")


def apply_split(
    adata: AnnData | MuData, path: str | Path, *, key_added: str = _keys.SPLIT, modality: str = "rna"
) -> None:
    """Replay a split saved by :func:`save_split`: each cell goes, by its name, where it was.

    Parameters
    ----------
    adata
        The same cells in any order, or a part of them.
    path
        File that :func:`save_split` wrote.
    key_added
        Name of the new column of `obs`.
    modality
        Modality of a MuData to write to.

    Returns
    -------
    Nothing; the same is written as by :func:`split`.

    Raises
    ------
    ValueError
        Cells of `adata` are not in the saved split, or have other labels than those that had their names.

    Examples
    --------
    >>> vc.pp.split(adata, perturbation_key="target_gene", control="non-targeting", holdout={"fraction": 0.2})
    >>> vc.pp.save_split(adata, "split.json")
    >>> again = adata[::-1].copy()  # cells are matched by name
    >>> vc.pp.apply_split(again, "split.json", key_added="replayed")
    >>> bool((again.obs["replayed"] == again.obs["split"]).all())
    True
    """
    manifest = read_json(Path(path), "split that `vc.pp.save_split` wrote")
    with as_damaged(path, "split that `vc.pp.save_split` wrote"):
        require_bounded({k: v for k, v in manifest.items() if k != "cells"}, str(path))
        saved = {cell: name for name, members in manifest.pop("cells").items() for cell in members}
        if not set(saved.values()) <= set(SPLITS):
            raise ValueError(f"its parts are {sorted(set(saved.values()))[:5]}, not {SPLITS}")
        design = {k: manifest[k] for k in ("perturbation_key", "control", "kind")}
        held_out = {part: [str(name) for name in names] for part, names in mapping_of(manifest["held_out"], "").items()}
    stated = {k: manifest[k] for k in ("context_key", "combination_separator", "dose_key") if k in manifest}
    require_own_column(key_added, {k: v for k, v in manifest.items() if k.endswith("_key")})
    made = Design(design["perturbation_key"], design["control"], **stated)
    cells = cells_of(adata, made, modality)
    assigned = pd.Series(cells.index.map(saved), index=cells.index)
    missing = assigned.index[assigned.isna()]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(cells)} cells are not in the split saved in {str(path)!r}, among them "
            f"{list(missing[:3])}. Cells are matched by name: give the data the names they had, or drop these cells."
        )
    _require_held_out(cells, assigned, made.control, held_out, path)
    write_split(adata, cells, assigned, manifest, key_added, modality)
    logger.info("Replayed a %s split: %d of its %d cells are here.", manifest["kind"], len(cells), len(saved))


def _require_held_out(
    cells: pd.DataFrame, assigned: pd.Series, control: str, held_out: Mapping[str, list[str]], path: str | Path
) -> None:
    """Raise where cells have other labels than those that had their names when the split was saved."""
    is_perturbed = cells["perturbation"] != control
    may_be_tested = is_perturbed.copy()
    for part, column in (("contexts", "context"), ("perturbations", "perturbation")):
        if part in held_out:
            may_be_tested &= cells[column].isin(held_out[part])
    is_tested = assigned == "test"
    wrong = (is_tested & ~may_be_tested) | (~is_perturbed & (assigned != "train"))
    if held_out:
        wrong |= may_be_tested & ~is_tested
    if wrong.any():
        cell = cells.index[wrong][0]
        was = f"{cells['perturbation'][cell]!r} in {cells['context'][cell]!r} and was saved as {assigned[cell]!r}"
        raise ValueError(
            f"{wrong.sum()} of {len(cells)} cells are not those of their names in the split saved in {str(path)!r}, "
            f"among them {cell!r}, which is {was}. Held out were {held_out or 'shares of cells'}, and control cells "
            "are 'train'. Cells are matched by name: give the data the names and labels that it had."
        )
