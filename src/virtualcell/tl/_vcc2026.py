"""The suite of the Virtual Cell Challenge 2026, by its official scorer."""

from __future__ import annotations

import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

from virtualcell._design import Design
from virtualcell.data._matrix import check_matches_scale, columns_by_name, matrix_name, raw_matrix

try:
    import cell_eval2
    from cell_eval2.anchor import compute_replicate_anchor
    from cell_eval2.catalog import CATALOG
    from cell_eval2.competition import competition_members
    from cell_eval2.run import metric_output_names
    from cell_eval2.scoring import is_degenerate, score_one
except ImportError as error:
    raise ImportError(
        "suite='vcc2026' is scored by cell-eval2, which is not installed: pip install \"virtualcell[eval]\""
    ) from error

ALL = "(all)"
_KEY = "perturbation"


def score(
    sides: dict[str, AnnData],
    observed: AnnData,
    *,
    groups: dict[str, dict],
    real: dict,
    genes: list[str],
    design: Design,
    generic: bool,
    predicted_control: bool,
    ceiling: bool,
    n_jobs: int,
    seed: int,
) -> list[pd.DataFrame]:
    """Rows of every source and context; see :func:`virtualcell.tl.evaluate`."""
    config = dataclasses.replace(
        cell_eval2.EvalConfig.from_preset("vcc2026"),
        pert_col=_KEY,
        control=design.control,
        num_threads=n_jobs,
        control_source="pred" if predicted_control else "real",
    )
    parts = []
    for context in dict.fromkeys(c for c, _ in groups["model"]):
        names = sorted({p for c, p in groups["model"] if c == context} | {design.control})
        truth = _counts(observed, design.layer, genes, {p: real[context, p] for p in names})
        for source, adata in sides.items():
            cells = _counts(adata, None, genes, {p: r for (c, p), r in groups[source].items() if c == context})
            if not predicted_control:  # the scorer wants the same labels on both sides, and tests against real cells
                cells = ad.concat([cells, truth[truth.obs[_KEY] == design.control]], index_unique="-")
            parts.append(_rows(cell_eval2.compute_metrics(cells, truth, config=config), config, source, context))
        if generic:
            result = cell_eval2.build_generic_baseline(truth, config=config, seed=seed)
            parts.append(_rows(result.results, config, "baseline", context))
        if ceiling:
            _, anchor = compute_replicate_anchor(truth, config=config, base_seed=seed)
            rows = {"perturbation": ALL, "metric": anchor["metric"].to_list(), "value": anchor["replicate"].to_list()}
            parts.append(pd.DataFrame(rows).assign(source="ceiling", context=context))
    return parts


def challenge_score(metric: str, value: float, baseline: float, replicate: float | None) -> float:
    """(u - b) / (r - b) under the scorer's own policy for a metric, or its score against the baseline alone.

    NaN where the scorer would refuse: the baseline is as good as what it is measured against.
    """
    policy = CATALOG[metric].scoring
    if replicate is not None:
        policy = dataclasses.replace(policy, anchor=replicate, allow_negative_baseline=False)
    return float("nan") if is_degenerate(baseline, policy) else score_one(value, baseline, policy)


def members() -> list[str]:
    """Return the metrics that the challenge averages."""
    return list(competition_members())


def _counts(adata: AnnData, layer: str | None, genes: list[str], rows: dict[str, np.ndarray]) -> AnnData:
    matrix = raw_matrix(adata, layer)
    check_matches_scale(matrix, "counts", matrix_name(layer))
    index = np.concatenate(list(rows.values()))
    labels = np.repeat(list(rows), [len(r) for r in rows.values()])
    order = np.argsort(index)  # the scorer's splits follow the order of the file
    obs = pd.DataFrame({_KEY: labels[order]}, index=adata.obs_names[index[order]].astype(str))
    matrix = columns_by_name(matrix, adata.var_names, genes)[index[order]]
    return AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes))


def _rows(tidy, config, source: str, context: str) -> pd.DataFrame:
    """Values of single perturbations, and of the metrics that exist for all of them together only."""
    rows = pd.DataFrame(tidy.to_dict(as_series=False))[["perturbation", "metric", "value"]]
    total = cell_eval2.aggregate_metrics(tidy, metrics=metric_output_names(config))
    for metric, value in zip(total["metric"], total["mean"], strict=True):
        if metric not in set(rows["metric"]):
            rows.loc[len(rows)] = [ALL, metric, value]
    return rows.assign(source=source, context=context)
