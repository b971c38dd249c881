from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import mudata as md
import numpy as np
import pytest

import virtualcell as vc
from virtualcell.data._expression import Expression
from virtualcell.models import ST

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting", "context_key": "cell_type"}
TINY = {"n_hidden": 32, "n_feedforward": 64, "n_layers": 1, "set_size": 16}
QUICK = {"max_steps": 5, "progress_bar": False, "validate_every": 50}


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
    """`fit_state` with a tiny network and few steps, without SE and verdict (five further fits) unless asked for."""

    def fit(data, *, network=None, training=None, **options) -> ST:
        quick = {
            "se": False,
            "validate": False,
            "network": {**TINY, **(network or {})},
            "training": {**QUICK, **(training or {})},
        }
        return vc.tl.fit_state(data, **{**DESIGN, **quick, **options})

    return fit


@pytest.fixture(scope="session")
def session_fitted(session_screen, fit) -> tuple[ad.AnnData, ST]:
    adata = session_screen.copy()
    return adata, fit(adata, se={"max_steps": 2}, n_top_genes=60, training={"max_steps": 60, "lr": 3e-3})


@pytest.fixture
def fitted(session_fitted) -> ad.AnnData:
    """`screen` after fit_state with SE and 60 highly variable genes."""
    return session_fitted[0].copy()


@pytest.fixture(scope="session")
def model(session_fitted) -> ST:
    return session_fitted[1]


@pytest.fixture
def rows_read(monkeypatch) -> list[int]:
    """How many rows expression is asked for from now on, call by call."""
    numbers, rows = [], Expression.rows

    def counted(self, index=None):
        found = rows(self, index)
        numbers.append(found.shape[0])
        return found

    monkeypatch.setattr(Expression, "rows", counted)
    return numbers


@pytest.fixture(scope="session")
def session_kang(kang_file) -> ad.AnnData:
    return ad.read_h5ad(kang_file)


@pytest.fixture
def kang(session_kang) -> ad.AnnData:
    return session_kang.copy()


@pytest.fixture(scope="session")
def kang_design() -> dict:
    return {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}


@pytest.fixture(scope="session")
def papalexi_halves(papalexi_file) -> tuple[ad.AnnData, ad.AnnData]:
    """Two disjoint halves of real cells, raw counts of 303 genes: seven targets and the controls."""
    rna = md.read_h5mu(papalexi_file).mod["rna"]
    rna = rna[rna.obs["guide_confident"].to_numpy()]
    targets = ["STAT1", "JAK2", "IFNGR1", "IRF1", "CUL3", "ATF2", "SPI1"]
    most = {"non-targeting": 1200, **dict.fromkeys(targets, 640)}
    rng = np.random.default_rng(0)
    halves = ([], [])
    for name, n in most.items():
        rows = rng.permutation(np.flatnonzero(rna.obs["target_gene"] == name))[:n]
        for half, part in zip(halves, np.array_split(rows, 2), strict=True):
            half.extend(part)
    obs = rna.obs[["target_gene", "batch", "total_counts"]].astype({"target_gene": str, "batch": str})
    whole = ad.AnnData(rna.X, obs=obs, var=rna.var[[]])
    return tuple(whole[half].copy() for half in halves)


@pytest.fixture(scope="session")
def papalexi_log_halves(papalexi_halves) -> tuple[ad.AnnData, ad.AnnData]:
    """The same on the scale log1p CP10k."""
    out = []
    for half in papalexi_halves:
        matrix = half.X.multiply(1e4 / half.obs["total_counts"].to_numpy()[:, None]).tocsr().log1p()
        out.append(ad.AnnData(matrix.astype(np.float32), obs=half.obs.copy(), var=half.var.copy()))
    return tuple(out)
