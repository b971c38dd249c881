"""The public calls on one GPU: cells per second of `tl.embed` and `fit_state`, agreement with the CPU, and scores.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json [--data ../shared/data] [--only rates embed_large ...]

* rates: bf16, TF32 and float32 products of random matrices, 8,192 cubed.
* agreement: networks in float32, and in bf16, beside float32 on the CPU: output, and losses of three training steps.
* embed_large: a model of SE-600M's size (random weights), 2,047 genes a cell, as a share of the bf16 rate.
* embed_small, embed_medium: 100,000 cells of 2,000 expressed genes of 18,000 in memory; the network alone on sentences
  that lie on the GPU; `tl.embed` from a matrix that was never read ("whole") and without the checks of it ("steady").
* train_small, train_large: `fit_state(se=False, validate=False)` on 120,000 cells x 2,000 genes; steady is from step 20
  on. Beside it ST alone: in float32, in bf16, and with its steps launched operation by operation.
* scores (with --data): Kang, one cell type left out, on GPU and CPU.
* sets: a synthetic screen, one context left out, with 8 sets a step and with the default.

Every section prints a line and writes the JSON as it ends; one that fails leaves its traceback there, and the script
ends with 1. `--device cpu` tries the script out on tiny sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from _gpu_cases import cells_of, se_case, st_case
from _splits import KANG, SYNTHETIC, kang

import virtualcell as vc
from virtualcell.models._se_data import Source, read_cells
from virtualcell.models._se_inference import sentence_batches
from virtualcell.models._set_batches import SetBatches
from virtualcell.train import _plan

TOLERANCE = 1e-3  # of float32 on the GPU, as a share of the largest value of the CPU
SPEED = 1.5  # seconds of repeats
ON_GPU = {"accelerator": "gpu", "progress_bar": False}


class Run:
    """The device, and the sizes that go with it."""

    def __init__(self, device: str, data: Path | None) -> None:
        self.device, self.data, self.tiny = torch.device(device), data, device == "cpu"
        self.bf16_rate: float | None = None

    def wait(self) -> None:
        """Until the GPU is done."""
        if not self.tiny:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object]) -> float:
        """Mean time of a call, after two to warm up."""
        function(), function(), self.wait()
        start, n = time.perf_counter(), 0
        while n == 0 or time.perf_counter() - start < (0.05 if self.tiny else SPEED):
            function(), self.wait()
            n += 1
        return (time.perf_counter() - start) / n

    def memory(self) -> float:
        """GiB at the peak since the last call."""
        if self.tiny:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


# -- matrix products --------------------------------------------------------------------------------------------------


def rates(run: Run) -> dict:
    n, found = 128 if run.tiny else 8192, {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=run.device, dtype=dtype) for _ in range(2))
        found[f"{name}_tflops"] = round(2 * n**3 / run.seconds(lambda a=a, b=b: a @ b) / 1e12, 1)
    torch.set_float32_matmul_precision("highest")
    run.bf16_rate = found["bf16_tflops"] * 1e12
    return found


# -- agreement with the CPU -------------------------------------------------------------------------------------------


def agreement(run: Run) -> dict:
    found = {}
    for title, make in {"ST": st_case, "SE": se_case}.items():
        torch.manual_seed(1)
        build, batch, forward, loss = make()
        network = build().eval()

        def results(device: torch.device, *, half: bool, case: tuple = (network, batch, forward, loss)) -> tuple:
            network, batch, forward, loss = case
            network, batch = copy.deepcopy(network).to(device), {k: v.to(device) for k, v in batch.items()}
            optimizer, losses = torch.optim.AdamW(network.parameters(), lr=1e-4), []
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                out = forward(network, batch).detach().float().cpu()
            for _ in range(3):
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    value = loss(network, batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                losses.append(value.item())
            return out, np.array(losses)

        out, losses = results(torch.device("cpu"), half=False)
        of = found[title] = {"largest_output": out.abs().max().item(), "losses": losses.tolist()}
        for name, half in (("float32", False), ("bf16", True)):
            theirs = results(run.device, half=half)
            of[f"{name}_output_difference"] = (theirs[0] - out).abs().max().item()
            of[f"{name}_loss_difference"] = float(np.abs(theirs[1] - losses).max())
        if of["float32_output_difference"] > TOLERANCE * of["largest_output"]:
            raise AssertionError(f"float32 of {title} differs from the CPU: {of}")
    return found


# -- SE ---------------------------------------------------------------------------------------------------------------


def model_of(run: Run, adata: ad.AnnData, size: str, n_token: int) -> vc.models.SE:
    table = np.random.default_rng(0).standard_normal((adata.n_vars, n_token), dtype=np.float32)
    vc.models.SE.setup_anndata(adata)
    with run.device:  # where weights are drawn in no time
        torch.manual_seed(0)
        se = vc.models.SE(adata, pd.DataFrame(table, index=adata.var_names), size=size)
    se.is_trained_ = True
    se.module.eval().requires_grad_(False)
    return se


def flops_of(se: vc.models.SE) -> float:
    """Operations of a cell in the transformer, whose last layer computes two places only."""
    c, t = se.config, se.length + 2
    dense = 2 * (4 * c.n_hidden**2 + 2 * c.n_hidden * c.n_feedforward)
    return (c.n_layers - 1) * t * (dense + 4 * t * c.n_hidden) + t * 6 * c.n_hidden**2


def embed_timed(run: Run, adata: ad.AnnData, se: vc.models.SE, **options: object) -> tuple[np.ndarray, float]:
    run.wait()
    start = time.perf_counter()
    vc.tl.embed(adata, se, **options)
    return adata.obsm["X_state"], time.perf_counter() - start


def embed_large(run: Run) -> dict:
    n, few = (12, 4) if run.tiny else (3072, 24)
    adata = cells_of(n, 200 if run.tiny else 18_000, 100 if run.tiny else 3500)
    se = model_of(run, adata, "small" if run.tiny else "large", 16 if run.tiny else 5120)
    embed_timed(run, adata[:few].copy(), se)
    run.memory()
    vectors, seconds = embed_timed(run, adata, se)
    vectors = vectors.copy()
    found = {"cells": n, "cells_per_second": round(n / seconds, 1), "peak_memory_gib": run.memory()}
    if run.bf16_rate:
        found["share_of_bf16_rate"] = round(n / seconds * flops_of(se) / run.bf16_rate, 3)
    some = adata[:few].copy()
    exact, slow = embed_timed(run, some, se, precision="float32")
    width = se.config.n_output
    for name, part in (("cell", slice(None, width)), ("dataset", slice(width, None))):
        a, b = vectors[:few, part], exact[:, part]
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        found[f"least_cosine_{name}"] = float(cosine.min())
    found["float32_cells_per_second"] = round(few / slow, 1)
    return found


def embed_many(run: Run, size: str, n_token: int) -> dict:
    adata = cells_of(*((300, 200, 50) if run.tiny else (100_000, 18_000, 2000)))
    se = model_of(run, adata, size, n_token)
    embed_timed(run, adata[:300].copy(), se)
    run.memory()
    found = {"cells": adata.n_obs}
    _, seconds = embed_timed(run, adata, se)
    found |= {"whole_cells_per_second": round(adata.n_obs / seconds), "peak_memory_gib": run.memory()}
    start = time.perf_counter()
    cells = read_cells(se, Source(adata))
    found["checks_seconds"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    full: dict[str, Tensor] = {}
    for _, batch in sentence_batches(cells, max(1, (1 << 18) // (se.length + 2)), run.device):
        full = batch if not full or len(batch["tokens"]) == len(full["tokens"]) else full
    run.wait()
    found["sentences_per_second"] = round(adata.n_obs / (time.perf_counter() - start))
    found["steady_cells_per_second"] = round(adata.n_obs / (seconds - found["checks_seconds"]))
    found["network_alone_cells_per_second"] = round(alone(run, se, full, cells.vectors))
    found["steady_share_of_network"] = round(
        found["steady_cells_per_second"] / found["network_alone_cells_per_second"], 3
    )
    found["whole_share_of_network"] = round(
        found["whole_cells_per_second"] / found["network_alone_cells_per_second"], 3
    )
    start = time.perf_counter()
    cells.sentences.rows(np.arange(min(2000, adata.n_obs)))
    found["sentences_per_second_cpu_core"] = round(min(2000, adata.n_obs) / (time.perf_counter() - start))
    return found


@torch.inference_mode()
def alone(run: Run, se: vc.models.SE, batch: dict[str, Tensor], vectors: Tensor) -> float:
    """Cells per second of the network, on sentences that lie where it is."""
    dtype = torch.bfloat16
    genes = se.module.encode_genes(vectors.to(run.device))
    network = se.module if run.tiny else se.module.with_products_in(dtype)
    return len(batch["tokens"]) / run.seconds(lambda: network(genes, **batch))


# -- ST ---------------------------------------------------------------------------------------------------------------


def screen_of(run: Run) -> ad.AnnData:
    """Four contexts, two batches, 100 perturbations; a sixth of the cells are controls."""
    adata, rng = cells_of(*((800, 60, 20) if run.tiny else (120_000, 2000, 300)), seed=1), np.random.default_rng(1)
    names = np.array(["control", *(f"p{i}" for i in range(4 if run.tiny else 100))])
    code = np.where(rng.random(adata.n_obs) < 1 / 6, 0, rng.integers(1, len(names), adata.n_obs))
    for key, values in (
        ("perturbation", names[code]),
        ("cell_type", np.array(["A", "B", "C", "D"])[rng.integers(4, size=adata.n_obs)]),
        ("batch", np.array(["x", "y"])[rng.integers(2, size=adata.n_obs)]),
    ):
        adata.obs[key] = pd.Categorical(values)
    return adata


@contextmanager
def timed_steps() -> Iterator[dict]:
    """When the batches of training steps were asked for, and how long the CPU was busy with each."""
    seen, step = {"at": [], "busy": []}, SetBatches.step

    def timed(self: SetBatches, i: int, *where: object) -> dict:
        start = time.perf_counter()
        batch = step(self, i, *where)
        if self.n_steps is None:
            seen["at"].append(start)
            seen["busy"].append(time.perf_counter() - start)
            seen["cells"] = batch["control"].shape[0] * batch["control"].shape[1]
        return batch

    SetBatches.step = timed
    try:
        yield seen
    finally:
        SetBatches.step = step


def figures(run: Run, seen: dict, n_steps: int, seconds: float) -> dict:
    at = np.array(seen["at"][:n_steps])  # later ones weigh the heads
    first = min(20, len(at) // 2)
    step = (at[-1] - at[first]) / (len(at) - 1 - first)
    return {
        "cells_per_second": round(seen["cells"] / step),
        "ms_per_step": round(1e3 * step, 2),
        "cells_per_step": seen["cells"],
        "steps": len(at),
        "ms_of_batches_on_cpu": round(1e3 * float(np.median(seen["busy"][first:n_steps])), 2),
        "seconds": round(seconds, 1),
        "seconds_before_step_20": round(seconds - (at[-1] - at[first]), 1),
        "peak_memory_gib": run.memory(),
    }


def train(run: Run, size: str) -> dict:
    adata, training = screen_of(run), {"accelerator": "cpu", "progress_bar": False} if run.tiny else dict(ON_GPU)
    keys = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type", "batch_key": "batch"}
    n_steps, short = (24, 12) if run.tiny else (400, 140)
    run.memory()
    with timed_steps() as seen:
        start = time.perf_counter()
        training["max_steps"] = n_steps
        options = {"n_top_genes": None, "se": False, "validate": False, "size": "small" if run.tiny else size}
        vc.tl.fit_state(adata, **keys, **options, training=training)
        found = {"fit_state": figures(run, seen, n_steps, time.perf_counter() - start)}
    vc.models.ST.setup_anndata(adata, **keys, scale="counts")
    variants = {
        "float32": {"precision": "32-true"},
        "bf16": {"precision": "bf16-mixed"},
        "float32, operation by operation": {"recorded": False, "precision": "32-true"},
    }
    for name, options in variants.items():
        recorded, before = options.pop("recorded", True), _plan.RECORDED_ON
        _plan.RECORDED_ON = before if recorded else ()
        try:
            with timed_steps() as seen:
                start = time.perf_counter()
                torch.manual_seed(0)
                st = vc.models.ST(adata, size="small" if run.tiny else size, transfer=False)
                st.train(**{**training, "max_steps": short, "validate_every": short, **options})
                found[f"ST, {name}"] = figures(run, seen, short, time.perf_counter() - start)
                found[f"ST, {name}"]["last_loss"] = float(st.history["train_loss"].iloc[-1, 0])
        finally:
            _plan.RECORDED_ON = before
        print(f"   {name}: {found[f'ST, {name}']['cells_per_second']} cells/s", flush=True)
    return found


def scores(run: Run) -> dict:
    if run.data is None:
        return {"skipped": "give --data"}
    adata, found = kang(run.data), {}
    context = sorted(adata.obs["cell_type_coarse"].unique())[0]
    cases = {"cpu": {"accelerator": "cpu"}}
    if not run.tiny:
        cases = {"gpu": {}, "gpu, large, float32": {"precision": "32-true"}, "gpu, large, bf16": {}, **cases}
    for name, options in cases.items():
        training = {"accelerator": "gpu", "progress_bar": False, **options}
        found[name] = scored(run, adata, KANG, context, training, size="large" if "large" in name else "small")
        print(f"   {name}: {found[name]}", flush=True)
    return found


def sets(run: Run) -> dict:
    """Scores with 8 sets a step, and with as many as are chosen on a GPU, in the same number of passes."""
    n_cells, n_perturbations = (4, 3) if run.tiny else (300, 50)
    sizes = {"n_perturbations": n_perturbations, "n_cells_per_group": n_cells, "n_control_cells": 7 * n_cells}
    adata, found = vc.datasets.synthetic(n_contexts=4, n_genes=60 if run.tiny else 500, seed=2026, **sizes), {}
    for n_sets in (8, None):
        training = {"batch_size": n_sets, "progress_bar": False, "accelerator": "cpu" if run.tiny else "gpu"}
        found["default" if n_sets is None else f"{n_sets} sets"] = scored(run, adata, SYNTHETIC, "type_4", training)
    return found


def scored(run: Run, adata: ad.AnnData, keys: dict, context: str, training: dict, size: str = "small") -> dict:
    training |= {"max_steps": 3} if run.tiny else {}
    start = time.perf_counter()
    table = vc.tl.benchmark(
        adata,
        **keys,
        models={"ST": ("ST", {"training": training, "size": size})},
        splits={context: {"contexts": [context]}},
        seeds=(0,),
        floor=(),
        ceiling=False,
    )
    means = table[table["model"] == "ST"].groupby("metric")["value"].mean()
    kept = means.reindex(["pearson_delta", "mae", "energy_distance", "top50_overlap"]).dropna()
    return {**kept.round(5).to_dict(), "seconds": round(time.perf_counter() - start, 1)}


SECTIONS: dict[str, Callable[[Run], dict]] = {
    "rates": rates,
    "agreement": agreement,
    "train_small": lambda run: train(run, "small"),
    "train_large": lambda run: train(run, "large"),
    "embed_large": embed_large,
    "embed_small": lambda run: embed_many(run, "small", 256),
    "embed_medium": lambda run: embed_many(run, "small" if run.tiny else "medium", 64 if run.tiny else 1280),
    "scores": scores,
    "sets": sets,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with the cells of Kang")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA GPU here: nothing to measure.")
    logging.basicConfig(format="   %(message)s")
    logging.getLogger("virtualcell.train").setLevel(logging.INFO)
    begin, run = time.perf_counter(), Run(given.device, given.data)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    result, failed = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}, []
    for title in [title for title in SECTIONS if title in given.only]:
        start = time.perf_counter()
        try:
            found = SECTIONS[title](run)
        except Exception:  # on a card that is met once, the other sections are worth having
            found = {"error": traceback.format_exc()}
            failed.append(title)
        result[title] = {**found, "section_seconds": round(time.perf_counter() - start, 1)}
        print(title, json.dumps(result[title]), flush=True)
        result["seconds"] = round(time.perf_counter() - begin, 1)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
        if given.device == "cuda":
            torch.cuda.empty_cache()
    print(f"{result['seconds']} s on {name}")
    if failed:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
