"""The SE of `fit_state`: trained on the training cells, or given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from virtualcell.data._screen import Screen
from virtualcell.models import SE
from virtualcell.models._finetune import continue_se
from virtualcell.models._partly import partly_trained
from virtualcell.pp import expression_gene_embeddings
from virtualcell.tl._fit_options import SEOptions


def fit_se(adata: AnnData, screen: Screen, options: SEOptions, *, gene_key: str | None, size: str) -> SE | None:
    """Return the SE that embeds the cells, trained on the training cells of the screen where it is to be trained."""
    if not options.is_trained_here:
        return options.model
    design, start = screen.design, options.start
    rows = screen.in_order(screen.is_train)
    columns = np.argsort(adata.var_names)  # by name, so that the order of genes in a file changes nothing
    matrix = adata.X if design.layer is None else adata.layers[design.layer]
    cells = AnnData(
        sparse.csr_matrix(matrix[rows][:, columns]),
        obs=pd.DataFrame(index=adata.obs_names[rows]),
        var=adata.var.iloc[columns].copy(),
    )
    if start is None:
        gene_key = None  # the table is made from the data, under var_names
        if design.library_size_key is not None:
            cells.obs[design.library_size_key] = adata.obs[design.library_size_key].to_numpy()[rows]
        start = expression_gene_embeddings(
            cells, scale=design.scale, library_size_key=design.library_size_key, seed=options.training.seed
        )
    SE.setup_anndata(cells, scale=design.scale, gene_key=gene_key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.training.seed)
        se = continue_se(cells, start) if isinstance(start, SE) else SE(cells, start, size=size)
    with partly_trained(se.module, freeze=options.freeze, lora=options.lora, seed=options.training.seed):
        se.train(options.training)
    se.forget_data()
    return se
