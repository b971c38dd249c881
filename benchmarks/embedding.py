"""SE beside PCA on cell types, and the round trip of a fitted model through a file.

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
import scanpy as sc
import torch
from sklearn.neighbors import KNeighborsClassifier

import virtualcell as vc

QUIET = {"enable_progress_bar": False, "se": False}


def embedding(folder: Path) -> dict:
    """Return the kNN accuracy of cell type in a donor that the classifier has not seen: SE beside PCA."""
    adata = ad.read_h5ad(folder / "kang2018_pbmc_control.h5ad")
    start = time.perf_counter()
    vc.models.SE.setup_anndata(adata)
    se = vc.models.SE(adata, vc.pp.expression_gene_embeddings(adata))
    se.train(enable_progress_bar=False)
    vc.tl.embed(adata, se)
    seconds = time.perf_counter() - start
    logs = ad.AnnData(adata.X.copy(), obs=adata.obs, var=adata.var)
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    sc.pp.pca(logs, n_comps=50)
    out = {}
    for name, x in (("SE", adata.obsm["X_state"]), ("PCA-50", logs.obsm["X_pca"])):
        donors, types = adata.obs["batch"].to_numpy(), adata.obs["cell_type"].to_numpy()
        folds = [
            (
                KNeighborsClassifier(15).fit(x[donors != d], types[donors != d]).predict(x[donors == d])
                == types[donors == d]
            )
            for d in np.unique(donors)
        ]
        out[name] = float(np.mean([f.mean() for f in folds]))
    print(
        f"\n== Kang control cells, 15-NN accuracy of cell type, one of 5 donors held out at a time; SE: {seconds:.0f} s"
    )
    print({k: round(v, 4) for k, v in out.items()})
    return {**out, "seconds": seconds}


def round_trip(folder: Path) -> dict:
    """Save, load in a new process without the data, predict the same cells."""
    adata = ad.read_h5ad(folder / "kang2018_pbmc_ifnb.h5ad")
    keys = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}
    st = vc.tl.fit_state(adata, **keys, max_steps=50, **QUIET)
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
    same = bool(np.array_equal(here[there.obs_names, there.var_names].X, there.X))
    print("\n== Round trip: saved, loaded in a new process without the data: same predictions bit for bit:", same)
    return {"bit_for_bit": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=["embedding", "round_trip"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    steps = {
        "embedding": lambda: embedding(args.data),
        "round_trip": lambda: round_trip(args.data),
    }
    results = {name: step() for name, step in steps.items() if args.only is None or name in args.only}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
