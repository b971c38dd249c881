"""One form for every data set: the same names of columns, and a design to pass on."""

from __future__ import annotations

PERTURBATION, CONTEXT, BATCH = "perturbation", "context", "batch"


def design_of(control: str, *, library_size_key: str | None = None) -> dict[str, str]:
    """Return the arguments of `fit_state` that name the columns of a tidy data set."""
    design = {"perturbation_key": PERTURBATION, "control": control, "context_key": CONTEXT, "batch_key": BATCH}
    return design if library_size_key is None else design | {"library_size_key": library_size_key}
