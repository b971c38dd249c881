"""Write cell embeddings of an SE model."""

from __future__ import annotations

from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell.data._design import Scale
from virtualcell.data._labels import expression_modality
from virtualcell.data._results import require_results
from virtualcell.models import SE
from virtualcell.models._se_inference import Precision


def embed(
    adata: AnnData | MuData,
    model: SE,
    *,
    layer: str | None = None,
    scale: Scale = "counts",
    gene_key: str | None = None,
    key_added: str = _keys.X_STATE,
    batch_size: int | None = None,
    precision: Precision = "auto",
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
        Layer with the expression (`X` where it is `None`), and whether that is "counts" or "log1p".
    gene_key
        Column of `var` with the names that the gene table uses; `var_names` where it is `None`.
    key_added
        Key of `obsm`.
    batch_size
        Number of cells at a time; by default 256 on a CPU, and on a GPU as many as keep it busy.
    precision
        Numbers that the network computes with: "float32", or "bf16", which is several times faster on GPUs that have it
        and gives nearly the same vectors. "auto" takes bf16 on such a GPU, and float32 everywhere else.
    modality
        Expression modality of a MuData.

    Raises
    ------
    ValueError
        If too few genes of the data are in the gene table, or a cell expresses none of them.

    Examples
    --------
    >>> vc.tl.embed(adata, se)
    >>> adata.obsm["X_state"].shape[0] == adata.n_obs
    True
    """
    require_results(expression_modality(adata, modality))
    expression_modality(adata, modality).obsm[key_added] = model.get_latent_representation(
        adata,
        layer=layer,
        scale=scale,
        gene_key=gene_key,
        modality=modality,
        batch_size=batch_size,
        precision=precision,
    )
