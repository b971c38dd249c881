"""The names that the labels of cells stand for, in every column that a design names."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell.data._design import Design
from virtualcell.data._doses import dose_name, drug_and_dose, numbers
from virtualcell.data._labels import JOIN, Written, expression_modality, obs_column, parts, read_names


def read_design(
    data: AnnData | MuData, design: Design, *, modality: str = "rna", prefix: str = "", untreated: bool = False
) -> tuple[dict[str, pd.Categorical], dict[str, Written]]:
    """Return the names that the labels of cells stand for and how they are written, by the design's name of a column.

    Nothing but `obs` is read. `prefix` begins the name of the argument in messages. All cells are control cells where
    they are `untreated`, and the columns of perturbations and doses need not be there.
    """
    labels: dict[str, pd.Categorical] = {}
    written: dict[str, Written] = {}
    for role in ("context_key", "split_key", "perturbation_key", "batch_key"):
        if (key := getattr(design, role)) is None:
            continue
        if untreated and role == "perturbation_key":
            n = expression_modality(data, modality).n_obs
            labels[role] = pd.Categorical([design.control] * n)
            written[role] = Written(key, np.dtype(object), {design.control: design.control})
            continue
        of_perturbation = (
            {"name_of": design.drug_name, "allowed": design.controls} if role == "perturbation_key" else {}
        )
        labels[role], written[role] = read_names(
            data, key, argument=f"{prefix}{role}", modality=modality, **of_perturbation
        )
    if design.dose_key is not None:
        if untreated:
            column = pd.Series(np.full(len(labels["perturbation_key"]), np.nan))
        else:
            column = obs_column(data, design.dose_key, argument=f"{prefix}dose_key", modality=modality)
        drugs = labels["perturbation_key"], written["perturbation_key"]
        labels["perturbation_key"], *both = _at_doses(*drugs, column, design)
        written["perturbation_key"], written["dose_key"] = both
    return labels, written


def _at_doses(
    drugs: pd.Categorical, written: Written, column: pd.Series, design: Design
) -> tuple[pd.Categorical, Written, Written]:
    """Return the names of drugs at doses, and how drugs and doses are written."""
    is_control = np.asarray(drugs == design.control)
    if column.dtype == np.float16:  # whose 0.1 is 0.09998
        column = column.astype(str).astype(float)
    doses = numbers(column, design.dose_key, is_control)
    table = pd.DataFrame({"drug": drugs.codes, "dose": doses})
    groups = table.groupby(["drug", "dose"], sort=True)
    codes, first = groups.ngroup().to_numpy(), table.drop_duplicates().sort_values(["drug", "dose"]).index
    names, of_drug, of_dose = [], {}, {}
    for row in first:
        drug = drugs[row]
        at = drug if is_control[row] else JOIN.join(sorted(dose_name(part, doses[row]) for part in parts(drug)))
        names.append(at)
        of_drug[at], of_dose[at] = written.values[drug], column.iloc[row]
    categories, place = np.unique(np.array(names, dtype=object), return_inverse=True)
    found = pd.Categorical.from_codes(place[codes] if len(codes) else [], categories=list(categories))
    return (
        found,
        Written(written.key, written.dtype, of_drug, _drug_of),
        Written(design.dose_key, column.dtype, of_dose, _dose_of),
    )


def _drug_of(name: str) -> str:
    """Drug of a name such as "drug_1.0"; drugs of a combination are joined."""
    return JOIN.join(part if (known := drug_and_dose(part)) is None else known[0] for part in parts(name))


def _dose_of(name: str) -> object:
    """Dose of a name such as "drug_1.0", where there is one."""
    doses = {known[1] for part in parts(name) if (known := drug_and_dose(part)) is not None}
    return doses.pop() if len(doses) == 1 else name
