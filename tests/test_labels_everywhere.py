"""Labels as people write them, through every call that reads them: input, call, and the right value or message.

Right values are computed from the generated cells, whose perturbations multiply six genes of their own.
"""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from anndata._io.specs.registry import IORegistryError
from scipy import sparse

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._labels import canonical, pieces
from virtualcell.data._screen import Screen

FIT = {"se": False, "size": "small", "n_top_genes": None, "validate": False}
TRAINING = {"max_steps": 3, "accelerator": "cpu", "progress_bar": False}
DESIGN = {"perturbation_key": "pert", "control": "NT", "context_key": "ctx"}


def screen(labels: dict[str, list[str]], *, control: list[str] = ["NT"], n: int = 24, seed: int = 0) -> ad.AnnData:  # noqa: B006
    """Counts of two contexts; each perturbation has its labels in turn and multiplies six genes of its own by four."""
    rng = np.random.default_rng(seed)
    base, counts, obs = rng.gamma(0.6, 3.0, 60) + 0.3, [], []
    for context in ("x", "y"):
        level = base * rng.lognormal(0, 0.3, 60)
        for i, written in enumerate([control, *labels.values()]):
            fold = np.ones(60)
            if i:
                fold[6 * i - 6 : 6 * i] = 4
            counts.append(rng.poisson(level * fold * rng.lognormal(0, 0.2, n)[:, None]))
            obs += [(written[k % len(written)], context) for k in range(n)]
    frame = pd.DataFrame(obs, columns=["pert", "ctx"], index=[f"cell{i}" for i in range(len(obs))])
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(60)])
    return ad.AnnData(sparse.csr_matrix(np.vstack(counts).astype(np.float32)), obs=frame, var=var)


def fitted(adata: ad.AnnData, **changes: object) -> vc.models.ST:
    return vc.tl.fit_state(adata, **{**DESIGN, **FIT, "training": TRAINING, **changes})


def same(a: ad.AnnData, b: ad.AnnData) -> None:
    """Nothing of the data has changed: matrix, obs with its types, names."""
    assert (a.X != b.X).nnz == 0
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)


# -- what a label stands for ------------------------------------------------------------------------------------------

NAMES = [
    # label, separator, its parts
    ("A", "+", "A"),
    ("B+A", "+", "A+B"),
    ("A+ctrl", "+", "A"),
    ("ctrl+A", "+", "A"),
    ("A+NT", "+", "A"),
    ("control+A", "+", "A"),
    ("A+non-targeting", "+", "A"),
    ("A+non-targeting_00012", "+", "A"),
    ("A_NegCtrl0", "_", "A"),
    ("NT+NT", "+", "NT"),
    ("ctrl+ctrl", "+", "NT"),
    ("NT", "_", "NT"),
    ("C+A+B", "+", "A+B+C"),
    ("A + B", "+", "A+B"),
    ("(+)-JQ1", "+", "(+)-JQ1"),
    ("atenolol-(+|-)", "+", "atenolol-(+|-)"),
    ("(+)-JQ1+Trametinib", "+", "(+)-JQ1+Trametinib"),
    ("Trametinib+(+)-JQ1", "+", "(+)-JQ1+Trametinib"),
    ("CC(=O)[O-].[Na+]", "+", "CC(=O)[O-].[Na+]"),
    ("C[N+](C)(C)CCO", "+", "C[N+](C)(C)CCO"),
    ("Ca2+", "+", "Ca2+"),
    ("CD4+ T", "+", "CD4+ T"),
    ("Na+/K+ inhibitor", "+", "Na+/K+ inhibitor"),
    ("CD28+CD3", "+", "CD28+CD3"),
    ("vitamin+C", None, "[vitamin+C]"),
    ("vitamin+C_A", "_", "A+[vitamin+C]"),
    ("B_A", "_", "A+B"),
    ("B_A", "+", "B_A"),
    ("B || A", " || ", "A+B"),
    ("B || A", "||", "A+B"),
    ("A_non_targeting", "_", "A"),
    ("drug_1.0", "+", "drug_1.0"),
    (7, "+", "7"),
    (True, "+", "True"),
    (-0.0, "+", "0.0"),
    (b"B+A", "+", "A+B"),
]


@pytest.mark.parametrize(("label", "separator", "name"), NAMES)
def test_a_label_has_one_name(label: object, separator: str | None, name: str) -> None:
    assert canonical(label, ("NT",), separator) == name
    assert canonical(name, ("NT",), "+") == name  # the name of a name is itself


@pytest.mark.parametrize(
    ("label", "parts"),
    [("A+B", ["A", "B"]), ("(+)-JQ1+B", ["(+)-JQ1", "B"]), ("[vitamin+C]+B", ["[vitamin+C]", "B"]), ("A+", ["A+"])],
)
def test_names_are_cut_outside_of_brackets(label: str, parts: list[str]) -> None:
    assert pieces(label) == parts


# -- spellings --------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "A+ctrl": ({"A": ["A+ctrl"], "B": ["B+ctrl"], "A+B": ["A+B"]}, ["ctrl"], "+"),
    "both orders": ({"A": ["A+ctrl", "ctrl+A"], "B": ["ctrl+B"], "A+B": ["A+B", "B+A"]}, ["ctrl"], "+"),
    "underscore": ({"A": ["A"], "B": ["B_non_targeting"], "A+B": ["A_B", "B_A"]}, ["non_targeting"], "_"),
    "bars": ({"A": ["A"], "B": ["B"], "A+B": ["B || A"]}, ["NT"], " || "),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_perturbation_however_it_is_written(spelling: str) -> None:
    labels, control, separator = SPELLINGS[spelling]
    plain = screen({name: [name] for name in labels})
    written = screen(labels, control=control)
    how = {"control": control[0], "combination_separator": separator}
    before = written.copy()
    st = fitted(written, **how)
    same(written, before)
    assert st.perturbations == ["A", "A+B", "B"] == fitted(plain).perturbations
    expected = vc.tl.predict_perturbation(plain, ["A", "A+B"], context="x")
    glue = separator
    asked = [f"A{glue}{control[0]}", f"B{glue}A"]
    found = vc.tl.predict_perturbation(written, asked, context="x")
    assert (found.layers["counts"] != expected.layers["counts"]).nnz == 0
    # what comes back is written as in the data
    assert set(found.obs["pert"]) <= set(written.obs["pert"])
    # and is scored against it
    for prediction in (found, expected):
        prediction.obs["pert"] = prediction.obs["pert"].astype(str)
    scores = vc.tl.evaluate(found, written, suite=["mae"])
    assert [canonical(p, control, separator) for p in scores["perturbation"]] == ["A", "A+B"]
    assert set(scores["perturbation"]) <= set(written.obs["pert"])
    np.testing.assert_array_equal(scores["value"], vc.tl.evaluate(expected, plain, suite=["mae"])["value"])


def test_data_may_be_written_in_another_way_than_what_the_model_learned_from() -> None:
    plain = screen({name: [name] for name in ("A", "B", "A+B")})
    labels, (control,), separator = SPELLINGS["underscore"]
    written = screen(labels, control=[control])
    how = {"model": fitted(plain), "context": "x", "control": control, "combination_separator": separator}
    found = vc.tl.predict_perturbation(written, ["B_A", "A"], **how)
    expected = vc.tl.predict_perturbation(plain, ["A+B", "A"], context="x")
    assert (found.layers["counts"] != expected.layers["counts"]).nnz == 0
    assert set(found.obs["pert"]) <= set(written.obs["pert"])
    table = vc.tl.screen(written, ["B_A", "A"], **how)
    assert set(table.index) <= set(written.obs["pert"])
    np.testing.assert_array_equal(
        np.sort(table["score"]), np.sort(vc.tl.screen(plain, ["A+B", "A"], context="x")["score"])
    )
    effects = vc.tl.effects(written, "A_B", observed=True, **how)
    assert effects["observed_log2_fold_change"].notna().all()


def test_split_holds_out_what_is_meant() -> None:
    adata = screen({"A": ["A+ctrl", "ctrl+A"], "B": ["B"], "A+B": ["A+B", "B+A"]}, control=["ctrl"])
    design = DESIGN | {"control": "ctrl"}
    vc.pp.split(adata, **design, holdout={"perturbations": ["A"]}, val_fraction=0)
    assert set(adata.obs["pert"][adata.obs["split"] == "test"]) == {"A+ctrl", "ctrl+A"}
    vc.pp.split(adata, **design, holdout={"perturbations": ["ctrl+B", "B+A"]}, val_fraction=0)
    assert set(adata.obs["pert"][adata.obs["split"] == "test"]) == {"B", "A+B", "B+A"}
    with pytest.raises(ValueError, match="names the control 'ctrl'"):
        vc.pp.split(adata, **design, holdout={"perturbations": ["ctrl+ctrl"]})


def test_split_of_drugs_shares_no_target(caplog: pytest.LogCaptureFixture) -> None:
    drugs = ["(+)-JQ1", "flurbiprofen-(+|-)", "atenolol-(+|-)", "Trametinib"]
    adata = screen({d: [d] for d in drugs})
    vc.pp.split(adata, **DESIGN, holdout={"perturbations": ["atenolol-(+|-)"]})
    assert "share a target" not in caplog.text
    st = fitted(adata)
    assert st.table.names == sorted(drugs)
    np.testing.assert_array_equal(st.table.encode(drugs).sum(axis=1), np.ones(4))
    both = vc.tl.predict_perturbation(adata, "Trametinib+(+)-JQ1", context="x")
    assert set(both.obs["pert"]) == {"Trametinib+(+)-JQ1"}
    with pytest.raises(KeyError, match=r"'\(\+\)-jq1' is unknown. Did you mean '\(\+\)-JQ1'"):
        vc.tl.predict_perturbation(adata, "(+)-jq1")
    table = pd.DataFrame(np.eye(4)[1:], index=drugs[1:])
    with pytest.raises(ValueError, match=r"no row for 1 perturbations of the data: \['\(\+\)-JQ1'\]"):
        fitted(adata, perturbation_features=table)


def test_without_a_separator_every_label_is_one_perturbation() -> None:
    adata = screen({"A+B": ["A+B"], "B+A": ["B+A"]})
    st = fitted(adata, combination_separator=None)
    assert len(st.perturbations) == 2
    first, second = (vc.tl.predict_perturbation(adata, p, context="x") for p in ("A+B", "B+A"))
    assert set(first.obs["pert"]) == {"A+B"}
    assert set(second.obs["pert"]) == {"B+A"}
    assert first.X[:, :6].mean() > second.X[:, :6].mean()  # GENE0 to GENE5 are those of the first


# -- several controls -------------------------------------------------------------------------------------------------


def test_several_controls_are_one() -> None:
    guides = [f"non-targeting_{i}" for i in (1, 2, 3)]
    one, several = screen({"A": ["A"], "B": ["B"]}), screen({"A": ["A"], "B": ["B"]}, control=guides)
    st = fitted(several, control=guides)
    assert (st.control, st.perturbations) == ("non-targeting_1", ["A", "B"])
    fitted(one)
    expected, found = (vc.tl.predict_perturbation(a, "A") for a in (one, several))
    assert (found.X != expected.X).nnz == 0
    scores = [vc.tl.evaluate(p, a, suite=["mae", "pearson_delta"]) for p, a in ((found, several), (expected, one))]
    np.testing.assert_array_equal(scores[0]["value"], scores[1]["value"])
    holdout = {"contexts": ["x"]}
    vc.pp.split(several, **DESIGN | {"control": guides}, holdout=holdout)
    vc.pp.split(one, **DESIGN, holdout=holdout)
    assert (several.obs["split"].to_numpy() == one.obs["split"].to_numpy()).all()
    vc.models.Additive.setup_anndata(several, **DESIGN | {"control": guides, "scale": "counts"})
    additive = vc.models.Additive(several)
    additive.train()
    assert additive.perturbations == ["A", "B"]


@pytest.mark.parametrize(
    ("control", "error", "message"),
    [
        ([], ValueError, r"control=\[\] names no label"),
        (None, TypeError, "control=None: give the label"),
        ("nt", KeyError, "control='nt' is unknown. Did you mean 'NT'"),
        (["none", "neither"], KeyError, "control='none' is unknown"),
    ],
)
def test_controls_that_are_not_there(control: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fitted(screen({"A": ["A"]}), control=control)


# -- types ------------------------------------------------------------------------------------------------------------

TYPES = {
    "text": lambda x: pd.Series(x, dtype=object),
    "categories": lambda x: pd.Series(pd.Categorical(x, categories=[*sorted(set(x)), "unused"])),
    "string": lambda x: pd.Series(x, dtype="string"),
    "integers": lambda x: pd.Series([int(v) for v in x]),
    "Int64": lambda x: pd.Series([int(v) for v in x], dtype="Int64"),
    "int categories": lambda x: pd.Series(pd.Categorical([int(v) for v in x])),
    "booleans": lambda x: pd.Series([v == "1" for v in x]),
    "bytes": lambda x: pd.Series([v.encode() for v in x], dtype=object),
    "ordered": lambda x: pd.Series(pd.Categorical(x, ordered=True)),
    "arrow": lambda x: pd.Series(x, dtype=pd.ArrowDtype(pa.string())),
    "fractions": lambda x: pd.Series([float(v) / 2 for v in x]),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("column", ["pert", "ctx"])
def test_labels_come_back_as_they_were(kind: str, column: str, tmp_path: object) -> None:
    adata = screen({"1": ["1"]}, control=["0"])
    adata.obs["ctx"] = np.where(adata.obs["ctx"] == "x", "1", "0")
    adata.obs[column] = (
        TYPES[kind](list(adata.obs[column])).to_numpy()
        if kind == "bytes"
        else TYPES[kind](list(adata.obs[column])).array
    )
    before = adata.copy()
    first = adata.obs[column].iloc[0]
    control = first if column == "pert" else "0"
    one = next(v for v in adata.obs[column] if v != first)
    asked = {"perturbation": one if column == "pert" else "1"}
    fitted(adata, control=control)
    predicted = vc.tl.predict_perturbation(adata, asked["perturbation"], context=one if column == "ctx" else "1")
    same(adata, before)
    assert set(predicted.obs[column]) == {one}
    if isinstance(adata.obs[column].dtype, pd.CategoricalDtype):
        assert predicted.obs[column].cat.categories.dtype == adata.obs[column].cat.categories.dtype
    else:
        assert predicted.obs[column].dtype == adata.obs[column].dtype
    joined = ad.concat([adata, predicted], join="inner", index_unique="-")
    assert joined.obs[column].value_counts()[one] == (adata.obs[column] == one).sum() + predicted.n_obs
    assert len(vc.tl.evaluate(predicted, adata, suite=["mae"])) == 1
    with ad.settings.override(allow_write_nullable_strings=True):  # anndata 0.12.0 asks for it
        try:
            adata.write_h5ad(tmp_path / "data.h5ad")
        except IORegistryError:
            pytest.skip("this anndata cannot write such a column of the data either")
        predicted.write_h5ad(tmp_path / "predicted.h5ad")
    written = one.decode() if kind == "bytes" else one
    assert (ad.read_h5ad(tmp_path / "predicted.h5ad").obs[column] == written).all()


@pytest.mark.parametrize("bad", ["nan", "NA", "", " ", "None", "<NA>"])
@pytest.mark.parametrize("column", ["pert", "ctx"])
def test_text_that_means_missing_is_refused(bad: str, column: str) -> None:
    adata = screen({"A": ["A"]})
    adata.obs.iloc[[30, 31], adata.obs.columns.get_loc(column)] = bad
    design = Design("pert", "NT", "ctx")
    with pytest.raises(ValueError, match=rf"{column_of(column)}: 2 cells have the label {bad!r}, text that stands"):
        Screen.from_anndata(adata, design)
    with pytest.raises(ValueError, match="2 cells have the label"):
        vc.pp.split(adata, **DESIGN, holdout={"fraction": 0.2})


@pytest.mark.parametrize(("slip", "column"), [("A ", "pert"), (" NT", "pert"), ("x\t", "ctx")])
def test_labels_that_differ_by_spaces_are_refused(slip: str, column: str) -> None:
    """A slip of typing would part the cells of one label, or make control cells a perturbation."""
    adata = screen({"A": ["A"]})
    before = adata.obs[column].copy()
    adata.obs.iloc[int(np.argmax(before == slip.strip())), adata.obs.columns.get_loc(column)] = slip
    predicted = adata[adata.obs["pert"] == "A"].copy()
    for call in (
        lambda: fitted(adata),
        lambda: vc.tl.fit_baseline(adata, "Additive", **DESIGN, scale="counts"),
        lambda: vc.pp.split(adata, **DESIGN, holdout={"fraction": 0.2}),
        lambda: vc.tl.evaluate(predicted, adata, **DESIGN, scale="counts", predicted_scale="counts", suite=["mae"]),
    ):
        with pytest.raises(ValueError, match="differ by spaces alone") as refused:
            call()
    follow(refused.value, adata)
    assert (adata.obs[column] == before).all()
    assert fitted(adata).perturbations == ["A"]


def follow(advice: Exception, adata: ad.AnnData) -> None:
    """Do what the last sentence of a message says."""
    exec(re.search(r"adata\.obs\[.*\] = .*", str(advice))[0].removesuffix("."), {"adata": adata})


ALIKE = {
    # two labels that look the same, the column, what they are called in the end
    "composed": ("contr\xf4le", "contro\u0302le", "pert", "contr\xf4le"),
    "micro sign and mu": ("5 \xb5M", "5 \u03bcM", "ctx", "5 \u03bcM"),
    "no width": ("B", "B\u200b", "pert", "B"),
    "byte order mark": ("\ufeffB", "B", "pert", "B"),
    "hard space": ("drug B", "drug\xa0B", "pert", "drug B"),
    "full width": ("B", "\uff22", "pert", "B"),
    "joiner and a space": ("e\u200d\u0301 ", "\xe9", "ctx", "\xe9"),
    "of a combination": ("A+\u03bc", "A+\xb5", "pert", "A+\u03bc"),
}


@pytest.mark.parametrize("kind", ["text", "categories", "bytes", "categories of bytes"])
@pytest.mark.parametrize("alike", ALIKE)
def test_labels_that_look_the_same_are_refused(alike: str, kind: str) -> None:
    """Half of the control cells would be a perturbation."""
    first, second, column, name = ALIKE[alike]
    control = first if alike == "composed" else "NT"
    adata = screen({"A": ["A"], "B": ["B"]})
    whole = np.asarray(adata.obs[column] == {"pert": "NT" if alike == "composed" else "B", "ctx": "x"}[column])
    adata.obs.loc[whole, column] = np.where(np.arange(whole.sum()) % 2 == 0, first, second)
    adata.obs[column] = TYPES[kind.split(" ")[-1]](list(adata.obs[column])).to_numpy()
    if kind.startswith("categories"):
        adata.obs[column] = adata.obs[column].astype("category")
    design = DESIGN | {"control": control}
    predicted = adata[whole].copy()
    calls = [
        lambda: fitted(adata, control=control),
        lambda: vc.tl.fit_baseline(adata, "Additive", **design, scale="counts"),
        lambda: vc.pp.split(adata, **design, holdout={"fraction": 0.2}),
        lambda: vc.tl.evaluate(predicted, adata, **design, scale="counts", predicted_scale="counts", suite=["mae"]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="look the same, and are of other characters") as refused:
            call()
        assert ascii(first) in str(refused.value)
        assert ascii(second) in str(refused.value)
    follow(refused.value, adata)
    assert set(adata.obs[column][whole]) == {name}
    model = vc.tl.fit_baseline(
        adata, "Additive", **DESIGN | {"control": name if control != "NT" else "NT"}, scale="counts"
    )
    assert model.perturbations == sorted(["A", name if (column, control) == ("pert", "NT") else "B"])


def test_a_part_of_a_combination_may_look_like_another_label() -> None:
    adata = screen({"B": ["\xb5"], "A+B": ["A+\u03bc"]})
    with pytest.raises(ValueError, match=r"the labels '\\u03bc' and '\\xb5' look the same|'\\xb5' and '\\u03bc'"):
        fitted(adata)


def test_what_is_asked_for_in_other_characters_is_told_apart() -> None:
    adata = screen({"\xb5M": ["\xb5M"], "B": ["B"]})
    model = vc.tl.fit_baseline(adata, "Additive", **DESIGN, scale="counts")
    predicted = vc.tl.predict_perturbation(adata, "\xb5M", model=model)
    other = adata.copy()
    other.obs["pert"] = other.obs["pert"].str.replace("\xb5", "\u03bc")
    mu = r"='\\u03bcM' is unknown\. Did you mean '\\xb5M'\? That looks the same, and is of other characters"
    for call, message in [
        (lambda: vc.tl.predict_perturbation(adata, "\u03bcM", model=model), f"perturbation{mu}"),
        (
            lambda: vc.pp.split(adata, **DESIGN, holdout={"perturbations": ["\u03bcM"]}),
            rf"holdout\['perturbations'\]{mu}",
        ),
        (
            lambda: vc.tl.predict_perturbation(adata, "\xb5M", model=model, context="\uff58"),
            r"context='\\uff58' is unknown\. Did you mean 'x'\?",
        ),
        (
            lambda: vc.tl.fit_baseline(adata, "Additive", **DESIGN | {"control": "N\u200bT"}, scale="counts"),
            r"control='N\\u200bT' is unknown\. Did you mean 'NT'\?",
        ),
        (
            lambda: vc.tl.evaluate(predicted, other, **DESIGN, scale="counts", suite=["mae"]),
            r"perturbation='\\xb5M' is unknown\. Did you mean '\\u03bcM'\?",
        ),
    ]:
        with pytest.raises(KeyError, match=message):
            call()


@pytest.mark.parametrize("as_categories", [False, True])
@pytest.mark.parametrize("column", ["pert", "ctx"])
def test_bytes_that_are_no_text_are_refused(column: str, as_categories: bool) -> None:
    adata = screen({"\xe9": ["\xe9"]})
    adata.obs["ctx"] = adata.obs["ctx"].replace("y", "\xf4")
    labels = pd.Series([v.encode("latin-1") for v in adata.obs[column]], index=adata.obs_names, dtype=object)
    adata.obs[column] = labels.astype("category") if as_categories else labels
    bad = {"pert": r"b'\\xe9'", "ctx": r"b'\\xf4'"}[column]
    for call in (
        lambda: fitted(adata),
        lambda: vc.tl.fit_baseline(adata, "Additive", **DESIGN, scale="counts"),
        lambda: vc.pp.split(adata, **DESIGN, holdout={"fraction": 0.2}),
    ):
        with pytest.raises(
            ValueError, match=rf"{column_of(column)}: the label {bad} is bytes that are not UTF-8"
        ) as refused:
            call()
    follow(refused.value, adata)
    assert set(adata.obs["ctx"]) == {"x", "\xf4"}
    assert vc.tl.fit_baseline(adata, "Additive", **DESIGN, scale="counts").perturbations == ["\xe9"]
    with pytest.raises(ValueError, match=r"the label b'\\xe9' is bytes that are not UTF-8"):
        vc.tl.fit_baseline(adata, "Additive", **DESIGN | {"control": b"\xe9"}, scale="counts")


@pytest.mark.parametrize("form", [np.array, tuple, set, pd.Index, lambda x: np.str_(x[0])])
def test_controls_in_any_form(form: object) -> None:
    adata = screen({"A": ["A"]})
    found = vc.tl.fit_baseline(adata, "Additive", **{**DESIGN, "control": form(["NT"])}, scale="counts")
    assert (found.control, found.perturbations) == ("NT", ["A"])


def column_of(column: str) -> str:
    return {"pert": "perturbation_key='pert'", "ctx": "context_key='ctx'"}[column]


def test_a_control_may_be_called_none() -> None:
    adata = screen({"A": ["A"]}, control=["None"])
    assert Screen.from_anndata(adata, Design("pert", "None", "ctx")).is_control.sum() == 48


def test_groups_are_pairs_and_not_joined_text() -> None:
    adata = screen({"P": ["P"], "P1": ["P1"]}, n=40)
    adata.obs["ctx"] = np.where(adata.obs["ctx"] == "x", "1", "11")  # P in 11 and P1 in 1 read the same when joined
    read = Screen.from_anndata(adata, Design("pert", "NT", "ctx"))
    for seed in range(20):
        held = adata.obs[read.hold_out(0.1, seed).split == "val"]
        assert held.groupby(["pert", "ctx"]).size().to_dict() == dict.fromkeys(
            [(p, c) for p in ("P", "P1") for c in ("1", "11")], 4
        )


# -- doses ------------------------------------------------------------------------------------------------------------

DOSES = {"perturbation_key": "drug", "dose_key": "dose", "control": "DMSO", "context_key": "ctx"}


def dosed(doses: tuple[float, ...] = (0.1, 1.0, 10.0), drugs: tuple[str, ...] = ("A", "B"), n: int = 60) -> ad.AnnData:
    """Counts of drugs whose effect on six genes each grows by a factor of two with every dose."""
    rng = np.random.default_rng(0)
    level, counts, obs = np.full(40, 4.0), [], []
    groups = [("DMSO", np.nan, np.ones(40))]
    for i, drug in enumerate(drugs):
        for k, dose in enumerate(doses, start=1):
            fold = np.ones(40)
            fold[6 * i : 6 * i + 6] = 2.0**k
            groups.append((drug, dose, fold))
    for context in ("x", "y"):
        for drug, dose, fold in groups:
            counts.append(rng.poisson(level * fold, (n, 40)))
            obs += [(drug, dose, context)] * n
    frame = pd.DataFrame(obs, columns=["drug", "dose", "ctx"], index=[f"c{i}" for i in range(len(obs))])
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(40)])
    return ad.AnnData(sparse.csr_matrix(np.vstack(counts).astype(np.float32)), obs=frame, var=var)


@pytest.fixture(scope="module")
def at_doses() -> tuple[ad.AnnData, vc.models.Additive]:
    adata = dosed()
    vc.models.Additive.setup_anndata(adata, **DOSES, scale="counts")
    model = vc.models.Additive(adata)
    model.train()
    return adata, model


def test_perturbations_are_drugs_at_doses(at_doses: tuple[ad.AnnData, vc.models.Additive], tmp_path: object) -> None:
    adata, model = at_doses
    names = [f"{d}_{x}" for d in "AB" for x in (0.1, 1.0, 10.0)]
    assert model.perturbations == names
    before = adata.copy()
    found = vc.tl.predict_perturbation(adata, drug="a", dose=1, model=model, context="x")
    same(adata, before)
    for asked in ("A_1.0", "A_1"):
        other = vc.tl.predict_perturbation(adata, asked, model=model, context="x")
        assert (found.X != other.X).nnz == 0
    assert set(zip(found.obs["drug"], found.obs["dose"], strict=True)) == {("A", 1.0)}
    assert found.obs["dose"].dtype == float
    joined = ad.concat([adata, found], join="inner", index_unique="-")
    joined.write_h5ad(tmp_path / "joined.h5ad")
    scores = vc.tl.evaluate(
        found,
        adata,
        suite=["mae"],
        scale="counts",
        dose_key="dose",
        **{k: v for k, v in DOSES.items() if k != "dose_key"},
    )
    assert list(scores["perturbation"]) == ["A_1.0"]
    model.save(tmp_path / "model")
    again = vc.models.Additive.load(tmp_path / "model")
    assert again.perturbations == names
    assert (vc.tl.predict_perturbation(adata, drug="A", dose=1.0, model=again, context="x").X != found.X).nnz == 0


def test_data_with_a_column_of_doses_for_a_model_that_has_them_in_names(
    at_doses: tuple[ad.AnnData, vc.models.Additive],
) -> None:
    adata, expected = at_doses
    joined = adata.copy()
    drug, dose = joined.obs["drug"].astype(str), joined.obs["dose"].astype(str)
    joined.obs["drug"] = np.where(drug == "DMSO", drug, drug + "_" + dose)
    of_names = {k: v for k, v in DOSES.items() if k != "dose_key"}
    model = vc.tl.fit_baseline(joined, "Additive", **of_names)
    how = {"drug": "A", "dose": 2.5, "context": "x"}
    found = vc.tl.predict_perturbation(adata, model=model, dose_key="dose", **how)
    assert set(zip(found.obs["drug"], found.obs["dose"], strict=True)) == {("A", 2.5)}
    assert (found.X != vc.tl.predict_perturbation(adata, model=expected, **how).X).nnz == 0


def test_doses_between_follow_a_monotone_curve(at_doses: tuple[ad.AnnData, vc.models.Additive]) -> None:
    adata, model = at_doses
    doses = [0.1, 0.2, 0.5, 1.0, 2.0, 10**0.5, 5.0, 10.0]
    means = np.stack(
        [
            vc.tl.predict_perturbation(adata, drug="A", dose=d, model=model, context="x", emit="mean").X.toarray()[0]
            for d in doses
        ]
    )
    raised = means[:, :6]
    assert (np.diff(raised, axis=0) > 0).all()  # between its neighbours, and rising where these rise
    measured = vc.tl.predict_perturbation(adata, "A_1.0", model=model, context="x", emit="mean").X.toarray()[0]
    np.testing.assert_array_equal(means[3], measured)
    control = vc.tl.predict_perturbation(adata, "DMSO", model=model, context="x", emit="mean").X.toarray()[0]
    start, one, ten = control[:6], means[3, :6], means[7, :6]
    assert (start < means[0, :6]).all()
    # halfway on the scale of logarithms
    assert np.abs(means[5, :6] - (one + ten) / 2).max() < 0.1 * (ten - one).min()
    found = vc.tl.predict_perturbation(adata, drug="A", dose=2.5, model=model, context="x", n_samples=3)
    assert set(zip(found.obs["drug"], found.obs["dose"], strict=True)) == {("A", 2.5)}
    assert np.isfinite(found.varm["standard_error"]).all()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"drug": "A", "dose": 20.0}, ValueError, r"dose=20.0 of 'A' lies outside of the measured range, 0.1 to 10.0"),
        ({"drug": "A", "dose": 0.01}, ValueError, "outside of the measured range, 0.1 to 10.0"),
        ({"drug": "A", "dose": 0}, ValueError, "outside of the measured range"),
        ({"drug": "A"}, KeyError, r"dose=None is unknown.*doses of A: give one as dose="),
        ({"drug": "A", "dose": "1 uM"}, TypeError, "dose='1 uM' must be a number"),
        ({"drug": "AA", "dose": 1.0}, KeyError, "drug='AA' is unknown"),
        ({"dose": 1.0}, ValueError, "dose=1.0 was given without drug="),
        ({"perturbation": "A_30.0"}, ValueError, "outside of the measured range, 0.1 to 10.0"),
        ({"perturbation": "A_1.0", "drug": "A"}, ValueError, "were both given"),
        ({"perturbation": "A"}, KeyError, r"'A' is unknown"),
    ],
)
def test_doses_that_nothing_tells_of(
    at_doses: tuple[ad.AnnData, vc.models.Additive], asked: dict, error: type, message: str
) -> None:
    adata, model = at_doses
    with pytest.raises(error, match=message):
        vc.tl.predict_perturbation(adata, model=model, context="x", **asked)


@pytest.mark.parametrize(
    ("dose", "message"),
    [
        ("10 uM", r"dose_key='dose' holds what is no number .*10 uM"),
        (np.nan, "dose_key='dose': 1 cells of a drug have the dose nan"),
        (0.0, "1 cells of a drug have the dose 0.*label of the control"),
        (-1.0, "1 cells of a drug have the dose -1"),
    ],
)
def test_doses_must_be_numbers(dose: object, message: str) -> None:
    adata = dosed(n=5)
    adata.obs["dose"] = adata.obs["dose"].astype(object)
    adata.obs.iloc[8, adata.obs.columns.get_loc("dose")] = dose
    with pytest.raises(ValueError, match=message):
        vc.pp.split(adata, **DOSES, holdout={"fraction": 0.2})


def test_a_drug_is_held_out_at_all_doses_or_at_one() -> None:
    adata = dosed(n=10)
    for held, expected in ((["A"], {("A", 0.1), ("A", 1.0), ("A", 10.0)}), (["B_1"], {("B", 1.0)})):
        vc.pp.split(adata, **DOSES, holdout={"perturbations": held}, val_fraction=0)
        test = adata.obs[adata.obs["split"] == "test"]
        assert set(zip(test["drug"], test["dose"], strict=True)) == expected


def test_whole_doses_and_combinations_of_drugs() -> None:
    adata = dosed(doses=(1, 10), drugs=("A", "B", "B+A"), n=12)
    adata.obs["dose"] = adata.obs["dose"].fillna(0).astype(int)
    st = vc.tl.fit_state(adata, **DOSES, **FIT, training=TRAINING)
    assert st.perturbations == [
        "A_1.0", "A_1.0+B_1.0", "A_10.0", "A_10.0+B_10.0", "B_1.0", "B_10.0",
    ]  # fmt: skip
    found = vc.tl.predict_perturbation(adata, ["A_1.0", "B_10.0+A_10.0"], context="x")
    assert set(zip(found.obs["drug"], found.obs["dose"], strict=True)) == {("A", 1), ("B+A", 10)}
    assert found.obs["dose"].dtype == int
    between = vc.tl.predict_perturbation(adata, drug="A", dose=3.0, context="x")
    assert set(between.obs["dose"]) == {3.0}
    with pytest.raises(ValueError, match="combination_separator='_' does not go with dose_key='dose'"):
        vc.tl.fit_state(adata, **DOSES, **FIT, combination_separator="_")


def test_labels_that_hold_drug_and_dose_themselves() -> None:
    adata = screen({"A_1.0": ["A_1.0"], "A_4.0": ["A_4.0"]})
    fitted(adata)
    one = vc.tl.predict_perturbation(adata, drug="A", dose=1.0, context="x")
    assert set(one.obs["pert"]) == {"A_1.0"}
    assert set(vc.tl.predict_perturbation(adata, drug="A", dose=2.0, context="x").obs["pert"]) == {"A_2.0"}


STORED = {
    "single precision": lambda x: x.astype(np.float32),
    "half precision": lambda x: x.astype(np.float16),
    "rounding noise": lambda x: x.where(np.arange(len(x)) % 2 == 0, x / 3 * (1 + 4e-16) * 3),
    "text": lambda x: x.astype(str),
    "categories": lambda x: x.astype(np.float32).astype("category"),
}


@pytest.mark.parametrize("stored", STORED)
def test_a_dose_has_one_name_however_it_is_stored(stored: str, tmp_path: object) -> None:
    """Or it would be another dose, which a prediction interpolates, and no other call knows."""
    names = [f"{d}_{x}" for d in "AB" for x in (0.1, 0.3, 2.2)]
    plain = dosed(doses=(0.1, 0.3, 2.2), n=10)
    adata = plain.copy()
    adata.obs["dose"] = STORED[stored](plain.obs["dose"].fillna(0))
    assert adata.obs["dose"].nunique() > 4 or stored != "rounding noise"
    model = vc.tl.fit_baseline(adata, "Additive", **DOSES, scale="counts", min_cells=4)
    assert model.perturbations == names
    model.save(tmp_path / "model")
    again = vc.models.Additive.load(tmp_path / "model")
    reference = vc.tl.fit_baseline(plain, "Additive", **DOSES, scale="counts", min_cells=4)
    expected = vc.tl.predict_perturbation(plain, drug="A", dose=0.3, model=reference, context="x")
    for dose in (0.3, np.float32(0.3), "0.3", 0.1 * 3):
        found = vc.tl.predict_perturbation(adata, drug="A", dose=dose, model=again, context="x")
        assert (found.X != expected.X).nnz == 0
        scores = vc.tl.evaluate(found, plain, suite=["mae"], **DOSES, scale="counts")
        assert list(scores["perturbation"]) == ["A_0.3"]
    between = vc.tl.predict_perturbation(adata, drug="A", dose=1, model=again, context="x")
    assert set(between.obs["dose"].astype(float)) == {1.0}
    between.write_h5ad(tmp_path / "between.h5ad")
    held = {"perturbations": ["A_0.1", "B_0.30000000000000004"]}
    vc.pp.split(adata, **DOSES, holdout=held)
    vc.pp.split(plain, **DOSES, holdout=held)
    assert (adata.obs["split"] == plain.obs["split"]).all()
    assert (plain.obs["split"] == "test").sum() == 40


@pytest.mark.parametrize("there", ["vehicle", "", "nan", "0 uM"])
@pytest.mark.parametrize("as_categories", [False, True])
def test_doses_of_control_cells_are_not_read(there: object, as_categories: bool) -> None:
    plain = dosed(n=10)
    adata = plain.copy()
    doses = adata.obs["dose"].astype(object)
    doses[adata.obs["drug"] == "DMSO"] = there
    adata.obs["dose"] = doses.astype("category") if as_categories else doses
    before = adata.copy()
    found, expected = (
        vc.tl.predict_perturbation(
            a,
            ["A_1.0", "DMSO"],
            context="x",
            model=vc.tl.fit_baseline(a, "Additive", **DOSES, scale="counts", min_cells=4),
        )
        for a in (adata, plain)
    )
    same(adata, before)
    assert (found.X != expected.X).nnz == 0
    assert set(found.obs["dose"][found.obs["drug"] == "A"]) == {1.0}
    vc.pp.split(adata, **DOSES, holdout={"perturbations": ["A_1"]})
    assert set(adata.obs["dose"][adata.obs["split"] == "test"]) == {1.0}


def test_benchmark_of_doses() -> None:
    adata = dosed(n=20)
    adata.obs["dose"] = adata.obs["dose"].astype(np.float32)
    for held, expected in (("A", ["A_0.1", "A_1.0", "A_10.0"]), ("A_0.1", ["A_0.1"])):
        splits = {"y unseen": {"contexts": ["y"], "perturbations": [held]}}
        scores = vc.tl.benchmark(
            adata, ["Additive"], **DOSES, splits=splits, suite=["mae"], floor=[], ceiling=False, min_cells=5, seeds=[0]
        )
        assert sorted(scores["perturbation"].unique()) == expected


# -- genes by other names ---------------------------------------------------------------------------------------------


def knockdowns(named: str) -> tuple[ad.AnnData, ad.AnnData]:
    """Real knockdowns of six genes, and a prediction that knows of each no more than that its target goes to zero.

    Genes are `named` by "symbol", by Ensembl "id" or by "version" with the symbols in a column, or so that
    perturbations are named by "ids" and genes by ids with a version.
    """
    rng = np.random.default_rng(3)
    symbols = [f"SYM{i}" for i in range(60)]
    ids = [f"ENSG{i:011d}" for i in range(60)]
    base = rng.gamma(1.0, 3.0, 60) + 2
    counts, labels = [], []
    for target in (None, *range(6)):
        fold = np.ones(60) if target is None else np.exp(rng.normal(0, 0.15, 60))
        if target is not None:
            fold[target] = 0.02
        counts.append(rng.poisson(base * fold, (50, 60)))
        labels += ["NT" if target is None else (ids if named == "ids" else symbols)[target]] * 50
    var = pd.DataFrame({"symbol": symbols}, index=symbols)
    if named != "symbol":
        var.index = ids if named == "id" else [f"{gene}.{i % 9 + 1}" for i, gene in enumerate(ids)]
    obs = pd.DataFrame({"pert": labels}, index=[f"c{i}" for i in range(len(labels))])
    real = ad.AnnData(sparse.csr_matrix(np.vstack(counts).astype(np.float32)), obs=obs, var=var)
    control = real.X[:50].toarray()
    control = np.log1p(1e4 * control / control.sum(axis=1, keepdims=True))
    shift = np.where(np.arange(60) < 6, 0, rng.uniform(0, 0.3, 60))
    cells = []
    for target in range(6):
        cells.append((control + shift).astype(np.float32))
        cells[-1][:, target] = 0
    names = np.repeat([labels[50 * (i + 1)] for i in range(6)], 50)
    obs = pd.DataFrame({"pert": names}, index=[f"p{i}" for i in range(300)])
    return ad.AnnData(np.vstack(cells), obs=obs, var=var), real


@pytest.mark.parametrize(
    ("named", "gene_key"), [("symbol", None), ("id", "symbol"), ("version", "symbol"), ("ids", None)]
)
def test_the_target_is_left_out_of_discrimination(
    named: str, gene_key: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    predicted, real = knockdowns(named)
    how = {"perturbation_key": "pert", "control": "NT", "scale": "counts", "suite": ["discrimination_cosine"]}
    scores = vc.tl.evaluate(predicted, real, **how, gene_key=gene_key)
    assert "gene_key" not in caplog.text
    # by hand, from the definition: 1 - rank / n by cosine of effects without the target
    log = np.log1p(1e4 * real.X.toarray() / real.X.sum(axis=1))
    means = np.asarray(log).reshape(7, 50, 60).mean(axis=1)
    guess = predicted.X.reshape(6, 50, 60).mean(axis=1) - means[0]
    expected = []
    for i, mine in enumerate(guess):
        kept = np.arange(60) != i
        near = [mine[kept] @ e[kept] / np.linalg.norm(e[kept]) for e in means[1:] - means[0]]
        expected.append(1 - sum(x > near[i] for x in near) / 6)
    np.testing.assert_allclose(scores["value"], expected, atol=1e-6)
    assert scores["value"].mean() < 0.9  # with the target, this prediction of nothing scores 1


@pytest.mark.parametrize("form", ["categories", "bytes", "None but for targets", "arrow"])
def test_names_of_genes_in_any_form(form: str) -> None:
    (predicted, real), scores = knockdowns("id"), []
    symbols = list(real.var["symbol"])
    forms = {
        "categories": pd.Categorical(symbols),
        "bytes": [s.encode() for s in symbols],
        "None but for targets": [s if i < 6 else None for i, s in enumerate(symbols)],
        "arrow": pd.array(symbols, dtype=pd.ArrowDtype(pa.string())),
    }
    for values in (symbols, forms[form]):
        for adata in (predicted, real):
            adata.var["symbol"] = values
        how = {"perturbation_key": "pert", "control": "NT", "scale": "counts", "gene_key": "symbol"}
        scores.append(vc.tl.evaluate(predicted, real, **how, suite=["discrimination_cosine"])["value"])
    np.testing.assert_array_equal(*scores)
    assert scores[0].mean() < 0.9


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (True, r"6 of 6 names of perturbations are in var\['symbol'\].*gene_key='symbol'"),
        (False, "named by Ensembl ids"),
    ],
)
def test_a_target_that_is_not_found_is_said(columns: bool, message: str, caplog: pytest.LogCaptureFixture) -> None:
    predicted, real = knockdowns("version")
    if not columns:
        predicted.var, real.var = predicted.var[[]], real.var[[]]
    how = {"perturbation_key": "pert", "control": "NT", "scale": "counts"}
    vc.tl.evaluate(predicted, real, **how, suite=["discrimination_cosine"])
    assert pd.Series([caplog.text]).str.contains(message, regex=True).all()
    caplog.clear()
    vc.tl.evaluate(predicted, real, **how, suite=["mae"])
    assert "gene_key" not in caplog.text


def test_benchmark_leaves_the_target_out_too() -> None:
    found = {}
    for named, gene_key in (("symbol", None), ("version", "symbol")):
        _, real = knockdowns(named)
        real.obs["ctx"] = np.where(np.arange(real.n_obs) % 2, "x", "y")
        found[named] = vc.tl.benchmark(
            real, ["PerturbationMean"], perturbation_key="pert", control="NT", context_key="ctx", gene_key=gene_key,
            splits={"x": {"contexts": ["x"]}}, suite=["discrimination_cosine"], floor=[], min_cells=5, seeds=[0],
            n_top_genes=None, ceiling=False,
        )  # fmt: skip
    np.testing.assert_array_equal(found["symbol"]["value"], found["version"]["value"])


def test_screens_and_effects_take_any_spelling() -> None:
    adata = screen({"A": ["A+ctrl", "A+ctrl", "ctrl+A"], "B": ["B"], "A+B": ["B+A"]}, control=["ctrl"])
    fitted(adata, control="ctrl")
    asked = ["A", "A+B"]
    ranked = vc.tl.screen(adata, asked, context="x", n_cells=24)
    assert set(ranked.index) == {"A+ctrl", "B+A"}  # as the data has them most often
    toward = vc.tl.screen(adata, asked, context="x", n_cells=24, objective="toward", target="ctrl+A")
    assert set(toward.index) == {"A+ctrl", "B+A"}
    table = vc.tl.effects(adata, ["ctrl+A"], context="x", n_cells=24, observed=True)
    assert set(table["perturbation"]) == {"A+ctrl"}
    assert table["observed_log2_fold_change"].notna().all()
