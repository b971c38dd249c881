"""What `fit_state` costs beside its networks: memory, the verdict, the rate of training steps; on simulated counts.

    OMP_NUM_THREADS=1 python benchmarks/costs.py --json benchmarks/results/costs.json
    ... --former ../former            # a checkout of another commit, measured in the same run
    ... --only verdict

* memory: 20,000 cells x 2,000 genes, a tenth of the entries expressed, 40 perturbations in 4 contexts: peak above X of
  `fit_state(se=False)` with all genes and two steps, in multiples of X (values and column numbers).
* verdict: 4 contexts x 4,000 control cells x 1,000 genes, 40 groups and 6 models: seconds of the verdict alone.
* steps: training steps of the small network through `fit_state`, 2,000 genes: cells a second with 8 sets of 64 cells a
  step, and where there is a GPU with 64 sets (a former commit, which has 8 sets in any case, is measured with these).
* uns: bytes that the stored model takes beside its network, at 400 perturbations x 5 contexts x 1,000 genes.

Every measurement runs in a process of its own. A `--former` commit is called by the arguments that it had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

KEYS = {"perturbation_key": "p", "control": "ctl", "context_key": "c"}


def screen(n_controls: int, n_per_group: int, n_perturbations: int, n_contexts: int, n_genes: int, density: float):
    """Random counts without any effect: what is measured here does not depend on any."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([["ctl"] * n_controls, np.repeat([f"P{i}" for i in range(n_perturbations)], n_per_group)])
    labels, contexts = np.tile(labels, n_contexts), np.repeat([f"c{i}" for i in range(n_contexts)], len(labels))
    n, k = len(labels), int(density * n_genes)
    patterns = np.sort(np.argpartition(rng.random((200, n_genes)), k, axis=1)[:, :k], axis=1).astype(np.int32)
    indices = patterns[rng.integers(0, 200, n)].ravel()
    counts = rng.integers(1, 6, n * k).astype(np.float32)
    matrix = sparse.csr_matrix((counts, indices, np.arange(0, n * k + 1, k)), shape=(n, n_genes))
    obs = pd.DataFrame({"p": labels, "c": contexts}, index=[f"cell{i:06d}" for i in range(n)])
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"G{i:04d}" for i in range(n_genes)]))


def fit(adata: ad.AnnData, *, max_steps: int, validate: bool, n_sets: int = 8):
    """Call `fit_state` as this commit, or one before, has it."""
    import inspect

    import virtualcell as vc

    shared = {**KEYS, "se": False, "n_top_genes": None, "validate": validate}
    training = {"max_steps": max_steps, "progress_bar": False, "batch_size": n_sets}
    if "training" in inspect.signature(vc.tl.fit_state).parameters:
        return vc.tl.fit_state(adata, **shared, training=training)
    return vc.tl.fit_state(
        adata, **shared, max_steps=max_steps, train_kwargs={"batch_size": n_sets}, enable_progress_bar=False
    )


def memory() -> dict[str, float]:
    warm = screen(20, 12, 2, 2, 50, 0.2)
    fit(warm, max_steps=2, validate=False)
    adata = screen(1000, 100, 40, 4, 2000, 0.1)
    size = adata.X.data.nbytes + adata.X.indices.nbytes

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    fit(adata, max_steps=2, validate=False)
    done.set()
    thread.join()
    return {"X_mb": size / 1e6, "peak_above_X_in_X": (peak[0] - before) / size}


def verdict() -> dict[str, float]:
    import virtualcell.tl._fit as module

    name = "compare_with_baselines" if hasattr(module, "compare_with_baselines") else "judge"  # as it was called before
    spent, compare = [], getattr(module, name)

    def timed(*arguments: object, **keywords: object) -> object:
        start = time.perf_counter()
        out = compare(*arguments, **keywords)
        spent.append(time.perf_counter() - start)
        return out

    setattr(module, name, timed)
    fit(screen(4000, 12, 10, 4, 1000, 0.1), max_steps=5, validate=True)
    return {"verdict_seconds": spent[0]}


def steps() -> dict[str, float]:
    import torch

    adata, found = screen(500, 64, 20, 4, 2000, 0.1), {}
    short, long = (20, 120) if not torch.cuda.is_available() else (50, 550)
    for n_sets in (8, 64) if torch.cuda.is_available() else (8,):
        seconds = {}
        for n in (short, long):
            start = time.perf_counter()
            fit(adata.copy(), max_steps=n, validate=False, n_sets=n_sets)
            seconds[n] = time.perf_counter() - start
        rate = (long - short) / (seconds[long] - seconds[short])
        found[f"cells_per_second_{n_sets}_sets"] = rate * n_sets * 64
    return found


def uns() -> dict[str, float]:
    adata = screen(50, 12, 400, 5, 1000, 0.05)
    st = fit(adata, max_steps=2, validate=False)
    stored = adata.uns["virtualcell"]["st"]
    weights = stored["weights"] if isinstance(stored, dict) else stored
    network = sum(p.numel() * p.element_size() for p in st.module.parameters())
    return {"stored_mb": weights.nbytes / 1e6, "beside_the_network_mb": (weights.nbytes - network) / 1e6}


MEASURED = {f.__name__: f for f in (memory, verdict, steps, uns)}


def in_a_process(name: str, source: Path) -> dict[str, float]:
    """Measure one thing with the package in `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file of results")
    parser.add_argument("--former", type=Path, help="checkout of another commit to measure beside this one")
    parser.add_argument("--only", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    parser.add_argument("--measure", choices=list(MEASURED), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.measure:
        print(json.dumps(MEASURED[args.measure]()))
        return
    here = Path(__file__).resolve().parents[1]
    checkouts = {"this commit": here} | ({"former commit": args.former} if args.former else {})
    result: dict = {}
    for name in args.only:
        result[name] = {label: in_a_process(name, folder / "src") for label, folder in checkouts.items()}
        for label, found in result[name].items():
            print(f"{name}, {label}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(before | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
