"""Every metric of :func:`virtualcell.tl.evaluate` by name, and what they share: the cells of one context, compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import sparse, stats
from scipy.linalg import eigh

from virtualcell import metrics
from virtualcell._keys import ALL
from virtualcell.data._labels import parts
from virtualcell.metrics._cells import mean_distance, mean_distances
from virtualcell.metrics._de import log2_fold_change
from virtualcell.metrics._rank_sum import rank_sum_test
from virtualcell.tl._cells import Cells

logger = logging.getLogger(__name__)

# Cells of one group beyond these numbers are drawn at random: distances between all pairs grow with the square.
MAX_CELLS = 2000
MAX_CELLS_PCA = 500
_CELLS_OF_PCA = 1000
# Metrics that need distances between cells over all genes, from control cells too, and on principal components.
_FULL = {"energy_distance", "pearson_edistance"}
_FROM_CONTROL = {"pearson_edistance"}
_IN_COMPONENTS = {"energy_distance_pca", "mmd"}
_N_COMPONENTS = 50


@dataclass
class Comparison:
    """Predicted against real cells of the same perturbations in one context; everything is computed once, when needed.

    Matrices are log1p CP10k of the same genes. `control` labels control cells, which `observed` has; effects of both
    sides are taken against them, unless `predicted` has control cells too. `targets_by` are the names by which
    perturbations call the genes.
    """

    predicted: Cells
    observed: Cells
    perturbations: list[str]
    control: str
    genes: np.ndarray
    targets_by: np.ndarray
    metrics: Sequence[str]
    seed: int = 0
    n_jobs: int = 1
    # columns in an order that does not depend on the data's, so that ties do not either
    order: np.ndarray = field(init=False)
    # scores by the distance they were taken with
    discrimination: dict[str, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.order = np.argsort(self.genes, kind="stable")
        tasks = [(self.observed, "moments"), (self.predicted, "moments")]
        if _IN_COMPONENTS.intersection(self.metrics):
            tasks.append((self, "components"))
        self._in_threads(getattr, tasks)

    def _in_threads(self, function: Callable, arguments: Iterable[tuple]) -> list:
        return Parallel(self.n_jobs, prefer="threads")(delayed(function)(*a) for a in arguments)

    @property
    def own_control(self) -> bool:
        """Whether predicted effects are taken against predicted control cells."""
        return self.control in self.predicted.size

    # -- profiles -----------------------------------------------------------------------------------------------------

    def _moment(self, cells: Cells, names: list[str], *, which: int = 0) -> np.ndarray:
        return np.stack([cells.moments[n][which] for n in names])[:, self.order]

    @cached_property
    def predicted_means(self) -> np.ndarray:
        """(n_perturbations, n_genes)."""
        return self._moment(self.predicted, self.perturbations)

    @cached_property
    def observed_means(self) -> np.ndarray:
        """(n_perturbations, n_genes)."""
        return self._moment(self.observed, self.perturbations)

    @cached_property
    def control_mean(self) -> np.ndarray:
        """Mean of the real control cells, (n_genes,)."""
        return self._moment(self.observed, [self.control])[0]

    @cached_property
    def shifted_means(self) -> np.ndarray:
        """Real control mean + predicted effect, (n_perturbations, n_genes)."""
        if not self.own_control:
            return self.predicted_means
        return self.predicted_means - self._moment(self.predicted, [self.control]) + self.control_mean

    def variances(self, cells: Cells) -> np.ndarray:
        """Of each perturbation over its cells, by n - 1, (n_perturbations, n_genes)."""
        n = np.array([cells.size[p] for p in self.perturbations])[:, None]
        variances = self._moment(cells, self.perturbations, which=1) - self._moment(cells, self.perturbations) ** 2
        return np.maximum(variances, 0) * n / np.maximum(n - 1, 1)

    @cached_property
    def targets(self) -> np.ndarray:
        """Column of the gene that each perturbation is named after, or -1."""
        place = {g: i for i, g in enumerate(self.targets_by[self.order])}
        named = [parts(p, self.control, place) for p in self.perturbations]
        return np.array([place.get(n[0], -1) if len(n) == 1 else -1 for n in named])

    # -- differential expression --------------------------------------------------------------------------------------

    def _de(self, cells: Cells, means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        controls = cells if self.control in cells.size else self.observed
        found = [self._rank_sums(cells, controls, names) for names in cells.portions(self.perturbations)]
        p_value, fdr = (np.concatenate(part) for part in zip(*found, strict=True))
        change = log2_fold_change(means, self._moment(controls, [self.control]))
        return change, p_value[:, self.order], fdr[:, self.order]

    def _rank_sums(self, cells: Cells, controls: Cells, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """p-values of some perturbations against the control cells, and adjusted ones, (n_names, n_genes)."""
        code_of = {self.control: 0, **{name: i + 1 for i, name in enumerate(names)}}
        groups = [name for name in cells.names if name in code_of]  # all of them in the order that they are stored in
        codes, matrix = np.repeat([code_of[n] for n in groups], [cells.size[n] for n in groups]), cells.together(groups)
        if controls is not cells:
            matrix = sparse.vstack([matrix, controls.group(self.control)], format="csr")
            codes = np.concatenate([codes, np.zeros(controls.size[self.control], dtype=codes.dtype)])
        return rank_sum_test(matrix, codes, n_jobs=max(1, self.n_jobs // 2))

    @cached_property
    def _both_de(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        sides = [(self.predicted, self.predicted_means), (self.observed, self.observed_means)]
        return self._in_threads(self._de, sides)

    @property
    def predicted_de(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log2 fold change, p-value and adjusted p-value, each (n_perturbations, n_genes)."""
        return self._both_de[0]

    @property
    def observed_de(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log2 fold change, p-value and adjusted p-value, each (n_perturbations, n_genes)."""
        return self._both_de[1]

    # -- cells --------------------------------------------------------------------------------------------------------

    def _drawn(self, cells: Cells, name: str | None, n: int) -> sparse.csr_matrix:
        """Cells of a group, or of all, as many as are drawn where there are more."""
        first, last = (0, cells.n_cells) if name is None else cells.span[name]
        if last - first <= n:
            return cells.together(cells.names) if name is None else cells.group(name)
        # rows come in the order of cell names: the same cells are drawn however the data is sorted
        return cells.rows(first + np.sort(np.random.default_rng(self.seed).choice(last - first, n, replace=False)))

    def _dense(self, sides: list[Cells], name: str, n: int) -> tuple[np.ndarray, int]:
        """Cells of one or two sides, one after another, and how many the first has.

        The mean of all control cells is taken off: distances stay, and float32 keeps more of their digits.
        """
        drawn = [self._drawn(s, name, n) for s in sides]
        first = drawn[0].shape[0]
        dense = np.empty((sum(d.shape[0] for d in drawn), len(self.genes)), dtype=np.float32)
        for cells, part in zip(drawn, (dense[:first], dense[first:]), strict=False):
            cells.toarray(out=part)
        dense -= self.observed.moments[self.control][0].astype(np.float32)
        return dense, first

    @cached_property
    def between_cells(self) -> dict[str, np.ndarray]:
        """The wanted ones of the metrics of cells; of "pearson_edistance" what it correlates, (n_perturbations, 2).

        In one pass, because each perturbation's cells have to be made dense.
        """
        sides = [self.predicted, self.observed]
        full, reduced, from_control = (not m.isdisjoint(self.metrics) for m in (_FULL, _IN_COMPONENTS, _FROM_CONTROL))
        if from_control:
            controls = [
                self._dense([s if self.own_control else self.observed], self.control, MAX_CELLS)[0] for s in sides
            ]
            spread = [mean_distance(c, c) for c in controls]

        def measure(p: str) -> dict[str, object]:
            out: dict[str, object] = {}
            few = max(s.size[p] for s in sides) <= min(MAX_CELLS, MAX_CELLS_PCA)
            if full or few:
                cells, n = self._dense(sides, p, MAX_CELLS)
            if full:
                *within, between = mean_distances(cells, n)
                out["energy_distance"] = between - sum(within) / 2
            if from_control:  # the energy distance of Székely and Rizzo
                to = [mean_distance(c, x) for c, x in zip(controls, (cells[:n], cells[n:]), strict=True)]
                out["pearson_edistance"] = [2 * t - w - s for t, w, s in zip(to, within, spread, strict=True)]
            if reduced:
                if not few:
                    cells, n = self._dense(sides, p, MAX_CELLS_PCA)
                cells = cells @ self.components
                out["energy_distance_pca"] = metrics.energy_distance(cells[:n], cells[n:])
                out["mmd"] = metrics.mmd(cells[:n], cells[n:])
            return out

        rows = self._in_threads(measure, [(p,) for p in self.perturbations])
        return {name: np.array([r[name] for r in rows]) for name in rows[0]}

    @cached_property
    def components(self) -> np.ndarray:
        """Principal axes (n_genes, <= 50) of real cells, from at most 1,000 of them."""
        dense = self._drawn(self.observed, None, _CELLS_OF_PCA).toarray()
        dense -= dense.mean(axis=0)
        n = min(_N_COMPONENTS, len(dense) - 1)
        values, vectors = eigh((dense @ dense.T).astype(np.float64), subset_by_index=[len(dense) - n, len(dense) - 1])
        kept = values > 1e-6 * values[-1]
        return dense.T @ (vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed, one value per perturbation or one for all of them, and its best value, if any."""

    compute: Callable[[Comparison], np.ndarray | list[float] | float]
    best: float | None = None


def _errors(function: Callable, c: Comparison) -> list[float]:
    return [function(p, o) for p, o in zip(c.predicted_means, c.observed_means, strict=True)]


def _errors_of_effect(function: Callable, c: Comparison) -> list[float]:
    return [function(p, o) for p, o in zip(c.shifted_means, c.observed_means, strict=True)]


def _effects(function: Callable, c: Comparison) -> list[float]:
    return [function(p, o, c.control_mean) for p, o in zip(c.shifted_means, c.observed_means, strict=True)]


def _effect_of_top_genes(k: int, c: Comparison) -> list[float]:
    out = []
    lfc, p_value, _ = c.observed_de
    last = min(k, lfc.shape[1]) - 1
    for i in range(len(c.perturbations)):
        top = np.flatnonzero(p_value[i] <= np.partition(p_value[i], last)[last])  # and those that tie with it
        top = top[np.lexsort((-np.abs(lfc[i, top]), p_value[i, top]))[:k]]
        out.append(metrics.pearson_delta(c.shifted_means[i, top], c.observed_means[i, top], c.control_mean[top]))
    return out


def _discrimination(metric: str, c: Comparison) -> np.ndarray:
    if len(c.perturbations) < 2:  # nothing to be told apart from
        return np.full(len(c.perturbations), np.nan)
    if metric not in c.discrimination:
        profiles = c.shifted_means, c.observed_means, c.control_mean
        c.discrimination[metric] = metrics.discrimination_score(*profiles, metric=metric, target_genes=c.targets)
    return c.discrimination[metric]


def _pdisc_norm(metric: str, c: Comparison) -> np.ndarray:
    return metrics.pdisc_norm(_discrimination(metric, c))


def _de_genes(function: Callable, k: int | None, c: Comparison) -> list[float]:
    (lfc, _, fdr), (real_lfc, _, real_fdr) = c.predicted_de, c.observed_de
    return [function(lfc[i], real_lfc[i], predicted_fdr=fdr[i], observed_fdr=real_fdr[i], k=k) for i in range(len(lfc))]


def _de_changes(function: Callable, c: Comparison) -> list[float]:
    lfc, (real_lfc, _, real_fdr) = c.predicted_de[0], c.observed_de
    return [function(lfc[i], real_lfc[i], observed_fdr=real_fdr[i]) for i in range(len(lfc))]


def _de_retrieval(function: Callable, c: Comparison) -> list[float]:
    return [function(p, o) for p, o in zip(c.predicted_de[2], c.observed_de[2], strict=True)]


def _n_significant(side: str, c: Comparison) -> np.ndarray:
    return (getattr(c, side)[2] < 0.05).sum(axis=1).astype(float)


def _spearman_of_numbers(c: Comparison) -> float:
    predicted, real = _n_significant("predicted_de", c), _n_significant("observed_de", c)
    predicted, real = predicted[real > 0], real[real > 0]
    constant = len(real) < 2 or np.ptp(predicted) == 0 or np.ptp(real) == 0
    return float("nan") if constant else float(stats.spearmanr(predicted, real).statistic)


def _between_cells(name: str, c: Comparison) -> np.ndarray:
    return c.between_cells[name]


def _pearson_of_distances(c: Comparison) -> float:
    predicted, real = c.between_cells["pearson_edistance"].T
    constant = len(real) < 2 or np.ptp(predicted) == 0 or np.ptp(real) == 0
    return float("nan") if constant else float(stats.pearsonr(predicted, real).statistic)


def _variance_ratio(c: Comparison) -> list[float]:
    sides = c.variances(c.predicted), c.variances(c.observed)
    return [metrics.variance_ratio(p, o) for p, o in zip(*sides, strict=True)]


_KS = (50, 100, 200, 500)

METRICS: dict[str, Metric] = {
    "pearson_delta": Metric(partial(_effects, metrics.pearson_delta), 1),
    "pearson_delta_top50_de": Metric(partial(_effect_of_top_genes, 50), 1),
    "pearson_delta_top100_de": Metric(partial(_effect_of_top_genes, 100), 1),
    "mae": Metric(partial(_errors, metrics.mae), 0),
    "mse": Metric(partial(_errors, metrics.mse), 0),
    "mae_delta": Metric(partial(_errors_of_effect, metrics.mae), 0),
    "mse_delta": Metric(partial(_errors_of_effect, metrics.mse), 0),
    "top50_overlap": Metric(partial(_effects, partial(metrics.top_overlap, k=50)), 1),
    **{f"discrimination_{m}": Metric(partial(_discrimination, m), 1) for m in ("l1", "l2", "cosine")},
    **{f"pdisc_norm_{m}": Metric(partial(_pdisc_norm, m), 1) for m in ("l1", "cosine")},
    "de_overlap": Metric(partial(_de_genes, metrics.de_overlap, None), 1),
    **{f"de_overlap_{k}": Metric(partial(_de_genes, metrics.de_overlap, k), 1) for k in _KS},
    "de_precision": Metric(partial(_de_genes, metrics.de_precision, None), 1),
    **{f"de_precision_{k}": Metric(partial(_de_genes, metrics.de_precision, k), 1) for k in _KS},
    "de_recall": Metric(partial(_de_retrieval, metrics.de_recall), 1),
    "de_spearman_lfc": Metric(partial(_de_changes, metrics.de_spearman_lfc), 1),
    "de_direction_match": Metric(partial(_de_changes, metrics.de_direction_match), 1),
    "pr_auc": Metric(partial(_de_retrieval, metrics.pr_auc), 1),
    "roc_auc": Metric(partial(_de_retrieval, metrics.roc_auc), 1),
    "de_n_predicted": Metric(partial(_n_significant, "predicted_de")),
    "de_n_observed": Metric(partial(_n_significant, "observed_de")),
    "de_spearman_n": Metric(_spearman_of_numbers, 1),
    **{m: Metric(partial(_between_cells, m), 0) for m in ("energy_distance", "energy_distance_pca", "mmd")},
    "variance_ratio": Metric(_variance_ratio),
    "pearson_edistance": Metric(_pearson_of_distances, 1),
}

SUITES: dict[str, list[str]] = {
    # direction, size, whole populations, their spread, telling perturbations apart, and genes that change
    "standard": [
        "pearson_delta",
        "mae",
        "energy_distance",
        "variance_ratio",
        "discrimination_cosine",
        "top50_overlap",
        "de_overlap",
    ],
    "vcc2025": ["pdisc_norm_l1", "pdisc_norm_cosine", "de_overlap", "mae"],
    "full": list(METRICS),
}


def score_rows(comparison: Comparison, source: str, context: str) -> pd.DataFrame:
    """Compute the metrics of a comparison, one row each of every perturbation, or of all of them."""
    frames = []
    for name in comparison.metrics:
        value = METRICS[name].compute(comparison)
        of = [ALL] if np.ndim(value) == 0 else comparison.perturbations
        frames.append(pd.DataFrame({"perturbation": of, "metric": name, "value": np.ravel(value).astype(float)}))
    sizes = len(comparison.metrics), len(comparison.perturbations)
    logger.info("Scored the %s in context %s: %d metrics of %d perturbations.", source, context, *sizes)
    return pd.concat(frames).assign(source=source, context=context)
