"""Cells, networks and batches for `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, nn

from virtualcell.modules import SEConfig, SENetwork, STConfig, STNetwork, set_loss


def st_case() -> tuple[Callable[[], nn.Module], dict[str, Tensor], Callable, Callable]:
    config = STConfig(500, 500, 20, n_hidden=64, head="both", n_batches=2)

    def network() -> nn.Module:
        built = STNetwork(config)
        nn.init.normal_(built.project_out[-1].weight, std=0.05)  # it starts at zero, which would hide differences
        return built

    def forward(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.cat(network(batch["control"], batch["perturbation"], batch["batch"]).heads)

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        target = torch.cat([batch["target"]] * 2)
        return set_loss(forward(network, batch), target, mean_weight=1.0).mean()

    control, target = ((5 * torch.rand(4, 32, 500) - 4).clamp_min(0) for _ in range(2))
    batch = {"control": control, "target": target, "perturbation": torch.eye(20)[:4], "batch": torch.arange(4) % 2}
    return network, batch, forward, loss


def se_case() -> tuple[Callable[[], nn.Module], dict[str, Tensor], Callable, Callable]:
    config = SEConfig(n_token=256, n_hidden=256, n_layers=4, n_heads=8, n_feedforward=512, n_output=256)

    def forward(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = network(network.encode_genes(batch["table"]), batch["tokens"], batch["expression"])
        return torch.cat([out.cell, out.dataset], dim=1)

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        cell, dataset = forward(network, batch).split([256, config.n_dataset], dim=1)
        decoded = network.decode_codes(
            network.encoder(batch["table"]), batch["wanted"], cell, dataset, batch["targets"].mean(dim=1)
        )
        return torch.linalg.vector_norm((decoded - batch["targets"]).float(), dim=1).mean()

    tokens = torch.rand(4, 500).argsort(dim=1)[:, :127]
    tokens[1, 100:] = -1  # padding
    batch = {
        "table": torch.randn(500, 256),
        "tokens": tokens,
        "expression": torch.rand(4, 127).sort(descending=True).values * 2,
        "wanted": torch.randint(500, (4, 64)),
        "targets": (5 * torch.rand(4, 64) - 2).clamp_min(0),
    }
    return lambda: SENetwork(config), batch, forward, loss


def cells_of(n: int, n_genes: int, n_expressed: int, seed: int = 0) -> ad.AnnData:
    """Sparse counts; 2,048 cells are drawn and repeated."""
    rng, few = np.random.default_rng(seed), min(n, 2048)
    sizes = np.clip(rng.normal(n_expressed, n_expressed / 4, few).astype(int), 2, n_genes)
    genes = np.concatenate([np.sort(rng.choice(n_genes, k, replace=False)) for k in sizes]).astype(np.int32)
    counts = rng.geometric(0.4, len(genes)).astype(np.float32)
    drawn = sparse.csr_matrix((counts, genes, np.concatenate([[0], np.cumsum(sizes)])), shape=(few, n_genes))
    matrix = sparse.vstack([drawn] * -(-n // few), format="csr")[:n]
    matrix.sort_indices()
    names = pd.Index([f"cell_{i:07d}" for i in rng.permutation(n)])
    return ad.AnnData(matrix, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=[f"g{j}" for j in range(n_genes)]))
