from __future__ import annotations

import inspect
import sys

import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.models import SE, ST
from virtualcell.tl._fit_options import FitOptions, NetworkOptions, SEOptions


@pytest.fixture
def trains_nothing(monkeypatch):
    """Any training ends the test."""
    for model in (ST, SE):
        monkeypatch.setattr(model, "train", lambda *_, **__: pytest.fail("a model is trained"))


@pytest.fixture
def refused(screen, design, trains_nothing):
    """`fit_state` with SE; nothing is trained or written."""

    def refused(error, message, **options) -> None:
        before = screen.copy()
        with pytest.raises(error, match=message):
            vc.tl.fit_state(screen, **{**design, **options})
        assert set(screen.obsm) == set(before.obsm)
        assert list(screen.obs) == list(before.obs)
        assert set(screen.uns) == set(before.uns)
        assert set(screen.uns["virtualcell"]) == set(before.uns["virtualcell"])
        assert "st" not in screen.uns["virtualcell"]

    return refused


def test_fit_state_has_few_parameters():
    assert len(inspect.signature(vc.tl.fit_state).parameters) <= 26


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": {"max_step": 5}}, r"^training option='max_step' is unknown\. Did you mean 'max_steps'"),
        ({"training": {"learning_rate": 1}}, r"^training option='learning_rate' is unknown.*Options.*lr"),
        ({"training": {"mincells": 5}}, r"^training option='mincells' is unknown\. Did you mean 'min_cells'"),
        ({"training": {"accelerator": "gpu0"}}, r"^accelerator='gpu0' is unknown\. Valid: 'auto', 'cpu', 'gpu'"),
        ({"training": {"loss": "enrgy"}}, r"^loss='enrgy' is unknown\. Did you mean 'energy'"),
        ({"network": {"n_hiden": 64}}, r"^network option='n_hiden' is unknown\. Did you mean 'n_hidden'"),
        ({"network": {"userep": "X_state"}}, r"^network option='userep' is unknown\. Did you mean 'use_rep'"),
        ({"network": {"member": 3}}, r"^network option='member' is unknown\. .*STConfig"),
        ({"network": {"preset": "publish"}}, r"^preset='publish' is unknown\. Did you mean 'published'"),
        ({"network": {"head": "hidden"}}, r"^head='hidden' is unknown; valid are \['both', 'shift', 'level'"),
        ({"se": {"max_step": 5}}, r"^se option='max_step' is unknown\. Did you mean 'max_steps'"),
        ({"se": {"gene_embedding": None}}, r"^se option='gene_embedding' is unknown\. Did you mean 'gene_embeddings'"),
        ({"validate": "context"}, r"^validate='context' is unknown\. Did you mean 'contexts'"),
        ({"size": "huge"}, r"^size='huge' is unknown\. Known: 'auto', 'small', 'medium', 'large'"),
        ({"perturbation_key": "target"}, r"^perturbation_key='target' is unknown\. Did you mean 'target_gene'"),
        ({"gene_key": "symbol"}, r"^gene_key='symbol' is unknown"),
    ],
)
def test_misspelt_names_are_answered_with_the_closest(refused, options, message):
    refused((KeyError, ValueError), message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": {"max_steps": 0}}, r"^max_steps=0 is not a whole number of at least 1"),
        ({"training": {"max_steps": 2.5}}, r"^max_steps=2\.5 is not a whole number"),
        ({"training": {"lr": "fast"}}, r"^lr='fast' is not a number above 0"),
        ({"training": {"min_cells": -1}}, r"^min_cells=-1 is not a whole number of at least 0"),
        ({"training": {"val_fraction": 1.0}}, r"^val_fraction=1\.0 must be at least 0 and less than 1"),
        ({"training": {"mean_weight": -1.0}}, r"^mean_weight=-1\.0 is not a number of at least 0"),
        ({"training": {"precision": "bf16-true"}}, r"^precision='bf16-true' is not for these models.*'bf16-mixed'"),
        ({"training": ["max_steps"]}, r"^training options \['max_steps'\] are neither"),
        ({"network": {"n_hidden": 0}}, r"^n_hidden=0 is not a whole number of at least 1"),
        ({"network": {"n_layers": "2"}}, r"^n_layers='2' is not a whole number"),
        ({"network": {"dropout": 1.5}}, r"^dropout=1\.5 is not a number of at least 0 and less than 1"),
        ({"network": {"batch_token": "yes"}}, r"^batch_token='yes' is neither True nor False"),
        ({"network": {"transfer": "yes"}}, r"^transfer='yes' is neither True nor False"),
        ({"network": {"decoder_hidden": (0,)}}, r"^decoder_hidden=\(0,\) is not a list of whole numbers"),
        ({"network": {"set_size": 0}}, r"^set_size=0 is not a whole number of at least 1"),
        ({"network": {"n_networks": 1.5}}, r"^n_networks=1\.5 is not a whole number of at least 1"),
        ({"network": {"n_genes": 500}}, r"^network: n_genes=500 follows from the data: leave it out"),
        ({"network": "published"}, r"^network='published' must be a dictionary"),
        ({"se": True}, r"^se must be a trained SE, a table of gene vectors, a dictionary of options, False or None"),
        ({"se": {"val_fraction": 2}}, r"^val_fraction=2 must be at least 0"),
        ({"se": {"gene_embeddings": [1.0]}}, r"^se: gene_embeddings must be a table .*, got list"),
        ({"seed": -1}, r"^seed=-1 is not a whole number of at least 0"),
        ({"n_top_genes": 0}, r"^n_top_genes=0: at least one gene is needed\. Say None for all"),
        ({"n_top_genes": "all"}, r"^n_top_genes='all': at least one gene is needed"),
        ({"init_from": "model"}, r"^init_from must be an ST or an SE, got str"),
        ({"init_from": None, "training": {"freeze": ["project_out"]}}, r"^freeze and lora need init_from="),
    ],
)
def test_wrong_values_are_refused(refused, options, message):
    refused((ValueError, TypeError), message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_key": "split", "training": {"val_fraction": 0.2}}, r"^val_fraction=0\.2 has no use with split_key"),
        ({"training": {"val_fraction": 0.0, "early_stopping": True}}, r"^early_stopping=True needs validation cells"),
        (
            {"training": {"val_fraction": 0.02, "early_stopping": True}},
            r"^early_stopping=True needs .*val_fraction=0\.02 of .* 20 cells, is none\. Say val_fraction=0\.05",
        ),
        ({"network": {"use_rep": "X_state", "transfer": True}}, r"^transfer=True is about genes"),
        ({"network": {"use_rep": "X_state", "perturbation_dropout": 0.1}}, r"^perturbation_dropout=0\.1 hides feat"),
        ({"scale": "log1p", "library_size_key": "total"}, r"^library_size_key='total' has no use with scale='log1p'"),
    ],
)
def test_options_that_contradict_each_other(refused, options, message):
    refused(ValueError, message, **options)


def test_genes_that_se_could_not_embed_are_found_before_anything_is_trained(screen, refused):
    table = pd.DataFrame(np.ones((3, 4), np.float32), index=["a", "b", "c"])
    refused(ValueError, r"^Only 0 of 90 genes of the data are in the gene table of 3: var_names", se=table)
    screen.obs["split"] = np.where(screen.obs["split"] == "test", "test", "train")
    counts = screen.X.toarray()
    counts[np.flatnonzero(screen.obs["split"] == "test")[0], 0] = np.nan  # all cells are to be embedded
    screen.X = counts
    refused(ValueError, "X holds NaN", split_key="split")


# -- going on from a trained model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"training": {"freeze": ["project"]}}, KeyError, r"^freeze='project' is unknown\. Did you mean 'project_out'"),
        ({"training": {"freeze": 3}}, TypeError, r"^freeze=3 must be a list of beginnings of names"),
        ({"training": {"lora": {"rank": 4}}}, KeyError, r"^lora='rank' is unknown.*'r', 'alpha'"),
        ({"training": {"lora": {"r": 0}}}, ValueError, r"^lora\['r'\]=0 is not a whole number of at least 1"),
        ({"training": {"lora": {"dropout": 1}}}, ValueError, r"^lora\['dropout'\]=1 must be at least 0"),
        ({"training": {"lora": 8}}, TypeError, r"^lora=8 must be a dictionary"),
        (
            {"training": {"lora": {"target_modules": ["q_projj"]}}},
            KeyError,
            r"^lora\['target_modules'\]='q_projj' is unknown\. Did you mean 'q_proj'",
        ),
        ({"network": {"n_hidden": 64}}, ValueError, r"^network: n_hidden=64 \(init_from has 32\)"),
        ({"network": {"n_networks": 2}}, ValueError, r"^network: n_networks=2 \(init_from has 1\)"),
        (
            {"network": {"use_rep": "X_pca"}},
            ValueError,
            r"^use_rep='X_pca', but init_from works on genes: leave use_rep",
        ),
        ({"size": "large"}, ValueError, r"^size='large' has no use with init_from="),
    ],
)
def test_what_does_not_fit_the_model_to_go_on_from(model, refused, options, error, message):
    refused(error, message, init_from=model, **options)


def test_nothing_is_left_to_train(model, refused):
    names = sorted({name.split(".")[0] for name, _ in model.module.named_parameters()})
    refused(ValueError, r"^freeze=\[.*\] leaves nothing to train", init_from=model, training={"freeze": names})


def test_adapters_without_peft(model, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(ImportError, r'pip install "virtualcell\[lora\]"', init_from=model, training={"lora": {"r": 2}})


def test_an_se_to_go_on_from_brings_its_table(screen, model, refused):
    table = vc.pp.expression_gene_embeddings(screen, n_comps=4)
    for se in (False, table, {"gene_embeddings": table}, model.se):
        refused(ValueError, r"^init_from= is an SE, .*: leave se= out", init_from=model.se, se=se)
    refused(KeyError, r"^freeze='gene' is unknown", init_from=model.se, training={"freeze": ["gene"]})


def test_models_that_were_not_trained(screen, design, refused):
    log = screen.copy()
    log.X = np.log1p(1e4 * screen.X.toarray() / screen.X.sum(axis=1).A1[:, None])
    ST.setup_anndata(log, **design)
    refused(ValueError, r"^init_from= is a model that was not trained", init_from=ST(log))
    SE.setup_anndata(screen)
    untrained = SE(screen, vc.pp.expression_gene_embeddings(screen, n_comps=4))
    for name in ("se", "init_from"):
        refused(ValueError, rf"^{name}= is a model that was not trained", **{name: untrained})


@pytest.fixture(scope="module")
def on_x_state(session_screen, fit) -> ST:
    network = {"use_rep": "X_state"}
    return fit(session_screen.copy(), se={"max_steps": 1}, network=network, training={"max_steps": 1})


def test_an_st_on_an_embedding_wants_the_se_that_made_it(on_x_state, refused, monkeypatch):
    on_rep = {"init_from": on_x_state, "network": {"use_rep": "X_state"}}
    refused(ValueError, r"the vectors of an SE that is trained now mean something else", **on_rep, se={"max_steps": 1})
    message = r"but init_from works on obsm\['X_state'\]: pass network=\{'use_rep': 'X_state'\}"
    refused(ValueError, message, init_from=on_x_state)
    monkeypatch.setattr(on_x_state, "se", None)
    refused(ValueError, r"of an SE that it does not carry: pass that one as se=", **on_rep)


# -- what they mean ---------------------------------------------------------------------------------------------------


def test_training_options_win_over_defaults_and_are_shared_with_se():
    options = FitOptions.from_({"lr": 0.1, "seed": 5, "precision": "bf16-mixed"}, seed=1)
    assert (options.lr, options.seed, options.min_cells, options.val_fraction) == (0.1, 5, 10, 0.1)
    assert options.of_training().stated.keys().isdisjoint({"min_cells", "freeze", "lora"})
    of_se = SEOptions.of({"max_steps": 7}, None, None, options)
    assert (of_se.training.max_steps, of_se.training.seed, of_se.training.precision) == (7, 5, "bf16-mixed")
    assert of_se.training.lr != 0.1  # which is ST's
    assert FitOptions.from_(options, seed=1) == options


def test_network_options_are_taken_apart():
    found = NetworkOptions.of({"use_rep": "X_pca", "head": "level", "n_layers": 3})
    assert found.use_rep == "X_pca"
    assert found.options == {"head": "level", "n_layers": 3}
    assert NetworkOptions.of(None) == NetworkOptions(None, {})


@pytest.mark.parametrize(
    ("se", "trains", "embeds", "gene_key"),
    [
        (None, True, True, None),
        (False, False, False, "symbol"),
        ({"gene_embeddings": pd.DataFrame(np.eye(2), index=["a", "b"])}, True, True, "symbol"),
    ],
)
def test_which_se_embeds(se, trains, embeds, gene_key):
    options = SEOptions.of(se, None, None, FitOptions.from_())
    assert (options.is_trained_here, options.embeds) == (trains, embeds)
    assert options.makes("X_state") == embeds
    assert not options.makes("X_pca")
    assert not options.makes(None)
    assert options.gene_key("symbol") == gene_key  # a table made from the data goes by var_names
