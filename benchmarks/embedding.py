"""SE beside PCA on cell types, what SE adds to the time of `fit_state`, and the round trip of a model through a file.

python benchmarks/embedding.py --data ../shared/data [--json benchmarks/results/embedding.json] [--only embedding ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from sklearn.neighbors import KNeighborsClassifier

import virtualcell as vc

QUIET = {"progress_bar": False}
SCREEN = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}


def normalised(adata: ad.AnnData) -> ad.AnnData:
    logs = ad.AnnData(adata.X.copy(), obs=adata.obs, var=adata.var)
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    return logs


def accuracy(x: np.ndarray, adata: ad.AnnData) -> float:
    """Share of cells whose type 15 nearest neighbours from the other donors tell, averaged over donors."""
    donors, types = adata.obs["batch"].to_numpy(), adata.obs["cell_type"].to_numpy()
    shares = []
    for donor in np.unique(donors):
        out = donors == donor
        found = KNeighborsClassifier(15).fit(x[~out], types[~out]).predict(x[out])
        shares.append((found == types[out]).mean())
    return float(np.mean(shares))


def fitted_se(adata: ad.AnnData, table: pd.DataFrame, seed: int) -> tuple[vc.models.SE, float]:
    """Return an SE with the default options, and the seconds of its training."""
    vc.models.SE.setup_anndata(adata)
    torch.manual_seed(seed)
    se = vc.models.SE(adata, table)
    start = time.perf_counter()
    se.train(seed=seed, **QUIET)
    return se, time.perf_counter() - start


def embedding(folder: Path) -> dict:
    """Return the kNN accuracy of cell type in a donor that the classifier has not seen: SE beside PCA."""
    adata = ad.read_h5ad(folder / "kang2018_pbmc_control.h5ad")
    logs = normalised(adata)
    sc.pp.pca(logs, n_comps=50)
    start = time.perf_counter()
    table = vc.pp.expression_gene_embeddings(adata)
    of_table = time.perf_counter() - start
    runs = []
    for seed in range(3):
        se, of_training = fitted_se(adata, table, seed)
        start = time.perf_counter()
        vc.tl.embed(adata, se)
        of_embedding = time.perf_counter() - start
        run = {"accuracy": accuracy(adata.obsm["X_state"], adata), "training": of_training, "embedding": of_embedding}
        runs.append(run)
        print(
            f"seed {seed}: accuracy {run['accuracy']:.4f}; training {of_training:.0f} s, {of_embedding:.0f} s to embed"
        )
    out = {
        "SE": float(np.mean([run["accuracy"] for run in runs])),
        "SE_by_seed": [run["accuracy"] for run in runs],
        "PCA-50": accuracy(logs.obsm["X_pca"], adata),
        "steps": int(se.history["train_loss"].index[-1]),
        "seconds_of_gene_table": of_table,
        "seconds_of_training": [run["training"] for run in runs],
        "seconds_of_embedding": [run["embedding"] for run in runs],
    }
    print(
        "\n== Kang control cells, 15-NN accuracy of cell type, one of 5 donors held out at a time, SE: mean of 3 seeds"
    )
    print({k: round(out[k], 4) for k in ("SE", "PCA-50")})
    return out


def cost(folder: Path) -> dict:
    """Return what the SE of `fit_state` adds to its time on a small screen, everything by default."""
    adata = ad.read_h5ad(folder / "kang2018_pbmc_ifnb.h5ad")
    out: dict = {"threads": torch.get_num_threads()}
    vc.tl.fit_state(adata[::4].copy(), **SCREEN, training={"max_steps": 2, **QUIET}, se={"max_steps": 2})  # imports
    for name, options in (("with SE", {}), ("without SE", {"se": False})):
        wall, cpu = time.perf_counter(), time.process_time()
        vc.tl.fit_state(adata.copy(), **SCREEN, **options, training=QUIET)
        out[name] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    for clock in ("seconds", "cpu_seconds"):
        out[f"added, {clock}"] = out["with SE"][clock] / out["without SE"][clock] - 1
    print(f"\n== fit_state on {adata.n_obs} cells x {adata.n_vars} genes: {json.dumps(out)}")
    return out


def round_trip(folder: Path) -> dict:
    """Save, load in a new process without the data, predict the same cells."""
    adata = ad.read_h5ad(folder / "kang2018_pbmc_ifnb.h5ad")
    st = vc.tl.fit_state(adata, **SCREEN, se=False, training={"max_steps": 50, **QUIET})
    with tempfile.TemporaryDirectory() as tmp:
        st.save(f"{tmp}/model")
        fresh = ad.read_h5ad(folder / "kang2018_pbmc_ifnb.h5ad")
        fresh[(fresh.obs["perturbation"] == "control").to_numpy()].write_h5ad(f"{tmp}/controls.h5ad")
        code = (
            "import sys, anndata, torch, virtualcell as vc; torch.set_num_threads(int(sys.argv[2]));"
            "st = vc.models.ST.load(sys.argv[1] + '/model');"
            "cells = anndata.read_h5ad(sys.argv[1] + '/controls.h5ad');"
            "vc.tl.predict_perturbation(cells, 'IFN-beta', model=st).write_h5ad(sys.argv[1] + '/out.h5ad')"
        )
        # float32 sums depend on how many threads share them in the last digit
        threads = str(torch.get_num_threads())
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp, threads], check=True)
        there = ad.read_h5ad(f"{tmp}/out.h5ad")
    here = vc.tl.predict_perturbation(adata, "IFN-beta")
    theirs, ours = (one.X.toarray() for one in (there, here[there.obs_names, there.var_names]))
    same = bool(np.array_equal(ours, theirs))
    print("\n== Round trip: saved, loaded in a new process without the data: same predictions bit for bit:", same)
    return {"bit_for_bit": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=["embedding", "cost", "round_trip"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    steps = {
        "embedding": lambda: embedding(args.data),
        "cost": lambda: cost(args.data),
        "round_trip": lambda: round_trip(args.data),
    }
    results = {name: step() for name, step in steps.items() if args.only is None or name in args.only}
    if args.json:
        if args.only is not None and args.json.exists():  # the other figures stay
            results = {**json.loads(args.json.read_text()), **results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
