"""A program of two processes that fit an ST, and note where the rows that they learn from lie in memory."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import anndata as ad
import torch
from torch import Tensor

import virtualcell as vc
from virtualcell.models._set_batches import SetBatches

PACKED: list[str] = []


def mapped_from(tensor: Tensor) -> tuple[str, str]:
    """Return inode and path of what the memory of a tensor is mapped from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return inode, "".join(path)
    raise AssertionError


def noted(batches: SetBatches, i: int, rank: int, world_size: int, device: torch.device) -> dict[str, Tensor]:
    rows = batches.source.rows
    lies = {name: mapped_from(getattr(rows, name)) for name in ("genes", "values")}
    if world_size > 1:  # and not what each process does by itself at the end
        Path(f"rank_{rank}.json").write_text(json.dumps({**lies, "pid": os.getpid(), "packed": PACKED}))
    return real(batches, i, rank, world_size, device)


# also in processes that are spawned, which import this file
real, SetBatches.step = SetBatches.step, noted


def main(data: str, strategy: str) -> None:
    vc.settings.cache_dir, vc.settings.progress = "cache", False
    logger = logging.getLogger("virtualcell.data._packed")
    logger.setLevel("INFO")
    logger.addFilter(lambda record: PACKED.append(record.getMessage()))
    vc.tl.fit_state(
        ad.read_h5ad(data, backed="r" if strategy == "ddp" else None),
        perturbation_key="perturbation",
        control="NT",
        n_top_genes=None,
        se=False,
        validate=False,
        network={"n_hidden": 8, "n_feedforward": 8, "n_layers": 1, "set_size": 8, "n_networks": 1},
        training={"devices": 2, "strategy": strategy, "accelerator": "cpu", "max_steps": 2, "batch_size": 2},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
