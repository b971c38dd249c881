"""The main job from end to end: split, fit, predict, compare with the baselines, draw. `make demo` runs it.

Without arguments it works on a simulated screen, and predicts a cell type whose perturbed cells it has not seen.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import scanpy as sc

import virtualcell as vc

MAX_CELLS = 500  # predicted for each perturbation of a context, so that the file of a large screen stays small
SE_STEPS = 300  # a third of the default: enough to look at X_state, and the demo stays under four minutes on two cores
BASELINES = {
    "additive": vc.models.Additive,
    "perturbation mean": vc.models.PerturbationMean,
    "no change": vc.models.NoChange,
}


def main() -> None:
    """Run the demo."""
    args = arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("virtualcell").setLevel(logging.INFO)
    mpl.use("agg")
    start = time.perf_counter()

    adata = ad.read_h5ad(args.data) if args.data else vc.datasets.synthetic(seed=0)
    print(f"{args.data or 'Simulated screen'}: {adata.n_obs:,} cells, {adata.n_vars:,} genes")
    if args.context_key is None:
        args.context_key = "context"
        adata.obs[args.context_key] = "all"
    design = {"perturbation_key": args.perturbation_key, "control": args.control, "context_key": args.context_key}
    vc.pp.split(adata, **design, holdout=holdout(adata, args))
    st = vc.tl.fit_state(adata, **design, scale=args.scale, split_key="split", se={"max_steps": SE_STEPS})
    pairs = test_pairs(adata, st)
    predicted = predict(adata, pairs, design)
    scores = compare(adata, predicted, pairs, design, args.scale)

    args.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.output / "model", ignore_errors=True)
    st.save(args.output / "model")
    predicted.write_h5ad(args.output / "predictions.h5ad")
    scores.to_csv(args.output / "scores.csv", index=False)
    draw(adata, predicted, st, scores, args.output)
    report(scores, args.output, time.perf_counter() - start)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an h5ad of a screen; a simulated one by default")
    parser.add_argument("--perturbation-key", help="column of obs with the perturbations")
    parser.add_argument("--control", help="label of the control cells in that column")
    parser.add_argument("--context-key", help="column of obs with the contexts, such as cell types")
    parser.add_argument("--holdout", help="context(s) to predict unseen, separated by commas; by default the largest")
    parser.add_argument("--scale", choices=["counts", "log1p"], default="counts", help="what X holds")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write to")
    args = parser.parse_args()
    if args.data is None:
        args.perturbation_key, args.control, args.context_key = "target_gene", "non-targeting", "cell_type"
    elif args.perturbation_key is None or args.control is None:
        parser.error("a file needs PERTURBATION_KEY (--perturbation-key) and CONTROL (--control) beside it")
    if args.holdout and args.context_key is None:
        parser.error("HOLDOUT (--holdout) names contexts: say which column they are in, CONTEXT_KEY (--context-key)")
    return args


def holdout(adata: ad.AnnData, args: argparse.Namespace) -> dict:
    """Choose what to hold out: a whole context where there are several, else a fifth of the cells."""
    if args.holdout:
        return {"contexts": args.holdout.split(",")}
    if adata.obs[args.context_key].nunique() > 1:
        return {"contexts": [str(adata.obs[args.context_key].value_counts().index[0])]}
    print("One context only: a fifth of the cells is held out, so the scores say nothing about new contexts.")
    return {"fraction": 0.2}


def test_pairs(adata: ad.AnnData, st: vc.models.ST) -> pd.DataFrame:
    """List the (context, perturbation) pairs with test cells whose perturbation the model has seen."""
    groups = adata.uns["virtualcell"]["split_manifest"]["split"]["groups"]
    pairs = groups.loc[groups["split"] == "test", ["context", "perturbation"]]
    seen = pairs["perturbation"].isin(st.table.seen)
    if not seen.all():
        print("Too few training cells to be predicted:", ", ".join(sorted(set(pairs["perturbation"][~seen]))))
    return pairs[seen]


def predict(adata: ad.AnnData, pairs: pd.DataFrame, design: dict) -> ad.AnnData:
    """Predict every pair with the model that `fit_state` left."""
    parts = [
        vc.tl.predict_perturbation(adata, sorted(names), context=context, n_cells=n_cells(adata, design, context))
        for context, names in pairs.groupby("context")["perturbation"]
    ]
    return parts[0] if len(parts) == 1 else ad.concat(parts, uns_merge="first")


def n_cells(adata: ad.AnnData, design: dict, context: str) -> int:
    """Count the cells to predict: one for each control cell, within reason."""
    return min(int(members(adata, design, design["control"], context).sum()), MAX_CELLS)


def compare(adata: ad.AnnData, predicted: ad.AnnData, pairs: pd.DataFrame, design: dict, scale: str) -> pd.DataFrame:
    """Score ST and the baselines on each pair, against the mean of its test cells."""
    logged = adata.copy()
    if scale == "counts":
        sc.pp.normalize_total(logged, target_sum=1e4)
        sc.pp.log1p(logged)
    logged = logged[:, predicted.var_names].copy()
    baselines = {}
    for name, model in BASELINES.items():
        model.setup_anndata(logged, **design, split_key="split")
        baselines[name] = model(logged)
        baselines[name].train()

    rows = []
    for context, perturbation in pairs.itertuples(index=False):
        control = mean(logged[members(logged, design, design["control"], context)])
        observed = mean(logged[members(logged, design, perturbation, context) & (logged.obs["split"] == "test")])
        n = n_cells(logged, design, context)
        means = {"ST": mean(predicted[members(predicted, design, perturbation, context)])}
        for name, model in baselines.items():
            means[name] = model.predict(perturbation=perturbation, context=context, n_cells=n).mean().to_numpy()
        for name, guess in means.items():
            rows.append(
                {
                    "predictor": name,
                    "context": context,
                    "perturbation": perturbation,
                    "pearson_delta": vc.metrics.pearson_delta(guess, observed, control),
                    "mae": vc.metrics.mae(guess, observed),
                    "effect": abs(observed - control).mean(),
                }
            )
    return pd.DataFrame(rows)


def members(adata: ad.AnnData, design: dict, perturbation: str, context: str) -> pd.Series:
    """Mark the cells of a perturbation in a context."""
    wanted = {design["perturbation_key"]: perturbation, design["context_key"]: context}
    return (adata.obs[list(wanted)].astype(str) == pd.Series(wanted)).all(axis=1)


def mean(adata: ad.AnnData):
    """Mean of each gene over the cells."""
    return adata.to_df().mean().to_numpy()


def draw(adata: ad.AnnData, predicted: ad.AnnData, st: vc.models.ST, scores: pd.DataFrame, out: Path) -> None:
    """Save the figures; those of one perturbation show the one with the largest effect."""
    context, perturbation = scores.loc[scores["effect"].idxmax(), ["context", "perturbation"]]
    shown = {"perturbation": perturbation, "context": context}
    plots = {
        "split": vc.pl.split(adata),
        "training_history": vc.pl.training_history(st),
        "perturbation_shift": vc.pl.perturbation_shift(predicted, adata, **shown),
        "de_agreement": vc.pl.de_agreement(predicted, adata, **shown),
    }
    if perturbation in adata.var_names:
        plots["target_expression"] = vc.pl.target_expression(adata, **shown)
    (out / "target_expression.png").unlink(missing_ok=True)  # of an earlier run, whose target may have been measured
    for name, ax in plots.items():
        ax.figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(ax.figure)


def report(scores: pd.DataFrame, out: Path, seconds: float) -> None:
    """Print the comparison, and where everything is."""
    table = scores.groupby("predictor", sort=False)[["pearson_delta", "mae"]].mean()
    mae = scores.pivot(index=["context", "perturbation"], columns="predictor", values="mae")
    best = table["mae"].drop("ST").idxmin()
    print(f"\nMean over {len(mae)} held-out pairs of context and perturbation (log1p of counts per 10,000):\n")
    print(table.to_string(float_format="{:.3f}".format, na_rep="-"))
    print(f"\nST has a lower error than the best baseline ({best}) in {(mae['ST'] < mae[best]).sum()} of {len(mae)}.")
    print(f"\nWritten to {out}/ in {seconds:.0f} s:")
    for path in sorted(out.iterdir()):
        print(f"  {path.name}{'/' if path.is_dir() else ''}")


if __name__ == "__main__":
    main()
