from __future__ import annotations

import pandas as pd
import pytest

from virtualcell._text_tables import are_values, counts_rows, head_of, is_number, numbers_rows


@pytest.mark.parametrize(
    ("name", "values", "numbers", "counts"),
    [
        ("Unnamed: 0", [0, 1, 2], True, True),
        ("Unnamed: 0.1", ["1", "2", "3"], True, True),
        ("index", [7, 2, 9], True, False),
        ("", [1, 2, 4], True, False),
        ("Unnamed: 0", [1, 2, 2], False, False),
        ("Unnamed: 0", ["A", "1", "2"], False, False),
        ("Unnamed: 0", [0.5, 1.5, 2.5], False, False),
        ("Unnamed: 0", [-1, 0, 1], False, False),
        ("Unnamed: 3", [None, None, None], False, False),
        ("entrez", [0, 1, 2], False, False),
        (0, [0, 1, 2], False, False),
    ],
)
def test_columns_that_number_rows(name, values, numbers, counts):
    column = pd.Series(values)
    assert numbers_rows(name, column) is numbers
    assert counts_rows(name, column) is counts


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["gene", "a", "b"], False),
        (["gene", "0", "1", "2"], False),
        (["gene", "5", "40", "200"], False),
        (["gene", "0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], False),
        (["gene", "0.0", "1.0"], False),
        (["MYC", "0.12", "1.5"], True),
        (["MYC", "-1", "2"], True),
        (["MYC", "1e-5", "a"], True),
        (["MYC", "3", "1", "7"], True),
        (["MYC", "1", "1.1"], True),  # as pandas calls the second 1
        (["MYC", "1e999"], True),
    ],
)
def test_values_in_the_place_of_a_header(names, found):
    assert are_values(names) is found


@pytest.mark.parametrize("text", ["1", "-1.5", " 2 ", ".5", "1e-05", "1E5", "100."])
def test_numbers(text):
    assert is_number(text)


@pytest.mark.parametrize("text", ["G1", "nan", "inf", "1_0", "", "1.2.3", "."])
def test_no_numbers(text):
    assert not is_number(text)


def test_names_of_rows_that_r_writes(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n1\tSTAT1\tJAK2\n2\tSTAT1\tIRF1\n")
    assert list(head_of(tmp_path / "x.tsv", "\t", "table")["b"]) == ["JAK2", "IRF1"]
    (tmp_path / "x.tsv").write_text("a\tb\nSTAT1\tJAK2\t0.5\n")
    with pytest.raises(ValueError, match="rows with more values than its first line has names"):
        head_of(tmp_path / "x.tsv", "\t", "table")


def test_how_another_separator_is_mended(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("gene;x\nNA;1.5\n007;2\n")
    with pytest.raises(ValueError, match="it is separated by ';'") as refused:
        head_of(path, ",", "table")
    exec(str(refused.value).split("`")[1], {"pd": pd})
    assert path.read_text() == "gene,x\nNA,1.5\n007,2\n"
