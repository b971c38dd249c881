"""SE and ST on a GPU: agreement with float32 on the CPU, cells per second and peak memory, in float32 and bfloat16.

python benchmarks/gpu.py [--device cuda] [--json PATH]

Needs torch and this checkout, nothing else; ends at once where there is no GPU. `--device cpu` runs tiny sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from virtualcell.modules import SEConfig, SENetwork, STConfig, STNetwork, set_loss

SECONDS = 1.5  # of repeats of each measurement
TOLERANCE = 1e-3  # of float32 on the device, as a share of the largest value of the CPU


class Case(NamedTuple):
    """A network to build, a batch, and what to compute from both."""

    network: Callable[[], nn.Module]
    batch: dict[str, Tensor]
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    n_cells: int


def st(n_sets: int, *, set_size: int, n_genes: int, n_perturbation: int, **sizes: int) -> Case:
    config = STConfig(n_input=n_genes, n_output=n_genes, n_perturbation=n_perturbation, **sizes)

    def network() -> nn.Module:
        built = STNetwork(config)
        nn.init.normal_(built.project_out[-1].weight, std=0.05)  # it starts at zero, which would hide differences
        return built

    def forward(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return network(batch["control"], batch["perturbation"], batch["batch"]).heads[0]

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return set_loss(forward(network, batch), batch["target"], mean_weight=1.0).mean()

    batch = {
        "control": (5 * torch.rand(n_sets, set_size, n_genes) - 4).clamp_min(0),
        "target": (5 * torch.rand(n_sets, set_size, n_genes) - 4).clamp_min(0),
        "perturbation": torch.eye(n_perturbation)[torch.randint(n_perturbation, (n_sets,))],
        "batch": torch.randint(max(config.n_batches, 1), (n_sets,)),
    }
    return Case(network, batch, forward, loss, n_sets * set_size)


def se(n_cells: int, *, length: int, n_genes: int, n_targets: int, **sizes: int) -> Case:
    config = SEConfig(**sizes)

    def forward(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = network(network.encode_genes(batch["table"]), batch["tokens"], batch["expression"])
        return torch.cat([out.cell, out.dataset], dim=1)

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        cell, dataset = forward(network, batch).split([config.n_output, config.n_dataset], dim=1)
        codes, depth = network.encoder(batch["table"]), batch["targets"].mean(dim=1)
        decoded = network.decode_codes(codes, batch["target_tokens"], cell, dataset, depth)
        return torch.linalg.vector_norm((decoded - batch["targets"]).float(), dim=1).mean()

    batch = {
        "table": torch.randn(n_genes, config.n_token),
        "tokens": torch.rand(n_cells, n_genes).argsort(dim=1)[:, :length],
        "expression": torch.rand(n_cells, length).sort(descending=True).values * 200 / length,
        "target_tokens": torch.randint(n_genes, (n_cells, n_targets)),
        "targets": (5 * torch.rand(n_cells, n_targets) - 2).clamp_min(0),
    }
    return Case(lambda: SENetwork(config), batch, forward, loss, n_cells)


# Case, sets (ST) or cells (SE) to time, sizes, and what is smaller where the CPU has to follow.
SCREEN = {"n_genes": 2000, "n_perturbation": 100}
PROTEOME = {"n_genes": 19790, "n_targets": 640}
MEDIUM = {"n_hidden": 256, "n_layers": 4, "n_heads": 8}
PAPER_ST = {"n_hidden": 328, "n_layers": 8, "n_heads": 12, "head_dim": 64, "n_feedforward": 3072, "n_batches": 56}
PAPER_ST |= {"n_encoder_layers": 4, "n_decoder_layers": 4, "n_genes": 2000, "n_perturbation": 2024, "set_size": 64}
PAPER_SE = {"n_token": 5120, "n_hidden": 2048, "n_layers": 16, "n_heads": 16, "n_feedforward": 2048, "n_output": 2048}
FEW_GENES = {"length": 127, "n_genes": 500, "n_targets": 64}
CASES = {
    "ST small": (st, 16, {**SCREEN, "set_size": 32}, {}),
    "ST medium": (st, 16, {**SCREEN, **MEDIUM, "set_size": 64, "n_feedforward": 768}, {}),
    "ST large (328 x 8)": (st, 16, PAPER_ST, {}),
    "SE small": (se, 256, {**PROTEOME, "n_token": 256, "n_hidden": 64, "length": 128}, FEW_GENES),
    "SE medium": (se, 64, {**PROTEOME, **MEDIUM, "n_token": 1280, "n_feedforward": 512, "length": 512}, FEW_GENES),
    "SE large (600M)": (se, 8, {**PROTEOME, **PAPER_SE, "n_targets": 1280, "length": 2047}, FEW_GENES),
}
TINY = {
    "ST tiny": (st, 2, {"n_genes": 50, "n_perturbation": 5, "set_size": 8, "n_batches": 2}, {}),
    "SE tiny": (se, 4, {"n_genes": 60, "n_targets": 10, "n_token": 16, "n_hidden": 32, "length": 20}, {"length": 10}),
}


def steps(case: Case, network: nn.Module, device: str, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Two functions: "forward" gives the output, "train" makes a step of training and gives its loss."""
    network, batch = network.to(device), {k: v.to(device) for k, v in case.batch.items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    half = torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    @torch.inference_mode()
    def forward() -> Tensor:
        with half:
            return case.forward(network, batch)

    def train() -> Tensor:
        with half:
            loss = case.loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return {"forward": forward, "train": train}


def agreement(case: Case, device: str) -> dict:
    """Compare with float32 on the CPU, without dropout: output, and losses of three training steps."""
    network = case.network().eval()

    def results(device: str, precision: str) -> tuple[Tensor, Tensor]:
        run = steps(case, copy.deepcopy(network), device, precision)
        return run["forward"]().float().cpu(), torch.stack([run["train"]() for _ in range(3)]).float().cpu()

    out, losses = results("cpu", "float32")
    found = {"largest_output": out.abs().max().item(), "losses": losses.tolist()}
    for precision in ("float32", "bfloat16"):
        theirs = results(device, precision)
        found[f"{precision}_output_difference"] = (theirs[0] - out).abs().max().item()
        found[f"{precision}_loss_difference"] = (theirs[1] - losses).abs().max().item()
    found["agrees"] = found["float32_output_difference"] <= TOLERANCE * found["largest_output"]
    return found


def speed(case: Case, device: str, precision: str, step: str) -> dict:
    """Cells per second and peak memory, after two steps to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        network = case.network().train(step == "train")
    run = steps(case, network, device, precision)[step]
    run(), run(), wait()
    start, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - start < SECONDS:
        run(), wait()
        n += 1
    found = {"cells_per_second": round(n * case.n_cells / (time.perf_counter() - start), 1)}
    if device == "cuda":
        found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    device, path = vars(parser.parse_args()).values()
    if device == "cuda" and not torch.cuda.is_available():
        print("No CUDA GPU here: nothing to measure.")
        return
    begin, name = time.perf_counter(), torch.cuda.get_device_name() if device == "cuda" else "cpu"
    result = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "agreement": {}, "speed": {}}
    for title, (kind, n, sizes, smaller) in (CASES if device == "cuda" else TINY).items():
        torch.manual_seed(1)
        found = result["agreement"][title] = agreement(kind(2, **{**sizes, **smaller}), device)
        print(title, *(f"{k} {v:.2g}" for k, v in found.items() if "difference" in k), sep="  ")
        case, result["speed"][title] = kind(n, **sizes), {}
        for precision in ("float32", "bfloat16"):
            for step in ("forward", "train"):
                try:
                    found = speed(case, device, precision, step)
                except torch.OutOfMemoryError:
                    found = {"error": "out of memory"}
                result["speed"][title][f"{step} {precision}"] = found
                print(f"  {step} {precision}", *(f"{k} {v}" for k, v in found.items()), sep="  ")
    result["seconds"] = round(time.perf_counter() - begin, 1)
    print(f"{result['seconds']} s on {name}")
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    if wrong := [title for title, found in result["agreement"].items() if not found["agrees"]]:
        sys.exit(f"float32 on {name} differs from the CPU: {wrong}")


if __name__ == "__main__":
    main()
