from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from mudata import MuData

import virtualcell as vc
from virtualcell.data._screen import Screen
from virtualcell.models import SE, ST

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
TINY_ST = {"n_hidden": 64, "n_feedforward": 128, "n_layers": 1, "set_size": 16}
TINY_SE = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_feedforward": 16, "n_output": 8, "length": 16}


def log1p_cp10k(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)


@pytest.fixture(scope="session")
def design() -> dict:
    return DESIGN


@pytest.fixture(scope="session")
def session_counts() -> ad.AnnData:
    adata = vc.datasets.synthetic(
        n_contexts=5,
        n_perturbations=6,
        n_genes=80,
        n_cells_per_group=30,
        n_control_cells=60,
        effect_size=0.5,
        context_specificity=0.5,
        seed=1,
    )
    vc.pp.split(adata, **DESIGN, holdout={"contexts": ["type_5"]}, val_fraction=0)
    return adata


@pytest.fixture
def counts(session_counts) -> ad.AnnData:
    """Raw counts: 5 cell types x (6 targets of 30 cells, 60 controls), the perturbed cells of type_5 held out."""
    return session_counts.copy()


@pytest.fixture(scope="session")
def session_screen(session_counts) -> ad.AnnData:
    obs = session_counts.obs.copy()
    return ad.AnnData(
        log1p_cp10k(session_counts.X.toarray()), obs=obs, var=pd.DataFrame(index=session_counts.var_names)
    )


@pytest.fixture
def screen(session_screen) -> ad.AnnData:
    """The same on the scale that models work on."""
    return session_screen.copy()


@pytest.fixture(scope="session")
def targets(session_screen) -> list[str]:
    return sorted(set(session_screen.obs["target_gene"]) - {"non-targeting"})


@pytest.fixture(scope="session")
def build() -> Callable[..., ST]:
    """Register data and build a small ST, its first weights drawn by `seed`; a Screen needs no registering."""

    def build(data, features=None, *, setup: dict | None = None, seed: int = 0, **network) -> ST:
        torch.manual_seed(seed)
        if isinstance(data, Screen):
            return ST(data, features, **{**TINY_ST, **network})
        register = ST.setup_mudata if isinstance(data, MuData) else ST.setup_anndata
        register(data, **{**DESIGN, **(setup or {})})
        return ST(data, features, **{**TINY_ST, **network})

    return build


@pytest.fixture(scope="session")
def fit(build) -> Callable[..., ST]:
    """Build a small ST and train it for a few steps on all cells, or as `train` says."""

    def fit(data, features=None, *, train: dict | None = None, **options) -> ST:
        st = build(data, features, **options)
        few = {} if "max_steps" in (train or {}) else {"max_steps": 3, "val_fraction": 0.0}
        st.train(**{"progress_bar": False, **few, **(train or {})})
        return st

    return fit


@pytest.fixture(scope="session")
def learned(session_screen, fit) -> ST:
    """An ST that has learned `screen` without the held-out cells."""
    return fit(session_screen.copy(), setup={"split_key": "split"}, train={"max_steps": 200, "lr": 3e-3})


@pytest.fixture(scope="session")
def small_se(session_counts) -> SE:
    """An SE after a few steps on `counts`."""
    data = session_counts.copy()
    SE.setup_anndata(data)
    torch.manual_seed(0)
    se = SE(data, vc.pp.expression_gene_embeddings(data, n_comps=12), n_targets=(8, 8, 8), **TINY_SE)
    se.train(max_steps=4, progress_bar=False)
    return se


@pytest.fixture(scope="session")
def weights() -> Callable:
    """Every number that a model would be saved with, as one vector."""

    def weights(model) -> np.ndarray:
        return np.concatenate([v.detach().cpu().double().flatten().numpy() for v in model.state().tensors.values()])

    return weights
