"""Files as people have them, through every call that reads them: input, call, and the right value or message.

Right values are computed with numpy from the generated counts. Each call leaves the data as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from scipy import sparse

import virtualcell as vc
from virtualcell.data._scales import totals_of

DESIGN = {"perturbation_key": "pert", "control": "NT", "context_key": "ctx"}
TRAINING = {"max_steps": 2, "accelerator": "cpu", "progress_bar": False}
FIT = {"se": False, "size": "small", "n_top_genes": None, "validate": False, "training": TRAINING}
GENES = 30


def screen(
    perturbations: tuple[str, ...] = ("A", "B", "C"), contexts: tuple[str, ...] = ("x", "y"), n: int = 12, seed: int = 0
) -> ad.AnnData:
    """Counts of a small screen; each perturbation multiplies six genes of its own by four."""
    rng = np.random.default_rng(seed)
    base, counts, obs = rng.gamma(0.6, 3.0, GENES) + 0.5, [], []
    for context in contexts:
        level = base * rng.lognormal(0, 0.3, GENES)
        for i, label in enumerate(["NT", *perturbations]):
            fold = np.ones(GENES)
            if i:
                fold[6 * i - 6 : 6 * i] = 4
            counts.append(rng.poisson(level * fold * rng.lognormal(0, 0.2, n)[:, None]))
            obs += [(label, context)] * n
    frame = pd.DataFrame(obs, columns=["pert", "ctx"], index=[f"cell{i}" for i in range(len(obs))])
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(GENES)])
    return ad.AnnData(sparse.csr_matrix(np.vstack(counts).astype(np.float32)), obs=frame, var=var)


def logs(adata: ad.AnnData, total: float | str | None = 1e4) -> np.ndarray:
    """log(1 + counts per `total`); of the median total for `None`, of the counts for "counts"."""
    counts = adata.X.toarray().astype(float)
    sums = counts.sum(axis=1, keepdims=True)
    target = np.median(sums) if total is None else total
    return np.log1p(counts if total == "counts" else counts / np.maximum(sums, 1) * target)


def holding(adata: ad.AnnData, values: np.ndarray, dtype: type = np.float32) -> ad.AnnData:
    out = adata.copy()
    out.X = sparse.csr_matrix(values.astype(dtype))
    return out


def with_empty_cell(adata: ad.AnnData) -> ad.AnnData:
    counts = adata.X.toarray()
    counts[3] = 0
    return holding(adata, counts)


class Unchanged:
    """Data that a call must leave as it is: matrices, labels and names; what was noted in `uns` is added."""

    def __init__(self, data: ad.AnnData | md.MuData) -> None:
        self.data, self.before = data, self.look(data)

    @staticmethod
    def look(data: ad.AnnData | md.MuData) -> list:
        found: list = [data.obs.copy()] if isinstance(data, md.MuData) else []
        for adata in data.mod.values() if isinstance(data, md.MuData) else [data]:
            found += [adata.obs.copy(), adata.var.copy()]
            found += [deepcopy(m) for m in (adata.X, *adata.layers.values(), *adata.obsm.values())]
        return found

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        now = self.look(self.data)
        assert len(now) == len(self.before)
        for a, b in zip(self.before, now, strict=True):
            assert type(a) is type(b)
            if isinstance(a, pd.DataFrame):
                pd.testing.assert_frame_equal(a, b)
            elif sparse.issparse(a):
                assert a.dtype == b.dtype
                for part in ("data", "indices", "indptr"):
                    np.testing.assert_array_equal(getattr(a, part), getattr(b, part))
            else:
                np.testing.assert_array_equal(a, b)


def fitted(data: ad.AnnData | md.MuData, **changes: object) -> vc.models.ST:
    return vc.tl.fit_state(data, **{**DESIGN, **FIT, **changes})


@pytest.fixture(scope="module")
def plain() -> ad.AnnData:
    return screen()


@pytest.fixture(scope="module")
def additive(plain: ad.AnnData) -> vc.models.Additive:
    return vc.tl.fit_baseline(plain.copy(), "Additive", **DESIGN, scale="counts")


@pytest.fixture(scope="module")
def st(plain: ad.AnnData) -> vc.models.ST:
    return fitted(plain.copy())


@pytest.fixture(scope="module")
def predicted(plain: ad.AnnData, additive: vc.models.Additive) -> ad.AnnData:
    return vc.tl.predict_perturbation(plain, "A", model=additive)


def gene_table(adata: ad.AnnData) -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).normal(size=(GENES, 4)), index=adata.var_names)


@pytest.fixture(scope="module")
def calls(additive: vc.models.Additive, predicted: ad.AnnData) -> dict[str, Callable]:
    """Calls that read expression."""

    def benchmark(data: ad.AnnData, scale: str) -> pd.DataFrame:
        return vc.tl.benchmark(
            data, ["Additive"], **DESIGN, scale=scale, splits={"A in y": {"contexts": ["y"], "perturbations": ["A"]}},
            suite=["mae"], floor=[], ceiling=False, min_cells=5, seeds=[0],
        )  # fmt: skip

    return {
        "fit_state": lambda data, scale: fitted(data, scale=scale),
        "fit_baseline": lambda data, scale: vc.tl.fit_baseline(data, "Additive", **DESIGN, scale=scale),
        "predict": lambda data, scale: vc.tl.predict_perturbation(data, "A", model=additive, scale=scale),
        "evaluate": lambda data, scale: vc.tl.evaluate(predicted, data, **DESIGN, scale=scale, suite=["mae"]),
        "benchmark": benchmark,
    }


def check_refused(calls: dict[str, Callable], data: ad.AnnData, scale: str, error: type, message: str) -> None:
    """All calls refuse the data with this message, and leave it as it was."""
    for name, call in calls.items():
        refused = None
        with Unchanged(data):
            try:
                call(data, scale)
            except error as found:
                refused = str(found)
        assert refused is not None, f"{name} accepts it"
        assert re.search(message, refused), f"{name}: {refused}"


# -- scale ------------------------------------------------------------------------------------------------------------

ANEW = r"target_sum=10000"
SCALES = {
    # values from the counts, the stated scale, the message
    "median total": (lambda a: logs(a, None), "log1p", rf"normalised to .* and not to 10000.*{ANEW}"),
    "30,000 a cell": (lambda a: logs(a, 3e4), "log1p", rf"normalised to 3e\+04 counts.*{ANEW}"),
    "a million": (lambda a: logs(a, 1e6), "log1p", rf"normalised to 1e\+06 counts.*{ANEW}"),
    "a million, as counts": (lambda a: logs(a, 1e6), "counts", rf"normalised to 1e\+06 counts.*{ANEW}"),
    "twice": (lambda a: np.log1p(logs(a)), "log1p", r"log\(1 \+ x\) twice.*once and without a base"),
    "twice, of the median": (lambda a: np.log1p(logs(a, None)), "log1p", r"log\(1 \+ x\) twice"),
    "twice, of counts": (lambda a: np.log1p(logs(a, "counts")), "log1p", r"log\(1 \+ x\) twice"),
    "of counts": (lambda a: logs(a, "counts"), "log1p", r"logarithms of whole numbers: of raw counts"),
    "base 2": (lambda a: logs(a) / np.log(2), "log1p", r"logarithms to base 2"),
    "base 10": (lambda a: logs(a) / np.log(10), "log1p", r"logarithms to base 10"),
    "base 2, of counts": (lambda a: logs(a, "counts") / np.log(2), "log1p", r"logarithms to base 2"),
    "square roots": (lambda a: np.sqrt(a.X.toarray()), "log1p", r"holds square roots"),
    "square roots of shares": (lambda a: np.sqrt(np.expm1(logs(a))) / 12, "log1p", r"holds square roots"),
    "arcsinh": (lambda a: np.arcsinh(a.X.toarray()), "log1p", r"holds inverse hyperbolic sines"),
    "by the largest": (lambda a: a.X.toarray() / a.X.max(), "log1p", r"whole numbers times 0\.0\d+: .*neither"),
    "few corrected counts, as log1p": (
        lambda a: np.minimum(a.X.toarray(), 5) * 0.97,
        "log1p",
        r"whole numbers times 0\.97: .*np\.rint",
    ),
    "no logarithm": (
        lambda a: np.expm1(logs(a)),
        "counts",
        r"divided by their total, and no logarithms.*sc\.pp\.log1p",
    ),
    "no logarithm, as log1p": (lambda a: np.expm1(logs(a)), "log1p", r"divided by their total, and no logarithms"),
    "shares": (lambda a: np.expm1(logs(a, 1)), "log1p", r"divided by their total, and no logarithms"),
    "logs as counts": (logs, "counts", r"holds fractions.*say scale='log1p'"),
    "counts as logs": (lambda a: a.X.toarray(), "log1p", r"Say scale='counts'"),
    "scaled": (lambda a: logs(a) - logs(a).mean(axis=0), "log1p", r"negative values.*scaled or residual"),
    "scaled, as counts": (lambda a: logs(a) - logs(a).mean(axis=0), "counts", r"negative values"),
    "corrected counts": (lambda a: a.X.toarray() * 0.97, "counts", r"holds fractions.*np\.rint"),
    "corrected counts, as log1p": (lambda a: a.X.toarray() * 0.97, "log1p", r"neither raw counts nor.*np\.rint"),
    "few corrected counts": (lambda a: np.minimum(a.X.toarray(), 5) * 0.97, "counts", r"holds fractions.*np\.rint"),
    "NaN": (lambda a: np.where(logs(a) == logs(a).max(), np.nan, logs(a)), "log1p", r"NaN or infinite values"),
    "infinite": (lambda a: np.where(logs(a) == logs(a).max(), np.inf, logs(a)), "log1p", r"NaN or infinite values"),
}


@pytest.mark.parametrize("empty", [False, True], ids=["", "one empty cell"])
@pytest.mark.parametrize("case", SCALES)
def test_what_is_not_on_the_scale_is_refused_by_all(
    case: str, empty: bool, plain: ad.AnnData, calls: dict[str, Callable]
) -> None:
    values, scale, message = SCALES[case]
    counts = with_empty_cell(plain) if empty else plain
    # predictions read control cells only
    reading = {k: v for k, v in calls.items() if case not in ("NaN", "infinite") or k != "predict"}
    check_refused(reading, holding(counts, values(counts)), scale, ValueError, message)


def test_half_of_the_cells_on_another_total(plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    values = logs(plain)
    values[::2] = logs(plain, 5000)[::2]
    check_refused(calls, holding(plain, values), "log1p", ValueError, r"50%\) that were normalised to 5000 counts")


def test_totals_that_cells_were_divided_to() -> None:
    rng = np.random.default_rng(0)
    found = totals_of(np.concatenate([2000 * rng.normal(1, 1e-7, 70), 1e4 * rng.normal(1, 1e-7, 30), [0]]))
    assert [(round(total), share) for total, share in found.items()] == [(2000, 0.7), (10000, 0.3)]
    assert totals_of(9500 * rng.normal(1, 0.01, 1000)) == {}  # of genes that were left out
    assert totals_of(np.repeat(2000.0, 50)) == {}  # copies of one cell


ACCEPTED = {
    # values from the counts, the stated scale
    "empty cell": (logs, "log1p"),
    "logs in float16": (lambda a: logs(a).astype(np.float16), "log1p"),
    "noise of 1e-6": (lambda a: a.X.toarray() + np.random.default_rng(0).normal(0, 1e-6, a.shape), "counts"),
    "logs undone": (lambda a: np.expm1(logs(a, "counts").astype(np.float32)), "counts"),
    "logs of two decimals": (lambda a: np.round(logs(a), 2), "log1p"),
    "corrected and rounded": (lambda a: np.rint(a.X.toarray() * 0.97), "counts"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_on_the_scale_is_taken(case: str, plain: ad.AnnData, additive: vc.models.Additive) -> None:
    values, scale = ACCEPTED[case]
    data = holding(with_empty_cell(plain) if case == "empty cell" else plain, values(plain))
    if case == "empty cell":
        data.X = sparse.csr_matrix(logs(with_empty_cell(plain)).astype(np.float32))
    with Unchanged(data):
        assert fitted(data, scale=scale).perturbations == ["A", "B", "C"]
        mean = vc.tl.predict_perturbation(data, "NT", model=additive, context="x", scale=scale, emit="mean")
    counts = np.rint(np.expm1(data.X.toarray()) if case == "logs" else data.X.toarray())
    known = logs(holding(plain, counts)) if scale == "counts" else data.X.toarray()
    np.testing.assert_allclose(mean.X.toarray()[0], known[:12].mean(axis=0), atol=2e-3 if "float16" in case else 1e-5)
    if scale == "counts":  # cells are of whole counts
        cells = vc.tl.predict_perturbation(data, "A", model=additive, context="x", scale=scale).layers["counts"]
        np.testing.assert_array_equal(cells.data, np.rint(cells.data))
        control = vc.tl.predict_perturbation(data, "NT", model=additive, context="x", scale=scale).layers["counts"]
        assert (control.toarray().sum(axis=0) == counts[:12].sum(axis=0)).all()


@pytest.mark.parametrize(
    ("where", "message", "remedy"),
    [
        ("layer", r"layers\['umi'\] holds whole numbers: layer='umi'", lambda a: (a, {"layer": "umi"})),
        (
            "raw",
            r"adata\.raw holds whole numbers: `adata = adata\.raw\.to_adata\(\)`",
            lambda a: (a.raw.to_adata(), {}),
        ),
    ],
)
@pytest.mark.parametrize("values", [logs, lambda a: logs(a) - logs(a).mean(axis=0)], ids=["logs", "scaled"])
def test_counts_elsewhere_are_named(
    where: str, message: str, remedy: Callable, values: Callable, plain: ad.AnnData, st: vc.models.ST
) -> None:
    data = holding(plain, values(plain))
    if where == "layer":
        data.layers["umi"] = plain.X.copy()
    else:
        data.raw = plain
    with Unchanged(data), pytest.raises(ValueError, match=message):
        fitted(data)
    found, how = remedy(data)  # which works
    a, b = (vc.tl.predict_perturbation(d, "B", model=st, seed=1, **h) for d, h in ((found, how), (plain, {})))
    assert (a.X != b.X).nnz == 0


# -- containers of expression -----------------------------------------------------------------------------------------


def from_the_right(x: sparse.csr_matrix) -> np.ndarray:
    """Order of the entries of each row by falling columns."""
    return np.lexsort((-x.indices, np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))))


CONTAINERS: dict[str, Callable] = {
    "csc": lambda x: x.tocsc(),
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
    "dense": lambda x: x.toarray(),
    "Fortran order": lambda x: np.asfortranarray(x.toarray()),
    "read only": lambda x: np.frombuffer(x.toarray().tobytes(), np.float32).reshape(x.shape),
    "matrix": lambda x: np.asmatrix(x.toarray()),
    "objects": lambda x: x.toarray().astype(object),
    "long double": lambda x: x.toarray().astype(np.longdouble),
    "minus zero": lambda x: np.where(x.toarray() == 0, np.float32(-0.0), x.toarray()),
    "the other byte order": lambda x: sparse.csr_matrix((x.data.astype(">f4"), x.indices, x.indptr), shape=x.shape),
    "the other byte order, csc": lambda x: sparse.csc_matrix(
        ((c := x.tocsc()).data.astype(">i4"), c.indices, c.indptr), shape=x.shape
    ),
    "the other byte order, dense": lambda x: x.toarray().astype(">f8"),
    "indices of 64 bits": lambda x: sparse.csr_matrix((x.data, x.indices.astype("i8"), x.indptr.astype("i8")), x.shape),
    "entries in another order": lambda x: sparse.csr_matrix(
        (x.data[o := from_the_right(x)], x.indices[o], x.indptr), shape=x.shape
    ),
    "entries twice": lambda x: sparse.csr_matrix(
        (np.repeat(x.data / 2, 2), np.repeat(x.indices, 2), x.indptr * 2), shape=x.shape
    ),
    "stored zeros": lambda x: sparse.csr_matrix(
        (x.toarray().ravel(), np.tile(np.arange(GENES), x.shape[0]), np.arange(x.shape[0] + 1) * GENES), shape=x.shape
    ),
} | {
    t: (lambda x, t=t: x.astype(t)) for t in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float64")
} | {"float16": lambda x: x.toarray().astype(np.float16)}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*matrix")
@pytest.mark.parametrize("container", CONTAINERS)
def test_expression_is_read_from_any_container(
    container: str, plain: ad.AnnData, additive: vc.models.Additive, predicted: ad.AnnData
) -> None:
    data = plain.copy()
    data.X = CONTAINERS[container](plain.X.copy())
    known = logs(plain)
    is_a = (plain.obs["pert"] == "A").to_numpy()
    with Unchanged(data):
        mean = vc.tl.predict_perturbation(data, "NT", model=additive, context="x", scale="counts", emit="mean")
        scores = vc.tl.evaluate(predicted, data, **DESIGN, scale="counts", suite=["mae"])
    np.testing.assert_allclose(np.asarray(mean.to_df())[0], known[:12].mean(axis=0), atol=1e-5)
    for row in scores.itertuples():
        real = known[is_a & (plain.obs["ctx"] == row.context).to_numpy()].mean(axis=0)
        guess = predicted.X[(predicted.obs["ctx"] == row.context).to_numpy()].toarray().mean(axis=0)
        np.testing.assert_allclose(row.value, np.abs(guess - real).mean(), rtol=1e-4)


NO_NUMBERS = {
    "complex": (lambda x: x.toarray() + 1j, {}, r"X.* is of the type complex\d+, which are no real numbers"),
    "text": (lambda x: x.toarray().astype(str).astype(object), {}, None),  # numbers as text are numbers
    "words": (lambda x: np.full(x.shape, "few", object), {}, r"X.* holds what is no number: .*few"),
    "nothing": (lambda x: None, {}, r"X.* is empty\.$"),
    "a layer": (
        lambda x: None,
        {"umi": lambda x: x},
        r"X.* is empty\. Name the layer with .*\['umi'\]",
    ),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_expression_that_is_no_number(kind: str, plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    made, layers, message = NO_NUMBERS[kind]
    data = ad.AnnData(obs=plain.obs.copy(), var=plain.var.copy(), layers={k: v(plain.X) for k, v in layers.items()})
    if (values := made(plain.X)) is not None:
        data.X = values
    if message is not None:
        for call in calls.values():
            with pytest.raises(ValueError, match=message):
                call(data, "counts")
    else:
        np.testing.assert_array_equal(
            calls["evaluate"](data, "counts")["value"], calls["evaluate"](plain.copy(), "counts")["value"]
        )


def test_views_and_their_copies_are_one(plain: ad.AnnData, st: vc.models.ST) -> None:
    wide = ad.concat([plain, plain], index_unique="-")
    view = wide[np.arange(plain.n_obs), np.arange(GENES)[::-1]]
    assert view.is_view
    found = [vc.tl.predict_perturbation(d, "A", model=st) for d in (view, view.copy())]
    assert view.is_view
    assert (found[0].X != found[1].X).nnz == 0


def test_masked_values_are_missing(plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    data = plain.copy()
    data.X = np.ma.masked_array(plain.X.toarray(), mask=np.eye(*plain.shape, dtype=bool))
    if not isinstance(data.X, np.ma.MaskedArray):
        pytest.skip("this anndata does not keep masks")
    check_refused(calls, data, "counts", ValueError, "masked values")


# -- files that R wrote -----------------------------------------------------------------------------------------------


def test_names_that_r_lost(plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    data = plain.copy()
    data.obs_names = [str(i) for i in range(data.n_obs)]
    for call in calls.values():
        call(data, "counts")


def test_factors_as_codes(plain: ad.AnnData) -> None:
    data = plain.copy()
    data.obs["pert"] = pd.Categorical(plain.obs["pert"]).codes + 1  # A B C NT
    with pytest.raises(KeyError, match=r"control='NT' is unknown.*numbers stand for labels.*R"):
        fitted(data)
    assert fitted(data, control=4).perturbations == ["1", "2", "3"]


def test_repeated_genes_are_refused_by_all(plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    data = plain.copy()
    data.var_names = ["GENE1", *data.var_names[1:]]
    check_refused(calls, data, "counts", ValueError, r"repeats \['GENE1'\].*var_names_make_unique")


# -- missing values and containers: embeddings ------------------------------------------------------------------------


def embedding(plain: ad.AnnData) -> np.ndarray:
    return np.linalg.svd(logs(plain), full_matrices=False)[0][:, :5].astype(np.float32)


@pytest.fixture(scope="module")
def on_embedding(plain: ad.AnnData) -> vc.models.ST:
    data = plain.copy()
    data.obsm["X_emb"] = embedding(plain)
    return fitted(data, network={"use_rep": "X_emb"})


EMBEDDINGS: dict[str, Callable] = {
    "float64": lambda r, i: r.astype(float),
    "sparse": lambda r, i: sparse.csr_matrix(r),
    "csc_array": lambda r, i: sparse.csc_array(r),
    "table": lambda r, i: pd.DataFrame(r, index=i, columns=list("abcde")),
    "table of objects": lambda r, i: pd.DataFrame(r, index=i, columns=list("abcde")).astype(object),
    "sparse table": lambda r, i: pd.DataFrame.sparse.from_spmatrix(
        sparse.csr_matrix(r), index=i, columns=list("abcde")
    ),
    "nullable table": lambda r, i: pd.DataFrame(r, index=i, columns=list("abcde")).astype("Float32"),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_in_any_form(kind: str, plain: ad.AnnData, on_embedding: vc.models.ST) -> None:
    data, same = plain.copy(), plain.copy()
    same.obsm["X_emb"] = embedding(plain)
    data.obsm["X_emb"] = EMBEDDINGS[kind](embedding(plain), plain.obs_names)
    with Unchanged(data):
        found = vc.tl.predict_perturbation(data, "A", model=on_embedding)
    assert (found.X != vc.tl.predict_perturbation(same, "A", model=on_embedding).X).nnz == 0


def with_row(rep: np.ndarray, row: int, value: float) -> np.ndarray:
    out = rep.copy()
    out[row] = value
    return out


BAD_EMBEDDINGS = {
    # what becomes of it, message of fitting, message of predicting
    "NaN of a perturbed cell": (lambda r, i: with_row(r, 40, np.nan), r"NaN.*in 1 cells.*cell40", None),
    "NaN of a control cell": (lambda r, i: with_row(r, 2, np.nan), r"NaN.*in 1 cells.*cell2'", r"NaN.*cell2'"),
    "infinite": (lambda r, i: with_row(r, 2, np.inf), r"NaN or infinite", r"NaN or infinite"),
    "missing in a table": (
        lambda r, i: pd.DataFrame(r, index=i, columns=list("abcde"), dtype="Float32").mask(lambda t: t == t.iloc[2, 1]),
        r"NaN.*in 1 cells.*cell2'", r"NaN.*cell2'",
    ),
    "masked": (
        lambda r, i: np.ma.masked_array(r, mask=np.arange(len(r))[:, None] == [2] * r.shape[1]),
        r"NaN.*in 1 cells.*cell2'", r"NaN.*cell2'",
    ),
    "text": (
        lambda r, i: pd.DataFrame(r, index=i, columns=list("abcde")).assign(note="n"),
        r"no numbers, \['note'\]", r"no numbers",
    ),
    "no columns": (lambda r, i: r[:, :0], r"cells x dimensions", r"cells x dimensions"),
    "three axes": (lambda r, i: r[:, :, None], r"cells x dimensions", r"cells x dimensions"),
    "complex": (lambda r, i: r.astype(complex), r"cells x dimensions, of real numbers", r"real numbers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_EMBEDDINGS)
def test_embeddings_with_what_is_missing(kind: str, plain: ad.AnnData, on_embedding: vc.models.ST) -> None:
    made, at_fit, at_predict = BAD_EMBEDDINGS[kind]
    data = plain.copy()
    data.obsm["X_emb"] = made(embedding(plain), plain.obs_names)
    with Unchanged(data), pytest.raises(ValueError, match=at_fit):
        fitted(data, network={"use_rep": "X_emb"})
    if at_predict is None:  # predictions start from control cells
        assert np.isfinite(vc.tl.predict_perturbation(data, "A", model=on_embedding).X.data).all()
        return
    with Unchanged(data), pytest.raises(ValueError, match=at_predict):
        vc.tl.predict_perturbation(data, "A", model=on_embedding)


# -- missing values: labels and totals --------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA, "NA", ""])
@pytest.mark.parametrize("column", ["pert", "ctx"])
def test_missing_labels(column: str, missing: object, plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    data = plain.copy()
    data.obs[column] = data.obs[column].astype(object)
    data.obs.loc["cell2", column] = missing
    split = {"split": lambda d, _: vc.pp.split(d, **DESIGN, holdout={"perturbations": ["A"]})}
    check_refused(calls | split, data, "counts", ValueError, rf"_key='{column}': 1 cells have")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"1 cells have no positive number in obs\['total'\].*cell2"),
        (np.inf, r"no positive number"),
        (0.0, r"no positive number"),
        (-5.0, r"no positive number"),
        (1.0, r"smaller than what X.* adds up to in 1 cells.*cell2"),
        ("many", r"column of object and not of numbers"),
    ],
)
def test_missing_totals(value: object, message: str, plain: ad.AnnData, additive: vc.models.Additive) -> None:
    data = plain.copy()
    totals = pd.Series(np.asarray(plain.X.sum(axis=1)).ravel().astype(float), index=data.obs_names).astype(object)
    totals.iloc[2] = value
    data.obs["total"] = totals if isinstance(value, str) else totals.astype(float)
    how = {"scale": "counts", "library_size_key": "total"}
    with Unchanged(data):
        for call in (
            lambda: fitted(data, library_size_key="total"),
            lambda: vc.tl.fit_baseline(data, "Additive", **DESIGN, **how),
            lambda: vc.tl.predict_perturbation(data, "A", model=additive, **how),
        ):
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize("kind", ["Int64", "arrow", "float16 of few"])
def test_totals_of_any_type(kind: str, plain: ad.AnnData, additive: vc.models.Additive) -> None:
    data, totals = plain.copy(), np.asarray(plain.X.sum(axis=1)).ravel()
    types = {"Int64": "Int64", "arrow": pd.ArrowDtype(pa.float64()), "float16 of few": np.float16}
    data.obs["total"] = pd.array(totals.astype(int), dtype=types[kind])
    how = {"scale": "counts", "emit": "mean", "model": additive}
    found = vc.tl.predict_perturbation(data, "A", library_size_key="total", **how)
    np.testing.assert_allclose(found.X.toarray(), vc.tl.predict_perturbation(plain, "A", **how).X.toarray(), rtol=1e-6)


@pytest.mark.parametrize(
    ("made", "message"),
    [(lambda t: t + 0j, r"column of complex\d+ and not"), (lambda t: pd.Categorical(t), r"column of category and not")],
)
def test_totals_that_are_no_numbers(made: Callable, message: str, plain: ad.AnnData) -> None:
    data = plain.copy()
    data.obs["total"] = made(np.asarray(plain.X.sum(axis=1)).ravel())
    for fit in (fitted, lambda d, **k: vc.tl.fit_baseline(d, "Additive", **DESIGN, scale="counts", **k)):
        with Unchanged(data), pytest.raises(ValueError, match=message):
            fit(data, library_size_key="total")


# -- features of perturbations and gene tables ------------------------------------------------------------------------


def features() -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32), index=list("ABCDE"))


FORMS: dict[str, Callable] = {
    "arrays": lambda t: {k: t.loc[k].to_numpy() for k in t.index},
    "tensors": lambda t: {k: torch.tensor(t.loc[k].to_numpy()) for k in t.index},
    "tensors with gradients": lambda t: {k: torch.tensor(t.loc[k].to_numpy(), requires_grad=True) for k in t.index},
    "lists": lambda t: {k: t.loc[k].tolist() for k in t.index},
    "series": lambda t: pd.Series({k: t.loc[k].to_numpy() for k in t.index}),
    "objects": lambda t: t.astype(object),
    "sparse": lambda t: pd.DataFrame.sparse.from_spmatrix(sparse.csr_matrix(t.to_numpy()), index=t.index),
    "nullable": lambda t: t.astype("Float32"),
    "arrow": lambda t: t.astype(pd.ArrowDtype(pa.float32())),
    "names in bytes": lambda t: t.set_axis([k.encode() for k in t.index]),
    "names beside the control": lambda t: t.set_axis([f"{k}+ctrl" for k in t.index]),
    "sparse tensors": lambda t: {k: torch.tensor(t.loc[k].to_numpy()).to_sparse() for k in t.index},
    "two columns of one name": lambda t: t.set_axis(["a", "a", "b"], axis=1),
}


@pytest.mark.parametrize("form", FORMS)
def test_features_in_any_form(form: str, plain: ad.AnnData) -> None:
    how = {**DESIGN, "scale": "counts"}
    data = plain.copy()
    with Unchanged(data):
        models = [
            vc.tl.fit_baseline(data, "Ridge", **how, perturbation_features=t)
            for t in (features(), FORMS[form](features()))
        ]
        st = fitted(data, perturbation_features=FORMS[form](features()))
    a, b = (vc.tl.predict_perturbation(data, "D", model=m, emit="mean").X.toarray() for m in models)
    np.testing.assert_array_equal(a, b)
    # by hand: columns at mean 0 and deviation 1, over the root of their number, and one that counts
    table = features().to_numpy(dtype=float)
    known = np.c_[(table - table.mean(axis=0)) / table.std(axis=0) / np.sqrt(3), np.ones(5)]
    np.testing.assert_allclose(st.table.encode(list("ABCDE")), known, atol=1e-6)


BAD_TABLES = {
    "array": (lambda t: t.to_numpy(), TypeError, r"must be a table .*dictionary of vectors by name, got ndarray"),
    "tensor": (lambda t: torch.tensor(t.to_numpy()), TypeError, r"got Tensor"),
    "sparse matrix": (lambda t: sparse.csr_matrix(t.to_numpy()), TypeError, r"got csr_matrix"),
    "path": (lambda t: "esm2.pt", TypeError, r"got str.*read_gene_embeddings"),
    "AnnData": (lambda t: ad.AnnData(t.rename(columns=str)), TypeError, r"got AnnData.*to_df\(\)"),
    "several lengths": (lambda t: {k: np.ones(i + 1) for i, k in enumerate(t.index)}, ValueError, r"of one length"),
    "matrices": (lambda t: {k: np.ones((1, 3)) for k in t.index}, ValueError, r"of one length"),
    "numbers": (lambda t: dict.fromkeys(t.index, 1.0), ValueError, r"of one length"),
    "empty": (lambda t: t.iloc[:0], ValueError, r"holds no vectors"),
    "no columns": (lambda t: t.iloc[:, :0], ValueError, r"holds no vectors"),
    "NaN": (lambda t: t.mask(t == t.iloc[1, 0]), ValueError, r"NaN or infinite values.*dropna"),
    "missing": (lambda t: t.astype("Float32").mask(t == t.iloc[1, 0]), ValueError, r"NaN or infinite values"),
    "text": (lambda t: t.astype(str), ValueError, r"columns that hold no numbers"),
    "names in a column": (lambda t: t.rename_axis("name").reset_index(), ValueError, r"set_index\('name'\)"),
    "row without a name": (lambda t: t.rename(index={t.index[-1]: np.nan}), ValueError, r"1 rows without a name"),
    "complex": (lambda t: t.astype(complex), ValueError, r"no numbers"),
    "names of two parts": (
        lambda t: t.set_axis(pd.MultiIndex.from_product([t.index, ["v1"]])),
        ValueError,
        r"several parts, as \(",
    ),
    "masked": (
        lambda t: {k: np.ma.masked_array(t.loc[k], mask=np.arange(t.shape[1]) == 0) for k in t.index},
        ValueError,
        r"NaN or infinite values",
    ),
    "dictionaries": (lambda t: {k: dict(t.loc[k]) for k in t.index}, ValueError, r"of one length"),
    "generator": (lambda t: map(str, t.index), TypeError, r"dictionary of vectors by name, got map"),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_tables_that_tell_nothing(kind: str, plain: ad.AnnData) -> None:
    made, error, message = BAD_TABLES[kind]
    data, how = plain.copy(), {**DESIGN, "scale": "counts"}
    of_perturbations, of_genes = made(features()), made(gene_table(plain))
    vc.models.SE.setup_anndata(data)
    with Unchanged(data):
        for call in (
            lambda: fitted(data, perturbation_features=of_perturbations),
            lambda: vc.tl.fit_baseline(data, "Ridge", **how, perturbation_features=of_perturbations),
            lambda: vc.pp.cell_sentences(data, of_genes, length=8),
            lambda: vc.models.SE(data, of_genes),
            lambda: fitted(data, se={"gene_embeddings": of_genes, "max_steps": 1}),
        ):
            with pytest.raises(error, match=message):
                call()


def test_features_that_tell_nothing_apart(plain: ad.AnnData) -> None:
    with pytest.raises(ValueError, match="one vector for all perturbations"):
        fitted(plain.copy(), perturbation_features=features() * 0 + 1)


def test_gene_vectors_as_a_dictionary(plain: ad.AnnData) -> None:
    table, found = gene_table(plain), []
    for given in (table, {g: torch.tensor(table.loc[g].to_numpy()) for g in table.index}):
        data = plain.copy()
        vc.pp.cell_sentences(data, given, length=8)
        found.append(data.obsm["cell_sentence"])
    np.testing.assert_array_equal(*found)
    best = plain.X.toarray().argmax(axis=1)
    assert (plain.X.toarray()[np.arange(96), found[0][:, 0]] == plain.X.toarray()[np.arange(96), best]).all()


# -- MuData -----------------------------------------------------------------------------------------------------------


def multimodal(plain: ad.AnnData, where: str) -> md.MuData:
    """The screen beside proteins, with its columns in the modality's obs or in the MuData's."""
    rna = plain.copy()
    columns = rna.obs.copy()
    if where != "rna.obs":
        rna.obs = rna.obs[[]]
    protein = ad.AnnData(np.ones((96, 2), np.float32), obs=rna.obs[[]].copy(), var=pd.DataFrame(index=["p1", "p2"]))
    data = md.MuData({"rna": rna, "prot": protein})
    if where != "rna.obs":
        for name in columns:
            data.obs[name if where == "mdata.obs" else f"rna:{name}"] = columns[name]
    return data


@pytest.mark.parametrize("where", ["rna.obs", "mdata.obs", "rna: in mdata.obs"])
def test_columns_of_a_mudata(
    where: str, plain: ad.AnnData, calls: dict[str, Callable], additive: vc.models.Additive
) -> None:
    data = multimodal(plain, where)
    with Unchanged(data):
        assert calls["fit_state"](data, "counts").perturbations == ["A", "B", "C"]
        found = calls["predict"](data, "counts")
        scores = calls["evaluate"](data, "counts")
    assert (found.X != calls["predict"](plain, "counts").X).nnz == 0
    np.testing.assert_array_equal(scores["value"], calls["evaluate"](plain.copy(), "counts")["value"])


def test_embedding_of_a_mudata(plain: ad.AnnData, on_embedding: vc.models.ST) -> None:
    data, same = multimodal(plain, "rna.obs"), plain.copy()
    same.obsm["X_emb"] = embedding(plain)
    data = data[::-1].copy()
    data.obsm["X_emb"] = embedding(plain)[::-1].copy()
    assert fitted(data, network={"use_rep": "X_emb"}).perturbations == ["A", "B", "C"]
    found = vc.tl.predict_perturbation(data, "A", model=on_embedding)
    assert (found.X != vc.tl.predict_perturbation(same, "A", model=on_embedding).X).nnz == 0


# -- designs ----------------------------------------------------------------------------------------------------------


def controls_of_y(obs: pd.DataFrame) -> pd.Series:
    return (obs["pert"] == "NT") & (obs["ctx"] == "y")


def without(adata: ad.AnnData, which: Callable, keep: int) -> ad.AnnData:
    """Leave out such cells but for the first few."""
    rows = np.flatnonzero(which(adata.obs))[keep:]
    return adata[np.setdiff1d(np.arange(adata.n_obs), rows)].copy()


def test_few_cells_of_one_perturbation_leave_the_others_their_validation() -> None:
    data = screen(n=30)
    few = without(data, lambda obs: obs["pert"] == "A", 3)
    training = {**TRAINING, "early_stopping": True, "val_fraction": 0.2}
    st = fitted(few, training=training, validate=True)
    assert st.perturbations == ["B", "C"]
    assert "validation_loss" in st.history
    assert st.validation is not None
    assert vc.tl.predict_perturbation(few, "B", context="x", fallback="best").n_obs == 30


def test_the_fraction_that_is_advised_works() -> None:
    data = screen(n=12)
    few = without(data, lambda obs: obs["pert"] != "NT", 0)
    few = ad.concat([few, *(data[(data.obs["pert"] == p) & (data.obs["ctx"] == c)][:7] for p in "ABC" for c in "xy")])
    training = {**TRAINING, "early_stopping": True, "min_cells": 1}
    with pytest.raises(ValueError, match=r"have at most 7 cells.*val_fraction=0\.143") as refused:
        fitted(few, training=training)
    advised = float(str(refused.value).split("Say val_fraction=")[1].split(" ")[0])
    assert "validation_loss" in fitted(few, training={**training, "val_fraction": advised}).history


DESIGNS = {
    # cells, arguments, perturbations that are learned
    "one context": (lambda: screen(contexts=("x",)), {}, ["A", "B", "C"]),
    "one perturbation": (lambda: screen(("A",)), {}, ["A"]),
    "one of each": (lambda: screen(("A",), ("x",)), {}, ["A"]),
    "no contexts": (screen, {"context_key": None}, ["A", "B", "C"]),
    "one gene": (lambda: (a := screen())[a.X[:, [0]].toarray()[:, 0] > 0, :1].copy(), {}, ["A", "B", "C"]),
    "one control cell": (lambda: without(screen(), controls_of_y, 1), {}, ["A", "B", "C"]),
    "a batch for A": (lambda: in_batches(lambda o: o["pert"] == "A"), {"batch_key": "batch"}, ["A", "B", "C"]),
    "a batch a pair": (lambda: in_batches(lambda o: o["pert"] + o["ctx"]), {"batch_key": "batch"}, ["A", "B", "C"]),
    "a batch a cell": (lambda: in_batches(lambda o: o.index), {"batch_key": "batch"}, ["A", "B", "C"]),
}  # fmt: skip


def in_batches(of: Callable) -> ad.AnnData:
    data = screen()
    data.obs["batch"] = np.asarray(of(data.obs)).astype(str)
    return data


@pytest.mark.parametrize("design", DESIGNS)
def test_small_designs(design: str) -> None:
    made, how, names = DESIGNS[design]
    data = made()
    with Unchanged(data):
        st = fitted(data, **how, training={**TRAINING, "min_cells": 5})
        found = vc.tl.predict_perturbation(data, "A")
    assert st.perturbations == names
    controls = data.obs_names[data.obs["pert"] == "NT"]
    assert sorted(found.obs["control_barcode"]) == sorted(controls)
    assert np.isfinite(found.X.data).all()
    # one mean profile for each context, of which the control's is that of the control cells
    mean = vc.tl.predict_perturbation(data, "NT", emit="mean").X.toarray()
    contexts = ["x"] if how.get("context_key", "") is None else sorted(set(data.obs["ctx"]))
    known = logs(data)
    is_control = (data.obs["pert"] == "NT").to_numpy()
    for row, context in zip(mean, contexts, strict=True):
        here = is_control & (
            np.ones(data.n_obs, bool) if len(contexts) < data.obs["ctx"].nunique() else (data.obs["ctx"] == context)
        )
        np.testing.assert_allclose(row, known[here].mean(axis=0), atol=1e-5)


NOTHING = {
    "one cell": (lambda a: a[:1].copy(), ValueError, r"nothing to train on"),
    "no cell": (lambda a: a[:0].copy(), KeyError, r"control='NT' is unknown"),
    "controls only": (lambda a: a[a.obs["pert"] == "NT"].copy(), ValueError, r"nothing to train on"),
    "no controls": (lambda a: a[a.obs["pert"] != "NT"].copy(), KeyError, r"control='NT' is unknown. Known: 'A', 'B'"),
    "a context without": (lambda a: without(a, controls_of_y, 0), ValueError, r"context 'y' has no control cells"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING)
def test_designs_that_tell_nothing(case: str, plain: ad.AnnData) -> None:
    made, error, message = NOTHING[case]
    data = made(plain)
    for call in (fitted, lambda d: vc.tl.fit_baseline(d, "Additive", **DESIGN, scale="counts")):
        with Unchanged(data), pytest.raises(error, match=message):
            call(data)


# -- names that are no text, and arguments of another kind -------------------------------------------------------------


def test_names_of_several_parts(plain: ad.AnnData) -> None:
    data = plain.copy()
    data.obs.index = pd.MultiIndex.from_arrays([data.obs["ctx"], data.obs_names])
    with pytest.raises(ValueError, match=r"\('x', 'cell0'\), which is no text") as refused:
        fitted(data)
    exec(str(refused.value).split("`")[1], {"adata": data})
    assert data.obs_names[0] == "x-cell0"
    assert fitted(data).perturbations == ["A", "B", "C"]


def test_names_that_are_text_of_any_type(plain: ad.AnnData) -> None:
    for dtype in (
        "category",
        "string",
        pd.ArrowDtype(pa.string()),
        pd.ArrowDtype(pa.dictionary(pa.int32(), pa.string())),
    ):
        data = plain.copy()
        data.var.index = data.var_names.astype(dtype)
        assert fitted(data).genes == sorted(plain.var_names)


@pytest.mark.parametrize("table", ["var", "obs"])
@pytest.mark.parametrize("names", ["numbers", "missing"])
def test_names_that_are_no_text(table: str, names: str, plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    data = plain.copy()
    frame = getattr(data, table)
    if names == "numbers":
        frame.index.name = "symbol"
        frame.reset_index(inplace=True)  # which is how names get lost
    else:
        frame.index = pd.Index([np.nan, *frame.index[1:]], name="symbol")
    others = {
        "split": lambda d, _: vc.pp.split(d, **DESIGN, holdout={"perturbations": ["A"]}),
        "knockdown": lambda d, scale: vc.pp.knockdown_efficiency(d, **DESIGN, scale=scale),
    }
    check_refused(calls | others, data, "counts", ValueError, rf"{table}_names holds (0|nan), which is no text")
    before = getattr(plain, f"{table}_names")
    if names == "numbers":
        setattr(data, f"{table}_names", frame["symbol"])  # as is advised
        assert list(getattr(data, f"{table}_names")) == list(before)
    else:
        setattr(data, f"{table}_names", before)
    assert fitted(data).perturbations == ["A", "B", "C"]


def test_counts_of_predictions_are_named_as_they_can_be_given(plain: ad.AnnData, predicted: ad.AnnData) -> None:
    data, how = predicted.copy(), {**DESIGN, "scale": "counts", "suite": ["mae"]}
    data.X = sparse.csr_matrix(data.X.toarray() / np.float32(np.log(2)))
    message = r"predicted\.layers\['counts'\] holds whole numbers: `predicted\.X = predicted\.layers\['counts'\]`"
    with pytest.raises(ValueError, match=message):
        vc.tl.evaluate(data, plain, **how)
    data.X = data.layers["counts"]  # which works
    scores = vc.tl.evaluate(data, plain, **how, predicted_scale="counts")
    right = vc.tl.evaluate(predicted, plain, **how)
    np.testing.assert_allclose(scores["value"], right["value"], rtol=1e-4)


BENCHMARK = {"splits": {"cells": {"fraction": 0.2}}, "suite": ["mae"], "floor": []}
WRONG_ARGUMENTS: dict[str, tuple[Callable, type, str]] = {
    "one seed": (lambda a: vc.tl.benchmark(a, ["Additive"], **DESIGN, **BENCHMARK, seeds=0), TypeError, r"\(0,\)"),
    "half a seed": (lambda a: vc.tl.benchmark(a, ["Additive"], **DESIGN, **BENCHMARK, seeds=[0.5]), ValueError, "0.5"),
    "floor": (
        lambda a: vc.tl.benchmark(a, ["Additive"], **DESIGN, **BENCHMARK | {"floor": "NoChange"}),
        TypeError,
        r"floor='NoChange' must be a list of names, \['NoChange'\]",
    ),
    "genes": (
        lambda a: vc.tl.prepare_submission(
            a, "a.vcc", year=2025, genes="names.csv", perturbation_key="pert", control="NT", controls=a
        ),
        TypeError,
        r"genes='names.csv' must be a list of names, such as `pd.read_csv",
    ),
    "model": (lambda a: vc.io.save(a, "folder"), TypeError, "model=AnnData is no model of vc.models"),
    "seed": (lambda a: vc.tl.fit_baseline(a, "Additive", **DESIGN, seed="0"), ValueError, "seed='0' is not a whole"),
    "table": (
        lambda _: vc.pl.effect_heatmap(pd.DataFrame(columns=["perturbation", "gene", "log2_fold_change"])),
        ValueError,
        "effects has no rows",
    ),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_arguments_of_another_kind(case: str, plain: ad.AnnData) -> None:
    call, error, message = WRONG_ARGUMENTS[case]
    with Unchanged(plain), pytest.raises(error, match=message):
        call(plain)


# -- cells that are all untreated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [None, "NT", "healthy", "A"])
def test_untreated_cells_need_no_column(column: str | None, st: vc.models.ST) -> None:
    atlas = screen((), ("z",), n=20, seed=7)
    labelled = atlas.copy()
    del atlas.obs["pert"]
    if column is not None:
        atlas.obs["pert"] = column
    with Unchanged(atlas):
        found = vc.tl.predict_perturbation(atlas, ["A", "NT"], model=st, untreated=True)
    known = vc.tl.predict_perturbation(labelled, ["A", "NT"], model=st)
    assert (found.layers["counts"] != known.layers["counts"]).nnz == 0
    assert found.obs["pert"].tolist() == ["A"] * 20 + ["NT"] * 20
    np.testing.assert_array_equal(
        found[20:].layers["counts"].toarray(), atlas[found.obs["control_barcode"][20:]].X.toarray()
    )


@pytest.mark.parametrize("column", ["pert", "ctx"])
def test_columns_of_one_name(column: str, plain: ad.AnnData, calls: dict[str, Callable]) -> None:
    data = plain.copy()
    data.obs = pd.concat([data.obs, data.obs[[column]]], axis=1)
    split = {"split": lambda d, _: vc.pp.split(d, **DESIGN, holdout={"perturbations": ["A"]})}
    check_refused(calls | split, data, "counts", ValueError, rf"_key='{column}' names 2 columns of obs")
    data.obs = data.obs.loc[:, ~data.obs.columns.duplicated()]  # as is advised
    assert fitted(data).perturbations == ["A", "B", "C"]


@pytest.mark.parametrize("role", ["context_key", "batch_key"])
def test_perturbations_are_no_contexts(role: str, plain: ad.AnnData) -> None:
    with pytest.raises(ValueError, match=rf"{role}='pert' is the column of perturbations"):
        fitted(plain.copy(), **{role: "pert"})


def test_columns_that_new_data_lacks(st: vc.models.ST) -> None:
    atlas = screen((), ("z",), n=20, seed=7)
    del atlas.obs["pert"]
    with pytest.raises(KeyError, match=r"perturbation_key='pert' is unknown.*untreated=True"):
        vc.tl.predict_perturbation(atlas, "A", model=st)
    del atlas.obs["ctx"]
    with pytest.raises(KeyError, match=r"context_key='ctx' is unknown.*adata\.obs\['ctx'\] = 'name'"):
        vc.tl.predict_perturbation(atlas, "A", model=st, untreated=True)
    atlas.obs["ctx"] = "name"
    assert vc.tl.predict_perturbation(atlas, "A", model=st, untreated=True).n_obs == 20
    with pytest.raises(TypeError, match="untreated='NT' must be True"):
        vc.tl.predict_perturbation(atlas, "A", model=st, untreated="NT")
