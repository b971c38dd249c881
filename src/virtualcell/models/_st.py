"""ST on single-cell data: training on matched sets of cells, prediction from control cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData

from virtualcell._arguments import require_whole
from virtualcell._errors import unknown_name
from virtualcell.data._cell_sets import CellGroups, SetSampler
from virtualcell.data._labels import Known
from virtualcell.data._packed import DenseRows, PackedRows
from virtualcell.data._screen import Screen
from virtualcell.models._base import PerturbationModel
from virtualcell.models._common import put_on, training_screen
from virtualcell.models._crispri import CRISPRi, check_modality
from virtualcell.models._effects import Effects
from virtualcell.models._features import PerturbationTable
from virtualcell.models._fitted_on import FittedOn
from virtualcell.models._mixture import Mixture
from virtualcell.models._set_batches import SetBatches, SetSource, validation_steps
from virtualcell.models._st_files import from_arc, from_state, state_of, to_arc
from virtualcell.models._st_fit import (
    check_validation,
    completed,
    learned_from,
    perturbation_table,
    start_at_mean,
)
from virtualcell.models._st_options import PRESETS, STTrainOptions, network_options
from virtualcell.models._st_predict import (
    apart,
    effect_error,
    error_from,
    means_from,
    predict_cells,
    predict_embedding,
    predict_parts,
    shared_error,
    shared_error_along,
    trust,
    where_measured,
)
from virtualcell.models._transferred import Transferred
from virtualcell.modules import Ensemble, STConfig, STNetwork, networks, st_loss
from virtualcell.train import TrainOptions, fit

logger = logging.getLogger(__name__)

_PERTURBATION_DROPOUT = 0.3  # where there are features
_WEIGHING_STEPS = 50  # training steps on which the heads are weighed


class ST(PerturbationModel):
    """State Transition model: what a perturbation does to a set of cells (Adduri et al. 2025).

    Parameters
    ----------
    data
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    perturbation_features
        One row of features per perturbation (gene embeddings, drug fingerprints), in a table or as a dictionary of
        vectors by name: perturbations that were never measured can then be predicted. Without it every perturbation
        learns a vector of its own.
    size
        Size of the network: "small" (laptop), "medium", or "large" (the paper's for genetic screens).
    set_size
        Number of cells in a set.
    preset
        "default", or "published" for the form of the paper: one head, "level", no transferred effect, and the energy
        distance as the only loss.
    head
        "both" (default): the weighted mean of two heads, of which "shift" predicts a shift of the control cells that
        starts at zero, and "level" the level itself from the hidden layer; or one of these alone. See
        :class:`virtualcell.models.STConfig`.
    transfer
        Whether what the perturbation did in other contexts, with similar control cells, is averaged with the heads. By
        default it is for head="both" in gene space; in embedding space it cannot be.
    modality_of_perturbation
        "CRISPRi" sets the target of a perturbation to what targets of others keep of their expression, and lowers genes
        that start beside it, see `virtualcell.models._neighbouring`.
    gene_positions
        Where genes start, from :func:`virtualcell.pp.gene_positions`; without it no gene has neighbours.
    n_networks
        Number of networks that are trained side by side from different first weights, and averaged.
    table
        Vectors of perturbations, where they are not to be made from the data.
    registry
        What a saved model knows of its data.
    network
        Any other field of :class:`virtualcell.models.STConfig`.

    Examples
    --------
    >>> vc.models.ST.setup_anndata(logged, perturbation_key="target_gene", control="non-targeting")
    >>> st = vc.models.ST(logged)
    >>> st.train(max_steps=2)  # leave it out for as many as the data need
    >>> cells = st.predict(logged, name)
    """

    def __init__(
        self,
        data: AnnData | MuData | Screen | None = None,
        perturbation_features: pd.DataFrame | None = None,
        *,
        size: Literal["small", "medium", "large"] = "small",
        set_size: int = 64,
        preset: Literal["default", "published"] = "default",
        head: Literal["both", "shift", "level", "all", "none"] | None = None,
        transfer: bool | None = None,
        n_networks: int = 1,
        modality_of_perturbation: Literal["CRISPRi"] | None = None,
        gene_positions: pd.DataFrame | None = None,
        table: PerturbationTable | None = None,
        registry: dict | None = None,
        **network: object,
    ) -> None:
        super().__init__(data, registry=registry)
        options = network_options(size, preset, network)
        self.preset, self.set_size, self.n_networks = preset, set_size, n_networks
        head = PRESETS[preset]["head"] if head is None else head
        in_genes = self.design.use_rep is None
        self.transfer = (in_genes and head == "both") if transfer is None else transfer
        if self.transfer and not in_genes:
            raise ValueError("transfer=True is about genes, and this model works on embeddings: leave it out.")
        for argument, value in (("n_networks", n_networks), ("set_size", set_size)):
            require_whole(argument, value)
        self.table = perturbation_table(self.screen, perturbation_features) if table is None else table
        if self.screen is not None:
            check_validation(self.screen, self.table)
            self.batches = self.screen.take(self.screen.is_train).batch_names  # of others it learns nothing
        if table is None and self.table.has_features:
            options.setdefault("perturbation_dropout", _PERTURBATION_DROPOUT)
        if options.get("perturbation_dropout") and not self.table.has_features:
            raise ValueError(
                f"perturbation_dropout={options['perturbation_dropout']!r} hides features, and there are none: give "
                "perturbation_features, or leave it out."
            )
        n_space = len(self.genes) if in_genes else self.registry["field_registries"]["rep"]["summary_stats"]["n_rep"]
        given = {
            "n_input": int(n_space),
            "n_output": int(n_space),
            "n_perturbation": self.table.n_dims,
            "head": head,
            "relu": in_genes,
            "n_batches": len(self.batches),
            "n_genes": 0 if in_genes else len(self.genes),
        }
        self.config = STConfig(**{**given, **options})
        self.module = STNetwork(self.config) if n_networks == 1 else Ensemble(self.config, n_networks)
        self.mixture = Mixture.equal(self.config.heads, transferred=self.transfer, nonnegative=self.config.relu)
        self.transferred: Transferred | None = None  # comes with training
        self.n_steps = 0  # of the last training
        check_modality(modality_of_perturbation)
        if modality_of_perturbation is not None and not in_genes:
            raise ValueError(
                "modality_of_perturbation is about genes, and this model works on embeddings: leave it out."
            )
        self.modality_of_perturbation, self.gene_positions = modality_of_perturbation, gene_positions
        self.elsewhere: PerturbationModel | None = None  # effects of other experiments, where fit_state was given some
        self.crispri: CRISPRi | None = None  # comes with training, where it was asked for
        self.se: PerturbationModel | None = None  # what made the embeddings, where fit_state did
        self.validation: pd.DataFrame | None = None  # scores beside the baselines, where fit_state validated
        self.verdict: str | None = None  # the sentence about them
        self.fallback: PerturbationModel | None = None  # the best baseline, where ST is worse
        self._model_summary_string = self._summary(n_space)

    def _summary(self, n_space: int) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        space = "genes" if self.design.use_rep is None else f"obsm[{self.design.use_rep!r}]"
        return (
            f"ST model: {len(self.table.seen)} perturbations ({'features' if self.table.has_features else 'one-hot'}), "
            f"{max(len(self.contexts), 1)} contexts, {n_space} dimensions of {space}, sets of {self.set_size} cells, "
            f"head={self.config.head!r}, {'with' if self.transfer else 'without'} a transferred effect, "
            + (f"{self.n_networks} networks, " if self.n_networks > 1 else "")
            + f"{n / 1e6:.1f} M parameters."
        )

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *([] if self.verdict is None else [self.verdict])])

    @property
    def networks(self) -> list[STNetwork]:
        """The networks, one or several."""
        return networks(self.module)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        options: STTrainOptions | Mapping[str, object] | None = None,
        *,
        effects: Effects | None = None,
        **keywords: object,
    ) -> None:
        """Train on sets of control cells and perturbed cells of the same context.

        Where nothing else is stated, training makes 20 passes over the cells, but at least 400 steps, and beyond 20,000
        steps fewer passes, with batches of 8 sets (up to 64 on a GPU, as long as 400 steps remain) and a learning rate
        of 1e-3.

        Parameters
        ----------
        options
            Options of the training, as an object or a dictionary.
        effects
            Measured effects of the training cells, where these are known already.
        keywords
            The same options by name: `train(max_steps=600)`.

        Raises
        ------
        KeyError, ValueError
            For an option that there is not, or with a wrong value, before anything runs.
        FloatingPointError
            If a loss is not finite.
        """
        screen = training_screen(self)
        self.check_width(len(screen.genes) if screen.rep is None else screen.rep.shape[1])
        screen.check_embedding(screen.split != "test")
        options = self.train_options(options, **keywords)
        if self.design.split_key is None and not screen.is_val.any():
            screen = screen.hold_out(options.val_fraction, options.seed)
        train, held = screen.groups(screen.is_train), screen.groups(screen.is_val) if screen.is_val.any() else None
        if not len(train):
            raise ValueError("there is nothing to train on: no perturbed training cells with matching controls.")
        options = completed(options, train, held, self.set_size)
        packed = PackedRows.pack(screen.expression)  # one copy for batches of training and of validation
        fitted_on = FittedOn.of(screen, packed)
        training, validation = self._batches(screen, packed, train, held, options)
        if self.config.head == "both":
            start_at_mean(self.networks, screen)
        silences = self.modality_of_perturbation is not None
        if effects is None and (self.transfer or silences):
            effects = Effects.measure(screen, screen.is_known)
        if self.transfer:
            self.transferred = Transferred.fit(effects, self.features)
        if silences:
            names = screen.target_names[screen.genes].to_numpy()
            self.crispri = CRISPRi.measure(effects, names, self.gene_positions, self.control)
        loss = partial(
            st_loss, kind=options.loss, mean_weight=options.mean_weight, contrast_weight=options.contrast_weight
        )
        self.history_ = fit(
            self.module,
            loss,
            training,
            options,
            validation=validation,
            name="ST",
            title="ST: effects of perturbations",
            data=None if options.checkpoint_dir is None else learned_from(screen, self.table, self.set_size),
        )
        self.is_trained_, self.n_steps = True, options.max_steps
        self.fitted_on = fitted_on
        put_on(self, options.accelerator)
        shown = range(0, options.max_steps, max(1, options.max_steps // _WEIGHING_STEPS))
        self.mixture = self.mixture.weighed(self.networks, (training.step(i, 0, 1, self.device) for i in shown))
        logger.info(self.mixture.describe())

    def _batches(
        self, screen: Screen, packed: PackedRows, train: CellGroups, held: CellGroups | None, options: STTrainOptions
    ) -> tuple[SetBatches, SetBatches | None]:
        """Batches of training and of validation, from one copy of the rows."""
        rows, genes = (packed, None) if screen.rep is None else (DenseRows(torch.from_numpy(screen.rep)), packed)
        codes = None
        if screen.batch is not None:
            codes, seen = np.full(screen.n_cells, -1), screen.is_train | screen.is_val
            codes[seen] = self.batch_codes(np.asarray(screen.batch[seen]).astype(str))
        source = SetSource(rows, self.table, batch=codes, genes=genes)
        size = {"set_size": self.set_size, "sets_per_step": options.batch_size, "seed": options.seed}
        with_base = options.contrast_weight > 0
        training = SetBatches(SetSampler(train, n_steps=options.max_steps, **size), source, with_base=with_base)
        if held is None:
            return training, None
        n_steps = validation_steps(held, self.set_size, options.batch_size)
        sampler = SetSampler(held, n_steps=n_steps, **size)
        return training, SetBatches(sampler, source, is_validation=True, with_base=with_base)

    def train_options(self, options: STTrainOptions | Mapping | None = None, **keywords: object) -> STTrainOptions:
        """Complete the options of a training, and raise for one that there is not."""
        stated = options.stated if isinstance(options, TrainOptions) else dict(options or {})
        twice = sorted(set(stated) & set(keywords))
        if twice:
            raise ValueError(f"{twice[0]}={keywords[twice[0]]!r} and options={{{twice[0]!r}: ...}} were both given.")
        preset = {k: PRESETS[self.preset][k] for k in ("mean_weight", "contrast_weight")}
        return STTrainOptions.from_(
            {**stated, **keywords}, lr=1e-3, gradient_clip=10.0, loss="energy", val_fraction=0.1, **preset
        )

    def batch_codes(self, names: np.ndarray) -> np.ndarray:
        codes = pd.Index(self.batches).get_indexer(names)
        if (codes < 0).any():
            raise unknown_name(
                "batch", str(names[codes < 0][0]), self.batches, "This model knows only the batches it was trained on."
            )
        return codes

    # -- prediction ---------------------------------------------------------------------------------------------------

    @property
    def n_seen_together(self) -> int:  # type: ignore[override]
        """Number of control cells that the network looks at together."""
        return self.set_size

    @property
    def features(self) -> PerturbationTable | None:
        return self.table if self.table.has_features else None

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that says why if this model has no vector for a perturbation, or never learned it."""
        if not self.measured_elsewhere(perturbation):
            self.table.check(perturbation)

    def measured_elsewhere(self, perturbation: str) -> bool:
        """Whether other experiments measured a perturbation that one's own cells lack."""
        if self.elsewhere is None or self.transferred is None or perturbation == self.control:
            return False
        own = self.transferred.lookup(self.control)
        if all(name in own for name in own.parts(perturbation)):
            return False
        return self.elsewhere.measured(perturbation)

    def check_width(self, n: int) -> None:
        """Raise unless cells have as many columns as the network takes."""
        if n != self.config.n_input:
            what = "the matrix" if self.design.use_rep is None else f"obsm[{self.design.use_rep!r}]"
            raise ValueError(
                f"{what} has {n} columns, this model {self.config.n_input}: give cells in the space it was trained in."
            )

    predict_embedding = predict_embedding
    predict_cells = predict_cells
    predict_parts = predict_parts
    apart = apart
    means_from = means_from
    error_from = error_from
    trust = trust
    effect_error = effect_error
    shared_error = shared_error
    shared_error_along = shared_error_along
    where_measured = where_measured

    @property
    def knows_error(self) -> bool:
        """Whether the model knows how wrong its predictions were, which comes with the transferred effect."""
        return self.transferred is not None

    @property
    def known_names(self) -> list[str]:
        """Labels of the perturbations that the model learned from, here or in other experiments."""
        others = [] if self.elsewhere is None else self.elsewhere.known_names
        return [*self.table.seen, *(name for name in others if self.measured_elsewhere(name))]

    @property
    def lookup(self) -> Known:
        """Perturbations that it learned from cells of, in which others are looked up."""
        return self.table.learned

    @property
    def featured_names(self) -> list[str]:
        """Names of all perturbations that the model has features of."""
        return self.table.names if self.table.has_features else []

    # -- files --------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, PerturbationModel]:
        """Return the models that this one carries: SE, fallback, effects of other experiments."""
        return {name: part for name in ("se", "fallback", "elsewhere") if (part := getattr(self, name)) is not None}

    state = state_of
    from_state = classmethod(from_state)
    from_arc = classmethod(from_arc)
    to_arc = to_arc
