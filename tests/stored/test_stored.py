"""Models that earlier versions saved are loaded, and predict what they predicted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import virtualcell as vc

HERE = Path(__file__).parent
STORED = sorted(path.parent for path in HERE.glob("format_*/*/model.safetensors"))


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_stored", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_some() -> None:
    assert {path.name for path in STORED if path.parent.name == "format_2"} >= {"st", "st_features", "se", "additive"}


@pytest.mark.parametrize("folder", STORED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_stored_model_predicts_what_it_predicted(folder: Path, make: ModuleType) -> None:
    name, of_format = folder.name, folder.parent
    got = make.predictions(name, of_format, make.cells(of_format))
    with np.load(of_format / "predictions.npz") as stored:
        wanted = {key.removeprefix(f"{name}/"): stored[key] for key in stored.files if key.startswith(f"{name}/")}
    assert set(got) == set(wanted)
    for what, values in wanted.items():
        np.testing.assert_allclose(got[what], values, rtol=1e-3, atol=1e-4, err_msg=what)


@pytest.mark.parametrize("folder", STORED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_stored_model_is_saved_again(folder: Path, make: ModuleType, tmp_path: Path) -> None:
    model = vc.io.load(folder, accelerator="cpu")
    model.save(tmp_path / folder.name)
    got = make.predictions(folder.name, tmp_path, data := make.cells(folder.parent))
    for what, values in make.predictions(folder.name, folder.parent, data).items():
        np.testing.assert_array_equal(got[what], values, err_msg=what)
