"""Predict what a perturbation does to single cells, from an AnnData of a Perturb-seq screen.

>>> import virtualcell as vc
>>> vc.tl.fit_state(adata, perturbation_key="target_gene", control="non-targeting")
>>> predicted = vc.tl.predict_perturbation(adata, "STAT1")
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtualcell import datasets, io, metrics, models, pl, pp, tl
    from virtualcell._settings import settings

try:
    __version__ = version("virtualcell")
except PackageNotFoundError:  # a checkout on the path of a machine that has torch alone
    __version__ = "unknown"

__all__ = ["datasets", "io", "metrics", "models", "pl", "pp", "settings", "tl"]


def __getattr__(name: str) -> object:
    # torch, scvi-tools and Lightning take seconds to import: everything is loaded when it is first touched
    if name == "settings":
        return importlib.import_module(f"{__name__}._settings").settings
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
