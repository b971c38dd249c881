"""What processes do in the tests of faults: each is one of its own, forked from one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import killed
import torch

import virtualcell as vc
from virtualcell._files import write_cells
from virtualcell.io._save import save
from virtualcell.tl import _embed

ENDLESS = {"max_steps": 10**5, "validate_every": 10**4, "progress_bar": False, "accelerator": "cpu"}


def disk_is_full(folder: Path, n_bytes: int = 20_000) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def folder_is_read_only(folder: Path) -> None:
    folder.chmod(0o555)
    if os.geteuid() == 0:  # who may write everywhere
        os.setuid(65534)


def saves(folder: Path) -> None:
    save(killed.model(1), folder, overwrite=True)


def writes(folder: Path) -> None:
    adata = killed.cells().copy()
    adata.obsm["new"] = adata.X.toarray()
    write_cells(adata, folder / "written.h5ad")


def fits(folder: Path) -> None:
    training = {"max_steps": 12, "progress_bar": False, "accelerator": "cpu", "checkpoint_every": 0}
    how = {"network": killed.NETWORK, "training": training, "se": False, "validate": False}
    adata = killed.cells().copy()
    vc.tl.fit_state(adata, **killed.DESIGN, **how, checkpoint_dir=folder / "fit")
    assert "st" in adata.uns["virtualcell"]


def fits_while_files_vanish(folder: Path) -> None:
    from virtualcell.models._set_batches import SetBatches

    step = SetBatches.step

    def vanish(self: SetBatches, i: int, *rest: object) -> dict:
        for path in (folder / "fit").glob("*.safetensors"):
            path.unlink()
        return step(self, i, *rest)

    SetBatches.step = vanish
    fits(folder)


def fits_for_ever(folder: Path) -> None:
    how = {"network": killed.NETWORK, "training": ENDLESS, "se": False, "validate": False}
    (folder / "started").touch()
    vc.tl.fit_state(killed.cells().copy(), **killed.DESIGN, **how, checkpoint_dir=folder / "fit")


def fits_for_ever_without_a_folder(folder: Path) -> None:
    how = {"network": killed.NETWORK, "training": ENDLESS, "se": False, "validate": False}
    (folder / "started").touch()
    vc.tl.fit_state(killed.cells().copy(), **killed.DESIGN, **how)


def embeds_for_ever(folder: Path) -> None:
    _embed._PORTION = 8
    adata = ad.concat([killed.cells()] * 500, index_unique="-")
    (folder / "started").touch()
    vc.tl.embed(adata, killed.model(0), to=folder / "embedded.zarr", batch_size=8)


def benchmarks_for_ever(folder: Path) -> None:
    st = ("ST", {"network": killed.NETWORK, "training": {k: v for k, v in ENDLESS.items() if k != "progress_bar"}})
    (folder / "started").touch()
    vc.tl.benchmark(
        killed.cells().copy(), {"ST": st}, **killed.DESIGN, splits={"new": {"contexts": ["type_2"]}}, suite=["mae"]
    )


def downloads(folder: Path, url: str) -> None:
    (folder / "started").touch()
    vc.datasets.fetch(url, known_hash=None, folder=folder / "cache")


def saves_often(folder: Path) -> None:
    for i in range(40):
        save(killed.model(i % 2), folder, overwrite=True)


class Running:
    """A process that does something in a folder, after something has befallen it."""

    def __init__(self, work: Callable, folder: Path, *arguments: object, fault: Callable | None = None) -> None:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["faulty", "virtualcell.tl._fit", "lightning.pytorch"])
        self.said = folder.parent / f"{folder.name}.said"
        self.process = processes.Process(target=_speaking, args=(work, folder, arguments, fault, self.said))
        self.process.start()
        self.started = folder / "started"

    def is_at_it(self, seconds: float = 1.5) -> Running:
        """Wait until the work has begun, and a little longer."""
        while not self.started.exists():
            assert self.process.is_alive(), self.said.read_text()
            time.sleep(0.05)
        time.sleep(seconds)
        assert self.process.is_alive(), self.said.read_text()
        return self

    def end(self) -> tuple[int, str]:
        """Return its status, and what it said."""
        self.process.join(120)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode, self.said.read_text()


def _speaking(work: Callable, folder: Path, arguments: tuple, fault: Callable | None, said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    vc.settings.progress = False
    if fault is not None:
        fault(folder)
    work(folder, *arguments)
