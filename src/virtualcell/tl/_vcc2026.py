"""The suite of the Virtual Cell Challenge 2026, by its official scorer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

from virtualcell._keys import ALL
from virtualcell._settings import settings
from virtualcell.data._on_disk import ENTRY
from virtualcell.data._screen import Screen
from virtualcell.tl._evaluate_checks import Task

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

_KEY = "perturbation"


def score(task: Task, *, generic: bool) -> list[pd.DataFrame]:
    """Rows of every source and context; see :func:`virtualcell.tl.evaluate`."""
    _check_memory(task)
    config = dataclasses.replace(
        cell_eval2.EvalConfig.from_preset("vcc2026"),
        pert_col=_KEY,
        control=task.control,
        num_threads=task.n_jobs,
        control_source="pred" if task.predicted_control else "real",
    )
    parts = []
    for context in task.contexts:
        truth = _cells(task.screens["observed"], task.rows("observed", context))
        for source in task.sources:
            cells = _cells(task.screens[source], task.rows(source, context))
            if not task.predicted_control:  # the scorer wants the same labels on both sides
                cells = ad.concat([cells, truth[truth.obs[_KEY] == task.control]], index_unique="-")
            parts.append(_rows(cell_eval2.compute_metrics(cells, truth, config=config), config, source, context))
        if generic:
            with _fractions_are_meant():
                result = cell_eval2.build_generic_baseline(truth, config=config, seed=task.seed)
            parts.append(_rows(result.results, config, "baseline", context))
        if task.ceiling:
            _, anchor = compute_replicate_anchor(truth, config=config, base_seed=task.seed)
            rows = {"perturbation": ALL, "metric": anchor["metric"].to_list(), "value": anchor["replicate"].to_list()}
            parts.append(pd.DataFrame(rows).assign(source="ceiling", context=context))
    return parts


def _check_memory(task: Task) -> None:
    """Raise, before any are read, for cells that are not in memory and may not be there together.

    The scorer takes files too, but reads them as a whole: of its metrics, those with moments and those of differential
    expression go through parts of the cells only on a GPU and in a format of its own.
    """
    for context in task.contexts:
        held = {}
        for side in ("observed", *task.sources):
            expression = task.screens[side].expression
            n_cells = 0 if expression.in_memory else sum(map(len, task.rows(side, context).values()))
            of_genes = len(expression.genes) / max(len(expression.gene_of_column), 1)
            held[side] = n_cells, n_cells and n_cells * expression.entries_per_cell * of_genes * ENTRY / 1e9
        n_cells, needed = np.sum([held["observed"], max(held[source] for source in task.sources)], axis=0)
        if needed > settings.max_memory:
            where = "" if context == ALL else f" of context {context!r}"
            raise ValueError(
                f"suite='vcc2026': the official scorer wants all cells{where} in memory at once, and {n_cells:.0f} of "
                f"them are not there. They take {needed:.3g} GB, more than vc.settings.max_memory="
                f"{settings.max_memory:g}. Say vc.settings.max_memory = {1.1 * needed:.2g} where there is as much, and "
                "some more for the scorer itself; or score with suite='vcc2025' or 'full', which read perturbation by "
                "perturbation."
            )


def challenge_score(metric: str, value: float, baseline: float, replicate: float | None) -> float:
    """(u - b) / (r - b) under the scorer's own policy for a metric, or its score against the baseline alone.

    NaN where the scorer would refuse: the baseline is as good as what it is measured against.
    """
    policy = CATALOG[metric].scoring
    if replicate is not None:
        policy = dataclasses.replace(policy, anchor=replicate, allow_negative_baseline=False)
    return float("nan") if is_degenerate(baseline, policy) else score_one(value, baseline, policy)


def averaged_metrics() -> list[str]:
    """Return the metrics that the challenge averages."""
    return list(competition_members())


@contextmanager
def _fractions_are_meant() -> Iterator[None]:
    """Keep the scorer from warning, at length, that means of cells are no whole counts."""
    scorer = logging.getLogger("cell_eval2.run")

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("allow_fractional_counts")

    scorer.addFilter(other)
    try:
        yield
    finally:
        scorer.removeFilter(other)


def _cells(screen: Screen, rows: dict[str, np.ndarray]) -> AnnData:
    """Return raw counts in the form that the scorer takes."""
    index = np.concatenate(list(rows.values()))
    labels = np.repeat(list(rows), [len(r) for r in rows.values()])
    order = np.argsort(index)  # the scorer's splits follow the order of the file
    obs = pd.DataFrame({_KEY: labels[order]}, index=screen.names[index[order]].astype(str))
    return AnnData(screen.expression.rows(index[order]), obs=obs, var=pd.DataFrame(index=screen.genes))


def _rows(tidy, config, source: str, context: str) -> pd.DataFrame:
    """Values of single perturbations, and of the metrics that exist for all of them together only."""
    rows = pd.DataFrame(tidy.to_dict(as_series=False))[["perturbation", "metric", "value"]]
    total = cell_eval2.aggregate_metrics(tidy, metrics=metric_output_names(config))
    for metric, value in zip(total["metric"], total["mean"], strict=True):
        if metric not in set(rows["metric"]):
            rows.loc[len(rows)] = [ALL, metric, value]
    return rows.assign(source=source, context=context)
