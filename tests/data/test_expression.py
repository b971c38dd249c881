from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from virtualcell._errors import UnknownNameError
from virtualcell.data import _expression, _moments, _stored
from virtualcell.data._expression import Expression, Moments
from virtualcell.data._read_expression import read_expression


@pytest.fixture(scope="module")
def kang(kang_file: Path) -> AnnData:
    return ad.read_h5ad(kang_file)[::9].copy()


@pytest.fixture
def adata() -> AnnData:
    counts = np.array([[3, 0, 1, 0], [0, 2, 0, 6], [5, 5, 0, 0]], dtype=np.float64)
    obs = pd.DataFrame({"depth": [8.0, 80.0, 10.0]}, index=list("xyz"))
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3", "g4"]))


def cells(n: int = 60, n_genes: int = 30, *, seed: int = 0, names: str = "c{:03d}") -> AnnData:
    """Counts below 100, none of the cells empty."""
    rng = np.random.default_rng(seed)
    counts = np.minimum(rng.negative_binomial(0.5, 0.1, (n, n_genes)), 99)
    counts[:, 0] += 1
    obs = pd.DataFrame(index=[names.format(i) for i in range(n)])
    var = pd.DataFrame(index=[f"g{j}" for j in range(n_genes)])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def lognorm(adata: AnnData, target_sum: float | None = 1e4, base: float | None = None) -> AnnData:
    out = adata.copy()
    sc.pp.normalize_total(out, target_sum=target_sum)
    sc.pp.log1p(out, base=base)
    return out


def read(adata: AnnData, **how: object) -> np.ndarray:
    return read_expression(adata, **how).rows().toarray()


def bits(x: np.ndarray) -> np.ndarray:
    assert x.dtype == np.float32
    return x.view(np.int32)


def fingerprint(adata: AnnData) -> tuple:
    x = adata.X
    parts = (x.data, x.indices, x.indptr) if sparse.issparse(x) else (x,)
    return (type(x), *((p.dtype, p.tobytes()) for p in parts), dict(adata.uns), adata.obs.to_csv())


# -- what is read -----------------------------------------------------------------------------------------------------


def test_log1p_is_scanpys(kang: AnnData) -> None:
    before = fingerprint(kang)
    expression = Expression(kang)
    found = expression.rows()
    for _ in expression.blocks(100):
        pass
    expression.moments([np.arange(50)])
    assert fingerprint(kang) == before
    assert found.format == "csr"
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), lognorm(kang).X.toarray(), rtol=2e-6, atol=1e-6)


def test_values_by_hand(adata: AnnData) -> None:
    np.testing.assert_allclose(read(adata, target_sum=100)[0], np.log1p([75, 0, 25, 0]), rtol=1e-6)
    found = read(adata, library_size_key="depth", target_sum=100)
    np.testing.assert_allclose(found[0], np.log1p([37.5, 0, 12.5, 0]), rtol=1e-6)
    np.testing.assert_allclose(found[1], np.log1p([0, 2.5, 0, 7.5]), rtol=1e-6)


def test_units(adata: AnnData) -> None:
    counts = adata.X.toarray().astype(np.float32)
    np.testing.assert_array_equal(read(adata, unit="counts"), counts)
    np.testing.assert_array_equal(read(adata, unit="log_counts"), np.log1p(counts))
    # a cell without counts has no log1p, and is a cell in the other units
    empty = AnnData(counts * [[1], [0], [1]], obs=adata.obs, var=adata.var)
    assert (read(empty, unit="counts")[1] == 0).all()
    with pytest.raises(ValueError, match="1 cells have no counts"):
        read(empty)
    # what holds logarithms is read as it is, and "log_counts" are of any total
    logs = AnnData(np.log1p(counts), obs=adata.obs, var=adata.var)
    np.testing.assert_array_equal(read(logs, scale="log1p", unit="log_counts"), np.log1p(counts))
    # in another unit all is asked anew
    expression = Expression(empty, unit="counts")
    assert expression.rows().shape == (3, 4)
    with pytest.raises(ValueError, match="1 cells have no counts"):
        expression.read_as("log1p").rows()
    assert expression.unit == "counts"


def test_library_sizes_are_exact() -> None:
    # sums of whole numbers beyond 2^24, which float32 cannot hold
    counts = np.full((2, 3), 2**24, np.float64)
    counts[0, 0] = 1
    found = read(AnnData(counts))
    expected = np.log1p(counts.astype(np.float32) * (1e4 / counts.sum(axis=1, keepdims=True)).astype(np.float32))
    np.testing.assert_array_equal(bits(found), bits(expected))


def test_chosen_genes_keep_the_library_size_of_all(kang: AnnData) -> None:
    genes = list(kang.var_names[[500, 3, 77]])
    found = Expression(kang, genes=genes)
    assert list(found.genes) == genes
    np.testing.assert_array_equal(found.rows().toarray(), Expression(kang).rows()[:, [500, 3, 77]].toarray())
    # by name, whatever the order of the columns in the file
    shuffled = kang[:, np.random.default_rng(0).permutation(kang.n_vars)].copy()
    np.testing.assert_array_equal(bits(read(shuffled, genes=genes)), bits(found.rows().toarray()))


@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("unit", ["log1p", "counts"])
def test_parts_of_parts_compose_in_any_order(unit: str, read_first: bool) -> None:
    adata = cells()
    whole = Expression(adata, unit=unit)
    values = pd.DataFrame(whole.rows().toarray(), adata.obs_names, adata.var_names)
    start = Expression(adata, unit=unit)
    if read_first:
        start.rows([0])
    rows, mask = np.array([50, 3, 3, 20, 9, 41]), np.array([True, False, True, True, True, False])
    genes, fewer = ["g9", "g0", "g4", "g20"], ["g20", "g9"]
    orders = {
        "cells first": start.take(rows).take(mask).select(genes).select(fewer),
        "genes first": start.select(genes).select(fewer).take(rows).take(mask),
        "in turn": start.select(genes).take(rows).select(fewer).take(mask.tolist()),
        "at once": Expression(adata, unit=unit, genes=fewer).take(rows[mask]),
    }
    expected = values.iloc[rows[mask]][fewer]
    for name, found in orders.items():
        assert found.n_cells == 4, name
        assert list(found.genes) == fewer, name
        np.testing.assert_array_equal(bits(found.rows().toarray()), bits(expected.to_numpy()))
        np.testing.assert_array_equal(bits(found.rows([2, 0]).toarray()), bits(expected.to_numpy()[[2, 0]]))
        np.testing.assert_array_equal(found.rows(slice(1, 3)).toarray(), expected.to_numpy()[1:3])
        np.testing.assert_array_equal(found.rows(slice(None, None, 2)).toarray(), expected.to_numpy()[::2])
    # nothing of all that changed what it came from
    assert start.n_cells == 60
    np.testing.assert_array_equal(start.rows().toarray(), values.to_numpy())
    nothing = start.take([]).select([])
    assert nothing.rows().shape == (0, 0)
    assert list(nothing.blocks()) == []
    with pytest.raises(IndexError):
        start.take(np.ones(59, bool))


def test_library_sizes_go_with_their_cells() -> None:
    adata = cells()
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel() + np.arange(60)
    whole = read(adata, library_size_key="depth")
    assert not np.array_equal(whole, read(adata))
    some = read_expression(adata, library_size_key="depth").take([50, 8]).take([1])
    np.testing.assert_array_equal(bits(some.rows().toarray()), bits(whole[[8]]))


@pytest.mark.parametrize("given", ["genes", "select"])
def test_genes_go_by_name(adata: AnnData, given: str) -> None:
    def chosen(data: AnnData, genes: list[str]) -> np.ndarray:
        how = {"unit": "counts"}
        return (
            Expression(data, genes=genes, **how) if given == "genes" else Expression(data, **how).select(genes)
        ).rows()

    np.testing.assert_array_equal(chosen(adata, ["g3", "g1"]).toarray(), adata.X.toarray()[:, [2, 0]])
    np.testing.assert_array_equal(chosen(adata, list(adata.var_names)).toarray(), adata.X.toarray())
    with pytest.raises(UnknownNameError, match=r"genes='G11' is unknown. Did you mean 'g1'.*1 of 2 genes are missing"):
        chosen(adata, ["g3", "G11"])
    adata.var_names = ["g1", "g2", "g1", "g4"]
    with pytest.raises(ValueError, match=r"var_names repeats \['g1'\].*var_names_make_unique"):
        chosen(adata, ["g2"])
    assert Expression(adata).rows().shape == (3, 4)  # names that nobody asks for may repeat


# -- moments ----------------------------------------------------------------------------------------------------------


def by_name(adata: AnnData, groups: list[list[str]]) -> Moments:
    """Moments of groups of cells that are named, in the order of names, genes in that of theirs."""
    rows = [np.sort(adata.obs_names.get_indexer(g)) for g in groups]
    order = [r[np.argsort(adata.obs_names[r])] for r in rows]
    return Expression(adata, genes=sorted(adata.var_names)).moments(order)


@pytest.mark.parametrize("block", [4096, 16, 5])
def test_moments(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(_moments, "BLOCK", block)
    monkeypatch.setattr(_moments, "_GROUPS", 4)
    expression = Expression(cells())
    values = expression.rows().toarray().astype(np.float64)
    rng = np.random.default_rng(1)
    sizes = [1, 16, 0, 40, 5, 1, 0, 10, 33, 1, 1, 1, 1, 1, 0]
    groups = [rng.permutation(60)[:n] for n in sizes]
    found = expression.moments(groups)
    assert found.mean.dtype == found.variance.dtype == np.float32
    assert list(found.n) == sizes
    for g, mean, variance in zip(groups, found.mean, found.variance, strict=True):
        np.testing.assert_allclose(mean, values[g].mean(axis=0) if len(g) else 0, rtol=1e-6)
        np.testing.assert_allclose(variance, values[g].var(axis=0, ddof=1) if len(g) > 1 else 0, rtol=1e-5, atol=1e-12)
    # which groups are asked for together makes no difference, to the last bit
    for i, g in enumerate(groups):
        alone = expression.moments([g])
        np.testing.assert_array_equal(bits(alone.mean[0]), bits(found.mean[i]))
        np.testing.assert_array_equal(bits(alone.variance[0]), bits(found.variance[i]))
    assert expression.moments([]).mean.shape == (0, 30)
    assert expression.moments([np.array([], int)]).mean.tolist() == [[0] * 30]
    panel = expression.select(["g4", "g1"]).take(np.arange(59, -1, -1)).moments([59 - g for g in groups])
    np.testing.assert_array_equal(bits(panel.mean), bits(found.mean[:, [4, 1]]))


@pytest.mark.parametrize("stored", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_order_of_a_file_changes_no_bit_of_moments(monkeypatch: pytest.MonkeyPatch, stored: Callable) -> None:
    monkeypatch.setattr(_moments, "BLOCK", 16)
    adata = cells(200)
    rng = np.random.default_rng(2)
    names = rng.permutation(adata.obs_names)
    groups = [list(names[a:b]) for a, b in ((0, 1), (1, 90), (90, 106), (106, 107), (107, 200), (0, 200))]
    expected = by_name(adata, groups)
    shuffled = adata[rng.permutation(200), rng.permutation(30)].copy()
    shuffled.X = stored(shuffled.X.toarray())
    found = by_name(shuffled, groups)
    np.testing.assert_array_equal(bits(found.mean), bits(expected.mean))
    np.testing.assert_array_equal(bits(found.variance), bits(expected.variance))
    # and rows by name are the same rows
    rows = [Expression(a, genes=["g5", "g2"]).rows(a.obs_names.get_indexer(names)) for a in (adata, shuffled)]
    np.testing.assert_array_equal(bits(rows[0].toarray()), bits(rows[1].toarray()))


# -- memory -----------------------------------------------------------------------------------------------------------


def test_reading_copies_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_expression, "BLOCK", 100)
    for module in (_stored, _moments):
        monkeypatch.setattr(module, "BLOCK", 100)
    monkeypatch.setattr(_expression, "_SAMPLE", 100)
    rng = np.random.default_rng(0)
    counts = sparse.random(5000, 500, density=0.2, format="csr", dtype=np.float32, random_state=rng)
    counts.data = np.ceil(counts.data * 5)
    whole = counts.data.nbytes + counts.indices.nbytes
    logs = lognorm(AnnData(counts.copy()))
    for adata, scale in ((AnnData(counts), "counts"), (logs, "log1p")):
        tracemalloc.start()
        expression = Expression(adata, scale=scale)
        assert expression.rows(np.arange(5)).shape == (5, 500)
        for _, block in expression.blocks(100):
            assert block.shape == (100, 500)
        expression.moments([np.arange(2000), np.arange(2000, 5000)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.25 * whole, peak / whole
    # what is stored as it is wanted is passed on, and what is not the whole is a copy
    assert np.shares_memory(Expression(logs, scale="log1p").rows().data, logs.X.data)
    assert not np.shares_memory(Expression(logs, scale="log1p").rows(np.arange(5000)).data, logs.X.data)
    assert not np.shares_memory(Expression(AnnData(counts)).rows().data, counts.data)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_values_are_named(adata: AnnData) -> None:
    adata.layers["scaled"] = adata.X.toarray() - 1.5
    with pytest.raises(
        ValueError, match=r"layers\['scaled'\] holds negative values \(least -1.5\).*raw counts or log1p"
    ):
        read(adata, layer="scaled")
    for name, value in {"nan": np.nan, "inf": np.inf}.items():
        adata.layers[name] = np.where(adata.X.toarray() > 4, value, 1)
        with pytest.raises(ValueError, match=rf"layers\['{name}'\] holds NaN or infinite values"):
            read(adata, layer=name)
        with pytest.raises(ValueError, match=rf"layers\['{name}'\] of observed holds NaN or infinite values"):
            read(adata, layer=name, side="observed")
    with pytest.raises(
        UnknownNameError, match=r"layer='Scaled' is unknown. Did you mean 'scaled'.*Leave it out to use X"
    ):
        read(adata, layer="Scaled")
    with pytest.raises(ValueError, match=r"X is empty"):
        read(AnnData(obs=adata.obs, var=adata.var))


def test_only_the_cells_that_are_covered_are_looked_at() -> None:
    adata = cells()
    right = read(adata)
    for value in (np.nan, -1, 0.5):
        bad = adata.copy()
        bad.X[7, 0] = value
        expression = Expression(bad)
        with pytest.raises(ValueError, match="X holds"):
            expression.take([3, 7]).rows([0])
        with pytest.raises(ValueError, match="X holds"):
            expression.rows([3])
        rest = np.delete(np.arange(60), 7)
        np.testing.assert_array_equal(expression.take(rest).rows().toarray(), right[rest])
        np.testing.assert_array_equal(expression.select(["g1"]).take(rest).rows().toarray(), right[rest][:, [1]])
        # genes left out do matter: they are part of the library
        with pytest.raises(ValueError, match="X holds"):
            expression.select(["g1"]).rows()
    empty = adata.copy()
    empty.X = sparse.csr_matrix(empty.X.toarray() * (np.arange(60) != 7)[:, None])
    with pytest.raises(ValueError, match=r"1 cells have no counts, among them \['c007'\]"):
        Expression(empty).rows()
    assert Expression(empty).take(np.arange(7)).rows().shape == (7, 30)


def test_the_matrix_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    look = Expression._look_at
    monkeypatch.setattr(Expression, "_look_at", lambda self, rows: looked.append(rows) or look(self, rows))
    expression = Expression(cells())
    panel = expression.select(["g1"])
    for part in (panel, expression, panel):
        part.rows([0])
    expression.take([3, 4]).rows()
    panel.take([5]).select(["g1"]).moments([np.arange(1)])
    assert len(looked) == 1


def test_scale_is_stated_and_checked(adata: AnnData) -> None:
    adata.layers["lognorm"] = read(adata)
    with pytest.raises(
        ValueError, match=r"scale='counts' was stated, but layers\['lognorm'\] holds fractions.*scale='log1p' if"
    ):
        read(adata, layer="lognorm")
    with pytest.raises(ValueError, match=r"predicted_scale='counts' was stated.*say predicted_scale='log1p' if"):
        read(adata, layer="lognorm", scale_argument="predicted_scale")
    adata.layers["high"] = adata.X * 2
    with pytest.raises(ValueError, match=r"scale='log1p' was stated, but layers\['high'\] reaches 12.*'counts'"):
        read(adata, layer="high", scale="log1p")
    with pytest.raises(ValueError, match=r"scale='log1p' was stated, but X of observed holds whole numbers only"):
        read(adata, scale="log1p", side="observed")
    with pytest.raises(ValueError, match=r"scale='raw' is unknown. Say 'counts'.*never guessed"):
        read(adata, scale="raw")
    # counts that were corrected are neither, and neither answer sends to the other
    adata.layers["corrected"] = adata.X * 9.7
    for scale in ("counts", "log1p"):
        with pytest.raises(ValueError, match=rf"scale='{scale}' was stated.*neither raw counts nor log.*np.rint"):
            read(adata, layer="corrected", scale=scale)
    # logarithms of 100 counts a cell cannot reach those of 10,000
    with pytest.raises(ValueError, match=r"neither raw counts nor log\(1 \+ counts per 100\)"):
        read(adata, layer="lognorm", scale="log1p", target_sum=100)


def test_log1p_of_another_total_is_refused(kang: AnnData) -> None:
    other = lognorm(kang, None)  # to the median, as scanpy does by default
    median = float(np.median(np.asarray(kang.X.sum(axis=1))))
    with pytest.raises(
        ValueError, match=rf"normalised to {median:.4g} counts per cell.*not to 10000.*target_sum=10000"
    ):
        read(other, scale="log1p")
    genes = other[:, ::3].copy()  # a panel: its totals differ and say nothing
    assert read(genes, scale="log1p").shape == genes.shape
    million = lognorm(kang, 1e6)  # whose values no logarithm of 10,000 reaches; rounding would not give counts
    for scale in ("counts", "log1p"):
        with pytest.raises(ValueError, match=rf"scale='{scale}' was stated.*normalised to 1e\+06 counts per cell"):
            read(million, scale=scale)
    right = lognorm(kang)
    np.testing.assert_array_equal(read(right, scale="log1p"), right.X.toarray())
    panel = right[:, ::3].copy()
    np.testing.assert_array_equal(read(panel, scale="log1p"), panel.X.toarray())


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
@pytest.mark.parametrize("target_sum", [None, 3e4])
def test_an_empty_cell_says_nothing_of_totals(target_sum: float | None) -> None:
    adata = cells(100)
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(100) != 3)[:, None])
    with pytest.raises(ValueError, match=r"scale='log1p' was stated, but X was normalised to .* and not to 10000"):
        read(lognorm(adata, target_sum), scale="log1p")
    right = lognorm(adata)
    np.testing.assert_array_equal(read(right, scale="log1p"), right.X.toarray())
    assert (read(AnnData(np.zeros((20, 3), np.float32)), scale="log1p") == 0).all()


def test_some_cells_of_another_total_do_not_hide_the_rest() -> None:
    adata = lognorm(cells(100), 3e3)
    odd = lognorm(cells(100), 2e3)
    adata.X[:5] = odd.X[:5]
    with pytest.raises(ValueError, match=r"was normalised to 3000 counts per cell"):
        read(adata, scale="log1p")


def test_log1p_of_raw_counts_is_refused() -> None:
    raw = cells(100)
    raw.X = raw.X.log1p()
    with pytest.raises(ValueError, match=r"'log1p' was stated, but X holds logarithms of whole numbers: of raw counts"):
        read(raw, scale="log1p")
    # also where the raw totals are, in the middle, those that were asked for
    rng = np.random.default_rng(0)
    deep = rng.poisson(rng.lognormal(0, 0.2, (100, 1)) * np.full(200, 50.0))
    deep = AnnData(np.log1p(deep * (deep.sum() > 0)).astype(np.float32))
    assert abs(np.median(np.expm1(deep.X).sum(axis=1)) / 1e4 - 1) < 0.05
    with pytest.raises(ValueError, match="logarithms of whole numbers"):
        read(deep, scale="log1p")
    # but what was divided may come out whole
    toy = AnnData(np.log1p(np.array([[7500, 2500, 0], [2500, 2500, 5000]], np.float32)))
    np.testing.assert_array_equal(read(toy, scale="log1p"), toy.X)


@pytest.mark.filterwarnings("error")
def test_other_logarithms_are_refused() -> None:
    adata = cells(100, 200)
    twice = lognorm(adata)
    twice.X = twice.X.log1p()
    with pytest.raises(ValueError, match=r"'log1p' was stated, but X was put through log\(1 \+ x\) twice"):
        read(twice, scale="log1p")
    with pytest.raises(ValueError, match=r"X holds logarithms to base 2"):
        read(lognorm(adata, base=2), scale="log1p")
    with pytest.raises(ValueError, match=r"X holds logarithms to base 10"):
        read(lognorm(adata, base=10), scale="log1p")
    # what is far beyond any logarithm is no matter of warnings
    with pytest.raises(ValueError, match="neither raw counts nor"):
        read(AnnData(adata.X.toarray() * 1000.5), scale="log1p")


OTHERS = {
    "log1p": (lambda rates: np.log1p(np.log1p(rates)), r"was put through log\(1 \+ x\) twice"),
    "base 2": (lambda rates: np.log2(1 + rates), "holds logarithms to base 2"),
    "base 10": (lambda rates: np.log10(1 + rates), "holds logarithms to base 10"),
    "roots": (np.sqrt, "holds square roots"),
    "arcsinh": (np.arcsinh, "holds inverse hyperbolic sines"),
    "none": (lambda rates: rates / 100, "holds counts that were divided by their total"),
    "to one": (lambda rates: np.log1p(rates) / np.log1p(rates).max(axis=0), "holds genes that were scaled to between"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("n_genes", [20, 200, 2000])
def test_other_logarithms_of_some_genes_are_refused(name: str, n_genes: int, kang: AnnData) -> None:
    """Where genes were left out cells have no one total: that values are multiples of one of them tells."""
    taken, told = OTHERS[name]
    counts = kang.X.toarray().astype(np.float64)
    rates = counts / counts.sum(axis=1, keepdims=True) * 1e4
    most = np.argsort(-np.log1p(rates).var(axis=0))[:n_genes]
    with np.errstate(invalid="ignore"):
        stated = AnnData(np.nan_to_num(taken(rates[:, most])).astype(np.float32))
    with pytest.raises(ValueError, match=f"'log1p' was stated, but X {told}"):
        read(stated, scale="log1p")


def test_logarithms_of_what_was_never_counted_are_read() -> None:
    """Fractions of counts, and rounded logarithms, are no sign of another logarithm."""
    rng = np.random.default_rng(0)
    log = np.log1p(rng.gamma(0.5, 20.0, (300, 50)) * (rng.random((300, 50)) < 0.4)).astype(np.float32)
    np.testing.assert_array_equal(read(AnnData(log), scale="log1p"), log)
    # means of cells, whose smallest value is often the smallest that the decimals leave
    ones = rng.poisson(0.3, (2000, 200)) * rng.uniform(1, 9, (2000, 1))
    means = np.stack([np.log1p(ones)[rng.integers(0, 2000, 100)].mean(axis=0) for _ in range(60)])
    for decimals in (1, 2, 3, 4):
        log = means.round(decimals).astype(np.float32)
        np.testing.assert_array_equal(read(AnnData(log), scale="log1p"), log)
    rounded = (log / log.max()).round(1)
    np.testing.assert_array_equal(read(AnnData(rounded), scale="log1p"), rounded)
    # zero or one count each, of few genes: far beyond what numbers hold when a second logarithm is undone
    few = np.log1p(rng.integers(0, 2, (300, 50)) * rng.uniform(50, 200, (300, 1))).astype(np.float32)
    np.testing.assert_array_equal(read(AnnData(few), scale="log1p"), few)
    counts = rng.poisson(1.0, (300, 50)) * rng.uniform(1, 9, (300, 1))
    for to in (lambda x: x.round(2), lambda x: x.astype(np.float16)):
        log = to(np.log1p(counts)).astype(np.float32)
        np.testing.assert_array_equal(read(AnnData(log), scale="log1p"), log)


def test_totals_of_predicted_cells_scatter() -> None:
    rng = np.random.default_rng(0)
    right = lognorm(cells(100))
    predicted = AnnData(np.log1p(np.expm1(right.X.toarray()) * rng.normal(1.1, 0.1, (100, 1))).astype(np.float32))
    with pytest.raises(ValueError, match="was normalised to"):
        read(predicted, scale="log1p")
    np.testing.assert_array_equal(read(predicted, scale="log1p", measured=False), predicted.X)
    # copies of one predicted cell have one total, which says nothing of how it came about
    copies = AnnData(np.repeat(predicted.X[:1] * 0.9, 50, axis=0))
    np.testing.assert_array_equal(read(copies, scale="log1p", measured=False), copies.X)
    # cells that were divided by their totals are told, predicted or not
    with pytest.raises(ValueError, match="was normalised to 500 counts"):
        read(lognorm(cells(100), 500), scale="log1p", measured=False)


def test_library_size_must_be_there_and_positive(adata: AnnData) -> None:
    with pytest.raises(UnknownNameError, match=r"library_size_key='dept' is unknown. Did you mean 'depth'.*row sums"):
        read(adata, library_size_key="dept")
    with pytest.raises(UnknownNameError, match=r"predicted: library_size_key='dept' is unknown"):
        read(adata, library_size_key="dept", side="predicted")
    for bad in ([1.0, 0.0, np.nan], pd.array([4, 0, None], dtype="Int64")):
        adata.obs["depth"] = bad
        with pytest.raises(
            ValueError, match=r"2 cells have no positive number in obs\[.depth.\], among them \['y', 'z'\]"
        ):
            read(adata, library_size_key="depth")
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel() - [0, 1, 0]
    with pytest.raises(ValueError, match=r"library_size_key='depth' is smaller than what X adds up to in 1 cells.*'y'"):
        read(adata, library_size_key="depth")
    for bad in (["a", "b", "c"], pd.Categorical([1, 2, 3])):
        adata.obs["depth"] = bad
        with pytest.raises(ValueError, match=r"library_size_key='depth' is a column of .* not of numbers"):
            read(adata, library_size_key="depth")
    # of no use where nothing is divided
    adata.layers["log"] = read(adata)
    assert read(adata, layer="log", scale="log1p", library_size_key="depth").shape == (3, 4)


@pytest.mark.parametrize("kind", ["sparse", "dense", "by columns"])
def test_rows_follow_from_what_is_stored(kind: str) -> None:
    """A GPU makes them itself, of any cells and genes."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, (3000, 12)).astype(np.float32)
    matrix = {"sparse": sparse.csr_matrix, "dense": np.asarray, "by columns": sparse.csc_matrix}[kind](counts)
    adata = AnnData(matrix, var=pd.DataFrame(index=[f"g{j}" for j in range(12)]))
    genes, cells = [f"g{j}" for j in (7, 2, 11)], rng.permutation(3000)[:2500]
    for columns in (genes, list(adata.var_names)):
        read = Expression(adata, unit="log_counts").take(cells).select(columns)
        assert read.takes_logarithm
        assert not read.read_as("counts").takes_logarithm
        place, dense = read.gene_of_column, np.zeros((40, len(columns)), np.float32)
        stored = read.stored(slice(0, 40)).toarray()
        dense[:, place[place >= 0]] = np.log1p(stored[:, place >= 0])
        np.testing.assert_array_equal(dense, read.rows(slice(0, 40)).toarray())
    expected = 12 if kind == "dense" else (counts > 0).sum() / 3000
    assert read.entries_per_cell == pytest.approx(expected)
    with pytest.raises(ValueError, match="divides counts by library sizes"):
        Expression(adata, unit="log1p").stored(slice(0, 1))
    adata.X = matrix = counts - 2 * (np.arange(3000) == 2999)[:, None]  # in the last block, in another thread
    with pytest.raises(ValueError, match="X holds negative values"):
        Expression(adata, unit="log_counts").stored(slice(0, 1))
