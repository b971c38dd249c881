"""What is asked of a model, and training cells left out in the same way, to find out how well it will be answered."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np

from virtualcell._errors import unknown_name
from virtualcell.data._labels import parts
from virtualcell.data._screen import Screen
from virtualcell.models._effects import Effects
from virtualcell.models._mixture import Question

logger = logging.getLogger(__name__)

QUESTIONS: tuple[Question, ...] = ("contexts", "perturbations", "cells")
_MOST_FOLDS = 5


@dataclass(frozen=True)
class Asked:
    """What predictions will be wanted for.

    Parameters
    ----------
    question
        "contexts": perturbations in a context where they were not measured; "perturbations": perturbations that were
        measured nowhere; "cells": pairs of both that were measured.
    share
        Which part of the perturbations is unknown in such a context; 1 for all of them.
    combined
        Whether new perturbations are combinations of measured ones.
    """

    question: Question
    share: float = 1.0
    combined: bool = False


def asked_by_split(screen: Screen, *, has_features: bool) -> Asked:
    """Read off a split what is asked: what most of the pairs are that it keeps from training.

    Labels are read, of test cells too, and no expression. Where nothing is kept from training but some cells of pairs
    that are learned from, or new perturbations that neither features nor their parts tell of, the question is about new
    contexts if there are several, and otherwise about new perturbations if there are features, else about the measured
    pairs.

    Parameters
    ----------
    screen
        All cells, in their parts.
    has_features
        Whether perturbations have features.
    """
    training = set(screen.pairs(screen.is_train & ~screen.is_control))
    held_out = set(screen.pairs(~screen.is_train & ~screen.is_control)) - training
    known = {p for _, p in training}
    new_contexts = [pair for pair in held_out if pair[1] in known]
    if len(new_contexts) * 2 >= len(held_out) > 0:
        asked_in = {c for c, _ in new_contexts}
        learned = [c for c, _ in training if c in asked_in]
        return Asked("contexts", len(new_contexts) / (len(new_contexts) + len(learned)))
    if held_out:
        combined = sum(_is_combined(p, known, screen.design.control) for _, p in held_out) * 2 >= len(held_out)
        if combined or has_features:
            return Asked("perturbations", combined=combined)
    if len({c for c, _ in training}) > 1:
        return Asked("contexts")
    return Asked("perturbations" if has_features else "cells")


def _is_combined(perturbation: str, known: Set[str], control: str) -> bool:
    """Whether this is a combination of several perturbations that are all known, measured itself or not."""
    names = parts(perturbation, control)
    return len(names) > 1 and set(names) <= known


def asked_by(validate: str | bool, screen: Screen, *, has_features: bool) -> Asked | None:
    """Return what the caller says is asked, or what the split says; `None` where nobody wants to know."""
    if validate is False:
        return None
    by_split = asked_by_split(screen, has_features=has_features)
    if validate is True:
        return by_split
    if validate not in QUESTIONS:
        raise unknown_name("validate", str(validate), QUESTIONS, "True takes what follows from the split.")
    if validate == by_split.question:
        return by_split
    combined = validate == "perturbations" and not has_features
    return Asked(validate, combined=combined)


@dataclass(frozen=True, eq=False)
class Fold:
    """Training cells without those of some pairs, and the pairs to predict.

    Parameters
    ----------
    screen
        The cells; what is left out is marked "test", and so is what was "val".
    effects
        What was measured in those that are learned from.
    observed
        Mean of the cells that are left out, by context and perturbation.
    """

    screen: Screen
    effects: Effects
    observed: dict[tuple[str, str], np.ndarray]


def folds(screen: Screen, effects: Effects, asked: Asked, *, seed: int = 0, most_groups: int = 200) -> list[Fold]:
    """Leave training cells out as the question would have it, at most five times.

    Contexts are left out one by one, or several at a time where there are more than five; perturbations a fifth at a
    time; of measured pairs each half of the cells in turn. What cannot be predicted from the rest, because nothing else
    has the perturbation, is not left out.

    Parameters
    ----------
    screen
        Cells to learn from.
    effects
        What was measured in them.
    asked
        The question.
    seed
        Seed of the draw of perturbations and of cells.
    most_groups
        Largest number of pairs to predict, over all folds; they are drawn where there are more.

    Returns
    -------
    The folds; none where the data does not allow to ask.
    """
    rng = np.random.default_rng(seed)
    training = screen.with_split(np.where(screen.is_known, "train", "test"))
    if asked.question == "cells":
        return list(_halves(training, rng, most_groups))
    left_out = _left_out(effects, asked, screen.design.control, rng)
    left_out = [rows for rows in left_out if 0 < len(rows) < len(effects.context)]
    return [_fold(training, effects, rows, rng, max(1, most_groups // len(left_out))) for rows in left_out]


def _left_out(effects: Effects, asked: Asked, control: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of the effects that each fold leaves out."""
    if asked.question == "perturbations":
        by, names = effects.perturbation, effects.perturbations
        known = set(names)
        wanted = [i for i, p in enumerate(names) if not asked.combined or _is_combined(p, known, control)]
    else:
        by, names = effects.context, effects.contexts
        wanted = np.unique(by)
    there = np.array(wanted, int)
    if len(there) < 2:  # nothing to leave out, or nothing left to learn from
        return []
    group_of = np.zeros(len(names), int)
    group_of[rng.permutation(there)] = np.arange(len(there)) % _MOST_FOLDS
    rows = [np.flatnonzero(np.isin(by, there) & (group_of[by] == k)) for k in range(min(len(there), _MOST_FOLDS))]
    if asked.question == "perturbations":
        return rows
    return [_with_donors(effects, _share_of(effects, part, asked.share, rng)) for part in rows]


def _share_of(effects: Effects, rows: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return so many of the perturbations of every context, drawn by their sorted names; at least one stays known."""
    if share == 1:
        return rows
    kept = []
    for c in np.unique(effects.context[rows]):
        here = rows[effects.context[rows] == c]
        n = min(max(1, round(share * len(here))), len(here) - 1)
        kept.append(np.sort(rng.permutation(here)[:n]))
    return np.concatenate(kept)


def _with_donors(effects: Effects, rows: np.ndarray) -> np.ndarray:
    """Return the rows whose perturbation is measured in a context that is not left out."""
    others = np.setdiff1d(np.arange(len(effects.context)), rows)
    return rows[np.isin(effects.perturbation[rows], effects.perturbation[others])]


def _fold(training: Screen, effects: Effects, rows: np.ndarray, rng: np.random.Generator, most: int) -> Fold:
    names = effects.pairs()
    pairs = {names[i]: i for i in rows}
    is_out = np.zeros(training.n_cells, bool)
    for pair, cells in training.pairs(training.is_train & ~training.is_control).items():
        is_out[cells] = pair in pairs
    drawn = _some(list(pairs), most, rng)
    stays = np.ones(len(effects.context), bool)
    stays[rows] = False
    observed = {pair: effects.controls[effects.context[pairs[pair]]] + effects.effects[pairs[pair]] for pair in drawn}
    return Fold(training.with_split(np.where(is_out, "test", training.split)), effects.take(stays), observed)


def _halves(training: Screen, rng: np.random.Generator, most: int) -> Iterator[Fold]:
    """Leave out each half of the cells of every pair in turn, and measure the effects of the other."""
    half = np.full(training.n_cells, -1)
    pairs = training.pairs(training.is_train & ~training.is_control)
    for cells in pairs.values():
        half[rng.permutation(cells)] = np.arange(len(cells)) % 2
    several = [pair for pair, cells in pairs.items() if len(cells) > 1]
    if not several:
        return
    drawn = _some(several, most, rng)
    known_controls = training.is_control & training.is_known
    measured = [Effects.measure(training, (half == k) | known_controls) for k in (0, 1)]
    for k, found in enumerate(measured):
        at = {pair: i for i, pair in enumerate(found.pairs())}
        observed = {pair: found.controls[found.context[at[pair]]] + found.effects[at[pair]] for pair in drawn}
        yield Fold(training.with_split(np.where(half == k, "test", training.split)), measured[1 - k], observed)


def _some(pairs: list[tuple[str, str]], most: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    if len(pairs) <= most:
        return pairs
    return [pairs[i] for i in sorted(rng.choice(len(pairs), most, replace=False))]
