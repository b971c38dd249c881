"""Labels of cells as they stand in `obs`, the names that they stand for, and what the name of a combination is made of.

A perturbation has one name, however its label is written: parts in alphabetical order, joined by "+", without the
control. `B+A`, `A+B` and `A+B+ctrl` are "A+B"; `A+ctrl`, `ctrl+A` and `A` are "A".

A label is cut at a separator only where that joins two names: outside of brackets, with a letter, a digit or a bracket
on either side of it, and a space on both sides or on none. So `(+)-JQ1`, `[Na+].[Cl-]`, `CD4+ T` and `Ca2+` are one
name each, `(+)-JQ1+Trametinib` is two, and a control such as `non_targeting` stays whole whatever the separator is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Literal, TypeGuard

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._errors import as_it_looks, unknown_name

JOIN = "+"  # between the parts of a name, whatever is between those of a label

# what screens call the control where it stands beside a target, as in `A+ctrl` or `A_NegCtrl0`
_CONTROL = re.compile(r"nt|ntc|(ctrl|control|non[-_ ]?targeting|neg[-_ ]?(ctrl|control))[-_ ]?\d*", re.IGNORECASE)
_VERSIONED = re.compile(r"(ENS[A-Z]*G\d{11})\.\d+")  # an Ensembl gene with its version
_OPEN, _CLOSE = "([{", ")]}"


def expression_modality(data: AnnData | MuData, modality: str = "rna") -> AnnData:
    """Return the AnnData with the expression: `data` itself, or its modality where it is a MuData."""
    if isinstance(data, MuData):
        if modality not in data.mod:
            raise unknown_name("modality", modality, data.mod, "Name the modality that holds gene expression.")
        data = data.mod[modality]
    if not isinstance(data, AnnData):
        raise TypeError(f"Expected an AnnData or a MuData, got {type(data).__name__}.")
    for table, names in (("var", data.var_names), ("obs", data.obs_names)):
        _require_text(names, table)
    return data


def _require_text(names: pd.Index, table: str) -> None:
    """Raise for names that are numbers or missing, as `adata.var.reset_index(inplace=True)` leaves them."""
    if names.inferred_type in ("string", "empty", "categorical"):
        return
    for odd in (name for name in names if not isinstance(name, str)):
        where = f"adata.{table}_names"
        remedy = f"`{where} = adata.{table}[column]`, a column with names"
        if isinstance(odd, tuple):
            remedy = f"`{where} = ['-'.join(map(str, name)) for name in {where}]`"
        elif pd.notna(odd):
            remedy += f", or `{where} = {where}.astype(str)`"
        raise ValueError(f"{table}_names holds {odd!r}, which is no text. Set names: {remedy}.")


def obs_column(data: AnnData | MuData, key: str, *, argument: str, modality: str = "rna") -> pd.Series:
    """Return a column of the modality's obs, or else of the MuData's obs, aligned to the modality's cells."""
    adata = expression_modality(data, modality)
    if key in adata.obs:
        return column_of(adata, "obs", key, argument)
    if isinstance(data, MuData):
        for name in (key, f"{modality}:{key}"):
            if name in data.obs:
                return data.obs[name].reindex(adata.obs_names)
    valid = [*adata.obs.columns, *(data.obs.columns if isinstance(data, MuData) else ())]
    raise unknown_name(argument, key, valid, "Name a column of obs.")


def column_of(adata: AnnData, table: Literal["obs", "var"], key: str, argument: str) -> pd.Series:
    """Return a column of `obs` or `var`, read where the table is lazy."""
    found = getattr(adata, table)
    if (n := list(found.columns).count(key)) > 1:
        raise ValueError(
            f"{argument}={key!r} names {n} columns of {table}. Keep the first of each: "
            f"`adata.{table} = adata.{table}.loc[:, ~adata.{table}.columns.duplicated()]`."
        )
    return found[key] if isinstance(found, pd.DataFrame) else found[[key]].to_memory()[key]


def obs_of(adata: AnnData) -> pd.DataFrame:
    """Return `obs`, read where it is lazy."""
    return adata.obs if isinstance(adata.obs, pd.DataFrame) else adata.obs.to_memory()


def var_of(adata: AnnData) -> pd.DataFrame:
    """Return `var`, read where it is lazy."""
    return adata.var if isinstance(adata.var, pd.DataFrame) else adata.var.to_memory()


# -- names ------------------------------------------------------------------------------------------------------------


def text(label: object) -> str:
    """Return a label of any type as text: a number, a truth value, bytes."""
    if isinstance(label, float | np.floating) and label == 0:
        label = abs(label)  # minus zero is zero, also to pandas
    if not isinstance(label, bytes):
        return str(label)
    try:
        return label.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the label {label!r} is bytes that are not UTF-8. Decode them by their own encoding, such as 'latin-1'"
        ) from error


def without_version(gene: str) -> str:
    """Return the name of a gene, of which the version of an Ensembl id is no part."""
    found = _VERSIONED.fullmatch(gene)
    return gene if found is None else found[1]


def is_several(labels: object) -> TypeGuard[Collection]:
    """Tell a list of labels from one label."""
    return isinstance(labels, Collection) and not isinstance(labels, str | bytes)


def pieces(label: str, separator: str | None = JOIN) -> list[str]:
    """Cut a label where a separator joins two names; `None` cuts nowhere."""
    label = str(label)  # numpy's text too
    if not separator or separator not in label:
        return [label]
    found, start, at, depth = [], 0, 0, 0
    while at < len(label):
        end = at + len(separator)
        if depth == 0 and label.startswith(separator, at) and _joins(label[:at], label[end:]):
            found.append(label[start:at].strip())
            start = at = end
            continue
        depth += (label[at] in _OPEN) - (label[at] in _CLOSE)
        at += 1
    return [*found, label[start:].strip()] if found else [label]


def _joins(left: str, right: str) -> bool:
    """Whether a separator between these two joins names."""
    before, after = left.rstrip(), right.lstrip()
    if not before or not after or (before == left) != (after == right):
        return False
    return (before[-1].isalnum() or before[-1] in f"{_CLOSE}'*") and (after[0].isalnum() or after[0] in f"{_OPEN}'")


def canonical(label: object, controls: Sequence[str], separator: str | None = JOIN) -> str:
    """Return the name that a label of a perturbation stands for; the first of `controls` is that of all of them.

    A name that holds a plus which would cut it, and may not be cut, is put into brackets.
    """
    label = text(label)
    if label in controls:
        return controls[0]
    found = _with_controls_whole(pieces(label, separator), controls, separator)
    if len(found) > 1:
        found = sorted(name for name in found if name not in controls and not looks_like_control(name))
    if not found:
        return controls[0]
    return JOIN.join(without_version(name) if len(pieces(name)) == 1 else f"[{name}]" for name in found)


def _with_controls_whole(found: list[str], controls: Sequence[str], separator: str | None) -> list[str]:
    """Put together again the pieces of a control such as `non_targeting`."""
    out, at = [], 0
    while at < len(found):
        for end in range(len(found), at, -1):
            name = found[at] if end == at + 1 else separator.join(found[at:end])
            if end == at + 1 or name in controls or looks_like_control(name):
                break
        out.append(name)
        at = end
    return out


def parts(name: str, control: str | None = None, known: Container[str] = ()) -> list[str]:
    """Split the name of a combination "A+B" into ["A", "B"]; a name that is `known` is one part, the control none."""
    if name == control:
        return []
    if name in known:
        return [name]
    return [p for p in pieces(name) if p != control]


class Known:
    """Perturbations that are known, in which others are looked up by what they are made of.

    Parameters
    ----------
    names
        Their names.
    control
        Name of the control.
    """

    def __init__(self, names: Iterable[str], control: str) -> None:
        self.control = control
        self.code = {name: i for i, name in enumerate(names)}

    def __contains__(self, name: str) -> bool:
        return name in self.code

    @cached_property
    def _written(self) -> dict[tuple[str, ...], str]:
        return {tuple(sorted(parts(name, self.control))): name for name in self.code}  # B+A is A+B

    def parts(self, name: str) -> list[str]:
        """Names that add up to one: itself where it is known, the same combination written otherwise, its parts."""
        if name not in self.code:
            name = self._written.get(tuple(sorted(parts(name, self.control))), name)
        return parts(name, self.control, self.code)


def looks_like_control(name: str) -> bool:
    """Tell whether a name is one that screens call control cells by, such as `non-targeting_2`."""
    return _CONTROL.fullmatch(name) is not None


def looks_combined(name: str, known: Container[str]) -> tuple[str, list[str]] | None:
    """Return a separator, and the known names that it joins to this one; `None` where there is none such."""
    for separator in ("||", "|", "_", "&", ";", ",", "/", "-", " "):
        found = [part.strip() for part in name.split(separator)]
        if len(found) > 1 and all(part in known for part in found):
            return separator, found
    return None


# -- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Written:
    """How names stand in a column of `obs`.

    Parameters
    ----------
    key
        Name of the column.
    dtype
        Its type.
    values
        The label of each name, as it is written most often.
    read_off
        What is written for a name that the column lacks, where that is not the name.
    """

    key: str
    dtype: object
    values: dict[str, object]
    read_off: Callable[[str], object] | None = None

    def restore(self, names: Iterable[str], asked: dict[str, str] | None = None) -> pd.Series:
        """Return names as a column like this one; names that it lacks as they were `asked` for.

        Where one of these cannot be of the column's type, all are text.
        """
        codes, found = pd.factorize(np.asarray(names, dtype=object))
        other = self.read_off or (lambda name: (asked or {}).get(name, name))
        values = [self.values[name] if name in self.values else other(name) for name in found]
        if all(isinstance(v, str) for v in self.values.values()):  # doses too, where those that are there are text
            values = [text(v) for v in values]
        of_categories = isinstance(self.dtype, pd.CategoricalDtype)
        kind = self.dtype.categories.dtype if isinstance(self.dtype, pd.CategoricalDtype) else self.dtype
        try:
            column = pd.Series(values, dtype=object).astype(kind)
            if not all(text(a) == text(b) for a, b in zip(column, values, strict=True)):
                raise ValueError("a label would become another")
        except (TypeError, ValueError):
            is_number = all(isinstance(v, Real) for v in values)
            column = pd.Series(values if is_number else [text(v) for v in values], dtype=None if is_number else object)
        column = column.take(codes).reset_index(drop=True)
        return column.astype("category") if of_categories else column


def read_names(
    data: AnnData | MuData,
    key: str,
    *,
    argument: str,
    modality: str = "rna",
    name_of: Callable[[object], str] = text,
    allowed: Collection[str] = (),
) -> tuple[pd.Categorical, Written]:
    """Return the names that the labels in a column of obs stand for, with sorted categories, and how they are written.

    Raises
    ------
    KeyError
        For an unknown column.
    ValueError
        For cells whose label is missing, because a cell without one belongs nowhere. Text that stands for a missing
        label is one, unless it is `allowed`. For labels that look the same, and for bytes that are no text.
    """
    column = obs_column(data, key, argument=argument, modality=modality)
    try:
        codes, labels = _distinct(column)
        as_text = [text(v) for v in labels]
    except ValueError as error:
        decode = "lambda v: v.decode('latin-1') if isinstance(v, bytes) else v"
        raise ValueError(
            f"{argument}={key!r}: {error}: adata.obs[{key!r}] = adata.obs[{key!r}].map({decode})."
        ) from error
    is_missing = np.array([label.strip() in _keys.MISSING and label not in allowed for label in as_text], dtype=bool)
    if (codes < 0).any():
        raise ValueError(
            f"{argument}={key!r}: {int((codes < 0).sum())} cells have no label there. Give them one, or drop them "
            f"with adata[adata.obs[{key!r}].notna()].copy()."
        )
    if is_missing.any():
        bad = as_text[int(np.argmax(is_missing))]
        raise ValueError(
            f"{argument}={key!r}: {int(is_missing[codes].sum())} cells have the label {bad!r}, text that stands for a "
            f"missing one. Give them a label, or drop them with adata[adata.obs[{key!r}] != {bad!r}].copy()."
        )
    names = [name_of(v) for v in labels]
    _require_told_apart(names, key, argument)
    by_count = np.argsort(-np.bincount(codes, minlength=len(labels)), kind="stable")
    values: dict[str, object] = {}
    for i in by_count:
        values.setdefault(names[i], labels[i])
    categories, place = np.unique(np.array(names, dtype=object), return_inverse=True)
    found = pd.Categorical.from_codes(place[codes] if len(codes) else [], categories=list(categories))
    return found, Written(key, column.dtype, values)


def _require_told_apart(names: Sequence[str], key: str, argument: str) -> None:
    """Raise for two names, or parts of names, that look the same: a slip of typing parts the cells of one label."""
    seen: dict[str, str] = {}
    for name in dict.fromkeys(part for whole in names for part in (whole, *pieces(whole))):
        other = seen.setdefault(as_it_looks(name), name)
        if other == name:
            continue
        told, remedy = "differ by spaces alone. Strip them", ".str.strip()"
        if other.strip() != name.strip():
            told = "look the same, and are of other characters. If they are one label, write both in one way"
            hidden = "".join(sorted({ascii(c)[1:-1] for c in other + name if unicodedata.category(c) == "Cf"}))
            drop = f".str.replace('[{hidden}]', '', regex=True)" if hidden else ""
            form = "NFC" if unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name) else "NFKC"
            remedy = f"{drop}.str.normalize({form!r}).str.strip()"
        # as objects first: pandas makes no text of categories that are bytes
        column = f"adata.obs[{key!r}]"
        raise ValueError(
            f"{argument}={key!r}: the labels {other!a} and {name!a} {told}, as with "
            f"{column} = {column}.astype(object).astype(str){remedy}."
        )


def _distinct(column: pd.Series) -> tuple[np.ndarray, Sequence[object]]:
    """Return the number of each row's label, -1 where it is missing, and the labels, each once."""
    if column.dtype != object:
        return pd.factorize(column)
    rows = column.notna().to_numpy()
    first: dict[str, object] = {}
    for label in column[rows]:
        first.setdefault(text(label), label)  # 1 and True are one to pandas
    codes = np.full(len(column), -1)
    codes[rows] = pd.Index(list(first), dtype=object).get_indexer([text(label) for label in column[rows]])
    return codes, list(first.values())


def read_labels(data: AnnData | MuData, key: str, *, argument: str, modality: str = "rna") -> pd.Series:
    """Return a column of obs as text; a missing label is an error, because a cell without one belongs nowhere."""
    found, _ = read_names(data, key, argument=argument, modality=modality)
    return pd.Series(np.asarray(found, dtype=object), index=expression_modality(data, modality).obs_names, name=key)
