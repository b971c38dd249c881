"""What a model was fitted on, in a few numbers, so that the same cells with other values are noticed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Self

import numpy as np
from scipy import sparse

from virtualcell.data._packed import PackedRows
from virtualcell.data._screen import Screen

_SAMPLED = 64  # control cells
_CLOSE = 1e-3  # relative; logarithms differ in the seventh digit between machines


@dataclass(frozen=True)
class FittedOn:
    """The cells and genes that a model learned from: how many, and fingerprints of their names and of some values.

    Predictions on other cells, of a new context for instance, are what a model is for, and say nothing about this.
    Where control cells have the names and the context of those that the model was fitted on but other values (another
    layer, denoised counts, other genes in the library size), :func:`virtualcell.tl.predict_perturbation` says so in the
    log, at the level INFO.

    Parameters
    ----------
    n_cells
        Number of the cells that were learned from.
    n_genes
        Number of genes.
    cells
        Fingerprint of the sorted names of the cells, in hexadecimal.
    genes
        Fingerprint of the sorted names of the genes.
    sample
        Name, context, and two sums over genes of up to 64 control cells: of log(1 + counts per 10,000), and of that
        with weights that the names of the genes give.

    Examples
    --------
    >>> fitted = vc.tl.fit_baseline(adata, "Additive", **adata.uns["design"])
    >>> fitted.fitted_on.n_cells == adata.n_obs
    True
    """

    n_cells: int
    n_genes: int
    cells: str
    genes: str
    sample: tuple[tuple[str, str, float, float], ...]

    def __repr__(self) -> str:
        return f"FittedOn({self.n_cells} cells {self.cells}, {self.n_genes} genes {self.genes})"

    @classmethod
    def of(cls, screen: Screen, packed: PackedRows | None = None) -> Self:
        """Describe the cells of a screen that are not "test".

        Parameters
        ----------
        screen
            The cells.
        packed
            Their expression in the memory of the CPU, where it was read already; otherwise the sampled cells are read.
        """
        learned = screen.in_order(screen.split != "test")
        controls = screen.in_order(screen.is_control & (screen.split != "test"))
        rows = controls[np.unique(np.linspace(0, len(controls) - 1, _SAMPLED).astype(int))] if len(controls) else []
        rows = np.asarray(rows, dtype=int)
        cells = screen.expression.rows(rows) if packed is None else packed.rows(rows).numpy()
        sums = _sums(cells, screen.genes)
        of_cell = zip(
            screen.names[rows].astype(str), np.asarray(screen.context[rows]).astype(str), *sums.T, strict=True
        )
        return cls(
            n_cells=len(learned),
            n_genes=len(screen.genes),
            cells=_fingerprint(screen.names[learned].astype(str)),
            genes=_fingerprint(sorted(map(str, screen.genes))),
            sample=tuple((name, context, float(a), float(b)) for name, context, a, b in of_cell),
        )

    def changed(
        self, context: str, names: Sequence[str], cells: sparse.csr_matrix | np.ndarray, genes: Sequence[str]
    ) -> tuple[int, int]:
        """Count the sampled control cells of a context that have other values here, and those that were compared.

        None are compared where some of them are not here, or where names are numbers: these are other cells, then.

        Parameters
        ----------
        context
            Name of the context.
        names
            Names of control cells of it.
        cells
            Their expression, (n_cells, n_genes), log(1 + counts per 10,000).
        genes
            Names of the genes.
        """
        wanted = {name: (a, b) for name, of, a, b in self.sample if of == context and not name.isdigit()}
        place = {name: i for i, name in enumerate(names)}
        if not wanted or not set(wanted) <= set(place):
            return 0, 0
        found = _sums(cells[[place[name] for name in wanted]], genes)
        is_close = np.isclose(found, np.array(list(wanted.values())), rtol=_CLOSE, atol=_CLOSE).all(axis=1)
        return int((~is_close).sum()), len(wanted)

    def to_plain(self) -> dict:
        """Return what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        """Read what :meth:`to_plain` returned."""
        sample = tuple((str(name), str(context), float(a), float(b)) for name, context, a, b in plain["sample"])
        return cls(**{**plain, "sample": sample})


def _fingerprint(names: Iterable[str]) -> str:
    digest = blake2b(digest_size=8)
    for name in names:
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


def _sums(cells: sparse.csr_matrix | np.ndarray, genes: Iterable[str]) -> np.ndarray:
    """Two sums of each cell, (n_cells, 2), that do not depend on the order of genes, nor on genes that are all zero."""
    words = [blake2b(str(gene).encode(), digest_size=4).digest() for gene in genes]
    weights = np.array([int.from_bytes(word, "little") / 2**32 for word in words])
    return np.stack([np.asarray(cells @ w).ravel() for w in (np.ones(len(words)), weights)], axis=1)
