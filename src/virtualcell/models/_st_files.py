"""ST in files: our folders, entries of `uns`, and Arc's run folders."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from virtualcell.io._arc_st import read_st
from virtualcell.io._save import read_folder
from virtualcell.io._write_arc_st import write_st
from virtualcell.models._base import PerturbationModel
from virtualcell.models._feature_baselines import load_baseline
from virtualcell.models._perturbations import PerturbationTable
from virtualcell.models._prior import ShiftPrior
from virtualcell.models._se import SE

logger = logging.getLogger(__name__)


class STInFiles(PerturbationModel):
    """What :class:`virtualcell.models.ST` has for saving and loading."""

    def _arguments(self) -> dict:
        config = dataclasses.asdict(self.config)
        table = {"names": self.table.names, "seen": self.table.seen, "has_features": self.table.has_features}
        own = {"set_size": self.set_size, "n_members": self.n_members, "config": config, "table": table}
        if self.prior is not None:
            own["prior"] = {k: v for k, v in vars(self.prior).items() if not isinstance(v, np.ndarray)}
        return own

    def _tensors(self) -> dict[str, Tensor]:
        arrays = {} if self.prior is None else {k: v for k, v in vars(self.prior).items() if isinstance(v, np.ndarray)}
        prior = {f"prior.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        return {**super()._tensors(), "perturbations": self.table.vectors, **prior}

    def _save_parts(self, folder: Path, *, overwrite: bool) -> None:
        for part, model in (("se", self.se), ("fallback", self.fallback)):
            if model is not None:
                model.save(folder / part, overwrite=overwrite)
                continue
            for name in ("model.json", "model.safetensors"):  # those of the model which was here before
                (folder / part / name).unlink(missing_ok=True)

    def _load_parts(self, folder: Path, *, accelerator: str, device: int | str) -> None:
        if (folder / "se" / "model.json").exists():
            self.se = SE.load(folder / "se", accelerator=accelerator, device=device)
        if (folder / "fallback" / "model.json").exists():
            self.fallback = load_baseline(*read_folder(folder / "fallback"))

    def _meta(self) -> dict:
        validation = None if self.validation is None else self.validation.to_dict(orient="split")
        return {**super()._meta(), "validation": validation}

    @classmethod
    def _from_saved(cls, meta: dict, tensors: dict[str, Tensor]) -> Self:
        model = super()._from_saved(meta, tensors)
        if (known := meta.get("validation")) is not None:
            index = pd.Index(known["index"], name="model")
            model.validation = pd.DataFrame(known["data"], index=index, columns=known["columns"])
        return model

    @classmethod
    def _from_arguments(cls, arguments: dict, tensors: dict[str, Tensor], registry: dict) -> Self:
        table = PerturbationTable(
            vectors=tensors["perturbations"], control=registry["setup_args"]["control"], **arguments["table"]
        )
        sizes = {k: arguments[k] for k in ("set_size", "n_members") if k in arguments}
        model = cls(registry=registry, table=table, **sizes, **{"prior": None, **arguments["config"]})
        if "prior" in arguments:
            arrays = {k.removeprefix("prior."): v.numpy() for k, v in tensors.items() if k.startswith("prior.")}
            model.prior = ShiftPrior(**arguments["prior"], **arrays)
        return model

    @classmethod
    def from_arc(
        cls,
        run_folder: str | os.PathLike,
        *,
        checkpoint: str = "final.ckpt",
        gene_names: Sequence[str] | None = None,
        perturbations: Sequence[str] | Mapping[str, Sequence[float]] | pd.DataFrame | None = None,
    ) -> Self:
        """Read a model of Arc's `arc-state`, published or trained by yourself. No code in its files is run.

        Its columns of `obs` (perturbation, context, batch) are those of the run; state other ones at
        :func:`virtualcell.tl.predict_perturbation`.

        Parameters
        ----------
        run_folder
            Folder of a run (`config.yaml`, `var_dims.pkl`, `pert_onehot_map.pt`, ..., `checkpoints/`), or a checkpoint
            alone, which then needs `gene_names` and `perturbations`; its batches, if any, are called "0", "1", ...
        checkpoint
            File in `checkpoints/` or in the folder itself.
        gene_names
            Names of the predicted genes in the order of training, where the run has none (Tahoe).
        perturbations
            Names in the order of training for one-hot codes, or name -> vector (n_perturbation,), the control among
            them; by default those of `pert_onehot_map.pt`.

        Raises
        ------
        ValueError
            If parameters are missing, unexpected or misshapen, or a list of names has another length than the model.
        UnsafePickleError
            If a file asks for anything but data.
        """
        path = Path(run_folder)
        arguments, tensors, registry = read_st(
            path, checkpoint=checkpoint, gene_names=gene_names, perturbations=perturbations
        )
        model = cls._from_foreign(arguments, tensors, registry)
        logger.info("%s: %r", path.name, model)
        return model

    def to_arc(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write a run folder that `arc-state` reads, with the network in `checkpoints/final.ckpt`.

        Parameters
        ----------
        folder
            The folder, made where it is missing.
        overwrite
            Replace a run that is there.

        Raises
        ------
        ValueError
            For `residual="both"`, our default, or "expression", for a prior, or for several members, which that format
            cannot express.
        """
        table = dict(zip(self.table.names, self.table.vectors, strict=True))
        batch = self.registry["field_registries"]["batch"]["state_registry"]
        write_st(
            Path(folder),
            self.module,
            setup=self.setup,
            genes=self.genes,
            perturbations=table | {self.control: self.table.encode([self.control])[0]},
            batches=[str(b) for b in batch["categorical_mapping"]],
            batch_key=batch["original_key"].removeprefix("_scvi_"),
            contexts=self.contexts,
            set_size=self.set_size,
            overwrite=overwrite,
        )
