"""The SE of `fit_state`: trained on the training cells, or given."""

from __future__ import annotations

import dataclasses

import torch
from anndata import AnnData
from mudata import MuData

from virtualcell.data._screen import Screen
from virtualcell.models import SE
from virtualcell.models._finetune import continue_se
from virtualcell.models._partly import partly_trained
from virtualcell.pp._coexpression import coexpression_vectors
from virtualcell.tl._fit_options import SEOptions


def fit_se(data: AnnData | MuData, screen: Screen, options: SEOptions, *, modality: str, size: str) -> SE | None:
    """Return the SE that embeds the cells, trained on the training cells of the screen where it is to be trained."""
    if not options.is_trained_here:
        return options.model
    rows = screen.in_order(screen.is_train)
    start, design = options.start, dataclasses.replace(screen.design, split_key=None, use_rep=None)
    if start is None:
        start = coexpression_vectors(screen.expression.take(rows), seed=options.training.seed)
        design = dataclasses.replace(design, gene_key=None)  # a table made from the data goes by var_names
    cells = Screen.from_anndata(data, design, modality=modality, unit="log_counts").take(rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.training.seed)
        se = continue_se(cells, start) if isinstance(start, SE) else SE(cells, start, size=size)
    with partly_trained(se.module, freeze=options.freeze, lora=options.lora, seed=options.training.seed):
        se.train(options.training)
    se.forget_data()
    return se
