from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import pytest

import virtualcell as vc
from virtualcell.models import ST

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
TINY = {"n_hidden": 32, "n_feedforward": 64, "n_layers": 1, "set_size": 16}


@pytest.fixture(scope="session")
def design() -> dict:
    return DESIGN


@pytest.fixture(scope="session")
def session_screen() -> ad.AnnData:
    adata = vc.datasets.synthetic(
        n_contexts=3, n_perturbations=5, n_genes=90, n_cells_per_group=20, n_control_cells=40, effect_size=0.5, seed=2
    )
    vc.pp.split(adata, **DESIGN, holdout={"contexts": ["type_3"]})
    return adata


@pytest.fixture
def screen(session_screen) -> ad.AnnData:
    """Raw counts: 3 cell types x (5 targets of 20 cells, 40 controls), with a split that holds type_3 out."""
    return session_screen.copy()


@pytest.fixture(scope="session")
def targets(session_screen) -> list[str]:
    return sorted(set(session_screen.obs["target_gene"]) - {"non-targeting"})


@pytest.fixture(scope="session")
def fit() -> Callable[..., ST]:
    """`fit_state` with a tiny network and few steps, without SE unless asked for."""

    def fit(data, **options) -> ST:
        quick = {"se": False, "max_steps": 5, "enable_progress_bar": False, "model_kwargs": TINY}
        return vc.tl.fit_state(data, **{**DESIGN, **quick, **options})

    return fit


@pytest.fixture(scope="session")
def session_fitted(session_screen, fit) -> tuple[ad.AnnData, ST]:
    adata = session_screen.copy()
    return adata, fit(adata, se=None, se_max_steps=2, n_top_genes=60, max_steps=60, train_kwargs={"lr": 3e-3})


@pytest.fixture
def fitted(session_fitted) -> ad.AnnData:
    """`screen` after fit_state with SE and 60 highly variable genes."""
    return session_fitted[0].copy()


@pytest.fixture(scope="session")
def model(session_fitted) -> ST:
    return session_fitted[1]


@pytest.fixture(scope="session")
def session_kang(kang_file) -> ad.AnnData:
    return ad.read_h5ad(kang_file)


@pytest.fixture
def kang(session_kang) -> ad.AnnData:
    return session_kang.copy()


@pytest.fixture(scope="session")
def kang_design() -> dict:
    return {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}
