from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from virtualcell.data._sentence_batches import RowBatchSampler, SentenceDataset
from virtualcell.data._sentences import sentences

N_CELLS, N_GENES, LENGTH = 25, 80, 20
P, N, S = 12, 7, 9


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(0.6, (N_CELLS, N_GENES))


@pytest.fixture
def tokens() -> np.ndarray:
    """Rows of a gene table of 200, none for 15 genes."""
    rng = np.random.default_rng(1)
    tokens = rng.permutation(200)[:N_GENES]
    tokens[rng.permutation(N_GENES)[:15]] = -1
    return tokens


def dataset(counts: np.ndarray, tokens: np.ndarray, **options: object) -> SentenceDataset:
    matrix = sparse.csr_matrix(np.log1p(counts).astype(np.float32))
    if "n_targets" in options:
        options.setdefault("dataset", np.arange(len(counts)) % 3)
    return SentenceDataset(matrix, tokens, options.pop("length", LENGTH), **options)


def test_inference_sentences_and_expression(counts: np.ndarray, tokens: np.ndarray) -> None:
    rows = np.array([4, 0, 24])
    data = dataset(counts, tokens)
    batch = data[rows]
    assert set(batch) == {"tokens", "expression"}
    expected, values = sentences(data.matrix[rows], tokens, LENGTH)
    np.testing.assert_array_equal(batch["tokens"], expected)
    embedded = np.log1p(counts[rows][:, tokens >= 0]).sum(axis=1)
    np.testing.assert_allclose(batch["expression"], 100 * values / embedded[:, None], rtol=1e-5)
    # percent of the cell: a sentence that holds every expressed gene adds up to 100
    whole = dataset(counts, tokens, length=N_GENES)[rows]
    np.testing.assert_allclose(whole["expression"].sum(1), 100, rtol=1e-5)
    for again in (data[rows], dataset(counts, tokens, seed=7)[rows]):
        np.testing.assert_array_equal(again["tokens"], batch["tokens"])


def test_cell_without_embedded_genes_is_all_padding(counts: np.ndarray, tokens: np.ndarray) -> None:
    counts[3, tokens >= 0] = 0
    batch = dataset(counts, tokens)[np.array([3])]
    assert (batch["tokens"] == -1).all()
    assert (batch["expression"] == 0).all()


def test_targets_are_expressed_unexpressed_and_shared_genes_with_their_values(
    counts: np.ndarray, tokens: np.ndarray
) -> None:
    rows = np.random.default_rng(2).permutation(N_CELLS)[:10]
    batch = dataset(counts, tokens, n_targets=(P, N, S))[rows]
    assert batch["targets"].shape == batch["target_tokens"].shape == (10, P + N + S)
    assert int(batch["n_shared"]) == S
    np.testing.assert_array_equal(batch["dataset"], rows % 3)
    column = {int(t): i for i, t in enumerate(tokens) if t >= 0}
    for row, target_tokens, targets in zip(rows, batch["target_tokens"].numpy(), batch["targets"].numpy(), strict=True):
        expected = [np.log1p(counts[row, column[int(t)]]) for t in target_tokens]
        np.testing.assert_allclose(targets, expected, rtol=1e-6)
        n_expressed = (counts[row, tokens >= 0] > 0).sum()
        assert n_expressed > P
        assert len(set(target_tokens[:P])) == P
        assert len(set(target_tokens[P : P + N])) == N
    assert (batch["targets"][:, :P] > 0).all()
    assert (batch["targets"][:, P : P + N] == 0).all()
    shared = batch["target_tokens"][:, P + N :]
    assert (shared == shared[0]).all()
    assert len(set(shared[0].tolist())) == S
    assert (batch["targets"][:, P + N :] > 0).any()


def test_few_expressed_genes_are_repeated_evenly(counts: np.ndarray, tokens: np.ndarray) -> None:
    embedded = np.flatnonzero(tokens >= 0)
    counts[0] = 0
    counts[0, embedded[:5]] = 3
    counts[1, embedded] += 1
    counts[1, embedded[:2]] = 0
    batch = dataset(counts, tokens, n_targets=(12, 7, 0))[np.array([0, 1])]
    drawn = np.unique(batch["target_tokens"][0, :12], return_counts=True)
    assert set(drawn[0]) == set(tokens[embedded[:5]])
    assert set(drawn[1]) == {2, 3}
    assert set(batch["target_tokens"][1, 12:].tolist()) == set(tokens[embedded[:2]])
    # more targets than genes
    many = dataset(counts, tokens, n_targets=(100, 100, 100))[np.array([2, 4])]
    assert (many["targets"][:, :100] > 0).all()
    assert (many["targets"][:, 100:200] == 0).all()
    assert many["targets"].shape == (2, 300)


def test_each_cell_draws_its_own_targets_and_all_genes_have_their_turn(counts: np.ndarray, tokens: np.ndarray) -> None:
    counts = np.tile(counts[:1], (N_CELLS, 1))
    data = dataset(counts, tokens, n_targets=(P, N, S))
    batch = data[np.arange(N_CELLS)]
    assert len({tuple(sorted(row)) for row in batch["target_tokens"][:, :P].tolist()}) > N_CELLS / 2
    expressed = {int(t) for t, c in zip(tokens, counts[0], strict=True) if c > 0 and t >= 0}
    rng = np.random.default_rng(0)  # an epoch puts other cells together
    drawn = np.concatenate([data[rng.permutation(N_CELLS)]["target_tokens"][:, :P].ravel() for _ in range(20)])
    found, times = np.unique(drawn, return_counts=True)
    assert set(found) == expressed
    # uniform: each of n genes in P / n of the 20 x 25 draws, within five standard deviations
    share = P / len(expressed)
    spread = np.sqrt(20 * N_CELLS * share * (1 - share))
    np.testing.assert_allclose(times, 20 * N_CELLS * share, atol=5 * spread)


def test_seed_decides(counts: np.ndarray, tokens: np.ndarray) -> None:
    rows = np.arange(5)
    a, b, c = (dataset(counts, tokens, n_targets=(P, N, S), seed=seed) for seed in (0, 0, 1))
    first = a[rows]
    for name, value in b[rows].items():
        np.testing.assert_array_equal(value, first[name])
    assert (c[rows]["target_tokens"] != first["target_tokens"]).any()
    # the same cells together give the same batch again, so that validation looks at the same targets every time
    np.testing.assert_array_equal(a[rows]["target_tokens"], first["target_tokens"])
    assert (a[rows[::-1].copy()]["target_tokens"].flip(0) != first["target_tokens"]).any()


def test_equal_counts_come_in_random_order_and_unequal_ones_in_theirs(tokens: np.ndarray) -> None:
    # counts that differ by one, up to those of MALAT1 or of mitochondrial genes, each three times
    embedded = np.flatnonzero(tokens >= 0)
    counts = np.zeros((1, N_GENES), int)
    levels = np.concatenate([np.arange(1, 11), np.arange(20_000, 20_010)])
    counts[0, embedded[:60]] = np.repeat(levels, 3)
    value = {int(tokens[g]): counts[0, g] for g in embedded[:60]}
    total = np.log1p(counts).sum()
    orders = set()
    for seed in range(10):
        data = dataset(counts, tokens, n_targets=(1, 1, 1), length=60, seed=seed)
        batch = data[np.array([0])]
        order = [int(t) for t in batch["tokens"][0]]
        orders.add(tuple(order))
        np.testing.assert_array_equal([value[t] for t in order], np.sort(np.repeat(levels, 3))[::-1])
        expected = 100 * np.log1p([value[t] for t in order]) / total
        np.testing.assert_allclose(batch["expression"][0], expected, rtol=2e-6)
    assert len(orders) == 10


def test_every_singleton_can_make_it_into_the_sentence(tokens: np.ndarray) -> None:
    counts = (tokens >= 0)[None].astype(int)
    datasets = [dataset(counts, tokens, n_targets=(1, 1, 1), length=10, seed=seed) for seed in range(200)]
    drawn = np.concatenate([data[np.array([0])]["tokens"].ravel() for data in datasets])
    found, times = np.unique(drawn, return_counts=True)
    assert set(found) == set(tokens[tokens >= 0])
    share = 10 / (tokens >= 0).sum()
    np.testing.assert_allclose(times, 200 * share, atol=5 * np.sqrt(200 * share * (1 - share)))


def test_the_matrix_is_not_changed(counts: np.ndarray, tokens: np.ndarray) -> None:
    data = dataset(counts, tokens, n_targets=(P, N, S))
    before = data.matrix.copy()
    data[np.arange(N_CELLS)]["targets"][:] = -1
    assert (before != data.matrix).nnz == 0


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n_rows", [1, 12, 13])
def test_every_row_once_an_epoch(n_rows: int, shuffle: bool) -> None:
    rows = np.arange(100, 100 + n_rows)
    sampler = RowBatchSampler(rows, 4, shuffle=shuffle)
    batches = list(sampler)
    assert len(sampler) == len(batches) == -(-n_rows // 4)
    assert all(len(batch) == 4 for batch in batches[:-1])
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), rows)


def test_order_is_kept_or_drawn_by_seed_and_epoch() -> None:
    rows = np.random.default_rng(0).permutation(30)
    np.testing.assert_array_equal(np.concatenate(list(RowBatchSampler(rows, 7, shuffle=False))), rows)
    one, same, other = (RowBatchSampler(rows, 7, shuffle=True, seed=s) for s in (0, 0, 1))
    epochs = [np.concatenate(list(one)).tolist() for _ in range(2)]
    assert epochs == [np.concatenate(list(same)).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert np.concatenate(list(other)).tolist() != epochs[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows(world_size: int) -> None:
    rows = np.arange(50)
    alone = list(RowBatchSampler(rows, 4, shuffle=True))
    samplers = [RowBatchSampler(rows, 4, shuffle=True, rank=r, world_size=world_size) for r in range(world_size)]
    drawn = [list(s) for s in samplers]
    assert [len(s) for s in samplers] == [len(d) for d in drawn] == [13 // world_size] * world_size
    interleaved = [batch for step in zip(*drawn, strict=True) for batch in step]
    for ours, theirs in zip(interleaved, alone, strict=False):
        np.testing.assert_array_equal(ours, theirs)


def test_habits_of_the_published_models_hold_in_training_too(counts: np.ndarray, tokens: np.ndarray) -> None:
    rows, cls = np.array([3, 1]), np.arange(N_CELLS, dtype=np.float32)
    options = {"n_targets": (P, N, S), "length": (tokens >= 0).sum()}
    plain = dataset(counts, tokens, **options)[rows]
    habits = dataset(counts, tokens, **options, fill=True, cls_expression=cls)[rows]
    assert "cls_expression" not in plain
    np.testing.assert_array_equal(habits["cls_expression"], [3, 1])
    padding = plain["tokens"] < 0
    assert padding.any()
    assert (habits["tokens"] >= 0).all()
    assert torch.equal(habits["tokens"][~padding], plain["tokens"][~padding])
    for row, sentence, empty in zip(rows, habits["tokens"], padding, strict=True):
        expressed = set(tokens[(counts[row] > 0) & (tokens >= 0)].tolist())
        assert not set(sentence[empty].tolist()) & expressed
