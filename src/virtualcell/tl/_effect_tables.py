"""Predicted changes of means and their standard errors, which a prediction has beside its cells."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from anndata import AnnData

from virtualcell import _keys


@dataclass
class EffectTables:
    """Changes and standard errors, (n_genes,) of each perturbation and context, as they are predicted."""

    groups: list[tuple[str, str]] = field(default_factory=list)
    changes: list[np.ndarray] = field(default_factory=list)
    errors: list[np.ndarray] = field(default_factory=list)

    def add(self, perturbation: str, context: str, change: np.ndarray, error: np.ndarray | float) -> None:
        """Take what was predicted for a group; an error of one number holds for all genes, NaN where none is known."""
        self.groups.append((perturbation, context))
        self.changes.append(change)
        self.errors.append(np.broadcast_to(error, change.shape))

    def write(self, predicted: AnnData, genes: list[str]) -> None:
        """Write to `varm` (genes x groups) and to `uns["virtualcell"]["groups"]`, which names the groups."""
        place = pd.Index(genes).get_indexer(predicted.var_names)
        for key, columns in ((_keys.CHANGE, self.changes), (_keys.STANDARD_ERROR, self.errors)):
            predicted.varm[key] = np.stack(columns, axis=1)[place].astype(np.float32)
        groups = pd.DataFrame(self.groups, columns=["perturbation", "context"])
        groups.index = groups.index.astype(str)  # as h5ad has it
        predicted.uns[_keys.UNS] = {**predicted.uns.get(_keys.UNS, {}), _keys.GROUPS: groups}
