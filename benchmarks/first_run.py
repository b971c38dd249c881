"""The main job on real cells: ST in unseen contexts beside baselines, SE beside PCA, and the round trip through a file.

    python benchmarks/first_run.py --data ../shared/data [--json benchmarks/results/first_run.json] [--only kang ...]

Nothing is tuned on test cells: splits are fixed beforehand, genes are chosen on training cells, and every model runs
with the defaults of the package. "ceiling" is the real data against itself: half of the perturbed cells predicts the
other half.
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
import mudata as md
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from sklearn.neighbors import KNeighborsClassifier

import virtualcell as vc

# the strong ones first
PAPALEXI_STRONG = ["STAT1", "JAK2", "IFNGR1", "IFNGR2", "SMAD4", "IRF1", "STAT2", "CUL3", "BRD4"]
PAPALEXI_HELD_OUT = [*PAPALEXI_STRONG, "ATF2", "CD86", "ETV7", "MARCH8", "PDCD1LG2", "SPI1", "STAT3", "UBE2L6"]
METRICS = ["pearson_delta", "mae", "energy_distance"]
QUIET = {"enable_progress_bar": False, "se": False}


# residual, weight of the set-mean loss
FORMS = {"ST": ("expression", 1.0), "ST as published": ("hidden", 0.0)}


def models(adata: ad.AnnData, keys: dict, seed: int) -> dict:
    """Fit the forms of ST through `fit_state`, and the baselines on the same normalised matrix."""
    fitted, seconds = {}, {}
    for name, (residual, mean_weight) in FORMS.items():
        start = time.perf_counter()
        fitted[name] = vc.tl.fit_state(
            adata,
            **keys,
            **QUIET,
            seed=seed,
            model_kwargs={"residual": residual},
            train_kwargs={"mean_weight": mean_weight},
        )
        seconds[name] = time.perf_counter() - start
    genes = fitted["ST"].genes
    normalised = lognormal(adata, genes, keys)
    for baseline in (vc.models.NoChange, vc.models.PerturbationMean, vc.models.Additive):
        names = ("perturbation_key", "control", "context_key", "split_key")
        baseline.setup_anndata(normalised, **{k: keys[k] for k in names})
        fitted[baseline.__name__] = baseline(normalised)
        fitted[baseline.__name__].train()
    return {"models": fitted, "cells": normalised, "seconds": seconds}


def lognormal(adata: ad.AnnData, genes: list[str], keys: dict) -> ad.AnnData:
    """log1p CP10k of some genes, library size over all genes or as stated, with scanpy alone."""
    size = np.asarray(adata.X.sum(axis=1)).ravel()
    if "library_size_key" in keys:
        size = adata.obs[keys["library_size_key"]].to_numpy()
    out = ad.AnnData(adata[:, genes].X.multiply(1e4 / size[:, None]).tocsr().log1p(), obs=adata.obs.copy())
    out.X = out.X.astype(np.float32)
    out.var_names = genes
    return out


def score(run: dict, keys: dict, perturbation: str, context: str, seed: int) -> list[dict]:
    """Score every model, and the ceiling, on the test cells of one perturbation and context."""
    cells = run["cells"]
    obs = cells.obs
    here = (obs[keys["context_key"]] == context).to_numpy()
    control = cells.X[here & (obs[keys["perturbation_key"]] == keys["control"]).to_numpy()].toarray().mean(axis=0)
    observed = cells.X[here & (obs[keys["perturbation_key"]] == perturbation).to_numpy()].toarray()
    halves = np.random.default_rng(seed).permutation(len(observed))
    half = observed[halves[: len(observed) // 2]], observed[halves[len(observed) // 2 :]]
    predictions = {
        name: (model.predict(cells, perturbation, context=context, seed=seed).to_numpy(), observed)
        for name, model in run["models"].items()
    }
    predictions["ceiling (half against half)"] = half
    rows = []
    for name, (predicted, real) in predictions.items():
        rows.append(
            {
                "model": name,
                "context": context,
                "perturbation": perturbation,
                "seed": seed,
                "pearson_delta": vc.metrics.pearson_delta(predicted.mean(0), real.mean(0), control),
                "mae": vc.metrics.mae(predicted.mean(0), real.mean(0)),
                "energy_distance": vc.metrics.energy_distance(predicted, real),
                "profiles": (predicted.mean(0), real.mean(0), control),
            }
        )
    return rows


def kang(folder: Path, seeds: range) -> dict:
    """Hold out the IFN-beta cells of one cell type at a time; its control cells stay."""
    adata = ad.read_h5ad(folder / "kang2018_pbmc_ifnb.h5ad")
    keys = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}
    rows, seconds = [], []
    for context in sorted(adata.obs["cell_type_coarse"].unique()):
        vc.pp.split(adata, **keys, holdout={"contexts": [context]})
        for seed in seeds:
            run = models(adata, {**keys, "split_key": "split"}, seed)
            seconds.append(run["seconds"]["ST"])
            rows += score(run, keys, "IFN-beta", context, seed)
    table = pd.DataFrame(rows).drop(columns="profiles")
    print("\n== Kang, IFN-beta in a cell type where it was never seen; mean over six types", f"and {len(seeds)} seeds")
    print(table.groupby("model")[METRICS].mean().round(4).to_string())
    by_type = table.pivot_table(index="context", columns="model", values="pearson_delta")
    print("\nPearson delta by type\n" + by_type.round(3).to_string())
    print("spread of the mean over seeds:", spread(table), f"\nslowest fit: {max(seconds):.0f} s")
    return {
        "mean": table.groupby("model")[METRICS].mean().to_dict("index"),
        "pearson_delta_by_type": by_type.to_dict("index"),
        "types_above_additive": int((by_type["ST"] > by_type["Additive"]).sum()),
        "slowest_fit_seconds": max(seconds),
    }


def papalexi(folder: Path, seeds: range) -> dict:
    """Replicate 3 as the new context: 17 of its 25 targets are unseen there."""
    adata = md.read_h5mu(folder / "papalexi2021_thp1_eccite.h5mu").mod["rna"]
    adata = adata[adata.obs["guide_confident"].to_numpy()].copy()
    keys = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "batch"}
    vc.pp.split(adata, **keys, holdout={"contexts": ["rep_3"], "perturbations": PAPALEXI_HELD_OUT})
    keys |= {"library_size_key": "total_counts"}
    rows = []
    for seed in seeds:
        run = models(adata, {**keys, "split_key": "split"}, seed)
        scored = [r for p in PAPALEXI_HELD_OUT for r in score(run, keys, p, "rep_3", seed)]
        for name in dict.fromkeys(r["model"] for r in scored):
            own = [r for r in scored if r["model"] == name]
            predicted, real, control = (np.stack(x) for x in zip(*(r["profiles"] for r in own), strict=True))
            for r, d in zip(
                own, vc.metrics.discrimination_score(predicted, real, control, metric="cosine"), strict=True
            ):
                r["discrimination_cosine"] = d
        rows += scored
    table = pd.DataFrame(rows).drop(columns="profiles")
    metrics = [*METRICS, "discrimination_cosine"]
    out = {}
    for name, which in (("all 17 targets", PAPALEXI_HELD_OUT), ("strong targets", PAPALEXI_STRONG)):
        part = table[table["perturbation"].isin(which)]
        print(f"\n== Papalexi, replicate 3, {name}; mean over {len(seeds)} seeds")
        print(part.groupby("model")[metrics].mean().round(4).to_string())
        print("spread of the mean over seeds:", spread(part))
        out[name] = part.groupby("model")[metrics].mean().to_dict("index")
    return out


def spread(table: pd.DataFrame) -> dict[str, float]:
    """Return the standard deviation over seeds of the mean Pearson delta of the default ST."""
    means = table[table["model"] == "ST"].groupby("seed")[METRICS].mean()
    return {m: round(float(means[m].std(ddof=0)), 4) for m in METRICS}


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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["kang", "papalexi", "embedding", "round_trip"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    steps = {
        "kang": lambda: kang(args.data, range(args.seeds)),
        "papalexi": lambda: papalexi(args.data, range(args.seeds)),
        "embedding": lambda: embedding(args.data),
        "round_trip": lambda: round_trip(args.data),
    }
    results = {name: step() for name, step in steps.items() if args.only is None or name in args.only}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
