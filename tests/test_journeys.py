"""What a newcomer pastes is short, fits the page and runs; `scripts/journeys.py` runs it at full size."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def journeys() -> ModuleType:
    spec = importlib.util.spec_from_file_location("journeys", ROOT / "scripts" / "journeys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "most"), [("quickstart", 10), ("screen", 14)])
def test_it_is_short_and_fits_the_page(journeys: ModuleType, name: str, most: int) -> None:
    block = journeys.code(name)
    assert journeys.n_lines(block) <= most
    assert max(map(len, block.splitlines())) <= 95


def test_the_screen_runs_in_a_few_steps(journeys: ModuleType, tmp_path: Path) -> None:
    block = journeys.code("screen").replace("se=False", "se=False, training={'max_steps': 3}")
    small = journeys.FILE.replace(
        "n_perturbations=30, n_genes=300", "n_perturbations=4, n_genes=50, n_cells_per_group=15"
    )
    code = f'import matplotlib\nmatplotlib.use("agg")\n{small}{block}{journeys.CHECK}'
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "figure.png").stat().st_size > 5000
