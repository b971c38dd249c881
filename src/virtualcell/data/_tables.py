"""Tables of vectors by name, of perturbations or of genes, in whatever form they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData

Vectors: TypeAlias = pd.DataFrame | Mapping[str, Sequence[float]]  # names x dims, or the vector of each name


def is_vectors(given: object) -> bool:
    """Tell a dictionary of vectors from one of something else."""
    return isinstance(given, Mapping) and len(given) > 0 and all(getattr(v, "ndim", None) == 1 for v in given.values())


def as_table(given: Vectors, argument: str) -> pd.DataFrame:
    """Return vectors as a table of finite numbers, names x dims.

    Parameters
    ----------
    given
        A table with names as its index, or a dictionary of vectors by name, of one length: arrays, tensors, lists.
    argument
        What it was given as, for messages.

    Raises
    ------
    TypeError
        For what has no names.
    ValueError
        For text, missing or infinite values, missing names, vectors of several lengths, and where there are none.
    """
    if isinstance(given, pd.Series):
        given = given.to_dict()
    if isinstance(given, Mapping):
        given = _of_vectors(given, argument)
    if not isinstance(given, pd.DataFrame):
        remedy = (
            "Make one with `pd.DataFrame(values, index=names)`. Read a file with `vc.pp.read_gene_embeddings(path)`."
        )
        if isinstance(given, AnnData):
            remedy = "Make one with `adata.to_df()`."
        raise TypeError(
            f"{argument} must be a table (DataFrame) with names as its index, or a dictionary of vectors by name, got "
            f"{type(given).__name__}. {remedy}"
        )
    if isinstance(given.index, pd.MultiIndex):
        raise ValueError(f"{argument} has names of several parts, as {given.index[0]!r}. Give each row one name.")
    text = [c for c, (_, column) in zip(given.columns, given.items(), strict=True) if not _is_numeric(column)]
    if text:
        raise ValueError(
            f"{argument} has columns that hold no numbers, {text[:3]}. Rows are named by the index: "
            f"`{argument}.set_index({text[0]!r})`, if these are the names."
        )
    if not given.shape[1] or not len(given):
        raise ValueError(f"{argument} holds no vectors: its shape is {given.shape}.")
    if given.index.isna().any():
        raise ValueError(f"{argument} has {int(given.index.isna().sum())} rows without a name: drop them.")
    values = given.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{argument} holds NaN or infinite values; drop or fill those rows: {list(given.index[bad][:3])}"
            f"{' and others' if bad.sum() > 3 else ''}, as with `{argument}.dropna()`."
        )
    return pd.DataFrame(values, index=given.index, columns=given.columns)


def _of_vectors(given: Mapping, argument: str) -> pd.DataFrame:
    vectors = {name: _vector(v) for name, v in given.items()}
    if not vectors:
        raise ValueError(f"{argument} holds no vectors: the dictionary is empty.")
    shapes = {v.shape for v in vectors.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"{argument} must hold vectors of one length, and has shapes {sorted(shapes)[:3]}.")
    return pd.DataFrame(np.stack(list(vectors.values())), index=pd.Index(list(vectors)))


def _vector(given: Any) -> np.ndarray:
    """Return an array of an array, a list or a tensor, NaN where a value is masked."""
    if hasattr(given, "detach"):  # a tensor, without torch
        given = given.detach().cpu().double()
        return (given.to_dense() if given.is_sparse else given).numpy()
    if np.ma.is_masked(given):
        return np.ma.filled(given.astype(np.float64), np.nan)
    return np.asarray(given)


def _is_numeric(column: pd.Series) -> bool:
    if column.dtype == object:
        return all(isinstance(v, Real) or v is None or v is pd.NA for v in column)
    return pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_complex_dtype(column.dtype)
