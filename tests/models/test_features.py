from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from virtualcell._errors import UnknownNameError
from virtualcell.data._labels import Known
from virtualcell.models._features import PerturbationTable


def test_one_hot_gives_each_target_of_a_combination_its_own_vector():
    table = PerturbationTable.one_hot(["B", "A+C", "NT", "B"], "NT")
    assert table.names == ["A", "B", "C"]
    assert table.seen == ["A+C", "B"]
    assert not table.has_features
    torch.testing.assert_close(
        table.encode(["NT", "B", "A+C", "C+A"]), torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 0, 1.0]])
    )


def test_one_hot_refuses_what_it_was_not_trained_on_and_says_what_to_do():
    table = PerturbationTable.one_hot(["STAT1", "JAK2"], "NT")
    with pytest.raises(
        UnknownNameError, match=r"^perturbation='STAT2' is unknown\. Did you mean 'STAT1'\?.*perturbation_features="
    ):
        table.encode(["STAT2"])
    with pytest.raises(KeyError, match=r"^perturbation='STAT1\+STAT2' is unknown"):
        table.encode(["STAT1+STAT2"])


def test_features_are_standardised_and_count_perturbations():
    rng = np.random.default_rng(0)
    values = rng.normal(3, [1, 100, 1e-3], (5, 3))
    frame = pd.DataFrame(np.c_[values, np.full(5, 7.0)], index=list("ABCDE"))  # the last column says nothing
    table = PerturbationTable.from_features(frame, ["A", "B", "A+B", "NT"], "NT")
    expected = (values - values.mean(0)) / values.std(0) / np.sqrt(3)
    np.testing.assert_allclose(table.vectors, np.c_[expected, np.ones(5)], atol=1e-6)
    assert table.seen == ["A", "A+B", "B"]
    both = table.encode(["D+E"])[0].numpy()  # never met in training
    np.testing.assert_allclose(both, np.r_[expected[3] + expected[4], 2], atol=1e-6)
    assert not table.encode(["NT"]).any()


def test_a_row_for_a_combination_goes_before_the_sum_of_its_parts():
    frame = pd.DataFrame(np.eye(3), index=["A", "B", "A+B"])
    table = PerturbationTable.from_features(frame, ["A", "A+B"], "NT")
    torch.testing.assert_close(table.encode(["A+B"])[0], table.vectors[2])


def test_features_that_lack_a_perturbation_of_the_data():
    frame = pd.DataFrame(np.eye(2), index=["A", "B"])
    with pytest.raises(ValueError, match=r"no row for 2 perturbations of the data: \['C', 'D'\]\. Add rows"):
        PerturbationTable.from_features(frame, ["A+C", "D", "NT"], "NT")
    table = PerturbationTable.from_features(frame, ["A"], "NT")
    with pytest.raises(KeyError, match=r"^perturbation='Z' is unknown.*no row in the feature table"):
        table.encode(["Z"])


def test_features_with_missing_values_or_repeated_names():
    frame = pd.DataFrame(np.eye(2), index=["A", "B"])
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        PerturbationTable.from_features(frame.replace(1.0, np.nan), ["A"], "NT")
    frame.index = ["A", "A"]
    with pytest.raises(ValueError, match=r"several rows for \['A'\]"):
        PerturbationTable.from_features(frame, ["A"], "NT")


def test_what_was_seen_only_in_combination_is_not_known_alone():
    table = PerturbationTable.one_hot(["A", "B", "C+D"], "NT")
    for label in ("A", "C+D", "A+B", "NT"):
        table.check(label)
    with pytest.raises(UnknownNameError, match=r"'C' was trained on only in combination, 'C\+D'"):
        table.check("C")
    with pytest.raises(UnknownNameError, match=r"perturbation='A\+C' is unknown"):
        table.check("A+C")


def test_what_was_measured_is_itself_however_it_is_written():
    known = ["A", "A+A", "A+ctrl", "B+A", "ctrl+A"]
    for label in known:  # and not another one that adds up to the same
        assert Known(known, "ctrl").parts(label) == [label]
    assert Known(known, "ctrl").parts("A+B") == ["B+A"]
    assert Known(known, "ctrl").parts("A+C") == ["A", "C"]
    assert Known(["A"], "ctrl").parts("A+A") == ["A", "A"]
    assert Known(known, "ctrl").parts("ctrl") == []


def test_tables_of_features_say_what_is_wrong():
    table = pd.DataFrame({"gene": ["P", "Q"], "x": [0.0, 1.0]})
    with pytest.raises(ValueError, match=r"columns that hold no numbers, \['gene'\].*set_index\('gene'\)"):
        PerturbationTable.from_features(table, ["P"], "ctrl")
    table = table.set_index("gene")
    with pytest.raises(ValueError, match=r"no row for 1 perturbations of the data: \['R'\]"):
        PerturbationTable.from_features(table, ["P"], "ctrl", ["R"])
