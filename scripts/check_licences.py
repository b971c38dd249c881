"""Raise for a dependency whose licence does not go with BSD 3-clause.

Looks at what virtualcell and its extras for users need, as it is installed in the environment that this runs in. Where
the metadata of a package name no licence, the first lines of its licence file do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# of licences that may be combined with ours when a program is distributed
FREE = re.compile(
    r"\b(0?BSD|MIT|MIT-0|Apache|ISC|PSF|Python[- ]Software|Python-2|CNRI|MPL|Mozilla|Zlib|Unlicense|CC0|HPND|"
    r"public domain|BSL|Boost|NCSA|LGPL|Lesser|WTFPL|Historical Permission)",
    re.IGNORECASE,
)
STRONG = re.compile(r"(?<!L)\b(A?GPL|General Public License)", re.IGNORECASE)
PROPRIETARY = re.compile(r"^(nvidia-|cuda-|triton$)")  # libraries of a GPU, which nothing of ours is made of
# whose packages hold no licence, and where it was read
READ: dict[str, str] = {}
EXTRAS = ("dask", "esm", "eval", "hub", "lora")


def licence_of(package: Distribution) -> str:
    """Return what the metadata of a package say about its licence."""
    meta = package.metadata
    told = [meta.get("License-Expression") or "", (meta.get("License") or "")[:300]]
    told += [c.rpartition(" :: ")[2] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    files = [file for file in package.files or [] if re.match(r"(LICEN[CS]E|COPYING)", file.name, re.IGNORECASE)]
    if not any(told):
        told = [" ".join(file.read_text()[:200].split()) for file in files]
    return "; ".join(text.strip().splitlines()[0] for text in told if text.strip())


Found = dict[str, Distribution]


def needed(name: str = "virtualcell", extras: Iterable[str] = EXTRAS, found: Found | None = None) -> Found:
    """Return what a package needs, directly or not, of what is installed."""
    found = {} if found is None else found
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))
        key = canonicalize_name(requirement.name)
        if not wanted or key in found:
            continue
        try:
            found[key] = distribution(key)
        except PackageNotFoundError:  # of another system, or an extra that is not here
            continue
        needed(key, requirement.extras, found)
    return found


def main() -> None:
    """Print what is not known to be free, and exit with 1 where there is any."""
    wrong = []
    packages = needed()
    for name, package in sorted(packages.items()):
        told = READ.get(name) or licence_of(package)
        is_free = FREE.search(told) is not None  # one of several that a user may choose from is enough
        if PROPRIETARY.match(name) or (is_free and not (STRONG.search(told) and not re.search(r"\bOR\b|/", told))):
            continue
        wrong.append(f"{name} {package.version}: {told or 'no licence in its metadata'}")
    print("\n".join(wrong) or f"The licences of {len(packages)} packages go with ours.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
