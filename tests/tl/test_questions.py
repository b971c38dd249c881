from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._effects import Effects
from virtualcell.tl._questions import Asked, Fold, asked_by, asked_by_split, folds

CONTROL = "ctrl"
CONTEXTS, SINGLES = ["w", "x", "y", "z"], [f"P{i}" for i in range(8)]
COMBINED = ["P0+P1", "P2+P3", "P4+P5"]


def screen_of(pairs, *, n_cells=6, n_controls=10, order=None, split=None) -> Screen:
    """Cells of some (context, perturbation); each cell's first gene is its own number."""
    labels = [(c, CONTROL) for c in sorted({c for c, _ in pairs}) for _ in range(n_controls)]
    labels += [pair for pair in pairs for _ in range(n_cells)]
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(labels, columns=["context", "target"], index=[f"cell{i:04d}" for i in range(len(labels))])
    x = rng.gamma(2, 0.5, size=(len(obs), 12)).astype(np.float32)
    obs["split"] = "train" if split is None else [split(c, p) for c, p in labels]
    adata = ad.AnnData(x, obs=obs)
    if order is not None:
        adata = adata[order].copy()
    design = Design(perturbation_key="target", control=CONTROL, context_key="context", split_key="split", scale="log1p")
    return Screen.from_anndata(adata, design)


def all_pairs(perturbations=SINGLES, contexts=CONTEXTS) -> list[tuple[str, str]]:
    return [(c, p) for c in contexts for p in perturbations]


def asked_folds(screen: Screen, asked: Asked, **options) -> list[Fold]:
    return folds(screen, Effects.measure(screen, screen.is_known), asked, **options)


def cells_of(screen: Screen, pairs) -> np.ndarray:
    """Mask of the perturbed cells of some pairs."""
    labels = zip(screen.context, screen.perturbation, strict=True)
    return np.array([pair in set(pairs) for pair in labels])


def learned(fold: Fold) -> set[tuple[str, str]]:
    e = fold.effects
    return {(e.contexts[c], e.perturbations[p]) for c, p in zip(e.context, e.perturbation, strict=True)}


def check(screen: Screen, found: list[Fold]) -> None:
    """What a fold leaves out is nowhere in what it learns from, and everything else is."""
    for fold in found:
        trained = set(fold.screen.pairs(fold.screen.is_train & ~fold.screen.is_control))
        assert not trained & set(fold.observed)
        assert trained == learned(fold)
        known = screen.pairs(screen.is_known & ~screen.is_control)
        assert trained < set(known)
        for pair, rows in known.items():
            assert (fold.screen.split[rows] == ("train" if pair in trained else "test")).all()
        np.testing.assert_array_equal(fold.screen.is_known[screen.is_control], screen.is_known[screen.is_control])
        # effects of the rest are as they were measured
        again = Effects.measure(fold.screen, fold.screen.is_known)
        assert again.contexts == fold.effects.contexts
        np.testing.assert_allclose(again.effects, fold.effects.effects, atol=1e-5)


# -- what is left out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_contexts", [2, 4, 7])
def test_every_context_is_left_out_once(n_contexts):
    contexts = [f"c{i}" for i in range(n_contexts)]
    screen = screen_of(all_pairs(contexts=contexts))
    found = asked_folds(screen, Asked("contexts"))
    assert len(found) == min(n_contexts, 5)
    check(screen, found)
    left = [{c for c, _ in fold.observed} for fold in found]
    assert sorted(c for contexts in left for c in contexts) == contexts
    for fold, there in zip(found, left, strict=True):
        assert set(fold.observed) == {(c, p) for c in there for p in SINGLES}
        assert not there & {c for c, _ in learned(fold)}


def test_observed_is_the_mean_of_the_cells_that_are_left_out():
    screen = screen_of(all_pairs())
    for asked in (Asked("contexts"), Asked("perturbations")):
        for fold in asked_folds(screen, asked):
            for pair, mean in fold.observed.items():
                cells = screen.expression.rows(screen.pairs()[pair])
                np.testing.assert_allclose(mean, cells.toarray().mean(axis=0), atol=1e-5)


def test_of_a_context_that_is_partly_known_so_much_is_left_out():
    screen = screen_of(all_pairs())
    found = asked_folds(screen, Asked("contexts", 0.75))
    check(screen, found)
    assert len(found) == 4
    for fold in found:
        (context,) = {c for c, _ in fold.observed}
        assert len(fold.observed) == 6  # of 8
        assert sum(c == context for c, _ in learned(fold)) == 2
    nearly_all = asked_folds(screen, Asked("contexts", 0.99))
    assert {len(fold.observed) for fold in nearly_all} == {7}  # one at least stays known


def test_what_no_other_context_has_is_not_left_out():
    pairs = [*all_pairs(SINGLES[:3]), ("w", "P5"), ("x", "P6"), ("y", "P6")]
    screen = screen_of(pairs)
    found = asked_folds(screen, Asked("contexts"))
    check(screen, found)
    left = {pair for fold in found for pair in fold.observed}
    assert left == set(pairs) - {("w", "P5")}
    for fold in found:
        donors = {p for _, p in learned(fold)}
        assert {p for _, p in fold.observed} <= donors


@pytest.mark.parametrize("n", [2, 5, 8])
def test_every_perturbation_is_left_out_once_in_all_contexts(n):
    screen = screen_of(all_pairs(SINGLES[:n]))
    found = asked_folds(screen, Asked("perturbations"))
    assert len(found) == min(n, 5)
    check(screen, found)
    left = [{p for _, p in fold.observed} for fold in found]
    assert sorted(p for names in left for p in names) == SINGLES[:n]
    for fold, names in zip(found, left, strict=True):
        assert set(fold.observed) == {(c, p) for c in CONTEXTS for p in names}


def test_combinations_are_left_out_and_their_parts_stay():
    screen = screen_of(all_pairs([*SINGLES, *COMBINED, "P6+unmeasured"]))
    found = asked_folds(screen, Asked("perturbations", combined=True))
    check(screen, found)
    assert sorted({p for fold in found for _, p in fold.observed}) == COMBINED
    for fold in found:
        for _, pair in fold.observed:
            assert set(pair.split("+")) <= {p for _, p in learned(fold)}


def test_measured_pairs_are_left_out_by_halves_of_their_cells():
    screen = screen_of([*all_pairs(SINGLES[:3])], n_cells=7)
    first, second = asked_folds(screen, Asked("cells"))
    is_perturbed = ~screen.is_control
    np.testing.assert_array_equal(first.screen.is_train[is_perturbed], ~second.screen.is_train[is_perturbed])
    for fold in (first, second):
        assert fold.screen.is_known[screen.is_control].all()
        assert set(fold.observed) == learned(fold) == set(all_pairs(SINGLES[:3]))
        for pair, rows in screen.pairs(is_perturbed).items():
            is_out = ~fold.screen.is_train[rows]
            assert is_out.sum() in (3, 4)
            cells = screen.expression.rows(rows).toarray()[is_out]
            np.testing.assert_allclose(fold.observed[pair], cells.mean(axis=0), atol=1e-5)
        again = Effects.measure(fold.screen, fold.screen.is_known)
        np.testing.assert_array_equal(again.effects, fold.effects.effects)


def test_a_single_cell_has_no_halves():
    pairs = all_pairs(SINGLES[:2])
    assert not asked_folds(screen_of(pairs, n_cells=1), Asked("cells"))


@pytest.mark.parametrize(
    ("pairs", "asked"),
    [
        (all_pairs(contexts=["x"]), Asked("contexts")),
        (all_pairs(SINGLES[:1]), Asked("perturbations")),
        (all_pairs(), Asked("perturbations", combined=True)),
        ([("x", "P0"), ("y", "P1"), ("z", "P2")], Asked("contexts")),
    ],
    ids=["one context", "one perturbation", "no combinations", "nothing is shared"],
)
def test_nothing_is_left_out_where_it_cannot_be_predicted(pairs, asked):
    assert asked_folds(screen_of(pairs), asked) == []


@pytest.mark.parametrize("question", ["contexts", "perturbations", "cells"])
def test_test_and_validation_cells_take_no_part(question):
    """Whatever they hold, controls among them: they are neither learned from nor predicted nor looked at."""

    def split(context, perturbation):
        if context == "z" or (context, perturbation) == ("w", "P0"):
            return "test"
        return "val" if perturbation == "P7" else "train"

    screen = screen_of(all_pairs(), split=split)
    cells = screen.expression.rows()
    spoilt = cells.toarray()
    spoilt[screen.split == "test"] += 1
    known = set(screen.pairs(screen.is_train & ~screen.is_control))
    found = asked_folds(screen, Asked(question))
    obs = pd.DataFrame({"context": screen.context, "target": screen.perturbation, "split": screen.split})
    obs.index = screen.names
    again = asked_folds(Screen.from_anndata(ad.AnnData(spoilt, obs=obs), screen.design), Asked(question))
    assert found
    for one, other in zip(found, again, strict=True):
        assert set(one.observed) <= known
        assert not one.screen.is_train[screen.split != "train"].any()
        for pair, mean in one.observed.items():
            np.testing.assert_array_equal(other.observed[pair], mean)
        np.testing.assert_array_equal(one.effects.effects, other.effects.effects)


@pytest.mark.parametrize(
    "asked",
    [Asked("contexts"), Asked("contexts", 0.5), Asked("perturbations"), Asked("cells")],
    ids=["contexts", "few-shot", "perturbations", "cells"],
)
def test_the_seed_decides_and_the_order_of_cells_does_not(asked):
    screen = screen_of(all_pairs())
    order = np.random.default_rng(1).permutation(screen.n_cells)
    other = screen_of(all_pairs(), order=order)
    one, two = asked_folds(screen, asked), asked_folds(other, asked)
    for a, b in zip(one, two, strict=True):
        assert list(a.observed) == list(b.observed)
        for pair, mean in a.observed.items():
            np.testing.assert_array_equal(b.observed[pair], mean)
        np.testing.assert_array_equal(a.effects.effects, b.effects.effects)
        parts = (dict(zip(fold.screen.names, fold.screen.split, strict=True)) for fold in (a, b))
        assert next(parts) == next(parts)
    if asked != Asked("contexts"):
        third = asked_folds(screen, asked, seed=1)
        left = [[sorted(np.asarray(f.screen.names)[f.screen.split == "test"]) for f in x] for x in (one, third)]
        assert left[0] != left[1]


def test_many_pairs_are_drawn_from_and_all_of_a_fold_are_left_out():
    screen = screen_of(all_pairs())
    found = asked_folds(screen, Asked("contexts"), most_groups=12)
    assert [len(fold.observed) for fold in found] == [3] * 4
    for fold in found:
        (context,) = {c for c, _ in fold.observed}
        assert context not in {c for c, _ in learned(fold)}
    drawn = [sorted(fold.observed) for fold in found]
    assert drawn == [sorted(fold.observed) for fold in asked_folds(screen, Asked("contexts"), most_groups=12)]


# -- what is asked ----------------------------------------------------------------------------------------------------


def held_out(*pairs, part="test"):
    return lambda c, p: part if (c, p) in pairs else "train"


@pytest.mark.parametrize(
    ("split", "expected", "without_features"),
    [
        (lambda c, p: "test" if c == "z" and p != CONTROL else "train", Asked("contexts"), None),
        (lambda c, p: "val" if c == "z" and p != CONTROL else "train", Asked("contexts"), None),
        (held_out(*[("z", p) for p in SINGLES[:6]]), Asked("contexts", 0.75), None),
        # nothing but features tells of a new perturbation
        (held_out(*[(c, "P0") for c in CONTEXTS]), Asked("perturbations"), Asked("contexts")),
        # most of what is held out decides
        (held_out(*[(c, "P0") for c in CONTEXTS], ("w", "P1")), Asked("perturbations"), Asked("contexts")),
        (held_out(*[(c, "P0") for c in CONTEXTS], *[("w", p) for p in SINGLES[1:7]]), Asked("contexts", 6 / 7), None),
        # nothing is held out
        (None, Asked("contexts"), None),
    ],
    ids=["zero-shot", "of validation", "few-shot", "perturbations", "mostly new", "mostly known", "nothing"],
)
def test_what_a_split_asks(split, expected, without_features):
    screen = screen_of(all_pairs(), split=split)
    assert asked_by_split(screen, has_features=True) == expected
    assert asked_by_split(screen, has_features=False) == (without_features or expected)


def test_a_split_of_combinations_asks_for_combinations():
    screen = screen_of(all_pairs([*SINGLES, *COMBINED]), split=lambda c, p: "test" if p in COMBINED[:2] else "train")
    assert asked_by_split(screen, has_features=False) == Asked("perturbations", combined=True)


def test_of_one_context_new_perturbations_are_asked_for_where_features_reach_them():
    screen = screen_of(all_pairs(contexts=["x"]))
    assert asked_by_split(screen, has_features=True) == Asked("perturbations")
    assert asked_by_split(screen, has_features=False) == Asked("cells")


def test_some_cells_of_known_pairs_are_no_question_of_their_own():
    count = iter(range(10_000))
    screen = screen_of(all_pairs(), split=lambda c, p: "val" if next(count) % 3 == 0 and p != CONTROL else "train")
    assert screen.is_val.any()
    assert asked_by_split(screen, has_features=False) == Asked("contexts")


def test_what_the_caller_asks_wins():
    screen = screen_of(all_pairs(), split=held_out(*[("z", p) for p in SINGLES[:6]]))
    assert asked_by(False, screen, has_features=False) is None
    assert asked_by(True, screen, has_features=False) == Asked("contexts", 0.75)
    assert asked_by("contexts", screen, has_features=False) == Asked("contexts", 0.75)  # the share is the split's
    assert asked_by("cells", screen, has_features=False) == Asked("cells")
    assert asked_by("perturbations", screen, has_features=True) == Asked("perturbations")
    assert asked_by("perturbations", screen, has_features=False) == Asked("perturbations", combined=True)
    with pytest.raises(KeyError, match=r"validate='context' is unknown\. Did you mean 'contexts'"):
        asked_by("context", screen, has_features=False)
