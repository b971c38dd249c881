"""How good a prediction is: pure functions on arrays. Definitions follow the Virtual Cell Challenge and cell-eval.

Profiles are mean expression per gene, log(1 + counts per 10,000) unless said otherwise; effects are differences to the
mean of the **real** control cells. :func:`virtualcell.tl.evaluate` computes all of them from AnnData.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtualcell._lazy import attach

if TYPE_CHECKING:
    from virtualcell.metrics._cells import energy_distance, mmd, variance_ratio
    from virtualcell.metrics._de import (
        de_direction_match,
        de_overlap,
        de_precision,
        de_recall,
        de_spearman_lfc,
        differential_expression,
        pr_auc,
        roc_auc,
    )
    from virtualcell.metrics._discrimination import discrimination_score, pdisc_norm
    from virtualcell.metrics._profiles import mae, mse, pearson_delta, top_overlap

__all__ = [
    "de_direction_match",
    "de_overlap",
    "de_precision",
    "de_recall",
    "de_spearman_lfc",
    "differential_expression",
    "discrimination_score",
    "energy_distance",
    "mae",
    "mmd",
    "mse",
    "pdisc_norm",
    "pearson_delta",
    "pr_auc",
    "roc_auc",
    "top_overlap",
    "variance_ratio",
]

__getattr__, __dir__ = attach(__name__)
