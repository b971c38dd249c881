"""What a training must leave as it was: loggers, warnings, random numbers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning

LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


def silence() -> None:
    """Keep Lightning's hints about devices, loaders and products from the user, whom only losses concern."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # torch's advice to Lightning
    warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU.*")  # an error of ours
    # unused parameters are looked for because some models have them; that this one has none is no news
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")


@contextmanager
def silenced() -> Iterator[None]:
    """Do the same for a while."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings():
        silence()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let loggers say nothing but warnings for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give the generators of the CPU and of `device` their state back. No other GPU is opened."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def set_seed(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of `device`; `torch.manual_seed` would seed those of every GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the generators that :func:`set_seed` seeds, by the kind of their device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put generators into the states that :func:`random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
