"""How fast SE embeds and ST trains on a CPU, beside the reference package on the same cells, networks and threads.

    python benchmarks/cpu_speed.py --peer ENVIRONMENT --work FOLDER --json benchmarks/results/cpu_speed.json
        [--data ../shared/data] [--threads 2] [--only embed] [--rounds 2]

ENVIRONMENT is one of Python's in which `pip install arc-state` was run (the CPU build of torch); it is used through
its command line alone. Every call is a process of its own that reads a file and writes one; calls of both take turns.
Processor time is given beside the time on the clock, which says little on a busy machine.

* embed: an SE with random weights (vectors of 5,120 numbers, width 64, 2 layers, sentences of 2,047 genes, every place
  taken), two numbers of cells: cells a second from the difference. The peer reads a checkpoint of the same weights.
* train: ST of the published form (width 256, 4 layers, sets of 64 cells, 8 a step) on Kang's cells and 2,000 genes, two
  numbers of steps: the whole call with the larger one, and from the difference cells a second. Ours validates, too, and
  runs in float32 and with `precision="bf16-mixed"`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _peer_tools import ARC, arc_options, for_arc
from scipy import sparse

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CELLS, STEPS = (8, 72), (10, 60)
N_GENES, N_EXPRESSED, LENGTH = 4000, 2200, 2047


def timed(command: list, threads: int, log: Path) -> dict[str, float]:
    """Run a command, and return its seconds on the clock and of the processor."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as out:
        subprocess.run(list(map(str, command)), stdout=out, stderr=out, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": used}


def compared(calls: dict, sizes: tuple[int, int], each: int, args: argparse.Namespace) -> dict:
    """Run both with both sizes in turns; `calls` makes a command of a size, which counts `each` cells."""
    runs: dict = {name: {n: [] for n in sizes} for name in calls}
    for _ in range(args.rounds):
        for n in sizes:
            for name, call in calls.items():
                runs[name][n].append(timed(call(n), args.threads, args.work / f"{name}-{n}.log"))
    found: dict = {"sizes": sizes, "runs": runs, "load": os.getloadavg()[0]}
    for clock in ("seconds", "cpu_seconds"):
        whole = {k: [float(np.median([r[clock] for r in runs[k][n]])) for n in sizes] for k in calls}
        rates = {k: each * (sizes[1] - sizes[0]) / (more - less) for k, (less, more) in whole.items()}
        found[clock] = {
            "whole": {k: more for k, (_, more) in whole.items()},
            "cells_per_second": rates,
            "ratio_whole": {k: whole["arc-state"][1] / more for k, (_, more) in whole.items()},
            "ratio": {k: rate / rates["arc-state"] for k, rate in rates.items()},
        }
    return found


# -- SE ---------------------------------------------------------------------------------------------------------------


def cells_of(n: int) -> ad.AnnData:
    rng = np.random.default_rng(n)
    indices = np.concatenate([np.sort(rng.choice(N_GENES, N_EXPRESSED, replace=False)) for _ in range(n)])
    counts = rng.integers(1, 20, len(indices)).astype(np.float32)
    starts = np.arange(0, len(indices) + 1, N_EXPRESSED)
    obs = pd.DataFrame(index=[f"cell_{i}" for i in range(n)])
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
    return ad.AnnData(sparse.csr_matrix((counts, indices.astype(np.int32), starts), (n, N_GENES)), obs=obs, var=var)


def write_se(folder: Path) -> None:
    """Write an SE with random weights in Arc's format, and what its command reads: a checkpoint with all of it."""
    import torch
    import yaml

    import virtualcell as vc

    adata = cells_of(8)
    table = np.random.default_rng(0).standard_normal((N_GENES, 5120), dtype=np.float32)
    vc.models.SE.setup_anndata(adata)
    torch.manual_seed(0)
    arc = {"length": LENGTH, "cls_expression_gene": 3, "fill_sentences": True}
    se = vc.models.SE(adata, pd.DataFrame(table, index=adata.var_names), **arc)
    se.is_trained_ = True
    se.to_arc(folder, overwrite=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= {"batch_size": 8, "num_downsample": 1, "variable_masking": True, "batch_tabular_loss": False}
    config["model"] |= {"sample_rda": False, "use_flash_attention": True, "ema": False}
    config["loss"] = {"name": "tabular", "apply_normalization": False, "kernel": "energy", "uniformity": False}
    config["optimizer"] = {"max_lr": 1e-5, "weight_decay": 0.01, "start": 0.33, "end": 1.0, "max_grad_norm": 0.8}
    config["optimizer"] |= {"gradient_accumulation_steps": 8, "reset_lr_on_restart": False, "zclip": False}
    sizes = {"token_dim": 5120, "d_model": 64, "nhead": 4, "d_hid": 128, "nlayers": 2, "output_dim": 64, "dropout": 0.0}
    checkpoint = {
        "state_dict": se.module.state_dict(),
        "cfg_yaml": yaml.safe_dump(config),
        "protein_embeds_dict": torch.load(folder / "protein_embeddings.pt", weights_only=True),
        "hyper_parameters": sizes,
        "pytorch-lightning_version": "2.5.0",
    }
    torch.save(checkpoint, folder / "model.ckpt")


def embed_one(folder: Path, n: int) -> None:
    """Embed cells with this package, in this process."""
    import virtualcell as vc

    adata = ad.read_h5ad(folder / f"cells{n}.h5ad")
    vc.tl.embed(adata, vc.models.SE.from_arc(folder / "se"))
    np.save(folder / f"ours{n}.npy", adata.obsm["X_state"])


def embed(args: argparse.Namespace) -> dict:
    folder = args.work
    write_se(folder / "se")
    for n in CELLS:
        cells_of(n).write_h5ad(folder / f"cells{n}.h5ad")

    def theirs(n: int) -> list:
        files = ["--input", folder / f"cells{n}.h5ad", "--output", folder / f"theirs{n}.npy"]
        return [args.peer / "bin" / "state", "emb", "transform", "--checkpoint", folder / "se" / "model.ckpt", *files]

    def ours(n: int) -> list:
        return [sys.executable, "-W", "ignore", __file__, "--work", folder, "--child", f"embed {n}"]

    found = compared({"virtualcell": ours, "arc-state": theirs}, CELLS, 1, args)
    a, b = (np.load(folder / f"{of}{CELLS[0]}.npy") for of in ("ours", "theirs"))
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return found | {"least_cosine_between_the_two": float(cosine.min())}


# -- ST ---------------------------------------------------------------------------------------------------------------


def train_one(folder: Path, n: int, precision: str = "32-true") -> None:
    """Train ST with this package, in this process."""
    import torch

    import virtualcell as vc

    adata = ad.read_h5ad(folder / "data" / "cells.h5ad")
    design = {"perturbation_key": "perturbation", "control": "control", "context_key": "context"}
    vc.models.ST.setup_anndata(adata, **design, scale="log1p")
    torch.manual_seed(0)
    sizes = {"n_hidden": 256, "n_layers": 4, "n_heads": 4, "head_dim": 64, "n_feedforward": 1024, "n_encoder_layers": 1}
    form = {"preset": "published", "set_size": 64, "transfer": False, "n_decoder_layers": 1, "dropout": 0.0}
    st = vc.models.ST(adata, **form, **sizes)
    st.train(max_steps=n, batch_size=8, lr=1e-3, precision=precision, progress_bar=False)
    st.save(folder / "ours", overwrite=True)


def train(args: argparse.Namespace) -> dict:
    folder = args.work
    (folder / "data").mkdir(exist_ok=True)
    adata = ad.read_h5ad(args.data / "kang2018_pbmc_ifnb.h5ad")
    genes = np.argsort(-np.asarray(adata.X.mean(axis=0)).ravel())[:2000]
    matrix = sparse.csr_matrix(adata.X[:, genes].multiply(1e4 / adata.X.sum(axis=1)), dtype=np.float32).log1p()
    obs = adata.obs.rename(columns={"cell_type_coarse": "context"})
    for_arc(ad.AnnData(matrix, obs=obs, var=adata.var.iloc[genes])).write_h5ad(folder / "data" / "cells.h5ad")
    (folder / "split.toml").write_text(f'[datasets]\ncells = "{folder / "data"}"\n\n[training]\ncells = "train"\n')

    def theirs(n: int) -> list:
        options = arc_options(folder, ARC | {"training.max_steps": n}, "control")
        return [args.peer / "bin" / "state", "tx", "train", *options]

    def ours(n: int, *precision: str) -> list:
        return [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--work",
            folder,
            "--child",
            " ".join(["train", str(n), *precision]),
        ]

    def ours_in_bf16(n: int) -> list:
        return ours(n, "bf16-mixed")

    calls = {"virtualcell": ours, "virtualcell, bf16-mixed": ours_in_bf16, "arc-state": theirs}
    return compared(calls, STEPS, 8 * 64, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="folder of the environment with arc-state")
    parser.add_argument("--work", type=Path, required=True, help="folder for files")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=["embed", "train"], default=["embed", "train"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve()
    if args.child:
        name, n, *others = args.child.split()
        {"embed": embed_one, "train": train_one}[name](args.work, int(n), *others)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    result = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.only:
        result[name] = {"threads": args.threads, **{"embed": embed, "train": train}[name](args)}
        print(name, json.dumps({k: v for k, v in result[name].items() if k != "runs"}, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
