from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from virtualcell.train import TrainOptions, fit

sys.path.insert(0, str(Path(__file__).parent))
import sharded
from regression import Network, Regression, square_loss

sys.path.pop(0)


def two_processes(folder: Path, *trainings: dict) -> tuple[subprocess.CompletedProcess, list[list[dict]]]:
    """Return how a program ended that made trainings one after another, and what each of its processes had."""
    program = [sys.executable, sharded.__file__, str(folder), "2", "fsdp", json.dumps(trainings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=180, check=False)
    return done, [json.loads((folder / f"found_{rank}.json").read_text()) for rank in (0, 1)]


def check_close(found: dict, expected: dict) -> None:
    assert found["error"] == expected["error"]
    assert found["unused_is_left_alone"]
    assert found["is_plain"]
    assert set(found["history"]) == set(expected["history"])
    for what in ("history", "weights"):
        for name, values in expected[what].items():
            np.testing.assert_allclose(found[what][name], values, rtol=1e-4, atol=2e-5, err_msg=name)


def test_a_network_divided_between_two_processes_is_trained_like_a_whole_one(tmp_path: Path) -> None:
    expected, broken = sharded.train(1, "auto"), sharded.train(1, "auto", bad=22)
    assert expected["history"]["train_loss"][-1] < expected["history"]["train_loss"][0] / 2
    assert "not finite in step 23 of 24" in broken["error"]
    with pytest.raises(SystemExit):
        sharded.train(1, "auto", ends=11, checkpoint_dir=tmp_path / "of_one")
    of_one, of_two = str(tmp_path / "of_one"), str(tmp_path / "of_two")

    done, found = two_processes(tmp_path, {}, {"bad": 22}, {"ends": 5, "checkpoint_dir": of_two})
    assert done.returncode == 143
    assert done.stderr.startswith("ST: training was ended by SIGTERM after 20 steps of 24.")
    assert len(done.stderr.splitlines()) == 1
    assert found[0] == found[1]  # every process has all of it
    assert all(one["layers_are_divided"] for one in found[0])
    for one, like in zip(found[0], (expected, broken), strict=True):
        check_close(one, like)

    uninterrupted = found[0][0]
    shutil.copytree(of_two, tmp_path / "copy")
    goes_on = [{"resume": True, "checkpoint_dir": folder} for folder in (of_two, of_one)]
    done, found = two_processes(tmp_path, *goes_on)
    assert done.returncode == 0
    assert done.stderr == "ST goes on with other devices than before: the same steps, with other random numbers.\n"
    assert found[0] == found[1]
    assert found[0][0] == uninterrupted  # bit for bit
    check_close(found[0][1], expected)
    check_close(sharded.train(1, "auto", resume=True, checkpoint_dir=tmp_path / "copy"), expected)


def test_what_cannot_be_divided_is_refused() -> None:
    def train(**given: object) -> None:
        fit(Network(), square_loss, Regression(), TrainOptions.from_(given, max_steps=2, lr=0.1, batch_size=8))

    with pytest.raises(ValueError, match=r"strategy='fsdp' divides a network .* devices='auto' is one. Say devices=2"):
        train(strategy="fsdp", accelerator="cpu")
    with pytest.raises(ValueError, match=r"precision='16-mixed' and strategy='fsdp' do not go together. Use '32-true'"):
        train(strategy="fsdp", accelerator="cpu", devices=2, precision="16-mixed")
