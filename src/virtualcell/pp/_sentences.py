"""Write each cell as a sentence of genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._arguments import require_whole
from virtualcell.data._design import Scale
from virtualcell.data._expression import Expression
from virtualcell.data._labels import expression_modality
from virtualcell.data._results import require_results
from virtualcell.data._sentences import sentences
from virtualcell.data._tables import Vectors, as_table
from virtualcell.pp._genes import match_genes

logger = logging.getLogger(__name__)


def cell_sentences(
    adata: AnnData | MuData,
    gene_embeddings: Vectors,
    *,
    length: int = 2048,
    layer: str | None = None,
    scale: Scale = "counts",
    gene_key: str | None = None,
    aliases: Mapping[str, str] | None = None,
    modality: str = "rna",
) -> None:
    """Write each cell as its most expressed genes, the input of a state embedding (SE) model.

    Only genes with an embedding take part. They are ordered by x, highest first, where x = log(1 + raw count) or, for
    `scale="log1p"`, the value itself; genes with the same x in the order of the gene table, so that the order of genes
    in `adata` does not matter. The matrix is never made dense.

    Parameters
    ----------
    adata
        Cells; of a MuData, the modality named by `modality` is read and written.
    gene_embeddings
        Gene table, genes x dimensions, indexed by gene name, or a dictionary of vectors. Genes are matched by
        name, never by position.
    length
        Places in a sentence; a cell with fewer expressed genes is padded.
    layer
        Layer to read; `X` by default.
    scale
        `"counts"` for raw counts, `"log1p"` for values on a log scale.
    gene_key
        Column of `var` with the names that the gene table uses; `var_names` by default.
    aliases
        Names in the data mapped to names in the gene table, for genes that do not match as they are.
    modality
        Modality with gene expression, of a MuData.

    Returns
    -------
    Nothing. Written are `obsm["cell_sentence"]` (cells x length, int32: rows of the gene table, -1 at padding),
    `obsm["cell_sentence_expression"]` (cells x length, float32: x, 0 at padding) and `var["gene_token"]` (int32: row
    of the gene table, or -1).

    Raises
    ------
    KeyError
        If `layer`, `gene_key` or `modality` does not exist.
    ValueError
        If no gene matches, two genes match the same row, or the values are not on the stated scale.

    Examples
    --------
    >>> table = vc.pp.expression_gene_embeddings(adata, n_comps=8)
    >>> vc.pp.cell_sentences(adata, table, length=16)
    >>> first = adata.obsm["cell_sentence"][0]  # rows of the table, the most expressed gene first
    >>> bool(adata[0, table.index[first[0]]].X.max() == adata[0].X.max())
    True
    """
    require_whole("length", length)
    gene_embeddings = as_table(gene_embeddings, "gene_embeddings")
    rna = expression_modality(adata, modality)
    require_results(rna)
    expression = Expression(rna, layer=layer, scale=scale, unit="log_counts")
    tokens = match_genes(rna, gene_embeddings.index, gene_key=gene_key, aliases=aliases)
    sentence = np.empty((rna.n_obs, length), np.int32)
    values = np.empty((rna.n_obs, length), np.float32)
    for rows, block in expression.blocks():
        sentence[rows], values[rows] = sentences(block, tokens, length)
    empty = int((sentence[:, 0] < 0).sum())
    if empty:
        logger.warning("%d of %d cells express no gene of the table: their sentences are empty.", empty, rna.n_obs)
    rna.obsm[_keys.SENTENCE] = sentence
    rna.obsm[_keys.SENTENCE_EXPRESSION] = values
    rna.var[_keys.GENE_TOKEN] = tokens
