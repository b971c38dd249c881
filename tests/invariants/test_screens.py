"""What holds of every screen, whatever its design: splits, matching to controls, sets, what is left out, effects.

A screen has every combination of contexts, perturbations and batches in any number of cells, none among them, but for a
control cell in each context. Cells lie in no order, and their names say nothing of their labels.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import sparse

import virtualcell as vc
from virtualcell.data._cell_sets import SetSampler
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._effects import Effects
from virtualcell.tl._prepare import prepared
from virtualcell.tl._questions import Asked, folds

LABELS = {"perturbation_key": "pert", "control": "NT", "context_key": "ctx"}
CONTEXTS, PERTURBATIONS, BATCHES, GENES = ("x", "y", "z"), ("A", "B", "C", "A+B"), ("1", "2"), 8


@st.composite
def screens(draw: st.DrawFn) -> ad.AnnData:
    """Counts and labels of a small screen."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for context in CONTEXTS[: draw(st.integers(1, 3))]:
        for perturbation in ("NT", *PERTURBATIONS[: draw(st.integers(1, 4))]):
            sizes = draw(st.tuples(*(st.integers(0, 7) for _ in BATCHES)))
            if perturbation == "NT" and not sum(sizes):
                sizes = (1, 0)
            rows += [(perturbation, context, b) for b, n in zip(BATCHES, sizes, strict=True) for _ in range(n)]
    obs = pd.DataFrame(rows, columns=["pert", "ctx", "batch"])
    assume((obs["pert"] != "NT").sum() > 1)
    obs.index = pd.Index([f"c{i}" for i in rng.permutation(len(obs))])
    counts = rng.poisson(rng.gamma(1, 3, GENES) + 0.5, (len(obs), GENES)).astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(GENES)]))
    return adata[rng.permutation(len(obs))].copy()


def shuffled(adata: ad.AnnData, seed: int = 1) -> ad.AnnData:
    """The same cells and genes in another order, their labels with other types, unused categories among them."""
    rng = np.random.default_rng(seed)
    out = adata[rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)].copy()
    for column in ("pert", "ctx", "batch"):
        known = rng.permutation([*out.obs[column].astype(str).unique(), "not there"])
        out.obs[column] = pd.Categorical(out.obs[column].astype(str), categories=list(known))
    return out


@st.composite
def held_out(draw: st.DrawFn, adata: ad.AnnData) -> dict:
    """What to hold out, of each of the four kinds, by name, by number and by share."""
    perturbed = adata.obs[adata.obs["pert"] != "NT"]
    contexts, perturbations = sorted(set(perturbed["ctx"])), sorted(set(perturbed["pert"]))

    def some(of: list[str]) -> list[str] | int | float:
        by_name = st.lists(st.sampled_from(of), min_size=1, unique=True)
        return draw(st.one_of(by_name, st.integers(1, len(of)), st.floats(0.05, 0.95)))

    kind = draw(st.sampled_from(["fraction", "contexts", "perturbations", "both"]))
    if kind == "fraction":
        return {"fraction": draw(st.floats(0.05, 0.95))}
    return {
        name: some(of)
        for name, of in (("contexts", contexts), ("perturbations", perturbations))
        if kind in (name, "both")
    }


def split(adata: ad.AnnData, holdout: dict, **options: object) -> bool:
    """Whether the split can be made: not where nothing is left on one side, or a name is not there."""
    try:
        vc.pp.split(adata, **LABELS, holdout=holdout, **options)
    except (KeyError, ValueError) as error:
        if any(words in str(error) for words in ("leaves no", "is unknown", "must be a whole number")):
            return False
        raise
    return True


@st.composite
def split_screens(draw: st.DrawFn) -> ad.AnnData:
    """Screens that are divided, in one of the four ways or cell by cell, where control cells may be "test" too."""
    adata = draw(screens())
    if draw(st.booleans()):
        parts = np.random.default_rng(draw(st.integers(0, 99))).choice(["train", "val", "test"], adata.n_obs)
        is_usable = (adata.obs["pert"] == "NT") & (parts != "test")
        assume(set(adata.obs["ctx"]) == set(adata.obs["ctx"][is_usable]))
        assume(((parts == "train") & (adata.obs["pert"] != "NT")).any())
        adata.obs["split"] = parts
        return adata
    fraction, seed = draw(st.floats(0, 0.9)), draw(st.integers(0, 9))
    assume(split(adata, draw(held_out(adata)), val_fraction=fraction, seed=seed))
    return adata


def read(adata: ad.AnnData, **columns: str) -> Screen:
    return Screen.from_anndata(adata, Design(**LABELS, **columns))


BOTH = {"batch_key": "batch", "split_key": "split"}

# -- splits -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_splits(data: st.DataObject) -> None:
    adata = data.draw(screens())
    holdout, fraction = data.draw(held_out(adata)), data.draw(st.floats(0, 0.9))
    turned = shuffled(adata)
    can = split(adata, holdout, val_fraction=fraction)
    assert split(turned, holdout, val_fraction=fraction) == can
    assume(can)
    assigned, obs = adata.obs["split"].astype(str), adata.obs
    pd.testing.assert_series_equal(turned.obs["split"].astype(str).loc[obs.index], assigned)  # of what is where
    assert (assigned[obs["pert"] == "NT"] == "train").all()

    record = adata.uns["virtualcell"]["split_manifest"]["split"]
    table = obs.assign(split=assigned)[obs["pert"] != "NT"].groupby(["ctx", "pert"])["split"]
    for (context, perturbation), of in table:
        n = Counter(of)
        if "fraction" in holdout:
            assert n["test"] == min(np.rint(holdout["fraction"] * len(of)), len(of) - 1)
        else:
            names = record["held_out"]
            is_out = context in names.get("contexts", [context]) and perturbation in names.get(
                "perturbations", [perturbation]
            )
            assert n["test"] == (len(of) if is_out else 0)
        left = len(of) - n["test"]
        assert n["val"] == (min(np.rint(fraction * left), left - 1) if left else 0)

    by_name = record["held_out"] or holdout  # listed, what a number drew is the same split
    vc.pp.split(adata, **LABELS, holdout=by_name, val_fraction=fraction, key_added="by name")
    assert (adata.obs["by name"].astype(str) == assigned).all()
    with tempfile.TemporaryDirectory() as folder:
        vc.pp.save_split(adata, Path(folder) / "split.json")
        vc.pp.apply_split(turned, Path(folder) / "split.json", key_added="replayed")
    assert (turned.obs["replayed"].astype(str) == turned.obs["split"].astype(str)).all()


@given(screens(), st.floats(0, 0.9), st.integers(0, 3), st.booleans())
def test_validation_cells_of_screens_that_are_not_split(
    adata: ad.AnnData, fraction: float, seed: int, by_batch: bool
) -> None:
    columns = {"batch_key": "batch"} if by_batch else {}
    held = read(adata, **columns).hold_out(fraction, seed)
    again = read(shuffled(adata), **columns).hold_out(fraction, seed)
    assert set(again.names[again.is_val]) == set(held.names[held.is_val])
    assert not (held.is_val & held.is_control).any()
    for rows in held.pairs().values():
        assert held.is_val[rows].sum() <= fraction * len(rows) + 1e-9
    if by_batch:
        assert set(held.batch[held.is_val]) <= set(held.batch[held.is_train])


# -- matching and sampling --------------------------------------------------------------------------------------------


@given(split_screens(), st.sampled_from(["train", "val"]), st.booleans())
def test_matching(adata: ad.AnnData, part: str, by_batch: bool) -> None:
    columns = BOTH if by_batch else {"split_key": "split"}
    screen, other = read(adata, **columns), read(shuffled(adata), **columns)
    groups, same = screen.groups(screen.split == part), other.groups(other.split == part)
    batch = np.asarray(screen.batch if by_batch else ["all"] * screen.n_cells)
    seen: list[int] = []
    for name, context, cells, pools in zip(
        groups.perturbation, groups.context, groups.cells, groups.pool_of, strict=True
    ):
        seen += list(cells)
        assert set(screen.perturbation[cells]) == {name}
        assert set(screen.context[cells]) == {context}
        for cell, pool in zip(cells, pools, strict=True):
            of_context = screen.is_control & (screen.context == context) & (screen.split != "test")
            matched = of_context & (batch == batch[cell])
            assert set(groups.pools[pool]) == set(np.flatnonzero(matched if matched.any() else of_context))
    assert sorted(seen) == list(np.flatnonzero(screen.split == part))  # each cell once
    # whatever the order of cells, the same by name
    assert groups.perturbation == same.perturbation
    for mine, theirs in ((groups.cells, same.cells), (groups.pools, same.pools)):
        assert [list(screen.names[c]) for c in mine] == [list(other.names[c]) for c in theirs]
    assert all((a == b).all() for a, b in zip(groups.pool_of, same.pool_of, strict=True))


@given(split_screens(), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_no_test_cell_is_ever_drawn(adata: ad.AnnData, set_size: int, n_sets: int, n_steps: int, seed: int) -> None:
    screen, other = read(adata, **BOTH), read(shuffled(adata), **BOTH)
    for part in ("train", "val"):
        mask = screen.split == part
        if not mask.any():
            continue
        options = {"set_size": set_size, "sets_per_step": n_sets, "n_steps": n_steps, "seed": seed}
        sampler = SetSampler(screen.groups(mask), **options)
        again = SetSampler(other.groups(other.split == part), **options)
        steps = [sampler.step(i) for i in range(n_steps)]
        for i in reversed(range(n_steps)):  # a step is a function of its number, and of the names of cells
            step, same = steps[i], again.step(i)
            assert step.perturbed.shape == step.control.shape == (n_sets, set_size)
            assert mask[step.perturbed].all()
            assert screen.is_control[step.control].all()
            assert (screen.split[step.control] != "test").all()
            assert (screen.context.codes[step.control] == screen.context.codes[step.perturbed]).all()
            assert (screen.names[step.perturbed.ravel()] == other.names[same.perturbed.ravel()]).all()
            assert (screen.names[step.control.ravel()] == other.names[same.control.ravel()]).all()


@given(split_screens(), st.sampled_from(["contexts", "perturbations", "cells"]), st.integers(0, 3))
def test_no_test_cell_takes_part_in_a_choice(adata: ad.AnnData, question: str, seed: int) -> None:
    """Of what is left out to choose weights and to judge, and of what is learned there, all are training cells."""
    screen = prepared(read(adata, **BOTH), min_cells=1, has_features=False)
    allowed = set(screen.names[screen.is_known])
    assert allowed <= set(adata.obs_names[adata.obs["split"].astype(str) != "test"])
    effects = Effects.measure(screen, screen.is_known)
    for fold in folds(screen, effects, Asked(question), seed=seed):
        learned = set(fold.screen.names[fold.screen.is_train])
        assert learned <= allowed
        of_pair = fold.screen.pairs(fold.screen.is_train)
        for pair in fold.observed:
            cells = set(screen.names[(screen.context == pair[0]) & (screen.perturbation == pair[1])])
            assert cells <= allowed | set(screen.names[screen.is_val])
            if question == "cells":  # one half is learned from, the other asked for
                assert 0 < len(of_pair[pair]) < len(cells & allowed)
                assert set(screen.names[of_pair[pair]]) < cells & allowed
            else:
                assert pair not in of_pair
                assert pair not in fold.effects.pairs()


# -- effects ----------------------------------------------------------------------------------------------------------


def by_hand(adata: ad.AnnData, mask: np.ndarray, by_batch: bool) -> dict[tuple[str, str], np.ndarray]:
    """Mean of the perturbed cells minus that of the control cells of their context and batch, cell by cell."""
    counts = adata.X.toarray().astype(float)
    logs = np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4)
    obs = adata.obs.astype(str)
    out: dict[tuple[str, str], list[np.ndarray]] = {}
    for i in np.flatnonzero(mask & (obs["pert"] != "NT").to_numpy()):
        of_context = mask & ((obs["pert"] == "NT") & (obs["ctx"] == obs["ctx"].iloc[i])).to_numpy()
        matched = of_context & (obs["batch"] == obs["batch"].iloc[i]).to_numpy()
        controls = matched if by_batch and matched.any() else of_context
        out.setdefault((obs["ctx"].iloc[i], obs["pert"].iloc[i]), []).append(logs[i] - logs[controls].mean(axis=0))
    return {pair: np.mean(cells, axis=0) for pair, cells in out.items()}


@given(split_screens(), st.booleans())
def test_effects(adata: ad.AnnData, by_batch: bool) -> None:
    columns = BOTH if by_batch else {"split_key": "split"}
    assume(all(adata.X.sum(axis=1) > 0))
    turned = shuffled(adata)
    screen, other = read(adata, **columns), read(turned, **columns)
    effects, same = (Effects.measure(s, s.is_known) for s in (screen, other.select(list(adata.var_names))))
    wanted = by_hand(adata, screen.is_known, by_batch)
    assert sorted(effects.pairs()) == sorted(wanted)
    for pair, row, error in zip(effects.pairs(), effects.effects, effects.variance, strict=True):
        np.testing.assert_allclose(row, wanted[pair], atol=2e-5)
        assert (error >= 0).all()
    # other orders of cells and genes change nothing, to the last bit
    assert effects.pairs() == same.pairs()
    np.testing.assert_array_equal(effects.effects, same.effects)
    np.testing.assert_array_equal(effects.variance, same.variance)
    # and test cells nothing at all: without them the same
    kept = adata[adata.obs["split"].astype(str) != "test"].copy()
    alone = Effects.measure(s := read(kept, **columns), s.is_known)
    np.testing.assert_array_equal(effects.effects, alone.effects)


# -- a whole fit ------------------------------------------------------------------------------------------------------

KINDS = {
    "zero-shot": {"contexts": ["y"]},
    "few-shot": {"contexts": ["y"], "perturbations": ["A"]},
    "unseen perturbations": {"perturbations": ["A+B"]},
    "random": {"fraction": 0.3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_test_cells_change_nothing_in_a_fit(kind: str) -> None:
    """Other expression in test cells: genes, weights, shares and the verdict stay the same to the last bit."""
    rng = np.random.default_rng(0)
    labels = [(p, c, b) for c in "xy" for p in ("NT", "A", "B", "A+B") for b in "12" for _ in range(12)]
    obs = pd.DataFrame(labels, columns=["pert", "ctx", "batch"], index=[f"c{i}" for i in rng.permutation(len(labels))])
    level = rng.gamma(1, 3, 40) * np.exp(0.5 * rng.normal(size=(len(obs), 1)) * (obs[["pert"]] != "NT").to_numpy())
    adata = ad.AnnData(
        sparse.csr_matrix(rng.poisson(level).astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"G{i}" for i in range(40)]),
    )
    vc.pp.split(adata, **LABELS, holdout=KINDS[kind])
    changed = adata.copy()
    is_test = (adata.obs["split"] == "test").to_numpy()
    assert is_test.any()
    counts = changed.X.toarray()
    counts[is_test] = rng.poisson(50 * rng.random(40), (is_test.sum(), 40))
    changed.X = sparse.csr_matrix(counts)
    changed.obs.loc[is_test, "batch"] = "3"

    def fit(data: ad.AnnData) -> vc.models.ST:
        network = {"n_hidden": 16, "n_feedforward": 16, "n_layers": 1, "set_size": 8}
        training = {"max_steps": 3, "accelerator": "cpu", "progress_bar": False}
        return vc.tl.fit_state(
            data, **LABELS, batch_key="batch", split_key="split", n_top_genes=20, se=False, network=network,
            training=training,
        )  # fmt: skip

    one, other = fit(adata), fit(changed)
    assert list(one.genes) == list(other.genes)
    assert one.mixture == other.mixture
    assert one.verdict == other.verdict
    for name, value in one.module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), other.module.state_dict()[name].numpy(), err_msg=name)
    asked = {"model": one, "perturbation": "B", "context": "x"}
    predicted = vc.tl.predict_perturbation(adata, **asked)
    np.testing.assert_array_equal(
        predicted.X.toarray() if sparse.issparse(predicted.X) else predicted.X,
        (
            p.X.toarray()
            if sparse.issparse((p := vc.tl.predict_perturbation(adata, **{**asked, "model": other})).X)
            else p.X
        ),
    )
