from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from virtualcell.models._neighbouring import Knockdown, Neighbours, share_kept

GENES = ["A", "NEXT", "MIDDLE", "EDGE", "FAR", "ELSEWHERE", "UNKNOWN"]
POSITIONS = pd.DataFrame(
    {
        "chromosome": ["chr1"] * 5 + ["chr2", "chr1"],
        "start": [10_000, 9_700, 10_000 + 1_581, 15_000, 15_001, 10_000, 14_000],
    },
    index=["A", "NEXT", "MIDDLE", "EDGE", "FAR", "ELSEWHERE", "NOT_MEASURED"],
)
BASE = np.log1p([10.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])


@pytest.fixture
def neighbours() -> Neighbours:
    return Neighbours(GENES, POSITIONS)


def kept(effect: np.ndarray) -> np.ndarray:
    return np.expm1(BASE + effect) / np.expm1(BASE)


def test_what_is_kept_rises_with_the_logarithm_of_the_distance():
    np.testing.assert_allclose(share_kept([0, 500, -500, 500 * 10**0.5, 5000]), [0.15, 0.15, 0.15, 0.575, 1])
    assert np.isinf(share_kept([5001, np.nan])).all()
    assert (np.diff(share_kept(np.arange(500, 5001, 100))) > 0).all()


def test_neighbours_of_a_target(neighbours):
    np.testing.assert_allclose(neighbours.most_kept("A"), [np.inf, 0.15, 0.575, 1, np.inf, np.inf, np.inf], rtol=1e-3)
    # a target need not be measured; without a position it has no neighbours
    assert np.isfinite(neighbours.most_kept("NOT_MEASURED")).sum() == 5
    assert np.isinf(neighbours.most_kept("UNKNOWN")).all()


def test_an_effect_is_capped_and_never_raised(neighbours):
    effect = np.full(len(GENES), 0.3)
    capped = neighbours.capped(effect, BASE, "A")
    np.testing.assert_allclose(kept(capped)[1:4], [0.15, 0.575, 1], rtol=1e-3)
    np.testing.assert_array_equal(capped[[0, 4, 5, 6]], effect[[0, 4, 5, 6]])
    assert (effect == 0.3).all()  # a copy
    low = np.full(len(GENES), -3.0)
    np.testing.assert_array_equal(neighbours.capped(low, BASE, "A"), low)
    rows = neighbours.capped(np.stack([effect, low]), BASE, "A")
    np.testing.assert_array_equal(rows, [capped, low])
    np.testing.assert_array_equal(neighbours.capped(effect, BASE, "ctrl", control="ctrl"), effect)
    silent = np.zeros(len(GENES))  # what is not expressed cannot fall
    np.testing.assert_array_equal(neighbours.capped(silent, silent, "A"), silent)


def test_every_part_of_a_combination_counts(neighbours):
    effect = np.zeros(len(GENES))
    both = neighbours.capped(effect, BASE, "A+FAR", control="ctrl")
    alone = [neighbours.capped(effect, BASE, p) for p in ("A", "FAR")]
    np.testing.assert_allclose(both, np.minimum(*alone))
    assert kept(both)[3] == pytest.approx(0.15)  # beside FAR, at the edge of A
    np.testing.assert_array_equal(neighbours.capped(effect, BASE, "FAR+A"), both)


def test_the_target_is_set_to_what_others_keep(neighbours):
    seen = Knockdown(np.array(["A", "A", "X", "Y", "Z"], dtype=object), np.array([0.9, 0.9, 0.1, 0.2, 0.4]))
    effect = np.full(len(GENES), 0.3)
    assert kept(neighbours.capped(effect, BASE, "A", knockdown=seen))[0] == pytest.approx(0.2)
    assert kept(neighbours.capped(effect - 5, BASE, "A", knockdown=seen))[0] == pytest.approx(0.2)  # and not only below
    alone = Knockdown(np.array(["A"], dtype=object), np.array([0.1]))
    np.testing.assert_array_equal(
        neighbours.capped(effect, BASE, "A", knockdown=alone), neighbours.capped(effect, BASE, "A")
    )
    # a target beside another is silenced by both
    assert kept(neighbours.capped(effect, BASE, "A+NEXT", knockdown=seen))[1] <= 0.15 + 1e-9


def test_knockdown_is_measured_in_cells_of_the_target():
    shares = {"A": 0.2, "NEXT": 0.3, "MIDDLE": 0.4, "EDGE+FAR": 0.5}
    effects = np.zeros((5, len(GENES)))
    for row, (label, share) in enumerate(shares.items()):
        for gene in label.split("+"):
            column = GENES.index(gene)
            effects[row, column] = np.log1p(share * np.expm1(BASE[column])) - BASE[column]
    labels = [*shares, "not a gene"]
    seen = Knockdown.measure(effects, np.tile(BASE, (5, 1)), labels, GENES, control="ctrl")
    assert dict(zip(seen.targets, seen.shares.round(6), strict=True)) == {
        "A": 0.2, "NEXT": 0.3, "MIDDLE": 0.4, "EDGE": 0.5, "FAR": 0.5,
    }  # fmt: skip
    assert seen.of_others("A") == pytest.approx(0.45)
    assert seen.of_others("somewhere else") == pytest.approx(0.4)
    silent = Knockdown.measure(effects, np.zeros((5, len(GENES))), labels, GENES)
    assert not len(silent.targets)
    assert np.isnan(silent.of_others("A"))
    raised = Knockdown(np.array(["B"], dtype=object), np.array([3.0]))
    assert raised.of_others("A") == 1


def test_positions_must_be_a_table_of_positions():
    with pytest.raises(ValueError, match=r"positions lacks \['start'\]: give what `vc\.pp\.gene_positions` returned"):
        Neighbours(GENES, POSITIONS.drop(columns="start"))
    with pytest.raises(ValueError, match="positions has 'A' more than once"):
        Neighbours(GENES, pd.concat([POSITIONS, POSITIONS[:1]]))
