"""What every model shares: saving to safetensors and JSON, loading without the data, letting go of it."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Self

import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model._utils import parse_device_args
from scvi.model.base import BaseModelClass
from torch import Tensor

from virtualcell.io._save import read_folder, write_folder


class SavedModel(BaseModelClass):
    """A scvi-tools model that saves to safetensors and JSON, and loads without the data and without unpickling."""

    @abstractmethod
    def _arguments(self) -> dict:
        """Return the arguments of `__init__` that JSON can hold."""

    def _tensors(self) -> dict[str, Tensor]:
        return {f"network.{k}": v for k, v in self.module.state_dict().items()}

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        prefix = "network."
        self.module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})

    @classmethod
    def _from_arguments(cls, arguments: dict, tensors: dict[str, Tensor], registry: dict) -> Self:
        return cls(registry=registry, **arguments)

    @classmethod
    def _from_foreign(cls, arguments: dict, tensors: dict[str, Tensor], registry: dict) -> Self:
        """Build a model around the tensors of another package's files, without weights of its own to throw away."""
        with torch.device("meta"):
            model = cls._from_arguments(arguments, tensors, registry)
        prefix = "network."
        network = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        model.module.load_state_dict(network, assign=True)
        model.module.eval()
        model.is_trained_ = True
        return model

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    def _meta(self) -> dict:
        from virtualcell import __version__

        history = {
            k: {"index": v.index.tolist(), "values": v.iloc[:, 0].tolist()} for k, v in (self.history or {}).items()
        }
        return {
            "class": type(self).__name__,
            "virtualcell_version": __version__,
            "arguments": self._arguments(),
            "registry": self.registry,
            "is_trained": bool(self.is_trained_),
            "history": history,
        }

    @classmethod
    def _from_saved(cls, meta: dict, tensors: dict[str, Tensor]) -> Self:
        if meta["class"] != cls.__name__:
            raise ValueError(f"this is a saved {meta['class']}: load it with `vc.models.{meta['class']}.load`.")
        model = cls._from_arguments(meta["arguments"], tensors, meta["registry"])
        model._load_tensors(tensors)
        model.is_trained_ = meta["is_trained"]
        model.history_ = {
            k: pd.DataFrame({k: v["values"]}, index=pd.Index(v["index"], name="epoch"))
            for k, v in meta["history"].items()
        }
        return model

    def save(self, dir_path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write `model.safetensors` and `model.json` into a folder; an ST writes its SE into the folder `se` in it.

        Parameters
        ----------
        dir_path
            The folder, made where it is missing.
        overwrite
            Replace a model that is there.

        Raises
        ------
        FileExistsError
            If the folder holds a model and `overwrite` is not set.
        """
        write_folder(dir_path, self._meta(), self._tensors(), overwrite=overwrite)
        self._save_parts(Path(dir_path), overwrite=overwrite)

    def _save_parts(self, folder: Path, *, overwrite: bool) -> None:
        """Write the models that this one holds into folders of their own; none here."""

    def _load_parts(self, folder: Path, *, accelerator: str, device: int | str) -> None:
        """Read what :meth:`_save_parts` wrote."""

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike,
        adata: AnnData | MuData | None = None,
        *,
        accelerator: str = "auto",
        device: int | str = "auto",
    ) -> Self:
        """Read a model that :meth:`save` wrote, an ST with its SE; no data is needed, and nothing is unpickled.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Data to predict on where a method is given none; `None` leaves the model without data.
        accelerator, device
            Where to put the network, as in scvi-tools.
        """
        model = cls._from_saved(*read_folder(dir_path))
        model._adata = adata
        model._load_parts(Path(dir_path), accelerator=accelerator, device=device)
        return model._put_on(accelerator, device)

    def _put_on(self, accelerator: str = "auto", device: int | str = "auto") -> Self:
        *_, where = parse_device_args(accelerator=accelerator, devices=device, return_device="torch")
        self.to_device(where)
        return self

    def _training_data(self) -> AnnData | MuData:
        if self.adata is None:
            raise ValueError(
                "this model holds no data to train on: it was loaded without, or `vc.tl.fit_state` let go of it. Set "
                "up data and build a new model, or give the data to `load` as adata=."
            )
        return self.adata

    def forget_data(self) -> None:
        """Drop the training data, which scvi-tools would keep in memory for as long as the process lives."""
        if self._adata_manager is not None:
            self._setup_adata_manager_store.pop(self._adata_manager.adata_uuid, None)
        self._per_instance_manager_store.pop(self.id, None)
        self._adata = self._adata_manager = self.trainer = None

    def __repr__(self) -> str:
        text = self._model_summary_string + ("" if self.is_trained_ else " Not trained yet.")
        return text.strip()
