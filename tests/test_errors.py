from __future__ import annotations

import pytest

from virtualcell._errors import UnknownNameError, as_it_looks, unknown_name


def test_message_names_argument_value_nearest_and_remedy() -> None:
    error = unknown_name("perturbation", "stat1", ["JAK2", "STAT1", "STAT2", "IRF1"], "Train it.")
    assert str(error).startswith("perturbation='stat1' is unknown. Did you mean 'STAT1', 'STAT2'")
    assert str(error).endswith("? Train it.")
    assert "IRF1" not in str(error)
    assert "JAK2" not in str(error)


def test_message_lists_what_is_known_where_nothing_is_near() -> None:
    assert str(unknown_name("key", "zzz", ["a", "b"])) == "key='zzz' is unknown. Known: 'a', 'b'."
    many = str(unknown_name("key", "zzz", [f"g{i}" for i in range(20)]))
    assert many == "key='zzz' is unknown. Known: " + ", ".join(f"'g{i}'" for i in range(8)) + " and 12 more."
    assert str(unknown_name("key", "zzz", [])) == "key='zzz' is unknown. There are none."
    assert str(unknown_name("key", "zzz", [], "Make one.")) == "key='zzz' is unknown. There are none. Make one."


def test_a_name_that_looks_the_same_is_shown_by_its_characters() -> None:
    """Shown as they are, the two would read alike."""
    error = unknown_name("control", "contro\u0302le", ["A", "contr\xf4le", "contro"], "Name it.")
    expected = r"Did you mean 'contr\xf4le'? That looks the same, and is of other characters. Name it."
    assert str(error) == rf"control='contro\u0302le' is unknown. {expected}"
    assert str(unknown_name("key", "\xe9", ["e"])) == "key='\xe9' is unknown. Known: 'e'."


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("contr\u00f4le", "contro\u0302le", True),
        ("5 \u00b5M", "5 \u03bcM", True),
        ("A\u200b", "A", True),
        ("\ufb01lter", "filter", True),
        ("A\u00a0B", "A B", True),
        ("10\u2075", "105", False),
        ("CD8\u207a T", "CD8+ T", False),
        ("H\u2082O", "H2O", False),
        ("\u2460", "1", False),
        ("\u03b1", "a", False),
    ],
)
def test_what_looks_the_same(one: str, other: str, are_one: bool) -> None:
    assert (as_it_looks(one) == as_it_looks(other)) is are_one


def test_names_need_not_be_strings_and_may_come_once() -> None:
    assert str(unknown_name("batch", 12, iter([7, 8, 112]))) == "batch=12 is unknown. Did you mean '112'?"


def test_it_is_a_key_error_that_prints_as_written() -> None:
    with pytest.raises(KeyError) as info:
        raise unknown_name("gene", "X", ["Y"])
    assert isinstance(info.value, UnknownNameError)
    # a plain KeyError would print the quoted repr
    assert str(info.value) == "gene='X' is unknown. Known: 'Y'."
    assert str(KeyError("it's")) != "it's"
