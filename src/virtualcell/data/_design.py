"""The design of an experiment: which columns mean what, and on which scale the matrix is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell.data._doses import at_dose, drug_and_dose
from virtualcell.data._labels import JOIN, canonical, expression_modality, is_several, obs_column, parts, text
from virtualcell.data._results import ours
from virtualcell.data._tables import Vectors, as_table

Scale = Literal["counts", "log1p"]

AS_NOTED = "as noted"  # combination_separator= where it is not stated, since None states one thing

# What belongs to one model or one split, and is not noted beside the data for other calls.
_NOT_NOTED = ("split_key", "use_rep")
# What a statement replaces as well, because it says nothing without it.
_GO_TOGETHER = {
    "control": ("other_controls",),
    "scale": ("layer", "library_size_key"),
    "perturbation_key": ("control", "other_controls", "combination_separator", "dose_key"),
}
# What describes labels. A call that says how they are read says all of it, by what it leaves out too.
OF_LABELS = ("perturbation_key", "control", "other_controls", "context_key", "combination_separator", "dose_key")


@dataclass(frozen=True)
class Design:
    """Columns of `obs` and scale of the expression matrix, as the caller stated them.

    Parameters
    ----------
    perturbation_key, control
        Column with the perturbation of each cell, and its label of unperturbed cells. Where several labels are given,
        the first is the name of all of them, and the others are kept as `other_controls`.
    context_key, batch_key
        Columns with the context (cell type, cell line) and the experimental batch.
    split_key
        Column with `train`, `val` and `test`.
    gene_key
        Column of `var` with the names of genes that perturbations go by, where these are not `var_names`.
    use_rep
        Key of `obsm` with cell embeddings to work on in place of genes.
    layer, scale
        Layer with the expression (`X` where it is `None`), and what it holds: `"counts"` means raw counts, which are
        divided by the library size, multiplied by `target_sum` and put through log(1 + x); `"log1p"` means that this
        was done before.
    library_size_key
        Column with the library size; by default it is the row sum of the matrix over all its genes.
    target_sum
        Counts per cell after the division.
    n_genes
        How many genes the library sizes were summed over when a model was fitted.
    combination_separator
        What stands between the parts of a combination; `None` where a label is always one perturbation.
    dose_key
        Column with the dose of the drug that `perturbation_key` names.
    other_controls
        More labels of unperturbed cells.
    """

    perturbation_key: str
    control: str
    context_key: str | None = None
    batch_key: str | None = None
    split_key: str | None = None
    gene_key: str | None = None
    use_rep: str | None = None
    layer: str | None = None
    scale: Scale = "counts"
    library_size_key: str | None = None
    target_sum: float = 1e4
    n_genes: int | None = None
    combination_separator: str | None = JOIN
    dose_key: str | None = None
    other_controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_scale(self.scale)
        for role in ("context_key", "batch_key"):
            if (key := getattr(self, role)) is not None and key == self.perturbation_key:
                raise ValueError(
                    f"{role}={key!r} is the column of perturbations, and its groups hold no control cells. Name "
                    "another column, or leave it out."
                )
        labels = list(dict.fromkeys([*control_labels(self.control), *map(text, self.other_controls)]))
        separator = self.combination_separator or None  # "" in a file
        if separator is not None and not isinstance(separator, str):
            raise TypeError(f"combination_separator={separator!r} must be text, such as '+' or '_', or None.")
        if self.dose_key is not None and separator is not None and "_" in separator:
            raise ValueError(
                f"combination_separator={separator!r} does not go with dose_key={self.dose_key!r}, where names of "
                "drugs at doses are 'drug_1.0'. Write combinations in another way, such as 'A+B'."
            )
        for name, value in (
            ("control", labels[0]),
            ("other_controls", tuple(labels[1:])),
            ("combination_separator", separator),
        ):
            object.__setattr__(self, name, value)

    @property
    def controls(self) -> tuple[str, ...]:
        """All labels of unperturbed cells; the first is the name of all of them."""
        return (self.control, *self.other_controls)

    def name_of(self, label: object) -> str:
        """Return the name of the perturbation that a label stands for; see :mod:`virtualcell.data._labels`."""
        name = canonical(label, self.controls, self.combination_separator)
        if self.dose_key is None or name == self.control:
            return name
        found = [(part, drug_and_dose(part)) for part in parts(name)]
        return JOIN.join(sorted(part if known is None else at_dose(part, known[1]) for part, known in found))

    def drug_name(self, label: object) -> str:
        """Return the name of what a label of `perturbation_key` says without the dose."""
        return canonical(label, self.controls, self.combination_separator)

    def named(self, features: Vectors) -> pd.DataFrame:
        """Return features of perturbations as a table, under the names of these, without any of the control."""
        features = as_table(features, "perturbation_features")
        features = features.set_axis([self.name_of(label) for label in features.index])
        return features[features.index != self.control]

    def to_uns(self) -> dict:
        """Entries for `uns` (h5ad holds no None: such entries are left out)."""
        found = asdict(self) | {
            "combination_separator": self.combination_separator or "",
            "other_controls": np.array(self.other_controls, dtype=str) if self.other_controls else None,
        }
        return {k: v for k, v in found.items() if v is not None and k not in _NOT_NOTED}

    def restated(self, **stated: object) -> Design:
        """Return the design with what is stated in place of what it had."""
        stated = only_stated(stated)
        check_library_sizes(stated.get("scale", self.scale), stated.get("library_size_key"))
        if "control" in stated:
            stated = {"other_controls": ()} | stated
        return dataclasses.replace(self, **stated)

    def plain(self) -> Design:
        """Return the design without what only models look at: batch, split, names of genes, embedding."""
        return dataclasses.replace(self, batch_key=None, split_key=None, gene_key=None, use_rep=None)

    def of_predicted(self, scale: Scale = "log1p") -> Design:
        """Return the design of cells that were predicted for such data, which have their expression in `X`."""
        key = self.library_size_key if scale == "counts" else None
        return dataclasses.replace(self.plain(), layer=None, scale=scale, library_size_key=key)

    @classmethod
    def from_data(cls, data: AnnData | MuData, *, modality: str = "rna", **stated: object) -> Design:
        """Take what the caller stated, and the rest from what earlier calls noted in `uns["virtualcell"]`.

        Another scale than the one that was noted is that of another matrix: `X`, where no layer is stated with it.
        Another column of perturbations has labels of its own.
        """
        stated = only_stated(stated)
        noted = noted_design(data, modality)
        changed = _changed(noted, stated, ("scale", "perturbation_key")) | ({"control"} & set(stated))
        replaced = {k for key in changed for k in _GO_TOGETHER[key]}
        noted = {k: v for k, v in noted.items() if k not in replaced}
        found = {f.name: noted[f.name] for f in fields(cls) if f.name in noted} | stated
        missing = [k for k in ("perturbation_key", "control") if k not in found]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} must be given: no earlier call, such as `vc.pp.split` or `vc.tl.fit_state`, "
                f"has noted a design in uns[{_keys.UNS!r}] of this data to take it from."
            )
        return cls(**found)


def only_stated(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that state something: `None` does so of a separator alone, that there is none."""
    found = {k: v for k, v in given.items() if v is not None}
    if given.get("combination_separator", AS_NOTED) is None:
        found["combination_separator"] = ""  # as h5ad has it
    return {k: v for k, v in found.items() if (k, v) != ("combination_separator", AS_NOTED)}


def noted_design(data: AnnData | MuData, modality: str = "rna") -> dict:
    """Return what earlier calls noted in `uns["virtualcell"]`, empty where there were none."""
    return ours(expression_modality(data, modality)).get("design", {})


def require_columns(data: AnnData | MuData, modality: str = "rna", **keys: str | None) -> None:
    """Raise for columns of `obs` that are not there, by the names of the arguments, whether a call uses them or not."""
    for argument, key in keys.items():
        if key is not None:
            obs_column(data, key, argument=argument, modality=modality)


def check_sides(predicted: AnnData | MuData, observed: AnnData | MuData) -> None:
    """Raise where measured cells were given first, and those that `predict_perturbation` made of them second."""

    def made(data: AnnData | MuData) -> bool:
        return isinstance(data, AnnData) and _keys.CONTROL_LAYER in data.layers

    if made(observed) and not made(predicted):
        raise ValueError(
            "`observed` is what `vc.tl.predict_perturbation` returned, and `predicted` is not: predicted cells come "
            "first, measured ones second."
        )


def note_design(
    data: AnnData | MuData,
    stated: Mapping[str, Any],
    modality: str = "rna",
    *,
    whole: bool = False,
    without: Collection[str] = (),
) -> None:
    """Note columns, control and scale in `uns["virtualcell"]`, so that nobody has to state them again.

    For the end of a call, which has read what it notes: what is wrong would be in the way of later calls. Columns that
    the call has no use for are noted too, which lets every call take a whole design; `require_columns` checks them.

    What was noted before and is not stated anew stays, but for what goes with it: other labels of a control, and the
    layer and the library sizes of a scale, and for what is to be `without` where it is not stated; nothing stays where
    the `whole` design is stated. A view is left as it is: writing to it would copy the data.
    """
    adata = expression_modality(data, modality)
    if adata.is_view:
        return
    found = only_stated(stated)
    if "control" in found:  # as h5ad has it
        first, *others = control_labels(found["control"])
        others += map(text, found.pop("other_controls", ()))
        found |= {"control": first, **({"other_controls": np.array(others, dtype=str)} if others else {})}
    noted = {} if whole else noted_design(adata)
    changed = _changed(noted, found, ("perturbation_key",)) | ({"control", "scale"} & set(found))
    replaced = {*without, *(k for key in changed for k in _GO_TOGETHER[key])}
    before = {k: v for k, v in noted.items() if k not in replaced}
    adata.uns[_keys.UNS] = {**ours(adata), "design": {**before, **found}}


def _changed(noted: Mapping[str, Any], stated: Mapping[str, Any], keys: Sequence[str]) -> set[str]:
    """Return which of some keys are stated otherwise than they were noted."""
    return {k for k in keys if k in stated and k in noted and stated[k] != noted[k]}


def control_labels(control: Any) -> list[str]:
    """Return the labels of unperturbed cells as text, of which there is one or more."""
    if control is None:
        raise TypeError("control=None: give the label of the unperturbed cells, or a list of them.")
    if not is_several(control):
        return [text(control)]
    labels = [text(label) for label in (sorted(control, key=text) if isinstance(control, set) else control)]
    if not labels:
        raise ValueError(f"control={control!r} names no label: give that of the unperturbed cells, or several.")
    return labels


def check_scale(scale: str, argument: str = "scale") -> None:
    """Raise unless `scale` is one of the two that are known."""
    if scale not in ("counts", "log1p"):
        raise ValueError(
            f"{argument}={scale!r} is unknown. Say 'counts' for raw counts or 'log1p' for log(1 + counts per 10,000); "
            "it is never guessed."
        )


def check_library_sizes(scale: str, library_size_key: str | None) -> None:
    """Raise for library sizes where nothing is divided by them."""
    if scale == "log1p" and library_size_key is not None:
        raise ValueError(
            f"library_size_key={library_size_key!r} has no use with scale='log1p', where cells were divided by their "
            "totals before. Leave it out, or give raw counts with scale='counts'."
        )
