"""Score predicted cells against real ones, beside a baseline and the ceiling that the data sets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from joblib import Parallel, delayed
from mudata import MuData
from scipy import sparse

from virtualcell._design import Design, Scale, check_library_sizes, check_scale, expression_modality, left_design
from virtualcell.data._matrix import check_matches_scale, columns_by_name, log_expression, matrix_name, raw_matrix
from virtualcell.tl._evaluate_checks import (
    ALL,
    COLUMNS,
    SIDES,
    Suite,
    check_groups,
    check_totals,
    contexts_of,
    groups_of,
    metric_names,
    scored_before,
    shared_genes,
)
from virtualcell.tl._scores import METRICS, Cells, Comparison

logger = logging.getLogger(__name__)

_N_SPLITS = 5


def evaluate(
    predicted: AnnData | MuData,
    observed: AnnData | MuData,
    *,
    perturbation_key: str | None = None,
    control: str | None = None,
    context_key: str | None = None,
    suite: Suite | Sequence[str] = "vcc2025",
    scale: Scale | None = None,
    predicted_scale: Scale = "log1p",
    layer: str | None = None,
    library_size_key: str | None = None,
    genes: Sequence[str] | None = None,
    predicted_control: bool = False,
    ceiling: bool = False,
    baseline: AnnData | pd.DataFrame | Literal["generic"] | None = None,
    n_jobs: int = 1,
    seed: int = 0,
    modality: str = "rna",
) -> pd.DataFrame:
    """Score predicted cells against the real ones, as the field's referees do.

    Effects of both sides are taken against the real control cells of the context. Perturbations compete for
    discrimination with those predicted in the same context, and the gene that a perturbation is named after is left out
    of that. Definitions, and how they differ from cell-eval's, are on the page "Evaluation" of the documentation.

    Parameters
    ----------
    predicted
        Predicted cells, as :func:`virtualcell.tl.predict_perturbation` returns them. Only what is predicted is scored.
    observed
        Real cells, perturbed and control.
    perturbation_key, context_key
        Columns of `obs` on both sides; without `context_key`, all cells are one context.
    control
        Label of control cells.
    suite
        "vcc2025", the three metrics of the Virtual Cell Challenge 2025 and discrimination by cosine; "vcc2026", that of
        2026 by its official scorer (`pip install "virtualcell[eval]"`), on raw counts; "full"; or names of metrics.
    scale
        Of `observed`: "counts" or "log1p" (of counts per 10,000); never guessed, and checked. It, the columns,
        `control`, `layer` and `library_size_key` are by default as :func:`virtualcell.tl.fit_state` left them in
        `observed.uns`.
    predicted_scale
        Of `predicted`, in its `X`.
    layer, library_size_key
        Where `observed` has its expression and, for counts, their totals; `X`, and sums over all its genes.
    genes
        Score only these. Without it, both sides must have the same genes, in any order.
    predicted_control
        Take predicted effects against control cells among the predicted ones: the convention of cell-eval.
    ceiling
        Score the real data against itself too: one half of the cells of each perturbation predicts the other half; mean
        of five splits. Both halves share the control cells, or have half of them each with `predicted_control`.
    baseline
        Predicted cells of a baseline, or what `evaluate` returned for them with the same arguments; for "vcc2026" also
        "generic", the mean response over perturbations as the official scorer builds it.
    n_jobs
        Threads.
    seed
        Of the ceiling's splits, and of the draw where there are more than 2,000 cells (500 on principal components) of
        a perturbation to measure distances between.
    modality
        Expression modality of a MuData.

    Returns
    -------
    One row per `source` ("model", "baseline", "ceiling"), `context`, `perturbation` and `metric`, with its `value`; raw
    values, NaN where a metric is not defined. Metrics that have one value for all perturbations have the perturbation
    "(all)", as has the context without `context_key`. What was scored and how is in `.attrs`. For means and challenge
    scores, see :func:`virtualcell.tl.summarize`.

    Raises
    ------
    KeyError
        For an unknown metric, gene, column, or a perturbation or context that `observed` does not have.
    ValueError
        If a matrix is not on the stated scale.
    """
    if scale is None and "scale" not in left_design(observed, modality):
        raise ValueError(
            "scale must be given, 'counts' or 'log1p' for log(1 + counts per 10,000); it is never guessed."
        )
    design = Design.from_data(
        observed,
        modality=modality,
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        scale=scale,
        layer=layer,
        library_size_key=library_size_key,
    )
    check_scale(predicted_scale, "predicted_scale")
    check_library_sizes(design.scale, library_size_key)
    names = metric_names(suite)
    sides = {"model": predicted}
    if isinstance(baseline, AnnData | MuData):
        sides["baseline"] = baseline
    elif (
        baseline is not None and not isinstance(baseline, pd.DataFrame) and (baseline, suite) != ("generic", "vcc2026")
    ):
        raise TypeError(
            f"baseline={baseline!r} must be predicted cells, scores of `vc.tl.evaluate`, or, with suite='vcc2026', "
            "'generic'."
        )
    groups = {s: groups_of(data, design, modality, SIDES[s]) for s, data in sides.items()}
    real = groups_of(observed, design, modality, "observed")
    for source, found in groups.items():
        check_groups(source, found, real, design.control, predicted_control)
    wanted = contexts_of(groups["model"], design.control)
    if "baseline" in groups and contexts_of(groups["baseline"], design.control) != wanted:
        raise ValueError(
            "baseline has other perturbations or contexts than predicted. Predict both for the same ones, because "
            "discrimination depends on which perturbations compete."
        )
    shared = shared_genes(sides, observed, genes, modality)

    arguments = {"predicted_control": predicted_control, "ceiling": ceiling, "n_jobs": n_jobs, "seed": seed}
    if suite == "vcc2026":
        from virtualcell.tl._vcc2026 import score  # an optional dependency

        if (design.scale, predicted_scale) != ("counts", "counts"):
            raise ValueError(
                f"suite='vcc2026' needs raw counts on both sides, not scale={design.scale!r} and predicted_scale="
                f"{predicted_scale!r}. Make counts of the predictions, and say predicted_scale='counts'."
            )
        adatas = {s: expression_modality(d, modality) for s, d in sides.items()}
        parts = score(
            adatas,
            expression_modality(observed, modality),
            groups=groups,
            real=real,
            genes=shared,
            design=design,
            generic=isinstance(baseline, str),
            **arguments,
        )
    else:
        in_threads = Parallel(n_jobs, prefer="threads")
        adatas = {s: expression_modality(d, modality) for s, d in {"observed": observed, **sides}.items()}
        if predicted_scale == "counts":
            check_totals(adatas, design)
        matrix, *matrices = in_threads(
            delayed(_log1p)(
                adata,
                shared,
                design.scale if side == "observed" else predicted_scale,
                side=side,
                layer=design.layer if side == "observed" else None,
                library_size_key=design.library_size_key,
            )
            for side, adata in adatas.items()
        )
        parts = []
        for context, perturbations in wanted.items():
            kept = {"control": design.control, "genes": np.asarray(shared), "seed": seed, "n_jobs": n_jobs}
            kept |= {"perturbations": perturbations, "metrics": names}
            rows = {p: real[context, p] for p in [*perturbations, design.control]}
            found = [{p: r for (c, p), r in groups[s].items() if c == context} for s in sides]
            real_cells, *cells = in_threads(
                delayed(Cells)(m, r) for m, r in zip([matrix, *matrices], [rows, *found], strict=True)
            )
            for source, simulated in zip(sides, cells, strict=True):
                parts.append(_rows(Comparison(simulated, real_cells, **kept), source, context))
            if ceiling:
                parts.append(_ceiling(matrix, rows, context, predicted_control, kept))
    counted = {
        "predicted_control": predicted_control,
        "n_genes": len(shared),
        "n_cells": {
            "predicted": sum(map(len, groups["model"].values())),
            "observed": sum(len(real[c, p]) for c, p in groups["model"] if p != design.control),
            "control": sum(len(real[c, design.control]) for c in wanted),
        },
    }
    if isinstance(baseline, pd.DataFrame):
        parts.append(scored_before(baseline, parts, counted))
    scores = pd.concat(parts, ignore_index=True)[COLUMNS]
    scores.attrs = {
        "suite": suite if isinstance(suite, str) else list(suite),
        "perturbation_key": design.perturbation_key,
        "control": design.control,
        "context_key": design.context_key,
        "scale": design.scale,
        "predicted_scale": predicted_scale,
        "seed": seed,
        **counted,
        "versions": {p: version(p) for p in ("virtualcell", "cell-eval2" if suite == "vcc2026" else "illico")},
    }
    return scores


# -- expression -------------------------------------------------------------------------------------------------------


def _log1p(
    adata: AnnData, genes: list[str], scale: Scale, *, side: str, layer: str | None, library_size_key: str | None
) -> sparse.csr_matrix:
    """log1p CP10k of some genes; shares memory with `adata` where it can, and is only read."""
    try:
        if scale == "counts":
            return log_expression(adata, genes=genes, layer=layer, scale=scale, library_size_key=library_size_key)
        matrix = raw_matrix(adata, layer)
        check_matches_scale(matrix, scale, matrix_name(layer), target_sum=1e4)
    except ValueError as error:
        text = str(error) if side == "observed" else str(error).replace("scale=", "predicted_scale=")
        raise ValueError(f"{SIDES[side]}: {text}") from error
    return columns_by_name(matrix, adata.var_names, genes)


# -- rows of the result -----------------------------------------------------------------------------------------------


def _rows(comparison: Comparison, source: str, context: str) -> pd.DataFrame:
    frames = []
    for name in comparison.metrics:
        value = METRICS[name].compute(comparison)
        of = [ALL] if np.ndim(value) == 0 else comparison.perturbations
        frames.append(pd.DataFrame({"perturbation": of, "metric": name, "value": np.ravel(value).astype(float)}))
    sizes = len(comparison.metrics), len(comparison.perturbations)
    logger.info("%s, %s: %d metrics of %d perturbations.", source, context, *sizes)
    return pd.concat(frames).assign(source=source, context=context)


def _ceiling(matrix: sparse.csr_matrix, rows: dict, context: str, own_control: bool, kept: dict) -> pd.DataFrame:
    """Mean over five splits of each perturbation's cells into halves, the one predicting the other."""
    control, perturbations = kept["control"], kept["perturbations"]
    split = [p for p in perturbations if len(rows[p]) > 1]
    if len(split) < len(perturbations):
        logger.warning("%d perturbations of %s have one cell and no ceiling.", len(perturbations) - len(split), context)
    runs = []
    for i in range(_N_SPLITS if split else 0):
        rng = np.random.default_rng([kept["seed"], i])
        halves = ({}, {control: rows[control]})
        for p in [*split, control] if own_control else split:
            shuffled = rng.permutation(rows[p])
            middle = len(shuffled) // 2
            halves[0][p], halves[1][p] = shuffled[:middle], shuffled[middle : 2 * middle]
        sides = [Cells(matrix, h) for h in halves]
        runs.append(_rows(Comparison(*sides, **{**kept, "perturbations": split}), "ceiling", context))
    if not runs:
        return pd.DataFrame(columns=COLUMNS)
    mean = sum(run["value"].to_numpy() for run in runs) / _N_SPLITS
    return runs[0].assign(value=mean)
