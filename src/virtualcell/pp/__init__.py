"""Prepare the data: gene embeddings, cell sentences, splits, knockdown efficiency, gene positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtualcell._lazy import attach

if TYPE_CHECKING:
    from virtualcell.pp._coexpression import expression_gene_embeddings
    from virtualcell.pp._esm import gene_embeddings
    from virtualcell.pp._gene_features import gene_features
    from virtualcell.pp._gene_vectors import read_gene_embeddings
    from virtualcell.pp._knockdown import knockdown_efficiency
    from virtualcell.pp._positions import gene_positions
    from virtualcell.pp._read_lazy import read_lazy
    from virtualcell.pp._saved_split import apply_split, save_split
    from virtualcell.pp._sentences import cell_sentences
    from virtualcell.pp._split import split

__all__ = [
    "apply_split",
    "cell_sentences",
    "expression_gene_embeddings",
    "gene_embeddings",
    "gene_features",
    "gene_positions",
    "knockdown_efficiency",
    "read_gene_embeddings",
    "read_lazy",
    "save_split",
    "split",
]

__getattr__, __dir__ = attach(__name__)
