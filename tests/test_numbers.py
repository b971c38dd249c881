from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from virtualcell._numbers import as_numbers


@pytest.mark.parametrize(
    "values",
    [
        ["1", " 2.5 ", "-3e2", "inf", "nan", None, "x", "1_000", ""],
        [1, 2.5, None, "4", b"5"],
        pd.Categorical(["1", "10", "1", None]),
        pd.array(["1", None, "x"], dtype="string"),
        pd.array([1, None, 3], dtype="Int64"),
        [True, False],
    ],
    ids=["text", "mixed", "categories", "new text", "integers that may be missing", "booleans"],
)
def test_numbers_are_those_of_pandas(values):
    values = pd.Series(values)
    wanted = pd.to_numeric(values.astype(object), errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    found = as_numbers(values).to_numpy(dtype=float, na_value=np.nan)
    is_bytes = np.array([isinstance(v, bytes) for v in values])
    np.testing.assert_array_equal(found[~is_bytes], wanted[~is_bytes])


def test_long_exponents():
    found = as_numbers(pd.Series(["1.5e991000000000", "-1e99999999999", "1e-99999999999"]))
    assert found.tolist() == [np.inf, -np.inf, 0]


def test_text_that_is_no_number():
    with pytest.raises(ValueError, match=r"'high' is no number"):
        as_numbers(pd.Series(["1", "high"]), strict=True)
