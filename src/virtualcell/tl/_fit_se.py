"""The SE of `fit_state`: trained on the training cells, or given."""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch

from virtualcell.data._screen import Screen
from virtualcell.models import SE
from virtualcell.models._finetune import continue_se
from virtualcell.models._partly import partly_trained
from virtualcell.pp._coexpression import coexpression_vectors
from virtualcell.tl._fit_options import SEOptions


def fit_se(screen: Screen, options: SEOptions, *, size: str) -> SE | None:
    """Return the SE that embeds the cells, trained on the training cells of the screen where it is to be trained."""
    if not options.is_trained_here:
        return options.model
    design = dataclasses.replace(screen.design, split_key=None, use_rep=None)
    train = dataclasses.replace(screen.take(screen.in_order(screen.is_train)), design=design, rep=None)
    table = options.table
    if table is None and options.init_from is None:
        # sorted, and under var_names: neither the order of genes in a file nor var[gene_key] has a part in it
        table = coexpression_vectors(train.expression, seed=options.training.seed).sort_index()
        names = pd.Series(train.target_names.index, index=train.target_names.index)
        train = dataclasses.replace(train, design=dataclasses.replace(design, gene_key=None), target_names=names)
    cells = train.read_as("log_counts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.training.seed)
        se = SE(cells, table, size=size) if options.init_from is None else continue_se(cells, options.init_from)
    with partly_trained(se.module, freeze=options.freeze, lora=options.lora, seed=options.training.seed):
        se.train(options.training)
    se.forget_data()
    return se
