"""What every model of perturbations shares: registering data, picking control cells, the frame it returns."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse
from scvi.data import AnnDataManager, fields
from torch import Tensor

from virtualcell._design import Design, expression_modality, labels
from virtualcell._errors import unknown_name
from virtualcell.data._matrix import check_matches_scale, columns_by_name, matrix_name, raw_matrix
from virtualcell.models._saved import SavedModel

MOST_EXPRESSION = np.float32(np.log1p(1e4))  # log1p CP10k of a cell that holds one gene only
SPLITS = ("train", "val", "test")


class PerturbationModel(SavedModel):
    """A model that turns control cells and a perturbation into perturbed cells: ST, and the baselines beside it."""

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        *,
        perturbation_key: str,
        control: str,
        context_key: str | None = None,
        batch_key: str | None = None,
        layer: str | None = None,
        use_rep: str | None = None,
        split_key: str | None = None,
    ) -> None:
        """Register the data.

        Parameters
        ----------
        adata
            Cells x genes. Expression is log(1 + counts per 10,000); :func:`virtualcell.tl.fit_state` makes that from
            raw counts without touching `X`.
        perturbation_key
            Column of `obs` with the perturbation of each cell; combinations as `A+B`.
        control
            Its label for unperturbed cells.
        context_key
            Column with the context (cell type, cell line); control cells are matched within it.
        batch_key
            Column with the experimental batch; control cells are matched within it too, and ST learns an embedding.
        layer
            Layer with the expression; `X` where it is `None`.
        use_rep
            Key of `obsm` with cell embeddings (`"X_state"`): ST then works there and decodes genes.
        split_key
            Column with `train`, `val` and `test`, from :func:`virtualcell.pp.split`; test cells are never seen.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        _check_design(adata, setup_method_args["setup_args"])
        anndata_fields = [
            fields.LayerField("X", layer, is_count_data=False),
            fields.CategoricalObsField("perturbation", perturbation_key),
            fields.CategoricalObsField("context", context_key),
            fields.CategoricalObsField("batch", batch_key),
        ]
        if use_rep is not None:
            anndata_fields.append(fields.ObsmField("rep", use_rep))
        manager = AnnDataManager(fields=anndata_fields, setup_method_args=setup_method_args)
        manager.register_fields(adata)
        cls.register_manager(manager)

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        perturbation_key: str,
        control: str,
        modality: str = "rna",
        context_key: str | None = None,
        batch_key: str | None = None,
        layer: str | None = None,
        use_rep: str | None = None,
        split_key: str | None = None,
    ) -> None:
        """Register the expression modality of a MuData; see :meth:`setup_anndata`.

        Columns are looked up in the modality's `obs`, then in the MuData's.

        Parameters
        ----------
        mdata
            MuData with the expression in `mdata.mod[modality]`.
        modality
            Name of that modality.
        perturbation_key, control, context_key, batch_key, layer, use_rep, split_key
            As in :meth:`setup_anndata`.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        _check_design(mdata, setup_method_args["setup_args"])
        in_modality = expression_modality(mdata, modality).obs.columns

        def column(name: str, key: str | None) -> fields.MuDataCategoricalObsField:
            mod_key = modality if key is None or key in in_modality else None
            return fields.MuDataCategoricalObsField(name, key, mod_key=mod_key)

        mudata_fields = [
            fields.MuDataLayerField("X", layer, mod_key=modality, mod_required=True, is_count_data=False),
            column("perturbation", perturbation_key),
            column("context", context_key),
            column("batch", batch_key),
        ]
        if use_rep is not None:
            mudata_fields.append(fields.MuDataObsmField("rep", use_rep, mod_key=modality, mod_required=True))
        manager = AnnDataManager(fields=mudata_fields, setup_method_args=setup_method_args)
        manager.register_fields(mdata)
        cls.register_manager(manager)

    def __init__(self, adata: AnnData | MuData | None = None, *, registry: dict | None = None) -> None:
        super().__init__(adata, registry)
        states = {k: v["state_registry"] for k, v in self.registry["field_registries"].items()}
        self.setup = self.registry["setup_args"]
        self.design = Design(  # fit_state, which normalises for the model, states what it started from instead
            **{k: self.setup[k] for k in ("perturbation_key", "control", "context_key", "batch_key", "layer")},
            scale="log1p",
        )
        self.control: str = self.setup["control"]
        self.genes = [str(g) for g in states["X"]["column_names"]]
        self.batches = [str(b) for b in states["batch"]["categorical_mapping"]] if self.setup["batch_key"] else []
        self.contexts = [str(c) for c in states["context"]["categorical_mapping"]] if self.setup["context_key"] else []
        self.perturbations = sorted({str(p) for p in states["perturbation"]["categorical_mapping"]} - {self.control})

    def _meta(self) -> dict:
        return {**super()._meta(), "design": self.design.to_uns()}

    @classmethod
    def _from_saved(cls, meta: dict, tensors: dict[str, Tensor]) -> Self:
        model = super()._from_saved(meta, tensors)
        model.design = Design(**meta["design"])
        return model

    # -- reading data -------------------------------------------------------------------------------------------------

    @property
    def _modality(self) -> str:
        return self.setup.get("modality", "rna")

    def _data(self, adata: AnnData | MuData | None) -> AnnData | MuData:
        if adata is None and self.adata is None:
            raise ValueError("adata=None, but this model was loaded without data: give the cells to start from.")
        return self.adata if adata is None else adata

    def _labels(self, data: AnnData | MuData, role: str) -> np.ndarray:
        """Labels of all cells for "perturbation", "context", "batch" or "split"; empty where there is no key."""
        key = self.setup[f"{role}_key"]
        if key is None:
            return np.full(expression_modality(data, self._modality).n_obs, "", dtype=object)
        return labels(data, key, argument=f"{role}_key", modality=self._modality).to_numpy()

    def _batch_codes(self, data: AnnData | MuData) -> np.ndarray | None:
        if not self.batches:
            return None
        names = self._labels(data, "batch")
        codes = pd.Index(self.batches).get_indexer(names)
        if (codes < 0).any():
            raise unknown_name(
                "batch", names[codes < 0][0], self.batches, "This model knows only the batches it was trained on."
            )
        return codes

    def _expression(self, data: AnnData | MuData) -> sparse.csr_matrix:
        """log1p CP10k of the model's genes, by name."""
        adata = expression_modality(data, self._modality)
        matrix = raw_matrix(adata, self.setup["layer"])
        _check_log1p(matrix, self.setup["layer"])
        return columns_by_name(matrix, adata.var_names, self.genes)

    def _cells(self, data: AnnData | MuData) -> sparse.csr_matrix | np.ndarray:
        """Return what a prediction starts from, all cells x features."""
        return self._expression(data)

    def _training_rows(self, data: AnnData | MuData) -> np.ndarray:
        """Mask of the cells that may be learned from: all that are not test."""
        return self._labels(data, "split") != "test"

    # -- prediction ---------------------------------------------------------------------------------------------------

    @property
    def _n_seen_together(self) -> int:
        """Control cells that one prediction looks at together."""
        return 1

    @abstractmethod
    def _predict_cells(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None
    ) -> np.ndarray:
        """Predicted expression (n_cells, n_genes) of control cells, rows of :meth:`_cells`, under a perturbation.

        `context` is their context ("" where the model knows none), which may be new; `base` the mean of all its control
        cells, (n_features,); `batch` the code of each cell's batch.
        """

    def _predict_means(
        self, cells: np.ndarray, perturbation: str, *, context: str, base: np.ndarray, batch: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean predicted profiles (n_opinions, n_genes), of each part of the model that has a say, and their shares."""
        predicted = self._predict_cells(cells, perturbation, context=context, base=base, batch=batch)
        return predicted.mean(axis=0, keepdims=True), np.ones(1)

    @abstractmethod
    def check_perturbation(self, perturbation: str) -> None:
        """Raise a KeyError that says why, if this model cannot predict a perturbation."""

    def predict(
        self,
        adata: AnnData | MuData | None = None,
        perturbation: str | None = None,
        *,
        context: str | None = None,
        n_cells: int | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Predict perturbed cells from control cells.

        Parameters
        ----------
        adata
            Cells on the scale of the training matrix, with the columns of `obs` that the model was set up with; the
            training data where it is `None`.
        perturbation
            What to predict: a label of the training data, `A+B`, or, for a model with features, any name in its table.
        context
            Take the control cells of this context, which may be one where the perturbation was never measured; all
            contexts where it is `None`.
        n_cells
            Predicted cells per context, drawn without replacement where there are enough controls; by default every
            control cell gives one.
        seed
            Of the draw and of how control cells fall into sets. The order of cells in `adata` does not matter.

        Returns
        -------
        Predicted expression, cells x genes, log(1 + counts per 10,000). The index names the control cell that each
        predicted cell started from.

        Raises
        ------
        KeyError
            For an unknown perturbation, context, gene or column.
        """
        self._check_ready(perturbation)
        data = self._data(adata)
        names = expression_modality(data, self._modality).obs_names
        if n_cells is not None and n_cells < 1:
            raise ValueError(f"n_cells={n_cells!r}: at least one cell is needed.")
        rows_of = self._control_rows(data, context)
        cells, batch = self._cells(data), self._batch_codes(data)
        frames = []
        for c, rows in rows_of.items():
            rows = rows[np.argsort(names[rows], kind="stable")]
            base = np.asarray(cells[rows].mean(axis=0), dtype=np.float32).ravel()
            rng = np.random.default_rng([seed, *c.encode()])
            n = len(rows) if n_cells is None else n_cells
            # a small request still shows the model a full set of control cells
            n_run = max(n, min(len(rows), self._n_seen_together))
            rows = rng.choice(rows, n_run, replace=n_run > len(rows))
            control = cells[rows].toarray() if sparse.issparse(cells) else cells[rows]
            codes = None if batch is None else batch[rows]
            predicted = self._predict_cells(control, perturbation, context=c, base=base, batch=codes)[:n]
            rows = rows[:n]
            order = np.argsort(names[rows], kind="stable")
            frames.append(pd.DataFrame(predicted[order], index=names[rows[order]], columns=self.genes))
        return pd.concat(frames)

    def uncertainty(
        self,
        adata: AnnData | MuData | None = None,
        perturbation: str | None = None,
        *,
        context: str | None = None,
        n_samples: int = 20,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Estimate the standard error of the predicted mean of each gene: from draws of cells and disagreement.

        Control cells are drawn with replacement `n_samples` times, and each part of the model that has a say of its own
        (heads and members of an ST, and its prior) predicts from each draw. The error is that of their weighted
        average: its variance between draws, plus the variance between parts times the sum of squared weights, which
        for equal weights divides it by their number. What all parts have wrong together it does not see.

        Parameters
        ----------
        adata, perturbation, context, seed
            As in :meth:`predict`.
        n_samples
            Draws, at least 2.

        Returns
        -------
        Contexts x genes, log(1 + counts per 10,000).
        """
        if n_samples < 2:
            raise ValueError(f"n_samples={n_samples!r}: at least 2 draws are needed for a standard error.")
        self._check_ready(perturbation)
        data = self._data(adata)
        names = expression_modality(data, self._modality).obs_names
        cells, batch = self._cells(data), self._batch_codes(data)
        errors = {}
        for c, rows in self._control_rows(data, context).items():
            rows = rows[np.argsort(names[rows], kind="stable")]
            rng = np.random.default_rng([seed, *c.encode()])
            means = []
            for _ in range(n_samples):
                drawn = rng.choice(rows, len(rows))
                control = cells[drawn].toarray() if sparse.issparse(cells) else cells[drawn]
                codes = None if batch is None else batch[drawn]
                base = control.mean(axis=0)
                opinions, share = self._predict_means(control, perturbation, context=c, base=base, batch=codes)
                means.append(opinions)
            means = np.stack(means)  # (n_samples, n_opinions, n_genes)
            variance = (share @ means).var(axis=0, ddof=1)
            if len(share) > 1:
                parts, total = means.mean(axis=0), np.square(share).sum()
                between = share @ np.square(parts - share @ parts) / (1 - total)  # unbiased; by n - 1 if all are equal
                variance = variance + between * total
            errors[c] = np.sqrt(variance)
        return pd.DataFrame.from_dict(errors, orient="index", columns=self.genes)

    def _check_ready(self, perturbation: str | None) -> None:
        self._check_if_trained(warn=False)
        if perturbation is None:
            raise ValueError("perturbation must be given: which one is to be predicted?")
        if not isinstance(perturbation, str):
            raise TypeError(
                f"perturbation={perturbation!r} must be one name, as a string; "
                "`vc.tl.predict_perturbation` takes several."
            )
        self.check_perturbation(perturbation)

    def _control_rows(self, data: AnnData | MuData, context: str | None) -> dict[str, np.ndarray]:
        contexts, is_control = self._labels(data, "context"), self._labels(data, "perturbation") == self.control
        if not is_control.any():
            raise unknown_name(
                "control",
                self.control,
                np.unique(self._labels(data, "perturbation")),
                "Predictions start from control cells.",
            )
        if context is not None and self.setup["context_key"] is None:
            raise ValueError(f"context={context!r} was given, but the model was set up without context_key.")
        found = {str(c): np.flatnonzero(is_control & (contexts == c)) for c in np.unique(contexts[is_control])}
        if context is None:
            return found
        if context not in found:
            raise unknown_name("context", context, found, "It needs control cells to start from.")
        return {context: found[context]}


def _check_design(data: AnnData | MuData, setup: dict) -> None:
    modality = setup.get("modality", "rna")
    adata = expression_modality(data, modality)
    if not adata.obs_names.is_unique:
        raise ValueError("obs_names repeats cells. Run `adata.obs_names_make_unique()` first.")
    found = labels(data, setup["perturbation_key"], argument="perturbation_key", modality=modality)
    if setup["control"] not in set(found):
        raise unknown_name("control", setup["control"], sorted(set(found)), "It labels the unperturbed cells.")
    for key in ("context_key", "batch_key"):
        if setup[key] is not None:
            labels(data, setup[key], argument=key, modality=modality)
    if setup["split_key"] is not None:
        split = labels(data, setup["split_key"], argument="split_key", modality=modality)
        if not set(split) <= set(SPLITS):
            raise ValueError(f"split_key={setup['split_key']!r} holds {sorted(set(split))}; valid are {SPLITS}.")
        if "train" not in set(split):
            raise ValueError(f"split_key={setup['split_key']!r} marks no cell as 'train'.")
    if setup["use_rep"] is not None and setup["use_rep"] not in adata.obsm:
        raise unknown_name("use_rep", setup["use_rep"], adata.obsm, "Run `vc.tl.embed` first.")
    _check_log1p(raw_matrix(adata, setup["layer"]), setup["layer"])


def _check_log1p(matrix: sparse.csr_matrix, layer: str | None) -> None:
    """Raise unless the values can be log(1 + counts per 10,000)."""
    where = matrix_name(layer)
    if matrix.nnz and np.array_equal(matrix.data, np.rint(matrix.data)):
        raise ValueError(
            f"{where} holds whole numbers only: raw counts? This model works on log(1 + counts per 10,000). Let "
            "`vc.tl.fit_state` and `vc.tl.predict_perturbation` prepare the data, or normalise into a layer."
        )
    check_matches_scale(matrix, "log1p", where, target_sum=1e4)
