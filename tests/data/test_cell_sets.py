from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from virtualcell.data._cell_sets import CellGroups, CellSets, SetSampler


def make_groups(sizes: Sequence[int], pools: Sequence[int] = (500,), seed: int = 0) -> CellGroups:
    """Groups of so many cells, each matched to one of the pools at random; pools have the first rows."""
    ends = np.cumsum([0, *pools, *sizes])
    rows = np.split(np.arange(ends[-1]), ends[1:-1])
    pool_of = np.random.default_rng(seed).integers(len(pools), size=int(sum(sizes)))
    cut = np.split(pool_of, np.cumsum(sizes)[:-1])
    names = [f"p{i}" for i in range(len(sizes))]
    return CellGroups(names, ["A"] * len(sizes), rows[len(pools) :], cut, rows[: len(pools)])


def sampler(groups: CellGroups, **options: int) -> SetSampler:
    return SetSampler(groups, **{"set_size": 64, "sets_per_step": 8, "n_steps": 100, **options})


def steps(one: SetSampler) -> list[CellSets]:
    return [one.step(i) for i in range(one.n_steps)]


def sets(found: list[CellSets]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for step in found:
        yield from zip(step.group.tolist(), step.perturbed, step.control, strict=True)


def times_seen(groups: CellGroups, found: list[CellSets]) -> list[np.ndarray]:
    """How often each cell is shown, by group."""
    seen = np.bincount(np.concatenate([s.perturbed.ravel() for s in found]), minlength=groups.cells[-1].max() + 1)
    return [seen[cells] for cells in groups.cells]


MIXED = [65, 64, 63, 1, 2, 100, 1000, 128, 129]


# -- how often --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_size", [64, 10, 1])
def test_every_cell_is_shown_about_equally_often(set_size: int) -> None:
    groups = make_groups(MIXED)
    found = steps(sampler(groups, set_size=set_size, n_steps=200))
    seen = times_seen(groups, found)
    expected = 200 * 8 * set_size / sum(MIXED)
    for size, times in zip(MIXED, seen, strict=True):
        assert np.ptp(times) <= 1  # within a group, to the set
        # a group has a whole number of sets; one cell alone is at least in one, with all its places
        assert abs(times.mean() - expected) <= max(set_size / size, 1e-9)


def test_small_groups_among_large_ones() -> None:
    """The former sampler showed a cell of 5 twelve times as often as one of 640."""
    groups = make_groups([640] * 10 + [5] * 10)
    seen = times_seen(groups, steps(sampler(groups, n_steps=1000)))
    large, small = np.concatenate(seen[:10]).mean(), np.concatenate(seen[10:]).mean()
    assert abs(small / large - 1) < 0.02


def test_many_batches_neither_shatter_sets_nor_make_steps() -> None:
    """200 perturbations of 120 cells in 48 batches: sets are full of cells that differ, and as many as without."""
    alone, many = make_groups([120] * 200, [4800]), make_groups([120] * 200, [100] * 48)
    assert many.n_sets(64) == alone.n_sets(64) == 400
    for _, perturbed, control in sets(steps(sampler(many, n_steps=50))):
        assert len(set(perturbed)) == len(set(control)) == 64


@pytest.mark.parametrize(("n_groups", "n_steps"), [(800, 100), (799, 100), (500, 63), (30, 4)])
def test_every_group_is_shown_where_there_are_as_many_sets(n_groups: int, n_steps: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        groups = make_groups(np.where(rng.random(n_groups) < 0.1, 1000, rng.integers(1, 6, n_groups)), seed=seed)
        one = sampler(groups, n_steps=n_steps, set_size=4, seed=seed)
        shown = Counter(np.concatenate([s.group for s in steps(one)]).tolist())
        assert len(shown) == n_groups
        assert sum(shown.values()) == 8 * n_steps


def test_a_run_shorter_than_the_groups_are_many_shows_some_of_them() -> None:
    groups = make_groups([5] * 300 + [50] * 30)
    shown = Counter(np.concatenate([s.group for s in steps(sampler(groups, n_steps=5))]).tolist())
    assert sum(shown.values()) == 40
    many = [Counter(np.concatenate([s.group for s in steps(sampler(groups, n_steps=5, seed=i))])) for i in range(20)]
    n_large = sum(n for shown in many for g, n in shown.items() if g >= 300)
    assert 0.4 < n_large / 800 < 0.6  # half of all cells are in large groups
    assert len(set().union(*many)) > 200


def test_sets_of_a_group_lie_all_over_the_run() -> None:
    groups = make_groups([640, 64, 64, 640])
    group = np.concatenate([s.group for s in steps(sampler(groups))])
    for g in range(4):
        at = np.flatnonzero(group == g) / len(group)
        np.testing.assert_allclose(at, (np.arange(len(at)) + 0.5) / len(at), atol=1.5 / len(at) + 0.01)


# -- what goes together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pools", [[500], [64], [63], [1], [200, 1, 40, 3], [2] * 48, [100] * 48])
def test_a_set_is_of_one_group_and_its_controls_of_the_right_pools(pools: list[int]) -> None:
    groups = make_groups(MIXED, pools)
    pool_of = {row: k for cells, of in zip(groups.cells, groups.pool_of, strict=True) for row, k in zip(cells, of)}  # noqa: B905
    for g, perturbed, control in sets(steps(sampler(groups))):
        n, shown = len(groups.cells[g]), Counter(perturbed.tolist())
        assert set(shown) <= set(groups.cells[g])
        assert max(shown.values()) == -(-64 // n)
        assert len(shown) == min(n, 64)
        pool = np.array([pool_of[row] for row in perturbed])
        for k in set(pool):
            drawn = Counter(control[pool == k].tolist())
            assert set(drawn) <= set(groups.pools[k])
            assert max(drawn.values()) <= -(-(pool == k).sum() // len(groups.pools[k]))


def test_every_control_cell_is_drawn_about_equally_often() -> None:
    groups = make_groups([640] * 3, [100, 40, 20, 7])
    pool = np.concatenate(groups.pool_of)
    drawn = np.bincount(np.concatenate([s.control.ravel() for s in steps(sampler(groups, n_steps=400))]))
    for k, rows in enumerate(groups.pools):
        expected = 400 * 8 * 64 * (pool == k).mean() / len(rows)
        np.testing.assert_allclose(drawn[rows], expected, rtol=6 / np.sqrt(expected))


def test_pools_that_overlap_do_not_repeat_a_control_cell_either() -> None:
    """Controls of a whole context stand in for a batch without any, beside those of the other batches."""
    groups = CellGroups.empty()
    groups.pools.extend([np.arange(100), np.arange(60), np.arange(60, 100)])
    groups.add("A", "T", np.arange(1000, 1300), np.random.default_rng(0).integers(3, size=300))
    for _, _, control in sets(steps(sampler(groups, set_size=40))):
        assert len(set(control)) == 40
    # where there are too few for that, it comes to an end all the same, and no pool repeats its own
    few = CellGroups.empty()
    few.pools.extend([np.arange(20), np.arange(15)])
    few.add("A", "T", np.arange(1000, 1025), np.repeat([0, 1], [10, 15]))
    for _, perturbed, control in sets(steps(sampler(few, set_size=25))):
        assert len(set(control[perturbed < 1010])) == 10
        assert len(set(control[perturbed >= 1010])) == 15


def test_sets_are_drawn_anew() -> None:
    groups = make_groups([130, 200])
    found = list(sets(steps(sampler(groups))))
    assert len({tuple(sorted(p)) for _, p, _ in found}) == len(found)
    # cells are in no order of their own, nor is a cell of a small group in the same place again
    small = [p for _, p, _ in sets(steps(sampler(make_groups([9]), set_size=20)))]
    assert len({p[0] for p in small}) == 9


# -- a function of the step -------------------------------------------------------------------------------------------


def same(a: CellSets, b: CellSets) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_step_is_a_function_of_its_number() -> None:
    groups = make_groups(MIXED, [200, 1, 40, 3])
    one = sampler(groups, seed=3)
    expected = steps(one)
    for i in (99, 3, 50, 3, 0, 51, 98):
        assert same(one.step(i), expected[i])
        assert same(sampler(groups, seed=3).step(i), expected[i])
    backwards = sampler(groups, seed=3)
    assert all(same(backwards.step(i), expected[i]) for i in range(99, -1, -1))
    # the global generator plays no part, the seed does
    np.random.seed(1)  # noqa: NPY002
    assert same(sampler(groups, seed=3).step(5), expected[5])
    assert not same(sampler(groups, seed=4).step(5), expected[5])
    assert not same(expected[5], expected[6])


def test_there_is_no_step_outside_the_run() -> None:
    one = sampler(make_groups([5]), n_steps=3)
    for i in (-1, 3):
        with pytest.raises(IndexError, match=rf"there is no step {i}: the run has 3 steps"):
            one.step(i)


def test_nothing_to_draw_from() -> None:
    for groups in (CellGroups.empty(), make_groups([5, 0]), make_groups([5], [3, 0])):
        with pytest.raises(ValueError, match="no cells to draw sets from"):
            sampler(groups)


def test_many_groups_are_planned_in_a_moment() -> None:
    groups = make_groups([5] * 200_000)
    start = time.perf_counter()
    one = sampler(groups, n_steps=25_000)
    first = one.step(0)
    assert time.perf_counter() - start < 5  # a quarter of a second where nothing else runs
    assert first.perturbed.shape == first.control.shape == (8, 64)
    assert len(set(first.group)) == 8
