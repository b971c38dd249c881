"""What shrinkage makes of measured effects, by halves of cells: one is shrunken, the other one says how near it is.

    OMP_NUM_THREADS=1 python benchmarks/shrinkage.py --data ../shared/data --json benchmarks/results/shrinkage.json

Training cells only: what the splits of `st.py` hold out has no part in it. Control cells are halved too. "raw": as
measured; "each row alone": adaptive shrinkage of every effect by itself; "rows together": as the package does it, genes
that move in other perturbations being believed more. Pearson delta, and squared and absolute error relative to no
change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from _splits import (
    KANG,
    PAPALEXI,
    PAPALEXI_HELD_OUT,
    SCREEN,
    SYNTHETIC,
    arguments,
    glioblastoma,
    kang,
    norman,
    papalexi,
    synthetic,
    targets,
    versions,
    write,
)

from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.models import _transferred
from virtualcell.models._effects import Effects
from virtualcell.models._scale import as_ratios, change_of_mean
from virtualcell.models._shrinkage import Shrunken, shrink

PANEL = {**SCREEN, "library_size_key": "total_counts"}


def norman_training(folder: Path):
    adata = norman(folder)
    names = set(targets(adata))
    pairs = [n for n in names if "+" in n and set(n.split("+")) <= names]
    return adata[~adata.obs["target_gene"].isin(pairs)], PANEL


def papalexi_training(folder: Path):
    adata = papalexi(folder)
    out = (adata.obs["batch"] == "rep_3") & adata.obs["target_gene"].isin(PAPALEXI_HELD_OUT)
    return adata[~out.to_numpy()], PAPALEXI


def synthetic_training(_: Path):
    adata = synthetic(4, 100, 2026)
    return adata[(adata.obs["cell_type"] != "type_4").to_numpy()], SYNTHETIC


SETS = {
    "kang": lambda folder: (kang(folder), KANG),
    "papalexi": papalexi_training,
    "norman": norman_training,
    "glioblastoma": lambda folder: (glioblastoma(folder), {**PANEL, "context_key": "cell_type"}),
    "synthetic": synthetic_training,
}


def alone(effects: np.ndarray, variance: np.ndarray) -> Shrunken:
    if not len(effects):
        return shrink(effects, variance)
    rows = [shrink(effects[i : i + 1], variance[i : i + 1]) for i in range(len(effects))]
    return Shrunken(*(np.concatenate(part) for part in zip(*rows, strict=True)))


FORMS: dict[str, Callable] = {
    "raw": lambda effects, variance: Shrunken(effects, variance),
    "each row alone": alone,
    "rows together": shrink,
}


def halves(screen: Screen, seed: int) -> tuple[Effects, Effects]:
    first = np.random.default_rng(seed).random(screen.n_cells) < 0.5
    return Effects.measure(screen, first), Effects.measure(screen, ~first)


def scores(one: Effects, other: Effects, form: Callable) -> dict[str, float]:
    _transferred.shrink = form
    effects = _transferred.shrunken(as_ratios(one)).effects
    _transferred.shrink = shrink
    predicted = np.stack([change_of_mean(one.controls[c], e) for c, e in zip(one.context, effects, strict=True)])
    seen = other.effects
    r = [np.corrcoef(p, o)[0, 1] if p.std() > 0 else 0.0 for p, o in zip(predicted, seen, strict=True)]
    squared, absolute = np.square(predicted - seen).sum(), np.abs(predicted - seen).sum()
    return {
        "pearson_delta": float(np.mean(r)),
        "squared_error": float(squared / np.square(seen).sum()),
        "absolute_error": float(absolute / np.abs(seen).sum()),
    }


def main() -> None:
    args = arguments(__doc__, list(SETS)).parse_args()
    for name in args.only:
        adata, design = SETS[name](args.data)
        screen = Screen.from_anndata(adata.copy(), Design(**design, scale="counts"))
        rows = []
        for seed in range(args.seeds):
            one, other = halves(screen, seed)
            if one.pairs() != other.pairs():
                continue  # a group without cells in one of the halves
            for a, b in ((one, other), (other, one)):
                rows += [{"form": form, **scores(a, b, how)} for form, how in FORMS.items()]
        table = pd.DataFrame(rows).groupby("form", sort=False).mean()
        print(f"\n== {name}\n{table.round(4).to_string()}")
        write(args.json, name, {"mean": table, "settings": {"seeds": range(args.seeds)}, "versions": versions()})


if __name__ == "__main__":
    main()
