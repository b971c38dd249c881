"""SE on AnnData: training on cell sentences, embedding of any data set whose genes have embeddings."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model.base import BaseModelClass

from virtualcell import _keys
from virtualcell.data._design import Scale
from virtualcell.data._screen import Screen
from virtualcell.io._save import save
from virtualcell.models._common import KINDS, forget_data, load_model, put_on, summary
from virtualcell.models._se_data import (
    Source,
    batches,
    check_not_empty,
    dataset_names,
    gene_rows,
    gene_table,
    learned_from,
    own_source,
    read_cells,
    register,
    screen_registry,
    sizes_of,
    training_source,
)
from virtualcell.models._se_files import from_arc, from_state, state_of, to_arc
from virtualcell.models._se_inference import Precision, cell_vectors, check_precision, decode, embed
from virtualcell.models._se_options import SETrainOptions, completed, network_options, train_options
from virtualcell.modules import SEConfig, SENetwork, se_loss
from virtualcell.train import TrainOptions, fit

logger = logging.getLogger(__name__)


class SE(BaseModelClass):
    """State Embedding model: a cell as a sentence of its top genes, embedded by a transformer (Adduri et al. 2025).

    Parameters
    ----------
    data
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    gene_embeddings
        Genes x dims: from :func:`virtualcell.pp.gene_embeddings` (ESM-2), :func:`virtualcell.pp.read_gene_embeddings`
        or :func:`virtualcell.pp.expression_gene_embeddings`. Genes of the data without a row take no part.
    size
        Size of the network: "small" (laptop), "medium", or "large" (SE-600M).
    length
        Number of genes in a sentence.
    n_targets
        Number of expressed, unexpressed and shared genes that each cell predicts in training.
    cls_expression_gene
        Arc's models give the [CLS] place, by an oversight, the expression of one gene: that with this index among the
        genes of the data that have an embedding, in the data's own order. Their embeddings therefore depend on the
        order of genes in a file. On (3) for models of :meth:`from_arc`, whose weights were trained that way.
    fill_sentences
        Whether to fill the sentence of a cell with fewer expressed genes than places with unexpressed genes, drawn with
        replacement, as Arc's models had it, instead of padding it. The draw is fixed by the genes of the cell alone.
    registry
        What a saved model knows of its data.
    network
        Any other field of :class:`virtualcell.models.SEConfig`.

    Examples
    --------
    >>> vc.models.SE.setup_anndata(adata)
    >>> se = vc.models.SE(adata, vc.pp.expression_gene_embeddings(adata, n_comps=8))
    >>> se.train(max_steps=2)  # leave it out for as many as the data need
    >>> adata.obsm["X_state"] = se.get_latent_representation(adata)
    """

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        scale: Scale = "counts",
        dataset_key: str | None = None,
        gene_key: str | None = None,
    ) -> None:
        """Register the data.

        Parameters
        ----------
        adata
            Cells x genes.
        layer
            Layer with the expression; `X` where it is `None`.
        scale
            "counts" for raw counts, "log1p" for log(1 + counts per 10,000). It is checked, never guessed.
        dataset_key
            Column of `obs` with the data set or donor of each cell, which the [DS] token learns to tell apart.
        gene_key
            Column of `var` with the names that `gene_embeddings` uses; `var_names` where it is `None`.
        """
        register(cls, adata, cls._get_setup_method_args(**locals()))

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        modality: str = "rna",
        layer: str | None = None,
        scale: Scale = "counts",
        dataset_key: str | None = None,
        gene_key: str | None = None,
    ) -> None:
        """Register the expression modality of a MuData; see :meth:`setup_anndata`.

        Parameters
        ----------
        mdata
            MuData with the expression in `mdata.mod[modality]`.
        modality
            Name of that modality.
        layer
            Layer with the expression; `X` where it is `None`.
        scale
            Whether that is "counts" (raw) or "log1p" (of counts per 10,000).
        dataset_key
            Column of the modality's `obs`, or else of the MuData's, with the data set of each cell.
        gene_key
            Column of `var` with the names that the gene table uses; `var_names` where it is `None`.
        """
        register(cls, mdata, cls._get_setup_method_args(**locals()), modality)

    def __init__(
        self,
        data: AnnData | MuData | Screen | None = None,
        gene_embeddings: pd.DataFrame | None = None,
        *,
        size: Literal["small", "medium", "large"] = "small",
        length: int | None = None,
        n_targets: tuple[int, int, int] | None = None,
        cls_expression_gene: int | None = None,
        fill_sentences: bool = False,
        registry: dict | None = None,
        **network: object,
    ) -> None:
        if isinstance(data, Screen):
            super().__init__(None, screen_registry(data))
        else:
            super().__init__(data, registry)
        self.screen = data if isinstance(data, Screen) else None
        self.setup = self.registry["setup_args"]
        self.datasets = dataset_names(self.registry)
        self.gene_names, self.gene_embeddings = gene_table(gene_embeddings)
        options = network_options(size, network)
        own_length, own_targets = options.pop("length"), options.pop("n_targets")
        self.length, self.n_targets = length or own_length, tuple(n_targets or own_targets)
        self.cls_expression_gene, self.fill_sentences = cls_expression_gene, fill_sentences
        given = {"n_token": self.gene_embeddings.shape[1], "n_datasets": len(self.datasets)}
        self.config = SEConfig(**{**given, **options})
        self.module = SENetwork(self.config)
        self._model_summary_string = sizes_of(self)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    # -- files --------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, BaseModelClass]:
        """Models that this one carries: none."""
        return {}

    def save(self, dir_path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write `model.safetensors` into a folder.

        Parameters
        ----------
        dir_path
            The folder, made where it is missing.
        overwrite
            Replace a model that is there.

        Raises
        ------
        FileExistsError
            If the folder holds a model and `overwrite` is not set.
        """
        save(self, dir_path, overwrite=overwrite)

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike,
        adata: AnnData | MuData | None = None,
        *,
        accelerator: str = "auto",
        device: int | str = "auto",
    ) -> Self:
        """Read a model that :meth:`save` wrote; no data is needed, and nothing is unpickled.

        Parameters
        ----------
        dir_path
            The folder.
        adata
            Data to embed or train on where a method is given none; `None` leaves the model without data.
        accelerator
            Kind of device to put the network on, as in scvi-tools: "auto", "cpu", "gpu" or another of
            Lightning's.
        device
            Number of the device, or "auto".
        """
        return load_model(cls, dir_path, adata, accelerator=accelerator, device=device)

    state = state_of
    from_state = classmethod(from_state)
    from_arc = classmethod(from_arc)
    to_arc = to_arc

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, options: TrainOptions | Mapping[str, object] | None = None, **keywords: object) -> None:
        """Train the cell vector to predict the expression of genes, drawn anew for every cell, from their embeddings.

        Where nothing else is stated, training takes 1,300 steps of 16 cells where `n_hidden` is at most 64, and 1,000
        of 32 in larger networks, with a learning rate of 2e-3. It keeps a tenth of the cells for validation and looks
        at these five times, or ten with early stopping.

        Parameters
        ----------
        options
            Options of the training (:class:`virtualcell.models.SETrainOptions`), as an object or a dictionary.
        keywords
            The same options by name: `train(max_steps=600)`.

        Raises
        ------
        KeyError, ValueError
            For an option that there is not, or with a wrong value, before anything runs.
        FloatingPointError
            If a loss is not finite.
        """
        options = completed(self.train_options(options, **keywords), self.config.n_hidden)
        source = training_source(self)
        dataset = source.dataset_codes(self.setup["dataset_key"], self.datasets)
        cells = read_cells(self, source)
        cells = cells._replace(sentences=cells.sentences.at_hand())  # steps draw cells from everywhere
        check_not_empty(cells)
        training, validation = batches(cells, dataset, self.n_targets, options)
        self.history_ = fit(
            self.module,
            se_loss,
            training,
            options,
            validation=validation,
            name="SE",
            title="SE: cell embedding",
            data=None if options.checkpoint_dir is None else learned_from(self, cells, dataset),
        )
        self.is_trained_ = True
        put_on(self, options.accelerator)

    @staticmethod
    def train_options(options: TrainOptions | Mapping[str, object] | None = None, **keywords: object) -> SETrainOptions:
        """Complete the options of a training, and raise for one that there is not."""
        return train_options(options, keywords)

    def forget_data(self) -> None:
        """Drop the training data, which scvi-tools would keep in memory for as long as the process lives."""
        forget_data(self)

    def __repr__(self) -> str:
        return summary(self)

    # -- results ------------------------------------------------------------------------------------------------------

    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        *,
        layer: str | None = None,
        scale: Scale | None = None,
        gene_key: str | None = None,
        modality: str = "rna",
        batch_size: int | None = None,
        precision: Precision = "auto",
        progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Embed cells of any data set: cell and dataset embedding side by side, (n_cells, n_output + n_dataset).

        Parameters
        ----------
        adata
            Cells of any data set, whose genes are matched by name; the training data where it is `None`.
        layer
            Layer of `adata` with the expression; `X` where it is `None`.
        gene_key
            Column of `var` with the names that the gene table uses; `var_names` where it is `None`.
        modality
            Modality of a MuData that holds gene expression.
        scale
            Scale of `adata`, "counts" or "log1p"; that of the training data where it is `None`.
        batch_size
            Number of cells at a time; by default as many as fit the caches of a CPU, or keep a GPU busy.
        precision
            Numbers that the network computes with: "float32", or "bf16", which is several times faster on GPUs that
            have it and gives nearly the same vectors (cosine at least 0.9999). "auto" takes bf16 on such a GPU, and
            float32 everywhere else; on CPUs with avx512_bf16 or amx_bf16 among their flags, bf16 makes medium and large
            models faster, and small ones not. The result is float32 in any case.
        progress_bar
            Whether a bar shows how many batches are embedded; by default what `vc.settings.progress` says.
        """
        self._check_if_trained(warn=False)
        check_precision(precision)
        if adata is None:
            source = own_source(self)
        else:
            source = Source(adata, layer, scale or self.setup["scale"], gene_key, modality)
        cells = read_cells(self, source)
        return embed(self.module, cells, batch_size=batch_size, precision=precision, progress_bar=progress_bar)

    def decode(
        self,
        adata: AnnData | MuData | np.ndarray,
        genes: Sequence[str],
        *,
        read_depth: float = 4.0,
        use_rep: str = _keys.X_STATE,
        modality: str = "rna",
    ) -> pd.DataFrame:
        """Predict log(1 + count) of any genes from cell vectors, cells x genes.

        Parameters
        ----------
        adata
            Cells that this model has embedded into `obsm[use_rep]` (:func:`virtualcell.tl.embed`), or the vectors
            themselves, (n_cells, n_output + n_dataset).
        genes
            Any genes of the gene table, whether the data has them or not.
        read_depth
            Mean of the non-zero log counts to assume for the cell; 4.0 is the constant of the paper's code.
        use_rep
            Key of `obsm` with the vectors of the cells.
        modality
            Modality of a MuData that holds gene expression.

        Raises
        ------
        KeyError
            For a gene without an embedding, or a missing key.
        ValueError
            For vectors of another width.
        """
        vectors, index = cell_vectors(adata, use_rep, modality)
        rows = gene_rows(self, genes)
        decoded = decode(self.module, vectors, self.gene_embeddings[rows], read_depth)
        return pd.DataFrame(decoded, index=index, columns=list(genes))


KINDS["SE"] = SE
