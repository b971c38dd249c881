"""Batches that are put together by a thread are those that a training would ask for, and end with it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from virtualcell.train import TrainOptions, fit
from virtualcell.train._ahead import THREAD, Ahead

sys.path.insert(0, str(Path(__file__).parent))
from regression import Network, Regression, square_loss

sys.path.pop(0)

CPU = torch.device("cpu")


class Noted(Regression):
    """Batches that note which were put together, and where; one may fail."""

    fails, begun = None, ()

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        self.begun = (*self.begun, (i, threading.current_thread().name.startswith(THREAD)))
        if i == self.fails:
            raise OSError("the disk is gone")
        return super().step(i, rank, world_size, device)


def train(network: nn.Module, batches: Regression, loss: object = square_loss, **given: object) -> dict:
    validation = given.pop("validation", None)
    common = {"max_steps": 20, "lr": 0.05, "batch_size": 8, "accelerator": "cpu", "progress_bar": False}
    return fit(network, loss, batches, TrainOptions.from_({**common, **given}), validation=validation)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def test_a_training_is_the_same_bit_for_bit() -> None:
    def noisy(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return square_loss(network, {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])})

    results = []
    for fetched in (False, True):
        network, batches = Network(dropout=0.5), Noted(fetched=fetched)
        validation = Noted(n_steps=3, seed=1, fetched=fetched)
        history = train(network, batches, noisy, validation=validation, validate_every=6)
        assert batches.begun == tuple((i, fetched) for i in range(20))  # in order, and none that is not asked for
        assert validation.begun == tuple((i, fetched) for i in range(3)) * 4
        results.append((network, history))
    (network, history), (other, same) = results
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert all(history[name].equals(same[name]) for name in {*history, *same})
    assert threads() == []


def test_a_training_goes_on_from_any_step(tmp_path: Path) -> None:
    whole, network = Network(), Network()
    train(whole, Regression())
    failing = Noted(fetched=True)
    failing.fails = 13
    with pytest.raises(OSError, match="the disk is gone"):
        train(Network(), failing, checkpoint_dir=tmp_path, checkpoint_every=0)
    train(network, Regression(fetched=True), checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(network.line.weight, whole.line.weight)


def test_the_next_batch_is_put_together_meanwhile_and_no_other_one() -> None:
    has_begun = [threading.Event() for _ in range(10)]

    class Seen(Noted):
        def step(self, i: int, *rest: object) -> dict[str, Tensor]:
            has_begun[i].set()
            return super().step(i, *rest)

    batches, used = Seen(fetched=True), []

    def waiting(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        used.append(len(used))
        if len(used) < 10:
            assert has_begun[len(used)].wait(10)  # while this one is worked on
        assert len(batches.begun) <= len(used) + 1
        return square_loss(network, batch)

    train(Network(), batches, waiting, max_steps=10)
    assert used == list(range(10))


def test_what_goes_wrong_in_the_thread_is_raised_by_the_step_that_it_was_for() -> None:
    batches, used = Noted(fetched=True), []
    batches.fails = 7

    def counted(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        used.append(len(used))
        return square_loss(network, batch)

    with pytest.raises(OSError, match="the disk is gone"):
        train(Network(), batches, counted)
    assert used == list(range(7))
    assert threads() == []
    ahead = Ahead(batches, 20)
    ahead.step(6, 0, 1, CPU)
    assert ahead.step(9, 0, 1, CPU)["x"].equal(Regression().step(9, 0, 1, CPU)["x"])  # another one was to come
    ahead.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_a_training_that_is_broken_off(error: type[BaseException]) -> None:
    def broken(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert len(threads()) == 1
        raise error

    with pytest.raises(error):
        train(Network(), Regression(fetched=True), broken)
    assert threads() == []


def test_a_training_that_ends_early_waits_for_no_batch() -> None:
    stops = {"max_steps": 200, "validate_every": 5, "early_stopping": True, "patience": 3, "lr": 1e-30}
    batches = Noted(fetched=True)
    history = train(Network(), batches, validation=Regression(n_steps=1, seed=1, fetched=True), **stops)
    assert list(history["validation_loss"].index) == [5, 10, 15, 20]
    assert len(batches.begun) <= 21
    assert threads() == []
