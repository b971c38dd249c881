"""A regression with a known answer, as numbered batches; and a program that fits it with any number of processes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from virtualcell.train import TrainOptions, fit

WEIGHT = torch.tensor([[1.0, -2.0, 0.5]])


@dataclass
class Regression:
    """`y = x @ WEIGHT.T` in batches of `size` that follow from their number; batch `bad` has a missing value.

    They are put together ahead where they are `fetched`.
    """

    size: int = 8
    n_steps: int | None = None
    seed: int = 0
    bad: int | None = None
    fetched: bool = False

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 100_000 + i)
        x = torch.randn(self.size, 3, generator=generator)
        y = x @ WEIGHT.T
        if i == self.bad:
            y[-1] = torch.nan  # in the share of the last process
        return {"x": x[rank::world_size].to(device), "y": y[rank::world_size].to(device)}

    def is_fetched(self, device: torch.device) -> bool:
        return self.fetched

    def describe(self, i: int) -> str:
        return f"batch number {i}"


class Network(nn.Module):
    """A line, and a part that no step uses, as models have where a column is not given."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.unused = nn.Linear(3, 1, bias=False), nn.Linear(2, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.dropout(x))


def square_loss(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    error = network(batch["x"]) - batch["y"]
    return {"loss": error.square().mean(), "loss_absolute": error.abs().mean()}


def results(strategy: str, stops: str) -> dict:
    """Return history, weights and error of two trainings; the second, by strategy `stops`, meets a missing value."""
    options = TrainOptions(
        max_steps=25,
        lr=0.1,
        batch_size=8,
        validate_every=1,
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        progress_bar=False,
    )
    network = Network()
    unused = network.unused.weight.detach().clone()
    validation = Regression(size=7, n_steps=2, seed=1)  # shares of four and three
    history = fit(network, square_loss, Regression(), options, validation=validation)
    broken, error = Network(), ""
    try:
        fit(broken, square_loss, Regression(bad=22), replace(options, strategy=stops, validate_every=20))
    except FloatingPointError as e:
        error = str(e)
    return {
        "history": {name: table[name].tolist() for name, table in history.items()},
        "weights": network.line.weight.detach().tolist(),
        "unused_is_left_alone": torch.equal(unused, network.unused.weight),
        "broken_weights": broken.line.weight.detach().tolist(),
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(results(*sys.argv[1:])))  # noqa: T201
