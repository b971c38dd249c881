"""Prediction by an ST: what its networks and the transferred effect say, together and apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from virtualcell._keys import AGREEMENT, ALL, EXTRAPOLATION
from virtualcell._threads import own_threads
from virtualcell.data._expression import MOST_EXPRESSION
from virtualcell.models._base import PerturbationModel
from virtualcell.models._common import require_finite
from virtualcell.models._from_start import Measured, SetMeans
from virtualcell.models._mixture import Change, Question
from virtualcell.models._start import Start

if TYPE_CHECKING:
    from virtualcell.models._st import ST

_SETS_AT_ONCE = 16  # in a forward pass without gradients


def _asked(model: ST, perturbation: str, context: str, base: np.ndarray | None) -> dict[str, Any]:
    """Return the transferred change of the mean, where there is one, the question, and how far from home it is."""
    if model.transferred is None or base is None:
        return {}
    question = _question(model, perturbation, context)
    if question == "elsewhere":
        profile = model.elsewhere.predict_cells(base[None], perturbation, context=context, base=base)[0]
        return {
            "change": _change(model, profile - base, base),
            "question": question,
            "extrapolation": model.transferred.extrapolation(base, context),
        }
    change = model.transferred(perturbation, control=model.control, context=context, base=base, features=model.features)
    return {
        "change": None if change is None else _change(model, change, base),
        "question": question,
        "extrapolation": model.transferred.extrapolation(base, context),
    }


def _question(model: ST, perturbation: str, context: str) -> Question:
    """Return what is asked of a model with a transferred effect."""
    if model.measured_elsewhere(perturbation):
        return "elsewhere"
    return model.transferred.question(perturbation, context, control=model.control)


def _change(model: ST, change: np.ndarray, base: np.ndarray) -> Change:
    return Change(*(torch.from_numpy(np.asarray(x, np.float32)).to(model.device) for x in (change, base)))


def _counts(model: ST, change: Change | None = None, question: Question = "contexts", **_: object) -> bool:
    """Whether the networks have any weight."""
    return change is None or model.mixture.of_networks(question, True) > 0


@torch.inference_mode()
def _run(
    model: ST, cells: np.ndarray, perturbation: str, batch: np.ndarray | None, *, with_networks: bool = True
) -> Iterator[tuple[Tensor, list[tuple[Tensor, ...]]]]:
    """Yield control sets (B, S, n_input), in the order given, and what the heads of each network predict.

    `with_networks=False` spares what has no weight, and yields nothing of them.
    """
    model.check_width(cells.shape[1])
    if model.module.training:  # to ask is cheap, to say it takes as long as a small network does
        model.module.eval()
    vector = model.table.encode([perturbation] if with_networks else []).to(model.device)
    codes = model.batch_codes(batch) if batch is not None and model.batches and with_networks else None
    s, starts = min(model.set_size, len(cells)), _set_starts(model, len(cells))
    for at in range(0, len(starts), _SETS_AT_ONCE):
        rows = np.stack([np.arange(i, i + s) for i in starts[at : at + _SETS_AT_ONCE]])
        control = torch.from_numpy(cells[rows]).to(model.device)
        of_batch = None if codes is None else torch.from_numpy(codes[rows]).to(model.device)
        networks = model.networks if with_networks else []
        outs = [network(control, vector.expand(len(rows), -1), of_batch) for network in networks]
        yield control, [out.heads for out in outs]


def _set_starts(model: ST, n: int) -> list[int]:
    """Where the sets begin; every one is full: the last one reaches back."""
    s = min(model.set_size, n)
    return [min(i, n - s) for i in range(0, n, s)]


def predict_embedding(
    model: ST,
    cells: np.ndarray,
    perturbation: str,
    *,
    context: str = ALL,
    base: np.ndarray | None = None,
    batch: np.ndarray | None = None,
) -> np.ndarray:
    """Predict in the space that the model works in, (n_cells, n_output); see :meth:`predict_cells`.

    Without `base`, no transferred effect takes part.
    """
    asked = _asked(model, perturbation, context, base)
    sets = [
        model.mixture.cells(heads, control, **asked).float().flatten(0, 1)
        for control, heads in _run(model, cells, perturbation, batch, with_networks=_counts(model, **asked))
    ]
    n, s = len(cells), min(model.set_size, len(cells))
    before = (len(_set_starts(model, n)) - 1) * s
    predicted = torch.cat(sets).cpu().numpy()
    predicted = np.concatenate([predicted[:before], predicted[before + s - (n - before) :]])  # of the last set
    require_finite(model, predicted, perturbation, context)  # before anything is cut off
    return predicted


@own_threads()
@torch.inference_mode()
def predict_cells(
    model: ST, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None = None
) -> np.ndarray:
    """Predict expression (n_cells, n_genes) from control cells of one context, `set_size` at a time.

    Parameters as in `virtualcell.models._base.PerturbationModel.predict_cells`.
    """
    predicted = model.predict_embedding(cells, perturbation, context=context, base=base, batch=batch)
    if model.config.n_genes:
        vectors = torch.from_numpy(predicted).to(model.device)
        predicted = torch.stack([n.decode(vectors) for n in model.networks]).mean(dim=0).float().cpu().numpy()
    if model.crispri is not None and base is not None:
        known = model.transferred
        measured = known is not None and known.question(perturbation, context, control=model.control) == "cells"
        predicted = model.crispri.put_on(predicted, base, perturbation, measured=measured)
    return np.minimum(predicted, MOST_EXPRESSION)


@own_threads()
@torch.inference_mode()
def predict_parts(
    model: ST, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean profiles (n_parts, n_genes) by every head of every network and the transferred effect, and weights."""
    if model.config.n_genes:
        predicted = model.predict_cells(cells, perturbation, context=context, base=base, batch=batch)
        return predicted.mean(axis=0, keepdims=True), np.ones(1)
    asked, means = _asked(model, perturbation, context, base), []
    for control, heads in _run(model, cells, perturbation, batch, with_networks=_counts(model, **asked)):
        of_sets, weights = model.mixture.means(heads, control, **asked)
        means.append(of_sets.float().cpu().numpy())
    return np.concatenate(means, axis=1).mean(axis=1), weights


@torch.inference_mode()
def means_from(model: ST, start: Start, perturbations: Sequence[str], sets: np.ndarray) -> Iterator[SetMeans]:
    """Yield the mean profiles of the parts for each perturbation, from the same control cells.

    Of what the networks predict only the means are kept, so that many perturbations run together. Parameters as in
    `virtualcell.models._from_start.means_from`.
    """
    if model.config.n_genes:
        yield from PerturbationModel.means_from(model, start, perturbations, sets)
        return
    cells = start.dense(sets.ravel())
    model.check_width(cells.shape[1])
    control = torch.from_numpy(cells.reshape(*sets.shape, -1)).to(model.device)
    asked = {name: _asked(model, name, start.context, start.base) for name in perturbations}
    run = [name for name in perturbations if _counts(model, **asked[name])]
    batch = start.batch_of(sets.ravel()) if run and model.batches else None
    codes = None if batch is None else torch.from_numpy(model.batch_codes(batch).reshape(sets.shape)).to(model.device)
    heads = dict(zip(run, _head_means(model, control, run, codes), strict=True))
    before = control.mean(dim=1, keepdim=True)
    for name in perturbations:
        # sets of one cell, the mean: parts and weights are those of the cells
        means, weights = model.mixture.means(heads.get(name, []), before, **asked[name])
        means = means.transpose(0, 1).float().cpu().numpy()
        require_finite(model, means, name, start.context)
        if model.crispri is not None:
            is_known = where_measured(model, name, start.context) == "here"
            mean = np.einsum("p,spg->g", weights, means) / len(means)
            means = model.crispri.put_on(means, start.base, name, measured=is_known, mean=mean)
        yield SetMeans(np.minimum(means, MOST_EXPRESSION), weights)


def _head_means(
    model: ST, control: Tensor, perturbations: Sequence[str], codes: Tensor | None
) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield for each perturbation the means, (n_sets, 1, n_genes), that the heads of each network predict."""
    if model.module.training:  # to ask is cheap, to say it takes as long as a small network does
        model.module.eval()
    for at in range(0, len(perturbations), _SETS_AT_ONCE):
        vectors = model.table.encode(perturbations[at : at + _SETS_AT_ONCE]).to(model.device)
        networks = []
        for network in model.networks:
            of_sets = []
            for i in range(len(control)):  # one set for all perturbations, which is encoded once
                out = network(control[i : i + 1], vectors, None if codes is None else codes[i : i + 1])
                of_sets.append([cells.mean(dim=1) for cells in out.heads])
            networks.append([torch.stack(of_head, dim=1) for of_head in zip(*of_sets, strict=True)])
        for i in range(len(vectors)):
            yield [tuple(head[i][:, None] for head in heads) for heads in networks]


@torch.inference_mode()
def apart(
    model: ST, start: Start, perturbation: str, *, n_cells: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean profile (n_genes,) by the networks alone, and by the transferred effect alone; see `predict_from`."""
    rows = model.rows_from(start, n_cells=n_cells, seed=seed)
    asked = _asked(model, perturbation, start.context, start.base)
    change, by_heads, by_change = asked.pop("change"), [], []
    for control, heads in _run(model, start.dense(rows), perturbation, start.batch_of(rows)):
        means, weights = model.mixture.means(heads, control, **asked)
        by_heads.append(np.einsum("p,pbg->bg", weights, means.float().cpu().numpy()))
        moved = control.mean(dim=1) if change is None else change.of(control.mean(dim=1))
        by_change.append(moved.cpu().numpy())
    networks, transferred = np.concatenate(by_heads).mean(axis=0), np.concatenate(by_change).mean(axis=0)
    return networks, networks if change is None else transferred


def error_from(model: ST, start: Start, perturbation: str, *, n_samples: int = 20, seed: int = 0) -> np.ndarray:
    """Estimate the standard error of the predicted mean of each gene, (n_genes,).

    Beside the draws and the disagreement of parts, see `virtualcell.models._base.PerturbationModel.uncertainty`,
    it has the error that predictions of this kind had where training cells were left out, which all parts share.
    """
    error = PerturbationModel.error_from(model, start, perturbation, n_samples=n_samples, seed=seed)
    return np.hypot(error, shared_error(model, perturbation, start.context))


def shared_error(model: ST, perturbation: str, context: str) -> np.ndarray | float:
    """Return the error that predictions of this kind had where training cells were left out, (n_genes,)."""
    if model.transferred is None or perturbation == model.control:
        return 0.0
    return model.transferred.error_of(perturbation, context, control=model.control)


def shared_error_along(model: ST, direction: np.ndarray, perturbation: str, context: str) -> float:
    """Return that error of a weighted sum of the changes, with weights (n_genes,)."""
    if model.transferred is None or perturbation == model.control:
        return 0.0
    return model.transferred.error_along(direction, perturbation, context, control=model.control)


def where_measured(model: ST, perturbation: str, context: str) -> Measured:
    """Tell whether the model learned from cells of a perturbation in this context, or where else."""
    if model.transferred is None:
        return PerturbationModel.where_measured(model, perturbation, context)
    if model.measured_elsewhere(perturbation):
        return "elsewhere"
    question = model.transferred.question(perturbation, context, control=model.control)
    where: dict[str, Measured] = {"cells": "here", "contexts": "elsewhere", "perturbations": "no"}
    return where[question]


def trust(model: ST, start: Start, perturbation: str) -> dict[str, float]:
    """Return how far control cells lie from the training contexts, and how far other experiments agree."""
    out = {}
    if model.transferred is not None:
        out[EXTRAPOLATION] = model.transferred.extrapolation(start.base, start.context)
    if model.elsewhere is not None:
        out[AGREEMENT] = model.elsewhere.agreement(perturbation)
    return out


def effect_error(model: ST, perturbation: str, *, context: str, base: np.ndarray) -> np.ndarray | float:
    """Return the error of what was measured, after shrinkage, below which an effect is emitted as none.

    The transferred effect was shrunken by its own error before; it is the networks that see small effects everywhere.
    """
    if model.transferred is None:
        return 0.0
    question = _question(model, perturbation, context)
    return model.transferred.error if model.mixture.of_networks(question, True) > 0 else 0.0
