"""A program of two processes: a training that a signal to one of them ends, and that goes on, beside one in one go."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pandas as pd
import torch
from regression import Network, Regression, square_loss
from torch import Tensor, nn

from virtualcell.train import TrainOptions, fit


class Ended(Regression):
    """Batches of which one ends the second process."""

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        if i == 23 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(i, rank, world_size, device)


def noisy_loss(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return square_loss(network, {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])})


def train(batches: Regression, **given: object) -> tuple[Network, dict[str, pd.DataFrame]]:
    common = {"max_steps": 50, "lr": 0.05, "batch_size": 8, "validate_every": 9, "progress_bar": False}
    options = TrainOptions.from_({**common, "accelerator": "cpu", "devices": 2, "strategy": "ddp", **given})
    network = Network(dropout=0.3)
    history = fit(network, noisy_loss, batches, options, validation=Regression(n_steps=2, seed=1))
    return network, history


def main(folder: str, part: str) -> None:
    whole, history = train(Regression())
    if part == "ended":
        train(Ended(), checkpoint_dir=folder)
    network, again = train(Regression(), checkpoint_dir=folder, resume=True)
    rank = torch.distributed.get_rank()
    found = {
        "weights": torch.equal(network.line.weight, whole.line.weight),
        "history": all(history[name].equals(again[name]) for name in history),
    }
    Path(folder, f"found_{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
