from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import virtualcell as vc
from virtualcell.tl import _predicted

# Predicts in portions of few cells, slowly, so that there is time to kill it between two of them.
PROGRAM = """
import sys, time
import anndata as ad
import virtualcell as vc
from virtualcell.tl import _predicted

_predicted._PORTION = 100
write = _predicted._write

def slowly(*arguments):
    time.sleep(0.2)
    write(*arguments)

_predicted._write = slowly
vc.settings.progress = False
vc.tl.predict_perturbation(ad.read_h5ad(sys.argv[1]), to=sys.argv[2])
"""


def same(one: ad.AnnData, other: ad.AnnData) -> None:
    for name in (None, "counts"):
        a, b = (x.X if name is None else x.layers[name] for x in (one, other))
        assert sparse.issparse(a) == sparse.issparse(b)
        np.testing.assert_array_equal(a.toarray(), b.toarray())
    pd.testing.assert_frame_equal(one.obs, other.obs, check_categorical=False)
    assert list(one.var_names) == list(other.var_names)
    for key in ("change", "standard_error"):
        np.testing.assert_array_equal(one.varm[key], other.varm[key])
    groups = [x.uns["virtualcell"]["groups"] for x in (one, other)]
    assert groups[0].astype(str).to_numpy().tolist() == groups[1].astype(str).to_numpy().tolist()
    assert one.uns["virtualcell"]["predicted_by"] == other.uns["virtualcell"]["predicted_by"]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_on_disk_it_is_the_same_as_in_memory(fitted, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(_predicted, "_PORTION", 100)
    path = tmp_path / f"predicted{suffix}"
    memory = vc.tl.predict_perturbation(fitted)
    disk = vc.tl.predict_perturbation(fitted, to=path)
    assert not sparse.issparse(disk.X)  # it stays where it is
    assert "control" not in disk.layers
    same(disk.to_memory(), memory)
    same(ad.read_h5ad(path) if suffix == ".h5ad" else ad.read_zarr(path), memory)
    with pytest.raises(FileExistsError, match="is there already"):
        vc.tl.predict_perturbation(fitted, to=path)


def test_groups_that_are_predicted_together_are_those_predicted_one_after_the_other(fitted):
    """Whatever the number of threads, and of cells that may be in memory at a time."""
    with vc.settings.override(n_threads=1):
        one = vc.tl.predict_perturbation(fitted)
    with vc.settings.override(n_threads=4):
        same(vc.tl.predict_perturbation(fitted), one)
    with vc.settings.override(n_threads=4, max_memory=1e-6):
        same(vc.tl.predict_perturbation(fitted), one)


def test_means_on_disk_are_those_in_memory(fitted, tmp_path):
    memory = vc.tl.predict_perturbation(fitted, emit="mean", n_samples=4)
    disk = vc.tl.predict_perturbation(fitted, emit="mean", n_samples=4, to=tmp_path / "means.h5ad").to_memory()
    np.testing.assert_array_equal(disk.X.toarray(), memory.X.toarray())
    np.testing.assert_array_equal(disk.layers["control"].toarray(), memory.layers["control"].toarray())
    np.testing.assert_array_equal(disk.obs["expected_error"], memory.obs["expected_error"])


def test_a_killed_prediction_goes_on_where_it_was(fitted, tmp_path, caplog):
    data, path = tmp_path / "data.h5ad", tmp_path / "predicted.zarr"
    fitted.write_h5ad(data)
    progress = tmp_path / "predicted.zarr.part" / "progress.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(vc.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, data, path], env=environment)
    deadline = time.monotonic() + 120
    while not (progress.exists() and json.loads(progress.read_text())["portions"] >= 2):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    n_cells = json.loads(progress.read_text())["cells"]
    assert not path.exists()
    with pytest.raises(ValueError, match="another result, of other cells, another model or other options"):
        vc.tl.predict_perturbation(ad.read_h5ad(data), to=path, seed=1)
    with caplog.at_level("INFO", logger="virtualcell"):
        disk = vc.tl.predict_perturbation(ad.read_h5ad(data), to=path)
    assert f"goes on behind {n_cells} cells" in caplog.text
    same(disk.to_memory(), vc.tl.predict_perturbation(fitted))


class Killed(BaseException):
    """The process dies."""


def test_it_goes_on_with_the_same_model_set_up_anew_or_read_from_a_file(screen, design, tmp_path, monkeypatch, caplog):
    """scvi-tools numbers every set-up, and the number says nothing about a model."""

    def model() -> vc.models.ST:
        adata = screen.copy()
        vc.models.ST.setup_anndata(adata, **design, scale="counts", split_key="split")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            st = vc.models.ST(adata, n_hidden=32, n_feedforward=64, n_layers=1)
        st.train(max_steps=2, progress_bar=False, accelerator="cpu", seed=0)
        return st

    def interrupted(path: Path, st: vc.models.ST) -> None:
        def dies(*arguments):
            if arguments[0].n_portions == 2:
                raise Killed
            write(*arguments)

        write = _predicted._write
        with monkeypatch.context() as patch:
            patch.setattr(_predicted, "_write", dies)
            with pytest.raises(Killed):
                vc.tl.predict_perturbation(screen, model=st, to=path)

    monkeypatch.setattr(_predicted, "_PORTION", 100)
    first, again = model(), model()
    assert first.registry["_scvi_uuid"] != again.registry["_scvi_uuid"]
    first.save(tmp_path / "model")
    expected = vc.tl.predict_perturbation(screen, model=first)
    for name, same_model in (("anew", again), ("read", vc.models.ST.load(tmp_path / "model", screen))):
        path = tmp_path / f"{name}.zarr"
        interrupted(path, first)
        caplog.clear()
        with caplog.at_level("INFO", logger="virtualcell"):
            found = vc.tl.predict_perturbation(screen, model=same_model, to=path)
        assert f"{name}.zarr goes on behind" in caplog.text
        same(found.to_memory(), expected)
    interrupted(tmp_path / "other.zarr", first)
    again.train(max_steps=3, progress_bar=False, accelerator="cpu", seed=1)
    with pytest.raises(ValueError, match="another model"):
        vc.tl.predict_perturbation(screen, model=again, to=tmp_path / "other.zarr")
