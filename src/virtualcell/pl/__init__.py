"""Pictures of a design, of what a perturbation does and of how well that was predicted; each returns its `Axes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtualcell._lazy import attach

if TYPE_CHECKING:
    from virtualcell.pl._agreement import de_agreement
    from virtualcell.pl._benchmark import benchmark
    from virtualcell.pl._effect_heatmap import effect_heatmap
    from virtualcell.pl._history import training_history
    from virtualcell.pl._screen import screen
    from virtualcell.pl._shift import perturbation_shift
    from virtualcell.pl._split import split
    from virtualcell.pl._target import target_expression
    from virtualcell.pl._volcano import de_volcano

__all__ = [
    "benchmark",
    "de_agreement",
    "de_volcano",
    "effect_heatmap",
    "perturbation_shift",
    "screen",
    "split",
    "target_expression",
    "training_history",
]

__getattr__, __dir__ = attach(__name__)
