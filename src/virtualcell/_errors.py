"""Errors that say which argument was wrong, what would have been right, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnknownNameError(KeyError):
    """A gene, perturbation, context or key that is not there. A `KeyError` whose message prints as written."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown_name(argument: str, value: object, valid: Iterable[object], remedy: str = "") -> UnknownNameError:
    """Build the error for `argument=value` where only `valid` names exist; the closest ones are shown first."""
    names = [str(v) for v in valid]
    folded = {n.casefold(): n for n in names}
    close = [folded[c] for c in difflib.get_close_matches(str(value).casefold(), folded, n=5, cutoff=0.6)]
    if close:
        shown = f"Did you mean {', '.join(map(repr, close))}?"
    elif names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        shown = f"Known: {', '.join(map(repr, names[:8]))}{more}."
    else:
        shown = "There are none."
    return UnknownNameError(f"{argument}={value!r} is unknown. {shown} {remedy}".strip())
