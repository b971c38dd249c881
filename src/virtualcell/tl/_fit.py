"""Fit SE and ST on a screen in one call."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._interrupted import told_when_interrupted
from virtualcell._settings import say
from virtualcell._tasks import Workers, check_client
from virtualcell._threads import own_threads
from virtualcell.data._design import Design, Scale, check_library_sizes
from virtualcell.data._labels import expression_modality
from virtualcell.data._results import ours, takes_results
from virtualcell.data._screen import Screen
from virtualcell.io._save import pack, save
from virtualcell.models import SE, ST, Transfer
from virtualcell.models._effects import Effects
from virtualcell.models._finetune import genes_to_model
from virtualcell.models._transfer_sources import Sources
from virtualcell.tl._fit_options import (
    FitOptions,
    NetworkOptions,
    SEOptions,
    Size,
    check_call,
    check_transfer,
    choose_size,
    require_validation,
)
from virtualcell.tl._fit_se import fit_se
from virtualcell.tl._fit_st import build_st, train_st
from virtualcell.tl._prepare import choose_genes, prepared, warn_of_panel
from virtualcell.tl._questions import asked_by
from virtualcell.train._checkpoint import refuse_used

logger = logging.getLogger(__name__)

_INTERRUPTED = (
    "The fit was interrupted: adata holds an ST only if one was fitted to the end. With checkpoint_dir= and "
    "resume=True the same call goes on where it was."
)
_SE_FOLLOWS = (
    "ST is fitted, and `vc.tl.predict_perturbation` has all that it needs, also if what follows is interrupted: SE is "
    "trained to embed the cells (obsm['X_state']). Predictions of genes do not use it; se=False leaves it out."
)


@told_when_interrupted(_INTERRUPTED)
@own_threads()
def fit_state(
    adata: AnnData | MuData,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    context_key: str | None = None,
    batch_key: str | None = None,
    combination_separator: str | None = "+",
    dose_key: str | None = None,
    split_key: str | None = None,
    layer: str | None = None,
    scale: Scale = "counts",
    library_size_key: str | None = None,
    gene_key: str | None = None,
    modality: str = "rna",
    n_top_genes: int | None = 2000,
    perturbation_features: pd.DataFrame | None = None,
    se: SE | pd.DataFrame | Mapping[str, object] | Literal[False] | None = None,
    init_from: ST | SE | None = None,
    transfer_from: Sources | None = None,
    size: Size = "auto",
    network: Mapping[str, object] | None = None,
    training: FitOptions | Mapping[str, object] | None = None,
    validate: Literal["contexts", "perturbations", "cells"] | bool = True,
    checkpoint_dir: str | os.PathLike | None = None,
    resume: bool = False,
    client: object | None = None,
    seed: int | None = None,
) -> ST:
    """Fit ST and SE: learn what each perturbation does to the control cells of each context, and embed every cell.

    `X` and the layers stay as they are. Written are `obsm["X_state"]` (unless `se=False`) and `uns["virtualcell"]`: the
    design, the verdict on cells that were left out, and the fitted ST, so that
    :func:`virtualcell.tl.predict_perturbation` needs no more than the data, also after it was saved as h5ad. ST comes
    first and is written as soon as it is fitted. SE, which predictions of genes do not use, follows: whoever interrupts
    it has the ST. Only an ST that works on `"X_state"` (`network`) waits for it.

    Training cells are learned from and choose everything: the genes, the embedding, the weights, and the verdict.
    Validation cells (those that `split_key` says, or else a tenth of each group) tell when to stop, where that is asked
    for; of test cells no expression is read, unless SE embeds them.

    Parameters
    ----------
    adata
        Cells x genes of a screen, or a MuData with it in `modality`.
    perturbation_key
        Column of `obs` with the perturbation of each cell. Combinations are written `A+B`, in any order;
        `A+control`, `control+A` and `A` are one perturbation.
    control
        Label of unperturbed cells in that column; several labels, in a list, are one control, by the name of
        the first.
    context_key
        Column with the context (cell type, cell line), within which control cells are matched.
    batch_key
        Column with the experimental batch, within which control cells are matched too. ST learns an embedding
        of it.
    combination_separator
        What stands between the parts of a combination in labels, such as "_". It is one where it joins two names: not
        within brackets, so that "(+)-JQ1" is one name, and not within the label of the control. `None` where every
        label is one perturbation. The model calls a combination `A+B`, in alphabetical order; in tables, pictures and
        predicted cells it is written as it is most often in `adata`.
    dose_key
        Column with the dose, a number, of the drug that `perturbation_key` names. Each drug at each dose is a
        perturbation, by the name "drug_1.0"; :func:`virtualcell.tl.predict_perturbation` takes `drug=` and `dose=`, and
        doses between those that were measured. Doses are read to six digits, so that 0.1 in single precision is 0.1;
        what control cells have there is not read.
    split_key
        Column with `train`, `val`, `test` (:func:`virtualcell.pp.split`).
    layer
        Layer with the expression; `X` where it is in none.
    scale
        Whether the expression is "counts" (raw) or "log1p" (of counts per 10,000), which is checked and never
        guessed.
    library_size_key
        Column of `obs` with the library size, needed where `adata` holds only some of the genes; by default it
        is the sum over the genes of `adata`.
    gene_key
        Column of `var` that holds the names of genes which perturbations and the gene table of SE go by, where these
        are not `var_names`.
    modality
        Expression modality of a MuData.
    n_top_genes
        Number of highly variable genes of the training cells to model; `None` for all. Genes that perturbations are
        named after always come along.
    perturbation_features
        Features per perturbation, to predict perturbations that were never measured; see
        :class:`virtualcell.models.ST`. After an `init_from` with features, only for perturbations that it lacks.
    se
        `None` trains an SE on vectors of genes from :func:`virtualcell.pp.expression_gene_embeddings`; a table of gene
        vectors trains one on these; a dictionary states options of that training, and the table as `"gene_embeddings"`:
        `{"gene_embeddings": esm2, "max_steps": 500}`. A trained SE embeds, and `False` leaves the embedding out.
    init_from
        A trained model to go on from, with its sizes. An ST: its genes (those that `adata` has), perturbations and
        batches are found by name and keep their weights, so that training starts with its predictions for them (the
        transferred effect is computed anew from `adata`); what is new in `adata` is added; its SE embeds, unless
        another is given. An SE: it goes on with its own gene table, on the training cells, and ST is trained from the
        start. A lower rate than the default, say `training={"lr": 1e-4}`, keeps more of what the model knew.
    transfer_from
        Other experiments, as in :class:`virtualcell.models.Transfer`: perturbations that your own cells lack are
        predicted from what they did there, by the transferred effect alone.
    size
        Size of the networks: "small", "medium", "large" (the paper's), or "auto": "medium" with a GPU and 20,000 cells
        or more, else "small".
    network
        Options of ST: `use_rep` (a key of `obsm` with cell embeddings to work on, such as `"X_state"`, in place of
        genes), `preset` ("published" for the form of the paper), `head`, `transfer`, `n_networks`, `set_size`,
        `modality_of_perturbation` ("CRISPRi") with `gene_positions`, and the fields of
        :class:`virtualcell.models.STConfig`.
    training
        Options of the training, see :class:`virtualcell.tl.FitOptions`: `max_steps`, `batch_size`, `lr`, `accelerator`,
        `devices`, `precision`, `progress_bar`, `min_cells`, `freeze`, `lora` and others. Devices, precision and the bar
        are SE's too.
    validate
        What predictions will be wanted for, which decides how much the networks count and what the verdict is about:
        perturbations in new "contexts", new "perturbations", or "cells" of measured pairs. Training cells are left out
        in the same way, at most five times, and predicted by short fits and by the baselines; that costs at most about
        twice the fit. `True` takes what follows from the split: what most of the pairs are that it keeps from training;
        without such pairs, new contexts where there are several. `False` asks nothing and takes default
        weights. The verdict is printed, and is in the model's `verdict` and its representation, in
        `uns["virtualcell"]["verdict"]`, and as a table in `uns["virtualcell"]["validation"]`.
    checkpoint_dir
        Folder in which the fit is kept, every five minutes (`training={"checkpoint_every": seconds}`) and when its
        process is told to end by SIGTERM or Ctrl-C: each training, those of the verdict too, in a file of its own,
        and in the end the model, for :func:`virtualcell.io.load`.
    resume
        Whether to go on from what is in `checkpoint_dir`. What was finished is not trained again, and the result is
        that of a fit which was not interrupted, bit for bit on a CPU. A folder that holds nothing yet is begun, so that
        a job can be sent again as it is. Trainings on other data or with other options are refused.
    client
        A `dask.distributed.Client` (`pip install "virtualcell[dask]"`) for data that is not in memory: its workers,
        which open the same files and share the disk of `vc.settings.cache_dir`, copy and check the cells, and take the
        sums from which genes are chosen and effects measured. What a worker did not finish another one does, and the
        result is the same, bit for bit. Networks are trained here.
    seed
        Seed of everything random; by default `vc.settings.seed`.

    Returns
    -------
    The fitted :class:`virtualcell.models.ST`; its `se` is the SE that was fitted or given.

    Raises
    ------
    KeyError
        For an unknown column, label, layer, modality or option.
    ValueError
        For data that does not fit what was stated: fractions as counts, negative or missing values, empty cells, a
        context without control cells, nothing to train on.
    FloatingPointError
        If a loss is not finite.
    FileExistsError
        If `checkpoint_dir` holds a fit, without `resume`.

    Examples
    --------
    >>> st = vc.tl.fit_state(
    ...     adata,
    ...     perturbation_key="target_gene",
    ...     control="non-targeting",
    ...     context_key="cell_type",
    ...     se=False,
    ...     validate=False,
    ...     training={"max_steps": 20},  # for a first look
    ... )
    >>> len(st.genes), "virtualcell" in adata.uns
    (60, True)
    """
    check_library_sizes(scale, library_size_key)
    check_client(client)
    options = FitOptions.from_(training, seed=seed, checkpoint_dir=checkpoint_dir, resume=resume)
    networks = NetworkOptions.of(network)
    of_se = SEOptions.of(se, init_from, networks.use_rep, options)
    check_call(options, training, split_key, size, init_from, of_se)
    check_transfer(transfer_from, networks)
    if options.checkpoint_dir is not None:
        refuse_used(options.checkpoint_dir, resume=options.resume)
    data, adata = adata, expression_modality(adata, modality)
    size = choose_size(size, adata.n_obs)
    design = Design(
        perturbation_key=perturbation_key, control=control, context_key=context_key, batch_key=batch_key,
        combination_separator=combination_separator, dose_key=dose_key, split_key=split_key, gene_key=gene_key,
        use_rep=networks.use_rep, layer=layer, scale=scale, library_size_key=library_size_key, n_genes=adata.n_vars,
    )  # fmt: skip
    waits = of_se.makes(design.use_rep)  # ST, for the embedding that it works on, which is yet to be made
    screen = Screen.from_anndata(
        data, dataclasses.replace(design, use_rep=None) if waits else design, modality=modality
    ).by(Workers(client))
    of_se.check_cells(adata, screen)
    goes_on = isinstance(init_from, ST)
    has_features = perturbation_features is not None or (goes_on and init_from.table.has_features)
    asked = asked_by(validate, screen, has_features=has_features)
    to_learn = {"min_cells": options.min_cells, "val_fraction": options.val_fraction, "seed": options.seed}
    screen = prepared(screen, has_features=has_features, **to_learn)
    warn_of_panel(screen, data, modality=modality)
    require_validation(options, screen)
    genes = choose_genes(screen, n_top_genes, targets=screen.targets())
    on_genes = screen.select(genes_to_model(genes, init_from, adata.var_names) if goes_on else genes)
    build = partial(
        build_st, features=perturbation_features, init_from=init_from, size=size, network=networks, options=options
    )

    def fitted_st(cells: Screen) -> ST:
        st = build(cells)
        st.elsewhere = _elsewhere(st, transfer_from, perturbation_features)
        verdict = train_st(st, build=build, options=options, asked=asked, init_from=init_from)
        _write(adata, st, design)
        if verdict is not None:
            say(verdict.message)
        return st

    if waits and of_se.is_trained_here:  # options that do not fit raise now, and not after the training of SE
        build(_in_embedding(on_genes, design, np.broadcast_to(np.float32(0), (screen.n_cells, 64))))
    st = None if waits else fitted_st(on_genes)
    if of_se.embeds:
        if st is not None and of_se.is_trained_here:
            say(_SE_FOLLOWS)
        fitted_se = fit_se(screen, of_se, size=size)
        where = {"layer": layer, "scale": scale, "gene_key": of_se.gene_key(gene_key)}
        vectors = fitted_se.get_latent_representation(adata, **where, progress_bar=options.progress_bar)
        if waits:
            st = fitted_st(_in_embedding(on_genes, design, vectors[adata.obs_names.get_indexer(screen.names)]))
        st.se = fitted_se
        if takes_results(adata):
            adata.obsm[_keys.X_STATE] = vectors
    if options.checkpoint_dir is not None:
        _keep(st, options.checkpoint_dir)
    return st


def _elsewhere(st: ST, sources: Sources | None, features: pd.DataFrame | None) -> Transfer | None:
    """Learn what other experiments tell, where there are some, scaled by what is true of one's own training cells."""
    if sources is None:
        return None
    if not st.transfer:
        raise ValueError("transfer_from= needs a transferred effect, which the ST in init_from does not have.")
    screen = st.screen
    model = Transfer(screen, sources, features)
    model.train(Effects.measure(screen, screen.is_known))
    model.forget_data()
    return model


def _in_embedding(screen: Screen, design: Design, vectors: np.ndarray) -> Screen:
    return dataclasses.replace(screen, design=design, rep=vectors.astype(np.float32, copy=False))


def _keep(st: ST, folder: str | os.PathLike) -> None:
    """Write the fitted model beside its trainings; where that cannot be, it is in the data all the same."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return  # the first process does
    try:
        save(st, folder, overwrite=True)
    except OSError as error:
        logger.warning("The fitted model is in the data, and not in checkpoint_dir: %s.", error)


def _write(adata: AnnData, st: ST, design: Design) -> None:
    """Write the design, the verdict and the model to `uns`, where it takes any."""
    if not takes_results(adata):
        logger.warning(
            "adata is a view of data that is not in memory, to which nothing can be written: keep the model that is "
            "returned, and give it to later calls as model=. Embed the whole data, or a copy, with `vc.tl.embed`."
        )
        return
    found = {"design": design.to_uns(), "st": pack(st, without=["se"])}
    if st.validation is not None:
        found |= {"validation": st.validation, "verdict": st.verdict}
    before = {k: v for k, v in ours(adata).items() if k not in ("st", "validation", "verdict")}
    adata.uns[_keys.UNS] = {**before, **found}
