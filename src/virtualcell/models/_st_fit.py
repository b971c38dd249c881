"""What an ST needs before it trains: vectors of perturbations, the length of the training, where its heads start."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import pandas as pd
import torch

from virtualcell.data._cell_sets import CellGroups
from virtualcell.data._fingerprint import digest, numbers, of_screen
from virtualcell.data._labels import parts
from virtualcell.data._screen import Screen
from virtualcell.models._features import PerturbationTable
from virtualcell.models._set_batches import auto_batch_size, default_steps, validation_interval, validation_steps
from virtualcell.models._st_options import STTrainOptions
from virtualcell.modules import STNetwork

logger = logging.getLogger(__name__)


def perturbation_table(screen: Screen, features: pd.DataFrame | None) -> PerturbationTable:
    """Vectors of the perturbations of the training cells, and, with features, of those that validation alone holds."""
    control, seen = screen.design.control, set(screen.perturbation[screen.is_train])
    if not seen - {control}:
        raise ValueError(f"the training cells hold no perturbation, only {control!r}.")
    if features is None:
        return PerturbationTable.one_hot(seen, control)
    only = set(screen.perturbation[screen.is_val]) - seen
    return PerturbationTable.from_features(screen.design.named(features), seen, control, only)


def check_validation(screen: Screen, table: PerturbationTable) -> None:
    """Raise for what validation alone holds and nothing tells of: batches, and perturbations.

    Features tell of perturbations, and so do training cells with each part of a combination.
    """
    if screen.batch is not None:
        only = sorted(set(screen.batch[screen.is_val]) - set(screen.batch[screen.is_train]))
        if only:
            raise ValueError(
                f"the batches {only[:10]} occur in validation but in no training cells, and an ST learns nothing of "
                "them. Mark their cells 'test', or leave batch_key out."
            )
    if table.has_features:
        return
    control = screen.design.control
    seen = {*screen.perturbation[screen.is_train], *table.seen, control}
    only = sorted(set(screen.perturbation[screen.is_val]) - seen)
    if untold := [name for name in only if not set(parts(name, control)) <= seen]:
        raise ValueError(
            f"{untold[:10]} occur in validation but in no training cells, and a one-hot model learns nothing of them. "
            "Mark their cells 'test', or give perturbation_features."
        )


def completed(options: STTrainOptions, groups: CellGroups, held: CellGroups | None, set_size: int) -> STTrainOptions:
    """Decide the length, the size of a step and how often to validate, and say how often a cell is seen."""
    size = options.batch_size or auto_batch_size(
        groups, set_size, on_gpu=_is_on_gpu(options), n_devices=_n_devices(options)
    )
    steps = options.max_steps or default_steps(groups, set_size, size)
    n_cells = int(groups.sizes.sum())
    logger.info(
        "ST sees each of %d training cells about %.3g times, in %d groups (context and perturbation) and %d steps of "
        "%d sets of %d cells.",
        *(n_cells, steps * size * set_size / n_cells, len(groups), steps, size, set_size),
    )
    every = options.validate_every
    if every is None and held is not None and not options.early_stopping:  # which waits for so many validations
        every = validation_interval(steps, validation_steps(held, set_size, size))
    return dataclasses.replace(options, batch_size=size, max_steps=steps, validate_every=every)


def learned_from(screen: Screen, table: PerturbationTable, set_size: int) -> dict[str, object]:
    """Describe the data that an ST learns from, and how it is shown."""
    vectors = {"perturbation vectors": numbers(table.vectors.numpy()), "names of these": digest(table.names)}
    return {**of_screen(screen), **vectors, "set_size": set_size}


def _is_on_gpu(options: STTrainOptions) -> bool:
    return options.accelerator in ("gpu", "cuda") or (options.accelerator == "auto" and torch.cuda.is_available())


def _n_devices(options: STTrainOptions) -> int:
    if options.devices == -1:
        return max(torch.cuda.device_count(), 1) if _is_on_gpu(options) else 1
    if isinstance(options.devices, int):
        return options.devices
    return 1 if isinstance(options.devices, str) else len(options.devices)


@torch.no_grad()
def start_at_mean(networks: Sequence[STNetwork], screen: Screen) -> None:
    """Let level heads start at the mean of the training cells; from zero, getting there takes most of the training.

    Only where one is still zero: a network that was trained before goes on from there.
    """
    rows = screen.in_order(screen.is_train)
    mean = screen.expression.moments([rows]).mean[0] if screen.rep is None else screen.rep[rows].mean(axis=0)
    for network in networks:
        bias = network.project_level[-1].bias
        bias.copy_(torch.where(bias == 0, torch.from_numpy(mean).to(bias), bias))
