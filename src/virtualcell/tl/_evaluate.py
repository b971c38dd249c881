"""Score predicted cells against real ones, beside a baseline and the ceiling that the data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Literal, Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from joblib import Parallel, delayed
from mudata import MuData

from virtualcell import __version__
from virtualcell._progress import Bar
from virtualcell._settings import seed_of
from virtualcell._threads import count_threads
from virtualcell.data._design import (
    Design,
    Scale,
    check_library_sizes,
    check_scale,
    check_sides,
    note_design,
    noted_design,
    require_columns,
)
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.data._labels import expression_modality, var_of
from virtualcell.tl._ceiling import CEILING, CORRECTED_CEILING, ceilings
from virtualcell.tl._cells import Cells
from virtualcell.tl._evaluate_checks import (
    COLUMNS,
    Suite,
    Task,
    check_baseline,
    metric_names,
    scored_before,
    task_of,
    warn_without_targets,
)
from virtualcell.tl._scores import Comparison, score_rows


@takes_design('they are then as earlier calls noted them in `observed.uns["virtualcell"]`, where this one notes them')
def evaluate(
    predicted: AnnData | MuData,
    observed: AnnData | MuData,
    *,
    gene_key: str | None = None,
    suite: Suite | Sequence[str] = "standard",
    predicted_scale: Scale = "log1p",
    genes: Sequence[str] | None = None,
    predicted_control: bool = False,
    ceiling: bool = False,
    baseline: AnnData | pd.DataFrame | Literal["generic"] | None = None,
    n_jobs: int = 1,
    seed: int | None = None,
    modality: str = "rna",
    **stated: Unpack[DesignArguments],
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
    gene_key
        Column of `observed.var` with the names of genes that perturbations go by, where these are not `var_names`; as
        noted where left out. The gene that a perturbation is named after is left out of its discrimination.
    suite
        "standard", the metrics that the page "Evaluation" recommends, Pearson delta and MAE first; "full", all of them;
        "vcc2025", the three metrics of the Virtual Cell Challenge 2025 and discrimination by cosine; "vcc2026", those
        of 2026 by its official scorer (`pip install "virtualcell[eval]"`), on raw counts; or names of metrics.
    predicted_scale
        Scale of `predicted`, whose expression is in its `X`.
    genes
        Names of the genes to score; by default those that the model predicts, where `predicted` is a prediction of this
        package. Other predictions must then have the genes of `observed`, in any order.
    predicted_control
        Whether predicted effects are taken against control cells among the predicted ones: the convention of cell-eval.
    ceiling
        Whether the real data is scored against itself too: one half of the cells of each perturbation predicts the
        other half, and the mean of five splits is given. Both halves share the control cells, or have half of them each
        with `predicted_control`. Halves are noisier than what a prediction is compared with, and lie below what a good
        one reaches: the "corrected ceiling" is what the truth would score against all observed cells, with as many
        cells as `predicted` has of each perturbation. Not for "vcc2026", whose official ceiling is the raw one.
    baseline
        Predicted cells of a baseline, or what `evaluate` returned for them with the same arguments; for "vcc2026" also
        "generic", the mean response over perturbations as the official scorer builds it.
    n_jobs
        Number of threads; -1 takes one per core.
    seed
        Seed of the ceiling's splits, and of the draw where there are more than 2,000 cells (500 on principal
        components) of a perturbation to measure distances between; by default `vc.settings.seed`.
    modality
        Modality of a MuData that holds gene expression.
    context_key
        Column of `obs` on both sides with the context; without it, all cells are of one.
    batch_key
        Column of `obs` with the experimental batch, which plays no part in scores.
    layer
        Layer with the expression of `observed`; `X` where it is in none.
    scale
        Whether the expression of `observed` is "counts" (raw) or "log1p" (of counts per 10,000), which is never
        guessed, and checked. Another scale than was noted is that of `X`, unless a layer is stated with it.
    **stated
        The design of `observed`. Its columns are read on both sides.

    Returns
    -------
    One row per `source` ("model", "baseline", "ceiling", "corrected ceiling"), `context`, `perturbation` and `metric`,
    with its `value`; raw values, NaN where a metric is not defined, of the model and of its ceilings alike. Metrics
    without a correction have no row of the corrected ceiling. Metrics that have one value for all perturbations have
    the perturbation "(all)", as has the context without `context_key`. What was scored and how is in `.attrs`. For
    means and challenge scores, see :func:`virtualcell.tl.summarize`.

    Raises
    ------
    KeyError
        For an unknown metric, gene, column, or a perturbation or context that `observed` does not have.
    ValueError
        If a matrix is not on the stated scale.

    Examples
    --------
    >>> scores = vc.tl.evaluate(predicted, fitted, suite=["pearson_delta", "mae"])
    >>> sorted(scores["metric"].unique())
    ['mae', 'pearson_delta']
    """
    seed = seed_of(seed)
    check_sides(predicted, observed)
    design = _design(observed, modality, {**stated, "gene_key": gene_key})
    check_scale(predicted_scale, "predicted_scale")
    batch = {"batch_key": stated.get("batch_key")}
    require_columns(observed, modality, **batch)
    names = metric_names(suite)
    check_baseline(baseline, suite)
    official = isinstance(suite, str) and suite == "vcc2026"
    if official and (design.scale, predicted_scale) != ("counts", "counts"):
        raise ValueError(
            f"suite='vcc2026' needs raw counts on both sides, not scale={design.scale!r} and predicted_scale="
            f"{predicted_scale!r}. Make counts of the predictions, and say predicted_scale='counts'."
        )
    given = {"model": predicted, "baseline": baseline, "observed": observed}
    task = task_of(
        {side: data for side, data in given.items() if isinstance(data, AnnData | MuData)}, design,
        predicted_scale=predicted_scale, counts=official, genes=genes, modality=modality,
        predicted_control=predicted_control, ceiling=ceiling, n_jobs=count_threads(n_jobs), seed=seed,
    )  # fmt: skip
    if official:
        from virtualcell.tl._vcc2026 import score  # an optional dependency

        parts = score(task, generic=isinstance(baseline, str))
    else:
        asked = {p for perturbations in task.contexts.values() for p in perturbations}
        warn_without_targets(task.screens["observed"], asked, names, var_of(expression_modality(observed, modality)))
        parts = [_defined_alike(pd.concat(_score(task, names), ignore_index=True))]
    for part in parts:
        part["perturbation"] = task.screens["observed"].spelled(part["perturbation"])
    counted = task.counted()
    if isinstance(baseline, pd.DataFrame):
        parts.append(scored_before(baseline, parts, counted))
    scores = pd.concat(parts, ignore_index=True)[COLUMNS]
    scorer = {"cell-eval2": version("cell-eval2")} if official else {}
    scores.attrs = {
        "suite": suite if isinstance(suite, str) else list(suite),
        "perturbation_key": design.perturbation_key,
        "control": design.control,
        "context_key": design.context_key,
        "scale": design.scale,
        "predicted_scale": predicted_scale,
        "seed": seed,
        **counted,
        "versions": {"virtualcell": __version__, **scorer},
    }
    note_design(observed, design.to_uns() | batch, modality)
    return scores


def _design(observed: AnnData | MuData, modality: str, stated: dict) -> Design:
    """Return the design of the real cells, of which the scale is never guessed."""
    if stated.get("scale") is None and "scale" not in noted_design(observed, modality):
        raise ValueError(
            "scale must be given, 'counts' or 'log1p' for log(1 + counts per 10,000); it is never guessed."
        )
    design = Design.from_data(observed, modality=modality, **stated)
    check_library_sizes(design.scale, stated.get("library_size_key"))
    return replace(design.plain(), gene_key=design.gene_key, target_sum=1e4)


def _defined_alike(scores: pd.DataFrame) -> pd.DataFrame:
    """Return scores without ceilings of what is not defined of the model: their means are then of the same cells."""
    of = pd.MultiIndex.from_frame(scores[["context", "perturbation", "metric"]])
    undefined = of[(scores["source"] == "model") & scores["value"].isna()]
    is_ceiling = scores["source"].isin([CEILING, CORRECTED_CEILING])
    return scores.assign(value=scores["value"].mask(is_ceiling & of.isin(undefined)))


def _score(task: Task, metrics: Sequence[str]) -> list[pd.DataFrame]:
    """Score every source in every context; the cells of one context are in memory at a time."""
    in_threads = Parallel(task.n_jobs, prefer="threads")
    targets_by = task.screens["observed"].target_names[task.genes].to_numpy()
    parts = []
    n_steps = len(task.contexts) * (len(task.sources) + task.ceiling)
    with Bar("evaluation", n_steps) as bar:
        for context, perturbations in task.contexts.items():
            sides = ["observed", *task.sources]
            real, *cells = in_threads(
                delayed(Cells.read)(task.screens[side].expression, task.rows(side, context)) for side in sides
            )
            kept = {"control": task.control, "genes": np.asarray(task.genes), "targets_by": targets_by}
            kept |= {"perturbations": perturbations, "metrics": metrics, "seed": task.seed, "n_jobs": task.n_jobs}
            for source, simulated in zip(task.sources, cells, strict=True):
                parts.append(score_rows(Comparison(simulated, real, **kept), source, context))
                bar.step(f"{source} of {context}")
            if task.ceiling:
                n_predicted = dict(zip(task.sources, cells, strict=True))["model"].size
                parts.append(ceilings(real, context, kept, own_control=task.predicted_control, n_predicted=n_predicted))
                bar.step(f"ceiling of {context}")
    return parts
