"""Processes that are killed by SIGKILL at random moments of a fit, an embedding and a save, and what that leaves."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import torch

import virtualcell as vc
from virtualcell._files import write_cells
from virtualcell._state import read_file
from virtualcell.io._save import FILE, read_state, save
from virtualcell.models import SE, ST
from virtualcell.tl import _embed

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
NETWORK = {"n_hidden": 32, "n_feedforward": 64, "n_layers": 1, "set_size": 8, "dropout": 0.2}
MODELS = 2  # that are saved in turn


@functools.cache
def cells() -> ad.AnnData:
    return vc.datasets.synthetic(
        n_contexts=2, n_perturbations=3, n_genes=40, n_cells_per_group=20, n_control_cells=30, seed=0
    )


@functools.cache
def model(number: int) -> SE:
    adata = cells().copy()
    SE.setup_anndata(adata)
    torch.manual_seed(number)
    se = SE(adata, vc.pp.expression_gene_embeddings(adata, n_comps=4), n_hidden=16 * (number + 1), n_heads=2)
    se.module.eval()
    se.is_trained_ = True
    return se


# -- what is killed: each goes on from, or replaces, what it finds in a folder ----------------------------------------


def fit(folder: Path, n_steps: int = 16) -> None:
    adata = cells().copy()
    training = {
        "max_steps": n_steps,
        "batch_size": 2,
        "validate_every": 9,
        "checkpoint_every": 0.03,
        "accelerator": "cpu",
    }
    vc.tl.fit_state(
        adata,
        **DESIGN,
        network=NETWORK,
        training={**training, "accelerator": "cpu", "progress_bar": False},
        se={"max_steps": n_steps // 2, "batch_size": 8},
        checkpoint_dir=folder / "fit",
        resume=True,
    )
    write_cells(adata, folder / "fitted.h5ad")


def embed(folder: Path) -> None:
    _embed._PORTION = 8
    if not (folder.parent / "se" / FILE).exists():  # models that are set up anew are others
        save(model(0), folder.parent / "se", overwrite=True)
    if not (folder / "embedded.zarr").exists():  # it was killed after its end
        vc.tl.embed(cells(), SE.load(folder.parent / "se"), to=folder / "embedded.zarr")


def write_again(folder: Path) -> None:
    for number in range(8):
        adata = cells().copy()
        adata.obsm["X_state"] = np.full((adata.n_obs, 500), number % MODELS, np.float32)
        write_cells(adata, folder / "written.h5ad")


def save_again(folder: Path) -> None:
    for number in range(8):
        save(model(number % MODELS), folder, overwrite=True)


# -- what must be on disk ---------------------------------------------------------------------------------------------


def steps_on_disk(folder: Path) -> int:
    """Check that every file of a fit is whole, and return how many steps of its trainings are done."""
    done = 0
    for path in folder.rglob("*.safetensors"):
        state = read_file(path)
        done += state.meta.get("steps_done", 0)
    for path in folder.glob("*.h5ad"):
        ad.read_h5ad(path)
    return done


def cells_on_disk(folder: Path) -> int:
    """Return how many cells of an embedding are there."""
    if (folder / "embedded.zarr").exists():
        return ad.read_zarr(folder / "embedded.zarr").n_obs
    progress = folder / "embedded.zarr.part" / "progress.json"
    return json.loads(progress.read_text())["cells"] if progress.exists() else 0


def result_of_embedding(folder: Path) -> list[list[float]]:
    """Return the vectors."""
    return ad.read_zarr(folder / "embedded.zarr").obsm["X_state"].tolist()


def result_of_fit(folder: Path) -> dict[str, str]:
    """Return digests of all that came of a fit."""
    st, adata = ST.load(folder / "fit"), ad.read_h5ad(folder / "fitted.h5ad")
    tensors = {f"{name}.{k}": v for name, m in (("st", st), ("se", st.se)) for k, v in m.module.state_dict().items()}
    arrays = {**{k: v.numpy() for k, v in tensors.items()}, "obsm": adata.obsm["X_state"]}
    found = {k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for k, v in arrays.items()}
    history = {k: v.iloc[:, 0].tolist() for k, v in st.history.items()}
    scores = st.validation.to_dict()
    return {**found, "verdict": st.verdict, "rest": json.dumps([history, scores, repr(st.mixture)], default=str)}


def which_is_written(folder: Path) -> int:
    """Return the number of the cells on disk, -1 for none."""
    if not (folder / "written.h5ad").exists():
        return -1
    (number,) = np.unique(ad.read_h5ad(folder / "written.h5ad").obsm["X_state"])
    return int(number)


def which_is_saved(folder: Path) -> int:
    """Return the number of the model on disk, -1 for none."""
    if not (folder / FILE).exists():
        return -1
    found = read_state(folder).tensors
    theirs = [model(i).state().tensors for i in range(MODELS)]
    numbers = [i for i, own in enumerate(theirs) if all(torch.equal(tensor, found[k]) for k, tensor in own.items())]
    assert len(numbers) == 1, "this is no model that was saved"
    return numbers[0]


# -- killing ----------------------------------------------------------------------------------------------------------


def kill_goers_on(
    work: Callable[[Path], None],
    progress: Callable[[Path], int],
    result: Callable[[Path], object],
    folder: Path,
    n: int,
    *,
    seed: int,
) -> dict[str, object]:
    """Kill a work that goes on from where it was, `n` times, and compare its result with one that nobody killed."""
    rng = np.random.default_rng(seed)
    whole, n_killed, n_finished = seconds(work, folder), 0, 0
    expected = result(folder / "whole")
    while n_killed < n:
        attempt, done, was_killed = folder / f"killed_{n_finished}", 0, True
        attempt.mkdir()
        while was_killed:
            was_killed = run(work, attempt, rng.uniform(0, whole) if n_killed < n else None)
            n_killed, before, done = n_killed + was_killed, done, progress(attempt)
            assert done >= before, "something that was kept is lost"
        n_finished += 1
        assert result(attempt) == expected, "the result is another one"
    return {"kills": n_killed, "came to their end, bit for bit equal": n_finished, "seconds of one": whole}


def kill_writers(
    work: Callable[[Path], None], which: Callable[[Path], int], folder: Path, n: int, *, seed: int
) -> dict[str, object]:
    """Kill a work that writes one file again and again, `n` times; what is there is one of the whole files."""
    whole, rng, found, n_killed = seconds(work, folder), np.random.default_rng(seed), [], 0
    place = folder / "killed"
    place.mkdir()
    while n_killed < n:
        n_killed += run(work, place, rng.uniform(0, whole))
        found.append(which(place))
        assert max(found) < 0 or found[-1] >= 0, "the file that was there is gone"
    counts = {"none": found.count(-1), **{f"number {i}": found.count(i) for i in range(MODELS)}}
    return {"kills": n_killed, "what was on disk": counts, "seconds of one": whole}


def seconds(work: Callable[[Path], None], folder: Path) -> float:
    """Return how long a work takes in a process of its own that nobody kills, and leave its results in "whole"."""
    for place in (folder / "first", folder / "whole"):  # the first one waits until the others can be forked
        place.mkdir()
        started = time.perf_counter()
        run(work, place, None)
    return round(time.perf_counter() - started, 2)


def run(work: Callable[[Path], None], folder: Path, after: float | None) -> bool:
    """Run a work in a process that is killed after some seconds, and tell whether it was still alive."""
    processes = multiprocessing.get_context("forkserver")  # which has imported everything
    processes.set_forkserver_preload([__name__, "virtualcell.tl._fit", "lightning.pytorch"])
    process = processes.Process(target=_quietly, args=(work, folder))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "it failed by itself"
    return process.exitcode != 0


def _quietly(work: Callable[[Path], None], folder: Path) -> None:
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        torch.set_num_threads(1)
        vc.settings.progress = False
        work(folder)
