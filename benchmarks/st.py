"""The default ST beside every baseline, the published form and the ceiling, on the splits that were fixed beforehand.

    OMP_NUM_THREADS=1 python benchmarks/st.py --data ../shared/data --jobs 2 --json benchmarks/results/st.json
    ... --only kang papalexi        # others in the file stay
    ... --seeds 1 --max-steps 5     # to try the script out

* kang: IFN-beta in each of six cell types, where it was never seen (zero-shot); 2,000 genes.
* papalexi: replicate 3 as the new context, 17 targets held out there (few-shot); all of them, and the nine strong ones.
* papalexi_unseen: targets that were never measured, in five folds (drawn with seed 0). Features: "knowledge" (Reactome
  and STRING side by side), "co-essential", "expression" (co-expression in the training cells), and "all", knowledge and
  expression side by side, which ST gets. A target that a table lacks has zeros there. Training has at most 100 cells of
  a target in a replicate, test cells are all scored. Five targets compete for discrimination: chance is 0.6.
* norman: K562, pairs A+B of which both singles are seen, one pair held out at a time.
* glioblastoma: three lines (CRISPRi, McFaline-Figueroa 2024), nine targets, one line held out at a time. Effects are
  weak and do not agree between lines: what can be said is that nothing is known.
* synthetic: four contexts, 100 perturbations, type_4 zero-shot; the signal is the generator's default (effects of 0.3
  on the natural-log scale, context specificity 1, 50 cells a group, 200 controls, 2,000 counts a cell), screen 2026.
  Scored against the observed cells, and ("truth") against 400 cells of each perturbation drawn from the true effects.

Every model has the package's defaults, and genes are chosen on training cells. ST is fitted with each seed, baselines,
in which nothing is random, once. Numbers are means over test groups and seeds; in brackets the standard deviation over
seeds of that mean. "ceiling": one half of the real cells predicts the other half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from _splits import (
    CEILING,
    CEILINGS,
    CELLS_PER_GROUP,
    FOLDS,
    KANG,
    PAPALEXI,
    PAPALEXI_HELD_OUT,
    PAPALEXI_STRONG,
    PUBLISHED,
    SCREEN,
    SMALLER_IS_BETTER,
    SYNTHETIC,
    arguments,
    collect,
    fit_and_score,
    fold_targets,
    gene_features,
    glioblastoma,
    kang,
    norman,
    papalexi,
    pool,
    score_baselines,
    show,
    summarise,
    synthetic,
    targets,
    thinned,
    versions,
    with_known_truth,
    write,
)

from virtualcell.tl._verdict import outcome_of

OF_MERIT = ("pearson_delta", "mae", "energy_distance", "top50_overlap", "discrimination_cosine")
BASELINES = ["NoChange", "ContextMean", "PerturbationMean", "Additive", "NearestContext"]
FORMS = {"ST": {}, "ST as published": PUBLISHED}
SCREEN_SEED = 2026


# -- the data sets ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """What is shown of one: `splits(folder)` names them, `case(folder, split)` gives the arguments of a benchmark."""

    metrics: tuple[str, ...]
    by: str  # single values are shown by this column
    splits: Callable[[Path], list[str]]
    case: Callable[[Path, str], dict]
    parts: Callable[[pd.DataFrame], dict[str, pd.Series]]  # rows of each table by its title
    forms: tuple[str, ...] = tuple(FORMS)


def kang_case(folder: Path, split: str) -> dict:
    return {"adata": kang(folder), **KANG, "splits": {split: {"contexts": [split]}}, "baselines": BASELINES}


def papalexi_case(folder: Path, split: str) -> dict:
    holdout = {"contexts": ["rep_3"], "perturbations": PAPALEXI_HELD_OUT}
    return {"adata": papalexi(folder), **PAPALEXI, "splits": {split: holdout}, "baselines": BASELINES}


def papalexi_parts(scores: pd.DataFrame) -> dict[str, pd.Series]:
    return {
        f"all {scores['perturbation'].nunique()} targets": scores["split"].notna(),
        "nine strong targets": scores["perturbation"].isin(PAPALEXI_STRONG),
    }


def unseen_case(folder: Path, split: str) -> dict:
    held_out = fold_targets(folder, split)
    features, _ = gene_features(folder, papalexi(folder), held_out)
    baselines = {name: name for name in ("NoChange", "ContextMean", "PerturbationMean")}
    for kind in ("Ridge", "NearestPerturbations"):
        baselines |= {f"{kind}, {n}": (kind, {"perturbation_features": table}) for n, table in features.items()}
    return {
        "adata": thinned(papalexi(folder), held_out),
        **PAPALEXI,
        "splits": {split: {"perturbations": held_out}},
        "perturbation_features": features["all"],
        "baselines": baselines,
    }


def norman_splits(folder: Path) -> list[str]:
    names = set(targets(norman(folder)))
    return sorted(n for n in names if "+" in n and set(n.split("+")) <= names)


def norman_case(folder: Path, split: str) -> dict:
    return {
        "adata": norman(folder),
        **SCREEN,
        "library_size_key": "total_counts",
        "splits": {split: {"perturbations": [split]}},
        "baselines": ["NoChange", "PerturbationMean", "Additive"],  # in one context the others are the same
    }


def glioblastoma_case(folder: Path, split: str) -> dict:
    return {
        "adata": glioblastoma(folder),
        **SCREEN,
        "context_key": "cell_type",
        "library_size_key": "total_counts",
        "splits": {split: {"contexts": [split]}},
        "baselines": BASELINES,
    }


def synthetic_case(folder: Path, split: str) -> dict:
    adata = synthetic(4, 100, SCREEN_SEED)
    adata = adata if split == "observed" else with_known_truth(adata, "type_4")
    return {"adata": adata, **SYNTHETIC, "splits": {split: {"contexts": ["type_4"]}}, "baselines": BASELINES}


SETS = {
    "kang": DataSet(
        metrics=(
            "pearson_delta",
            "mae",
            "energy_distance",
            "top50_overlap",
            "de_overlap",
            "de_precision",
            "variance_ratio",
        ),
        by="context",
        splits=lambda folder: sorted(kang(folder).obs["cell_type_coarse"].unique()),
        case=kang_case,
        parts=lambda scores: {f"mean over {scores['context'].nunique()} cell types": scores["split"].notna()},
    ),
    "papalexi": DataSet(
        metrics=(
            "pearson_delta",
            "mae",
            "energy_distance",
            "discrimination_cosine",
            "de_overlap",
            "de_precision",
            "variance_ratio",
        ),
        by="perturbation",
        splits=lambda folder: ["replicate 3"],
        case=papalexi_case,
        parts=papalexi_parts,
    ),
    "papalexi_unseen": DataSet(
        metrics=("pearson_delta", "mae", "discrimination_cosine"),
        by="perturbation",
        splits=lambda folder: FOLDS,
        case=unseen_case,
        parts=papalexi_parts,
        forms=("ST",),
    ),
    "norman": DataSet(
        metrics=("pearson_delta", "mae"),
        by="perturbation",
        splits=norman_splits,
        case=norman_case,
        parts=lambda scores: {f"mean over {scores['perturbation'].nunique()} pairs": scores["split"].notna()},
        forms=("ST",),
    ),
    "glioblastoma": DataSet(
        metrics=("pearson_delta", "mae", "energy_distance"),
        by="context",
        splits=lambda folder: sorted(glioblastoma(folder).obs["cell_type"].unique()),
        case=glioblastoma_case,
        parts=lambda scores: {"mean over 3 lines": scores["split"].notna()},
        forms=("ST",),
    ),
    "synthetic": DataSet(
        metrics=("pearson_delta", "mae", "discrimination_cosine"),
        by="split",
        splits=lambda folder: ["observed", "truth"],
        case=synthetic_case,
        parts=lambda scores: {f"against {s}": scores["split"] == s for s in ("observed", "truth")},
    ),
}


# -- running ----------------------------------------------------------------------------------------------------------


def run(name: str, split: str, form: str, seed: int, folder: Path, max_steps: int | None) -> tuple:
    """One task: a form of ST with one seed on one split, or the baselines and the ceiling."""
    case = SETS[name].case(folder, split) | {"suite": list(SETS[name].metrics)}
    if form == "baselines":
        return score_baselines(case)
    return fit_and_score(case, form, FORMS[form], seed, max_steps)


def tasks(name: str, args) -> list[tuple]:
    """ST first, because it takes longest."""
    out = []
    for split in SETS[name].splits(args.data):
        for form in SETS[name].forms:
            if split == "truth" and form != "ST":
                continue  # the truth takes a fit of its own
            n = args.seeds if form == "ST" or args.published_seeds is None else args.published_seeds
            out += [(name, split, form, seed, args.data, args.max_steps) for seed in range(n)]
        out.append((name, split, "baselines", 0, args.data, args.max_steps))
    return sorted(out, key=lambda task: task[2] == "baselines")


def verdict(mean: pd.DataFrame, spread: pd.DataFrame, metrics: list[str], lead: str = "ST") -> dict[str, dict]:
    """ST beside the best baseline of each metric, and who beats the perturbation mean."""
    out = {}
    baselines = [m for m in mean.index if m not in CEILINGS and not m.startswith("ST")]
    for metric in metrics:
        sign = -1 if metric in SMALLER_IS_BETTER else 1
        best = (sign * mean.loc[baselines, metric]).idxmax()
        above_mean = [m for m in mean.index if sign * (mean.loc[m, metric] - mean.loc["PerturbationMean", metric]) > 0]
        out[metric] = {
            "ST": mean.loc[lead, metric],
            "spread": spread.loc[lead, metric],
            "best_baseline": best,
            "value": mean.loc[best, metric],
            "ST_is_better": bool(sign * (mean.loc[lead, metric] - mean.loc[best, metric]) > 0),
            "above_perturbation_mean": [m for m in above_mean if m not in CEILINGS],
        }
    return out


def agreement(scores: pd.DataFrame) -> dict:
    """Compare what each fit said of itself with what the test cells say, by the spread that it stated.

    On the test cells the best baseline of each metric is taken; better, level and worse are defined as in the verdict.
    """
    said = []
    means = scores.groupby(["model", "split", "seed", "metric"])["value"].mean()
    for verdict in scores.attrs["verdicts"]:
        if verdict["model"] != "ST":
            continue
        gains = {}
        for metric, (_, spread) in verdict["gains"].items():
            sign = -1 if metric in SMALLER_IS_BETTER else 1
            baselines = [m for m in means.index.unique("model") if m not in CEILINGS and not m.startswith("ST")]
            best = max(sign * means.get((m, verdict["split"], 0, metric), -np.inf * sign) for m in baselines)
            gains[metric] = sign * means["ST", verdict["split"], verdict["seed"], metric] - best, spread
        said.append({**verdict, "test_gains": gains, "test_outcome": outcome_of(list(gains.values()))})
    worst = [v for v in said if v["outcome"] == "better" and v["test_outcome"] == "worse"]
    agree = float(np.mean([v["outcome"] == v["test_outcome"] for v in said])) if said else float("nan")
    print(f"  verdicts that agree with the test cells: {agree:.2f} of {len(said)}; better for worse: {len(worst)}")
    print("  weights of the networks:", pd.Series([v["weight"] for v in said]).value_counts().to_dict())
    return {"share": agree, "n": len(said), "better_for_worse": len(worst), "verdicts": said}


def merit(mean: pd.DataFrame, metrics: list[str]) -> dict[str, float]:
    """Error of ST divided by that of the best baseline; the error of what is best at 1 is what lacks from 1."""
    baselines = [m for m in mean.index if m not in CEILINGS and not m.startswith("ST")]
    error = {m: mean[m] if m in SMALLER_IS_BETTER else 1 - mean[m] for m in metrics}
    return {m: float(e["ST"] / e[baselines].min()) for m, e in error.items()}


def say(found: dict[str, dict]) -> None:
    for metric, v in found.items():
        how = "better than" if v["ST_is_better"] else "NOT better than"
        print(
            f"  {metric}: ST {v['ST']:.4f} is {how} the best baseline, {v['best_baseline']} ({v['value']:.4f})", end=""
        )
        print("" if v["above_perturbation_mean"] else "; NOTHING beats the perturbation mean")


def report(name: str, scores: pd.DataFrame, seconds: dict[str, list[float]], args) -> dict:
    """Print the tables of a data set, and return what goes into the file."""
    this, out = SETS[name], {}
    metrics = list(this.metrics)
    order = dict.fromkeys([*FORMS, *sorted(set(scores["model"]) - set(CEILINGS)), *CEILINGS])
    for title, rows in this.parts(scores).items():
        mean, spread = summarise(scores[rows], metrics)
        print(f"\n== {name}, {title}; {args.seeds} seeds")
        show(mean, spread, list(order))
        found = verdict(mean, spread, metrics)
        say(found)
        ratios = merit(mean, [m for m in metrics if m in OF_MERIT])
        print("  error of ST / that of the best baseline:", {m: round(r, 3) for m, r in ratios.items()})
        part = {"mean": mean, "spread": spread, "verdict": found, "merit": ratios}
        if name == "synthetic":
            share = mean["pearson_delta"] / mean.loc[CEILING, "pearson_delta"]
            print(f"  share of the ceiling's Pearson delta: {share.round(3).to_dict()}")
            part["share_of_ceiling"] = share.to_dict()
        out[title] = part
    agree = agreement(scores)
    by = scores.pivot_table(index=this.by, columns=["metric", "model"], values="value")
    print(f"\nPearson delta by {this.by}\n{by['pearson_delta'].round(3).to_string()}")
    for form, times in seconds.items():
        print(f"fit and scores of {form}: {np.mean(times):.0f} s, at most {max(times):.0f} s")
    result = {
        "tables": out,
        "agreement": agree,
        f"by_{this.by}": {m: by[m] for m in metrics},
        "seconds_per_fit": {form: {"mean": np.mean(t), "max": max(t)} for form, t in seconds.items()},
        "settings": {
            "seeds": range(args.seeds),
            "published_seeds": args.published_seeds,
            "max_steps": args.max_steps,
            "jobs": args.jobs,
            "threads_per_job": 1,
            "splits": this.splits(args.data),
            "forms": {f: FORMS[f] for f in this.forms},
        },
        "versions": versions(),
    }
    if name == "papalexi_unseen":
        folds = {split: fold_targets(args.data, split) for split in FOLDS}
        lacking = gene_features(args.data, papalexi(args.data), fold_targets(args.data, FOLDS[0]))[1]
        print(f"folds: {folds}\ntargets without features, which have zeros: {lacking}")
        result["settings"] |= {"held_out": folds, "without_features": lacking, "cells_per_group": CELLS_PER_GROUP}
    if name == "synthetic":
        result["settings"]["screen_seed"] = SCREEN_SEED
    return result


def main() -> None:
    parser = arguments(__doc__, list(SETS))
    parser.add_argument("--published-seeds", type=int, help="of the published form, to save time; as many by default")
    args = parser.parse_args()
    with pool(args.jobs) as run_tasks:
        for name in args.only:
            todo = tasks(name, args)
            scores, seconds = collect(run_tasks(run, todo), name, len(todo))
            write(args.json, name, report(name, scores, seconds, args))


if __name__ == "__main__":
    main()
