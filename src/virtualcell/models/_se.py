"""SE on AnnData: training on cell sentences, embedding of any data set whose genes have embeddings."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model.base import BaseModelClass
from torch import Tensor

from virtualcell import _keys
from virtualcell.data._design import Scale
from virtualcell.data._screen import Screen
from virtualcell.io._arc_se import read_se, write_se
from virtualcell.io._save import State, save
from virtualcell.models import _common, _se_data
from virtualcell.models._se_inference import Precision, cell_vectors, check_precision, decode, embed
from virtualcell.models._se_options import SETrainOptions, network_options, train_options
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
    network
        Any other field of :class:`virtualcell.modules.SEConfig`.

    Examples
    --------
    >>> vc.models.SE.setup_anndata(adata)
    >>> se = vc.models.SE(adata, vc.pp.expression_gene_embeddings(adata))
    >>> se.train(max_steps=1000)
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
        _se_data.register(cls, adata, cls._get_setup_method_args(**locals()))

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
        layer, scale, dataset_key, gene_key
            As in :meth:`setup_anndata`; `dataset_key` is looked up in the modality's `obs`, then in the MuData's.
        """
        _se_data.register(cls, mdata, cls._get_setup_method_args(**locals()), modality)

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
            super().__init__(None, _se_data.screen_registry(data))
        else:
            super().__init__(data, registry)
        self.screen = data if isinstance(data, Screen) else None
        self.setup = self.registry["setup_args"]
        self.datasets = _se_data.dataset_names(self.registry)
        self.gene_names, self.gene_embeddings = _se_data.gene_table(gene_embeddings)
        options = network_options(size, network)
        own_length, own_targets = options.pop("length"), options.pop("n_targets")
        self.length, self.n_targets = length or own_length, tuple(n_targets or own_targets)
        self.cls_expression_gene, self.fill_sentences = cls_expression_gene, fill_sentences
        given = {"n_token": self.gene_embeddings.shape[1], "n_datasets": len(self.datasets)}
        self.config = SEConfig(**{**given, **options})
        self.module = SENetwork(self.config)
        self._model_summary_string = _se_data.summary(self)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.module.parameters()).device

    # -- files --------------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, BaseModelClass]:
        """Models that this one carries: none."""
        return {}

    def state(self) -> State:
        """Return what is to be saved."""
        meta = {**_common.meta_of(self), "arguments": self._arguments()}
        tensors = {**_common.network_tensors(self.module), "gene_embeddings": self.gene_embeddings}
        return State(type(self).__name__, meta, tensors)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Build the model that :meth:`state` described."""
        model = cls._from_arguments(state.meta["arguments"], state.tensors, state.meta["registry"])
        _common.load_network(model.module, state.tensors)
        _common.restore_meta(model, state.meta)
        return model

    def _arguments(self) -> dict:
        return {
            "length": self.length,
            "n_targets": self.n_targets,
            "cls_expression_gene": self.cls_expression_gene,
            "fill_sentences": self.fill_sentences,
            "genes": list(self.gene_names),
            "config": dataclasses.asdict(self.config),
        }

    @classmethod
    def _from_arguments(cls, arguments: dict, tensors: dict[str, Tensor], registry: dict) -> Self:
        table = pd.DataFrame(tensors["gene_embeddings"].numpy(), index=arguments["genes"])
        options = {k: v for k, v in arguments.items() if k not in ("genes", "config")}
        return cls(gene_embeddings=table, registry=registry, **options, **arguments["config"])

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
        accelerator, device
            Where to put the network, as in scvi-tools.
        """
        return _common.load_model(cls, dir_path, adata, accelerator=accelerator, device=device)

    @classmethod
    def from_arc(
        cls,
        folder: str | os.PathLike,
        *,
        gene_embeddings: pd.DataFrame | None = None,
        checkpoint: str | None = None,
    ) -> SE:
        """Read a model in Arc's format (SE-600M, SE-100M, or your own of `arc-state`). No code in its files is run.

        Parameters
        ----------
        folder
            Holds `config.yaml`, `model.safetensors` or a Lightning checkpoint, and `protein_embeddings.pt`.
        gene_embeddings
            Genes x dims, the table that the model was trained with or one made in the same way for other genes; by
            default that of the folder, or else of the checkpoint.
        checkpoint
            File with the weights; by default `model.safetensors`, or else the only `.ckpt`.

        Raises
        ------
        ValueError
            If parameters are missing, unexpected or misshapen, or the gene table has another width.
        UnsafePickleError
            If a file asks for anything but data.
        """
        path = Path(folder)
        arguments, tensors, registry = read_se(path, gene_embeddings=gene_embeddings, checkpoint=checkpoint)
        with torch.device("meta"):  # without weights of its own to throw away
            model = cls._from_arguments(arguments, tensors, registry)
        _common.load_network(model.module, tensors, assign=True)
        model.module.eval()
        model.is_trained_ = True
        logger.info("%s: %r", path.name, model)
        return model

    def to_arc(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write `config.yaml`, `model.safetensors` and `protein_embeddings.pt`, which `arc-state` reads.

        That package always does what `cls_expression_gene` and `fill_sentences` describe. A model without them gives
        other embeddings there than here; :meth:`from_arc` finds in `config.yaml` that it is without them.

        Parameters
        ----------
        folder
            The folder, made where it is missing.
        overwrite
            Whether to replace a model that is there.
        """
        if self.cls_expression_gene is None or not self.fill_sentences:
            logger.warning("arc-state will embed with cls_expression_gene and fill_sentences, this model is without.")
        write_se(
            Path(folder), self.module, self.gene_names, self.gene_embeddings, self._arguments(), overwrite=overwrite
        )

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, options: TrainOptions | Mapping[str, object] | None = None, **keywords: object) -> None:
        """Train the cell vector to predict the expression of genes, drawn anew for every cell, from their embeddings.

        Where nothing else is stated, training takes DEFAULTS.

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
        options = self.train_options(options, **keywords)
        source = _se_data.training_source(self)
        dataset = source.dataset_codes(self.setup["dataset_key"], self.datasets)
        training, validation = _se_data.batches(_se_data.read_cells(self, source), dataset, self.n_targets, options)
        self.history_ = fit(self.module, se_loss, training, options, validation=validation, name="SE")
        self.is_trained_ = True

    @staticmethod
    def train_options(options: TrainOptions | Mapping[str, object] | None = None, **keywords: object) -> SETrainOptions:
        """Complete the options of a training, and raise for one that there is not."""
        return train_options(options, keywords)

    def forget_data(self) -> None:
        """Drop the training data, which scvi-tools would keep in memory for as long as the process lives."""
        _common.forget_data(self)

    def __repr__(self) -> str:
        return _common.summary(self)

    # -- results ------------------------------------------------------------------------------------------------------

    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        *,
        layer: str | None = None,
        scale: Scale | None = None,
        gene_key: str | None = None,
        modality: str = "rna",
        batch_size: int = 256,
        precision: Precision = "auto",
    ) -> np.ndarray:
        """Embed cells of any data set: cell and dataset embedding side by side, (n_cells, n_output + n_dataset).

        Parameters
        ----------
        adata
            Cells of any data set, whose genes are matched by name; the training data where it is `None`.
        layer, gene_key, modality
            Where expression and gene names are in `adata`: a layer or `X`, a column of `var` or `var_names`.
        scale
            Scale of `adata`, "counts" or "log1p"; that of the training data where it is `None`.
        batch_size
            Number of cells at a time.
        precision
            Numbers that the network computes with: "float32", or "bf16", which is several times faster on GPUs that
            have it and gives nearly the same vectors (cosine at least 0.9999). "auto" takes bf16 on such a GPU, and
            float32 everywhere else. The result is float32 in any case.
        """
        self._check_if_trained(warn=False)
        check_precision(precision)
        if adata is None:
            source = _se_data.own_source(self)
        else:
            source = _se_data.Source(adata, layer, scale or self.setup["scale"], gene_key, modality)
        return embed(self.module, _se_data.read_cells(self, source), batch_size=batch_size, precision=precision)

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
        use_rep, modality
            Key of `obsm`; expression modality of a MuData.

        Raises
        ------
        KeyError
            For a gene without an embedding, or a missing key.
        ValueError
            For vectors of another width.
        """
        vectors, index = cell_vectors(adata, use_rep, modality)
        rows = _se_data.gene_rows(self, genes)
        decoded = decode(self.module, vectors, self.gene_embeddings[rows], read_depth)
        return pd.DataFrame(decoded, index=index, columns=list(genes))


_common.KINDS["SE"] = SE
