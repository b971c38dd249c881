"""Features of genes from what is known about them, so that unmeasured perturbations can be told apart."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh, svds

from virtualcell._arguments import require_number, require_whole
from virtualcell.pp._relations import read_annotations, read_edges, read_sets

logger = logging.getLogger(__name__)


def gene_features(
    path: str | Path,
    *,
    names: str | Path | None = None,
    n_comps: int = 64,
    min_score: float = 0.7,
    min_genes: int = 5,
    max_genes: int = 500,
) -> pd.DataFrame:
    r"""Turn a network of genes, or a collection of gene sets, into a table of features.

    The table is what `perturbation_features=` of :func:`virtualcell.tl.fit_state` and of the baselines takes, to
    predict perturbations of genes that were never perturbed: genes that are close in it are expected to act alike.

    =====================  =========================================================================================
    suffix (also `.gz`)    file
    =====================  =========================================================================================
    `.gmt`                 gene sets, such as Reactome's, from https://reactome.org/download-data or, with gene
                           symbols, from https://www.gsea-msigdb.org
    `.gaf`                 annotations of the Gene Ontology, such as goa_human.gaf.gz from
                           https://current.geneontology.org/products/pages/downloads.html; terms as annotated, without
                           their ancestors
    `.txt`                 links of STRING, such as 9606.protein.physical.links.v12.0.txt.gz from
                           https://string-db.org/cgi/download, with the file protein.info from there as `names`
    `.tsv`, `.csv`         any other network: a header, then two genes a row, and a score of 0 or more if there is one
    =====================  =========================================================================================

    Of a **network** with weights A, the features are the leading eigenvectors of a random walk that may stay where it
    is, :math:`(D + I)^{-1} (A + I)` with D the sums of A's rows, without the constant one, on the largest connected
    part. Of **sets**, genes x sets with the entry :math:`\log(n / n_s)` for a member of a set with :math:`n_s` of all n
    genes; each row is scaled to length one, and its singular value decomposition :math:`U S V^\top` taken, of which
    :math:`U S` are the features.

    The order of lines, sets and genes does not matter, and neither does repetition; the largest entry of each component
    is positive. Tables of two sources go together with `pd.concat([a, b], axis=1, join="inner")`.

    Parameters
    ----------
    path
        File to read; the suffix tells the format.
    names
        STRING's file protein.info, for its links.
    n_comps
        Number of features; as many as the file allows, if fewer.
    min_score
        Links of lower score are left out. STRING's scores run from 0 to 1 here (its files hold thousandths); 0.7 is
        what it calls high confidence.
    min_genes
        Size of the smallest set that counts.
    max_genes
        Size of the largest set that counts; large sets say little about a gene.

    Returns
    -------
    Genes x components (float32), in the order of gene names, which are those of the file: check that they are the names
    that your perturbations go by. Genes without a set, or outside the largest connected part, have no row.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The suffix is unknown, the file is not what its suffix says, or too little is left of it.

    Examples
    --------
    >>> features = vc.pp.gene_features("c2.cp.reactome.v2023.2.Hs.symbols.gmt")  # doctest: +SKIP
    >>> vc.tl.fit_state(adata, **adata.uns["design"], perturbation_features=features)  # doctest: +SKIP
    """
    path, names = Path(path), None if names is None else Path(names)
    for argument, file in (("path", path), ("names", names)):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{argument}={str(file)!r} does not exist.")
    require_whole("n_comps", n_comps)
    for argument, value in (("min_score", min_score), ("min_genes", min_genes), ("max_genes", max_genes)):
        require_number(argument, value)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    known = {".gmt": read_sets, ".gaf": read_annotations, ".txt": read_edges, ".tsv": read_edges, ".csv": read_edges}
    if suffix not in known:
        raise ValueError(f"path={str(path)!r} has an unknown suffix. Known: {', '.join(known)}, each also with .gz.")
    if known[suffix] is read_edges:
        genes, vectors = _of_network(read_edges(path, names, min_score), n_comps, path.name)
    else:
        genes, vectors = _of_sets(known[suffix](path), n_comps, min_genes, max_genes, path.name)
    prefix = "network" if known[suffix] is read_edges else "set"
    columns = [f"{prefix}_{i}" for i in range(vectors.shape[1])]
    return pd.DataFrame(vectors.astype(np.float32), index=pd.Index(genes, name="gene"), columns=columns)


def _of_network(edges: pd.DataFrame, n_comps: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return genes and eigenvectors of the random walk on their network, of mean square one where it dwells."""
    genes, ends = np.unique(edges[["a", "b"]].to_numpy(dtype=str), return_inverse=True)
    ends, n = ends.reshape(-1, 2), len(genes)
    weights = sparse.csr_matrix((edges["weight"], (ends[:, 0], ends[:, 1])), shape=(n, n))
    weights = weights + weights.T
    parts = connected_components(weights)[1] if n else np.zeros(0, dtype=int)
    inside = parts == np.bincount(parts, minlength=1).argmax()
    _check(int(inside.sum()), f"the largest connected part of {name}, after min_score=,")
    if not inside.all():
        logger.info("%s: %d of %d genes are not in the largest connected part.", name, (~inside).sum(), n)
    genes, weights = genes[inside], weights[inside][:, inside]
    # genes with one weak link would otherwise dominate the leading vectors
    weights = weights + sparse.eye_array(len(genes), format="csr")
    degree = np.asarray(weights.sum(axis=1)).ravel()
    scale = sparse.diags_array(1 / np.sqrt(degree))
    n_comps = _allowed(n_comps, len(genes) - 2, name)
    values, vectors = eigsh(scale @ weights @ scale, k=n_comps + 1, which="LA", v0=_start(len(genes)))
    order = np.argsort(-values)[1:]  # the first is the same for all genes
    vectors = vectors[:, order] * np.sqrt(degree.sum() / degree)[:, None]
    return genes, _signed(vectors)


def _of_sets(
    sets: Mapping[str, set[str]], n_comps: int, min_genes: int, max_genes: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return genes and left singular vectors, times singular values, of their weighted memberships."""
    used = {key: sorted(sets[key]) for key in sorted(sets) if min_genes <= len(sets[key]) <= max_genes}
    _check(
        len(used), f"{name}, of {len(sets)} sets those with min_genes={min_genes} to max_genes={max_genes} genes,", 2
    )
    genes, member = np.unique(np.concatenate(list(used.values())), return_inverse=True)
    sizes = np.array([len(of_set) for of_set in used.values()])
    idf = np.repeat(np.log(len(genes) / sizes), sizes)
    column = np.repeat(np.arange(len(sizes)), sizes)
    matrix = sparse.csr_matrix((idf, (member, column)), shape=(len(genes), len(sizes)))
    if not idf.any():
        raise ValueError(
            f"All {len(used)} sets of {name} with min_genes={min_genes} to max_genes={max_genes} genes hold the same "
            f"{len(genes)} genes, so that they tell no gene from another. Choose other sets, or another file."
        )
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    matrix = sparse.diags_array(1 / np.maximum(length, np.finfo(float).tiny)) @ matrix
    n_comps = _allowed(n_comps, min(matrix.shape) - 1, name)
    left, values, _ = svds(matrix.tocsr(), k=n_comps, v0=_start(min(matrix.shape)))
    order = np.argsort(-values)
    return genes, _signed(left[:, order] * values[order])


def _check(n_left: int, what: str, fewest: int = 3) -> None:
    if n_left < fewest:
        raise ValueError(f"Too little is left of {what} namely {n_left}; at least {fewest} are needed.")


def _allowed(n_comps: int, limit: int, name: str) -> int:
    if n_comps > limit:
        logger.warning("n_comps=%d is more than %s allows: %d.", n_comps, name, limit)
    return min(n_comps, limit)


def _start(n: int) -> np.ndarray:
    """Return where the iteration starts. It ends at the same vectors from anywhere, and is the same every time."""
    return np.random.default_rng(0).standard_normal(n)


def _signed(vectors: np.ndarray) -> np.ndarray:
    """Make the largest entry of each column positive; ties, up to rounding, go to the first gene."""
    largest = np.abs(vectors).max(axis=0)
    first = (np.abs(vectors) > largest * (1 - 1e-6)).argmax(axis=0)
    return vectors * np.sign(vectors[first, np.arange(vectors.shape[1])])
