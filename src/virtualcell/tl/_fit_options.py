"""What can be said to `fit_state`, checked before anything is fitted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell.models import SE, ST
from virtualcell.models._st_options import STTrainOptions, network_options
from virtualcell.train import TrainOptions

logger = logging.getLogger(__name__)

Size = Literal["auto", "small", "medium", "large"]

# options of the run that SE shares with ST
_SHARED = ("accelerator", "devices", "strategy", "precision", "seed", "progress_bar")
_OF_ST = ("set_size", "preset", "head", "transfer", "n_networks")


@dataclass(frozen=True, kw_only=True)
class FitOptions(STTrainOptions):
    """Options of a training in :func:`virtualcell.tl.fit_state`: those of ST, and what that function adds.

    Parameters
    ----------
    min_cells
        Smallest number of training cells of a perturbation to be learned, 10 by default; perturbations with fewer are
        left out, with a warning that names them.
    freeze
        Beginnings of names of parameters of the model in `init_from` which stay as they are:
        `["transformer_backbone"]`.
    lora
        Options of low-rank adapters: the transformer of the model in `init_from` stays as it is, and adapters of its
        linear layers are trained, together with all that is outside of it and not in `freeze`. At the end they are
        added to the weights, so that the model is an ordinary one. Options are `r` (rank), `alpha`, `dropout` and
        `target_modules` (names of layers, all by default), as in `peft`, which `pip install "virtualcell[lora]"`
        brings.
    """

    min_cells: int | None = None
    freeze: Sequence[str] | None = None
    lora: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_cells is not None and (not isinstance(self.min_cells, int) or self.min_cells < 0):
            raise ValueError(f"min_cells={self.min_cells!r} is not a whole number of at least 0.")

    @classmethod
    def from_(cls, given: TrainOptions | Mapping[str, object] | None = None, **defaults: object) -> FitOptions:
        """Complete the options that a user gave; see :meth:`virtualcell.models.TrainOptions.from_`."""
        return super().from_(given, **{"min_cells": 10, "val_fraction": 0.1, **defaults})

    def of_training(self) -> STTrainOptions:
        """Return what ST itself is told."""
        names = {field.name for field in dataclasses.fields(STTrainOptions)}
        return STTrainOptions(**{k: v for k, v in self.stated.items() if k in names})

    def of_run(self) -> dict[str, object]:
        """Return what SE shares: devices, precision, seed and progress bar."""
        return {k: v for k, v in self.stated.items() if k in _SHARED}


@dataclass(frozen=True)
class NetworkOptions:
    """What ST works on, and the other options of its network."""

    use_rep: str | None
    options: dict[str, object]

    @classmethod
    def of(cls, given: Mapping[str, object] | None) -> NetworkOptions:
        """Check the names of the options."""
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"network={given!r} must be a dictionary of options, such as {{'preset': 'published'}}.")
        options = dict(given or {})
        use_rep = options.pop("use_rep", None)
        preset = options.get("preset", "default")
        network_options("small", preset, {k: v for k, v in options.items() if k not in _OF_ST})
        return cls(use_rep, options)


@dataclass(frozen=True)
class SEOptions:
    """Which SE embeds: a trained one, one to be trained (from a gene table or another SE), or none."""

    model: SE | None = None
    start: SE | pd.DataFrame | None = None
    is_trained_here: bool = False
    training: TrainOptions | None = None
    freeze: Sequence[str] = ()
    lora: Mapping[str, object] | None = None

    def makes(self, use_rep: str | None) -> bool:
        """Whether the embedding that ST is to work on is made in this call."""
        return use_rep == _keys.X_STATE and (self.model is not None or self.is_trained_here)

    @classmethod
    def of(
        cls,
        se: SE | pd.DataFrame | Mapping[str, object] | Literal[False] | None,
        init_from: ST | SE | None,
        use_rep: str | None,
        options: FitOptions,
    ) -> SEOptions:
        """Check that what was said of SE fits together, and what was said of the model to go on from."""
        if not (se is None or se is False or isinstance(se, SE | pd.DataFrame | Mapping)):
            raise TypeError(
                f"se must be a trained SE, a table of gene vectors, a dictionary of options, False or None, got "
                f"{type(se).__name__}."
            )
        partly = {"freeze": options.freeze or (), "lora": options.lora}
        if init_from is None and (options.freeze or options.lora is not None):
            raise ValueError("freeze and lora need init_from=, the trained model that they are about.")
        if isinstance(init_from, ST):
            se = _se_of(init_from, se, use_rep)
        elif init_from is not None and not isinstance(init_from, SE):
            raise TypeError(f"init_from must be an ST or an SE, got {type(init_from).__name__}.")
        given = dict(se) if isinstance(se, Mapping) else {}
        table = se if isinstance(se, pd.DataFrame) else given.pop("gene_embeddings", None)
        training = SE.train_options({**options.of_run(), **given})
        if isinstance(init_from, SE):
            if table is not None or se is False or isinstance(se, SE):
                raise ValueError(
                    "init_from= is an SE, which goes on with its own gene table: leave se= out, or give it options of "
                    "the training only."
                )
            return cls(start=init_from, is_trained_here=True, training=training, **partly)
        if se is False:
            return cls()
        if isinstance(se, SE):
            return cls(model=se)
        return cls(start=table, is_trained_here=True, training=training)


def _se_of(init_from: ST, se: object, use_rep: str | None) -> object:
    """Return the SE that goes with an ST to go on from, after checking that the call works on what that one did."""
    theirs = init_from.design.use_rep
    if use_rep != theirs:
        told = "genes" if theirs is None else f"obsm[{theirs!r}]"
        remedy = "leave use_rep out" if theirs is None else f"pass network={{'use_rep': {theirs!r}}}"
        raise ValueError(f"use_rep={use_rep!r}, but init_from works on {told}: {remedy}.")
    se = init_from.se if se is None else se
    if theirs == _keys.X_STATE and se is None:
        raise ValueError(
            "init_from works on obsm['X_state'] of an SE that it does not carry: pass that one as se=, or se=False "
            "where obsm['X_state'] comes from it already."
        )
    return se


def choose_size(size: Size, n_cells: int) -> str:
    """Return a size, where it is left to us by what there is."""
    if size not in ("auto", "small", "medium", "large"):
        raise unknown_name("size", size, ("auto", "small", "medium", "large"))
    if size != "auto":
        return size
    chosen = "medium" if torch.cuda.is_available() and n_cells >= 20_000 else "small"
    logger.info("size='auto': %r for %d cells.", chosen, n_cells)
    return chosen
