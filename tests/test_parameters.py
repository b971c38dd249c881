"""Every parameter of every public call has an entry of its own in the docstring, and every entry is of a parameter."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator

import pytest

import virtualcell as vc

MODULES = ("datasets", "io", "metrics", "models", "pl", "pp", "tl")


def public_calls() -> Iterator[tuple[str, Callable]]:
    """Public functions and classes, and the public methods that are defined by us."""
    for module in MODULES:
        for name in getattr(vc, module).__all__:
            thing = getattr(getattr(vc, module), name)
            if inspect.isclass(thing) and issubclass(thing, BaseException):
                continue
            if callable(thing):
                yield f"{module}.{name}", thing
            if not inspect.isclass(thing):
                continue
            for method in dir(thing):
                of_class = getattr(thing, method)
                ours = str(getattr(of_class, "__module__", "")).startswith("virtualcell.")
                if not method.startswith("_") and inspect.isroutine(of_class) and ours:
                    yield f"{module}.{name}.{method}", of_class


CALLS = dict(public_calls())


def entries(call: Callable) -> list[str]:
    """Lines that begin an entry of the section "Parameters"."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)", inspect.getdoc(call) or "", re.M | re.S)
    return [] if section is None else [line for line in section[1].splitlines() if line and not line.startswith(" ")]


def of_bases(call: Callable) -> set[str]:
    """Options that a class inherits are described where they are defined."""
    return {entry for base in getattr(call, "__mro__", ())[1:] for entry in entries(base)}


@pytest.mark.parametrize("name", CALLS)
def test_each_parameter_has_an_entry_of_its_own(name: str) -> None:
    documented = [entry.removeprefix("**").removeprefix("*") for entry in entries(CALLS[name])]
    together = [entry for entry in documented if "," in entry]
    assert not together, "one entry for each parameter"
    taken = [p for p in inspect.signature(CALLS[name]).parameters if p not in ("self", "cls")]
    assert set(documented) <= set(taken)
    assert len(set(documented)) == len(documented)
    if documented:  # a method that does what its base class says has no entries
        assert set(taken) == set(documented) | of_bases(CALLS[name])


def test_arguments_of_a_design_are_spelled_out_in_signatures() -> None:
    taken = inspect.signature(vc.tl.predict_perturbation).parameters
    assert taken["dose_key"].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    with pytest.raises(TypeError, match=r"^screen\(\) got an unexpected keyword argument 'contexts'$"):
        vc.tl.screen(None, contexts="type_1")
