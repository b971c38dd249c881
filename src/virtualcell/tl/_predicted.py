"""Predictions of several perturbations in several contexts, one after the other: into memory, or to disk."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy import sparse

from virtualcell import _keys
from virtualcell._progress import Bar
from virtualcell._settings import settings
from virtualcell._tasks import in_tasks
from virtualcell._threads import share_threads
from virtualcell.data._design import Design
from virtualcell.data._fingerprint import digest
from virtualcell.data._threads import in_threads, most_threads
from virtualcell.io._cell_store import CellStore, made_for
from virtualcell.models._base import PerturbationModel
from virtualcell.models._start import Start
from virtualcell.tl._doses import Asked
from virtualcell.tl._effect_tables import EffectTables
from virtualcell.tl._emit import Effect, Emit, emitted_cells

if TYPE_CHECKING:
    from distributed import Client

_PORTION = 8192  # cells that are written together
_COPIES = 6  # of the cells of a group, while a model predicts them
_TASK = 4  # groups that a worker predicts at a time


@dataclass(frozen=True, eq=False)
class Group:
    """One perturbation in one context: cells or their mean, the change of each gene's mean, and its error."""

    cells: AnnData
    perturbation: str
    context: str
    change: np.ndarray
    error: np.ndarray


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is to be predicted, from which control cells.

    Parameters
    ----------
    model
        A fitted model.
    asked
        Perturbations.
    starts
        What the model starts from in each context, and the expression of the same cells.
    design
        Design of the data.
    genes, columns
        Genes that are predicted, and their places among the model's.
    var
        Genes of the data, in whose order they come.
    emit, n_cells, n_samples, seed, client
        As in :func:`virtualcell.tl.predict_perturbation`.
    """

    model: PerturbationModel
    asked: Sequence[Asked]
    starts: Sequence[tuple[Start, Start]]
    design: Design
    genes: Sequence[str]
    columns: np.ndarray
    var: pd.DataFrame
    emit: Emit
    n_cells: int | None
    n_samples: int | None
    seed: int
    client: Client | None = None

    @property
    def order(self) -> pd.Index:
        """Genes in the order of the result."""
        return self.var.index[self.var.index.isin(self.genes)]

    def __len__(self) -> int:
        return len(self.asked) * len(self.starts)

    def groups(self, first: int = 0, *, with_control: bool = True) -> Iterator[Group]:
        """Yield one group after the other, perturbation by perturbation, from number `first` on."""
        if self.client is None:
            yield from self.some_groups(range(first, len(self)), with_control=with_control)
            return
        numbers = [range(start, min(start + _TASK, len(self))) for start in range(first, len(self), _TASK)]
        made = partial(_groups_of, with_control=with_control)
        for groups in in_tasks(self.client, made, dataclasses.replace(self, client=None), numbers):
            yield from groups

    def some_groups(self, numbers: Sequence[int], *, with_control: bool) -> Iterator[Group]:
        """Yield groups by their numbers, several of which are predicted and made into cells at the same time."""
        place = self.order.get_indexer(pd.Index(self.genes))
        in_order = np.array_equal(place, np.arange(len(place)))
        n_together = self._predicted_together()
        turns = BoundedSemaphore(n_together)
        if self.emit == "cells":
            for i in {number % len(self.starts) for number in numbers}:
                _ = self.starts[i][1].counted  # once, before several threads want them

        def made(number: int) -> Group:
            question, (start, in_genes) = self._group(number)
            with turns:
                effect, error = self._effect(question, start, in_genes)
            if self.emit == "cells":
                cells = _cells(effect, in_genes, self.design, self.genes, self.seed, with_control=with_control)
            else:
                cells = _mean(effect, in_genes, self.design)
            for matrix in () if in_order else (cells.X, *cells.layers.values()):
                matrix.indices = place[matrix.indices].astype(matrix.indices.dtype)
                matrix.has_sorted_indices = False
                matrix.sort_indices()
            for column, value in question.trust(self.model, start).items():
                cells.obs[column] = value
            if self.n_samples is not None:
                # the mean absolute value of a normal variable is sqrt(2 / pi) of its deviation
                cells.obs[_keys.EXPECTED_ERROR] = np.sqrt(2 / np.pi) * error.mean()
            return Group(cells, question.name, start.context, effect.change, error)

        yield from in_threads(made, numbers, begin=partial(share_threads, most_threads() // n_together))

    def _predicted_together(self) -> int:
        """Count the groups whose dense cells may be in memory at the same time."""
        n_cells = max((max(len(start.names), self.n_cells or 0) for start, _ in self.starts), default=0)
        each = _COPIES * 4 * n_cells * max(len(self.model.genes), 1)
        return int(np.clip(settings.max_memory * 1e9 // max(each, 1), 1, most_threads()))

    def _effect(self, question: Asked, start: Start, in_genes: Start) -> tuple[Effect, np.ndarray]:
        """Return what the model predicts, and the standard error of the predicted change of each gene."""
        how = {"columns": self.columns, "n_cells": self.n_cells, "seed": self.seed}
        effect = question.effect(self.model, start, in_genes, **how)
        # at a dose between two that were measured, the larger error of theirs
        return effect, np.max([self._error(start, name) for name in question.around], axis=0)

    def _error(self, start: Start, perturbation: str) -> np.ndarray:
        """Return the standard error of the predicted change of each gene, NaN where the model knows none."""
        model, columns = self.model, self.columns
        if self.n_samples is not None:
            return model.error_from(start, perturbation, n_samples=self.n_samples, seed=self.seed)[columns]
        if perturbation == model.control:
            return np.zeros(len(columns))
        known = np.asarray(model.shared_error(perturbation, start.context))
        return known[columns] if known.ndim else np.full(len(columns), np.nan)

    def joined(self, *, is_sparse: bool) -> AnnData:
        """Return all groups in one AnnData, with matrices of the kind that the data has."""
        tables, cells = EffectTables(), []
        for group in self.groups():
            tables.add(group.perturbation, group.context, group.change, group.error)
            cells.append(group.cells)
        out = ad.concat(cells)
        del cells
        self._complete(out, tables)
        if not is_sparse:
            for name in (name for name in out.layers if name != _keys.COUNTS_LAYER):
                out.layers[name] = out.layers[name].toarray()
            out.X = out.X.toarray()
        return out

    def _complete(self, out: AnnData, tables: EffectTables) -> None:
        """Give cells unique names, their genes, labels that are categories, and what was predicted of means."""
        out.var_names = self.order
        out.var = self.var.loc[out.var_names].copy()
        out.obs_names = make_index_unique(pd.Index(out.obs_names))
        for key in out.obs.columns.difference([_keys.CONTROL_BARCODE]):
            if not pd.api.types.is_numeric_dtype(out.obs[key]):
                out.obs[key] = pd.Categorical(out.obs[key])
        tables.write(out, self.genes)

    def to_disk(self, path: Path) -> tuple[CellStore, AnnData]:
        """Write the matrices of all groups, some groups at a time, and return what else belongs to the result.

        Groups that are there, of a process that died, are not predicted again.
        """
        beside = _keys.COUNTS_LAYER if self.emit == "cells" else _keys.CONTROL_LAYER
        store = CellStore(
            path,
            made_for=self._fingerprint(),
            matrices=["X", f"layers/{beside}"],
            n_genes=len(self.genes),
            same_places=self.emit == "cells",  # where these are counts and their logarithms
        )
        done = sum(len(arrays["change"]) for arrays in store.arrays())
        with ThreadPoolExecutor(1) as writer, Bar("predicting", len(self), unit="group", done=done) as bar:
            written: Future | None = None
            for portion in _portions(self.groups(done, with_control=self.emit == "mean")):
                if written is not None:
                    written.result()
                written = writer.submit(_write, store, portion)
                bar.show(bar.done + len(portion))
            if written is not None:
                written.result()
        tables = EffectTables()
        of_groups = (
            (arrays["change"][i], arrays["error"][i]) for arrays in store.arrays() for i in range(len(arrays["change"]))
        )
        for number, (change, error) in enumerate(of_groups):
            question, (start, _) = self._group(number)
            tables.add(question.name, start.context, change, error)
        rest = AnnData(obs=store.table(), var=self.var.loc[self.order])
        self._complete(rest, tables)
        return store, rest

    def _group(self, number: int) -> tuple[Asked, tuple[Start, Start]]:
        return self.asked[number // len(self.starts)], self.starts[number % len(self.starts)]

    def _fingerprint(self) -> str:
        """Return what decides about the result, as text."""
        how = {"emit": self.emit, "n_cells": self.n_cells, "n_samples": self.n_samples, "seed": self.seed}
        names = {"genes": digest(self.order), "perturbations": [one.name for one in self.asked]}
        cells = {start.context: digest(start.names) for start, _ in self.starts}
        matrices = [one.cells for pair in self.starts for one in pair]
        parts = [(m.data, m.indices, m.indptr) if sparse.issparse(m) else (m,) for m in matrices]
        return made_for(
            self.model, {**how, **names, "cells": cells, "design": self.design.to_uns()}, itertools.chain(*parts)
        )


def _groups_of(predictions: Predictions, numbers: range, *, with_control: bool) -> list[Group]:
    return list(predictions.some_groups(numbers, with_control=with_control))


def _portions(groups: Iterator[Group]) -> Iterator[list[Group]]:
    portion: list[Group] = []
    n_cells = 0
    for group in groups:
        portion.append(group)
        n_cells += group.cells.n_obs
        if n_cells >= _PORTION:
            yield portion
            portion, n_cells = [], 0
    if portion:
        yield portion


def _write(store: CellStore, portion: Sequence[Group]) -> None:
    matrices = {}
    for name in store.matrices:
        layer = None if name == "X" else name.removeprefix("layers/")
        parts = [one.cells.X if layer is None else one.cells.layers[layer] for one in portion]
        matrices[name] = sparse.vstack(parts, format="csr")
    arrays = {"change": np.stack([one.change for one in portion]), "error": np.stack([one.error for one in portion])}
    store.add(matrices, pd.concat([one.cells.obs for one in portion]), arrays)


def _cells(
    effect: Effect, start: Start, design: Design, genes: Sequence[str], seed: int, *, with_control: bool
) -> AnnData:
    """Predicted cells of one perturbation and context, with their labels."""
    cells, barcodes = emitted_cells(effect, start, genes, seed=seed), start.names[effect.rows]
    obs = _labels(effect, start, design)
    if design.batch_key is not None:
        obs[design.batch_key] = start.batch_of(effect.rows)
    obs[design.library_size_key or _keys.LIBRARY_SIZE] = cells.library
    # a control cell occurs several times where more cells than controls were asked for
    index = make_index_unique(pd.Index([f"{barcode}-{effect.perturbation}" for barcode in barcodes]))
    frame = pd.DataFrame({**obs, _keys.CONTROL_BARCODE: np.asarray(barcodes)}, index=index)
    layers = {_keys.COUNTS_LAYER: cells.counts}
    if with_control:
        layers[_keys.CONTROL_LAYER] = start.cells[effect.rows]
    return AnnData(cells.log, obs=frame, layers=layers)


def _mean(effect: Effect, start: Start, design: Design) -> AnnData:
    """Predicted mean profile of one perturbation and context, with its labels."""
    before = start.mean_of(effect.rows)[None]
    after = np.maximum(before + effect.change, 0).astype(np.float32)
    name = effect.perturbation if design.context_key is None else f"{start.context}-{effect.perturbation}"
    frame = pd.DataFrame(_labels(effect, start, design), index=[name])
    control = sparse.csr_matrix(before, dtype=np.float32)
    return AnnData(sparse.csr_matrix(after), obs=frame, layers={_keys.CONTROL_LAYER: control})


def _labels(effect: Effect, start: Start, design: Design) -> dict[str, object]:
    labels = {design.perturbation_key: effect.perturbation, design.context_key: start.context}
    return {key: label for key, label in labels.items() if key is not None}
