"""What is to be scored, and whether it can be compared: names, genes, totals, earlier scores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._design import Design, expression_modality, labels
from virtualcell._errors import unknown_name
from virtualcell.tl._scores import METRICS, SUITES

logger = logging.getLogger(__name__)

Suite = Literal["vcc2025", "vcc2026", "full"]

# Stands for a context where there are none, and for the perturbation of a metric that has one value for all of them.
ALL = "(all)"
COLUMNS = ["source", "context", "perturbation", "metric", "value"]
SIDES = {"model": "predicted", "baseline": "baseline", "observed": "observed"}  # names of the arguments


def metric_names(suite: Suite | Sequence[str]) -> list[str]:
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


def groups_of(data: AnnData | MuData, design: Design, modality: str, side: str) -> dict[tuple[str, str], np.ndarray]:
    """Rows of each (context, perturbation), by name of the cell, so that the order of cells does not matter."""

    def named(role: str) -> np.ndarray:
        return labels(data, getattr(design, role), argument=f"{side}: {role}", modality=modality).to_numpy()

    perturbation, names = named("perturbation_key"), expression_modality(data, modality).obs_names
    context = np.full(len(perturbation), ALL, dtype=object) if design.context_key is None else named("context_key")
    order = np.argsort(names.astype(str), kind="stable")
    frame = pd.DataFrame({"context": context[order], "perturbation": perturbation[order]})
    return {key: order[rows] for key, rows in frame.groupby(["context", "perturbation"]).indices.items()}


def check_groups(source: str, found: Iterable, real: Iterable, control: str, own_control: bool) -> None:
    side = SIDES[source]
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


def contexts_of(groups: Iterable[tuple[str, str]], control: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for context, perturbation in sorted(groups):
        if perturbation != control:
            out.setdefault(context, []).append(perturbation)
    if not out:
        raise ValueError("predicted holds no perturbed cells.")
    return out


def shared_genes(
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
        name = SIDES[source]
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


def check_totals(adatas: dict[str, AnnData], design: Design) -> None:
    """Raise or warn where counts on the two sides would be divided by totals that are not comparable."""
    key, real = design.library_size_key, adatas["observed"]
    for source, adata in adatas.items():
        if source == "observed":
            continue
        side = SIDES[source]
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


def scored_before(scores: pd.DataFrame, parts: list[pd.DataFrame], counted: dict) -> pd.DataFrame:
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
