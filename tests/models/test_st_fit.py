from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from virtualcell.data._cell_sets import CellGroups
from virtualcell.models import STTrainOptions
from virtualcell.models._st_fit import completed

GROUPS = CellGroups(["a"], ["x"], [np.arange(640)], [np.zeros(640, int)], [np.arange(640, 700)])


@pytest.mark.parametrize("has_gpu", [False, True])
def test_large_networks_are_trained_in_bf16_on_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_gpu)
    large, small = nn.Linear(4000, 3000), nn.Linear(4000, 2000)

    def precision(network: nn.Module, **given: object) -> str:
        return completed(STTrainOptions.from_(given), GROUPS, 64, network).precision

    assert precision(large) == ("bf16-mixed" if has_gpu else "32-true")
    assert precision(large, accelerator="cpu") == "32-true"
    assert precision(small) == "32-true"
    assert precision(large, precision="32-true") == "32-true"
    assert precision(small, precision="bf16-mixed") == "bf16-mixed"
