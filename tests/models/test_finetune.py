from __future__ import annotations

import dataclasses
import logging
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import virtualcell as vc
from virtualcell.models import ST
from virtualcell.models._features import PerturbationTable
from virtualcell.models._finetune import extend_table, transfer_weights
from virtualcell.models._partly import partly_trained
from virtualcell.modules import STNetwork

CONTROL = "non-targeting"
TINY = {"n_hidden": 64, "n_feedforward": 128, "n_layers": 1, "set_size": 16}
QUIET = {"progress_bar": False, "accelerator": "cpu", "val_fraction": 0.0}
FAST = {"scale": "log1p", "se": False, "validate": False}
STAY = {"max_steps": 1, "lr": 1e-30}  # a step that changes nothing


@pytest.fixture(scope="module")
def continued(design):
    """`fit_state` from a trained model, without SE."""

    def continued(data, start, *, training: dict | None = None, **options) -> ST:
        training = {**QUIET, **STAY, **(training or {})}
        return vc.tl.fit_state(data, **{**design, **FAST, "init_from": start, "training": training, **options})

    return continued


@pytest.fixture(scope="module")
def start(design):
    """A small ST trained on some genes and perturbations of a screen."""

    def start(data, genes, perturbations, *, training: dict | None = None, **options) -> ST:
        part = data[data.obs["target_gene"].isin([*perturbations, CONTROL]), genes].copy()
        options["network"] = {**TINY, **options.get("network", {})}
        training = {**QUIET, "max_steps": 10, **(training or {})}
        return vc.tl.fit_state(part, **{**design, **FAST, "training": training, **options})

    return start


@pytest.fixture
def shuffled(screen, targets) -> ad.AnnData:
    """Cells of one old and one new target and controls, the genes in another order."""
    rng = np.random.default_rng(3)
    return screen[
        screen.obs["target_gene"].isin([targets[0], targets[-1], CONTROL]), rng.permutation(screen.n_vars)
    ].copy()


def predicted(model: ST, data: ad.AnnData, perturbation: str, genes) -> np.ndarray:
    """Mean profiles, which do not depend on what other genes there are; cells keep their number of counts."""
    return vc.tl.predict_perturbation(data, perturbation, model=model, scale="log1p", emit="mean")[:, genes].X


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.module.state_dict().items()}


# -- where it starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["shift", "level", "all", "none"])
def test_starts_with_the_old_predictions_whatever_the_order_of_genes(
    screen, shuffled, targets, start, continued, head, caplog
):
    genes = list(screen.var_names[:70])
    old = start(screen, genes, targets[:-1], network={"head": head})
    with caplog.at_level(logging.INFO):
        new = continued(shuffled, old)
    assert "70 genes kept, 10 new, 0 dropped" in caplog.text
    assert "5 perturbations kept, 1 new, 0 dropped" in caplog.text
    assert new.genes == sorted(screen.var_names)
    assert new.config.n_hidden == 64
    for target in [*targets[:-1], f"{targets[0]}+{targets[1]}"]:  # also those of which the new data have no cell
        expected = predicted(old, screen, target, genes)
        np.testing.assert_allclose(predicted(new, screen, target, genes), expected, atol=2e-6)
    if head == "shift":  # a gene that is new starts unchanged
        others = list(screen.var_names[70:])
        here = vc.tl.predict_perturbation(screen, targets[0], model=new, scale="log1p", emit="mean")[:, others]
        np.testing.assert_allclose(here.X, here.layers["control"], atol=1e-6)


def test_old_genes_that_the_data_lack_are_named(screen, shuffled, targets, start, continued, caplog):
    old = start(screen, list(screen.var_names), targets[:-1])
    without = sorted(screen.var_names)[3]
    new = continued(shuffled[:, shuffled.var_names != without].copy(), old)
    assert without in caplog.text
    assert new.genes == [g for g in sorted(screen.var_names) if g != without]


def test_genes_of_the_old_model_come_along_with_new_variable_ones(screen, shuffled, targets, start, continued):
    genes = list(screen.var_names[:40])
    old = start(screen, genes, targets[:-1])
    new = continued(shuffled, old, n_top_genes=20)
    assert set(genes) < set(new.genes) < set(screen.var_names)


def test_batches_are_found_by_name(screen, shuffled, targets, start, continued):
    genes = list(screen.var_names)
    shuffled.obs["batch"] = shuffled.obs["batch"].astype(str).replace({"batch_1": "zeroth"})
    names = sorted(set(screen.obs["batch"].astype(str)))
    assert names[0] == "batch_1"
    old = start(screen, genes, targets[:-1], batch_key="batch", network={"transfer": False})
    table = old.module.batch_encoder.weight.detach()
    new = continued(shuffled, old, batch_key="batch")
    rows = new.module.batch_encoder.weight.detach()
    assert new.batches == [*names[1:], "zeroth"]
    torch.testing.assert_close(rows[:-1], table[1:])
    torch.testing.assert_close(rows[-1], table.mean(dim=0))
    # without batches: as the old model with the mean of its batches, which is linear in front of the transformer
    none = continued(shuffled, old)
    old.module.batch_encoder.weight.data[:] = table.mean(dim=0)
    none.mixture = old.mixture  # heads were weighed anew, on the new cells
    cells = np.ones((16, len(genes)), np.float32)
    expected = old.predict_embedding(cells, targets[0], batch=np.full(16, "batch_1"))
    np.testing.assert_allclose(none.predict_embedding(cells, targets[0]), expected, atol=2e-6)
    # batches where there were none: nothing changes yet
    added = continued(shuffled, none, batch_key="batch")
    assert added.module.batch_encoder.weight.abs().max() < 1e-20


def test_models_of_arc_continue_from_their_control(golden, continued, design):
    old = ST.from_arc(golden / "st_run")
    known = [p for p in old.table.names if p != old.control]
    rng = np.random.default_rng(0)
    n = 96
    counts = rng.poisson(2.0, size=(n, len(old.genes))) + 1.0
    data = ad.AnnData(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32))
    data.var_names = old.genes
    data.obs["target_gene"] = np.repeat(["ctrl", known[0], "novel"], n // 3)
    data.obs["cell_type"] = "A"
    data = data[:, ::-1].copy()
    kwargs = {"control": "ctrl", "context_key": None, "batch_key": None}
    new = continued(data, old, **kwargs)
    control = data[:16, old.genes].X
    assert not old.batches
    order = [new.genes.index(g) for g in old.genes]
    for theirs, ours in [(known[0], known[0]), (known[1], known[1]), (old.control, "ctrl")]:
        expected = old.predict_embedding(control, theirs)
        got = new.predict_embedding(control[:, np.argsort(order)], ours)[:, order]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_embedding_space_keeps_its_se_and_decodes_genes_by_name(counts, small_se, design, targets):
    quick = {"validate": False, "library_size_key": "n"}
    rep = {"use_rep": "X_state"}
    network = {**TINY, **rep, "head": "level", "decoder_hidden": (16,)}
    counts.obs["n"] = np.asarray(counts.X.sum(axis=1)).ravel()
    genes = list(counts.var_names[:60])
    part = counts[counts.obs["target_gene"] != targets[-1]].copy()
    old = vc.tl.fit_state(
        part, **design, **quick, se=small_se, training={**QUIET, "max_steps": 3}, network=network, n_top_genes=40
    )
    more = counts[:, ::-1].copy()
    stay = {**design, **quick, "init_from": old, "training": {**QUIET, **STAY}}
    new = vc.tl.fit_state(more, **stay, network=rep, n_top_genes=60)
    assert new.se is small_se
    assert len(new.genes) > len(old.genes)
    controls = small_se.get_latent_representation(part)[:16]
    genes = [g for g in old.genes if g in new.genes]
    assert genes == old.genes
    rows = [new.genes.index(g) for g in genes]
    a, b = (m.predict_embedding(controls, targets[0]) for m in (old, new))
    np.testing.assert_allclose(b, a, atol=1e-6)
    there = {"context": "type_1", "base": controls.mean(axis=0)}
    a, b = (m.predict_cells(controls, targets[0], **there) for m in (old, new))
    np.testing.assert_allclose(b[:, rows], a, atol=1e-6)

    old.se = None
    with pytest.raises(ValueError, match=r"pass that one as se=, or se=False"):
        vc.tl.fit_state(more, **stay, network=rep)
    with pytest.raises(ValueError, match=r"use_rep=None, but init_from works on obsm\['X_state'\]"):
        vc.tl.fit_state(more, **stay)
    more.obsm["X_state"] = more.obsm["X_state"][:, :-1]
    with pytest.raises(ValueError, match="17 columns, init_from was trained on 18"):
        vc.tl.fit_state(more, **stay, network=rep, se=False)


# -- tables of perturbations ------------------------------------------------------------------------------------------


def test_one_hot_tables_grow():
    old = PerturbationTable.one_hot(["B", "A", "A+C"], "ctrl")
    new = extend_table(old, ["NT", "A+D", "B", "E"], "NT", None)
    assert new.names == ["A", "B", "C", "D", "E"]
    assert torch.equal(new.vectors, torch.eye(5))
    assert new.seen == ["A", "A+C", "A+D", "B", "E"]
    # a row of the control, as published models have it, keeps its vector under the new label
    arc = PerturbationTable(["A", "DMSO"], torch.eye(4)[[2, 0]], control="DMSO", seen=["A"], has_features=False)
    new = extend_table(arc, ["NT", "B"], "NT", None)
    assert new.names == ["A", "NT", "B"]
    assert torch.equal(new.vectors, torch.eye(5)[[2, 0, 4]])
    with pytest.raises(ValueError, match="control='A' is a perturbation of init_from, whose control is 'DMSO'"):
        extend_table(arc, ["A", "B"], "A", None)


def test_features_come_on_the_scale_of_the_old_table():
    rng = np.random.default_rng(0)
    raw = pd.DataFrame(rng.normal(3, 10, size=(7, 4)), index=list("ABCDEFG"))
    old = PerturbationTable.from_features(raw.iloc[:4], ["A", "B"], "ctrl")
    new = extend_table(old, ["A", "F", "ctrl"], "ctrl", raw.iloc[2:])
    assert new.names == list("ABCDEFG")
    assert new.seen == ["A", "B", "F"]
    torch.testing.assert_close(new.vectors[:4], old.vectors)
    center, spread = raw.iloc[:4].mean(), raw.iloc[:4].std(ddof=0)
    expected = np.c_[(raw.iloc[4:] - center) / spread / 2, np.ones(3)]
    np.testing.assert_allclose(new.vectors[4:].numpy(), expected, rtol=1e-4, atol=1e-5)
    # no features needed for what is there
    assert extend_table(old, ["C"], "ctrl", None).names == list("ABCD")
    with pytest.raises(ValueError, match=r"has none for \['F'\]"):
        extend_table(old, ["F"], "ctrl", None)
    with pytest.raises(ValueError, match=r"has none for \['Z'\]"):
        extend_table(old, ["Z"], "ctrl", raw)
    with pytest.raises(ValueError, match="3 columns and 2 rows of perturbations that init_from knows; needed are 4"):
        extend_table(old, ["F"], "ctrl", raw.iloc[2:, :3])
    with pytest.raises(ValueError, match="differs from the features of init_from"):
        extend_table(old, ["F"], "ctrl", raw + rng.normal(size=raw.shape))


def test_features_reach_a_model_that_was_one_hot(screen, shuffled, targets, start, continued, caplog):
    old = start(screen, list(screen.var_names), targets[:-1])
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(7, 3)), index=[*targets, "UNSEEN"])
    new = continued(shuffled, old, perturbation_features=table)
    assert "first layer is learned anew" in caplog.text
    assert torch.equal(new.module.transformer_backbone.norm.weight, old.module.transformer_backbone.norm.weight)
    assert np.isfinite(predicted(new, screen, "UNSEEN", new.genes)).all()
    # and a model with features keeps them
    again = continued(shuffled, new)
    np.testing.assert_allclose(
        predicted(again, screen, "UNSEEN", new.genes), predicted(new, screen, "UNSEEN", new.genes), atol=1e-6
    )


# -- what it learns ---------------------------------------------------------------------------------------------------


def test_new_perturbations_start_among_the_old_ones(build, screen):
    old = build(screen.copy())
    first = old.module.pert_encoder[0]
    with torch.no_grad():
        first.weight.copy_(torch.randn(64, 6) * torch.rand(64, 1) + torch.randn(64, 1))
    names = [f"new{i}" for i in range(3000)]
    table = extend_table(old.table, names, CONTROL, None)
    new = STNetwork(dataclasses.replace(old.config, n_perturbation=table.n_dims))
    transfer_weights(old.module, new, genes=(old.genes, old.genes), batches=([], []), perturbations=(old.table, table))
    drawn, theirs = new.pert_encoder[0].weight.detach()[:, 6:], first.weight.detach()
    assert torch.equal(new.pert_encoder[0].weight.detach()[:, :6], theirs)
    assert (drawn.mean(dim=1) - theirs.mean(dim=1)).abs().max() < 0.1
    assert (drawn.std(dim=1) / theirs.std(dim=1, correction=0) - 1).abs().max() < 0.1


def test_learns_new_perturbations_faster_than_from_scratch(design):
    counts = vc.datasets.synthetic(
        n_contexts=5, n_perturbations=12, n_genes=80, n_cells_per_group=30, n_control_cells=60,
        effect_size=0.5, context_specificity=0.5, seed=1,
    )  # fmt: skip
    counts.X = counts.X.toarray()
    counts.X = np.log1p(counts.X / counts.X.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    vc.pp.split(counts, **design, holdout={"contexts": ["type_5"]}, val_fraction=0)
    *_, new = np.split(np.array(sorted(set(counts.obs["target_gene"]) - {CONTROL})), [7])
    is_new = counts.obs["target_gene"].isin(new)
    options = {**design, **FAST, "split_key": "split"}
    quiet = {k: v for k, v in QUIET.items() if k != "val_fraction"}  # the split says which
    # the transferred effect would know the new perturbations without learning, the level head knows the mean cell
    network = {**TINY, "head": "shift"}

    def training(max_steps: int) -> dict:
        return {"training": {**quiet, "lr": 3e-3, "contrast_weight": 0, "max_steps": max_steps}}

    old = vc.tl.fit_state(counts[~is_new].copy(), **options, **training(120), network=network)
    few = counts[is_new | (counts.obs["target_gene"] == CONTROL)]
    starts = ({"init_from": old}, {"network": network})
    unseen = counts[counts.obs["cell_type"] == "type_5"].copy()
    control = unseen[unseen.obs["target_gene"] == CONTROL].X.mean(axis=0)

    def score(model: ST) -> np.ndarray:
        """Pearson delta and error of the mean shift in the unseen cell type, over the new targets."""
        scores = []
        for target in new:
            truth = unseen[unseen.obs["target_gene"] == target].X.mean(axis=0) - control
            delta = model.predict(unseen, target)[list(counts.var_names)].to_numpy().mean(axis=0) - control
            scores.append([np.corrcoef(delta, truth)[0, 1], np.abs(delta - truth).mean()])
        return np.mean(scores, axis=0)

    # so few steps go differently with every seed
    (r, error), (r_scratch, error_scratch) = (
        np.mean([score(vc.tl.fit_state(few.copy(), **options, **training(30), **start, seed=s)) for s in range(3)], 0)
        for start in starts
    )
    assert r > r_scratch + 0.1
    assert error < 0.95 * error_scratch


def test_frozen_parts_do_not_move(screen, shuffled, targets, start, continued):
    old = start(screen, list(screen.var_names), targets[:-1])
    before = state(old)
    frozen = ["transformer_backbone", "project_out.0", "basal_encoder.0.bias"]
    learning = {"max_steps": 3, "lr": 1e-2, "weight_decay": 0.5, "freeze": frozen}
    new = continued(shuffled, old, training=learning)
    moved = {k for k, v in state(new).items() if v.shape != before[k].shape or not torch.equal(v, before[k])}
    parts = {k.split(".")[0] for k in moved}
    assert parts == {"pert_encoder", "basal_encoder", "project_out", "project_level"}
    assert not moved & {"project_out.0.weight", "project_out.0.bias", "basal_encoder.0.bias"}
    assert {"project_out.3.weight", "basal_encoder.0.weight"} <= moved
    assert all(p.requires_grad for p in new.module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in state(old).items())  # the old model is left alone


def test_a_prefix_is_a_whole_name(screen, targets, start):
    old = start(screen, list(screen.var_names), targets, network={"n_layers": 2})
    with partly_trained(old.module, freeze="transformer_backbone.layers.1"):
        frozen = {n for n, p in old.module.named_parameters() if not p.requires_grad}
    assert frozen
    assert {n.split(".")[2] for n in frozen} == {"1"}
    with pytest.raises(KeyError, match=r"freeze='transformer_bakbone' is unknown. Did you mean 'transformer_backbone'"):
        partly_trained(old.module, freeze=["transformer_bakbone"]).__enter__()
    with pytest.raises(KeyError, match=r"freeze='nothing' is unknown. Known: 'pert_encoder', 'basal_encoder'"):
        partly_trained(old.module, freeze=["nothing"]).__enter__()
    everything = [n for n, _ in old.module.named_children()]
    with pytest.raises(ValueError, match="leaves nothing to train"):
        partly_trained(old.module, freeze=everything).__enter__()
    assert all(p.requires_grad for p in old.module.parameters())


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_changes_the_backbone_by_matrices_of_low_rank(screen, shuffled, targets, start, continued, rank, tmp_path):
    old = start(screen, list(screen.var_names), targets[:-1], training={"lr": 3e-3})
    before = state(old)
    lora = {"r": rank, "alpha": 16}
    learning = {"lora": lora, "freeze": ["pert_encoder"], "max_steps": 10, "lr": 1e-2}
    new = continued(shuffled, old, training=learning)
    after = state(new)
    assert set(after) == set(before)
    linear = [k for k in before if "_proj" in k]
    assert len(linear) == 7
    for name in linear:
        change = torch.linalg.svdvals((after[name] - before[name]).double())
        assert change[rank - 1] > 1e-3
        assert change[rank] < 1e-4 * change[0]  # float32 of a sum
    for name in set(before) - set(linear):
        if name.startswith("transformer_backbone"):
            assert torch.equal(after[name], before[name]), name
    assert torch.equal(after["pert_encoder.3.weight"], before["pert_encoder.3.weight"])
    assert not torch.equal(after["project_out.0.weight"], before["project_out.0.weight"])
    new.save(tmp_path / "merged")
    again = ST.load(tmp_path / "merged", accelerator="cpu")
    np.testing.assert_array_equal(
        predicted(again, screen, targets[-1], again.genes), predicted(new, screen, targets[-1], new.genes)
    )


def test_lora_loads_without_peft(screen, shuffled, targets, start, continued, tmp_path):
    old = start(screen, list(screen.var_names), targets[:-1])
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    new = continued(shuffled, old, training={"lora": lora, "max_steps": 2, "lr": 1e-2})
    changed = {k for k, v in state(new).items() if "_proj" in k and not torch.equal(v, old.module.state_dict()[k])}
    assert {k.split(".")[-2] for k in changed} == {"q_proj", "v_proj"}
    assert {type(m).__module__.split(".")[0] for m in new.module.modules()} == {"torch", "virtualcell"}


def test_lora_refuses(screen, shuffled, targets, start, continued, monkeypatch):
    old = start(screen, list(screen.var_names), targets[:-1])
    with pytest.raises(KeyError, match=r"lora='rank' is unknown. .*'r'"):
        continued(shuffled, old, training={"lora": {"rank": 2}})
    with pytest.raises(KeyError, match=r"lora\['target_modules'\]='q' is unknown. .*'q_proj'"):
        continued(shuffled, old, training={"lora": {"target_modules": ["q"]}})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "virtualcell\[lora\]"'):
        continued(shuffled, old, training={"lora": {"r": 2}})


# -- SE ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_an_se_goes_on_with_its_own_genes(counts, small_se, design, lora):
    before = state(small_se)
    more = counts[:, ::-1][:, 10:].copy()
    training = {**QUIET, "max_steps": 1, "lora": lora, "freeze": ["count_encoder"]}
    kwargs = {"network": TINY, "training": training, "validate": False}
    st = vc.tl.fit_state(more, **design, **kwargs, init_from=small_se, se={"max_steps": 2})
    assert st.se is not small_se
    assert list(st.se.gene_names) == list(small_se.gene_names)
    assert torch.equal(st.se.gene_embeddings, small_se.gene_embeddings)
    assert st.se.length == small_se.length
    after = state(st.se)
    frozen = {k for k, v in before.items() if torch.equal(v, after[k])}
    expected = {k for k in before if k.startswith("count_encoder")}
    if lora is not None:
        expected |= {k for k in before if k.startswith("transformer_encoder") and (".norm" in k or "bias" in k)}
    assert expected <= frozen
    assert all(k in expected or k.startswith("dataset_encoder") for k in frozen)  # one data set: nothing to classify
    np.testing.assert_allclose(more.obsm["X_state"], st.se.get_latent_representation(more), atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in state(small_se).items())
    # two steps from a trained model, not from a new one
    far = {k: (after[k] - before[k]).abs().mean() for k in before if k.startswith("transformer_encoder")}
    assert max(far.values()) < 0.01


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_go_together(screen, shuffled, targets, start, continued, small_se, design):
    old = start(screen, list(screen.var_names), targets[:-1])
    with pytest.raises(
        ValueError, match=r"network: n_hidden=32 \(init_from has 64\), head='none' \(init_from has 'both'\)\. The mod"
    ):
        continued(shuffled, old, network={"n_hidden": 32, "head": "none", "n_layers": 1})
    assert continued(shuffled, old, network={"n_hidden": 64, "dropout": 0.0}).config.dropout == 0
    with pytest.raises(KeyError, match=r"network option='n_hiden' is unknown\. Did you mean 'n_hidden'"):
        continued(shuffled, old, network={"n_hiden": 32})
    with pytest.raises(ValueError, match="freeze and lora need init_from="):
        continued(shuffled, None, training={"freeze": ["project_out"]})
    with pytest.raises(TypeError, match="init_from must be an ST or an SE, got str"):
        continued(shuffled, "model")
    with pytest.raises(ValueError, match=r"init_from= is an SE, .*: leave se= out"):
        continued(shuffled, small_se)
    shuffled.var_names = [f"X{i}" for i in range(shuffled.n_vars)]
    with pytest.raises(
        ValueError, match=r"none of the 80 genes of init_from \(GENE.*is among the 80 of the data \(X0, X1"
    ):
        continued(shuffled, old)


@pytest.mark.parametrize("has_features", [False, True])
def test_a_perturbation_that_only_validation_holds_needs_features(screen, targets, start, continued, has_features):
    old = start(screen, list(screen.var_names), targets[:-1])
    last, validated = targets[-1], {"split_key": "part", "training": {"min_cells": 0, "val_fraction": None}}
    screen.obs["part"] = np.where(screen.obs["target_gene"] == last, "val", "train")
    if has_features:
        table = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)), index=targets)
        new = continued(screen, old, **validated, perturbation_features=table)
        assert last not in new.table.seen
        assert last in new.table.names
        return
    with pytest.raises(ValueError, match=rf"\['{last}'\] occur in validation but in no training cells"):
        continued(screen, old, **validated)
    # one that the model learned from before is no such one
    screen.obs["part"] = np.where(screen.obs["target_gene"] == targets[0], "val", "train")
    new = continued(screen, old, **validated)
    assert targets[0] in new.table.seen
    # and of a pair, both parts have to be known
    pair = screen.obs["target_gene"].astype(str)
    screen.obs["target_gene"] = pair.where(pair != targets[1], f"{targets[0]}+{last}")
    screen.obs["part"] = np.where(pair == targets[1], "val", "train")
    assert f"{targets[0]}+{last}" not in continued(screen, old, **validated).table.seen
    screen.obs["part"] = np.where(pair.isin([targets[1], last]), "val", "train")
    with pytest.raises(ValueError, match=rf"\['{targets[0]}\+{last}', '{last}'\] occur in validation"):
        continued(screen, old, **validated)
