"""What can be said to `fit_state`, checked before anything is fitted."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell.data._screen import Screen
from virtualcell.data._tables import as_table, is_vectors
from virtualcell.models import SE, ST
from virtualcell.models._partly import check_adapters, check_partly
from virtualcell.models._se_options import SETrainOptions
from virtualcell.models._st_options import PRESETS, STTrainOptions, network_options
from virtualcell.modules import STConfig
from virtualcell.pp._genes import match_genes
from virtualcell.train import TrainOptions

logger = logging.getLogger(__name__)

Size = Literal["auto", "small", "medium", "large"]

# options of the run that SE shares with ST
_SHARED = (
    *("accelerator", "devices", "strategy", "precision", "seed", "progress_bar"),
    *("checkpoint_dir", "checkpoint_every", "resume"),
)
_OF_ST = ("set_size", "preset", "head", "transfer", "n_networks", "modality_of_perturbation", "gene_positions")
_FROM_DATA = ("n_input", "n_output", "n_perturbation", "n_batches", "n_genes")


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

    Examples
    --------
    >>> options = vc.tl.FitOptions(max_steps=500, min_cells=5)
    >>> options.stated
    {'max_steps': 500, 'min_cells': 5}
    """

    min_cells: int | None = None
    freeze: Sequence[str] | None = None
    lora: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_cells is not None and (not isinstance(self.min_cells, int) or self.min_cells < 0):
            raise ValueError(f"min_cells={self.min_cells!r} is not a whole number of at least 0.")
        names = [self.freeze] if isinstance(self.freeze, str) else self.freeze
        if names is not None and not (isinstance(names, Sequence) and all(isinstance(n, str) for n in names)):
            raise TypeError(f"freeze={self.freeze!r} must be a list of beginnings of names of parameters.")
        check_adapters(self.lora)

    @classmethod
    def from_(cls, given: TrainOptions | Mapping[str, object] | None = None, **defaults: object) -> FitOptions:
        """Complete the options that a user gave; see :meth:`virtualcell.models.TrainOptions.from_`."""
        return super().from_(given, **{"min_cells": 10, "val_fraction": 0.1, **defaults})

    def of_training(self) -> STTrainOptions:
        """Return what ST itself is told."""
        names = {field.name for field in dataclasses.fields(STTrainOptions)}
        return STTrainOptions(**{k: v for k, v in self.stated.items() if k in names})

    def of_run(self) -> dict[str, object]:
        """Return what SE shares: devices, precision, seed, progress bar and checkpoints."""
        return {k: v for k, v in self.stated.items() if k in _SHARED}


@dataclass(frozen=True)
class NetworkOptions:
    """What ST works on, and the other options of its network."""

    use_rep: str | None
    options: dict[str, object]

    @property
    def transfers(self) -> bool:
        """Whether ST has a transferred effect with these options, on genes."""
        head = self.options.get("head") or PRESETS[self.options.get("preset", "default")]["head"]
        stated = self.options.get("transfer")
        return head == "both" if stated is None else bool(stated)

    @classmethod
    def of(cls, given: Mapping[str, object] | None) -> NetworkOptions:
        """Check names and values of the options."""
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"network={given!r} must be a dictionary of options, such as {{'preset': 'published'}}.")
        options = dict(given or {})
        fields = [f.name for f in dataclasses.fields(STConfig)]
        valid = sorted({*fields, *_OF_ST, "use_rep"} - {*_FROM_DATA})
        for name in options:
            if name in _FROM_DATA:
                raise ValueError(f"network: {name}={options[name]!r} follows from the data: leave it out.")
            if name not in valid:
                raise unknown_name("network option", name, valid, "See vc.models.STConfig.")
        use_rep, transfer = options.pop("use_rep", None), options.get("transfer")
        if not (transfer is None or isinstance(transfer, bool)):
            raise ValueError(f"transfer={transfer!r} is neither True nor False.")
        preset = options.get("preset", "default")
        network_options("small", preset, {k: v for k, v in options.items() if k not in _OF_ST or k == "head"})
        return cls(use_rep, options)


def check_transfer(transfer_from: object, networks: NetworkOptions) -> None:
    """Raise for other experiments that a model without a transferred effect could not use."""
    if transfer_from is not None and (networks.use_rep is not None or not networks.transfers):
        raise ValueError(
            "transfer_from= needs a transferred effect, which ST has on genes with head='both' or transfer=True: leave "
            "use_rep, preset='published', head= and transfer=False out of network=, or transfer_from."
        )


@dataclass(frozen=True)
class SEOptions:
    """Which SE embeds: a trained one, one to be trained (from a gene table or another SE), or none."""

    model: SE | None = None
    init_from: SE | None = None
    table: pd.DataFrame | None = None
    training: SETrainOptions | None = None
    freeze: str | Sequence[str] = ()
    lora: Mapping[str, object] | None = None

    @property
    def is_trained_here(self) -> bool:
        """Whether an SE is to be trained."""
        return self.training is not None

    @property
    def embeds(self) -> bool:
        """Whether there is an SE to embed the cells."""
        return self.model is not None or self.is_trained_here

    def makes(self, use_rep: str | None) -> bool:
        """Whether the embedding that ST is to work on is made in this call."""
        return use_rep == _keys.X_STATE and self.embeds

    def check_cells(self, adata: AnnData, screen: Screen) -> None:
        """Raise before SE is trained for cells, not only those it learns from, or genes that it could not embed."""
        if not self.embeds:
            return
        screen.expression.rows(np.arange(0))  # the first reading checks all cells
        names = self.table.index if self.table is not None else getattr(self.init_from, "gene_names", None)
        if names is not None:
            match_genes(adata, names, gene_key=screen.design.gene_key)

    def gene_key(self, stated: str | None) -> str | None:
        """Column of `var` with the names that the gene table of SE goes by; a table made from the data has its own."""
        is_from_data = self.is_trained_here and self.table is None and self.init_from is None
        return None if is_from_data else stated

    @classmethod
    def of(
        cls,
        se: SE | pd.DataFrame | Mapping[str, object] | Literal[False] | None,
        init_from: ST | SE | None,
        use_rep: str | None,
        options: FitOptions,
    ) -> SEOptions:
        """Check that what was said of SE fits together, and what was said of the model to go on from."""
        if is_vectors(se):
            se = as_table(se, "se")
        if not (se is None or se is False or isinstance(se, SE | pd.DataFrame | Mapping)):
            raise TypeError(
                f"se must be a trained SE, a table of gene vectors, a dictionary of options, False or None, got "
                f"{type(se).__name__}."
            )
        _check_start(init_from, options)
        given = dict(se) if isinstance(se, Mapping) else {}
        table = se if isinstance(se, pd.DataFrame) else given.pop("gene_embeddings", None)
        if table is not None:
            table = as_table(table, "se: gene_embeddings" if isinstance(se, Mapping) else "se")
        training = _training_of_se(given, options)
        if isinstance(init_from, SE):
            if table is not None or se is False or isinstance(se, SE):
                raise ValueError(
                    "init_from= is an SE, which goes on with its own gene table: leave se= out, or give it options of "
                    "the training only."
                )
            return cls(init_from=init_from, training=training, freeze=options.freeze or (), lora=options.lora)
        if isinstance(init_from, ST):
            se = _se_of(init_from, se, use_rep)
        if se is False:
            return cls()
        if isinstance(se, SE):
            _check_trained(se, "se")
            return cls(model=se)
        return cls(table=table, training=training)


def _check_start(init_from: object, options: FitOptions) -> None:
    """Raise unless the model to go on from is a trained one that has the parts which `freeze` and `lora` name."""
    if init_from is None:
        if options.freeze or options.lora is not None:
            raise ValueError("freeze and lora need init_from=, the trained model that they are about.")
        return
    if not isinstance(init_from, ST | SE):
        raise TypeError(f"init_from must be an ST or an SE, got {type(init_from).__name__}.")
    _check_trained(init_from, "init_from")
    check_partly(init_from.module, freeze=options.freeze or (), lora=options.lora)


def _check_trained(model: ST | SE, argument: str) -> None:
    if not model.is_trained_:
        raise ValueError(f"{argument}= is a model that was not trained: run its `train` first, or leave it out.")


def _training_of_se(given: Mapping[str, object], options: FitOptions) -> SETrainOptions:
    """Complete the options of SE's training, of which devices, precision, seed and the bar are ST's too."""
    valid = [f.name for f in dataclasses.fields(SETrainOptions)]
    for name in given:
        if name not in valid:
            remedy = "These are a table, gene_embeddings, and options of the training of SE."
            raise unknown_name("se option", name, [*valid, "gene_embeddings"], remedy)
    return SE.train_options({**options.of_run(), **given})


def _se_of(init_from: ST, se: object, use_rep: str | None) -> object:
    """Return the SE that goes with an ST to go on from, after checking that the call works on what that one did."""
    theirs = init_from.design.use_rep
    if use_rep != theirs:
        told = "genes" if theirs is None else f"obsm[{theirs!r}]"
        remedy = "leave use_rep out" if theirs is None else f"pass network={{'use_rep': {theirs!r}}}"
        raise ValueError(f"use_rep={use_rep!r}, but init_from works on {told}: {remedy}.")
    if theirs == _keys.X_STATE and isinstance(se, pd.DataFrame | Mapping):
        raise ValueError(
            "init_from works on obsm['X_state'], and the vectors of an SE that is trained now mean something else: "
            "leave se= out, or pass the SE that init_from was fitted with."
        )
    se = init_from.se if se is None else se
    if theirs == _keys.X_STATE and se is None:
        raise ValueError(
            "init_from works on obsm['X_state'] of an SE that it does not carry: pass that one as se=, or se=False "
            "where obsm['X_state'] comes from it already."
        )
    return se


def check_call(
    options: FitOptions, training: object, split_key: str | None, size: Size, init_from: object, se: SEOptions
) -> None:
    """Raise for options that have no use beside each other."""
    given = training.stated if isinstance(training, TrainOptions) else dict(training or {})
    if split_key is not None and given.get("val_fraction") is not None:
        raise ValueError(
            f"val_fraction={options.val_fraction!r} has no use with split_key={split_key!r}, where the cells to "
            "validate on are marked: leave one of them out."
        )
    if isinstance(init_from, ST) and not se.is_trained_here and size != "auto":
        raise ValueError(f"size={size!r} has no use with init_from=, which has a size of its own: leave it out.")


def require_validation(options: FitOptions, screen: Screen) -> None:
    """Raise where training is to stop by validation cells, and there are none."""
    if options.early_stopping and not screen.is_val.any():
        if screen.design.split_key is None and options.val_fraction > 0:
            most = max(map(len, screen.pairs(screen.is_train & ~screen.is_control).values()))
            least = math.ceil(1000 / most) / 1000  # with which the largest group gives a cell
            raise ValueError(
                f"early_stopping=True needs validation cells, and val_fraction={options.val_fraction!r} of each "
                f"context and perturbation, which have at most {most} cells, is none. Say val_fraction={least} or "
                "more, or use early_stopping=False."
            )
        raise ValueError(
            "early_stopping=True needs validation cells: give val_fraction > 0 or a split with 'val', or use "
            "early_stopping=False."
        )


def choose_size(size: Size, n_cells: int) -> Size:
    """Return a size, where it is left to us by what there is."""
    if size not in ("auto", "small", "medium", "large"):
        raise unknown_name("size", size, ("auto", "small", "medium", "large"))
    if size != "auto":
        return size
    chosen: Size = "medium" if torch.cuda.is_available() and n_cells >= 20_000 else "small"
    logger.info("size='auto': %r for %d cells.", chosen, n_cells)
    return chosen
