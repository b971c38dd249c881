from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from virtualcell._threads import torch_threads_kept

# The same examples in every run. `pytest --hypothesis-profile=search` looks for others, and for more of them.
_EXAMPLES = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("fixed", derandomize=True, max_examples=60, **_EXAMPLES)
settings.register_profile("search", derandomize=False, max_examples=2000, print_blob=True, **_EXAMPLES)
settings.load_profile("fixed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as it is behind `nohup` and `&`, and in all that is started
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_file(*parts: str) -> Path:
    """A file of real data or of reference outputs beside the checkout; CI always has it."""
    path = Path(os.environ.get("VIRTUALCELL_TEST_DATA", SHARED)).joinpath(*parts)
    if not path.exists():
        if os.environ.get("CI"):
            raise FileNotFoundError(f"CI must have {path}")
        pytest.skip(f"test data {'/'.join(parts)} is not here; set VIRTUALCELL_TEST_DATA to the folder that holds it")
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    np.random.seed(0)  # noqa: NPY002  scanpy and scvi draw from the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Start numba, which scanpy uses, before it sets torch to all cores: on a busy machine that is slow."""
    with torch_threads_kept():
        pass


@pytest.fixture(scope="session")
def kang_file() -> Path:
    return shared_file("data", "kang2018_pbmc_ifnb.h5ad")


@pytest.fixture(scope="session")
def kang_control_file() -> Path:
    return shared_file("data", "kang2018_pbmc_control.h5ad")


@pytest.fixture(scope="session")
def papalexi_file() -> Path:
    return shared_file("data", "papalexi2021_thp1_eccite.h5mu")


@pytest.fixture(scope="session")
def norman_file() -> Path:
    return shared_file("data", "norman_mcfaline_4contexts.h5ad")


@pytest.fixture(scope="session")
def cite_file() -> Path:
    return shared_file("data", "pbmc_cite_10x_400cells.h5mu")


@pytest.fixture(scope="session")
def kinase_fasta() -> Path:
    return shared_file("data", "human_kinase_proteins.fasta")


@pytest.fixture(scope="session")
def positions_file() -> Path:
    return shared_file("data", "gene_positions_grch38.tsv.gz")


@pytest.fixture(scope="session")
def originals() -> Path:
    """The files that `vc.datasets` downloads, byte for byte."""
    return shared_file("data", "originals")


@pytest.fixture(scope="session")
def golden() -> Path:
    return shared_file("golden")
