from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from virtualcell.modules import STConfig, STNetwork, st_loss
from virtualcell.train import TrainOptions, _plan, fit
from virtualcell.train._step import WARM_UP, Step, Waits

sys.path.insert(0, str(Path(__file__).parent))
from regression import Network, Regression, square_loss

sys.path.pop(0)

CPU = torch.device("cpu")


def make_step(network: nn.Module, loss: object, **given: object) -> Step:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    return Step(network, loss, optimizer, **{"clip": 1.0, "name": "ST", **given})


def st_batch(n_sets: int = 3, n_genes: int = 20) -> dict[str, Tensor]:
    def cells() -> Tensor:
        return (3 * torch.rand(n_sets, 8, n_genes) - 2).clamp_min(0)

    vectors = torch.eye(4)[torch.arange(n_sets) % 4]
    batch = {"control": cells(), "perturbed": cells(), "perturbation": vectors, "base": torch.rand(n_sets, n_genes)}
    return {**batch, "batch": torch.zeros(n_sets, 8, dtype=torch.long)}


def st_network() -> STNetwork:
    return STNetwork(STConfig(20, 20, 4, n_hidden=16, n_feedforward=16, head="both", n_batches=2, dropout=0.0))


def st_step(batch_of: object, kind: str = "energy") -> Step:
    torch.manual_seed(0)

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return st_loss(network, batch, kind=kind, mean_weight=1.0, contrast_weight=0.3)

    step = make_step(st_network(), loss)
    for _ in range(WARM_UP + 3):
        step(batch_of())
    return step


def test_a_training_of_st_can_be_recorded_whatever_its_precision() -> None:
    """It asks for no value on the way: on a GPU, no step waits."""
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            step = st_step(st_batch)
        assert step.can_record
        assert step.is_recorded


def test_what_waits_for_values_is_not_recorded_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="virtualcell"):
        step = st_step(st_batch, kind="sinkhorn")
    assert not step.can_record
    assert not step.is_recorded
    assert caplog.text.count("ST: steps are launched operation by operation") == 1
    assert "_local_scalar_dense" in caplog.text


def test_operations_that_cannot_be_recorded_are_noticed() -> None:
    x = torch.arange(4.0)
    for operation in (lambda: x.sum().item(), lambda: x.unique(), lambda: x[x > 1], lambda: x.nonzero()):
        with Waits(CPU) as waits:
            operation()
        assert waits.names
    with Waits(CPU) as waits:
        x[torch.tensor([1, 2])] * 2 + x.sum()
    assert not waits.names
    with Waits(torch.device("meta")) as waits:  # the batch is elsewhere
        x + 1
    assert waits.names


def test_batches_of_several_shapes_are_not_recorded_before_they_are_alike() -> None:
    sizes = iter([3, 4] * 20)
    step = st_step(lambda: st_batch(next(sizes)))
    assert step.can_record
    assert not step.is_recorded


def test_recorded_and_ordinary_steps_are_the_same_as_a_plain_loop() -> None:
    """Also where a batch of another shape comes in between."""
    torch.manual_seed(1)
    network = st_network()
    plain = copy.deepcopy(network)
    batches = [st_batch(5 if i == 7 else 3) for i in range(12)]
    step, losses = make_step(network, st_loss, clip=0.5), []
    for i, batch in enumerate(batches):
        found, norm = step(batch)
        losses.append((found["loss"].item(), norm.item()))
        assert step.is_recorded == (i >= WARM_UP)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for batch, (loss, norm) in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        expected = st_loss(plain, batch)["loss"]
        expected.backward()
        assert norm == nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item()
        assert loss == expected.item()
        optimizer.step()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def options(**given: object) -> TrainOptions:
    shared = {"max_steps": 40, "lr": 0.05, "batch_size": 8, "accelerator": "cpu", "progress_bar": False}
    return TrainOptions.from_({**shared, **given})


@pytest.mark.parametrize("given", [{}, {"precision": "bf16-mixed"}, {"gradient_clip": 0.01, "validate_every": 7}])
def test_a_training_of_recorded_steps_is_that_of_lightning(monkeypatch: pytest.MonkeyPatch, given: dict) -> None:
    results = []
    for devices in (("cuda",), ("cuda", "cpu")):
        monkeypatch.setattr(_plan, "RECORDED_ON", devices)
        network = Network()
        history = fit(network, square_loss, Regression(), options(**given), validation=Regression(n_steps=2, seed=1))
        results.append((network, history))
    (network, history), (recorded, same) = results
    for ours, theirs in zip(network.parameters(), recorded.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert set(history) == set(same)
    for name, table in history.items():
        assert table.index.equals(same[name].index)
        torch.testing.assert_close(*(torch.tensor(h[name].to_numpy()) for h in (history, same)), rtol=1e-5, atol=1e-6)


def test_recorded_steps_stop_where_a_loss_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "RECORDED_ON", ("cuda", "cpu"))
    network = Network()
    with pytest.raises(FloatingPointError, match="not finite in step 24 of 40"):
        fit(network, square_loss, Regression(bad=23), options())
    assert all(torch.isfinite(p).all() for p in network.parameters())
