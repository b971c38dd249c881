"""What is to be scored, and whether it can be compared: names, genes, totals, earlier scores."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import unknown_name
from virtualcell._keys import ALL
from virtualcell.data._design import Design, Scale
from virtualcell.data._labels import obs_column, parts, text, without_version
from virtualcell.data._results import ours
from virtualcell.data._screen import Screen
from virtualcell.tl._scores import METRICS, SUITES

logger = logging.getLogger(__name__)

Suite = Literal["standard", "vcc2025", "vcc2026", "full"]

COLUMNS = ["source", "context", "perturbation", "metric", "value"]
SIDES = {"model": "predicted", "baseline": "baseline", "observed": "observed"}  # names of the arguments


@dataclass(frozen=True)
class Task:
    """What is to be scored: all sides on the same genes, and how.

    Parameters
    ----------
    screens
        Cells of "model", perhaps "baseline", and "observed".
    pairs
        Rows of each (context, perturbation) of these.
    contexts
        Perturbations to score in each context.
    predicted_control, ceiling, n_jobs, seed
        As in :func:`virtualcell.tl.evaluate`.
    """

    screens: dict[str, Screen]
    pairs: dict[str, dict[tuple[str, str], np.ndarray]]
    contexts: dict[str, list[str]]
    predicted_control: bool
    ceiling: bool
    n_jobs: int
    seed: int

    @property
    def sources(self) -> list[str]:
        """Sides that are scored."""
        return [side for side in self.screens if side != "observed"]

    @property
    def control(self) -> str:
        """Label of control cells."""
        return self.screens["observed"].design.control

    @property
    def genes(self) -> pd.Index:
        """Genes that are scored, in the order of `observed`."""
        return self.screens["observed"].genes

    def rows(self, side: str, context: str) -> dict[str, np.ndarray]:
        """Rows of one side in a context by perturbation; of `observed` those that are scored, and then the control."""
        if side == "observed":
            return {p: self.pairs[side][context, p] for p in [*self.contexts[context], self.control]}
        return {p: rows for (c, p), rows in self.pairs[side].items() if c == context}

    def counted(self) -> dict:
        """Return how much is scored, for the attributes of the result."""
        model, real = self.pairs["model"], self.pairs["observed"]
        cells = {
            "predicted": sum(map(len, model.values())),
            "observed": sum(len(real[c, p]) for c, p in model if p != self.control),
            "control": sum(len(real[c, self.control]) for c in self.contexts),
        }
        return {"predicted_control": self.predicted_control, "n_genes": len(self.genes), "n_cells": cells}


def task_of(
    given: dict[str, AnnData | MuData],
    design: Design,
    *,
    predicted_scale: Scale,
    counts: bool,
    genes: Sequence[str] | None,
    modality: str,
    predicted_control: bool,
    **how: object,
) -> Task:
    """Read the labels of all sides, "observed" the last, and raise unless they can be compared."""
    unit = "counts" if counts else "log1p"
    if counts:  # nothing is divided by library sizes
        design = replace(design, library_size_key=None)
    screens = {}
    for side, data in given.items():
        name = SIDES[side]
        if side == "observed":
            screens[side] = Screen.from_anndata(data, design, modality=modality, unit=unit, side=name)
            continue
        of_predicted = design.of_predicted(predicted_scale)
        _check_library_sizes(data, of_predicted.library_size_key, name, modality)
        screens[side] = Screen.from_anndata(
            data, of_predicted, modality=modality, unit=unit, side=name, scale_argument="predicted_scale",
            measured=False,
        )  # fmt: skip
    pairs = {side: screen.pairs() for side, screen in screens.items()}
    for side in given:
        if side != "observed":
            _check_groups(side, pairs[side], pairs["observed"], design.control, predicted_control)
    contexts = _contexts_of(pairs["model"], design.control)
    if "baseline" in pairs and _contexts_of(pairs["baseline"], design.control) != contexts:
        raise ValueError(
            "baseline has other perturbations or contexts than predicted. Predict both for the same ones, because "
            "discrimination depends on which perturbations compete."
        )
    if genes is None and not counts:
        genes = _predicted_genes(given["model"], screens)
    shared = _shared_genes(screens, genes)
    if not counts:
        _warn_of_totals(screens)
    screens = {side: screen.select(shared) for side, screen in screens.items()}
    return Task(screens, pairs, contexts, predicted_control=predicted_control, **how)


def warn_without_targets(
    screen: Screen, perturbations: Iterable[str], metrics: Sequence[str], var: pd.DataFrame
) -> None:
    """Warn where genes go by other names than those that perturbations are named after: no target is left out."""
    if not any(name.startswith(("discrimination", "pdisc")) for name in metrics):
        return
    wanted = {part for name in perturbations for part in parts(name, screen.design.control)}
    if wanted & set(screen.target_names):
        return
    text_columns = [key for key, kind in var.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    found = {key: len(wanted & {without_version(text(name)) for name in var[key]}) for key in text_columns}
    best = max(found, key=found.get, default=None)
    if best is not None and found[best]:
        logger.warning(
            "No target is left out of discrimination, which then tells targets apart and not effects: %d of %d names "
            "of perturbations are in var[%r], and none among the names that genes go by. Say gene_key=%r.",
            *(found[best], len(wanted), best, best),
        )
    elif screen.design.gene_key is None and any(str(gene).startswith("ENSG") for gene in screen.genes[:100]):
        logger.warning(
            "No perturbation has the name of a gene, and genes are named by Ensembl ids. If perturbations are named "
            "after their targets, put the names of genes into a column of var, and say gene_key=: the target is to be "
            "left out of discrimination."
        )


def check_baseline(baseline: object, suite: Suite | Sequence[str]) -> None:
    """Raise unless a baseline is cells, scores, or what the official scorer builds."""
    if baseline is None or isinstance(baseline, AnnData | MuData | pd.DataFrame):
        return
    if not (isinstance(baseline, str) and isinstance(suite, str) and (baseline, suite) == ("generic", "vcc2026")):
        raise TypeError(
            f"baseline={baseline!r} must be predicted cells, scores of `vc.tl.evaluate`, or, with suite='vcc2026', "
            "'generic'."
        )


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


def _check_groups(source: str, found: Iterable, real: Iterable, control: str, own_control: bool) -> None:
    side = SIDES[source]
    for context, perturbation in found:
        if (context, perturbation) not in real and perturbation != control:
            where = "" if context == ALL else f" of context {context!r}"
            raise unknown_name(
                f"{side}: perturbation",
                perturbation,
                sorted({p for c, p in real if c == context and p != control}),
                f"`observed` has no such cells{where} to compare with: leave its cells out of {side}.",
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


def _contexts_of(groups: Iterable[tuple[str, str]], control: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for context, perturbation in sorted(groups):
        if perturbation != control:
            out.setdefault(context, []).append(perturbation)
    if not out:
        raise ValueError("predicted holds no perturbed cells.")
    return out


def _predicted_genes(predicted: AnnData | MuData, screens: dict[str, Screen]) -> pd.Index | None:
    """Return the genes of a prediction that a model made, which leaves genes out on purpose; `None` for any other."""
    here, real = screens["model"].genes, screens["observed"].genes
    made = isinstance(predicted, AnnData) and "predicted_by" in ours(predicted)
    if not made or len(here) == len(real) or not here.isin(real).all():
        return None
    logger.info("Scored are the %d genes that the model predicts, of %d in observed.", len(here), len(real))
    return here


def _shared_genes(screens: dict[str, Screen], genes: Sequence[str] | None) -> pd.Index:
    """Genes to score, in the order of `observed`."""
    real = screens["observed"].genes
    if isinstance(genes, str) or (genes is not None and not len(genes)):
        raise ValueError(f"genes={genes!r} must be a list of one or more names; leave it out for all genes.")
    remedy = (
        "They are matched by name. Name those to score: genes=observed.var_names.intersection(predicted.var_names)."
    )
    for source in ("observed", *(s for s in screens if s != "observed")):
        there, name = screens[source].genes, SIDES[source]
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
    return real if genes is None else real[real.isin(genes)]


def _check_library_sizes(data: AnnData | MuData, key: str | None, side: str, modality: str) -> None:
    """Raise where the observed counts are divided by a column that predicted counts lack."""
    if key is None:
        return
    try:
        obs_column(data, key, argument="library_size_key", modality=modality)
    except KeyError as error:
        raise type(error)(
            f"{error} The observed counts are divided by that column, and {side}.obs has none of the name: put the "
            f"library sizes of the predicted cells there, or give {side} as log(1 + counts per 10,000)."
        ) from error


def _warn_of_totals(screens: dict[str, Screen]) -> None:
    """Warn where counts on the two sides are divided by sums over other genes."""
    real = screens["observed"]
    for side, screen in screens.items():
        summed = screen.design.library_size_key is None and {screen.design.scale, real.design.scale} == {"counts"}
        if summed and len(screen.genes) != len(real.genes):
            logger.warning(
                "%s has %d genes and observed has %d: library sizes are sums over these, and differ for the same cell. "
                "Give both the same genes, or name the true totals with library_size_key=.",
                *(SIDES[side], len(screen.genes), len(real.genes)),
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
