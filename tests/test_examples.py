"""Every public function and class has an example, and the examples do what they say."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

import virtualcell as vc

DOWNLOADED = ("datasets.kang2018", "datasets.norman2019_mcfaline2024")
MODULES = ("datasets", "io", "metrics", "models", "pl", "pp", "tl")
NAMES = [f"{module}.{name}" for module in MODULES for name in getattr(vc, module).__all__]
DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}


def public(name: str) -> object:
    module, name = name.split(".")
    return getattr(getattr(vc, module), name)


def needs_no_example(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """What examples start from: a small screen, models fitted to it, and a prediction."""
    sizes = {"n_contexts": 3, "n_perturbations": 5, "n_genes": 60, "n_cells_per_group": 20, "n_control_cells": 40}
    adata = vc.datasets.synthetic(**sizes, effect_size=0.6, seed=0)
    fitted = adata.copy()
    name = sorted(set(adata.obs["target_gene"]) - {"non-targeting"})[0]
    with vc.settings.override(progress=False):
        st = vc.tl.fit_state(
            fitted, **DESIGN, se={"max_steps": 2}, validate=False, training={"max_steps": 5, "progress_bar": False}
        )
        predicted = vc.tl.predict_perturbation(fitted, st.table.names, context="type_3")
    return SimpleNamespace(adata=adata, fitted=fitted, st=st, se=st.se, predicted=predicted, name=name)


@pytest.fixture
def namespace(made: SimpleNamespace) -> dict[str, object]:
    """The names that examples may use without saying where they come from."""
    adata = made.adata.copy()
    logged = adata.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    names = {"vc": vc, "np": np, "pd": pd, "plt": plt, "sc": sc, "design": DESIGN}
    names |= {"adata": adata, "logged": logged, "other": adata.copy(), "fitted": made.fitted.copy()}
    return names | {"st": made.st, "se": made.se, "predicted": made.predicted.copy(), "name": made.name}


@pytest.mark.parametrize("name", NAMES)
def test_there_is_an_example(name: str) -> None:
    thing = public(name)
    assert needs_no_example(thing) or ">>> " in inspect.getdoc(thing), f"vc.{name} has no section Examples"


@pytest.mark.parametrize("name", [name for name in NAMES if ">>> " in (inspect.getdoc(public(name)) or "")])
def test_the_example_runs(
    name: str,
    namespace: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in DOWNLOADED:
        monkeypatch.setattr(vc.settings, "cache_dir", request.getfixturevalue("originals"))
    said: list[str] = []
    with mpl.rc_context({"backend": "agg"}), vc.settings.override(progress=False, verbosity="error"):
        test = doctest.DocTestParser().get_doctest(inspect.getdoc(public(name)), namespace, name, None, 0)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        result = doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    plt.close("all")
    assert result.failed == 0, "".join(said)


def documented(thing: object) -> set[str]:
    """The names that stand under "Parameters" of a docstring."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=\n\w+\n-{3,}|\Z)", inspect.getdoc(thing), flags=re.M | re.S)
    heads = re.findall(r"^(\S.*)$", section[1], flags=re.M) if section else []
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


@pytest.mark.parametrize("name", [name for name in NAMES if not needs_no_example(public(name))])
def test_every_parameter_is_documented(name: str) -> None:
    thing = public(name)
    owners = thing.__mro__[:-1] if inspect.isclass(thing) else [thing]  # options have those of the class they extend
    named = set().union(*(documented(owner) for owner in owners if owner.__module__.startswith("virtualcell")))
    stated = set(inspect.signature(thing).parameters) - {"self"}
    assert stated - named == set(), f"vc.{name}"
    assert documented(thing) - stated == set(), f"vc.{name}"
