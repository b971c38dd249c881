"""ST in files: our own format, and Arc's run folders."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from virtualcell._reading import as_damaged
from virtualcell._state import State
from virtualcell.io._arc import require_sizes
from virtualcell.io._arc_st import read_st
from virtualcell.io._write_arc_st import write_st
from virtualcell.models._common import load_network, meta_of, model_of, network_tensors, restore_meta
from virtualcell.models._crispri import CRISPRi
from virtualcell.models._features import PerturbationTable
from virtualcell.models._mixture import Mixture
from virtualcell.models._transferred import Transferred

if TYPE_CHECKING:
    from virtualcell.models._st import ST

logger = logging.getLogger(__name__)

_VECTORS = "perturbations"  # in a file


def state_of(model: ST) -> State:
    """Return what is to be saved."""
    table = {"names": model.table.names, "seen": model.table.seen, "has_features": model.table.has_features}
    meta = {
        **meta_of(model),
        "batches": model.batches,
        "sizes": {"set_size": model.set_size, "n_networks": model.n_networks, "preset": model.preset},
        "config": dataclasses.asdict(model.config),
        "table": table,
        "mixture": dataclasses.asdict(model.mixture),
        "verdict": model.verdict,
        "crispri": None if model.crispri is None else model.crispri.to_plain(),
        "validation": None if model.validation is None else model.validation.to_dict(orient="split"),
    }
    tensors = {**network_tensors(model.module), **_vectors(model.table)}
    if model.transferred is not None:
        meta["transferred"], arrays = model.transferred.to_arrays()
        tensors |= {f"transferred.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    parts = {name: part.state() for name, part in model.parts().items()}
    return State(type(model).__name__, meta, tensors, parts)


def from_state(cls: type[ST], state: State) -> ST:
    """Build the model that :meth:`state` described."""
    meta, tensors = state.meta, state.tensors
    with torch.device("meta"):  # without weights of its own to throw away
        model = _from_arguments(cls, meta, tensors, meta["registry"], transfer=meta["mixture"]["transferred"])
    load_network(model.module, tensors, assign=True)
    restore_meta(model, meta)
    model.batches = meta["batches"]
    mixture = meta["mixture"]
    model.mixture = Mixture(
        tuple(mixture["heads"]),
        tuple(mixture["head_weights"]),
        mixture["transferred"],
        mixture["nonnegative"],
        mixture["networks"],
    )
    if "transferred" in meta:
        arrays = {k.removeprefix("transferred."): v.numpy() for k, v in tensors.items() if "transferred." in k}
        model.transferred = Transferred.from_arrays(meta["transferred"], arrays)
    if (known := meta["validation"]) is not None:
        index = pd.Index(known["index"], name="model")
        model.validation = pd.DataFrame(known["data"], index=index, columns=known["columns"])
    model.verdict = meta["verdict"]
    if meta["crispri"] is not None:
        model.modality_of_perturbation, model.crispri = "CRISPRi", CRISPRi.from_plain(meta["crispri"])
        model.gene_positions = model.crispri.neighbours.positions
    for name, part in state.parts.items():
        setattr(model, name, model_of(part))
    return model


def _vectors(table: PerturbationTable) -> dict[str, Tensor]:
    """Vectors of perturbations, but for plain one-hot ones, whose square would be larger than the network."""
    n, n_dims = table.vectors.shape
    is_plain = n == n_dims and torch.equal(table.vectors, torch.eye(n))
    return {} if is_plain else {_VECTORS: table.vectors}


def _from_arguments(
    cls: type[ST], arguments: dict, tensors: dict[str, Tensor], registry: dict, *, transfer: bool = False
) -> ST:
    sizes = {**arguments["config"], "n_networks": arguments["sizes"].get("n_networks", 1)}
    require_sizes(sizes, tensors.values(), source="the file")
    vectors = tensors.get(_VECTORS)
    if vectors is None:
        n = len(arguments["table"]["names"])
        require_sizes({"n_perturbation": n}, tensors.values(), source="the file")
        vectors = torch.eye(n, device="cpu")
    table = PerturbationTable(vectors=vectors, control=registry["setup_args"]["control"], **arguments["table"])
    return cls(registry=registry, table=table, transfer=transfer, **arguments["sizes"], **arguments["config"])


def from_arc(
    cls: type[ST],
    run_folder: str | os.PathLike,
    *,
    checkpoint: str = "final.ckpt",
    gene_names: Sequence[str] | None = None,
    perturbations: Sequence[str] | Mapping[str, Sequence[float]] | pd.DataFrame | None = None,
) -> ST:
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
    with as_damaged(path, "run folder of an ST model", checked=True):
        arguments, tensors, registry = read_st(
            path, checkpoint=checkpoint, gene_names=gene_names, perturbations=perturbations
        )
    with torch.device("meta"):  # without weights of its own to throw away
        model = _from_arguments(cls, arguments, tensors, registry)
    load_network(model.module, tensors, assign=True)
    model.module.eval()
    model.is_trained_ = True
    logger.info("%s: %r", path.name, model)
    return model


def to_arc(self: ST, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
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
        For head="both", our default, or "shift", for a transferred effect, or for several networks, which that
        format cannot express.
    """
    if self.transfer:
        raise ValueError(
            "transfer=True has no counterpart in Arc's format. Train with preset='published' to share a model."
        )
    table = dict(zip(self.table.names, self.table.vectors, strict=True))
    batch = self.registry["field_registries"]["batch"]["state_registry"]
    names = self.batches or batch["categorical_mapping"]
    write_st(
        Path(folder),
        self.module,
        setup=dataclasses.asdict(self.design),
        genes=self.genes,
        perturbations=table | {self.control: self.table.encode([self.control])[0]},
        batches=[str(b) for b in names],
        batch_key=batch.get("original_key", self.design.batch_key or "batch").removeprefix("_scvi_"),
        contexts=self.contexts,
        set_size=self.set_size,
        overwrite=overwrite,
    )
