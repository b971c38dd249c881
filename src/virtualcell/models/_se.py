"""SE on AnnData: training on cell sentences, embedding of any data set whose genes have embeddings."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scipy import sparse
from scvi.data import AnnDataManager, fields
from torch import Tensor
from torch.utils.data import DataLoader

from virtualcell import _keys
from virtualcell._design import Scale, expression_modality, labels
from virtualcell._errors import unknown_name
from virtualcell.data._matrix import check_matches_scale, matrix_name, raw_matrix
from virtualcell.data._sentence_batches import RowBatchSampler, SentenceDataset
from virtualcell.io._arc_se import read_se, write_se
from virtualcell.models._saved import SavedModel
from virtualcell.modules import SEConfig, SENetwork, se_loss
from virtualcell.pp._genes import match_genes
from virtualcell.train import run_training

logger = logging.getLogger(__name__)

SIZES = {
    "small": {
        "n_hidden": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_feedforward": 128,
        "n_output": 64,
        "length": 128,
        "n_targets": (64, 32, 64),
    },
    "medium": {
        "n_hidden": 256,
        "n_layers": 4,
        "n_heads": 8,
        "n_feedforward": 512,
        "n_output": 256,
        "length": 512,
        "n_targets": (256, 128, 256),
    },
    # SE-600M
    "large": {
        "n_hidden": 2048,
        "n_layers": 16,
        "n_heads": 16,
        "n_feedforward": 2048,
        "n_output": 2048,
        "length": 2047,
        "n_targets": (512, 256, 512),
    },
}


class SE(SavedModel):
    """State Embedding model: a cell as a sentence of its top genes, embedded by a transformer (Adduri et al. 2025).

    Parameters
    ----------
    adata
        Data registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    gene_embeddings
        Genes x dims: from :func:`virtualcell.pp.gene_embeddings` (ESM-2), :func:`virtualcell.pp.read_gene_embeddings`
        or :func:`virtualcell.pp.expression_gene_embeddings`. Genes of the data without a row take no part.
    size
        "small" (laptop), "medium", or "large" (SE-600M).
    length
        Genes in a sentence.
    n_targets
        Expressed, unexpressed and shared genes that each cell predicts in training.
    cls_expression_gene
        Arc's models give the [CLS] place, by an oversight, the expression of one gene: that with this index among the
        genes of the data that have an embedding, in the data's own order. Their embeddings therefore depend on the
        order of genes in a file. On (3) for models of :meth:`from_arc`, whose weights were trained that way.
    fill_sentences
        Fill the sentence of a cell with fewer expressed genes than places with unexpressed genes, drawn with
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
            "counts" for raw counts, "log1p" for log(1 + counts per 10,000). Stated, never guessed.
        dataset_key
            Column of `obs` with the data set or donor of each cell, which the [DS] token learns to tell apart.
        gene_key
            Column of `var` with the names that `gene_embeddings` uses; `var_names` where it is `None`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        check_matches_scale(raw_matrix(adata, layer), scale, matrix_name(layer))
        if dataset_key is not None:
            labels(adata, dataset_key, argument="dataset_key")
        manager = AnnDataManager(
            fields=[
                fields.LayerField("X", layer, is_count_data=False),
                fields.CategoricalObsField("dataset", dataset_key),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata)
        cls.register_manager(manager)

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
        setup_method_args = cls._get_setup_method_args(**locals())
        adata = expression_modality(mdata, modality)
        check_matches_scale(raw_matrix(adata, layer), scale, matrix_name(layer))
        if dataset_key is not None:
            labels(mdata, dataset_key, argument="dataset_key", modality=modality)
        in_modality = dataset_key is None or dataset_key in adata.obs
        manager = AnnDataManager(
            fields=[
                fields.MuDataLayerField("X", layer, mod_key=modality, mod_required=True, is_count_data=False),
                fields.MuDataCategoricalObsField("dataset", dataset_key, mod_key=modality if in_modality else None),
            ],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(mdata)
        cls.register_manager(manager)

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
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
        super().__init__(adata, registry)
        if gene_embeddings is None:
            raise ValueError("gene_embeddings must be given, for instance vc.pp.expression_gene_embeddings(adata).")
        if size not in SIZES:
            raise ValueError(f"size={size!r} is unknown; valid are {list(SIZES)}.")
        self.setup = self.registry["setup_args"]
        states = {k: v["state_registry"] for k, v in self.registry["field_registries"].items()}
        self.datasets = (
            [str(d) for d in states["dataset"]["categorical_mapping"]] if self.setup["dataset_key"] else ["all"]
        )
        self.gene_names = pd.Index([str(g) for g in gene_embeddings.index])
        self.gene_embeddings = torch.from_numpy(gene_embeddings.to_numpy(dtype=np.float32))
        if not torch.isfinite(self.gene_embeddings).all():
            raise ValueError("gene_embeddings holds NaN or infinite values; drop or fill those rows.")
        options = {**SIZES[size], **network}
        self.length = length or options["length"]
        self.n_targets = tuple(n_targets or options["n_targets"])
        self.cls_expression_gene, self.fill_sentences = cls_expression_gene, fill_sentences
        given = {"n_token": self.gene_embeddings.shape[1], "n_datasets": len(self.datasets)}
        options = {k: v for k, v in options.items() if k not in ("length", "n_targets")}
        known = {f.name for f in dataclasses.fields(SEConfig)}
        if unknown := set(options) - known:
            raise TypeError(f"SE has no option {sorted(unknown)}; valid are {sorted(known - set(given))}.")
        self.config = SEConfig(**{**given, **options})
        self.module = SENetwork(self.config)
        n = sum(p.numel() for p in self.module.parameters())
        self._model_summary_string = (
            f"SE model: {len(self.gene_names)} genes x {self.config.n_token} dimensions, sentences of {self.length} "
            f"genes, cell vectors of {self.config.n_output} + {self.config.n_dataset}, {n / 1e6:.1f} M parameters."
        )

    # -- saving -------------------------------------------------------------------------------------------------------

    def _arguments(self) -> dict:
        return {
            "length": self.length,
            "n_targets": self.n_targets,
            "cls_expression_gene": self.cls_expression_gene,
            "fill_sentences": self.fill_sentences,
            "genes": list(self.gene_names),
            "config": dataclasses.asdict(self.config),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "gene_embeddings": self.gene_embeddings}

    @classmethod
    def _from_arguments(cls, arguments: dict, tensors: dict[str, Tensor], registry: dict) -> SE:
        table = pd.DataFrame(tensors["gene_embeddings"].numpy(), index=arguments["genes"])
        return cls(
            gene_embeddings=table,
            registry=registry,
            length=arguments["length"],
            n_targets=arguments["n_targets"],
            cls_expression_gene=arguments["cls_expression_gene"],
            fill_sentences=arguments["fill_sentences"],
            **arguments["config"],
        )

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
        model = cls._from_foreign(*read_se(path, gene_embeddings=gene_embeddings, checkpoint=checkpoint))
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
            Replace a model that is there.
        """
        if self.cls_expression_gene is None or not self.fill_sentences:
            logger.warning("arc-state will embed with cls_expression_gene and fill_sentences, this model is without.")
        write_se(
            Path(folder), self.module, self.gene_names, self.gene_embeddings, self._arguments(), overwrite=overwrite
        )

    # -- data ---------------------------------------------------------------------------------------------------------

    def _values(
        self, data: AnnData | MuData, layer: str | None, scale: Scale, gene_key: str | None, modality: str
    ) -> tuple[sparse.csr_matrix, np.ndarray]:
        """log(1 + count), cells x genes, and the row of the gene table of each gene."""
        adata = expression_modality(data, modality)
        matrix = raw_matrix(adata, layer)
        check_matches_scale(matrix, scale, matrix_name(layer))
        tokens = match_genes(adata, self.gene_names, gene_key=gene_key)
        if scale == "counts":
            matrix = sparse.csr_matrix((np.log1p(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
        empty = np.asarray(matrix @ (tokens >= 0).astype(np.float32)) <= 0
        if empty.any():
            raise ValueError(
                f"{int(empty.sum())} cells express no gene that has an embedding, among them "
                f"{list(adata.obs_names[empty][:3])}. Drop them first, or fit without an embedding (se=False)."
            )
        return matrix, tokens

    def _setup_values(self, data: AnnData | MuData) -> tuple[sparse.csr_matrix, np.ndarray]:
        s = self.setup
        return self._values(data, s["layer"], s["scale"], s["gene_key"], s.get("modality", "rna"))

    def _dataset_codes(self, data: AnnData | MuData) -> np.ndarray:
        key, modality = self.setup["dataset_key"], self.setup.get("modality", "rna")
        if key is None:
            return np.zeros(expression_modality(data, modality).n_obs, int)
        names = labels(data, key, argument="dataset_key", modality=modality).to_numpy()
        codes = pd.Index(self.datasets).get_indexer(names)
        if (codes < 0).any():
            raise unknown_name("dataset", names[codes < 0][0], self.datasets, "This model tells only those apart.")
        return codes

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        max_steps: int | None = None,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        early_stopping: bool = False,
        early_stopping_patience: int = 10,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        precision: str = "32-true",
        seed: int = 0,
        enable_progress_bar: bool = True,
        **trainer_kwargs: object,
    ) -> None:
        """Train the cell vector to predict the expression of genes, drawn anew for every cell, from their embeddings.

        Parameters
        ----------
        max_epochs, max_steps
            Length, whichever ends first; 1,000 steps where neither is given.
        lr, weight_decay
            Of AdamW; the rate rises from a third over 3 % of the steps and falls along a cosine to 0.3 of it.
        batch_size
            Cells per step.
        val_fraction
            Share of the cells kept for validation.
        early_stopping, early_stopping_patience, accelerator, devices, precision, seed
            As in :meth:`virtualcell.models.ST.train`.
        enable_progress_bar, trainer_kwargs
            As in :meth:`virtualcell.models.ST.train`.
        """
        data = self._training_data()
        matrix, tokens = self._setup_values(data)
        codes = self._dataset_codes(data)
        modality = self.setup.get("modality", "rna")
        by_name = np.argsort(expression_modality(data, modality).obs_names.to_numpy(), kind="stable")
        place = np.argsort(by_name)  # of each cell among the sorted names
        by_name = np.random.default_rng(seed).permutation(by_name)
        n_val = int(val_fraction * len(by_name))
        cells = SentenceDataset(
            matrix,
            tokens,
            self.length,
            n_targets=self.n_targets,
            dataset=codes,
            seed=seed,
            ids=place,
            **self._habits(matrix, tokens),
        )

        tables: dict[torch.device, Tensor] = {}  # the gene table, up to 400 MB, goes to a device once, not every step

        def loss(network: SENetwork, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            device = batch["tokens"].device
            if device not in tables:
                tables[device] = self.gene_embeddings.to(device)
            return se_loss(network, tables[device], batch)

        def loader(rows: np.ndarray, *, shuffle: bool) -> DataLoader:
            return DataLoader(
                cells, sampler=RowBatchSampler(rows, batch_size, shuffle=shuffle, seed=seed), batch_size=None
            )

        run_training(
            self,
            loss,
            loader(by_name[n_val:], shuffle=True),
            loader(by_name[:n_val], shuffle=False) if n_val else None,
            max_epochs=max_epochs,
            max_steps=max_steps,
            default_steps=1000,
            lr=lr,
            weight_decay=weight_decay,
            gradient_clip=0.8,
            plan_kwargs={"final_lr": 0.3},
            early_stopping=early_stopping,
            early_stopping_patience=early_stopping_patience,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            seed=seed,
            enable_progress_bar=enable_progress_bar,
            **trainer_kwargs,
        )

    # -- results ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        *,
        layer: str | None = None,
        scale: Scale | None = None,
        gene_key: str | None = None,
        modality: str = "rna",
        batch_size: int = 256,
    ) -> np.ndarray:
        """Embed cells of any data set: cell and dataset embedding side by side, (n_cells, n_output + n_dataset).

        Parameters
        ----------
        adata
            Cells of any data set, whose genes are matched by name; the training data where it is `None`.
        layer, gene_key, modality
            Where expression and gene names are in `adata`: a layer or `X`, a column of `var` or `var_names`.
        scale
            Of `adata`, "counts" or "log1p"; that of the training data where it is `None`.
        batch_size
            Cells at a time.
        """
        self._check_if_trained(warn=False)
        data = self.adata if adata is None else adata
        if data is None:
            raise ValueError("adata=None, but this model was loaded without data: give the cells to embed.")
        if adata is None:
            matrix, tokens = self._setup_values(data)
        else:
            matrix, tokens = self._values(data, layer, scale or self.setup["scale"], gene_key, modality)
        self.module.eval()
        present = np.unique(tokens[tokens >= 0])  # a table of 20,000 x 5,120 takes longer to encode than a few cells
        genes = self.module.encode_genes(self.gene_embeddings[present].to(self.device))
        tokens = np.where(tokens >= 0, np.searchsorted(present, tokens), -1)
        cells = SentenceDataset(matrix, tokens, self.length, **self._habits(matrix, tokens))
        out = []
        for rows in RowBatchSampler(np.arange(matrix.shape[0]), batch_size, shuffle=False, rank=0, world_size=1):
            batch = cells[rows]
            batch = {name: value.to(self.device) for name, value in batch.items()}
            embedded = self.module(genes, batch["tokens"], batch["expression"], batch.get("cls_expression"))
            out.append(torch.cat([embedded.cell, embedded.dataset], dim=1).float().cpu())
        return torch.cat(out).numpy()

    def _habits(self, matrix: sparse.csr_matrix, tokens: np.ndarray) -> dict:
        """Return what the published models do with [CLS] and with short sentences, where this one does it."""
        if self.cls_expression_gene is None:
            return {"fill": self.fill_sentences}
        embedded = np.flatnonzero(tokens >= 0)
        if len(embedded) <= self.cls_expression_gene:
            raise ValueError(
                f"cls_expression_gene={self.cls_expression_gene}, but only {len(embedded)} genes have an embedding."
            )
        x = matrix[:, [embedded[self.cls_expression_gene]]].toarray().ravel()
        c = 100 * x / np.asarray(matrix @ (tokens >= 0).astype(np.float32))
        return {"fill": self.fill_sentences, "cls_expression": c}

    @torch.inference_mode()
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
        if isinstance(adata, AnnData | MuData):
            cells = expression_modality(adata, modality)
            if use_rep not in cells.obsm:
                raise unknown_name("use_rep", use_rep, cells.obsm, "Run `vc.tl.embed(adata, model)` first.")
            vectors, index = np.asarray(cells.obsm[use_rep], dtype=np.float32), cells.obs_names
        else:
            vectors, index = np.asarray(adata, dtype=np.float32), None
        width = self.config.n_output + self.config.n_dataset
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(f"cell vectors have shape {vectors.shape}; this model makes (n_cells, {width}).")
        rows = self.gene_names.get_indexer(pd.Index(genes))
        if (rows < 0).any():
            raise unknown_name("genes", list(genes)[int(np.argmax(rows < 0))], self.gene_names, "It has no embedding.")
        self.module.eval()
        x = torch.from_numpy(vectors).to(self.device)
        cell, dataset = x.split([self.config.n_output, self.config.n_dataset], dim=1)
        depth = torch.full((len(x),), read_depth, device=self.device)
        out = self.module.decode(self.gene_embeddings[rows].to(self.device), cell, dataset, depth)
        return pd.DataFrame(out.float().cpu().numpy(), index=index, columns=list(genes))
