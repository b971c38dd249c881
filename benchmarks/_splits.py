"""What `st.py` and `ablation.py` share: data, a pool of processes, tables, and the file of results."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import torch
from scipy import sparse

import virtualcell as vc

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KANG = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}
SCREEN = {"perturbation_key": "target_gene", "control": "non-targeting"}
PAPALEXI = {**SCREEN, "context_key": "batch", "library_size_key": "total_counts"}
SYNTHETIC = {**SCREEN, "context_key": "cell_type"}
PAPALEXI_STRONG = ["STAT1", "JAK2", "IFNGR1", "IFNGR2", "SMAD4", "IRF1", "STAT2", "CUL3", "BRD4"]
PAPALEXI_HELD_OUT = [*PAPALEXI_STRONG, "ATF2", "CD86", "ETV7", "MARCH8", "PDCD1LG2", "SPI1", "STAT3", "UBE2L6"]
PUBLISHED = {"network": {"preset": "published"}}  # one head, the level, and the energy distance alone as loss
TABLES = {
    "Reactome": "gene_features_reactome_svd64",
    "STRING": "gene_features_string_spectral64",
    "co-essential": "gene_features_coessential_svd64",
}
FEATURES = {
    "knowledge": ["Reactome", "STRING"],
    "co-essential": ["co-essential"],
    "expression": ["expression"],
    "all": ["Reactome", "STRING", "expression"],
}
FOLDS = [f"fold {i + 1}" for i in range(5)]
CELLS_PER_GROUP = 100
SMALLER_IS_BETTER = {"mae", "energy_distance"}
CEILING = "ceiling"
CEILINGS = (CEILING, "corrected ceiling")


# -- data -------------------------------------------------------------------------------------------------------------


@cache
def kang(folder: Path) -> ad.AnnData:
    return ad.read_h5ad(folder / "kang2018_pbmc_ifnb.h5ad")


@cache
def papalexi(folder: Path) -> ad.AnnData:
    """RNA of the cells whose guide is certain."""
    rna = md.read_h5mu(folder / "papalexi2021_thp1_eccite.h5mu").mod["rna"]
    return rna[rna.obs["guide_confident"].to_numpy()].copy()


@cache
def norman(folder: Path) -> ad.AnnData:
    """K562 cells, CRISPRa."""
    adata = ad.read_h5ad(folder / "norman_mcfaline_4contexts.h5ad")
    return adata[(adata.obs["cell_type"] == "K562").to_numpy()].copy()


@cache
def glioblastoma(folder: Path) -> ad.AnnData:
    """Three lines, CRISPRi, and the targets that all of them have."""
    adata = ad.read_h5ad(folder / "norman_mcfaline_4contexts.h5ad")
    adata = adata[(adata.obs["cell_type"] != "K562").to_numpy()]
    return adata.copy()


@cache
def synthetic(n_contexts: int, n_perturbations: int, seed: int) -> ad.AnnData:
    """Draw a screen with the generator's default signal: effects of 0.3 (natural log), gated fully by the context."""
    return vc.datasets.synthetic(n_contexts=n_contexts, n_perturbations=n_perturbations, n_genes=500, seed=seed)


def targets(adata: ad.AnnData) -> list[str]:
    return sorted(set(adata.obs["target_gene"]) - {"non-targeting"})


def fold_targets(folder: Path, fold: str) -> list[str]:
    """Targets of Papalexi's screen in one of `FOLDS`."""
    shuffled = np.random.default_rng(0).permutation(targets(papalexi(folder)))
    return sorted(shuffled[FOLDS.index(fold) :: len(FOLDS)].tolist())


def gene_features(
    folder: Path, adata: ad.AnnData, held_out: list[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, list[str]]]:
    """Tables (targets x features) by name, with zeros where a source lacks a target, and the targets it lacks."""
    training = adata[~adata.obs["target_gene"].isin(held_out).to_numpy()]
    tables = {name: pd.read_parquet(folder / f"{file}.parquet").set_index("gene") for name, file in TABLES.items()}
    # as many columns as the others have
    embed = partial(vc.pp.expression_gene_embeddings, n_comps=64, library_size_key="total_counts")
    tables["expression"] = embed(training)
    names = targets(adata)
    lacking = {name: [t for t in names if t not in table.index] for name, table in tables.items()}
    tables = {name: table.reindex(names).fillna(0).add_prefix(f"{name} ") for name, table in tables.items()}
    return {name: pd.concat([tables[t] for t in parts], axis=1) for name, parts in FEATURES.items()}, lacking


def thinned(adata, held_out: list[str]):
    """At most so many training cells of a target in a replicate, drawn by seed 0; all control and test cells."""
    order = np.random.default_rng(0).permutation(adata.n_obs)
    groups = adata.obs[["target_gene", "batch"]].astype(str).iloc[order]
    kept = (groups.groupby(["target_gene", "batch"]).cumcount() < CELLS_PER_GROUP).to_numpy()
    kept = kept | groups["target_gene"].isin([*held_out, "non-targeting"]).to_numpy()
    return adata[np.sort(order[kept])].copy()


def with_known_truth(adata: ad.AnnData, context: str, *, n_cells: int = 400, seed: int = 0) -> ad.AnnData:
    """Put cells drawn from the truth in place of the perturbed cells of a context.

    The true fold change multiplies the mean profile of the control cells at hand, so that their batches and their
    sampling are on both sides; a cell is then drawn as in :func:`virtualcell.datasets.synthetic`, with its defaults.
    """
    rng = np.random.default_rng(seed)
    here, is_control = (adata.obs["cell_type"] == context).to_numpy(), (adata.obs["target_gene"] == "non-targeting")
    controls = adata[here & is_control.to_numpy()].X.toarray()
    share, totals = (controls / controls.sum(axis=1, keepdims=True)).mean(axis=0), controls.sum(axis=1)
    truth, weights = adata.varm[f"truth_{context}"], adata.varm["programmes"].to_numpy()
    matrices = []
    for name in truth:
        log_rate = truth[name].to_numpy() + rng.normal(scale=0.3, size=(n_cells, weights.shape[1])) @ weights.T
        rate = share * np.exp(log_rate)
        mean = rate / rate.sum(axis=1, keepdims=True) * rng.choice(totals, n_cells)[:, None]
        counts = rng.poisson(mean * rng.gamma(10, 0.1, size=mean.shape))
        matrices.append(sparse.csr_matrix(counts, dtype=np.float32))
    names = pd.Index([f"truth_{i}" for i in range(n_cells * truth.shape[1])])
    obs = pd.DataFrame({"target_gene": np.repeat(list(truth), n_cells), "cell_type": context}, index=names)
    drawn = ad.AnnData(sparse.vstack(matrices, format="csr"), obs=obs, var=adata.var)
    return ad.concat([adata[~here | is_control.to_numpy()], drawn])


# -- one fit ----------------------------------------------------------------------------------------------------------


def fit_and_score(case: dict, label: str, how: dict, seed: int, max_steps: int | None) -> tuple[pd.DataFrame, float]:
    """Fit one ST and score it; scores of `vc.tl.benchmark`, and the seconds of fitting, predicting and scoring."""
    if max_steps is not None:
        how = {**how, "training": {**how.get("training", {}), "max_steps": max_steps}}
    case = {k: v for k, v in case.items() if k != "baselines"}
    start = time.perf_counter()
    scores = vc.tl.benchmark(models={label: ("ST", how)}, seeds=(seed,), floor=(), ceiling=False, **case)
    return scores, time.perf_counter() - start


def score_baselines(case: dict) -> tuple[pd.DataFrame, None]:
    """Fit the baselines, in which nothing is random, and score them and the ceiling."""
    case = dict(case)
    return vc.tl.benchmark(models=case.pop("baselines"), seeds=(0,), floor=(), ceiling=True, **case), None


def _start_process() -> None:
    torch.set_num_threads(1)
    _quiet()


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)  # warnings stay: a baseline that cannot predict a split is left out of it
    logging.getLogger("virtualcell.pp").setLevel(logging.ERROR)  # pairs share targets with what is held out, by design


@contextmanager
def pool(jobs: int) -> Iterator[Callable]:
    """Give a function that runs tasks in `jobs` processes of one thread each (1: in this one), as they end."""
    if jobs == 1:
        _start_process()
        yield lambda function, tasks: ((task, function(*task)) for task in tasks)
        return
    _quiet()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_process) as executor:

        def run(function: Callable, tasks: list[tuple]) -> Iterator[tuple]:
            futures = {executor.submit(function, *task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()

        try:
            yield run
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def collect(results: Iterable[tuple], name: str, n: int) -> tuple[pd.DataFrame, dict[str, list[float]]]:
    """All scores, with the verdicts in `attrs`, and seconds of training by label; prints a line for each task."""
    frames, seconds, verdicts, start = [], {}, [], time.perf_counter()
    for i, (task, (scores, trained)) in enumerate(results):
        frames.append(scores)
        verdicts += scores.attrs["verdicts"]
        if trained is not None:
            seconds.setdefault(scores["model"].iloc[0], []).append(trained)
        what = " ".join(str(x) for x in task if isinstance(x, str | int) and x != name)
        print(f"   {name} {i + 1}/{n}: {what} ({time.perf_counter() - start:.0f} s)", flush=True)
        scores.attrs = {}  # or pandas compares them all
    scores = pd.concat(frames, ignore_index=True)
    scores = scores.sort_values(["split", "model", "seed", "context", "perturbation"], ignore_index=True)
    scores.attrs["verdicts"] = verdicts
    return scores, seconds


# -- tables -----------------------------------------------------------------------------------------------------------


def summarise(scores: pd.DataFrame, metrics: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean over everything but seeds, then mean and standard deviation over seeds: models x metrics each."""
    by_seed = scores.groupby(["model", "seed", "metric"])["value"].mean().unstack()[metrics]
    mean, spread = by_seed.groupby("model").mean(), by_seed.groupby("model").std(ddof=0)
    random = by_seed.groupby("model").size() > 1
    return mean, spread.where(random, axis=0)


def show(mean: pd.DataFrame, spread: pd.DataFrame, order: list[str]) -> None:
    order = [m for m in order if m in mean.index]

    def cell(model: str, metric: str) -> str:
        value, around = mean.loc[model, metric], spread.loc[model, metric]
        return f"{value:.4f}" + ("" if np.isnan(around) else f" ({around:.4f})")

    table = {m: [cell(model, m) for model in order] for m in mean}
    print(pd.DataFrame(table, index=order).to_string())


def plain(value: object) -> object:
    """Turn a value into what JSON knows: numbers to five digits, nothing for NaN."""
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("index"))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else float(f"{value:.5g}")
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str]:
    names = ("torch", "scvi-tools", "lightning", "anndata", "numpy", "scipy")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return {"virtualcell": vc.__version__, **{name: version(name) for name in names}, "device": device}


def write(path: Path | None, name: str, result: dict) -> None:
    """Put the result of one data set in the file, beside those of others that are there."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | {name: plain(result)}, indent=1) + "\n")


def arguments(doc: str, names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", type=Path, help="file of results; data sets that it has stay, unless run again")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--max-steps", type=int, help="of every ST: to try the script out")
    return parser
