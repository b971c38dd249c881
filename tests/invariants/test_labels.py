"""What holds of every label: it has one name, in whatever order and by whatever separator it is written."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import assume, given
from hypothesis import strategies as st

from virtualcell._keys import MISSING
from virtualcell.data._labels import Known, canonical, looks_like_control, parts, pieces, read_names

CONTROLS = ("NT", "safe+harbour")
SEPARATORS = [None, "+", "_", "|", "||", " & ", "; "]

# what people put into names of genes and drugs, brackets and plus signs before all
characters = st.text("AbZ19+-_|()[]{}.,;:&/ '*µé中", min_size=1, max_size=12)
anything = st.one_of(characters, st.text(max_size=8), st.integers(), st.booleans(), st.floats(), st.binary(max_size=0))
names = st.text("ABCDEFG123", min_size=1, max_size=4).filter(lambda name: not looks_like_control(name))


@given(anything, st.sampled_from(SEPARATORS))
def test_a_name_is_its_own_name(label: object, separator: str | None) -> None:
    name = canonical(label, CONTROLS, separator)
    assert canonical(name, CONTROLS, "+") == name
    assert parts(name, CONTROLS[0]) == ([] if name == CONTROLS[0] else sorted(parts(name)))


@given(characters, st.sampled_from([s for s in SEPARATORS if s is not None]))
def test_what_a_label_is_cut_into_is_in_the_label(label: str, separator: str) -> None:
    found = pieces(label, separator)
    kept = Counter(c for piece in found for c in piece)
    assert kept <= Counter(label)
    assert Counter(label) - kept <= Counter({c: len(label) for c in separator + " "})
    assert pieces(label, None) == [label]


@given(st.lists(names, min_size=1, max_size=4, unique=True), st.permutations(range(6)), st.sampled_from(SEPARATORS[1:]))
def test_combinations_have_no_order(of: list[str], order: list[int], separator: str) -> None:
    turned = [of[i] for i in order if i < len(of)]
    name = canonical(separator.join(of), CONTROLS, separator)
    assert canonical(separator.join(turned), CONTROLS, separator) == name
    assert parts(name, CONTROLS[0]) == sorted(of)
    assert Known([name], CONTROLS[0]).parts("+".join(turned)) == [name]


@given(
    st.lists(names, min_size=1, max_size=3, unique=True), st.integers(0, 3), st.sampled_from(["ctrl", "NT", "NegCtrl0"])
)
def test_a_control_beside_a_target_says_nothing(of: list[str], at: int, control: str) -> None:
    with_control = [*of[:at], control, *of[at:]]
    assert canonical("+".join(with_control), CONTROLS) == canonical("+".join(of), CONTROLS)
    assert canonical("+".join([control] * (at + 1)), (control, *CONTROLS)) == control


@given(characters)
def test_a_name_that_is_known_is_one_part(label: str) -> None:
    assert parts(label, "NT", {label}) == ([] if label == "NT" else [label])


KINDS = {
    "text": (names, object),
    "new text": (names, "string"),
    "categories": (names, "category"),
    "integers": (st.integers(-(2**31), 2**31), "int64"),
    "booleans": (st.booleans(), bool),
    "bytes": (names.map(str.encode), object),
    "fractions": (st.floats(allow_nan=False, allow_infinity=False), "float64"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_columns_come_back_as_they_were(kind: str, data: st.DataObject) -> None:
    of, dtype = KINDS[kind]
    labels = data.draw(st.lists(of, min_size=1, max_size=20))
    column = pd.Series(labels, dtype=dtype, index=[f"c{i}" for i in range(len(labels))])
    assume(not any(str(label).strip() in MISSING for label in labels))
    adata = AnnData(np.zeros((len(labels), 1), np.float32), obs=pd.DataFrame({"label": column}))
    found, written = read_names(adata, "label", argument="perturbation_key")
    assert list(found.categories) == sorted(found.categories)
    back = written.restore(found).set_axis(column.index)
    if dtype == "category":
        assert isinstance(back.dtype, pd.CategoricalDtype)
        back, column = back.astype(column.cat.categories.dtype), column.astype(column.cat.categories.dtype)
    pd.testing.assert_series_equal(back, column, check_names=False)
    turned = adata[::-1].copy()
    again, _ = read_names(turned, "label", argument="perturbation_key")
    assert list(again) == list(found)[::-1]
