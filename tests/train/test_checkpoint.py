from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from virtualcell.train import TrainOptions, fit

sys.path.insert(0, str(Path(__file__).parent))
from regression import Network, Regression, square_loss

sys.path.pop(0)

FILE = "ST.training.safetensors"


class Ends(Regression):
    """Batches in which one step, the first time that it comes, ends the training in some way."""

    def ending(self, at: int, how: signal.Signals | None) -> Ends:
        self.at, self.how = at, how
        return self

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        if i == self.at:
            self.at = -1
            if self.how is None:
                raise RuntimeError("the node is gone")
            os.kill(os.getpid(), self.how)
        return super().step(i, rank, world_size, device)


def noisy_loss(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return square_loss(network, {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])})


def train(
    network: Network, folder: Path | None = None, *, batches: object = None, data: object = None, **given: object
) -> dict[str, pd.DataFrame]:
    common = {"max_steps": 40, "lr": 0.05, "batch_size": 8, "accelerator": "cpu", "progress_bar": False}
    options = TrainOptions.from_({**common, "validate_every": 7, "checkpoint_dir": folder, **given})
    validation = Regression(n_steps=2, seed=1)
    return fit(network, noisy_loss, batches or Regression(), options, validation=validation, data=data)


@pytest.fixture(scope="module")
def whole() -> tuple[Tensor, dict[str, pd.DataFrame]]:
    """Weights and history of a training that nothing interrupts."""
    network = Network(dropout=0.3)
    return network.line.weight.detach(), train(network)


def check_equal(network: Network, history: dict[str, pd.DataFrame], whole: tuple) -> None:
    assert torch.equal(network.line.weight, whole[0])
    assert not network.training
    assert set(history) == set(whole[1])
    for name, table in whole[1].items():
        pd.testing.assert_frame_equal(history[name], table, check_exact=True)


@pytest.mark.parametrize("at", [0, 5, 6, 7, 33, 39])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, None])
def test_a_training_that_goes_on_is_the_uninterrupted_one_bit_for_bit(tmp_path, whole, caplog, at, how) -> None:
    network = Network(dropout=0.3)
    kind = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt, None: RuntimeError}[how]
    every = 300 if how else 0
    with pytest.raises(kind) as ended:
        train(network, tmp_path, batches=Ends().ending(at, how), checkpoint_every=every)
    if how == signal.SIGTERM:
        assert ended.value.code == 128 + signal.SIGTERM  # and not 0, which schedulers take for success
    if how is not None:
        assert f"after {at + 1} steps of 40. The same call with resume=True goes on from" in caplog.text
    for handled in (signal.SIGTERM, signal.SIGINT):
        assert signal.getsignal(handled) in (signal.SIG_DFL, signal.default_int_handler)
    again = Network(dropout=0.3)
    history = train(again, tmp_path, resume=True)
    check_equal(again, history, whole)


def test_a_training_that_is_interrupted_many_times(tmp_path, whole) -> None:
    for at in (3, 3, 4, 21, 38):
        with pytest.raises(RuntimeError, match="gone"):
            train(Network(dropout=0.3), tmp_path, batches=Ends().ending(at, None), resume=True, checkpoint_every=0)
    network = Network(dropout=0.3)
    check_equal(network, train(network, tmp_path, resume=True), whole)


def test_early_stopping_waits_as_long_as_without_the_interruption(tmp_path) -> None:
    stops = {"max_steps": 200, "validate_every": 5, "early_stopping": True, "patience": 2, "lr": 0.3, "final_lr": 1.0}
    whole = Network(dropout=0.5)
    history = train(whole, **stops)
    n_steps = history["validation_loss"].index[-1]
    assert n_steps < 200
    with pytest.raises(SystemExit):
        train(Network(dropout=0.5), tmp_path, batches=Ends().ending(n_steps - 4, signal.SIGTERM), **stops)
    network = Network(dropout=0.5)
    check_equal(network, train(network, tmp_path, resume=True, **stops), (whole.line.weight, history))


def test_what_was_finished_is_not_trained_again(tmp_path, whole, caplog) -> None:
    train(Network(dropout=0.3), tmp_path)

    class Never(Regression):
        def step(self, *_: object) -> dict:
            raise AssertionError

    network = Network(dropout=0.3)
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        history = train(network, tmp_path, batches=Never(), resume=True)
    check_equal(network, history, whole)
    assert "ST was trained before, as" in caplog.text
    assert {p.name for p in tmp_path.iterdir()} == {FILE, f".{FILE}.lock"}


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_that_of_another_training(tmp_path) -> None:
    train(Network(), tmp_path, data={"genes": "a", "cells": "b", "embedding": [1.0, 2.0]})
    kept = (tmp_path / FILE).read_bytes()
    with pytest.raises(FileExistsError, match=r"Say resume=True to go on .* another checkpoint_dir, or delete it"):
        train(Network(), tmp_path)
    differs = r"checkpoint of another training: lr=0\.05 there and 0\.1 here, seed=0 there and 1 here, other genes\."
    other = {"genes": "c", "cells": "b", "embedding": [1.0, 2.0]}
    with pytest.raises(ValueError, match=differs):
        train(Network(), tmp_path, resume=True, lr=0.1, seed=1, data=other)
    with pytest.raises(ValueError, match=r"another training: other network, other cells, other embedding\. Repeat"):
        train(nn.Sequential(Network()), tmp_path, resume=True, data={"genes": "a", "embedding": [1.0, 2.1]})
    other = Network()
    with torch.no_grad():
        other.line.weight.mul_(1.01)
    close = {"genes": "a", "cells": "b", "embedding": [1.0, 2.00001]}
    with pytest.raises(ValueError, match=r"another training: other first weights\. Repeat the call"):
        train(other, tmp_path, resume=True, data=close)
    assert (tmp_path / FILE).read_bytes() == kept
    # another place to compute, another bar and another computer's rounding are the same training
    train(Network(), tmp_path, resume=True, data=close, accelerator="auto", devices=1, checkpoint_every=1)


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path) -> None:
    train(Network(), tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for content in (whole[:-10], b"", b"\0" * len(whole)):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.*Delete this file to begin the training of ST anew"):
            train(Network(), tmp_path, resume=True)


def test_frozen_parts_belong_to_a_training(tmp_path) -> None:
    train(Network(), tmp_path)
    frozen = Network()
    frozen.unused.requires_grad_(False)
    with pytest.raises(ValueError, match="another training: other network"):
        train(frozen, tmp_path, resume=True)


def test_sigterm_without_a_folder_ends_with_its_status_and_says_how_to_go_on(caplog) -> None:
    with pytest.raises(SystemExit) as ended:
        train(Network(), batches=Ends().ending(3, signal.SIGTERM))
    assert ended.value.code == 143
    assert "ended by SIGTERM after 4 steps of 40. Nothing of it is kept: with checkpoint_dir= it could" in caplog.text


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path) -> None:
    class Twice(Ends):
        def step(self, i: int, *rest: object) -> dict:
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError
            return Regression.step(self, i, *rest)

    with pytest.raises(KeyboardInterrupt):
        train(Network(), tmp_path, batches=Twice())


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path) -> None:
    class Nested(Regression):
        def step(self, i: int, *rest: object) -> dict:
            if i == 2:  # locks of one process keep each other out like those of two
                with pytest.raises(RuntimeError, match="another process trains ST in checkpoint_dir="):
                    train(Network(), tmp_path, resume=True)
            return super().step(i, *rest)

    train(Network(), tmp_path, batches=Nested(), max_steps=4)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"checkpoint_dir=.* cannot be written into: Not a directory. Name a folder that"):
        train(Network(), tmp_path / "file" / "new", batches=Ends().ending(0, None))


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"resume='yes' is neither True nor False"):
        TrainOptions(resume="yes")
    with pytest.raises(ValueError, match=r"checkpoint_every=-1 is not a number of at least 0"):
        TrainOptions(checkpoint_every=-1)
    with pytest.raises(ValueError, match=r"checkpoint_dir=True is not the name of a folder"):
        TrainOptions(checkpoint_dir=True)
    with pytest.raises(ValueError, match=r"resume=True needs checkpoint_dir="):
        TrainOptions.from_({"resume": True})


def test_a_training_of_two_processes_goes_on_bit_for_bit(tmp_path) -> None:
    def run(part: str) -> subprocess.CompletedProcess:
        program = [sys.executable, str(Path(__file__).parent / "goes_on.py"), str(tmp_path), part]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=120, check=False)

    ended = run("ended")
    assert ended.returncode == 143
    said = "ST: training was ended by SIGTERM after 40 steps of 50. The same call with resume=True goes on"
    assert ended.stderr.startswith(said)  # where all processes look for signals
    assert len(ended.stderr.splitlines()) == 1
    resumed = run("resumed")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    for rank in (0, 1):
        assert json.loads((tmp_path / f"found_{rank}.json").read_text()) == {"weights": True, "history": True}
