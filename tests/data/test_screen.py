from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._errors import UnknownNameError
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen

DESIGN = Design("target", "ctrl", context_key="line", batch_key="lane", split_key="part")
N = 240


def make_cells(seed: int = 0) -> AnnData:
    """240 cells: controls, A, B and A+B in 2 lines and 3 lanes; names in an order of their own."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "target": rng.choice(["A", "B", "A+B", "ctrl"], N, p=[0.2, 0.2, 0.2, 0.4]),
            "line": rng.choice(["T", "NK"], N),
            "lane": rng.integers(3, size=N),
            "part": rng.choice(["train", "val", "test"], N, p=[0.6, 0.2, 0.2]),
        },
        index=[f"cell{i}" for i in rng.permutation(N)],
    )
    counts = rng.poisson(1.0, (N, 5)).astype(np.float32) + np.eye(5, dtype=np.float32)[0]
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=["A", "g1", "g2", "B", "C"]))


@pytest.fixture
def adata() -> AnnData:
    return make_cells()


@pytest.fixture
def screen(adata: AnnData) -> Screen:
    return Screen.from_anndata(adata, DESIGN)


def named(screen: Screen, groups: dict) -> dict:
    return {key: list(screen.names[rows]) for key, rows in groups.items()}


def shuffled(adata: AnnData, seed: int = 1) -> AnnData:
    rng = np.random.default_rng(seed)
    return adata[rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)].copy()


# -- what is read -----------------------------------------------------------------------------------------------------


def test_labels_of_all_cells(adata: AnnData, screen: Screen) -> None:
    assert screen.n_cells == N
    for role, key in (("perturbation", "target"), ("context", "line"), ("batch", "lane"), ("split", "part")):
        np.testing.assert_array_equal(np.asarray(getattr(screen, role)).astype(str), adata.obs[key].astype(str))
    assert screen.perturbation_names == ["A", "A+B", "B"]
    assert screen.context_names == ["NK", "T"]
    assert screen.batch_names == ["0", "1", "2"]
    np.testing.assert_array_equal(screen.is_control, adata.obs["target"] == "ctrl")
    np.testing.assert_array_equal(screen.is_train, adata.obs["part"] == "train")
    np.testing.assert_array_equal(screen.is_val, adata.obs["part"] == "val")
    known = (adata.obs["part"] == "train") | ((adata.obs["target"] == "ctrl") & (adata.obs["part"] == "val"))
    np.testing.assert_array_equal(screen.is_known, known)
    expected = adata.obs[["target", "line", "lane"]].astype(str)
    pd.testing.assert_frame_equal(screen.labels(), expected)
    assert list(screen.genes) == list(adata.var_names)


def test_what_a_design_leaves_out(adata: AnnData) -> None:
    screen = Screen.from_anndata(adata, Design("target", "ctrl"))
    assert screen.context_names == [_keys.ALL]
    assert screen.batch is None
    assert screen.batch_names == []
    assert screen.is_train.all()
    assert list(screen.labels().columns) == ["target"]
    assert set(screen.pairs()) == {(_keys.ALL, p) for p in ("A", "A+B", "B", "ctrl")}


@pytest.mark.parametrize(
    "kind",
    [
        lambda c: pd.Categorical(c, categories=["x", *sorted(set(c), reverse=True)]),
        lambda c: c.map({"A": 2, "B": 10, "A+B": 1, "ctrl": 0}),
        lambda c: c.map({"A": True, "B": True, "A+B": True, "ctrl": False}),
        lambda c: c.astype("string"),
        lambda c: c.map({"A": 2, "B": 10, "A+B": 1, "ctrl": 0}).astype("Int64"),
    ],
    ids=["category", "int", "bool", "string", "Int64"],
)
def test_labels_of_any_type(adata: AnnData, kind: Callable) -> None:
    """Their order is that of their text, unused categories are none, and groups are the same cells."""
    expected = Screen.from_anndata(adata, Design("target", "ctrl", batch_key="lane"))
    plain = adata.obs["target"]
    adata.obs["target"] = kind(plain)
    written = dict(zip(plain, adata.obs["target"].astype(str), strict=True))
    found = Screen.from_anndata(adata, Design("target", written["ctrl"], batch_key="lane"))
    assert found.perturbation_names == sorted({v for k, v in written.items() if k != "ctrl"})
    np.testing.assert_array_equal(found.is_control, expected.is_control)
    cells: dict[str, list[str]] = {}
    for (_, p), names in named(expected, expected.pairs()).items():
        cells[written[p]] = sorted(cells.get(written[p], []) + names)
    assert named(found, {p: rows for (_, p), rows in found.pairs().items()}) == cells
    assert list(found.pairs()) == sorted(found.pairs())
    taken = found.take(found.is_control)
    assert taken.perturbation_names == []
    assert list(taken.pairs()) == [(_keys.ALL, written["ctrl"])]


@pytest.mark.parametrize("key", ["target", "line", "lane", "part"])
def test_missing_labels_and_columns_are_refused(adata: AnnData, key: str) -> None:
    role = {"target": "perturbation_key", "line": "context_key", "lane": "batch_key", "part": "split_key"}[key]
    column = adata.obs.pop(key)
    with pytest.raises(UnknownNameError, match=rf"^{role}='{key}' is unknown. .*Name a column of obs"):
        Screen.from_anndata(adata, DESIGN)
    with pytest.raises(UnknownNameError, match=rf"^predicted: {role}='{key}' is unknown"):
        Screen.from_anndata(adata, DESIGN, side="predicted")
    adata.obs[key] = column.astype(object).where(np.arange(N) > 2, None)
    with pytest.raises(ValueError, match=rf"^{role}='{key}': 3 cells have no label there"):
        Screen.from_anndata(adata, DESIGN)


def test_parts_of_a_split_are_three(adata: AnnData) -> None:
    adata.obs["part"] = adata.obs["part"].replace("val", "validation")
    with pytest.raises(ValueError, match=r"split_key='part' holds \['test', 'train', 'validation'\]; valid are"):
        Screen.from_anndata(adata, DESIGN)


@pytest.mark.filterwarnings("ignore:Cannot join columns")
@pytest.mark.parametrize("place", ["modality", "mudata", "prefix"])
def test_columns_of_a_mudata(adata: AnnData, place: str) -> None:
    expected = Screen.from_anndata(adata, DESIGN)
    obs, rna = adata.obs, adata.copy()
    if place != "modality":
        rna.obs = obs[[]]
    protein = AnnData(np.eye(N + 1, dtype=np.float32), obs=pd.DataFrame(index=["other", *obs.index[::-1]]))
    mdata = MuData({"prot": protein, "rna": rna})
    for column in obs if place != "modality" else ():
        mdata.obs[column if place == "mudata" else f"rna:{column}"] = (
            obs[column].astype(object).reindex(mdata.obs_names)
        )
    found = Screen.from_anndata(mdata, DESIGN)
    assert list(found.names) == list(expected.names)
    assert named(found, found.pairs()) == named(expected, expected.pairs())
    np.testing.assert_array_equal(found.split, expected.split)
    np.testing.assert_array_equal(found.expression.rows().toarray(), expected.expression.rows().toarray())
    with pytest.raises(UnknownNameError, match="modality='protein' is unknown"):
        Screen.from_anndata(mdata, DESIGN, modality="protein")
    if place == "mudata":  # which labels a cell of the other modality, too, but for one
        with pytest.raises(ValueError, match="context_key='line': 1 cells have no label"):
            Screen.from_anndata(mdata, DESIGN, modality="prot")


def test_embedding(adata: AnnData) -> None:
    adata.obsm["X_pca"] = sparse.csr_matrix(np.arange(2.0 * N).reshape(N, 2))
    screen = Screen.from_anndata(adata, Design("target", "ctrl", use_rep="X_pca"))
    assert screen.rep.dtype == np.float32
    np.testing.assert_array_equal(screen.take([5, 2]).rep, [[10, 11], [4, 5]])
    with pytest.raises(UnknownNameError, match=r"use_rep='X_state' is unknown.*Run `vc.tl.embed"):
        Screen.from_anndata(adata, Design("target", "ctrl", use_rep="X_state"))


def test_the_matrix_is_looked_at_when_it_is_asked_for(adata: AnnData) -> None:
    adata.X.data[0] = np.nan
    screen = Screen.from_anndata(adata, DESIGN)
    assert len(screen.pairs()) == 8
    rest = screen.take(np.arange(1, N))
    assert rest.expression.rows().shape == (N - 1, 5)
    with pytest.raises(ValueError, match="X holds NaN"):
        screen.expression.rows([5])


def test_totals_of_predicted_cells_may_scatter(adata: AnnData) -> None:
    rng = np.random.default_rng(0)
    counts = adata.X.toarray() + 5
    shares = counts / counts.sum(axis=1, keepdims=True)
    adata.X = np.log1p(shares * 1.2e4 * rng.uniform(0.9, 1.1, (N, 1))).astype(np.float32)
    design = Design("target", "ctrl", scale="log1p")
    with pytest.raises(ValueError, match=r"X of observed was normalised to"):
        Screen.from_anndata(adata, design, side="observed").expression.rows()
    screen = Screen.from_anndata(adata, design, measured=False)
    np.testing.assert_array_equal(screen.expression.rows().toarray(), adata.X)


# -- cells by name ----------------------------------------------------------------------------------------------------


def test_pairs_are_all_cells_by_name(adata: AnnData, screen: Screen) -> None:
    pairs = screen.pairs()
    assert list(pairs) == sorted(pairs)
    for (line, target), rows in pairs.items():
        here = adata.obs[(adata.obs["line"] == line) & (adata.obs["target"] == target)]
        assert list(screen.names[rows]) == sorted(here.index)
    assert sum(map(len, pairs.values())) == N
    mask = adata.obs["lane"].to_numpy() == 1
    some = screen.pairs(mask)
    assert {key: sorted(set(names) & set(screen.names[mask])) for key, names in named(screen, pairs).items()} == named(
        screen, some
    )
    assert screen.pairs(np.zeros(N, bool)) == {}
    assert list(screen.names[screen.in_order(mask)]) == sorted(screen.names[mask])
    # a pair without cells is none
    assert ("NK", "A") not in screen.pairs(~((adata.obs["line"] == "NK") & (adata.obs["target"] == "A")).to_numpy())


def test_order_of_a_file_changes_nothing(adata: AnnData, screen: Screen) -> None:
    other = Screen.from_anndata(shuffled(adata), DESIGN)
    assert named(other, other.pairs()) == named(screen, screen.pairs())
    assert named(other, other.controls()) == named(screen, screen.controls())
    genes = ["C", "A"]
    for key, rows in screen.select(genes).pairs().items():
        a, b = screen.select(genes).expression.rows(rows), other.select(genes).expression.rows(other.pairs()[key])
        np.testing.assert_array_equal(a.toarray(), b.toarray())
    held, held_other = screen.hold_out(0.3, 5), other.hold_out(0.3, 5)
    assert set(held.names[held.is_val]) == set(held_other.names[held_other.is_val])
    ours, theirs = screen.groups(screen.is_train), other.groups(other.is_train)
    assert (ours.perturbation, ours.context) == (theirs.perturbation, theirs.context)
    for a, b in ((ours.cells, theirs.cells), (ours.pools, theirs.pools)):
        assert [list(screen.names[r]) for r in a] == [list(other.names[r]) for r in b]
    assert all(np.array_equal(a, b) for a, b in zip(ours.pool_of, theirs.pool_of, strict=True))


def test_controls(adata: AnnData, screen: Screen) -> None:
    is_control = adata.obs["target"] == "ctrl"
    for line, names in named(screen, screen.controls()).items():
        assert names == sorted(adata.obs_names[is_control & (adata.obs["line"] == line)])
    assert named(screen, screen.controls("T")) == {"T": named(screen, screen.controls())["T"]}
    with pytest.raises(UnknownNameError, match=r"context='t' is unknown. Did you mean 'T'.*control cells to start"):
        screen.controls("t")
    only_t = screen.take(~(screen.is_control & (screen.context == "NK")))
    with pytest.raises(UnknownNameError, match=r"context='NK' is unknown"):
        only_t.controls("NK")
    with pytest.raises(ValueError, match=r"context='T' was given, but the design has no contexts: state context_key"):
        Screen.from_anndata(adata, Design("target", "ctrl")).controls("T")
    with pytest.raises(UnknownNameError, match=r"control='NT' is unknown.*It labels the unperturbed cells"):
        Screen.from_anndata(adata, Design("target", "NT")).controls()
    with pytest.raises(UnknownNameError, match=r"control='ctrl' is unknown"):
        screen.take(~screen.is_control).controls()


def test_take_and_select_go_together(screen: Screen) -> None:
    rows = np.array([7, 3, 100, 20])
    some = screen.take(rows).select(["C", "A"]).take([True, False, True, True])
    assert list(some.names) == list(screen.names[rows[[0, 2, 3]]])
    assert list(some.genes) == ["C", "A"]
    for role in ("perturbation", "context", "batch", "split", "is_control"):
        np.testing.assert_array_equal(getattr(some, role), getattr(screen, role)[rows[[0, 2, 3]]])
    expected = screen.expression.rows(rows[[0, 2, 3]])[:, [4, 0]]
    np.testing.assert_array_equal(some.expression.rows().toarray(), expected.toarray())
    other_order = screen.select(["C", "A"]).take(rows[[0, 2, 3]])
    np.testing.assert_array_equal(other_order.expression.rows().toarray(), expected.toarray())
    assert screen.take([]).n_cells == 0
    assert screen.take([]).pairs() == {}
    counts = some.read_as("counts").expression.rows()
    assert (counts.data == np.rint(counts.data)).all()


def test_names_must_be_unique(adata: AnnData, screen: Screen) -> None:
    screen.require_unique_names()
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]
    with pytest.raises(ValueError, match=r"obs_names repeats cells.*obs_names_make_unique"):
        Screen.from_anndata(adata, DESIGN).require_unique_names()


# -- validation cells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [object, "str", "category", "string"])
def test_held_out_cells_are_a_share_of_every_group(dtype: str) -> None:
    """P in 11 and P1 in 1 are two groups, however the labels are stored."""
    obs = pd.DataFrame(
        [(p, c) for p in ("NT", "P", "P1") for c in ("1", "11") for _ in range(40)], columns=["pert", "ctx"]
    )
    obs.index = [f"c{i}" for i in range(240)]
    adata = AnnData(np.ones((240, 1), np.float32), obs=obs.astype(dtype))
    screen = Screen.from_anndata(adata, Design("pert", "NT", context_key="ctx"))
    drawn = [screen.hold_out(0.1, seed) for seed in range(5)]
    for held in drawn:
        groups = dict.fromkeys([pair for pair in screen.pairs() if pair[1] != "NT"], 4)  # control cells stay "train"
        assert {key: len(rows) for key, rows in held.pairs(held.is_val).items()} == groups
        assert held.is_train.sum() == 240 - 16
    assert len({tuple(np.flatnonzero(held.is_val)) for held in drawn}) == 5
    assert screen.is_train.all()
    # the same cells are drawn, whatever the type
    adata.obs = obs.astype(object)
    plain = Screen.from_anndata(adata, screen.design).hold_out(0.1, 0)
    np.testing.assert_array_equal(plain.split, drawn[0].split)


@pytest.mark.parametrize(
    ("fraction", "n", "held"), [(0.1, 30, 3), (0.29, 100, 29), (0.1, 9, 0), (0.5, 3, 1), (0, 9, 0)]
)
def test_shares_are_rounded_down(fraction: float, n: int, held: int) -> None:
    obs = pd.DataFrame({"pert": ["A"] * n}, index=[f"c{i}" for i in range(n)])
    screen = Screen.from_anndata(AnnData(np.ones((n, 1)), obs=obs), Design("pert", "NT"))
    assert screen.hold_out(fraction).is_val.sum() == held


def test_only_training_cells_are_held_out(screen: Screen) -> None:
    held = screen.hold_out(0.5)
    assert ((held.split == "test") == (screen.split == "test")).all()
    assert held.is_val[screen.is_val].all()
    assert screen.with_split(np.full(N, "test")).hold_out(0.5).is_val.sum() == 0


# -- groups for training ----------------------------------------------------------------------------------------------


def test_groups_are_matched_to_controls_of_their_context_and_batch(adata: AnnData, screen: Screen) -> None:
    groups = screen.groups(screen.is_train)
    obs = adata.obs
    assert list(zip(groups.context, groups.perturbation, strict=True)) == list(screen.pairs(screen.is_train))
    np.testing.assert_array_equal(np.sort(np.concatenate(groups.cells)), np.flatnonzero(screen.is_train))
    for c, p, cells, pool_of in zip(groups.context, groups.perturbation, groups.cells, groups.pool_of, strict=True):
        assert set(obs["target"].iloc[cells]) == {p}
        for row, k in zip(cells, pool_of, strict=True):
            pool = (obs["target"] == "ctrl") & (obs["line"] == c) & (obs["lane"] == obs["lane"].iloc[row])
            pool &= obs["part"] != "test"
            assert set(groups.pools[k]) == set(np.flatnonzero(pool))
    assert len(groups.pools) == 6
    assert groups.n_sets(64) == len(groups)
    assert groups.n_sets(1) == screen.is_train.sum()


def test_without_batches_controls_are_those_of_the_context(adata: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    screen = Screen.from_anndata(adata, Design("target", "ctrl", context_key="line"))
    groups = screen.groups(screen.is_train)
    assert len(groups.pools) == 2
    for c, pool_of in zip(groups.context, groups.pool_of, strict=True):
        assert set(pool_of) == {["NK", "T"].index(c)}
        np.testing.assert_array_equal(groups.pools[pool_of[0]], screen.controls(c)[c])
    assert caplog.text == ""
    assert len(screen.groups(np.zeros(N, bool))) == 0


def test_batches_without_controls_take_those_of_their_context_and_say_so(
    adata: AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    bare = (adata.obs["lane"] == 1) & (adata.obs["line"] == "T")
    adata.obs.loc[bare & (adata.obs["target"] == "ctrl"), "target"] = "A"
    screen = Screen.from_anndata(adata, Design("target", "ctrl", context_key="line", batch_key="lane"))
    with caplog.at_level(logging.WARNING):
        groups = screen.groups(screen.is_train)
    assert bare.sum() > 0
    assert f"{bare.sum()} cells lie in batches without control cells" in caplog.text
    everywhere = np.flatnonzero((adata.obs["target"] == "ctrl") & (adata.obs["line"] == "T"))
    for cells, pool_of in zip(groups.cells, groups.pool_of, strict=True):
        for k in pool_of[bare.to_numpy()[cells]]:
            np.testing.assert_array_equal(np.sort(groups.pools[k]), everywhere)


def test_a_context_without_controls_is_refused(adata: AnnData) -> None:
    there = (adata.obs["target"] == "ctrl") & (adata.obs["line"] == "NK")
    screen = Screen.from_anndata(adata, DESIGN)
    with pytest.raises(ValueError, match=r"context 'NK' has no control cells \('ctrl'\).*Drop it or add controls"):
        screen.take(~there.to_numpy()).groups(np.ones(N - there.sum(), bool))
    # controls of the test part are not to be looked at
    split = np.where(there, "test", "train")
    with pytest.raises(ValueError, match=r"all control cells \('ctrl'\) of context 'NK' are marked 'test'.*Mark some"):
        screen.with_split(split).groups(split == "train")
    split[np.flatnonzero(there)[0]] = "train"  # as the message says
    screen.with_split(split).groups(split == "train")
    split = np.where(there, "test", "train")
    # a context that is not asked for needs none
    screen.with_split(split).groups((screen.context == "T") & (split == "train"))


# -- targets ----------------------------------------------------------------------------------------------------------


def test_targets_are_genes_that_training_perturbations_are_named_after(adata: AnnData) -> None:
    adata.obs["target"] = adata.obs["target"].replace({"B": "g2", "A+B": "A+g1"})
    design = Design("target", "ctrl", split_key="part")
    assert Screen.from_anndata(adata, design).targets() == ["A", "g1", "g2"]
    assert Screen.from_anndata(shuffled(adata), design).targets() == ["A", "g1", "g2"]
    # neither labels of test cells nor of validation cells choose a gene
    for part in ("test", "val"):
        other = adata.copy()
        other.obs.loc[other.obs["part"] == part, "target"] = "C"
        assert Screen.from_anndata(other, design).targets() == ["A", "g1", "g2"]
    other = adata[adata.obs["target"] != "g2"].copy()
    assert Screen.from_anndata(other, design).targets() == ["A", "g1"]


def test_targets_by_symbols_of_genes(adata: AnnData) -> None:
    adata.var_names = [f"ENSG{i}" for i in range(5)]
    adata.var["symbol"] = pd.Categorical(["A", "x", "A", "B", "y"])
    assert Screen.from_anndata(adata, DESIGN).targets() == []
    screen = Screen.from_anndata(adata, Design("target", "ctrl", gene_key="symbol"))
    assert screen.targets() == ["ENSG0", "ENSG2", "ENSG3"]  # one symbol may have several genes
    adata.obs["target"] = adata.obs["target"].replace("B", "ENSG4")
    assert "ENSG4" in Screen.from_anndata(adata, Design("target", "ctrl", gene_key="symbol")).targets()
    with pytest.raises(UnknownNameError, match=r"gene_key='Symbol' is unknown. Did you mean 'symbol'.*by var_names"):
        Screen.from_anndata(adata, Design("target", "ctrl", gene_key="Symbol"))
