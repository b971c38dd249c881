"""Whether the standard errors of `predict_perturbation(..., n_samples=20)` say where a prediction is wrong.

    OMP_NUM_THREADS=1 python benchmarks/uncertainty.py --data ../shared/data --json benchmarks/results/uncertainty.json
    ... --only synthetic
    ... --seeds 1 --max-steps 5     # to try the script out

* papalexi: replicate 3 as the new context, 17 targets held out there (few-shot); the default ST with each seed, and
  with three networks once.
* synthetic: four contexts, 40 perturbations, type_4 zero-shot, screen 2026; errors of the same predictions against the
  50 observed cells of each perturbation, and ("truth") against 400 cells drawn from the true effects.

For each held-out perturbation: the error is |predicted mean - observed mean| of each gene, `mae` its mean over genes,
`expected` what `obs["expected_error"]` says. The observed mean is an estimate too: `expected + noise` is the mean
absolute error that follows from both standard errors, and coverage is the share of genes whose error is at most two of
sqrt(standard_error^2 + standard error of the observed mean^2); 0.954 if both were right and normal. "noise alone" is
the same without the standard error of the prediction. Genes that no cell of either side has are left out.

Spearman correlations of `expected` with the error, over perturbations, have the 95 % interval of 2,000 bootstraps over
perturbations. Beside them stand those of what costs nothing: the size of the predicted shift, and 1 / sqrt(observed
cells), since noise of the observed mean is part of the error. "same shift" and "same cells" are partial correlations,
with either held fixed; "noise taken off" is the correlation with the mean over genes of error^2 - (standard error of
the observed mean)^2 in place of the error. Correlations over genes, taken in each perturbation, stand beside that of
the mean expression in control cells. Numbers are means over seeds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import anndata as ad
import numpy as np
import pandas as pd
from _splits import (
    PAPALEXI,
    PAPALEXI_HELD_OUT,
    SYNTHETIC,
    arguments,
    papalexi,
    pool,
    synthetic,
    targets,
    versions,
    with_known_truth,
    write,
)
from scipy.stats import spearmanr

import virtualcell as vc
from virtualcell.data._read_expression import read_expression

N_SAMPLES, SCREEN_SEED, N_BOOTSTRAPS = 20, 2026, 2000
NETWORKS = {"ST": 1, "ST, 3 networks": 3}
RANKED_BY = {
    "expected": "expected_error",
    "shift": "size of the shift",
    "few_cells": "few observed cells",
    "expected_same_shift": "expected, same shift",
    "expected_same_cells": "expected, same cells",
    "expected_noise_off": "expected, noise taken off",
}
ABSOLUTE = np.sqrt(2 / np.pi)  # mean absolute value of a normal variable of standard deviation 1


def cases(name: str, args) -> tuple[dict[str, ad.AnnData], dict, dict]:
    """Return the data to score against (the first is fitted on), its columns, and what is held out."""
    if name == "papalexi":
        holdout = {"contexts": ["rep_3"], "perturbations": PAPALEXI_HELD_OUT}
        return {name: papalexi(args.data).copy()}, PAPALEXI, holdout
    adata = synthetic(4, 40, SCREEN_SEED).copy()
    drawn = with_known_truth(adata, "type_4")
    return {name: adata, f"{name}, truth": drawn}, SYNTHETIC, {"contexts": ["type_4"]}


def run(name: str, label: str, seed: int, args) -> tuple[pd.DataFrame, float]:
    """Fit one ST, and compare what it expects of its errors with what they are: one row per held-out perturbation."""
    data, keys, holdout = cases(name, args)
    fitted_on = data[name]
    vc.pp.split(fitted_on, **{k: v for k, v in keys.items() if k != "library_size_key"}, holdout=holdout)
    start = time.perf_counter()
    st = vc.tl.fit_state(
        fitted_on,
        **keys,
        split_key="split",
        se=False,
        validate=False,
        network={"n_networks": NETWORKS[label]},
        training={"progress_bar": False} | ({} if args.max_steps is None else {"max_steps": args.max_steps}),
        seed=seed,
    )
    seconds = time.perf_counter() - start
    [context] = holdout["contexts"]
    names = holdout.get("perturbations", targets(fitted_on))
    predicted = vc.tl.predict_perturbation(fitted_on, names, context=context, model=st, n_samples=N_SAMPLES, seed=seed)
    rows = []
    for split, observed in data.items():
        here = observed[(observed.obs[keys["context_key"]] == context).to_numpy()]
        key = keys.get("library_size_key")
        matrix = read_expression(here, genes=list(predicted.var_names), library_size_key=key).rows().toarray()
        perturbation = here.obs["target_gene"].to_numpy()
        base = matrix[perturbation == "non-targeting"].mean(axis=0)
        for target in names:
            cells = predicted[(predicted.obs["target_gene"] == target).to_numpy()]
            column = list(predicted.uns["virtualcell"]["groups"]["perturbation"]).index(target)
            row = compare(cells, column, matrix[perturbation == target], base)
            rows.append({"split": split, "model": label, "seed": seed, "perturbation": target, **row})
    return pd.DataFrame(rows), seconds


def compare(cells: ad.AnnData, column: int, observed: np.ndarray, base: np.ndarray) -> dict[str, float]:
    mean, error = cells.X.mean(axis=0), cells.varm["standard_error"][:, column]
    noise = observed.std(axis=0, ddof=1) / np.sqrt(len(observed))
    wrong = np.abs(mean - observed.mean(axis=0))
    used = (base > 0) | (noise > 0)
    mean, error, noise, wrong, base = (x[used] for x in (mean, error, noise, wrong, base))
    both = np.sqrt(error**2 + noise**2)
    return {
        "n_cells": len(observed),
        "n_genes": int(used.sum()),
        "mae": wrong.mean(),
        "mse_noise_off": (wrong**2 - noise**2).mean(),
        "expected": cells.obs["expected_error"].iloc[0],
        "expected_with_noise": ABSOLUTE * both.mean(),
        "shift": np.abs(mean - base).mean(),
        "few_cells": 1 / np.sqrt(len(observed)),
        "genes": spearmanr(error, wrong).statistic,
        "genes_by_expression": spearmanr(base, wrong).statistic,
        "coverage": (wrong <= 2 * both).mean(),
        "coverage_noise_alone": (wrong <= 2 * noise).mean(),
    }


def rank_correlation(fit: pd.DataFrame) -> tuple[float, float, float]:
    """Spearman correlation of the expected with the real error over perturbations, and its interval."""
    rng, values = np.random.default_rng(0), fit[["expected", "mae"]].to_numpy()
    drawn = [values[rng.integers(len(values), size=len(values))] for _ in range(N_BOOTSTRAPS)]
    low, high = np.nanpercentile([spearmanr(*d.T).statistic for d in drawn], [2.5, 97.5])
    return spearmanr(*values.T).statistic, low, high


def partial(x: pd.Series, y: pd.Series, held: pd.Series) -> float:
    """Spearman correlation of x and y with a third variable held fixed."""
    r = spearmanr(np.column_stack([x, y, held])).statistic
    return (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))


def summarise(rows: pd.DataFrame) -> Iterator[dict]:
    """One line for each split, form and seed."""
    for (split, model, seed), fit in rows.groupby(["split", "model", "seed"]):
        expected, error = fit["expected"], fit["mae"]
        value, low, high = rank_correlation(fit)
        correlations = {
            "expected": value,
            "shift": spearmanr(fit["shift"], error).statistic,
            "few_cells": spearmanr(fit["few_cells"], error).statistic,
            "expected_same_shift": partial(expected, error, fit["shift"]),
            "expected_same_cells": partial(expected, error, fit["few_cells"]),
            "expected_noise_off": spearmanr(expected, fit["mse_noise_off"]).statistic,
        }
        means = fit[["mae", "expected", "expected_with_noise", "genes", "genes_by_expression"]].mean()
        coverage = fit[["coverage", "coverage_noise_alone"]].mean()
        yield {
            "split": split,
            "model": model,
            "seed": seed,
            "perturbations": len(fit),
            **{f"spearman_{by}": r for by, r in correlations.items()},
            "spearman_expected_low": low,
            "spearman_expected_high": high,
            **means,
            **coverage,
        }


def show(table: pd.DataFrame) -> pd.DataFrame:
    """Print the means over seeds, and return them."""
    by = table.groupby(["split", "model"])
    mean = by.mean(numeric_only=True).drop(columns="seed")
    mean.insert(0, "seeds", by.size())
    names = {f"spearman_{k}": v for k, v in RANKED_BY.items()}
    lines = {
        "Spearman with the error, over perturbations": mean[list(names)].rename(columns=names),
        "single fits, expected_error: value and 95 % interval": table.set_index(["split", "model", "seed"])[
            ["spearman_expected", "spearman_expected_low", "spearman_expected_high"]
        ],
        "size of the error": mean[["mae", "expected", "expected_with_noise"]],
        "Spearman with the error, over genes": mean[["genes", "genes_by_expression"]],
        "share of genes within two standard errors": mean[["coverage", "coverage_noise_alone"]],
    }
    for title, part in lines.items():
        print(f"\n== {title}\n{part.round(4).to_string()}")
    return mean


def main() -> None:
    parser = arguments(__doc__, ["papalexi", "synthetic"])
    parser.set_defaults(seeds=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with pool(args.jobs) as run_tasks:
        for name in args.only:
            todo = [(name, "ST", seed, args) for seed in range(args.seeds if name == "papalexi" else 1)]
            todo += [(name, "ST, 3 networks", 0, args)] if name == "papalexi" else []
            frames, seconds = [], {}
            for task, (rows, taken) in run_tasks(run, todo):
                frames.append(rows)
                seconds.setdefault(task[1], []).append(taken)
                print(f"   {name}: {task[1]}, seed {task[2]} ({taken:.0f} s)", flush=True)
            rows = pd.concat(frames).sort_values(["split", "model", "seed", "perturbation"], ignore_index=True)
            table = pd.DataFrame(list(summarise(rows)))
            mean = show(table)
            result = {
                "mean": {" / ".join(key): row for key, row in mean.to_dict("index").items()},
                "fits": table.to_dict("records"),
                "perturbations": rows.to_dict("records"),
                "seconds_per_fit": seconds,
                "settings": {"n_samples": N_SAMPLES, "max_steps": args.max_steps, "jobs": args.jobs},
                "versions": versions(),
            }
            write(args.json, name, result)


if __name__ == "__main__":
    main()
