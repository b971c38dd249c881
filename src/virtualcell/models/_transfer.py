"""Effects that other experiments measured, put onto one's own control cells without any training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import unknown_name
from virtualcell._keys import AGREEMENT
from virtualcell._state import State
from virtualcell.data._design import Design, Scale
from virtualcell.data._design_arguments import describes_design
from virtualcell.data._screen import Screen
from virtualcell.models._baselines import Baseline
from virtualcell.models._common import training_screen
from virtualcell.models._effects import Effects
from virtualcell.models._fitted_on import FittedOn
from virtualcell.models._setup import registry_without_cells
from virtualcell.models._start import Start
from virtualcell.models._transfer_fit import (
    agreements,
    checked_features,
    choose_k,
    combine,
    in_one_unit,
    mean_cosine,
    nearest,
    neighbours_mean,
    parts_of,
    report_coverage,
)
from virtualcell.models._transfer_slopes import choose_slopes, folds_of
from virtualcell.models._transfer_sources import (
    OWN,
    SourceEffects,
    Sources,
    checked_weights,
    measure_each,
    named_sources,
)

logger = logging.getLogger(__name__)


class Transfer(Baseline):
    """Add to control cells the effect that a perturbation had in other experiments, scaled by what carries over.

    Each source (and one's own training cells, where there are any) is centred on its mean over the other perturbations,
    context by context, shrunken where its errors are known, and averaged over its contexts, then over sources, gene by
    gene over those that have the gene. The prediction is

    ``a * effect + b * smooth + c * neighbours + d * mean``

    with the centred effect, the part of it on the leading principal axes of all effects (less noisy), the mean centred
    effect of the perturbations with the most similar features, and the mean effect over the other perturbations. The
    slopes lie in [0, 1] and are fitted by least squares on experiments left out: one's
    own training cells, or each source in turn, or the contexts of a single source. Where nothing can be left out, they
    are a = .2, d = 1 and b = c = 0, and a warning says so: between experiments .1 to .5 is usual, and copies of effects
    as they are would be far too large.

    A perturbation that no source has is predicted from its neighbours, with a slope of its own; one without features
    has no effect, with a warning.

    Parameters
    ----------
    data
        Data registered with `setup_anndata` or `setup_mudata`, or a screen, whose training cells are a source too. With
        none of one's own, use :meth:`fit`.
    sources
        Other experiments, by name or in a list: :class:`virtualcell.models.TransferSource`, or dictionaries of its
        fields.
    perturbation_features
        One row of features per perturbation, for neighbours; measured perturbations without a row are none.
    weights
        Weights of the sources beside each other by name (those of a list are "source 1", "source 2", ...; one's own
        "own data"), 1 for those left out.
    slope
        Factor of centred effects, from 0 to 1, in place of the fitted one. Between experiments, .1 to .5 is usual.
    registry
        What a saved model knows of its data.

    Examples
    --------
    >>> sources = {"other": {"adata": other, "perturbation_key": "target_gene", "control": "non-targeting"}}
    >>> transfer = vc.models.Transfer.fit(
    ...     sources,
    ...     genes=adata.var_names,
    ...     perturbation_key="target_gene",
    ...     control="non-targeting",
    ...     scale="counts",
    ...     slope=0.3,
    ... )
    >>> predicted = vc.tl.predict_perturbation(adata, name, model=transfer)
    """

    def __init__(
        self,
        data: AnnData | MuData | Screen | None = None,
        sources: Sources | None = None,
        perturbation_features: pd.DataFrame | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        slope: float | None = None,
        registry: dict | None = None,
    ) -> None:
        super().__init__(data, registry=registry)
        self.sources = named_sources(sources or {})
        self.weights = checked_weights(weights or {}, [*self.sources, OWN])
        if slope is not None and not 0 <= slope <= 1:
            raise ValueError(f"slope={slope!r} must be from 0 to 1, or None to have it fitted.")
        self.slope = slope
        self.feature_names: list[str] = []
        self._features = None
        if perturbation_features is not None:
            self._features = checked_features(self.design.named(perturbation_features))
        self._row_of: dict[str, int] = {}
        self._warned: set[str] = set()

    @classmethod
    @describes_design
    def fit(
        cls,
        sources: Sources,
        *,
        genes: Sequence[str] | None = None,
        perturbation_features: pd.DataFrame | None = None,
        weights: Mapping[str, float] | None = None,
        slope: float | None = None,
        perturbation_key: str = "perturbation",
        control: str = "control",
        context_key: str | None = None,
        layer: str | None = None,
        scale: Scale = "log1p",
        library_size_key: str | None = None,
    ) -> Self:
        """Learn from sources alone, to predict on any control cells.

        Parameters
        ----------
        sources
            Other experiments, as in :class:`Transfer`.
        perturbation_features
            Features per perturbation, as in :class:`Transfer`.
        weights
            How much each source counts, as in :class:`Transfer`.
        slope
            How much of an effect carries over, as in :class:`Transfer`.
        genes
            Genes to predict, `adata.var_names` of one's own cells; by default all that any source has.
        perturbation_key, control, context_key, layer, scale, library_size_key
            The design of the cells to predict on; :func:`virtualcell.tl.predict_perturbation` can be told another.

        Raises
        ------
        ValueError
            If there is no source.
        """
        found = named_sources(sources)
        if not found:
            raise ValueError("sources=[] names no experiment to take effects from: give at least one.")
        if genes is None:
            genes = sorted({g for source in found.values() for g in source.genes})
        design = Design(
            perturbation_key=perturbation_key,
            control=control,
            context_key=context_key,
            layer=layer,
            scale=scale,
            library_size_key=library_size_key,
        )
        registry = registry_without_cells(cls.__name__, design, genes)
        model = cls(None, found, perturbation_features, weights=weights, slope=slope, registry=registry)
        model._learn(None)
        return model

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, effects: Effects | None = None) -> None:
        """Learn from the sources, and from the cells that are not "test" of one's own data.

        Parameters
        ----------
        effects
            Measured effects of one's own data, where these are known already. No cell is read then, and `fitted_on`
            does not tell of any.
        """
        self.fitted_on = None
        if effects is None:
            screen = training_screen(self)
            self.fitted_on = FittedOn.of(screen)
            effects = Effects.measure(screen, screen.split != "test")
        if effects.effects.shape[1] != len(self.genes):
            n = effects.effects.shape[1]
            raise ValueError(f"effects= has {n} genes, this model {len(self.genes)}. Measure them on the same genes.")
        if not effects.perturbations and not self.sources:
            raise ValueError(
                f"the training cells hold no perturbation, only {self.control!r}, and there are no sources."
            )
        self._fit(effects)

    def _fit(self, effects: Effects) -> dict[str, np.ndarray]:
        own = SourceEffects.of(effects, self.genes) if effects.perturbations else None
        return self._learn(own)

    def _learn(self, own: SourceEffects | None) -> dict[str, np.ndarray]:
        """Learn from the sources and one's own effects, and return what is remembered."""
        genes = sorted(self.genes)  # sums over genes then come out the same in whatever order they are given
        contexts = [] if own is None else sorted({str(c) for c in own.context})
        tables = measure_each({n: source for n, source in self.sources.items() if self._weight(n) > 0}, genes)
        if own is not None and self._weight(OWN) > 0:
            tables[OWN] = own.select(genes)
        if not tables:
            raise ValueError(f"weights={self.weights!r}: at least one source needs a weight above 0.")
        known = sorted({str(p) for table in tables.values() for p in table.perturbation})
        contexts_of = {name: parts_of(table, known, genes) for name, table in tables.items()}
        other = [name for name, source in self.sources.items() if source.unit == "other" and name in tables]
        units = in_one_unit({name: combine(list(parts.values())) for name, parts in contexts_of.items()}, other)
        weights = [self._weight(name) for name in units]
        whole = combine(list(units.values()), weights)
        several = units if len(units) > 1 else next(iter(contexts_of.values()))
        features = self._features_of(known)
        k = choose_k(features[has], whole.effects[has]) if (has := features.any(axis=1)).any() else 1
        if folds := folds_of(units, weights, OWN) if OWN in units else []:
            left_out = "one's own data left out"
        elif folds := folds_of(units, weights):
            left_out = "sources left out"
        else:
            folds = [fold for parts in contexts_of.values() for fold in folds_of(parts, [1.0] * len(parts))]
            left_out = "contexts left out" if folds else "nothing that could be left out"
        found = choose_slopes(folds, whole, features, k, stated=self.slope)
        agree = agreements(list(several.values()), len(known))
        place = pd.Index(genes).get_indexer(pd.Index(self.genes))
        arrays = {"effects": whole.effects[:, place], "carried": found.carried(whole.effects)[:, place]}
        arrays |= {"mean": np.nan_to_num(whole.mean[place]), "share": whole.share, "agreement": agree}
        arrays |= {"k": np.array(k)} | found.arrays()
        if self._features is not None:
            arrays["features"] = self._features.to_numpy(np.float32)
        self._remember(known, contexts, arrays)
        self._set_features([] if self._features is None else list(self._features.index))
        report_coverage(tables, arrays, len(genes))
        found.report(k if self.feature_names else None, left_out)
        self.is_trained_ = True
        return self.arrays

    def _weight(self, source: str) -> float:
        return self.weights.get(source, 1.0)

    def _features_of(self, known: Sequence[str]) -> np.ndarray:
        """Features of the known perturbations, zeros where there are none."""
        if self._features is None:
            return np.zeros((len(known), 1), np.float32)
        return self._features.reindex(list(known)).fillna(0).to_numpy(np.float32)

    # -- prediction ---------------------------------------------------------------------------------------------------

    def effects(self, perturbations: Sequence[str]) -> pd.DataFrame:
        """Return the effects that are added to control cells, perturbations x genes.

        Any perturbations can be asked for; the effect of the control is 0.
        """
        self._check_if_trained(warn=False)
        zero = np.zeros(len(self.genes))
        found = [zero if p == self.control else self._effect(p, -1, zero) for p in perturbations]
        return pd.DataFrame(found, index=list(perturbations), columns=self.genes)

    def _effect(self, perturbation: str, context: int, base: np.ndarray) -> np.ndarray:
        return np.sum([self._effect_of(part) for part in self._names(perturbation)], axis=0)

    def _effect_of(self, name: str) -> np.ndarray:
        slope, neighbours = self.arrays["slope_of_mean"], self.arrays["slope_of_neighbours"]
        mean = slope * self.arrays["mean"]
        if (code := self.lookup.code.get(name)) is not None:
            own = np.nan_to_num(self.arrays["effects"][code])
            # the mean of the others: that over all has a share of this one
            mean = mean - slope * self.arrays["share"][code] * own * (self.arrays["mean"] != 0)
            out = np.nan_to_num(self.arrays["carried"][code]) + mean
            return out + neighbours * self._of_neighbours(name) if neighbours and name in self._row_of else out
        if name in self._row_of:
            return self.arrays["slope_of_unmeasured"] * self._of_neighbours(name) + mean
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("Transfer: %r is in no source and has no features: it is predicted to do nothing.", name)
        return np.zeros(len(self.genes))

    def _names(self, perturbation: str) -> list[str]:
        return self.lookup.parts(perturbation)

    def _neighbours(self, name: str) -> np.ndarray:
        """Numbers of the measured perturbations whose features are the most similar."""
        own, k = self.lookup.code.get(name, -1), int(self.arrays["k"])
        query = self.arrays["features"][[self._row_of[name]]]
        found = self._featured[nearest(query, self._theirs, k + 1)[0]]
        return found[found != own][:k]

    def _of_neighbours(self, name: str) -> np.ndarray:
        return neighbours_mean(self.arrays["effects"], [self._neighbours(name)])[0]

    @property
    def featured_names(self) -> list[str]:
        """Names of all perturbations that there are features of."""
        return self.feature_names

    def measured(self, perturbation: str) -> bool:
        """Whether a source has a perturbation, or all parts of a combination."""
        names = self._names(perturbation)
        return bool(names) and all(name in self.lookup for name in names)

    def agreement(self, perturbation: str) -> float:
        """Tell how well the sources agree on a perturbation: the mean cosine between their centred effects.

        Where one source alone has it, its contexts are compared if it is the only source, and otherwise its effect with
        the mean of its neighbours; for a perturbation that was never measured, its neighbours with each other. Of a
        combination that was not measured it is the mean over the parts. NaN where there is nothing to compare.
        """
        self._check_if_trained(warn=False)
        values = [self._agreement_on(name) for name in self._names(perturbation)]
        return float(np.mean(values)) if values else float("nan")

    def _agreement_on(self, name: str) -> float:
        code = self.lookup.code.get(name)
        if code is not None and not np.isnan(found := self.arrays["agreement"][code]):
            return float(found)
        if name not in self._row_of:
            return float("nan")
        effects = self.arrays["effects"]
        if code is None:
            return mean_cosine(np.nan_to_num(effects[self._neighbours(name)]))
        return mean_cosine(np.stack([effects[code], self._of_neighbours(name)]))

    def trust(self, start: Start, perturbation: str) -> dict[str, float]:
        """Return how far the sources agree, see :meth:`agreement`."""
        return {AGREEMENT: self.agreement(perturbation)}

    def on_genes(self, genes: Sequence[str]) -> Self:
        """Return the same model for other genes, by name; those that no source has stay as they are in the controls.

        Parameters
        ----------
        genes
            Genes to predict, such as `adata.var_names` of one's own cells.
        """
        self._check_if_trained(warn=False)
        if list(genes) == self.genes:
            return self
        place = pd.Index(self.genes).get_indexer(pd.Index(genes))
        if (place < 0).all():
            raise unknown_name("genes", next(iter(genes)), self.genes, "None of these genes is in any source.")
        logger.info("Transfer: %d of %d genes are in the sources.", int((place >= 0).sum()), len(place))
        state = self.state()
        values = {name: self.arrays[name][..., place] for name in ("effects", "carried", "mean")}
        for table in values.values():
            table[..., place < 0] = np.nan
        values["mean"] = np.nan_to_num(values["mean"])
        state.tensors |= {name: torch.as_tensor(np.ascontiguousarray(v)) for name, v in values.items()}
        registry = copy.deepcopy(state.meta["registry"])
        registry["field_registries"]["X"]["state_registry"]["column_names"] = [str(g) for g in genes]
        state.meta["registry"] = registry
        if set(genes) != set(self.genes):
            state.meta["fitted_on"] = None  # its sums are over genes, and cells with others cannot be compared
        return type(self).from_state(state)

    # -- files --------------------------------------------------------------------------------------------------------

    def _set_features(self, names: Sequence[str]) -> None:
        self.feature_names = list(names)
        self._row_of = {name: i for i, name in enumerate(self.feature_names)}
        # measured perturbations that have features, and these: looked up once, as a screen asks for thousands of names
        self._featured = np.array([i for i, name in enumerate(self.known) if name in self._row_of], dtype=int)
        rows = [self._row_of[self.known[i]] for i in self._featured]
        self._theirs = self.arrays["features"][rows] if rows else np.empty((0, 0), np.float32)

    def forget_data(self) -> None:
        """Drop the training data and the sources; what was learned of them stays."""
        self.sources, self._features = {}, None
        super().forget_data()

    def state(self) -> State:
        """Return what is to be saved."""
        state = super().state()
        state.meta["feature_names"] = self.feature_names
        return state

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Build the model that :meth:`state` described."""
        model = super().from_state(state)
        model._set_features(state.meta["feature_names"])
        return model
