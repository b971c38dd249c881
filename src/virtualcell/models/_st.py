"""ST on AnnData: training on matched sets of cells, prediction from control cells."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scipy import sparse
from torch.utils.data import DataLoader

from virtualcell._design import expression_modality
from virtualcell.data._cell_sets import CellSetDataset, CellSetSampler, Rows, cell_groups
from virtualcell.models._base import MOST_EXPRESSION
from virtualcell.models._baselines import ShiftModel
from virtualcell.models._perturbations import PerturbationTable, find_drug
from virtualcell.models._prior import ShiftPrior
from virtualcell.models._se import SE
from virtualcell.models._shifts import shift_table
from virtualcell.models._st_files import STInFiles
from virtualcell.modules import (
    PRIOR_WEIGHT,
    PRIOR_WEIGHT_UNSEEN,
    Ensemble,
    Prior,
    STConfig,
    STNetwork,
    STOutput,
    networks,
    st_loss,
)
from virtualcell.train import run_training

logger = logging.getLogger(__name__)

_SETS_AT_ONCE = 16  # in a forward pass without gradients
_PERTURBATION_DROPOUT = 0.3  # where there are features

SIZES = {
    "small": {"n_hidden": 128, "n_layers": 2, "n_heads": 4, "head_dim": 32, "n_feedforward": 256, "set_size": 64},
    "medium": {"n_hidden": 256, "n_layers": 4, "n_heads": 8, "head_dim": 32, "n_feedforward": 768, "set_size": 64},
    # ST-HVG-Replogle of the paper
    "large": {
        "n_hidden": 328,
        "n_layers": 8,
        "n_heads": 12,
        "head_dim": 64,
        "n_feedforward": 3072,
        "set_size": 64,
        "n_encoder_layers": 4,
        "n_decoder_layers": 4,
    },
}


class ST(STInFiles):
    """State Transition model: what a perturbation does to a set of cells (Adduri et al. 2025).

    Parameters
    ----------
    adata
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    perturbation_features
        One row of features per perturbation (gene embeddings, drug fingerprints): perturbations that were never
        measured can then be predicted. Without it every perturbation learns a vector of its own.
    size
        "small" (laptop), "medium", or "large" (the paper's size for genetic screens).
    set_size
        Cells in a set; by default that of `size`.
    residual
        "both" (default): the average of two heads, of which one predicts a shift of the control cells that starts at
        zero, the other the level itself from the hidden layer; "expression" and "hidden" (the published form) are these
        alone. See :class:`virtualcell.modules.STConfig`.
    prior
        "similar": what the training cells say without learning, the shift that the perturbation had in contexts with
        similar control cells, is averaged with the heads. "additive": ST learns what the additive baseline leaves over.
        `None`: neither. "auto" is "similar" for residual="both" in gene space, and `None` otherwise; in embedding space
        nothing else is possible.
    n_members
        Networks that are trained side by side from different first weights, and averaged.
    network
        Any other field of :class:`virtualcell.modules.STConfig`.

    Examples
    --------
    >>> vc.models.ST.setup_anndata(adata, perturbation_key="target_gene", control="non-targeting", layer="lognorm")
    >>> st = vc.models.ST(adata)
    >>> st.train(max_steps=600)
    >>> cells = st.predict(adata, "STAT1")
    """

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        perturbation_features: pd.DataFrame | None = None,
        *,
        size: Literal["small", "medium", "large"] = "small",
        set_size: int | None = None,
        residual: Literal["both", "expression", "hidden", "all", "none"] = "both",
        prior: Literal["auto", "similar", "additive"] | None = "auto",
        n_members: int = 1,
        registry: dict | None = None,
        **network: object,
    ) -> None:
        super().__init__(adata, registry=registry)
        if size not in SIZES:
            raise ValueError(f"size={size!r} is unknown; valid are {list(SIZES)}.")
        dropped = 0.0
        if "table" in network:
            self.table = network.pop("table")
        else:
            data = self._data(None)
            perturbation, split = self._labels(data, "perturbation"), self._labels(data, "split")
            seen = set(perturbation[~np.isin(split, ["val", "test"])])
            only = set(perturbation[split == "val"]) - seen - {self.control}
            if only and perturbation_features is None:
                raise ValueError(
                    f"{sorted(only)[:10]} occur in validation but in no training cells, and a one-hot model learns "
                    "nothing of them. Mark their cells 'test', or give perturbation_features."
                )
            if perturbation_features is None:
                self.table = PerturbationTable.one_hot(seen, self.control)
            else:
                self.table = PerturbationTable.from_features(perturbation_features, seen, self.control, only)
                dropped = _PERTURBATION_DROPOUT
            if not self.table.n_dims:
                raise ValueError(f"the training cells hold no perturbation, only {self.control!r}.")
        if network.get("perturbation_dropout") and not self.table.has_features:
            raise ValueError(
                f"perturbation_dropout={network['perturbation_dropout']!r} hides features, and there are none: give "
                "perturbation_features, or leave it out."
            )
        options = {**SIZES[size], "perturbation_dropout": dropped, **network}
        self.set_size = set_size or options["set_size"]
        options.pop("set_size")
        n_genes, in_genes = len(self.genes), self.setup["use_rep"] is None
        if prior == "auto":
            prior = "similar" if in_genes and residual == "both" else None
        if not in_genes and prior is not None:
            raise ValueError(
                f"prior={prior!r} is a shift of genes, and this model works on embeddings: say prior=None."
            )
        if n_members < 1:
            raise ValueError(f"n_members={n_members!r}: at least one network is needed.")
        n_space = n_genes if self.setup["use_rep"] is None else self._n_rep()
        given = {
            "n_input": n_space,
            "n_output": n_space,
            "n_perturbation": self.table.n_dims,
            "residual": residual,
            "prior": prior,
            "relu": self.setup["use_rep"] is None,
            "n_batches": len(self.batches),
            "n_genes": 0 if self.setup["use_rep"] is None else n_genes,
        }
        known = {f.name for f in dataclasses.fields(STConfig)}
        if unknown := set(options) - known:
            valid = sorted({*(known - set(given)), "residual", "prior", "n_members", "set_size"})
            raise TypeError(f"ST has no option {sorted(unknown)}; valid are {valid}.")
        if "decoder_hidden" in options:  # a list after JSON
            options["decoder_hidden"] = tuple(options["decoder_hidden"])
        self.config = STConfig(**{**given, **options})
        self.n_members = n_members
        self.module = STNetwork(self.config) if n_members == 1 else Ensemble(self.config, n_members)
        self.prior: ShiftPrior | None = None  # comes with training
        n = sum(p.numel() for p in self.module.parameters())
        space = "genes" if self.setup["use_rep"] is None else f"obsm[{self.setup['use_rep']!r}]"
        self.se: SE | None = None  # what made the embeddings, where fit_state did
        self.validation: pd.DataFrame | None = None  # scores beside the baselines, where fit_state validated
        self.fallback: ShiftModel | None = None  # the baseline that was better there, if one was
        self._model_summary_string = (
            f"ST model: {len(self.table.seen)} perturbations ({'features' if self.table.has_features else 'one-hot'}), "
            f"{max(len(self.contexts), 1)} contexts, {n_space} dimensions of {space}, sets of {self.set_size} cells, "
            f"residual={residual!r}, prior={self.config.prior!r}, "
            + (f"{n_members} members, " if n_members > 1 else "")
            + f"{n / 1e6:.1f} M parameters."
        )

    def _by_name(self, data: AnnData | MuData) -> np.ndarray:
        """Rows in the order of the cells' names: sums of float32 depend on the order in the last digit."""
        return np.argsort(expression_modality(data, self._modality).obs_names.to_numpy(), kind="stable")

    # -- data ---------------------------------------------------------------------------------------------------------

    def _n_rep(self) -> int:
        return int(self.registry["field_registries"]["rep"]["summary_stats"]["n_rep"])

    def _cells(self, data: AnnData | MuData) -> sparse.csr_matrix | np.ndarray:
        """Return what goes into the network: expression of the model's genes, or cell embeddings."""
        if self.setup["use_rep"] is None:
            return self._expression(data)
        rep = np.asarray(expression_modality(data, self._modality).obsm[self.setup["use_rep"]], dtype=np.float32)
        if rep.shape[1] != self.config.n_input:
            raise ValueError(
                f"obsm[{self.setup['use_rep']!r}] has {rep.shape[1]} columns, this model {self.config.n_input}: it was "
                "made by another SE model."
            )
        return rep

    def _loader(self, data, target: np.ndarray, cells: CellSetDataset, *, fixed: bool, **sampler: object) -> DataLoader:
        groups = cell_groups(
            self._labels(data, "perturbation"),
            self._labels(data, "context"),
            control=self.control,
            order=expression_modality(data, self._modality).obs_names.to_numpy(),
            batch=self._batch_codes(data),
            target=target,
            source=self._training_rows(data),
        )
        sets = CellSetSampler(groups, set_size=self.set_size, fixed=fixed, **sampler)
        return DataLoader(cells, sampler=sets, batch_size=None)

    def validation_cells(self, data: AnnData | MuData, fraction: float | None = None, seed: int = 0) -> np.ndarray:
        """Mask of the cells that training validates on.

        Parameters
        ----------
        data
            The training data.
        fraction, seed
            Of :meth:`train` (`val_fraction`, 0.1 by default): where the data has no split of its own, that share of the
            cells of each perturbation and context is drawn, by name.
        """
        if self.setup["split_key"] is not None:
            return (self._labels(data, "split") == "val") & self._training_rows(data)
        fraction = 0.1 if fraction is None else fraction
        names = expression_modality(data, self._modality).obs_names.to_numpy()
        group = pd.Series(self._labels(data, "perturbation")) + "\0" + pd.Series(self._labels(data, "context"))
        rng = np.random.default_rng(seed)
        mask = np.zeros(len(names), bool)
        order = np.argsort(names, kind="stable")
        for _, rows in pd.Series(order).groupby(group.to_numpy()[order]):
            mask[rng.permutation(rows.to_numpy())[: int(fraction * len(rows))]] = True
        return mask

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        max_steps: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 8,
        loss: Literal["energy", "sinkhorn", "energy+sinkhorn"] = "energy",
        mean_weight: float = 1.0,
        contrast_weight: float = 0.3,
        val_fraction: float = 0.1,
        early_stopping: bool = False,
        early_stopping_patience: int = 10,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        precision: str = "32-true",
        seed: int = 0,
        enable_progress_bar: bool = True,
        **trainer_kwargs: object,
    ) -> None:
        """Train on sets of control cells and perturbed cells of the same context.

        Parameters
        ----------
        max_epochs, max_steps
            Length, whichever ends first; where neither is given, 20 passes over the training cells, but at least 400
            and at most 20,000 steps. An epoch is a pass, or 50 steps where that is more.
        lr, weight_decay
            Of AdamW; the rate warms up over 3 % of the steps and then falls along a cosine.
        batch_size
            Sets of cells per step.
        loss
            Distance between predicted and observed set: energy distance (published default), Sinkhorn divergence, or
            the former plus 0.01 of the latter.
        mean_weight
            Weight of the distance between the means of the two sets, which the published loss leaves out.
        contrast_weight
            Weight of a term that tells the perturbations of a batch apart, see
            :func:`virtualcell.modules._losses.contrast`.
        val_fraction
            Share of cells of each group kept for validation, where the data has no split of its own.
        early_stopping, early_stopping_patience
            Stop when `validation_loss` has not fallen for so many epochs.
        accelerator, devices, precision
            As in Lightning ("auto", "cpu", "gpu"; "bf16-mixed").
        seed
            Of weights drawn in training (dropout) and of the sets. The first weights come from `torch.manual_seed` at
            construction.
        enable_progress_bar
            Show the progress bar of scvi-tools.
        trainer_kwargs
            Anything else for :class:`scvi.train.Trainer`.
        """
        data = self._training_data()
        validation = self.validation_cells(data, val_fraction, seed)
        genes = None if self.setup["use_rep"] is None else Rows(self._expression(data))
        matrix = self._cells(data)
        cells = CellSetDataset(Rows(matrix), self.table.encode, genes)
        sampler = {"sets_per_batch": batch_size, "seed": seed}
        learned = self._training_rows(data) & ~validation
        train = self._loader(data, learned, cells, fixed=False, min_batches=50, **sampler)
        held = self._loader(data, validation, cells, fixed=True, **sampler) if validation.any() else None
        if self.config.residual == "both":
            rows = self._by_name(data)
            self._start_at_mean(matrix[rows[learned[rows]]])
        if self.config.prior is not None:
            self.prior = self._fit_prior(data, learned)
            if self.config.prior == "additive":
                base = dict(zip(self.prior.contexts, self.prior.controls, strict=True))
                cells.prior = cache(lambda perturbation, context: self._prior_of(perturbation, context, base[context]))
        options = {"kind": loss, "mean_weight": mean_weight, "contrast_weight": contrast_weight}
        run_training(
            self,
            partial(st_loss, **options),
            train,
            held,
            max_epochs=max_epochs,
            max_steps=max_steps,
            default_steps=min(max(20 * len(train) // train.sampler.n_passes, 400), 20_000),
            lr=lr,
            weight_decay=weight_decay,
            gradient_clip=10.0,
            early_stopping=early_stopping,
            early_stopping_patience=early_stopping_patience,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            seed=seed,
            enable_progress_bar=enable_progress_bar,
            **trainer_kwargs,
        )
        if self.config.residual == "both":
            self._weigh_heads(train)

    @torch.no_grad()
    def _start_at_mean(self, cells: sparse.csr_matrix | np.ndarray) -> None:
        """Let the level head start at the mean of training cells; from zero, getting there takes most of the training.

        Only where it is still zero: a network that was trained before goes on from there.
        """
        mean = torch.from_numpy(np.asarray(cells.mean(axis=0), dtype=np.float32).ravel())
        for network in networks(self.module):
            bias = network.project_level[-1].bias
            bias.copy_(torch.where(bias == 0, mean.to(bias), bias))

    @torch.inference_mode()
    def _weigh_heads(self, loader: DataLoader) -> None:
        """Weigh the two heads by the inverse squared error of their means on training sets.

        Which of them is better differs between data sets by much, and shows on the cells that both have learned from.
        """
        errors = torch.zeros(2)
        self.module.eval()
        for sets in islice(loader.sampler, 50):
            batch = {k: v.to(self.device) for k, v in loader.dataset[sets].items()}
            prior = Prior(batch["prior_scale"], batch["prior_shift"]) if "prior_scale" in batch else None
            wanted = batch["perturbed"].mean(dim=1)
            for network in networks(self.module):
                out = network(batch["control"], batch["perturbation"], batch["batch"], prior)
                errors += torch.stack([(x.mean(dim=1) - wanted).square().mean() for x in out.learned]).cpu()
        weights = 1 / errors / (1 / errors).sum()
        logger.info("Heads are weighed %s (shift of the control cells, level).", weights.tolist())
        for network in networks(self.module):
            network.head_weights.copy_(weights)

    def _fit_prior(self, data: AnnData | MuData, learned: np.ndarray) -> ShiftPrior:
        labels, contexts, rows = self._labels(data, "perturbation"), self._labels(data, "context"), self._by_name(data)
        # control cells of every context take part: they are what similarity is told by
        taken = learned | ((labels == self.control) & self._training_rows(data))
        rows = rows[taken[rows]]
        table = shift_table(self._expression(data)[rows], labels[rows], contexts[rows], control=self.control)
        return ShiftPrior.fit(table, self.config.prior, self.table if self.table.has_features else None)

    def _prior_of(self, perturbation: str, context: str, base: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if self.prior is None:
            return None
        features = self.table if self.table.has_features else None
        return self.prior(perturbation, control=self.control, context=context, base=base, features=features)

    def _weight_of_prior(self, perturbation: str) -> float:
        return PRIOR_WEIGHT if self.prior.measured(perturbation, self.control) else PRIOR_WEIGHT_UNSEEN

    # -- prediction ---------------------------------------------------------------------------------------------------

    @property
    def _n_seen_together(self) -> int:
        return self.set_size

    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that says why if this model has no vector for a perturbation, or never learned it."""
        self.table.check(perturbation)

    def perturbation_name(self, *, drug: str, dose: float | None = None) -> str:
        """Find the perturbation of a drug at a dose in names such as "[('Dabrafenib', 0.5, 'uM')]" of Tahoe-100M.

        Parameters
        ----------
        drug
            Name of the drug, in any case of letters.
        dose
            Dose, in the unit of the names; may be left out where there is one.

        Raises
        ------
        KeyError
            For an unknown drug or dose; the message names those there are.
        """
        return find_drug(self.table.names, drug, dose)

    @torch.inference_mode()
    def _run(
        self,
        cells: np.ndarray,
        perturbation: str,
        batch: np.ndarray | None,
        prior: tuple[np.ndarray, np.ndarray] | None,
    ) -> Iterator[STOutput]:
        """Run the network over control cells in the order given, `set_size` at a time, some sets at once."""
        self.module.eval()
        s = min(self.set_size, len(cells))
        starts = self._starts(len(cells))
        vector = self.table.encode([perturbation]).to(self.device)
        if prior is not None:
            tensors = (torch.from_numpy(x).to(self.device).unsqueeze(0) for x in prior)
            known = Prior(*tensors, self._weight_of_prior(perturbation))
        for at in range(0, len(starts), _SETS_AT_ONCE):
            rows = np.stack([np.arange(i, i + s) for i in starts[at : at + _SETS_AT_ONCE]])
            control = torch.from_numpy(cells[rows]).to(self.device)
            codes = None if batch is None else torch.from_numpy(batch[rows]).to(self.device)
            yield self.module(control, vector.expand(len(rows), -1), codes, None if prior is None else known)

    def _starts(self, n: int) -> list[int]:
        """Where the sets begin; every one is full: the last one reaches back."""
        s = min(self.set_size, n)
        return [min(i, n - s) for i in range(0, n, s)]

    def predict_sets(
        self,
        cells: np.ndarray,
        perturbation: str,
        batch: np.ndarray | None = None,
        *,
        prior: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the network over control cells in the order given, `set_size` at a time.

        Parameters
        ----------
        cells
            Control cells, (n, n_input).
        perturbation
            Its name.
        batch
            Batch code of each cell, (n,), for a model with batches.
        prior
            Scale and shift of the prior, (n_output,) each, for a model with one; left out of the average by default.

        Returns
        -------
        "cells" (n, n_output), and "genes" (n, n_genes) for a model in embedding space.
        """
        n, s = len(cells), min(self.set_size, len(cells))
        out: dict[str, list[np.ndarray]] = {"cells": [], "genes": []}
        for predicted in self._run(cells, perturbation, batch, prior):
            for name in [k for k in out if getattr(predicted, k) is not None]:
                out[name].append(getattr(predicted, name).float().cpu().flatten(0, 1).numpy())
        n_sets = len(self._starts(n))
        kept = np.arange(n_sets * s)  # of the last set only what is new
        kept = np.concatenate([kept[: (n_sets - 1) * s], kept[n_sets * s - (n - (n_sets - 1) * s) :]])
        return {k: np.concatenate(v)[kept] for k, v in out.items() if v}

    def _predict_cells(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None
    ) -> np.ndarray:
        prior = self._prior_of(perturbation, context, base)
        predicted = self.predict_sets(cells, perturbation, batch, prior=prior)
        return np.minimum(predicted["genes" if self.config.n_genes else "cells"], MOST_EXPRESSION)

    def _predict_means(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean profiles (n_opinions, n_genes) of every head of every member and of the prior, and their shares."""
        if self.config.n_genes:
            return super()._predict_means(cells, perturbation, context=context, base=base, batch=batch)
        prior = self._prior_of(perturbation, context, base)
        means = []
        for out in self._run(cells, perturbation, batch, prior):
            opinions = [*out.learned, *([] if out.baseline is None else [out.baseline])]
            means.append(torch.stack([x.mean(dim=1) for x in opinions]).float().cpu().numpy())
        members = networks(self.module)
        heads = [n.head_weights if n.config.residual == "both" else torch.ones(1) for n in members]
        share = torch.cat(heads).cpu().numpy() / len(members)
        if prior is not None and self.config.prior == "similar":
            of_prior = self._weight_of_prior(perturbation)
            share = np.append(share * (1 - of_prior), of_prior)
        return np.concatenate(means, axis=1).mean(axis=1), share
