"""Unseen knockdowns from gene features, and transfer between cell lines: effects of Replogle et al. (2022), no cells.

    python benchmarks/replogle.py --data ../shared/data [--json benchmarks/results/replogle.json]

585 essential genes were knocked down in K562 and in RPE1; an effect is 1 - rank/1000 of the 1,000 most up-regulated of
7,225 genes, 0 elsewhere. Since 0 does not mean "unchanged", only order is scored:

* retrieval: share of the other perturbations whose prediction matches (Pearson) the true profile of a perturbation
  worse than its own prediction does. Profiles and predictions are taken relative to the mean of the line, for
  predictions that of the rows they were made from. 0.5 is chance, 1 perfect.
* top-50 overlap: share of the 50 most up-regulated genes among the 50 with the highest prediction.

Every perturbation is predicted from the others. Penalty and width of the similarity are chosen by leave-one-out within
two thirds of the perturbations, and used for those of the last third; the weight of the features beside the other line
is the one with the best retrieval there. The number of neighbours is 10, as in `vc.models.NearestPerturbations`.
Nothing is random but the shuffled features, whose rows are given to other genes, with five seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from virtualcell.models._closed_forms import additive, additive_leave_one_out, cosine
from virtualcell.models._effects import Effects
from virtualcell.models._regression import nearest_perturbations, ridge

TABLES = {
    "Reactome": "gene_features_reactome_svd64",
    "STRING": "gene_features_string_spectral64",
    "co-essential": "gene_features_coessential_svd64",
}
SETS = {**{name: [name] for name in TABLES}, "combined": list(TABLES)}
WIDTHS = (0.1, 0.3)  # of exp(-(1 - cosine) / width)
WEIGHTS = np.linspace(0, 1, 11)  # of the features beside the other line
N_FOLDS = 3


# -- features ---------------------------------------------------------------------------------------------------------


def read_features(folder: Path, genes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of each table at unit length; a gene that a table lacks has zeros there, similar to nothing."""
    out = {}
    for name, file in TABLES.items():
        rows = pd.read_parquet(folder / f"{file}.parquet").set_index("gene").reindex(genes).fillna(0).to_numpy()
        out[name] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return out


def linear(blocks: list[np.ndarray]) -> np.ndarray:
    """Tables side by side, each with a column that tells the genes it has."""
    return np.concatenate([np.column_stack([b, b.any(axis=1)]) if not b.any(axis=1).all() else b for b in blocks], 1)


def similarity(blocks: list[np.ndarray], width: float) -> np.ndarray:
    """Features whose products are exp(-(1 - cosine) / width), summed over tables: ridge on them is kernel ridge."""
    kernel = sum(np.exp((cosine(b, b) - 1) / width) * np.outer(b.any(axis=1), b.any(axis=1)) for b in blocks)
    values, vectors = np.linalg.eigh(kernel)
    return vectors * np.sqrt(np.maximum(values, 0))


# -- every perturbation from the others -------------------------------------------------------------------------------


def others_mean(effects: np.ndarray) -> np.ndarray:
    """Return, for each row, the mean of the other rows."""
    return (effects.sum(axis=0) - effects) / (len(effects) - 1)


def folds(n: int) -> list[np.ndarray]:
    return [np.arange(n) % N_FOLDS == i for i in range(N_FOLDS)]


def neighbours(blocks: list[np.ndarray], effects: np.ndarray) -> np.ndarray:
    """10 nearest neighbours; the mean where a gene has no features."""
    x, out = np.concatenate(blocks, axis=1), others_mean(effects)
    has = x.any(axis=1)
    for i in np.flatnonzero(has):
        rest = has & (np.arange(len(x)) != i)
        out[i] = nearest_perturbations(x[rest], effects[rest], x[[i]])[0]
    return out


def ridge_left_out(choices: list[np.ndarray], effects: np.ndarray) -> np.ndarray:
    """Ridge on one of several sets of features; set and penalty are chosen without the fold that they are used for."""
    out, cache = np.empty_like(effects), {}
    for fold in folds(len(effects)):
        fits = [ridge(x[~fold], effects[~fold]) for x in choices]
        best = int(np.argmin([((fit.leave_one_out - effects[~fold]) ** 2).sum() for fit in fits]))
        key = best, fits[best].penalty
        if key not in cache:  # one fit tells, for each row, what it would be without that row
            cache[key] = ridge(choices[best], effects, penalties=np.array(key[1:])).leave_one_out
        out[fold] = cache[key][fold]
    return out


# -- scores -----------------------------------------------------------------------------------------------------------


def retrieval(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of other predictions that match each true profile worse; ties count half."""
    predicted, truth = (x - x.mean(axis=1, keepdims=True) for x in (predicted, truth))
    match = cosine(truth, predicted)
    own = np.diag(match)[:, None]
    return ((match < own).sum(axis=1) + ((match == own).sum(axis=1) - 1) / 2) / (len(match) - 1)


def overlap(predicted: np.ndarray, truth: np.ndarray, k: int = 50) -> np.ndarray:
    top = [np.argsort(-x, axis=1, kind="stable")[:, :k] for x in (predicted, truth)]
    return np.array([len(np.intersect1d(a, b)) for a, b in zip(*top, strict=True)]) / k


def mixed(first: np.ndarray, second: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Weighted mean of two predictions, each at unit length, and the weight of the second in each fold.

    The weight with the best retrieval, and the scale with the least squared error, are those of the other folds.
    """
    first, second = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (first, second))
    out, chosen = np.empty_like(truth), []
    for fold in folds(len(truth)):
        x, y, t = first[~fold], second[~fold], truth[~fold]
        chosen.append(max(WEIGHTS, key=lambda w: retrieval((1 - w) * x + w * y, t).mean()))
        mix = (1 - chosen[-1]) * first + chosen[-1] * second
        out[fold] = mix[fold] * (mix[~fold] * t).sum() / (mix[~fold] ** 2).sum()
    return out, chosen


class Line:
    """Effects in one cell line, in as many coordinates as there are perturbations while predictions are made."""

    def __init__(self, effects: np.ndarray) -> None:
        self.effects = effects
        mean = effects.mean(axis=0)
        u, s, self.axes = np.linalg.svd(effects - mean, full_matrices=False)
        self.mean, self.short = mean, (u * s).astype(np.float32)

    def score(self, predicted: np.ndarray) -> dict[str, float]:
        """Score predictions, in those coordinates, of all perturbations from the others."""
        relative = (predicted - others_mean(self.short)) @ self.axes
        scores = retrieval(relative, self.effects - self.mean)
        return {
            "retrieval": float(scores.mean()),
            "top50_overlap": float(overlap(relative + others_mean(self.effects), self.effects).mean()),
        }


def within(effects: dict[str, np.ndarray], features: dict[str, np.ndarray], rows: np.ndarray) -> list[dict]:
    """Leave one gene out within a line, for the perturbations in `rows`."""
    out = []
    for name, members in SETS.items():
        blocks = [features[m][rows] for m in members]
        covered = int(np.any([b.any(axis=1) for b in blocks], axis=0).sum())
        by_similarity = [similarity(blocks, width) for width in WIDTHS]
        for context, matrix in effects.items():
            line = Line(matrix[rows])
            methods = {
                "nearest perturbations": neighbours(blocks, line.short),
                "ridge": ridge_left_out([linear(blocks)], line.short),
                "ridge on similarities": ridge_left_out(by_similarity, line.short),
            }
            for method, predicted in methods.items():
                found = {
                    "features": name,
                    "method": method,
                    "context": context,
                    "n": len(rows),
                    "with_features": covered,
                }
                out.append(found | line.score(predicted))
    return out


def shuffled(
    effects: dict[str, np.ndarray], features: dict[str, np.ndarray], rows: np.ndarray, seed: int
) -> list[dict]:
    """Give the combined features to the wrong genes."""
    order = np.random.default_rng(seed).permutation(rows)
    blocks = [b[order] for b in features.values()]
    out = []
    for context, matrix in effects.items():
        line = Line(matrix[rows])
        methods = {
            "nearest perturbations": neighbours(blocks, line.short),
            "ridge on similarities": ridge_left_out([similarity(blocks, WIDTHS[0])], line.short),
        }
        out += [{"method": m, "context": context, "seed": seed} | line.score(p) for m, p in methods.items()]
    return out


def transfer(effects: dict[str, np.ndarray], features: dict[str, np.ndarray], genes: np.ndarray) -> list[dict]:
    """Predict a knockdown in one line from the other line, where it was measured, and from the features."""
    out, names = [], list(effects)
    contexts = np.repeat(names, len(genes))
    table = Effects.from_effects(np.concatenate(list(effects.values())), contexts, np.tile(genes, len(names)))
    additive_fit = additive_leave_one_out(table, additive(table))
    by_similarity = [similarity(list(features.values()), width) for width in WIDTHS]
    for here, there in (names, names[::-1]):
        line, mean = Line(effects[here]), others_mean(effects[here])
        other = effects[there] - others_mean(effects[there])
        own = ridge_left_out(by_similarity, line.short)
        own = (own - others_mean(line.short)) @ line.axes
        both, weights = mixed(other, own, effects[here] - mean)
        methods = {
            "copy of the other line": other,
            "additive": additive_fit[table.context == table.contexts.index(here)] - mean,
            "features alone": own,
            "copy + features": both,
        }
        for method, predicted in methods.items():
            scores = {
                "retrieval": float(retrieval(predicted, effects[here] - line.mean).mean()),
                "top50_overlap": float(overlap(predicted + mean, effects[here]).mean()),
            }
            if method == "copy + features":
                scores["weight_of_features"] = float(np.mean(weights))
            out.append({"method": method, "from": there, "to": here, "n": len(genes)} | scores)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    start = time.perf_counter()
    adata = ad.read_h5ad(args.data / "replogle2022_k562_rpe1_upranks.h5ad")
    adata = adata[np.argsort(adata.obs["target_gene"].astype(str), kind="stable")]
    genes = np.unique(adata.obs["target_gene"].astype(str))
    contexts = sorted(adata.obs["context"].unique())
    effects = {c: adata[(adata.obs["context"] == c).to_numpy()].to_df().to_numpy(np.float32) for c in contexts}
    features = read_features(args.data, genes)
    has = np.stack([b.any(axis=1) for b in features.values()])
    common = np.flatnonzero(has.all(axis=0))
    results = {
        "genes": {"all": len(genes), "in all tables": len(common), "in any table": int(has.any(axis=0).sum())},
        "within, all genes": within(effects, features, np.arange(len(genes))),
        "within, genes in all tables": within(effects, features, common),
        "within, genes of each table": [
            row
            for name in TABLES
            for row in within(effects, {n: features[n] for n in TABLES}, np.flatnonzero(features[name].any(axis=1)))
            if row["features"] == name
        ],
        "within, shuffled features": [
            row for seed in range(args.seeds) for row in shuffled(effects, features, common, seed)
        ],
        "transfer": transfer(effects, features, genes),
    }
    for title, rows in results.items():
        print(f"\n== {title}\n" + (pd.DataFrame(rows).round(3).to_string() if isinstance(rows, list) else str(rows)))
    results["seconds"] = time.perf_counter() - start
    print(f"\n{results['seconds']:.0f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
