"""What the default says where there is little or nothing to say: simulated screens with a known truth.

    OMP_NUM_THREADS=1 python benchmarks/honesty.py --json benchmarks/results/honesty.json
    ... --only null --max-steps 5       # to try the script out

* null: perturbations without any effect, in a context that was left out. Share of genes that a rank-sum test calls
  (Benjamini-Hochberg, 5 %) between predicted and control cells, share of zeros beside that of observed cells, and the
  ratio of predicted to observed variance.
* batch: perturbations without any effect, each measured in one of two batches; control cells in both. Correlation of
  what is predicted with the difference between the batches, and its size in standard deviations of that difference.
* few: 5, 20 and 60 cells of each of 40 perturbations in three contexts. Squared error of the predicted mean of the
  measured pairs on fresh cells, relative to no change (what the noise of 60 fresh cells adds is in all figures).
* own: effects of which half is a context's own, measured with 500 cells in ten contexts. Squared error of the
  transferred effect for measured pairs, relative to that of the measurement itself.
"""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from _splits import SYNTHETIC, arguments, versions, write
from scipy import sparse

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._effects import Effects
from virtualcell.models._transferred import Transferred

MODELS = ("Additive", "NearestContext")


def training(args, seed: int) -> dict:
    steps = {} if args.max_steps is None else {"max_steps": args.max_steps}
    return {"progress_bar": False, "seed": seed, **steps}


def null(seed: int, args) -> dict:
    adata = vc.datasets.synthetic(
        n_contexts=3, n_perturbations=6, n_genes=2000, n_cells_per_group=100, n_control_cells=300, effect_size=0.0,
        residual_expression=0.999, library_size=3000, n_batches=1, seed=seed,
    )  # fmt: skip
    vc.pp.split(adata, **SYNTHETIC, holdout={"contexts": ["type_3"]})
    suite = ["de_n_predicted", "de_n_observed", "variance_ratio"]
    scores = vc.tl.benchmark(
        adata, list(MODELS), **SYNTHETIC, split_key="split", suite=suite, seeds=(seed,), floor=(), n_top_genes=None,
        ceiling=False,
    )  # fmt: skip
    st = vc.tl.fit_state(
        adata, **SYNTHETIC, split_key="split", se=False, n_top_genes=None, training=training(args, seed)
    )
    here = adata[(adata.obs["cell_type"] == "type_3").to_numpy()]
    predicted = vc.tl.predict_perturbation(here, st.perturbations, model=st, context="type_3")
    ours = vc.tl.evaluate(predicted, here, **SYNTHETIC, scale="counts", suite=suite, genes=list(predicted.var_names))
    table = pd.concat([scores, ours.assign(model="ST")]).pivot_table(index="model", columns="metric", values="value")
    observed = here[(here.obs["target_gene"] != "non-targeting").to_numpy()].X
    return {
        "genes called": (table["de_n_predicted"] / 2000).to_dict(),
        "genes called, observed cells": float(table["de_n_observed"].iloc[0] / 2000),
        "variance ratio": table["variance_ratio"].to_dict(),
        "zeros": {"predicted": zeros(predicted.X), "observed": zeros(observed)},
        "verdict": st.verdict,
    }


def zeros(matrix) -> float:
    return float(1 - sparse.csr_matrix(matrix).count_nonzero() / np.prod(matrix.shape))


def batch(seed: int, args) -> dict:
    rng = np.random.default_rng(seed)
    base, factor = rng.gamma(1, 2, 200), np.exp(rng.normal(0, 0.5, (2, 200)))
    labels = np.r_[np.repeat([f"P{i:02d}" for i in range(12)], 60), np.repeat("control", 400)]
    batches = np.r_[np.repeat(np.arange(12) % 2, 60), np.tile([0, 1], 200)]
    mean = base * factor[batches]
    mean = mean / mean.sum(axis=1, keepdims=True) * 3000
    counts = rng.poisson(mean * rng.gamma(10, 0.1, mean.shape)).astype(np.float32)
    obs = pd.DataFrame({"target": labels, "batch": batches.astype(str)}, index=[f"c{i}" for i in range(len(labels))])
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i:03d}" for i in range(200)]))
    design = {"perturbation_key": "target", "control": "control", "batch_key": "batch"}
    st = vc.tl.fit_state(adata, **design, se=False, n_top_genes=None, training=training(args, seed))
    log = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    shift = log[(labels == "control") & (batches == 1)].mean(axis=0) - log[labels == "control"].mean(axis=0)
    out = {"verdict": st.verdict}
    # the raw output of the model, before effects below their error are taken for none
    start = adata[labels == "control"]
    effects = [
        st.predict(start, f"P{i:02d}").to_numpy().mean(axis=0) - log[labels == "control"].mean(axis=0)
        for i in (1, 3, 5)
    ]
    out["correlation with the batch"] = [correlation(e, shift) for e in effects]
    out["size, in that of the batch"] = [float(np.linalg.norm(e) / np.linalg.norm(shift)) for e in effects]
    return out


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return 0.0 if np.std(a) < 1e-6 else float(np.corrcoef(a, b)[0, 1])


def few(seed: int, args) -> dict:
    out = {}
    for n in (5, 20, 60):
        adata = vc.datasets.synthetic(
            n_contexts=3, n_perturbations=40, n_genes=300, n_cells_per_group=n + 60, n_control_cells=200, seed=seed,
            effect_size=0.15,
        )  # fmt: skip
        group = adata.obs["target_gene"].astype(str) + "|" + adata.obs["cell_type"].astype(str)
        rank, is_control = group.groupby(group).cumcount().to_numpy(), adata.obs["target_gene"] == "non-targeting"
        is_control = is_control.to_numpy()
        learned, fresh = adata[(rank < n) | is_control].copy(), adata[(rank >= n) | is_control].copy()
        st = vc.tl.fit_state(
            learned, **SYNTHETIC, se=False, n_top_genes=None, validate="cells",
            training={**training(args, seed), "val_fraction": 0.0, "min_cells": 1},
        )  # fmt: skip
        measured, truth = (effects_of(a, st.genes) for a in (learned, fresh))
        errors = {"ST": [], "measurement": []}
        total = float(np.square(truth.effects).sum())
        for c, context in enumerate(truth.contexts):
            here = fresh[(fresh.obs["cell_type"] == context).to_numpy()]
            for i in np.flatnonzero(truth.context == c):
                name = truth.perturbations[truth.perturbation[i]]
                cells = st.predict(here, name, context=context).to_numpy()
                errors["ST"].append(np.square(cells.mean(axis=0) - truth.controls[c] - truth.effects[i]).sum())
                errors["measurement"].append(np.square(measured.effects[i] - truth.effects[i]).sum())
        out[f"{n} cells"] = {name: float(np.sum(e) / total) for name, e in errors.items()}
        out[f"{n} cells"]["no change"] = 1.0
    return out


def effects_of(adata: ad.AnnData, genes: list[str]) -> Effects:
    return Effects.measure(Screen.from_anndata(adata, Design(**SYNTHETIC)).select(genes))


def own(seed: int, args) -> dict:
    rng = np.random.default_rng(seed)
    n_contexts, n_perturbations, n_genes, n = 10, 40, 1000, 500
    controls = rng.gamma(1, 1, (n_contexts, n_genes)).astype(np.float32)
    truth = rng.normal(0, 0.2, (1, n_perturbations, n_genes)) + rng.normal(
        0, 0.2, (n_contexts, n_perturbations, n_genes)
    )
    truth = np.maximum(truth, -controls[:, None])
    noise = rng.normal(0, 0.5 / np.sqrt(n), truth.shape)
    measured = (truth + noise).reshape(-1, n_genes).astype(np.float32)
    effects = Effects(
        [f"c{i}" for i in range(n_contexts)], [f"p{i:02d}" for i in range(n_perturbations)],
        np.repeat(np.arange(n_contexts), n_perturbations), np.tile(np.arange(n_perturbations), n_contexts), measured,
        np.full_like(measured, 0.25 / n), np.full(len(measured), n), controls,
    )  # fmt: skip
    fitted = Transferred.fit(effects)
    ours, theirs = [], []
    for c in range(n_contexts):
        for p in range(0, n_perturbations, 5):
            change = fitted(f"p{p:02d}", control="control", context=f"c{c}", base=controls[c])
            ours.append(np.square(change - truth[c, p]).sum())
            theirs.append(np.square(measured[c * n_perturbations + p] - truth[c, p]).sum())
    return {"squared error, relative to the measurement": float(np.sum(ours) / np.sum(theirs))}


CASES = {"null": null, "batch": batch, "few": few, "own": own}


def main() -> None:
    args = arguments(__doc__, list(CASES)).parse_args()
    for name in args.only:
        found = [CASES[name](seed, args) for seed in range(args.seeds)]
        for one in found:
            print(name, one, flush=True)
        write(args.json, name, {"seeds": found, "versions": versions()})


if __name__ == "__main__":
    main()
