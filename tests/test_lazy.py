"""Importing the package costs next to nothing, and hides nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import virtualcell as vc

HEAVY = ["anndata", "lightning", "matplotlib", "numba", "pandas", "scanpy", "scvi", "sklearn", "torch"]
LAZY = ["datasets", "io", "metrics", "models", "pl", "pp", "tl"]


def imported(code: str) -> set[str]:
    """Heavy packages that a fresh process holds after some code."""
    program = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert imported("import virtualcell as vc; vc.tl; vc.pl; vc.pp; vc.models; vc.metrics; vc.io; vc.datasets") == set()


def test_a_function_loads_what_it_needs_and_no_more() -> None:
    loaded = imported("import virtualcell as vc; vc.pp.split")
    assert "anndata" in loaded
    assert not loaded & {"lightning", "scanpy", "scvi", "torch"}


@pytest.mark.parametrize("name", LAZY)
def test_all_names_resolve_to_their_own_objects(name: str) -> None:
    package = getattr(vc, name)
    assert {n for n in dir(package) if not n.startswith("__")} == set(package.__all__)
    for public in package.__all__:
        found = getattr(package, public)
        assert found.__name__ == public
        assert found is getattr(package, public)
        assert found is getattr(import_module(found.__module__), public)


@pytest.mark.parametrize("name", LAZY)
def test_what_type_checkers_see_is_what_is_public(name: str) -> None:
    package = getattr(vc, name)
    block = next(b for b in ast.parse(Path(package.__file__).read_text()).body if isinstance(b, ast.If))
    assert sorted(alias.name for line in block.body for alias in line.names) == sorted(package.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'virtualcell.tl' has no attribute 'fit_stat'"):
        vc.tl.fit_stat  # noqa: B018
    assert not hasattr(vc, "fit_state")
