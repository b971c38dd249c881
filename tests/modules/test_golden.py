"""The published layout: tiny random models written by the reference package load by name and give its outputs."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from virtualcell.data._expression import Expression
from virtualcell.data._sentence_batches import Sentences
from virtualcell.data._sentences import sentences
from virtualcell.modules import SEConfig, SENetwork, STConfig, STNetwork, STOutput, energy_distance

TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
ST_FOLDERS = ["st_genes", "st_genes_batch", "st_all_genes", "st_embedding"]
UNUSED_IN_ST = {"transformer_backbone.embed_tokens.weight"}


def st_config(h: dict) -> STConfig:
    """Translate the hyper-parameters of a published checkpoint."""
    backbone, decoder = h["transformer_backbone_kwargs"], h["decoder_cfg"] if h["gene_decoder_bool"] else None
    assert h["predict_residual"]
    assert backbone["bidirectional_attention"]
    assert not backbone["use_rotary_embeddings"]
    return STConfig(
        n_input=h["input_dim"],
        n_output=h["output_dim"],
        n_perturbation=h["pert_dim"],
        n_hidden=h["hidden_dim"],
        n_layers=backbone["num_hidden_layers"],
        n_heads=backbone["num_attention_heads"],
        head_dim=backbone["head_dim"],
        n_feedforward=backbone["intermediate_size"],
        n_encoder_layers=h["n_encoder_layers"],
        n_decoder_layers=h["n_decoder_layers"],
        dropout=h["dropout"],
        head="all" if h["output_space"] == "all" else "level",
        relu=h["embed_key"] == "X_hvg" or not h["gene_decoder_bool"],
        control_projection=h.get("use_basal_projection", True),
        n_batches=h["batch_dim"] if h["batch_encoder"] else 0,
        confidence_token=h.get("confidence_token", False),
        n_genes=decoder["gene_dim"] if decoder else 0,
        decoder_hidden=tuple(decoder["hidden_dims"]) if decoder else (),
        decoder_residual=decoder["residual_decoder"] if decoder else False,
    )


def load_st(config: STConfig, state: dict[str, Tensor]) -> STNetwork:
    assert set(state) >= UNUSED_IN_ST
    network = STNetwork(config)
    network.load_state_dict({k: v for k, v in state.items() if k not in UNUSED_IN_ST}, strict=True)
    return network.eval()


@pytest.fixture(params=ST_FOLDERS)
def st(golden: Path, request: pytest.FixtureRequest) -> tuple[STNetwork, dict[str, Tensor], STOutput]:
    """Network, expected tensors as (B, S, ...), and our output."""
    folder = golden / request.param
    description = json.loads((folder / "description.json").read_text())
    n_sets, size = description["n_sets"], description["set_size"]
    state = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    assert {k: list(v.shape) for k, v in state.items()} == description["state_dict"]
    network = load_st(st_config(description["hyper_parameters"]), state)
    expected = load_file(folder / "expected.safetensors")
    per_set = ("loss_per_set", "confidence")
    expected = {k: v if k in per_set else v.reshape(n_sets, size, *v.shape[1:]) for k, v in expected.items()}
    # one perturbation and one batch to a set
    for name in ("perturbation", "batch"):
        assert (expected[name] == expected[name][:, :1]).all()
    with torch.no_grad():
        out = network(expected["control"], expected["perturbation"][:, 0], expected["batch"][:, 0].long())
    return network, expected, out


def test_st_predicts_what_the_reference_predicts(st: tuple) -> None:
    network, expected, out = st
    (cells,) = out.heads
    torch.testing.assert_close(cells, expected["predicted"], **TOLERANCE)
    assert cells.std() > 0.01  # not agreement on a constant
    assert (network.config.n_genes > 0) == ("predicted_genes" in expected)
    assert (out.confidence is not None) == ("confidence" in expected)
    if network.config.n_genes:
        with torch.no_grad():
            genes = network.decode(cells)
        torch.testing.assert_close(genes, expected["predicted_genes"], **TOLERANCE)
        assert genes.std() > 0.01


def test_st_loss_of_each_set(st: tuple) -> None:
    _, expected, out = st
    # the reference leaves float32 self-distances in, ours are exact zeros
    found = energy_distance(out.heads[0], expected["target"])
    torch.testing.assert_close(found, expected["loss_per_set"], atol=5e-4, rtol=0)
    exact = [exact_energy(p, t) for p, t in zip(out.heads[0], expected["target"], strict=True)]
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float32), atol=2e-6, rtol=0)


def exact_energy(x: Tensor, y: Tensor) -> float:
    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.linalg.vector_norm(a.double()[:, None] - b.double()[None], dim=-1).mean())

    return mean(x, y) - mean(x, x) / 2 - mean(y, y) / 2


@pytest.mark.parametrize("st", ["st_genes_batch"], indirect=True)
def test_st_confidence(st: tuple) -> None:
    network, expected, out = st
    torch.testing.assert_close(out.confidence, expected["confidence"][:, 0], **TOLERANCE)
    # All of the reference's are cut off by its last ReLU, so the sign before it is all that can be compared further.
    assert (expected["confidence"] == 0).all()
    network.confidence_token.confidence_projection[-1] = torch.nn.Identity()
    raw = network(expected["control"], expected["perturbation"][:, 0], expected["batch"][:, 0].long()).confidence
    assert (raw < 0).all()


@pytest.mark.parametrize("st", ["st_genes_batch"], indirect=True)
def test_st_batch_code_may_be_given_for_each_cell(st: tuple) -> None:
    network, expected, out = st
    with torch.no_grad():
        again = network(expected["control"], expected["perturbation"][:, 0], expected["batch"].long())
        other = network(expected["control"], expected["perturbation"][:, 0], (expected["batch"][:, 0].long() + 1) % 3)
    torch.testing.assert_close(again.heads[0], out.heads[0], atol=0, rtol=0)
    assert (other.heads[0] - out.heads[0]).abs().max() > 1e-3


@pytest.mark.parametrize("perturbation", ["g2", "g7", "non-targeting"])
def test_st_run_folder(golden: Path, perturbation: str) -> None:
    folder = golden / "st_run"
    description = json.loads((folder / "description.json").read_text())
    checkpoint = torch.load(
        folder / "checkpoints" / "final.ckpt", weights_only=True
    )  # plain tensors: nothing unpickled
    h, sizes = checkpoint["hyper_parameters"], description["var_dims"]
    assert not h["use_basal_projection"]
    for ours, theirs in (("input_dim", "input_dim"), ("output_dim", "output_dim"), ("pert_dim", "pert_dim")):
        assert h[ours] == sizes[theirs]
    network = load_st(st_config(h), checkpoint["state_dict"])
    assert isinstance(network.basal_encoder, torch.nn.Linear)
    expected = load_file(folder / "expected.safetensors")
    one_hot = torch.zeros(1, sizes["pert_dim"])
    one_hot[0, description["perturbations"][perturbation]] = 1
    with torch.no_grad():
        out = network(expected["control"].unsqueeze(0), one_hot)
    torch.testing.assert_close(out.heads[0][0], expected[f"predicted.{perturbation}"], **TOLERANCE)


class SE:
    """Golden SE: our network, its gene table, the cells, and what the reference computed."""

    def __init__(self, folder: Path) -> None:
        self.config = yaml.safe_load((folder / "config.yaml").read_text())
        model, dataset = self.config["model"], self.config["dataset"]
        state = load_file(folder / "model.safetensors")
        # the token encoder is stored twice
        for name in [k for k in state if k.startswith("gene_embedding_layer.")]:
            torch.testing.assert_close(state.pop(name), state[name.replace("gene_embedding_layer", "encoder")])
        self.network = SENetwork(
            SEConfig(
                n_token=self.config["tokenizer"]["token_dim"],
                n_hidden=model["emsize"],
                n_layers=model["nlayers"],
                n_heads=model["nhead"],
                n_feedforward=model["d_hid"],
                n_output=model["output_dim"],
                n_datasets=dataset[dataset["current"]]["num_datasets"],
            )
        )
        self.network.load_state_dict(state, strict=True)
        self.network.eval()
        table = torch.load(folder / "protein_embeddings.pt", weights_only=True)
        self.rows = {name: i for i, name in enumerate(table)}
        self.embeddings = torch.stack(list(table.values())).float()
        self.expected = load_file(folder / "expected.safetensors")
        self.decoded = json.loads((folder / "description.json").read_text())["decoded_genes"]
        adata = ad.read_h5ad(folder / "cells.h5ad")
        self.adata, self.matrix = adata, adata.X.tocsr().astype(np.float32)
        self.matrix.data = np.log1p(self.matrix.data)
        self.tokens = np.array([self.rows.get(g, -1) for g in adata.var_names])
        self.length = dataset["pad_length"] - 1  # the first place is [CLS]

    @property
    def cls_expression(self) -> Tensor:
        """The published quirk: [CLS] carries the c of one certain gene, in the order of the data."""
        x = self.matrix[:, np.flatnonzero(self.tokens >= 0)].toarray()
        return torch.from_numpy(100 * x / x.sum(axis=1, keepdims=True))[:, self.config["dataset"]["cls_token_idx"]]

    @torch.no_grad()
    def embed(self, cls_expression: Tensor | None):
        embedded = np.flatnonzero(self.tokens >= 0)
        columns = embedded[np.argsort(self.tokens[embedded])]
        expression = Expression(self.adata, unit="log_counts", genes=self.adata.var_names[columns])
        batch = Sentences(expression, self.length).rows(np.arange(self.adata.n_obs))
        genes = self.network.encode_genes(self.embeddings[self.tokens[columns]])
        return self.network(genes, batch["tokens"], batch["expression"], cls_expression)


@pytest.fixture
def se(golden: Path) -> SE:
    return SE(golden / "se")


def test_se_embeds_cells_as_the_reference_does(se: SE) -> None:
    assert (se.tokens < 0).sum() == 20
    out = se.embed(se.cls_expression)
    torch.testing.assert_close(out.cell, se.expected["cell_embedding"], **TOLERANCE)
    torch.testing.assert_close(out.dataset, se.expected["dataset_embedding"], **TOLERANCE)
    # without the quirk the vectors differ, so the comparison above does see the [CLS] place
    assert (se.embed(None).cell - se.expected["cell_embedding"]).abs().max() > 1e-3


def test_se_safetensors_and_lightning_checkpoint_hold_the_same_weights(se: SE, golden: Path) -> None:
    state = torch.load(golden / "se" / "model.ckpt", weights_only=True)["state_dict"]
    for name, value in se.network.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=0, rtol=0)


def test_se_gene_tokens_are_the_encoder_of_the_raw_embedding(se: SE) -> None:
    rows = torch.tensor([se.rows[g] for g in se.decoded])
    with torch.no_grad():
        found = se.network.encoder(se.embeddings[rows])
    torch.testing.assert_close(found, se.expected["gene_tokens"], **TOLERANCE)


def test_se_decodes_genes_as_the_reference_does(se: SE) -> None:
    raw = se.embeddings[[se.rows[g] for g in se.decoded]]
    cell, dataset = se.expected["cell_embedding"], se.expected["dataset_embedding"]
    depth = torch.full((len(cell),), 4.0)
    with torch.no_grad():
        found = se.network.decode(raw, cell, dataset, depth)
        per_cell = se.network.decode(raw.expand(len(cell), -1, -1), cell, dataset, depth)
    torch.testing.assert_close(found, se.expected["decoded_read_depth_4"], **TOLERANCE)
    torch.testing.assert_close(per_cell, found, atol=1e-6, rtol=0)


def test_se_sentences_of_the_golden_cells_are_full_and_sorted(se: SE) -> None:
    tokens, values = sentences(se.matrix, se.tokens, se.length)
    assert (tokens >= 0).all()
    assert (np.diff(values, axis=1) <= 0).all()
