"""What each path costs per cell: bytes, floating-point operations, and hours from the rates that were measured.

    python benchmarks/cost_model.py --json benchmarks/results/cost_model.json --page docs/scale.md

Operations are counted by PyTorch (`torch.utils.flop_counter`) on the networks themselves. Rates come from the results
of other benchmarks beside: `gpu.json` (one H200), `atlas.json` and `predict_stream.json` (two CPU cores).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from tables import header, row
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from virtualcell.models._se_options import SIZES as SE_SIZES
from virtualcell.models._st_options import SIZES as ST_SIZES
from virtualcell.modules import SEConfig, SENetwork, STConfig, STNetwork
from virtualcell.modules._losses import st_loss

RESULTS = Path(__file__).parent / "results"
GENES, EXPRESSED, MODELLED, OF_MODELLED = 20_000, 2_500, 2_000, 400  # of an atlas, and of the model's genes
PASSES = 20  # of a default fit below 20,000 steps; above, as many cells as these steps show
SHOWN = 20_000 * 64 * 64  # at most by a default fit on a GPU: steps x sets x cells
SIZES = (10**5, 10**6, 10**8)
# of a parameter that a process has: weight, gradient, two moments of AdamW, and the weight of the last look at losses
OWNED, PUT_TOGETHER = 4 * (1 + 1 + 2 + 1), 4 * (1 + 1)  # and of one that is put together: weight and gradient
GPUS = (1, 2, 4, 8)


def flops(function: Callable[[], object]) -> int:
    # attention as plain products, which the counter knows
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def of_st(size: str, set_size: int = 64, n_sets: int = 2) -> dict[str, int]:
    """Operations per cell of a training step, forward and backward, and of a prediction."""
    config = STConfig(MODELLED, MODELLED, 100, head="both", **ST_SIZES[size])
    network = STNetwork(config)
    cells = torch.rand(2, n_sets, set_size, MODELLED)
    batch = {"control": cells[0], "perturbed": cells[1], "perturbation": torch.eye(100)[:n_sets]}

    def step() -> None:
        st_loss(network, batch, mean_weight=1.0)["loss"].backward()

    n = n_sets * set_size
    with torch.no_grad():
        forward = flops(lambda: network(batch["control"], batch["perturbation"]))
    return {"training": flops(step) // n, "forward": forward // n, "parameters": n_parameters(network)}


def of_se(size: str, n_cells: int = 2) -> dict[str, int]:
    """Operations per cell of an embedding: everything behind the encoding of genes, which happens once."""
    options = {k: v for k, v in SE_SIZES[size].items() if k not in ("length", "n_targets")}
    network, length = SENetwork(SEConfig(n_token=256, **options)).eval(), SE_SIZES[size]["length"]
    tokens, expression = torch.randint(100, (n_cells, length)), torch.rand(n_cells, length)
    with torch.no_grad():
        genes = network.encode_genes(torch.randn(100, 256))
        found = flops(lambda: network(genes, tokens, expression)) // n_cells
    return {"forward": found, "parameters": n_parameters(network), "length": length}


def n_parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def read(name: str) -> dict:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def amount(number: float, unit: str) -> str:
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:,.3g} h"


def paths() -> list[dict]:
    """One entry a path: what a cell costs, and cells per second where that was measured."""
    gpu, atlas, stream = read("gpu.json"), read("atlas.json"), read("predict_stream.json")
    st, se = {s: of_st(s) for s in ("small", "large")}, {s: of_se(s) for s in ("small", "medium", "large")}
    on_disk = [run for size in atlas.get("sizes", ()) for run in size["runs"] if run["source"] == "disk"]
    most = max(on_disk, key=lambda run: run["cells"], default=None)
    packed = 8 + OF_MODELLED * (2 + 4)
    found = [
        {
            "path": "copy cells, short fit of a small ST, tiny SE",
            "bytes": EXPRESSED * 8 + EXPRESSED * 4 + packed,  # read, copied, packed
            "cpu": most and most["cells"] / most["seconds"],
            "core": "one busy core",
        },
    ]
    for size in ("small", "large"):
        rate = gpu.get(f"train_{size}", {}).get("fit_state", {}).get("cells_per_second")
        found.append({"path": f"train ST, {size}", "bytes": 2 * packed, "flops": st[size]["training"], "gpu": rate})
    for size in ("small", "medium", "large"):
        embedded = gpu.get(f"embed_{size}", {})
        rate = embedded.get("whole_cells_per_second", embedded.get("cells_per_second"))
        flops_of = se[size]["forward"]
        found.append({"path": f"embed with SE, {size}", "bytes": EXPRESSED * 8, "flops": flops_of, "gpu": rate})
    zarr = stream.get(".zarr", {})
    found.append(
        {
            "path": "predict cells to disk, ST small",
            "bytes": 2 * OF_MODELLED * 8,
            "flops": st["small"]["forward"],
            "cpu": zarr["cells"] / zarr["seconds"] if zarr else None,
        }
    )
    return found


def table(found: list[dict]) -> str:
    """Table of the page: of trainings, a cell that is shown counts, and so it says for how many."""
    columns = ["path", "bytes per cell", "operations per cell", "cells per second"]
    lines = [header([*columns, *(f"10^{len(str(n)) - 1} cells" for n in SIZES)])]
    for one in found:
        for device, name in (("cpu", "2 CPU cores"), ("gpu", "one H200")):
            if not one.get(device):
                continue
            rate = one[device]
            shown = [max(min(PASSES * n, SHOWN), n) if "train" in one["path"] else n for n in SIZES]
            cells = [
                one["path"],
                amount(one["bytes"], "B"),
                amount(one.get("flops", 0), "FLOP") if "flops" in one else "",
            ]
            lines.append(row([*cells, f"{rate:,.0f} ({one.get('core', name)})", *(duration(n / rate) for n in shown)]))
    return "\n".join(lines)


def of_sharded() -> dict[str, object]:
    """Bytes a GPU that training an SE of SE-600M's size takes, when its states are divided, but for activations."""
    options = {k: v for k, v in SE_SIZES["large"].items() if k not in ("length", "n_targets")}
    with torch.device("meta"):
        network = SENetwork(SEConfig(n_token=5120, **options))
    layers = network.transformer_encoder.layers
    whole = n_parameters(network)
    # the root, and the layer that computes and the next one
    together = whole - n_parameters(layers) + 2 * n_parameters(layers[0])
    bytes_of = {n: OWNED * whole // n + (PUT_TOGETHER * together if n > 1 else 0) for n in GPUS}
    return {"parameters": whole, "bytes per GPU": bytes_of}


def sharded_table(found: dict) -> str:
    columns = [f"{n} GPU{'s' if n > 1 else ''}" for n in found["bytes per GPU"]]
    sizes = [amount(n, "B") for n in found["bytes per GPU"].values()]
    return "\n".join([header(["", *columns]), row([f"{found['parameters'] / 1e6:.0f} M parameters", *sizes])])


def put(page: Path, place: str, text: str) -> None:
    """Write a table behind its mark."""
    mark = re.compile(rf"^<!-- {place} -->\n(?:.+\n)*", flags=re.M)
    page.write_text(mark.sub(lambda _: f"<!-- {place} -->\n{text}\n", page.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = paths()
    divided = of_sharded()
    print(table(found), sharded_table(divided), sep="\n\n")
    if args.json:
        assumed = {"genes": GENES, "expressed": EXPRESSED, "modelled": MODELLED, "expressed_of_modelled": OF_MODELLED}
        result = {"assumed": assumed, "paths": found, "training SE, large, divided": divided}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.page:
        put(args.page, "cost model", table(found))
        put(args.page, "divided", sharded_table(divided))


if __name__ == "__main__":
    main()
