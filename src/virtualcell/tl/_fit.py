"""Fit SE and ST on a screen in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._design import Design, Scale, check_library_sizes, expression_modality, labels
from virtualcell._errors import unknown_name
from virtualcell._threads import torch_threads_kept
from virtualcell.data._matrix import log_expression
from virtualcell.io._save import pack
from virtualcell.models import SE, ST
from virtualcell.models._base import SPLITS
from virtualcell.models._finetune import continue_se, continue_st, genes_to_model, partly_trained
from virtualcell.models._perturbations import parts
from virtualcell.pp import expression_gene_embeddings
from virtualcell.tl._verdict import judge

logger = logging.getLogger(__name__)

Size = Literal["auto", "small", "medium", "large"]


def fit_state(
    adata: AnnData | MuData,
    *,
    perturbation_key: str,
    control: str,
    context_key: str | None = None,
    batch_key: str | None = None,
    layer: str | None = None,
    scale: Scale = "counts",
    library_size_key: str | None = None,
    use_rep: str | None = None,
    gene_embeddings: pd.DataFrame | None = None,
    gene_key: str | None = None,
    se: SE | Literal[False] | None = None,
    init_from: ST | SE | None = None,
    freeze: Sequence[str] = (),
    lora: dict | None = None,
    perturbation_features: pd.DataFrame | None = None,
    split_key: str | None = None,
    n_top_genes: int | None = 2000,
    min_cells: int = 10,
    size: Size = "auto",
    max_steps: int | None = None,
    se_max_steps: int | None = None,
    model_kwargs: dict | None = None,
    train_kwargs: dict | None = None,
    accelerator: str = "auto",
    devices: int | list[int] | str = "auto",
    precision: str = "32-true",
    store_model: bool = True,
    validate: bool = True,
    seed: int = 0,
    enable_progress_bar: bool = True,
    modality: str = "rna",
) -> ST:
    """Fit SE and ST: embed every cell, and learn what each perturbation does to the control cells of each context.

    `X` and the layers stay as they are. Written are `obsm["X_state"]` (unless `se=False`) and `uns["virtualcell"]`: the
    design, the verdict on validation cells, and the fitted ST, so that :func:`virtualcell.tl.predict_perturbation`
    needs no more than the data, also after it was saved as h5ad.

    Parameters
    ----------
    adata
        Cells x genes of a screen, or a MuData with it in `modality`.
    perturbation_key, control
        Column of `obs` with the perturbation of each cell (combinations as `A+B`), and its label for unperturbed cells.
    context_key, batch_key
        Columns with the context (cell type, cell line) and the experimental batch. Control cells are matched within
        both, and ST learns an embedding of the batch.
    layer, scale, library_size_key
        Where the expression is; whether it is "counts" (raw) or "log1p" (of counts per 10,000), checked and never
        guessed; the column of `obs` with the library size, needed where `adata` holds only some of the genes
        (default: sum over the genes of `adata`).
    use_rep
        Work on cell embeddings, `"X_state"` or another key of `obsm`, and decode genes from them. By default ST works
        in gene space.
    gene_embeddings, gene_key
        Gene table for SE (default: :func:`virtualcell.pp.expression_gene_embeddings` of the training cells), and the
        column of `var` that holds the names it uses, among which targets are looked for too.
    se
        A trained SE to embed with, instead of training one; `False` for no embedding.
    init_from
        A trained model to go on from, with its sizes. An ST: its genes (those that `adata` has), perturbations and
        batches are found by name and keep their weights, so that training starts with its predictions for them (a prior
        is computed anew from `adata`); what is new in `adata` is added; its SE embeds, unless another is given. An SE:
        it goes on with its own gene table, on the training cells, and ST is trained from the start. A lower rate than
        the default, say `train_kwargs={"lr": 1e-4}`, keeps more of what the model knew.
    freeze
        Beginnings of names of parameters of that model which stay as they are: `["transformer_backbone"]`.
    lora
        Leave the transformer of `init_from` as it is and train low-rank adapters of its linear layers, together with
        all that is outside of it and not in `freeze`. At the end they are added to the weights, so that the model is an
        ordinary one. Options `r` (rank), `alpha`, `dropout` and `target_modules` (names of layers, all by default), as
        in `peft`, which `pip install "virtualcell[lora]"` brings.
    perturbation_features
        Features per perturbation, to predict perturbations that were never measured; see
        :class:`virtualcell.models.ST`. After an `init_from` with features, only for perturbations that it lacks.
    split_key
        Column with `train`, `val`, `test` (:func:`virtualcell.pp.split`). Test cells take no part in anything that is
        learned or chosen, the genes included.
    n_top_genes
        Highly variable genes of the training cells to model; `None` for all. Targets of the screen always come along.
    min_cells
        Perturbations with fewer training cells are left out, with a warning that names them.
    size
        Of the networks: "small", "medium", "large" (the paper's), or "auto": "medium" with a GPU and 20,000 cells or
        more, else "small".
    max_steps, se_max_steps
        Training steps of ST and SE, where their defaults do not fit.
    model_kwargs, train_kwargs
        Passed to :class:`virtualcell.models.ST` (`residual="hidden"` for the published form) and its `train`.
    accelerator, devices, precision, enable_progress_bar
        As in Lightning, for both trainings.
    store_model
        Keep the fitted ST in `uns` (its size in memory); otherwise pass it to `predict_perturbation` as `model=`.
    validate
        End with a verdict: ST beside the baselines on the validation cells (those of the split, or the share that
        training kept), in one line of the log and in `uns["virtualcell"]["validation"]`. Validation cells are as new as
        the split makes them: of groups that were learned from, unless it says otherwise.
    seed
        Of everything random.
    modality
        Expression modality of a MuData.

    Returns
    -------
    The fitted :class:`virtualcell.models.ST`; its `se` is the SE that was fitted or given.

    Raises
    ------
    KeyError
        For an unknown column, label, layer or modality.
    ValueError
        For data that does not fit what was stated: fractions as counts, negative or missing values, empty cells, a
        context without control cells, nothing to train on.
    """
    data, adata = adata, expression_modality(adata, modality)
    design = Design(
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        batch_key=batch_key,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
        n_genes=adata.n_vars,
    )
    train_kwargs = dict(train_kwargs or {})
    if max_steps is not None and "max_steps" in train_kwargs:
        raise ValueError(
            f"max_steps={max_steps!r} and train_kwargs={{'max_steps': {train_kwargs['max_steps']!r}}} were both given."
        )
    check_library_sizes(scale, library_size_key)
    obs, split = _read_obs(data, design, split_key, modality)
    seen = (split != "test") & _enough_cells(
        obs[perturbation_key], split, control, min_cells, has_features=perturbation_features is not None
    )
    se = _check_start(init_from, freeze, lora, se=se, use_rep=use_rep, gene_embeddings=gene_embeddings)
    if use_rep is not None and use_rep not in adata.obsm and not (use_rep == _keys.X_STATE and se is not False):
        raise unknown_name("use_rep", use_rep, adata.obsm, "Compute it first, or use 'X_state' and let SE be fitted.")
    _check_controls(obs, seen, design)
    matrix = log_expression(adata, layer=layer, scale=scale, library_size_key=library_size_key)
    targets = _targets(adata, obs[perturbation_key], control, gene_key)
    genes = _genes(matrix, adata.var_names, seen, targets, n_top_genes)
    if isinstance(init_from, ST):
        genes = genes_to_model(genes, init_from, adata.var_names)
    work = AnnData(matrix[:, adata.var_names.get_indexer(genes)], obs=obs, var=pd.DataFrame(index=genes))
    work.obs["_split"] = np.where(seen, split, "test")
    del matrix  # of all genes, as large as `adata`
    size = _size(size, adata.n_obs)
    run = {
        "accelerator": accelerator,
        "devices": devices,
        "precision": precision,
        "seed": seed,
        "enable_progress_bar": enable_progress_bar,
    }

    partly = {"freeze": freeze, "lora": lora, "seed": seed}
    if isinstance(init_from, SE):
        se = _fit_se(adata[seen], design, init_from, gene_key, size, {"max_steps": se_max_steps, **run}, partly)
    elif se is None:
        if gene_embeddings is None:
            gene_key = None  # the table is made from the data, under var_names
        se = _fit_se(adata[seen], design, gene_embeddings, gene_key, size, {"max_steps": se_max_steps, **run}, {})
    if se is not False:
        adata.obsm[_keys.X_STATE] = se.get_latent_representation(adata, layer=layer, scale=scale, gene_key=gene_key)

    if use_rep is not None:
        work.obsm[use_rep] = np.asarray(adata.obsm[use_rep], dtype=np.float32)
    ST.setup_anndata(
        work,
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        batch_key=batch_key,
        use_rep=use_rep,
        split_key="_split" if split_key is not None or not seen.all() else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(init_from, ST):
            st = continue_st(work, init_from, perturbation_features, **(model_kwargs or {}))
        else:
            st = ST(work, perturbation_features, size=size, **(model_kwargs or {}))
    options = {"max_steps": max_steps, **run} | train_kwargs
    with partly_trained(st.module, **(partly if isinstance(init_from, ST) else {})):
        st.train(**options)
    if validate:
        validation = st.validation_cells(work, options.get("val_fraction"), options["seed"])
        if (validation & (work.obs[perturbation_key] != control).to_numpy()).any():
            table, baseline = judge(st, work, validation, perturbation_features, seed=seed)
            st.validation = table
            st.fallback = baseline if table.index[0] != "ST" else None
            baseline.design = design
        else:
            logger.warning("There are no perturbed validation cells: whether ST beats the baselines was not asked.")
    st.forget_data()
    st.design, st.se = design, se or None

    left = {"design": design.to_uns(), **({"st": pack(st._meta(), st._tensors())} if store_model else {})}
    if st.validation is not None:
        left["validation"] = st.validation
    if st.fallback is not None and store_model:
        left["fallback"] = pack(st.fallback._meta(), st.fallback._tensors())
    before = {k: v for k, v in adata.uns.get(_keys.UNS, {}).items() if k not in ("st", "validation", "fallback")}
    adata.uns[_keys.UNS] = {**before, **left}
    return st


def _read_obs(data, design: Design, split_key: str | None, modality: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Labels as strings, under the names of their columns, and the split of each cell ("train" where there is none)."""
    adata = expression_modality(data, modality)
    if not adata.obs_names.is_unique:
        raise ValueError("obs_names repeats cells. Run `adata.obs_names_make_unique()` first.")
    obs = pd.DataFrame(index=adata.obs_names)
    for role in ("perturbation_key", "context_key", "batch_key"):
        key = getattr(design, role)
        if key is not None:
            obs[key] = labels(data, key, argument=role, modality=modality)
    found = obs[design.perturbation_key]
    if design.control not in set(found):
        raise unknown_name("control", design.control, sorted(set(found)), "It labels the unperturbed cells.")
    if split_key is None:
        return obs, np.full(adata.n_obs, "train")
    split = labels(data, split_key, argument="split_key", modality=modality)
    if not set(split) <= set(SPLITS):
        raise ValueError(f"split_key={split_key!r} holds {sorted(set(split))}; valid are {SPLITS}.")
    return obs, split.to_numpy().astype(str)


def _enough_cells(
    perturbation: pd.Series, split: np.ndarray, control: str, min_cells: int, has_features: bool
) -> np.ndarray:
    """Mask of the cells whose perturbation has enough training cells; control cells always are."""
    counts = perturbation[split == "train"].value_counts()
    if not has_features:  # with features a perturbation may be met for the first time in validation
        counts = counts.reindex(perturbation[split != "test"].unique(), fill_value=0)
    few = sorted(set(counts.index[counts < min_cells]) - {control})
    if few:
        logger.warning(
            "%d perturbations have fewer than min_cells=%d training cells and are left out: %s%s.",
            *(len(few), min_cells, ", ".join(few[:10]), " ..." if len(few) > 10 else ""),
        )
    if not set(counts.index) - set(few) - {control}:
        raise ValueError(f"no perturbation has min_cells={min_cells} training cells: there is nothing to train on.")
    return ~perturbation.isin(few).to_numpy()


def _check_controls(obs: pd.DataFrame, seen: np.ndarray, design: Design) -> None:
    """Raise for a context to learn in that has no control cells, before anything takes its time."""
    if design.context_key is None:
        return
    is_control = (obs[design.perturbation_key] == design.control).to_numpy()
    context = obs[design.context_key]
    without = sorted(set(context[seen]) - set(context[seen & is_control]))
    if without:
        raise ValueError(
            f"context {without[0]!r} has no control cells ({design.control!r}) to start from. Drop it or add controls."
        )


def _targets(adata: AnnData, perturbation: pd.Series, control: str, gene_key: str | None) -> set[str]:
    """Find the genes that perturbations are named after, by `var_names` or by `var[gene_key]`."""
    if gene_key is not None and gene_key not in adata.var:
        raise unknown_name("gene_key", gene_key, adata.var.columns, "Leave it out to match genes by var_names.")
    wanted = {p for label in set(perturbation) for p in parts(label, control)}
    found = adata.var_names.isin(wanted)
    if gene_key is not None:
        found |= adata.var[gene_key].astype(str).isin(wanted).to_numpy()
    return set(adata.var_names[found])


def _genes(
    matrix: sparse.csr_matrix, names: pd.Index, seen: np.ndarray, targets: set[str], n_top_genes: int | None
) -> list[str]:
    """Names of the genes to model, sorted, so that the order of genes in a file changes nothing."""
    if not names.is_unique:
        raise ValueError("var_names repeats genes. Run `adata.var_names_make_unique()` first.")
    if n_top_genes is not None and n_top_genes < 1:
        raise ValueError(f"n_top_genes={n_top_genes!r}: at least one gene is needed. Say None for all genes.")
    if n_top_genes is None or n_top_genes >= len(names):
        return sorted(names)
    cells = AnnData(matrix if seen.all() else matrix[np.flatnonzero(seen)], var=pd.DataFrame(index=names))
    with torch_threads_kept():
        table = sc.pp.highly_variable_genes(cells, n_top_genes=n_top_genes, flavor="seurat", inplace=False)
    return sorted(set(names[table["highly_variable"].to_numpy()]) | targets)


def _size(size: Size, n_cells: int) -> str:
    if size != "auto":
        return size
    chosen = "medium" if torch.cuda.is_available() and n_cells >= 20_000 else "small"
    logger.info("size='auto': %r for %d cells.", chosen, n_cells)
    return chosen


def _check_start(
    init_from: ST | SE | None,
    freeze: Sequence[str],
    lora: dict | None,
    *,
    se: SE | Literal[False] | None,
    use_rep: str | None,
    gene_embeddings: pd.DataFrame | None,
) -> SE | Literal[False] | None:
    """Return the SE to embed with, after checking that the rest of the call fits the model to go on from."""
    if not (se is None or se is False or isinstance(se, SE)):
        raise TypeError(f"se must be a trained SE, False or None, got {type(se).__name__}.")
    if se is not None and gene_embeddings is not None:
        raise ValueError("gene_embeddings= is for an SE that is trained here: leave it out, or leave se= out.")
    if init_from is None:
        if freeze or lora is not None:
            raise ValueError("freeze= and lora= need init_from=, the trained model that they are about.")
        return se
    if isinstance(init_from, SE):
        if se is not None or gene_embeddings is not None:
            raise ValueError(
                "init_from= is an SE, which goes on with its own gene table: leave se= and gene_embeddings= out."
            )
        return None
    if not isinstance(init_from, ST):
        raise TypeError(f"init_from must be an ST or an SE, got {type(init_from).__name__}.")
    theirs = init_from.setup["use_rep"]
    if use_rep != theirs:
        raise ValueError(
            f"use_rep={use_rep!r}, but init_from works on {'genes' if theirs is None else f'obsm[{theirs!r}]'}: pass "
            f"use_rep={theirs!r}."
        )
    se = init_from.se if se is None and gene_embeddings is None else se
    if theirs == _keys.X_STATE and se is None:
        raise ValueError(
            "init_from works on obsm['X_state'] of an SE that it does not carry: pass that one as se=, or se=False "
            "where obsm['X_state'] comes from it already."
        )
    return se


def _fit_se(
    cells: AnnData,
    design: Design,
    start: SE | pd.DataFrame | None,
    gene_key: str | None,
    size: str,
    run: dict,
    partly: dict,
) -> SE:
    """Train an SE, from a gene table or an SE, on a copy of the training cells that holds only their expression."""
    cells = cells[:, np.argsort(cells.var_names)]  # so that the order of genes in a file changes nothing
    matrix = cells.X if design.layer is None else cells.layers[design.layer]
    work = AnnData(sparse.csr_matrix(matrix), obs=pd.DataFrame(index=cells.obs_names), var=cells.var.copy())
    if design.library_size_key is not None:
        work.obs[design.library_size_key] = cells.obs[design.library_size_key]
    if start is None:
        start = expression_gene_embeddings(
            work, scale=design.scale, library_size_key=design.library_size_key, seed=run["seed"]
        )
    SE.setup_anndata(work, scale=design.scale, gene_key=gene_key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run["seed"])
        se = continue_se(work, start) if isinstance(start, SE) else SE(work, start, size=size)
    with partly_trained(se.module, **partly):
        se.train(**run)
    se.forget_data()
    return se
