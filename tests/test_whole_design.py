"""A design is stated once and passed to every call, whichever of its columns the call has a use for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from anndata import AnnData

import virtualcell as vc

matplotlib.use("Agg")

DESIGN = {
    "perturbation_key": "target_gene",
    "control": "non-targeting",
    "context_key": "cell_type",
    "batch_key": "lane",
    "combination_separator": "&",
    "dose_key": "dose",
    "library_size_key": "depth",
}
QUICK = {
    "se": False,
    "validate": False,
    "network": {"n_hidden": 16, "n_feedforward": 32, "n_layers": 1, "set_size": 8},
    "training": {"max_steps": 2, "progress_bar": False},
}


@pytest.fixture(scope="module")
def cells() -> AnnData:
    adata = vc.datasets.synthetic(
        n_contexts=3, n_perturbations=4, n_genes=80, n_cells_per_group=12, n_control_cells=24, effect_size=0.5, seed=2
    )
    adata.obs["lane"] = ["one", "two"] * (adata.n_obs // 2)
    adata.obs["dose"] = 1.0
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel().astype(int)
    others = adata.var_names.difference(adata.obs["target_gene"])
    return adata[:, adata.var_names.difference(others[:20])].copy()  # a panel: row sums are not depths


@pytest.fixture(scope="module")
def fitted(cells) -> tuple[AnnData, AnnData]:
    adata = cells.copy()
    vc.pp.split(adata, **DESIGN, holdout={"contexts": ["type_3"]})
    vc.tl.fit_state(adata, **DESIGN, split_key="split", **QUICK)
    targets = sorted(set(adata.obs["target_gene"]) - {DESIGN["control"]})
    return adata, vc.tl.predict_perturbation(adata, [f"{target}_1.0" for target in targets[:2]], context="type_3")


def calls(design: dict[str, str] = DESIGN) -> dict[str, Callable[[AnnData, AnnData, Path], object]]:
    """Every call that takes columns of a design, on measured and predicted cells."""

    def one(predicted: AnnData) -> str:
        return gene(predicted) + "_1.0"

    def gene(predicted: AnnData) -> str:
        return sorted(predicted.obs["target_gene"].unique())[0]

    return {
        "pp.split": lambda a, p, _: vc.pp.split(a, **design, holdout={"contexts": ["type_3"]}),
        "pp.knockdown_efficiency": lambda a, p, _: vc.pp.knockdown_efficiency(a, **design),
        "pp.expression_gene_embeddings": lambda a, p, _: vc.pp.expression_gene_embeddings(a, **design),
        "tl.fit_state": lambda a, p, _: vc.tl.fit_state(a, **design, **QUICK),
        "tl.predict_perturbation": lambda a, p, _: vc.tl.predict_perturbation(a, one(p), **design),
        "tl.evaluate": lambda a, p, _: vc.tl.evaluate(p, a, **design, scale="counts", suite=["mae"], genes=p.var_names),
        "tl.benchmark": lambda a, p, _: vc.tl.benchmark(
            a, ["NoChange"], **design, splits={"new": {"contexts": ["type_3"]}}, suite=["mae"], seeds=(0,)
        ),
        "tl.screen": lambda a, p, _: vc.tl.screen(a, context="type_3", **design),
        "tl.effects": lambda a, p, _: vc.tl.effects(a, context="type_3", **design),
        "tl.prepare_submission": lambda a, p, folder: vc.tl.prepare_submission(
            p,
            folder / "a.vcc",
            **design,
            year=2026,
            genes=list(p.var_names),
            contexts=["type_3"],
            n_cells=24,
            perturbations=[f"{target}_1.0" for target in p.obs["target_gene"].unique()],
        ),
        "pl.split": lambda a, p, _: vc.pl.split(a, **design),
        "pl.perturbation_shift": lambda a, p, _: vc.pl.perturbation_shift(p, a, perturbation=one(p), **design),
        "pl.de_agreement": lambda a, p, _: vc.pl.de_agreement(p, a, perturbation=one(p), **design),
        "pl.de_volcano": lambda a, p, _: vc.pl.de_volcano(a, perturbation=one(p), **design),
        "pl.target_expression": lambda a, p, _: vc.pl.target_expression(a, perturbation=one(p), gene=gene(p), **design),
    }


def with_columns() -> dict[str, set[str]]:
    """Public calls on data that take some column of a design, and what they lack of the whole."""
    found = {}
    for name in ("pp", "tl", "pl"):
        module = getattr(vc, name)
        for call in filter(inspect.isfunction, (getattr(module, n) for n in module.__all__)):
            taken = set(inspect.signature(call).parameters)
            if taken & set(DESIGN):
                found[f"{name}.{call.__name__}"] = set(DESIGN) - taken
    return found


def test_what_takes_a_column_of_a_design_takes_all() -> None:
    lacking = {name: sorted(missing) for name, missing in with_columns().items() if missing}
    assert not lacking, f"`**design` must fit; check what has no use with `require_columns` and note it: {lacking}"
    assert set(calls()) <= set(with_columns())


@pytest.mark.parametrize("name", calls())
def test_whole_design_is_taken_and_noted_by_calls_that_write(fitted, name: str, tmp_path: Path) -> None:
    adata, predicted = fitted[0].copy(), fitted[1].copy()
    del adata.uns["virtualcell"]["design"]
    calls()[name](adata, predicted, tmp_path)
    noted = adata.uns["virtualcell"].get("design", {})
    writes = name[:2] == "pp" or name in ("tl.fit_state", "tl.evaluate")
    assert {k: v for k, v in noted.items() if k in DESIGN} == (DESIGN if writes else {})


@pytest.mark.parametrize(
    "name", [name for name in calls() if name[:2] in ("pp", "pl") or name in ("tl.fit_state", "tl.evaluate")]
)
def test_a_wrong_control_is_not_noted(fitted, name: str, tmp_path: Path) -> None:
    adata, predicted = fitted[0].copy(), fitted[1].copy()
    del adata.uns["virtualcell"]["design"]
    call = calls({**DESIGN, "control": "non_targeting"})[name]
    draws_without_controls = name == "pl.split"
    with nullcontext() if draws_without_controls else pytest.raises(KeyError, match="'non_targeting'"):
        call(adata, predicted, tmp_path)
    assert "control" not in adata.uns["virtualcell"].get("design", {})


def test_a_picture_takes_columns_of_the_prediction_whatever_else_was_noted(fitted) -> None:
    adata, predicted = fitted[0].copy(), fitted[1]
    adata.uns["virtualcell"]["design"] = {"batch_key": "lane"}
    ax = vc.pl.de_agreement(predicted, adata, layer=None, scale="counts")
    assert "2 perturbations" in ax.get_title() or ", " in ax.get_title()


@pytest.mark.parametrize("call", [vc.tl.evaluate, vc.pl.perturbation_shift, vc.pl.de_agreement])
def test_measured_cells_that_are_given_first_are_told_from_predicted_ones(fitted, call: Callable) -> None:
    adata, predicted = fitted
    with pytest.raises(ValueError, match="predicted cells come first, measured ones second"):
        call(adata, predicted)


def test_a_column_without_use_must_be_there_all_the_same(cells) -> None:
    with pytest.raises(KeyError, match="batch_key='lanes'"):
        vc.pp.split(cells.copy(), **{**DESIGN, "batch_key": "lanes"}, holdout={"contexts": ["type_3"]})


def test_library_sizes_divide_control_cells_of_a_submission(fitted, tmp_path: Path) -> None:
    adata, predicted = fitted
    controls = adata[adata.obs["target_gene"] == "non-targeting"].copy()
    controls.uns.clear()
    arguments = {**DESIGN, "year": 2025, "genes": list(predicted.var_names), "controls": controls}
    written = vc.tl.prepare_submission(predicted, tmp_path / "a.vcc", controls_scale="counts", **arguments)
    first = written[-controls.n_obs].X.toarray().ravel()
    counts = controls[0, written.var_names].X.toarray().ravel()
    assert first == pytest.approx(np.log1p(1e4 * counts / controls.obs["depth"].iloc[0]), rel=1e-5)
