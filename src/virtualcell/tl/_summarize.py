"""From scores of single perturbations to means and challenge scores."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from virtualcell._keys import ALL
from virtualcell.tl._ceiling import CEILING, CORRECTED_CEILING
from virtualcell.tl._evaluate_checks import check_scores
from virtualcell.tl._scores import METRICS

# What the challenge of 2025 averages; the cosine beside it is ours.
_AVERAGED_2025 = ["pdisc_norm_l1", "de_overlap", "mae"]
CHALLENGE = "challenge_score"


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Average scores over perturbations, and measure them against the baseline.

    The score of a metric against the baseline's value b is (x - b) / (1 - b) where 1 is best, and 1 - x / b where 0 is.
    The Virtual Cell Challenge 2025 sets what is below 0 to 0 (`score`), which makes it free to be far worse than the
    baseline in one of the metrics: `unclipped` and the raw values beside it show that. For 2026 both columns are
    (x - b) / (r - b), with r the raw ceiling, as the official scorer has it; without a ceiling, its score against the
    baseline alone; NaN where the baseline is already as good as that.

    Parameters
    ----------
    scores
        Table that :func:`virtualcell.tl.evaluate` returned, whose `.attrs` say which suite it was, or that of
        :func:`virtualcell.tl.benchmark`.

    Returns
    -------
    Of a benchmark one row per `split` and `model`, in the order of the table, ceilings last, and one column per
    metric, the mean over perturbations, then over contexts, and over seeds; with several seeds of a model,
    `mae_spread` and the like are the standard deviations over them of those means, NaN for a model that was fitted
    once.

    Of an evaluation one row per `context` and `metric`: `value`, the mean over perturbations where the metric is
    defined, `n` how many these are, `baseline` and `ceiling` likewise, `ceiling_corrected` (the ceiling corrected
    for having half of the cells, NaN where there is no correction), `score` and `unclipped`, and `note`. Columns
    that would hold nothing are left out. A note says where a metric is not defined, and where a value is better
    than a ceiling: halves of the cells are noisier than a prediction of their mean, which may well have a lower
    error; `.attrs["note"]` says so at length. Rows of the context "(all)" are means over contexts, each of the same
    weight. The challenges add the metric "challenge_score", the mean of the scores of the metrics that they
    average, where there is a baseline.

    Raises
    ------
    TypeError, ValueError
        If this is not such a table, or lacks metrics that the suite's score is made of.

    Examples
    --------
    >>> scores = vc.tl.evaluate(predicted, fitted, suite=["pearson_delta", "mae"], ceiling=True)
    >>> table = vc.tl.summarize(scores)
    >>> sorted(table["metric"])
    ['mae', 'pearson_delta']
    """
    if isinstance(scores, pd.DataFrame) and {"split", "seed", "model"} <= set(scores):
        return _of_benchmark(scores)
    check_scores(scores, "scores")
    if not (scores["source"] == "model").any():
        raise ValueError(f"scores has no rows of the source 'model', only {sorted(set(scores['source']))}.")
    suite = scores.attrs.get("suite")
    keys = ["context", "metric"]
    by = scores.groupby(["source", *keys], sort=False)["value"]
    mean = by.mean().unstack("source").reindex(columns=["model", "baseline", CEILING, CORRECTED_CEILING])
    out = mean.rename(columns={"model": "value", CORRECTED_CEILING: "ceiling_corrected"})
    # a metric without one row per perturbation holds for all of them
    out.insert(1, "n", by.count().unstack("source")["model"])
    out = out[out["value"].notna() | out["n"].notna()]
    ends = out[_ENDS].to_numpy()
    out["unclipped"] = [_score(m, x, b, r, suite) for (_, m), (x, b, r) in zip(out.index, ends, strict=True)]
    out["score"] = out["unclipped"] if suite == "vcc2026" else np.maximum(out["unclipped"], 0) + 0.0  # no -0
    out = out.reset_index()
    order = list(dict.fromkeys(scores["metric"]))

    averaged = _averaged(suite)
    if averaged and out.loc[out["metric"].isin(averaged), "unclipped"].notna().any():
        if missing := set(averaged) - set(out["metric"]):
            raise ValueError(
                f"scores lacks {sorted(missing)}, which the score of {suite!r} is made of. Keep all its metrics."
            )
        total = out[out["metric"].isin(averaged)].groupby("context")[["score", "unclipped"]].agg(_mean_of_all)
        out = pd.concat([out, total.reset_index().assign(metric=CHALLENGE)])
        order.append(CHALLENGE)
    if out["context"].nunique() > 1:
        over = out.groupby("metric").agg(dict.fromkeys(_NUMBERS, "mean") | {"n": "sum"}).reset_index()
        total = out[out["metric"] == CHALLENGE]  # of all contexts or of none, as of all metrics
        over.loc[over["metric"] == CHALLENGE, ["score", "unclipped"]] = [
            _mean_of_all(total[k]) for k in ("score", "unclipped")
        ]
        out = pd.concat([out, over.assign(context=ALL)])
    contexts = [*dict.fromkeys(scores["context"]), ALL]
    out["context"], out["metric"] = (
        pd.Categorical(out["context"], list(dict.fromkeys(contexts))),
        pd.Categorical(out["metric"], order),
    )
    out = out.sort_values(keys).astype(dict.fromkeys(keys, object)).reset_index(drop=True)
    out["n"] = out["n"].fillna(0).astype(int)
    rows = out[["metric", *_NOTED]].itertuples(index=False)
    out["note"] = [_note(metric, x, ceiling, corrected, suite) for metric, x, ceiling, corrected in rows]
    out = out[[*keys, "value", "n", *_MAY_LACK]].replace({"note": {"": None}})
    out = out.drop(columns=[name for name in _MAY_LACK if out[name].isna().all()])
    if "note" in out:
        out["note"] = out["note"].fillna("")
    noted = [text for short, text in _NOTES.items() if short in set(out.get("note", []))]
    out.columns.name = None
    out.attrs = dict(scores.attrs) | ({"note": " ".join(noted)} if noted else {})
    return out


def _of_benchmark(scores: pd.DataFrame) -> pd.DataFrame:
    """Models beside each other, for each split."""
    keys = ["split", "model", "metric"]
    splits, models, metrics = (list(dict.fromkeys(scores[key])) for key in keys)
    models.sort(key=[CEILING, CORRECTED_CEILING].__contains__)  # the ceilings last
    # as for an evaluation and in `vc.pl.benchmark`, contexts count the same whatever was predicted in them
    by_context = scores.groupby([*keys, "seed", "context"])["value"].mean()
    of_seed = by_context.groupby([*keys, "seed"]).mean().groupby(keys)
    out = of_seed.mean().unstack("metric")[metrics]
    if (of_seed.size() > 1).any():
        spread = of_seed.std().unstack("metric")
        for at, metric in enumerate(metrics):
            out.insert(2 * at + 1, f"{metric}_spread", spread[metric])
    out = out.loc[[row for row in itertools.product(splits, models) if row in out.index]].reset_index()
    out.columns.name, out.attrs = None, dict(scores.attrs)
    return out


_ENDS = ["value", "baseline", "ceiling"]
_NOTED = ["value", "ceiling", "ceiling_corrected"]
_MAY_LACK = ["baseline", "ceiling", "ceiling_corrected", "score", "unclipped", "note"]
_UNDEFINED, _BEYOND, _FAR_BEYOND = (
    "not defined",
    "better than halves, which are noisier",
    "better than the corrected ceiling, an estimate",
)
# What a row says, no longer than a notebook shows of a text, and what the table says of it.
_NOTES = {
    _UNDEFINED: "A metric is not defined where, for instance, there is one perturbation and nothing to tell it from.",
    _BEYOND: (
        "The ceiling is one half of the real cells against the other, both with the noise of half of the cells; a "
        "prediction of the mean has less, and can be better than that. `ceiling_corrected`, where there is one, is "
        "what the truth would score."
    ),
    _FAR_BEYOND: (
        "The corrected ceiling is an estimate of what the truth would score, and the same cells tell whether it was "
        "reached: a little beyond it is chance, far beyond it a sign that the prediction has seen these cells."
    ),
}
_NUMBERS = [*_ENDS, "ceiling_corrected", "score", "unclipped"]


def _averaged(suite: object) -> list[str]:
    """Metrics that a challenge averages, none for a suite that is no challenge."""
    if suite == "vcc2026":
        from virtualcell.tl._vcc2026 import averaged_metrics

        return averaged_metrics()
    return _AVERAGED_2025 if suite == "vcc2025" else []


def _score(metric: str, x: float, b: float, r: float, suite: object) -> float:
    if np.isnan(b):
        return float("nan")
    if suite == "vcc2026":
        from virtualcell.tl._vcc2026 import averaged_metrics, challenge_score

        known = metric in averaged_metrics()
        return challenge_score(metric, x, b, None if np.isnan(r) else r) if known else float("nan")
    best = METRICS[metric].best
    if best is None or b == best:  # nothing is better than this baseline
        return float("nan")
    return (x - b) / (best - b)


def _note(metric: str, x: float, ceiling: float, corrected: float, suite: object) -> str:
    """Say what a reader would wonder about; nothing about the official ceiling, which is part of a score."""
    if np.isnan(x) and metric != CHALLENGE:
        return _UNDEFINED
    best = METRICS[metric].best if metric in METRICS and suite != "vcc2026" else None
    if best is None:
        return ""
    is_better = [x > r if best == 1 else x < r for r in (ceiling, corrected)]  # False for NaN
    return _FAR_BEYOND if is_better[1] else _BEYOND if is_better[0] else ""


def _mean_of_all(values: pd.Series) -> float:
    """NaN where one of them is: a challenge score of fewer metrics would be another quantity."""
    return values.mean(skipna=False)
