"""Hold out contexts, perturbations or cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._arguments import require_number
from virtualcell._errors import unknown_name
from virtualcell._keys import SPLITS
from virtualcell._settings import seed_of
from virtualcell.data._design import OF_LABELS, Design, note_design, require_columns
from virtualcell.data._doses import drug_and_dose
from virtualcell.data._labels import expression_modality, is_several, parts, text
from virtualcell.data._read_design import read_design
from virtualcell.data._results import ours, require_results

logger = logging.getLogger(__name__)

_KINDS = {
    frozenset({"contexts"}): "zero-shot",
    frozenset({"contexts", "perturbations"}): "few-shot",
    frozenset({"perturbations"}): "unseen perturbations",
    frozenset({"fraction"}): "random",
}


def split(
    adata: AnnData | MuData,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    holdout: Mapping[str, Sequence[str] | int | float],
    context_key: str | None = None,
    batch_key: str | None = None,
    combination_separator: str | None = "+",
    dose_key: str | None = None,
    library_size_key: str | None = None,
    val_fraction: float = 0.1,
    key_added: str = _keys.SPLIT,
    seed: int | None = None,
    modality: str = "rna",
) -> None:
    """Divide the cells into train, val and test by what a model must generalise to.

    ========================================================= ===================== ====================================
    `holdout`                                                 kind                  test cells
    ========================================================= ===================== ====================================
    `{"contexts": ["K562"]}`                                  zero-shot             all perturbed cells of the contexts
    `{"contexts": ["K562"], "perturbations": ["JAK2", ...]}`  few-shot              these perturbations, in the contexts
    `{"perturbations": ["JAK2", ...]}`                        unseen perturbations  these perturbations, in all contexts
    `{"fraction": 0.2}`                                       random                that share of each group's cells
    ========================================================= ===================== ====================================

    In place of a list, a whole number draws that many names and a fraction that share of them (at least one). Few-shot
    draws once, among the perturbations seen in the held-out contexts, and holds the same ones out of each.

    **Control cells are always "train", in every context**: they are what a model starts from and what its prediction
    is compared with, so those of a held-out context stay at hand as input (and may be learned from). They are never
    "val" or "test".

    Holding out "A" holds out what else stands for it ("A+ctrl"), and leaves the combination "A+B" in training. Such
    combinations are named in a warning; list them too if nothing with A may be seen.

    Validation cells are `val_fraction` of the perturbed training cells of each (context, perturbation) group, rounded;
    a group always keeps one training cell. Draws follow the sorted cell names, so the order of cells does not matter.

    Parameters
    ----------
    adata
        Cells with unique names. In a MuData, the modality is read and written.
    perturbation_key
        Column of `obs` with the perturbation of each cell.
    context_key
        Column of `obs` with the context. Without it all cells are of one, "(all)".
    control
        Label of the control cells in `perturbation_key`, or several.
    batch_key
        Column of `obs` with the experimental batch, which plays no part in a split and is noted for later
        calls.
    library_size_key
        Column of `obs` with the library size, which plays no part in a split and is noted for later calls.
    holdout
        What to hold out, as in the table above.
    combination_separator
        What stands between the parts of a combination, such as "+"; `None` where every label is one
        perturbation.
    dose_key
        Column of `obs` with the dose of the drug that `perturbation_key` names. A drug that is held out without
        a dose is held out at all doses.
    val_fraction
        Share of the perturbed training cells to validate on, from 0 up to but not including 1.
    key_added
        Name of the new column.
    seed
        Seed of every draw; by default `vc.settings.seed`.
    modality
        Modality of a MuData with the expression.

    Returns
    -------
    Nothing. Written are `obs[key_added]` (categorical: train, val, test) and
    `uns["virtualcell"]["split_manifest"][key_added]`: the kind, the arguments, the names held out, and the `groups`, a
    table of `context`, `perturbation`, `split` and `n_cells`. Save it with :func:`save_split`. The columns are noted
    for later calls in `uns["virtualcell"]["design"]`.

    Raises
    ------
    KeyError
        A column, context or perturbation of that name is not there.
    ValueError
        The control is held out, a context with test cells has no control cells, or nothing is left to train or test on.

    Examples
    --------
    >>> vc.pp.split(
    ...     adata,
    ...     perturbation_key="target_gene",
    ...     control="non-targeting",
    ...     context_key="cell_type",
    ...     holdout={"contexts": ["type_3"]},
    ... )
    >>> held_out = adata.obs["split"] == "test"
    >>> sorted(adata.obs.loc[held_out, "cell_type"].unique())
    ['type_3']
    """
    kind, seed = _kind(holdout, val_fraction, context_key), seed_of(seed)
    design = Design(
        perturbation_key, control, context_key, combination_separator=combination_separator, dose_key=dose_key
    )
    control = design.control
    beside = {"batch_key": batch_key, "library_size_key": library_size_key}
    require_columns(adata, modality, **beside)
    labels = {"perturbation_key": perturbation_key, "context_key": context_key, "dose_key": dose_key}
    require_own_column(key_added, labels | beside)
    cells = cells_of(adata, design, modality)
    perturbed = cells["perturbation"] != control
    if perturbed.all():
        raise unknown_name("control", control, cells["perturbation"].unique(), f"Name a label of {perturbation_key!r}.")

    # Two streams, so that listing the names that a number would draw gives the very same split.
    names_rng, cells_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    if kind == "random":
        if not isinstance(holdout["fraction"], Real) or not 0 < holdout["fraction"] < 1:
            raise ValueError(f"holdout={{'fraction': {holdout['fraction']!r}}} must be a number between 0 and 1.")
        held_out = {}
        test = perturbed & _draw(cells, holdout["fraction"], cells_rng)
    else:
        held_out, test = {}, perturbed
        for part, column in (("contexts", "context"), ("perturbations", "perturbation")):
            if part in holdout:
                held_out[part] = _names(holdout[part], part, cells.loc[test, column], design, names_rng)
                test = test & cells[column].isin(held_out[part])

    assigned = pd.Series("train", index=cells.index)
    assigned[test] = "test"
    candidates = perturbed & ~test
    if not candidates.any():
        raise ValueError(f"holdout={dict(holdout)!r} leaves no perturbed cell to train on. Hold out less.")
    if not test.any():
        raise ValueError(f"holdout={dict(holdout)!r} leaves no cell to test on. Hold out more.")
    without = sorted(set(cells.loc[test, "context"]) - set(cells.loc[~perturbed, "context"]))
    if without:
        raise ValueError(
            f"Context {without[0]!r} has test cells but no control cells ({control!r}) for a model to start from. "
            "Choose another context, or drop its cells."
        )
    chosen = cells[candidates]
    assigned[chosen.index[_draw(chosen, val_fraction, cells_rng)]] = "val"

    manifest = {
        "kind": kind,
        "perturbation_key": perturbation_key,
        "control": list(design.controls) if design.other_controls else control,
        "combination_separator": combination_separator or "",
        "holdout": {k: list(map(text, v)) if is_several(v) else v for k, v in holdout.items()},
        "held_out": held_out,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    manifest |= {k: v for k, v in (("context_key", context_key), ("dose_key", dose_key)) if v is not None}
    write_split(adata, cells, assigned, manifest, key_added, modality, beside)
    _report(cells, assigned, kind)


def _kind(holdout: Mapping, val_fraction: float, context_key: str | None) -> str:
    """Return which kind of split this is, after checking what can be checked without the cells."""
    if not isinstance(holdout, Mapping):
        raise TypeError(f"holdout={holdout!r} must be a dictionary, such as {{'contexts': ['K562']}}.")
    kind = _KINDS.get(frozenset(holdout))
    if kind is None:
        raise ValueError(
            f"holdout={dict(holdout)!r} is none of the four kinds. Give one of {{'contexts': ...}}, "
            "{'contexts': ..., 'perturbations': ...}, {'perturbations': ...} or {'fraction': ...}."
        )
    require_number("val_fraction", val_fraction, below=1)
    if "contexts" in holdout and context_key is None:
        raise ValueError(
            "holdout names contexts, but context_key is not given. Name the column of obs that holds them."
        )
    return kind


def require_own_column(key_added: object, columns: Mapping[str, str | None]) -> None:
    """Raise for the name of a new column that is no text, or that of a column which the split is made from."""
    if not isinstance(key_added, str) or not key_added:
        raise TypeError(f"key_added={key_added!r} must be the name of a column of obs, such as {_keys.SPLIT!r}.")
    if key_added in columns.values():
        argument = next(argument for argument, column in columns.items() if column == key_added)
        raise ValueError(f"key_added={key_added!r} is the column of {argument}=, which would be lost. Name another.")


def cells_of(adata: AnnData | MuData, design: Design, modality: str) -> pd.DataFrame:
    """Return the context and perturbation of each cell, indexed by its name."""
    names = expression_modality(adata, modality).obs_names
    found, _ = read_design(adata, design, modality=modality)
    if not names.is_unique:
        twice = names[names.duplicated()]
        raise ValueError(f"obs_names repeats {list(twice[:3])}. Run `adata.obs_names_make_unique()` first.")
    context = found.get("context_key", np.full(len(names), _keys.ALL))
    columns = {"context": np.asarray(context), "perturbation": np.asarray(found["perturbation_key"])}
    return pd.DataFrame(columns, index=names)


def _names(wanted: Any, part: str, column: pd.Series, design: Design, rng: np.random.Generator) -> list[str]:
    """Return the names to hold out, checked where they are listed and drawn where `wanted` is a number."""
    known = sorted(column.unique())
    if isinstance(wanted, Real):
        whole = isinstance(wanted, Integral)
        if not (1 <= wanted <= len(known) if whole else 0 < wanted < 1):
            raise ValueError(
                f"holdout={{{part!r}: {wanted!r}}} must be a whole number from 1 to {len(known)} (all of them) or a "
                "fraction between 0 and 1."
            )
        number = int(wanted) if whole else max(1, round(wanted * len(known)))
        return sorted(rng.choice(known, size=number, replace=False).tolist())
    name_of = design.name_of if part == "perturbations" else text
    asked = {name_of(label) for label in (wanted if is_several(wanted) else [wanted])}
    if part == "perturbations" and design.dose_key is not None:  # a drug stands for all of its doses
        doses = {name: {k for k in known if (at := drug_and_dose(k)) is not None and at[0] == name} for name in asked}
        asked = set().union(*(doses[name] or {name} for name in asked))
    names = sorted(asked)
    if part == "perturbations" and design.control in names:
        raise ValueError(f"holdout names the control {design.control!r}, which every model needs. Leave it out.")
    for name in names:
        if name not in known:
            raise unknown_name(f"holdout[{part!r}]", name, known, "Only labels with perturbed cells can be held out.")
    return names


def _draw(cells: pd.DataFrame, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Mark `fraction` of the cells of each group, whatever their order; one cell of a group is always left."""
    score = np.empty(len(cells))
    score[np.argsort(cells.index.to_numpy(dtype=str))] = rng.random(len(cells))
    keys = [cells["context"], cells["perturbation"]]
    grouped = pd.Series(score, index=cells.index).groupby(keys)
    size = grouped.transform("size")
    number = np.minimum(np.rint(fraction * size), size - 1)
    return (grouped.rank(method="first") <= number).to_numpy()


def write_split(
    adata: AnnData | MuData,
    cells: pd.DataFrame,
    assigned: pd.Series,
    manifest: dict,
    key: str,
    modality: str,
    beside: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Write the split and its manifest, with the table of groups, to the modality; note columns `beside` the labels."""
    expression = expression_modality(adata, modality)
    require_results(expression)
    groups = cells.assign(split=assigned).groupby(["context", "perturbation", "split"]).size()
    expression.obs[key] = pd.Categorical(assigned, categories=SPLITS)
    before = ours(expression)
    manifests = {**before.get(_keys.SPLIT_MANIFEST, {}), key: manifest | {"groups": groups.reset_index(name="n_cells")}}
    expression.uns[_keys.UNS] = {**before, _keys.SPLIT_MANIFEST: manifests}
    labels = {k: manifest[k] for k in OF_LABELS if k in manifest}
    note_design(adata, labels | dict(beside), modality, without=OF_LABELS)


def _report(cells: pd.DataFrame, assigned: pd.Series, kind: str) -> None:
    """Log the sizes, and warn of combinations that show a held-out target in training."""
    sizes = assigned.value_counts()
    seen = set(cells.loc[assigned == "train", "perturbation"])
    tested = set(cells.loc[assigned == "test", "perturbation"])
    logger.info(
        "%s split: %s cells; %d of %d test perturbations are seen in training.",
        kind,
        ", ".join(f"{sizes.get(name, 0)} {name}" for name in SPLITS),
        len(tested & seen),
        len(tested),
    )
    if kind == "unseen perturbations":
        held = {part for label in tested for part in parts(label)}
        leaks = sorted(label for label in seen if set(parts(label)) & held)
        if leaks:
            shown = ", ".join(leaks[:8]) + (", ..." if len(leaks) > 8 else "")
            logger.warning("%d training perturbations share a target with a held-out one: %s.", len(leaks), shown)
