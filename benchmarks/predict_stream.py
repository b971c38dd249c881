"""Cells of many perturbations, predicted to disk: seconds, memory and bytes.

    python benchmarks/predict_stream.py --json benchmarks/results/predict_stream.json

A screen of one context with 500 control cells x 2,000 genes; a model that has learned 2,000 perturbations predicts 500
cells of each in a process of its own, so that the peak of its memory is that of the prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import torch

import virtualcell as vc

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}


def prepare(folder: Path, n_perturbations: int, n_cells: int, n_genes: int) -> None:
    """Write control cells, and a model that was fitted on few cells of each perturbation."""
    # targets are drawn from half of the genes: guides of two names for each make twice as many perturbations
    adata = vc.datasets.synthetic(
        n_contexts=1, n_perturbations=n_perturbations // 2, n_genes=n_genes, n_cells_per_group=20,
        n_control_cells=n_cells, seed=0,
    )  # fmt: skip
    target = adata.obs["target_gene"].astype(str)
    is_second = (target != "non-targeting") & (adata.obs.groupby(target).cumcount() % 2 == 1)
    adata.obs["target_gene"] = np.where(is_second, target + " (2)", target)
    quick = {"max_steps": 100, "val_fraction": 0.0, "progress_bar": False}
    st = vc.tl.fit_state(adata, **DESIGN, se=False, validate=False, n_top_genes=None, training=quick)
    st.save(folder / "model")
    controls = adata[adata.obs["target_gene"] == "non-targeting"].copy()
    controls.uns.clear()
    controls.write_h5ad(folder / "controls.h5ad")


def peak_gb() -> float:
    """Return the most memory that this process had; what getrusage says holds the parent's, from before it began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 2)


def predict(folder: Path, suffix: str) -> None:
    """Predict in this process, and print what it took."""
    vc.settings.progress = False
    controls, model = ad.read_h5ad(folder / "controls.h5ad"), vc.models.ST.load(folder / "model")
    # what is compiled once in an installation is not part of it
    vc.tl.predict_perturbation(controls, model.perturbations[:2], model=model)
    before = peak_gb()
    to = folder / f"predicted{suffix}"
    started, cpu = time.perf_counter(), time.process_time()
    out = vc.tl.predict_perturbation(controls, model=model, to=to)
    found = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "cells": out.n_obs,
        "genes": out.n_vars,
        "genes_changed_per_group": round(float((out.varm["change"] != 0).sum(axis=0).mean()), 1),
        "entries_per_cell": round(out.X[:2000].nnz / 2000, 1),
        "peak_gb": peak_gb(),
        "peak_gb_before": before,
        "file_gb": round(
            sum(f.stat().st_size for f in ([to] if to.is_file() else to.rglob("*")) if f.is_file()) / 1e9, 2
        ),
        "dense_gb": round(out.n_obs * out.n_vars * 4 / 1e9, 2),
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perturbations", type=int, default=2000)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--suffixes", nargs="+", default=[".zarr", ".h5ad"])
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "SUFFIX"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.child:
        predict(Path(args.child[0]), args.child[1])
        return
    folder = Path(tempfile.mkdtemp())
    try:
        prepare(folder, args.perturbations, args.cells, args.genes)
        found = {"perturbations": args.perturbations, "threads": torch.get_num_threads(), "numpy": np.__version__}
        for suffix in args.suffixes:
            found["load_before"] = round(os.getloadavg()[0], 1)
            run = [sys.executable, __file__, "--child", str(folder), suffix]
            found[suffix] = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
            print(suffix, found[suffix])
            to = folder / f"predicted{suffix}"
            shutil.rmtree(to) if to.is_dir() else to.unlink()
    finally:
        shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
