"""An atlas on disk: `fit_state` with a small SE and ST on up to a million cells that are never in memory.

    OMP_NUM_THREADS=1 python benchmarks/atlas.py --cells 10_000 100_000 1_000_000 --json benchmarks/results/atlas.json
    ... --cells 200_000 --files 5     # the same cells in memory, in one file, and in five with other orders of genes
    python benchmarks/atlas.py --json benchmarks/results/atlas.json --page docs/scale.md     # the table of the page

Counts are simulated: 4 contexts, 50 perturbations and controls, 5,000 genes, 6 to 7 % of the entries expressed, cells
in random order. Files are written block by block into `--folder`, and removed at the end.

Every fit runs in a process of its own: genes by variance, 200 steps of a small ST on effects that are measured on all
cells, embeddings of all cells by a tiny SE, no verdict. SE was trained before on the first 2,000 cells of the one file,
so that it is the same for all. What the fit is made of is a backed h5ad (`disk`), once more with the copy that the
first fit left in the cache (`disk again`), the same file read into memory (`memory`), or files that `vc.pp.read_lazy`
put together (`files`).

* peak_anonymous: most memory of the process that no file backs (RssAnon of /proc, looked at every 50 ms), GB.
* peak_resident: its most resident memory (VmHWM), GB: with the pages of files that it has mapped, which the system
  takes back when somebody else needs memory.
* before: resident memory before the fit, with all packages imported, GB.
* seconds, cpu_seconds: of the fit, by the clock and by what the process computed; a busy machine makes the first
  longer.
* cells_per_cpu_second: with the training steps, which are the same for any number of cells; marginal_ms_per_cell: CPU
  time of every cell more than in the next smaller data set, without them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from tables import header, row

N_GENES, N_PERTURBATIONS, N_CONTEXTS, BLOCK = 5_000, 50, 4, 20_000
KEYS = {"perturbation_key": "perturbation", "control": "control", "context_key": "context"}
SE = {"n_hidden": 32, "n_layers": 1, "n_heads": 2, "n_feedforward": 64, "n_output": 32, "length": 64}
NAMES = {"memory": "in memory", "disk": "backed h5ad", "disk again": "backed h5ad, copied before"}
NAMES["files"] = "five files, genes in other orders"
PLACE = re.compile(r"^<!-- atlas -->\n(?:.+\n)*", flags=re.M)
FIT = {"size": "small", "validate": False, "n_top_genes": 1000}
FIT["network"] = {"n_hidden": 64, "set_size": 32}
FIT["training"] = {"max_steps": 200, "progress_bar": False, "accelerator": "cpu"}


# -- data -------------------------------------------------------------------------------------------------------------


def labels(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    names = np.array(["control", *(f"G{i:04d}" for i in range(N_PERTURBATIONS))])
    obs = {
        "perturbation": pd.Categorical(names[np.maximum(rng.integers(-10, N_PERTURBATIONS + 1, n), 0)]),
        "context": pd.Categorical(np.array([f"c{i}" for i in range(N_CONTEXTS)])[rng.integers(0, N_CONTEXTS, n)]),
    }
    return pd.DataFrame(obs, index=[f"cell{i:07d}" for i in range(n)])


def profiles() -> np.ndarray:
    """Cumulated shares of genes of every (context, perturbation), each of which changes a fiftieth of the genes."""
    rng = np.random.default_rng(2)
    base = rng.gamma(0.6, size=N_GENES) + 1e-3
    of_context = base * rng.lognormal(0, 0.4, (N_CONTEXTS, N_GENES))
    changes = np.ones((N_PERTURBATIONS + 1, N_GENES))
    for i in range(1, N_PERTURBATIONS + 1):
        changes[i, rng.choice(N_GENES, N_GENES // 50, replace=False)] = rng.choice([0.3, 3.0], N_GENES // 50)
    shares = (of_context[:, None] * changes).reshape(-1, N_GENES)
    return np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)


def block_of(obs: pd.DataFrame, start: int, stop: int, cumulated: np.ndarray) -> sparse.csr_matrix:
    """Draw the counts of some cells, the same whatever the blocks before."""
    rng = np.random.default_rng([3, start])
    part = obs.iloc[start:stop]
    group = part["context"].cat.codes.to_numpy(int) * (N_PERTURBATIONS + 1) + part["perturbation"].cat.codes
    totals = np.maximum(rng.lognormal(np.log(420), 0.25, stop - start).astype(int), 50)
    rows, genes = [], []
    for g in np.unique(group):
        cells = np.flatnonzero(group == g)
        rows.append(np.repeat(cells, totals[cells]))
        genes.append(np.minimum(np.searchsorted(cumulated[g], rng.random(len(rows[-1]))), N_GENES - 1))
    rows, genes = np.concatenate(rows), np.concatenate(genes)
    shape = (stop - start, N_GENES)
    return sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, genes)), shape=shape
    )  # adds up what is drawn twice


def write(folder: Path, n: int, n_files: int) -> dict[str, list[str]]:
    """Write the cells as one file and, where asked for, as several with genes in orders of their own."""
    from anndata.io import sparse_dataset, write_elem

    obs, cumulated, names = labels(n), profiles(), np.array([f"G{i:04d}" for i in range(N_GENES)])
    edges = np.linspace(0, n, n_files + 1).astype(int) if n_files > 1 else []
    parts = [(folder / "atlas.h5ad", 0, n, np.arange(N_GENES))]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        parts.append((folder / f"part{i}.h5ad", int(a), int(b), np.random.default_rng(i).permutation(N_GENES)))
    for path, first, last, order in parts:
        with h5py.File(path, "w") as file:
            write_elem(file, "obs", obs.iloc[first:last])
            write_elem(file, "var", pd.DataFrame(index=names[order]))
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            for start in range(0, n, BLOCK):
                stop = min(start + BLOCK, n)
                if stop <= first or start >= last:
                    continue
                counts = block_of(obs, start, stop, cumulated)[max(first - start, 0) : last - start][:, order]
                counts.sort_indices()
                counts.indptr = counts.indptr.astype(np.int64)
                if "X" in file:
                    sparse_dataset(file["X"]).append(counts)
                else:
                    write_elem(file, "X", counts)
    return {"one": [str(parts[0][0])], "several": [str(path) for path, *_ in parts[1:]]}


# -- one fit, in a process of its own ---------------------------------------------------------------------------------


def status(name: str) -> float:
    """Return what a line of /proc/self/status says, GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


class Watch(threading.Thread):
    """The most memory that no file backs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.is_over = 0.0, threading.Event()

    def run(self) -> None:
        """Look every 50 ms."""
        while not self.is_over.wait(0.05):
            self.most = max(self.most, status("RssAnon"))


def tiny_se(cells):
    import torch

    import virtualcell as vc

    torch.manual_seed(0)
    table = vc.pp.expression_gene_embeddings(cells, n_comps=32)
    vc.models.SE.setup_anndata(cells)
    se = vc.models.SE(cells, table, **SE)
    se.train(max_steps=30, progress_bar=False, accelerator="cpu")
    se.forget_data()
    return se


def fit(source: str, paths: list[str], one: str, cache: str, results: str) -> dict:
    import anndata as ad

    import virtualcell as vc

    _ = vc.tl.fit_state, vc.pp.read_lazy  # imported before the clock starts
    vc.settings.cache_dir, vc.settings.progress, vc.settings.verbosity = cache, False, "error"
    before = status("VmRSS")
    watch = Watch()
    watch.start()
    if source == "memory":
        adata = ad.read_h5ad(paths[0])
    else:
        adata = vc.pp.read_lazy(paths) if source == "files" else ad.read_h5ad(paths[0], backed="r")
    se = tiny_se(ad.read_h5ad(one, backed="r")[:2000].to_memory())
    start, computed = time.perf_counter(), time.process_time()
    st = vc.tl.fit_state(adata, **KEYS, **FIT, se=se)
    seconds, computed = time.perf_counter() - start, time.process_time() - computed
    watch.is_over.set()
    measured = {
        "source": source, "cells": adata.n_obs, "seconds": seconds,
        "cpu_seconds": computed, "cells_per_cpu_second": adata.n_obs / computed,
        "peak_anonymous": watch.most, "peak_resident": status("VmHWM"),
        "before": before,
    }  # fmt: skip
    start = time.perf_counter()
    predicted = vc.tl.predict_perturbation(adata, st.perturbations[:5], context="c0", emit="mean", model=st)
    measured["seconds_to_predict"] = time.perf_counter() - start
    np.savez(
        results,
        genes=np.array(st.genes),
        embedding=np.asarray(adata.obsm["X_state"]),
        names=adata.obs_names.to_numpy(str),
        predicted=predicted[:, sorted(predicted.var_names)].to_df().to_numpy(),
    )
    return measured


def in_process(source: str, paths: dict[str, list[str]], cache: Path, results: Path) -> dict:
    which = paths["several" if source == "files" else "one"]
    told = {"source": source, "paths": which, "one": paths["one"][0], "cache": str(cache), "results": str(results)}
    told = json.dumps(told)
    done = subprocess.run([sys.executable, __file__, "--one", told], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source} of {paths} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def difference(a: Path, b: Path) -> dict:
    """How far results of two fits are apart at most: chosen genes, embeddings of cells by name, predictions."""
    one, two = np.load(a), np.load(b)
    place = pd.Index(two["names"]).get_indexer(one["names"])
    scale = np.abs(one["embedding"]).max()
    return {
        "same_genes": bool(np.array_equal(one["genes"], two["genes"])),
        "embedding": float(np.abs(one["embedding"] - two["embedding"][place]).max() / scale),
        "prediction": float(np.abs(one["predicted"] - two["predicted"]).max()),
    }


def measure(n: int, n_files: int, sources: list[str], folder: Path) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="atlas-", dir=folder))
    try:
        start = time.perf_counter()
        paths = write(folder, n, n_files)
        found = {"cells": n, "seconds_to_write": time.perf_counter() - start, "runs": []}
        found["gigabytes"] = Path(paths["one"][0]).stat().st_size / 1e9
        with h5py.File(paths["one"][0]) as file:
            found["density"] = len(file["X/data"]) / n / N_GENES
        for source in sources:
            cache = folder / ("cache" if source.startswith("disk") else f"cache-{source}")
            run = in_process(source, paths, cache, folder / f"{source}.npz")
            if source == "disk":
                run["gigabytes_of_copy"] = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) / 1e9
            if source != sources[0]:
                run[f"difference_from_{sources[0]}"] = difference(
                    folder / f"{sources[0]}.npz", folder / f"{source}.npz"
                )
            found["runs"].append(run)
            print(json.dumps(run), flush=True)
        return found
    finally:
        shutil.rmtree(folder)


def with_marginal(found: list[dict]) -> None:
    """Add what every cell more costs, for each source, from one size to the next."""
    for source in {run["source"] for one in found for run in one["runs"]}:
        runs = sorted((r for one in found for r in one["runs"] if r["source"] == source), key=lambda r: r["cells"])
        for less, more in itertools.pairwise(runs):
            if more["cells"] > less["cells"]:
                seconds = more["cpu_seconds"] - less["cpu_seconds"]
                more["marginal_ms_per_cell"] = 1000 * seconds / (more["cells"] - less["cells"])


def table(sizes: list[dict]) -> str:
    """Table of the page; throughput and differences are from the same cells in memory, where they were measured."""
    columns = ["cells", "matrix", "peak of the process's own memory, GiB", "with mapped files, GiB", "CPU seconds"]
    columns += ["cells per CPU second", "of in memory", "embeddings differ by", "predictions differ by"]
    lines = [header(columns)]
    for size in sorted(sizes, key=lambda one: one["cells"]):
        rate = {run["source"]: run["cells_per_cpu_second"] for run in size["runs"]}
        for run in size["runs"]:
            apart = run.get("difference_from_memory", {})
            lines.append(
                row(
                    [
                        f"{run['cells']:,}",
                        NAMES[run["source"]],
                        *(f"{run[name]:.2f}" for name in ("peak_anonymous", "peak_resident")),
                        f"{run['cpu_seconds']:.0f}",
                        f"{run['cells_per_cpu_second']:,.0f}",
                        f"{run['cells_per_cpu_second'] / rate['memory']:.0%}" if "memory" in rate else "",
                        *(f"{apart[name]:.1g}" if name in apart else "" for name in ("embedding", "prediction")),
                    ]
                )
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--sources", nargs="+", help="memory, disk, 'disk again', files; by default all that fit")
    parser.add_argument("--most-in-memory", type=int, default=200_000, help="cells beyond which memory is left out")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, help="file that results are added to, in place of those of the same kind")
    parser.add_argument("--page", type=Path, help="page whose table is made of the results in --json, and nothing else")
    parser.add_argument("--one", type=json.loads)
    given = parser.parse_args()
    if given.page is not None:
        text = table(json.loads(given.json.read_text())["sizes"])
        given.page.write_text(PLACE.sub(lambda _: f"<!-- atlas -->\n{text}\n", given.page.read_text()))
        return
    if given.one is not None:
        print(json.dumps(fit(**given.one)))
        return
    found = []
    for n in given.cells:
        sources = given.sources or [
            *(["memory"] if n <= given.most_in_memory else []), "disk", "disk again",
            *(["files"] if given.files > 1 else []),
        ]  # fmt: skip
        found.append({"files": given.files, **measure(n, given.files, sources, given.folder)})
        if given.json is None:
            continue
        before = json.loads(given.json.read_text())["sizes"] if given.json.exists() else []
        kept = [one for one in before if (one["cells"], one["files"]) not in {(f["cells"], f["files"]) for f in found}]
        sizes = sorted([*kept, *found], key=lambda one: (one["files"], one["cells"]))
        with_marginal(sizes)
        machine = {"cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")}
        given.json.write_text(json.dumps({"machine": machine, "n_genes": N_GENES, "sizes": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
