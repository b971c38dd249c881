from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import virtualcell as vc

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}


@pytest.mark.parametrize("kind", ["Additive", "NearestContext", "PerturbationMean"])
def test_any_model_is_read_as_what_it_was(kind: str, tmp_path: Path) -> None:
    adata = vc.datasets.synthetic(n_contexts=2, n_perturbations=3, n_genes=40, n_cells_per_group=12, n_control_cells=30)
    cls = getattr(vc.models, kind)
    cls.setup_anndata(adata, **DESIGN, scale="counts")
    model = cls(adata)
    model.train()
    vc.io.save(model, tmp_path)
    again = vc.io.load(tmp_path)
    assert type(again) is cls
    name = model.perturbations[0]
    np.testing.assert_array_equal(again.predict(adata, name), model.predict(adata, name))


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        vc.io.load(tmp_path)
