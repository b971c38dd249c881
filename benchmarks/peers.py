"""Other tools beside ours, on the same cells, genes and splits, scored in the same way.

Every tool runs in an environment of its own, and gets a folder of files:

    python benchmarks/peers.py prepare --work FOLDER --data ../shared/data    # in our environment
    scgen/bin/python benchmarks/peers.py scgen --work FOLDER
    gears/bin/python benchmarks/peers.py gears --work FOLDER
    arc/bin/python benchmarks/peers.py arc --work FOLDER --epochs 300      # steps
    python benchmarks/peers.py score --work FOLDER --data ../shared/data --json benchmarks/results/peers.json
    python benchmarks/peers.py page --json benchmarks/results/peers.json      # the table of docs/comparison.md

The environments (Python 3.11; the CPU build of torch where there is no GPU):

    scgen   pip install pertpy scvi-tools "statsmodels<0.15"
    gears   pip install cell-gears torch_geometric "scipy<1.14"
    arc     pip install arc-state

`prepare` writes the cells that may be seen: all but the perturbed cells of the held-out context and perturbations. Each
tool writes cells, one for each control cell of that context, as log1p of counts per 10,000; what is below zero, or
above all of a cell's counts in one gene, is set to that. One seed. Settings are those of the tool's tutorial, or
else its defaults, but for what --minutes, --epochs and --cells cut off; `settings` in the results says what was run.

* kang: IFN-beta, one of six cell types held out at a time; 2,000 genes.
* papalexi: 17 targets held out in replicate 3, measured in replicates 1 and 2; 303 genes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _peer_tools import TOOLS, Limits, dense
from scipy import sparse

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
METRICS = ["pearson_delta", "mae", "energy_distance", "variance_ratio"]
MOST = float(np.log1p(1e4))  # all of a cell's counts in one gene
PARTS = ("all 17 targets", "nine strong targets")
BASELINES = ("NoChange", "PerturbationMean", "Additive", "NearestContext")
WITH_FEATURES = ("Ridge", "NearestPerturbations")


# -- what a tool gets, and gives back ---------------------------------------------------------------------------------


def seen(work: Path, case: str) -> ad.AnnData:
    """Cells of a case that a tool may see: log1p CP10k in `X`, counts in `layers`, what to predict in `uns`."""
    return ad.read_h5ad(work / f"{case}.h5ad")


def cases(work: Path, only: list[str]) -> list[str]:
    found = sorted(p.stem for p in work.glob("*.h5ad") if "." not in p.stem)
    return [c for c in found if not only or any(c.startswith(o) for o in only)]


def hand_in(work: Path, case: str, tool: str, predicted: dict[str, np.ndarray], cells: ad.AnnData, **about) -> None:
    """Write predicted cells (log1p CP10k, a matrix for each perturbation) and what is to be said about the run."""
    names = np.repeat(list(predicted), [len(x) for x in predicted.values()])
    obs = pd.DataFrame(
        {"perturbation": names, "context": cells.uns["context"]}, index=np.arange(len(names)).astype(str)
    )
    matrix = np.concatenate(list(predicted.values()))
    out = ad.AnnData(np.maximum(matrix, 0).astype(np.float32), obs=obs, var=pd.DataFrame(index=cells.var_names))
    out.uns["about"] = json.dumps(about | {"share below zero": float((matrix < 0).mean())})
    out.write_h5ad(work / f"{case}.{tool}.h5ad")
    print(case, tool, out.shape, about, flush=True)


# -- our side ---------------------------------------------------------------------------------------------------------


def all_cases(folder: Path) -> dict[str, tuple[ad.AnnData, dict, dict]]:
    """Return data, columns and what is held out, by the name of the case."""
    from _splits import KANG, PAPALEXI, PAPALEXI_HELD_OUT, kang, papalexi

    types = sorted(kang(folder).obs["cell_type_coarse"].unique())
    found = {f"kang-{t}": (kang(folder), KANG, {"contexts": [t]}) for t in types}
    held_out = {"contexts": ["rep_3"], "perturbations": PAPALEXI_HELD_OUT}
    return found | {"papalexi-rep_3": (papalexi(folder), PAPALEXI, held_out)}


def prepare(args) -> None:
    import virtualcell as vc

    args.work.mkdir(parents=True, exist_ok=True)
    sets = gzip.decompress((args.data / "reactome_msigdb2023_2.gmt.gz").read_bytes())
    (args.work / "reactome.gmt").write_bytes(sets)  # for GEARS
    for case, (adata, design, holdout) in all_cases(args.data).items():
        adata = adata.copy()
        vc.pp.split(adata, **{k: v for k, v in design.items() if k != "library_size_key"}, holdout=holdout)
        model = vc.tl.fit_baseline(adata, "NoChange", **design, split_key="split")
        totals = adata.obs[design["library_size_key"]] if "library_size_key" in design else dense(adata.X.sum(axis=1))
        is_test = (adata.obs["split"] == "test").to_numpy()
        counts = adata[:, list(model.genes)].X.tocsr()
        totals = np.asarray(totals, dtype=np.float64).ravel()
        obs = pd.DataFrame(
            {
                "perturbation": adata.obs[design["perturbation_key"]].astype(str).astype(object),
                "context": adata.obs[design["context_key"]].astype(str).astype(object),
                "split": adata.obs["split"].astype(str).astype(object),
                "total": totals,
            }
        )
        log = sparse.csr_matrix(np.log1p(counts.multiply(1e4 / totals[:, None]).toarray()), dtype=np.float32)
        out = ad.AnnData(log, obs=obs, var=pd.DataFrame(index=list(model.genes)), layers={"counts": counts})
        held_out = sorted(set(obs["perturbation"][is_test]))
        out = out[~is_test].copy()
        out.uns |= {"context": holdout["contexts"][0], "control": design["control"], "held_out": held_out}
        out.write_h5ad(args.work / f"{case}.h5ad")
        print(case, out.shape, f"{is_test.sum()} test cells", held_out)


def features_of(folder: Path, adata: ad.AnnData) -> pd.DataFrame:
    """Return what Reactome and STRING say of the targets."""
    from _splits import PAPALEXI_HELD_OUT, gene_features

    return gene_features(folder, adata, PAPALEXI_HELD_OUT)[0]["knowledge"]


def ours(folder: Path, case: str, adata: ad.AnnData, design: dict, holdout: dict) -> dict[str, ad.AnnData]:
    """Predict cells with our baselines."""
    import virtualcell as vc

    adata = adata.copy()
    vc.pp.split(adata, **{k: v for k, v in design.items() if k != "library_size_key"}, holdout=holdout)
    context, out = holdout["contexts"][0], {}
    names = sorted(set(adata.obs[design["perturbation_key"]][(adata.obs["split"] == "test").to_numpy()]))
    for name in BASELINES + (WITH_FEATURES if case.startswith("papalexi") else ()):
        features = {"perturbation_features": features_of(folder, adata)} if name in WITH_FEATURES else {}
        model = vc.tl.fit_baseline(adata, name, **design, split_key="split", **features)
        out[name] = vc.tl.predict_perturbation(adata, names, context=context, model=model)
    return out


def score(args) -> None:
    """Score what the tools handed in, and our baselines."""
    from _splits import PAPALEXI_STRONG, plain

    import virtualcell as vc

    frames, about = [], {}
    for case, (adata, design, holdout) in all_cases(args.data).items():
        if case not in cases(args.work, args.only):
            continue
        columns = {"perturbation": design["perturbation_key"], "context": design["context_key"]}
        found = ours(args.data, case, adata, design, holdout)
        for file in sorted(args.work.glob(f"{case}.*.h5ad")):
            predicted = ad.read_h5ad(file)
            predicted.obs = predicted.obs.rename(columns=columns)
            tool = file.stem.removeprefix(f"{case}.")
            above = {"share above the most that a cell can have": float((predicted.X > MOST).mean())}
            predicted.X = np.minimum(predicted.X, MOST)
            about.setdefault(tool, {})[case] = json.loads(predicted.uns["about"]) | above
            found[tool] = predicted
        genes = list(seen(args.work, case).var_names)
        for name, predicted in found.items():
            scores = vc.tl.evaluate(predicted, adata.copy(), **design, suite=METRICS, scale="counts", genes=genes)
            frames.append(scores[scores["source"] == "model"].assign(model=name, case=case))
    scores = pd.concat(frames, ignore_index=True)
    strong = scores["perturbation"].isin(PAPALEXI_STRONG)
    is_kang = scores["case"].str.startswith("kang")
    rows = {"kang": is_kang, PARTS[0]: ~is_kang, PARTS[1]: ~is_kang & strong}
    tables = {name: table(scores[r]) for name, r in rows.items() if r.any()}
    by_type = scores[is_kang].pivot_table(index="case", columns=["metric", "model"], values="value")
    result = {
        "tables": tables,
        "kang_by_type": {m: by_type[m] for m in METRICS},
        "runs": about,
        "n_scored": scores.groupby(["model", "case"])["perturbation"].nunique().unstack(),
    }
    for name, t in tables.items():
        print(f"\n== {name}\n{t.round(4).to_string()}")
    if args.json is not None:  # tools that were scored before, and whose files are gone, keep their figures
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(updated(before, plain(result)), indent=1) + "\n")


def updated(before: dict, now: dict) -> dict:
    """Dictionaries in dictionaries, with what is in `now` in place of what was there."""
    both = {k: updated(before[k], v) if isinstance(v, dict) and k in before else v for k, v in now.items()}
    return before | both


def table(scores: pd.DataFrame) -> pd.DataFrame:
    """Models x metrics: the mean over everything that was scored."""
    return scores.groupby(["model", "metric"])["value"].mean().unstack()[METRICS]


PAGE = Path(__file__).resolve().parents[1] / "docs" / "comparison.md"
ROWS = {
    "NoChange": "no change",
    "Additive": "Additive (linear)",
    "NearestContext": "NearestContext",
    "scgen": "scGen, cut short",
    "arc": "arc-state, cut down",
}
OF_ST = {"ST": "ST (virtualcell)", "ceiling": "ceiling", "corrected ceiling": "corrected ceiling"}


def page(args) -> None:
    """Put the table of Kang's cells into the page: the results of `score`, and of ST and the ceilings from `st.py`."""
    from tables import DIGITS, NAMES, header, row

    found = json.loads(args.json.read_text())["kang_by_type"]
    st = json.loads(args.json.with_name("st.json").read_text())["kang"]["by_context"]
    types = [case.removeprefix("kang-") for case in found["mae"]]
    lines = [header(["predictor", *(f"{NAMES[m]}: {t}" for m in METRICS[:3] for t in ("mean", ", ".join(types)))])]
    for model, label in (ROWS | OF_ST).items():
        cells = [label]
        for metric in METRICS[:3]:
            of = {t: st[metric][t] if model in OF_ST else found[metric][f"kang-{t}"] for t in types}
            values = [of[t][model] for t in types]
            digits = DIGITS.get(metric, 3)
            cells += [f"{np.mean(values):.{digits}f}", ", ".join(f"{v:.{digits}f}" for v in values)]
        lines.append(row(cells))
    place = re.compile(r"^<!-- peers: kang -->\n(?:.+\n)*", flags=re.M)
    PAGE.write_text(place.sub("<!-- peers: kang -->\n" + "\n".join(lines) + "\n", PAGE.read_text()))


# -- running one of them ----------------------------------------------------------------------------------------------


def run(args) -> None:
    """Run one tool on every case that it is for and that it has not done."""
    limits = Limits(args.minutes, args.epochs, args.cells)
    for case in cases(args.work, args.only):
        if args.command == "gears" and case.startswith("kang"):
            continue  # its perturbations are genes
        if (args.work / f"{case}.{args.command}.h5ad").exists():
            continue
        cells = seen(args.work, case)
        begin = time.perf_counter()
        predicted, about = TOOLS[args.command](cells.copy(), args.work, case, limits)
        hand_in(args.work, case, args.command, predicted, cells, seconds=round(time.perf_counter() - begin), **about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", *TOOLS, "score", "page"])
    parser.add_argument(
        "--work", type=Path, default=Path("peers"), help="folder of the files that go to the tools and back"
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of names of cases, such as kang-B")
    parser.add_argument("--minutes", type=float, default=600, help="that scGen may train on a case")
    parser.add_argument("--epochs", type=int, default=20, help="of GEARS; steps of arc-state")
    parser.add_argument("--cells", type=int, help="of a perturbation in a context, for GEARS; all by default")
    parser.add_argument("--json", type=Path, help="file of results, for score and page")
    args = parser.parse_args()
    args.work = args.work.resolve()
    {"prepare": prepare, "score": score, "page": page}.get(args.command, run)(args)


if __name__ == "__main__":
    main()
