"""Effects of perturbations from other experiments, each read with its own columns, contexts and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import UnknownNameError, unknown_name
from virtualcell._keys import ALL
from virtualcell.data._design import Design, Scale, check_library_sizes, check_scale
from virtualcell.data._labels import expression_modality, obs_column
from virtualcell.data._lazy import stored_matrix
from virtualcell.data._read_design import read_design
from virtualcell.data._screen import Screen
from virtualcell.data._stored import columns_of, row_sums
from virtualcell.models._effects import Effects, group_means

KINDS = ("cells", "pseudobulk", "effects")
OWN = "own data"  # name of one's own training cells beside the sources
UNITS = {"log1p": 1.0, "log2fc": float(np.log(2)), "other": 1.0}


@dataclass(frozen=True, eq=False)
class TransferSource:
    """One experiment that :class:`virtualcell.models.Transfer` takes effects from.

    Parameters
    ----------
    adata
        Rows x genes, or a MuData with them in `modality`. It is not changed.
    perturbation_key
        Column of `obs` with the perturbation of each row; combinations are written `A+B`, in any order.
    control
        Label of the unperturbed rows, or several. `None` where there are none: then effects are taken against the mean
        of the other perturbations, and nothing is learned of the mean effect.
    kind
        What a row is: `"cells"`, one cell; `"pseudobulk"`, sums of raw counts over cells, one row or several per
        condition with controls among them; `"effects"`, one measured effect, NaN where a gene was not measured.
    context_key
        Column with the context (cell type, cell line), where there are several.
    batch_key
        Column with the experimental batch, where there are several.
    layer
        Layer with the values; `X` where it is `None`.
    scale
        Scale of cells, `"counts"` or `"log1p"`. Pseudobulk has counts; for effects it means nothing.
    library_size_key
        Column with the library size of raw counts; by default it is the row sum.
    unit
        Unit of effects: `"log1p"`, differences of log(1 + counts per 10,000) or natural logarithms of fold changes;
        `"log2fc"`, logarithms to base 2; `"other"` (z-scores, ranks), which are brought to the spread of the sources
        that have one of the others.
    error_layer
        Layer with the standard errors of effects, by which they are shrunken.
    modality
        Expression modality of a MuData.
    combination_separator
        What stands between the parts of a combination; `None` where every label is one perturbation.
    dose_key
        Column with the dose of the drug in `perturbation_key`.

    Examples
    --------
    >>> source = vc.models.TransferSource(adata=other, perturbation_key="target_gene", control="non-targeting")
    >>> source.kind
    'cells'
    """

    adata: AnnData | MuData
    perturbation_key: str
    control: str | Sequence[str] | None = None
    kind: Literal["cells", "pseudobulk", "effects"] = "cells"
    context_key: str | None = None
    batch_key: str | None = None
    layer: str | None = None
    scale: Scale = "counts"
    library_size_key: str | None = None
    unit: Literal["log1p", "log2fc", "other"] = "log1p"
    error_layer: str | None = None
    modality: str = "rna"
    combination_separator: str | None = "+"
    dose_key: str | None = None

    def __post_init__(self) -> None:
        for argument, valid in (("kind", KINDS), ("unit", tuple(UNITS))):
            if (value := getattr(self, argument)) not in valid:
                raise ValueError(f"{argument}={value!r} of a source is unknown; valid are {', '.join(valid)}.")
        check_scale(self.scale)
        check_library_sizes(self.scale, self.library_size_key)
        if self.kind == "pseudobulk" and self.scale != "counts":
            raise ValueError(
                f"scale={self.scale!r}: pseudobulk is read as sums of raw counts. Give the sums, with scale='counts', "
                "or the differences to the controls as kind='effects'."
            )
        for argument, default in (("unit", "log1p"), ("error_layer", None)):
            if self.kind != "effects" and (value := getattr(self, argument)) != default:
                raise ValueError(f"{argument}={value!r} belongs to kind='effects', and kind is {self.kind!r}.")

    @classmethod
    def of(cls, given: TransferSource | Mapping[str, object], name: str) -> TransferSource:
        """Take a source, or make one of a dictionary of its fields."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise TypeError(
                f"sources[{name!r}] is a {type(given).__name__}. Give a `vc.models.TransferSource` or a dictionary of "
                "its fields: {'adata': adata, 'perturbation_key': 'target_gene', 'control': 'non-targeting'}."
            )
        valid = [f.name for f in fields(cls)]
        for field in given:
            if field not in valid:
                raise unknown_name(f"sources[{name!r}]: field", field, valid, "See `vc.models.TransferSource`.")
        if lacking := [n for n in ("adata", "perturbation_key") if n not in given]:
            raise ValueError(f"sources[{name!r}] lacks {' and '.join(lacking)}.")
        return cls(**given)

    @property
    def genes(self) -> pd.Index:
        """Names of its genes."""
        return expression_modality(self.adata, self.modality).var_names

    def measure(self, genes: Sequence[str]) -> SourceEffects:
        """Return the effects on those of the genes that the source has."""
        wanted = set(genes)
        here = sorted(g for g in self.genes if g in wanted)
        if not here:
            raise unknown_name(
                "genes", next(iter(genes)), self.genes, "No gene of this source is wanted; genes are matched by name."
            )
        found = self._measured(here)
        if not len(found.perturbation):
            raise ValueError(f"a source holds no perturbation besides the control {self.control!r}: leave it out.")
        return found

    def _measured(self, here: list[str]) -> SourceEffects:
        if self.kind == "effects":
            return self._of_effects(here)
        screen = Screen.from_anndata(self.adata, self._design(), modality=self.modality, genes=here)
        if self.control is not None:
            screen.require_control()
        if self.kind == "cells" and self.control is not None:
            return SourceEffects.of(Effects.measure(screen), here)
        return self._of_cells(screen, here) if self.kind == "cells" else self._of_pseudobulk(screen, here)

    def _design(self) -> Design:
        return Design(
            perturbation_key=self.perturbation_key,
            control=_NO_CONTROL if self.control is None else self.control,
            context_key=self.context_key,
            batch_key=self.batch_key,
            layer=self.layer,
            scale=self.scale,
            library_size_key=self.library_size_key,
            combination_separator=self.combination_separator,
            dose_key=self.dose_key,
        )

    def _of_cells(self, screen: Screen, genes: list[str]) -> SourceEffects:
        """Means of cells without controls."""
        pairs = screen.pairs()
        found = screen.expression.moments(list(pairs.values()))
        # one cell tells nothing of its own scatter: it is that within all groups
        pooled = np.einsum("i,ij->j", found.n - 1.0, found.variance) / max((found.n - 1).sum(), 1)
        variance = np.where(found.n[:, None] > 1, found.variance / found.n[:, None], pooled)
        context, perturbation = zip(*pairs, strict=True)
        return SourceEffects.average(found.mean, variance, context, perturbation, genes, has_control=False)

    def _of_pseudobulk(self, screen: Screen, genes: list[str]) -> SourceEffects:
        """Differences of log(1 + sums per 10,000) to the controls of the same context and batch, where there are any.

        Errors are those of counting alone: what samples differ by beyond that does not show in sums.
        """
        logs = screen.expression.rows().toarray()
        per_count = 1e4 / self._library_sizes()[:, None]
        rate = np.maximum(np.expm1(logs), per_count)  # of a gene without a count, as of one with one
        variance = rate * per_count / (1 + rate) ** 2
        context, perturbation = (np.asarray(x).astype(str) for x in (screen.context, screen.perturbation))
        if self.control is not None:
            batch = np.zeros(len(context), str) if screen.batch is None else np.asarray(screen.batch).astype(str)
            for c in np.unique(context):
                of_context = screen.is_control & (context == c)
                if not of_context.any():
                    raise ValueError(
                        f"context {c!r} has no control rows ({self.control!r}). Drop it, or give it as a source of its "
                        "own with control=None."
                    )
                for b in np.unique(batch[context == c]):
                    matched = of_context & (batch == b)
                    matched = matched if matched.any() else of_context
                    rows = (context == c) & (batch == b) & ~screen.is_control
                    logs[rows] -= logs[matched].mean(axis=0)
                    variance[rows] += variance[matched].mean(axis=0) / matched.sum()
        rows = screen.in_order(~screen.is_control)
        return SourceEffects.average(
            logs[rows], variance[rows], context[rows], perturbation[rows], genes, has_control=self.control is not None
        )

    def _library_sizes(self) -> np.ndarray:
        if self.library_size_key is not None:
            column = obs_column(self.adata, self.library_size_key, argument="library_size_key", modality=self.modality)
            return column.to_numpy(dtype=np.float64)
        adata = expression_modality(self.adata, self.modality)
        name = "X" if self.layer is None else f"layers[{self.layer!r}]"
        matrix = stored_matrix(adata, self.layer, name)
        edges = zip(matrix.edges[:-1], matrix.edges[1:], strict=True)
        return np.concatenate([np.zeros(0), *(row_sums(matrix.rows(slice(int(a), int(b)))) for a, b in edges)])

    def _of_effects(self, genes: list[str]) -> SourceEffects:
        """Effects as they are published."""
        adata = expression_modality(self.adata, self.modality)
        design = self._design()
        found, _ = read_design(self.adata, replace(design, batch_key=None), modality=self.modality)
        labels = np.asarray(found["perturbation_key"])
        context = np.asarray(found.get("context_key", np.full(adata.n_obs, ALL)))
        order = np.argsort(adata.obs_names.to_numpy(dtype=str), kind="stable")
        rows = order[labels[order] != design.control]
        unit = np.float32(UNITS[self.unit])
        values = _values(adata, self.layer, rows, genes, "effects") * unit
        variance = None if self.error_layer is None else (self._errors(adata, rows, genes) * unit) ** 2
        return SourceEffects.average(values, variance, context[rows], labels[rows], genes, has_control=True)

    def _errors(self, adata: AnnData, rows: np.ndarray, genes: list[str]) -> np.ndarray:
        """Return the standard errors of effects, NaN where they are not known."""
        if self.error_layer not in adata.layers:
            raise unknown_name(
                "error_layer", self.error_layer, adata.layers, "Leave it out where errors are not known."
            )
        errors = _values(adata, self.error_layer, rows, genes, "standard errors")
        if (bad := errors < 0).any():
            raise ValueError(
                f"error_layer={self.error_layer!r} holds {int(bad.sum())} negative standard errors, among them "
                f"{errors[bad][0]:g}. Set those that are not known to NaN."
            )
        return errors


_NO_CONTROL = "(no control)"  # label that no row has


def _values(adata: AnnData, layer: str | None, rows: np.ndarray, genes: list[str], what: str) -> np.ndarray:
    """Return `X` or a layer, wherever it is, on some rows and genes; NaN where nothing was measured."""
    where = "X" if layer is None else f"layers[{layer!r}]"
    values = stored_matrix(adata, layer, where).rows(rows).toarray()
    columns = columns_of(adata.var_names, genes)
    values = values if columns is None else values[:, columns]
    if np.isinf(values).any():
        raise ValueError(f"{where} holds infinite {what}. Set them to NaN where not measured.")
    return values


@dataclass(frozen=True, eq=False)
class SourceEffects:
    """Effects of one source, one row per (context, perturbation), sorted by both.

    Parameters
    ----------
    genes
        Names of the columns.
    context, perturbation
        Labels of the rows.
    effects
        (n_rows, n_genes), NaN where not measured.
    variance
        Squared standard errors, where they are known.
    has_control
        Whether effects are against controls; otherwise they are levels, of which only differences mean something.
    """

    genes: list[str]
    context: np.ndarray
    perturbation: np.ndarray
    effects: np.ndarray
    variance: np.ndarray | None
    has_control: bool

    @classmethod
    def of(cls, effects: Effects, genes: Sequence[str]) -> SourceEffects:
        """Take the effects of a screen."""
        context = np.asarray(effects.contexts, dtype=str)[effects.context]
        perturbation = np.asarray(effects.perturbations, dtype=str)[effects.perturbation]
        return cls(list(genes), context, perturbation, effects.effects, effects.variance, has_control=True)

    def select(self, genes: Sequence[str]) -> SourceEffects:
        """Return the same effects on those genes, in this order."""
        columns = columns_of(pd.Index(self.genes), genes)
        if columns is None:
            return self
        variance = None if self.variance is None else self.variance[:, columns]
        return replace(self, genes=list(genes), effects=self.effects[:, columns], variance=variance)

    @classmethod
    def average(
        cls,
        values: np.ndarray,
        variance: np.ndarray | None,
        context: Sequence[str],
        perturbation: Sequence[str],
        genes: Sequence[str],
        *,
        has_control: bool,
    ) -> SourceEffects:
        """Average what was measured several times."""
        labels = pd.DataFrame({"context": np.asarray(context, str), "perturbation": np.asarray(perturbation, str)})
        groups = labels.groupby(["context", "perturbation"], sort=True)
        code, n = groups.ngroup().to_numpy(), groups.ngroups
        names = groups.size().index
        here = ~np.isnan(values)
        share = group_means(here.astype(np.float32), code, n)
        with np.errstate(invalid="ignore"):
            mean = group_means(np.where(here, values, 0), code, n) / share  # NaN where no row has the gene
        if variance is not None:
            times = np.bincount(code, minlength=n)[:, None]
            unknown = np.isnan(variance)
            if unknown.any():  # an error that is not stated is no certainty
                typical = np.nanmedian(np.where(unknown.all(axis=0), np.nanmedian(variance), variance), axis=0)
                variance = np.where(unknown, typical, variance)
            variance = group_means(variance, code, n) / np.maximum(share**2 * times, 1e-12)
        context, perturbation = (names.get_level_values(i).to_numpy(dtype=str) for i in (0, 1))
        return cls(list(genes), context, perturbation, mean.astype(np.float32), variance, has_control)


Sources = Sequence[TransferSource | Mapping] | Mapping[str, TransferSource | Mapping]


def named_sources(sources: Sources) -> dict[str, TransferSource]:
    """Return sources by name; those of a list are numbered."""
    if isinstance(sources, AnnData | MuData | TransferSource):
        raise TypeError(f"sources={type(sources).__name__} must be a list or a dictionary of sources.")
    if not isinstance(sources, Mapping):
        sources = {f"source {i}": source for i, source in enumerate(sources, start=1)}
    if OWN in sources:
        raise ValueError(f"sources has the name {OWN!r}, which stands for the training cells: choose another.")
    return {str(name): TransferSource.of(source, str(name)) for name, source in sources.items()}


def measure_each(sources: Mapping[str, TransferSource], genes: Sequence[str]) -> dict[str, SourceEffects]:
    """Return the effects of each source on those of the genes that it has; errors name the source."""
    found = {}
    for name, source in sources.items():
        try:
            found[name] = source.measure(genes)
        except (UnknownNameError, ValueError, TypeError) as error:
            raise type(error)(f"sources[{name!r}]: {error}") from error
    return found


def checked_weights(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return weights as numbers, after a look at them."""
    for name, weight in weights.items():
        if name not in names:
            raise unknown_name("weights: source", name, names)
        if not (np.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights[{name!r}]={weight!r} must be a number of at least 0.")
    return {name: float(weight) for name, weight in weights.items()}
