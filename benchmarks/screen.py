"""Whether a screen ranks the right perturbations first, and how long one of 8,000 genes takes.

    OMP_NUM_THREADS=1 python benchmarks/screen.py --data ../shared/data --json benchmarks/results/screen.json
    ... --only speed
    ... --max-steps 5     # to try the script out

* interferon: knockouts in THP-1 cells under interferon gamma (Papalexi), ranked by how far they take back an interferon
  signature from another experiment: the genes that interferon beta induces in PBMC (Kang), which are those of the
  panel that rise in at least one of six cell types (local false sign rate below 0.05) and in more than they fall in.
  Regulators are JAK2, STAT1, IFNGR1, IFNGR2 and IRF1. "measured": all cells are learned from, and replicate 3 is
  screened; "left out": 17 targets, the regulators among them, were kept from the model in replicate 3.
* speed: seconds of `vc.tl.screen` for 8,000 genes with features (Reactome), on one thread, the model being there:
  Papalexi's screen (303 genes), and a synthetic screen of 2,000 genes and 60 targets, given names with features.
"""

from __future__ import annotations

import resource
import time

import numpy as np
import pandas as pd
import torch
from _splits import (
    KANG,
    PAPALEXI,
    PAPALEXI_HELD_OUT,
    SYNTHETIC,
    TABLES,
    arguments,
    kang,
    papalexi,
    targets,
    versions,
    write,
)

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models._effects import Effects
from virtualcell.models._shrinkage import shrink_with_signs

REGULATORS = ["JAK2", "STAT1", "IFNGR1", "IFNGR2", "IRF1"]
N_GENES, STEPS = 8000, 400
REPLICATE = "rep_3"


def induced(args) -> list[str]:
    """Genes of Papalexi's panel that interferon beta induces in Kang's cells."""
    effects = Effects.measure(Screen.from_anndata(kang(args.data), Design(**KANG)))
    found = shrink_with_signs(effects.effects, effects.variance)
    sure = found.false_sign < 0.05
    n_up, n_down = (sure & (found.mean > 0)).sum(axis=0), (sure & (found.mean < 0)).sum(axis=0)
    genes = kang(args.data).var_names[(n_up > 0) & (n_up > n_down)]
    return [gene for gene in papalexi(args.data).var_names if gene in set(genes)]


def fitted(adata, args, **options):
    start = time.perf_counter()
    training = {"max_steps": args.max_steps or STEPS, "progress_bar": False}
    model = vc.tl.fit_state(adata, se=False, validate=False, training=training, **options)
    return model, time.perf_counter() - start


def interferon(args) -> dict:
    signature, out = induced(args), {}
    print("signature:", ", ".join(signature))
    for name, held_out in (("measured", []), ("left out", PAPALEXI_HELD_OUT)):
        adata = papalexi(args.data).copy()
        options = dict(PAPALEXI)
        if held_out:
            columns = {k: v for k, v in PAPALEXI.items() if k != "library_size_key"}
            vc.pp.split(adata, **columns, holdout={"contexts": [REPLICATE], "perturbations": held_out})
            options["split_key"] = "split"
        model, seconds = fitted(adata, args, **options)
        table = vc.tl.screen(
            adata,
            context=REPLICATE,
            objective="toward",
            target={"down": signature},
            model=model,
            progress_bar=False,
        )
        ranks = pd.Series(np.arange(1, len(table) + 1), table.index)[REGULATORS]
        others = table["score"].drop(REGULATORS).to_numpy()
        auc = float((table.loc[REGULATORS, "score"].to_numpy()[:, None] > others).mean())
        print(f"\n== {name}: fit {seconds:.0f} s, regulators in the first five: {(ranks <= 5).sum()}, AUC {auc:.3f}")
        print(table.head(10).round(4).to_string())
        out[name] = {
            "ranks": ranks.to_dict(),
            "n_targets": len(table),
            "in_first_five": int((ranks <= 5).sum()),
            "auc": auc,
            "table": table[["score", "score_error", "effect", "effect_error", "n_genes", "measured"]],
        }
    return {"signature": signature, "regulators": REGULATORS, "context": REPLICATE, **out}


def speed_case(name: str, features: pd.DataFrame, args) -> tuple:
    """Cells, and the options of a fit with features."""
    if name == "papalexi, 303 genes":
        adata = papalexi(args.data).copy()
        lacking = [t for t in targets(adata) if t not in features.index]
        zeros = pd.DataFrame(0.0, index=lacking, columns=features.columns)
        return adata, {**PAPALEXI, "perturbation_features": pd.concat([features, zeros])}, REPLICATE
    adata = vc.datasets.synthetic(
        n_contexts=2, n_perturbations=60, n_genes=2000, n_cells_per_group=20, n_control_cells=300, seed=0
    )
    named = dict(zip(targets(adata), features.index[::50], strict=False))
    adata.obs["target_gene"] = [named.get(t, t) for t in adata.obs["target_gene"].astype(str)]
    return adata, {**SYNTHETIC, "perturbation_features": features, "n_top_genes": None}, "type_1"


def speed(args) -> dict:
    features, out = pd.read_parquet(args.data / f"{TABLES['Reactome']}.parquet").set_index("gene"), {}
    names = sorted(features.index)[:N_GENES]
    for name in ("papalexi, 303 genes", "synthetic, 2000 genes"):
        adata, options, context = speed_case(name, features, args)
        model, seconds = fitted(adata, args, **options)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        table = vc.tl.screen(adata, names, context=context, model=model, progress_bar=False)
        took = time.perf_counter() - start
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        unmeasured = int((table["measured"] == "no").sum())
        print(
            f"{name}: fit {seconds:.0f} s; {len(table):,} genes in {took:.0f} s, {more:.0f} MiB more memory; "
            f"{unmeasured:,} not measured; mean correlation {table.attrs['mean_correlation']:.2f}"
        )
        out[name] = {
            "n_perturbations": len(table),
            "n_unmeasured": unmeasured,
            "seconds": took,
            "seconds_of_fit": seconds,
            "MiB_more_at_peak": more,
            "mean_correlation": table.attrs["mean_correlation"],
        }
    return {**out, "threads": 1}


def main() -> None:
    parts = {"interferon": interferon, "speed": speed}
    args = arguments(__doc__, list(parts)).parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        write(args.json, name, {**parts[name](args), "max_steps": args.max_steps or STEPS, "versions": versions()})


if __name__ == "__main__":
    main()
