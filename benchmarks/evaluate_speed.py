"""How long the full suite of `vc.tl.evaluate` takes beside `cell-eval --profile full`, on the same cells and cores.

    python benchmarks/evaluate_speed.py [--json benchmarks/results/evaluate_speed.json] [--threads 2] [--rounds 5]

Both score the same made-up screen (negative binomial counts, log1p CP10k, sparse), with predicted control cells, which
cell-eval requires. Each is called once on a small screen first, so that compilation (which takes cell-eval far longer)
and imports are not counted; what that call took is given too. They then take turns, and medians are given: of the
seconds, and of the ratios within each round. Shared metrics are compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from cell_eval import MetricsEvaluator
from scipy import sparse
from threadpoolctl import threadpool_limits

import virtualcell as vc
from virtualcell.tl._scores import SUITES

SHARED = {"mae": "mae", "pearson_delta": "pearson_delta", "overlap_at_N": "de_overlap", "roc_auc": "roc_auc"}


# What cell-eval does not have.
EXTRA = {"energy_distance", "energy_distance_pca", "mmd", "variance_ratio", "top50_overlap"}
EXTRA |= {"pearson_delta_top50_de", "pearson_delta_top100_de", "pdisc_norm_l1", "pdisc_norm_cosine"}


def screen(n_cells: int, n_genes: int, n_perturbations: int, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Draw two samples of one made-up screen, of which the first serves as the prediction of the second."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(0.5, 1.0, n_genes)
    profiles = np.tile(base, (n_perturbations + 1, 1))
    for profile in profiles[1:]:
        profile[rng.choice(n_genes, n_genes // 30, replace=False)] *= np.exp(rng.normal(0, 1, n_genes // 30))
    profiles /= profiles.sum(axis=1, keepdims=True)
    names = np.array(["control", *(f"gene_{i}" for i in range(n_perturbations))])
    codes = np.sort(np.arange(n_cells) % len(names))

    def sample() -> ad.AnnData:
        blocks = []
        for code, profile in enumerate(profiles):
            mean = rng.lognormal(np.log(4000), 0.3, ((codes == code).sum(), 1)) * profile
            blocks.append(sparse.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2)).astype(np.float32)))
        counts = sparse.vstack(blocks, format="csr")
        matrix = sparse.csr_matrix(counts.multiply(1e4 / counts.sum(axis=1))).log1p().astype(np.float32)
        obs = pd.DataFrame({"target": pd.Categorical(names[codes])}, index=[f"cell_{i}" for i in range(n_cells)])
        return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"gene_{i}" for i in range(n_genes)]))

    return sample(), sample()


def ours(predicted: ad.AnnData, observed: ad.AnnData, threads: int, *, shared_only: bool = False) -> pd.DataFrame:
    suite = [m for m in SUITES["full"] if m not in EXTRA] if shared_only else "full"
    keys = {"perturbation_key": "target", "control": "control", "scale": "log1p"}
    with threadpool_limits(1):  # threads go over perturbations
        scores = vc.tl.evaluate(predicted, observed, **keys, suite=suite, predicted_control=True, n_jobs=threads)
    return scores.pivot(index="perturbation", columns="metric", values="value").drop(index="(all)")


def theirs(predicted: ad.AnnData, observed: ad.AnnData, threads: int) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        run = MetricsEvaluator(
            predicted, observed, control_pert="control", pert_col="target", num_threads=threads, outdir=folder
        )
        results, _ = run.compute(profile="full", break_on_error=True)
    return pd.DataFrame(results.to_dict(as_series=False)).set_index("perturbation")


def timed(function: Callable, *args: object) -> tuple[pd.DataFrame, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = function(*args)
    return out, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--genes", type=int, default=6_000)
    parser.add_argument("--perturbations", type=int, default=50)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    small, full = screen(600, 300, 5, seed=1), screen(args.cells, args.genes, args.perturbations, seed=0)
    density = full[1].X.nnz / np.prod(full[1].shape)
    results: dict = {"cells": args.cells, "genes": args.genes, "perturbations": args.perturbations}
    results |= {"density": float(density), "threads": args.threads, "load_before": os.getloadavg()[0]}
    scores = {}
    calls = {"virtualcell": ours, "virtualcell_shared_metrics": partial(ours, shared_only=True), "cell_eval": theirs}
    first = {name: timed(function, *(s.copy() for s in small), args.threads)[1] for name, function in calls.items()}
    runs: dict[str, list] = {name: [] for name in calls}
    for _ in range(args.rounds):  # in turns, because the machine is not equally fast all the time
        for name, function in calls.items():
            scores[name], run = timed(function, *(s.copy() for s in full), args.threads)
            runs[name].append(run)
    for name in calls:
        results[name] = {k: float(np.median([r[k] for r in runs[name]])) for k in ("seconds", "cpu_seconds")}
        results[name] |= {"all_seconds": [r["seconds"] for r in runs[name]]}
        results[name] |= {"first_call_on_600_cells": first[name]["seconds"]}

    def ratio(name: str, of: str = "seconds") -> float:
        pairs = zip(runs["cell_eval"], runs[name], strict=True)
        return float(np.median([theirs[of] / ours[of] for theirs, ours in pairs]))

    results["ratio"] = ratio("virtualcell")
    results["ratio_shared_metrics"] = ratio("virtualcell_shared_metrics")
    results["ratio_of_cpu"] = ratio("virtualcell", "cpu_seconds")
    results["largest_difference"] = {
        their: float((scores["cell_eval"][their].astype(float) - scores["virtualcell"][our]).abs().max())
        for their, our in SHARED.items()
    }
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
