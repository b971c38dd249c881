"""SE, the State Embedding network: a cell sentence in, a cell vector out; and any gene's expression back from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from virtualcell.modules._transformer import PostNormEncoder, SkipBlock, add_norm

N_BINS = 10


@dataclass(frozen=True)
class SEConfig:
    """Sizes of `SENetwork`.

    Parameters
    ----------
    n_token
        Width of a gene's embedding (5,120 for ESM-2 15B).
    n_hidden
        Width of the transformer.
    n_layers
        Number of its layers.
    n_heads
        Number of its attention heads.
    n_feedforward
        Width of its feed-forward layers.
    dropout
        Dropout of the transformer, attention included. It makes a training step on a CPU a third slower, since
        attention then has no fused kernel, and did not tell cell types apart any better.
    n_output
        Width of the cell embedding.
    n_dataset
        Width of the dataset embedding.
    n_datasets
        Classes of the dataset classifier that trains it.

    Examples
    --------
    >>> vc.models.SEConfig(n_token=64, n_hidden=128, n_layers=2).n_hidden
    128
    """

    n_token: int
    n_hidden: int = 128
    n_layers: int = 2
    n_heads: int = 4
    n_feedforward: int = 256
    n_output: int = 128
    n_dataset: int = 10
    n_datasets: int = 1
    dropout: float = 0.0


class SEOutput(NamedTuple):
    """Cell embedding (B, n_output), of length 1; dataset embedding (B, n_dataset); dataset logits (B, n_datasets)."""

    cell: Tensor
    dataset: Tensor
    dataset_logits: Tensor


class SENetwork(nn.Module):
    """Transformer over [CLS], genes by falling expression, [DS]; there is no order but what the expression says."""

    def __init__(self, config: SEConfig) -> None:
        super().__init__()
        self.config = c = config
        d = c.n_hidden
        self.cls_token = nn.Parameter(torch.randn(1, c.n_token))
        self.dataset_token = nn.Parameter(torch.randn(1, c.n_token))
        self.encoder = nn.Sequential(nn.Linear(c.n_token, d), nn.LayerNorm(d), nn.SiLU())
        self.count_encoder = nn.Sequential(nn.Linear(1, 512), nn.LeakyReLU(0.01), nn.Linear(512, N_BINS))
        self.bin_encoder = nn.Embedding(N_BINS, d)
        self.transformer_encoder = PostNormEncoder(c.n_layers, d, c.n_heads, c.n_feedforward, c.dropout)
        self.decoder = nn.Sequential(SkipBlock(d), nn.Linear(d, c.n_output))
        self.dataset_embedder = nn.Linear(c.n_output, c.n_dataset)
        self.dataset_encoder = nn.Sequential(
            nn.Linear(c.n_output, d), nn.SiLU(), nn.LayerNorm(d), nn.Dropout(0.1), nn.Linear(d, c.n_datasets)
        )
        n = d + c.n_output + 1 + c.n_dataset
        self.binary_decoder = nn.Sequential(SkipBlock(n), SkipBlock(n), nn.Linear(n, 1))

    def encode_genes(self, gene_embeddings: Tensor) -> Tensor:
        """Token encoding of the whole gene table (G, n_token) -> (G, d), once, instead of at every place it occurs."""
        return self.encoder(F.normalize(gene_embeddings, dim=-1)) * math.sqrt(self.config.n_hidden)

    def encode_expression(self, expression: Tensor) -> Tensor:
        """Soft binning (...) -> (..., d): softmax over 10 bins of an MLP of the value, weighting 10 learned vectors."""
        # counts are few whole numbers: a batch of cells has a tenth as many values as places
        values, place = expression.unique(return_inverse=True)
        values = values.unsqueeze(-1).to(self.bin_encoder.weight.dtype)
        weights = self.count_encoder(values).softmax(dim=-1)
        return F.embedding(place, weights @ self.bin_encoder.weight)

    def forward(
        self, genes: Tensor, tokens: Tensor, expression: Tensor, cls_expression: Tensor | None = None
    ) -> SEOutput:
        """Embed cells.

        `genes` (G, d) from :meth:`encode_genes`; `tokens` (B, L), rows of `genes` or -1 for padding; `expression`
        (B, L), the value c of each place in percent of the cell; `cls_expression` (B,), that of
        the [CLS] place (0).
        """
        n = len(tokens)
        special = self.encoder(torch.cat([self.cls_token, self.dataset_token])) * math.sqrt(self.config.n_hidden)
        if cls_expression is None:
            cls_expression = expression.new_zeros(n)
        cls = special[0] + self.encode_expression(cls_expression)  # (B, d)
        places = F.embedding(tokens.clamp_min(0), genes) + self.encode_expression(expression)  # (B, L, d)
        x = torch.cat([cls.unsqueeze(1), places, special[1].expand(n, 1, -1)], dim=1)  # (B, 1 + L + 1, d)
        mask = None
        if (tokens < 0).any():
            mask = F.pad(tokens >= 0, (1, 1), value=True)
        out = self.decoder(self.transformer_encoder(x, mask, read=[0, -1]))  # the places of [CLS] and [DS]
        # in float32 where weights have 16 bits, so that the length is 1
        return SEOutput(
            F.normalize(out[:, 0].float(), dim=-1), self.dataset_embedder(out[:, 1]), self.dataset_encoder(out[:, 1])
        )

    def with_products_in(self, dtype: torch.dtype, add_norm: Callable = add_norm) -> SENetwork:
        """Return a copy whose transformer multiplies matrices in `dtype`, 16 bits; all else stays in 32.

        `add_norm` does what the function of this name does, perhaps faster.
        """
        out = copy.deepcopy(self)
        for layer in out.transformer_encoder.layers:
            layer.lower(dtype, add_norm)
        return out

    def decode(self, gene_embeddings: Tensor, cell: Tensor, dataset: Tensor, read_depth: Tensor) -> Tensor:
        """Predict log1p counts (B, T) of genes given by their embedding, (T, n_token) or (B, T, n_token).

        `read_depth` (B,) is the mean of the cell's non-zero targets in training, 4.0 otherwise.
        """
        codes = self.encoder(gene_embeddings).flatten(0, -2)  # neither normalised nor scaled here
        places = torch.arange(len(codes), device=codes.device).view(-1, gene_embeddings.shape[-2])
        return self.decode_codes(codes, places.expand(len(cell), -1), cell, dataset, read_depth)

    def decode_codes(self, codes: Tensor, places: Tensor, cell: Tensor, dataset: Tensor, read_depth: Tensor) -> Tensor:
        """As :meth:`decode`, of the genes at `places` (B, T), rows of `codes` (N, d) that went through the encoder."""
        first, second, last = self.binary_decoder
        per_cell = torch.cat([cell, read_depth.unsqueeze(-1), dataset], dim=-1)
        return last(second(first.of_pairs(codes, per_cell, places))).squeeze(-1)


def se_loss(network: SENetwork, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Distance of predicted to true targets per cell and, over the shared genes, per gene; dataset cross-entropy.

    "genes" (n, n_token) are the vectors of the genes that occur in the batch, each encoded once, however many cells
    name it; "tokens" (B, L) and "target_tokens" (B, T) are rows of it. The last "n_shared" targets (B, T) are the same
    genes for all cells.
    """
    genes, targets = batch["genes"], batch["targets"]
    out = network(network.encode_genes(genes), batch["tokens"], batch["expression"], batch.get("cls_expression"))
    depth = targets.sum(dim=1) / (targets > 0).sum(dim=1).clamp_min(1)
    codes = network.encoder(genes)
    error = (network.decode_codes(codes, batch["target_tokens"], out.cell, out.dataset, depth) - targets).float()
    shared = error[:, error.shape[1] - int(batch["n_shared"]) :]
    # with one data set this is 0 and so is its gradient, but every parameter then has one, which DDP wants
    dataset = F.cross_entropy(out.dataset_logits, batch["dataset"])
    losses = {
        "loss_cell": torch.linalg.vector_norm(error, dim=1).mean(),
        "loss_gene": _norm_over_cells(shared).mean(),
    }
    if network.config.n_datasets > 1:
        losses["loss_dataset"] = dataset
    return {"loss": losses["loss_cell"] + losses["loss_gene"] + dataset, **losses}


def _norm_over_cells(error: Tensor) -> Tensor:
    """Euclidean norm of (B, S) over the cells of all processes, (S,), whose mean gradient is that of one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return torch.linalg.vector_norm(error, dim=0)
    squares = error.square().sum(dim=0)
    total = squares.detach().clone()
    torch.distributed.all_reduce(total)
    norm = total.sqrt().clamp_min(1e-12)
    return norm + torch.distributed.get_world_size() * (squares - squares.detach()) / (2 * norm)
