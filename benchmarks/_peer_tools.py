"""The tools that `peers.py` runs, each in its own environment: from cells that may be seen to predicted cells.

Each function takes the cells, a folder to work in, the name of the case and the limits that training has, and returns
a matrix of cells (log1p of counts per 10,000) for each held-out perturbation, and what is to be said about the run.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import sparse

SEED = 0


@dataclass(frozen=True)
class Limits:
    """What a machine allows: minutes of training (scGen), epochs (GEARS) or steps (arc-state), cells of a group."""

    minutes: float = 600
    epochs: int = 20
    cells: int | None = None


Found = tuple[dict[str, np.ndarray], dict]


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def start_cells(cells: ad.AnnData) -> ad.AnnData:
    """Return the control cells of the context to predict."""
    here = (cells.obs["context"] == cells.uns["context"]) & (cells.obs["perturbation"] == cells.uns["control"])
    return cells[here.to_numpy()].copy()


def thinned(cells: ad.AnnData, n: int) -> ad.AnnData:
    """Draw at most so many cells of a perturbation in a context, and three times as many control cells."""
    order = np.random.default_rng(SEED).permutation(cells.n_obs)
    groups = cells.obs[["perturbation", "context"]].astype(str).iloc[order]
    most = np.where(groups["perturbation"] == cells.uns["control"], 3 * n, n)
    kept = groups.groupby(["perturbation", "context"]).cumcount().to_numpy() < most
    return cells[np.sort(order[kept])].copy()


def versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


def scgen(cells: ad.AnnData, work: Path, case: str, limits: Limits) -> Found:
    """Run pertpy's scGen with the settings of its tutorial; one network for all perturbations of a case."""
    import pertpy as pt

    settings = {"max_epochs": 100, "batch_size": 32, "early_stopping": True, "early_stopping_patience": 25}
    start, held_out = start_cells(cells), list(cells.uns["held_out"])
    cells.X, start.X = dense(cells.X), dense(start.X)
    pt.tl.Scgen.setup_anndata(cells, batch_key="perturbation", labels_key="context")
    model = pt.tl.Scgen(cells)
    model.train(**settings, accelerator="cpu", max_time=timedelta(minutes=limits.minutes))
    settings["epochs"] = len(next(iter(model.history.values())))
    out = {}
    for name in held_out:
        found, _ = model.predict(ctrl_key=cells.uns["control"], stim_key=name, adata_to_predict=start)
        out[name] = dense(found.X)
    return out, {"settings": settings, "versions": versions("pertpy", "scvi-tools", "jax")}


def gears(cells: ad.AnnData, work: Path, case: str, limits: Limits) -> Found:
    """Run GEARS with its defaults, but for the limits (its learning rate is halved after each epoch).

    Its graph of genes is made of Reactome's sets instead of the Gene Ontology's. It knows no contexts and predicts a
    mean: that of the control cells of the held-out context, and its difference to theirs is added to each of them.
    """
    import torch
    from gears import GEARS, PertData

    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  (what GEARS draws control cells with)
    settings = {"epochs": limits.epochs, "batch_size": 32, "hidden_size": 64, "cells of a group": limits.cells}
    start, held_out, control = start_cells(cells), list(cells.uns["held_out"]), cells.uns["control"]
    cells = cells if limits.cells is None else thinned(cells, limits.cells)
    folder = work / f"gears-{case}"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # it writes its graph to ./data
    Path("gene2go_all.pkl").write_bytes(pickle.dumps(gene_sets(work, set(cells.obs["perturbation"]) - {control})))
    is_control = cells.obs["perturbation"] == control
    cells.obs["condition"] = np.where(is_control, "ctrl", cells.obs["perturbation"].astype(str) + "+ctrl")
    cells.obs["cell_type"] = "cells"
    cells.var["gene_name"] = cells.var_names
    data = PertData(str(folder), default_pert_graph=False)
    if (made := folder / case.lower()).exists():  # by a run that was stopped
        data.load(data_path=str(made))
    else:
        data.new_data_process(case.lower(), adata=cells)
    names = sorted(set(data.adata.obs["condition"]))
    # it validates on some of the perturbations: all were measured in another context, and none is held out from it
    Path("split.pkl").write_bytes(pickle.dumps({"train": names, "val": names[:3], "test": names[:1]}))
    data.prepare_split(split="custom", seed=1, split_dict_path="split.pkl")
    data.get_dataloader(batch_size=settings["batch_size"], test_batch_size=128)
    del data.dataloader["test_loader"]
    model = GEARS(data, device="cpu")
    model.model_initialize(hidden_size=settings["hidden_size"])
    model.train(epochs=settings["epochs"])
    here = (model.adata.obs["condition"] == "ctrl") & (model.adata.obs["context"] == cells.uns["context"])
    model.adata = model.adata[here.to_numpy()]  # it starts from the control cells that it finds here
    found = model.predict([[name] for name in held_out])
    base, used = dense(start.X), dense(model.adata.X).mean(axis=0)
    out = {name: base + (found[name] - used) for name in held_out}
    return out, {"settings": settings, "versions": versions("cell-gears", "torch")}


def gene_sets(work: Path, targets: set[str]) -> dict[str, set[str]]:
    """Return the sets that each gene is in; a target that is in none has one of its own."""
    out: dict[str, set[str]] = {}
    for line in (work / "reactome.gmt").read_text().splitlines():
        name, _, *genes = line.split("\t")
        for gene in genes:
            out.setdefault(gene, set()).add(name)
    return out | {target: {f"only {target}"} for target in targets - set(out)}


def arc(cells: ad.AnnData, work: Path, case: str, limits: Limits) -> Found:
    """Train ST of `arc-state` through its command line, cut down to what a CPU does in minutes, and let it predict.

    Its default network (width 768, 8 layers, sets of 512 cells, 400,000 steps of 16 sets) is far out of reach; a
    network so small, with so few steps, learns more at ten times the default learning rate.
    """
    held_out, control = list(cells.uns["held_out"]), cells.uns["control"]
    folder = work / f"arc-{case}"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for_arc(cells).write_h5ad(folder / "data" / "cells.h5ad")
    asked = []
    for i, name in enumerate([control, *held_out]):  # cells to take the place of, which it samples control cells for
        part = start_cells(cells)
        part.obs["perturbation"], part.obs_names = name, [f"{n}-{i}" for n in part.obs_names]
        asked.append(part)
    for_arc(ad.concat(asked)).write_h5ad(folder / "asked.h5ad")
    (folder / "split.toml").write_text(f'[datasets]\ncells = "{folder / "data"}"\n\n[training]\ncells = "train"\n')
    settings = ARC | {"training.max_steps": limits.epochs}
    seconds = run_arc(["tx", "train", *arc_options(folder, settings, control)], folder / "train.log")
    keys = ["--embed-key", "X_hvg", "--pert-col", "perturbation", "--celltype-col", "context", "--batch-col", "batch"]
    where = ["--model-dir", folder / "run", "--adata", folder / "asked.h5ad", "--output", folder / "out.h5ad"]
    run_arc(["tx", "infer", *where, *keys, "--control-pert", control], folder / "infer.log")
    found = ad.read_h5ad(folder / "out.h5ad")
    of = found.obs["perturbation"].to_numpy()
    out = {name: dense(found.obsm["X_hvg"])[of == name] for name in held_out}
    about = {"settings": settings, "seconds_of_training": round(seconds), "versions": versions("arc-state", "torch")}
    return out, about


ARC = {
    "training.lr": 1e-3,
    "training.batch_size": 8,
    "model.kwargs.cell_set_len": 64,
    "model.kwargs.hidden_dim": 256,
    "model.kwargs.transformer_backbone_kwargs.intermediate_size": 1024,
    "model.kwargs.transformer_backbone_kwargs.num_hidden_layers": 4,
    "model.kwargs.transformer_backbone_kwargs.num_attention_heads": 4,
    "model.kwargs.transformer_backbone_kwargs.num_key_value_heads": 4,
}


def for_arc(cells: ad.AnnData) -> ad.AnnData:
    """Return cells as `arc-state` reads them: expression as a dense matrix in `obsm`, one batch."""
    obs = cells.obs[["perturbation", "context"]].assign(batch="batch").astype("category")
    return ad.AnnData(
        sparse.csr_matrix(cells.X),
        obs=obs,
        var=cells.var[[]].rename_axis(None),
        obsm={"X_hvg": dense(cells.X).astype(np.float32)},
    )


def arc_options(folder: Path, settings: dict, control: str) -> list[str]:
    """Return the options of `state tx train` for the cells in a folder."""
    given = {
        "data.kwargs.toml_config_path": folder / "split.toml",
        "data.kwargs.embed_key": "X_hvg",
        "data.kwargs.output_space": "gene",
        "data.kwargs.num_workers": 0,
        "data.kwargs.pin_memory": "false",
        "data.kwargs.batch_col": "batch",
        "data.kwargs.pert_col": "perturbation",
        "data.kwargs.cell_type_key": "context",
        "data.kwargs.control_pert": control,
        "training.val_freq": 1_000_000,
        "training.ckpt_every_n_steps": 1_000_000,
        "training.wandb_track": "false",
        "use_wandb": "false",
        "model": "state",
        "model.device": "cpu",
        "output_dir": folder,
        "name": "run",
        "overwrite": "true",
    }
    return [f"{key}={value}" for key, value in (given | settings).items()]


def run_arc(arguments: list, log: Path, program: Path | str | None = None) -> float:
    """Run the command `state` of this environment, or another one, and return its seconds."""
    program = program or Path(sys.executable).with_name("state")
    start = time.perf_counter()
    with log.open("w") as out:
        subprocess.run([program, *map(str, arguments)], stdout=out, stderr=out, check=True)
    return time.perf_counter() - start


TOOLS = {"scgen": scgen, "gears": gears, "arc": arc}
