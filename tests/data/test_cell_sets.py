from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import sparse

from virtualcell.data import _cell_sets
from virtualcell.data._cell_sets import CellGroup, CellSet, CellSetDataset, CellSetSampler, Rows, cell_groups

N = 120


@pytest.fixture
def screen() -> dict[str, np.ndarray]:
    """120 cells: 3 perturbations and controls in 2 contexts and 3 batches, names in an order of their own."""
    rng = np.random.default_rng(0)
    return {
        "perturbation": rng.choice(["A", "B", "A+B", "ctrl"], N, p=[0.2, 0.2, 0.2, 0.4]),
        "context": rng.choice(["T", "NK"], N),
        "batch": rng.integers(3, size=N),
        "order": np.array([f"cell{i}" for i in rng.permutation(N)]),
    }


def groups_of(screen: dict, **options: object) -> list[CellGroup]:
    given = {k: v for k, v in screen.items() if k not in options}
    return cell_groups(**given, control="ctrl", **options)


def test_every_target_cell_is_in_one_group_of_its_own_labels(screen: dict) -> None:
    groups = groups_of(screen)
    for g in groups:
        assert len(g.perturbed) > 0
        assert set(screen["perturbation"][g.perturbed]) == {g.perturbation}
        for rows in (g.perturbed, g.control):
            assert set(screen["context"][rows]) == {g.context}
            assert set(screen["batch"][rows]) == {g.batch}
    np.testing.assert_array_equal(np.sort(np.concatenate([g.perturbed for g in groups])), np.arange(N))


def test_controls_are_all_that_match(screen: dict) -> None:
    for g in groups_of(screen):
        where = (screen["perturbation"] == "ctrl") & (screen["context"] == g.context) & (screen["batch"] == g.batch)
        np.testing.assert_array_equal(np.sort(g.control), np.flatnonzero(where))


def test_without_batches_controls_are_those_of_the_context(screen: dict) -> None:
    groups = groups_of(screen, batch=None)
    assert [(g.context, g.perturbation, g.batch) for g in groups] == [
        (c, p, 0) for c in ("NK", "T") for p in ("A", "A+B", "B", "ctrl")
    ]
    for g in groups:
        where = (screen["perturbation"] == "ctrl") & (screen["context"] == g.context)
        np.testing.assert_array_equal(np.sort(g.control), np.flatnonzero(where))


def test_target_and_source_limit_what_is_predicted_and_drawn(screen: dict) -> None:
    target, source = np.arange(N) < 60, np.arange(N) % 2 == 0
    groups = groups_of(screen, target=target, source=source, batch=None)
    np.testing.assert_array_equal(np.sort(np.concatenate([g.perturbed for g in groups])), np.arange(60))
    assert all((g.control % 2 == 0).all() for g in groups)
    # drawn controls need not be targets
    assert any((g.control >= 60).any() for g in groups)
    assert groups_of(screen, target=np.zeros(N, bool)) == []


def test_order_of_cells_in_the_file_changes_nothing(screen: dict) -> None:
    shuffle = np.random.default_rng(1).permutation(N)
    moved = {k: v[shuffle] for k, v in screen.items()}
    a, b = groups_of(screen), groups_of(moved)
    assert len(a) == len(b)
    for g, h in zip(a, b, strict=True):
        assert (g.perturbation, g.context, g.batch) == (h.perturbation, h.context, h.batch)
        # the same cells in the same order
        np.testing.assert_array_equal(screen["order"][g.perturbed], moved["order"][h.perturbed])
        np.testing.assert_array_equal(screen["order"][g.control], moved["order"][h.control])
    sets = [
        [
            (s.perturbation, list(data["order"][s.control]), list(data["order"][s.perturbed]))
            for batch in CellSetSampler(groups, set_size=4, sets_per_batch=3, seed=5)
            for s in batch
        ]
        for groups, data in ((a, screen), (b, moved))
    ]
    assert sets[0] == sets[1]


def test_batch_without_controls_takes_those_of_its_context_and_says_so(
    screen: dict, caplog: pytest.LogCaptureFixture
) -> None:
    in_batch = screen["batch"] == 1
    in_batch &= screen["context"] == "T"
    screen["perturbation"][in_batch & (screen["perturbation"] == "ctrl")] = "A"
    with caplog.at_level(logging.WARNING):
        groups = groups_of(screen)
    assert f"{in_batch.sum()} cells lie in batches without control cells" in caplog.text
    pool = np.flatnonzero((screen["perturbation"] == "ctrl") & (screen["context"] == "T"))
    changed = [g for g in groups if (g.context, g.batch) == ("T", 1)]
    assert changed
    for g in changed:
        np.testing.assert_array_equal(np.sort(g.control), pool)
    caplog.clear()
    groups_of(screen, batch=None)
    assert caplog.text == ""


def test_context_without_controls_is_an_error(screen: dict) -> None:
    screen["perturbation"][(screen["perturbation"] == "ctrl") & (screen["context"] == "NK")] = "A"
    with pytest.raises(ValueError, match=r"context 'NK' has no control cells \('ctrl'\).*Drop it or add controls"):
        groups_of(screen)
    # a context that is not to be predicted needs none
    groups_of(screen, target=screen["context"] == "T")


# -- the sampler ------------------------------------------------------------------------------------------------------


def sampler(groups: list[CellGroup], **options: object) -> CellSetSampler:
    return CellSetSampler(groups, **{"set_size": 8, "sets_per_batch": 4, **options})


def rows_of(batches: list[list[CellSet]]) -> list[tuple]:
    return [(s.perturbation, *s.control, *s.perturbed) for batch in batches for s in batch]


def test_one_pass_shows_every_target_cell_and_repeats_only_to_fill_sets(screen: dict) -> None:
    groups = groups_of(screen)
    batches = list(sampler(groups))
    sets = [s for batch in batches for s in batch]
    assert {len(batch) for batch in batches[:-1]} == {4}
    seen = np.bincount(np.concatenate([s.perturbed for s in sets]), minlength=N)
    assert (seen >= 1).all()
    assert seen.sum() == sum(-(-len(g.perturbed) // 8) * 8 for g in groups)
    big = [g for g in groups if len(g.perturbed) >= 8]
    assert big
    for g in big:  # filled up without repeating a cell twice
        assert seen[g.perturbed].max() <= 2
    for s in sets:
        assert len(s.control) == len(s.perturbed) == 8
        assert set(screen["perturbation"][s.control]) == {"ctrl"}
        assert set(screen["perturbation"][s.perturbed]) == {s.perturbation}
        for key in ("context", "batch"):
            assert len(set(screen[key][np.concatenate([s.control, s.perturbed])])) == 1
        assert set(screen["batch"][s.control]) == {s.batch}


def test_controls_are_drawn_without_replacement_where_there_are_enough(screen: dict) -> None:
    for batch in sampler(groups_of(screen, batch=None), set_size=16):
        for s in batch:
            assert len(set(s.control)) == 16
    few = [CellGroup("A", "T", 0, np.arange(10), np.array([20, 21]))]
    assert {len(s.control) for batch in sampler(few) for s in batch} == {8}
    assert {row for batch in sampler(few) for s in batch for row in s.control} == {20, 21}


def test_every_control_of_the_pool_is_drawn_in_time() -> None:
    group = [CellGroup("A", "T", 0, np.arange(10), np.arange(50, 90))]
    one = sampler(group)
    drawn = {row for _ in range(40) for batch in one for s in batch for row in s.control}
    assert drawn == set(range(50, 90))


def test_seed_and_epoch_decide(screen: dict) -> None:
    groups = groups_of(screen)
    one, same, other = sampler(groups, seed=3), sampler(groups, seed=3), sampler(groups, seed=4)
    first = [rows_of(one), rows_of(one)]
    assert first == [rows_of(same), rows_of(same)]
    assert first[0] != first[1]
    assert rows_of(other) != first[0]
    # the global generators play no part
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert rows_of(sampler(groups, seed=3)) == first[0]


def test_fixed_sets_are_the_same_every_epoch(screen: dict) -> None:
    one = sampler(groups_of(screen), fixed=True)
    assert rows_of(one) == rows_of(one)


def test_passes_are_repeated_up_to_min_batches(screen: dict) -> None:
    groups = groups_of(screen)
    once, long = sampler(groups), sampler(groups, min_batches=50)
    assert len(long) >= 50
    assert len(long) == len(list(long))
    # whole passes: every cell as often as any other of its group, and no pass more than needed
    n_sets = sum(len(batch) for batch in once)
    assert long.n_passes == -(-50 * 4 // n_sets)
    assert len(rows_of(long)) == n_sets * long.n_passes
    # every pass is drawn anew
    passes = [rows_of(long)[i : i + n_sets] for i in range(0, 2 * n_sets, n_sets)]
    assert sorted(passes[0]) != sorted(passes[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches(screen: dict, world_size: int) -> None:
    groups = groups_of(screen)
    alone = rows_of(sampler(groups))
    shares = [sampler(groups, rank=r, world_size=world_size) for r in range(world_size)]
    drawn = [list(s) for s in shares]
    assert len({len(d) for d in drawn}) == 1
    assert [len(s) for s in shares] == [len(d) for d in drawn]
    # together they are what one process would see, but for a last incomplete round
    interleaved = [batch for step in zip(*drawn, strict=True) for batch in step]
    assert rows_of(interleaved) == alone[: len(rows_of(interleaved))]
    assert len(interleaved) > len(sampler(groups)) - world_size


def test_nothing_to_sample() -> None:
    assert len(sampler([])) == 0
    assert list(sampler([])) == []


# -- rows and tensors -------------------------------------------------------------------------------------------------


def test_dense_and_sparse_rows_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = np.random.default_rng(0).poisson(0.5, (30, 11)).astype(np.float64)
    index = np.array([[3, 3, 0], [29, 7, 1]])
    kept_dense = Rows(sparse.csr_matrix(dense))
    monkeypatch.setattr(_cell_sets, "_DENSE_BYTES", 0)
    kept_sparse = Rows(sparse.csr_matrix(dense))
    assert sparse.issparse(kept_sparse.matrix)
    assert not sparse.issparse(kept_dense.matrix)
    for rows in (Rows(dense), kept_dense, kept_sparse):
        assert rows.shape == (30, 11)
        assert rows[index].dtype == torch.float32
        np.testing.assert_array_equal(rows[index].numpy(), dense[index])
        np.testing.assert_array_equal(rows[np.array([5, 2])].numpy(), dense[[5, 2]])
        # a batch may be written to without reaching the matrix
        rows[index][:] = -1
        np.testing.assert_array_equal(rows[index].numpy(), dense[index])


def test_tensors_of_a_batch_of_sets(screen: dict) -> None:
    matrix = np.random.default_rng(0).random((N, 6), dtype=np.float32)
    genes = np.random.default_rng(1).random((N, 9), dtype=np.float32)
    names = ["A", "A+B", "B", "ctrl"]
    dataset = CellSetDataset(Rows(matrix), lambda p: torch.eye(4)[[names.index(x) for x in p]], Rows(genes))
    sets = next(iter(sampler(groups_of(screen), seed=2)))
    batch = dataset[sets]
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "control": (4, 8, 6),
        "perturbed": (4, 8, 6),
        "perturbation": (4, 4),
        "batch": (4,),
        "genes": (4, 8, 9),
    }
    for i, s in enumerate(sets):
        np.testing.assert_array_equal(batch["control"][i], matrix[s.control])
        np.testing.assert_array_equal(batch["perturbed"][i], matrix[s.perturbed])
        np.testing.assert_array_equal(batch["genes"][i], genes[s.perturbed])
        assert names[int(batch["perturbation"][i].argmax())] == s.perturbation
        assert int(batch["batch"][i]) == s.batch
    assert "genes" not in CellSetDataset(Rows(matrix), dataset.encode)[sets]


def test_sets_of_a_pass_come_in_random_order(screen: dict) -> None:
    order = [s.perturbation for batch in sampler(groups_of(screen, batch=None), set_size=2) for s in batch]
    assert sum(a != b for a, b in pairwise(order)) > len(order) / 3
