"""Cells per second of `virtualcell.data._sentences.sentences` on one core, beside one argsort per cell.

python benchmarks/cell_sentences.py [--json]
"""

from __future__ import annotations

import os

# One thread; before numpy is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import sparse

from virtualcell.data._sentences import sentences

RESULT = Path(__file__).parent / "results" / "cell_sentences.json"


def naive(matrix: sparse.csr_matrix, tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort the dense row of each cell on its own."""
    out_tokens = np.full((matrix.shape[0], length), -1, dtype=np.int32)
    out_values = np.zeros((matrix.shape[0], length), dtype=np.float32)
    columns = np.argsort(tokens, kind="stable")
    columns = columns[tokens[columns] >= 0]
    for i in range(matrix.shape[0]):
        row = matrix[i].toarray().ravel()[columns]
        order = np.argsort(-row, kind="stable")[:length]
        order = order[row[order] > 0]
        out_tokens[i, : len(order)] = tokens[columns[order]]
        out_values[i, : len(order)] = row[order]
    return out_tokens, out_values


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    matrix = sparse.random(
        arguments.cells, arguments.genes, density=arguments.density, format="csr", dtype=np.float32, random_state=0
    )
    matrix.data = rng.geometric(0.4, matrix.nnz).astype(np.float32)  # many ties, as raw counts have
    tokens = rng.permutation(arguments.genes).astype(np.int32)
    tokens[rng.random(arguments.genes) < 0.05] = -1  # genes without an embedding

    few = matrix[: max(1, arguments.cells // 20)]
    for ours, theirs in zip(
        sentences(few, tokens, arguments.length), naive(few, tokens, arguments.length), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    ours = arguments.cells / best_seconds(lambda: sentences(matrix, tokens, arguments.length), repeats=5)
    loop = few.shape[0] / best_seconds(lambda: naive(few, tokens, arguments.length), repeats=3)
    result = {
        "cells": arguments.cells,
        "genes": arguments.genes,
        "density": arguments.density,
        "length": arguments.length,
        "threads": 1,
        "cells_per_second": round(ours),
        "naive_cells_per_second": round(loop),
        "ratio": round(ours / loop, 1),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    print(f"sentences: {ours:,.0f} cells/s   one argsort per cell: {loop:,.0f} cells/s   ratio {ours / loop:.1f}")
    if arguments.json:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
