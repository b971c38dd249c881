from __future__ import annotations

import logging

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.tl._prepare import choose_genes, prepared, warn_of_panel, with_enough_cells, with_known_batches

CONTROL = "non-targeting"


@pytest.fixture
def read(screen, design):
    """A Screen of `screen`, or of other data."""

    def read(data=None, **more) -> Screen:
        return Screen.from_anndata(screen if data is None else data, Design(**design, **more))

    return read


def chosen(screen: Screen, n: int = 20) -> list[str]:
    return choose_genes(screen, n, targets=screen.targets())


# -- library sizes of a panel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["total_counts", "nCount_RNA"])
def test_totals_far_above_the_sums_of_a_panel_are_named(screen, read, caplog, column):
    totals = np.asarray(screen.X.sum(axis=1)).ravel()
    panel = screen[:, :30].copy()
    panel.obs[column] = totals
    warn_of_panel(read(panel), panel)
    (line,) = caplog.messages
    times = np.median(totals / np.asarray(panel.X.sum(axis=1)).ravel())
    assert line.startswith(f"obs['{column}'] is {times:.3g} times the counts that the 30 genes here add up to")
    assert f"Say library_size_key='{column}'" in line
    remedied = read(panel, library_size_key=column)
    warn_of_panel(remedied, panel)
    assert len(caplog.messages) == 1  # the remedy works, and ends the warning
    np.testing.assert_array_equal(remedied.expression.library_size, totals)


def test_columns_of_a_mudata_count_too(screen, read, caplog):
    panel = screen[:, :30].copy()
    data = md.MuData({"rna": panel})
    data.obs["n_counts"] = np.asarray(screen.X.sum(axis=1)).ravel()
    warn_of_panel(Screen.from_anndata(data, read().design), data)
    assert "library_size_key='n_counts'" in caplog.text


@pytest.mark.parametrize(
    "totals",
    [
        lambda sums: sums * 1.2,  # a few genes were left out
        lambda sums: np.where(np.arange(len(sums)) == 3, 0.5, 5) * sums,  # would be refused as library sizes
        lambda sums: (5 * sums).astype(str),
        lambda sums: np.where(np.arange(len(sums)) == 3, np.nan, 5 * sums),
    ],
)
def test_columns_that_are_no_totals_of_more_genes_are_not_named(screen, read, caplog, totals):
    screen.obs["total_counts"] = totals(np.asarray(screen.X.sum(axis=1)).ravel())
    warn_of_panel(read(), screen)
    assert caplog.messages == []


def test_logarithms_have_no_totals_to_be_named(screen, read, caplog):
    sums = np.asarray(screen.X.sum(axis=1)).ravel()
    sc.pp.normalize_total(screen, target_sum=1e4)
    sc.pp.log1p(screen)
    screen.obs["total_counts"] = sums * 9
    warn_of_panel(read(scale="log1p"), screen)
    assert caplog.messages == []


# -- which cells ------------------------------------------------------------------------------------------------------


def test_test_cells_are_gone_and_all_controls_stay(screen, read):
    found = prepared(read(split_key="split"), min_cells=10, has_features=False)
    assert set(found.names) == set(screen.obs_names[screen.obs["split"] != "test"])
    assert found.is_control.sum() == 120
    assert set(found.context_names) == {"type_1", "type_2", "type_3"}
    assert found.is_val.sum() == (screen.obs["split"] == "val").sum() == 20


def test_a_tenth_of_each_group_is_held_out_by_name(screen, read):
    found = prepared(read(), min_cells=10, has_features=False)
    held = pd.crosstab(np.asarray(found.perturbation), np.asarray(found.context), values=found.is_val, aggfunc="sum")
    assert not held.loc[[CONTROL]].any(axis=None)  # predictions start from all of them
    assert (held.drop(index=CONTROL) == 2).all(axis=None)
    shuffled = screen[np.random.default_rng(0).permutation(screen.n_obs)].copy()
    again = prepared(read(shuffled), min_cells=10, has_features=False)
    assert set(again.names[again.is_val]) == set(found.names[found.is_val])
    other = prepared(read(), min_cells=10, has_features=False, seed=1)
    assert set(other.names[other.is_val]) != set(found.names[found.is_val])
    assert not prepared(read(), min_cells=10, has_features=False, val_fraction=0.0).is_val.any()


def test_perturbations_with_few_cells_are_named_and_left_out(screen, read, targets, caplog):
    rare = np.flatnonzero(screen.obs["target_gene"] == targets[0])
    few = read(screen[np.setdiff1d(np.arange(screen.n_obs), rare[6:])].copy())
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        found = with_enough_cells(few, 10, has_features=False)
    assert caplog.messages == [
        f"1 perturbations have fewer than min_cells=10 training cells and are left out: {targets[0]}."
    ]
    assert ((found.split == "test") == (found.perturbation == targets[0])).all()
    assert (with_enough_cells(few, 6, has_features=False).split == "train").all()
    with pytest.raises(ValueError, match=r"^no perturbation has min_cells=99 training cells"):
        with_enough_cells(few, 99, has_features=False)


def test_features_allow_perturbations_that_validation_alone_holds(screen, read, targets):
    screen.obs["split"] = np.where(screen.obs["target_gene"] == targets[0], "val", "train")
    assert "test" in with_enough_cells(read(split_key="split"), 10, has_features=False).split
    assert "test" not in with_enough_cells(read(split_key="split"), 10, has_features=True).split


def test_combinations_may_be_met_in_validation_first(screen, read, targets):
    labels, a, b = screen.obs["target_gene"].astype(str).to_numpy(), targets[0], targets[1]
    rows = np.flatnonzero(labels == targets[2])
    labels[rows[:20]], labels[rows[20:40]], labels[rows[40:]] = f"{a}+{b}", f"{a}+UNKNOWN", "UNKNOWN"
    screen.obs["target_gene"] = labels
    screen.obs["split"] = np.where(np.isin(np.arange(screen.n_obs), rows), "val", "train")
    found = with_enough_cells(read(split_key="split"), 10, has_features=False)
    assert set(found.perturbation[found.is_val]) == {f"{a}+{b}"}


def test_validation_cells_of_unknown_batches_are_left_out(screen, read, caplog):
    screen.obs["batch"] = screen.obs["batch"].astype(str)
    first = screen.obs_names[screen.obs["split"] == "val"][:3]
    screen.obs.loc[first, "batch"] = "late"
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        found = with_known_batches(read(split_key="split", batch_key="batch"))
    assert caplog.messages == ["3 validation cells are left out: there are no training cells of their batches, late."]
    assert set(found.names[found.split == "test"]) == {*first, *screen.obs_names[screen.obs["split"] == "test"]}
    assert with_known_batches(read(split_key="split")).is_val.sum() == 20  # without batches all are known


def test_batches_of_test_cells_are_unknown(screen, read):
    screen.obs["batch"] = np.where(screen.obs["split"] == "test", "late", screen.obs["batch"].astype(str))
    found = prepared(read(split_key="split", batch_key="batch"), min_cells=10, has_features=False)
    assert found.batch_names == ["batch_1", "batch_2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a[~((a.obs["cell_type"] == "type_2") & (a.obs["target_gene"] == CONTROL))],
            "'type_2' has no control",
        ),
        (lambda a: a[a.obs["target_gene"] != CONTROL], "control='non-targeting' is unknown"),
    ],
)
def test_contexts_need_controls(screen, read, change, message):
    with pytest.raises((ValueError, KeyError), match=message):
        prepared(read(change(screen).copy()), min_cells=10, has_features=False)


def test_names_of_cells_must_differ(screen, read):
    screen.obs_names = ["cell"] * screen.n_obs
    with pytest.raises(ValueError, match=r"obs_names repeats cells\. Run `adata\.obs_names_make_unique\(\)`"):
        prepared(read(), min_cells=10, has_features=False)


# -- which genes ------------------------------------------------------------------------------------------------------


def test_genes_are_scanpys_of_the_training_cells_and_the_targets(screen, read, targets):
    train = screen[screen.obs["split"] == "train"].to_memory()
    counts = train.X.toarray()
    reference = ad.AnnData(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)), var=train.var[[]])
    sc.pp.highly_variable_genes(reference, n_top_genes=20)
    found = chosen(read(split_key="split"))
    assert set(found) == {*reference.var_names[reference.var["highly_variable"]], *targets}
    assert found == sorted(found)
    assert chosen(read(), None) == chosen(read(), 90) == sorted(screen.var_names)


@pytest.mark.parametrize("part", ["test", "val"])
def test_neither_counts_nor_labels_of_other_cells_choose_genes(screen, read, part):
    reference = chosen(read(split_key="split"))
    rows = np.flatnonzero(screen.obs["split"] == part)
    counts = screen.X.toarray()
    counts[rows] = np.random.default_rng(0).permuted(counts[rows], axis=1)
    screen.X = counts
    spare = sorted(set(screen.var_names) - set(reference))
    labels = screen.obs["target_gene"].astype(str).to_numpy()
    labels[rows] = spare[0]  # a gene that would come along as a target
    screen.obs["target_gene"] = labels
    assert chosen(read(split_key="split")) == reference
    seen = chosen(read())
    assert spare[0] in seen  # which shows that it would have mattered
    assert seen != reference


@pytest.mark.parametrize(
    "form",
    [
        lambda a: a[np.random.default_rng(0).permutation(a.n_obs), np.random.default_rng(1).permutation(a.n_vars)],
        lambda a: ad.AnnData(a.X.toarray().astype(np.float64), obs=a.obs, var=a.var),
        lambda a: ad.AnnData(a.X.tocsc().astype(np.int64), obs=a.obs, var=a.var),
    ],
    ids=["permuted", "dense", "csc"],
)
def test_the_file_does_not_choose_genes(screen, read, form):
    assert chosen(read(form(screen).copy())) == chosen(read())


def test_repeated_genes_and_wrong_numbers(screen, read):
    with pytest.raises(ValueError, match=r"^n_top_genes=0: at least one gene is needed\. Say None for all genes"):
        chosen(read(), 0)
    screen.var_names = ["same"] * screen.n_vars
    with pytest.raises(ValueError, match=r"^var_names repeats \[.same.*\]\. Run `adata\.var_names_make_unique\(\)`"):
        chosen(read(), 5)


def test_guides_that_are_called_like_control_cells_are_named(screen, design, caplog):
    labels = screen.obs["target_gene"].astype(str).to_numpy()
    at = np.flatnonzero(labels == "non-targeting")
    labels[at] = [f"non-targeting_{i % 3 + 1}" for i in range(len(at))]
    screen.obs["guide"] = labels
    guides = [f"non-targeting_{i}" for i in (1, 2, 3)]
    options = {**design, "perturbation_key": "guide"}
    prepared(Screen.from_anndata(screen, Design(**{**options, "control": guides[0]})), min_cells=5, has_features=False)
    assert "2 perturbations are called like control cells" in caplog.text
    assert f"say control={guides}" in caplog.text
    caplog.clear()  # the remedy works
    prepared(Screen.from_anndata(screen, Design(**{**options, "control": guides})), min_cells=5, has_features=False)
    assert not caplog.text
