from __future__ import annotations

import json
import logging

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell._errors import UnknownNameError
from virtualcell._keys import ALL

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}


@pytest.fixture
def screen() -> ad.AnnData:
    """Two contexts x (5 perturbations of 20 cells, 30 controls); "A+B" is a combination."""
    labels = np.repeat(["A", "B", "C", "D", "A+B", "non-targeting"], [20, 20, 20, 20, 20, 30])
    obs = pd.DataFrame({"target_gene": np.tile(labels, 2), "cell_type": np.repeat(["K562", "RPE1"], len(labels))})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    return ad.AnnData(np.ones((len(obs), 3), dtype=np.float32), obs=obs)


def parts(adata: ad.AnnData) -> dict[tuple[str, str], set[str]]:
    return adata.obs.groupby(["cell_type", "target_gene"], observed=True)["split"].agg(set).to_dict()


def test_zero_shot_tests_every_perturbed_cell_of_the_context_and_no_other(screen):
    vc.pp.split(screen, **DESIGN, holdout={"contexts": ["RPE1"]})
    for (context, perturbation), found in parts(screen).items():
        if perturbation == "non-targeting":
            assert found == {"train"}
        else:
            assert found == ({"test"} if context == "RPE1" else {"train", "val"})


def test_few_shot_tests_the_perturbations_in_that_context_only(screen):
    vc.pp.split(screen, **DESIGN, holdout={"contexts": ["RPE1"], "perturbations": ["A", "C"]})
    tested = {group for group, found in parts(screen).items() if "test" in found}
    assert tested == {("RPE1", "A"), ("RPE1", "C")}
    assert all(parts(screen)[group] == {"test"} for group in tested)


def test_unseen_perturbations_are_tested_in_every_context_letter_for_letter(screen, caplog):
    with caplog.at_level(logging.WARNING):
        vc.pp.split(screen, **DESIGN, holdout={"perturbations": ["A", "D"]})
    tested = {group for group, found in parts(screen).items() if "test" in found}
    assert tested == {("K562", "A"), ("K562", "D"), ("RPE1", "A"), ("RPE1", "D")}
    assert "1 training perturbations share a target with a held-out one: A+B." in caplog.text


def test_random_takes_the_fraction_of_each_group(screen):
    vc.pp.split(screen, **DESIGN, holdout={"fraction": 0.25}, val_fraction=0.2)
    counts = screen.obs.groupby(["cell_type", "target_gene", "split"], observed=False).size().unstack()
    perturbed = counts.drop(index="non-targeting", level=1)
    # 5 of 20 for the test, then a fifth of the 15 left.
    assert (perturbed.to_numpy() == [12, 3, 5]).all()
    assert (counts.xs("non-targeting", level=1).to_numpy() == [30, 0, 0]).all()


@pytest.mark.parametrize(
    ("holdout", "tested"),
    [
        ({"contexts": 1}, 5),
        ({"contexts": 0.5}, 5),
        ({"perturbations": 2}, 4),
        ({"contexts": 1, "perturbations": 0.6}, 3),
        ({"contexts": "RPE1", "perturbations": 1}, 1),
    ],
)
def test_numbers_draw_names_and_listing_those_names_gives_the_same_split(screen, holdout, tested):
    vc.pp.split(screen, **DESIGN, holdout=holdout, seed=3)
    drawn = screen.uns["virtualcell"]["split_manifest"]["split"]["held_out"]
    vc.pp.split(screen, **DESIGN, holdout=drawn, seed=3, key_added="listed")
    assert (screen.obs["split"] == screen.obs["listed"]).all()
    assert sum("test" in found for found in parts(screen).values()) == tested


@pytest.mark.parametrize("holdout", [{"contexts": 1}, {"perturbations": 2}, {"fraction": 0.3}])
def test_order_of_cells_does_not_matter_but_the_seed_does(screen, holdout):
    shuffled = screen[np.random.default_rng(1).permutation(screen.n_obs)].copy()
    vc.pp.split(screen, **DESIGN, holdout=holdout)
    vc.pp.split(shuffled, **DESIGN, holdout=holdout)
    assert (shuffled.obs["split"].reindex(screen.obs_names) == screen.obs["split"]).all()
    vc.pp.split(shuffled, **DESIGN, holdout=holdout, seed=1)
    assert (shuffled.obs["split"].reindex(screen.obs_names) != screen.obs["split"]).any()


def test_validation_leaves_a_training_cell_in_small_groups(screen):
    few = screen[screen.obs.groupby(["cell_type", "target_gene"]).cumcount() < 2].copy()
    vc.pp.split(few, **DESIGN, holdout={"contexts": ["RPE1"]}, val_fraction=0.9)
    assert all(
        found == {"train", "val"} for (context, p), found in parts(few).items() if context == "K562" and p in "ABCD"
    )


@pytest.mark.parametrize("suffix", ["h5ad", "json"])
def test_replay_is_exact_after_a_round_trip_in_any_order(screen, tmp_path, suffix):
    vc.pp.split(screen, **DESIGN, holdout={"contexts": 1, "perturbations": ["A", "B"]}, seed=5)
    before = screen.uns["virtualcell"]["split_manifest"]["split"]
    source = screen
    if suffix == "h5ad":
        screen.write_h5ad(tmp_path / "screen.h5ad")
        source = ad.read_h5ad(tmp_path / "screen.h5ad")
    vc.pp.save_split(source, tmp_path / "split.json")

    blank = screen[np.random.default_rng(0).permutation(screen.n_obs)].copy()
    del blank.obs["split"], blank.uns["virtualcell"]
    vc.pp.apply_split(blank, tmp_path / "split.json")
    assert (blank.obs["split"].reindex(screen.obs_names) == screen.obs["split"]).all()
    assert list(blank.obs["split"].cat.categories) == ["train", "val", "test"]
    after = blank.uns["virtualcell"]["split_manifest"]["split"]
    pd.testing.assert_frame_equal(before["groups"], after["groups"])
    assert {k: v for k, v in before.items() if k != "groups"} == {k: v for k, v in after.items() if k != "groups"}
    assert after["seed"] == 5
    assert after["kind"] == "few-shot"


def test_groups_count_the_cells(screen):
    vc.pp.split(screen, **DESIGN, holdout={"contexts": ["RPE1"]})
    groups = screen.uns["virtualcell"]["split_manifest"]["split"]["groups"]
    assert groups["n_cells"].sum() == screen.n_obs
    found = groups.set_index(["context", "perturbation", "split"])["n_cells"]
    assert found["K562", "A", "val"] == 2
    assert found["K562", "A", "train"] == 18
    assert found["RPE1", "A", "test"] == 20
    assert found["RPE1", "non-targeting", "train"] == 30


def test_without_contexts_all_cells_are_of_one(screen):
    vc.pp.split(screen, perturbation_key="target_gene", control="non-targeting", holdout={"fraction": 0.2})
    groups = screen.uns["virtualcell"]["split_manifest"]["split"]["groups"]
    assert set(groups["context"]) == {ALL}
    assert groups["n_cells"].sum() == screen.n_obs


def test_replay_takes_a_part_of_the_cells_but_no_others(screen, tmp_path):
    vc.pp.split(screen, **DESIGN, holdout={"fraction": 0.2})
    vc.pp.save_split(screen, tmp_path / "split.json")
    part = screen[::3].copy()
    del part.obs["split"]
    vc.pp.apply_split(part, tmp_path / "split.json", key_added="again")
    assert (part.obs["again"] == screen.obs["split"].reindex(part.obs_names)).all()

    part.obs_names = ["new1", "new2", *part.obs_names[2:]]
    with pytest.raises(ValueError, match=r"2 of 87 cells are not in the split saved in .*\['new1', 'new2'\].*by name"):
        vc.pp.apply_split(part, tmp_path / "split.json")
    assert sum(map(len, json.loads((tmp_path / "split.json").read_text())["cells"].values())) == screen.n_obs


def test_labels_are_noted_as_the_split_read_them(screen, tmp_path):
    screen.obs["dose"], screen.obs["other"] = 1.0, screen.obs["target_gene"]
    vc.pp.split(screen, **DESIGN, dose_key="dose", combination_separator="&", holdout={"fraction": 0.5})
    plain = {k: v for k, v in DESIGN.items() if k != "context_key"}
    vc.pp.split(screen, **plain, holdout={"fraction": 0.5}, key_added="plain")
    design = screen.uns["virtualcell"]["design"]
    assert design == {**plain, "combination_separator": "+"}  # neither doses nor contexts
    vc.pp.save_split(screen, tmp_path / "plain.json", split_key="plain")
    vc.pp.split(screen, **DESIGN, holdout={"fraction": 0.5})
    vc.pp.apply_split(screen, tmp_path / "plain.json")
    assert screen.uns["virtualcell"]["design"] == design
    # whatever was noted afterwards, a split is drawn as it was made
    screen.uns["virtualcell"]["design"] |= {"context_key": "cell_type", "dose_key": "dose"}
    assert len(vc.pl.split(screen, split_key="plain").get_xticks()) == 1


def test_several_splits_live_side_by_side_and_spare_what_others_wrote(screen, tmp_path):
    screen.uns["virtualcell"] = {"design": {"control": "NT", "layer": "counts"}}
    vc.pp.split(screen, **DESIGN, holdout={"contexts": ["K562"]}, key_added="zero")
    vc.pp.split(screen, **DESIGN, holdout={"fraction": 0.5}, key_added="cells")
    kinds = {k: m["kind"] for k, m in screen.uns["virtualcell"]["split_manifest"].items()}
    assert kinds == {"zero": "zero-shot", "cells": "random"}
    assert screen.uns["virtualcell"]["design"] == {
        **DESIGN,
        "layer": "counts",
        "combination_separator": "+",
    }  # noted for later calls
    with pytest.raises(UnknownNameError, match=r"split_key='zer' is unknown. Did you mean 'zero'\? Run `vc.pp.split`"):
        vc.pp.save_split(screen, tmp_path / "split.json", split_key="zer")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"holdout": {"context": ["K562"]}}, ValueError, "none of the four kinds"),
        ({"holdout": ["K562"]}, TypeError, r"^holdout=\['K562'\] must be a dictionary"),
        ({"holdout": {"contexts": ["K652"]}}, KeyError, "holdout\\['contexts'\\]='K652' .* Did you mean 'K562'"),
        ({"holdout": {"perturbations": ["E"]}}, KeyError, "holdout\\['perturbations'\\]='E' is unknown"),
        ({"holdout": {"perturbations": ["non-targeting"]}}, ValueError, "names the control 'non-targeting'"),
        ({"holdout": {"contexts": ["K562", "RPE1"]}}, ValueError, "leaves no perturbed cell to train on"),
        ({"holdout": {"contexts": 3}}, ValueError, "whole number from 1 to 2"),
        ({"holdout": {"perturbations": 1.5}}, ValueError, "fraction between 0 and 1"),
        ({"holdout": {"fraction": 1.0}}, ValueError, "must be a number between 0 and 1"),
        ({"holdout": {"fraction": "0.2"}}, ValueError, "fraction': '0.2'} must be a number between 0 and 1"),
        ({"holdout": {"fraction": 0.1}, "val_fraction": "0.1"}, ValueError, "val_fraction='0.1' is not a number"),
        ({"holdout": {"fraction": 0.1}, "seed": -1}, ValueError, "seed=-1 is not a whole number of at least 0"),
        ({"holdout": {"fraction": 0.1}, "key_added": 3}, TypeError, "key_added=3 must be the name of a column"),
        ({"holdout": {"fraction": 0.1}, "key_added": "cell_type"}, ValueError, "is the column of context_key=, which"),
        ({"holdout": {"fraction": 0.01}}, ValueError, "leaves no cell to test on"),
        ({"holdout": {"fraction": 0.1}, "val_fraction": 1}, ValueError, "val_fraction=1 "),
        ({"holdout": {"contexts": 1}, "context_key": None}, ValueError, "context_key is not given"),
        ({"holdout": {"fraction": 0.1}, "control": "NT"}, KeyError, "control='NT' is unknown"),
        ({"holdout": {"fraction": 0.1}, "context_key": "celltype"}, KeyError, "Did you mean 'cell_type'"),
    ],
)
def test_errors_name_what_was_wrong(screen, arguments, error, message):
    with pytest.raises(error, match=message):
        vc.pp.split(screen, **(DESIGN | arguments))
    assert "split" not in screen.obs
    assert "virtualcell" not in screen.uns


@pytest.mark.parametrize(
    "holdout", [{"contexts": ["RPE1"]}, {"perturbations": ["A"]}, {"contexts": ["RPE1"], "perturbations": ["A"]}]
)
def test_a_split_is_not_replayed_on_other_cells_of_the_same_names(screen, tmp_path, holdout):
    screen.obs_names = [str(i) for i in range(screen.n_obs)]
    other = screen[::-1].copy()
    vc.pp.split(screen, **DESIGN, holdout=holdout)
    vc.pp.save_split(screen, tmp_path / "split.json")
    vc.pp.apply_split(other, tmp_path / "split.json")
    assert (other.obs["split"] == screen.obs["split"][other.obs_names]).all()
    other.obs_names = [str(i) for i in range(other.n_obs)]  # numbered anew after cells were sorted
    del other.obs["split"]
    with pytest.raises(ValueError, match=r"cells are not those of their names in the split saved in .*Held out were"):
        vc.pp.apply_split(other, tmp_path / "split.json")
    assert "split" not in other.obs
    with pytest.raises(ValueError, match="'target_gene' is the column of perturbation_key=, which would be lost"):
        vc.pp.apply_split(screen, tmp_path / "split.json", key_added="target_gene")


def test_a_random_split_is_not_replayed_where_control_cells_would_be_tested(screen, tmp_path):
    screen.obs_names = [str(i) for i in range(screen.n_obs)]
    vc.pp.split(screen, **DESIGN, holdout={"fraction": 0.3})
    vc.pp.save_split(screen, tmp_path / "split.json")
    screen.obs["target_gene"] = screen.obs["target_gene"].to_numpy()[::-1]
    with pytest.raises(ValueError, match=r"Held out were shares of cells, and control cells are 'train'"):
        vc.pp.apply_split(screen, tmp_path / "split.json", key_added="again")


def test_a_test_context_without_controls_is_refused(screen):
    bare = screen[(screen.obs["cell_type"] == "K562") | (screen.obs["target_gene"] != "non-targeting")].copy()
    with pytest.raises(ValueError, match="Context 'RPE1' has test cells but no control cells"):
        vc.pp.split(bare, **DESIGN, holdout={"contexts": ["RPE1"]})


def test_doubled_cell_names_are_refused(screen):
    screen.obs_names = ["cell1", *screen.obs_names[1:]]
    with pytest.raises(ValueError, match=r"obs_names repeats \['cell1'\]"):
        vc.pp.split(screen, **DESIGN, holdout={"fraction": 0.2})


def test_papalexi_few_shot_in_a_mudata(papalexi_file, tmp_path):
    mdata = md.read_h5mu(papalexi_file)
    arguments = DESIGN | {"context_key": "batch"}
    held = ["STAT1", "JAK2", "IFNGR2"]
    vc.pp.split(mdata, **arguments, holdout={"contexts": ["rep_3"], "perturbations": held})
    rna = mdata["rna"]
    expected = (rna.obs["batch"] == "rep_3") & rna.obs["target_gene"].isin(held)
    assert ((rna.obs["split"] == "test") == expected).all()
    fraction = (rna.obs["split"] == "val").sum() / (~expected & (rna.obs["target_gene"] != "non-targeting")).sum()
    assert fraction == pytest.approx(0.1, abs=0.005)
    vc.pp.save_split(mdata, tmp_path / "split.json")
    again = rna[::-1].copy()
    vc.pp.apply_split(again, tmp_path / "split.json", key_added="replayed")
    assert (again.obs["replayed"] == again.obs["split"]).all()
