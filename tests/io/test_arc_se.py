from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy import sparse

import virtualcell as vc
from virtualcell.data._sentences import fill_with_unexpressed

TOLERANCE = 1e-5


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A copy of the golden folder, to change."""
    shutil.copytree(golden / "se", tmp_path / "se")
    return tmp_path / "se"


@pytest.fixture
def cells(golden: Path) -> ad.AnnData:
    return ad.read_h5ad(golden / "se" / "cells.h5ad")


@pytest.fixture
def expected(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "se" / "expected.safetensors")


def largest_difference(se: vc.models.SE, cells: ad.AnnData, expected: dict, genes: list[str]) -> float:
    cells = cells.copy()
    vc.tl.embed(cells, se)
    x = cells.obsm["X_state"]
    assert x.shape == (12, 26)
    decoded = se.decode(x, genes, read_depth=4.0)
    return max(
        np.abs(x[:, :16] - expected["cell_embedding"].numpy()).max(),
        np.abs(x[:, 16:] - expected["dataset_embedding"].numpy()).max(),
        np.abs(decoded[genes].to_numpy() - expected["decoded_read_depth_4"].numpy()).max(),
    )


@pytest.mark.parametrize("checkpoint", [None, "model.ckpt"])
def test_embeds_and_decodes_as_the_reference_does(
    golden: Path, cells: ad.AnnData, expected: dict, checkpoint: str | None, tmp_path: Path
) -> None:
    genes = json.loads((golden / "se" / "description.json").read_text())["decoded_genes"]
    se = vc.models.SE.from_arc(golden / "se", checkpoint=checkpoint)
    assert se.cls_expression_gene == 3
    assert se.length == 63
    assert largest_difference(se, cells, expected, genes) < TOLERANCE
    # converted, and in our own format
    se.to_arc(tmp_path / "arc")
    assert largest_difference(vc.models.SE.from_arc(tmp_path / "arc"), cells, expected, genes) < TOLERANCE
    se.save(tmp_path / "ours")
    assert largest_difference(vc.models.SE.load(tmp_path / "ours"), cells, expected, genes) < TOLERANCE


def test_checkpoint_alone_carries_configuration_and_genes(folder: Path, cells: ad.AnnData, expected: dict) -> None:
    for name in ("model.safetensors", "config.yaml", "protein_embeddings.pt"):
        (folder / name).unlink()
    se = vc.models.SE.from_arc(folder)
    vc.tl.embed(cells, se)
    np.testing.assert_allclose(cells.obsm["X_state"][:, :16], expected["cell_embedding"], atol=TOLERANCE)


def test_written_folder_is_what_the_reference_wrote(golden: Path, tmp_path: Path) -> None:
    vc.models.SE.from_arc(golden / "se").to_arc(tmp_path / "arc")
    theirs, ours = load_file(golden / "se" / "model.safetensors"), load_file(tmp_path / "arc" / "model.safetensors")
    described = json.loads((golden / "se" / "description.json").read_text())["state_dict"]
    assert {k: list(v.shape) for k, v in ours.items()} == described
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    table = torch.load(tmp_path / "arc" / "protein_embeddings.pt", weights_only=True)
    original = torch.load(golden / "se" / "protein_embeddings.pt", weights_only=True)
    assert list(table) == list(original)
    assert all(torch.equal(table[g], original[g]) for g in table)
    config = yaml.safe_load((tmp_path / "arc" / "config.yaml").read_text())
    reference = yaml.safe_load((golden / "se" / "config.yaml").read_text())
    for section, keys in {
        "model": ["emsize", "d_hid", "nhead", "nlayers", "output_dim", "rda", "dataset_correction", "counts"],
        "tokenizer": ["token_dim"],
        "dataset": ["pad_length", "cls_token_idx", "P", "N", "S"],
    }.items():
        assert {k: config[section][k] for k in keys} == {k: reference[section][k] for k in keys}
    assert config["dataset"][config["dataset"]["current"]]["num_datasets"] == 7
    with pytest.raises(FileExistsError, match="Pass overwrite=True"):
        vc.models.SE.from_arc(golden / "se").to_arc(tmp_path / "arc")


# -- parameters --------------------------------------------------------------------------------------------------------


def test_every_parameter_that_does_not_fit_is_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["bin_encoder.weight"], state["decoder.1.bias"]
    state["count_encoder.2.weight"] = torch.zeros(11, 512)
    state["decoder.7.weight"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the network") as error:
        vc.models.SE.from_arc(folder)
    assert "2 missing: bin_encoder.weight, decoder.1.bias" in str(error.value)
    assert "1 unexpected: decoder.7.weight" in str(error.value)
    assert "1 misshapen: count_encoder.2.weight (11, 512) for (10, 512)" in str(error.value)


def test_known_extras_and_compiled_names(
    folder: Path, cells: ad.AnnData, expected: dict, caplog: pytest.LogCaptureFixture
) -> None:
    state = load_file(folder / "model.safetensors")
    # a writer that keeps shared tensors once may keep the second name
    for k in [k for k in state if k.startswith("encoder.")]:
        del state[k]
    state = {f"_orig_mod.{k}" if i % 2 else k: v for i, (k, v) in enumerate(state.items())}
    state["pe_embedding.weight"] = torch.zeros(300, 40)
    save_file(state, folder / "model.safetensors")
    with caplog.at_level("INFO"):
        se = vc.models.SE.from_arc(folder)
    assert "left out: gene_embedding_layer.0.bias" in caplog.text
    assert "pe_embedding.weight" in caplog.text
    vc.tl.embed(cells, se)
    np.testing.assert_allclose(cells.obsm["X_state"][:, :16], expected["cell_embedding"], atol=TOLERANCE)


def test_twins_that_differ_are_an_error(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["gene_embedding_layer.1.bias"] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"gene_embedding_layer.1.bias and encoder.1.bias must be one tensor"):
        vc.models.SE.from_arc(folder)


def test_half_precision_is_read_as_float32(folder: Path) -> None:
    state = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    se = vc.models.SE.from_arc(folder)
    assert {p.dtype for p in se.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", [torch.Tensor.numpy, torch.nn.Parameter, torch.Tensor.double])
def test_gene_table_of_any_kind_of_vector(folder: Path, cells: ad.AnnData, expected: dict, kind) -> None:
    table = torch.load(folder / "protein_embeddings.pt", weights_only=True)
    torch.save({gene: kind(vector) for gene, vector in table.items()}, folder / "protein_embeddings.pt")
    vc.tl.embed(cells, vc.models.SE.from_arc(folder))
    np.testing.assert_allclose(cells.obsm["X_state"][:, :16], expected["cell_embedding"], atol=TOLERANCE)


def test_checkpoint_with_foreign_classes(
    folder: Path, cells: ad.AnnData, expected: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "their_config.py").write_text("class Config:\n    pass\nclass Collator:\n    pass\n")
    monkeypatch.syspath_prepend(folder)
    import their_config

    content = torch.load(folder / "model.ckpt", weights_only=True)
    cfg, collator = their_config.Config(), their_config.Collator()
    cfg.content = {"model": {"emsize": 16}}
    collator.cfg = cfg
    content["hyper_parameters"] |= {"cfg": cfg, "collater": collator}
    content["callbacks"] = {"x": np.float64(1)}
    torch.save(content, folder / "model.ckpt")
    del sys.modules["their_config"]
    se = vc.models.SE.from_arc(folder, checkpoint="model.ckpt")
    assert "their_config" not in sys.modules
    vc.tl.embed(cells, se)
    np.testing.assert_allclose(cells.obsm["X_state"][:, :16], expected["cell_embedding"], atol=TOLERANCE)


# -- what is missing or other ------------------------------------------------------------------------------------------


def test_messages_for_folders_that_lack_something(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint='best.ckpt' is not in .*model.ckpt"):
        vc.models.SE.from_arc(folder, checkpoint="best.ckpt")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        vc.models.SE.from_arc(folder / "nowhere")
    whole = (folder / "model.safetensors").read_bytes()
    for part in (b"", whole[:5000], b"version https://git-lfs.github.com/spec/v1\n"):
        (folder / "model.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match=r"model.safetensors is cut off, damaged, or a pointer of git LFS"):
            vc.models.SE.from_arc(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "protein_embeddings.pt").unlink()
    with pytest.raises(FileNotFoundError, match="Give gene_embeddings="):
        vc.models.SE.from_arc(folder)
    table = pd.DataFrame(np.ones((5, 39)), index=list("abcde"))
    with pytest.raises(ValueError, match="gene_embeddings has 39 dimensions, but this model was trained on 40"):
        vc.models.SE.from_arc(folder, gene_embeddings=table)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["rda"] = False
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"model.rda: false"):
        vc.models.SE.from_arc(folder)
    del config["model"]["emsize"], config["model"]["rda"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"has no entry 'model.rda'"):
        vc.models.SE.from_arc(folder)
    (folder / "config.yaml").write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match=r"is no configuration.*os.system"):
        vc.models.SE.from_arc(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config.yaml"):
        vc.models.SE.from_arc(folder)


def test_ensembl_ids_through_gene_key_give_the_same_vectors(golden: Path, cells: ad.AnnData) -> None:
    se = vc.models.SE.from_arc(golden / "se")
    vc.tl.embed(cells, se)
    other = cells.copy()
    other.var["symbol"] = other.var_names
    other.var_names = [f"ENSG{i:011d}" for i in range(other.n_vars)]
    with pytest.raises(ValueError, match="pass gene_key='symbol'"):
        vc.tl.embed(other, se)
    vc.tl.embed(other, se, gene_key="symbol")
    np.testing.assert_array_equal(other.obsm["X_state"], cells.obsm["X_state"])
    mdata = md.MuData({"rna": cells.copy()})
    vc.tl.embed(mdata, se)
    np.testing.assert_array_equal(mdata["rna"].obsm["X_state"], cells.obsm["X_state"])


def test_log1p_values_are_taken_as_they_are(golden: Path, cells: ad.AnnData) -> None:
    se = vc.models.SE.from_arc(golden / "se")
    cells = cells[:9].copy()  # all golden cells have one total of counts: more of them look normalised to it
    vc.tl.embed(cells, se)
    logged = cells.copy()
    logged.X = logged.X.log1p()
    vc.tl.embed(logged, se, scale="log1p")
    np.testing.assert_allclose(logged.obsm["X_state"], cells.obsm["X_state"], atol=1e-6)


# -- the order of genes and cells --------------------------------------------------------------------------------------


def embed(se: vc.models.SE, cells: ad.AnnData) -> np.ndarray:
    return se.get_latent_representation(cells, scale="counts")


@pytest.mark.parametrize("sparse_cells", [False, True])
def test_order_of_genes_and_cells_matters_only_through_the_quirk(
    golden: Path, cells: ad.AnnData, sparse_cells: bool
) -> None:
    if sparse_cells:  # fewer expressed genes than places: filled
        keep = np.random.default_rng(0).random(cells.shape) < 0.3
        cells.X = sparse.csr_matrix(cells.X.toarray() * keep)
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(cells.n_obs), rng.permutation(cells.n_vars)
    shuffled = cells[rows, columns].copy()
    shuffled.obs_names = [f"other{i}" for i in range(cells.n_obs)]
    se = vc.models.SE.from_arc(golden / "se")
    assert se.fill_sentences
    with_quirk = embed(se, cells)
    # cells: never
    np.testing.assert_allclose(embed(se, cells[rows].copy()), with_quirk[rows], atol=1e-6)

    # genes, quirk on: only where another gene lends its expression to [CLS], and by as much as that says
    other = embed(se, shuffled)
    assert np.abs(other - with_quirk[rows]).max() > 1e-4
    known = set(se.gene_names)
    lending = [g for g in cells.var_names if g in known][3]
    others = [g for g in shuffled.var_names if g != lending]
    place = others.index([g for g in others if g in known][3])
    back = shuffled[:, [*others[:place], lending, *others[place:]]].copy()  # all shuffled, but the same gene lends
    assert [g for g in back.var_names if g in known][3] == lending
    np.testing.assert_allclose(embed(se, back), with_quirk[rows], atol=1e-6)

    # quirk off: never
    se.cls_expression_gene = None
    without = embed(se, cells)
    np.testing.assert_allclose(embed(se, shuffled), without[rows], atol=1e-6)
    assert np.abs(without - with_quirk).max() > 1e-4


def test_sentences_are_filled_with_unexpressed_genes() -> None:
    values = np.zeros((3, 10), np.float32)
    values[0, [2, 5]] = 1
    values[1] = 1
    values[2, [2, 5]] = 1
    tokens = np.array([7, -1, 3, 9, 1, 4, 0, 2, -1, 11], dtype=np.int32)
    sentence = torch.full((3, 12), -1)
    sentence[0, :2] = torch.tensor([3, 4])
    sentence[1, :8] = torch.tensor([0, 1, 2, 3, 4, 7, 9, 11])
    sentence[2] = sentence[0]
    block = sparse.csr_matrix(values)
    filled = fill_with_unexpressed(sentence, block, tokens).numpy()
    assert filled[0, :2].tolist() == [3, 4]
    assert set(filled[0, 2:]) <= {0, 1, 2, 7, 9, 11}
    assert len(set(filled[0, 2:])) > 3
    assert (filled[1] == sentence[1].numpy()).all()  # nothing is unexpressed: padded as before
    assert (filled[0] == filled[2]).all()
    assert (sentence[0, 2:] == -1).all()  # not in place
    order = np.random.default_rng(0).permutation(10)
    again = fill_with_unexpressed(sentence, sparse.csr_matrix(values[:, order]), tokens[order])
    assert (again.numpy() == filled).all()


def test_few_genes_for_the_quirk(golden: Path, cells: ad.AnnData) -> None:
    se = vc.models.SE.from_arc(golden / "se")
    few = [g for g in cells.var_names if g in set(se.gene_names)][:3]
    subset = cells[:, few].copy()
    subset.X = np.ones(subset.shape, np.float32)
    with pytest.raises(ValueError, match="cls_expression_gene=3, but only 3 genes have an embedding"):
        embed(se, subset)


def test_our_own_model_goes_to_arc_and_back(
    cells: ad.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vc.models.SE.setup_anndata(cells)
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 8)), index=cells.var_names)
    se = vc.models.SE(cells, table)
    se.train(max_steps=3, progress_bar=False, accelerator="cpu")
    assert se.cls_expression_gene is None
    with caplog.at_level("WARNING"):
        se.to_arc(tmp_path / "arc")
    assert "arc-state will embed with cls_expression_gene" in caplog.text
    again = vc.models.SE.from_arc(tmp_path / "arc")
    assert again.cls_expression_gene is None
    assert not again.fill_sentences
    np.testing.assert_allclose(embed(again, cells), embed(se, cells), atol=1e-6)
    other = vc.models.SE(cells, table, n_dataset=7)
    other.train(max_steps=1, progress_bar=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"n_dataset=7, but Arc's models have 10"):
        other.to_arc(tmp_path / "other")
    assert not (tmp_path / "other").exists()
