"""A perturbation experiment as models see it: the only reader of `obs`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import unknown_name
from virtualcell._keys import ALL, SPLITS
from virtualcell._tasks import Workers
from virtualcell.data._cell_sets import CellGroups
from virtualcell.data._design import Design
from virtualcell.data._expression import Expression, Unit
from virtualcell.data._labels import Written, expression_modality, parts, text
from virtualcell.data._read_design import read_design
from virtualcell.data._read_expression import read_embedding, read_expression, read_target_names
from virtualcell.data._registry import scvi_registry
from virtualcell.data._stored import row_numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Screen:
    """Labels, split and expression of cells, with their design.

    Parameters
    ----------
    design
        Which columns the labels came from, and the scale of the matrix.
    names
        Names of the cells.
    perturbation, context
        Names of what labels stand for, with sorted categories; see :mod:`virtualcell.data._labels`. Without a column of
        contexts, all cells are of the context :data:`virtualcell._keys.ALL`.
    batch
        Experimental batch of the cells, or `None` where the design has none.
    split
        Part of each cell: "train", "val" or "test"; all "train" where the design names no column.
    expression
        The matrix, read only when it is asked for.
    rep
        Cell embeddings, (n_cells, n_dims), where the design names some.
    target_names
        Name of each gene that perturbations go by, indexed by `var_names`: those themselves, or `var[gene_key]`.
    written
        How names stand in the columns of `obs`, by the field of the design that names the column.
    """

    design: Design
    names: pd.Index
    perturbation: pd.Categorical
    context: pd.Categorical
    batch: pd.Categorical | None
    split: np.ndarray
    expression: Expression
    rep: np.ndarray | None = None
    target_names: pd.Series | None = field(default=None, repr=False)
    written: Mapping[str, Written] = field(default_factory=dict, repr=False)

    @classmethod
    def from_anndata(
        cls,
        data: AnnData | MuData,
        design: Design,
        *,
        modality: str = "rna",
        genes: Sequence[str] | None = None,
        unit: Unit = "log1p",
        side: str = "",
        scale_argument: str = "scale",
        measured: bool = True,
        untreated: bool = False,
    ) -> Screen:
        """Read the labels of all cells; the matrix is looked at when rows are asked for.

        Parameters
        ----------
        data
            Cells x genes, or a MuData with them in `modality`, whose columns of `obs` are looked up there, then in the
            MuData's.
        design
            Which columns to read.
        modality
            Modality with the expression.
        genes, unit, scale_argument, measured
            As in :class:`virtualcell.data._expression.Expression`.
        side
            Name of the argument that `data` was given as, for messages of calls with several.
        untreated
            Whether all cells are control cells, whatever `obs` says.

        Raises
        ------
        KeyError
            For an unknown column, layer, modality or key of `obsm`.
        ValueError
            For cells without a label, or a split with other parts than train, val and test.
        """
        adata = expression_modality(data, modality)
        prefix = f"{side}: " if side else ""
        if not adata.var_names.is_unique:
            twice = list(adata.var_names[adata.var_names.duplicated()][:3])
            where = f"var_names of {side}" if side else "var_names"
            raise ValueError(f"{where} repeats {twice}. Run `{side or 'adata'}.var_names_make_unique()` first.")
        labels, written = read_design(data, design, modality=modality, prefix=prefix, untreated=untreated)
        context, split = labels.get("context_key"), labels.get("split_key")
        if split is not None and not set(split.categories) <= set(SPLITS):
            raise ValueError(f"split_key={design.split_key!r} holds {list(split.categories)}; valid are {SPLITS}.")
        return cls(
            design=design,
            names=adata.obs_names,
            perturbation=labels["perturbation_key"],
            context=pd.Categorical([ALL] * adata.n_obs) if context is None else context,
            batch=labels.get("batch_key"),
            split=np.full(adata.n_obs, "train") if split is None else np.asarray(split).astype(str),
            expression=read_expression(
                data,
                modality=modality,
                layer=design.layer,
                scale=design.scale,
                library_size_key=design.library_size_key,
                target_sum=design.target_sum,
                unit=unit,
                genes=genes,
                side=side,
                scale_argument=scale_argument,
                measured=measured,
            ),
            rep=None if design.use_rep is None else read_embedding(data, design.use_rep, modality=modality),
            target_names=read_target_names(adata, design.gene_key),
            written=written,
        )

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def n_cells(self) -> int:
        """How many cells there are."""
        return len(self.names)

    @property
    def genes(self) -> pd.Index:
        """Names of the genes that are read."""
        return self.expression.genes

    @cached_property
    def is_control(self) -> np.ndarray:
        """Mask of the control cells."""
        return np.asarray(self.perturbation == self.design.control)

    @cached_property
    def is_train(self) -> np.ndarray:
        """Mask of the cells that are learned from."""
        return self.split == "train"

    @cached_property
    def is_val(self) -> np.ndarray:
        """Mask of the validation cells."""
        return self.split == "val"

    @cached_property
    def is_known(self) -> np.ndarray:
        """Mask of the cells that effects are measured on: training cells, and all control cells that are not "test"."""
        return self.is_train | (self.is_control & (self.split != "test"))

    @cached_property
    def batch_names(self) -> list[str]:
        """Names of the batches, sorted; none where the design has none."""
        return [] if self.batch is None else _present(self.batch)

    @cached_property
    def context_names(self) -> list[str]:
        """Names of the contexts, sorted."""
        return _present(self.context)

    @cached_property
    def perturbation_names(self) -> list[str]:
        """Names of the perturbations without the control, sorted."""
        return [name for name in _present(self.perturbation) if name != self.design.control]

    @cached_property
    def _by_name(self) -> np.ndarray:
        return np.argsort(self.names.to_numpy(dtype=str), kind="stable")

    def labels(self) -> pd.DataFrame:
        """Return the names of perturbation, context and batch of the cells under the names of their columns."""
        columns = {"perturbation_key": self.perturbation, "context_key": self.context, "batch_key": self.batch}
        found = {getattr(self.design, k): v for k, v in columns.items() if getattr(self.design, k) is not None}
        return pd.DataFrame({k: np.asarray(v).astype(str) for k, v in found.items()}, index=self.names)

    def spelled(self, names: Iterable[str]) -> list[str]:
        """Return names of perturbations as text that is written in the data, for tables and pictures."""
        if self.design.dose_key is not None or not self.written:
            return list(names)
        return [text(self.written["perturbation_key"].values.get(name, name)) for name in names]

    def as_written(self, obs: pd.DataFrame, asked: Mapping[str, str] | None = None) -> pd.DataFrame:
        """Return a table of names, as :meth:`labels` has them, with labels as they are written in the data.

        Perturbations that the data lacks are called as they were `asked` for.
        """
        of = {w.key: getattr(self.design, {"dose_key": "perturbation_key"}.get(k, k)) for k, w in self.written.items()}
        columns = {w.key: w.restore(obs[of[w.key]], asked).array for w in self.written.values() if of[w.key] in obs}
        return obs.assign(**columns)

    def in_order(self, mask: np.ndarray) -> np.ndarray:
        """Row numbers of the marked cells in the order of their names: the order of a file then changes nothing."""
        return self._by_name[mask[self._by_name]]

    def pairs(self, mask: np.ndarray | None = None) -> dict[tuple[str, str], np.ndarray]:
        """Rows of every (context, perturbation), in the order of cell names; the pairs come sorted."""
        rows = self._by_name if mask is None else self.in_order(mask)
        n = len(self.perturbation.categories)
        codes = self.context.codes[rows].astype(np.int64) * n + self.perturbation.codes[rows]
        found, counts = np.unique(codes, return_counts=True)
        cells = np.split(rows[np.argsort(codes, kind="stable")], np.cumsum(counts))[:-1]
        names = [(str(self.context.categories[c // n]), str(self.perturbation.categories[c % n])) for c in found]
        return dict(zip(names, cells, strict=True))

    def controls(self, context: str | None = None) -> dict[str, np.ndarray]:
        """Rows of the control cells of one context or of each, in the order of cell names.

        Raises
        ------
        KeyError
            If there are none, or none in that context.
        ValueError
            For a `context` where the design has no contexts.
        """
        self.require_control()
        if context is not None and self.design.context_key is None:
            raise ValueError(f"context={context!r} was given, but the design has no contexts: state context_key.")
        found = {c: rows for (c, _), rows in self.pairs(self.is_control).items()}
        if context is None:
            return found
        if (context := text(context)) not in found:
            raise unknown_name("context", context, found, "It needs control cells to start from.")
        return {context: found[context]}

    def targets(self) -> list[str]:
        """Genes (of `var_names`) that perturbations of training cells are named after, sorted; others choose none."""
        labels = _present(self.perturbation[self.is_train])
        wanted = {part for label in labels for part in parts(label, self.design.control)}
        here = self.target_names
        return sorted(here.index[here.isin(wanted) | here.index.isin(wanted)])

    def registry(self, model: str) -> dict:
        """Return what scvi-tools would have registered of these cells, for a model that is built from a screen."""
        states = {
            "X": {"column_names": [str(g) for g in self.genes]},
            "perturbation": {"categorical_mapping": [*self.perturbation_names, self.design.control]},
            "context": {"categorical_mapping": self.context_names},
            "batch": {"categorical_mapping": self.batch_names},
        }
        setup = {**dataclasses.asdict(self.design), "modality": "rna"}
        summaries = {} if self.rep is None else {"rep": {"n_rep": self.rep.shape[1]}}
        return scvi_registry(model, setup, states | {name: {} for name in summaries}, summaries)

    # -- parts of it --------------------------------------------------------------------------------------------------

    def take(self, rows: np.ndarray) -> Screen:
        """Return some of the cells: row numbers or a mask."""
        rows = row_numbers(rows, self.n_cells)
        return dataclasses.replace(
            self,
            names=self.names[rows],
            perturbation=self.perturbation[rows],
            context=self.context[rows],
            batch=None if self.batch is None else self.batch[rows],
            split=self.split[rows],
            expression=self.expression.take(rows),
            rep=None if self.rep is None else self.rep[rows],
        )

    def select(self, genes: Sequence[str]) -> Screen:
        """Return the same cells with some of the genes, by name and in this order."""
        return dataclasses.replace(self, expression=self.expression.select(genes))

    def read_as(self, unit: Unit) -> Screen:
        """Return the same cells with their expression in another unit."""
        return dataclasses.replace(self, expression=self.expression.read_as(unit))

    def by(self, workers: Workers) -> Screen:
        """Return the same cells, of whose expression workers go through the blocks."""
        return dataclasses.replace(self, expression=self.expression.by(workers))

    def with_split(self, split: np.ndarray) -> Screen:
        """Return the same cells in other parts."""
        return dataclasses.replace(self, split=split)

    def hold_out(self, fraction: float, seed: int = 0) -> Screen:
        """Mark that share of the perturbed training cells of each context and perturbation "val", rounded down.

        Cells are drawn by name, so that their order in a file changes nothing. Each batch keeps training cells.
        Control cells stay "train", as :func:`virtualcell.pp.split` has them: predictions start from all of them.
        """
        rng = np.random.default_rng(seed)
        split = self.split.copy()
        for rows in self.pairs(self.is_train & ~self.is_control).values():
            n = int(fraction * len(rows) + 1e-9)  # a tenth of 30 is 3, whatever 0.1 * 30 is
            split[rng.permutation(rows)[:n]] = "val"
        if self.batch is not None:  # of a batch that validation alone has nothing would be learned
            split[(split == "val") & ~self.batch.isin(self.batch[split == "train"])] = "train"
        return self.with_split(split)

    def groups(self, mask: np.ndarray) -> CellGroups:
        """Match the marked cells of each context and perturbation to control cells of their context and batch.

        Control cells are drawn from those that are not "test". Cells of a batch without any are matched to those of
        the whole context. The control is a group too: a network learns that no perturbation changes nothing.
        """
        self.check_controls(mask)
        pools = {c: rows for (c, _), rows in self.pairs(self.is_control & (self.split != "test")).items()}
        batch = np.zeros(self.n_cells, int) if self.batch is None else self.batch.codes.astype(int)
        groups, unmatched = CellGroups.empty(), 0
        number: dict[tuple[str, int], int] = {}
        stand_ins: set[int] = set()
        for (context, perturbation), rows in self.pairs(mask).items():
            pool_of = np.empty(len(rows), int)
            for b in np.unique(batch[rows]):
                if (context, b) not in number:
                    matched = pools[context][batch[pools[context]] == b]
                    number[context, b] = len(groups.pools)
                    stand_ins |= set() if len(matched) else {len(groups.pools)}
                    groups.pools.append(matched if len(matched) else pools[context])
                here = batch[rows] == b
                pool_of[here] = number[context, b]
                unmatched += int(here.sum()) if number[context, b] in stand_ins else 0
            groups.add(perturbation, context, rows, pool_of)
        if unmatched:
            logger.warning(
                "%d cells lie in batches without control cells; controls of their context stand in.", unmatched
            )
        return groups

    # -- checks -------------------------------------------------------------------------------------------------------

    def require_unique_names(self) -> None:
        """Raise where two cells have one name: what is drawn goes by names."""
        if not self.names.is_unique:
            raise ValueError("obs_names repeats cells. Run `adata.obs_names_make_unique()` first.")

    def require_control(self) -> None:
        """Raise unless there are control cells."""
        if not self.is_control.any():
            names = _present(self.perturbation)
            are_numbers = names and all(name.replace(".", "", 1).isdigit() for name in names)
            of_r = " Where numbers stand for labels, as R writes a factor, give the control's." if are_numbers else ""
            raise unknown_name("control", self.design.control, names, f"It labels the unperturbed cells.{of_r}")

    def check_embedding(self, mask: np.ndarray | None = None) -> None:
        """Raise for embeddings of the cells, or of the marked ones, that are not finite."""
        if self.rep is None:
            return
        bad = self.names[~np.isfinite(self.rep).all(axis=1) & (True if mask is None else mask)]
        if len(bad):
            raise ValueError(
                f"obsm[{self.design.use_rep!r}] holds NaN or infinite values in {len(bad)} cells, among them "
                f"{list(bad[:3])}. Embed them again, or drop them."
            )

    def check_controls(self, mask: np.ndarray) -> None:
        """Raise for a context of the marked cells that has no control cells to start from, of those not "test"."""
        there = _present(self.context[self.is_control & (self.split != "test")])
        in_test = _present(self.context[self.is_control & (self.split == "test")])
        for context in _present(self.context[mask]):
            if context in there:
                continue
            if context in in_test:
                raise ValueError(
                    f"all control cells ({self.design.control!r}) of context {context!r} are marked 'test', and those "
                    "are not read. Mark some of them 'train', or all cells of the context 'test'."
                )
            raise ValueError(
                f"context {context!r} has no control cells ({self.design.control!r}) to start from. Drop it or add "
                "controls."
            )


def _present(labels: pd.Categorical) -> list[str]:
    """Return the labels that occur, sorted."""
    return [str(label) for label in labels.categories[np.unique(labels.codes)]]
