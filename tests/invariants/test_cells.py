"""What holds of all cells: as sentences, as counts, and when predicted changes are put onto them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from virtualcell.data._counts import averaged, counts_of, depth_matched_counts, library_of, log_of
from virtualcell.data._device_sentences import DeviceSentences
from virtualcell.data._emit import emit_counts, with_totals
from virtualcell.data._expression import Expression
from virtualcell.data._sentence_batches import Sentences
from virtualcell.data._sentences import sentences
from virtualcell.models._mixture import NETWORKS, TRANSFERRED, Change, Mixture, put_on_cells

seeds = st.integers(0, 2**32 - 1)


def random_counts(rng: np.random.Generator, n_cells: int, n_genes: int, *, empty: bool = True) -> sparse.csr_matrix:
    """Whole counts with many equal values; genes differ by orders of magnitude, and some cells may have none."""
    counts = rng.poisson(rng.gamma(0.3, 4, n_genes) * rng.lognormal(0, 0.7, (n_cells, 1)))
    if not empty:
        counts[np.arange(n_cells), rng.integers(n_genes, size=n_cells)] += 1
    return sparse.csr_matrix(counts.astype(np.float32))


def whole(matrix: sparse.csr_matrix) -> bool:
    return bool((matrix.data == np.rint(matrix.data)).all() and (matrix.data > 0).all() and matrix.dtype == np.float32)


# -- sentences --------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 20), st.integers(1, 30), st.integers(1, 12))
def test_sentences(seed: int, n_cells: int, n_genes: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    counts = random_counts(rng, n_cells, n_genes)
    tokens = rng.permutation(2 * n_genes)[:n_genes].astype(np.int32)
    tokens[rng.random(n_genes) < 0.2] = -1
    found, values = sentences(counts, tokens, length)
    assert found.shape == values.shape == (n_cells, length)
    for row, token, value in zip(counts.toarray(), found, values, strict=True):
        wanted = sorted((-x, t) for x, t in zip(row, tokens, strict=True) if t >= 0 and x > 0)[:length]
        n = len(wanted)
        assert [(-v, t) for v, t in zip(value[:n], token[:n], strict=True)] == wanted
        assert (token[n:] == -1).all()
        assert (value[n:] == 0).all()
    genes, cells = rng.permutation(n_genes), rng.permutation(n_cells)
    other, of_other = sentences(counts[cells][:, genes], tokens[genes], length)
    np.testing.assert_array_equal(other, found[cells])
    np.testing.assert_array_equal(of_other, values[cells])
    again, _ = sentences(counts * 3, tokens, length)  # the order of values is all that counts
    np.testing.assert_array_equal(again, found)


@given(seeds, st.integers(1, 20), st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_sentences_of_a_device_are_those_of_the_cpu(
    seed: int, n_cells: int, n_genes: int, length: int, dense: bool
) -> None:
    rng = np.random.default_rng(seed)
    counts = random_counts(rng, n_cells, n_genes, empty=False)
    names = [f"g{i}" for i in range(n_genes)]
    adata = AnnData(counts.toarray() if dense else counts, var=pd.DataFrame(index=names))
    cells = Sentences(Expression(adata, unit="log_counts").select(list(rng.permutation(names))), length)
    wanted = cells.rows(np.arange(n_cells))
    # sums of cells are at most 100 in each, since expression is given in per cent
    assert (wanted["expression"].sum(dim=1) <= 100 + 1e-3).all()

    def refuse(rows: np.ndarray) -> None:
        raise AssertionError(f"cells {rows} express something")

    on_device = DeviceSentences(cells, torch.device("cpu"), most_bytes=1 << 20, refuse=refuse)
    for rows, batch in on_device.batches(rng.permutation(n_cells), 7):
        n = batch["tokens"].shape[1]
        cells_of = torch.from_numpy(rows)
        assert torch.equal(batch["tokens"], wanted["tokens"][cells_of, :n])
        torch.testing.assert_close(batch["expression"], wanted["expression"][cells_of, :n], rtol=1e-6, atol=0)


# -- counts -----------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 20), st.integers(1, 30))
def test_counts_come_back_from_logarithms(seed: int, n_cells: int, n_genes: int) -> None:
    rng = np.random.default_rng(seed)
    counts = random_counts(rng, n_cells, n_genes, empty=False)
    counts[np.arange(n_cells), rng.integers(n_genes, size=n_cells)] = 1  # the smallest value is one count
    counts = counts.tocsr()
    library = np.asarray(counts.sum(axis=1)).ravel()
    log = log_of(counts, library)
    np.testing.assert_allclose(np.expm1(log.toarray().astype(float)).sum(axis=1), 1e4, rtol=1e-4)
    found = library_of(log)
    np.testing.assert_allclose(found, library, rtol=1e-3)
    np.testing.assert_array_equal(counts_of(log, found).toarray(), counts.toarray())


@given(seeds, st.integers(1, 10), st.integers(1, 30), st.sampled_from(["systematic", "multinomial"]))
def test_counts_that_are_drawn(seed: int, n_cells: int, n_genes: int, sampling: str) -> None:
    rng = np.random.default_rng(seed)
    log = log_of(random_counts(rng, n_cells, n_genes, empty=False), np.full(n_cells, 1000.0))
    depths, genes = rng.integers(0, 500, n_cells), [f"g{i}" for i in rng.permutation(n_genes)]
    drawn = depth_matched_counts(log, depths, genes=genes, sampling=sampling, seed=1)
    assert whole(drawn)
    np.testing.assert_array_equal(drawn.toarray().sum(axis=1), depths)
    assert not drawn.toarray()[log.toarray() == 0].any()  # what is not expressed is not drawn
    if sampling == "systematic":  # to within one count of what is expected
        share = np.expm1(log.toarray().astype(float))
        expected = depths[:, None] * share / share.sum(axis=1, keepdims=True)
        assert (np.abs(drawn.toarray() - expected) < 1 + 1e-4).all()
    order = rng.permutation(n_genes)
    again = depth_matched_counts(log[:, order], depths, genes=[genes[i] for i in order], sampling=sampling, seed=1)
    np.testing.assert_array_equal(again.toarray(), drawn[:, order].toarray())


@given(seeds, st.integers(2, 40), st.integers(1, 20), st.booleans(), st.floats(0, 3))
def test_counts_that_are_changed(seed: int, n_cells: int, n_genes: int, panel: bool, size: float) -> None:
    rng = np.random.default_rng(seed)
    counts = random_counts(rng, n_cells, n_genes, empty=False)
    library = np.asarray(counts.sum(axis=1)).ravel().astype(float)
    if panel:  # of genes, beside which there are others
        library += rng.integers(100, 1000, n_cells)
    change = rng.normal(0, size, n_genes) * (rng.random(n_genes) < 0.5)
    genes, order = [f"g{i}" for i in range(n_genes)], rng.permutation(n_genes)
    options = {"dispersion": rng.gamma(1, 0.3, n_genes), "key": "x", "seed": 3}
    got = emit_counts(counts, library, change, genes=genes, **options)
    assert whole(got)
    totals, before, after = np.asarray(got.sum(axis=1)).ravel(), counts.toarray(), got.toarray()
    assert (totals <= library).all() if panel else (totals == library).all()
    if panel:
        some = totals < library  # what does not fit into a cell is taken from all of its genes
        np.testing.assert_array_equal(after[some][:, change == 0], before[some][:, change == 0])
        assert (after[:, change < 0] <= before[:, change < 0]).all()
        assert (after[some][:, change > 0] >= before[some][:, change > 0]).all()
    options["dispersion"] = options["dispersion"][order]
    again = emit_counts(counts[:, order], library, change[order], genes=[genes[i] for i in order], **options)
    np.testing.assert_array_equal(again.toarray(), after[:, order])
    nothing = emit_counts(counts, library, np.zeros(n_genes), genes=genes)
    np.testing.assert_array_equal(nothing.toarray(), before)


@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_other_totals(seed: int, n_cells: int, n_genes: int) -> None:
    rng = np.random.default_rng(seed)
    counts = random_counts(rng, n_cells, n_genes, empty=False)
    totals = rng.integers(0, 300, n_cells)
    genes, order = [f"g{i}" for i in range(n_genes)], rng.permutation(n_genes)
    got = with_totals(counts, totals, genes=genes)
    assert whole(got)
    np.testing.assert_array_equal(np.asarray(got.sum(axis=1)).ravel(), totals)
    assert not got.toarray()[counts.toarray() == 0].any()
    fewer = totals <= np.asarray(counts.sum(axis=1)).ravel()
    assert (got.toarray()[fewer] <= counts.toarray()[fewer]).all()
    np.testing.assert_array_equal(with_totals(got, totals, genes=genes).toarray(), got.toarray())  # done is done
    again = with_totals(counts[:, order], totals, genes=[genes[i] for i in order])
    np.testing.assert_array_equal(again.toarray(), got[:, order].toarray())


@given(seeds, st.integers(1, 20), st.integers(1, 10), st.integers(1, 4))
def test_averages_of_a_group(seed: int, n_cells: int, n_genes: int, n_groups: int) -> None:
    rng = np.random.default_rng(seed)
    log = log_of(random_counts(rng, n_cells, n_genes), np.full(n_cells, 1e3))
    groups = rng.integers(n_groups, size=n_cells)
    got = averaged(log, groups)
    for group in np.unique(groups):  # every cell is taken equally often: the mean expression stays
        before, after = (np.expm1(m[groups == group].toarray().astype(float)) for m in (log, got))
        np.testing.assert_allclose(after.mean(axis=0), before.mean(axis=0), rtol=1e-4, atol=1e-4)
        assert (after <= before.max(axis=0) * (1 + 1e-5) + 1e-5).all()


# -- mixtures ---------------------------------------------------------------------------------------------------------

shares = st.floats(0, 1)
questions = st.sampled_from(sorted(NETWORKS))


@given(shares, shares, questions, st.booleans(), st.floats(0, 20) | st.just(float("nan")))
def test_weights(a: float, of_networks: float, question: str, transferred: bool, far: float) -> None:
    mixture = Mixture(("shift", "level"), (a, 1 - a), transferred=True).with_networks(question, of_networks)
    weights = mixture.weights(question, transferred=transferred, extrapolation=far)
    assert (TRANSFERRED in weights) == transferred
    assert all(0 <= w <= 1 + 1e-12 for w in weights.values())
    if a > 0 or not far > 1:
        assert abs(sum(weights.values()) - 1) < 1e-9
    near = mixture.weights(question, transferred=transferred)
    assert weights["level"] <= near["level"] + 1e-12


@given(seeds, questions, st.booleans(), st.booleans(), st.integers(1, 3))
def test_what_is_mixed(seed: int, question: str, transferred: bool, nonnegative: bool, n_networks: int) -> None:
    rng = np.random.default_rng(seed)
    n_sets, n_cells, n_genes = 2, 6, 5

    def cells() -> torch.Tensor:
        values = torch.from_numpy(rng.normal(1, 1, (n_sets, n_cells, n_genes)))
        return values.clamp_min(0) if nonnegative else values

    control, outputs = cells(), [(cells(), cells()) for _ in range(n_networks)]
    base = control.mean(dim=(0, 1))
    change = Change(torch.from_numpy(rng.normal(0, 1, n_genes)), base) if transferred else None
    mixture = Mixture(("shift", "level"), (0.3, 0.7), transferred, nonnegative)
    got = mixture.cells(outputs, control, change, question=question)
    means, weights = mixture.means(outputs, control, change, question=question)
    assert abs(weights.sum() - 1) < 1e-9
    wanted = torch.einsum("p,pbg->bg", torch.from_numpy(weights), means)
    torch.testing.assert_close(got.mean(dim=1), wanted, rtol=1e-6, atol=1e-6)
    if nonnegative:
        assert (got >= 0).all()
    # in whatever order cells, genes and networks come
    order, genes = torch.from_numpy(rng.permutation(n_cells)), torch.from_numpy(rng.permutation(n_genes))
    turned = [tuple(x[:, order][:, :, genes] for x in heads) for heads in reversed(outputs)]
    changed = None if change is None else Change(change.change[genes], base[genes])
    again = mixture.cells(turned, control[:, order][:, :, genes], changed, question=question)
    torch.testing.assert_close(again, got[:, order][:, :, genes])


@given(seeds, st.booleans(), st.integers(1, 8))
def test_means_that_are_put_on_cells(seed: int, nonnegative: bool, n_cells: int) -> None:
    rng = np.random.default_rng(seed)
    cells, wanted = torch.from_numpy(rng.gamma(0.5, 2, (2, n_cells, 4))), torch.from_numpy(rng.gamma(0.5, 2, (2, 1, 4)))
    cells[:, :, 0] = 0
    got = put_on_cells(cells, wanted, nonnegative=nonnegative)
    torch.testing.assert_close(got.mean(dim=1, keepdim=True), wanted)
    torch.testing.assert_close(put_on_cells(got, wanted, nonnegative=nonnegative), got)  # done is done
    if nonnegative:
        assert (got >= 0).all()
        lower = (wanted <= 2 * cells.mean(dim=1, keepdim=True)).expand_as(cells)
        assert (got[(cells == 0) & lower] == 0).all()  # zeros stay zeros where a factor does it
