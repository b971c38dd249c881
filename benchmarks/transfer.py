"""Effects that carry over: from other cell types, lines and tissues, and from features, on tables of real effects.

    python benchmarks/transfer.py --data ../shared/data [--json benchmarks/results/transfer.json]

One context of a table is left out and predicted by `vc.models.Transfer` from the others; everything it fits (slopes,
number of neighbours) it fits without that context. Where one context is all that is left, nothing can be left out to
fit the slopes: beside the copy, a stated slope of 0.2 is shown, and "some known": the left-out context is a second
source with four fifths of its perturbations, and the last fifth is predicted, in five folds.

* retrieval: share of the other perturbations whose prediction matches (Pearson) the true profile of a perturbation
  worse than its own prediction does, profiles taken relative to the mean of the context; 0.5 is chance.
* error: sum (predicted - true)^2 / sum true^2; no change has 1. Once on effects against the control, and once relative
  to the mean of the context.
* rank of errors: Spearman correlation between `agreement` and the cosine of prediction and truth (relative to the
  mean), and the same of the size of the transferred effect in place of agreement.

Nothing is random. Replogle's table holds ranks of the most up-regulated genes alone, 0 elsewhere: squared errors there
are of these numbers, which are not fold changes; the others hold normal scores of signed ranks, with one spread for all
rows, so that a weak effect is as large as a strong one. Cytokines are pseudobulk of CD4 T cells, and neutrophils
without control cells, so that their effects are relative to the mean of the others only.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from virtualcell.models import Transfer, TransferSource

TABLES = {
    "Replogle": ("replogle2022_k562_rpe1_upranks", "target_gene"),
    "NeurIPS": ("neurips2023_pbmc_drug_ranks", "perturbation"),
    "sci-Plex": ("sciplex3_drug_ranks_3lines", "perturbation"),
    "DrugMatrix": ("second/drugmatrix_rat_liver_kidney_39drugs_ranks", "perturbation"),
}
FEATURES = {"Reactome": "gene_features_reactome_svd64", "STRING": "gene_features_string_spectral64"}
N_FOLDS = 5
OTHER = {"K562": "RPE1", "RPE1": "K562"}


# -- scores -----------------------------------------------------------------------------------------------------------


def retrieval(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of other predictions that match each true profile worse; ties count half."""
    predicted, truth = (x - x.mean(axis=1, keepdims=True) for x in (predicted, truth))
    length = [np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (predicted, truth)]
    match = (truth / length[1]) @ (predicted / length[0]).T
    own = np.diag(match)[:, None]
    return float(np.mean(((match < own).sum(axis=1) + ((match == own).sum(axis=1) - 1) / 2) / (len(match) - 1)))


def error(predicted: np.ndarray, truth: np.ndarray) -> float:
    return float(((predicted - truth) ** 2).sum() / (truth**2).sum())


def cosine(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(predicted, axis=1) * np.linalg.norm(truth, axis=1)
    return (predicted * truth).sum(axis=1) / np.maximum(length, 1e-12)


def rank(trust: np.ndarray, accuracy: np.ndarray) -> float | None:
    here = ~np.isnan(trust)
    return float(spearmanr(trust[here], accuracy[here]).statistic) if here.sum() > 2 else None


class Left:
    """The context that is left out."""

    def __init__(self, effects: pd.DataFrame, *, has_control: bool = True) -> None:
        self.effects, self.has_control = effects, has_control
        self.truth = effects.to_numpy(np.float64)
        self.relative = self.truth - self.truth.mean(axis=0)

    def score(self, predicted: np.ndarray, mean: np.ndarray | float, trust: np.ndarray | None = None) -> dict:
        """Score predicted effects, of which `mean` is common to all perturbations."""
        relative = predicted - mean
        out = {"retrieval": retrieval(relative, self.relative), "error_relative": error(relative, self.relative)}
        if self.has_control:
            out["error"] = error(predicted, self.truth)
        if trust is not None:
            accuracy = cosine(relative, self.relative)
            out["rank_by_agreement"] = rank(trust, accuracy)
            out["rank_by_size"] = rank(np.linalg.norm(relative, axis=1), accuracy)
            out["cosine_by_third"] = thirds(trust, accuracy)
        return out


def thirds(trust: np.ndarray, accuracy: np.ndarray) -> list[float]:
    """Mean cosine with the truth of the third with the least agreement, the middle one, and the one with the most."""
    order = np.flatnonzero(~np.isnan(trust))
    order = order[np.argsort(trust[order], kind="stable")]
    return [float(accuracy[part].mean()) for part in np.array_split(order, 3)] if len(order) > 2 else []


def predicted_by(model: Transfer, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effects, what is common to all of them, and agreement."""
    mean = model.arrays["slope_of_mean"] * model.arrays["mean"]
    trust = np.array([model.agreement(name) for name in names])
    return model.effects(names).to_numpy(), np.tile(mean, (len(names), 1)), trust


def in_folds(names: Sequence[str], fit: Callable[[list[str]], Transfer], n_folds: int) -> list[np.ndarray]:
    """Predict every perturbation by a model that was fitted without the fold it is in."""
    fold = np.arange(len(names)) % n_folds
    found = []
    for i in range(n_folds):
        model = fit([n for n, f in zip(names, fold, strict=True) if f != i])
        found.append(predicted_by(model, [n for n, f in zip(names, fold, strict=True) if f == i]))
    order = np.argsort(np.argsort(fold, kind="stable"), kind="stable")
    return [np.concatenate(values)[order] for values in zip(*found, strict=True)]


def slopes_of(model: Transfer) -> dict[str, float]:
    return {k: float(v) for k, v in model.arrays.items() if k.startswith("slope_of_") or k in ("n_axes", "k")}


# -- tables -----------------------------------------------------------------------------------------------------------


def read(folder: Path, file: str, key: str) -> tuple[TransferSource, dict[str, pd.DataFrame]]:
    """Return a table as a source, and the effects of each context, perturbations x genes."""
    adata = ad.read_h5ad(folder / f"{file}.h5ad")
    source = TransferSource(adata, key, kind="effects", context_key="context")
    frame, contexts = adata.to_df().set_index(adata.obs[key].astype(str)), adata.obs["context"].astype(str).to_numpy()
    genes = sorted(frame.columns)
    return source, {c: frame[contexts == c].sort_index()[genes] for c in np.unique(contexts)}


def only(source: TransferSource, contexts: Sequence[str], names: Sequence[str] | None = None) -> TransferSource:
    """Return a source with some of its contexts and perturbations."""
    obs = source.adata.obs
    here = obs["context"].isin(contexts) if source.context_key else np.ones(len(obs), bool)
    if names is not None:
        here = here & obs[source.perturbation_key].isin(names)
    return replace(source, adata=source.adata[np.asarray(here)].copy())


def across(source: TransferSource, effects: dict[str, pd.DataFrame], features: dict[str, pd.DataFrame]) -> list[dict]:
    """Leave one context out, and predict it from the others."""
    out = []
    for here, frame in effects.items():
        names, genes, there = list(frame.index), list(frame.columns), [c for c in effects if c != here]
        left, common = Left(frame), {"to": here, "from": len(there), "n": len(names)}
        copied = np.mean([effects[c].reindex(names).to_numpy() for c in there], axis=0)
        out.append({"method": "copy", **common} | left.score(copied, 0.0))
        out.append({"method": "copy, relative to its mean", **common} | left.score(copied, copied.mean(axis=0)))
        rest = only(source, there)
        for table, values in {"": None, **features}.items():
            how = {"genes": genes, "perturbation_features": values}
            title = f", {table} neighbours" if table else ""
            if len(there) > 1:
                model = Transfer.fit([rest], **how)
                found = {"method": f"Transfer{title}", **common, "slopes": slopes_of(model)}
                out.append(found | left.score(*predicted_by(model, names)))
                continue
            for slope in (1.0, 0.2) if not table else (0.2,):
                model = Transfer.fit([rest], slope=slope, **how)
                label = f"slope {slope:g}"
                out.append({"method": f"Transfer, {label}{title}", **common} | left.score(*predicted_by(model, names)))
            known = in_folds(
                names, lambda some, h=here, w=how, r=rest: Transfer.fit([r, only(source, [h], some)], **w), N_FOLDS
            )
            model = Transfer.fit([rest, only(source, [here], names[N_FOLDS:])], **how)
            found = {"method": f"Transfer, some known{title}", **common, "slopes": slopes_of(model)}
            out.append(found | left.score(*known))
    return out


def unmeasured(
    source: TransferSource, effects: dict[str, pd.DataFrame], features: dict[str, pd.DataFrame]
) -> list[dict]:
    """Predict perturbations that no source has, in five folds, within a line and into another line."""
    out = []
    for table, values in features.items():
        for here, frame in effects.items():
            names = [n for n in frame.index if n in values.index]
            left = Left(frame.loc[names])
            for there, slope in [(["K562"], None), (["RPE1"], None), (["K562", "RPE1"], None), ([OTHER[here]], 0.2)]:

                def fit(some: list[str], there=there, slope=slope, values=values) -> Transfer:
                    return Transfer.fit([only(source, there, some)], perturbation_features=values, slope=slope)

                row = {"features": table, "from": " + ".join(there), "to": here, "n": len(names), "slope": slope}
                out.append(row | left.score(*in_folds(names, fit, N_FOLDS)))
    return out


def cytokines(folder: Path) -> list[dict]:
    """Transfer from pseudobulk of CD4 T cells to neutrophils, single cells without controls."""
    cd4 = ad.read_h5ad(folder / "second" / "cytokine_cd4_pseudobulk_46cond.h5ad")
    cells = ad.read_h5ad(folder / "second" / "cytokine_neutrophils_12cond.h5ad")
    source = TransferSource(cd4, "perturbation", "Ctrl_2", kind="pseudobulk")
    own = TransferSource(cells, "perturbation")
    genes = sorted(set(cd4.var_names) & set(cells.var_names))
    measured = own.measure(genes)
    frame = pd.DataFrame(measured.effects, index=measured.perturbation, columns=genes)
    names = [n for n in frame.index if n in set(cd4.obs["perturbation"])]
    left, out = Left(frame.loc[names], has_control=False), []
    common = {"n": len(names), "genes": len(genes)}
    for slope in (1.0, 0.2):
        model = Transfer.fit([source], genes=genes, slope=slope)
        label = "copy" if slope == 1 else f"slope {slope}"
        out.append({"method": f"Transfer, {label}", **common} | left.score(*predicted_by(model, names)[:2]))
    found = in_folds(names, lambda some: Transfer.fit([source, only(own, [], some)], genes=genes), len(names))
    model = Transfer.fit([source, own], genes=genes)
    row = {"method": "Transfer, the other cytokines known", **common, "slopes": slopes_of(model)}
    return [*out, row | left.score(*found[:2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[*TABLES, "unmeasured", "cytokines"])
    args = parser.parse_args()
    logging.getLogger("virtualcell").setLevel(logging.ERROR)
    start = time.perf_counter()
    features = {n: pd.read_parquet(args.data / f"{f}.parquet").set_index("gene") for n, f in FEATURES.items()}
    results: dict[str, list[dict]] = {}
    for name, (file, key) in TABLES.items():
        if name in args.only:
            results[name] = across(*read(args.data, file, key), features if name == "Replogle" else {})
    if "unmeasured" in args.only:
        results["Replogle, unmeasured"] = unmeasured(*read(args.data, *TABLES["Replogle"]), features)
    if "cytokines" in args.only:
        results["cytokines"] = cytokines(args.data)
    for title, rows in results.items():
        shown = pd.DataFrame(rows).drop(columns=["slopes", "cosine_by_third"], errors="ignore")
        print(f"\n== {title}\n{shown.round(3).to_string()}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
