"""A program of one or two processes that trains a network of transformer layers, and notes what each ends with."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from regression import Regression
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from virtualcell.modules._transformer import LlamaLayer, PostNormLayer
from virtualcell.train import TrainOptions, fit

N_STEPS = 24
DIVIDED: set[bool] = set()  # whether the weights of a layer were, while another part computed


class Network(nn.Module):
    """Layers of both kinds, a part that is frozen, one that no step uses, and no `forward`, as losses call others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.unused = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(1, 8))
        self.first, self.last, self.frozen = nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 8)
        self.layers = nn.ModuleList([LlamaLayer(8, 2, 4, 5), LlamaLayer(8, 2, 4, 5), PostNormLayer(8, 2, 7, 0.0)])
        self.frozen.requires_grad_(False)
        self.layers[2].qkv_proj.bias.requires_grad_(False)  # that of keys has no effect: rounding alone moves it

    def predict(self, x: Tensor) -> Tensor:  # (B, 3) -> (B, 1)
        DIVIDED.add(isinstance(self.layers[0].mlp.up_proj.weight, DTensor))
        x = torch.stack([self.first(x), self.token.expand(len(x), -1)], dim=1)
        x = self.layers[1](self.layers[0](x))
        x, _ = self.layers[2](x, x)
        return self.last(self.frozen(x[:, 0]))


class Batches(Regression):
    """Batches of which one may end a process."""

    ends = -1

    def step(self, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
        if i == self.ends and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(i, rank, world_size, device)


def loss(network: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": (network.predict(batch["x"]) - batch["y"]).square().mean()}


def train(n: int, strategy: str, *, ends: int = -1, bad: int | None = None, **given: object) -> dict[str, object]:
    """Return history, weights, and what went wrong, as this process has them."""
    options = TrainOptions.from_(
        {"strategy": strategy if n > 1 else "auto", "devices": n, **given},
        max_steps=N_STEPS,
        lr=0.02,
        batch_size=8,
        gradient_clip=1.0,
        validate_every=4,
        accelerator="cpu",
        progress_bar=False,
    )
    DIVIDED.clear()
    batches, network, error = Batches(bad=bad), Network(), ""
    batches.ends, before, history = ends, network.unused.tolist(), {}
    if os.environ.get("LOCAL_RANK", "0") != "0" and "checkpoint_dir" not in given:
        with torch.no_grad():  # what it starts from is told by the first process
            network.first.weight.zero_()
    try:
        history = fit(network, loss, batches, options, validation=Regression(size=7, n_steps=2, seed=1))
    except FloatingPointError as e:
        error = str(e)
    return {
        "history": {name: table[name].tolist() for name, table in history.items()},
        "weights": {name: tensor.tolist() for name, tensor in network.state_dict().items()},
        "unused_is_left_alone": before == network.unused.tolist(),
        "layers_are_divided": all(DIVIDED),
        "is_plain": not any(isinstance(p, DTensor) for p in network.parameters())
        and type(network.layers[0]) is LlamaLayer
        and not network.training,
        "error": error,
    }


def main(out: str, n: str, strategy: str, trainings: str) -> None:
    file, found = Path(out, f"found_{os.environ.get('LOCAL_RANK', '0')}.json"), []
    for given in json.loads(trainings):
        found.append(train(int(n), strategy, **given))
        file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
