"""Data to try things on: real screens from the internet, and a synthetic one with a known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtualcell._lazy import attach

if TYPE_CHECKING:
    from virtualcell.datasets._fetch import fetch
    from virtualcell.datasets._published import kang2018, norman2019_mcfaline2024
    from virtualcell.datasets._scverse import available, load
    from virtualcell.datasets._synthetic import synthetic

__all__ = ["available", "fetch", "kang2018", "load", "norman2019_mcfaline2024", "synthetic"]

__getattr__, __dir__ = attach(__name__)
