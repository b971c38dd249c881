"""The arguments by which calls take a design that was stated before: their types and descriptions, once for all calls.

Whoever keeps a design in a dictionary passes all of it to every call, whichever columns the call has a use for.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypedDict, TypeVar, get_type_hints

from virtualcell.data._design import AS_NOTED, Scale

P = ParamSpec("P")
R = TypeVar("R")


class LabelArguments(TypedDict, total=False):
    """What a design may state of labels, of which any part may be left out."""

    perturbation_key: str | None
    control: str | Sequence[str] | None
    context_key: str | None
    batch_key: str | None
    combination_separator: str | None
    dose_key: str | None


class DesignArguments(LabelArguments, total=False):
    """What a design may state of labels and expression."""

    layer: str | None
    scale: Scale | None
    library_size_key: str | None


_DESCRIPTIONS = {
    "perturbation_key": "Column of `obs` with the perturbation of each cell.",
    "control": "Label of unperturbed cells in that column, or several.",
    "context_key": "Column of `obs` with the context: cell type, cell line.",
    "batch_key": "Column of `obs` with the experimental batch.",
    "combination_separator": (
        'What stands between the parts of a combination, such as "+"; `None` where every label is one perturbation.'
    ),
    "dose_key": (
        "Column of `obs` with the dose of the drug that `perturbation_key` names, a number that is read to six digits; "
        "what control cells have there is not read."
    ),
    "layer": "Layer with the expression; `X` where it is in none.",
    "scale": 'Whether the expression is "counts" (raw) or "log1p" (of counts per 10,000).',
    "library_size_key": "Column of `obs` with the library size, where sums over the genes that are there are smaller.",
    "gene_key": "Column of `var` with the names of genes that perturbations go by, where these are not `var_names`.",
    "modality": "Modality of a MuData that holds gene expression.",
}
_LEFT_OUT = " It and the rest of the design may be left out: {clause}."


def takes_design(
    where_left_out: str, arguments: type[LabelArguments] = DesignArguments
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Spell out the arguments of a design in the signature and the docstring of a function.

    The function takes them as `**stated`, and has an entry of that name among its parameters, in the place of which the
    descriptions come. Those that its docstring describes itself keep what it says.

    Parameters
    ----------
    where_left_out
        What a design is where it was not stated, as a clause.
    arguments
        Which arguments these are, as the function has them as the type of `**stated`.
    """
    types = get_type_hints(arguments)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        before = inspect.signature(function)
        own = [p for p in before.parameters.values() if p.kind is not p.VAR_KEYWORD]
        spelled = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=AS_NOTED if name == "combination_separator" else None,
                annotation=annotation,
            )
            for name, annotation in types.items()
        ]
        signature = before.replace(parameters=[*own, *spelled])

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in signature.parameters:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != "stated"} | types
        call.__doc__ = _documented(function.__doc__, types, where_left_out)
        return call

    return decorate


def describes_design(function: Callable[P, R]) -> Callable[P, R]:
    """Describe one by one, in the docstring of a function, the arguments of a design that it lists together."""
    if function.__doc__ is not None:
        lines = inspect.cleandoc(function.__doc__).splitlines()
        for group in [line for line in lines if "," in line and set(line.split(", ")) <= set(_DESCRIPTIONS)]:
            at = lines.index(group)
            _cut(lines, group)
            lines[at:at] = [line for name in group.split(", ") for line in _entry(name, _DESCRIPTIONS[name])]
        function.__doc__ = "\n".join(lines)
    return function


def _documented(doc: str | None, names: Iterable[str], where_left_out: str) -> str | None:
    """Put the descriptions in the place of the entry `**stated`, with those of the docstring itself among them."""
    if doc is None:  # of Python without docstrings
        return None
    lines, entries = inspect.cleandoc(doc).splitlines(), []
    for name in names:
        text = _DESCRIPTIONS[name] + (_LEFT_OUT.format(clause=where_left_out) if not entries else "")
        entries += _cut(lines, name) or _entry(name, text)
    at = lines.index("**stated")
    _cut(lines, "**stated")
    return "\n".join([*lines[:at], *entries, *lines[at:]])


def _entry(name: str, text: str) -> list[str]:
    return [name, *textwrap.wrap(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 4)]


def _cut(lines: list[str], name: str) -> list[str]:
    """Take the entry of a parameter out of the lines of a docstring; it has none where the name is no line."""
    if name not in lines:
        return []
    start = lines.index(name)
    stop = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    entry = lines[start:stop]
    del lines[start:stop]
    return entry
