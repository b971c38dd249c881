"""Continue from a trained model on new data: weights carried over by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from virtualcell.data._labels import parts
from virtualcell.data._screen import Screen
from virtualcell.models._features import PerturbationTable
from virtualcell.models._se import SE
from virtualcell.models._st import ST
from virtualcell.modules import STNetwork

logger = logging.getLogger(__name__)

_FROM_DATA = ("n_input", "n_output", "n_perturbation", "n_batches", "n_genes")
_FREE = ("dropout", "decoder_dropout", "perturbation_dropout")  # may differ: no weight depends on them

Places = tuple[Tensor, Tensor]  # where the same names are in the new and in the old model


def continue_st(
    screen: Screen,
    old: ST,
    perturbation_features: pd.DataFrame | None,
    *,
    set_size: int | None = None,
    **network: object,
) -> ST:
    """Build an ST on the cells of a screen, of the sizes of `old`, and carry the weights over."""
    theirs = {**dataclasses.asdict(old.config), "n_networks": old.n_networks, "transfer": old.transfer}
    theirs["preset"] = old.preset
    if old.crispri is not None and "modality_of_perturbation" not in network:
        positions = network.get("gene_positions", old.gene_positions)
        network = {**network, "modality_of_perturbation": old.modality_of_perturbation, "gene_positions": positions}
    network = {k: tuple(v) if isinstance(v, list) else v for k, v in network.items()}
    wrong = [k for k in network if k in theirs and k not in _FREE and network[k] != theirs[k]]
    if wrong:
        told = ", ".join(f"{k}={network[k]!r} (init_from has {theirs[k]!r})" for k in wrong)
        raise ValueError(f"network: {told}. The model goes on as it was built: leave these out.")
    labels = set(screen.perturbation[screen.is_train])
    unseen = set(screen.perturbation[screen.is_val]) - labels
    features = None if perturbation_features is None else screen.design.named(perturbation_features)
    table = extend_table(old.table, labels, screen.design.control, features, unseen)
    sizes = {k: v for k, v in theirs.items() if k not in _FROM_DATA}
    new = ST(screen, table=table, set_size=set_size or old.set_size, **{**sizes, **network})
    if new.design.use_rep is not None and new.config.n_input != old.config.n_input:
        raise ValueError(
            f"obsm[{new.design.use_rep!r}] has {new.config.n_input} columns, init_from was trained on "
            f"{old.config.n_input}: they come from different SE models."
        )
    if old.transferred is not None and (lost := sorted(set(old.transferred.perturbations) - labels)):
        logger.warning(
            "The transferred effect is computed from the new data alone, which lacks %d perturbations of init_from: "
            "predictions for them lose its part. They are %s%s.",
            *(len(lost), ", ".join(lost[:10]), " ..." if len(lost) > 10 else ""),
        )
    for theirs, ours in zip(old.networks, new.networks, strict=True):
        transfer_weights(
            theirs,
            ours,
            genes=(old.genes, new.genes),
            batches=(old.batches, new.batches),
            perturbations=(old.table, table),
        )
    new.elsewhere = old.elsewhere
    return new


def continue_se(screen: Screen, old: SE) -> SE:
    """Build an SE on the cells of a screen, with the gene table and the weights of `old`."""
    config = {k: v for k, v in dataclasses.asdict(old.config).items() if k not in ("n_token", "n_datasets")}
    new = SE(
        screen,
        pd.DataFrame(old.gene_embeddings.numpy(), index=old.gene_names),
        length=old.length,
        n_targets=old.n_targets,
        cls_expression_gene=old.cls_expression_gene,
        fill_sentences=old.fill_sentences,
        **config,
    )
    with torch.no_grad():
        last = new.module.dataset_encoder[-1]
        _copy_all(old.module, new.module, but=[last])
        _carry(last, old.module.dataset_encoder[-1], rows=_places(old.datasets, new.datasets))
    logger.info("init_from: an SE with %d genes in its table.", len(new.gene_names))
    return new


def genes_to_model(chosen: Sequence[str], old: ST, available: pd.Index) -> list[str]:
    """Return the genes of a trained model that the data have, and those chosen from the data, sorted."""
    kept = set(old.genes) & set(available)
    if not kept:
        raise ValueError(
            f"none of the {len(old.genes)} genes of init_from ({', '.join(old.genes[:3])}, ...) is among the "
            f"{len(available)} of the data ({', '.join(available[:3])}, ...). Genes are matched by name: see var_names."
        )
    return sorted(kept | set(chosen))


def extend_table(
    old: PerturbationTable,
    labels: Iterable[str],
    control: str,
    features: pd.DataFrame | None,
    unseen: Iterable[str] = (),
) -> PerturbationTable:
    """Return the table of a trained model with what the `labels` of new training cells lack in it.

    Vectors that were there stay what they were. A one-hot table grows by a dimension for each new perturbation; a
    table of features takes rows of `features`, on the scale of its own; `features` replace a one-hot table.
    """
    labels = sorted(set(labels) - {control})
    if features is not None and not old.has_features:
        return PerturbationTable.from_features(features, labels, control, unseen)
    if control != old.control and control in old.names:
        raise ValueError(
            f"control={control!r} is a perturbation of init_from, whose control is {old.control!r}. Give the control "
            "cells of the new data another label."
        )
    names = [control if name == old.control else name for name in old.names]
    wanted = {*labels, *unseen} if old.has_features else labels
    added = sorted({p for label in wanted for p in parts(label, control, names)} - set(names))
    vectors = old.vectors
    if old.has_features:
        rows = pd.DataFrame() if features is None else features.set_axis(features.index.astype(str))
        missing = [p for p in added if p not in rows.index]
        if missing:
            raise ValueError(
                f"init_from predicts from features of perturbations and has none for {missing[:10]}. Give them as "
                "perturbation_features=, from the same source and with rows for some of its own perturbations."
            )
        added = [name for name in rows.index if name not in {*names, control}]
        if added:
            vectors = torch.cat([vectors, _on_scale_of(old, names, rows, added)])
    elif added:
        vectors = torch.block_diag(vectors, torch.eye(len(added)))
    seen = sorted({*old.seen, *labels} - {control})
    return PerturbationTable([*names, *added], vectors, control=control, seen=seen, has_features=old.has_features)


def _on_scale_of(old: PerturbationTable, names: list[str], features: pd.DataFrame, added: list[str]) -> Tensor:
    """Vectors of new rows; how columns were shifted and scaled is read off the perturbations that both tables have."""
    n, d = features.shape[1], old.n_dims
    counts = d == n + 1  # our own tables end with a column of ones
    shared = [name for name in features.index if name in set(names)]
    if d not in (n, n + 1) or len(shared) < 2:
        raise ValueError(
            f"perturbation_features has {n} columns and {len(shared)} rows of perturbations that init_from knows; "
            f"needed are {d - 1} columns, those of its own table, and at least 2 such rows."
        )
    x = features.loc[shared].to_numpy(np.float64)
    y = old.vectors[[names.index(name) for name in shared], :n].double().numpy()
    dx, dy = x - x.mean(axis=0), y - y.mean(axis=0)
    slope = (dx * dy).sum(axis=0) / np.maximum((dx**2).sum(axis=0), 1e-12)
    if np.abs(dx * slope - dy).max() > 1e-3 * max(np.abs(y).max(), 1e-12):
        raise ValueError("perturbation_features differs from the features of init_from for perturbations in both.")
    rows = (features.loc[added].to_numpy(np.float64) - x.mean(axis=0)) * slope + y.mean(axis=0)
    return torch.from_numpy(np.concatenate([rows, np.ones((len(rows), int(counts)))], axis=1)).float()


@torch.no_grad()
def transfer_weights(
    old: STNetwork,
    new: STNetwork,
    *,
    genes: tuple[Sequence[str], Sequence[str]],
    batches: tuple[Sequence[str], Sequence[str]],
    perturbations: tuple[PerturbationTable, PerturbationTable],
) -> None:
    """Copy weights, so that `new` starts with the predictions of `old` for the genes that both have.

    A gene that is new is at first not looked at, and its own output starts as in an untrained network. A perturbation
    that is new starts as if drawn from the old ones, a batch that is new as the mean of the old ones.

    Parameters
    ----------
    old, new
        Networks of the same sizes, except where the names of genes, perturbations and batches decide.
    genes, batches
        Names in the old and the new model.
    perturbations
        The tables, the new one made by :func:`extend_table`.
    """
    ours, theirs = _named_layers(new), _named_layers(old)
    but = [*ours.values(), *([new.batch_encoder] if new.config.n_batches else [])]
    _copy_all(old, new, but=but)

    shared = _places(*genes)
    in_genes = not new.config.n_genes
    for name, layer in ours.items():
        its = theirs[name]
        if name == "decoded":
            _carry(layer, its, rows=shared)
        elif name == "control":
            _carry(layer, its, columns=shared if in_genes else None)
        elif name in ("out", "level"):
            _carry(layer, its, rows=shared if in_genes else None)
        elif name in ("down", "up"):  # a bottleneck, narrower where there are fewer genes
            narrow = torch.arange(min(new.config.n_output // 8, old.config.n_output // 8))
            named = shared if in_genes else None
            places = (narrow, narrow)
            _carry(layer, its, rows=places if name == "down" else named, columns=named if name == "down" else places)

    if perturbations[1].has_features and not perturbations[0].has_features:
        logger.warning("init_from: one-hot perturbations give way to features, whose first layer is learned anew.")
    else:
        _carry_perturbations(ours["perturbation"], theirs["perturbation"])
    if new.config.n_batches and old.config.n_batches:
        at, there = _places(*batches)
        new.batch_encoder.weight[:] = old.batch_encoder.weight.mean(dim=0)
        new.batch_encoder.weight[at] = old.batch_encoder.weight[there].to(new.batch_encoder.weight)
    elif new.config.n_batches:
        new.batch_encoder.weight.zero_()
    elif old.config.n_batches:  # what was added to every cell is added here now, for an average batch
        new.pert_encoder[-1].bias += old.batch_encoder.weight.mean(dim=0).to(new.pert_encoder[-1].bias)
    _report("genes", *genes)
    _report("perturbations", *(table.names for table in perturbations))
    if any(batches):
        _report("batches", *batches)


def _named_layers(network: STNetwork) -> dict[str, nn.Linear]:
    """Layers that have names of genes or perturbations on one side."""
    c, basal = network.config, network.basal_encoder
    layers = {
        "perturbation": network.pert_encoder[0],
        "control": basal[0] if c.control_projection else basal,
        "out": network.project_out[-1],
    }
    if c.head == "both":
        layers["level"] = network.project_level[-1]
    if c.head == "all":
        layers |= {"down": network.final_down_then_up[0], "up": network.final_down_then_up[-1]}
    if c.n_genes:
        decoder = network.gene_decoder
        layers["decoded"] = decoder.final_layer[0] if c.decoder_residual else decoder.decoder[-2]
    return layers


def _places(old: Sequence[str], new: Sequence[str]) -> Places:
    there = pd.Index(old).get_indexer(pd.Index(new))
    return torch.from_numpy(np.flatnonzero(there >= 0)), torch.from_numpy(there[there >= 0]).long()


def _copy_all(old: nn.Module, new: nn.Module, *, but: Sequence[nn.Module]) -> None:
    left_out = {id(p) for module in but for p in module.parameters()}
    theirs = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if id(parameter) not in left_out:
            parameter.copy_(theirs[name])
    for name, buffer in old.named_buffers():
        new.get_buffer(name).copy_(buffer)


def _carry(new: nn.Linear, old: nn.Linear, *, rows: Places | None = None, columns: Places | None = None) -> None:
    """Copy the rows and columns that two layers share. Other columns become zero, other rows stay as first drawn."""
    every = [torch.arange(n) for n in new.weight.shape]
    (to_row, row), (to_column, column) = rows or (every[0], every[0]), columns or (every[1], every[1])
    fresh = torch.ones(new.in_features, dtype=torch.bool)
    fresh[to_column] = False
    new.weight[:, fresh] = 0
    new.weight[to_row.unsqueeze(1), to_column] = old.weight[row.unsqueeze(1), column].to(new.weight)
    new.bias[to_row] = old.bias[row].to(new.bias)


def _carry_perturbations(new: nn.Linear, old: nn.Linear) -> None:
    n = old.in_features
    new.weight[:, :n] = old.weight
    # as if drawn from the old ones: those that start alike, at zero or the mean, take long to come apart
    mean, spread = old.weight.mean(dim=1, keepdim=True), old.weight.std(dim=1, keepdim=True, correction=0)
    drawn = torch.randn(old.out_features, new.in_features - n)
    new.weight[:, n:] = mean.to(new.weight) + drawn * spread.to(new.weight)
    new.bias.copy_(old.bias)


def _report(what: str, old: Sequence[str], new: Sequence[str]) -> None:
    kept, dropped = len(set(old) & set(new)), sorted(set(old) - set(new))
    logger.info("init_from: %d %s kept, %d new, %d dropped.", kept, what, len(set(new) - set(old)), len(dropped))
    if what == "genes" and dropped:
        logger.warning("The model starts without %d genes that are not in the data: %s ...", len(dropped), dropped[:5])
