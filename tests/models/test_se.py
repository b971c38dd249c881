from __future__ import annotations

import gc
import weakref

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from mudata import MuData
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import virtualcell as vc
from virtualcell.models import SE, _se_inference
from virtualcell.modules._transformer import add_norm

# the transformer sees batches of another shape or genes summed in another order: float32 rounding
CLOSE = {"atol": 2e-5, "rtol": 0}


def build(data, table, *, setup: dict | None = None, **options) -> SE:
    register = SE.setup_mudata if isinstance(data, MuData) else SE.setup_anndata
    register(data, **(setup or {}))
    torch.manual_seed(0)
    small = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_feedforward": 16, "n_output": 8, "length": 16}
    return SE(data, table, **{**small, "n_targets": (8, 8, 8), **options})


def train(se: SE, **options) -> SE:
    se.train(**{"max_steps": 3, "progress_bar": False, **options})
    return se


@pytest.fixture(scope="module")
def table(session_counts) -> pd.DataFrame:
    return vc.pp.expression_gene_embeddings(session_counts, n_comps=12)


# -- real cells -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pbmc(kang_control_file) -> ad.AnnData:
    """150 unstimulated cells of each of four types, and the genes seen in 2 % of them."""
    adata = ad.read_h5ad(kang_control_file)
    rng = np.random.default_rng(0)
    types = adata.obs["cell_type"].to_numpy().astype(str)
    rows = [rng.choice(np.flatnonzero(types == t), 150, replace=False) for t in np.unique(types)]
    adata = adata[np.sort(np.concatenate(rows))].copy()
    return adata[:, (adata.X > 0).mean(axis=0).A1 > 0.02].copy()


@pytest.fixture(scope="module")
def trained(pbmc) -> SE:
    data = pbmc.copy()
    options = {"n_hidden": 32, "n_feedforward": 32, "n_output": 16, "length": 48, "n_targets": (24, 12, 24)}
    se = build(data, vc.pp.expression_gene_embeddings(data, n_comps=32), setup={"dataset_key": "batch"}, **options)
    return train(se, max_steps=100, lr=4e-3)


def test_loss_falls_on_training_and_validation_cells(trained):
    assert trained.datasets == [f"donor_{i}" for i in (1015, 1016, 1244, 1256, 1488)]
    assert set(trained.history) == {
        f"{s}_{k}" for s in ("train", "validation") for k in ("loss", "loss_cell", "loss_gene", "loss_dataset")
    }
    for name, most in (("train_loss", 0.85), ("validation_loss", 0.95)):
        loss = trained.history[name][name].astype(float)
        assert loss.iloc[-1] < most * loss.iloc[0], name


def test_cell_types_are_told_apart(trained, pbmc):
    x = trained.get_latent_representation(pbmc)
    assert x.shape == (600, 16 + 10)
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x[:, :16], axis=1), 1, rtol=1e-5)
    accuracy = cross_val_score(KNeighborsClassifier(15), x, pbmc.obs["cell_type"], cv=5).mean()
    assert accuracy > 0.6  # chance is 0.25


def test_decoded_expression_follows_the_cells(trained, pbmc):
    genes = list(pbmc.var_names[np.argsort(-pbmc.X.mean(axis=0).A1)[:150]])
    some = pbmc[::5].copy()
    decoded = trained.decode(trained.get_latent_representation(some), genes)
    assert list(decoded.columns) == genes
    observed = np.log1p(some[:, genes].X.toarray())
    across_genes = np.corrcoef(decoded.mean(), observed.mean(axis=0))[0, 1]
    centred = decoded - decoded.mean(), observed - observed.mean(axis=0)
    across_cells = np.corrcoef(centred[0].to_numpy().ravel(), centred[1].ravel())[0, 1]
    assert across_genes > 0.5
    assert across_cells > 0.1
    with pytest.raises(KeyError, match=r"genes='NOGENE' is unknown.*It has no embedding"):
        trained.decode(trained.get_latent_representation(some[:2].copy()), [genes[0], "NOGENE"])


def test_decode_takes_embedded_cells(trained, pbmc):
    some, genes = pbmc[:20].copy(), list(pbmc.var_names[:5])
    with pytest.raises(KeyError, match=r"use_rep='X_state' is unknown.*vc.tl.embed"):
        trained.decode(some, genes)
    vc.tl.embed(some, trained)
    decoded = trained.decode(some, genes, read_depth=3.0)
    assert list(decoded.index) == list(some.obs_names)
    expected = trained.decode(trained.get_latent_representation(some), genes, read_depth=3.0)
    np.testing.assert_allclose(decoded.to_numpy(), expected.to_numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(20, 7\); this model makes \(n_cells, 26\)"):
        trained.decode(np.zeros((20, 7)), genes)


def test_counts_and_log1p_give_nearly_the_same_cell(trained, pbmc):
    from_counts = trained.get_latent_representation(pbmc)[:, :16]
    counts = pbmc.X.toarray()
    log = pbmc.copy()
    log.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    from_log = trained.get_latent_representation(log, scale="log1p")[:, :16]
    # cells are compared with themselves and with others, around the mean cell
    a, b = from_counts - from_counts.mean(axis=0), from_log - from_log.mean(axis=0)
    a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
    same, other = (a * b).sum(axis=1), (a * np.roll(b, 150, axis=0)).sum(axis=1)
    assert same.mean() > 0.7
    assert same.mean() > other.mean() + 0.4
    with pytest.raises(ValueError, match=r"scale='counts' was stated, but X holds fractions.*scale='log1p'"):
        trained.get_latent_representation(log)
    log.layers["counts"] = pbmc.X
    np.testing.assert_array_equal(
        trained.get_latent_representation(log, layer="counts"), trained.get_latent_representation(pbmc)
    )


def test_order_of_cells_and_genes_changes_no_bit(trained, pbmc):
    x = trained.get_latent_representation(pbmc)
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(pbmc.n_obs), rng.permutation(pbmc.n_vars)
    np.testing.assert_array_equal(trained.get_latent_representation(pbmc[cells].copy()), x[cells])
    np.testing.assert_array_equal(trained.get_latent_representation(pbmc[:, genes].copy()), x)


def test_batches_of_another_size_differ_by_rounding(trained, pbmc):
    x = trained.get_latent_representation(pbmc)
    np.testing.assert_allclose(trained.get_latent_representation(pbmc, batch_size=7), x, **CLOSE)


def test_a_cell_does_not_depend_on_its_neighbours(trained, pbmc):
    x = trained.get_latent_representation(pbmc)
    np.testing.assert_allclose(trained.get_latent_representation(pbmc[5:8].copy()), x[5:8], **CLOSE)


def test_other_data_sets_with_other_genes(trained, pbmc, cite_file):
    x = trained.get_latent_representation(pbmc)
    extra = ad.AnnData(
        np.c_[np.full((pbmc.n_obs, 2), 9, np.float32), pbmc.X.toarray()],
        obs=pbmc.obs,
        var=pd.DataFrame(index=["NEW1", "NEW2", *pbmc.var_names]),
    )
    np.testing.assert_allclose(trained.get_latent_representation(extra), x, **CLOSE)  # genes without vectors do nothing
    half = pbmc[:, ::2].copy()
    assert np.abs(trained.get_latent_representation(half) - x).max() > 1e-3
    mdata = mudata.read_h5mu(cite_file)
    other = trained.get_latent_representation(mdata)
    assert other.shape == (400, 26)
    assert np.isfinite(other).all()
    np.testing.assert_array_equal(other, trained.get_latent_representation(mdata["rna"]))


def test_ensembl_ids_with_a_column_of_symbols(trained, pbmc):
    x = trained.get_latent_representation(pbmc)
    ensembl = pbmc.copy()
    ensembl.var["symbol"] = ensembl.var_names.to_numpy()
    ensembl.var_names = [f"ENSG{i:011d}.3" for i in range(ensembl.n_vars)]
    np.testing.assert_allclose(trained.get_latent_representation(ensembl, gene_key="symbol"), x, **CLOSE)
    with pytest.raises(ValueError, match=r"Only 0 of \d+ genes of the data are in the gene table.*gene_key='symbol'"):
        trained.get_latent_representation(ensembl)
    with pytest.raises(KeyError, match=r"gene_key='Symbol' is unknown\. Did you mean 'symbol'"):
        trained.get_latent_representation(ensembl, gene_key="Symbol")


def test_bf16_gives_nearly_the_same_vectors(trained, pbmc, weights, caplog):
    before = weights(trained)
    with caplog.at_level("INFO", logger="virtualcell"):
        exact = trained.get_latent_representation(pbmc)  # "auto" on a CPU
        assert "SE embeds 600 cells in float32, on the CPU." in caplog.text
        np.testing.assert_array_equal(trained.get_latent_representation(pbmc, precision="float32"), exact)
        x = trained.get_latent_representation(pbmc, precision="bf16")
        assert "SE embeds 600 cells in bf16 (numbers of 16 bits), on the CPU." in caplog.text
    assert x.dtype == np.float32
    assert (x != exact).any()
    for part in (slice(None, 16), slice(16, None)):  # cell, dataset
        a, b = x[:, part], exact[:, part]
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        assert cosine.min() > 0.9998  # .99988 with torch 2.7
    np.testing.assert_allclose(np.linalg.norm(x[:, :16], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights(trained), before)
    assert {p.dtype for p in trained.module.parameters()} == {torch.float32}
    with pytest.raises(KeyError, match=r"precision='fp16' is unknown\. Did you mean 'bf16'\?"):
        trained.get_latent_representation(pbmc, precision="fp16")


def test_without_a_compiler_the_same_is_computed(trained, monkeypatch, caplog):
    def fails(*_: object, **__: object):
        def compiled(*_: object):
            raise RuntimeError("no compiler here")

        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(_se_inference, "_WIDE", 1)
    monkeypatch.setattr(_se_inference, "COMPILED_ON", ("cpu",))
    found = _se_inference._add_norm(trained.module, torch.device("cpu"), torch.bfloat16)
    assert found is add_norm
    assert "torch.compile failed: no compiler here" in caplog.text


def test_sentences_made_on_the_device_give_the_same_vectors(trained, pbmc, monkeypatch):
    x = trained.get_latent_representation(pbmc)
    monkeypatch.setattr(_se_inference, "SENTENCES_ON", ("cuda", "cpu"))
    found = trained.get_latent_representation(pbmc)
    np.testing.assert_allclose(found, x, **CLOSE)
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(pbmc.n_obs), rng.permutation(pbmc.n_vars)
    np.testing.assert_array_equal(trained.get_latent_representation(pbmc[cells][:, genes].copy()), found[cells])
    np.testing.assert_allclose(trained.get_latent_representation(pbmc, batch_size=7), x, **CLOSE)


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_by_a_column_of_gene_names(counts, table, weights):
    reference = train(build(counts.copy(), table))
    counts.var["symbol"] = counts.var_names.to_numpy()
    counts.var_names = [f"ENSG{i:011d}" for i in range(counts.n_vars)]
    se = train(build(counts, table, setup={"gene_key": "symbol"}))
    np.testing.assert_array_equal(weights(se), weights(reference))
    np.testing.assert_array_equal(
        se.get_latent_representation(), se.get_latent_representation(counts, gene_key="symbol")
    )


def test_seed_decides_and_order_of_cells_does_not(counts, table, weights):
    one = weights(train(build(counts.copy(), table)))
    np.testing.assert_array_equal(one, weights(train(build(counts.copy(), table))))
    assert not np.array_equal(one, weights(train(build(counts.copy(), table), seed=1)))
    permuted = counts[np.random.default_rng(0).permutation(counts.n_obs)].copy()
    np.testing.assert_array_equal(one, weights(train(build(permuted, table))))


def test_layers_and_log1p_are_read_as_stated(counts, table, weights):
    reference = weights(train(build(counts.copy(), table)))
    layered = ad.AnnData(np.full(counts.shape, 0.5, np.float32), obs=counts.obs[[]], var=counts.var[[]])
    layered.layers["raw"] = counts.X
    np.testing.assert_array_equal(weights(train(build(layered, table, setup={"layer": "raw"}))), reference)
    log = counts.copy()
    log.X = sc.pp.log1p(sc.pp.normalize_total(counts, target_sum=1e4, inplace=False)["X"])
    se = train(build(log, table, setup={"scale": "log1p"}))
    assert np.isfinite(weights(se)).all()
    assert not np.array_equal(weights(se), reference)
    counts.layers["log"] = log.X
    again = train(build(counts, table, setup={"layer": "log", "scale": "log1p"}))
    np.testing.assert_array_equal(weights(again), weights(se))


@pytest.mark.parametrize("kind", ["csc", "dense", "int64", "float64"])
def test_kind_of_matrix_changes_no_bit(counts, table, weights, kind):
    reference = train(build(counts.copy(), table))
    other = counts.copy()
    kinds = {"csc": lambda x: x.tocsc(), "dense": lambda x: x.toarray()}
    other.X = kinds[kind](counts.X) if kind in kinds else counts.X.astype(kind)
    se = train(build(other, table))
    np.testing.assert_array_equal(weights(se), weights(reference))
    np.testing.assert_array_equal(se.get_latent_representation(), reference.get_latent_representation())


@pytest.mark.parametrize("where", ["modality", "mudata"])
def test_mudata_gives_the_same_model(counts, table, weights, where):
    reference = train(build(counts.copy(), table, setup={"dataset_key": "batch"}))
    mdata = MuData({"gex": counts})
    if where == "mudata":
        mdata.obs["batch"] = counts.obs["batch"].to_numpy()
        del counts.obs["batch"]
    se = train(build(mdata, table, setup={"dataset_key": "batch", "modality": "gex"}))
    np.testing.assert_array_equal(weights(se), weights(reference))
    np.testing.assert_array_equal(se.get_latent_representation(), reference.get_latent_representation())


def test_early_stopping_and_length(counts, table):
    still = {"max_steps": 30, "lr": 1e-12, "early_stopping": True, "patience": 1, "validate_every": 2}
    with pytest.raises(ValueError, match="early_stopping=True needs validation cells"):
        train(build(counts, table), **still, val_fraction=0.0)
    se = train(build(counts, table), **still)
    assert se.history["validation_loss"].index[-1] < 30
    se = train(build(counts, table), max_steps=6, validate_every=4)
    assert list(se.history["train_loss"].index) == list(se.history["validation_loss"].index) == [4, 6]


def test_options_of_the_training(counts, table):
    se = build(counts, table)
    with pytest.raises(KeyError, match=r"training option='max_step' is unknown\. Did you mean 'max_steps'"):
        train(se, max_step=3)
    with pytest.raises(ValueError, match=r"val_fraction=1\.5 must be at least 0 and less than 1"):
        train(se, val_fraction=1.5)
    with pytest.raises(ValueError, match=r"max_steps=3 and options=\{'max_steps': \.\.\.\} were both given"):
        se.train({"max_steps": 2}, max_steps=3)
    assert not se.is_trained
    se.train({"max_steps": 2, "progress_bar": False}, val_fraction=0.0)
    assert set(se.history) == {"train_loss", "train_loss_cell", "train_loss_gene"}


def test_two_processes_make_the_same_curve_as_one(counts, table, weights):
    options = {"max_steps": 4, "batch_size": 8, "validate_every": 2, "accelerator": "cpu"}
    one = train(build(counts.copy(), table, dropout=0.0), **options)  # of one data set
    two = train(build(counts, table, dropout=0.0), **options, devices=2, strategy="ddp_spawn")
    assert set(one.history) == set(two.history)
    for name, losses in one.history.items():
        np.testing.assert_allclose(two.history[name], losses, rtol=1e-4)
    np.testing.assert_allclose(weights(two), weights(one), atol=1e-4)


def test_training_does_not_touch_the_data(counts, table):
    before = counts.copy()
    train(build(counts, table))
    np.testing.assert_array_equal(counts.X.toarray(), before.X.toarray())
    assert list(counts.var_names) == list(before.var_names)
    assert not counts.obsm


# -- errors -----------------------------------------------------------------------------------------------------------


def test_cells_without_embedded_genes_are_refused(small_se, counts):
    genes = counts.var_names[:5]
    few = counts[:, genes].copy()
    few = few[few.X.sum(axis=1).A1 > 0].copy()
    assert np.isfinite(small_se.get_latent_representation(few)).all()
    few.X = few.X.toarray()
    few.X[3] = 0
    with pytest.raises(
        ValueError, match=rf"1 cells express no gene that has an embedding, among them \['{few.obs_names[3]}'\]"
    ):
        small_se.get_latent_representation(few)


def test_setup_refuses(counts, table):
    with pytest.raises(KeyError, match=r"dataset_key='batches' is unknown\. Did you mean 'batch'"):
        build(counts, table, setup={"dataset_key": "batches"})
    with pytest.raises(ValueError, match="scale='log1p' was stated, but X reaches"):
        build(counts, table, setup={"scale": "log1p"})
    with pytest.raises(ValueError, match="scale='raw' is unknown"):
        build(counts, table, setup={"scale": "raw"})
    counts.X = counts.X / 2
    with pytest.raises(ValueError, match="scale='counts' was stated, but X holds fractions"):
        build(counts, table)


def test_options(counts, table):
    with pytest.raises(ValueError, match="gene_embeddings must be given"):
        build(counts, None)
    with pytest.raises(KeyError, match=r"network option='n_head' is unknown\. Did you mean 'n_heads'"):
        build(counts, table, n_head=3)
    with pytest.raises(KeyError, match="size='tiny' is unknown"):
        build(counts, table, size="tiny")
    with pytest.raises(ValueError, match="gene_embeddings holds NaN or infinite values"):
        build(counts, table.mask(table == table.iloc[0, 0]))
    with pytest.raises(RuntimeError, match="untrained"):
        build(counts, table).get_latent_representation()


def test_repr(counts, table):
    se = build(counts, table)
    assert repr(se).startswith("SE model: 80 genes x 12 dimensions, sentences of 16 genes, cell vectors of 8 + 10, ")
    assert repr(se).endswith("Not trained yet.")
    assert repr(train(se)).endswith("M parameters.")


def test_forget_data_frees_the_data(session_counts, table):
    data = session_counts.copy()
    se = train(build(data, table))
    x = se.get_latent_representation()
    se.forget_data()
    gone = weakref.ref(data)
    del data
    gc.collect()
    assert gone() is None
    np.testing.assert_array_equal(se.get_latent_representation(session_counts), x)
    with pytest.raises(ValueError, match="loaded without data: give the cells to embed"):
        se.get_latent_representation()
    with pytest.raises(ValueError, match="this model holds no data to train on"):
        train(se)
