"""Names of drugs at doses, and what lies between the doses that were measured."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from virtualcell._errors import unknown_name
from virtualcell._numbers import as_number, as_numbers

_NAME = re.compile(r"(.+)_(\d+(?:\.\d+)?(?:e-?\d+)?)")


def as_dose(number: float) -> float:
    """Return the dose that a number stands for: files have 0.1 as 0.10000000149, and 0.1 * 3 is 0.30000000000000004.

    It is what the number reads as in single precision, whole or to six digits: where all that is stored in either
    precision, or computed, is one number. A whole number that single precision does not hold is itself.
    """
    if not 1e-37 < number < 1e37:  # beyond single precision, or no dose
        return float(number)
    if float(number).is_integer() and number != float(np.float32(number)):
        return float(number)
    single = float(str(np.float32(number)))
    return single if single.is_integer() else float(f"{single:.6g}")


def asked_dose(dose: object) -> float:
    """Return the dose that was asked for, as a number or as text that holds one."""
    number = (
        math.nan
        if isinstance(dose, bool | np.bool_)
        else as_number(str(dose) if isinstance(dose, np.floating) else dose)
    )
    if math.isnan(number):
        raise TypeError(f"dose={dose!r} must be a number, in the unit of the doses of the data.")
    return as_dose(number)


def dose_name(drug: str, dose: float) -> str:
    """Return the name of a drug at a dose, "drug_1.0"."""
    return f"{drug}_{as_dose(dose)!r}".replace("e+", "e")


def of_tahoe(name: str) -> tuple[str, float, str] | None:
    """Take apart a name such as "[('Dabrafenib', 0.5, 'uM')]", as Tahoe-100M has them; `None` for any other name."""
    try:
        ((drug, dose, unit),) = ast.literal_eval(name)
        return str(drug), as_dose(float(dose)), str(unit)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def drug_and_dose(name: str) -> tuple[str, float] | None:
    """Take apart the name of a drug at a dose, "drug_1.0" or one of Tahoe-100M; `None` for any other name."""
    if (known := of_tahoe(name)) is not None:
        return known[:2]
    found = _NAME.fullmatch(name)
    return None if found is None else (found[1], as_dose(float(found[2])))


def at_dose(name: str, dose: float) -> str:
    """Return the name of the same drug at another dose."""
    if (known := of_tahoe(name)) is not None:
        return f"[({known[0]!r}, {as_dose(dose)!r}, {known[2]!r})]"
    return dose_name(drug_and_dose(name)[0], dose)


def doses_of(names: Iterable[str], drug: str) -> dict[float, str]:
    """Return the names of a drug by its doses, which rise; the case of letters does not matter.

    Raises
    ------
    KeyError
        For an unknown drug; the message names the closest ones.
    ValueError
        Where two names hold one dose of it.
    """
    doses: dict[str, dict[float, list[str]]] = {}
    for name in names:
        if (known := drug_and_dose(name)) is not None:
            doses.setdefault(known[0], {}).setdefault(known[1], []).append(name)
    found = {d: by_dose for d, by_dose in doses.items() if d.casefold() == drug.casefold()}
    if not found:
        remedy = "Names of perturbations here hold drug and dose."
        if not doses:
            remedy = "No name of a perturbation here holds a dose: ask for perturbation= in place of drug=."
        raise unknown_name("drug", drug, doses, remedy)
    by_dose = dict(sorted(next(iter(found.values())).items()))
    if several := [called for called in by_dose.values() if len(called) > 1]:
        raise ValueError(f"drug={drug!r}: {several[0]} are of one dose. Ask for one by its name, perturbation=.")
    return {dose: name for dose, (name,) in by_dose.items()}


def name_at(names: Iterable[str], drug: str, dose: float | None) -> str:
    """Return the one name that holds a drug at a dose that was measured, which may be left out where there is one."""
    by_dose = doses_of(names, drug)
    if dose is None and len(by_dose) == 1:
        return next(iter(by_dose.values()))
    if dose is None or asked_dose(dose) not in by_dose:
        raise unknown_name("dose", dose, by_dose, f"These are the doses of {drug}: give one as dose=.")
    return by_dose[asked_dose(dose)]


def check_between(drug: str, dose: float, measured: Sequence[float]) -> None:
    """Raise for a dose outside of the range that was measured."""
    low, high = min(measured), max(measured)
    if not low <= dose <= high:
        raise ValueError(
            f"dose={dose!r} of {drug!r} lies outside of the measured range, {low!r} to {high!r}, and nothing tells "
            "what happens there. Ask for a dose within it."
        )


def between_doses(effects: Mapping[float, np.ndarray], dose: float) -> np.ndarray:
    """Interpolate effects, each (n_genes,), at a dose between those that were measured.

    Each gene follows a monotone cubic (PCHIP, Fritsch and Carlson 1980) of the logarithm of the dose between any two
    doses, so that it leaves their range nowhere. The curve begins with the control, which has no effect: a dose of zero
    stands one step below the lowest dose, as far as that is from the second.
    """
    at = np.log(sorted(effects))
    values = np.stack([effects[d] for d in sorted(effects)])
    at = np.concatenate([[2 * at[0] - at[1]], at])
    return PchipInterpolator(at, np.concatenate([np.zeros_like(values[:1]), values]), axis=0)(np.log(dose))


def numbers(column: pd.Series, key: str, is_control: np.ndarray) -> np.ndarray:
    """Return the doses in a column of obs, one per cell; that of control cells is 0, whatever stands there.

    Raises
    ------
    ValueError
        For doses that are no positive numbers.
    """
    try:
        found = as_numbers(column[~is_control], strict=True).to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"dose_key={key!r} holds what is no number ({error}). Put doses there as numbers, all in one unit."
        ) from error
    bad = ~(np.isfinite(found) & (found > 0))
    if bad.any():
        raise ValueError(
            f"dose_key={key!r}: {int(bad.sum())} cells of a drug have the dose {found[np.argmax(bad)]:g}. Doses of "
            "drugs are above 0; give untreated cells the label of the control."
        )
    each, place = np.unique(found, return_inverse=True)
    doses = np.zeros(len(column))
    doses[~is_control] = np.array([as_dose(number) for number in each], dtype=float)[place]
    return doses
