"""Agreement with the reference package on its tiny random models, and the cost of a model of SE-600M's size.

python benchmarks/arc.py [--json] [--no-large]

The tiny models and what the reference computed from them lie beside the checkout; set VIRTUALCELL_TEST_DATA to the
folder that holds `golden`. The large model has random weights: the published ones are not run here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

import virtualcell as vc
from virtualcell.io._arc_se import write_se
from virtualcell.modules import SEConfig, SENetwork

RESULT = Path(__file__).parent / "results" / "arc.json"
GOLDEN = Path(os.environ.get("VIRTUALCELL_TEST_DATA", Path(__file__).resolve().parents[2] / "shared")) / "golden"
NAMES = ["p0", "p1", "p2", "p3", "non-targeting"]
SE_600M = SEConfig(
    n_token=5120, n_hidden=2048, n_layers=16, n_heads=16, n_feedforward=2048, n_output=2048, n_datasets=1000
)
N_GENES = 19_790


def se_difference(folder: Path, reference: Path, checkpoint: str | None = None) -> float:
    """Largest difference of embeddings and decoded genes."""
    expected = load_file(reference / "expected.safetensors")
    genes = json.loads((reference / "description.json").read_text())["decoded_genes"]
    cells = ad.read_h5ad(reference / "cells.h5ad")
    se = vc.models.SE.from_arc(folder, checkpoint=checkpoint)
    vc.tl.embed(cells, se)
    x = cells.obsm["X_state"]
    pairs = [
        (x, torch.cat([expected["cell_embedding"], expected["dataset_embedding"]], dim=1)),
        (se.decode(x, genes, read_depth=4.0).to_numpy(), expected["decoded_read_depth_4"]),
    ]
    return max(float(np.abs(a - b.numpy()).max()) for a, b in pairs)


def st_difference(st: vc.models.ST, reference: Path) -> float:
    """Largest difference of predicted cells, genes and confidence."""
    expected = {k: v.numpy() for k, v in load_file(reference / "expected.safetensors").items()}
    if "predicted" not in expected:
        named = {k.removeprefix("predicted."): v for k, v in expected.items() if k.startswith("predicted.")}
        return max(float(np.abs(st.predict_sets(expected["control"], k)["cells"] - v).max()) for k, v in named.items())
    worst, s = 0.0, st.set_size
    for i in range(len(expected["control"]) // s):
        rows = slice(i * s, (i + 1) * s)
        name = NAMES[int(expected["perturbation"][rows.start].argmax())]
        batch = expected["batch"][rows].astype(int) if st.batches else None
        found = st.predict_sets(expected["control"][rows], name, batch)
        for ours, theirs in {"cells": "predicted", "genes": "predicted_genes"}.items():
            if ours in found:
                worst = max(worst, float(np.abs(found[ours] - expected[theirs][rows]).max()))
        if "confidence" in expected:
            control, codes = torch.from_numpy(expected["control"][rows])[None], torch.from_numpy(batch)[None]
            with torch.no_grad():
                out = st.module(control, st.table.encode([name]), codes)
            worst = max(worst, abs(float(out.confidence) - float(expected["confidence"][i, 0])))
    return worst


def agreement(temporary: Path) -> dict[str, dict[str, float]]:
    """Largest difference per folder: as loaded, and after writing Arc's format and loading that."""
    table = {}
    for label, checkpoint in (("se", None), ("se (model.ckpt)", "model.ckpt")):
        se = vc.models.SE.from_arc(GOLDEN / "se", checkpoint=checkpoint)
        se.to_arc(temporary / label)
        table[label] = {
            "from_arc": se_difference(GOLDEN / "se", GOLDEN / "se", checkpoint),
            "to_arc, from_arc": se_difference(temporary / label, GOLDEN / "se"),
        }
    for name in ("st_genes", "st_genes_batch", "st_all_genes", "st_embedding", "st_run"):
        folder = GOLDEN / name
        if name == "st_run":
            st = vc.models.ST.from_arc(folder)
        else:
            h = json.loads((folder / "description.json").read_text())["hyper_parameters"]
            n = h["decoder_cfg"]["gene_dim"] if h["decoder_cfg"] else h["output_dim"]
            genes = [f"gene{i}" for i in range(n)]
            st = vc.models.ST.from_arc(folder / "model.ckpt", gene_names=genes, perturbations=NAMES)
        st.to_arc(temporary / name)
        table[name] = {
            "from_arc": st_difference(st, folder),
            "to_arc, from_arc": st_difference(vc.models.ST.from_arc(temporary / name), folder),
        }
    return table


def write_large(folder: Path) -> None:
    torch.manual_seed(0)
    arguments = {"length": 2047, "n_targets": (512, 256, 512), "cls_expression_gene": 3, "fill_sentences": True}
    genes = pd.Index([f"GENE{i}" for i in range(N_GENES)])
    write_se(folder, SENetwork(SE_600M), genes, torch.randn(N_GENES, 5120), arguments, overwrite=False)


def run_large(folder: Path, queue: multiprocessing.Queue) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.3, (4, N_GENES)).astype(np.float32)
    cells = ad.AnnData(counts, var=pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)]))
    start = time.perf_counter()
    se = vc.models.SE.from_arc(folder)
    # weights are mapped, not copied: this reads every page
    total = sum(float(p.detach().sum()) for p in se.module.parameters())
    loaded = time.perf_counter()
    vc.tl.embed(cells, se, batch_size=4)
    done = time.perf_counter()
    x = cells.obsm["X_state"]
    queue.put(
        {
            "parameters": sum(p.numel() for p in se.module.parameters()),
            "columns": x.shape[1],
            "finite": bool(np.isfinite(x).all() and np.isfinite(total)),
            "seconds to load": round(loaded - start, 1),
            "seconds to embed 4 cells": round(done - loaded, 1),
            "peak memory, GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
    )


def large(temporary: Path) -> dict:
    """Load and embed in a process of its own, whose peak memory is that of the model alone."""
    folder = temporary / "se_600m"
    context = multiprocessing.get_context("spawn")
    try:
        writer = context.Process(target=write_large, args=(folder,))
        writer.start()
        writer.join()
        size = sum(p.stat().st_size for p in folder.iterdir())
        queue = context.Queue()
        reader = context.Process(target=run_large, args=(folder, queue))
        reader.start()
        result = queue.get(timeout=600)
        reader.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"files, GiB": round(size / 2**30, 2), "threads": torch.get_num_threads(), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-large", action="store_true", help="leave out the model of SE-600M's size")
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = {"largest difference": agreement(Path(temporary)), "machine": platform.machine()}
        print(f"{'folder':18}{'from_arc':>12}{'to_arc, from_arc':>20}")
        for name, row in result["largest difference"].items():
            print(f"{name:18}{row['from_arc']:12.1e}{row['to_arc, from_arc']:20.1e}")
        if not arguments.no_large:
            result["SE-600M's size, random weights"] = large(Path(temporary))
            for key, value in result["SE-600M's size, random weights"].items():
                print(f"{key:28}{value}")
    if arguments.json:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
