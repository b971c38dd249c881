"""What scvi-tools knows of data, for data that it was not shown."""

from __future__ import annotations

from importlib.metadata import version


def scvi_registry(model: str, setup: dict, states: dict[str, dict], summaries: dict[str, dict] | None = None) -> dict:
    """Return a registry of scvi-tools for data that is not in an AnnData: state and summary by field."""
    return {
        "scvi_version": version("scvi-tools"),
        "model_name": model,
        "setup_method_name": "setup_anndata",
        "setup_args": setup,
        "field_registries": {
            name: {"data_registry": {}, "state_registry": state, "summary_stats": (summaries or {}).get(name, {})}
            for name, state in states.items()
        },
    }
