from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from anndata import AnnData
from torch import Tensor

from virtualcell.data._expression import Expression
from virtualcell.data._sentence_batches import Sentences
from virtualcell.modules import SEConfig, SENetwork, se_loss

N_GENES, N_CELLS, LENGTH = 40, 6, 15


@pytest.fixture
def network() -> SENetwork:
    torch.manual_seed(0)
    sizes = {
        "n_token": 12,
        "n_hidden": 16,
        "n_layers": 2,
        "n_heads": 4,
        "n_feedforward": 24,
        "n_output": 9,
        "dropout": 0.1,
    }
    return SENetwork(SEConfig(**sizes, n_datasets=3)).eval()


@pytest.fixture
def table() -> Tensor:
    return torch.randn(N_GENES, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def cells() -> tuple[Tensor, Tensor]:
    """Tokens and expression of sentences of full length."""
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(N_GENES)[:LENGTH] for _ in range(N_CELLS)])
    return torch.from_numpy(tokens), torch.from_numpy(rng.random((N_CELLS, LENGTH), dtype=np.float32) * 5)


def close(a: tuple, b: tuple) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_order_of_the_sentence_does_not_matter(network: SENetwork, table: Tensor, cells: tuple) -> None:
    genes, order = network.encode_genes(table), torch.randperm(LENGTH)
    tokens, expression = cells
    close(network(genes, tokens[:, order], expression[:, order]), network(genes, tokens, expression))


@torch.no_grad()
def test_order_of_the_gene_table_does_not_matter(network: SENetwork, table: Tensor, cells: tuple) -> None:
    tokens, expression = cells
    order = torch.randperm(N_GENES)
    renamed = torch.argsort(order)[tokens]
    torch.testing.assert_close(table[order][renamed], table[tokens])
    expected = network(network.encode_genes(table), tokens, expression)
    close(network(network.encode_genes(table[order]), renamed, expression), expected)


@torch.no_grad()
@pytest.mark.parametrize("n_padding", [1, 50])
def test_padding_changes_nothing(network: SENetwork, table: Tensor, cells: tuple, n_padding: int) -> None:
    genes = network.encode_genes(table)
    tokens, expression = cells
    expected = network(genes, tokens, expression)
    # whatever stands in the expression of padding
    for filling in (0.0, 70.0):
        padded = F.pad(tokens, (0, n_padding), value=-1), F.pad(expression, (0, n_padding), value=filling)
        close(network(genes, *padded), expected)


@torch.no_grad()
def test_cells_of_different_length_do_not_disturb_each_other(network: SENetwork, table: Tensor, cells: tuple) -> None:
    genes = network.encode_genes(table)
    tokens, expression = cells
    lengths = [15, 3, 1, 9, 15, 6]
    ragged = torch.stack([t.where(torch.arange(LENGTH) < n, -1) for t, n in zip(tokens, lengths, strict=True)])
    together = network(genes, ragged, expression)
    for i, n in enumerate(lengths):
        alone = network(genes, tokens[i : i + 1, :n], expression[i : i + 1, :n])
        close([x[i : i + 1] for x in together], alone)


@torch.no_grad()
def test_longer_sentences_of_the_same_cells_give_the_same_vectors(network: SENetwork, table: Tensor) -> None:
    # from the matrix on: once a sentence holds every expressed gene, more places are padding
    rng = np.random.default_rng(0)
    counts = AnnData(rng.poisson(0.5, (N_CELLS, N_GENES)).astype(np.float32))
    genes = network.encode_genes(table)
    outs = []
    for length in (N_GENES, 3 * N_GENES):
        batch = Sentences(Expression(counts, unit="log_counts"), length).rows(np.arange(N_CELLS))
        assert (batch["tokens"] < 0).any()
        outs.append(network(genes, batch["tokens"], batch["expression"]))
    close(*outs)


@torch.no_grad()
def test_cell_vector_has_length_one_and_depends_on_expression(network: SENetwork, table: Tensor, cells: tuple) -> None:
    genes = network.encode_genes(table)
    tokens, expression = cells
    out = network(genes, tokens, expression)
    assert out.cell.shape == (N_CELLS, 9)
    assert out.dataset.shape == (N_CELLS, 10)
    assert out.dataset_logits.shape == (N_CELLS, 3)
    torch.testing.assert_close(out.cell.norm(dim=-1), torch.ones(N_CELLS))
    assert (network(genes, tokens, expression.flip(1)).cell - out.cell).abs().amax(dim=1).min() > 1e-4
    # [CLS] has no expression unless it is given some
    close(network(genes, tokens, expression, torch.zeros(N_CELLS)), out)
    assert (network(genes, tokens, expression, torch.full((N_CELLS,), 5.0)).cell - out.cell).abs().max() > 1e-4


@torch.no_grad()
def test_token_encoding_ignores_the_length_of_a_gene_vector(network: SENetwork, table: Tensor) -> None:
    torch.testing.assert_close(network.encode_genes(table * 7), network.encode_genes(table))
    normalised = table / table.norm(dim=1, keepdim=True)
    linear, norm = network.encoder[0], network.encoder[1]
    expected = F.silu(norm(normalised @ linear.weight.T + linear.bias)) * 4  # sqrt(16)
    torch.testing.assert_close(network.encode_genes(table), expected)


@torch.no_grad()
def test_soft_binning_mixes_bins_by_softmax(network: SENetwork) -> None:
    x = torch.tensor([0.0, 0.5, 3.0])
    hidden, out = network.count_encoder[0], network.count_encoder[2]
    for value, found in zip(x, network.encode_expression(x), strict=True):
        h = hidden.weight[:, 0] * value + hidden.bias
        scores = out.weight @ torch.where(h > 0, h, 0.01 * h) + out.bias
        weights = scores.exp() / scores.exp().sum()
        expected = sum(w * vector for w, vector in zip(weights, network.bin_encoder.weight, strict=True))
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_decoder_takes_each_cell_and_each_gene_on_its_own(network: SENetwork, table: Tensor, cells: tuple) -> None:
    out = network(network.encode_genes(table), *cells)
    depth = torch.linspace(1, 5, N_CELLS)
    genes = table[:7]
    found = network.decode(genes, out.cell, out.dataset, depth)
    assert found.shape == (N_CELLS, 7)
    for i in (0, 4):
        for g in (0, 6):
            x = torch.cat([network.encoder(genes[g]), out.cell[i], depth[i : i + 1], out.dataset[i]])
            torch.testing.assert_close(network.binary_decoder(x)[0], found[i, g], atol=1e-6, rtol=1e-5)
    # a table of its own for each cell
    own = torch.stack([table[torch.randperm(N_GENES)[:7]] for _ in range(N_CELLS)])
    per_cell = network.decode(own, out.cell, out.dataset, depth)
    for i in range(N_CELLS):
        alone = network.decode(own[i], out.cell[i : i + 1], out.dataset[i : i + 1], depth[i : i + 1])
        torch.testing.assert_close(per_cell[i : i + 1], alone, atol=1e-6, rtol=1e-5)
    # codes that went through the encoder before, each once, for genes that cells name in any order
    places = torch.stack([torch.randperm(7)[:5] for _ in range(N_CELLS)])
    named = network.decode_codes(network.encoder(genes), places, out.cell, out.dataset, depth)
    torch.testing.assert_close(named, found.gather(1, places), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_dropout_acts_in_training_only(network: SENetwork, table: Tensor, cells: tuple) -> None:
    genes = network.encode_genes(table)
    assert torch.equal(network(genes, *cells).cell, network(genes, *cells).cell)
    network.train()
    assert not torch.equal(network(genes, *cells).cell, network(genes, *cells).cell)


@pytest.fixture
def batch(table: Tensor, cells: tuple) -> dict[str, Tensor]:
    tokens, expression = cells
    rng = torch.Generator().manual_seed(5)
    shared = torch.randperm(N_GENES, generator=rng)[:4].expand(N_CELLS, -1)
    own = torch.stack([torch.randperm(N_GENES, generator=rng)[:6] for _ in range(N_CELLS)])
    return {
        "tokens": tokens,
        "expression": expression,
        "genes": table,
        "target_tokens": torch.cat([own, shared], dim=1),
        "targets": torch.rand(N_CELLS, 10, generator=rng),
        "n_shared": torch.tensor(4),
        "dataset": torch.arange(N_CELLS) % 3,
    }


@torch.no_grad()
def test_loss_is_distance_per_cell_and_per_shared_gene_and_entropy(
    network: SENetwork, table: Tensor, batch: dict
) -> None:
    losses = se_loss(network, batch)
    out = network(network.encode_genes(table), batch["tokens"], batch["expression"])
    depth = batch["targets"].mean(dim=1)  # no target is 0
    errors = network.decode(table[batch["target_tokens"]], out.cell, out.dataset, depth) - batch["targets"]
    per_cell = sum(e.square().sum().sqrt() for e in errors) / N_CELLS
    per_gene = sum(e.square().sum().sqrt() for e in errors.T[-4:]) / 4
    entropy = -out.dataset_logits.log_softmax(dim=1)[range(N_CELLS), batch["dataset"]].mean()
    torch.testing.assert_close(losses["loss_cell"], per_cell)
    torch.testing.assert_close(losses["loss_gene"], per_gene)
    torch.testing.assert_close(losses["loss_dataset"], entropy)
    torch.testing.assert_close(losses["loss"], per_cell + per_gene + entropy)


@pytest.mark.parametrize("n_datasets", [1, 3])
def test_loss_has_a_gradient_for_every_parameter(network: SENetwork, batch: dict, n_datasets: int) -> None:
    # without one, training in several processes would wait for it
    if n_datasets == 1:
        network = SENetwork(dataclasses.replace(network.config, n_datasets=1))
        batch["dataset"] = torch.zeros(N_CELLS, dtype=torch.long)
    losses = se_loss(network, batch)
    losses["loss"].backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert ("loss_dataset" in losses) == (n_datasets > 1)
    without = {name.split(".")[0] for name, p in network.named_parameters() if not p.grad.abs().sum()}
    assert without == (set() if n_datasets > 1 else {"dataset_encoder"})


def test_gradient_reaches_every_parameter(network: SENetwork, table: Tensor, cells: tuple) -> None:
    out = network(network.encode_genes(table), *cells)
    decoded = network.decode(table[:5], out.cell, out.dataset, torch.ones(N_CELLS))
    (decoded.square().sum() + out.dataset_logits.square().sum()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == []
