"""Write cell embeddings of an SE model."""

from __future__ import annotations

from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._design import Scale, expression_modality
from virtualcell.models import SE


def embed(
    adata: AnnData | MuData,
    model: SE,
    *,
    layer: str | None = None,
    scale: Scale = "counts",
    gene_key: str | None = None,
    key_added: str = _keys.X_STATE,
    batch_size: int = 256,
    modality: str = "rna",
) -> None:
    """Write the cell vectors of an SE model to `obsm["X_state"]`: cell embedding and dataset embedding side by side.

    Parameters
    ----------
    adata
        Any cells; genes are matched by name to the model's gene table.
    model
        A trained :class:`virtualcell.models.SE`.
    layer, scale
        Where expression is, and whether it is "counts" or "log1p".
    gene_key
        Column of `var` with the names that the gene table uses; `var_names` where it is `None`.
    key_added
        Key of `obsm`.
    batch_size
        Cells at a time.
    modality
        Expression modality of a MuData.

    Raises
    ------
    ValueError
        If too few genes of the data are in the gene table, or a cell expresses none of them.
    """
    expression_modality(adata, modality).obsm[key_added] = model.get_latent_representation(
        adata, layer=layer, scale=scale, gene_key=gene_key, modality=modality, batch_size=batch_size
    )
