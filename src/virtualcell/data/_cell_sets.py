"""Which rows go together in training: groups of cells, and the sets drawn from them. Row numbers only, no matrices."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_DRAWS = 32  # attempts to find control cells that no other pool of the set has given


@dataclass(frozen=True)
class CellGroups:
    """Cells of one perturbation in one context each, and the control cells that match every one of them.

    Parameters
    ----------
    perturbation, context
        Labels of each group.
    cells
        Rows of each group's cells.
    pool_of
        For each of these cells, the number of the pool that its control cell is drawn from.
    pools
        Rows of the control cells of one context and batch each.
    """

    perturbation: list[str]
    context: list[str]
    cells: list[np.ndarray]
    pool_of: list[np.ndarray]
    pools: list[np.ndarray]

    @classmethod
    def empty(cls) -> CellGroups:
        """Return no groups."""
        return cls([], [], [], [], [])

    def add(self, perturbation: str, context: str, cells: np.ndarray, pool_of: np.ndarray) -> None:
        """Append a group."""
        self.perturbation.append(perturbation)
        self.context.append(context)
        self.cells.append(cells)
        self.pool_of.append(pool_of)

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def sizes(self) -> np.ndarray:
        """Number of cells of each group, (n_groups,)."""
        return np.array([len(c) for c in self.cells], dtype=np.int64)

    def n_sets(self, set_size: int) -> int:
        """Return the number of sets in which every cell of every group has a place."""
        return int((-(-self.sizes // set_size)).sum())


class CellSets(NamedTuple):
    """B sets of S rows each: their groups (B,), perturbed and control cells (B, S)."""

    group: np.ndarray
    perturbed: np.ndarray
    control: np.ndarray


class SetSampler:
    """The sets of every training step, as a function of the step's number: there is no other state.

    Over all steps every cell is shown about equally often, whether its group is small or large, and every group at
    least once where there are as many sets as groups. The cells of a group are dealt from one shuffling after another,
    so that each comes again only when all have been, and none twice in a set of a group that fills it; a set of a
    smaller group holds all its cells equally often, or once more. Control cells are drawn for each perturbed cell from
    its own pool, without repeating one within a set as long as the pool lasts.

    Parameters
    ----------
    groups
        From :meth:`virtualcell.data._screen.Screen.groups`.
    set_size, sets_per_step
        Cells in a set; sets in a step, over all processes.
    n_steps
        Length of the run.
    seed
        Seed of all draws, together with the number of the step.

    Raises
    ------
    ValueError
        If there are no groups, or one without cells or control cells.
    """

    def __init__(self, groups: CellGroups, *, set_size: int, sets_per_step: int, n_steps: int, seed: int = 0) -> None:
        self._length = np.array([len(p) for p in groups.pools], dtype=np.int64)
        if not len(groups) or not groups.sizes.all() or not self._length.all():
            raise ValueError("there are no cells to draw sets from: no groups, or one without cells or controls.")
        self.groups, self.set_size, self.sets_per_step = groups, set_size, sets_per_step
        self.n_steps, self.seed = n_steps, seed
        self._group, self._turn = self._plan(np.random.default_rng([seed, 0]))
        self._start = np.cumsum(self._length) - self._length
        self._controls = np.concatenate(groups.pools).astype(np.int64)
        self._latest: dict[int, tuple[int, np.ndarray]] = {}  # the latest shuffling of each group, to be used again

    def _plan(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Group of every set of the run, in order, and which of its group's sets it is."""
        total, sizes = self.n_steps * self.sets_per_step, self.groups.sizes
        quota = total * sizes / sizes.sum()
        if total >= len(sizes):  # those that would have less than one set get one, at the expense of the others
            small = np.zeros(len(sizes), bool)
            while (new := (quota < 1) & ~small).any():
                small |= new
                quota[small] = 1
                quota[~small] = (total - small.sum()) * sizes[~small] / sizes[~small].sum()
        counts = np.floor(quota).astype(np.int64)
        # the sets that remain go to groups in proportion to their fractions: marks one apart, at a random place
        order = rng.permutation(len(sizes))
        marks = np.floor(np.cumsum((quota - counts)[order]) + rng.random()).astype(np.int64)
        marks[-1] = total - counts.sum()
        counts[order] += np.diff(np.minimum(marks, marks[-1]), prepend=0)
        group = np.repeat(np.arange(len(sizes)), counts)
        turn = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        place = (turn + rng.random(len(sizes))[group]) / counts[group]  # a group's sets lie evenly over the run
        at = np.argsort(place, kind="stable")
        return group[at], turn[at]

    def step(self, i: int) -> CellSets:
        """Return the sets of step `i`, from 0 to n_steps - 1."""
        if not 0 <= i < self.n_steps:
            raise IndexError(f"there is no step {i}: the run has {self.n_steps} steps.")
        rng = np.random.default_rng([self.seed, 1, i])
        sets = slice(i * self.sets_per_step, (i + 1) * self.sets_per_step)
        group = self._group[sets]
        at = np.stack([self._deal(g, k) for g, k in zip(group.tolist(), self._turn[sets].tolist(), strict=True)])
        at = rng.permuted(at, axis=1)
        perturbed = np.stack([self.groups.cells[g][a] for g, a in zip(group, at, strict=True)])
        pool = np.stack([self.groups.pool_of[g][a] for g, a in zip(group, at, strict=True)])
        return CellSets(group, perturbed, self._draw(pool, rng))

    def _deal(self, g: int, k: int) -> np.ndarray:
        """Places, within group `g`, of the cells of its set number `k`, (set_size,)."""
        n = len(self.groups.cells[g])
        whole, rest = divmod(self.set_size, n)
        places = [np.arange(whole * n) % n]
        if rest:
            first, start = divmod(k * rest, n)
            places.append(self._shuffled(g, first, n, rest)[start : start + rest])
            if (missing := start + rest - n) > 0:
                places.append(self._shuffled(g, first + 1, n, rest)[:missing])
        return np.concatenate(places)

    def _shuffled(self, g: int, which: int, n: int, size: int) -> np.ndarray:
        """Shuffle `n` cells for the time number `which`, to be dealt `size` at a time from shuffling after shuffling.

        The end of one and the beginning of the next go into the same set, where no cell may be twice: the next looks
        at the one before, as far back as where a set began with a shuffling.
        """
        number, places = self._latest.get(g, (-1, np.empty(0, np.int64)))
        if number == which:
            return places
        period = size // math.gcd(n, size)  # shufflings until a set begins with one
        if not which - which % period <= number < which:
            number = which - which % period - 1
        while number < which:
            number += 1
            last = number * n % size  # cells of the shuffling before that are in the first set of this one
            shuffled = np.random.default_rng([self.seed, 2, g, number]).permutation(n)
            if last:
                is_new = np.ones(n, bool)
                is_new[places[-last:]] = False
                is_new = is_new[shuffled]
                is_first = is_new & (np.cumsum(is_new) <= size - last)
                shuffled = np.concatenate([shuffled[is_first], shuffled[~is_first]])
            places = shuffled
        self._latest[g] = which, places
        return places

    def _draw(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw one control cell for every place from its pool, (B, S), all different within a set where they can be."""
        sets = np.repeat(np.arange(len(pool)), pool.shape[1])
        pool = pool.ravel()
        pairs, pair, wanted = np.unique(sets * len(self._length) + pool, return_inverse=True, return_counts=True)
        length = self._length[pairs % len(self._length)]  # of the pool of each set and pool that go together
        is_scarce = (2 * wanted > length)[pair]  # so few that drawing again would take long: dealt from a shuffling
        place = (rng.random(len(pool)) * length[pair]).astype(np.int64)
        place[is_scarce] = _dealt(pair[is_scarce], length, rng)
        width = max(len(self._controls), self._controls.max() + 1)
        for attempt in itertools.count():
            row = self._controls[self._start[pool] + place]
            # stand-ins are in two pools, which may leave no other cell to draw: then each pool is by itself
            drawn = row if attempt < _DRAWS else self._start[pool] + place
            again = _repeated(sets * width + drawn, is_scarce) & ~is_scarce
            if not again.any():
                break
            place[again] = (rng.random(again.sum()) * length[pair[again]]).astype(np.int64)
        return row.reshape(-1, self.set_size)


def _dealt(pair: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each of `pair`, a place below its `length`, which comes again only when all have been."""
    kinds, kind, count = np.unique(pair, return_inverse=True, return_counts=True)
    length = length[kinds]
    start = np.cumsum(length) - length
    owner = np.repeat(np.arange(len(kinds)), length)
    order = np.lexsort((rng.random(len(owner)), owner))  # each one's places, shuffled
    rank = np.empty(len(pair), np.int64)
    rank[np.argsort(kind, kind="stable")] = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count)
    return order[start[kind] + rank % length[kind]] - start[kind]


def _repeated(key: np.ndarray, is_first: np.ndarray) -> np.ndarray:
    """Mark what has occurred before, where those of `is_first` come before the others."""
    order = np.lexsort((~is_first, key))
    out = np.zeros(len(key), bool)
    out[order[1:]] = key[order[1:]] == key[order[:-1]]
    return out
