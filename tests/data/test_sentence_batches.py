from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from virtualcell.data._expression import Expression
from virtualcell.data._sentence_batches import MOST_VALIDATION_STEPS, SentenceBatches, Sentences

N_CELLS, N_GENES, LENGTH = 25, 65, 20
P, N, S = 12, 7, 9
CPU = torch.device("cpu")


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(0.6, (N_CELLS, N_GENES))


def read(counts: np.ndarray, length: int = LENGTH, **options: object) -> Sentences:
    return Sentences(Expression(AnnData(counts.astype(np.float32)), unit="log_counts"), length, **options)


def batches(
    counts: np.ndarray, *, length: int = LENGTH, cells: dict | None = None, **options: object
) -> SentenceBatches:
    names = pd.Index([f"cell {i}" for i in range(len(counts))])
    options = {
        "rows": np.arange(len(counts)),
        "n_targets": (P, N, S),
        "batch_size": 10,
        "vectors": torch.arange(counts.shape[1])[:, None].float(),  # a gene's vector is its token
        **options,
    }
    dataset = np.arange(len(counts)) % 3
    return SentenceBatches(read(counts, length, **(cells or {})), names=names, dataset=dataset, **options)


def step(data: SentenceBatches, i: int, rank: int = 0, world_size: int = 1) -> dict[str, np.ndarray]:
    """A batch with tokens of the whole table in place of those of the genes that occur."""
    batch = data.step(i, rank, world_size, CPU)
    genes = batch["genes"][:, 0].long()
    batch["tokens"] = genes[batch["tokens"].clamp_min(0)].where(batch["tokens"] >= 0, -1)
    batch["target_tokens"] = genes[batch["target_tokens"]]
    return {name: value.numpy() for name, value in batch.items()}


# -- sentences --------------------------------------------------------------------------------------------------------


def test_sentences_hold_the_highest_genes_in_percent_of_the_cell(counts: np.ndarray) -> None:
    rows = np.array([4, 0, 24])
    batch = read(counts).rows(rows)
    assert set(batch) == {"tokens", "expression"}
    for cell, tokens, values in zip(counts[rows], batch["tokens"], batch["expression"], strict=True):
        order = np.lexsort([np.arange(N_GENES), -cell])[:LENGTH]  # equal counts in the order of the tokens
        order = order[cell[order] > 0]
        assert tokens[: len(order)].tolist() == order.tolist()
        assert (tokens[len(order) :] == -1).all()
        expected = 100 * np.log1p(cell[order]) / np.log1p(cell).sum()
        np.testing.assert_allclose(values[: len(order)], expected, rtol=1e-6)
    # a sentence that holds every expressed gene adds up to 100
    np.testing.assert_allclose(read(counts, N_GENES).rows(rows)["expression"].sum(1), 100, rtol=1e-5)


def test_order_and_kind_of_the_matrix_change_no_bit(counts: np.ndarray) -> None:
    expected = read(counts).rows(np.arange(N_CELLS))
    rng = np.random.default_rng(1)
    cells, genes = rng.permutation(N_CELLS), rng.permutation(N_GENES)
    names = [f"g{i}" for i in range(N_GENES)]
    for kind in (np.asarray, sparse.csr_matrix, sparse.csc_matrix):
        for dtype in (np.int64, np.float32, np.float64):
            adata = AnnData(kind(counts[cells][:, genes].astype(dtype)), var=pd.DataFrame(index=np.array(names)[genes]))
            sentences = Sentences(Expression(adata, unit="log_counts").select(names), LENGTH)
            found = sentences.rows(np.argsort(cells))
            for name, value in expected.items():
                assert torch.equal(found[name], value), (kind, dtype, name)


def test_cell_without_genes_is_all_padding(counts: np.ndarray) -> None:
    counts[3] = 0
    batch = read(counts).rows(np.array([3]))
    assert (batch["tokens"] == -1).all()
    assert (batch["expression"] == 0).all()


def test_habits_of_the_published_models_hold_in_training_too(counts: np.ndarray) -> None:
    options = {"length": N_GENES, "batch_size": N_CELLS}
    plain = step(batches(counts, **options), 0)
    data = batches(counts, **options, cells={"fill": True, "cls_gene": 3})
    like_theirs, rows = step(data, 0), data.rows(0)
    assert "cls_expression" not in plain
    expected = 100 * np.log1p(counts[rows, 3]) / np.log1p(counts[rows]).sum(axis=1)
    np.testing.assert_allclose(like_theirs["cls_expression"], expected, rtol=1e-6)
    padding = plain["tokens"] < 0
    assert padding.any()
    assert (like_theirs["tokens"] >= 0).all()
    np.testing.assert_array_equal(like_theirs["tokens"][~padding], plain["tokens"][~padding])
    for row, sentence, empty in zip(rows, like_theirs["tokens"], padding, strict=True):
        assert not set(sentence[empty].tolist()) & set(np.flatnonzero(counts[row]).tolist())


# -- targets ----------------------------------------------------------------------------------------------------------


def test_targets_are_expressed_unexpressed_and_shared_genes_with_their_values(counts: np.ndarray) -> None:
    data = batches(counts)
    batch, rows = step(data, 0), data.rows(0)
    assert batch["targets"].shape == batch["target_tokens"].shape == (10, P + N + S)
    assert batch["n_shared"] == S
    np.testing.assert_array_equal(batch["dataset"], rows % 3)
    for row, tokens, targets in zip(rows, batch["target_tokens"], batch["targets"], strict=True):
        np.testing.assert_allclose(targets, np.log1p(counts[row, tokens]), rtol=1e-6)
        assert (counts[row] > 0).sum() > P
        assert len(set(tokens[:P])) == P
        assert len(set(tokens[P : P + N])) == N
    assert (batch["targets"][:, :P] > 0).all()
    assert (batch["targets"][:, P : P + N] == 0).all()
    shared = batch["target_tokens"][:, P + N :]
    assert (shared == shared[0]).all()
    assert len(set(shared[0].tolist())) == S
    assert (batch["targets"][:, P + N :] > 0).any()


def test_genes_are_those_that_occur_each_once(counts: np.ndarray) -> None:
    batch = batches(counts, batch_size=2).step(0, 0, 1, CPU)
    genes = batch["genes"][:, 0].tolist()
    assert len(genes) < N_GENES
    assert sorted(set(genes)) == genes
    named = torch.cat([batch["tokens"], batch["target_tokens"]], dim=1)
    assert set(named[named >= 0].tolist()) == set(range(len(genes)))


def test_few_genes_of_a_kind_are_repeated_evenly(counts: np.ndarray) -> None:
    counts[0] = 0
    counts[0, :5] = 3
    counts[1] += 1
    counts[1, :2] = 0
    batch = step(batches(counts, rows=np.array([0, 1]), n_targets=(12, 7, 0), batch_size=2, is_validation=True), 0)
    drawn = np.unique(batch["target_tokens"][0, :12], return_counts=True)
    assert set(drawn[0]) == set(range(5))
    assert set(drawn[1]) == {2, 3}
    assert set(batch["target_tokens"][1, 12:].tolist()) == {0, 1}
    # more targets than genes
    many = step(batches(counts, n_targets=(100, 100, 100)), 0)
    assert (many["targets"][:, :100] > 0).all()
    assert (many["targets"][:, 100:200] == 0).all()
    assert many["targets"].shape == (10, 300)


def test_cells_that_express_everything_have_targets_too(counts: np.ndarray) -> None:
    data = batches(counts + 1)
    batch, rows = step(data, 0), data.rows(0)
    for row, tokens, targets in zip(rows, batch["target_tokens"], batch["targets"], strict=True):
        np.testing.assert_allclose(targets, np.log1p(counts[row, tokens] + 1), rtol=1e-6)


def test_each_cell_draws_its_own_targets_and_all_genes_have_their_turn(counts: np.ndarray) -> None:
    data = batches(np.tile(counts[:1], (N_CELLS, 1)), batch_size=N_CELLS)
    drawn = np.stack([step(data, i)["target_tokens"] for i in range(20)])
    assert len({tuple(sorted(row)) for row in drawn[0, :, :P].tolist()}) > N_CELLS / 2
    for part, of_kind in ((drawn[..., :P], counts[0] > 0), (drawn[..., P : P + N], counts[0] == 0)):
        found, times = np.unique(part, return_counts=True)
        assert set(found) == set(np.flatnonzero(of_kind))
        # uniform: each of n genes in k / n of the 20 x 25 draws, within five standard deviations
        share = part.shape[-1] / of_kind.sum()
        spread = np.sqrt(20 * N_CELLS * share * (1 - share))
        np.testing.assert_allclose(times, 20 * N_CELLS * share, atol=5 * spread)


def test_equal_counts_come_in_random_order_and_unequal_ones_in_theirs() -> None:
    # counts that differ by one, up to those of MALAT1 or of mitochondrial genes, each three times
    levels = np.concatenate([np.arange(1, 11), np.arange(20_000, 20_010)])
    counts = np.zeros((1, N_GENES), int)
    counts[0, :60] = np.repeat(levels, 3)
    total, orders = np.log1p(counts).sum(), set()
    data = batches(counts, length=60, batch_size=1)
    for i in range(10):
        batch = step(data, i)
        tokens = batch["tokens"][0]
        orders.add(tuple(tokens))
        np.testing.assert_array_equal(counts[0, tokens], np.sort(np.repeat(levels, 3))[::-1])
        np.testing.assert_allclose(batch["expression"][0], 100 * np.log1p(counts[0, tokens]) / total, rtol=2e-6)
    assert len(orders) == 10


def test_every_singleton_can_make_it_into_the_sentence() -> None:
    data = batches(np.ones((1, N_GENES), int), length=10, batch_size=1, n_targets=(1, 1, 1))
    drawn = np.concatenate([step(data, i)["tokens"].ravel() for i in range(200)])
    found, times = np.unique(drawn, return_counts=True)
    assert set(found) == set(range(N_GENES))
    share = 10 / N_GENES
    np.testing.assert_allclose(times, 200 * share, atol=5 * np.sqrt(200 * share * (1 - share)))


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_a_function_of_its_number_and_the_seed(counts: np.ndarray) -> None:
    data = batches(counts)
    seven = step(data, 7)
    for again in (step(data, 7), step(batches(counts), 7)):
        for name, value in seven.items():
            np.testing.assert_array_equal(again[name], value)
    assert (step(data, 8)["target_tokens"] != seven["target_tokens"]).any()
    assert (step(batches(counts, seed=1), 7)["target_tokens"] != seven["target_tokens"]).any()


def test_training_shows_every_cell_once_a_pass(counts: np.ndarray) -> None:
    rows = np.random.default_rng(2).permutation(N_CELLS)[:21]
    data = batches(counts, rows=rows, batch_size=6)
    assert data.n_steps is None
    shown = np.concatenate([data.rows(i) for i in range(14)])
    passes = shown.reshape(4, 21)
    for one in passes:
        np.testing.assert_array_equal(np.sort(one), np.sort(rows))
    assert (passes[0] != passes[1]).any()
    np.testing.assert_array_equal(data.rows(3), shown[18:24])  # in whatever order steps are asked for
    # a batch of more cells than there are
    times = np.bincount(batches(counts, batch_size=60).rows(0))
    assert set(times) == {2, 3}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_a_step(counts: np.ndarray, world_size: int) -> None:
    for is_validation in (False, True):
        data = batches(counts, batch_size=6, is_validation=is_validation)
        whole = step(data, 2)
        shares = [step(data, 2, rank, world_size) for rank in range(world_size)]
        for name in ("tokens", "expression", "target_tokens", "targets", "dataset"):
            for rank, share in enumerate(shares):
                np.testing.assert_array_equal(share[name], whole[name][rank::world_size])


def test_validation_shows_every_cell_once_up_to_a_limit(counts: np.ndarray) -> None:
    data = batches(counts, batch_size=7, is_validation=True)
    assert data.n_steps == 4
    np.testing.assert_array_equal(np.concatenate([data.rows(i) for i in range(4)]), np.arange(N_CELLS))
    assert [len(data.step(3, rank, 5, CPU)["tokens"]) for rank in range(5)] == [1] * 5  # nobody goes without
    assert batches(counts, batch_size=1, is_validation=True).n_steps == MOST_VALIDATION_STEPS


def test_a_step_says_which_cells_it_shows(counts: np.ndarray) -> None:
    data = batches(counts, batch_size=6)
    names = [f"cell {row}" for row in data.rows(4)]
    assert data.describe(4) == f"cells {names[0]}, {names[1]}, {names[2]} and 3 more"
    assert batches(counts, batch_size=1).describe(0).startswith("cells cell ")
