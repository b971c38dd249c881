from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from virtualcell.data._doses import (
    as_dose,
    asked_dose,
    at_dose,
    between_doses,
    check_between,
    dose_name,
    doses_of,
    drug_and_dose,
    name_at,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A_1.0", ("A", 1.0)),
        ("A_10", ("A", 10.0)),
        ("a_b_0.5", ("a_b", 0.5)),
        ("A_1e-07", ("A", 1e-7)),
        ("[('Dabrafenib', 0.5, 'uM')]", ("Dabrafenib", 0.5)),
        ("A", None),
        ("A_", None),
        ("A_B", None),
        ("1.0", None),
    ],
)
def test_names_hold_drug_and_dose(name: str, expected: tuple[str, float] | None) -> None:
    assert drug_and_dose(name) == expected


@pytest.mark.parametrize("dose", [1e-7, 0.1, 1, 2.5, 1000.0, 1e17])
def test_a_name_comes_back(dose: float) -> None:
    assert drug_and_dose(dose_name("a_b", dose)) == ("a_b", dose)
    assert drug_and_dose(at_dose("[('A', 1.0, 'uM')]", dose)) == ("A", dose)


@pytest.mark.parametrize(
    ("number", "dose"),
    [
        (0.1 * 3, 0.3),
        (np.float32(0.1), 0.1),
        (np.float32(0.1) + np.float32(0.2), 0.3),
        (float(np.float32(2.2)), 2.2),
        (1 / 3, 0.333333),
        (np.float32(1) / 3, 0.333333),
        (1e-9, 1e-9),
        (float(np.float32(1e-9)), 1e-9),
        (float(np.float32(1e-5) / 512), 1.95313e-8),  # 1.953125e-8, which ends where two roundings part
        (1e-5 / 512, 1.95313e-8),
        (7, 7.0),
        (1234567, 1234567.0),
        (float(np.float32(1e11)), 1e11),
        (1e-40, 1e-40),
        (1e300, 1e300),
    ],
)
def test_a_dose_is_one_number_however_it_is_stored(number: float, dose: float) -> None:
    assert as_dose(number) == dose == as_dose(dose)
    assert dose_name("A", number) == dose_name("A", dose)
    assert drug_and_dose(f"[('A', {float(number)!r}, 'uM')]") == ("A", dose)


def test_a_dose_has_one_name_in_single_and_in_double_precision() -> None:
    doses = [
        b / q**k for b in (1e-5, 1e-6, 3e-7, 1.0, 10, 100, 1000) for q in (2, 3, 5, 10, 10**0.5) for k in range(25)
    ]
    assert [as_dose(d) for d in doses] == [as_dose(float(np.float32(d))) for d in doses]
    np.testing.assert_allclose([as_dose(d) for d in doses], doses, rtol=5e-6)


@pytest.mark.parametrize("dose", [0.1, np.float32(0.1), np.float16(0.1), "0.1", 0.1 * 3 / 3])
def test_a_dose_is_asked_for_in_any_form(dose: object) -> None:
    assert asked_dose(dose) == 0.1
    assert name_at(["A_0.1", "A_0.3"], "A", dose) == "A_0.1"


@pytest.mark.parametrize("dose", [True, "0.1 uM", [0.1], float("nan")])
def test_what_is_no_dose(dose: object) -> None:
    with pytest.raises(TypeError, match=r"dose=.* must be a number, in the unit of the doses of the data"):
        asked_dose(dose)


def test_two_names_of_one_dose_are_refused() -> None:
    with pytest.raises(ValueError, match=r"drug='A': \['A_1', 'A_1.0'\] are of one dose. Ask for one by its name"):
        doses_of(["A_1", "A_1.0", "B_1"], "A")
    assert doses_of(["A_1", "A_1.0", "B_1"], "B") == {1.0: "B_1"}


def test_doses_of_a_drug_rise() -> None:
    names = ["A_10.0", "A_0.1", "A_2.0", "B_1.0"]
    assert list(doses_of(names, "a").items()) == [(0.1, "A_0.1"), (2.0, "A_2.0"), (10.0, "A_10.0")]
    assert name_at(names, "B", None) == "B_1.0"
    with pytest.raises(KeyError, match=r"drug='C' is unknown\. Known: 'A', 'B'"):
        doses_of(names, "C")


def test_a_straight_line_of_the_logarithm_stays_one() -> None:
    effects = {1.0: np.array([1.0, -2.0]), 10.0: np.array([2.0, -4.0]), 100.0: np.array([3.0, -6.0])}
    np.testing.assert_allclose(between_doses(effects, 10**0.5), [1.5, -3.0])
    np.testing.assert_allclose(between_doses(effects, 10**1.25), [2.25, -4.5])
    for dose, effect in effects.items():
        np.testing.assert_allclose(between_doses(effects, dose), effect, atol=1e-12)


def test_no_gene_leaves_the_range_of_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    doses = np.array([0.01, 0.1, 0.3, 5.0, 40.0])
    effects = dict(zip(doses, rng.normal(size=(5, 200)), strict=True))
    for low, high in pairwise(doses):
        ends = np.sort([effects[low], effects[high]], axis=0)
        curve = np.array([between_doses(effects, d) for d in np.geomspace(low, high, 12)])
        assert (curve >= ends[0] - 1e-9).all()
        assert (curve <= ends[1] + 1e-9).all()
        steps = np.diff(curve, axis=0) * np.sign(effects[high] - effects[low])
        assert (steps >= -1e-9).all()


@pytest.mark.parametrize("dose", [0.05, 11.0])
def test_outside_of_the_range_nothing_is_told(dose: float) -> None:
    with pytest.raises(ValueError, match=r"lies outside of the measured range, 0.1 to 10.0"):
        check_between("A", dose, [10.0, 0.1])


@pytest.mark.parametrize("dose", [1.0, 1234567.0, 16777217.0, 123456789.0])
def test_whole_doses_are_what_they_are(dose: float) -> None:
    assert as_dose(dose) == dose
