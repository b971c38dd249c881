"""Perturbation labels to vectors: learned one-hot, or features, which reach perturbations that were never measured."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from virtualcell._errors import unknown_name
from virtualcell.data._doses import of_tahoe
from virtualcell.data._labels import Known, looks_combined, parts
from virtualcell.data._tables import as_table


class PerturbationTable:
    """Vectors of perturbations, (n_perturbations, n_dims); `A+B` is the sum of A and B.

    The control is the zero vector, unless the table has a row of that name: published models learned one for it.

    Parameters
    ----------
    names, vectors
        Row labels and rows.
    control
        Label of unperturbed cells.
    seen
        Labels met in training.
    has_features
        Whether rows are features (so that rows never met in training mean something) or one-hot.
    """

    def __init__(
        self, names: Sequence[str], vectors: Tensor, *, control: str, seen: Sequence[str], has_features: bool
    ) -> None:
        self.names, self.vectors, self.control = list(names), vectors.float(), control
        self.seen, self.has_features = list(seen), has_features
        self.rows = Known(self.names, control)  # of which published models have some for combinations
        self.learned = Known(self.seen, control)

    def frame(self) -> pd.DataFrame:
        """Return the features as a table, perturbations x dims, without the column that counts."""
        return pd.DataFrame(self.vectors[:, :-1].numpy(), index=self.names)

    @classmethod
    def one_hot(cls, labels: Iterable[str], control: str) -> PerturbationTable:
        """Give every single perturbation that occurs in `labels` a vector of its own."""
        labels = sorted(set(labels) - {control})
        names = sorted({p for label in labels for p in parts(label, control)})
        return cls(names, torch.eye(len(names)), control=control, seen=labels, has_features=False)

    @classmethod
    def from_features(
        cls, features: pd.DataFrame, labels: Iterable[str], control: str, unseen: Iterable[str] = ()
    ) -> PerturbationTable:
        """Standardise the columns of `features` (perturbations x dims) and add one that counts perturbations.

        Features differ in scale by orders of magnitude between sources; the count tells an average gene from none.
        `unseen` labels need rows too.
        """
        if not features.index.is_unique:
            doubled = list(features.index[features.index.duplicated()][:3])
            raise ValueError(f"perturbation_features has several rows for {doubled}; keep one of each.")
        features = features[features.index.astype(str) != control]  # it is the zero vector
        values = as_table(features, "perturbation_features").to_numpy()
        spread = values.std(axis=0)
        if len(values) > 1 and not spread.any():
            raise ValueError("perturbation_features has one vector for all perturbations, which tells none apart.")
        values = (values - values.mean(axis=0))[:, spread > 0] / spread[spread > 0]
        values = np.concatenate([values / np.sqrt(max(values.shape[1], 1)), np.ones((len(values), 1))], axis=1)
        labels = sorted(set(labels) - {control})
        names = [str(n) for n in features.index]
        table = cls(names, torch.from_numpy(values), control=control, seen=labels, has_features=True)
        needed = {p for label in (*labels, *unseen) for p in parts(label, control, table.rows)}
        missing = sorted(needed - set(names))
        if missing:
            raise ValueError(
                f"perturbation_features has no row for {len(missing)} perturbations of the data: {missing[:10]}. Add "
                "rows for them, or drop their cells. (ST without perturbation_features learns one-hot vectors.)"
            )
        return table

    @property
    def n_dims(self) -> int:
        """Width of a vector."""
        return self.vectors.shape[1]

    def parts(self, label: str) -> list[str]:
        """Rows that add up to a perturbation; its own where there is one, and the control's where it has one."""
        return [label] if label in self.rows else self.rows.parts(label)

    def encode(self, labels: Sequence[str]) -> Tensor:
        """Return the vectors of labels, (n, n_dims).

        Raises
        ------
        KeyError
            For a perturbation without a vector.
        """
        out = torch.zeros(len(labels), self.n_dims)
        for i, label in enumerate(labels):
            for part in self.parts(label):
                if part not in self.rows:
                    raise self._unknown(label)
                out[i] += self.vectors[self.rows.code[part]]
        return out

    def check(self, label: str) -> None:
        """Raise a KeyError for a perturbation without a vector, or, of one-hot ones, seen only within combinations."""
        self.encode([label])
        if self.has_features or label in self.learned:
            return
        for part in self.parts(label):
            if part not in self.learned:
                pairs = [s for s in self.seen if part in parts(s, self.control)]
                raise unknown_name(
                    "perturbation",
                    label,
                    self.seen,
                    f"{part!r} was trained on only in combination, {', '.join(map(repr, pairs[:3]))}, which does not "
                    "tell what it does alone; perturbation_features= would.",
                )

    def _unknown(self, label: str) -> KeyError:
        drugs = {n: known[0].casefold() for n in self.names if (known := of_tahoe(n)) is not None}
        wanted = (of_tahoe(label) or (label, None))[0].casefold()
        here = sorted(set(drugs.values()))
        close = [wanted] if wanted in here else difflib.get_close_matches(wanted, here, n=2)
        if drugs:
            remedy = "Names hold drug and dose: `model.perturbation_name(drug=..., dose=...)` finds them."
        elif self.has_features:
            remedy = "It has no row in the feature table that this model was trained with."
        else:
            remedy = (
                "A one-hot model predicts only what it was trained on; to reach unseen perturbations "
                "train with perturbation_features= (for instance a table of gene embeddings)."
            )
        if (combined := looks_combined(label, self.rows)) is not None:
            remedy = (
                f"Its parts are known: the combination is written {'+'.join(sorted(combined[1]))!r}. (Other separators "
                "than a plus are stated at fitting, combination_separator=.)"
            )
        if close:
            same_drug = [n for drug in close for n, d in drugs.items() if d == drug]
            which = "that drug" if close == [wanted] else "drugs of such a name"
            remedy = f"Of {which} it has {', '.join(map(repr, same_drug[:5]))}. {remedy}"
        return unknown_name("perturbation", label, self.names, remedy)
