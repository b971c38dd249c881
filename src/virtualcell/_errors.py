"""Errors that say which argument was wrong, what would have been right, and what to do."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class UnknownNameError(KeyError):
    """A gene, perturbation, context or key that is not there. A `KeyError` whose message prints as written."""

    def __str__(self) -> str:
        return str(self.args[0])


def as_it_looks(name: str) -> str:
    """Return a name in the one form that Unicode has for what it looks like, without what does not show.

    "ô" is one character or two, a micro sign is the letter mu, and some spaces have no width.
    """
    if name.isascii():
        return name.strip()
    shown = unicodedata.normalize("NFC", "".join(c for c in name if unicodedata.category(c) != "Cf"))
    # what stands high, low or in a circle looks different
    return "".join(c if _is_set_apart(c) else unicodedata.normalize("NFKC", c) for c in shown).strip()


def _is_set_apart(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<super>", "<sub>", "<fraction>", "<circle>"))


def unknown_name(argument: str, value: object, valid: Iterable[object], remedy: str = "") -> UnknownNameError:
    """Build the error for `argument=value` where only `valid` names exist; the closest ones are shown first."""
    names, wanted = [str(v) for v in valid], str(value)
    folded = {n.casefold(): n for n in names}
    close = [folded[c] for c in difflib.get_close_matches(wanted.casefold(), folded, n=5, cutoff=0.6)]
    twins = [] if wanted.isascii() and all(map(str.isascii, names)) else [n for n in names if _are_twins(n, wanted)]
    if twins:
        shown = f"Did you mean {', '.join(map(ascii, twins))}? That looks the same, and is of other characters."
    elif close:
        shown = f"Did you mean {', '.join(map(repr, close))}?"
    elif names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        shown = f"Known: {', '.join(map(repr, names[:8]))}{more}."
    else:
        shown = "There are none."
    said = ascii(value) if twins else repr(value)
    return UnknownNameError(f"{argument}={said} is unknown. {shown} {remedy}".strip())


def _are_twins(name: str, other: str) -> bool:
    return name != other and as_it_looks(name) == as_it_looks(other)
