"""Which rows go together in training: groups of cells, and the sets drawn from them. Row numbers only, no matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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
        """Cells of each group, (n_groups,)."""
        return np.array([len(c) for c in self.cells], dtype=np.int64)

    def n_sets(self, set_size: int) -> int:
        """Sets in which every cell of every group has a place."""
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
    so that each comes again only when all have been; a group smaller than a set is dealt several times over. Control
    cells are drawn for each perturbed cell from its own pool, without repeating one within a set as long as the pool
    lasts.

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
    """

    def __init__(
        self, groups: CellGroups, *, set_size: int, sets_per_step: int, n_steps: int, seed: int = 0
    ) -> None:
        self.groups, self.set_size, self.sets_per_step = groups, set_size, sets_per_step
        self.n_steps, self.seed = n_steps, seed
        self._group, self._turn = self._plan(np.random.default_rng([seed, 0]))
        self._length = np.array([len(p) for p in groups.pools], dtype=np.int64)
        self._start = np.cumsum(self._length) - self._length
        self._controls = np.concatenate([np.empty(0, np.int64), *groups.pools]).astype(np.int64)
        self._dealt: dict[int, tuple[int, np.ndarray]] = {}  # the latest shuffling of each group, to be used again

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
        order = rng.permutation(len(sizes))
        counts = np.empty(len(sizes), np.int64)
        counts[order] = np.diff(np.floor(np.cumsum(quota[order]) + rng.random()), prepend=0)
        counts[order[-1]] += total - counts.sum()  # rounding of the last edge
        group = np.repeat(np.arange(len(sizes)), counts)
        turn = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        place = (turn + rng.random(len(sizes))[group]) / counts[group]  # a group's sets lie evenly over the run
        at = np.argsort(place, kind="stable")
        return group[at], turn[at]

    def step(self, i: int) -> CellSets:
        """Return the sets of step `i`, from 0 to n_steps - 1."""
        sets = slice(i * self.sets_per_step, (i + 1) * self.sets_per_step)
        group = self._group[sets]
        at = np.stack([self._deal(g, k) for g, k in zip(group, self._turn[sets], strict=True)])
        perturbed = np.stack([self.groups.cells[g][a] for g, a in zip(group, at, strict=True)])
        pool = np.stack([self.groups.pool_of[g][a] for g, a in zip(group, at, strict=True)])
        return CellSets(group, perturbed, self._draw(pool, np.random.default_rng([self.seed, 1, i])))

    def _deal(self, g: int, k: int) -> np.ndarray:
        """Places, within group `g`, of the cells of its set number `k`, (set_size,)."""
        n, s = len(self.groups.cells[g]), self.set_size
        length = -(-s // n) * n  # one or more shufflings, dealt as one
        first, rest = divmod(k * s, length)
        dealt = self._shuffled(g, first, n, length)[rest : rest + s]
        return dealt if len(dealt) == s else np.concatenate([dealt, self._shuffled(g, first + 1, n, length)[: s - len(dealt)]])

    def _shuffled(self, g: int, which: int, n: int, length: int) -> np.ndarray:
        number, places = self._dealt.get(g, (-1, None))
        if number != which:
            rng = np.random.default_rng([self.seed, 2, g, which])
            places = rng.permuted(np.tile(np.arange(n), (length // n, 1)), axis=1).ravel()
            self._dealt[g] = which, places
        return places

    def _draw(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw one control cell for every place from its pool, (B, S), all different within a set where they can be."""
        sets = np.repeat(np.arange(len(pool)), pool.shape[1])
        pool = pool.ravel()
        of_set, wanted = np.unique(sets * len(self._length) + pool, return_inverse=True, return_counts=True)[1:]
        wanted, length = wanted[of_set], self._length[pool]
        place = (rng.random(len(pool)) * length).astype(np.int64)
        scarce = 2 * wanted > length  # so few that drawing again would take long: dealt from a shuffling
        for pair in np.unique(of_set[scarce]):
            where = np.flatnonzero(of_set == pair)
            place[where] = np.resize(rng.permutation(length[where[0]]), len(where))
        key = sets * (len(self._controls) + 1) + self._start[pool] + place
        while (again := _repeated(key) & ~scarce).any():
            place[again] = (rng.random(again.sum()) * length[again]).astype(np.int64)
            key = sets * (len(self._controls) + 1) + self._start[pool] + place
        return self._controls[self._start[pool] + place].reshape(-1, self.set_size)


def _repeated(key: np.ndarray) -> np.ndarray:
    """Mark what has occurred before."""
    order = np.argsort(key, kind="stable")
    out = np.zeros(len(key), bool)
    out[order[1:]] = key[order[1:]] == key[order[:-1]]
    return out
