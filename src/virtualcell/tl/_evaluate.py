"""Score predicted cells against real ones, beside a baseline and the ceiling that the data sets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from joblib import Parallel, delayed
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._design import Design, Scale, check_library_sizes, check_scale, expression_modality, labels
from virtualcell._errors import unknown_name
from virtualcell.data._matrix import check_matches_scale, columns_by_name, log_expression, matrix_name, raw_matrix
from virtualcell.tl._scores import METRICS, SUITES, Cells, Comparison

logger = logging.getLogger(__name__)

Suite = Literal["vcc2025", "vcc2026", "full"]

# Stands for a context where there are none, and for the perturbation of a metric that has one value for all of them.
ALL = "(all)"
COLUMNS = ["source", "context", "perturbation", "metric", "value"]
_N_SPLITS = 5
_SIDES = {"model": "predicted", "baseline": "baseline", "observed": "observed"}  # names of the arguments


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
    if scale is None and "scale" not in _design_of(observed, modality):
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
    check_library_sizes(design.scale if scale is None else scale, library_size_key)
    names = _metric_names(suite)
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
    groups = {s: _groups(data, design, modality, _SIDES[s]) for s, data in sides.items()}
    real = _groups(observed, design, modality, "observed")
    for source, found in groups.items():
        _check_groups(source, found, real, design.control, predicted_control)
    wanted = _contexts(groups["model"], design.control)
    if "baseline" in groups and _contexts(groups["baseline"], design.control) != wanted:
        raise ValueError(
            "baseline has other perturbations or contexts than predicted. Predict both for the same ones, because "
            "discrimination depends on which perturbations compete."
        )
    shared = _shared_genes(sides, observed, genes, modality)

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
            _check_library_sizes(adatas, design)
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
        parts.append(_scored_before(baseline, parts, counted))
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


# -- what is to be scored ---------------------------------------------------------------------------------------------


def _design_of(data: AnnData | MuData, modality: str) -> dict:
    return expression_modality(data, modality).uns.get(_keys.UNS, {}).get("design", {})


def _metric_names(suite: Suite | Sequence[str]) -> list[str]:
    if isinstance(suite, str):
        if suite not in (*SUITES, "vcc2026"):
            remedy = f"Single metrics are named in a list: suite=[{suite!r}]." if suite in METRICS else ""
            raise unknown_name("suite", suite, [*SUITES, "vcc2026"], remedy or "A list may name single metrics.")
        return SUITES.get(suite, [])
    if suite is None:
        raise ValueError(f"suite=None: say {[*SUITES, 'vcc2026']}, or name metrics in a list.")
    for name in suite:
        if name not in METRICS:
            raise unknown_name("suite", name, METRICS, "These are the metrics that a list may name.")
    if not len(suite):
        raise ValueError("suite=[] names no metric.")
    return list(dict.fromkeys(suite))


def _groups(data: AnnData | MuData, design: Design, modality: str, side: str) -> dict[tuple[str, str], np.ndarray]:
    """Rows of each (context, perturbation), by name of the cell, so that the order of cells does not matter."""

    def named(role: str) -> np.ndarray:
        return labels(data, getattr(design, role), argument=f"{side}: {role}", modality=modality).to_numpy()

    perturbation, names = named("perturbation_key"), expression_modality(data, modality).obs_names
    context = np.full(len(perturbation), ALL, dtype=object) if design.context_key is None else named("context_key")
    order = np.argsort(names.astype(str), kind="stable")
    frame = pd.DataFrame({"context": context[order], "perturbation": perturbation[order]})
    return {key: order[rows] for key, rows in frame.groupby(["context", "perturbation"]).indices.items()}


def _check_groups(source: str, found: Iterable, real: Iterable, control: str, own_control: bool) -> None:
    side = _SIDES[source]
    for context, perturbation in found:
        if (context, perturbation) not in real and perturbation != control:
            where = "" if context == ALL else f" of context {context!r}"
            raise unknown_name(
                f"{side}: perturbation",
                perturbation,
                sorted({p for c, p in real if c == context and p != control}),
                f"`observed` has no such cells{where} to compare with: leave it out, "
                f"{side}[{side}.obs[key] != {perturbation!r}].",
            )
    for context in dict.fromkeys(c for c, _ in found):
        where = "" if context == ALL else f" in context {context!r}"
        if (context, control) not in real:
            raise unknown_name(
                "control",
                control,
                sorted({p for c, p in real if c == context}),
                f"observed has no such cells{where}, and effects are taken against real control cells. (Predicted "
                "cells come first, `evaluate(predicted, observed)`.)",
            )
        if own_control != ((context, control) in found):
            raise ValueError(
                f"predicted_control=True, but {side} has no {control!r} cells{where}. Leave it out to take effects "
                "against real control cells."
                if own_control
                else f"{side} has {control!r} cells{where}. Drop them, or say predicted_control=True to take predicted "
                "effects against them."
            )


def _contexts(groups: Iterable[tuple[str, str]], control: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for context, perturbation in sorted(groups):
        if perturbation != control:
            out.setdefault(context, []).append(perturbation)
    if not out:
        raise ValueError("predicted holds no perturbed cells.")
    return out


def _shared_genes(
    sides: dict[str, AnnData | MuData], observed: AnnData | MuData, genes: Sequence[str] | None, modality: str
) -> list[str]:
    """Genes to score, in the order of `observed`."""
    real = expression_modality(observed, modality).var_names
    if isinstance(genes, str) or (genes is not None and not len(genes)):
        raise ValueError(f"genes={genes!r} must be a list of one or more names; leave it out for all genes.")
    remedy = (
        "They are matched by name. Name those to score: genes=observed.var_names.intersection(predicted.var_names)."
    )
    for source, data in [("observed", observed), *sides.items()]:
        there = expression_modality(data, modality).var_names
        name = _SIDES[source]
        if not there.is_unique:
            twice = list(there[there.duplicated()][:3])
            raise ValueError(f"var_names of {name} repeats {twice}. Run `{name}.var_names_make_unique()` first.")
        wanted = real if genes is None else pd.Index(genes)
        missing = wanted[~wanted.isin(there)]
        if len(missing):
            raise unknown_name("genes", missing[0], there, f"{name} lacks {len(missing)} of {len(wanted)}. {remedy}")
        extra = there[~there.isin(real)]
        if genes is None and len(extra):
            raise unknown_name("genes", extra[0], real, f"{name} has {len(extra)} that observed lacks. {remedy}")
    return list(real) if genes is None else list(real[real.isin(genes)])


def _check_library_sizes(adatas: dict[str, AnnData], design: Design) -> None:
    """Raise or warn where counts on the two sides would be divided by totals that are not comparable."""
    key, real = design.library_size_key, adatas["observed"]
    for source, adata in adatas.items():
        if source == "observed":
            continue
        side = _SIDES[source]
        if key is not None and key not in adata.obs:
            raise unknown_name(
                "library_size_key",
                key,
                adata.obs.columns,
                f"The observed counts are divided by that column, and {side}.obs has none of the name: put the "
                f"library sizes of the predicted cells there, or give {side} as log(1 + counts per 10,000).",
            )
        if key is None and design.scale == "counts" and adata.n_vars != real.n_vars:
            logger.warning(
                "%s has %d genes and observed has %d: library sizes are sums over these, and differ for the same cell. "
                "Give both the same genes, or name the true totals with library_size_key=.",
                *(side, adata.n_vars, real.n_vars),
            )


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
        raise ValueError(f"{_SIDES[side]}: {text}") from error
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


def check_scores(scores: object, argument: str) -> None:
    """Raise unless this is a table of `evaluate`, of one prediction."""
    if not isinstance(scores, pd.DataFrame):
        raise TypeError(f"{argument}={type(scores).__name__} must be the table that `vc.tl.evaluate` returned.")
    if not set(COLUMNS) <= set(scores):
        raise ValueError(f"{argument} has the columns {list(scores)}; give what `vc.tl.evaluate` returned: {COLUMNS}.")
    if not len(scores):
        raise ValueError(f"{argument} has no rows: give what `vc.tl.evaluate` returned.")
    again = scores.duplicated(COLUMNS[:-1])
    if again.any():
        raise ValueError(
            f"{argument} has {scores.loc[again, COLUMNS[:-1]].iloc[0].to_dict()} more than once: it holds several "
            "models, splits or seeds. Give the rows of one of them, scores[scores['model'] == ...]."
        )


def _scored_before(scores: pd.DataFrame, parts: list[pd.DataFrame], counted: dict) -> pd.DataFrame:
    """Rows of a baseline that was scored in an earlier call, which must cover those of the model."""
    check_scores(scores, "baseline")
    keys = ["context", "perturbation", "metric"]
    earlier = scores[scores["source"] == "model"]
    model = pd.concat([p[p["source"] == "model"] for p in parts])
    if set(counted) <= set(scores.attrs):  # not of a table that was read from a file
        before, now = ({k: a[k] for k in counted} for a in (scores.attrs, counted))
        for attrs in (before, now):  # how many cells were predicted may differ
            attrs["n_cells"] = {k: attrs["n_cells"][k] for k in ("observed", "control")}
        if before != now:
            raise ValueError(
                f"baseline was scored with {before}, these predictions with {now}. Evaluate it on the same observed "
                "cells and genes, in the same way."
            )
    here, there = (set(map(tuple, s[keys].to_numpy())) for s in (model, earlier))
    if here != there:
        odd = sorted(here ^ there)[0]
        raise ValueError(
            f"baseline was scored on other contexts, perturbations or metrics: {odd} is on one side only. Evaluate it "
            "with the same arguments, because discrimination depends on which perturbations compete."
        )
    return earlier.assign(source="baseline")
