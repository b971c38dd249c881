"""The cells of an SE: data registered with scvi-tools, and the sentences that are read from any data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi.data import AnnDataManager
from scvi.data import fields as scvi_fields
from scvi.model.base import BaseModelClass
from torch import Tensor

from virtualcell._errors import unknown_name
from virtualcell.data._design import Scale
from virtualcell.data._expression import Expression
from virtualcell.data._fingerprint import digest, numbers, of_expression
from virtualcell.data._labels import expression_modality, read_labels
from virtualcell.data._registry import scvi_registry
from virtualcell.data._screen import Screen
from virtualcell.data._sentence_batches import SentenceBatches, Sentences
from virtualcell.data._tables import Vectors, as_table
from virtualcell.data._threads import in_threads
from virtualcell.models._se_options import SETrainOptions
from virtualcell.pp._genes import match_genes

if TYPE_CHECKING:
    from virtualcell.models._se import SE

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Data to read cells from, and where in it: a Screen says that itself."""

    data: AnnData | MuData | Screen
    layer: str | None = None
    scale: Scale = "counts"
    gene_key: str | None = None
    modality: str = "rna"

    def expression(self) -> Expression:
        """Return the matrix, log(1 + count)."""
        if not isinstance(self.data, Screen):
            adata = expression_modality(self.data, self.modality)
            expression = Expression(adata, layer=self.layer, scale=self.scale, unit="log_counts")
            return expression.at_hand(make=False)
        if self.data.expression.unit != "log_counts":
            raise ValueError(
                f"the screen reads {self.data.expression.unit!r}, and SE looks at counts that are not divided by their "
                "total: make the screen with unit='log_counts'."
            )
        return self.data.expression

    def names(self) -> pd.Index:
        """Names of the cells."""
        return (
            self.data.names
            if isinstance(self.data, Screen)
            else expression_modality(self.data, self.modality).obs_names
        )

    def tokens(self, gene_names: pd.Index) -> np.ndarray:
        """Row of each gene of the data in a table of genes, or -1."""
        if not isinstance(self.data, Screen):
            return match_genes(expression_modality(self.data, self.modality), gene_names, gene_key=self.gene_key)
        genes = pd.DataFrame({"name": self.data.target_names.reindex(self.data.genes)}, index=self.data.genes)
        return match_genes(AnnData(var=genes), gene_names, gene_key="name")

    def dataset_codes(self, key: str | None, known: list[str]) -> np.ndarray:
        """Return the number of each cell's data set among those that a model tells apart."""
        if key is None:
            return np.zeros(len(self.names()), int)
        names = read_labels(self.data, key, argument="dataset_key", modality=self.modality).to_numpy()
        codes = pd.Index(known).get_indexer(names)
        if (codes < 0).any():
            raise unknown_name("dataset", names[codes < 0][0], known, "This model tells only those apart.")
        return codes


class Cells(NamedTuple):
    """Cells to learn from or to embed: sentences, vectors of the genes in these, and names of the cells."""

    sentences: Sentences
    vectors: Tensor
    names: pd.Index

    def in_order(self) -> np.ndarray:
        """Rows in the order of names or, of a matrix that is not in memory, in that of the file."""
        return self.by_name() if self.sentences.expression.in_memory else np.arange(len(self.names))

    def by_name(self) -> np.ndarray:
        """Rows in the order of the cells' names: the order of a file then changes nothing."""
        return np.argsort(self.names.to_numpy(dtype=str), kind="stable")


def training_source(model: SE) -> Source:
    """Return the data that a model was built on, and where in it is what."""
    source = _source(model)
    if source is None:
        raise ValueError(
            "this model holds no data to train on: it was loaded without, or `vc.tl.fit_state` let go of it. Set up "
            "data and build a new model, or give the data to `load` as adata=."
        )
    return source


def own_source(model: SE) -> Source:
    """Return the data that a model holds, to embed it."""
    source = _source(model)
    if source is None:
        raise ValueError("adata=None, but this model was loaded without data: give the cells to embed.")
    return source


def _source(model: SE) -> Source | None:
    data, setup = model.screen if model.adata is None else model.adata, model.setup
    if data is None:
        return None
    return Source(data, setup["layer"], setup["scale"], setup["gene_key"], setup.get("modality") or "rna")


def read_cells(model: SE, source: Source) -> Cells:
    """Match genes to a model's table, and make the cells readable as sentences of the genes that are there."""
    cls_expression_gene = model.cls_expression_gene
    expression, names, tokens = source.expression(), source.names(), source.tokens(model.gene_names)
    embedded = np.flatnonzero(tokens >= 0)
    # in the order of the table, so that the order of genes in a file changes nothing
    columns = embedded[np.argsort(tokens[embedded])]
    cls_gene = None
    if cls_expression_gene is not None:
        if len(embedded) <= cls_expression_gene:
            raise ValueError(
                f"cls_expression_gene={cls_expression_gene}, but only {len(embedded)} genes have an embedding."
            )
        cls_gene = int(np.flatnonzero(columns == embedded[cls_expression_gene])[0])
    expression = expression.select(expression.genes[columns])
    sentences = Sentences(expression, model.length, cls_gene=cls_gene, fill=model.fill_sentences)
    return Cells(sentences, model.gene_embeddings[tokens[columns]], names)


def batches(
    cells: Cells, dataset: np.ndarray, n_targets: tuple[int, int, int], options: SETrainOptions
) -> tuple[SentenceBatches, SentenceBatches | None]:
    """Return the batches of a training and, where cells are held out, of its validation."""
    rows = np.random.default_rng(options.seed).permutation(cells.by_name())
    n_held = int(options.val_fraction * len(rows))

    def of(rows: np.ndarray, *, is_validation: bool) -> SentenceBatches:
        return SentenceBatches(
            cells.sentences,
            rows,
            names=cells.names,
            vectors=cells.vectors,
            dataset=dataset,
            n_targets=n_targets,
            batch_size=options.batch_size,
            seed=options.seed,
            is_validation=is_validation,
        )

    n, steps, size = len(rows) - n_held, options.max_steps, options.batch_size
    logger.info(
        "SE sees each of %d training cells about %.3g times, in %d steps of %d cells.", n, steps * size / n, steps, size
    )
    return of(rows[n_held:], is_validation=False), of(rows[:n_held], is_validation=True) if n_held else None


def learned_from(model: SE, cells: Cells, dataset: np.ndarray) -> dict[str, object]:
    """Describe the data that an SE learns from, and how it is shown."""
    return {
        **of_expression(cells.names, cells.sentences.expression),
        "gene embeddings": numbers(cells.vectors.numpy()),
        "data sets": digest(dataset[cells.by_name()]),
        "sentences": [model.length, *model.n_targets, model.cls_expression_gene, model.fill_sentences],
    }


def check_not_empty(cells: Cells) -> None:
    """Raise for cells of which there would be no sentence."""
    expression = cells.sentences.expression
    is_gene = (expression.gene_of_column >= 0).astype(np.float32)
    sums = in_threads(lambda rows: expression.stored(rows) @ is_gene, expression.slices())
    empty = np.concatenate([np.zeros(0, bool), *(of_rows <= 0 for of_rows in sums)])
    if empty.any():
        refuse_empty(cells.names[empty])


def refuse_empty(names: pd.Index) -> None:
    """Raise for cells, by their names, of which there would be no sentence."""
    raise ValueError(
        f"{len(names)} cells express no gene that has an embedding, among them {list(names[:3])}. Drop them first, or "
        "fit without an embedding (se=False)."
    )


def gene_table(gene_embeddings: Vectors | None) -> tuple[pd.Index, Tensor]:
    """Return names and vectors of a table of genes."""
    if gene_embeddings is None:
        raise ValueError("gene_embeddings must be given, for instance vc.pp.expression_gene_embeddings(adata).")
    table = as_table(gene_embeddings, "gene_embeddings")
    vectors = torch.from_numpy(table.to_numpy(dtype=np.float32, copy=True))
    return pd.Index([str(g) for g in table.index]), vectors


def gene_rows(model: SE, genes: Sequence[str]) -> np.ndarray:
    """Return the rows of a model's gene table."""
    rows = model.gene_names.get_indexer(pd.Index(genes))
    if (rows < 0).any():
        raise unknown_name("genes", list(genes)[int(np.argmax(rows < 0))], model.gene_names, "It has no embedding.")
    return rows


def sizes_of(model: SE) -> str:
    """Describe a model in one line."""
    config, n = model.config, sum(p.numel() for p in model.module.parameters())
    return (
        f"SE model: {len(model.gene_names)} genes x {config.n_token} dimensions, sentences of {model.length} genes, "
        f"cell vectors of {config.n_output} + {config.n_dataset}, {n / 1e6:.1f} M parameters."
    )


def dataset_names(registry: dict) -> list[str]:
    """Return the names of the data sets that were registered; one for all cells where none were."""
    if not registry["setup_args"]["dataset_key"]:
        return ["all"]
    state = registry["field_registries"]["dataset"]["state_registry"]
    return [str(name) for name in state["categorical_mapping"]]


def register(
    cls: type[BaseModelClass], data: AnnData | MuData, setup_method_args: dict, modality: str | None = None
) -> None:
    """Check data and register its matrix and data sets for SE; a MuData is one with a `modality`."""
    setup = setup_method_args["setup_args"]
    layer, key = setup["layer"], setup["dataset_key"]
    adata = expression_modality(data, modality or "rna")
    Expression(adata, layer=layer, scale=setup["scale"], unit="log_counts").rows(
        np.arange(1)
    )  # checks the whole matrix
    if key is not None:
        read_labels(data, key, argument="dataset_key", modality=modality or "rna")
    if modality is None:
        found = [
            scvi_fields.LayerField("X", layer, is_count_data=False),
            scvi_fields.CategoricalObsField("dataset", key),
        ]
    else:
        mod_key = modality if key is None or key in adata.obs else None
        found = [
            scvi_fields.MuDataLayerField("X", layer, mod_key=modality, mod_required=True, is_count_data=False),
            scvi_fields.MuDataCategoricalObsField("dataset", key, mod_key=mod_key),
        ]
    manager = AnnDataManager(fields=found, setup_method_args=setup_method_args)
    manager.register_fields(data)
    cls.register_manager(manager)


def screen_registry(screen: Screen) -> dict:
    """Return what scvi-tools would have registered of the cells of a screen, which are of one data set."""
    design = screen.design
    setup = {"layer": design.layer, "scale": design.scale, "dataset_key": None, "gene_key": design.gene_key}
    states = {"X": {"column_names": [str(g) for g in screen.genes]}, "dataset": {"categorical_mapping": [0]}}
    return scvi_registry("SE", setup, states)
