from __future__ import annotations

import itertools

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.text import Text

from virtualcell.data._design import Design
from virtualcell.data._screen import Screen

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture(scope="session")
def papalexi(papalexi_file) -> AnnData:
    """STAT1, JAK2 and 300 control cells, three replicates as contexts."""
    import mudata

    adata = mudata.read_h5mu(papalexi_file)["rna"]
    adata = adata[adata.obs["guide_confident"].astype(bool)]
    rng = np.random.default_rng(0)
    target = adata.obs["target_gene"].astype(str)
    control = rng.choice(np.flatnonzero(target == "non-targeting"), 300, replace=False)
    adata = adata[np.concatenate([np.flatnonzero(target.isin(["STAT1", "JAK2"])), control])].copy()
    design = Design("target_gene", "non-targeting", "batch", library_size_key="total_counts")
    adata.uns["virtualcell"] = {"design": design.to_uns()}
    return adata


@pytest.fixture(scope="session")
def predict():
    """Stand-in for a model: control cells moved by 0.7 of the observed shift, in the shape of a prediction."""

    def predict(adata: AnnData, perturbation: str, *, contexts: list[str]) -> AnnData:
        design = Design.from_data(adata)
        expression = Screen.from_anndata(adata, design).expression.rows().toarray()
        target = adata.obs[design.perturbation_key].astype(str).to_numpy()
        parts = []
        for context in contexts:
            here = (adata.obs[design.context_key] == context).to_numpy()
            control = np.flatnonzero(here & (target == design.control))[:60]
            shift = expression[here & (target == perturbation)].mean(0) - expression[control].mean(0)
            obs = {
                design.perturbation_key: perturbation,
                design.context_key: context,
                "control_barcode": adata.obs_names[control],
            }
            parts.append(
                AnnData(
                    np.maximum(expression[control] + 0.7 * shift, 0),
                    obs=pd.DataFrame(obs, index=[f"{context}_{i}" for i in range(len(control))]),
                    var=pd.DataFrame(index=adata.var_names),
                    layers={"control": expression[control]},
                )
            )
        predicted = ad.concat(parts)[:, ::-1].copy()  # genes in another order: they must be matched by name
        groups = pd.DataFrame({"perturbation": perturbation, "context": contexts})
        change = [p.X.mean(axis=0) - p.layers["control"].mean(axis=0) for p in parts]
        predicted.varm["change"] = np.stack(change, axis=1)[::-1]
        predicted.varm["standard_error"] = np.full(predicted.varm["change"].shape, 0.02)
        predicted.uns["virtualcell"] = {"design": design.to_uns(), "groups": groups}
        return predicted

    return predict


@pytest.fixture(scope="session")
def predicted(papalexi, predict) -> AnnData:
    return predict(papalexi, "STAT1", contexts=["rep_1", "rep_2"])


@pytest.fixture(scope="session")
def assert_readable():
    def assert_readable(ax: Axes) -> None:
        """No label touches another or leaves the axes, when drawn as it is saved."""
        ax.get_figure(root=True).canvas.draw()
        boxes = [Text.get_window_extent(t) for t in ax.texts if t.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        frame = ax.get_window_extent().padded(0.5)
        assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)

    return assert_readable
