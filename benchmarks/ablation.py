"""Choices inside ST, compared by nested validation: the test cells of `st.py` take no part, not even their controls.

    export OMP_NUM_THREADS=1
    python benchmarks/ablation.py --data ../shared/data --jobs 2 --json benchmarks/results/ablation.json
    ... --rows default "no transfer"   # only these rows
    ... --seeds 1 --max-steps 5     # to try the script out

* kang: without monocytes; B, CD8T and NK cells in turn are the type in which IFN-beta was never seen.
* papalexi: without replicate 3; replicate 2 is the new context, 12 of 25 targets (drawn with seed 1) held out there.
* papalexi_unseen: targets that were never measured; the targets of one fold of `st.py` are left out, and those of the
  next predicted, in turn.
* synthetic: three contexts, 20 perturbations, another screen (seed 7) than in `st.py`; type_3 zero-shot.

Every row is `vc.tl.fit_state` with the arguments in `ROWS`, and its other defaults (so some rows repeat the default;
"gene features", for papalexi only, are Reactome and STRING vectors of the targets in place of learned ones, which
papalexi_unseen has always).
Numbers are means over test groups and seeds. "mean rank": of a row among the rows of ST, mean over all columns; 1 is
best, rows that were not run on all sets have none. Baselines and the ceiling, one half of the real cells against the
other, are shown beside, without a rank.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from _splits import (
    CEILINGS,
    FOLDS,
    KANG,
    PAPALEXI,
    PUBLISHED,
    SMALLER_IS_BETTER,
    SYNTHETIC,
    arguments,
    collect,
    fit_and_score,
    fold_targets,
    gene_features,
    kang,
    papalexi,
    pool,
    score_baselines,
    summarise,
    synthetic,
    targets,
    thinned,
    versions,
    write,
)

METRICS = ["pearson_delta", "mae", "energy_distance", "discrimination_cosine"]
BASELINES = ["NoChange", "PerturbationMean", "Additive", "NearestContext", "Ridge"]
KANG_DROPPED, KANG_VALIDATION = "Mono", ["B", "CD8T", "NK"]
SCREEN_SEED = 7

# arguments of `fit_state`
ROWS: dict[str, dict] = {
    "default": {},
    "no transfer": {"network": {"transfer": False}},
    "shift head": {"network": {"head": "shift"}},
    "shift head, transfer": {"network": {"head": "shift", "transfer": True}},
    "level head": {"network": {"head": "level"}},
    "level head, transfer": {"network": {"head": "level", "transfer": True}},
    "mean_weight 0": {"training": {"mean_weight": 0.0}},
    "mean_weight 0.3": {"training": {"mean_weight": 0.3}},
    "mean_weight 1": {"training": {"mean_weight": 1.0}},
    "mean_weight 3": {"training": {"mean_weight": 3.0}},
    "contrast_weight 0": {"training": {"contrast_weight": 0.0}},
    "contrast_weight 0.1": {"training": {"contrast_weight": 0.1}},
    "contrast_weight 0.3": {"training": {"contrast_weight": 0.3}},
    "contrast_weight 1": {"training": {"contrast_weight": 1.0}},
    "3 networks": {"network": {"n_networks": 3}},
    "64 sets a step": {"training": {"batch_size": 64}},  # what a GPU gets where the data allow
    "early stopping": {"training": {"early_stopping": True}},
    "gene features": {"perturbation_features": "knowledge"},  # of papalexi alone: the others have them, or no genes
    "perturbation_dropout 0": {"network": {"perturbation_dropout": 0.0}},  # of features
    "as published": PUBLISHED,
}
APPLIES = {"gene features": ["papalexi"], "perturbation_dropout 0": ["papalexi_unseen"]}  # rows of some sets alone


# -- the data sets: arguments of `vc.tl.benchmark` by split -----------------------------------------------------------


def kang_case(folder: Path, split: str) -> dict:
    adata = kang(folder)
    adata = adata[(adata.obs["cell_type_coarse"] != KANG_DROPPED).to_numpy()].copy()
    return {"adata": adata, **KANG, "splits": {split: {"contexts": [split]}}}


def papalexi_held_out(folder: Path) -> list[str]:
    return sorted(np.random.default_rng(1).permutation(targets(papalexi(folder)))[:12].tolist())


def papalexi_case(folder: Path, split: str) -> dict:
    adata = papalexi(folder)
    held_out = {"contexts": ["rep_2"], "perturbations": papalexi_held_out(folder)}
    adata = adata[(adata.obs["batch"] != "rep_3").to_numpy()].copy()
    return {"adata": adata, **PAPALEXI, "splits": {split: held_out}}


def unseen_case(folder: Path, split: str) -> dict:
    outer, inner = fold_targets(folder, FOLDS[FOLDS.index(split) - 1]), fold_targets(folder, split)
    adata = papalexi(folder)
    adata = adata[~adata.obs["target_gene"].isin(outer).to_numpy()].copy()
    features, _ = gene_features(folder, adata, inner)
    holdout = {split: {"perturbations": inner}}
    return {"adata": thinned(adata, inner), **PAPALEXI, "splits": holdout, "perturbation_features": features["all"]}


def synthetic_case(folder: Path, split: str) -> dict:
    return {"adata": synthetic(3, 20, SCREEN_SEED), **SYNTHETIC, "splits": {split: {"contexts": [split]}}}


SETS = {
    "kang": (kang_case, KANG_VALIDATION),
    "papalexi": (papalexi_case, ["rep_2"]),
    "papalexi_unseen": (unseen_case, FOLDS),
    "synthetic": (synthetic_case, ["type_3"]),
}


# -- running ----------------------------------------------------------------------------------------------------------


def metrics_of(name: str) -> list[str]:
    """Discrimination needs several perturbations; distances of cells are not what unseen targets are scored by."""
    left_out = {"kang": "discrimination_cosine", "papalexi_unseen": "energy_distance"}
    return [m for m in METRICS if m != left_out.get(name)]


def run(name: str, split: str, row: str, seed: int, folder: Path, max_steps: int | None) -> tuple:
    """One task: a row with one seed on one split, or the baselines and the ceiling."""
    case = SETS[name][0](folder, split) | {"suite": metrics_of(name)}
    if row == "baselines":
        possible = BASELINES if "perturbation_features" in case else [b for b in BASELINES if b != "Ridge"]
        return score_baselines(case | {"baselines": possible})
    how = ROWS[row]
    if "perturbation_features" in how:
        features, _ = gene_features(folder, case["adata"], papalexi_held_out(folder))
        how = {"perturbation_features": features[how["perturbation_features"]]}
    return fit_and_score(case, row, how, seed, max_steps)


def tasks(name: str, rows: list[str], args) -> list[tuple]:
    splits = SETS[name][1]
    rows = [row for row in rows if name in APPLIES.get(row, SETS)]
    fits = [
        (name, s, row, seed, args.data, args.max_steps) for row in rows for s in splits for seed in range(args.seeds)
    ]
    return [*fits, *((name, s, "baselines", 0, args.data, args.max_steps) for s in splits)]


def ranks(mean: pd.DataFrame, rows: list[str]) -> pd.Series:
    """Mean rank over columns (data set, metric) of the rows that have all of them."""
    here = mean.loc[[r for r in rows if r in mean.index]].dropna()
    sign = np.array([-1 if column[1] in SMALLER_IS_BETTER else 1 for column in here])
    return (-sign * here).rank().mean(axis=1)


def main() -> None:
    parser = arguments(__doc__, list(SETS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()
    means, spreads = {}, {}
    with pool(args.jobs) as run_tasks:
        for name in args.only:
            todo = tasks(name, args.rows, args)
            scores, seconds = collect(run_tasks(run, todo), name, len(todo))
            means[name], spreads[name] = summarise(scores, metrics_of(name))
            by = scores.pivot_table(index="split", columns=["metric", "model"], values="value")
            settings = {
                "seeds": range(args.seeds),
                "max_steps": args.max_steps,
                "rows": {row: ROWS[row] for row in args.rows},
                "jobs": args.jobs,
            }
            settings |= {"papalexi": {"held_out": papalexi_held_out(args.data)}, "kang": {"dropped": KANG_DROPPED}}.get(
                name, {"screen_seed": SCREEN_SEED}
            )
            result = {
                "mean": means[name],
                "spread": spreads[name],
                "by_split": {m: by[m] for m in metrics_of(name)},
                "seconds_per_fit": {row: np.mean(times) for row, times in seconds.items()},
                "settings": settings,
                "versions": versions(),
            }
            write(args.json, name, result)
    mean, spread = pd.concat(means, axis=1), pd.concat(spreads, axis=1)
    rank = ranks(mean, args.rows)
    first = rank.sort_values().index
    order = [*first, *(r for r in [*args.rows, *BASELINES, *CEILINGS] if r in mean.index and r not in first)]
    for name in args.only:
        print(f"\n== {name}; in brackets the standard deviation over {args.seeds} seeds")
        table = mean[name].map("{:.4f}".format) + spread[name].map(lambda x: "" if np.isnan(x) else f" ({x:.4f})")
        print(table.loc[[r for r in order if mean[name].loc[r].notna().all()]].to_string())
    print("\n== All; rank 1 is best")
    short = {"pearson_delta": "r", "mae": "MAE", "energy_distance": "E", "discrimination_cosine": "discr."}
    table = mean.loc[order].round(4)
    table.columns = [f"{name} {short[metric]}" for name, metric in table]
    table["mean rank"] = rank.round(2).reindex(order)
    print(table.to_string(na_rep=""))
    if args.only == list(SETS) and args.rows == list(ROWS):
        write(args.json, "mean_rank", rank.to_dict())


if __name__ == "__main__":
    main()
