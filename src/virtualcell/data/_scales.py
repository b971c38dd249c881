"""What a matrix of expression holds: whole counts, logarithms, totals of cells, or something else."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
from anndata import AnnData
from scipy import sparse

from virtualcell.data._lazy import is_lazy, stored_matrix
from virtualcell.data._stored import row_sums

_FEW_CELLS = 10  # equal totals of fewer cells than this may be chance
_FEW_PART = 5  # so may totals, equal to five digits, of fewer
_NEAR = 0.05  # of a count, within which values are taken for multiples where that is not known
_FEW_STEPS = 5  # multiples of one number, of which logarithms have few
_FEW_VALUES = 20  # that may be whole by chance
_FEW = 1 << 15  # values looked at together
_MOST_SMALLEST = 5  # counts that the smallest value of a cell may stand for, where few genes are left
_MOST_COUNTED = 1e9  # all numbers that are large enough are whole
_LOOKED_AT = 100  # cells of a matrix that nobody asked for

# What is no natural logarithm of 1 + x though it was stated to be one, and what undoes it: if the cells then have one
# total, or counts are whole, that was it.
OTHER_LOGARITHMS = {
    "was put through log(1 + x) twice": lambda x: np.expm1(np.expm1(x)),
    "holds logarithms to base 2": lambda x: np.expm1(x * np.log(2)),
    "holds logarithms to base 10": lambda x: np.expm1(x * np.log(10)),
    "holds square roots": np.square,
    "holds inverse hyperbolic sines": np.sinh,
}


def are_whole(values: np.ndarray) -> bool:
    """Tell whether there are no fractions, looking at few values at a time, which stay in the cache of a core."""
    return all(np.array_equal(v := values[i : i + _FEW], np.rint(v)) for i in range(0, len(values), _FEW))


def are_nearly_whole(values: np.ndarray) -> bool:
    """Tell whether numbers are whole but for what arithmetic leaves: a thousandth, or a millionth of large ones."""
    parts = (values[i : i + _FEW] for i in range(0, len(values), _FEW))
    return all((np.abs(v - np.rint(v)) <= 1e-3 + 1e-6 * np.abs(v)).all() for v in parts)


def rounded(block: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return nearly whole numbers as whole ones, in memory of their own and without stored zeros."""
    out = sparse.csr_matrix((np.rint(block.data), block.indices.copy(), block.indptr.copy()), shape=block.shape)
    out.eliminate_zeros()
    return out


def is_one_total(totals: np.ndarray) -> bool:
    """Tell whether cells were divided by their totals. Those of copies of one cell are equal to the last bit."""
    totals = totals[totals > 0]
    if len(totals) < _FEW_CELLS or not np.isfinite(totals).all() or np.ptp(totals) == 0:
        return False
    return bool(np.mean(np.abs(totals / np.median(totals) - 1) < 1e-3) > 0.9)


def totals_of(totals: np.ndarray) -> dict[float, float]:
    """Return the totals that cells were divided to, where there are several, and the share of cells that have each.

    A total is one that a tenth of the cells have to five digits. Where these are not nearly all cells there is none:
    cells of few molecules may have equal sums.
    """
    totals = np.unique(totals[totals > 0])  # copies of one cell say it once
    found: dict[float, float] = {}
    if not np.isfinite(totals).all():
        return found
    n = len(totals)
    while len(totals):
        size = np.searchsorted(totals, totals * (1 + 1e-5), side="right") - np.arange(len(totals))
        first = int(np.argmax(size))
        if size[first] < max(_FEW_PART, 0.1 * n):
            break
        here = slice(first, first + size[first])
        found[float(np.median(totals[here]))] = size[first] / n
        totals = np.delete(totals, here)
    return found if sum(found.values()) > 0.9 else {}


def smallest_counts(rates: sparse.csr_matrix, most_off: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest value of each cell, and the fewest counts that it can be.

    These are 0 where no number of them makes all values of the cell whole numbers of counts, within 1 % and `most_off`.
    Where genes were left out the smallest value may be two counts or more.
    """
    width = np.diff(rates.indptr)
    full = np.flatnonzero(width)
    smallest, n_counts = np.ones(len(width)), np.zeros(len(width), int)
    if len(full):
        smallest[full] = np.minimum.reduceat(rates.data, rates.indptr[full])
    cell = np.repeat(np.arange(len(width)), width)
    for n in range(1, _MOST_SMALLEST + 1):
        counts = n * rates.data / smallest[cell]
        on = np.abs(counts - np.rint(counts)) <= np.minimum(0.01 * counts, most_off)
        n_counts[(n_counts == 0) & (width > 0) & (np.bincount(cell, ~on, minlength=len(width)) == 0)] = n
    return smallest, n_counts


def are_multiples(rates: sparse.csr_matrix) -> bool:
    """Tell whether each cell, of some, holds whole counts times a number of its own, which is no matter of chance."""
    rates = rates[:: max(1, rates.shape[0] // _LOOKED_AT)]
    data, edges = rates.data, itertools.pairwise(rates.indptr)
    if not np.isfinite(data).all():
        return False
    tells = np.array([len(np.unique(data[start:stop])) >= _FEW_STEPS for start, stop in edges])
    if tells.sum() < _FEW_CELLS:
        return False
    return bool(np.mean(smallest_counts(rates, _NEAR)[1][tells] > 0) > 0.9)


def other_logarithm(logs: sparse.csr_matrix) -> str | None:
    """Name the logarithm that was taken where it is no natural one of 1 + x, `None` where nothing says so."""
    with np.errstate(over="ignore", invalid="ignore"):  # of values and of their sums, which are then no one total
        if are_divided(logs.expm1()):
            return None
        is_divided = are_divided(logs)  # which what undoes logarithms hardly changes where shares are small
        for what, undone in OTHER_LOGARITHMS.items():
            counts = sparse.csr_matrix((undone(logs.data), logs.indices, logs.indptr), shape=logs.shape)
            if (not is_divided and are_divided(counts)) or look_counted(counts.data):
                return what
    return None


def are_divided(rates: sparse.csr_matrix) -> bool:
    """Tell whether these are counts that were divided by the totals of their cells, perhaps of some of the genes."""
    return is_one_total(row_sums(rates)) or are_multiples(rates)


def are_of_zero_to_one(sample: sparse.csr_matrix) -> bool:
    """Tell whether genes were scaled to between 0 and 1: the highest values of several are 1 to the last bit."""
    if sample.data.max(initial=0) != 1 or are_decimals(sample.data):
        return False
    return len(np.unique(sample.indices[sample.data == 1])) >= _FEW_STEPS


def are_decimals(values: np.ndarray) -> bool:
    """Tell whether numbers were rounded to one of 1 to 4 decimals, whose multiples are then no counts."""
    return any(look_counted(values * 10.0**n) for n in range(1, 5))


def unit_of(values: np.ndarray) -> float | None:
    """Return the number that positive ones are multiples of, `None` where they are none.

    Those that were rounded to a decimal may be logarithms, and few different ones may be multiples by chance.
    """
    unit = float(values.min(initial=1))
    power = np.log10(unit)
    if abs(power - np.rint(power)) < 1e-4 or not look_counted(times := values / unit):
        return None
    return unit if len(np.unique(np.rint(times))) >= _FEW_STEPS else None


def fault_of_fractions(
    sample: sparse.csr_matrix, scale: str, argument: str, target_sum: float, *, measured: bool
) -> str | None:
    """Say what fractions are, and what to do, where they are known not to be what was stated."""
    if scale == "log1p" and (what := other_logarithm(sample)) is not None:
        return (
            f"{what}. Use `sc.pp.log1p(adata)`, once and without a base, or give raw counts with {argument}='counts'."
        )
    if measured and are_of_zero_to_one(sample):
        return (
            "holds genes that were scaled to between 0 and 1: these are neither raw counts nor logarithms. Give raw "
            f"counts with {argument}='counts'."
        )
    if scale == "log1p" and (unit := unit_of(sample.data[sample.data > 0])) is not None:
        return (
            f"holds whole numbers times {unit:.3g}: these are neither raw counts nor logarithms. Give raw counts with "
            f"{argument}='counts', or divide by that number, round with `np.rint`, and say so."
        )
    is_rate = is_one_total(row_sums(sample)) or (
        scale == "log1p" and not are_decimals(sample.data) and are_multiples(sample)
    )
    if measured and is_rate:  # sums of predicted logarithms may be near each other
        return (
            f"holds counts that were divided by their total, and no logarithms of these. Run `sc.pp.normalize_total("
            f"adata, target_sum={target_sum:g})` and `sc.pp.log1p(adata)`, and say {argument}='log1p', or give raw "
            f"counts with {argument}='counts'."
        )
    return None


def fault_of_totals(logs: sparse.csr_matrix, argument: str, target_sum: float, *, measured: bool) -> str | None:
    """Say what logarithms are of, and what to do, where that is something else than counts per `target_sum`.

    Genes that were left out make totals smaller and unequal, which is as it should be. An empty cell has no total.
    """
    counts = logs.expm1()
    totals = row_sums(counts)
    if not totals.any():
        return None
    median = float(np.median(totals[totals > 0]))
    anew = (
        f"Normalise anew with `sc.pp.normalize_total(adata, target_sum={target_sum:g})`, or give raw counts with "
        f"{argument}='counts'."
    )
    on_target = np.mean(np.abs(totals[totals > 0] / target_sum - 1) < 1e-3) > 0.9
    if not on_target and look_counted(counts.data):
        return (
            "holds logarithms of whole numbers: of raw counts, not divided by their total. Give the raw counts, with "
            f"{argument}='counts'."
        )
    off = abs(median / target_sum - 1)
    if (is_one_total(totals) and off > 0.01) or (measured and median > 1.05 * target_sum):
        return (
            f"was normalised to {median:.4g} counts per cell (median) and not to {target_sum:g}: scanpy's "
            f"normalize_total takes the median where target_sum is left out. {anew}"
        )
    for total, share in totals_of(totals).items():
        if abs(total / target_sum - 1) > 0.01:
            return (
                f"holds cells ({share:.0%}) that were normalised to {total:.4g} counts, beside others, and not to "
                f"{target_sum:g}. {anew}"
            )
    return None


def look_counted(values: np.ndarray) -> bool:
    """Tell whether numbers, of which logarithms were undone, are whole ones."""
    return (
        len(values) >= _FEW_VALUES
        and bool((np.abs(values) < _MOST_COUNTED).all())
        and np.allclose(values, np.rint(values), rtol=0, atol=0.01)
    )


class DataOf:
    """The data that a matrix is of, for messages, for as long as others keep it; not sent to other processes."""

    def __init__(self, adata: AnnData | None) -> None:
        self._adata = None if adata is None else weakref.ref(adata)

    def __reduce__(self) -> tuple:
        return DataOf, (None,)

    def counts_elsewhere(self, layer: str | None, argument: str, side: str) -> str:
        """Name another matrix of the data that holds whole numbers, as the end of a message, or nothing."""
        adata = None if self._adata is None else self._adata()
        return "" if adata is None else _counts_elsewhere(adata, layer, argument, side)


def _counts_elsewhere(adata: AnnData, layer: str | None, argument: str, side: str) -> str:
    say = f"{argument}='counts'"
    for name in adata.layers:
        if name != layer and _holds_counts(adata, name):
            if argument == "predicted_scale":  # of predictions X is read
                there = f"{side}.layers[{name!r}]"
                return f" {there} holds whole numbers: `{side}.X = {there}`, with {say}."
            return f" layers[{name!r}] holds whole numbers: layer={name!r} with {say}."
    if layer is not None and _holds_counts(adata, None):
        return f" X holds whole numbers: leave layer= out, with {say}."
    if adata.raw is not None and not is_lazy(adata) and _holds_counts(AnnData(adata.raw.X), None):
        data = side or "adata"
        return f" {data}.raw holds whole numbers: `{data} = {data}.raw.to_adata()`, with {say}."
    return ""


def _holds_counts(adata: AnnData, layer: str | None) -> bool:
    try:
        values = stored_matrix(adata, layer, "").rows(slice(0, _LOOKED_AT)).data
    except (TypeError, ValueError):  # empty, or of a kind that is not read: no matrix to name
        return False
    return bool(len(values) and values.max() > 0 and values.min() >= 0) and are_whole(values.astype(np.float64))
